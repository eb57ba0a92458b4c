"""Tiny runs in this process and in others."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image

from common import cli

ROOT = Path(__file__).parent.parent
SCRIPTS = (
    "cmo.py",
    "ride.py",
    "bbn.py",
    "csa.py",
    "decoupled_crt.py",
    "balanced_meta_softmax.py",
    "meta_weights.py",
    "bag_of_tricks.py",
    "class_rectification.py",
    "equalization_loss.py",
)
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
        flag = cli.flag(name)
        if value is True:
            line.append(flag)
        elif value is False:
            line.append("--no-" + flag[2:])
        elif value is not None:
            line += [flag, *map(str, value if isinstance(value, tuple) else (value,))]
    return line


def parse(script, *line, **options):
    """Args of a command line."""
    module = importlib.import_module(script.removesuffix(".py"))
    return cli.parse(module.Args, module.RECIPES, module.__doc__, [*line, *words(options)])


def run_here(script, **options):
    """The result of a script's main in this process: the same run as `launch` makes, without its start."""
    return importlib.import_module(script.removesuffix(".py")).main(parse(script, **options))


def command(script, processes=1, **options):
    start = [sys.executable]
    if processes > 1:
        # -- because torchrun takes --r and --start for its own
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "--"]
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


def state_of(folder, name="model"):
    """What the checkpoint in `folder` holds of the model, the optimizer, ..."""
    return torch.load(folder / "checkpoint.pt", weights_only=True)["state"][name]


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
    data = dict(dataset="image_folder", data_dir=str(tmp_path / "data"), image_size=72)
    return dict(**data, arch="resnet10", batch_size=16, augment="jitter", lr_steps=())


@pytest.fixture
def jpeg_lists(tmp_path, jpegs):
    """The same as list files, train.txt and test.txt, and dev.txt of two training images of each class."""
    for name, part, count in (("train", "train", 20), ("test", "test", 3), ("dev", "train", 2)):
        lines = [f"{part}/class {k}/{i}.jpg {k}" for k in range(3) for i in range(count)]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    lists = {f"{name}_list": str(tmp_path / f"{name}.txt") for name in ("train", "test")}
    return {**jpegs, "dataset": "image_list", **lists}


def refusal(call, *args, **options):
    """The one line with which a call is refused."""
    with pytest.raises(cli.Refused) as refused:
        call(*args, **options)
    line = str(refused.value)
    assert "\n" not in line
    return line
