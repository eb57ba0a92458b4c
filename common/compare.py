"""Finished runs side by side: `python -m common.compare runs/cmo/* [--csv]`.

Takes run folders, result.json files and .jsonl files of result lines. Runs that differ only in the seed
become one row: the mean over seeds, and +- the standard deviation between them. A run that predicts in
several ways has a row for each. Result lines with a "row" (benchmarks.reproduce) are called by it.
"""

import argparse
import csv
import json
import statistics
import sys
from pathlib import Path

from common import cli
from common.evaluation import ACCURACIES
from common.runs import NOT_COMPARED

SPLIT = ("dataset", "imbalance", "train_list", "test_list")
SPLIT += ("many_over", "few_under", "many_classes", "few_classes")


def read(paths):
    """The results that the paths hold, a list of dicts."""
    results = []
    for path in map(Path, paths):
        path = path / "result.json" if path.is_dir() else path
        try:
            text = path.read_text()
            lines = text.splitlines() if path.suffix == ".jsonl" else [text]
            results += [one for result in map(json.loads, lines) for one in by_prediction(result)]
        except (OSError, ValueError, KeyError) as e:
            cli.fail(f"{path}: not a finished run or a file of result lines ({e!r})")
    return results


def by_prediction(result):
    """The result once for each of its predictions, if it has several."""
    args, predictions = result["args"], result.get("predictions")
    if predictions is None:
        return [result]
    return [{**result, **own, "args": {**args, "prediction": name}} for name, own in predictions.items()]


def options(result):
    """What makes a row: the script, the precision and every option but the seed and where things lie."""
    args = {k: v for k, v in result["args"].items() if k not in (*NOT_COMPARED, "seed")}
    named = {"row": result["row"]} if "row" in result else {}
    return {"script": result["script"], "precision": result["precision"], **named, **args}


def spread(values):
    """Mean and, of several values, +- their standard deviation; `-` where there is none."""
    values = [value for value in values if value is not None]
    if not values:
        return "-"
    return f"{statistics.mean(values):.1f}" + (
        f" +- {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    )


def rows(results):
    """Header and rows of the table. Results of different data sets or splits are refused."""
    for name in SPLIT:
        values = sorted({str(result["args"].get(name)) for result in results})
        if len(values) > 1:
            cli.fail(f"the runs differ in {cli.flag(name)} ({', '.join(values)}); compare one set at a time")
    groups = {}
    for result in results:
        groups.setdefault(json.dumps(options(result), sort_keys=True), []).append(result)
    keys = [json.loads(key) for key in groups]
    every = sorted({name for key in keys for name in key} - {"script"})
    names = ["script"] + [k for k in every if len({str(key[k]) for key in keys if k in key}) > 1]
    if all("row" in key for key in keys):  # as benchmarks.reproduce names them
        names = ["row"]
    table = [[*names, *ACCURACIES, "seeds", "minutes", "GB", "commit"]]
    for key, group in zip(keys, groups.values(), strict=True):
        cells = [str(key.get(name, "-")) for name in names]  # - where a script has no such option
        cells += [spread([result[name] for result in group]) for name in ACCURACIES]
        minutes = statistics.mean(result["seconds"] for result in group) / 60
        memory = max(result["peak_memory_gb"] for result in group)
        commits = ", ".join(sorted({str(result["commit"]) for result in group}))
        seeds = str(len({result["seed"] for result in group}))
        table.append([*cells, seeds, f"{minutes:.1f}", f"{memory:.1f}", commits])
    return table


def markdown(table):
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in table
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m common.compare", description=__doc__)
    parser.add_argument("paths", nargs="+", help="run folders, result.json or .jsonl files")
    parser.add_argument("--csv", action="store_true", help="comma-separated values instead of markdown")
    args = parser.parse_args(argv)
    table = rows(read(args.paths))
    if args.csv:
        csv.writer(sys.stdout).writerows(table)
    else:
        print(markdown(table))


if __name__ == "__main__":
    main()
