"""Augmentations of training images, on torch's own generator, which a run seeds anew at each epoch.

Those of batches of small images run where the images are; torchvision's, image by image, in loader processes.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torchvision.transforms import v2

POLICY = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)
apply_op = POLICY._apply_image_or_video_transform


def of_batches(kind, size, padding):
    """(the augmentation `kind` of uint8 batches [B, C, H, W], whether it goes image by image)."""
    shift = partial(crop_and_flip, padding=padding)
    if kind in ("weak", "auto"):
        return shift if kind == "weak" else v2.Compose([shift, auto_augment, cutout]), False
    return partial(one_by_one, transform=of_images(kind, size, padding)), True


def one_by_one(images, transform):
    return torch.stack([transform(image) for image in images])


def of_images(kind, size, padding=None):
    """The augmentation `kind` of one uint8 image [C, H, W]. padding: of small images."""
    small = padding is not None
    crop = v2.RandomCrop(size, padding) if small else v2.RandomResizedCrop(size)
    flip = v2.RandomHorizontalFlip()
    colours = v2.ColorJitter(0.4, 0.4, 0.4, 0.1 if small else 0.0)
    if kind != "strong":
        more = {"jitter": [colours], "rotate": [v2.RandomRotation(15)], "auto": [v2.AutoAugment()]}
        return v2.Compose([crop, flip, *more.get(kind, [])])
    if small:
        usual = [crop, flip, POLICY, v2.Lambda(cutout)]
        crop, colours = v2.RandomResizedCrop(size, (0.2, 1.0)), v2.RandomApply([colours], 0.8)
    else:  # near to timm's rand-n2-m10-mstd0.5: two operations, each with probability 0.5
        operation = v2.RandAugment(1, 30, interpolation=v2.InterpolationMode.BILINEAR, fill=[124, 116, 104])
        usual = [crop, flip, colours, *[v2.RandomApply([operation], 0.5) for _ in range(2)]]
    blur = v2.RandomApply([v2.GaussianBlur(9, (0.1, 2.0))], 0.5)
    contrastive = [crop, flip, colours, v2.RandomGrayscale(0.2), blur]
    return v2.RandomChoice([v2.Compose(usual), v2.Compose(contrastive)])


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
    y, x = (torch.randint(size, (*number, 1, 1, 1), device=images.device) for size in (height, width))
    down = torch.arange(height, device=images.device)[:, None] - y  # from the centre
    across = torch.arange(width, device=images.device) - x
    half = side // 2
    hole = (down >= -half) & (down < half) & (across >= -half) & (across < half)
    return images.clone().masked_fill_(hole, 0)  # out of place it would not keep channels_last


def auto_augment(images):
    """AutoAugment with its CIFAR-10 policy (Cubuk et al., CVPR 2019) on each image. uint8 [B, 3, H, W].

    torchvision's class draws once for a whole batch. Here images of one sub-policy and sign go together.
    """
    chosen = torch.randint(len(POLICY._policies), (len(images),))
    chances, negative = torch.rand(len(images), 2), torch.rand(len(images), 2) < 0.5
    images = images.clone()
    for i, operations in enumerate(POLICY._policies):
        for step, (name, probability, level) in enumerate(operations):
            levels, is_signed = POLICY._AUGMENTATION_SPACE[name]
            magnitude = 0.0 if level is None else float(levels(10, *images.shape[-2:])[level])
            members = (chosen == i) & (chances[:, step] < probability)
            minus = negative[:, step] & is_signed
            for some, value in ((members & ~minus, magnitude), (members & minus, -magnitude)):
                if some.any():
                    images[some] = apply_op(images[some], name, value, POLICY.interpolation, POLICY._fill)
    return images
