"""What holds for every script: help, several processes, resuming after a kill, precision, compilation."""

import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import time

import pytest
import torch

from common import cli
from tests.conftest import (
    ROOT,
    SCRIPTS,
    TINY,
    command,
    environment,
    forget,
    kill_at,
    launch,
    refusal,
    result_of,
    run_here,
    sabotage,
    state_of,
)

README = (ROOT / "README.md").read_text()
COMMANDS = sorted(
    set(re.findall(r"^ *(?:accelerate launch|python)(?: .*)? ([a-z_]+\.py\b.*)$", README, re.M))
)
# No BatchNorm, whose statistics are each process's own, and a rate that does not amplify rounding.
EXACT = dict(arch="lenet", epochs=3, lr=0.005)
# Options that make each script use all of its method within three epochs.
METHOD = {
    "bag_of_tricks.py": dict(
        epochs=1, lr_steps=(), stage2_epochs=1, stage2_lr_steps=(), stage3_epochs=1, generate="image-trans"
    ),
    "balanced_meta_softmax.py": dict(lr_steps=(), stage2_epochs=2, stage2_lr=0.02, meta_batch_size=40),
    "bbn.py": dict(),
    "class_rectification.py": dict(crl_epoch=1, level="instance", kappa=5),
    "cmo.py": dict(
        mix_start=-1,
        mix_end=0,
        p_mix=0.7,
        drw=True,
        drw_epoch=1,
        loss="bs",
        las=True,
        las_epochs=1,
        las_batch_size=30,
        las_lr=0.02,
    ),
    "csa.py": dict(start_aug=1, delta=0.0),
    "decoupled_crt.py": dict(sampling="square-root", stage2_epochs=2, stage2_lr=0.02),
    "equalization_loss.py": dict(loss="softmax_eql"),
    "meta_weights.py": dict(pretrain_epochs=1, dev_per_class=5, freeze_backbone=False, dev_batch_size=30),
}
# Options that take away what each process does on its own share of a batch.
ALIKE = {
    "bag_of_tricks.py": dict(mixup="none", reweight="cost"),  # partners come from a process's own share
    "csa.py": dict(lam_max=0.0),  # blends contexts of its own bank
}
# Options that take away what amplifies the rounding of single precision.
CALM = {
    "class_rectification.py": dict(lr=0.001),  # the directions of 2-dimensional features turn fast
    "cmo.py": dict(las_lr=0.005),
    "equalization_loss.py": dict(epochs=1, lr_steps=(), lr=0.002),  # its gradients come back as a prior
}
# Double precision throughout.
DOUBLE = "torch.set_default_dtype(torch.float64)\ntorch.Tensor.float = torch.Tensor.double\n"

# What is the same in every script, and long, is tested with one; with the others by `make test-slow`.
FIRST = [pytest.param(script, marks=[pytest.mark.slow] * (script != "cmo.py")) for script in SCRIPTS]


def options(script, folder, **more):
    return {**TINY, **METHOD[script], "output_dir": folder, **more}


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").open()]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_is_covered(script):
    assert script in METHOD
    assert (ROOT / "tests" / f"test_{script}").exists()
    head = (ROOT / script).read_text()[:4000]
    assert all(f"{field}:" in head for field in ("Paper", "Method", "Differs", "Expected", "Run"))


def parse(script, *words):
    module = importlib.import_module(script[:-3])
    return cli.parse(module.Args, module.RECIPES, module.__doc__, words)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(script, "--help")
    done = capsys.readouterr()
    assert stop.value.code == 0 and done.err == ""
    for word in ("Paper:", "Method:", "Run:", "--dataset", "--data-dir", "--resume", "--seed"):
        assert word in done.out


@pytest.mark.parametrize("script", SCRIPTS)
def test_wrong_options_take_one_line(script, capsys):
    assert refusal(lambda: parse(script, "--dataset", "nothing"), capsys).startswith("--dataset nothing: ")


@pytest.mark.parametrize("script", FIRST)
def test_as_a_command(script):
    done = launch(script, **{"help": True})
    assert done.returncode == 0 and done.stderr == "" and "Paper:" in done.stdout
    done = launch(script, dataset="nothing")
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1


@pytest.fixture
def double(monkeypatch):
    """What DOUBLE does, for a test."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_processes_are_one(script, tmp_path, double):
    """To the rounding of double precision."""
    compare_processes(script, tmp_path, 1e-11, DOUBLE, lr=0.02, epochs=2)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_two_processes_are_one_in_single_precision(script, tmp_path):
    compare_processes(script, tmp_path, 1e-5, "", **CALM.get(script, {}))


def compare_processes(script, tmp_path, tolerance, code, **more):
    """Same batches, same loss and weights to rounding, same evaluation; equal weights in both processes."""
    exact = EXACT | ALIKE.get(script, {}) | more
    env = sabotage(
        tmp_path,
        f"{code}finish = runs.Run.finish\n"
        "def telling(self, **facts):\n"
        "    weights = dict(self.tracked['model'].named_parameters())\n"
        f"    open('{tmp_path}/' + os.environ['RANK'], 'w').write(runs.weights_hash(weights))\n"
        "    return finish(self, **facts)\n"
        "runs.Run.finish = telling\n",
    )
    one = run_here(script, **options(script, tmp_path / "one", **exact))
    two = result_of(launch(script, processes=2, env=env, **options(script, tmp_path / "two", **exact)))
    assert (one["num_processes"], two["num_processes"]) == (1, 2)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=tolerance)
    assert (tmp_path / "0").read_text() == (tmp_path / "1").read_text()
    last = len(losses(tmp_path / "one")) - 1
    first, second = (state_of(tmp_path / name, last) for name in ("one", "two"))
    assert max((first[name] - second[name]).abs().max() for name in first) < tolerance
    ties = 0.0 if code else 0.3  # one may fall otherwise after rounding
    for name in ("all", "many", "medium", "few", "top5"):
        assert two[name] == pytest.approx(one[name], abs=ties)
    assert two["ece"] == pytest.approx(one["ece"], abs=0.1)


@pytest.mark.parametrize("script", SCRIPTS)
def test_dry_run(script, tmp_path, jpegs, capsys):
    """With images from files and worker processes: seconds, and nothing is left."""
    given = {**options(script, tmp_path / "run", **jpegs), "num_workers": 2, "dry_run": True}
    assert run_here(script, **given)["seconds"] > 0
    done = capsys.readouterr()
    assert done.out == "" and done.err.splitlines()[0] == "all 69 images are there"
    assert "drew" not in done.err and "head_b learned nothing" not in done.err
    assert done.err.splitlines()[-1].startswith("--dry-run: the whole run would take about ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", FIRST)
def test_same_command_twice(script, tmp_path):
    given = [options(script, tmp_path / str(i), seed=seed, epochs=2) for i, seed in enumerate((0, 0, 1))]
    first, second, other = (
        result_of(launch(script, **given[0])),
        *(run_here(script, **of) for of in given[1:]),
    )
    assert first["weights_sha256"] == second["weights_sha256"] != other["weights_sha256"]
    assert losses(tmp_path / "0") == losses(tmp_path / "1")


CORRUPT = "train/class 1/3.jpg"


@pytest.mark.parametrize("script", SCRIPTS)
def test_images_from_files(script, tmp_path, jpegs, capsys):
    """The same weights whatever the number of worker processes; a corrupt file is named."""

    def run(name, workers):
        return run_here(script, **options(script, tmp_path / name, **jpegs, num_workers=workers))

    none, two = run("none", 0), run("two", 2)
    assert none["weights_sha256"] == two["weights_sha256"]
    assert none["data_sha256"] == two["data_sha256"] and len(set(none["data_sha256"][:2])) == 2
    (tmp_path / "data" / CORRUPT).write_bytes(b"no image")
    with pytest.raises(SystemExit) as stop:
        run("corrupt", 0)
    last = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and f"{tmp_path}/data/{CORRUPT}: not readable as an image" in last


@pytest.mark.parametrize("script", FIRST)
def test_corrupt_file_in_a_command(script, tmp_path, jpegs):
    (tmp_path / "data" / CORRUPT).write_bytes(b"no image")
    done = launch(script, **options(script, tmp_path / "corrupt", **jpegs))
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    assert f"{tmp_path}/data/{CORRUPT}: not readable as an image" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("script", SCRIPTS)
def test_killed_and_resumed_equals_unbroken(script, tmp_path):
    kill_and_resume(script, 1, tmp_path)


@pytest.mark.parametrize("script", FIRST)
def test_killed_and_resumed_with_two_processes(script, tmp_path):
    kill_and_resume(script, 2, tmp_path)


def kill_and_resume(script, processes, tmp_path):
    """SIGKILL amid the second epoch; the resumed run ends with the unbroken one's weights, bit for bit."""

    def run(**given):
        return run_here(script, **given) if processes == 1 else result_of(launch(script, processes, **given))

    unbroken = run(**options(script, tmp_path / "unbroken", epochs=2))
    broken = options(script, tmp_path / "broken", epochs=2)
    killed = launch(script, processes, env=kill_at(tmp_path, "1:5"), **broken)
    assert killed.returncode != 0 and killed.stdout == ""
    assert len(losses(tmp_path / "broken")) == 1
    resumed = run(**broken, resume="auto")
    assert resumed["num_processes"] == processes
    assert resumed["weights_sha256"] == unbroken["weights_sha256"]
    assert losses(tmp_path / "broken") == losses(tmp_path / "unbroken")


def stopped(script, number, **given):
    """What a run says on stderr that gets a signal after its first epoch, with its children, as by Ctrl-C."""
    how = dict(cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command(script, **given), start_new_session=True, **how)
    while not (given["output_dir"] / "checkpoint" / "epoch_0000.json").exists():
        time.sleep(0.05)
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number and out == "" and "Traceback" not in err
    return err


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
@pytest.mark.parametrize("script", FIRST)
def test_stopped_by_a_signal(script, number, tmp_path):
    """One line, and a resumed run that ends with the unbroken one's weights."""
    long = options(script, tmp_path / "run", epochs=3)
    said = stopped(script, number, **long).splitlines()[-1]
    assert said.startswith(f"stopped by {number.name}; --resume goes on after epoch ")
    unbroken = run_here(script, **{**long, "output_dir": tmp_path / "unbroken"})
    assert run_here(script, **long, resume="yes")["weights_sha256"] == unbroken["weights_sha256"]


@pytest.mark.parametrize("script", FIRST)
def test_stopped_with_loader_processes(script, tmp_path, jpegs):
    given = options(script, tmp_path / "run", **jpegs, num_workers=2) | dict(epochs=30)
    assert stopped(script, signal.SIGINT, **given).splitlines()[-1].startswith("stopped by SIGINT; --resume ")


@pytest.mark.parametrize("script", FIRST)
def test_batch_that_the_processes_cannot_share(script, tmp_path):
    done = launch(script, processes=2, **options(script, tmp_path / "run", batch_size=15))
    assert done.returncode != 0 and done.stdout == ""
    assert done.stderr.count("--batch-size 15: not a multiple of 2 processes; use 14 or 16") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_precision(script, tmp_path, monkeypatch):
    """As `accelerate launch --mixed_precision bf16` sets it."""
    small = options(script, tmp_path / "plain", arch="lenet", epochs=2, lr=0.02)
    plain = run_here(script, **small)
    forget()  # Accelerate's state of the plain run
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    result = run_here(script, **{**small, "output_dir": tmp_path / "run"})
    assert (plain["precision"], result["precision"]) == ("no", "bf16")
    assert result["loss"] == pytest.approx(plain["loss"], rel=0.02) and result["loss"] != plain["loss"]


@pytest.mark.parametrize("script", FIRST)
def test_compilation(script, tmp_path):
    """As `accelerate launch --dynamo_backend inductor` sets it."""
    small = options(script, tmp_path / "run", arch="lenet", epochs=2, lr=0.02)
    result = result_of(launch(script, env=dict(ACCELERATE_DYNAMO_BACKEND="INDUCTOR"), **small))
    plain = run_here(script, **{**small, "output_dir": tmp_path / "plain"})
    assert (plain["compiler"], result["compiler"]) == ("no", "inductor")
    assert result["loss"] == pytest.approx(plain["loss"], rel=0.02)


@pytest.mark.parametrize("line", COMMANDS)
def test_readme_commands_are_understood(line):
    """Every README line that runs a script, up to the point where its data would be read."""
    assert isinstance(parse(*shlex.split(line, comments=True)), cli.Args)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_kills_at_random_moments(script, tmp_path):
    """SIGKILL after 20 random times, resumed each time, ends with the unbroken run's weights."""
    import random

    long = options(script, tmp_path / "unbroken", epochs=6)
    begun = time.time()
    unbroken = result_of(launch(script, **long))
    duration, generator = time.time() - begun, random.Random(0)
    for trial in range(20):
        broken = {**long, "output_dir": tmp_path / str(trial), "resume": "auto"}
        process = subprocess.Popen(
            command(script, **broken), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL
        )
        time.sleep(duration * generator.uniform(0.3, 1.0))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert result_of(launch(script, **broken))["weights_sha256"] == unbroken["weights_sha256"]
