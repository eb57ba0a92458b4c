"""The 2-dimensional features of finished LeNet runs as a picture: `python -m tools.features RUN ...`.

One panel per run, of any script: the features of its test images in the colour of their class.
"""

import argparse

import numpy as np
import torch

import tools
from common import datasets, models
from common.cli import Refused

BATCH = 1000


def read(folder, data_dir=None):
    """(LeNet, test set) of the finished run in `folder`."""
    args = argparse.Namespace(**tools.read_result(folder)["args"])
    args.data_dir = data_dir or args.data_dir
    for module in models.load(folder).modules():  # a script may wrap it
        if isinstance(module, models.LeNet):
            return module, datasets.load(args)[1]
    raise Refused(f"{folder}: its run is of --arch {args.arch}; only lenet has features to draw")


@torch.no_grad()
def features_of(network, dataset):
    """(features [N, 2], labels [N]) of all images, as NumPy."""
    device = next(network.parameters()).device
    parts = [network.features(images.to(device)).cpu() for images in dataset.images.split(BATCH)]
    return torch.cat(parts).numpy(), dataset.labels.numpy()


def draw(folders, file, data_dir=None):
    """Write the picture of the runs in `folders` to `file`."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise Refused("tools.features: needs matplotlib; pip install matplotlib") from None
    runs = [read(folder, data_dir) for folder in folders]
    figure = Figure(figsize=(5 * len(runs) + 2, 5), layout="constrained")
    panels = figure.subplots(1, len(runs), squeeze=False)[0]
    for axes, folder, (network, test_set) in zip(panels, folders, runs, strict=True):
        points, labels = features_of(network, test_set)
        order = np.random.RandomState(0).permutation(len(labels))  # or the last class would cover the others
        axes.scatter(*points[order].T, s=2, color=[f"C{k % 10}" for k in labels[order]])
        axes.set(title=folder, xlabel="feature 1", ylabel="feature 2")
    for k, name in enumerate(test_set.class_names):
        axes.scatter([], [], color=f"C{k % 10}", label=name)
    figure.legend(*axes.get_legend_handles_labels(), title="class", loc="outside right center")
    tools.save_picture(figure, file)


def main(words):
    parser = tools.parser("features", __doc__)
    parser.add_argument("folders", nargs="+", help="folders of finished runs with --arch lenet")
    parser.add_argument("--output", default="features.png", help="file to write (default: features.png)")
    parser.add_argument("--data-dir", help="where the images are now, if not where they were")
    args = parser.parse_args(words)
    draw(args.folders, args.output, args.data_dir)


if __name__ == "__main__":
    tools.run(main)
