"""benchmarks.reproduce: tables are of commands that exist; they run, skip what is done and are printed."""

import importlib
import json
import signal
import subprocess
import sys
import time

import pytest

from benchmarks import reproduce, systems
from common import cli
from tests.conftest import ROOT, environment, refusal

TABLES = sorted(path.stem for path in (ROOT / "benchmarks" / "tables").glob("*.txt"))
TINY = "--epochs 1 --batch-size 512 --lr-steps --lr 0.01 --arch lenet".split()


@pytest.mark.parametrize("table", TABLES)
def test_rows_are_understood(table):
    rows = reproduce.read_table(table)
    assert len({name for name, *_ in rows}) == len(rows)
    for _, (script, *words), _ in rows:
        module = importlib.import_module(script[:-3])
        assert isinstance(cli.parse(module.Args, module.RECIPES, module.__doc__, words), cli.Args)


def test_a_dry_run_lists_every_command(capsys):
    reproduce.main(["--table", "tricks", "--dry-run", "--seeds", "0", "1", "--", "--imbalance", "50"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * len(reproduce.read_table("tricks"))
    assert lines[0] == (
        "CE: bag_of_tricks.py --mixup none --sampling instance --imbalance 50 --seed 0 "
        "--output-dir runs/tables/tricks_imbalance_50/ce_0 --resume auto"
    )


@pytest.mark.parametrize("paper", systems.PAPERS)
def test_rows_of_a_paper_have_folders_of_their_own(paper):
    of_paper = [system for system in systems.read_systems() if system["paper"] == paper and system["command"]]
    for on in {key for system in of_paper for key in system["published"]}:
        names = [reproduce.slug(name) for name, *_ in reproduce.read_paper(paper, on)]
        assert len(set(names)) == len(names) > 0


def test_a_column_of_a_paper(capsys):
    on = "cifar100_lt --imbalance 100"
    rows = {name: (words, published) for name, words, published in reproduce.read_paper("CMO", on)}
    command = "cmo.py --loss ce --drw --dataset cifar100_lt --imbalance 100"
    assert rows["CE-DRW + CMO"] == (command.split(), 47.0)
    assert not any("--imbalance 10 " in " ".join(words) + " " for words, _ in rows.values())
    reproduce.main(["--table", "CMO", "--on", on, "--seeds", "3", "--dry-run"])
    lines = capsys.readouterr().out.splitlines()
    folder = "runs/tables/cmo_cifar100_lt_imbalance_100/ce_drw_cmo_3"
    assert f"CE-DRW + CMO: {command} --seed 3 --output-dir {folder} --resume auto" in lines


def test_a_published_figure_stands_beside_ours(tmp_path, capsys, monkeypatch):
    row = ("CE", ["cmo.py", "--paste", "none"], 38.6)
    monkeypatch.setattr(reproduce, "read_paper", lambda *_: [row])
    reproduce.main(["--table", "CMO", "--seeds", "0", "--output-dir", str(tmp_path), "--", *TINY])
    head, _, line = capsys.readouterr().out.splitlines()
    assert head.split("|")[1].strip() == "row" and head.split("|")[2].strip() == "published"
    assert line.split("|")[2].strip() == "38.6"


@pytest.mark.parametrize(
    "words, start",
    [
        (["--table", "CMO"], "--table CMO: needs --on; give one of cifar100_lt --imbalance 100; "),
        (
            ["--table", "CMO", "--on", "cifar100_lt --imbalance 1"],
            "--on cifar100_lt --imbalance 1: no column",
        ),
        (["--table", "tricks", "--on", "inat2018"], "--on inat2018: is for a paper (CMO, BBN, "),
    ],
)
def test_columns_that_are_not_there(words, start, capsys):
    assert refusal(lambda: reproduce.main([*words, "--dry-run"]), capsys).startswith(start)


def test_a_table_runs_and_is_not_run_twice(tmp_path, capsys, monkeypatch):
    table, out = tmp_path / "two.txt", tmp_path / "out"
    table.write_text("# two rows\nplain: cmo.py --paste none\n\nmixed: cmo.py --mix-start -1 --mix-end 0\n")
    words = ["--table", str(table), "--seeds", "0", "1", "--output-dir", str(out), "--jobs", "2", "--", *TINY]
    reproduce.main(words)
    printed = capsys.readouterr()
    rows = [line.split("|")[1].strip() for line in printed.out.splitlines()[2:]]
    assert rows == ["plain", "mixed"] and " 2     |" in printed.out  # two seeds
    results = [json.loads(line) for line in (out / "table.jsonl").open()]
    assert sorted((r["row"], r["seed"]) for r in results) == sorted((n, s) for n in rows for s in (0, 1))
    monkeypatch.setattr(reproduce.subprocess, "run", None)  # nothing is run any more
    reproduce.main(words)
    again = capsys.readouterr()
    assert again.out == printed.out and again.err.count("already there") == 4


@pytest.mark.slow
def test_a_table_that_is_stopped(tmp_path):
    """By Ctrl-C, say: one line, and its runs end, too."""
    table, out = tmp_path / "long.txt", tmp_path / "out"
    table.write_text("long: cmo.py --paste none\n")
    words = ["--table", str(table), "--seeds", "0", "1", "--output-dir", str(out), "--", "--epochs", "300"]
    how = dict(cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.reproduce", *words], **how)
    while not (out / "long_0" / "checkpoint" / "epoch_0000.json").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said, told = process.communicate(timeout=60)
    assert process.returncode == 130 and said == "" and not (out / "long_1").exists()
    assert told == "stopped by SIGINT; the same command goes on\n"
    assert not subprocess.run(["pgrep", "-f", str(out)], capture_output=True, text=True).stdout


def test_a_row_that_fails_is_named(tmp_path, capsys):
    table = tmp_path / "bad.txt"
    table.write_text("good: cmo.py --paste none\nbad: cmo.py --loss none\n")
    with pytest.raises(SystemExit):
        reproduce.main(["--table", str(table), "--seeds", "0", "--output-dir", str(tmp_path), "--", *TINY])
    said = capsys.readouterr()
    assert "--loss none: must be one of ce, ldam, bs" in said.err and "| good " in said.out
    assert said.err.splitlines()[-1] == "1 of 2 runs failed; the same command runs them again"


def test_a_table_that_is_not_there(capsys):
    line = refusal(lambda: reproduce.main(["--table", "nothing"]), capsys)
    assert line.startswith("--table nothing: no such file, nor a table of the project (")


@pytest.mark.parametrize(
    "text, start",
    [
        ("CE cmo.py\n", ":1: not a row; write NAME: SCRIPT.py OPTIONS"),
        ("\nCE:\n", ":2: not a row"),
        ("CE: cmo.py --loss 'ce\n", ":1: not a row"),
        ("CE: com.py\n", ":1: not a row"),
        ("A b: cmo.py\nA-b: bbn.py\n", ":2: A-b would share its folder with another row; rename it"),
        ("  # nothing\n", ": holds no row"),
    ],
)
def test_a_table_that_is_wrong(text, start, tmp_path, capsys):
    (tmp_path / "wrong.txt").write_text(text)
    line = refusal(lambda: reproduce.main(["--table", str(tmp_path / "wrong.txt")]), capsys)
    assert line.startswith(f"{tmp_path}/wrong.txt{start}")


def test_no_jobs(capsys):
    line = refusal(lambda: reproduce.main(["--table", "tricks", "--jobs", "0", "--dry-run"]), capsys)
    assert line == "--jobs 0: must be at least 1"


def test_columns_of_several_data_sets_are_refused(capsys):
    line = refusal(lambda: reproduce.read_paper("CMO", "cifar100_lt"), capsys)
    assert line.startswith("--on cifar100_lt: several data sets; give one of cifar100_lt --imbalance ")


def test_a_seed_given_twice_runs_once(tmp_path):
    assert len(reproduce.jobs_of([("a", ["cmo.py"], None)], [0, 0, 1], tmp_path, [])) == 2
