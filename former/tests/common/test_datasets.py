"""common.datasets: subsets to the image, samplers as laws and as functions of the seed, both ways through."""

import gc
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from common import augment, datasets
from common.cli import Args, flag
from tests.conftest import ROOT, refusal

CIFAR10_100 = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
CIFAR100_100 = """
500 477 455 434 415 396 378 361 344 328 314 299 286 273 260 248 237 226 216 206 197 188 179 171 163 156
149 142 135 129 123 118 112 107 102 98 93 89 85 81 77 74 70 67 64 61 58 56 53 51 48 46 44 42 40 38 36 35
33 32 30 29 27 26 25 24 23 22 21 20 19 18 17 16 15 15 14 13 13 12 12 11 11 10 10 9 9 8 8 7 7 7 6 6 6 6 5
5 5 5"""
CIFAR100_50 = """
500 480 462 444 426 410 394 379 364 350 336 323 311 299 287 276 265 255 245 235 226 218 209 201 193 186 178
172 165 158 152 146 141 135 130 125 120 115 111 107 102 98 95 91 87 84 81 78 75 72 69 66 64 61 59 56 54 52 50
48 46 44 43 41 39 38 36 35 34 32 31 30 29 27 26 25 24 23 22 22 21 20 19 18 18 17 16 16 15 14 14 13 13 12 12
11 11 10 10 10"""
CIFAR100_10 = """
500 488 477 466 455 445 434 424 415 405 396 387 378 369 361 352 344 336 328 321 314 306 299 292 286 279 273
266 260 254 248 243 237 232 226 221 216 211 206 201 197 192 188 183 179 175 171 167 163 159 156 152 149 145
142 139 135 132 129 126 123 121 118 115 112 110 107 105 102 100 98 95 93 91 89 87 85 83 81 79 77 75 74 72 70
69 67 66 64 63 61 60 58 57 56 54 53 52 51 50"""
MNIST_COUNTS = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
RECORDED = "b5a095d3d333334d8085354a20e7a12465b351855c6725d9f5147bc01f7fe9e7"  # of crops and flips


# Subsets


def test_counts_of_the_cifars():
    assert datasets.long_tail_counts(5000, 10, 100) == CIFAR10_100
    assert datasets.long_tail_counts(5000, 10, 50) == [5000, 3237, 2096, 1357, 878, 568, 368, 238, 154, 100]
    assert datasets.long_tail_counts(5000, 10, 10) == [
        5000,
        3871,
        2997,
        2320,
        1796,
        1391,
        1077,
        834,
        645,
        500,
    ]
    assert datasets.long_tail_counts(5000, 10, 200) == [5000, 2775, 1540, 854, 474, 263, 146, 81, 45, 25]
    assert datasets.long_tail_counts(500, 100, 100) == [int(n) for n in CIFAR100_100.split()]
    assert datasets.long_tail_counts(500, 100, 50) == [int(n) for n in CIFAR100_50.split()]
    assert datasets.long_tail_counts(500, 100, 10) == [int(n) for n in CIFAR100_10.split()]
    totals = {ratio: sum(datasets.long_tail_counts(500, 100, ratio)) for ratio in (10, 20, 50, 100, 200)}
    assert totals == {10: 19573, 20: 15907, 50: 12608, 100: 10847, 200: 9502}
    assert datasets.long_tail_counts(500, 100, 10)[-1] == 50  # 49 with the root taken first
    assert datasets.long_tail_counts(500, 100, 50)[-1] == 10
    assert datasets.long_tail_counts(7, 1, 100) == [7]


@pytest.mark.parametrize(
    "per_class, imbalance, first",
    [
        (
            [500] * 100,
            100,
            {0: [90, 254, 283, 445, 461], 1: [277, 307, 436, 88, 261], 99: [348, 153, 363, 361, 299]},
        ),
        (
            [500] * 100,
            10,
            {0: [90, 254, 283, 445, 461], 1: [277, 307, 436, 88, 261], 99: [348, 153, 363, 361, 299]},
        ),
        ([5000] * 10, 100, {0: [398, 3833, 4836, 4572, 636], 9: [2204, 3816, 2206, 2507, 1926]}),
        (MNIST_COUNTS, 100, {0: [1386, 5218, 4744, 1833, 737], 9: [2062, 3198, 3183, 637, 272]}),
    ],
)
def test_subsets_are_the_published_ones(per_class, imbalance, first):
    """Positions within a class do not depend on how classes are interleaved: any order of labels will do."""
    labels = np.random.RandomState(5).permutation(np.repeat(np.arange(len(per_class)), per_class))
    largest = 6000 if per_class == MNIST_COUNTS else max(per_class)
    kept = datasets.cut(labels, len(per_class), imbalance, largest)
    assert (np.diff(labels[kept]) >= 0).all()  # grouped by class
    for k, expected in first.items():
        positions = np.flatnonzero(labels == k)
        of_class = kept[labels[kept] == k]
        assert np.searchsorted(positions, of_class[:5]).tolist() == expected


def test_mnist_is_capped_by_what_there_is():
    labels = np.repeat(np.arange(10), MNIST_COUNTS)
    counts = np.bincount(labels[datasets.cut(labels, 10, 100, 6000)])
    assert counts.tolist() == [5923, 3596, 2156, 1292, 774, 464, 278, 166, 100, 60]


def cmnist():
    """(labels of the cut, noisy labels, colours of the training images), one generator through all three."""
    generator, labels = np.random.RandomState(0), np.repeat(np.arange(10), MNIST_COUNTS)
    labels = labels[datasets.cut(labels, 10, 100, 6000, generator)]
    noisy = datasets.noisy(labels, 0.25, generator)
    return labels, noisy, datasets.draw_colours(noisy, generator, own=(5, 6, 7, 8, 9))


def test_label_noise_of_coloured_mnist():
    labels, noisy, _ = cmnist()
    assert np.bincount(noisy).tolist() == [5513, 3643, 2282, 1389, 860, 490, 281, 194, 106, 51]
    assert (noisy != labels).sum() == 3702 and (noisy != labels).mean() == pytest.approx(0.249983, abs=1e-6)
    true = [4442, 2698, 1620, 972, 590, 339, 209, 122, 78, 37]
    assert np.bincount(noisy[noisy == labels]).tolist() == true
    assert noisy[:20].tolist() == [0, 0, 3, 2, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0]
    assert noisy[-20:].tolist() == [2, 1, 9, 2, 9, 9, 9, 9, 3, 9, 9, 0, 0, 9, 1, 3, 9, 0, 9, 9]
    assert (datasets.noisy(labels, 0.0, np.random.RandomState(0)) == labels).all()


def test_noise_goes_by_the_size_of_the_other_classes():
    counts = np.array([5923, 3596, 2156, 1292, 774, 464, 278, 166, 100, 60])
    labels = np.repeat(np.arange(10), counts)
    drawn = np.concatenate(
        [datasets.noisy(labels, 1.0, np.random.RandomState(seed))[:5923] for seed in range(20)]
    )
    shares = np.bincount(drawn, minlength=10) / len(drawn)
    row = [0, 0.4047, 0.2426, 0.1454, 0.0871, 0.0522, 0.0313, 0.0187, 0.0113, 0.0068]
    assert shares == pytest.approx(row, abs=0.005) and shares[0] == 0


def test_colours_of_coloured_mnist():
    _, noisy, colours = cmnist()
    assert colours[:20].tolist() == [3, 3, 0, 1, 8, 3, 5, 2, 3, 6, 6, 0, 5, 5, 7, 3, 7, 1, 6, 1]
    assert colours[-20:].tolist() == [5, 3, 9, 9, 9, 9, 9, 9, 8, 9, 9, 0, 5, 9, 7, 2, 9, 2, 9, 9]
    histogram = [1366, 1367, 1363, 1373, 1385, 1821, 1675, 1559, 1469, 1431]
    assert np.bincount(colours).tolist() == histogram
    assert (colours[noisy >= 5] == noisy[noisy >= 5]).all()
    test = datasets.draw_colours(np.arange(20) % 10, np.random.RandomState(0))
    assert test.tolist() == [5, 7, 6, 5, 4, 6, 4, 8, 9, 3, 7, 5, 5, 9, 0, 0, 0, 8, 7, 8]


@pytest.mark.parametrize(
    "pixel, values",
    [
        (0, "0 0 0 " * 10),
        (
            255,
            "31 119 180 255 127 14 44 160 44 214 39 40 148 103 189 140 86 75 227 119 194 127 127 127 "
            "188 189 34 23 190 207",
        ),
        (128, "15 59 90 128 63 7 22 80 22 107 19 20 74 51 94 70 43 37 113 59 97 63 63 63 94 94 17 11 95 103"),
    ],
)
def test_coloured_pixels_are_rounded_down(pixel, values):
    images = datasets.coloured(torch.full((10, 2, 3), pixel, dtype=torch.uint8), np.arange(10))
    assert images.shape == (10, 3, 2, 3) and images.dtype == torch.uint8
    assert images[:, :, 0, 0].flatten().tolist() == [int(value) for value in values.split()]
    assert (images == images[:, :, :1, :1]).all()


def test_private_generator():
    """The subset is the same whatever the global generator did, and leaves it alone."""
    labels = np.repeat(np.arange(3), 50)
    np.random.seed(1)
    before = np.random.get_state()[1].copy()
    first = datasets.long_tail_subset(labels, [50, 10, 5], np.random.RandomState(0))
    assert (np.random.get_state()[1] == before).all()
    np.random.seed(2)
    assert (first == datasets.long_tail_subset(labels, [50, 10, 5], np.random.RandomState(0))).all()


def test_too_large_an_imbalance(capsys):
    line = refusal(lambda: datasets.cut(np.repeat(np.arange(3), 50), 3, 51), capsys)
    assert line == "--imbalance 51: leaves a class without an image; use a lower factor"


@pytest.mark.parametrize("many, few", [(6, 5), (11, None)])
def test_more_classes_in_groups_than_there_are(many, few, capsys):
    args = Args(many_classes=many, few_classes=few)
    line = refusal(lambda: datasets.load(args), capsys)
    given = f"--many-classes {many}" + f", --few-classes {few}" * (few is not None)
    assert line == f"{given}: there are only 10 classes; lower them"


# Samplers


def test_permutation_and_seeds():
    sampler = datasets.EpochSampler(range(50), seed=3)
    items = list(sampler)
    assert sorted(index for index, _ in items) == list(range(50))
    assert len({seed for _, seed in items}) == 50
    assert items == list(sampler)
    sampler.set_epoch(1)
    assert items != list(sampler)
    assert items != list(datasets.EpochSampler(range(50), seed=4))
    assert items != list(datasets.EpochSampler(range(50), seed=3, stream=1))


def test_weighted_draws():
    weights = torch.tensor([0.0, 1.0, 3.0, 0.0, 6.0, 0.0])
    sampler, found = datasets.EpochSampler(range(6), 0, weights=weights), []
    for epoch in range(4000):
        sampler.set_epoch(epoch)
        found += [index for index, _ in sampler]
    shares = torch.bincount(torch.tensor(found), minlength=6) / len(found)
    torch.testing.assert_close(shares, weights / 10, atol=0.01, rtol=0)
    assert shares[[0, 3, 5]].sum() == 0


def test_fingerprints_of_the_subset():
    """Legacy draws, worked out elsewhere: of [0] * 5 + [1] * 5 + [2] * 5 and of i % 10."""
    kept = datasets.long_tail_subset(np.repeat([0, 1, 2], 5), [5, 3, 1], np.random.RandomState(0))
    assert kept.tolist() == [2, 0, 1, 3, 4, 5, 7, 6, 11]
    labels, counts = np.arange(1000) % 10, datasets.long_tail_counts(100, 10, 100)
    assert counts == [100, 59, 35, 21, 12, 7, 4, 2, 1, 1]
    kept = datasets.long_tail_subset(labels, counts, np.random.RandomState(0))
    assert len(kept) == 242 and kept.sum() == 121360
    firsts = np.cumsum([0, *counts[:-1]])
    assert kept[firsts].tolist() == [260, 181, 422, 543, 894, 935, 936, 987, 28, 969]


def test_an_order_of_its_own():
    """`order` gets the size, the epoch and a generator that is a function of (seed, epoch, stream)."""
    asked = []

    def order(size, epoch, generator):
        asked.append((size, epoch, torch.rand(1, generator=generator).item()))
        return torch.arange(size) % 3

    sampler = datasets.EpochSampler(range(3), 0, order=order, size=7)
    for epoch in (0, 4, 0):
        sampler.set_epoch(epoch)
        assert [index for index, _ in sampler] == [0, 1, 2, 0, 1, 2, 0]
    assert len(sampler) == 7 and [call[:2] for call in asked] == [(7, 0), (7, 4), (7, 0)]
    assert asked[0] == asked[2] and asked[0][2] != asked[1][2]


def test_pairs_load_only_what_is_wanted():
    asked = []

    class Source(datasets.LabelledImages):
        def __init__(self):
            pass

        def __len__(self):
            return 10

        def __getitems__(self, items):
            asked.append(len(items))
            return [index for index, _ in items]

    first, second = (datasets.EpochSampler(range(10), 0, stream) for stream in (0, 1))
    sampler = datasets.PairSampler(first, second, 4, wanted=lambda epoch: [epoch == 0, True])
    loader = DataLoader(
        datasets.Pairs(Source()), 4, sampler=sampler, drop_last=True, collate_fn=datasets.whole_batch
    )
    assert [partner is None for _, partner in loader] == [False, False]
    sampler.set_epoch(1)
    asked.clear()
    batches = list(loader)
    assert [partner is None for _, partner in batches] == [True, False]
    assert asked == [4, 4, 4]
    assert batches[1][1] == [index for index, _ in second][4:8]


# In memory


def in_memory(padding=2, flip=True, size=6, count=5):
    images = torch.arange(count * 3 * size * size).view(count, 3, size, size).remainder(251).to(torch.uint8)
    statistics = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)
    facts = [count], ["only"], (3, size, size), *statistics
    return (
        images,
        datasets.ImagesInMemory(images, torch.zeros(count), *facts, padding=padding, flip=flip),
        statistics,
    )


def normalised(image, statistics):
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in statistics)
    return (image.float() / 255 - mean) / std


def test_plain_items_are_the_images():
    images, data, statistics = in_memory()
    batch, labels = data.__getitems__([3, 0])
    torch.testing.assert_close(batch, normalised(images[[3, 0]], statistics))
    assert labels.tolist() == [0, 0]


def test_augmentation_is_a_crop_of_the_zero_padded_image_and_a_flip():
    """Every outcome is one of the 5 x 5 x 2 made by hand with NumPy, and all are about equally frequent."""
    images, data, statistics = in_memory()
    padded = np.pad(images[2].numpy(), ((0, 0), (2, 2), (2, 2)))
    outcomes = {}
    for dy in range(5):
        for dx in range(5):
            crop = padded[:, dy : dy + 6, dx : dx + 6]
            for flip, image in enumerate((crop, crop[:, :, ::-1].copy())):
                outcomes[normalised(torch.from_numpy(image), statistics).numpy().round(3).tobytes()] = (
                    dy,
                    dx,
                    flip,
                )
    assert len(outcomes) == 50
    seeds = torch.randint(2**62, (5000,), generator=torch.Generator().manual_seed(0)).tolist()
    batch, _ = data.__getitems__([(2, seed) for seed in seeds])
    found = [outcomes[image.numpy().round(3).tobytes()] for image in batch]
    counts = [found.count(outcome) for outcome in outcomes.values()]
    assert min(counts) > 60 and max(counts) < 140  # 100 expected, standard deviation 10


def test_augmentation_depends_on_the_seed_alone():
    _, data, _ = in_memory()
    together, _ = data.__getitems__([(0, 77), (1, 78), (0, 79)])
    alone, _ = data.__getitems__([(1, 78)])
    assert together[1].equal(alone[0])


def test_without_augmentation_seeds_change_nothing():
    _, data, _ = in_memory(padding=0, flip=False)
    assert data.__getitems__([(1, 78)])[0].equal(data.__getitems__([1])[0])


# Through the loader


def batches(train_set, sampler, batch_size=4, workers=None):
    accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(split_batches=True))
    options = datasets.loader_options(train_set)
    if workers is not None:
        options["num_workers"] = workers
    loader = accelerator.prepare(
        DataLoader(train_set, batch_size, sampler=sampler, drop_last=True, **options)
    )
    loader.set_epoch(2)
    return list(loader)


def test_loader_in_memory():
    images, data, _ = in_memory()
    sampler = datasets.EpochSampler(data, 0)
    ((batch, labels),) = batches(data, sampler)
    sampler.set_epoch(2)
    assert batch.equal(data.__getitems__(list(sampler)[:4])[0])
    assert labels.shape == (4,)


@pytest.fixture
def folder(tmp_path):
    """train/ and test/ with 6 and 3 images of odd sizes, colour modes and names."""
    generator = np.random.RandomState(0)
    for part, counts in (("train", (6, 3)), ("test", (2, 2))):
        for k, count in enumerate(counts):
            (tmp_path / part / f"class {k}").mkdir(parents=True)
            for i in range(count):
                pixels = generator.randint(0, 256, (80 + 7 * i, 90, 3), dtype=np.uint8)
                image = Image.fromarray(pixels).convert(("RGB", "L", "P", "CMYK")[i % 4])
                kind = "png" if image.mode == "P" else "jpg"
                image.save(tmp_path / part / f"class {k}" / f"ein Bild für {i}.{kind}")
    return tmp_path


def folder_args(folder, **options):
    return Args(
        **{**dict(dataset="image_folder", data_dir=str(folder), imbalance=None, batch_size=4), **options}
    )


def test_image_folder_from_files(folder):
    train_set, test_set = datasets.load(folder_args(folder, image_size=72))
    assert isinstance(train_set, datasets.ImageFiles)
    assert train_set.class_names == ["class 0", "class 1"]
    assert train_set.class_counts.tolist() == test_set.class_counts.tolist() == [6, 3]
    assert len(train_set) == 9 and len(test_set) == 4
    found = batches(train_set, datasets.EpochSampler(train_set, 0), workers=0)
    assert [images.shape for images, _ in found] == [(4, 3, 72, 72)] * 2
    again = batches(train_set, datasets.EpochSampler(train_set, 0), workers=2)
    for (one, labels), (other, same) in zip(found, again, strict=True):  # whatever the number of workers
        assert one.equal(other) and labels.equal(same)
    assert 0.5 < torch.cat([images for images, _ in found]).std() < 3  # normalised


def test_test_images_from_files_are_the_centre(folder):
    _, test_set = datasets.load(folder_args(folder, image_size=72))
    image = Image.new("RGB", (164, 82), (0, 0, 0))  # resized to a short side of 82 = 72 / 0.875: no change
    image.paste((255, 255, 255), (46, 5, 118, 77))  # the centre 72 x 72
    image.save(os.path.join(test_set.root, os.fsdecode(test_set.paths[0])), "png")
    images, _ = test_set.__getitems__([0]).to("cpu")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in datasets.IMAGENET_STATISTICS)
    torch.testing.assert_close(images[0], ((1 - mean) / std).expand(3, 72, 72), atol=1e-4, rtol=0)


def test_small_images_are_kept_in_memory(folder):
    train_set, _ = datasets.load(folder_args(folder, image_size=32))
    assert isinstance(train_set, datasets.ImagesInMemory)
    assert train_set.shape == (3, 32, 32) and train_set.padding == 4 and train_set.flip
    for i, size in enumerate(((32, 40), (40, 32))):  # one side fits
        Image.new("RGB", size).save(folder / "train" / "class 0" / f"ein Bild für {i}.jpg")
    assert datasets.load(folder_args(folder, image_size=32))[0].shape == (3, 32, 32)


def test_native_size(folder, capsys):
    assert datasets.load(folder_args(folder))[0].shape == (3, 224, 224)
    assert capsys.readouterr().err.endswith(", 4 test images, of 224 pixels a side\n")
    Image.new("RGB", (7, 7)).save(folder / "train" / "class 0" / "a.png")  # not to be trained on
    assert datasets.load(folder_args(folder))[0].shape == (3, 224, 224)
    for path in folder.glob("t*/*/*"):
        with Image.open(path) as image:
            image.convert("RGB").resize((24, 24)).save(path)
    train_set, _ = datasets.load(folder_args(folder))
    assert train_set.shape == (3, 24, 24) and isinstance(train_set, datasets.ImagesInMemory)


def test_image_folder_is_cut(folder):
    train_set, _ = datasets.load(folder_args(folder, image_size=32, imbalance=6.0))
    assert train_set.class_counts.tolist() == [6, 1]


def test_val_serves_as_test(folder, capsys):
    """Where there is no test/."""
    shutil.copytree(folder / "test", folder / "val")
    next((folder / "val" / "class 0").iterdir()).unlink()
    assert len(datasets.load(folder_args(folder, image_size=32))[1]) == 4
    note = f"note: tested on {folder}/test; {folder}/val is left alone"
    assert capsys.readouterr().err.splitlines()[0] == note
    shutil.rmtree(folder / "test")
    assert len(datasets.load(folder_args(folder, image_size=32))[1]) == 3
    assert "note" not in capsys.readouterr().err
    shutil.rmtree(folder / "val")
    line = refusal(lambda: datasets.load(folder_args(folder)), capsys)
    assert line.endswith(f"needs train/CLASS/ and test/CLASS/ (or val/CLASS/); there is no {folder}/test")


def test_links_to_nowhere_are_no_classes(folder, capsys):
    (folder / "train" / "class 2").symlink_to(folder / "nowhere")
    line = refusal(lambda: datasets.load(folder_args(folder)), capsys)
    assert line == f"{folder}/train/class 2: is a link to what is not there; mend it"


def test_hidden_folders_are_no_classes(folder):
    (folder / "train" / ".ipynb_checkpoints").mkdir()
    assert datasets.load(folder_args(folder))[0].class_names == ["class 0", "class 1"]


def test_folders_that_cannot_be_read(folder, capsys, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(datasets.Path, "iterdir", refuse)
    line = refusal(lambda: datasets.load(folder_args(folder)), capsys)
    assert line == f"{folder}/train: cannot be read (Permission denied); mend that"


def write_lists(folder):
    """train.txt and test.txt with CRLF ends, a blank line and no final newline."""
    for part in ("train", "test"):
        lines = [f"{p.relative_to(folder)} {p.parent.name[-1]}" for p in sorted((folder / part).glob("*/*"))]
        (folder / f"{part}.txt").write_bytes("\r\n".join([*lines[:2], "", *lines[2:]]).encode())
    return dict(
        train_list=str(folder / "train.txt"), test_list=str(folder / "test.txt"), dataset="image_list"
    )


def test_paths_of_a_list(folder, capsys, monkeypatch):
    """A list in --data-dir, with a byte order mark; ./a.jpg is a.jpg."""
    options, file = write_lists(folder), folder / "train.txt"
    plain = datasets.read_list(file)
    file.write_bytes(b"\xef\xbb\xbf./" + file.read_bytes().replace(b"class 1/", b".//class 1/"))
    paths, labels = datasets.read_list(file)
    assert paths == plain[0] and labels.tolist() == plain[1].tolist()
    assert paths[0].startswith("train/class 0/")
    here = {**options, "train_list": "train.txt", "test_list": "test.txt"}
    assert len(datasets.load(folder_args(folder, **here))[0]) == 9
    (folder / "elsewhere").mkdir()  # the working folder comes first
    (folder / "elsewhere" / "test.txt").write_text("test/class 0/ein Bild für 0.jpg 0")
    monkeypatch.chdir(folder / "elsewhere")
    assert len(datasets.load(folder_args(folder, **here))[1]) == 1
    capsys.readouterr()
    line = refusal(lambda: datasets.load(folder_args(folder, **{**here, "test_list": "tset.txt"})), capsys)
    assert line.startswith(f"--test-list tset.txt: no such list file, nor in --data-dir {folder}; ")


def test_a_path_that_is_no_text(tmp_path, capsys):
    content = '{"images": [{"id": 1, "file_name": "\\ud800.jpg"}], "annotations": []}'
    (tmp_path / "train.json").write_text(content)
    line = refusal(lambda: datasets.read_list(tmp_path / "train.json"), capsys)
    assert line.startswith(f"{tmp_path}/train.json: not a list file in UTF-8 or a JSON file with")


def test_a_label_that_is_a_mistake(folder, capsys):
    """Is not taken for the number of the classes, whatever may be left out."""
    options = write_lists(folder)
    with open(options["train_list"], "a") as file:
        file.write(f"\na.jpg {10**20}")
    args = folder_args(folder, **options, allow_empty_classes=True)
    line = refusal(lambda: datasets.load(args), capsys)
    assert line == f"{options['train_list']}:11: label {10**20} is out of range; labels are 0 to 999999"


def test_image_list_equals_image_folder(folder):
    listed, _ = datasets.load(folder_args(folder, **write_lists(folder), image_size=32))
    found, _ = datasets.load(folder_args(folder, image_size=32))
    assert listed.labels.equal(found.labels)
    assert listed.crops.equal(found.crops)


def test_competition_json(tmp_path):
    content = dict(
        images=[dict(id=7, file_name="a/x y.jpg"), dict(id=3, file_name="b.jpg")],
        annotations=[dict(image_id=3, category_id=0), dict(image_id=7, category_id=2)],
    )
    (tmp_path / "train.json").write_text(json.dumps(content))
    paths, labels = datasets.read_list(tmp_path / "train.json", 3)
    assert paths == ["a/x y.jpg", "b.jpg"] and labels.tolist() == [2, 0]


# Wrong input: one line each


@pytest.mark.parametrize(
    "lines, complaint",
    [
        ("a.jpg 0\nb.jpg", "list.txt:2: no label after 'b.jpg'; a line is `relative/path label`"),
        ("a.jpg 0\nb.jpg 1.0", "list.txt:2: label '1.0' is no integer; a line is `relative/path label`"),
        ("a.jpg -1", "list.txt:1: label -1 is out of range; labels are 0 to 4"),
        ("a.jpg -100", "list.txt:1: label -100 is out of range; labels are 0 to 4"),
        ("a.jpg 4\n\nb.jpg 5", "list.txt:3: label 5 is out of range; labels are 0 to 4"),
        ("\n", "list.txt: names no image; a line is `relative/path label`"),
        (
            "a.jpg 0\nb\0.jpg 1",
            "list.txt: not a list file in UTF-8 or a JSON file with images and annotations (a NUL byte)",
        ),
    ],
)
def test_wrong_lists(tmp_path, capsys, lines, complaint):
    (tmp_path / "list.txt").write_text(lines)
    line = refusal(lambda: datasets.read_list(tmp_path / "list.txt", 5), capsys)
    assert line == f"{tmp_path}/{complaint}"


@pytest.mark.parametrize("text", ['{"images": []}', "{", "[1]"])
def test_wrong_json(tmp_path, capsys, text):
    (tmp_path / "train.json").write_text(text)
    line = refusal(lambda: datasets.read_list(tmp_path / "train.json", 5), capsys)
    assert line.startswith(f"{tmp_path}/train.json: not a list file in UTF-8 or a JSON file with images")


@pytest.mark.parametrize("dataset", ["imagenet_lt", "places_lt", "inat2017", "inat2018"])
def test_missing_lists_and_folders(tmp_path, capsys, dataset):
    args = Args(dataset=dataset, data_dir=str(tmp_path), imbalance=None)
    line = refusal(lambda: datasets.load(args), capsys)
    named = f"{datasets.LISTS[dataset][0]}; put it there (README: Data), or name it by --train-list"
    assert line == f"--data-dir {tmp_path}: holds no {named}"
    args.data_dir = str(tmp_path / "nowhere")
    line = refusal(lambda: datasets.load(args), capsys)
    assert line.startswith(f"--data-dir {tmp_path}/nowhere: no such folder")


def test_lists_are_needed_and_fixed_lists_are_not_cut(folder, capsys):
    line = refusal(lambda: datasets.load(folder_args(folder, dataset="image_list")), capsys)
    assert line.startswith("--train-list: image_list needs it")
    lists = write_lists(folder)
    lists["dataset"] = "places_lt"
    (folder / "train.txt").write_text("".join(f"train/x.jpg {k}\n" for k in range(365)))
    line = refusal(lambda: datasets.load(folder_args(folder, **lists, imbalance=10.0)), capsys)
    assert line == "--imbalance 10: places_lt is a fixed list; leave the option out"


def test_download_that_fails(tmp_path, capsys, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", no_network)
    line = refusal(lambda: datasets.load(Args(dataset="cifar10_lt", data_dir=str(tmp_path / "data"))), capsys)
    assert line.startswith(f"--data-dir {tmp_path}/data: cifar-10-batches-py is not complete there")


def test_classes_on_one_side_only(folder, capsys):
    (folder / "train" / "class 1").rename(folder / "train" / "klass")
    line = refusal(lambda: datasets.load(folder_args(folder)), capsys)
    remedy = "make a folder of that name, be it empty"
    assert line == f"{folder}/test: lacks 1 classes of {folder}/train: klass; {remedy}"
    (folder / "test" / "klass").mkdir()
    line = refusal(lambda: datasets.load(folder_args(folder)), capsys)
    assert line == f"{folder}/train: lacks 1 classes of {folder}/test: class 1; {remedy}"


def test_folders_that_are_no_image_folder(tmp_path, capsys):
    line = refusal(lambda: datasets.load(folder_args(tmp_path)), capsys)
    assert line.endswith(f"there is no {tmp_path}/train")
    (tmp_path / "train").mkdir()
    line = refusal(lambda: datasets.load(folder_args(tmp_path)), capsys)
    assert line.startswith(f"{tmp_path}/train: holds no class folder")


def test_class_without_training_images(folder, capsys):
    for path in (folder / "train" / "class 1").iterdir():
        path.unlink()
    line = refusal(lambda: datasets.load(folder_args(folder)), capsys)
    assert line == (
        f"--data-dir {folder}: no training image of 1 of 2 classes: class 1; "
        "add images, or --allow-empty-classes leaves them out"
    )


def test_empty_classes_can_be_left_out(folder, capsys):
    """Classes are numbered anew, and the test images of the empty ones go, too."""
    for part in ("train", "test"):
        shutil.copytree(folder / part / "class 1", folder / part / "class 2")
    for path in (folder / "train" / "class 1").iterdir():
        path.unlink()
    for lists in ({}, write_lists(folder)):
        train, test = datasets.load(folder_args(folder, **lists, allow_empty_classes=True))
        note = capsys.readouterr().err.splitlines()[0]
        assert note.startswith("note: no training image of 1 of 3 classes: ")
        assert note.endswith("1; left out, with 2 test images")
        assert train.class_names == (["0", "2"] if lists else ["class 0", "class 2"])
        assert train.classes == test.classes == [0, 2] and len(train.all_names) == len(test.all_names) == 3
        assert train.class_counts.tolist() == [6, 3]
        assert train.labels.tolist() == [0] * 6 + [1] * 3 and test.labels.tolist() == [0, 0, 1, 1]
        assert [path.decode()[:14] for path in test.paths] == ["test/class 0/e"] * 2 + ["test/class 2/e"] * 2
    args = folder_args(folder, allow_empty_classes=True, imbalance=2.0)
    assert datasets.load(args)[0].class_counts.tolist() == [6, 3]
    before = datasets.load(args)[0].sha256()
    capsys.readouterr()
    args.few_classes = 3
    for call in (datasets.load, datasets.check):
        assert refusal(lambda of=call: of(args), capsys).startswith(
            "--few-classes 3: there are only 2 classes"
        )
    args.few_classes = None
    for part in ("train", "test"):  # another class is left out, and the same images are there
        (folder / part / "class 1").rename(folder / part / "class 3")
    assert datasets.load(args)[0].sha256() != before


@pytest.mark.parametrize("call", [datasets.load, datasets.check])
def test_a_part_without_images(folder, capsys, call):
    """Neither is there a test without images, whether or not classes may be left out, nor a training."""
    for path in (folder / "test" / "class 0").iterdir():
        path.unlink()
    for path in (folder / "train" / "class 1").iterdir():
        path.unlink()
    args = folder_args(folder, allow_empty_classes=True, check_data=call is datasets.check)
    line = refusal(lambda: call(args), capsys)
    assert line == f"--data-dir {folder}: no test image of these classes; put them there"
    for path in (folder / "train" / "class 0").iterdir():
        path.unlink()
    assert refusal(lambda: call(args), capsys) == f"--data-dir {folder}: no training image; put them there"


def test_a_test_without_images(folder, capsys):
    for path in (folder / "test").glob("*/*"):
        path.unlink()
    line = refusal(lambda: datasets.load(folder_args(folder)), capsys)
    assert line == f"--data-dir {folder}: no test image of these classes; put them there"


def test_images_in_both_parts_are_told(folder, capsys):
    lists = write_lists(folder)
    with open(lists["test_list"], "a") as file:
        file.write("\ntrain/class 0/ein Bild für 2.png 0\n")
    datasets.load(folder_args(folder, **lists))
    note = "note: 1 test images are training images, too, such as train/class 0/ein Bild für 2.png"
    assert capsys.readouterr().err.splitlines()[0] == note
    with pytest.raises(SystemExit):
        datasets.check(folder_args(folder, **lists, check_data=True))
    assert capsys.readouterr().err.splitlines() == [
        "train/class 0/ein Bild für 2.png: for training and test",
        "--check-data: of 13 images 0 missing, 0 broken, 1 for training and test",
    ]


def test_copies_in_both_parts_are_told(folder, capsys):
    """A link to a training image, and with --decode a copy of one; not one that is twice in a part."""
    train, test = folder / "train" / "class 0", folder / "test" / "class 0"
    (test / "link.jpg").symlink_to(train / "ein Bild für 0.jpg")
    shutil.copy(train / "ein Bild für 1.jpg", test / "copy.jpg")
    shutil.copy(train / "ein Bild für 2.png", train / "again.png")
    for decode, named in ((False, ["link"]), (True, ["copy", "link"])):
        with pytest.raises(SystemExit):
            datasets.check(folder_args(folder, check_data=True, decode=decode))
        *lines, last = capsys.readouterr().err.splitlines()
        assert lines == [f"test/class 0/{name}.jpg: for training and test" for name in named]
        assert last == f"--check-data: of 16 images 0 missing, 0 broken, {len(named)} for training and test"


def test_development_images_are_trained_on(jpeg_lists, tmp_path, capsys):
    """So none of the test may be among them; a dry run goes on."""
    import meta_weights

    (tmp_path / "dev.txt").write_text((tmp_path / "test.txt").read_text())
    args = meta_weights.Args(**jpeg_lists, dev_list=str(tmp_path / "dev.txt"), check_data=True)
    with pytest.raises(SystemExit):
        datasets.check(args)
    assert capsys.readouterr().err.splitlines()[-1].endswith("0 missing, 0 broken, 9 for training and test")
    args.check_data, args.dry_run = False, True
    datasets.check(args)
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "note: 9 test images are trained on, too, such as test/class 0/0.jpg"


def test_images_named_twice_are_told(folder, capsys):
    options = write_lists(folder)
    with open(options["train_list"], "a") as file:
        file.write("\n./train/class 0/ein Bild für 0.jpg 1\ntrain/class 0/ein\u2028 Bild.jpg 1")
    paths, _ = datasets.read_list(options["train_list"])
    assert len(paths) == 11 and paths[-1] == "train/class 0/ein\u2028 Bild.jpg"
    note = f"note: {options['train_list']}: 1 lines name an image that is named before\n"
    assert capsys.readouterr().err == note


def test_missing_images_are_counted(jpegs, jpeg_lists, tmp_path, capsys):
    """Of lists of 69 images first 3, then 36; a folder is no image."""
    args = Args(**jpeg_lists, check_data=True)
    datasets.check(args)
    assert capsys.readouterr().err.splitlines() == [
        "image_list: 60 training images in 3 classes of 20 to 20, 9 test images, of 72 pixels a side",
        "all 69 images are there",
    ]
    files = [tmp_path / "data" / part for part in open(args.train_list).read().split("\n")]
    files = [file.with_name(file.name.rpartition(" ")[0]) for file in files]
    for file in files[:3]:
        file.unlink()
    files[1].mkdir()
    with pytest.raises(SystemExit) as stop:
        datasets.check(args)
    *lines, last = capsys.readouterr().err.splitlines()
    assert (
        stop.value.code == 2
        and last == "--check-data: of 69 images 2 missing, 1 broken, 0 for training and test"
    )
    assert lines[0] == f"{files[0]}: no such image; check --data-dir and the list" and len(lines) == 3
    for file in files[3:36]:
        file.unlink()
    with pytest.raises(SystemExit):
        datasets.check(args)
    *lines, last = capsys.readouterr().err.splitlines()
    assert len(lines) == 10
    assert last.endswith(
        "35 missing, 1 broken, 0 for training and test; is it another edition of the data set?"
    )


def test_broken_images_are_counted(jpegs, tmp_path, capsys):
    """All of them, with --decode; without it they are there."""
    whole = (tmp_path / "data" / "train" / "class 0" / "5.jpg").read_bytes()
    contents = {"0": b"", "1": b"<html>", "2": whole[:500]}
    for name, content in contents.items():
        (tmp_path / "data" / "train" / "class 1" / f"{name}.jpg").write_bytes(content)
    datasets.check(Args(**jpegs, check_data=True))
    capsys.readouterr()
    with pytest.raises(SystemExit):
        datasets.check(Args(**jpegs, check_data=True, decode=True))
    *lines, last = capsys.readouterr().err.splitlines()
    assert last == "--check-data: of 69 images 0 missing, 3 broken, 0 for training and test"
    for name, line in zip(contents, lines, strict=True):
        assert line.startswith(f"{tmp_path}/data/train/class 1/{name}.jpg: not readable as an image")


def test_lists_of_a_script_are_checked(jpeg_lists, tmp_path, capsys):
    import meta_weights

    text = (tmp_path / "dev.txt").read_text()
    (tmp_path / "dev.txt").write_text(text.replace("class 0/0.jpg", "class 0/gone.jpg"))
    args = meta_weights.Args(**jpeg_lists, dev_list=str(tmp_path / "dev.txt"), check_data=True)
    with pytest.raises(SystemExit):
        datasets.check(args)
    assert capsys.readouterr().err.splitlines()[-1].startswith("--check-data: of 70 images 1 missing")
    (tmp_path / "dev.txt").write_text(text[:-1] + "3")
    assert refusal(lambda: datasets.check(args), capsys).endswith(
        "label 3 is out of range; labels are 0 to 2"
    )


@pytest.mark.parametrize(
    "options, complaint",
    [
        (dict(batch_size=61), "--batch-size 61: there are only 60 training images"),
        (dict(few_classes=4), "--few-classes 4: there are only 3 classes"),
        (dict(cutout=4), "--cutout: is for RGB images of up to 64 pixels"),
        (dict(color_jitter=0.0, image_size=None, random_rotation=4), "--random-rotation: is for RGB images"),
    ],
)
def test_what_loading_would_refuse_is_checked(jpegs, capsys, options, complaint):
    args = Args(**{**jpegs, **options}, check_data=True)
    line = refusal(lambda: datasets.check(args), capsys)
    assert line.startswith(complaint)
    assert refusal(lambda: datasets.load(args), capsys) == line


def test_labels_of_other_lists_count_classes_that_are_left_out(jpeg_lists, tmp_path, capsys):
    import meta_weights

    for name in ("train", "test", "dev"):
        file = tmp_path / f"{name}.txt"
        lines = [line.rsplit(" ", 1) for line in file.read_text().splitlines()]
        file.write_text("".join(f"{path} {2 * int(label)}\n" for path, label in lines))
    args = meta_weights.Args(**jpeg_lists, dev_list=str(tmp_path / "dev.txt"), check_data=True)
    args.allow_empty_classes = True
    datasets.check(args)
    train_set, _ = datasets.load(args)
    dev_set = datasets.load_list(args, "dev_list", train_set)
    assert dev_set.class_counts.tolist() == [2, 2, 2] and dev_set.labels.tolist() == [0, 0, 1, 1, 2, 2]
    file.write_text("train/class 0/0.jpg 0\ntest/class 0/0.jpg 1\ntrain/class 1/0.jpg 4\n")
    capsys.readouterr()
    for call in (lambda: datasets.check(args), lambda: datasets.load_list(args, "dev_list", train_set)):
        line = refusal(call, capsys)
        assert line == f"--dev-list {file}: names no image of class 2; give a list with images of each"
    file.write_text("".join(f"train/class 0/{k}.jpg {k}\n" for k in range(5)))  # and of others
    assert datasets.load_list(args, "dev_list", train_set).paths.tolist() == [
        b"train/class 0/%d.jpg" % k for k in (0, 2, 4)
    ]


def test_what_a_data_set_is_known_by(jpegs, jpeg_lists, tmp_path):
    """Its classes, paths and labels, also of images in memory; not the folder it lies in."""

    def known(size=72, **options):
        return datasets.load(Args(**{**jpeg_lists, "image_size": size, **options}))[0].sha256()

    before = {size: known(size) for size in (72, 32)}
    (tmp_path / "data").rename(tmp_path / "moved")
    assert {size: known(size, data_dir=str(tmp_path / "moved")) for size in (72, 32)} == before
    (tmp_path / "moved").rename(tmp_path / "data")
    file = Path(jpeg_lists["train_list"])
    content = file.read_text()
    for old, new in (("class 1/3.jpg 1", "class 1/3.jpg 2"), ("class 1/3.jpg", "class 1/../class 1/4.jpg")):
        file.write_text(content.replace(old, new))
        assert all(known(size) != sha for size, sha in before.items())


@pytest.mark.parametrize("mode, name", [("I;16", "x.png"), ("I;16", "x.tif"), ("F", "x.tif")])
def test_more_than_eight_bits_are_not_cut_off(tmp_path, mode, name):
    Image.new(mode, (4, 4)).save(tmp_path / name)
    with pytest.raises(OSError, match=f"{name}: not readable as an image .more than 8 bits a channel; "):
        datasets.read_pixels(tmp_path / name)


@pytest.mark.slow
def test_transparent_palettes_are_taken_in_silence(tmp_path):
    Image.new("P", (4, 4)).save(tmp_path / "x.png", transparency=b"\x00\x80")
    code = f"from common import datasets; print(datasets.read_pixels('{tmp_path}/x.png').shape)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "torch.Size([3, 4, 4])\n" and done.stderr == ""


def test_whatever_a_decoder_raises_names_the_file(tmp_path, monkeypatch):
    def fail(file):
        raise RuntimeError("of a codec")

    monkeypatch.setattr(datasets.Image, "open", fail)
    with pytest.raises(OSError, match="x.avif: not readable as an image .of a codec.; replace it"):
        datasets.read_image(tmp_path / "x.avif")


def test_sets_without_files_are_loaded(capsys):
    datasets.check(Args(check_data=True, batch_size=8))
    assert capsys.readouterr().err.startswith("synthetic: 1236 training images")


def test_a_failed_download_leaves_no_folder(tmp_path, monkeypatch):
    def make(root, train, download=False):
        if not download:
            raise RuntimeError("not found")
        (root / "MNIST").mkdir(parents=True)
        raise OSError("no network")

    monkeypatch.setitem(datasets.TORCHVISION, "mnist_lt", (make, "MNIST/raw", 6000))
    with pytest.raises(SystemExit):
        datasets.load(Args(dataset="mnist_lt", data_dir=str(tmp_path / "typo")))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "there").mkdir()
    with pytest.raises(SystemExit):
        datasets.load(Args(dataset="mnist_lt", data_dir=str(tmp_path / "there")))
    assert (tmp_path / "there").is_dir()


@pytest.mark.parametrize(
    "content, size, workers",
    [
        (b"", 32, 0),
        (b"<html>", 32, 0),
        (b"truncated", 32, 0),
        (b"", 72, 0),
        (b"<html>", 72, 0),
        (b"truncated", 72, 2),
    ],
)
def test_corrupt_images_are_named(folder, capsys, content, size, workers):
    path = folder / "train" / "class 0" / "ein Bild für 0.jpg"
    path.write_bytes(path.read_bytes()[:300] if content == b"truncated" else content)

    def read():
        train_set, _ = datasets.load(folder_args(folder, image_size=size, num_workers=workers, batch_size=9))
        capsys.readouterr()
        batches(train_set, datasets.EpochSampler(train_set, 0), batch_size=9, workers=workers)

    assert refusal(read, capsys).startswith(f"{path}: not readable as an image")
    gc.collect()  # the worker processes that an error leaves behind


def test_missing_image(folder, capsys):
    lists = write_lists(folder)
    (folder / "train" / "class 1" / "ein Bild für 0.jpg").unlink()
    line = refusal(lambda: datasets.load(folder_args(folder, **lists, image_size=32)), capsys)
    assert line == f"{folder}/train/class 1/ein Bild für 0.jpg: no such image; check --data-dir and the list"


def test_batch_larger_than_the_data(folder, capsys):
    line = refusal(lambda: datasets.load(folder_args(folder, image_size=32, batch_size=10)), capsys)
    assert line == "--batch-size 10: there are only 9 training images; use a smaller one"


def test_unknown_data_set(capsys):
    assert refusal(lambda: datasets.load(Args(dataset="cifar")), capsys).startswith(
        "--dataset cifar: must be one of"
    )


# The synthetic set


def test_synthetic():
    train_set, test_set = datasets.load(Args())
    assert train_set.class_counts.tolist() == [500, 299, 179, 107, 64, 38, 23, 13, 8, 5]
    assert torch.bincount(test_set.labels).tolist() == [100] * 10
    assert train_set.crops.equal(datasets.load(Args(seed=1))[0].crops)  # one and the same set for every seed


def test_synthetic_contexts(monkeypatch):
    """The tail in one context, the head in all, the test in all."""
    drawn = []
    draw = datasets.draw_synthetic
    monkeypatch.setattr(
        datasets, "draw_synthetic", lambda *args, **kw: drawn.append(args) or draw(*args, **kw)
    )
    datasets.load(Args())
    (labels, contexts), (test_labels, test_contexts) = (args[:2] for args in drawn)
    occurring = [contexts[labels == k].unique().numel() for k in range(10)]
    assert occurring[:2] == [10, 10] and occurring[-3:] == [1, 1, 1]
    assert sorted(occurring, reverse=True) == occurring
    assert torch.bincount(10 * test_labels + test_contexts).tolist() == [10] * 100


# Batches chosen step by step, other lists


def test_on_demand_in_memory():
    """What the data set gives, for items on the device."""
    train, _ = datasets.load(Args(batch_size=8))
    items = torch.tensor([[3, 7], [500, 2**61], [3, 7]])
    images, labels = datasets.OnDemand(train)(items)
    expected, of_them = train.__getitems__([tuple(item) for item in items.tolist()])
    assert images.equal(expected) and labels.equal(of_them) and images[0].equal(images[2])


@pytest.mark.parametrize("workers", [0, 2])
def test_on_demand_from_files(jpegs, workers):
    """The same images whoever reads them, batch after batch, and none before it is asked for."""
    train, _ = datasets.load(Args(**{**jpegs, "num_workers": workers}))
    fetch = datasets.OnDemand(train, share=3)
    for seed in (1, 2):
        items = torch.tensor([[i, seed + i] for i in (5, 40, 5, 23, 0, 59, 7)])
        images, labels = fetch(items)
        whole = train.__getitems__([tuple(item) for item in items.tolist()])
        expected, of_them = whole.to(torch.device("cpu"))
        assert images.equal(expected) and labels.equal(of_them)
    assert images.shape == (7, 3, 72, 72)


def test_on_demand_names_a_corrupt_file(jpegs, capsys):
    train, _ = datasets.load(Args(**{**jpegs, "num_workers": 0}))
    path = f"{jpegs['data_dir']}/train/class 1/3.jpg"
    with open(path, "wb") as file:
        file.write(b"no image")
    with pytest.raises(SystemExit):
        datasets.OnDemand(train)(torch.tensor([[0, 1], [33, 1]]))
    assert f"{path}: not readable as an image" in capsys.readouterr().err


def test_sampler_without_augmentation():
    train, _ = datasets.load(Args(batch_size=8))
    plain = list(datasets.EpochSampler(train, 0, augment=False))
    assert plain == [index for index, _ in datasets.EpochSampler(train, 0)]


def test_augmentation_of_images_in_memory():
    """AutoAugment and the hole follow crop and flip, each by its own digits of the seed."""
    train, _ = datasets.load(Args(batch_size=8, cutout=8))
    holes, _ = train.__getitems__([(0, seed) for seed in range(0, 2**40, 2**31)])
    black = (holes == ((0 - train.mean) / train.std)).all(1)
    assert 4 * 4 <= black.flatten(1).sum(1).min() and len(black.flatten(1).unique(dim=0)) > 100
    train.cutout, train.auto_augment = 0, True
    ways = torch.randperm(10_000)[:400].tolist()
    seeds = [(0, 50 * way) for way in ways]  # 2 * 5 * 5 crops and flips: the same one
    images, _ = train.__getitems__(seeds)
    assert len(images.flatten(1).unique(dim=0)) > 50  # many operations do nothing to this image
    assert images.equal(torch.cat([train.__getitems__([item])[0] for item in seeds]))
    plain, _ = train.__getitems__([0])
    train.auto_augment = False
    assert train.__getitems__([0])[0].equal(plain)  # nothing without a seed


def test_images_without_the_new_options_are_those_of_the_recorded_runs():
    """Crop and flip by their hash, AutoAugment and hole by the digits that are theirs."""
    _, data, _ = in_memory()
    seeds = torch.randint(2**62, (500,), generator=torch.Generator().manual_seed(0))
    items = torch.stack([torch.arange(500) % 4, seeds], 1)
    images = data.pixels(data.__getitems__(items)[0])
    assert hashlib.sha256(images.numpy().tobytes()).hexdigest() == RECORDED
    train, _ = datasets.load(Args(batch_size=8))
    items[:, 0] = torch.arange(500)
    images = train.pixels(train.__getitems__(items)[0])
    train.auto_augment, train.cutout = True, 8
    expected = augment.cutout(augment.auto_augment(images, seeds // 50), seeds // 500_000, 8)
    assert train.pixels(train.__getitems__(items)[0]).equal(expected)


def test_files_without_the_new_options_are_those_of_the_recorded_runs(jpegs):
    train, _ = datasets.load(Args(**jpegs))
    jitter = v2.ColorJitter(0.4, 0.4, 0.4)
    usual = v2.Compose([v2.RandomResizedCrop(72), v2.RandomHorizontalFlip(), jitter])
    images = train.__getitems__([(5, seed) for seed in range(8)]).images
    for seed, image in enumerate(images):
        torch.manual_seed(seed)
        expected = usual(datasets.read_image(os.path.join(train.root, os.fsdecode(train.paths[5]))))
        expected = v2.functional.pil_to_tensor(expected).int()
        assert (image.int() - expected).abs().max() <= 3  # of tensors jitter rounds in other places


def test_pixels_are_those_of_pil(folder, monkeypatch):
    """Of all kinds of images, by torchvision's decoder where it serves, and where there is none."""
    files = sorted((folder / "train" / "class 0").iterdir())
    Image.new("LA", (9, 8), (200, 100)).save(folder / "grey and alpha.png")
    files.append(folder / "grey and alpha.png")
    assert {Image.open(file).mode for file in files} == {"RGB", "L", "P", "CMYK", "LA"}
    decoded, decode = [], datasets.decode_jpeg
    monkeypatch.setattr(datasets, "decode_jpeg", lambda data: decoded.append(len(data)) or decode(data))
    expected = [v2.functional.pil_to_tensor(datasets.read_image(file)) for file in files]
    for file, pixels in zip(files, expected, strict=True):
        assert datasets.read_pixels(file).equal(pixels)
    assert decoded == [file.stat().st_size for file in files]
    monkeypatch.setattr(datasets, "decode_jpeg", None)
    for file, pixels in zip(files, expected, strict=True):
        assert datasets.read_pixels(file).equal(pixels)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_of_both_streams_is_decoded_once(jpegs, monkeypatch, workers):
    train, _ = datasets.load(Args(**jpegs))
    first, second = [(3, 0), (7, 1), (3, 2)], [(7, 3), (1, 4), (3, 5)]
    apart, asked = [train.__getitems__(items).images for items in (first, second)], []
    read = datasets.read_pixels
    monkeypatch.setattr(datasets, "read_pixels", lambda path: asked.append(path) or read(path))
    options = dict(datasets.loader_options(train), num_workers=workers)
    items = list(zip(first, second, strict=True))
    ((one, other),) = DataLoader(datasets.Pairs(train), batch_sampler=[items], **options)
    assert one.images.equal(apart[0]) and other.images.equal(apart[1])
    assert one.labels.equal(train.labels[[3, 7, 3]]) and other.labels.equal(train.labels[[7, 1, 3]])
    if workers == 0:
        assert len(asked) == len(set(asked)) == 3
        state = torch.get_rng_state()
        train.batches(first, second)
        assert torch.get_rng_state().equal(state)


def test_rotation_and_contrastive_views_in_memory():
    """The rotation follows crop and flip; a view is of the whole image and takes the place of all else."""
    train, _ = datasets.load(Args(batch_size=8))
    seeds = torch.randint(2**62, (400,), generator=torch.Generator().manual_seed(0))
    items = torch.stack([torch.arange(400), seeds], 1)
    plain, usual = (train.pixels(train.__getitems__(of)[0]) for of in (items[:, 0], items))
    train.random_rotation = 15
    turned = train.pixels(train.__getitems__(items)[0])
    assert turned.equal(augment.rotate(usual, seeds, 15)) and not turned.equal(usual)
    train.auto_augment, train.cutout = True, 8
    usual = train.pixels(train.__getitems__(items)[0])
    assert usual.equal(augment.cutout(augment.auto_augment(turned, seeds // 50), seeds // 500_000, 8))
    train.contrastive = 0.5
    found, labels = train.__getitems__(items)
    views = augment.contrastive(plain, usual, seeds, 1.0)
    here, there = (train.pixels(found).flatten(1).eq(of.flatten(1)).all(1) for of in (views, usual))
    assert (here | there).all() and 160 < here.sum() < 240 and not (here & there).any()
    for i in (3, 77):  # whatever the batch
        alone, label = train.__getitems__([tuple(items[i].tolist())])
        assert alone.equal(found[i : i + 1]) and label == labels[i]
    assert train.pixels(train.__getitems__(items[:, 0])[0]).equal(plain)  # nothing without a seed
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_contrastive_views_from_files(jpegs):
    """The same whatever the number of workers; jittered by --color-jitter or 0.4; the share is as asked."""
    found = []
    for workers in (0, 2):
        args = Args(**jpegs, contrastive=0.5, rand_augment=True, num_workers=workers)
        train, test = datasets.load(args)
        found.append(batches(train, datasets.EpochSampler(train, 0), batch_size=16))
    for (one, labels), (other, same) in zip(*found, strict=True):
        assert one.equal(other) and labels.equal(same)
    assert train.augment.p == [0.5, 0.5]
    views, usual = (branch.transforms for branch in train.augment.transforms)
    names = "RandomResizedCrop ColorJitter RandomGrayscale RandomApply RandomHorizontalFlip"
    assert [type(one).__name__ for one in views] == names.split()
    names = "RandomResizedCrop RandomHorizontalFlip ColorJitter RandomApply RandomApply"
    assert [type(one).__name__ for one in usual] == names.split()
    assert (views[2].p, views[3].p) == (0.2, 0.5)
    assert usual[-1].transforms[0].fill == [124, 116, 104]  # the mean colour
    for strength, of_views, of_usual in ((0.2, (0.8, 1.2), 3), (0.0, (0.6, 1.4), 2)):
        train, _ = datasets.load(Args(**{**jpegs, "color_jitter": strength}, contrastive=1.0))
        views, usual = (branch.transforms for branch in train.augment.transforms)
        assert views[1].brightness == views[1].contrast == views[1].saturation == pytest.approx(of_views)
        assert views[1].hue is None and len(usual) == of_usual
        train.augment.transforms[1] = None  # never taken
        assert train.__getitems__([(5, seed) for seed in range(20)]).images.shape == (20, 3, 72, 72)


@pytest.mark.parametrize(
    "options",
    [dict(auto_augment=True), dict(cutout=8), dict(random_rotation=15)],
    ids=lambda o: next(iter(o)),
)
def test_augmentation_of_files_is_refused(jpegs, capsys, options):
    (name,) = options
    line = refusal(lambda: datasets.load(Args(**jpegs, **options)), capsys)
    assert line == f"{flag(name)}: is for RGB images of up to 64 pixels; leave it out"


def test_augmentation_in_memory_is_refused(capsys):
    line = refusal(lambda: datasets.load(Args(rand_augment=True)), capsys)
    assert line == "--rand-augment: is for RGB images of more than 64 pixels; leave it out"


@pytest.mark.parametrize("options", [dict(contrastive=0.5), dict(random_rotation=15), dict(cutout=4)])
def test_augmentation_of_grey_images_is_refused(monkeypatch, capsys, options):
    facts = np.array([1, 1]), ["a", "b"], (1, 8, 8), (0.5,), (0.2,)
    grey = datasets.ImagesInMemory(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), [0, 1], *facts)
    monkeypatch.setattr(datasets, "load_torchvision", lambda args: (grey, grey))
    line = refusal(lambda: datasets.load(Args(dataset="mnist_lt", batch_size=1, **options)), capsys)
    (name,) = options
    assert line == f"{flag(name)}: is for RGB images of up to 64 pixels; leave it out"


def test_another_list(tmp_path, jpeg_lists, capsys):
    """Found where it is said to be or in --data-dir."""
    (tmp_path / "data" / "other.txt").write_text((tmp_path / "dev.txt").read_text())
    for file in (tmp_path / "dev.txt", "other.txt"):
        for size in (72, 32):
            args = Args(**{**jpeg_lists, "test_list": str(file), "image_size": size})
            train_set, test_set = datasets.load(args)
            images = datasets.load_list(args, "test_list", train_set)
            assert images.class_counts.tolist() == [2, 2, 2] and len(images) == 6
            assert train_set.class_counts.tolist() == [20, 20, 20] and len(train_set) == 60
            assert images.sha256() == test_set.sha256()
            batches = [of.__getitems__([3, 5]) for of in (images, test_set)]
            one, other = (batch.to("cpu") if size == 72 else batch for batch in batches)
            assert one[0].equal(other[0]) and one[1].equal(other[1])
    capsys.readouterr()
    lacking = Args(**{**jpeg_lists, "test_list": "nowhere.txt"})
    line = refusal(lambda: datasets.load_list(lacking, "test_list", train_set), capsys)
    assert line.startswith("--test-list nowhere.txt: no such list file, nor in --data-dir ")


# Class-aware order


def test_class_aware_order():
    labels, counts = torch.tensor([0] * 6 + [1] * 3 + [2]), torch.tensor([6, 3, 1])
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        order = datasets.class_aware(3 * 6, labels, counts, generator)
        assert len(order) == 18
        groups = [labels[group].tolist() for group in order.split(4)]
        assert all(len(set(group)) == 1 for group in groups)
        assert sorted(group[0] for group in groups[:3]) == [0, 1, 2]
        assert len({groups[3][0], groups[4][0]}) == 2 and len(groups[4]) == 2
        of_class = {group[0]: order[4 * i : 4 * i + 4].tolist() for i, group in enumerate(groups[:3])}
        assert len(set(of_class[0])) == 4 and of_class[2] == [9] * 4
        assert sorted(of_class[1][:3]) == [6, 7, 8] and of_class[1][3] in (6, 7, 8)


def test_rounds_cover_every_class_and_every_image():
    counts = torch.tensor([12, 5, 3])
    labels = torch.arange(3).repeat_interleave(counts)[torch.randperm(20)]  # in any order
    order = datasets.class_aware(4 * 3 * 3, labels, counts, torch.Generator().manual_seed(0))
    for round_of in labels[order].view(3, 3, 4):
        assert sorted(round_of[:, 0].tolist()) == [0, 1, 2]
    of_the_first = order[labels[order] == 0]
    assert sorted(of_the_first.tolist()) == (labels == 0).nonzero().flatten().tolist()


def test_every_pass_has_an_order_of_its_own():
    """Of the classes and of the images of a class, in the first pass, too."""
    counts = torch.tensor([8] * 6)
    labels = torch.arange(6).repeat_interleave(counts)
    order = datasets.class_aware(4 * 6 * 8, labels, counts, torch.Generator().manual_seed(0))
    rounds = labels[order].view(8, 6, 4)[..., 0].tolist()
    assert len({tuple(classes) for classes in rounds}) > 4 and rounds[0] != sorted(rounds[0])
    passes = order[labels[order] == 0].view(4, 8).tolist()  # two rounds have all 8 images
    assert all(sorted(images) == list(range(8)) for images in passes)
    assert len({tuple(images) for images in passes}) == 4 and passes[0] != sorted(passes[0])


def test_class_aware_blocks():
    """Blocks of 4 of one class, every class once a round; the class of one image repeats it."""
    counts = torch.tensor([5, 3, 1])
    labels = torch.arange(3).repeat_interleave(counts)
    generator = torch.Generator().manual_seed(0)
    drawn = datasets.class_aware(1200, labels, counts, generator, 4)
    blocks = labels[drawn].view(-1, 4)
    assert blocks.eq(blocks[:, :1]).all()
    for of_round in blocks[:, 0].view(-1, 3):
        assert of_round.sort().values.tolist() == [0, 1, 2]
    assert len({tuple(r) for r in blocks[:, 0].view(-1, 3).tolist()}) == 6  # in all orders
    assert drawn[:12][labels[drawn[:12]] == 2].tolist() == [8] * 4
    assert labels[drawn].bincount().tolist() == [400] * 3
    of_class_1 = drawn[labels[drawn] == 1]
    for again in of_class_1[:399].view(-1, 3):  # its list, shuffled again each time round
        assert again.sort().values.tolist() == [5, 6, 7]


def test_class_aware_without_whole_rounds():
    counts = torch.tensor([5, 3, 1])
    labels = torch.arange(3).repeat_interleave(counts)
    drawn = datasets.class_aware(18, labels, counts, torch.Generator(), 4)
    assert len(drawn) == 18 and labels[drawn[16:]].unique().numel() == 1


def test_more_classes_than_images(tmp_path, jpegs, jpeg_lists, capsys):
    """A label that is a mistake, say."""
    with open(jpeg_lists["train_list"], "a") as file:
        file.write("\ntrain/class 0/0.jpg 1000")
    line = refusal(lambda: datasets.load(Args(**jpeg_lists)), capsys)
    given = f"{jpeg_lists['train_list']}: labels up to 1000, but 61 images; "
    assert line == given + "number the classes from 0 on, or --allow-empty-classes leaves out empty ones"
