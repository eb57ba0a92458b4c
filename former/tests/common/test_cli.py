"""common.cli: where a value comes from, and the one line that refuses it."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from common import cli, runs
from tests.conftest import refusal

RECIPES = {"synthetic": dict(lr=0.3, lr_steps=(2, 3)), "imagenet_lt": dict(lr=0.2, imbalance=None)}


@dataclass
class Args(cli.Args):
    tau: float = cli.option(1.0, "strength, 100% at 1", least=0, most=2)
    fast: bool = cli.option(False, "quicker")
    colour: str = cli.option("red", "which", choices=("red", "blue", "green"))
    shade: float = cli.option(0.5, "how dark", needs=dict(colour=("blue", "green"), fast=(True,)))


def parse(line):
    return cli.parse(Args, RECIPES, "A method.", line.split())


def test_default_recipe_command_line():
    assert parse("").lr == 0.3 and parse("").epochs == 10 and parse("").lr_steps == (2, 3)
    assert parse("--dataset imagenet_lt").lr == 0.2 and parse("--dataset imagenet_lt").imbalance is None
    assert parse("--dataset imagenet_lt --lr 0.5").lr == 0.5
    assert parse("--lr=0.5 --dataset=imagenet_lt").lr == 0.5
    assert cli.build(Args, RECIPES, dataset="imagenet_lt", tau=0.5) == parse(
        "--dataset imagenet_lt --tau 0.5"
    )


def test_kinds():
    args = parse("--lr-steps 4 5 6 --fast --imbalance 20 --batch_size 8 --output-dir a_b --resume --epochs 3")
    assert args.lr_steps == (4, 5, 6) and args.fast and args.imbalance == 20.0 and args.batch_size == 8
    assert args.output_dir == "a_b" and args.resume == "yes" and args.epochs == 3
    assert parse("--lr-steps").lr_steps == () and not parse("--no-fast").fast
    assert parse("--resume auto").resume == "auto" and parse("").resume == "no"


@pytest.mark.parametrize(
    "line, complaint",
    [
        (
            "--dataset imagnet_lt",
            "--dataset imagnet_lt: not one of synthetic, imagenet_lt; did you mean imagenet_lt?",
        ),
        ("--batchsize 8", "--batchsize: no such option; did you mean --batch-size?"),
        ("--zzz", "--zzz: no such option; --help lists them all"),
        ("stray", "stray: no such option; --help lists them all"),
        ("--batch-size 0", "--batch-size 0: must be at least 1"),
        ("--epochs 0", "--epochs 0: must be at least 1"),
        ("--epochs 1.5", "--epochs: '1.5' is not an integer"),
        ("--lr -1", "--lr -1.0: must be above 0"),
        ("--lr nan", "--lr nan: must be above 0"),
        ("--lr inf", "--lr inf: must be finite"),
        ("--lr much", "--lr: 'much' is not a number"),
        ("--tau 3", "--tau 3.0: must be at most 2"),
        (
            "--imbalance 0.01",
            "--imbalance 0.01: must be at least 1 (largest class over smallest); write 100 for 1:100",
        ),
        (
            "--imbalance nan",
            "--imbalance nan: must be at least 1 (largest class over smallest); write 100 for 1:100",
        ),
        ("--resume maybe", "--resume maybe: must be one of no, yes, auto"),
        ("--lr-steps 4 -5", "--lr-steps -5: must be at least 0"),
        ("--seed", "--seed: expected one argument"),
        (f"--seed {2**64}", f"--seed {2**64}: must be at most {2**32}"),
        (
            "--many-over 10 --few-under 12",
            "--many-over 10, --few-under 12: a class would be both many- and few-shot; lower the second",
        ),
        (
            "--resume auto --overwrite",
            "--overwrite: deletes the run that --resume goes on with; leave one of them out",
        ),
    ],
)
def test_refusals(line, complaint, capsys):
    assert refusal(lambda: parse(line), capsys) == complaint


def test_direct_use_is_checked_too(capsys):
    assert refusal(lambda: Args(tau=-1.0), capsys) == "--tau -1.0: must be at least 0"


def test_help_shows_the_recipe_of_the_data_set(capsys):
    for line, shown in (("--help", "(default: 0.3)"), ("--help --dataset imagenet_lt", "(default: 0.2)")):
        with pytest.raises(SystemExit) as stop:
            parse(line)
        assert stop.value.code == 0
        text = capsys.readouterr().out
        assert "A method." in text and "100% at 1" in text and shown in text
        assert ("(default: 2 3)" in text) == (line == "--help")


def test_only_the_first_process_speaks(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        cli.fail("not here")
    with pytest.raises(SystemExit):
        cli.fail("on this\none", here=True)
    assert capsys.readouterr().err == "on this one\n"


def test_recipe_that_goes_by_another_option(capsys):
    recipes = {"synthetic": dict(lr_steps=cli.By(lambda arch: (6,) if arch == "lenet" else (28, 36)))}
    assert cli.parse(cli.Args, recipes, "", []).lr_steps == (28, 36)
    assert cli.parse(cli.Args, recipes, "", ["--arch", "lenet"]).lr_steps == (6,)
    assert cli.parse(cli.Args, recipes, "", ["--arch=lenet", "--lr-steps", "3"]).lr_steps == (3,)
    assert cli.build(cli.Args, recipes, arch="lenet").lr_steps == (6,)
    with pytest.raises(SystemExit):
        cli.parse(cli.Args, recipes, "", ["--arch", "lenet", "--help"])
    assert "(default: 6)" in capsys.readouterr().out


def test_recipe_that_goes_by_a_value_that_goes_by_another():
    """Whatever their order; and by a switch."""
    twice = cli.By(lambda auto_augment: 20 if auto_augment else 10)
    recipes = {"synthetic": dict(lr_steps=cli.By(lambda epochs: (epochs - 1,)), epochs=twice)}
    assert cli.parse(cli.Args, recipes, "", []).lr_steps == (9,)
    assert cli.parse(cli.Args, recipes, "", ["--auto-augment"]).lr_steps == (19,)
    assert cli.parse(cli.Args, recipes, "", ["--auto-augment", "--epochs", "5"]).lr_steps == (4,)
    assert cli.build(cli.Args, recipes, auto_augment=True).lr_steps == (19,)


def test_recipe_that_goes_by_several_options(capsys):
    """They have their types, in the help text, too; a wrong value still takes one line."""
    recipes = {"synthetic": dict(epochs=cli.By(lambda imbalance, arch: int(imbalance) + len(arch)))}
    assert cli.parse(cli.Args, recipes, "", []).epochs == 107
    assert cli.parse(cli.Args, recipes, "", ["--imbalance", "50", "--arch", "lenet"]).epochs == 55
    assert cli.parse(cli.Args, recipes, "", ["--imbalance", "50", "--epochs", "3"]).epochs == 3
    with pytest.raises(SystemExit):
        cli.parse(cli.Args, recipes, "", ["--imbalance", "50", "--help"])
    assert "number of epochs (default: 57)" in " ".join(capsys.readouterr().out.split())
    line = refusal(lambda: cli.parse(cli.Args, recipes, "", ["--imbalance", "x"]), capsys)
    assert line == "--imbalance: 'x' is not a number"


def test_an_option_without_effect_is_refused(capsys):
    line = refusal(lambda: parse("--shade 0.7"), capsys)
    assert line == "--shade 0.7: is for --colour blue or green or --fast; add that, or leave it out"
    assert parse("--shade 0.7 --colour blue").shade == parse("--shade 0.7 --fast").shade == 0.7
    assert parse("--shade 0.5").shade == 0.5  # as it is anyway
    recipes = {"synthetic": dict(shade=0.9)}
    assert cli.build(Args, recipes).shade == 0.9  # a recipe may set it whatever the others are
    with pytest.raises(SystemExit):
        parse("--help")
    assert "how dark; for --colour blue or green or --fast" in " ".join(capsys.readouterr().out.split())


def test_where_values_are_from(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--print-config --lr 0.5 --seed 3")
    assert stop.value.code == 0
    lines = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    assert lines["--lr"] == ["0.5", "command", "line"] and lines["--seed"] == ["3", "command", "line"]
    assert lines["--lr-steps"] == ["2", "3", "recipe"] and lines["--wd"] == ["0.0", "default"]
    assert lines["--output-dir"] == ["-", "default"] and "--print-config" not in lines


def test_where_values_are_from_is_told_once(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as stop:
        parse("--print-config")
    assert stop.value.code == 0 and capsys.readouterr().out == ""


def test_lists_are_for_data_sets_of_lists(capsys):
    assert parse("--dataset imagenet_lt --train-list a.txt --test-list b.txt").test_list == "b.txt"
    line = refusal(lambda: parse("--train-list a.txt"), capsys)
    assert line.startswith("--train-list a.txt: is for --dataset image_list or imagenet_lt or ")


def test_batch_sizes_without_effect_are_not_judged(capsys):
    """The rest of two processes matters where a batch is used."""
    import cmo

    two = SimpleNamespace(num_processes=2, is_main_process=True, wait_for_everyone=lambda: None)
    odd = dict(batch_size=126, las_batch_size=125)
    runs.start(two, cmo.Args(**odd, output_dir="nowhere"))
    line = refusal(lambda: runs.start(two, cmo.Args(**odd, las=True, output_dir="nowhere")), capsys)
    assert line == "--las-batch-size 125: not a multiple of 2 processes; use 124 or 126"
