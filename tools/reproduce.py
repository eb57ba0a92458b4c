"""The runs of a table: `python -m tools.reproduce --table tricks --seeds 0 1 2 [-- --dataset cifar10_lt]`.

A table is a file of lines `NAME: SCRIPT.py OPTIONS`, in tools/tables or anywhere, or a column of a paper's in
results/systems.jsonl: `--table CMO --on "cifar100_lt --imbalance 100"`. Each row runs with each seed; what is
finished is skipped, what was broken off goes on. Options after `--` are added to every row. At the end is
the table of tools.compare; its result lines are in OUTPUT/table.jsonl.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import tools
from common import cli
from common.cli import Refused
from tools import compare, tables

ROOT = tables.ROOT


class Row(NamedTuple):
    name: str
    words: list  # of the command
    published: float | None = None


# -------------------------------------------------------------------------------------------------- the rows


def slug(text):
    return re.sub("[^a-z0-9]+", "_", text.lower()).strip("_")


def read_table(table):
    """The rows of the table file, a path or a name in tools/tables."""
    file = Path(table)
    if not file.is_file():
        file = ROOT / "tools" / "tables" / f"{table}.txt"
    if not file.is_file():
        known = ", ".join(sorted(path.stem for path in file.parent.glob("*.txt")))
        papers = ", ".join(tables.papers())
        raise Refused(f"--table {table}: no such file, table ({known}) or paper ({papers})")
    rows, folders = [], set()
    for number, line in enumerate(file.read_text().splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, _, command = line.partition(": ")
        try:
            words = shlex.split(command)
        except ValueError:  # an open quotation
            words = []
        if not words or not (ROOT / words[0]).is_file():
            raise Refused(
                f"{file}:{number}: not a row; write NAME: SCRIPT.py OPTIONS, a script of the project"
            )
        if slug(name) in folders:
            raise Refused(f"{file}:{number}: {name} would share its folder with another row; rename it")
        folders.add(slug(name))
        rows.append(Row(name, words))
    if not rows:
        raise Refused(f"{file}: holds no row; write NAME: SCRIPT.py OPTIONS")
    return rows


def read_paper(paper, on):
    """The rows of a paper in the columns that begin with `on`: of one data set, at one imbalance."""
    systems = [system for system in tables.read_systems() if system["paper"] == paper and system["command"]]
    keys = dict.fromkeys(key for system in systems for key in system["published"])
    if not on:
        raise Refused(f"--table {paper}: needs --on; give one of {'; '.join(keys)}")
    chosen = [key for key in keys if f"{key} ".startswith(f"{on} ")]
    if not chosen:
        raise Refused(f"--on {on}: no column of {paper}; give one of {'; '.join(keys)}")
    if len({str(re.findall(r"^\S+|--imbalance \S+", key)) for key in chosen}) > 1:
        raise Refused(f"--on {on}: several data sets; give one of {'; '.join(chosen)}")
    rows = []
    for system in systems:
        for key, published in system["published"].items():
            if key in chosen:
                words = shlex.split(f"{system['command']} --dataset {key}")
                rows.append(Row(system["system"] + key.removeprefix(on), words, published))
    return rows


# -------------------------------------------------------------------------------------------------- the runs


def jobs_of(rows, seeds, folder, more):
    """[(row, its words with seed and folder, folder of the run)], so that each seed's table comes whole."""
    jobs = []
    for seed in dict.fromkeys(seeds):
        for row in rows:
            place = folder / f"{slug(row.name)}_{seed}"
            own = ["--seed", str(seed), "--output-dir", str(place), "--resume"]
            jobs.append((row, [*row.words, *more, *own], place))
    return jobs


class Runner:
    """Runs jobs. running: their processes."""

    def __init__(self, threads):
        self.environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self.running = set()

    def run(self, job):
        """The result of a job with the name of its row; None where it failed, with its last line said."""
        row, words, place = job
        result, there = self.finished(place, words), ", already there"
        if not result:
            pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            process = subprocess.Popen([sys.executable, *words], env=self.environment, **pipes)
            self.running.add(process)
            told = process.communicate()[1]
            self.running.remove(process)
            if process.returncode in (130, -signal.SIGTERM):  # by Ctrl-C or `stop`
                return None
            if process.returncode:
                last = told.strip().splitlines()[-1:] or ["killed"]
                cli.say(f"failed: {shlex.join(words)}: {last[0]}")
                return None
            result, there = tools.read_result(place), ""
        minutes = result["seconds"] / 60
        cli.say(f"{row.name}, seed {result['seed']}: all {result['all']:.1f} ({minutes:.1f} min{there})")
        named = {"row": row.name}
        if row.published is not None:
            named["published"] = row.published
        return {**named, **result}

    def finished(self, place, words):
        """The result of the command, if the folder holds it."""
        if not (place / "result.json").is_file():
            return None
        result = tools.read_result(place)
        return result if result["command"] == shlex.join(words) else None

    def stop(self):
        for process in list(self.running):
            process.terminate()


def main(words):
    more = []
    if "--" in words:
        more = words[words.index("--") + 1 :]
        words = words[: words.index("--")]
    parser = tools.parser("reproduce", __doc__)
    parser.add_argument("--table", required=True, help="its file, its name in tools/tables, or a paper")
    parser.add_argument("--on", help="of a paper: data set and options that head the column")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--output-dir", help="folder of the runs (default: runs/tables/TABLE_OPTIONS)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the cores")
    parser.add_argument("--list", action="store_true", help="print the commands and stop")
    args = parser.parse_args(words)
    if args.jobs < 1:
        raise Refused(f"--jobs {args.jobs}: must be at least 1")
    if args.table in tables.papers():
        rows = read_paper(args.table, args.on)
        parts = [slug(f"{args.table} {args.on}"), slug(" ".join(more))]
    elif args.on:
        raise Refused(f"--on {args.on}: is for a paper ({', '.join(tables.papers())}); leave it out")
    else:
        rows = read_table(args.table)
        parts = [Path(args.table).stem, slug(" ".join(more))]
    folder = Path(args.output_dir or Path("runs", "tables", "_".join(filter(None, parts))))
    jobs = jobs_of(rows, args.seeds, folder, more)
    if args.list:
        for row, line, _ in jobs:
            print(f"{row.name}: {shlex.join(line)}")
        return

    runner = Runner(threads=max(1, (os.cpu_count() or 1) // args.jobs))
    with ThreadPoolExecutor(args.jobs) as pool:
        try:
            results = list(pool.map(runner.run, jobs))
        except KeyboardInterrupt:
            runner.stop()
            raise
    results = [result for result in results if result]
    if results:
        lines = [json.dumps(result) + "\n" for result in results]
        (folder / "table.jsonl").write_text("".join(lines))
        compare.main([str(folder / "table.jsonl")])
    if len(results) < len(jobs):
        failed = len(jobs) - len(results)
        raise Refused(f"{failed} of {len(jobs)} runs failed; the same command runs them again")


if __name__ == "__main__":
    tools.run(main)
