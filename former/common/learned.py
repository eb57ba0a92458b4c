"""What finished runs learned of each class, as a picture: `python -m common.learned runs/...`.

One row per run, one panel per quantity that its log has of each class: class_rates, the share of a class in
the draws of balanced_meta_softmax.py (dotted: its share of the training images); class_weights and class_eps,
mean weights of meta_weights.py. A line is a class, from the most frequent (dark) to the rarest (light).
"""

import argparse
import json
from pathlib import Path

import numpy as np

from common import cli


def read(folder):
    """(class counts [K], {name: (epochs [E], values [E, K], NaN where there are none)}) of a finished run."""
    try:
        counts = json.loads(Path(folder, "result.json").read_text())["class_counts"]
        lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError, KeyError):
        cli.fail(f"{folder}: holds no finished run; name the folder of one")
    found = {}
    for name in sorted({name for line in lines for name in line if name.startswith("class_")}):
        epochs = [line["epoch"] + 1 for line in lines if name in line]
        values = [line[name] for line in lines if name in line]
        found[name] = np.array(epochs), np.array(values, dtype=float)
    if not found:
        cli.fail(f"{folder}: its log has nothing of each class; a run of a script that learns it has")
    return counts, found


def draw(folders, file):
    """Write the picture of the runs in `folders` to `file`."""
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError:
        cli.fail("python -m common.learned needs matplotlib: pip install matplotlib")
    logs = [read(folder) for folder in folders]
    width = max(len(found) for _, found in logs)
    figure = Figure(figsize=(5.5 * width + 1, 4 * len(logs)), layout="constrained")
    panels = figure.subplots(len(logs), width, squeeze=False)
    for folder, (counts, found), row in zip(folders, logs, panels, strict=True):
        ranks = np.argsort(np.argsort([-count for count in counts], kind="stable"))
        for axes in row[len(found) :]:
            axes.axis("off")
        for axes, (name, (epochs, values)) in zip(row, found.items(), strict=False):
            for k in np.argsort(ranks):
                colour = colormaps["viridis"](0.95 * ranks[k] / max(len(counts) - 1, 1))
                style = dict(color=colour, marker="." if len(epochs) < 30 else None, lw=1.2)
                axes.plot(epochs, values[:, k], label=f"{k} ({counts[k]})", **style)
                if name == "class_rates":
                    axes.axhline(counts[k] / sum(counts), color=colour, ls=":", lw=0.8)
            signed = name == "class_eps"
            scale = dict(linthresh=np.nanmedian(np.abs(values)) + 1e-12) if signed else {}
            axes.set_yscale("symlog" if signed else "log", **scale)
            if signed:  # the labels at the ends of the linear part would lie over that of 0
                axes.set_yticks([t for t in axes.get_yticks() if t == 0 or abs(t) > 5 * scale["linthresh"]])
            axes.set(title=f"{folder}\n{name}", xlabel="epoch")
        if len(counts) <= 20:
            axes.legend(
                title="class (images)", fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5)
            )
    figure.savefig(file, dpi=110)


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m common.learned", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folders", nargs="+", help="folders of finished runs")
    parser.add_argument("--output", default="learned.png", help="file to write (default: learned.png)")
    args = parser.parse_args(argv)
    draw(args.folders, Path(args.output))
    cli.say(f"drew {args.output}")


if __name__ == "__main__":
    main()
