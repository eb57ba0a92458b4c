"""CSA: Context-Shift Augmentation.

Paper:    J.-X. Shi, T. Wei, Y. Xiang, Y.-F. Li, "How Re-sampling Helps for Long-Tail Learning?",
          NeurIPS 2023, arXiv:2310.18236.
Method:   1. one network with two heads: head_u learns from images as they are, head_b from batches that draw
             classes evenly                                                               TwoHeads, streams
          2. natural images of which head_u is sure, p(label) >= delta, go into a bank of the last V,
             with a mask M of what is not object in them       harvest, is_fit, background_masks, Bank
          3. every balanced image gets the background of one of them and keeps its label:
             lam * M * context + (1 - lam * M) * image, lam ~ U(0, 1) per batch                       blend
          4. loss = CE(head_u, natural batch) + CE(head_b, balanced batch)                  train_one_epoch
          --no-bank leaves the balanced images as they are ("w/o Q"); --mixup-alpha mixes the natural batch
          (CSA + mixup). The paper's baselines CE, CB-RS and cRT are rows of decoupled_crt.py (README: Two
          heads and a bank of contexts, with the options that make its recipe the paper's).
Differs:  where paper and released code disagree, this follows the code: the bank is emptied every epoch;
          head_b learns from epoch 10 on, once the bank holds a batch, and sees 4 images of a class in a row.
          M is (1 - cam)^2 with the Grad-CAM of the true class, of each image scaled to 0..1; average pooling
          and a linear head give it in closed form (LeNet's further layers take a short backward pass).
          Unlike the code: a map that is zero everywhere gives M = 1 (there 0/0), class-balanced sampling
          begins a new round each epoch, an incomplete last batch is dropped, the result is the last epoch.
          On Places-LT the new block's BatchNorm trains (there it stops after the first step, by a bug).
          Neither says which head predicts: here it is head_b (--prediction), the result has all three.
          Many, medium and few are fixed numbers of classes, as in the paper (--many-classes, --few-classes;
          "by_counts" in result.json has the usual ones). Recipes for MNIST-style sets, image_folder,
          image_list and synthetic are ours; that for MNIST-style sets trains a ResNet-8, since two heads
          have no room on the 2 features of the study's LeNet.
          Each of several processes has its own bank, of its share of the images and of V / processes; while
          that does not hold a batch, the process adds nothing to head_b's gradient. Partners of mixup are
          of a process's share, too.
Expected: ResNet-32, imbalance 100 / 50 / 10: cifar100_lt 45.8 / 49.6 / 61.3 all, with mixup 46.6 / 51.9 /
          62.6; cifar10_lt 80.6 / 84.3 / 89.8, with mixup 82.5 / 86.0 / 90.8; cifar100_lt 100 w/o Q 41.2.
          imagenet_lt: ResNet-10 42.7, ResNet-50 49.1 (paper, best epoch on the test set). Ours: see README.
Run:      accelerate launch csa.py --dataset cifar100_lt
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator, DataLoaderConfiguration, DistributedDataParallelKwargs
from torch import nn
from torch.utils.data import DataLoader

from common import cli, datasets, evaluation, models, runs

# Settings of the released code (CIFAR, ImageNet-LT, Places-LT) and our own (the others), one row per data
# set; an option given on the command line wins.
# fmt: off
CIFAR = dict(arch="resnet32", epochs=200, lr=0.2, lr_steps=(160, 180), wd=2e-4, start_aug=10)
LARGE = dict(arch="resnet10", imbalance=None, epochs=90, batch_size=256, lr=0.2, warmup=0, cosine=True,
             wd=5e-4, color_jitter=0.4, start_aug=10)
MNIST = dict(epochs=8, warmup=1, cosine=True, wd=5e-4, start_aug=1, many_classes=3, few_classes=3)
RECIPES = {
    "cifar10_lt": dict(CIFAR, many_classes=3, few_classes=3),
    "cifar100_lt": dict(CIFAR, many_classes=36, few_classes=29),
    "imagenet_lt": dict(LARGE, many_classes=390, few_classes=165),
    "places_lt": dict(LARGE, arch="resnet152", pretrained=True, last_block=True, many_classes=131,
                      few_classes=77),
    "mnist_lt": MNIST,
    "fashion_mnist_lt": MNIST,
    "cmnist_lt": MNIST,
    "image_folder": dict(LARGE, arch="resnet50", batch_size=128, lr=0.1),
    "image_list": dict(LARGE, arch="resnet50", batch_size=128, lr=0.1),
    "synthetic": dict(epochs=40, batch_size=32, lr_steps=(28, 36), wd=5e-4, warmup=2, start_aug=4),
}
# fmt: on
HEADS = ("u", "b", "average")
OF_BANK = ("bank_size", "delta", "lam_min", "lam_max")  # options without effect where there is none


@dataclass
class Args(cli.Args):
    start_aug: int = cli.option(0, "first 0-based epoch in which head_b learns", least=0)
    bank: bool = cli.option(True, "blend contexts into the balanced images; --no-bank is the paper's w/o Q")
    bank_size: int | None = cli.option(None, "contexts kept, over all processes (default: the batch size)")
    delta: float = cli.option(0.8, "an image is a context if p(label) is at least this", least=0, most=1)
    lam_min: float = cli.option(0.0, "lambda ~ U(lam-min, lam-max), the strength of a blend", least=0, most=1)
    lam_max: float = cli.option(1.0, "the largest lambda", least=0, most=1)
    q: float | None = cli.option(
        None,
        "draw balanced images one by one, class k with probability ~ n_k^q: 0 class-balanced, 1 natural "
        "(default: 4 images of a class in a row, class after class)",
        least=0,
        most=1,
    )
    mixup_alpha: float = cli.option(
        0.0, "mixup of the natural batch, lambda ~ Beta(alpha, alpha); 0: none", least=0
    )
    end_aug: int = cli.option(3, "epochs at the end without mixup", least=0)
    prediction: str = cli.option(
        "b", "head that gives the result, or the mean of their logits", choices=HEADS
    )
    warmup: int = cli.option(5, "epochs of linear warm-up", least=0)
    lr_factor: float = cli.option(0.1, "factor on the learning rate at each of --lr-steps", above=0)
    cosine: bool = cli.option(False, "cosine schedule instead of --lr-steps")
    pretrained: bool = cli.option(False, "start from torchvision's ImageNet weights")
    last_block: bool = cli.option(
        False, "train only a new last block and the heads; the rest stays in eval mode"
    )
    visualize: bool = cli.option(
        False, "at the end, draw contexts, masks and blends into contexts.png of the run"
    )

    def __post_init__(self):
        super().__post_init__()
        learns = balances(self.epochs - 1, self)  # head_b, in the end
        for name in (*OF_BANK, "q"):
            value = getattr(self, name)
            has_effect = learns and (self.bank or name == "q")
            if value != getattr(Args, name) and not has_effect:
                why = "--no-bank" if learns else f"--start-aug {self.start_aug}"
                cli.fail(f"{cli.flag(name)} {value}: has no effect with {why}; leave it out")
        if self.bank_size is not None and self.bank_size < self.batch_size:
            size = f"--bank-size {self.bank_size}"
            cli.fail(f"{size}: less than --batch-size {self.batch_size}, so that head_b would never learn")
        if self.lam_min > self.lam_max:
            cli.fail(f"--lam-min {self.lam_min}: above --lam-max {self.lam_max}; lower it")
        if not learns and self.prediction != "u":
            start = f"--start-aug {self.start_aug}"
            cli.fail(f"{start}: not before the end of --epochs {self.epochs}; lower it, or --prediction u")
        if not self.mixup_alpha and self.end_aug != Args.end_aug:
            cli.fail(f"--end-aug {self.end_aug}: has no effect without --mixup-alpha; leave it out")
        if self.mixup_alpha and not mixes(0, self):
            cli.fail(f"--end-aug {self.end_aug}: leaves nothing of --epochs {self.epochs} to mix; lower it")
        if self.cosine and self.lr_steps:
            cli.fail("--lr-steps: have no effect on a cosine; leave them out, or add --no-cosine")
        if self.last_block and self.arch == "lenet":
            cli.fail("--last-block: lenet has no residual blocks; use another --arch, or --no-last-block")
        if self.visualize and not (self.bank and learns):
            cli.fail("--visualize: without a bank there are no contexts to draw; leave it out")


def balances(epoch, args):
    """Whether head_b may learn in the 0-based `epoch`."""
    return epoch >= args.start_aug


def mixes(epoch, args):
    """Whether natural batches of the 0-based `epoch` are mixed."""
    return args.mixup_alpha > 0 and epoch < args.epochs - args.end_aug


def class_probabilities(class_counts, q):
    """Probability p_j = n_j^q / sum_k n_k^q of drawing each class [K]."""
    powers = class_counts.double().pow(q)
    return powers / powers.sum()


def streams(train_set, args):
    """Samplers of the natural batches and of the balanced ones."""
    labels, counts = train_set.labels, train_set.class_counts
    natural = datasets.EpochSampler(train_set, args.seed, stream=0)
    if args.q is not None:
        weights = (class_probabilities(counts, args.q) / counts)[labels]  # of an image: p_j / n_j
        return natural, datasets.EpochSampler(train_set, args.seed, stream=1, weights=weights)

    def order(size, epoch, generator):
        return datasets.class_aware(size, labels, counts, generator)

    return natural, datasets.EpochSampler(train_set, args.seed, stream=1, order=order)


class TwoHeads(nn.Module):
    """A network and two classifiers of its features: the network's own is head_u, the other head_b.

    To train: (z_u of `images`, z_b of `others` or None without them), [B, K] each. Each batch goes through on
    its own, `others` first, which is the order in which they move BatchNorm's statistics.
    To predict: z_u, z_b and their mean, [B, 3, K].
    """

    def __init__(self, network, head_b, frozen_trunk=False):
        super().__init__()
        self.network, self.head_b, self.frozen_trunk = network, head_b, frozen_trunk

    @property
    def head_u(self):
        return self.network.classifier

    def train(self, mode=True):
        super().train(mode)
        if self.frozen_trunk:
            models.split_last_block(self.network)[0].eval()
        return self

    def forward(self, images, others=None):
        if self.training:
            z_b = None if others is None else self.head_b(self.network.features(others))
            return self.network(images), z_b
        features = self.network.features(images)
        logits = torch.stack([self.head_u(features), self.head_b(features)], dim=1).float()
        return torch.cat([logits, logits.mean(1, keepdim=True)], dim=1)


def make_model(train_set, args):
    """TwoHeads; with --last-block all is frozen but a new last block. Refuses maps that can mask nothing."""
    what = args.arch, train_set.num_classes
    network = models.build(*what, args.seed, train_set.shape, pretrained=args.pretrained)
    another = models.build(*what, datasets.epoch_seed(args.seed, epoch=0, stream=2), train_set.shape)
    if args.last_block:
        network.backbone.requires_grad_(False)
        network.backbone[-1][-1] = another.backbone[-1][-1]
        if not args.pretrained:
            cli.say("note: --last-block without --pretrained: what is frozen has random weights")
    if args.bank:
        models.check_map(network, train_set.shape, args.arch)
    return TwoHeads(network, another.classifier, args.last_block)


def channel_weights(network, maps, labels):
    """Grad-CAM's weight of each channel [B, D]: the mean over h, w of d logit_y / d map, up to a factor > 0.

    maps [B, D, h, w], labels [B]. With average pooling below a linear head it is W[y] / (h w).
    """
    if isinstance(network, models.LeNet):  # has layers between the map and the head
        return gradient_weights(network, maps, labels)
    return network.classifier.weight[labels]


def gradient_weights(network, maps, labels):
    """The same by a backward pass from the logits down to the map."""
    with torch.enable_grad():
        maps = maps.detach().requires_grad_()
        logits = network.classifier(network.pool(maps))
        (gradient,) = torch.autograd.grad(logits.gather(1, labels[:, None]).sum(), maps)
    return gradient.mean((2, 3))


def background_masks(maps, weights, size):
    """M = (1 - cam)^2 [B, 1, H, W], 1 on background and 0 on the object, in between without a threshold.

    cam = ReLU(sum over channels of weights * maps), of each image scaled to 0..1 and resized to size (H, W).
    maps [B, D, h, w], weights [B, D]. A cam that is constant counts as zero: M is 1.
    """
    cam = F.relu((weights[:, :, None, None] * maps).sum(1, keepdim=True))
    cam = cam - cam.amin((2, 3), keepdim=True)
    cam = cam / cam.amax((2, 3), keepdim=True).clamp(min=1e-12)
    cam = F.interpolate(cam, size, mode="bicubic", align_corners=False).clamp(0, 1)
    return (1 - cam) ** 2


def is_fit(logits, labels, delta):
    """Whether the softmax of the label is at least delta, [B]. logits [B, K], labels [B]."""
    return logits.softmax(1).gather(1, labels[:, None])[:, 0] >= delta


@torch.no_grad()
def harvest(accelerator, model, images, labels, delta):
    """(background masks [B, 1, H, W], fit [B]) of natural images, by head_u in eval mode, as it is now."""
    network = model.eval().network
    with accelerator.autocast():
        maps = network.feature_map(images)
        logits = network.classifier(network.pool(maps))
    maps = maps.float()
    masks = background_masks(maps, channel_weights(network, maps, labels), images.shape[2:])
    model.train()
    return masks, is_fit(logits.float(), labels, delta)


class Bank:
    """The last `size` contexts, images with their masks, first in, first out. Drawing takes none out.

    What comes in is sorted out on the device, so that nothing waits for it: entries are (image, mask) with a
    flag, and those without, not being contexts, stand in front.
    """

    def __init__(self, size):
        self.size, self.entries, self.flags, self.sure = size, None, None, 0

    def push(self, images, masks, fit):
        """Append those of images [B, C, H, W] and masks [B, 1, H, W] that are fit [B]."""
        entries = torch.cat([images, masks], dim=1)
        if self.entries is not None:
            entries, fit = torch.cat([self.entries, entries]), torch.cat([self.flags, fit])
        last = fit.long().argsort(stable=True)[-self.size :]
        self.entries, self.flags = entries[last], fit[last]

    def holds(self, number):
        """Whether there are `number` contexts. Once there are, the device is not asked again."""
        if self.sure < number:
            self.sure = int(self.flags.sum())
        return self.sure >= number

    def draw(self, number):
        """(images, masks) of `number` different contexts, in random order."""
        keys = torch.rand(len(self.flags)).to(self.flags.device, non_blocking=True)
        entries = self.entries[keys.masked_fill(~self.flags, 2).argsort()[:number]]
        return entries[:, :-1], entries[:, -1:]


def blend(images, contexts, masks, lam):
    """lam * M * context + (1 - lam * M) * image. [B, C, H, W] both, masks M [B, 1, H, W]."""
    return (1 - lam * masks) * images + lam * masks * contexts  # images first: the sum keeps their layout


def learning_rate(epoch, args):
    """Learning rate of the 0-based `epoch`: linear warm-up, then steps or a cosine."""
    warm = min(1.0, (epoch + 1) / max(args.warmup, 1))
    if args.cosine:
        return args.lr * warm * 0.5 * (1 + math.cos(math.pi * epoch / args.epochs))
    return args.lr * warm * args.lr_factor ** sum(epoch >= step for step in args.lr_steps)


def train_one_epoch(run, model, loader, optimizer, epoch, args):
    """Records the loss and the shares of fit images and of steps in which head_b learned ("balanced")."""
    model.train()
    accelerator = run.accelerator
    two_heads = accelerator.unwrap_model(model, keep_torch_compile=False)
    bank = Bank((args.bank_size or args.batch_size) // accelerator.num_processes)  # empty in each epoch
    draws = np.random.RandomState(datasets.epoch_seed(args.seed, epoch, stream=3) % 2**32)
    for (images, labels), other in run.steps(loader):
        lam = draws.uniform(args.lam_min, args.lam_max)
        balanced = None if other is None else other[0]
        fit = {}
        if other is not None and args.bank:
            masks, is_context = harvest(accelerator, two_heads, images, labels, args.delta)
            bank.push(images, masks, is_context)
            fit = {"fit": is_context.float().mean()}
            balanced = blend(balanced, *bank.draw(len(labels)), lam) if bank.holds(len(labels)) else None
        if mixes(epoch, args):  # each process permutes its share of the batch
            share = draws.beta(args.mixup_alpha, args.mixup_alpha)  # mixup's lambda
            order = torch.randperm(len(labels)).to(labels.device, non_blocking=True)
            z_u, z_b = model(share * images + (1 - share) * images[order], balanced)
            loss = share * F.cross_entropy(z_u, labels) + (1 - share) * F.cross_entropy(z_u, labels[order])
        else:
            z_u, z_b = model(images, balanced)
            loss = F.cross_entropy(z_u, labels)
        if z_b is not None:
            loss = loss + F.cross_entropy(z_b, other[1])
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        run.record(loss=loss, balanced=loss.new_full((), z_b is not None), **fit)


@torch.no_grad()
def visualize(run, model, loader, train_set, args):
    """Draw contexts.png: in a row a natural image, its mask, what that leaves, a balanced image, their blend.

    The blend is that of the middle lambda; at most 8 rows, of natural images that are fit.
    """
    accelerator = run.accelerator
    rows, bank = min(8, args.batch_size // accelerator.num_processes), Bank(8)
    two_heads = accelerator.unwrap_model(model, keep_torch_compile=False)
    loader.set_epoch(args.epochs - 1)
    for (images, labels), other in loader:
        bank.push(images, *harvest(accelerator, two_heads, images, labels, args.delta))
        balanced = other[0]
        if bank.holds(rows):
            break
    if not bank.holds(rows):
        cli.say(f"note: --visualize: fewer than {rows} images with p(label) >= {args.delta}; none drawn")
        return
    torch.manual_seed(args.seed)  # the same picture each time
    contexts, masks = bank.draw(rows)
    balanced = balanced[:: len(balanced) // rows][:rows]
    blends = blend(balanced, contexts, masks, (args.lam_min + args.lam_max) / 2)
    mean, std = train_set.mean.to(images.device) / 255, train_set.std.to(images.device) / 255
    contexts, balanced, blends = (mean + std * part for part in (contexts, balanced, blends))
    run.save_grid("contexts.png", contexts, masks, masks * contexts, balanced, blends)


def main(args: Args) -> dict:
    config = DataLoaderConfiguration(split_batches=True, non_blocking=True)
    # Where a process's bank does not hold a batch, head_b is without a gradient there. Torch warns that this
    # costs time at the first step in which it has one.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(dataloader_config=config, kwargs_handlers=[unused])
    run = runs.start(accelerator, args)
    train_set, test_set = datasets.load(args)
    run.set_data(train_set, test_set)
    steps = len(train_set) // args.batch_size
    sampler = datasets.PairSampler(
        *streams(train_set, args),
        args.batch_size,
        wanted=lambda epoch: [balances(epoch, args)] * steps,
    )
    options = datasets.loader_options(train_set)
    train_loader = DataLoader(
        datasets.Pairs(train_set), args.batch_size, sampler=sampler, drop_last=True, **options
    )
    test_loader = DataLoader(test_set, args.batch_size, **options)
    model = make_model(train_set, args)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=args.wd)
    model, optimizer = accelerator.prepare(model, optimizer)
    train_loader, test_loader = accelerator.prepare(train_loader, test_loader)
    for epoch in run.track(range(args.epochs), model=model, optimizer=optimizer):
        run.begin_epoch(epoch, train_loader)
        optimizer.param_groups[0]["lr"] = learning_rate(epoch, args)
        train_one_epoch(run, model, train_loader, optimizer, epoch, args)
        if balances(epoch, args) and run.stats["balanced"] == 0 and not args.dry_run:
            cli.say(f"note: head_b learned nothing: too few images with p(label) >= {args.delta} for a batch")
        accuracy = evaluation.per_split(accelerator, model, test_loader, train_set.class_counts, args, HEADS)
        run.end_epoch(epoch, accuracy)
    if args.visualize and run.main:
        visualize(run, model, train_loader, train_set, args)
    return run.finish()


if __name__ == "__main__":
    main(cli.parse(Args, RECIPES, __doc__))
