"""common.augment: each operation against torchvision's on one image, laws of the draws, holes by hand."""

from collections import Counter

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from common import augment

TORCHVISION = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)
LAYOUTS = torch.contiguous_format, torch.channels_last


def photos(count, height=32, width=32):
    """Smooth random images, with a constant, a black and a two-valued one among them."""
    generator = torch.Generator().manual_seed(0)
    small = torch.randint(256, (count, 3, 5, 5), generator=generator).float()
    images = torch.nn.functional.interpolate(small, (height, width), mode="bilinear").to(torch.uint8)
    images[1::8], images[2::8], images[3::8, :, :, ::2] = 90, 0, 255
    return images


# Crop and flip


def test_augmentation_is_a_crop_of_the_zero_padded_image_and_a_flip():
    """Every outcome is one of the 5 x 5 x 2 made by hand with NumPy, and all are about equally frequent."""
    image = torch.arange(3 * 36).view(3, 6, 6).remainder(251).to(torch.uint8)
    padded = np.pad(image.numpy(), ((0, 0), (2, 2), (2, 2)))
    outcomes = []
    for dy in range(5):
        for dx in range(5):
            crop = padded[:, dy : dy + 6, dx : dx + 6]
            outcomes += [crop.tobytes(), crop[:, :, ::-1].tobytes()]
    assert len(set(outcomes)) == 50
    torch.manual_seed(0)
    batch = augment.crop_and_flip(image.expand(5000, 3, 6, 6), padding=2)
    counts = Counter(made.numpy().tobytes() for made in batch)
    assert counts.keys() == set(outcomes)
    assert min(counts.values()) > 60 and max(counts.values()) < 140  # 100 expected, standard deviation 10


# AutoAugment


class Draws:
    """Takes the place of torch's draws in auto_augment: sub-policies, chances [N, 2], signs [N, 2]."""

    def __init__(self, monkeypatch, chosen, chances, negative):
        drawn = iter([torch.tensor(chances), torch.where(torch.tensor(negative), 0.0, 1.0)])
        monkeypatch.setattr(augment.torch, "randint", lambda *shape: torch.tensor(chosen))
        monkeypatch.setattr(augment.torch, "rand", lambda *shape: next(drawn))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_sub_policies_are_torchvisions(size, layout, monkeypatch):
    """Each sub-policy, with either operation, both and none, and each sign, as torchvision's own forward."""
    images, chosen, chances, negative, expected = photos(25 * 16, *size), [], [], [], []
    for i, image in enumerate(images):
        pair, *bits = i // 16, i // 8 % 2, i // 4 % 2, i // 2 % 2, i % 2
        chosen.append(pair)
        chances.append([0.0 if bits[0] else 1.0, 0.0 if bits[2] else 1.0])
        negative.append([bits[1] == 0, bits[3] == 0])
        drawn = []
        for step, (name, probability, level) in enumerate(TORCHVISION._policies[pair]):
            is_applied = chances[-1][step] < probability
            drawn.append(0.0 if is_applied else 1.1)  # torchvision: chance <= probability
            if is_applied and level is not None and TORCHVISION._AUGMENTATION_SPACE[name][1]:
                drawn.append(0.0 if negative[-1][step] else 1.0)
        drawn = iter(drawn)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "randint", lambda *shape, pair=pair: pair)
            patch.setattr(torch, "rand", lambda *shape, drawn=drawn: next(drawn))
            expected.append(TORCHVISION(image))
        assert next(drawn, None) is None
    images = images.contiguous(memory_format=layout)
    before = images.clone()
    with monkeypatch.context() as patch:
        Draws(patch, chosen, chances, negative)
        result = augment.auto_augment(images)
    assert torch.equal(result, torch.stack(expected))
    assert torch.equal(images, before) and result.is_contiguous(memory_format=layout)


def test_each_operation_is_torchvisions():
    """Of a batch what it is of each image."""
    images, tried, rest = photos(8), set(), (TORCHVISION.interpolation, TORCHVISION._fill)
    for name, _, level in sum(TORCHVISION._policies, ()):
        levels, signed = TORCHVISION._AUGMENTATION_SPACE[name]
        magnitude = 0.0 if level is None else levels(10, 32, 32)[level].item()
        for value in {magnitude, -magnitude if signed else magnitude}:
            tried.add(name)
            singly = [augment.apply_op(i, name, value, *rest) for i in images]
            assert torch.equal(augment.apply_op(images, name, value, *rest), torch.stack(singly))
    assert tried == {name for pair in TORCHVISION._policies for name, _, _ in pair}


def test_frequencies_of_the_draws(monkeypatch):
    """The operations are asked for as often as the policy has it, within 4 sigma."""
    n, counts, expected = 100_000, Counter(), Counter()

    def record(images, name, magnitude, *rest):
        counts[name, magnitude] += len(images)
        return images

    monkeypatch.setattr(augment, "apply_op", record)
    torch.manual_seed(0)
    augment.auto_augment(torch.zeros(n, 3, 1, 1, dtype=torch.uint8))
    for name, probability, level in sum(TORCHVISION._policies, ()):
        levels, signed = TORCHVISION._AUGMENTATION_SPACE[name]
        magnitude = 0.0 if level is None else levels(10, 1, 1)[level].item()
        for value in (magnitude, -magnitude if signed else magnitude):
            expected[name, value] += n * probability / 25 / 2
    assert counts.keys() == expected.keys()
    for key, mean in expected.items():  # variance: at most 2 means, an image counting in both its operations
        assert abs(counts[key] - mean) < 4 * (2 * mean) ** 0.5, key


# Cutout


def white(count, height, width):
    return torch.full((count, 3, height, width), 255, dtype=torch.uint8)


@pytest.mark.parametrize(
    "y, x, side, rows, columns",
    [
        (3, 4, 4, (1, 5), (2, 6)),  # inside
        (0, 0, 4, (0, 2), (0, 2)),  # corners, clipped
        (5, 7, 4, (3, 6), (5, 8)),
        (0, 7, 2, (0, 1), (6, 8)),
        (3, 4, 5, (1, 5), (2, 6)),  # odd: as 4
        (2, 5, 100, (0, 6), (0, 8)),  # everything
        (3, 4, 1, (0, 0), (0, 0)),  # nothing
        (3, 4, 0, (0, 0), (0, 0)),
    ],
)
def test_hole_by_hand(y, x, side, rows, columns, monkeypatch):
    centres = iter([torch.tensor([[y]]), torch.tensor([[x]])])
    monkeypatch.setattr(augment.torch, "randint", lambda *shape, device: next(centres))
    expected = white(1, 6, 8)
    expected[:, :, rows[0] : rows[1], columns[0] : columns[1]] = 0
    assert torch.equal(augment.cutout(white(1, 6, 8), side), expected)


def test_centres_are_uniform_over_the_pixels():
    n = 48_000
    torch.manual_seed(0)
    holes = augment.cutout(white(n, 6, 8), 2)[:, 0] == 0  # rows y-1, y and columns x-1, x
    ys, xs = (holes.any(2) * torch.arange(6)).amax(1), (holes.any(1) * torch.arange(8)).amax(1)
    counts = torch.bincount(8 * ys + xs, minlength=48)
    assert (counts - n / 48).abs().max() < 4 * (n / 48) ** 0.5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cutout_keeps_its_input_and_layout(layout):
    images = photos(32).contiguous(memory_format=layout)
    before = images.clone()
    batch = augment.cutout(images)
    assert torch.equal(images, before) and batch.is_contiguous(memory_format=layout)
    assert augment.cutout(images[0]).shape == (3, 32, 32)


# Image by image


@pytest.mark.parametrize("kind", ["weak", "jitter", "rotate", "auto", "strong"])
@pytest.mark.parametrize("size, padding", [(32, 4), (96, None)])
def test_single_images(kind, size, padding):
    """uint8 images of the size that was asked for; drawn anew each time, the same from the same seed."""
    image = photos(5, size + (padding is None), size)[4]
    transform = augment.of_images(kind, size, padding)
    made = []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        made.append(torch.stack([transform(image) for _ in range(8)]))
    assert made[0].shape == (8, 3, size, size) and made[0].dtype == torch.uint8
    assert torch.equal(made[0], made[2]) and not torch.equal(made[0], made[1])
    assert not torch.equal(made[0][0], made[0][1])


def test_half_of_the_strong_views_have_a_hole():
    """Of a white image of 32 pixels: AutoAugment with Cutout, or a contrastive view, which has none."""
    torch.manual_seed(0)
    augmented = augment.of_batches("strong", 32, 4)[0](white(400, 32, 32))
    black = (augmented.amax(1) < 8).flatten(1).float().mean(1)
    assert 0.4 < (black > 0.05).float().mean() < 0.6
