"""Augmentations of training images, on torch's own generator, which a run seeds anew at each epoch.

Those of whole batches of small images are fast and run where the images are. The others are torchvision's,
for one image at a time, in loader processes.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.autoaugment import AutoAugment, AutoAugmentPolicy, _apply_op

POLICY = AutoAugment(AutoAugmentPolicy.CIFAR10)


def of_batches(kind, size, padding):
    """(the augmentation `kind` of uint8 batches [B, C, H, W], whether it goes image by image)."""
    if kind == "weak":
        return partial(crop_and_flip, padding=padding), False
    if kind == "auto":
        return v2.Compose([partial(crop_and_flip, padding=padding), auto_augment, cutout]), False
    return partial(one_by_one, transform=of_images(kind, size, padding)), True


def one_by_one(images, transform):
    return torch.stack([transform(image) for image in images])


def of_images(kind, size, padding=None):
    """The augmentation `kind` of one uint8 image [C, H, W]. padding: of small images."""
    small = padding is not None
    crop = v2.RandomCrop(size, padding) if small else v2.RandomResizedCrop(size)
    flip = v2.RandomHorizontalFlip()
    colours = v2.ColorJitter(0.4, 0.4, 0.4, 0.1 if small else 0.0)
    if kind == "jitter":
        return v2.Compose([crop, flip, colours])
    if kind == "rotate":
        return v2.Compose([crop, flip, v2.RandomRotation(15)])
    if kind == "auto":
        return v2.Compose([crop, flip, v2.AutoAugment()])
    if kind == "strong":
        blur = v2.RandomApply([v2.GaussianBlur(9, (0.1, 2.0))], 0.5)
        if small:
            usual = [crop, flip, v2.AutoAugment(AutoAugmentPolicy.CIFAR10), v2.Lambda(cutout)]
            crop, colours = v2.RandomResizedCrop(size, (0.2, 1.0)), v2.RandomApply([colours], 0.8)
        else:  # near to timm's rand-n2-m10-mstd0.5: two operations, each with probability 0.5
            operation = v2.RandAugment(1, 30, interpolation=InterpolationMode.BILINEAR, fill=[124, 116, 104])
            usual = [crop, flip, colours, *[v2.RandomApply([operation], 0.5) for _ in range(2)]]
        contrastive = [crop, flip, colours, v2.RandomGrayscale(0.2), blur]
        return v2.RandomChoice([v2.Compose(usual), v2.Compose(contrastive)])
    return v2.Compose([crop, flip])


def crop_and_flip(images, padding):
    """A random crop of each image after zero padding, then a flip of half of them. [B, C, H, W]."""
    (number, _, size, _), device = images.shape, images.device
    windows = F.pad(images, (padding,) * 4).unfold(2, size, 1).unfold(3, size, 1)
    top, left = torch.randint(2 * padding + 1, (2, number), device=device)
    images = windows[torch.arange(number, device=device), :, top, left]
    flipped = torch.rand(number, 1, 1, 1, device=device) < 0.5
    return torch.where(flipped, images.flip(3), images)


def cutout(images, side=16):
    """A black square of `side` pixels at a random place of each image, clipped at the border. [.., C, H, W].

    DeVries and Taylor, arXiv:1708.04552. Rows y - side // 2 to y + side // 2 - 1: an odd side loses one.
    """
    *number, _, height, width = images.shape

    def covered(size):
        centres = torch.randint(size, (*number, 1), device=images.device)
        offsets = torch.arange(size, device=images.device) - centres
        return (offsets >= -(side // 2)) & (offsets < side // 2)

    hole = covered(height)[..., None, :, None] & covered(width)[..., None, None, :]
    return images.clone().masked_fill_(hole, 0)  # out of place it would not keep channels_last


def auto_augment(images):
    """AutoAugment with its CIFAR-10 policy (Cubuk et al., CVPR 2019) on each image. uint8 [B, 3, H, W].

    torchvision's class draws once for a whole batch. Here images of the same operation are taken together.
    """
    space, number = POLICY._augmentation_space(10, images.shape[-2:]), len(images)
    chosen = torch.randint(len(POLICY.policies), (number,)).tolist()
    chances = torch.rand(number, 2).tolist()
    negative = (torch.rand(number, 2) < 0.5).tolist()
    members = {}
    for i in range(number):
        for step, (name, probability, level) in enumerate(POLICY.policies[chosen[i]]):
            if chances[i][step] < probability:
                values, signed = space[name]
                magnitude = 0.0 if level is None else values[level].item()
                if signed and negative[i][step]:
                    magnitude = -magnitude
                members.setdefault((step, name, magnitude), []).append(i)
    images = images.clone()
    for (_, name, magnitude), positions in sorted(members.items()):  # first operations before second ones
        if name == "Equalize":  # _apply_op gives the same bits, but waits for the device at each image
            changed = v2.functional.equalize(images[positions])
        else:
            changed = _apply_op(images[positions], name, magnitude, InterpolationMode.NEAREST, None)
        images[positions] = changed
    return images
