"""tools.reproduce: tables are of commands that exist; they run, skip what is done and are printed."""

import json
import signal
import subprocess
import sys
import time

import pytest

from common import cli
from tests.conftest import ROOT, environment, refusal
from tools import reproduce, tables

TABLES = sorted(path.stem for path in (ROOT / "tools" / "tables").glob("*.txt"))


@pytest.mark.parametrize("table", TABLES)
def test_rows_are_understood(table):
    rows = reproduce.read_table(table)
    assert len({row.name for row in rows}) == len(rows) > 1
    for row in rows:
        assert isinstance(tables.parse(" ".join(row.words)), cli.Args)


def test_the_list_has_every_command(capsys):
    reproduce.main(["--table", "cmo", "--list", "--seeds", "0", "1", "--", "--imbalance", "50"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * len(reproduce.read_table("cmo"))
    assert lines[0] == (
        "CE: cmo.py --p-mix 0 --imbalance 50 --seed 0 --output-dir runs/tables/cmo_imbalance_50/ce_0 --resume"
    )


# Papers


@pytest.mark.parametrize("paper", tables.papers())
def test_rows_of_a_paper_have_folders_of_their_own(paper):
    systems = [s for s in tables.read_systems() if s["paper"] == paper and s["command"]]
    for key in {key for system in systems for key in system["published"]}:
        names = [reproduce.slug(row.name) for row in reproduce.read_paper(paper, key)]
        assert len(set(names)) == len(names) > 0


def test_a_column_of_a_paper(capsys):
    on = "cifar100_lt --imbalance 100"
    rows = {row.name: row for row in reproduce.read_paper("CMO", on)}
    command = "cmo.py --loss ce --drw --dataset cifar100_lt --imbalance 100"
    assert rows["CE-DRW + CMO"] == ("CE-DRW + CMO", command.split(), 47.0)
    assert not any("--imbalance 10 " in " ".join(row.words) + " " for row in rows.values())
    reproduce.main(["--table", "CMO", "--on", on, "--seeds", "3", "--list"])
    lines = capsys.readouterr().out.splitlines()
    folder = "runs/tables/cmo_cifar100_lt_imbalance_100/ce_drw_cmo_3"
    assert f"CE-DRW + CMO: {command} --seed 3 --output-dir {folder} --resume" in lines


@pytest.mark.parametrize(
    "words, start",
    [
        (["--table", "CMO"], "--table CMO: needs --on; give one of cifar100_lt --imbalance 100; "),
        (
            ["--table", "CMO", "--on", "cifar100_lt --imbalance 1"],
            "--on cifar100_lt --imbalance 1: no column",
        ),
        (["--table", "CMO", "--on", "cifar100_lt"], "--on cifar100_lt: several data sets; give one of cifar"),
        (["--table", "cmo", "--on", "inat2018"], "--on inat2018: is for a paper (CMO, BBN, "),
        (["--table", "nothing"], "--table nothing: no such file, table (balms, "),
        (["--table", "cmo", "--jobs", "0"], "--jobs 0: must be at least 1"),
        ([], "the following arguments are required: --table"),
    ],
)
def test_what_is_not_there(words, start):
    assert refusal(reproduce.main, [*words]).startswith(start)


# Runs, of a script that is done at once

SCRIPT = """
import json, pathlib, shlex, sys
words = sys.argv[1:]
value = {name: words[words.index(name) + 1] for name in ("--seed", "--output-dir", "--loss")}
if value["--loss"] == "none":
    sys.exit("a note\\n--loss none: must be one of ce, bs")
folder = pathlib.Path(value["--output-dir"])
folder.mkdir(parents=True, exist_ok=True)
with open(folder / "runs", "a") as file:
    file.write("x")
seed = int(value["--seed"])
result = dict(script="quick.py", dataset="x", seed=seed, precision="no", all=10.0 + seed, many=1, medium=2)
result.update(few=3, seconds=60, peak_memory_gb=1, commit="abc", command=shlex.join(sys.argv))
result["args"] = {"dataset": "x", "loss": value["--loss"], "seed": seed}
(folder / "result.json").write_text(json.dumps(result))
"""


@pytest.fixture
def quick(tmp_path, monkeypatch):
    (tmp_path / "quick.py").write_text(SCRIPT)
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_table_runs_and_is_not_run_twice(quick, capsys):
    (quick / "two.txt").write_text("# two rows\nplain: quick.py --loss ce\n\nmixed: quick.py --loss bs\n")
    words = ["--table", "two.txt", "--seeds", "0", "1", "1", "--output-dir", "out", "--jobs", "2", "--", "-x"]
    reproduce.main(words)
    printed = capsys.readouterr()
    rows = [line.split("|")[1].strip() for line in printed.out.splitlines()[2:]]
    assert rows == ["plain", "mixed"] and "| 10.5 +- 0.7 |" in printed.out
    assert "mixed, seed 1: all 11.0 (1.0 min)" in printed.err.splitlines()
    results = [json.loads(line) for line in (quick / "out" / "table.jsonl").open()]
    assert sorted((r["row"], r["seed"]) for r in results) == sorted((n, s) for n in rows for s in (0, 1))
    assert all(" -x --seed " in result["command"] for result in results)
    reproduce.main(words)
    again = capsys.readouterr()
    assert again.out == printed.out and again.err.count("already there") == 4
    assert (quick / "out" / "plain_0" / "runs").read_text() == "x"
    reproduce.main([*words, "-y"])  # is another command
    assert (quick / "out" / "plain_0" / "runs").read_text() == "xx"


def test_a_published_figure_stands_beside_ours(quick, capsys, monkeypatch):
    rows = [reproduce.Row("CE", ["quick.py", "--loss", "ce"], 38.6)]
    monkeypatch.setattr(reproduce, "read_paper", lambda *_: rows)
    reproduce.main(["--table", "CMO", "--seeds", "0", "--output-dir", "out"])
    head, _, line = capsys.readouterr().out.splitlines()
    assert head.split("|")[1].strip() == "row" and head.split("|")[2].strip() == "published"
    assert line.split("|")[2].strip() == "38.6"


def test_a_row_that_fails_is_named(quick, capsys):
    (quick / "bad.txt").write_text("good: quick.py --loss ce\nbad: quick.py --loss none\n")
    line = refusal(reproduce.main, ["--table", "bad.txt", "--seeds", "0", "--output-dir", "out"])
    assert line == "1 of 2 runs failed; the same command runs them again"
    said = capsys.readouterr()
    told = (
        "failed: quick.py --loss none --seed 0 --output-dir out/bad_0 --resume: --loss none: must be one of"
    )
    assert told in said.err and "| good " in said.out


@pytest.mark.parametrize(
    "text, start",
    [
        ("CE quick.py\n", ":1: not a row; write NAME: SCRIPT.py OPTIONS"),
        ("\nCE:\n", ":2: not a row"),
        ("CE: quick.py --loss 'ce\n", ":1: not a row"),
        ("CE: quikc.py\n", ":1: not a row"),
        ("A b: quick.py\nA-b: quick.py\n", ":2: A-b would share its folder with another row; rename it"),
        ("  # nothing\n", ": holds no row"),
    ],
)
def test_a_table_that_is_wrong(text, start, quick):
    (quick / "wrong.txt").write_text(text)
    assert refusal(reproduce.main, ["--table", "wrong.txt"]).startswith(f"wrong.txt{start}")


@pytest.mark.slow
def test_a_table_that_is_stopped(tmp_path):
    """By Ctrl-C, say: one line, and its runs end, too; then it goes on."""
    (tmp_path / "long.txt").write_text("long: cmo.py --p-mix 0 --epochs 300\n")
    words = [
        "--table",
        str(tmp_path / "long.txt"),
        "--seeds",
        "0",
        "1",
        "--output-dir",
        str(tmp_path / "out"),
    ]
    pipes = dict(cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen([sys.executable, "-m", "tools.reproduce", *words], **pipes)
    while not (tmp_path / "out" / "long_0" / "checkpoint.pt").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said, told = process.communicate(timeout=60)
    assert process.returncode == 130 and said == "" and not (tmp_path / "out" / "long_1").exists()
    assert told == "stopped\n"
    assert not subprocess.run(["pgrep", "-f", str(tmp_path / "out")], capture_output=True, text=True).stdout
