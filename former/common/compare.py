"""Finished runs side by side: `python -m common.compare runs/cmo/* [--csv] [--plot compared.png]`.

Takes run folders, result.json files and .jsonl files of result lines; unfinished runs are left out. Runs
that differ only in the seed become one row: the mean over seeds, and +- the standard deviation between
them. A run that predicts in several ways has a row for each. Result lines with a "row"
(benchmarks.reproduce) are called by it.

--plot draws the rows: accuracy of each class over its training images, accuracy by split, and, of run
folders, test accuracy over the epochs.
"""

import argparse
import csv
import json
import math
import statistics
import sys
from pathlib import Path

from common import cli
from common.evaluation import ACCURACIES
from common.runs import NOT_COMPARED

DATA = ("dataset", "imbalance", "train_list", "test_list", "many_over", "few_under")
SPLITS = ACCURACIES[1:]
MARKERS = "os^Dv*PX<>ph"


def read(paths):
    """The results that the paths hold, a list of dicts."""
    results = []
    for path in map(Path, paths):
        if (path / "args.json").is_file() and not (path / "result.json").exists():
            cli.say(f"note: {path}: not finished; left out")
            continue
        path = path / "result.json" if path.is_dir() else path
        try:
            text = path.read_text()
            lines = text.splitlines() if path.suffix == ".jsonl" else [text]
            log = path.with_name("metrics.jsonl")
            history = {"history": list(map(json.loads, log.open()))} if log.is_file() else {}
            for result in map(json.loads, lines):
                missing = {"script", "args", "seed"} - set(result)
                if missing:
                    raise KeyError(*missing)
                for one in by_prediction(result):
                    results.append(one | history if one.get("per_class", True) else one)
        except (OSError, ValueError, KeyError, TypeError) as e:
            cli.fail(f"{path}: not a finished run or a file of result lines ({e!r})")
    if not results:
        cli.fail(f"{paths[0]}: no finished run there; name folders of finished runs")
    return results


def by_prediction(result):
    """The result once for each of its predictions, if it has several; classes and epochs are of its own."""
    args, predictions = result["args"], result.get("predictions")
    if predictions is None:
        return [result]
    each = [{**result, **own, "args": {**args, "prediction": name}} for name, own in predictions.items()]
    other = {"per_class": None, "by_counts": dict.fromkeys(SPLITS)}
    return [one if one["args"] == args else {**one, **other} for one in each]


def on_one_split(results):
    """The results on equal terms; refuses different data sets, and bounds of many- and few-shot classes.

    Where the numbers of many- or few-shot classes that some have differ, all are taken by the bounds.
    """

    def differing(*names):
        for name in names:
            values = sorted({str(result["args"].get(name)) for result in results})
            if len(values) > 1:
                yield f"the runs differ in {cli.flag(name)} ({', '.join(values)})"

    is_own = results[0]["args"]["dataset"].startswith("image_")  # told by its folder alone
    for difference in differing(*DATA, "data_dir") if is_own else differing(*DATA):
        cli.fail(f"{difference}; compare one set at a time")
    differences = list(differing("many_classes", "few_classes"))
    for difference in differences:
        cli.say(f"note: {difference}; splits are by the bounds")
    return [result | result.get("by_counts", {}) for result in results] if differences else results


def options(result):
    """What makes a row: the script, the precision and every option but the seed and where things lie."""
    args = {k: v for k, v in result["args"].items() if k not in (*NOT_COMPARED, "seed")}
    named = {name: result[name] for name in ("row", "published") if name in result}
    return {"script": result["script"], "precision": result["precision"], **named, **args}


def by_seed(group, name):
    """The accuracy `name` of each seed, a mean over its runs, where there is one."""
    values = {}
    for result in group:
        if result[name] is not None:
            values.setdefault(result["seed"], []).append(result[name])
    return [statistics.mean(of_seed) for of_seed in values.values()]


def spread(values):
    """Mean and, of several values, +- their standard deviation; `-` where there is none."""
    if not values:
        return "-"
    deviation = f" +- {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def grouped(results):
    """(names of the options that differ, [their values, the results of that row]), in the order given.

    An option that a result lacks, of an older version of its script, is taken as off.
    """
    groups = {}
    for result in results:
        on = {k: v for k, v in options(result).items() if v is not None and v is not False}
        groups.setdefault(json.dumps(on, sort_keys=True), []).append(result)
    keys = [options(of[0]) for of in groups.values()]

    def differs(name):
        having = [key for key in keys if name in key]
        scripts = {key["script"] for key in having if key[name] is not None and key[name] is not False}
        lacking = any(name not in key and key["script"] in scripts for key in keys)
        return lacking or len({str(key[name]) for key in having}) > 1

    names = ["script"] + sorted(k for k in {k for key in keys for k in key} - {"script"} if differs(k))
    if all("row" in key for key in keys):  # as benchmarks.reproduce names them
        names = ["row", *(["published"] if any("published" in key for key in keys) else [])]
    # - where there is no such option
    return names, [
        ([str(key.get(k, "-")) for k in names], of) for key, of in zip(keys, groups.values(), strict=True)
    ]


def rows(results):
    """Header and rows of the table."""
    names, groups = grouped(results)
    table = [[*names, *ACCURACIES, "seeds", "minutes", "GB", "commit"]]
    for cells, group in groups:
        accuracies = [spread(by_seed(group, name)) for name in ACCURACIES]
        minutes = statistics.mean(result["seconds"] for result in group) / 60
        memory = max(result["peak_memory_gb"] for result in group)
        commits = ", ".join(sorted({str(result["commit"]) for result in group}))
        seeds = str(len({result["seed"] for result in group}))
        table.append([*cells, *accuracies, seeds, f"{minutes:.1f}", f"{memory:.1f}", commits])
    return table


def class_curve(group):
    """(training images, mean accuracy) of the classes, the rarest first; empty where no result has them."""
    whole = [result for result in group if result.get("per_class")]
    points = []
    for k, n in enumerate(whole[0]["class_counts"] if whole else []):
        seen = [result["per_class"][k] for result in whole if result["per_class"][k] is not None]
        points += [(n, statistics.mean(seen))] if seen else []
    return tuple(zip(*sorted(points), strict=True)) or ([], [])


def draw(results, file):
    """Write the picture of the rows to `file`. They differ in marker, line, hatch and shade: in grey, too."""
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
        from matplotlib.legend_handler import HandlerTuple
    except ImportError:
        cli.fail("--plot: needs matplotlib: pip install matplotlib")
    names, groups = grouped(results)
    if len(groups) > len(MARKERS):
        cli.fail(
            f"--plot: {len(groups)} rows are too many to tell apart; name runs of {len(MARKERS)} or less"
        )
    figure = Figure(figsize=(17, 5), layout="constrained")
    (classes, bars, curves), handles, labels = figure.subplots(1, 3), [], []
    for i, (cells, group) in enumerate(groups):
        shown = zip(names, cells, strict=True)
        labels.append(", ".join(v if name in ("script", "row") else f"{name} {v}" for name, v in shown))
        colour = colormaps["viridis"](0.9 * i / max(len(groups) - 1, 1))
        style = dict(color=colour, marker=MARKERS[i], ls=("-", "--", ":", "-.")[i % 4], ms=5, lw=1.2)
        handles.append(tuple(classes.plot(*class_curve(group), **style)))
        shares = [by_seed(group, name) for name in ACCURACIES]
        heights = [statistics.mean(values) if values else math.nan for values in shares]
        errors = [statistics.stdev(values) if len(values) > 1 else 0 for values in shares]
        places = [x + 0.8 * ((i + 0.5) / len(groups) - 0.5) for x in range(len(shares))]
        look = dict(
            color=colour, edgecolor="black", hatch=("", "//", "..", "xx")[i % 4], lw=0.5, ecolor="grey"
        )
        handles[i] += (bars.bar(places, heights, 0.8 / len(groups), yerr=errors, **look),)
        logs = [[line["all"] for line in result["history"]] for result in group if "history" in result]
        means = [statistics.mean(values) for values in zip(*logs, strict=False)]
        curves.plot(range(1, len(means) + 1), means, **style, markevery=max(1, len(means) // 10))
    classes.set(xscale="log", xlabel="training images of the class", ylabel="test accuracy of the class (%)")
    bars.set(ylabel="test accuracy (%), +- over seeds", xticks=range(len(ACCURACIES)))
    bars.set_xticklabels(ACCURACIES)
    curves.set(xlabel="epoch", ylabel="test accuracy (%)")
    curves.xaxis.get_major_locator().set_params(integer=True)
    for axes in (classes, bars, curves):
        axes.grid(alpha=0.3, axis="y")
    for axes in (classes, curves):
        if not any(len(line.get_xdata()) for line in axes.lines):
            axes.clear()
            axes.text(0.5, 0.5, "of run folders alone", ha="center")
            axes.axis("off")
    columns = max(1, min(len(labels), 200 // (12 + max(map(len, labels)))))
    how = dict(handler_map={tuple: HandlerTuple(ndivide=None)}, handlelength=5, ncols=columns)
    figure.legend(handles, labels, loc="outside lower center", **how)
    try:
        figure.savefig(file, dpi=110)
    except (OSError, ValueError) as e:
        cli.fail(f"--plot {file}: cannot be written ({e}); name another file, such as x.png")


def markdown(table):
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in table
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def numbers(table):
    """The table with each accuracy's spread in a column of its own."""
    split = [name in ACCURACIES for name in table[0]]
    table = [
        [f"{cell} +- {cell} +-" if s else cell for cell, s in zip(table[0], split, strict=True)],
        *table[1:],
    ]
    return [
        [
            part
            for cell, s in zip(row, split, strict=True)
            for part in (cell.partition(" +- ")[::2] if s else [cell])
        ]
        for row in table
    ]


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m common.compare", description=__doc__)
    parser.add_argument("paths", nargs="+", help="run folders, result.json or .jsonl files")
    parser.add_argument("--csv", action="store_true", help="comma-separated values instead of markdown")
    parser.add_argument(
        "--plot", metavar="FILE", help="also draw the rows, into a picture file such as x.png"
    )
    args = parser.parse_args(argv)
    results = on_one_split(read(args.paths))
    table = rows(results)
    if args.csv:
        csv.writer(sys.stdout).writerows(numbers(table))
    else:
        print(markdown(table))
    if args.plot:
        draw(results, args.plot)
        cli.say(f"drew {args.plot}")


if __name__ == "__main__":
    main()
