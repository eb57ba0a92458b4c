"""common.augment: each operation against torchvision's on one image, laws of the draws, holes by hand."""

from collections import Counter
from math import prod

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2
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


# Uniform numbers


def test_uniforms_are_those_of_splitmix64():
    def splitmix64(state, n):  # with Python's integers
        found = []
        for _ in range(n):
            state = (state + 0x9E3779B97F4A7C15) % 2**64
            z = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
            z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
            found.append(z ^ z >> 31)
        return found

    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert splitmix64(1234567, 4) == published
    seeds = [0, 1, 1234567, 2**40 + 3, 2**62 - 1, *draw_seeds(50).tolist()]
    expected = torch.tensor([[(z >> 40) / 2**24 for z in splitmix64(seed, 6)] for seed in seeds])
    found = augment.uniforms(torch.tensor(seeds), 6)
    assert found.dtype == torch.float32 and found.equal(expected)
    assert augment.uniforms(torch.tensor(seeds), 2).equal(expected[:, :2])


@pytest.mark.parametrize("seeds", [draw_seeds(40_000), torch.arange(40_000)], ids=["drawn", "in a row"])
def test_uniforms_are_uniform_and_independent(seeds):
    """Means, variances and correlations within 5 sigma, with each other, the digits and the next seed's."""
    n, columns = len(seeds), 37
    draws = augment.uniforms(seeds, columns).double()
    assert 0 <= draws.min() < 1e-4 and 1 - 1e-4 < draws.max() < 1
    assert (draws.mean(0) - 1 / 2).abs().max() < 5 * (1 / 12 / n) ** 0.5
    assert (draws.var(0) - 1 / 12).abs().max() < 5 * (1 / 180 / n) ** 0.5
    for column in draws.T:
        assert (torch.histc(column, 16, 0, 1) - n / 16).abs().max() < 5 * (n / 16) ** 0.5
    others = torch.stack(augment.digits(seeds, 9, 9, 2, *augment.AUTO_AUGMENT_BASES)).double()
    others = others[others.std(1) > 0]  # small seeds have few digits
    correlations = torch.corrcoef(torch.cat([draws.T, draws.roll(1, 0).T, others]))[:columns]
    correlations[:, :columns].fill_diagonal_(0)
    assert correlations.abs().max() < 5 / n**0.5
    assert len(draws.unique(dim=0)) == n


# The operations of a contrastive view, each on a batch with numbers of its own


def fourth(values):
    return values.view(-1, 1, 1, 1)


def noise(count):
    return torch.randint(256, (count, 3, 32, 32), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


PICTURES = torch.cat([photos(16), noise(16)])


def expect(batch, operation, *numbers, levels=1, share=0.001):
    """`batch` is torchvision's operation on each picture, but for some pixels that differ by a few levels."""
    numbers = [values.tolist() for values in numbers]
    expected = [operation(image, *of) for image, *of in zip(PICTURES, *numbers, strict=True)]
    apart = (batch.float() - torch.stack(expected).float()).abs()
    assert apart.max() <= levels and (apart > 0).float().mean() <= share


def test_colours_are_torchvisions():
    images, factors = PICTURES.float(), torch.linspace(0.6, 1.4, 32)
    grey = augment.greys(images)
    expect(grey.expand(-1, 3, -1, -1), lambda image: v2.functional.rgb_to_grayscale(image, 3))
    expect(augment.blend(images, 0, fourth(factors)), v2.functional.adjust_brightness, factors)
    mean = grey.mean((1, 2, 3), keepdim=True)
    expect(augment.blend(images, mean, fourth(factors)), v2.functional.adjust_contrast, factors)
    expect(augment.blend(images, grey, fourth(factors)), v2.functional.adjust_saturation, factors)
    for turns in (torch.linspace(-0.5, 0.5, 32), torch.linspace(-0.1, 0.1, 32)):
        expect(augment.turn_hue(images, fourth(turns)), v2.functional.adjust_hue, turns)
    assert augment.turn_hue(images, torch.zeros(32, 1, 1, 1)).equal(images)


def jittered(image, factors, order):
    """By v2.ColorJitter with these numbers."""
    names = "brightness_factor", "contrast_factor", "saturation_factor", "hue_factor"
    numbers = dict(zip(names, factors, strict=True), fn_idx=order)
    return v2.ColorJitter(0.4, 0.4, 0.4, 0.1).transform(image, numbers)


def jitter_numbers(draws):
    return torch.cat([0.6 + 0.8 * draws[:, :3], 0.2 * draws[:, 3:4] - 0.1], 1), draws[:, 4:].argsort(1)


def test_jitter_is_torchvisions_in_its_order():
    """A level apart may grow in the operations after it."""
    draws = augment.uniforms(draw_seeds(32), 8)
    factors, orders = jitter_numbers(draws)
    assert len(orders.unique(dim=0)) > 12
    expect(augment.color_jitter(PICTURES.float(), draws), jittered, factors, orders, levels=3, share=0.01)


def test_orders_of_the_jitter_are_uniform():
    n = 48_000
    orders = augment.uniforms(draw_seeds(n), 8)[:, 4:].argsort(1)
    _, counts = (orders @ torch.tensor([64, 16, 4, 1])).unique(return_counts=True)
    assert len(counts) == 24 and (counts - n / 24).abs().max() < 4.5 * (n / 24) ** 0.5


def test_blur_is_torchvisions():
    sigmas = torch.linspace(0.1, 2, 32)
    blurred = augment.gaussian_blur(PICTURES.float(), sigmas)
    expect(blurred, lambda image, sigma: v2.functional.gaussian_blur(image, 9, sigma), sigmas)


def test_crops_are_torchvisions():
    boxes = augment.crop_boxes(augment.uniforms(draw_seeds(32), 22), 32, 32)
    for i, box in enumerate([(0, 0, 32, 32), (0, 31, 32, 1), (5, 7, 1, 9)]):  # all, one column, one row
        for values, value in zip(boxes, box, strict=True):
            values[i] = value

    def crop(image, *box):
        return v2.functional.resized_crop(image, *map(int, box), [32, 32], antialias=False)

    resized = augment.resized_crop(PICTURES.float(), *boxes)
    expect(resized, crop, *boxes, share=0.25)  # torchvision's weights for uint8 are of 8 bits or so
    assert resized[0].equal(PICTURES[0].float())


def test_boxes_are_as_torchvision_draws_them():
    """Means and spreads of 20,000 boxes, against 4,000 of torchvision's own, in 24 x 24."""
    top, left, height, width = augment.crop_boxes(augment.uniforms(draw_seeds(20_000), 22), 24, 24)
    assert (top.min(), left.min(), (top + height).max(), (left + width).max()) == (0, 0, 24, 24)
    torch.manual_seed(0)
    crop, image = v2.RandomResizedCrop(24, (0.2, 1)), torch.zeros(3, 24, 24)
    drawn = [crop.make_params([image]) for _ in range(4000)]
    for name, values in dict(top=top, left=left, height=height, width=width, area=height * width).items():
        theirs = [one["height"] * one["width"] if name == "area" else one[name] for one in drawn]
        theirs = torch.tensor(theirs, dtype=torch.float64)
        assert abs(values.mean() - theirs.mean()) < 5 * theirs.std() / 4000**0.5, name
        assert abs(values.std() / theirs.std() - 1) < 0.08, name
    whole = augment.crop_boxes(torch.ones(1, 22) - 2**-24, 24, 24)  # ten times too wide
    assert [value.item() for value in whole] == [0, 0, 24, 24]


def test_rotation_is_torchvisions():
    seeds = draw_seeds(32)
    angles = 15 * (2 * augment.uniforms(seeds, 1)[:, 0] - 1)
    expect(augment.rotate(PICTURES, seeds, 15), v2.functional.rotate, angles, levels=255)
    assert augment.rotate(PICTURES, seeds, 0).equal(PICTURES)


def view(images, seeds, share=1.0):
    return augment.contrastive(images, images, seeds, share)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_view_of_a_batch(layout):
    images, seeds = PICTURES.contiguous(memory_format=layout), draw_seeds(32)
    before = images.clone(), seeds.clone()
    for function in (lambda *batch: augment.rotate(*batch, 15), view, lambda *batch: view(*batch, 0.5)):
        batch = function(images, seeds)
        alone = [function(images[i : i + 1], seeds[i : i + 1]) for i in range(32)]
        assert batch.equal(torch.cat(alone)) and batch.equal(function(images.flip(0), seeds.flip(0)).flip(0))
        assert not batch.equal(function(images, draw_seeds(32, seed=1)))
        assert batch.shape == images.shape and batch.dtype == torch.uint8
        assert images.equal(before[0]) and seeds.equal(before[1])
        if function is view:
            assert batch.is_contiguous(memory_format=layout)
    assert augment.rotate(images, seeds, 15).is_contiguous(memory_format=torch.channels_last)
    assert view(images[:0], seeds[:0]).shape == (0, 3, 32, 32)


def test_a_view_is_torchvisions_operations_each_with_numbers_of_its_own():
    images, seeds = photos(64), draw_seeds(64)
    draws = augment.uniforms(seeds, 37)
    flips, jitters, greys, blurs = (draws[:, 2:6] < torch.tensor([0.5, 0.8, 0.2, 0.5])).T.tolist()
    boxes, (factors, orders) = augment.crop_boxes(draws[:, 6:28], 32, 32), jitter_numbers(draws[:, 28:36])
    expected = []
    for i, image in enumerate(images):
        box = [int(values[i]) for values in boxes]
        image = v2.functional.resized_crop(image, *box, [32, 32], antialias=False)
        image = image.flip(-1) if flips[i] else image
        image = jittered(image, factors[i].tolist(), orders[i].tolist()) if jitters[i] else image
        image = v2.functional.rgb_to_grayscale(image, 3) if greys[i] else image
        sigma = 0.1 + 1.9 * draws[i, 36].item()
        expected.append(v2.functional.gaussian_blur(image, 9, sigma) if blurs[i] else image)
    apart = (view(images, seeds).float() - torch.stack(expected).float()).abs()
    assert apart.mean() < 0.5 and apart.flatten(1).mean(1).max() < 2


def test_share_of_the_views():
    """0: none, 1: all; in between the same views, as often as asked for, whatever way the others went."""
    n = 6000
    usual, images, seeds = torch.zeros(n, 3, 8, 8, dtype=torch.uint8), white(n, 8, 8), draw_seeds(n)
    assert augment.contrastive(images, usual, seeds, 0.0).equal(usual)
    every = augment.contrastive(images, usual, seeds, 1.0)
    assert every.flatten(1).amax(1).min() > 100
    some = augment.contrastive(images, usual, seeds, 0.3)
    chosen = some.flatten(1).bool().any(1)
    assert chosen.equal(augment.uniforms(seeds, 2)[:, 1] < 0.3)  # column 0 is the rotation's
    assert abs(chosen.sum() - 0.3 * n) < 4 * (n * 0.3 * 0.7) ** 0.5
    assert some[chosen].equal(every[chosen])


def test_chances_of_a_view(monkeypatch):
    """Flip, jitter, grey and blur as often as published, and each pair independently."""
    n = 4000
    monkeypatch.setattr(augment, "resized_crop", lambda images, *_: images)
    monkeypatch.setattr(
        augment, "color_jitter", lambda images, _: images + torch.tensor([[[8]], [[0]], [[0]]])
    )
    monkeypatch.setattr(augment, "greys", lambda images: images + torch.tensor([[[0]], [[8]], [[0]]]))
    monkeypatch.setattr(
        augment, "gaussian_blur", lambda images, _: images + torch.tensor([[[0]], [[0]], [[8]]])
    )
    images = torch.arange(4).expand(n, 3, 4, 4).to(torch.uint8)
    found = view(images, draw_seeds(n)).long()
    done = torch.stack([found[:, 0, 0, 0] % 8 == 3, *(found[:, :, 0, 0] >= 8).T]).double()
    chances = torch.tensor([0.5, 0.8, 0.2, 0.5], dtype=torch.float64)
    assert ((done.mean(1) - chances).abs() < 4 * (chances * (1 - chances) / n) ** 0.5).all()
    assert (torch.corrcoef(done) - torch.eye(4)).abs().max() < 4 / n**0.5


# One image


def test_blur_of_a_file_is_within_its_bounds(monkeypatch):
    image = torch.zeros(3, 19, 19, dtype=torch.uint8)
    image[:, 9, 9] = 255
    torch.manual_seed(0)
    blurred = augment.blur(image)
    torch.manual_seed(0)
    sigma = torch.empty(1).uniform_(0.1, 2)
    assert blurred.dtype == torch.uint8
    assert blurred.float().equal(augment.gaussian_blur(image[None].float(), sigma)[0])
    drawn = []
    monkeypatch.setattr(
        augment, "gaussian_blur", lambda images, sigmas: drawn.append(sigmas.item()) or images
    )
    for _ in range(300):
        augment.blur(image)
    assert 0.1 <= min(drawn) < 0.13 and 1.97 < max(drawn) <= 2


def test_rand_augment_is_at_the_end_of_the_ranges():
    """As timm's level 10: rotation by 30 degrees, shear 0.3, 4 bits; two operations, each in half of all."""
    transforms = augment.rand_augment([124, 116, 104])
    assert [(type(one), one.p) for one in transforms] == [(v2.RandomApply, 0.5)] * 2
    for one in transforms:
        (operation,) = one.transforms
        space = {name: make(31, 224, 224) for name, (make, _) in operation._AUGMENTATION_SPACE.items()}
        level = operation.magnitude
        assert operation.num_ops == 1 and operation.num_magnitude_bins == 31
        assert (space["Rotate"][level], space["Posterize"][level]) == (30, 4)
        assert space["ShearX"][level] == pytest.approx(0.3) and space["Color"][level] == pytest.approx(0.9)
        assert space["TranslateX"][level] == pytest.approx(0.45 * 224, rel=0.01)
    torch.manual_seed(0)
    image = Image.fromarray(np.full((32, 32, 3), 200, dtype=np.uint8))
    corners = {v2.Compose(transforms)(image).getpixel((0, 0)) for _ in range(200)}
    assert (124, 116, 104) in corners  # the colour that moves in
