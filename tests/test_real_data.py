"""The real images of the folder LONGTAIL_DATA: counts to the image, pixels unchanged, both ways."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import meta_weights
from common import cmnist, datasets, evaluation
from common.cli import Args
from tests.conftest import parse, run_here

FOLDER = os.environ.get("LONGTAIL_DATA")
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not FOLDER, reason="LONGTAIL_DATA does not name a folder with the image data"),
]
MNIST = [5923, 3596, 2156, 1292, 774, 464, 278, 166, 100, 60]
# The first images of class 0 and of class 9 in the published CIFAR-10-LT, by their place in the class.
PUBLISHED = {0: [398, 3833, 4836, 4572, 636], 9: [2204, 3816, 2206, 2507, 1926]}


def load(dataset, **options):
    return datasets.load(Args(dataset=dataset, data_dir=options.pop("data_dir", FOLDER), **options))


@pytest.mark.parametrize("imbalance", [10, 50, 100, 200])
def test_cifar10(imbalance):
    train_set, test_set = load("cifar10_lt", imbalance=imbalance)
    assert train_set.class_counts.tolist() == datasets.long_tail_counts(5000, 10, imbalance)
    assert test_set.class_counts.tolist() == [1000] * 10
    assert train_set.images.shape == (len(train_set), 3, 32, 32) and train_set.images.dtype == torch.uint8


def test_cifar10_is_the_published_one():
    train_set, test_set = load("cifar10_lt")
    original = torchvision.datasets.CIFAR10(FOLDER)
    for k, places in PUBLISHED.items():
        positions = np.flatnonzero(np.asarray(original.targets) == k)[places]
        ours = train_set.images[train_set.labels == k][:5]
        assert ours.permute(0, 2, 3, 1).numpy().tobytes() == original.data[positions].tobytes()
    original = torchvision.datasets.CIFAR10(FOLDER, train=False)
    assert test_set.images.permute(0, 2, 3, 1).numpy().tobytes() == original.data.tobytes()
    assert test_set.labels.tolist() == original.targets


def test_cifar10_with_development_images():
    """Set aside before the cut: other pixels, of which no training image has a copy."""
    args = parse("meta_weights.py", dataset="cifar10_lt", data_dir=FOLDER)
    train_set, _, dev_set = meta_weights.load(args)
    assert len(train_set) == 12380 and dev_set.class_counts.tolist() == [10] * 10
    of_training = {image.numpy().tobytes() for image in train_set.images}
    of_development = {image.numpy().tobytes() for image in dev_set.images}
    assert len(of_development) == 100 and not of_training & of_development


@pytest.mark.parametrize(
    "dataset, first, make",
    [
        ("mnist_lt", 5923, torchvision.datasets.MNIST),
        ("fashion_mnist_lt", 6000, torchvision.datasets.FashionMNIST),
    ],
)
def test_mnist_style(dataset, first, make):
    train_set, test_set = load(dataset)
    assert train_set.class_counts.tolist() == [first, *MNIST[1:]]
    assert len(test_set) == 10000 and train_set.shape == (1, 28, 28)
    original = make(FOLDER, train=False)
    images, labels = test_set.__getitems__(list(range(100)))
    assert images.dtype == torch.uint8 and images[:, 0].equal(original.data[:100])
    assert labels.equal(original.targets[:100])
    mean, deviation = test_set.statistics  # with which the network scales to 0..1, and nothing else
    assert (tuple(mean), tuple(deviation)) == ((0.0,), (1.0,)) and train_set.augmentation is None


def test_cifar100_folder_and_lists(tmp_path):
    root = Path(FOLDER, "cifar100")
    train_set, test_set = load("image_folder", data_dir=str(root), image_size=32)
    assert train_set.class_counts.tolist() == datasets.long_tail_counts(500, 100, 100)
    assert len(test_set) == 10000 and train_set.shape == (3, 32, 32)
    first = min((root / "test" / test_set.class_names[0]).iterdir())
    assert np.array_equal(test_set.images[0].permute(1, 2, 0), Image.open(first).convert("RGB"))

    lists = {}
    for part, step in (("train", 1), ("test", 50)):
        lines = []
        for k, name in enumerate(train_set.class_names):
            for file in sorted((root / part / name).iterdir())[::step]:
                lines.append(f"{part}/{name}/{file.name} {k}")
        (tmp_path / f"{part}.txt").write_text("\n".join(lines))
        lists[f"{part}_list"] = str(tmp_path / f"{part}.txt")
    listed, listed_test = load("image_list", data_dir=str(root), image_size=32, **lists)
    assert listed.labels.equal(train_set.labels) and listed.images.equal(train_set.images)
    assert listed_test.images.equal(test_set.images[::50])

    # the same through worker processes
    large, _ = load("image_list", data_dir=str(root), image_size=96, num_workers=1, **lists)
    loader = datasets.test_loader(large.subset([0, 5000]).plain(), Args())
    ((images, labels),) = loader
    assert loader.num_workers == 1 and images.dtype == torch.uint8 and images.shape == (2, 3, 96, 96)
    assert labels.equal(train_set.labels[[0, 5000]])
    shrunk = torch.nn.functional.interpolate(images.float(), 28, mode="area")  # of 32 the centre is shown
    assert (shrunk - train_set.images[[0, 5000], :, 2:30, 2:30]).abs().mean() < 10


def test_coloured_mnist():
    """The digits of MNIST-LT in the colours of the study; the same on every load."""
    train_set, test_set = load("cmnist_lt")
    grey, grey_test = load("mnist_lt")
    assert train_set.class_counts.tolist() == [5513, 3643, 2282, 1389, 860, 490, 281, 194, 106, 51]
    assert train_set.labels[:20].tolist() == [0, 0, 3, 2, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0]
    assert test_set.labels.equal(grey_test.labels) and train_set.shape == (3, 28, 28)
    palette = [bytes.fromhex(colour) for colour in cmnist.COLOURS.split()]
    firsts = [(train_set, grey, [3, 3, 0, 1, 8, 3, 5, 2]), (test_set, grey_test, [5, 7, 6, 5, 4, 6, 4, 8])]
    for coloured, plain, colours in firsts:
        for i, colour in enumerate(colours):
            digit = plain.images[i].long()  # [1, 28, 28]
            expected = digit * torch.tensor(list(palette[colour])).view(3, 1, 1) // 255
            assert coloured.images[i].long().equal(expected)
    assert load("cmnist_lt")[0].images.equal(train_set.images)


def test_published_lists():
    _, labels = datasets.read_list(Path(FOLDER, "lists", "Places_LT_train.txt"), 365)
    counts = json.loads(Path(FOLDER, "lists", "places_lt_train_counts.json").read_text())["places_lt_train"]
    assert np.bincount(labels).tolist() == counts
    splits = evaluation.split_classes(torch.tensor(counts))
    assert [int(members.sum()) for members in splits.values()] == [131, 163, 71]
    for name, count, classes in (("ImageNet_LT_test", 50000, 1000), ("iNaturalist18_val", 24426, 8142)):
        paths, labels = datasets.read_list(Path(FOLDER, "lists", f"{name}.txt"), classes)
        assert len(paths) == count and len(np.unique(labels)) == classes


@pytest.mark.slow
@pytest.mark.parametrize("dataset", ["mnist_lt", "fashion_mnist_lt"])
def test_the_study_of_crt(dataset, tmp_path):
    """CSA's study: the head is learned, the tail is not, and cRT finds it in the same features."""

    def run(classifier, **more):
        folder = str(tmp_path / classifier)
        options = dict(dataset=dataset, data_dir=FOLDER, recipe="study", output_dir=folder)
        return run_here("decoupled_crt.py", classifier=classifier, **options, **more)

    joint = run("joint")
    crt = run("tune", stage1=str(tmp_path / "joint"))
    assert joint["many"] > 93 and joint["few"] < 20
    assert crt["all"] > joint["all"] + 10 and crt["few"] > 35
