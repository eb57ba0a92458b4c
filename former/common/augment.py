"""Augmentations of whole batches of uint8 images, where a seed per image alone decides how.

The random numbers of `auto_augment` and `cutout` are the lowest digits of the seeds: the next one is given
`seeds // range`, the range being AUTO_AUGMENT_RANGE and H * W. There is no room for more: `rotate` takes
column 0 of `uniforms` of the whole seeds, `contrastive` the columns after it.
"""

import math
from functools import cache

import torch
import torch.nn.functional as F
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.autoaugment import AutoAugment, AutoAugmentPolicy, _apply_op

POLICY = AutoAugment(AutoAugmentPolicy.CIFAR10)
AUTO_AUGMENT_BASES = len(POLICY.policies), 10, 2, 10, 2  # sub-policy, then each operation's chance and sign
AUTO_AUGMENT_RANGE = math.prod(AUTO_AUGMENT_BASES)  # 10,000


def digits(seeds, *bases):
    """One tensor [B] per base, in 0..base-1: the digits of the non-negative `seeds` [B], lowest first."""
    found = []
    for base in bases:
        found.append(seeds % base)
        seeds = seeds // base
    return found


def uniforms(seeds, n):
    """float32 [B, n] in [0, 1), the same on any device: the first n outputs of SplitMix64 from each seed.

    Steele et al., OOPSLA 2014, in wrap-around arithmetic; the upper 24 bits are taken. int64 seeds [B].
    """

    def shifted(bits, by):  # >> alone copies the sign
        return (bits >> by) & (1 << 64 - by) - 1

    steps = torch.arange(1, n + 1, device=seeds.device)
    bits = seeds[:, None] + (0x9E3779B97F4A7C15 - 2**64) * steps
    bits = (bits ^ shifted(bits, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    bits = (bits ^ shifted(bits, 27)) * (0x94D049BB133111EB - 2**64)
    return shifted(bits ^ shifted(bits, 31), 40).float() / 2**24


@cache
def sub_policies(height, width):
    """The 25 pairs of operations (name, probability in tenths, (negative, positive magnitude))."""
    space = POLICY._augmentation_space(10, (height, width))

    def operation(name, probability, level):
        values, signed = space[name]
        magnitude = 0.0 if level is None else values[level].item()
        return name, round(10 * probability), (-magnitude if signed else magnitude, magnitude)

    return [[operation(*entry) for entry in pair] for pair in POLICY.policies]


def apply_operation(images, name, magnitude):
    """One operation on all of `images` [B, 3, H, W]; a new tensor."""
    if name == "Equalize":  # _apply_op gives the same bits, but image by image, with a GPU waited for in each
        return v2.functional.equalize(images)
    return _apply_op(images, name, magnitude, InterpolationMode.NEAREST, None)


def auto_augment(images, seeds):
    """AutoAugment with its CIFAR-10 policy (Cubuk et al., CVPR 2019), as torchvision applies it.

    uint8 images [B, 3, H, W], int64 seeds [B] in 0..2^62 on any device; a new tensor of the same layout.
    """
    pairs, groups = sub_policies(*images.shape[-2:]), {}
    drawn = [values.tolist() for values in digits(seeds.cpu(), *AUTO_AUGMENT_BASES)]
    for i, (pair, *draws) in enumerate(zip(*drawn, strict=True)):
        for step, (name, tenths, magnitudes) in enumerate(pairs[pair]):
            chance, sign = draws[2 * step : 2 * step + 2]
            if chance < tenths:
                groups.setdefault((step, name, magnitudes[sign]), []).append(i)
    order = sorted(groups)  # every first operation before any second one
    members = torch.tensor([i for group in order for i in groups[group]], dtype=torch.int64)
    members = members.to(images.device, non_blocking=True)  # one transfer for all groups
    images = images.clone()
    for (_, name, magnitude), of in zip(order, members.split([len(groups[g]) for g in order]), strict=True):
        images[of] = apply_operation(images[of], name, magnitude)
    return images


def cutout(images, seeds, side):
    """One black square of `side` pixels per image, clipped at the border (DeVries & Taylor, 2017).

    uint8 images [B, C, H, W] before normalisation, int64 seeds [B] on their device; a new tensor. The centre
    is uniform over all pixels; the hole's rows are y - side // 2 to y + side // 2 - 1: an odd side loses one.
    """

    def covered(centres, size):  # [B] -> bool [B, size]
        offsets = torch.arange(size, device=centres.device) - centres[:, None]
        return (offsets >= -(side // 2)) & (offsets < side // 2)

    height, width = images.shape[-2:]
    y, x = digits(seeds, height, width)
    hole = covered(y, height)[:, None, :, None] & covered(x, width)[:, None, None, :]
    return images.clone().masked_fill_(hole, 0)  # out of place it would not keep channels_last


def warp(images, maps):
    """(images [B, C, H, W] moved, 0 where nothing came from inside; bool [B, H, W] where something did).

    maps [B, 2, 3]: from (x, y, 1) of a pixel to the (x, y) that it shows; the nearest pixel is taken.
    """
    batch, _, height, width = images.shape
    y, x = (torch.arange(size, device=images.device) for size in (height, width))
    y, x = torch.meshgrid(y, x, indexing="ij")
    pixels = torch.stack([x, y, torch.ones_like(x)]).view(3, -1).to(maps)
    from_x, from_y = (maps @ pixels).round().long().view(batch, 2, height, width).unbind(1)
    inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
    which = torch.arange(batch, device=images.device)[:, None, None]
    moved = images.permute(0, 2, 3, 1)[which, from_y.clamp(0, height - 1), from_x.clamp(0, width - 1)]
    return moved.permute(0, 3, 1, 2) * inside[:, None], inside


def rotate(images, seeds, degrees):
    """Each image turned about its centre by up to `degrees` either way, as torchvision's RandomRotation.

    uint8 images [B, C, H, W], int64 seeds [B] on their device; a new tensor in channels_last, 0 from outside.
    """
    angles = math.radians(degrees) * (2 * uniforms(seeds, 1)[:, 0].double() - 1)  # double: no ties
    cos, sin = angles.cos(), angles.sin()
    y, x = ((size - 1) / 2 for size in images.shape[-2:])
    maps = torch.stack([cos, -sin, x - x * cos + y * sin, sin, cos, y - x * sin - y * cos], 1)
    return warp(images, maps.view(-1, 2, 3))[0]


# The contrastive view, with the operations of torchvision.transforms.v2, for images of 0 to 255 in float32


def crop_boxes(draws, height, width, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3)):
    """RandomResizedCrop's top, left, height and width, whole numbers [B] each, from uniform draws [B, 22].

    Of ten boxes the first that fits, else the whole image, which must be square.
    """
    area, turn = draws[:, :20].double().split(10, 1)  # double: the exponential may differ in the last bit
    area = height * width * (scale[0] + (scale[1] - scale[0]) * F.pad(area, (0, 1), value=1))
    ratios = (math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * F.pad(turn, (0, 1), value=0.5)).exp()
    heights, widths = (area / ratios).sqrt().round(), (area * ratios).sqrt().round()
    fits = (heights > 0) & (heights <= height) & (widths > 0) & (widths <= width)
    first = fits.int().argmax(1, keepdim=True)
    h, w = heights.gather(1, first)[:, 0], widths.gather(1, first)[:, 0]
    return (draws[:, 20] * (height - h + 1)).floor(), (draws[:, 21] * (width - w + 1)).floor(), h, w


def resized_crop(images, top, left, height, width):
    """The boxes [B] of `images` [B, C, H, W] in the size of the images, bilinear and rounded."""

    def places(start, side, size):  # [B] -> [B, size], from -1 to 1 over the image
        steps = torch.arange(size, device=images.device) + 0.5
        inside = torch.minimum((side[:, None] / size * steps - 0.5).clamp(min=0), side[:, None] - 1)
        return ((start[:, None] + inside) * 2 + 1) / size - 1

    y, x = places(top, height, images.shape[2]), places(left, width, images.shape[3])
    y, x = torch.broadcast_tensors(y[:, :, None], x[:, None])
    grid = torch.stack([x, y], 3).to(images)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False).round_()


def greys(images):
    """The grey levels [B, 1, H, W] of RGB images [B, 3, H, W], rounded down."""
    red, green, blue = images.split(1, 1)
    return (0.2989 * red + 0.587 * green + 0.114 * blue).floor_()


def blend(images, others, factors):
    """images * f + others * (1 - f), cut to 0..255 and rounded down. factors f [B, 1, 1, 1]."""
    return (images * factors + others * (1 - factors)).clamp_(0, 255).floor_()


def turn_hue(images, turns):
    """RGB images [B, 3, H, W] with the hue moved by `turns` [B, 1, 1, 1] of the colour circle."""
    red, green, blue = images.split(1, 1)
    high = images.amax(1, keepdim=True)
    chroma = high - images.amin(1, keepdim=True)
    sixths = torch.where(high == green, 2 * chroma + blue - red, 4 * chroma + red - green)
    sixths = torch.where(high == red, green - blue, sixths) / chroma.clamp(min=1)
    place = sixths + 6 * turns + torch.arange(5, 0, -2, device=images.device).view(3, 1, 1)
    place -= 6 * (place / 6).floor_()  # % is slow
    images = high - chroma * torch.minimum(place, 4 - place).clamp_(0, 1)
    return (images * (255.999 / 255)).clamp_(min=0).floor_()  # as torchvision leaves 0..1


def color_jitter(images, draws, strength=0.4, hue=0.1):
    """ColorJitter(strength, strength, strength, hue), in random order, from uniform draws [B, 8]."""
    factors = 1 + strength * (2 * draws[:, :3] - 1)
    turns = hue * (2 * draws[:, 3] - 1).view(-1, 1, 1, 1)
    for which in draws[:, 4:].argsort(dim=1, stable=True).split(1, 1):  # 0 to 3, an image's operation now
        grey, now = greys(images), which.view(-1, 1, 1, 1)
        others = torch.where(now == 1, grey.mean((1, 2, 3), keepdim=True), grey * (now == 2))
        blended = blend(images, others, factors.gather(1, which.clamp(max=2)).view(-1, 1, 1, 1))
        images = torch.where(now == 3, turn_hue(images, turns), blended)
    return images


def gaussian_blur(images, sigmas, side=9):
    """Images [B, C, H, W] blurred by sigmas [B] in pixels, with kernels of `side` pixels, and rounded."""
    offsets, reach = torch.arange(side, device=images.device) - side // 2, side // 2
    kernels = (-0.5 * (offsets / sigmas[:, None]) ** 2).softmax(1).view(-1, side, 1, 1, 1)
    for axis, padding in ((2, (0, 0, reach, reach)), (3, (reach, reach, 0, 0))):
        padded, size = F.pad(images, padding, mode="reflect"), images.shape[axis]
        images = sum(kernels[:, i] * padded.narrow(axis, i, size) for i in range(side))
    return images.round_()


def contrastive(images, usual, seeds, share):
    """`usual`, each image with probability `share` replaced by a contrastive view of that in `images`.

    The view is that of CMO's code for CIFAR, taken from PaCo (Cui et al., ICCV 2021). uint8 images and usual
    [B, 3, H, W], H = W, int64 seeds [B] on their device; a new tensor laid out as `usual`.
    """
    draws = uniforms(seeds, 37)

    def chance(column, probability):
        return (draws[:, column] < probability).view(-1, 1, 1, 1)

    view = resized_crop(images.float(), *crop_boxes(draws[:, 6:28], *images.shape[-2:]))
    view = torch.where(chance(2, 0.5), view.flip(-1), view)
    view = torch.where(chance(3, 0.8), color_jitter(view, draws[:, 28:36]), view)
    view = torch.where(chance(4, 0.2), greys(view), view)
    view = torch.where(chance(5, 0.5), gaussian_blur(view, 0.1 + 1.9 * draws[:, 36]), view)
    return torch.empty_like(usual).copy_(torch.where(chance(1, share), view, usual))


# Of one image, by torch's own random numbers


def blur(image):
    """A uint8 image [C, H, W] under a Gaussian blur of 0.1 to 2 pixels, cut to 9 taps."""
    return gaussian_blur(image[None].float(), torch.empty(1).uniform_(0.1, 2))[0].to(torch.uint8)


def rand_augment(fill):
    """Transforms near to timm's `rand-n2-m10-mstd0.5`: two operations, each done with probability 0.5.

    timm's level 10 of 10 is the end of its ranges, as is 30 of torchvision's 0 to 30: rotation by 30 degrees,
    shear 0.3, shift by 0.45 of the side, 4 bits, colours by 0.9. fill: the RGB colour moved in, 0 to 255.
    """
    one = v2.RandAugment(num_ops=1, magnitude=30, interpolation=InterpolationMode.BILINEAR, fill=fill)
    return [v2.RandomApply([one], 0.5) for _ in range(2)]
