"""Training settings that are ours and the same in every script, and the learning rate that all of them use.

A script's RECIPES take OWN for data sets without a published setting. `--recipe equal` takes EQUAL for the
others, so that methods can be compared on equal terms instead of each with its paper's setting.
"""

import math

SYNTHETIC = dict(epochs=40, batch_size=32, lr_steps=(28, 36), lr_factor=0.01, warmup=2, wd=5e-4)
MNIST = dict(arch="lenet", epochs=8, lr=0.01, lr_steps=(6,), lr_factor=0.01)
FILES = dict(arch="resnet50", imbalance=None, epochs=100, lr_steps=(60, 80), warmup=5, wd=2e-4)
OWN = {"synthetic": SYNTHETIC, "mnist_lt": MNIST, "fashion_mnist_lt": MNIST, "cmnist_lt": MNIST}
OWN |= {"image_folder": FILES, "image_list": FILES}

CIFAR = dict(arch="resnet32", epochs=200, lr_steps=(160, 180), lr_factor=0.01, warmup=5, wd=2e-4)
LARGE = dict(FILES, batch_size=256, augment="jitter")
INAT = dict(LARGE, splits=(100, 21))
EQUAL = {"cifar10_lt": CIFAR, "cifar100_lt": CIFAR, "imagenet_lt": LARGE, "places_lt": LARGE}
EQUAL |= {"inat2017": INAT, "inat2018": INAT, **OWN}
# What an equal recipe has where it names no value, whatever the paper's.
PLAIN = dict(batch_size=128, lr=0.1, lr_steps=(), lr_factor=0.1, cosine=False, warmup=0, warmup_from=0.0)
PLAIN |= dict(wd=0.0, nesterov=False, augment="weak", pretrained=False, splits=(100, 20))


def learning_rate(epoch, args):
    """Learning rate of the 0-based `epoch`: linear warm-up from warmup_from * lr, then steps or a cosine."""
    warm = min(1.0, (epoch + 1) / max(args.warmup, 1))
    lr = args.lr * (args.warmup_from + (1 - args.warmup_from) * warm)
    if args.cosine:
        start = max(args.warmup - 1, 0)  # the first epoch of the whole rate
        return lr * 0.5 * (1 + math.cos(math.pi * max(epoch - start, 0) / max(args.epochs - start, 1)))
    return lr * args.lr_factor ** sum(epoch >= step for step in args.lr_steps)
