"""CMO: Context-rich Minority Oversampling.

Paper:    S. Park, Y. Hong, B. Heo, S. Yun, J. Y. Choi, "The Majority Can Help the Minority: Context-rich
          Minority Oversampling for Long-tailed Classification", CVPR 2022, arXiv:2112.00412.
Method:   1. draw backgrounds from the data as they are,
             foregrounds with the weight n_k^-r per image                      Eq. (2), class_weights, streams
          2. paste one box of each foreground onto a background                      Eq. (1), box, mix
          3. loss = lam * loss(background's label) + (1 - lam) * loss(foreground's)  Alg. 1, train_one_epoch
          The loss is cross-entropy, LDAM or Balanced Softmax, with or without deferred re-weighting, or that
          of RIDE (Wang et al., ICLR 2021): experts of one trunk, pushed apart          Experts, disagreement
          --las: label-aware smoothing in a second stage (MiSLAS, Zhong et al., CVPR 2021)          smoothing
Differs:  where paper and released code disagree, this follows the code: Eq. (2) weighs images, so r = 1
          draws classes uniformly; foregrounds are drawn anew every epoch; half of the batches are mixed;
          the first 4 and the last 3 epochs are not (paper: 3 and 3); half sides of a box are floored; no
          jitter on iNaturalist; the rate on CIFAR falls to 1e-3, then 1e-5. Batch sizes and epochs are the
          paper's. RIDE and LAS were not released with CMO: they are as in their own code, with their recipes,
          RIDE without its router; its disagreement has no labels and counts once in a mixed batch. CutMix,
          mixup and Remix mix when CMO does, half of the batches. In the recipe of 400 epochs (--long) the
          augmentations are torchvision's (black borders, no jitter of magnitudes), batches on large sets have
          256 images, and the rate on CIFAR does not warm up beyond 0.1.
          Unlike both: an incomplete last batch is dropped, foregrounds are loaded only for batches that are
          mixed, the result is the last epoch. --epochs moves neither --lr-steps nor --drw-epoch.
          Effective-number sampling as defined cannot give the paper's row (39.5).
Expected: cifar100_lt, imbalance 100, ResNet-32, with CMO: CE 43.9, CE-DRW 47.0, LDAM-DRW 47.2, Balanced
          Softmax 46.6, RIDE 50.0 all (paper); CE reruns of the released code 41.7 to 43.1. Ours: see README.
          The paper used one GTX 1080 Ti for CIFAR, 4 for ImageNet-LT (batch 256), 8 V100 for iNaturalist.
Run:      accelerate launch cmo.py --dataset cifar100_lt --loss ce --drw
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator, DataLoaderConfiguration
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from common import cli, datasets, evaluation, models, runs


def by(usual, **other):
    """A setting of the paper; in `other` those that differ, of RIDE and of --long, the 400-epoch recipe."""
    return cli.By(lambda loss, long: other.get("long" if long else loss, usual))


def by_imbalance(*values):
    """A setting at imbalance 100 and more, 50 and more, less."""
    return cli.By(lambda imbalance: values[((imbalance or 1) < 100) + ((imbalance or 1) < 50)])


# Settings of the paper (CIFAR, ImageNet-LT, iNaturalist) and our own (the others), one row per data set; an
# option given on the command line wins. In all of them RIDE re-weights, and Remix mixes within a batch.
# fmt: off
ALL = dict(drw=by(False, ride=True),
           oversample=cli.By(lambda paste: "nothing" if paste == "remix" else "foreground"))
CIFAR = dict(ALL, arch="resnet32", epochs=by(200, long=400), lr_steps=by((160, 180), long=(321, 361)),
             lr_factor=by(0.01, long=0.1), wd=by(2e-4, ride=5e-4), drw_epoch=by(160, long=320),
             warmup=by(5, long=10), random_rotation=by(0, ride=15), contrastive=by(0.0, long=0.5),
             auto_augment=by(False, long=True), cutout=by(0, long=16))
MNIST = dict(ALL, arch="lenet", epochs=8, lr=0.01, lr_steps=(6,), warmup=0, mix_start=-1, mix_end=1,
             drw_epoch=6)
LARGE = dict(ALL, arch="resnet50", imbalance=None, lr_factor=0.1, wd=2e-4, diversity=-0.2, las_head=0.3,
             las_factor=0.05)
FULL = dict(LARGE, lr=by(0.1, long=0.02), cosine=by(False, long=True), warmup=by(5, long=10),
            rand_augment=by(False, long=True), contrastive=by(0.0, long=0.5), las_batch_size=256)
FILES = dict(LARGE, epochs=100, batch_size=128, lr_steps=(60, 80), drw_epoch=80)
RECIPES = {
    "cifar10_lt": dict(CIFAR, las_head=by_imbalance(0.3, 0.2, 0.1), las_factor=by_imbalance(0.5, 0.2, 0.2),
                       las_shift_bn=False),
    "cifar100_lt": dict(CIFAR, las_head=by_imbalance(0.4, 0.3, 0.2), las_tail=by_imbalance(0.1, 0.0, 0.0),
                        las_factor=by_imbalance(0.2, 0.1, 0.1)),
    "imagenet_lt": dict(FULL, epochs=by(100, long=400), batch_size=256, lr_steps=by((60, 80), long=()),
                        wd=by(2e-4, long=5e-4), drw_epoch=by(80, long=320), color_jitter=0.4,
                        spread=0.02, las_wd=5e-4),
    "inat2018": dict(FULL, epochs=by(200, ride=100, long=400), batch_size=by(512, long=256),
                     lr=by(0.1, ride=0.2, long=0.02), lr_steps=by((75, 160), ride=(60, 80), long=()),
                     wd=by(2e-4, long=1e-4), drw_epoch=by(160, ride=80, long=320),
                     color_jitter=by(0.0, long=0.4), spread=0.015, las_wd=1e-4, few_under=21),
    "mnist_lt": MNIST,
    "fashion_mnist_lt": MNIST,
    "cmnist_lt": MNIST,
    "image_folder": FILES,
    "image_list": FILES,
    "synthetic": dict(ALL, epochs=40, batch_size=32, lr_steps=(28, 36), lr_factor=0.01, wd=5e-4,
                      warmup=2, mix_start=0, mix_end=1, drw_epoch=28, las_batch_size=32, las_shift_bn=False),
}
# fmt: on
LONG = ("cifar10_lt", "cifar100_lt", "imagenet_lt", "inat2018")
SCALE = 30.0  # LDAM's and RIDE's factor on the cosines
LAS, RIDE = dict(las=(True,)), dict(loss=("ride",))


@dataclass
class Args(cli.Args):
    loss: str = cli.option(
        "ce",
        "cross-entropy, LDAM, Balanced Softmax, or RIDE, whose experts have LDAM's",
        choices=("ce", "ldam", "bs", "ride"),
    )
    max_margin: float = cli.option(0.5, "LDAM's margin of the rarest class", above=0)
    experts: int = cli.option(3, "number of experts", least=2, needs=RIDE)
    diversity: float = cli.option(-0.45, "factor on their disagreement; below 0 rewards it", needs=RIDE)
    spread: float = cli.option(
        0.05, "how RIDE's temperatures differ under --drw", least=0, most=1, needs=RIDE
    )
    drw: bool = cli.option(False, "deferred re-weighting: effective-number weights from --drw-epoch on")
    drw_epoch: int = cli.option(160, "first 0-based epoch of that", least=0, needs=dict(drw=(True,)))
    paste: str = cli.option(
        "cutmix",
        "what a mixed batch is: a box of the foreground pasted (CMO), a blend of both, that with Remix's "
        "labels, the foregrounds alone, blurred or jittered, or none",
        choices=("cutmix", "mixup", "remix", "blur", "jitter", "none"),
    )
    oversample: str = cli.option(
        "foreground",
        "stream drawn by class weight: foreground (CMO), background (CMO_back; with --paste none random "
        "oversampling), both (CMO_minor); or nothing: foregrounds are the batch itself in another order, "
        "as in plain CutMix, mixup and Remix",
        choices=("foreground", "background", "both", "nothing"),
    )
    weighting: str = cli.option("inverse", "n_k^-r or 1 / effective number", choices=("inverse", "effective"))
    r: float = cli.option(1.0, "exponent of Eq. (2): 0 natural, 1 class-balanced, 2 reversed", least=0)
    p_mix: float = cli.option(0.5, "probability that a batch is mixed", least=0, most=1)
    alpha: float = cli.option(1.0, "lambda ~ Beta(alpha, alpha)", above=0)
    mix_start: int = cli.option(3, "the last 0-based epoch at the start that is not mixed", least=-1)
    mix_end: int = cli.option(3, "number of epochs at the end that are not mixed", least=0)
    warmup: int = cli.option(5, "epochs of linear warm-up", least=0)
    lr_factor: float = cli.option(0.01, "factor on the learning rate at each of --lr-steps", above=0)
    cosine: bool = cli.option(False, "after the warm-up the rate falls along a cosine, not by --lr-steps")
    long: bool = cli.option(False, "the recipe of 400 epochs with strong augmentation, where there is one")
    las: bool = cli.option(False, "stage 2: label-aware smoothing of the classifier, the rest frozen")
    las_epochs: int = cli.option(10, "epochs of stage 2", least=1, needs=LAS)
    las_batch_size: int = cli.option(128, "images per step of stage 2", least=1, needs=LAS)
    las_lr: float = cli.option(0.1, "its rate, along a cosine, for a scale per class", above=0, needs=LAS)
    las_factor: float = cli.option(0.2, "factor on that for the classifier", least=0, needs=LAS)
    las_wd: float = cli.option(2e-4, "weight decay of stage 2", least=0, needs=LAS)
    las_head: float = cli.option(0.4, "smoothing of the largest class", least=0, most=1, needs=LAS)
    las_tail: float = cli.option(0.0, "smoothing of the smallest class", least=0, most=1, needs=LAS)
    las_shift_bn: bool = cli.option(True, "BatchNorm statistics go on moving in stage 2", needs=LAS)

    def __post_init__(self):
        super().__post_init__()
        if self.long and (self.dataset not in LONG or self.loss == "ride"):
            what = "--loss ride" if self.loss == "ride" else self.dataset
            cli.fail(f"--long: is a recipe of {', '.join(LONG)}, and not of {what}; leave it out")
        if self.cosine and self.lr_steps:
            cli.fail("--cosine: takes the place of --lr-steps; add --lr-steps without any, or leave it out")
        if self.loss == "ride" and self.arch == "lenet":
            cli.fail("--arch lenet: has no stages to make experts of; use a ResNet")
        if self.las and self.loss in ("ldam", "ride"):
            cli.fail(f"--las: is for linear classifiers, not for --loss {self.loss}; use ce or bs")
        if self.drw and self.drw_epoch >= self.epochs:
            given = f"--drw-epoch {self.drw_epoch}"
            cli.fail(f"{given}: not before the end of --epochs {self.epochs}; lower it, or add --no-drw")
        if self.paste != "none" and not any(mixing_window(epoch, self) for epoch in range(self.epochs)):
            window = f"--mix-start {self.mix_start}, --mix-end {self.mix_end}"
            cli.fail(
                f"{window}: nothing of --epochs {self.epochs} is left to mix; lower them, or --paste none"
            )


def class_weights(class_counts, weighting="inverse", r=1.0, beta=0.9999):
    """Weight of an image of each class [K], mean 1: n_k^-r, Eq. (2), or (1 - beta) / (1 - beta^n_k).

    Images drawn by it are of class k with probability ~ n_k * weight_k: n_k^(1-r), uniform at r = 1.
    """
    counts = class_counts.double()
    weights = counts.pow(-r) if weighting == "inverse" else (1 - beta) / (1 - beta**counts)
    return weights / weights.mean()


def streams(train_set, args):
    """Samplers (backgrounds, foregrounds); foregrounds is None where the batch provides them or none are."""
    weights = class_weights(train_set.class_counts, args.weighting, args.r)[train_set.labels]
    weighted = [datasets.EpochSampler(train_set, args.seed, stream, weights) for stream in (1, 2)]
    natural = datasets.EpochSampler(train_set, args.seed, stream=0)
    backgrounds = weighted[0] if args.oversample in ("background", "both") else natural
    foregrounds = natural if args.oversample == "background" else weighted[1]
    return backgrounds, None if args.paste == "none" or args.oversample == "nothing" else foregrounds


def mixing_window(epoch, args):
    """Whether batches of the 0-based `epoch` may be mixed."""
    return args.paste != "none" and args.mix_start < epoch < args.epochs - args.mix_end


def draw_mix(generator, size, args):
    """One batch's (lam, x, y), share of the background and centre of the box, or None for a batch left alone.

    generator: legacy NumPy, drawn from in the order of the released code; size (H, W).
    """
    if generator.random_sample() >= args.p_mix:
        return None
    return generator.beta(args.alpha, args.alpha), generator.randint(size[0]), generator.randint(size[1])


def mixing_plan(epoch, steps, size, args):
    """draw_mix of every batch of an epoch: a pure function of (seed, epoch), so equal on all processes."""
    if not mixing_window(epoch, args):
        return [None] * steps
    generator = np.random.RandomState(datasets.epoch_seed(args.seed, epoch, stream=3) % 2**32)
    return [draw_mix(generator, size, args) for _ in range(steps)]


def box(lam, x, y, size):
    """(x1, x2, y1, y2): the box of area 1 - lam centred at (x, y), clipped. x runs along H, y along W."""
    edges = []
    for centre, side in zip((x, y), size, strict=True):
        half = int(side * (1 - lam) ** 0.5) // 2  # an odd side loses a pixel, as in the released code
        edges += [max(centre - half, 0), min(centre + half, side)]
    return edges


def mix(images, foregrounds, draw, train_set, args):
    """(mixed images, label share lam of the background), Eq. (1). [B, C, H, W] both; overwrites images."""
    lam, x, y = draw
    if args.paste in ("mixup", "remix"):
        return lam * images + (1 - lam) * foregrounds, lam
    if args.paste in ("blur", "jitter"):
        return perturb(foregrounds, train_set, args.paste), 0.0
    size = images.shape[2:]
    x1, x2, y1, y2 = box(lam, x, y, size)
    images[:, :, x1:x2, y1:y2] = foregrounds[:, :, x1:x2, y1:y2]
    return images, 1 - (x2 - x1) * (y2 - y1) / (size[0] * size[1])  # what is left after clipping


def perturb(images, train_set, paste):
    """Each image blurred or jittered on its own; drawn per process, so several processes differ from one."""
    change = v2.GaussianBlur(13, (0.1, 2.0)) if paste == "blur" else v2.ColorJitter(0.4, 0.4, 0.4, 0.1)
    mean, std = train_set.mean.to(images.device), train_set.std.to(images.device)
    pixels = ((images * std + mean) / 255).clamp(0, 1)
    return (255 * torch.stack([change(image) for image in pixels]) - mean) / std


def remix_share(lam, n_i, n_j, kappa=3.0, tau=0.5):
    """Remix: share [B] of the background's label; n_i, n_j [B]: images of its class, of the foreground's."""
    share = torch.full_like(n_i, lam, dtype=torch.float32)
    share[(n_i >= kappa * n_j) & (lam < tau)] = 0.0
    share[(kappa * n_i <= n_j) & (1 - lam < tau)] = 1.0
    return share


def ldam_margins(class_counts, max_margin=0.5):
    """LDAM's margin of each class [K], ~ n_k^(-1/4), the largest max_margin."""
    margins = class_counts.double().pow(-0.25)
    return max_margin * margins / margins.max()


class Experts(nn.Module):
    """RIDE: a trunk and experts, each the two last stages of a network, made narrower, and its classifier.

    To train, the experts' logits [B, E, K]; else their mean [B, K].
    """

    def __init__(self, networks):
        super().__init__()
        self.trunk = networks[0].backbone[:-2]
        self.experts = nn.ModuleList(models.Network(net.backbone[-2:], net.classifier) for net in networks)

    def forward(self, images):
        maps = self.trunk(images)
        logits = torch.stack([expert(maps) for expert in self.experts], 1)
        return logits if self.training else logits.mean(1)


def class_temperatures(class_counts, spread):
    """RIDE's temperatures t_k / max t [K], with t_k = 1 + spread (K n_k / N - 1)."""
    temperatures = 1 + spread * (class_counts.double() / class_counts.double().mean() - 1)
    return temperatures / temperatures.max()


def disagreement(logits, temperatures):
    """RIDE: sum over experts of KL(q || softmax(z_i / T)) of each image [B], logits z [B, E, K], T [K].

    q = softmax(mean of z / T), through which no gradient goes.
    """
    log_q = (logits.mean(1, keepdim=True).detach() / temperatures).log_softmax(2)
    log_p = (logits / temperatures).log_softmax(2)
    return (log_q.exp() * (log_q - log_p)).sum((1, 2))


def smoothing(class_counts, head=0.4, tail=0.1):
    """LAS: smoothing eps_k of each class [K], `head` of the largest, `tail` of the smallest; a sine."""
    n = class_counts.double()
    share = (n - n.min()) / (n.max() - n.min()).clamp(min=1)
    return tail + (head - tail) * torch.sin(math.pi / 2 * share)


def image_losses(logits, labels, class_counts, args):
    """Loss of each image [B] in nats, of RIDE the sum over experts, without their disagreement.

    logits [B, K], of RIDE [B, E, K] (LDAM, RIDE: SCALE * cosine), labels [B], class_counts [K].
    """
    if args.loss in ("ldam", "ride"):  # SCALE * (cosine - margin) at the label
        margins = ldam_margins(class_counts, args.max_margin).to(logits, non_blocking=True)
        margins = margins * F.one_hot(labels, logits.shape[-1])
        logits = logits - SCALE * (margins if logits.ndim == 2 else margins[:, None])
    elif args.loss == "bs":  # log N cancels in the softmax
        logits = logits + class_counts.double().log().to(logits, non_blocking=True)
    if logits.ndim == 3:
        return sum(F.cross_entropy(of_one, labels, reduction="none") for of_one in logits.unbind(1))
    return F.cross_entropy(logits, labels, reduction="none")


def smoothed_losses(logits, labels, class_counts, args):
    """LAS: (1 - eps) (-log p_y) + eps mean_k(-log p_k) of each image [B], eps that of its label y."""
    eps = smoothing(class_counts, args.las_head, args.las_tail).to(logits, non_blocking=True)[labels]
    return (1 - eps) * F.cross_entropy(logits, labels, reduction="none") - eps * logits.log_softmax(1).mean(1)


def batch_loss(accelerator, logits, labels, share, class_counts, epoch, args):
    """Mean of share * loss; from drw_epoch on weighted: sum(w share l) / sum(w), w that of the labels.

    Over the batch of all processes. share: of that label in each image, [B] or a number. In stage 2 LAS.
    """
    if epoch >= args.epochs:
        return smoothed_losses(logits, labels, class_counts, args).mean()
    losses = share * image_losses(logits, labels, class_counts, args)
    deferred, temperatures = args.drw and epoch >= args.drw_epoch, torch.ones(1)
    if deferred:
        weights = class_weights(class_counts, "effective").to(losses, non_blocking=True)[labels]
        # Gradients are averaged over processes: over the mean of their sums, the whole is a weighted mean.
        loss = (weights * losses).sum() / accelerator.reduce(weights.sum(), reduction="mean")
        temperatures = class_temperatures(class_counts, args.spread)
    else:
        loss = losses.mean()
    if args.loss == "ride":
        factor = args.diversity * temperatures.mean().item() ** 2
        temperatures = temperatures.to(logits, non_blocking=True)
        loss = loss + factor * (share * disagreement(logits, temperatures)).mean()
    return loss


def make_network(train_set, args):
    def build(seed, **options):
        return models.build(args.arch, train_set.num_classes, seed, train_set.shape, **options)

    if args.loss == "ride":
        return Experts([build(args.seed + 1000 * i, cosine=SCALE, narrow=0.75) for i in range(args.experts)])
    return build(args.seed, cosine=SCALE if args.loss == "ldam" else None)


def make_loader(train_set, stage, args):
    """Loader of backgrounds with foregrounds where they are wanted; of stage 2 of images class by class."""
    if stage == 1:
        batch, pairs, steps = args.batch_size, streams(train_set, args), len(train_set) // args.batch_size
    else:

        def order(size, epoch, generator):
            return datasets.class_aware(size, train_set.labels, train_set.class_counts, generator)

        batch = args.las_batch_size
        steps = math.ceil(len(train_set) / batch) + 1
        pairs = datasets.EpochSampler(train_set, args.seed, order=order, size=steps * batch), None

    def wanted(epoch):
        return [draw is not None for draw in mixing_plan(epoch, steps, train_set.shape[1:], args)]

    sampler = datasets.PairSampler(*pairs, batch, wanted)
    options = datasets.loader_options(train_set)
    return DataLoader(datasets.Pairs(train_set), batch, sampler=sampler, drop_last=True, **options)


def make_optimizer(network, stage, args):
    """SGD; "factor" of a group is that on its learning rate."""
    groups, wd = [dict(params=network.parameters(), factor=1.0)], args.wd
    if stage == 2:
        scale, linear, wd = network.classifier.scale, network.classifier.linear, args.las_wd
        groups = [dict(params=[scale], factor=1.0), dict(params=linear.parameters(), factor=args.las_factor)]
    how = dict(momentum=0.9, weight_decay=wd, nesterov=args.loss == "ride")
    return torch.optim.SGD(groups, args.lr, **how)


def learning_rate(epoch, args):
    """Learning rate of the 0-based `epoch`: linear warm-up, then steps or a cosine; that of stage 2."""
    if epoch >= args.epochs:
        return args.las_lr * 0.5 * (1 + math.cos(math.pi * (epoch - args.epochs) / args.las_epochs))
    warm = min(1.0, (epoch + 1) / max(args.warmup, 1))
    if args.cosine:
        share = max(0, epoch + 1 - args.warmup) / max(1, args.epochs + 1 - args.warmup)
        return args.lr * warm * 0.5 * (1 + math.cos(math.pi * share))
    return args.lr * warm * args.lr_factor ** sum(epoch >= step for step in args.lr_steps)


def train_one_epoch(run, model, loader, optimizer, train_set, epoch, args):
    model.train(epoch < args.epochs or args.las_shift_bn)
    accelerator, class_counts = run.accelerator, train_set.class_counts
    plan = mixing_plan(epoch, len(loader), train_set.shape[1:], args)
    for ((images, labels), foreground), draw in zip(run.steps(loader), plan, strict=False):
        shares = [(labels, 1.0)]
        if draw is not None:
            if foreground is None:  # plain CutMix, mixup, Remix: each process permutes its share of the batch
                order = torch.randperm(len(labels)).to(labels.device, non_blocking=True)
                foreground = images[order], labels[order]
            images, share = mix(images, foreground[0], draw, train_set, args)
            if args.paste == "remix":
                n = class_counts.to(labels.device, non_blocking=True)
                share = remix_share(share, n[labels], n[foreground[1]])
            shares = [(labels, share), (foreground[1], 1 - share)]
        logits = model(images)
        loss = sum(batch_loss(accelerator, logits, *of, class_counts, epoch, args) for of in shares)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        run.record(loss=loss)


def main(args: Args) -> dict:
    config = DataLoaderConfiguration(split_batches=True, non_blocking=True)
    accelerator = Accelerator(dataloader_config=config)
    last = args.epochs + args.las_epochs * args.las
    run = runs.start(accelerator, args, epochs=last)
    train_set, test_set = datasets.load(args)
    run.set_data(train_set, test_set)
    test_loader = DataLoader(test_set, args.batch_size, **datasets.loader_options(test_set))
    test_loader = accelerator.prepare(test_loader)
    network = make_network(train_set, args).to(accelerator.device)
    for stage, epochs in [(1, range(args.epochs)), (2, range(args.epochs, last))][: 1 + args.las]:
        if stage == 2:
            network.requires_grad_(False)
            network.classifier = models.ScaledClassifier(network.classifier.requires_grad_(True))
        train_loader = make_loader(train_set, stage, args)
        optimizer = make_optimizer(network, stage, args)
        model, optimizer, train_loader = accelerator.prepare(network, optimizer, train_loader)
        for epoch in run.track(epochs, model=model, optimizer=optimizer):
            run.begin_epoch(epoch, train_loader)
            for group in optimizer.param_groups:
                group["lr"] = group["factor"] * learning_rate(epoch, args)
            train_one_epoch(run, model, train_loader, optimizer, train_set, epoch, args)
            accuracy = evaluation.per_split(accelerator, model, test_loader, train_set.class_counts, args)
            run.end_epoch(epoch, accuracy)
        accelerator.free_memory()  # stage 2 prepares the network anew, for its own part to be trained
    return run.finish()


if __name__ == "__main__":
    main(cli.parse(Args, RECIPES, __doc__))
