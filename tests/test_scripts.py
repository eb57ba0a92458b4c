"""What holds for every script: help, short runs, equal recipes, kills, processes, precision, compilation."""

import dataclasses
import functools
import importlib
import json
import multiprocessing
import os
import random
import socket
import subprocess
import textwrap
import time

import pytest
import torch

from common import cli, recipes, runs
from tests.conftest import (
    ROOT,
    SCRIPTS,
    TINY,
    command,
    environment,
    forget,
    launch,
    lines_of,
    parse,
    refusal,
    result_of,
    run_here,
    state_of,
)

# Options that make each script use all of its method within two epochs.
METHOD = {
    "bag_of_tricks.py": dict(drw_epoch=1, stage3_epochs=1),
    "balanced_meta_softmax.py": dict(lr_steps=(), stage2_epochs=2, stage2_lr=0.02, meta_batch_size=40),
    "bbn.py": dict(),
    "class_rectification.py": dict(crl_epoch=1, level="instance", kappa=5),
    "cmo.py": dict(mix_start=0, mix_end=0, p_mix=0.7, drw=True, drw_epoch=1, loss="bs"),
    "csa.py": dict(start=1, delta=0.0),
    "decoupled_crt.py": dict(sampling="square-root", stage2_epochs=2, stage2_lr=0.02),
    "equalization_loss.py": dict(loss="softmax_eql"),
    "meta_weights.py": dict(pretrain_epochs=1, dev_per_class=5, dev_batch_size=30),
    "ride.py": dict(mix_start=0, mix_end=0, p_mix=0.7, drw_epoch=1),
}
# No BatchNorm, whose statistics are each process's own, no augmentation, which is, too.
EXACT = dict(arch="lenet", augment="none", lr=0.02)
# Options that take away what each process does on its own share of a batch.
ALIKE = {
    "bag_of_tricks.py": dict(
        mixup=0.0, finetune=False, cam=False
    ),  # partners come from a process's own share
    "csa.py": dict(bank=0),  # contexts come from its own bank
}
# Double precision throughout.
DOUBLE = "torch.set_default_dtype(torch.float64)\ntorch.Tensor.float = torch.Tensor.double\n"


def slow_but(value, *quick):
    """A parameter whose test is left to `make test-slow`, unless it is one of the `quick` ones."""
    return pytest.param(value, marks=[] if value in quick else pytest.mark.slow)


# What is the same in every script, and long, is tested with one; with the others by `make test-slow`.
FIRST = [slow_but(script, "cmo.py") for script in SCRIPTS]


def options(script, folder, **more):
    return {**TINY, **METHOD[script], "output_dir": folder, **more}


def losses(folder):
    return [line.get("loss") for line in lines_of(folder)]


def sabotage(folder, code):
    """Environment in which every process of a run, but not its launcher, begins with `code`."""
    head = "import os, sys\nif sys.argv[:1] != ['-m']:\n    from common import runs\n    import torch\n"
    (folder / "sitecustomize.py").write_text(head + textwrap.indent(code, "    "))
    return dict(PYTHONPATH=f"{folder}{os.pathsep}{ROOT}")


def in_step(moment, code, rank=0):
    """What makes the process `rank` of a run do `code` in step S of epoch E, "E:S", from 0.

    There `values` are what the step logs.
    """
    epoch, step = moment.split(":")
    return (
        "log = runs.Run.log\n"
        "def failing(self, **values):\n"
        f"    now = self.epoch == {epoch} and len(self.logged.get('loss', [])) == {step}\n"
        f"    if now and os.environ.get('RANK', '0') == '{rank}':\n"
        f"        {code}\n"
        "    log(self, **values)\n"
        "runs.Run.log = failing\n"
    )


KILL = "os.kill(os.getpid(), 9)"


def begin(script, given, code, variables):
    """What a forked process does."""
    os.environ.update(variables)
    torch.set_num_threads(1)
    exec(code, dict(os=os, runs=runs, torch=torch))
    run_here(script, **given)


def fork(script, given, code="", processes=1):
    """The started processes of a run, each of which begins with `code`; unlike `launch` without imports."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = []
    for rank in map(str, range(processes)):
        variables = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=str(processes), OMP_NUM_THREADS="1")
        variables |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        alone = processes == 1
        started.append(FORKS.Process(target=begin, args=(script, given, code, {} if alone else variables)))
        started[-1].start()
    return started


FORKS = multiprocessing.get_context("forkserver")  # of a process that has imported all of it
FORKS.set_forkserver_preload(["tests.test_scripts", *[script[:-3] for script in SCRIPTS]])


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_is_covered(script):
    assert script in METHOD
    assert (ROOT / "tests" / f"test_{script}").exists()
    assert (ROOT / "docs" / script.replace(".py", ".md")).exists()
    doc = importlib.import_module(script[:-3]).__doc__
    assert len(doc.splitlines()) <= 20
    assert all(f"\n{field}:" in doc for field in ("Paper", "Method", "Differs", "Expected", "Run"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(script, "--help")
    done = capsys.readouterr()
    assert stop.value.code == 0 and done.err == ""
    for word in ("Paper:", "Method:", "Run:", "--dataset", "--data-dir", "--resume", "--seed"):
        assert word in done.out


@pytest.mark.parametrize("script", SCRIPTS)
def test_short_runs_of_every_recipe(script, capsys):
    """`--epochs 2` is understood with each, what counts epochs is scaled, and it is said."""
    module = importlib.import_module(script[:-3])
    assert set(recipes.OWN) <= set(module.RECIPES)
    fields = {field.name for field in dataclasses.fields(module.Args)}
    for key in module.RECIPES:
        assert set(module.RECIPES[key]) <= fields
        dataset, *name = key.split()
        chosen = ["--dataset", dataset, *(["--recipe", *name] if name else [])]
        whole = parse(script, *chosen)
        capsys.readouterr()
        short = parse(script, *chosen, "--epochs", "2")
        told = capsys.readouterr().err
        assert short.epochs == 2
        for field in dataclasses.fields(whole):
            if field.metadata["is_epoch"] and getattr(short, field.name) != getattr(whole, field.name):
                assert cli.flag(field.name) in told
            elif field.name != "epochs" and not field.metadata["is_epoch"]:
                assert getattr(short, field.name) == getattr(whole, field.name)


SETTINGS = [*recipes.PLAIN, "epochs", "lr_factor", "arch"]


def settings(script, dataset, recipe):
    args = parse(script, dataset=dataset, recipe=recipe)
    return {name: getattr(args, name) for name in SETTINGS}


@pytest.mark.parametrize("script", SCRIPTS)
def test_equal_terms(script):
    """The same training settings in all scripts: where there is no published one, and by --recipe equal."""
    for dataset in recipes.OWN:
        if script == "csa.py" and "mnist" in dataset:  # LeNet's map shows no places
            continue
        assert settings(script, dataset, "paper") == settings("cmo.py", dataset, "paper")
    for dataset in ("cifar10_lt", "cifar100_lt", "imagenet_lt", "inat2018"):
        assert settings(script, dataset, "equal") == settings("cmo.py", dataset, "equal")


@pytest.mark.parametrize("script", SCRIPTS)
def test_wrong_options_take_one_line(script):
    assert refusal(parse, script, "--dataset", "nothing").startswith("--dataset nothing: must be one of ")


@pytest.mark.parametrize("script", FIRST)
def test_as_a_command(script, tmp_path):
    done = launch(script, **{"help": True})
    assert done.returncode == 0 and done.stderr == "" and "Paper:" in done.stdout
    for given in (dict(dataset="nothing"), dict(dataset="imagenet_lt", data_dir=tmp_path / "nowhere")):
        done = launch(script, **given, output_dir=tmp_path / "run")
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
    compare_processes(script, tmp_path, 1e-11, DOUBLE)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_two_processes_are_one_in_single_precision(script, tmp_path):
    start = dict(start=0) if script == "csa.py" else {}
    compare_processes(script, tmp_path, 1e-5, "", lr=0.002, epochs=1, **start)


@pytest.mark.slow
def test_two_processes_are_one_with_a_frozen_backbone(tmp_path, double):
    options = dict(pretrain_epochs=1, freeze_backbone=True)
    compare_processes("meta_weights.py", tmp_path, 1e-11, DOUBLE, **options)


def compare_processes(script, tmp_path, tolerance, code, **more):
    """Same batches, same loss and weights to rounding, same evaluation; equal weights in both processes."""
    exact = EXACT | ALIKE.get(script, {}) | more
    telling = (
        f"{code}finish = runs.Run.finish\n"
        "def telling(self, **facts):\n"
        "    weights = dict(self.objects['model'].named_parameters())\n"
        "    weights = {name: p.detach().contiguous() for name, p in weights.items()}\n"
        "    digest = runs.hashlib.sha256(runs.save(weights)).hexdigest()\n"
        f"    open('{tmp_path}/' + os.environ['RANK'], 'w').write(digest)\n"
        "    return finish(self, **facts)\n"
        "runs.Run.finish = telling\n"
        "torch.nn.BatchNorm2d = torch.nn.Identity\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn, "BatchNorm2d", torch.nn.Identity)
        one = run_here(script, **options(script, tmp_path / "one", **exact))
    for process in fork(script, options(script, tmp_path / "two", **exact), telling, processes=2):
        process.join()
    two = json.loads((tmp_path / "two" / "result.json").read_text())
    assert (one["num_processes"], two["num_processes"]) == (1, 2)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=tolerance)
    assert (tmp_path / "0").read_text() == (tmp_path / "1").read_text()
    first, second = (state_of(tmp_path / name) for name in ("one", "two"))
    assert max((first[name] - second[name]).abs().max() for name in first) < tolerance
    ties = 0.0 if code else 0.3  # one may fall otherwise after rounding
    for name in ("all", "many", "medium", "few", "top5"):
        assert two[name] == pytest.approx(one[name], abs=ties)


@pytest.mark.parametrize("script", FIRST)
def test_same_command_twice(script, tmp_path):
    given = [options(script, tmp_path / str(i), seed=seed) for i, seed in enumerate((0, 0, 1))]
    first = result_of(launch(script, **given[0]))
    second, other = (run_here(script, **given[i]) for i in (1, 2))
    assert first["weights_sha256"] == second["weights_sha256"] != other["weights_sha256"]
    assert losses(tmp_path / "0") == losses(tmp_path / "1")


CORRUPT = "train/class 1/3.jpg"


@pytest.mark.parametrize("script", SCRIPTS)
def test_images_from_files(script, tmp_path, jpegs):
    """Decoded by loader processes, the same again; a corrupt file is named."""

    def run(name, **more):
        return run_here(script, **{**options(script, tmp_path / name), **jpegs, **more})

    result = run("two", num_workers=2)
    assert result["weights_sha256"] and result["shape"] == [3, 72, 72]
    (tmp_path / "data" / CORRUPT).write_bytes(b"no image")
    with pytest.raises(cli.Refused, match=f"{tmp_path}/data/{CORRUPT}: not readable as an image"):
        run("corrupt", num_workers=0)


@pytest.mark.parametrize("script", FIRST)
def test_corrupt_file_in_a_command(script, tmp_path, jpegs):
    (tmp_path / "data" / CORRUPT).write_bytes(b"no image")
    done = launch(script, **{**options(script, tmp_path / "corrupt"), **jpegs, "num_workers": 2})
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"{tmp_path}/data/{CORRUPT}: not readable as an image")


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory):
    """(result, losses) of a script's run in one process, which several tests compare with."""

    @functools.cache
    def run(script):
        folder = tmp_path_factory.mktemp("plain")
        return run_here(script, **options(script, folder)), losses(folder)

    return run


@pytest.mark.parametrize("script", SCRIPTS)
def test_killed_and_resumed_equals_unbroken(script, tmp_path, plain_run):
    """SIGKILL amid the second epoch; the resumed run ends with the unbroken one's weights, bit for bit."""
    unbroken, unbroken_losses = plain_run(script)
    broken = options(script, tmp_path / "broken")
    (killed,) = fork(script, broken, in_step("1:5", KILL))
    killed.join()
    assert killed.exitcode == -9 and len(lines_of(tmp_path / "broken")) == 1
    resumed = run_here(script, **broken, resume=True)
    assert resumed["weights_sha256"] == unbroken["weights_sha256"]
    assert losses(tmp_path / "broken") == unbroken_losses


@pytest.mark.parametrize("script", FIRST)
def test_killed_and_resumed_with_two_processes(script, tmp_path):
    """The same; the first is killed, and the other ends as well."""

    def run(folder, code="", **more):
        processes = fork(script, options(script, tmp_path / folder, **more), code, processes=2)
        for process in processes:
            process.join()
        if not code:
            return json.loads((tmp_path / folder / "result.json").read_text())
        assert processes[0].exitcode == -9 and processes[1].exitcode not in (0, None)

    unbroken = run("unbroken")
    run("broken", in_step("1:5", KILL))
    assert len(lines_of(tmp_path / "broken")) == 1
    resumed = run("broken", resume=True)
    assert resumed["num_processes"] == 2
    assert resumed["weights_sha256"] == unbroken["weights_sha256"]
    assert losses(tmp_path / "broken") == losses(tmp_path / "unbroken")


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_stage_1_of_every_script(script, tmp_path):
    """cRT on its network, where that has one backbone and one head, goes on without its folder, too."""
    first, second = tmp_path / "first", tmp_path / "second"
    plain = dict(level="class") if script == "class_rectification.py" else {}  # instance: another network
    run_here(script, **options(script, first, **plain))
    forget()
    given = dict(TINY, stage1=first, output_dir=second, stage2_epochs=1)
    if script in ("bbn.py", "csa.py", "ride.py"):
        line = refusal(run_here, "decoupled_crt.py", **given)
        assert line.startswith(f"{first}: its network does not fit (")
        return
    result = run_here("decoupled_crt.py", **given)
    before, after = state_of(first), state_of(second)
    same = [name for name in before if before[name].equal(after[name])]
    assert same == [name for name in before if not name.startswith("classifier.")]
    forget()
    (first / "model.safetensors").unlink()
    again = run_here("decoupled_crt.py", **given, resume=True)
    assert again["weights_sha256"] == result["weights_sha256"]


@pytest.mark.parametrize("script", FIRST)
def test_ctrl_c_takes_one_line(script, tmp_path, jpegs):
    """In the second epoch, of the whole group of processes, its loader processes as well."""
    given = {**options(script, tmp_path / "run"), **jpegs, "num_workers": 2}
    env = environment(**sabotage(tmp_path, in_step("1:1", "os.killpg(0, 2)")))
    how = dict(cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command(script, **given), start_new_session=True, **how)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130 and out == ""
    assert err.splitlines()[-1] == "stopped; --resume goes on after the last whole epoch"
    assert subprocess.run(["pgrep", "-g", str(process.pid)], capture_output=True).stdout == b""
    assert (tmp_path / "run" / "checkpoint.pt").exists()


@pytest.mark.parametrize("script", FIRST)
def test_batch_that_the_processes_cannot_share(script, tmp_path):
    done = launch(script, processes=2, **options(script, tmp_path / "run", batch_size=15))
    assert done.returncode != 0 and done.stdout == ""
    assert done.stderr.count("--batch-size 15: not a multiple of the 2 processes") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "script", [slow_but(script, "cmo.py", "csa.py", "meta_weights.py") for script in SCRIPTS]
)
def test_precision(script, tmp_path, monkeypatch, plain_run):
    """As `accelerate launch --mixed_precision bf16` sets it."""
    plain, _ = plain_run(script)
    forget()  # Accelerate's state of the plain run
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    result = run_here(script, **options(script, tmp_path / "run"))
    assert (plain["precision"], result["precision"]) == ("no", "bf16")
    assert result["loss"] == pytest.approx(plain["loss"], rel=0.1) and result["loss"] != plain["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_compilation(script, tmp_path):
    """As `accelerate launch --dynamo_backend inductor` sets it."""
    small = options(script, tmp_path / "run", lr=0.02)
    result = result_of(launch(script, env=dict(ACCELERATE_DYNAMO_BACKEND="INDUCTOR"), **small))
    plain = run_here(script, **{**small, "output_dir": tmp_path / "plain"})
    assert (plain["compiler"], result["compiler"]) == ("no", "inductor")
    assert result["loss"] == pytest.approx(plain["loss"], rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_kills_at_random_moments(script, tmp_path):
    """SIGKILL at 20 random moments, resumed each time, ends with the unbroken run's weights and log."""

    def start(folder, **more):
        return fork(script, options(script, tmp_path / folder, **more))[0]

    def result(folder):
        content = json.loads((tmp_path / folder / "result.json").read_text())
        return content["weights_sha256"], losses(tmp_path / folder)

    start("warm").join()  # which makes the process that is forked
    begun = time.time()
    start("unbroken").join()
    duration, generator, killed = time.time() - begun, random.Random(0), 0
    for trial in map(str, range(80)):  # some end before they are killed
        process = start(trial)
        process.join(duration * generator.uniform(0.0, 1.0))
        killed += process.is_alive()
        process.kill()
        process.join()
        start(trial, resume=True).join()
        assert result(trial) == result("unbroken")
        if killed == 20:
            return
    pytest.fail(f"{killed} kills")


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_memory_and_files_are_flat(script, tmp_path):
    """Of 30 epochs from the tenth on, by less than 16 MB; as many open files."""
    code = (
        "end = runs.Run.end_epoch\n"
        "def measuring(self, *values, **facts):\n"
        "    end(self, *values, **facts)\n"
        "    pages, files = open('/proc/self/statm').read().split()[1], len(os.listdir('/proc/self/fd'))\n"
        f"    print(pages, files, file=open('{tmp_path}/used', 'a'))\n"
        "runs.Run.end_epoch = measuring\n"
    )
    done = launch(
        script, env=sabotage(tmp_path, code), **options(script, tmp_path / "run", epochs=30, eval_every=30)
    )
    assert done.returncode == 0, done.stderr
    used = [[int(number) for number in line.split()] for line in (tmp_path / "used").open()]
    assert len(used) >= 30 and used[-1][1] == used[9][1]
    assert (used[-1][0] - used[9][0]) * os.sysconf("SC_PAGE_SIZE") < 16 * 2**20


# Processes that disagree, or of which one fails


def ranks(folder, code):
    """Environment in which the second process of a run begins with `code`."""
    return sabotage(folder, f"if os.environ.get('RANK') == '1':\n    {code}\n")


DISAGREE = {
    "options": "sys.argv += ['--lr', '0.07']",
    "seed": "sys.argv += ['--seed', '7']",
    "data": "sys.argv += ['--imbalance', '99']",
    "images": "from common import synthetic; d = synthetic.draw_images; "
    "synthetic.draw_images = lambda *a, **k: d(*a, **k) // 2",
}


@pytest.mark.parametrize("what", [slow_but(what, "options", "images") for what in DISAGREE])
def test_processes_that_disagree(what, tmp_path):
    """One line, before the first step."""
    begun = time.time()
    done = launch("cmo.py", 2, ranks(tmp_path, DISAGREE[what]), **options("cmo.py", tmp_path / "run"))
    assert (
        done.returncode != 0 and done.stdout == "" and "Traceback (most" not in done.stderr.split("torch/")[0]
    )
    assert "the processes have other " in done.stderr and time.time() - begun < 60
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


FAULTS = {
    "nan": ("values['loss'].data.mul_(float('nan'))", "not finite"),
    "refused": ("raise runs.Refused('a.jpg: not readable')", "a.jpg: not readable"),
    "bug": ("raise ZeroDivisionError('of the test')", "ZeroDivisionError: of the test"),
    "kill": (KILL, "Signal 9"),
}


@pytest.mark.parametrize("name", [slow_but(name, "nan", "refused", "kill") for name in FAULTS])
@pytest.mark.parametrize("rank", [slow_but(rank, 1) for rank in (0, 1)])
def test_one_process_fails(name, rank, tmp_path):
    """All end within a minute, the cause is told, and the checkpoint is whole."""
    code, told = FAULTS[name]
    begun = time.time()
    env = sabotage(tmp_path, in_step("1:3", code, rank))
    done = launch("cmo.py", 2, env, **options("cmo.py", tmp_path / "run"))
    assert done.returncode != 0 and done.stdout == "" and told in done.stderr
    assert time.time() - begun < 60
    assert all(value.isfinite().all() for value in state_of(tmp_path / "run").values())
    assert json.loads((tmp_path / "run" / "args.json").read_text())["seed"] == 0
    assert runs.torch.load(tmp_path / "run" / "checkpoint.pt")["epoch"] == 0


def test_one_value_per_channel_takes_one_line(tmp_path):
    """BatchNorm of one image on a map of one pixel."""
    small = dict(TINY, arch="resnet10", batch_size=1, epochs=1, output_dir=tmp_path / "run")
    done = launch("cmo.py", **small)
    line = "BatchNorm sees one value per channel; raise --batch-size or --image-size"
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == line
