"""The real images of the folder LONGTAIL_DATA: counts to the image, pixels unchanged, both ways."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

import meta_weights
from common import datasets, evaluation
from common.cli import Args, build

FOLDER = os.environ.get("LONGTAIL_DATA")
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not FOLDER, reason="LONGTAIL_DATA does not name a folder with the image data"),
]
MNIST = [5923, 3596, 2156, 1292, 774, 464, 278, 166, 100, 60]


def load(dataset, **options):
    return datasets.load(Args(dataset=dataset, data_dir=options.pop("data_dir", FOLDER), **options))


@pytest.mark.parametrize("imbalance", [10, 50, 100, 200])
def test_cifar10(imbalance):
    train_set, test_set = load("cifar10_lt", imbalance=imbalance)
    assert train_set.class_counts.tolist() == datasets.long_tail_counts(5000, 10, imbalance)
    assert torch.bincount(test_set.labels).tolist() == [1000] * 10
    if imbalance == 100:  # the first images of class 0 and the last of class 9, in the published order
        original = torchvision.datasets.CIFAR10(FOLDER)
        for k, first in ((0, [398, 3833, 4836, 4572, 636]), (9, [2204, 3816, 2206, 2507, 1926])):
            positions = np.flatnonzero(np.asarray(original.targets) == k)[first]
            ours = train_set.crops[(train_set.labels == k).nonzero().flatten()[:5], 4, 4]
            assert ours.permute(0, 2, 3, 1).numpy().tobytes() == original.data[positions].tobytes()


def test_cifar10_with_development_images():
    """Set aside before the cut: other pixels, of which no training image has a copy."""
    args = build(meta_weights.Args, meta_weights.RECIPES, dataset="cifar10_lt", data_dir=FOLDER)
    train_set, dev_set, _ = meta_weights.load(args)
    assert len(train_set) == 12380 and dev_set.class_counts.tolist() == [10] * 10
    images = [{image.numpy().tobytes() for image in part.padded} for part in (train_set, dev_set)]
    assert len(images[1]) == 100 and not images[0] & images[1]


@pytest.mark.parametrize("dataset, first", [("mnist_lt", 5923), ("fashion_mnist_lt", 6000)])
def test_mnist_style(dataset, first):
    train_set, test_set = load(dataset)
    assert train_set.class_counts.tolist() == [first, *MNIST[1:]]
    assert len(test_set) == 10000 and train_set.shape == (1, 28, 28)
    images, labels = test_set.__getitems__(list(range(100)))
    assert images.min() == 0 and images.max() == 1  # scaled, nothing else
    assert labels.tolist() == test_set.labels[:100].tolist()


def test_cifar100_folder_and_lists(tmp_path):
    root = Path(FOLDER, "cifar100")
    train_set, test_set = load("image_folder", data_dir=str(root))
    assert train_set.class_counts.tolist() == datasets.long_tail_counts(500, 100, 100)
    assert len(test_set) == 10000 and train_set.shape == (3, 32, 32)
    lists = {}
    for part in ("train", "test"):
        names = sorted(folder.name for folder in (root / part).iterdir())
        lines = [
            f"{part}/{n}/{f.name} {k}"
            for k, n in enumerate(names)
            for f in sorted((root / part / n).iterdir())
        ]
        (tmp_path / f"{part}.txt").write_text("\n".join(lines))
        lists[f"{part}_list"] = str(tmp_path / f"{part}.txt")
    listed, _ = load("image_list", data_dir=str(root), **lists)
    assert listed.labels.equal(train_set.labels) and listed.crops.equal(train_set.crops)
    large, _ = load(
        "image_list", data_dir=str(root), image_size=96, **lists
    )  # the same through worker processes
    images, labels = large.__getitems__([0, 5000]).to("cpu")
    assert images.shape == (2, 3, 96, 96) and labels.tolist() == large.labels[[0, 5000]].tolist()


def test_coloured_mnist():
    """The digits of MNIST-LT in the colours of the study; the same on every load."""
    train_set, test_set = load("cmnist_lt")
    grey, grey_test = load("mnist_lt")
    assert train_set.class_counts.tolist() == [5513, 3643, 2282, 1389, 860, 490, 281, 194, 106, 51]
    assert train_set.labels[:20].tolist() == [0, 0, 3, 2, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0]
    assert test_set.labels.equal(grey_test.labels) and train_set.shape == (3, 28, 28)
    palette = [bytes.fromhex(colour) for colour in datasets.COLOURS.split()]
    firsts = (train_set, grey, [3, 3, 0, 1, 8, 3, 5, 2]), (test_set, grey_test, [5, 7, 6, 5, 4, 6, 4, 8])
    for coloured, plain, colours in firsts:
        for i, colour in enumerate(colours):
            digit = plain.crops[i, 0, 0].long()  # [1, 28, 28]
            expected = digit * torch.tensor(list(palette[colour])).view(3, 1, 1) // 255
            assert coloured.crops[i, 0, 0].long().equal(expected)
    assert load("cmnist_lt")[0].crops.equal(train_set.crops)


def test_published_lists():
    _, labels = datasets.read_list(Path(FOLDER, "lists", "Places_LT_train.txt"), 365)
    counts = json.loads(Path(FOLDER, "lists", "places_lt_train_counts.json").read_text())["places_lt_train"]
    assert np.bincount(labels).tolist() == counts
    assert [int(split.sum()) for split in evaluation.split_classes(counts).values()] == [131, 163, 71]
    for name, count, classes in (("ImageNet_LT_test", 50000, 1000), ("iNaturalist18_val", 24426, 8142)):
        paths, labels = datasets.read_list(Path(FOLDER, "lists", f"{name}.txt"), classes)
        assert len(paths) == count and len(np.unique(labels)) == classes


@pytest.mark.slow
@pytest.mark.parametrize("dataset", ["mnist_lt", "fashion_mnist_lt"])
def test_the_study_of_crt(dataset, tmp_path):
    """CSA's study: the head is learned, the tail is not, and cRT finds it in the same features."""
    import decoupled_crt

    def run(classifier, **more):
        given = dict(
            dataset=dataset, data_dir=FOLDER, classifier=classifier, output_dir=str(tmp_path / classifier)
        )
        return decoupled_crt.main(build(decoupled_crt.Args, decoupled_crt.RECIPES, **given, **more))

    joint = run("joint")
    crt = run("crt", stage1=str(tmp_path / "joint"))
    assert joint["many"] > 93 and joint["few"] < 20
    assert crt["all"] > joint["all"] + 10 and crt["few"] > 35
