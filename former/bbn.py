"""BBN: Bilateral-Branch Network with cumulative learning.

Paper:    B. Zhou, Q. Cui, X.-S. Wei, Z.-M. Chen, "BBN: Bilateral-Branch Network with Cumulative Learning for
          Long-Tailed Visual Recognition", CVPR 2020, arXiv:1912.02413.
Method:   1. draw one batch as the data are, one by P_i ~ 1 / N_i per class     Samplers, class_probabilities
          2. share the network but for its last block, which exists twice, and mix the branches:
             z = 2 * (alpha * W_c f_c + (1 - alpha) * W_r f_r) + b                  Eq. (1) of the code, BBN
          3. loss = alpha * CE(z, y_c) + (1 - alpha) * CE(z, y_r)                        Eq. (3), mixed_loss
          4. alpha falls with the epochs, 1 - (t / T)^2                       Cumulative learning, alpha_at
          5. predict by both branches, as with alpha = 1/2: W_c f_c + W_r f_r + b             Inference, BBN
          --method ce, mixup, manifold and manifold2 (of two samplers) are the baselines, class Mixed.
Differs:  where paper and released code disagree, this follows the code: the factor 2 and the one bias in z,
          t = epoch - 1 counted from 1 (so alpha is 1 at first), T = 100 for 90 epochs and 200 for 180,
          milestones hold from that epoch on, counted from 1, random resized crops of 224 pixels.
          Unlike the code: ResNet-50 starts from torchvision's initialisation; iNaturalist is normalised by
          its own mean and deviation; the result is the last epoch. "1x" on iNaturalist is --epochs 90
          --lr-steps 59 79. The authors have no setting for ImageNet-LT, ours is a user's. The baselines have
          no Nesterov momentum and a warm-up linear from lr / 5, on CIFAR the steps 160 and 180, as LDAM's
          code. Manifold mixup of two samplers was not released, this is our reading. Of LeNet the linear
          layers below the classifier exist twice.
          One process and several differ in the partners of mixup and in BatchNorm statistics alone.
Expected: ResNet-32, imbalance 100 / 50 / 10: cifar10_lt 79.8 / 82.2 / 88.3 all, cifar100_lt 42.6 / 47.0 /
          59.1 (paper, best epoch on the test set; a user measured 79.5 for cifar10_lt 50). cifar10_lt 100: CE
          70.4 (copied from LDAM; reruns give 72), mixup 73.1, manifold 73.0, manifold2 73.1. inat2018,
          ResNet-50: 66.3 (1x), 69.6 (2x); inat2017: 63.4, 65.8. Ours: see README.
Run:      accelerate launch bbn.py --dataset cifar10_lt --imbalance 100
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator, DataLoaderConfiguration
from torch import nn
from torch.utils.data import DataLoader

from common import cli, datasets, evaluation, models, runs

# Settings of the released code (CIFAR, iNaturalist), of a user (ImageNet-LT) and our own (the others), one
# row per data set; an option given on the command line wins. (119, 159): epochs 120 and 160 counted from 1.
# fmt: off
CIFAR = dict(arch="resnet32", epochs=200, wd=2e-4,
             lr_steps=cli.By(lambda method: (119, 159) if method == "bbn" else (160, 180)))
INAT = dict(arch="resnet50", imbalance=None, epochs=180, lr=0.05, lr_steps=(119, 159), lr_factor=0.1,
            wd=1e-4, warmup=0)
MNIST = dict(arch="lenet", epochs=8, lr=0.01, lr_steps=(6,), warmup=0)
FILES = dict(INAT, epochs=100, lr_steps=(59, 79))
RECIPES = {
    "cifar10_lt": CIFAR,
    "cifar100_lt": CIFAR,
    "imagenet_lt": dict(arch="resnet50", imbalance=None, epochs=90, batch_size=256, cosine=True, wd=5e-4,
                        warmup=0, color_jitter=0.4),
    "inat2017": INAT,
    "inat2018": dict(INAT, few_under=21),
    "mnist_lt": MNIST,
    "fashion_mnist_lt": MNIST,
    "cmnist_lt": MNIST,
    "image_folder": FILES,
    "image_list": FILES,
    "synthetic": dict(epochs=40, batch_size=32, lr_steps=(28, 36), wd=5e-4, warmup=2),
}
# fmt: on
Q = {"reversed": -1, "class": 0, "instance": 1}  # exponent of the class counts in the second batch's law
ADAPTORS = ("parabolic", "linear", "cosine", "increment", "equal", "beta", "stages")
TWO = ("bbn", "manifold2")  # the methods of two batches
MANIFOLD = ("manifold", "manifold2")
BBN, MIX = dict(method=("bbn",)), dict(method=("mixup", *MANIFOLD))  # what an option needs


@dataclass
class Args(cli.Args):
    method: str = cli.option(
        "bbn",
        "BBN; or cross-entropy, mixup, manifold mixup, manifold mixup of a natural and a rebalanced batch",
        choices=("bbn", "ce", "mixup", "manifold", "manifold2"),
    )
    adaptor: str = cli.option("parabolic", "alpha over the epochs", choices=ADAPTORS, needs=BBN)
    alpha_index: str = cli.option(
        "code",
        "how epochs count in alpha: code, from 0 (1 in the first epoch); paper, from 1 (0 in the last)",
        choices=("code", "paper"),
        needs=BBN,
    )
    alpha_epochs: int | None = cli.option(
        None,
        "epochs over which alpha falls (default: --epochs, but 100 for 90 and 200 for 180)",
        least=1,
        needs=BBN,
    )
    rebalancing: str = cli.option(
        "reversed",
        "law of the second batch: class probability ~ 1 / n_k, class-balanced, or instance-balanced",
        choices=tuple(Q),
        needs=dict(method=TWO),
    )
    joint_trunk: bool = cli.option(
        False,
        "both batches go through the trunk at once: faster, with BatchNorm statistics of both",
        needs=BBN,
    )
    mix_alpha: float = cli.option(1.0, "lambda ~ Beta(alpha, alpha)", above=0, needs=MIX)
    mix_layer: str = cli.option(
        "pooled",
        "where manifold mixup mixes",
        choices=("layer1", "layer2", "layer3", "pooled"),
        needs=dict(method=MANIFOLD),
    )
    warmup: int = cli.option(5, "epochs of linear warm-up, of BBN from a third of the rate", least=0)
    lr_factor: float = cli.option(0.01, "factor on the learning rate at each of --lr-steps", above=0)
    cosine: bool = cli.option(False, "cosine schedule instead of --lr-steps")

    def __post_init__(self):
        super().__post_init__()
        if self.adaptor in ("equal", "beta", "stages") and (self.alpha_epochs or self.alpha_index == "paper"):
            cli.fail(
                f"--alpha-epochs, --alpha-index: have no effect on --adaptor {self.adaptor}; leave them out"
            )
        if self.alpha_epochs and self.alpha_index == "paper":
            cli.fail("--alpha-epochs: is of --alpha-index code; leave one of them out")
        if self.alpha_epochs and self.alpha_epochs < self.epochs:
            cli.fail(
                f"--alpha-epochs {self.alpha_epochs}: at least --epochs {self.epochs}, or alpha ends below 0"
            )
        if self.mix_layer != "pooled" and self.arch == "lenet":
            cli.fail(f"--mix-layer {self.mix_layer}: lenet has no such stage; use pooled")
        if self.cosine and self.lr_steps:
            cli.fail("--lr-steps: have no effect on a cosine; leave them out, or add --no-cosine")


def class_probabilities(class_counts, q):
    """Probability p_j = n_j^q / sum_k n_k^q of drawing each class [K]; q = -1 is the reversed sampler's."""
    powers = class_counts.double().pow(q)
    return powers / powers.sum()


def streams(train_set, args):
    """Samplers of the natural and the rebalanced batches; the latter None for the methods of one batch."""
    natural = datasets.EpochSampler(train_set, args.seed, stream=0)
    if args.method not in TWO:
        return natural, None
    probabilities = class_probabilities(train_set.class_counts, Q[args.rebalancing])
    weights = (probabilities / train_set.class_counts)[train_set.labels]  # of an image: p_j / n_j
    return natural, datasets.EpochSampler(train_set, args.seed, stream=1, weights=weights)


def alpha_at(epoch, epochs, adaptor="parabolic", index="code", divisor=None):
    """alpha of the 0-based `epoch`, and its ablations; None for "beta", of which each batch draws its own."""
    if divisor is None:
        divisor = 100 * (epochs // 100 + 1) if epochs in (90, 180) else epochs  # as in the released code
    t = epoch / divisor if index == "code" else (epoch + 1) / epochs
    return {
        "parabolic": 1 - t**2,
        "linear": 1 - t,
        "cosine": math.cos(t * math.pi / 2),
        "increment": t**2,
        "equal": 0.5,
        "stages": float(epoch < 0.6 * epochs),  # 120 of 200
        "beta": None,
    }[adaptor]


class BBN(nn.Module):
    """A trunk, a conventional and a re-balancing block, one classifier W = [W_c | W_r], b of both features.

    z = W [2 alpha f_c ; 2 (1 - alpha) f_r] + b = 2 (alpha W_c f_c + (1 - alpha) W_r f_r) + b, Eq. (1) of the
    code: f_c of `images`, f_r of `others`, [B, C, H, W] both; z [B, K]. To predict, both blocks see the same
    images and alpha is 1/2: z = W [f_c ; f_r] + b. So the factor 2 keeps the scale, and one classifier of
    both features is the sum of two with one bias.
    """

    def __init__(self, arch, num_classes, seed, shape, joint_trunk=False):
        super().__init__()
        seeds = seed, datasets.epoch_seed(seed, epoch=0, stream=2)  # the blocks start apart
        network, another = (models.build(arch, num_classes, s, shape) for s in seeds)
        self.trunk, self.cb_block = models.split_last_block(network)
        _, self.rb_block = models.split_last_block(another)
        with models.seeded(seed):
            self.classifier = nn.Linear(2 * network.classifier.in_features, num_classes)
        self.joint_trunk = joint_trunk

    def forward(self, images, others=None, alpha=0.5):
        if others is None:
            lower = others = self.trunk(images)
            alpha = 0.5
        elif self.joint_trunk:
            lower, others = self.trunk(torch.cat([images, others])).chunk(2)
        else:
            lower, others = self.trunk(images), self.trunk(others)
        f_c, f_r = self.cb_block(lower), self.rb_block(others)
        return self.classifier(torch.cat([2 * alpha * f_c, 2 * (1 - alpha) * f_r], dim=1))


class Mixed(nn.Module):
    """The plain network, which on its way blends a batch by lam with its own images in `order` or `others`.

    layer: input (mixup), layer1 .. layer3 or pooled, the features under the classifier (manifold mixup).
    """

    def __init__(self, network, layer):
        super().__init__()
        self.network, self.layer = network, layer
        if layer.startswith("layer"):
            stages = [i for i, part in enumerate(network.backbone) if isinstance(part, nn.Sequential)]
            self.cut = stages[int(layer[5:]) - 1] + 1

    def lower(self, images):
        if self.layer == "pooled":
            return self.network.features(images)
        return images if self.layer == "input" else self.network.backbone[: self.cut](images)

    def upper(self, hidden):
        if self.layer == "pooled":
            return self.network.classifier(hidden)
        if self.layer == "input":
            return self.network(hidden)
        return self.network.classifier(self.network.pool(self.network.backbone[self.cut :](hidden)))

    def forward(self, images, lam=None, order=None, others=None):
        if lam is None:
            return self.network(images)
        hidden = self.lower(images)
        partners = hidden[order] if others is None else self.lower(others)
        return self.upper(lam * hidden + (1 - lam) * partners)


def make_model(train_set, args):
    """BBN, or the plain network of the baselines."""
    what = args.arch, train_set.num_classes, args.seed, train_set.shape
    if args.method == "bbn":
        return BBN(*what, args.joint_trunk)
    return Mixed(models.build(*what), args.mix_layer if args.method in MANIFOLD else "input")


def mixed_loss(logits, labels, other_labels, share):
    """Eq. (3): share * CE(z, labels) + (1 - share) * CE(z, other_labels), means over the batch, in nats."""
    first, second = (F.cross_entropy(logits, y) for y in (labels, other_labels))
    return share * first + (1 - share) * second


def mixed_accuracy(logits, labels, other_labels, share):
    """Training accuracy in percent, weighted as the loss."""
    first, second = (100 * (logits.argmax(1) == y).float().mean() for y in (labels, other_labels))
    return share * first + (1 - share) * second


def learning_rate(epoch, args):
    """Learning rate of the 0-based `epoch`: linear warm-up, of BBN from lr / 3 on, then steps or a cosine."""
    warm = min(1.0, (epoch + 1) / max(args.warmup, 1))
    if args.method == "bbn":
        warm = (1 - warm) / 3 + warm
    if args.cosine:
        return args.lr * warm * 0.5 * (1 + math.cos(math.pi * epoch / args.epochs))
    return args.lr * warm * args.lr_factor ** sum(epoch >= step for step in args.lr_steps)


def train_one_epoch(run, model, loader, optimizer, epoch, args):
    model.train()
    accelerator = run.accelerator
    draws = np.random.RandomState(datasets.epoch_seed(args.seed, epoch, stream=3) % 2**32)
    for (images, labels), other in run.steps(loader):
        if args.method == "ce":
            share, logits, other_labels = 1.0, model(images), labels
        elif args.method == "bbn":
            share = alpha_at(epoch, args.epochs, args.adaptor, args.alpha_index, args.alpha_epochs)
            share = draws.beta(0.2, 0.2) if share is None else share
            logits, other_labels = model(images, other[0], share), other[1]
        else:
            share = draws.beta(args.mix_alpha, args.mix_alpha)  # lambda
            if args.method == "manifold2":
                logits, other_labels = model(images, share, others=other[0]), other[1]
            else:  # each process permutes its share of the batch
                order = torch.randperm(len(labels)).to(labels.device, non_blocking=True)
                logits, other_labels = model(images, share, order), labels[order]
        loss = mixed_loss(logits, labels, other_labels, share)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        run.record(loss=loss, train_accuracy=mixed_accuracy(logits, labels, other_labels, share))


def main(args: Args) -> dict:
    config = DataLoaderConfiguration(split_batches=True, non_blocking=True)
    accelerator = Accelerator(dataloader_config=config)
    run = runs.start(accelerator, args)
    train_set, test_set = datasets.load(args)
    run.set_data(train_set, test_set)
    sampler = datasets.PairSampler(*streams(train_set, args))
    options = datasets.loader_options(train_set)
    train_loader = DataLoader(
        datasets.Pairs(train_set), args.batch_size, sampler=sampler, drop_last=True, **options
    )
    test_loader = DataLoader(test_set, args.batch_size, **options)
    model = make_model(train_set, args)
    how = dict(momentum=0.9, weight_decay=args.wd, nesterov=args.method == "bbn")
    optimizer = torch.optim.SGD(model.parameters(), args.lr, **how)
    model, optimizer = accelerator.prepare(model, optimizer)
    train_loader, test_loader = accelerator.prepare(train_loader, test_loader)
    for epoch in run.track(range(args.epochs), model=model, optimizer=optimizer):
        run.begin_epoch(epoch, train_loader)
        optimizer.param_groups[0]["lr"] = learning_rate(epoch, args)
        train_one_epoch(run, model, train_loader, optimizer, epoch, args)
        accuracy = evaluation.per_split(accelerator, model, test_loader, train_set.class_counts, args)
        run.end_epoch(epoch, accuracy)
    return run.finish()


if __name__ == "__main__":
    main(cli.parse(Args, RECIPES, __doc__))
