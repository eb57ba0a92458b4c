"""The 2-dimensional features of finished LeNet runs as a picture: `python -m common.features runs/...`.

One panel per run: the features of the test images in the colour of their class.
"""

import argparse
import dataclasses
from pathlib import Path

import numpy as np
import torch

from common import cli, datasets, models, runs


def read(folder, data_dir=None):
    """(network, test set) of the finished run in `folder`, any script's whose network has 2 features."""
    try:
        result, weights = runs.read_finished(folder)
    except OSError as e:
        cli.fail(e)
    names = {field.name for field in dataclasses.fields(cli.Args)} & result["args"].keys()
    given = {name: result["args"][name] for name in names} | ({"data_dir": data_dir} if data_dir else {})
    args = cli.Args(**given)
    if args.arch != "lenet":
        cli.fail(f"{folder}: its run is of --arch {args.arch}; only lenet has features to draw")
    # A script that wraps its network calls it `network`.
    backbone = {k.removeprefix("network."): v for k, v in weights.items() if "backbone" in k or "neck" in k}
    test_set = datasets.load(args)[1]
    network = models.build(args.arch, test_set.num_classes, args.seed, test_set.shape)
    own = {name: value for name, value in network.state_dict().items() if name.startswith("classifier")}
    models.load_weights(network, {**own, **backbone}, str(folder))  # whatever classifies: it is not drawn
    return network, test_set


@torch.no_grad()
def features(network, dataset, batch_size=1000):
    """(features [N, 2], labels [N]) of all images, as NumPy."""
    network.eval()
    batches = torch.arange(len(dataset)).split(batch_size)
    parts = [network.features(dataset.__getitems__(batch.tolist())[0]) for batch in batches]
    return torch.cat(parts).numpy(), dataset.labels.numpy()


def draw(folders, file, data_dir=None):
    """Write the picture of the runs in `folders` to `file`."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        cli.fail("python -m common.features needs matplotlib: pip install matplotlib")
    figure = Figure(figsize=(5 * len(folders) + 2, 5), layout="constrained")
    for axes, folder in zip(figure.subplots(1, len(folders), squeeze=False)[0], folders, strict=True):
        network, test_set = read(folder, data_dir)
        points, labels = features(network, test_set)
        order = np.random.RandomState(0).permutation(len(labels))  # or the last class would cover the others
        axes.scatter(*points[order].T, s=2, color=[f"C{k % 10}" for k in labels[order]])
        axes.set(title=folder, xlabel="feature 1", ylabel="feature 2")
    for k, name in enumerate(test_set.class_names):
        axes.scatter([], [], color=f"C{k % 10}", label=f"{name} ({test_set.class_counts[k]})")
    handles = axes.get_legend_handles_labels()
    figure.legend(*handles, title="class (training images)", loc="outside right center")
    figure.savefig(file, dpi=120)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m common.features", description=__doc__)
    parser.add_argument("folders", nargs="+", help="folders of finished runs with --arch lenet")
    parser.add_argument("--output", default="features.png", help="file to write (default: features.png)")
    parser.add_argument("--data-dir", help="where the images are now, if not where they were")
    args = parser.parse_args(argv)
    draw(args.folders, Path(args.output), args.data_dir)
    cli.say(f"drew {args.output}")


if __name__ == "__main__":
    main()
