"""common.augment: each operation against torchvision's on one image, laws of the draws, holes by hand."""

from collections import Counter
from math import prod

import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.autoaugment import AutoAugment, AutoAugmentPolicy, _apply_op

from common import augment

TORCHVISION = AutoAugment(AutoAugmentPolicy.CIFAR10)
LAYOUTS = torch.contiguous_format, torch.channels_last


def photos(count, height=32, width=32):
    """Smooth random images, with a constant, a black and a two-valued one among them."""
    generator = torch.Generator().manual_seed(0)
    small = torch.randint(256, (count, 3, 5, 5), generator=generator).float()
    images = torch.nn.functional.interpolate(small, (height, width), mode="bilinear").to(torch.uint8)
    images[1::8], images[2::8], images[3::8, :, :, ::2] = 90, 0, 255
    return images


def draw_seeds(count, seed=0):
    return torch.randint(2**62, (count,), generator=torch.Generator().manual_seed(seed))


def compose(values, bases):
    """The seed with these digits, lowest first."""
    return sum(value * prod(bases[:i]) for i, value in enumerate(values))


def test_digits_are_those_of_the_seed():
    a, b, c = augment.digits(torch.tensor([0, 7, 25 * 10 * 3 + 25 * 4 + 24, 2**62 - 1]), 25, 10, 2**62)
    assert a.tolist() == [0, 7, 24, (2**62 - 1) % 25]
    assert b.tolist() == [0, 0, 4, (2**62 - 1) // 25 % 10]
    assert c.tolist() == [0, 0, 3, (2**62 - 1) // 250]
    assert augment.AUTO_AUGMENT_RANGE == 10_000


# AutoAugment


def test_probabilities_of_the_policy_are_tenths():
    for pair in TORCHVISION.policies:
        for _, probability, _ in pair:
            assert 10 * probability == pytest.approx(round(10 * probability), abs=1e-9)


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_sub_policies_are_torchvisions(size, monkeypatch):
    """Each sub-policy, with either operation, both and none, and each sign, as torchvision's own forward."""
    images, seeds, expected = photos(25 * 16, *size), [], []
    for i, image in enumerate(images):
        pair, *bits = i // 16, i // 8 % 2, i // 4 % 2, i // 2 % 2, i % 2
        (_, p, _), (_, q, _) = TORCHVISION.policies[pair]
        tenths = [round(10 * p), round(10 * q)]
        # the last chance within the probability, or the first one beyond; none is within a probability of 0
        applied = [bits[0] and tenths[0] > 0, bits[2] and tenths[1] > 0]
        chances = [t - 1 if a else t for a, t in zip(applied, tenths, strict=True)]
        seeds.append(compose([pair, chances[0], bits[1], chances[1], bits[3]], augment.AUTO_AUGMENT_BASES))
        uniform = torch.tensor([0.0 if a else 1.0 for a in applied])
        drawn = pair, uniform, torch.tensor([bits[1], bits[3]])
        monkeypatch.setattr(TORCHVISION, "get_params", lambda _, drawn=drawn: drawn)
        expected.append(TORCHVISION(image))
    for layout in LAYOUTS:
        result = augment.auto_augment(images.contiguous(memory_format=layout), torch.tensor(seeds))
        assert torch.equal(result, torch.stack(expected))


def test_each_operation_is_torchvisions():
    images, tried = photos(8), set()
    for name, _, magnitudes in sum(augment.sub_policies(32, 32), []):
        for magnitude in magnitudes:
            tried.add(name)
            one_by_one = [_apply_op(i, name, magnitude, InterpolationMode.NEAREST, None) for i in images]
            assert torch.equal(augment.apply_operation(images, name, magnitude), torch.stack(one_by_one))
    assert tried == {name for pair in TORCHVISION.policies for name, _, _ in pair}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_image_does_not_depend_on_its_batch(layout):
    images, seeds = photos(96).contiguous(memory_format=layout), draw_seeds(96)
    before = images.clone(), seeds.clone()
    batch = augment.auto_augment(images, seeds)
    alone = [augment.auto_augment(images[i : i + 1], seeds[i : i + 1]) for i in range(96)]
    assert torch.equal(batch, torch.cat(alone))
    assert torch.equal(batch, augment.auto_augment(images, seeds))
    assert torch.equal(batch, augment.auto_augment(images, seeds % augment.AUTO_AUGMENT_RANGE))
    assert not torch.equal(batch, augment.auto_augment(images, draw_seeds(96, seed=1)))
    assert torch.equal(images, before[0]) and torch.equal(seeds, before[1])
    assert batch.shape == images.shape and batch.dtype == torch.uint8
    assert batch.is_contiguous(memory_format=layout)


def test_no_operation_and_no_image():
    none = torch.tensor([compose([0, 9, 0, 9, 0], augment.AUTO_AUGMENT_BASES)] * 2)
    images = photos(2)
    result = augment.auto_augment(images, none)
    assert torch.equal(result, images) and result.data_ptr() != images.data_ptr()
    assert augment.auto_augment(images[:0], none[:0]).shape == (0, 3, 32, 32)


def test_frequencies_of_the_draws(monkeypatch):
    """Uniform digits, and the operations asked for as often as the policy has it, within 4 sigma."""
    n, seeds, counts, expected = 100_000, draw_seeds(100_000), Counter(), Counter()
    bases = augment.AUTO_AUGMENT_BASES
    for values, base in zip(augment.digits(seeds, *bases), bases, strict=True):
        sigma = (n / base * (1 - 1 / base)) ** 0.5
        assert (torch.bincount(values, minlength=base) - n / base).abs().max() < 4 * sigma

    def record(images, name, magnitude):
        counts[name, magnitude] += len(images)
        return images

    monkeypatch.setattr(augment, "apply_operation", record)
    augment.auto_augment(torch.zeros(n, 3, 1, 1, dtype=torch.uint8), seeds)
    space = TORCHVISION._augmentation_space(10, (1, 1))
    for name, probability, level in sum(TORCHVISION.policies, ()):
        values, signed = space[name]
        magnitude = 0.0 if level is None else values[level].item()
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
def test_hole_by_hand(y, x, side, rows, columns):
    expected = white(1, 6, 8)
    expected[:, :, rows[0] : rows[1], columns[0] : columns[1]] = 0
    seeds = torch.tensor([y + 6 * x])
    assert torch.equal(augment.cutout(white(1, 6, 8), seeds, side), expected)
    assert torch.equal(augment.cutout(white(1, 6, 8), seeds + 6 * 8 * 12345, side), expected)


def test_centres_are_uniform_over_the_pixels():
    n = 48_000
    holes = augment.cutout(white(n, 6, 8), draw_seeds(n), 2)[:, 0] == 0  # rows y-1, y and columns x-1, x
    ys, xs = (holes.any(2) * torch.arange(6)).amax(1), (holes.any(1) * torch.arange(8)).amax(1)
    counts = torch.bincount(8 * ys + xs, minlength=48)
    assert (counts - n / 48).abs().max() < 4 * (n / 48) ** 0.5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cutout_of_a_batch(layout):
    images, seeds = photos(32).contiguous(memory_format=layout), draw_seeds(32)
    before = images.clone(), seeds.clone()
    batch = augment.cutout(images, seeds, 16)
    assert torch.equal(
        batch,
        torch.cat([augment.cutout(*one, 16) for one in zip(images.split(1), seeds.split(1), strict=True)]),
    )
    assert torch.equal(images, before[0]) and torch.equal(seeds, before[1])
    assert batch.dtype == torch.uint8 and batch.is_contiguous(memory_format=layout)
    assert torch.equal(augment.cutout(images, seeds, 0), images)
