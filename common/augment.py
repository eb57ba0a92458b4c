"""Augmentations of whole batches of uint8 images, where a seed per image alone decides how.

A function's random numbers are the lowest digits of the seeds: the next one is given `seeds // range`,
the range being AUTO_AUGMENT_RANGE for `auto_augment` and H * W for `cutout`.
"""

import math
from functools import cache

import torch
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
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    pixels = torch.stack([x, y, torch.ones_like(x)]).view(3, -1).to(maps)
    from_x, from_y = (maps @ pixels).round().long().view(batch, 2, height, width).unbind(1)
    inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
    which = torch.arange(batch, device=images.device)[:, None, None]
    moved = images.permute(0, 2, 3, 1)[which, from_y.clamp(0, height - 1), from_x.clamp(0, width - 1)]
    return moved.permute(0, 3, 1, 2) * inside[:, None], inside
