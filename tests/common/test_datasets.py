"""common.datasets: subsets to the image, samplers as laws and functions of the seed, files and faults."""

import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from PIL import Image
from torchvision.transforms import v2

from common import cmnist, datasets, synthetic
from common.cli import Args
from tests.conftest import refusal

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


def coloured_mnist():
    """(labels of the cut, noisy labels, colours of the training images), one generator through all three."""
    generator, labels = np.random.RandomState(0), np.repeat(np.arange(10), MNIST_COUNTS)
    labels = labels[datasets.cut(labels, 10, 100, 6000, generator)]
    noisy = cmnist.noisy(labels, 0.25, generator)
    return labels, noisy, cmnist.draw_colours(noisy, generator, own=(5, 6, 7, 8, 9))


def test_label_noise_of_coloured_mnist():
    labels, noisy, _ = coloured_mnist()
    assert np.bincount(noisy).tolist() == [5513, 3643, 2282, 1389, 860, 490, 281, 194, 106, 51]
    assert (noisy != labels).sum() == 3702 and (noisy != labels).mean() == pytest.approx(0.249983, abs=1e-6)
    true = [4442, 2698, 1620, 972, 590, 339, 209, 122, 78, 37]
    assert np.bincount(noisy[noisy == labels]).tolist() == true
    assert noisy[:20].tolist() == [0, 0, 3, 2, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0]
    assert noisy[-20:].tolist() == [2, 1, 9, 2, 9, 9, 9, 9, 3, 9, 9, 0, 0, 9, 1, 3, 9, 0, 9, 9]
    assert (cmnist.noisy(labels, 0.0, np.random.RandomState(0)) == labels).all()


def test_noise_goes_by_the_size_of_the_other_classes():
    counts = np.array([5923, 3596, 2156, 1292, 774, 464, 278, 166, 100, 60])
    labels = np.repeat(np.arange(10), counts)
    drawn = np.concatenate(
        [cmnist.noisy(labels, 1.0, np.random.RandomState(seed))[:5923] for seed in range(20)]
    )
    shares = np.bincount(drawn, minlength=10) / len(drawn)
    row = [0, 0.4047, 0.2426, 0.1454, 0.0871, 0.0522, 0.0313, 0.0187, 0.0113, 0.0068]
    assert shares == pytest.approx(row, abs=0.005) and shares[0] == 0


def test_colours_of_coloured_mnist():
    _, noisy, colours = coloured_mnist()
    assert colours[:20].tolist() == [3, 3, 0, 1, 8, 3, 5, 2, 3, 6, 6, 0, 5, 5, 7, 3, 7, 1, 6, 1]
    assert colours[-20:].tolist() == [5, 3, 9, 9, 9, 9, 9, 9, 8, 9, 9, 0, 5, 9, 7, 2, 9, 2, 9, 9]
    histogram = [1366, 1367, 1363, 1373, 1385, 1821, 1675, 1559, 1469, 1431]
    assert np.bincount(colours).tolist() == histogram
    assert (colours[noisy >= 5] == noisy[noisy >= 5]).all()
    test = cmnist.draw_colours(np.arange(20) % 10, np.random.RandomState(0))
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
    images = cmnist.coloured(torch.full((10, 2, 3), pixel, dtype=torch.uint8), np.arange(10))
    assert images.shape == (10, 3, 2, 3) and images.dtype == torch.uint8
    assert images[:, :, 0, 0].flatten().tolist() == [int(value) for value in values.split()]
    assert (images == images[:, :, :1, :1]).all()


def test_private_generator():
    """The subset is the same whatever the global generator did, and leaves it alone."""
    labels = np.repeat(np.arange(3), 50)
    np.random.seed(1)
    before = np.random.get_state()[1].copy()
    first = datasets.draw_subset(labels, [50, 10, 5], np.random.RandomState(0))
    assert (np.random.get_state()[1] == before).all()
    np.random.seed(2)
    assert (first == datasets.draw_subset(labels, [50, 10, 5], np.random.RandomState(0))).all()


def test_fingerprints_of_the_subset():
    """Legacy draws, worked out elsewhere: of [0] * 5 + [1] * 5 + [2] * 5 and of i % 10."""
    kept = datasets.draw_subset(np.repeat([0, 1, 2], 5), [5, 3, 1], np.random.RandomState(0))
    assert kept.tolist() == [2, 0, 1, 3, 4, 5, 7, 6, 11]
    labels, counts = np.arange(1000) % 10, datasets.long_tail_counts(100, 10, 100)
    assert counts == [100, 59, 35, 21, 12, 7, 4, 2, 1, 1]
    kept = datasets.draw_subset(labels, counts, np.random.RandomState(0))
    assert len(kept) == 242 and kept.sum() == 121360
    firsts = np.cumsum([0, *counts[:-1]])
    assert kept[firsts].tolist() == [260, 181, 422, 543, 894, 935, 936, 987, 28, 969]


def test_too_large_an_imbalance():
    line = refusal(datasets.cut, np.repeat(np.arange(3), 50), 3, 51)
    assert line == "--imbalance 51: leaves a class without an image; use a lower factor"
    assert refusal(datasets.load, Args(imbalance=1000)).startswith("--imbalance 1000: leaves a class without")


def test_an_imbalance_that_is_not_reached_is_told(capsys):
    labels = np.repeat(np.arange(5), [1, 1, 6, 20, 60])
    kept = datasets.cut(labels, 5, 2.0)
    assert np.bincount(labels[kept]).tolist() == [1, 1, 6, 20, 30]
    told = "note: --imbalance 2: some classes have fewer, so that the cut leaves 1 to 30 images\n"
    assert capsys.readouterr().err == told


# Samplers and orders


class Labels:
    """What an order asks of a data set. counts [K]; the images in class order, or shuffled."""

    def __init__(self, counts, size=None, shuffled=False):
        self.labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        if shuffled:
            self.labels = self.labels[torch.randperm(len(self.labels))]
        self.counts, self.size = counts, size or len(self.labels)

    def __len__(self):
        return self.size

    def by_class(self):
        return self.labels.argsort(stable=True).split(self.counts)


def permutation(generator, epoch):
    return torch.randperm(50, generator=generator)


def test_samplers_are_functions_of_seed_epoch_and_stream():
    sampler = datasets.EpochSampler(permutation, 50, seed=3)
    items = list(sampler)
    assert sorted(items) == list(range(50)) and items == list(sampler) and len(sampler) == 50
    sampler.set_epoch(1)
    assert items != list(sampler)
    assert items != list(datasets.EpochSampler(permutation, 50, seed=4))
    assert items != list(datasets.EpochSampler(permutation, 50, seed=3, stream=1))


def test_weighted_draws():
    weights = torch.tensor([0.0, 1.0, 3.0, 0.0, 6.0, 0.0])
    found = datasets.draw(weights, 24000, torch.Generator().manual_seed(0))
    shares = torch.bincount(found, minlength=6) / len(found)
    torch.testing.assert_close(shares, weights / 10, atol=0.01, rtol=0)
    assert shares[[0, 3, 5]].sum() == 0


def aware(dataset, in_a_row=4, seed=0):
    return datasets.class_aware(dataset, in_a_row)(torch.Generator().manual_seed(seed), 0)


def test_class_aware_order():
    data = Labels([6, 3, 1], size=18)
    for seed in range(20):
        order = aware(data, seed=seed)
        assert len(order) == 18
        groups = [data.labels[group].tolist() for group in order.split(4)]
        assert all(len(set(group)) == 1 for group in groups)
        assert sorted(group[0] for group in groups[:3]) == [0, 1, 2]
        assert len({groups[3][0], groups[4][0]}) == 2 and len(groups[4]) == 2
        drawn = {group[0]: order[4 * i : 4 * i + 4].tolist() for i, group in enumerate(groups[:3])}
        assert len(set(drawn[0])) == 4 and drawn[2] == [9] * 4
        assert sorted(drawn[1][:3]) == [6, 7, 8] and drawn[1][3] in (6, 7, 8)


def test_every_pass_has_an_order_of_its_own():
    """Of the classes and of the images of a class, in the first pass, too."""
    data = Labels([8] * 6, size=4 * 6 * 8)
    order = aware(data)
    rounds = data.labels[order].view(8, 6, 4)[..., 0].tolist()
    assert len({tuple(classes) for classes in rounds}) > 4 and rounds[0] != sorted(rounds[0])
    passes = order[data.labels[order] == 0].view(4, 8).tolist()  # two rounds have all 8 images
    assert all(sorted(images) == list(range(8)) for images in passes)
    assert len({tuple(images) for images in passes}) == 4 and passes[0] != sorted(passes[0])


def test_class_aware_blocks():
    """Blocks of 4 of one class, every class once a round; the class of one image repeats it."""
    data = Labels([5, 3, 1], size=1200)
    drawn = aware(data)
    blocks = data.labels[drawn].view(-1, 4)
    assert blocks.eq(blocks[:, :1]).all()
    for classes in blocks[:, 0].view(-1, 3):
        assert classes.sort().values.tolist() == [0, 1, 2]
    assert len({tuple(r) for r in blocks[:, 0].view(-1, 3).tolist()}) == 6  # in all orders
    assert drawn[:12][data.labels[drawn[:12]] == 2].tolist() == [8] * 4
    assert data.labels[drawn].bincount().tolist() == [400] * 3
    for again in drawn[data.labels[drawn] == 1][:399].view(-1, 3):  # its list, shuffled each time round
        assert again.sort().values.tolist() == [5, 6, 7]


def test_labels_in_any_order():
    data = Labels([12, 5, 3], size=36, shuffled=True)
    order = aware(data)
    first = order[data.labels[order] == 0]
    assert sorted(first.tolist()) == (data.labels == 0).nonzero().flatten().tolist()


def test_hold_out():
    train, _ = datasets.load(Args())
    rest, held = datasets.hold_out(train, 10)
    assert held.class_counts.tolist() == [10] * 7 + [0] * 3  # classes of 500 to 23 have twice as many
    assert (rest.class_counts + held.class_counts).equal(train.class_counts)
    pixels = {image.numpy().tobytes() for image in held.images}
    assert not pixels & {image.numpy().tobytes() for image in rest.images}
    assert datasets.hold_out(train, 10)[1].images.equal(held.images)


# In memory


def test_synthetic():
    train, test = datasets.load(Args())
    assert train.class_counts.tolist() == [500, 299, 179, 107, 64, 38, 23, 13, 8, 5]
    assert torch.bincount(test.labels).tolist() == [100] * 10
    assert train.images.equal(datasets.load(Args(seed=1))[0].images)  # one and the same set for every seed
    assert train.sha256() != test.sha256() and train.sha256() == datasets.load(Args(seed=1))[0].sha256()
    assert train.sha256() != datasets.load(Args(imbalance=99))[0].sha256()


def test_synthetic_contexts(monkeypatch):
    """The tail in one context, the head in all, the test in all."""
    drawn, draw = [], synthetic.draw_images
    monkeypatch.setattr(synthetic, "draw_images", lambda *args, **kw: drawn.append(args) or draw(*args, **kw))
    datasets.load(Args())
    (labels, contexts), (test_labels, test_contexts) = (args[:2] for args in drawn)
    occurring = [contexts[labels == k].unique().numel() for k in range(10)]
    assert occurring[:2] == [10, 10] and occurring[-3:] == [1, 1, 1]
    assert sorted(occurring, reverse=True) == occurring
    assert torch.bincount(10 * test_labels + test_contexts).tolist() == [10] * 100


def test_plain_batches_are_the_images():
    _, test = datasets.load(Args())
    images, labels = test.__getitems__([3, 970, 3])
    assert images.equal(test.images[[3, 970, 3]]) and labels.tolist() == [0, 9, 0]
    assert images.dtype == torch.uint8


def test_loaders():
    """An epoch of whole batches, the same again, of other images in another epoch; the test in order."""
    args = Args(batch_size=100)
    train, test = datasets.load(args)
    loader = datasets.train_loader(train.plain(), args)
    batches = [labels for _, labels in loader]
    assert [len(labels) for labels in batches] == [100] * 12
    loader.sampler.set_epoch(1)
    assert any(not labels.equal(other) for labels, (_, other) in zip(batches, loader, strict=True))
    assert torch.cat([labels for _, labels in datasets.test_loader(test, args)]).equal(test.labels)
    weights = (train.labels == 9).double()
    assert all((labels == 9).all() for _, labels in datasets.train_loader(train, args, weights))
    line = refusal(datasets.train_loader, train, Args(batch_size=2000))
    assert line == "--batch-size 2000: there are 1236 training images; use a smaller one"


def test_options_that_a_data_set_has_no_use_for(tmp_path):
    """Else the training would be of other images than asked."""
    line = refusal(datasets.load, Args(train_list="mine.txt"))
    assert line == "--train-list, --test-list: synthetic has none; use --dataset image_list"
    assert refusal(datasets.load, Args(dataset="image_folder", test_list="mine.txt")).startswith(
        "--train-list"
    )


def test_batches_that_shared_memory_cannot_hold(monkeypatch):
    """Of 64 images of 24 pixels, two for each loader process. A container has 64 MB in all."""
    args = Args(augment="rotate", num_workers=8, batch_size=64)
    need = 2 * 8 * 64 * 3 * 24 * 24
    monkeypatch.setattr(datasets.shutil, "disk_usage", lambda path: SimpleNamespace(free=need))
    datasets.load(args)
    monkeypatch.setattr(datasets.shutil, "disk_usage", lambda path: SimpleNamespace(free=need - 1))
    assert refusal(datasets.load, args) == "--num-workers 8: needs 2 MB in /dev/shm; lower it"
    args.num_workers = 0
    datasets.load(args)


@pytest.mark.parametrize("augment", ["rotate", "strong"])
def test_augmentation_in_loader_processes(augment):
    """Image by image, the same again with the same seed."""
    args = Args(augment=augment, num_workers=2, batch_size=64)
    train, _ = datasets.load(args)
    assert train.workers == 2
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        loader = datasets.train_loader(train, args)
        found.append(next(iter(loader))[0])
    assert found[0].equal(found[1]) and found[0].shape == (64, 3, 24, 24)
    assert not found[0].equal(train.images[:64])


# Files


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
    given = dict(dataset="image_folder", data_dir=str(folder), imbalance=None, batch_size=4)
    return Args(**{**given, **options})


def load(folder, **options):
    return datasets.load(folder_args(folder, **options))


def batches(dataset, args):
    accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(split_batches=True))
    return list(accelerator.prepare(datasets.train_loader(dataset, args)))


@pytest.mark.parametrize("workers", [0, 2])
def test_image_folder_from_files(folder, workers):
    args = folder_args(folder, image_size=72, num_workers=workers)
    train, test = datasets.load(args)
    assert not torch.is_tensor(train.images) and train.class_names == ["class 0", "class 1"]
    assert train.class_counts.tolist() == [6, 3] and len(train) == 9 and len(test) == 4
    found = batches(train, args)
    assert [(images.shape, images.dtype) for images, _ in found] == [((4, 3, 72, 72), torch.uint8)] * 2


def test_test_images_from_files_are_the_centre(folder):
    _, test = load(folder, image_size=72)
    image = Image.new("RGB", (164, 82), (0, 0, 0))  # resized to a short side of 82 = 72 / 0.875: no change
    image.paste((255, 255, 255), (46, 5, 118, 77))  # the centre 72 x 72
    image.save(os.path.join(test.root, os.fsdecode(test.images[0])), "png")
    assert (test.__getitems__([0])[0] == 255).all()


def test_small_images_are_kept_in_memory(folder):
    train, _ = load(folder, image_size=32)
    assert torch.is_tensor(train.images) and train.shape == (3, 32, 32)
    for i, size in enumerate(((32, 40), (40, 32))):  # one side fits
        Image.new("RGB", size).save(folder / "train" / "class 0" / f"ein Bild für {i}.jpg")
    assert load(folder, image_size=32)[0].shape == (3, 32, 32)


def test_size_is_224_if_not_given(folder):
    assert load(folder)[0].shape == (3, 224, 224)


def test_image_folder_is_cut(folder):
    assert load(folder, image_size=32, imbalance=6.0)[0].class_counts.tolist() == [6, 1]


def test_val_serves_as_test(folder):
    (folder / "test").rename(folder / "val")
    assert len(load(folder, image_size=32)[1]) == 4
    shutil.rmtree(folder / "val")
    line = refusal(load, folder)
    assert line == f"--data-dir {folder}: needs train/CLASS/, and test/CLASS/ or val/CLASS/; no {folder}/val"


def write_lists(folder, end="\r\n"):
    """train.txt and test.txt with CRLF ends, a blank line and no final newline."""
    for part in ("train", "test"):
        lines = [f"{p.relative_to(folder)} {p.parent.name[-1]}" for p in sorted((folder / part).glob("*/*"))]
        (folder / f"{part}.txt").write_bytes(os.fsencode(end.join([*lines[:2], "", *lines[2:]])))
    return dict(train_list=f"{folder}/train.txt", test_list="test.txt", dataset="image_list")


def test_image_list_equals_image_folder(folder):
    """A byte order mark and tabs, too."""
    found, _ = load(folder, image_size=32)
    options, file = write_lists(folder), folder / "train.txt"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b" 1", b"\t1"))
    listed, _ = load(folder, **options, image_size=32)
    assert listed.labels.equal(found.labels) and listed.images.equal(found.images)


def test_names_of_other_bytes_and_repeated_lines(folder):
    old = folder / "train" / "class 0" / "ein Bild für 0.jpg"
    new = os.path.join(os.fsencode(old.parent), b"Bild f\xfcr 0.jpg")
    os.rename(old, new)
    options, lines = write_lists(folder), []
    for entry in sorted(os.scandir(os.fsencode(folder / "train" / "class 0")), key=lambda e: e.name):
        lines.append(b"train/class 0/" + entry.name + b" 0")
    lines += [b"train/class 1/ein Bild f\xc3\xbcr 0.jpg 1"] * 2
    (folder / "train.txt").write_bytes(b"\n".join(lines))
    for size in (32, 72):
        train, _ = load(folder, **options, image_size=size)
        assert len(train) == 7 and train.__getitems__([0, 6])[0].shape == (2, 3, size, size)


def test_competition_json(tmp_path):
    content = dict(
        images=[dict(id=7, file_name="a/x y.jpg"), dict(id=3, file_name="b.jpg")],
        annotations=[dict(image_id=7, category_id=2), dict(image_id=3, category_id=0)],
    )
    (tmp_path / "train.json").write_text(json.dumps(content))
    paths, labels = datasets.read_list(tmp_path / "train.json", 3)
    assert paths == ["a/x y.jpg", "b.jpg"] and labels.tolist() == [2, 0]


def test_another_list(tmp_path, jpeg_lists):
    """Found where it is said to be or in --data-dir, from files and in memory."""
    for size in (72, 32):
        args = Args(**{**jpeg_lists, "imbalance": None, "image_size": size})
        train, _ = datasets.load(args)
        args.test_list = str(tmp_path / "dev.txt")
        images = datasets.load_list(args, "test_list", train)
        assert images.class_counts.tolist() == [2, 2, 2] and len(images) == 6 and len(train) == 60
        (tmp_path / "one.txt").write_text("train/class 0/0.jpg 0\n")
        args.test_list = str(tmp_path / "one.txt")
        line = refusal(datasets.load_list, args, "test_list", train)
        assert line == f"--test-list {tmp_path}/one.txt: names no image of class 1"


# Wrong input: one line each


@pytest.mark.parametrize(
    "lines, complaint",
    [
        ("a.jpg 0\nb.jpg", "line 2:  b.jpg: not `relative/path label`, labels being 0, 1, .."),
        ("a.jpg 0\nb.jpg 1.0", "line 2: b.jpg 1.0: not `relative/path label`, labels being 0, 1, .."),
        ("a.jpg -1", "line 1: a.jpg -1: not `relative/path label`, labels being 0, 1, .."),
        (
            "a.jpg " + 20 * "1",
            "line 1: a.jpg 11111111111111111111: not `relative/path label`, labels being 0, 1, ..",
        ),
        ("a.jpg,1", "line 1:  a.jpg,1: not `relative/path label`, labels being 0, 1, .."),
        ("a.jpg 4\n\nb.jpg 5", "line 3: label 5 is too large; labels are 0 to 4"),
        ("/data/a.jpg 0", "line 1: /data/a.jpg: write paths relative to --data-dir, with /"),
        ("train\\a.jpg 0", "line 1: train\\a.jpg: write paths relative to --data-dir, with /"),
        ("a.jpg 0\na.jpg 1", "line 2: a.jpg has label 1 here and 0 before"),
        ("a.jpg 0\n./a.jpg 1", "line 2: a.jpg has label 1 here and 0 before"),
    ],
)
def test_wrong_lists(tmp_path, lines, complaint):
    (tmp_path / "list.txt").write_text(lines)
    assert refusal(datasets.read_list, tmp_path / "list.txt", 5) == f"{tmp_path}/list.txt, {complaint}"


def test_a_list_without_images(tmp_path):
    (tmp_path / "list.txt").write_text("\n")
    assert refusal(datasets.read_list, tmp_path / "list.txt") == f"{tmp_path}/list.txt: names no image"


def annotations(*pairs):
    images = [dict(id=i, file_name=f"{i}.jpg") for i in range(2)]
    return json.dumps(dict(images=images, annotations=[dict(image_id=i, category_id=k) for i, k in pairs]))


@pytest.mark.parametrize(
    "text, complaint",
    [
        ('{"images": []}', "cannot be read as JSON with images and annotations (KeyError: 'annotations')"),
        ("{", "cannot be read as JSON with images and annotations (JSONDecodeError: "),
        ("[1]", "cannot be read as JSON with images and annotations (TypeError: "),
        ("[" * 10**5, "cannot be read as JSON with images and annotations (RecursionError: "),
        (annotations((7, 0)), "cannot be read as JSON with images and annotations (KeyError: 7)"),
        (annotations((0, 0), (0, 1)), "annotation 2: 0.jpg has label 1 here and 0 before"),
        (annotations((0, None)), "annotation 1: 0.jpg None: not `relative/path label`"),
        ('{"images": [{"id": 1, "file_name": null}], "annotations": []}', "names no image"),
        (annotations((1, 5)), "annotation 1: label 5 is too large; labels are 0 to 4"),
    ],
)
def test_wrong_json(tmp_path, text, complaint):
    (tmp_path / "train.json").write_text(text)
    line = refusal(datasets.read_list, tmp_path / "train.json", 5)
    assert line.removeprefix(f"{tmp_path}/train.json")[2:].startswith(complaint)


@pytest.mark.parametrize("dataset", ["imagenet_lt", "inat2018"])
def test_missing_lists_and_folders(tmp_path, dataset):
    args = Args(dataset=dataset, data_dir=str(tmp_path), imbalance=None)
    name = datasets.LISTS[dataset][0]
    assert refusal(datasets.load, args) == f"--train-list {name}: no such file, nor in --data-dir {tmp_path}"
    args.data_dir = str(tmp_path / "nowhere")
    assert refusal(datasets.load, args).startswith(f"--data-dir {tmp_path}/nowhere: no such folder")


def test_lists_are_needed_and_fixed_lists_are_not_cut(folder):
    assert refusal(load, folder, dataset="image_list").startswith("--train-list: image_list needs one")
    line = refusal(load, folder, **{**write_lists(folder), "dataset": "places_lt"}, imbalance=10.0)
    assert line == "--imbalance 10: places_lt is a fixed list; leave it out"


def test_download_that_fails(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", no_network)
    line = refusal(datasets.load, Args(dataset="cifar10_lt", data_dir=str(tmp_path / "data")))
    assert line == f"--data-dir {tmp_path}/data: no cifar10_lt, and no download (no network)"


def test_classes_on_one_side_only(folder):
    (folder / "train" / "__MACOSX").mkdir()
    line = refusal(load, folder)
    assert line == f"{folder}: class __MACOSX is in one of train/ and test/ alone; remove it there, or add it"


def test_folders_inside_and_other_files(folder, capsys):
    (folder / "train" / "class 0" / "Thumbs.db").write_text("")
    assert len(load(folder)[0]) == 9
    told = capsys.readouterr().err.splitlines()[0]
    assert told.startswith("note: 1 files that are no images by their names are left out, such as ")
    (folder / "train" / "class 0" / "more").mkdir()
    line = refusal(load, folder)
    assert line.startswith(f"{folder}/train/class 0/more: a folder inside a class folder; ")


def test_classes_without_images(folder):
    for path in (folder / "train" / "class 1").iterdir():
        path.unlink()
    assert refusal(load, folder) == f"--data-dir {folder}: no training image of class class 1; add some"
    options = write_lists(folder)
    for name in ("train.txt", "test.txt"):
        (folder / name).write_text("a.jpg 1\nb.jpg 2\n")
    line = refusal(load, folder, **options)
    assert line == f"--data-dir {folder}: no training image of class 0; add some; labels count from 0"


def test_a_test_without_images(folder):
    for path in (folder / "test").glob("*/*"):
        path.unlink()
    assert refusal(load, folder) == f"--data-dir {folder}: no test image; put some there"


def test_one_class_alone(folder):
    for part in ("train", "test"):
        shutil.rmtree(folder / part / "class 1")
    line = refusal(load, folder, image_size=32)
    assert line == f"--data-dir {folder}: 1 classes; at least two are needed"


def test_test_images_among_the_training_images_are_told(folder, capsys):
    options = write_lists(folder, "\n")
    with open(folder / "test.txt", "a") as file:
        file.write("\ntrain/class 0/ein Bild für 2.png 0\n")
    load(folder, **options)
    assert capsys.readouterr().err.splitlines()[0] == "note: 1 test images are training images, too"
    shutil.rmtree(folder / "test")
    (folder / "test").symlink_to(folder / "train")
    load(folder)
    assert capsys.readouterr().err.splitlines()[0] == "note: all test images are training images, too"


@pytest.mark.parametrize("content, size", [(b"", 32), (b"<html>", 72), (b"truncated", 72)])
def test_corrupt_images_are_named(folder, content, size):
    path = folder / "train" / "class 0" / "ein Bild für 0.jpg"
    path.write_bytes(path.read_bytes()[:300] if content == b"truncated" else content)

    def read():
        args = folder_args(folder, image_size=size, num_workers=0, batch_size=9)
        batches(datasets.load(args)[0], args)

    assert refusal(read).startswith(f"{path}: not readable as an image")


def test_missing_image(folder):
    """Told before training."""
    options = write_lists(folder)
    path = folder / "train" / "class 1" / "ein Bild für 0.jpg"
    path.unlink()
    for size in (32, 72):
        line = refusal(load, folder, **options, image_size=size)
        assert line == f"{path}: no such image; check --data-dir and the list"
        if size == 32:
            os.mkfifo(path)  # from which reading would wait for ever


@pytest.mark.parametrize("mode, name", [("I;16", "x.png"), ("I;16", "x.tif"), ("F", "x.tif")])
def test_more_than_eight_bits_are_not_cut_off(tmp_path, mode, name):
    Image.new(mode, (4, 4)).save(tmp_path / name)
    line = refusal(datasets.read_image, tmp_path / name)
    assert line.startswith(f"{tmp_path}/{name}: not readable as an image (more than 8 bits a channel; ")


def test_pixels_are_those_of_pil(folder, monkeypatch):
    """Of all kinds of images, by torchvision's decoder where it serves, and where there is none."""
    files = sorted((folder / "train" / "class 0").iterdir())
    Image.new("LA", (9, 8), (200, 100)).save(folder / "grey and alpha.png")
    files.append(folder / "grey and alpha.png")
    assert {Image.open(file).mode for file in files} == {"RGB", "L", "P", "CMYK", "LA"}
    expected = [v2.functional.pil_to_tensor(Image.open(file).convert("RGB")) for file in files]
    for file, pixels in zip(files, expected, strict=True):
        assert datasets.read_image(file).equal(pixels)
    monkeypatch.setattr(datasets, "decode_jpeg", None)
    for file, pixels in zip(files, expected, strict=True):
        assert datasets.read_image(file).equal(pixels)
