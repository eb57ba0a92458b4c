"""Tiny runs in this process and in others."""

import importlib
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image

from common import cli, datasets

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(path.name for path in ROOT.glob("*.py"))
os.environ["ACCELERATE_USE_CPU"] = "true"  # also of the runs in this process
# A run of seconds on the synthetic set: 1,236 images, 19 steps an epoch.
TINY = dict(epochs=2, batch_size=64, lr=0.05, lr_steps=(1,), warmup=0)


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerate keeps its state in singletons: forget it between two runs of one process."""
    torch.set_num_threads(1)
    yield
    forget()


def forget():
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def words(options):
    """Keyword options as words of a command line."""
    line = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if value is None or isinstance(value, bool):
            line += [flag] if value else []
        else:
            line += [flag, *map(str, value if isinstance(value, tuple) else (value,))]
    return line


def command(script, processes=1, **options):
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [*start, str(ROOT / script), *words(options)]


def environment(**extra):
    return {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", **extra}


def launch(script, processes=1, env=None, cwd=ROOT, **options):
    """Run a script in a process, or several, of its own; the finished subprocess, with its output as text."""
    return subprocess.run(
        command(script, processes, **options),
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment(**(env or {})),
        timeout=300,
    )


def run_here(script, **options):
    """The result of a script's main in this process: the same run as `launch` makes, without its start."""
    module = importlib.import_module(script[:-3])
    options["output_dir"] = str(options["output_dir"])
    return module.main(cli.build(module.Args, module.RECIPES, **options))


def sabotage(folder, code):
    """Environment in which every process of a run, but not its launcher, begins with `code`."""
    head = "import os, sys\nif sys.argv[:1] != ['-m']:\n    from common import runs\n    import torch\n"
    (folder / "sitecustomize.py").write_text(head + textwrap.indent(code, "    "))
    return dict(PYTHONPATH=f"{folder}{os.pathsep}{ROOT}")


def after_step(folder, moment, code, rank=0):
    """Environment in which the process `rank` of a run does `code` in step S of epoch E, "E:S", from 0.

    There `values` are what the step records.
    """
    epoch, step = moment.split(":")
    return sabotage(
        folder,
        "record = runs.Run.record\n"
        "def failing(self, **values):\n"
        f"    now = self.epoch == {epoch} and len(self.recorded.get('loss', [])) == {step}\n"
        f"    if now and os.environ.get('RANK', '0') == '{rank}':\n"
        f"        {code}\n"
        "    record(self, **values)\n"
        "runs.Run.record = failing\n",
    )


def kill_at(folder, moment):
    return after_step(folder, moment, "os.kill(os.getpid(), 9)")


def result_of(done):
    """The one JSON line on a script's stdout."""
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    return json.loads(line)


def close(actual, expected, tolerance=1e-4):
    torch.testing.assert_close(
        torch.as_tensor(actual, dtype=torch.float64),
        torch.as_tensor(expected, dtype=torch.float64),
        rtol=0,
        atol=tolerance,
    )


def lines_of(folder):
    """The log of the run in `folder`, one dict per epoch."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


def state_of(folder, epoch, of="model"):
    """What the checkpoint of the 0-based `epoch` holds of the model, the optimizer, ..."""
    file = folder / "checkpoint" / f"epoch_{epoch:04d}.pt"
    return torch.load(file, weights_only=True)["state"][of]


def synthetic_objects(train_set):
    """bool [N, H, W] of the synthetic training images: the object, which is what no context changes."""
    labels, counts = train_set.labels, train_set.class_counts
    ranks = torch.cat([torch.arange(n) for n in counts])
    contexts = (labels + ranks % (counts // 10).clamp(1, 10)[labels]) % 10
    drawn, moved = (datasets.draw_synthetic(labels, (contexts + k) % 10, seed=0) for k in (0, 5))
    assert drawn.equal(train_set.crops[torch.arange(len(labels)), 2, 2])
    return (drawn == moved).all(1)


def refusal(call, capsys):
    """What `call` says, one line on stderr, before it exits with code 2."""
    with pytest.raises(SystemExit) as stop:
        call()
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("note: ")]
    return line


@pytest.fixture
def jpegs(tmp_path):
    """Options of a run on an image folder of 3 classes, for files decoded by worker processes."""
    generator = np.random.RandomState(0)
    for part, count in (("train", 20), ("test", 3)):
        for k in range(3):
            folder = tmp_path / "data" / part / f"class {k}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = generator.randint(0, 256, (70 + i, 90, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.jpg")
    data = dict(dataset="image_folder", data_dir=str(tmp_path / "data"), imbalance=None, image_size=72)
    return dict(**data, arch="resnet10", batch_size=16, color_jitter=0.4, lr_steps=())


@pytest.fixture
def jpeg_lists(tmp_path, jpegs):
    """The same as list files, train.txt and test.txt, and dev.txt of two training images of each class."""
    for name, part, count in (("train", "train", 20), ("test", "test", 3), ("dev", "train", 2)):
        lines = [f"{part}/class {k}/{i}.jpg {k}" for k in range(3) for i in range(count)]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    lists = {f"{name}_list": str(tmp_path / f"{name}.txt") for name in ("train", "test")}
    return {**jpegs, "dataset": "image_list", **lists}
