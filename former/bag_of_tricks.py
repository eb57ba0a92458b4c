"""Bag of tricks: re-weighting, re-sampling, mixup, two stages and CAM-based sampling, alone and combined.

Paper:    Y. Zhang, X.-S. Wei, B. Zhou, J. Wu, "Bag of Tricks for Long-Tailed Visual Recognition with Deep
          Convolutional Neural Networks", AAAI 2021.
Method:   1. train with input mixup on the images as they come                     batch_loss, train_one_epoch
          2. with mixup, draw classes evenly, from the images and from new ones: the foreground of an image,
             where its class activation map is above the mean, is flipped, moved or turned and scaled, the
             background stays     quotas, activation_maps, foregrounds, inverse_maps, paste, with_new_images
          3. without mixup, draw classes evenly, from the images alone                         make_stages
          Each trick is an option: --reweight and --loss, --sampling, --deferred (DRW, DRS), --mixup,
          --generate (CAM-based and ImageTrans sampling), --finetune.
Differs:  as in the authors' toolbox (BagofTricks-LT), not the paper: rotation and scale come together,
          cost-sensitive weights are n_min / n_k, DRW with focal loss has it in stage 1, too, stage 3 draws
          from the images alone, ImageNet-LT has 220 epochs and colour jitter. As in the paper, not the
          toolbox: the map is of the image as it is, its threshold is the mean, not 0.75 of it
          (--cam-threshold), each image has its own share in Remix. Unlike both: the maps are of stage 1's
          last epoch, not of its best on the test set, new images are as large as the network sees them, a
          pixel stays where one from outside would come in. Random over- and under-sampling are the paper's
          alone; the toolbox's influence-balanced loss, DiVE and concatenated batches are not here, SEQL is
          in equalization_loss.py. At imbalance 50 it has --gamma 2 on CIFAR-10, --beta 0.99 on CIFAR-100 for
          class-balanced focal loss. iNaturalist has ImageNet-LT's recipe, with its own cap.
          An incomplete last batch is dropped; the result is the last epoch.
Expected: errors on cifar10_lt and cifar100_lt, imbalance 100, ResNet-32: 19.97 and 52.17 (paper). Of the
          toolbox: CE 28.05 and 62.27, mixup 25.94 and 59.18, CAM-based sampling 23.10 and 58.05.
          imagenet_lt, ResNet-10: 56.87. inat2018, ResNet-50: 29.13. Ours: see README.
Run:      accelerate launch bag_of_tricks.py --dataset cifar100_lt
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import send_to_device
from torch import nn
from torch.utils.data import DataLoader

from common import cli, datasets, evaluation, models, runs
from common.augment import warp


def by_mixup(without, with_it):
    return cli.By(lambda mixup: without if mixup == "none" else with_it)


# Settings of the toolbox (CIFAR, ImageNet-LT), of ImageNet-LT for iNaturalist, and our own (the rest), one
# row per data set; an option given on the command line wins. Mixup takes twice as long.
# fmt: off
TRICKS = dict(finetune=by_mixup(False, True), generate=cli.By(
                  lambda sampling, deferred: "cam" if deferred and sampling != "instance" else "none"),
              power=cli.By(lambda loss: 0.2 if loss == "cdt" else 1.0),
              gamma=cli.By(lambda loss, reweight: 1.0 if (loss, reweight) == ("focal", "effective") else 2.0))
CIFAR = dict(TRICKS, arch="resnet32", wd=2e-4, warmup=5, lr_factor=0.01,
             epochs=by_mixup(160, 320), stage2_epochs=by_mixup(40, 80),
             lr_steps=cli.By(lambda epochs: (epochs - 1,)),
             stage2_lr_steps=cli.By(lambda stage2_epochs: ((stage2_epochs - 1) // 2,)))
LARGE = dict(TRICKS, arch="resnet10", imbalance=None, batch_size=512, lr=0.2, wd=1e-4, stage3_lr=0.002,
             epochs=by_mixup(80, 160), lr_steps=cli.By(lambda epochs: (3 * (epochs - 1) // 4, epochs - 1)),
             stage2_epochs=by_mixup(20, 40), stage2_lr_steps=by_mixup((), (39,)))
FILES = dict(LARGE, arch="resnet50", batch_size=128, lr=0.05, stage3_lr=5e-4)
RECIPES = {
    "cifar10_lt": CIFAR,
    "cifar100_lt": dict(CIFAR, beta=cli.By(lambda loss: 0.9999 if loss == "ldam" else 0.9)),
    "imagenet_lt": dict(LARGE, color_jitter=0.4, cap=100),
    "inat2018": dict(LARGE, arch="resnet50", few_under=21, cap=50),
    "image_folder": FILES,
    "image_list": FILES,
    "synthetic": dict(TRICKS, batch_size=32, wd=5e-4, warmup=2, epochs=by_mixup(28, 40),
                      # the rate falls when re-weighting begins, as on CIFAR with LDAM
                      lr_steps=cli.By(lambda epochs, loss: (epochs - 1,) if loss == "ldam" else ()),
                      stage2_epochs=by_mixup(12, 16), stage2_lr_steps=cli.By(
                          lambda mixup, loss: (0,) * (loss != "ldam") + ((8,) if mixup == "none" else (10,))),
                      stage3_epochs=8, stage3_lr=0.01, stage3_lr_steps=(4, 7),
                      rotation=10),  # some of its shapes differ by a rotation of 45 degrees
}
# fmt: on
SCALE = 30.0  # LDAM's factor on the cosines
# what an option needs to have an effect
POWER, EFFECTIVE = dict(reweight=("cost",), loss=("cdt",)), dict(reweight=("effective",))
MIXUP = dict(mixup=("input", "manifold", "remix"))
GENERATE, CAM = dict(generate=("cam", "image-trans")), dict(generate=("cam",))
UNDEFERRED = ("smooth", "label_aware")  # losses that are the same in all stages


@dataclass
class Args(cli.Args):
    loss: str = cli.option(
        "ce",
        "ce: cross-entropy; focal: of sigmoids; smooth: label smoothing; label_aware: the same by class; "
        "cdt: class-dependent temperatures; bs: Balanced Softmax",
        choices=("ce", "focal", "smooth", "label_aware", "ldam", "cdt", "bs"),
    )
    reweight: str = cli.option(
        "none",
        "class weights; cost: cost-sensitive; effective: class-balanced, by effective numbers",
        choices=("none", "cost", "effective"),
    )
    power: float = cli.option(1.0, "exponent of the weights or temperatures", least=0, needs=POWER)
    beta: float = cli.option(0.9999, "beta of effective numbers", least=0, most=0.9999999, needs=EFFECTIVE)
    gamma: float = cli.option(2.0, "exponent of --loss focal", least=0, needs=dict(loss=("focal",)))
    sampling: str = cli.option(
        "class",
        "how images are drawn; class: a class, then one of its images; square-root: classes by the root of "
        "their sizes; progressive: from instance to class; over, under: random over- and under-sampling",
        choices=("instance", "class", "square-root", "progressive", "over", "under"),
    )
    deferred: bool = cli.option(True, "re-balancing begins with stage 2 (DRW, DRS), not with the run")
    mixup: str = cli.option("input", "what is mixed", choices=("none", "input", "manifold", "remix"))
    alpha: float = cli.option(1.0, "lambda of mixup ~ Beta(alpha, alpha)", above=0, needs=MIXUP)
    generate: str = cli.option(
        "cam",
        "new images for stage 2; cam: their foregrounds moved (CAM-based sampling); image-trans: all moved",
        choices=("cam", "image-trans", "none"),
    )
    cap: int | None = cli.option(None, "only for classes below this, up to it", least=1, needs=GENERATE)
    cam_threshold: float = cli.option(1.0, "the foreground begins at so many means", least=0, needs=CAM)
    rotation: int = cli.option(45, "largest, in degrees; lower if it alters a class", least=0, needs=GENERATE)
    finetune: bool = cli.option(True, "stage 3: go on without mixup")
    warmup: int = cli.option(0, "epochs of linear warm-up, from lr / 3 on", least=0)
    lr_factor: float = cli.option(0.1, "factor on the learning rate at each step of stages 1 and 2", above=0)
    stage2_epochs: int = cli.option(40, "epochs of stage 2, beginning at the rate that is reached", least=1)
    stage2_lr_steps: tuple[int, ...] = cli.option((), "0-based epochs of stage 2 at which it falls", least=0)
    stage3_epochs: int = cli.option(20, "epochs of stage 3", least=1)
    stage3_lr: float = cli.option(1e-3, "learning rate of stage 3", above=0)
    stage3_lr_steps: tuple[int, ...] = cli.option((7, 15), "its epochs at which that falls tenfold", least=0)

    def __post_init__(self):
        super().__post_init__()
        if self.loss == "cdt" and self.reweight == "cost":
            cli.fail("--reweight cost: shares --power with --loss cdt; use one of them")
        if self.mixup == "none" and self.finetune:
            cli.fail("--finetune: goes on without mixup, and there is none; add --mixup, or leave it out")
        if self.generate != "none" and not self.deferred:
            cli.fail(f"--generate {self.generate}: is for stage 2, so not with --no-deferred; leave one out")
        if self.generate == "cam" and self.arch == "lenet":
            cli.fail("--arch lenet: has no class activation maps; use a ResNet, or another --generate")
        if self.deferred and self.loss in UNDEFERRED and self.reweight == "none":
            cli.say(f"note: --loss {self.loss}: has no deferred form; the loss is the same in all stages")


def class_weights(class_counts, reweight, power=1.0, beta=0.9999):
    """Weights [K]: cost, (n_min / n_k)^power; effective, (1 - beta) / (1 - beta^n_k) scaled to a sum of K."""
    counts = class_counts.double()
    if reweight == "cost":
        return (counts.min() / counts).pow(power)
    weights = (1 - beta) / (1 - beta**counts)
    return weights * len(counts) / weights.sum()


def smoothing(class_counts, high=0.4, low=0.1):
    """Label-aware smoothing eps_k [K], concave: `high` for the largest class, `low` for the smallest."""
    n = class_counts.double()
    share = (n - n.min()) / (n.max() - n.min()).clamp(min=1)
    return low + (high - low) * torch.sin(math.pi / 2 * share)


def image_losses(logits, labels, class_counts, rebalanced, args):
    """Loss of each image [B] in nats, without class weights. logits [B, K] (LDAM: SCALE * cosine).

    labels [B], class_counts [K]; rebalanced: whether cdt and bs go by the counts already.
    """
    counts, onehot = class_counts.double(), F.one_hot(labels, logits.shape[1])
    if args.loss == "focal":  # of K sigmoids, summed
        against = (1 - 2 * onehot) * logits
        return ((args.gamma * F.logsigmoid(against)).exp() * F.softplus(against)).sum(1)
    if args.loss in ("smooth", "label_aware"):
        eps = 0.1 if args.loss == "smooth" else smoothing(counts).to(logits, non_blocking=True)[labels]
        log_p = logits.log_softmax(1)
        return -(1 - eps) * log_p.gather(1, labels[:, None])[:, 0] - eps * log_p.mean(1)
    if args.loss == "ldam":  # SCALE * (cosine - margin) at the label
        margins = 0.5 * (counts.min() / counts).pow(0.25).to(logits, non_blocking=True)
        logits = logits - SCALE * margins * onehot
    elif args.loss == "cdt" and rebalanced:
        logits = logits / (counts.max() / counts).pow(args.power).to(logits, non_blocking=True)
    elif args.loss == "bs" and rebalanced:  # log N cancels in the softmax
        logits = logits + counts.log().to(logits, non_blocking=True)
    return F.cross_entropy(logits, labels, reduction="none")


def rebalances(epoch, args):
    """Whether re-weighting holds in the 0-based `epoch`; LDAM's begins one epoch earlier (code)."""
    return not args.deferred or epoch >= args.epochs - (args.loss == "ldam")


def batch_loss(accelerator, logits, labels, share, class_counts, epoch, args):
    """sum(share w l) / sum(w) over the batch of all processes; of the focal loss the mean of share w l.

    w: class weights of the labels [B], l: image_losses, share: of that label in each image, [B] or a number.
    """
    rebalanced = rebalances(epoch, args)
    losses = share * image_losses(logits, labels, class_counts, rebalanced, args)
    if args.reweight == "none" or not rebalanced:
        return losses.mean()
    weights = class_weights(class_counts, args.reweight, args.power, args.beta)
    weights = weights.to(losses, non_blocking=True)[labels]
    if args.loss == "focal":
        return (weights * losses).mean()
    # Gradients are averaged over processes: divided by the mean of their sums, the whole is a weighted mean.
    return (weights * losses).sum() / accelerator.reduce(weights.sum(), reduction="mean")


def remix_share(lam, n_i, n_j, kappa=3.0, tau=0.5):
    """Remix: share [B] of the first label, that of lam; n_i, n_j [B] images of the first and second class."""
    share = torch.full_like(n_i, lam, dtype=torch.float32)
    share[(n_i >= kappa * n_j) & (lam < tau)] = 0.0
    share[(kappa * n_i <= n_j) & (1 - lam < tau)] = 1.0
    return share


class ManifoldMixup(nn.Module):
    """The network, blending the pooled features of a batch by lam with those of its images in `order`."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images, lam=1.0, order=None):
        features = self.network.features(images)
        if order is not None:
            features = lam * features + (1 - lam) * features[order]
        return self.network.classifier(features)


def class_probabilities(class_counts, sampling, t=1.0):
    """Probability of drawing each class [K]; progressive: from instance, t = 0, to class, t = 1."""
    n = class_counts.double()
    if sampling == "progressive":
        return (1 - t) * n / n.sum() + t / len(n)
    powers = n.pow({"instance": 1.0, "square-root": 0.5, "class": 0.0}[sampling])
    return powers / powers.sum()


def progress(epoch, args):
    """t = e / E at the end of the 0-based `epoch`; with new images stage 2 counts anew. Stage 3 has 1."""
    start = 0 if args.generate == "none" else args.epochs
    return min(1.0, (epoch + 1 - start) / (args.epochs + args.stage2_epochs - start))


def make_sampler(pool, class_counts, sampling, args):
    """Sampler of the pool, the training images with class_counts [K], maybe with new ones.

    An epoch has as many images as the training set; with over, all of the pool and draws that make each class
    as large as the largest; with under, as many of each class as the smallest has, always the same.
    """
    lists = datasets.by_class(pool.labels, pool.class_counts)
    smallest, largest = int(class_counts.min()), int(pool.class_counts.max())
    sizes = {"over": largest * len(lists), "under": smallest * len(lists)}
    size = sizes.get(sampling, int(class_counts.sum()))

    def order(size, epoch, generator):
        if sampling == "over":
            more = [of[torch.randint(len(of), (largest - len(of),), generator=generator)] for of in lists]
            images = torch.cat([*lists, *more])
        elif sampling == "under":
            kept = datasets.long_tail_subset(pool.labels, [smallest] * len(lists), np.random.RandomState(0))
            images = torch.from_numpy(kept)
        elif sampling == "instance" and len(pool) == size:
            images = torch.arange(size)
        else:
            p = class_probabilities(class_counts, sampling, progress(epoch, args))
            return datasets.draw((p / pool.class_counts)[pool.labels], size, generator)
        return images[torch.randperm(size, generator=generator)]

    return datasets.EpochSampler(pool, args.seed, order=order, size=size)


def quotas(class_counts, cap=None):
    """New images per class [K]: n_max + n_min - n_k; with a cap none from cap images on, else at most cap."""
    absent = class_counts.max() + class_counts.min() - class_counts
    return absent if cap is None else torch.where(class_counts >= cap, 0, absent.clamp(max=cap))


def activation_maps(maps, rows, size):
    """Class activation maps [B, H, W]: sum_k W[y, k] F_k, scaled to 0..1, then resized; constant ones are 0.

    maps F [B, D, h, w] before pooling, rows W[y] [B, D] of the classifier, its bias left out, size (H, W).
    """
    cam = torch.einsum("bdhw,bd->bhw", maps, rows)
    cam = cam - cam.amin((1, 2), keepdim=True)
    largest = cam.amax((1, 2), keepdim=True)
    cam = cam / torch.where(largest > 0, largest, 1.0)
    return F.interpolate(cam[:, None], size, mode="bilinear", align_corners=False)[:, 0]


def foregrounds(cam, threshold=1.0):
    """bool [B, H, W]: where the map is at least threshold times its mean; nowhere where it is 0."""
    mean = cam.mean((1, 2), keepdim=True)
    return (cam >= threshold * mean - 1e-6) & (mean > 0)


def inverse_maps(mask, draws, rotation=45, whole=False):
    """Affine maps [B, 2, 3] from pixels (x, y, 1) of the new images to those that they show.

    draws [B, 5] in 0..1 choose: a flip of the picture; a translation, evenly of those that leave the box of
    the mask [B, H, W] inside, with `whole` of up to a quarter of the side; or a rotation by -rotation to
    rotation - 1 degrees and scale 0.80 to 1.19 about the middle of the box.
    """
    height, width = mask.shape[1:]
    columns, rows = mask.any(1).int(), mask.any(2).int()
    left, right = columns.argmax(1).float(), width - 1 - columns.flip(1).argmax(1).float()
    top, bottom = rows.argmax(1).float(), height - 1 - rows.flip(1).argmax(1).float()
    operation, *draws = draws.to(left).unbind(1)
    one, zero, x, y = torch.ones_like(left), torch.zeros_like(left), (left + right) / 2, (top + bottom) / 2
    across, down = (-left, width - 1 - right), (-top, height - 1 - bottom)
    if whole:
        across, down = (-(width // 4), width // 4), (-(height // 4), height // 4)
    ranges = [across, down, (-rotation, max(rotation - 1, 0)), (80, 119)]
    drawn = [low + (u * (high - low + 1)).floor() for u, (low, high) in zip(draws, ranges, strict=True)]
    dx, dy, angle, scale = *drawn[:2], drawn[2].deg2rad(), drawn[3] / 100
    cos, sin = angle.cos() / scale, angle.sin() / scale
    flip = [-one, zero, (width - 1) * one, zero, one, zero]
    translate = [one, zero, -dx, zero, one, -dy]
    rotate = [cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y]
    choices = torch.stack([torch.stack(numbers, 1) for numbers in (flip, translate, rotate)])
    return choices[(3 * operation).long(), torch.arange(len(mask), device=mask.device)].view(-1, 2, 3)


def paste(images, mask, maps):
    """images [B, C, H, W], but moved by `maps` where the mask [B, H, W] was or is then."""
    moved, inside = warp(images, maps)
    moved_mask, _ = warp(mask[:, None], maps)
    where = (mask | moved_mask[:, 0]) & inside
    return torch.where(where[:, None], moved, images)


@torch.no_grad()
def transform(network, images, labels, draws, train_set, args):
    """(pixels, maps, foregrounds, new pixels) of normalised images [B, C, H, W]; pixels are uint8."""
    pixels, whole = train_set.pixels(images), args.generate == "image-trans"
    if whole:
        cam = torch.ones_like(images[:, 0])
    else:
        rows = network.classifier.weight
        rows = (rows.T if args.loss == "ldam" else rows)[labels]
        cam = activation_maps(network.feature_map(images), rows, images.shape[2:])
    mask = foregrounds(cam, args.cam_threshold)
    maps = inverse_maps(mask, draws, args.rotation, whole)
    return pixels, cam, mask, warp(pixels, maps)[0] if whole else paste(pixels, mask, maps)


def with_new_images(run, network, train_set, args):
    """The training set and new images by quotas, each made from a random one of its class. Draws a few."""
    generator = torch.Generator().manual_seed(datasets.epoch_seed(args.seed, 0, stream=4))
    counts = train_set.class_counts
    wanted = zip(datasets.by_class(train_set.labels, counts), quotas(counts, args.cap).tolist(), strict=True)
    sources = torch.cat([of[torch.randint(len(of), (n,), generator=generator)] for of, n in wanted])
    draws, folder = torch.rand(len(sources), 5, generator=generator), run.folder / "new_images"

    def make(images, labels, at):
        return transform(network.eval(), images, labels, draws[at], train_set, args)

    cli.say(f"making {'a batch of ' * args.dry_run}{len(sources)} new images")
    shown = torch.arange(len(sources))[:: -(-len(sources) // 8)]
    batch = train_set.__getitems__(sources[shown].tolist())
    run.save_grid("new_images.png", *make(*send_to_device(batch, run.accelerator.device), shown))
    how = dict(batch_size=args.batch_size, folder=folder, once=args.dry_run)
    return train_set.extended(run.accelerator, sources, lambda *of: make(*of)[3], **how)


def make_network(train_set, args):
    """The network. Refuses what would fail in stage 2."""
    cosine, smallest = SCALE if args.loss == "ldam" else None, int(train_set.class_counts.min())
    network = models.build(args.arch, train_set.num_classes, args.seed, train_set.shape, cosine=cosine)
    if args.generate == "cam":
        models.check_map(network, train_set.shape, args.arch)
    if args.generate != "none" and args.cap is not None and args.cap <= smallest:
        cli.fail(f"--cap {args.cap}: all classes have as many images or more; raise it, to get new ones")
    if args.sampling == "under" and smallest * train_set.num_classes < args.batch_size:
        least = f"it leaves {smallest * train_set.num_classes} images"
        cli.fail(f"--sampling under: {least}, less than --batch-size {args.batch_size}; lower that")
    return network


def make_stages(args):
    """(number, epochs, sampling, mixup) of each stage; epochs count on."""
    ends = [0, args.epochs, args.epochs + args.stage2_epochs]
    first = "instance" if args.deferred else args.sampling
    stages = [(1, range(*ends[:2]), first, args.mixup), (2, range(*ends[1:]), args.sampling, args.mixup)]
    if args.finetune:
        stages.append((3, range(ends[2], ends[2] + args.stage3_epochs), args.sampling, "none"))
    return stages


def learning_rate(epoch, args):
    """Learning rate of the 0-based `epoch`: linear warm-up from lr / 3, then steps; stage 3 has its own."""
    stage3 = epoch - args.epochs - args.stage2_epochs
    if stage3 >= 0:
        return args.stage3_lr * 0.1 ** sum(stage3 >= step for step in args.stage3_lr_steps)
    warm = min(1.0, (epoch + 1) / max(args.warmup, 1))
    steps = [step for step in args.lr_steps if step < args.epochs]
    steps += [args.epochs + step for step in args.stage2_lr_steps]
    return args.lr * ((1 - warm) / 3 + warm) * args.lr_factor ** sum(epoch >= step for step in steps)


def train_one_epoch(run, model, loader, optimizer, train_set, mixup, epoch, args):
    model.train()
    accelerator, class_counts = run.accelerator, train_set.class_counts
    draws = np.random.RandomState(datasets.epoch_seed(args.seed, epoch, stream=3) % 2**32)
    for images, labels in run.steps(loader):
        if mixup == "none":
            logits, shares = model(images), [(labels, 1.0)]
        else:  # each process permutes its share of the batch
            share = lam = draws.beta(args.alpha, args.alpha)
            order = torch.randperm(len(labels)).to(labels.device, non_blocking=True)
            if mixup == "manifold":
                logits = model(images, lam, order)
            else:
                logits = model(lam * images + (1 - lam) * images[order])
            if mixup == "remix":
                n = class_counts.to(labels.device, non_blocking=True)[labels]
                share = remix_share(lam, n, n[order])
            shares = [(labels, share), (labels[order], 1 - share)]
        losses = [batch_loss(accelerator, logits, *of, class_counts, epoch, args) for of in shares]
        optimizer.zero_grad()
        accelerator.backward(sum(losses))
        optimizer.step()
        run.record(loss=sum(losses))


def main(args: Args) -> dict:
    stages = make_stages(args)
    config = DataLoaderConfiguration(split_batches=True, non_blocking=True)
    accelerator = Accelerator(dataloader_config=config)
    run = runs.start(accelerator, args, epochs=stages[-1][1].stop)
    train_set, test_set = datasets.load(args)
    run.set_data(train_set, test_set)
    options = datasets.loader_options(train_set)
    test_loader = accelerator.prepare(DataLoader(test_set, args.batch_size, **options))
    network = make_network(train_set, args)
    model = ManifoldMixup(network) if args.mixup == "manifold" else network
    how = dict(momentum=0.9, weight_decay=args.wd, nesterov=True)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, **how)
    model, optimizer = accelerator.prepare(model, optimizer)
    for stage, epochs, sampling, mixup in stages:
        pool, tracked = train_set, dict(model=model, optimizer=optimizer)
        generates = stage == 2 and args.generate != "none"
        if generates or stage == 3:  # runs of their own in the released code: momentum starts anew
            optimizer.state.clear()
        if generates:  # what the new images are made with, also after --resume
            tracked["stage1"] = make_network(train_set, args).to(accelerator.device)
            tracked["stage1"].load_state_dict(network.state_dict())
        left = run.track(epochs, **tracked)
        if generates and left:
            pool = with_new_images(run, tracked["stage1"], train_set, args)
        sampler = make_sampler(pool, train_set.class_counts, sampling, args)
        train_loader = DataLoader(pool, args.batch_size, sampler=sampler, drop_last=True, **options)
        train_loader = accelerator.prepare(train_loader)
        for epoch in left:
            run.begin_epoch(epoch, train_loader)
            optimizer.param_groups[0]["lr"] = learning_rate(epoch, args)
            train_one_epoch(run, model, train_loader, optimizer, train_set, mixup, epoch, args)
            accuracy = evaluation.per_split(accelerator, model, test_loader, train_set.class_counts, args)
            run.end_epoch(epoch, accuracy)
    return run.finish()


if __name__ == "__main__":
    main(cli.parse(Args, RECIPES, __doc__))
