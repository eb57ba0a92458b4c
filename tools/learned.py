"""What finished runs learned of each class, as a picture: `python -m tools.learned runs/... [--output FILE]`.

One row per run, one panel per quantity that its log has of each class: class_rates, the share of a class in
the draws of balanced_meta_softmax.py (dotted: its share of the training images); class_weights and class_eps,
mean weights of meta_weights.py. A line is a class, from the most frequent (dark) to the rarest (light).
"""

import json
from pathlib import Path

import numpy as np

import tools
from common.cli import Refused

MOST_NAMED = 20  # classes in a legend


def read(folder):
    """(class counts [K], {name: (epochs [E], values [E, K])}) of a finished run. Values may be NaN."""
    counts = tools.read_result(folder)["class_counts"]
    try:
        lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").open()]
    except (OSError, ValueError):
        raise Refused(f"{folder}: holds no log (metrics.jsonl); name the folder of a finished run") from None
    found = {}
    for line in lines:
        for name, value in line.items():
            if name.startswith("class_") and isinstance(value, list):
                epochs, values = found.setdefault(name, ([], []))
                epochs.append(line["epoch"] + 1)
                values.append(value)
    if not found:
        raise Refused(f"{folder}: its log has nothing of each class; name a run that learns weights or rates")
    for name, (epochs, values) in found.items():
        found[name] = np.array(epochs), np.array(values, dtype=float)
    return counts, found


def draw(folders, file):
    """Write the picture of the runs in `folders` to `file`."""
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError:
        raise Refused("tools.learned: needs matplotlib; pip install matplotlib") from None
    runs = [read(folder) for folder in folders]
    width = max(len(found) for _, found in runs)
    figure = Figure(figsize=(5.5 * width + 1, 4 * len(runs)), layout="constrained")
    panels = figure.subplots(len(runs), width, squeeze=False)
    for axes in panels.flat:
        axes.axis("off")  # what is drawn on gets its axes back
    for row, folder, (counts, found) in zip(panels, folders, runs, strict=True):
        by_size = np.argsort([-count for count in counts], kind="stable")
        colours = colormaps["viridis"](np.linspace(0, 0.95, len(counts)))
        for axes, (name, (epochs, values)) in zip(row[: len(found)], sorted(found.items()), strict=True):
            axes.axis("on")
            marker = "." if len(epochs) < 30 else None
            for k, colour in zip(by_size, colours, strict=True):
                axes.plot(epochs, values[:, k], color=colour, marker=marker, label=f"{k} ({counts[k]})")
                if name == "class_rates":
                    axes.axhline(counts[k] / sum(counts), color=colour, linestyle=":", linewidth=0.8)
            scale_axis(axes, values)
            axes.set(title=f"{folder}\n{name}", xlabel="epoch")
        if len(counts) <= MOST_NAMED:
            side = dict(loc="center left", bbox_to_anchor=(1, 0.5))
            axes.legend(title="class (images)", fontsize="x-small", **side)
    tools.save_picture(figure, file)


def scale_axis(axes, values):
    """Logarithmic; where there are values of both signs, linear about 0."""
    if np.nanmin(values) > 0:
        axes.set_yscale("log")
        return
    linear = np.nanmedian(np.abs(values)) + 1e-12
    axes.set_yscale("symlog", linthresh=linear)
    # The labels at the ends of the linear part would lie over that of 0.
    axes.set_yticks([tick for tick in axes.get_yticks() if tick == 0 or abs(tick) > 5 * linear])


def main(words):
    parser = tools.parser("learned", __doc__)
    parser.add_argument("folders", nargs="+", help="folders of finished runs")
    parser.add_argument("--output", default="learned.png", help="file to write (default: learned.png)")
    args = parser.parse_args(words)
    draw(args.folders, args.output)


if __name__ == "__main__":
    tools.run(main)
