"""Finished runs side by side: `python -m tools.compare runs/cmo/* [--csv] [--plot compared.png]`.

Takes run folders, result.json files and .jsonl files of result lines. Runs that differ only in the seed are
one row: the mean over seeds, and +- the standard deviation between them. A run that predicts in several ways
has a row for each. Result lines with a "row" (tools.reproduce) are called by it. Where the rows differ in
training settings, and not in the method alone, a line says in which.

--plot draws the rows: accuracy of each class over its training images, accuracy by split, and, of run
folders, test accuracy over the epochs.
"""

import csv
import json
import math
import statistics
import sys
from pathlib import Path

import tools
from common import cli
from common.cli import Refused
from common.evaluation import SPLITS
from common.runs import FREE

# Options that make no difference to the weights. The last ones are of results of the first version.
NOT_COMPARED = (*FREE, "seed", "eval_every", "visualize", "dry_run", "check_data", "decode")
DATA = ("dataset", "imbalance", "train_list", "test_list")  # stand for the data where their hash is missing
BOUNDS = ("splits", "many_over", "few_under", "many_classes", "few_classes")
TRAINING = (
    "arch",
    "pretrained",
    "image_size",
    "augment",
    "epochs",
    "batch_size",
    "lr",
    "lr_steps",
    "lr_factor",
    "cosine",
    "warmup",
    "warmup_from",
    "wd",
    "nesterov",
)
MARKERS = "os^Dv*PX<>ph"
LINES = ("-", "--", ":", "-.")
HATCHES = ("", "//", "..", "xx")


# ------------------------------------------------------------------------------------------------ the results


def read(paths):
    """The results that the paths hold, a list of dicts. Unfinished runs are left out."""
    results = []
    for path in map(Path, paths):
        if (path / "args.json").is_file() and not (path / "result.json").is_file():
            cli.say(f"note: {path}: not finished; left out")
            continue
        file = path / "result.json" if path.is_dir() else path
        try:
            text = file.read_text()
            lines = text.splitlines() if file.suffix == ".jsonl" else [text]
            for line in lines:
                result = json.loads(line)
                check(result)
                log = file.with_name("metrics.jsonl")
                if log.is_file():
                    result["history"] = [json.loads(line) for line in log.open()]
                results += by_prediction(result)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise Refused(f"{file}: not a finished run or a file of result lines ({error!r})") from None
    if not results:
        raise Refused(f"{paths[0]}: no finished run there; name folders of finished runs")
    return results


def check(result):
    for name in ("script", "seed", "precision", "seconds", "peak_memory_gb", "commit", *SPLITS):
        if name not in result:
            raise KeyError(name)
    dict(result["args"])


def by_prediction(result):
    """The result once for each of its predictions, if it has several; classes and epochs are of its own."""
    several = []
    for name, accuracies in result.get("predictions", {}).items():
        other = {**result, **accuracies, "args": {**result["args"], "prediction": name}}
        if "row" in result:
            other["row"] = f"{result['row']}, prediction {name}"
        if name != result["args"]["prediction"]:
            other["per_class"] = None
            other.pop("history", None)
        several.append(other)
    return several or [result]


def check_data(results):
    """Refused where the results are of different data. Said where they split the classes differently."""
    if all("data_sha256" in result for result in results):
        if len({result["data_sha256"][0] for result in results}) > 1:
            for name in DATA:
                refuse_difference(results, name)
            cli.say("note: the runs have other training images of one data set")
        if len({result["data_sha256"][1] for result in results}) > 1:
            raise Refused("the runs have other test images; compare runs on the same ones")
    else:
        is_own = results[0]["args"]["dataset"].startswith("image_")  # told by its folder alone
        for name in (*DATA, "data_dir") if is_own else DATA:
            refuse_difference(results, name)
    for name in BOUNDS:
        values = values_of(results, name)
        if len(values) > 1:
            said = f"the runs differ in {cli.flag(name)} ({', '.join(values)})"
            cli.say(f"note: {said}, so many, medium and few are others")


def values_of(results, name):
    return sorted({show(result["args"].get(name)) for result in results})


def refuse_difference(results, name):
    values = values_of(results, name)
    if len(values) > 1:
        raise Refused(f"the runs differ in {cli.flag(name)} ({', '.join(values)}); compare one set at a time")


# --------------------------------------------------------------------------------------------------- the rows


def show(value):
    """A value of an option as on the command line."""
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value)) or "none"
    return str(value)


def options(result):
    """What makes a row: the script, the precision and every option but those that are not compared."""
    facts = {"script": result["script"], "precision": result["precision"]}
    for name in ("row", "published"):
        if name in result:
            facts[name] = result[name]
    for name, value in result["args"].items():
        if name not in NOT_COMPARED:
            facts[name] = value
    return facts


def grouped(results):
    """[(options, results)] of each row, in the order given.

    An option that a result lacks, of an older version of its script, is taken as off.
    """
    groups = {}
    for result in results:
        on = {name: value for name, value in options(result).items() if is_on(value)}
        groups.setdefault(json.dumps(on, sort_keys=True), []).append(result)
    return [(options(group[0]), group) for group in groups.values()]


def is_on(value):
    return value is not None and value is not False


def differing(groups):
    """Names of the options in which the rows differ, the script first. - stands where there is no such."""
    all_options = [row for row, _ in groups]
    if all("row" in row for row in all_options):  # as tools.reproduce names them
        return ["row", "published"] if any("published" in row for row in all_options) else ["row"]
    names = sorted({name for row in all_options for name in row} - {"script", "row", "published"})
    return ["script", *[name for name in names if differs(all_options, name)]]


def differs(all_options, name):
    having = [row for row in all_options if name in row]
    scripts = {row["script"] for row in having if is_on(row[name])}
    if any(name not in row and row["script"] in scripts for row in all_options):
        return True  # of an older version of its script
    return len({show(row[name]) for row in having}) > 1


def training_note(groups):
    """One line on the training settings in which the rows differ; None where they are on equal terms."""
    parts = []
    for name in TRAINING:
        values = dict.fromkeys(show(row[name]) for row, _ in groups if name in row)
        if len(values) > 1:
            parts.append(f"{name} ({', '.join(values)})")
    if not parts:
        return None
    return f"note: the rows differ in training settings, too: {'; '.join(parts)}"


def of_seeds(group, name):
    """The accuracy `name` of each seed, a mean over its runs, where there is one."""
    values = {}
    for result in group:
        if result[name] is not None:
            values.setdefault(result["seed"], []).append(result[name])
    return [statistics.mean(runs) for runs in values.values()]


def spread(values):
    """Mean and, of several values, +- their standard deviation; - where there is none."""
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} +- {statistics.stdev(values):.1f}"


def table_of(groups):
    """Header and rows of the table, strings all."""
    names = differing(groups)
    table = [[*names, *SPLITS, "seeds", "minutes", "GB", "commit"]]
    for row, group in groups:
        cells = [show(row.get(name, "-")) for name in names]
        cells += [spread(of_seeds(group, name)) for name in SPLITS]
        cells.append(str(len({result["seed"] for result in group})))
        cells.append(f"{statistics.mean(result['seconds'] for result in group) / 60:.1f}")
        cells.append(f"{max(result['peak_memory_gb'] for result in group):.1f}")
        cells.append(", ".join(sorted({str(result["commit"]) for result in group})))
        table.append(cells)
    return table


def markdown(table):
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for row in table:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append(f"| {' | '.join(cells)} |")
    lines.insert(1, f"|{'|'.join('-' * (width + 2) for width in widths)}|")
    return "\n".join(lines)


def write_csv(table, stream):
    """With each accuracy's spread in a column of its own."""
    header = table[0]
    writer = csv.writer(stream)
    for row in table:
        cells = []
        for name, cell in zip(header, row, strict=True):
            if name not in SPLITS:
                cells.append(cell)
            elif row is header:
                cells += [cell, f"{cell} +-"]
            else:
                mean, _, deviation = cell.partition(" +- ")
                cells += [mean, deviation]
        writer.writerow(cells)


# ------------------------------------------------------------------------------------------------ the picture


def draw(groups, file):
    """Write the picture of the rows to `file`. They differ in marker, line, hatch and shade: in grey, too."""
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
        from matplotlib.legend_handler import HandlerTuple
    except ImportError:
        raise Refused("--plot: needs matplotlib; pip install matplotlib") from None
    if len(groups) > len(MARKERS):
        raise Refused(
            f"--plot: {len(groups)} rows are too many to tell apart; name runs of at most {len(MARKERS)}"
        )
    figure = Figure(figsize=(17, 5), layout="constrained")
    classes, bars, curves = figure.subplots(1, 3)
    names, width = differing(groups), 0.8 / len(groups)
    handles, labels = [], []
    for i, (row, group) in enumerate(groups):
        colour = colormaps["viridis"](0.9 * i / max(len(groups) - 1, 1))
        style = dict(color=colour, marker=MARKERS[i], linestyle=LINES[i % 4], markersize=5, linewidth=1.2)
        (line,) = classes.plot(*class_curve(group), **style)
        epochs, accuracies = epoch_curve(group)
        curves.plot(epochs, accuracies, **style, markevery=max(1, len(epochs) // 10))
        values = [of_seeds(group, name) for name in SPLITS]
        places = [k + (i + 0.5) * width - 0.4 for k in range(len(SPLITS))]
        heights = [statistics.mean(seeds) if seeds else math.nan for seeds in values]
        errors = [statistics.stdev(seeds) if len(seeds) > 1 else 0 for seeds in values]
        look = dict(color=colour, edgecolor="black", hatch=HATCHES[i % 4], linewidth=0.5, ecolor="grey")
        handles.append((line, bars.bar(places, heights, width, yerr=errors, **look)))
        labels.append(label_of(row, names))
    classes.set(xscale="log", xlabel="training images of the class", ylabel="test accuracy of the class (%)")
    bars.set(ylabel="test accuracy (%), +- over seeds", xticks=range(len(SPLITS)), xticklabels=SPLITS)
    curves.set(xlabel="epoch", ylabel="test accuracy (%)")
    curves.xaxis.get_major_locator().set_params(integer=True)
    for axes in (classes, bars, curves):
        axes.grid(alpha=0.3, axis="y")
    for axes in (classes, curves):
        if not any(len(line.get_xdata()) for line in axes.lines):
            axes.clear()
            axes.text(0.5, 0.5, "of run folders alone", ha="center")
            axes.axis("off")
    columns = max(1, min(len(groups), 200 // (12 + max(map(len, labels)))))
    side_by_side = {tuple: HandlerTuple(ndivide=None)}
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, handlelength=5, handler_map=side_by_side
    )
    try:
        figure.savefig(file, dpi=110)
    except (OSError, ValueError) as error:
        raise Refused(
            f"--plot {file}: cannot be written ({error}); name another file, such as x.png"
        ) from None
    cli.say(f"drew {file}")


def label_of(row, names):
    parts = []
    for name in names:
        value = show(row.get(name, "-"))
        parts.append(value if name in ("script", "row") else f"{name} {value}")
    return ", ".join(parts)


def class_curve(group):
    """(training images, mean accuracy) of the classes, the rarest first; empty where no result has them."""
    whole = [result for result in group if result.get("per_class")]
    points = []
    for k, count in enumerate(whole[0]["class_counts"] if whole else []):
        accuracies = [result["per_class"][k] for result in whole if result["per_class"][k] is not None]
        if accuracies:
            points.append((count, statistics.mean(accuracies)))
    points.sort()
    return [count for count, _ in points], [accuracy for _, accuracy in points]


def epoch_curve(group):
    """(1-based epochs, mean accuracy after them) of those that were tested; empty where there is no log."""
    accuracies = {}
    for result in group:
        for line in result.get("history", []):
            if "all" in line:
                accuracies.setdefault(line["epoch"] + 1, []).append(line["all"])
    return list(accuracies), [statistics.mean(values) for values in accuracies.values()]


def main(words):
    parser = tools.parser("compare", __doc__)
    parser.add_argument("paths", nargs="+", help="run folders, result.json or .jsonl files")
    parser.add_argument("--csv", action="store_true", help="comma-separated values instead of markdown")
    parser.add_argument("--plot", metavar="FILE", help="also draw the rows, into a file such as x.png")
    args = parser.parse_args(words)
    results = read(args.paths)
    check_data(results)
    groups = grouped(results)
    table = table_of(groups)
    if args.csv:
        write_csv(table, sys.stdout)
    else:
        print(markdown(table))
    note = training_note(groups)
    if note:
        cli.say(note)
    if args.plot:
        draw(groups, args.plot)


if __name__ == "__main__":
    tools.run(main)
