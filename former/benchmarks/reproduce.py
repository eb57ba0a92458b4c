"""Every row of a table: `python -m benchmarks.reproduce --table tricks [-- --dataset cifar10_lt]`.

A table is a file of lines `NAME: SCRIPT.py OPTIONS`, in benchmarks/tables or anywhere, or a column of a
paper's in results/systems.jsonl: `--table CMO --on "cifar100_lt --imbalance 100"`. Each row runs with
each seed; what is finished is skipped, what is broken goes on. Options after `--` are added to every row. At
the end is the table of `python -m common.compare`; its result lines are in OUTPUT/table.jsonl.
"""

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks import systems
from common import cli, compare, runs

ROOT = Path(__file__).parent.parent


def read_table(table):
    """[(name, words of the command, None)] of the table file, a path or a name in benchmarks/tables."""
    file = Path(table) if Path(table).is_file() else ROOT / "benchmarks" / "tables" / f"{table}.txt"
    if not file.is_file():
        there = ", ".join(sorted(path.stem for path in file.parent.glob("*.txt")))
        there = f"({there}) or a paper ({', '.join(systems.PAPERS)})"
        cli.fail(f"--table {table}: no such file, nor a table of the project {there}")
    rows = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, _, command = line.partition(": ")
        try:
            words = shlex.split(command)
        except ValueError:  # an open quotation
            words = []
        if not (words and (ROOT / words[0]).is_file()):
            cli.fail(f"{file}:{number}: not a row; write NAME: SCRIPT.py OPTIONS, a script of the project")
        if slug(name) in [slug(other) for other, *_ in rows]:
            cli.fail(f"{file}:{number}: {name} would share its folder with another row; rename it")
        rows.append((name, words, None))
    if not rows:
        cli.fail(f"{file}: holds no row; write NAME: SCRIPT.py OPTIONS")
    return rows


def read_paper(paper, on):
    """[(system, words of its command, published figure)] of a paper, where the data set begins with `on`."""
    of_paper = [system for system in systems.read_systems() if system["paper"] == paper and system["command"]]
    keys, rows = dict.fromkeys(key for system in of_paper for key in system["published"]), []
    for system in of_paper:
        for key, figure in system["published"].items():
            if on and key.split()[: len(on.split())] == on.split():
                more = key.removeprefix(on)
                words = shlex.split(f"{system['command']} --dataset {key}")
                rows.append((system["system"] + more, words, figure))
    chosen = [key for key in keys if on and key.split()[: len(on.split())] == on.split()]
    if len({str(re.findall(r"^\S+|--imbalance \S+", key)) for key in chosen}) > 1:
        cli.fail(f"--on {on}: several data sets; give one of {'; '.join(chosen)}")
    if not rows:
        problem = f"--on {on}: no column of {paper}" if on else f"--table {paper}: needs --on"
        cli.fail(f"{problem}; give one of {'; '.join(keys)}")
    return rows


def slug(text):
    return re.sub("[^a-z0-9]+", "_", text.lower()).strip("_")


def jobs_of(rows, seeds, folder, more):
    """[(name, command, published, folder of the run)], seed by seed, so that whole tables come first."""
    jobs = []
    for seed in dict.fromkeys(seeds):
        for name, words, published in rows:
            of = folder / f"{slug(name)}_{seed}"
            where = ["--seed", str(seed), "--output-dir", str(of), "--resume", "auto"]
            jobs.append((name, [*words, *more, *where], published, of))
    return jobs


def run(job, threads):
    """The result of a job, {"row": name, ...}; None where it failed, with its last line said."""
    name, words, published, folder = job
    result, there = runs.read_result(folder), ", already there"
    if result is None or result["command"] != shlex.join(words):
        env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, str(ROOT / words[0]), *words[1:]]
        done, there = subprocess.run(command, capture_output=True, text=True, env=env), ""
        if done.returncode:
            cli.say(f"failed: {shlex.join(words)}: {(done.stderr.strip().splitlines() or ['killed'])[-1]}")
            return None
        result = runs.read_result(folder)
    minutes = result["seconds"] / 60
    cli.say(f"{name}, seed {result['seed']}: all {result['all']:.1f} ({minutes:.1f} min{there})")
    return {"row": name, **({} if published is None else {"published": published}), **result}


def main(argv=None):
    words, more = list(sys.argv[1:] if argv is None else argv), []
    if "--" in words:
        words, more = words[: words.index("--")], words[words.index("--") + 1 :]
    parser = cli.Parser(
        prog="python -m benchmarks.reproduce",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--table", required=True, help="its file, name in benchmarks/tables, or paper")
    parser.add_argument("--on", help="of a paper: data set and options that head the column")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output-dir", help="folder of the runs (default: runs/tables/TABLE_OPTIONS)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the cores")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and stop")
    args = parser.parse_args(words)
    if args.jobs < 1:
        cli.fail(f"--jobs {args.jobs}: must be at least 1")
    is_paper = args.table in systems.PAPERS
    if args.on and not is_paper:
        cli.fail(
            f"--on {args.on}: is for a paper ({', '.join(systems.PAPERS)}), not for --table {args.table}"
        )
    rows = read_paper(args.table, args.on) if is_paper else read_table(args.table)
    stem = slug(f"{args.table} {args.on}") if is_paper else Path(args.table).stem
    folder = Path(
        args.output_dir or Path("runs", "tables", "_".join(filter(None, [stem, slug(" ".join(more))])))
    )
    jobs = jobs_of(rows, args.seeds, folder, more)
    if args.dry_run:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it quietly
        print("\n".join(f"{name}: {shlex.join(words)}" for name, words, *_ in jobs))
        return
    if argv is None:
        runs.end_at_signals(lambda: "the same command goes on")
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    with ThreadPoolExecutor(args.jobs) as pool:
        results = [result for result in pool.map(lambda job: run(job, threads), jobs) if result]
    if results:
        (folder / "table.jsonl").write_text("".join(json.dumps(result) + "\n" for result in results))
        compare.main([str(folder / "table.jsonl")])
    if len(results) < len(jobs):
        cli.fail(f"{len(jobs) - len(results)} of {len(jobs)} runs failed; the same command runs them again")


if __name__ == "__main__":
    main()
