"""What a run survives: faults of one process or several, of memory and of the disk, told in one line."""

import resource
import signal
import subprocess
import sys
import time

import pytest
import torch

from common import runs
from tests.conftest import (
    ROOT,
    SCRIPTS,
    after_step,
    command,
    environment,
    launch,
    refusal,
    result_of,
    run_here,
    sabotage,
    state_of,
)
from tests.test_scripts import EXACT, FIRST, options

# What is put in the way of a run in a process of its own: code that runs after each step.
FAULTS = {
    "nan": "values['loss'].data.mul_(float('nan'))",
    "memory": "raise torch.OutOfMemoryError('Tried to allocate 20.00 GiB')",
    "worker": "raise RuntimeError('DataLoader worker (pid 7) is killed by signal: Killed.')",
    "kill": "os.kill(os.getpid(), 9)",
    "bug": "raise ZeroDivisionError('of the test')",
    "leave": "os._exit(0)",
}


def fault(folder, name, rank):
    """Environment in which the process `rank` meets a fault in the fourth step of the second epoch."""
    return after_step(folder, "1:3", FAULTS[name], rank)


def said(done):
    """The lines on stderr but those of the launcher."""
    ours = ("epoch ", "synthetic: ", "note: ")
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return [line for line in lines if not line.startswith(ours) and "torch/distributed" not in line]


@pytest.mark.parametrize(
    "name, line",
    [
        pytest.param(
            "nan",
            "loss is not finite in epoch 2, step 4 (lr 0.0005, precision no); the checkpoint of epoch 1 is",
            marks=pytest.mark.slow,
        ),
        ("memory", "out of memory (--batch-size 64, images of 3x24x24, peak "),
        pytest.param(
            "worker",
            "a loader process died (--batch-size 64, images of 3x24x24, peak ",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_one_line_and_nothing_lost(tmp_path, name, line):
    given = options("cmo.py", tmp_path / "run")
    done = launch("cmo.py", env=fault(tmp_path, name, rank=0), **given)
    assert done.returncode != 0 and done.stdout == "" and len(said(done)) == 1
    assert said(done)[0].startswith(line)
    if name != "nan":
        assert said(done)[0].endswith("; --resume goes on after epoch 1")
    if name == "memory":
        assert "; halve --batch-size; " in said(done)[0]
    unbroken = run_here("cmo.py", **{**given, "output_dir": tmp_path / "unbroken"})
    assert run_here("cmo.py", **given, resume="yes")["weights_sha256"] == unbroken["weights_sha256"]


def test_a_fault_of_the_program_keeps_its_traceback(tmp_path):
    done = launch("cmo.py", env=fault(tmp_path, "bug", rank=0), **options("cmo.py", tmp_path / "run"))
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == "ZeroDivisionError: of the test"


def test_allocations_that_fail_on_a_cpu(tmp_path, capsys, monkeypatch):
    """What torch raises there is a RuntimeError."""
    import cmo

    run = runs.start(cmo.Accelerator(), cmo.Args(output_dir=str(tmp_path)))
    with pytest.raises(RuntimeError) as stop:
        torch.empty(2**60)
    monkeypatch.setattr(runs.os, "_exit", lambda code: sys.exit(code + 1))
    line = refusal(lambda: run.explain(stop.type, stop.value, None), capsys)
    assert line.startswith("out of memory (--batch-size ") and line.endswith(
        "; --resume has no epoch to go on from"
    )


@pytest.mark.parametrize(
    "name",
    ["nan", "kill", *[pytest.param(name, marks=pytest.mark.slow) for name in ("memory", "bug", "leave")]],
)
def test_a_fault_of_one_process_of_two(tmp_path, name):
    """Both end within a minute, the cause is told once, and the run goes on from its checkpoint."""
    given = options("cmo.py", tmp_path / "run", epochs=3)
    begun = time.time()
    done = launch("cmo.py", processes=2, env=fault(tmp_path, name, rank=1), **given)
    assert done.returncode != 0 and done.stdout == "" and time.time() - begun < 60
    assert "(No such process)" not in done.stderr
    cause = dict(
        nan="loss is not finite in epoch 2, step 4", memory="out of memory (", bug="Error: of the test"
    )
    if name in cause:
        assert done.stderr.count(cause[name]) == 1
    assert not processes_of(tmp_path)
    assert runs.load_checkpoint(tmp_path / "run" / "checkpoint")["epoch"] == 0
    assert run_here("cmo.py", **given, resume="yes")["epochs"] == 3


def processes_of(folder):
    """Numbers of the processes that have `folder` in their command line."""
    done = subprocess.run(["pgrep", "-f", str(folder)], capture_output=True, text=True)
    return done.stdout.split()


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_signal_to_the_launcher(tmp_path, number):
    """Its processes end, too, with one line of the run, which goes on."""
    given = options("cmo.py", tmp_path / "run", epochs=3)
    how = dict(cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command("cmo.py", 2, **given), start_new_session=True, **how)
    while not (tmp_path / "run" / "checkpoint" / "epoch_0000.json").exists():
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode != 0 and out == "" and err.count("; --resume goes on after epoch ") == 1
    assert not processes_of(tmp_path)
    assert run_here("cmo.py", **given, resume="yes")["epochs"] == 3


def test_signal_before_a_run(tmp_path):
    env = sabotage(
        tmp_path, "from common import datasets\ndatasets.check = lambda args: os.kill(os.getpid(), 2)\n"
    )
    done = launch("cmo.py", env=env, check_data=True)
    assert done.returncode == 130 and done.stdout == ""
    assert said(done) == ["stopped by SIGINT; nothing was trained"]


def test_dry_run_of_two_processes(tmp_path):
    """In one folder, of which nothing is left."""
    (tmp_path / "temporary").mkdir()
    given = options("cmo.py", tmp_path / "run", dry_run=True)
    done = launch("cmo.py", processes=2, env=dict(TMPDIR=str(tmp_path / "temporary")), **given)
    assert done.returncode == 0 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("--dry-run: the whole run would take about ")
    assert not (tmp_path / "run").exists()
    left = [path for path in (tmp_path / "temporary").rglob("*") if "torchelastic" not in str(path)]
    assert left == []


def test_full_disk(tmp_path):
    """A limit on the size of a file stands for it: one line, and the folder holds no part of a checkpoint."""
    given = options("cmo.py", tmp_path / "run")
    done = subprocess.run(
        command("cmo.py", **given),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)),
    )
    assert done.returncode == 2 and done.stdout == ""
    (line,) = said(done)
    assert line.startswith(
        f"{tmp_path}/run/checkpoint/epoch_0000.pt: cannot be written, 0.6 MB (File too large)"
    )
    assert list((tmp_path / "run" / "checkpoint").iterdir()) == []
    assert run_here("cmo.py", **given, resume="auto")["epochs"] == 2


@pytest.mark.parametrize("script", FIRST)
def test_only_the_first_process_writes(tmp_path, script):
    env = sabotage(
        tmp_path,
        f"folder, wrote = '{tmp_path}/run', os.open('{tmp_path}/wrote', os.O_CREAT | os.O_WRONLY)\n"
        "def look(event, given):\n"
        "    changes = event in ('os.mkdir', 'os.rename', 'os.remove')\n"
        "    if changes or event == 'open' and given[2] & os.O_ACCMODE:\n"
        "        if str(given[0]).startswith(folder):\n"
        "            os.write(wrote, str(given[0]).encode())\n"
        "if os.environ.get('RANK') == '1':\n"
        "    sys.addaudithook(look)\n",
    )
    assert result_of(launch(script, 2, env=env, **options(script, tmp_path / "run")))["num_processes"] == 2
    assert (tmp_path / "wrote").read_text() == "" and (tmp_path / "run" / "result.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_memory_and_files_are_flat(script, tmp_path, monkeypatch):
    """Over 20 epochs, from the third one on."""
    memory, files, end = [], [], runs.Run.end_epoch

    def ending(run, epoch, accuracy):
        end(run, epoch, accuracy)
        with open("/proc/self/statm") as statm:
            memory.append(int(statm.read().split()[1]))
        files.append(len(list(run.folder.rglob("*"))))

    monkeypatch.setattr(runs.Run, "end_epoch", ending)
    lengths = dict(epochs=20, lr_steps=())
    run_here(script, **{**options(script, tmp_path / "run"), **lengths})
    assert len(memory) >= 20 and memory[19] < 1.05 * memory[2]
    assert files[2] == files[19]


@pytest.mark.slow
@pytest.mark.parametrize("processes, others", [(1, 2), (2, 1)])
def test_resumed_with_another_number_of_processes(tmp_path, processes, others):
    """It is said, and the weights are those of the unbroken run to rounding."""
    given = options("cmo.py", tmp_path / "run", **EXACT)
    run_here("cmo.py", **{**given, "output_dir": tmp_path / "whole"})
    launch("cmo.py", processes, env=fault(tmp_path, "kill", rank=0), **given)
    done = launch("cmo.py", others, **given, resume="yes")
    assert f"note: from {processes} processes to {others}, same batches" in done.stderr
    assert result_of(done)["num_processes"] == others
    whole, resumed = (state_of(tmp_path / name, 3) for name in ("whole", "run"))  # the epoch of LAS
    assert max((whole[name] - resumed[name]).abs().max() for name in whole) < 1e-5


def test_home_and_data_that_cannot_be_written(tmp_path, jpegs):
    for folder in (tmp_path / "data").rglob("*"):
        folder.chmod(0o555 if folder.is_dir() else 0o444)
    done = launch("cmo.py", env=dict(HOME="/nonexistent"), **options("cmo.py", tmp_path / "run", **jpegs))
    assert result_of(done)["epochs"] == 2
