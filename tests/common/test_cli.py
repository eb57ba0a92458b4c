"""common.cli: where a value comes from, the one line that refuses it, short runs, equal recipes."""

import sys
from dataclasses import dataclass

import pytest
import torch

from common import cli, recipes
from tests.conftest import refusal

RECIPES = {
    "synthetic": dict(lr=0.3, lr_steps=(2, 3)),
    "imagenet_lt": dict(lr=0.2, imbalance=None, epochs=90, begin=9, cosine=True, wd=1.0),
    "imagenet_lt long": dict(lr=0.7, epochs=400),
}


@dataclass
class Args(cli.Args):
    tau: float = cli.option(1.0, "strength, 100% at 1", least=0, most=2)
    fast: bool = cli.option(False, "quicker")
    colour: str = cli.option("red", "which", choices=("red", "blue", "green"))
    begin: int = cli.option(0, "first epoch", is_epoch=True)


def parse(line):
    return cli.parse(Args, RECIPES, "A method.", line.split())


def test_default_recipe_command_line():
    assert parse("").lr == 0.3 and parse("").epochs == 10 and parse("").lr_steps == (2, 3)
    assert parse("--dataset imagenet_lt").lr == 0.2 and parse("--dataset imagenet_lt").imbalance is None
    assert parse("--dataset imagenet_lt --lr 0.5").lr == 0.5
    assert parse("--lr=0.5 --dataset=imagenet_lt").lr == 0.5
    assert parse("--dataset imagenet_lt --recipe long").lr == 0.7


def test_kinds():
    args = parse("--lr-steps 4 5 6 --fast --imbalance 20 --batch-size 8 --output-dir a_b --resume --epochs 3")
    assert args.lr_steps == (4, 5, 6) and args.fast and args.imbalance == 20.0 and args.batch_size == 8
    assert args.output_dir == "a_b" and args.resume and args.epochs == 3
    assert parse("--lr-steps").lr_steps == () and not parse("--no-fast").fast and not parse("").resume


def test_a_short_run_scales_what_counts_epochs(capsys):
    args = parse("--dataset imagenet_lt --epochs 10")
    assert (args.begin, args.lr, args.epochs) == (1, 0.2, 10)
    assert capsys.readouterr().err == "note: for --epochs 10: --begin 1\n"
    assert parse("--epochs 5").lr_steps == (1, 1)
    assert capsys.readouterr().err == "note: for --epochs 5: --lr-steps (1, 1)\n"
    assert parse("--epochs 4").lr_steps == (0, 1)  # rounded down: what was reached still is
    assert parse("--epochs 5 --lr-steps 4").lr_steps == (4,)  # the command line wins
    capsys.readouterr()
    parse("--epochs 10")
    assert capsys.readouterr().err == ""


def test_the_equal_recipe():
    """Training settings of recipes.EQUAL alone; the method's own, its epochs scaled to their number."""
    args = parse("--dataset imagenet_lt --recipe equal")
    equal = recipes.EQUAL["imagenet_lt"]
    assert args.epochs == equal["epochs"] == 100 and args.begin == 10
    assert (args.lr, args.cosine, args.wd, args.lr_steps) == (0.1, False, 2e-4, (60, 80))
    assert parse("--dataset imagenet_lt --recipe equal --epochs 50").begin == 5


@pytest.mark.parametrize(
    "line, complaint",
    [
        ("--dataset imagnet_lt", "--dataset imagnet_lt: must be one of synthetic, imagenet_lt"),
        ("--recipe long", "--recipe long: for --dataset synthetic there are paper, equal"),
        (
            "--dataset imagenet_lt --recipe lang",
            "--recipe lang: for --dataset imagenet_lt there are paper, equal, long",
        ),
        ("--batchsize 8", "--batchsize: no such option; did you mean --batch-size?"),
        ("--batch_size 8", "--batch_size: no such option; did you mean --batch-size?"),
        ("--zzz", "--zzz: no such option; --help lists them all"),
        ("stray", "stray: neither an option nor a value of one; --help lists them all"),
        ("--batch-size 0", "--batch-size 0: must be at least 1"),
        ("--epochs 0", "--epochs 0: must be at least 1"),
        ("--epochs 1.5", "--epochs: invalid int value: '1.5'"),
        ("--lr -1", "--lr -1.0: must be above 0"),
        ("--lr nan", "--lr nan: must be finite"),
        ("--lr inf", "--lr inf: must be finite"),
        ("--lr much", "--lr: invalid float value: 'much'"),
        ("--tau 3", "--tau 3.0: must be at most 2"),
        ("--imbalance 0.01", "--imbalance 0.01: must be at least 1"),
        ("--imbalance nan", "--imbalance nan: must be finite"),
        ("--colour grey", "--colour grey: must be one of red, blue, green"),
        ("--lr-steps 4 -5", "--lr-steps -5: must be at least 0"),
        ("--seed", "--seed: expected one argument"),
        ("--splits 10 12", "--splits (10, 12): a class would be many- and few-shot; try 100 20"),
        ("--lr-factor 2", "--lr-factor 2.0: must be at most 1"),
        ("--splits 10", "--splits: expected 2 arguments"),
        ("--splits 10 5 2", "2: neither an option nor a value of one; --help lists them all"),
    ],
)
def test_refusals(line, complaint):
    assert refusal(parse, line) == complaint


def test_direct_use_is_checked_too():
    assert refusal(Args, tau=-1.0) == "--tau -1.0: must be at least 0"


def test_help_shows_the_recipe_of_the_data_set(capsys):
    for line, shown in (("--help", "(default: 0.3)"), ("--help --dataset imagenet_lt", "(default: 0.2)")):
        with pytest.raises(SystemExit) as stop:
            parse(line)
        assert stop.value.code == 0
        text = capsys.readouterr().out
        assert "A method." in text and "100% at 1" in text and shown in text


def test_only_the_first_process_speaks(capsys, monkeypatch):
    cli.say("here")
    monkeypatch.setenv("RANK", "1")
    cli.say("not here")
    assert capsys.readouterr().err == "here\n"


def test_a_stream_that_nobody_reads_ends_nothing(tmp_path):
    closed = open(tmp_path / "closed", "w")
    closed.close()
    for stream in (closed, None, open("/dev/full", "w")):
        cli.show("a line", stream)


IN_A_WORKER = "Caught Refused in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
TROUBLE = [
    (cli.Refused("--lr 7: too much"), "--lr 7: too much"),
    (cli.Refused(IN_A_WORKER + "common.cli.Refused: a.jpg: not readable\n"), "a.jpg: not readable"),
    (
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error."),
        "a loader process died; lower --num-workers, or raise the memory of /dev/shm",
    ),
    (
        RuntimeError("DataLoader timed out after 600 seconds"),
        "a loader process died; lower --num-workers, or raise the memory of /dev/shm",
    ),
    (
        PermissionError(13, "Permission denied", "new.jpg"),
        "new.jpg: Permission denied; mend that, and start again",
    ),
    (OSError(28, "No space left on device"), "disk: No space left on device; mend that, and start again"),
    (
        torch.OutOfMemoryError("Tried to allocate 20.00 GiB\nmore"),
        "out of memory (Tried to allocate 20.00 GiB); halve --batch-size and begin anew",
    ),
    (
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8000000000000 bytes"),
        "out of memory (DefaultCPUAllocator: can't allocate memory: you tried to allocate 800000000); "
        "halve --batch-size and begin anew",
    ),
    (
        ValueError("Expected more than 1 value per channel when training, got input size [1, 8, 1, 1]"),
        "BatchNorm sees one value per channel; raise --batch-size or --image-size",
    ),
]


@pytest.fixture
def started(monkeypatch):
    """cli.run of a main that raises an error, by a process of several; the seconds that it waited."""

    def start(error, rank, processes=2):
        def fail(args):
            raise error

        waited = []
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        monkeypatch.setattr(cli.time, "sleep", waited.append)
        monkeypatch.setattr(sys, "argv", ["script.py"])
        with pytest.raises((SystemExit, type(error))) as stop:
            cli.run(fail, Args, RECIPES, "")
        return stop.value, len(waited)

    return start


@pytest.mark.parametrize("error, line", TROUBLE)
def test_what_ends_a_script_takes_one_line(error, line, started, capsys):
    """Told by the process that saw it, the others after a while, in which the launcher ends them."""
    for rank in (0, 1):
        stop, waited = started(error, rank)
        assert stop.code == 2 and waited == rank
        assert capsys.readouterr().err == line + "\n"


def test_ctrl_c(started, capsys):
    stop, _ = started(KeyboardInterrupt(), 0, processes=1)
    assert stop.code == 130
    assert capsys.readouterr().err == "stopped; --resume goes on after the last whole epoch\n"


@pytest.mark.parametrize("text", ["of the program", "Caught RuntimeError in DataLoader worker process 0."])
def test_other_errors_keep_their_traceback(text, started):
    """Of several processes after a while: another one may be the cause."""
    error = RuntimeError(text)
    assert started(error, 0, processes=1) == (error, 0)
    assert started(error, 0) == started(error, 1) == (error, 1)


# The learning rate that all scripts share


def rates(**options):
    args = Args(**{"lr": 0.1, **options})
    return [recipes.learning_rate(epoch, args) for epoch in range(args.epochs)]


def test_steps_and_warm_up():
    lr = rates(epochs=200, lr_steps=(160, 180), lr_factor=0.01, warmup=5)
    found = [lr[epoch] for epoch in (0, 3, 4, 159, 160, 179, 180)]
    assert found == pytest.approx([0.02, 0.08, 0.1, 0.1, 1e-3, 1e-3, 1e-5])
    assert rates(epochs=4, warmup=2, warmup_from=1 / 3)[:2] == pytest.approx([0.1 * 2 / 3, 0.1])


def test_cosine():
    """The 400 epochs of CMO's paper: 0.02, ten epochs of warm-up; and a cosine that begins at once."""
    lr = rates(epochs=400, lr=0.02, cosine=True, warmup=10)
    found = [lr[epoch] for epoch in (0, 9, 10, 200, 399)]
    assert found == pytest.approx([0.002, 0.02, 0.02, 0.010361, 0.0], abs=1e-5)
    assert rates(epochs=2, cosine=True, warmup=5)[0] > 0
    assert rates(epochs=4, cosine=True) == pytest.approx([0.1, 0.0853553, 0.05, 0.0146447], abs=1e-6)
