"""Equalization losses: rare classes are spared gradients that images of other classes send them.

Paper:    J. Tan, C. Wang, B. Li, Q. Li, W. Ouyang, C. Yin, J. Yan, "Equalization Loss for Long-Tailed Object
          Recognition", CVPR 2020, arXiv:2003.05176 (seql); J. Tan, X. Lu, G. Zhang, C. Yin, Q. Li,
          "Equalization Loss v2", CVPR 2021, arXiv:2012.08548 (eqlv2); J. Tan, B. Li, X. Lu, Y. Yao, F. Yu,
          T. He, W. Ouyang, "The Equalization Losses", 2022, arXiv:2210.05566 (softmax_eql).
Method:   seql         a rare class that is not the label drops out of the image's softmax with probability
                       gamma                                                     rare_classes, dropped, seql
          eqlv2        K sigmoids, whose positive and negative parts are weighted by the ratio of the positive
                       and negative gradients that each class has had                   eqlv2_weights, eqlv2
          softmax_eql  tau log G_k is added to logit k, where G_k is the sum of the positive gradients that
                       class k has had                                                           softmax_eql
          They change the training alone; the prediction is the largest logit.
Differs:  eqlv2 and softmax_eql are losses of detectors, here of a classifier: without a background class, the
          loss of eqlv2 is a sum over classes and a mean over images, and its biases begin at -log(K - 1).
          Below which share of the images classes are rare has been published for CIFAR-100 and ImageNet-LT
          alone: on CIFAR-10 it is 0.03, elsewhere the largest that leaves --tail-ratio of the images to rare
          classes. On CIFAR the recipe is that of the other scripts, with --long the paper's, its iterations
          rounded to epochs; its Cutout, of a size that is not published, has 16 pixels.
          The calibration error is that of the softmax of the logits, for eqlv2, too.
          An incomplete last batch is dropped; the result is the last epoch.
Expected: seql on cifar100_lt, imbalance 100 and 50, ResNet-32: 40.5 and 44.8 all (Bag of Tricks; CE 38.3 and
          43.9); with --long at imbalance 200: 43.4 (paper; CE 41.3). imagenet_lt, ResNet-10: 36.4 all, 49.4
          many, 32.3 medium, 14.5 few (paper; CE 34.7). There are no published figures of the other two.
          Ours: see README.
Run:      accelerate launch equalization_loss.py --dataset cifar100_lt
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator, DataLoaderConfiguration
from torch import nn
from torch.utils.data import DataLoader

from common import cli, datasets, evaluation, models, runs


def by_long(usual, paper):
    return cli.By(lambda long: paper if long else usual)


def published(usual, paper=None):
    """A published --tail-share; a --tail-ratio takes its place."""
    shares = (usual, paper or usual)
    return cli.By(lambda long, tail_ratio: shares[long] if tail_ratio == Args.tail_ratio else None)


# Settings of Bag of Tricks' comparison (CIFAR; with --long the paper's), of the paper (ImageNet-LT) and our
# own (the rest), one row per data set; an option given on the command line wins.
# fmt: off
CIFAR = dict(arch="resnet32", epochs=by_long(200, 346), batch_size=by_long(128, 256), lr=by_long(0.1, 0.2),
             lr_steps=by_long((160, 180), (173, 259)), lr_factor=by_long(0.01, 0.1), wd=by_long(2e-4, 1e-4),
             warmup=by_long(5, 11), warmup_from=by_long(0.0, 0.1), nesterov=by_long(False, True),
             auto_augment=by_long(False, True), cutout=by_long(0, 16))
LARGE = dict(arch="resnet50", imbalance=None, epochs=100, batch_size=256, lr_steps=(60, 80), wd=2e-4,
             warmup=5)
MNIST = dict(arch="lenet", epochs=8, lr=0.01, lr_steps=(6,), lr_factor=0.01)
RECIPES = {
    "cifar10_lt": dict(CIFAR, tail_share=published(0.03)),
    "cifar100_lt": dict(CIFAR, tail_share=published(0.005, 0.003), gamma=by_long(0.9, 0.95)),
    "imagenet_lt": dict(LARGE, arch="resnet10", epochs=106, batch_size=1024, lr=0.4, lr_steps=(30, 60, 90),
                        wd=1e-4, warmup=4, warmup_from=0.1, color_jitter=0.4, tail_share=published(4.3e-4)),
    "inat2018": dict(LARGE, epochs=200, batch_size=512, lr_steps=(75, 160), few_under=21),
    "mnist_lt": MNIST,
    "fashion_mnist_lt": MNIST,
    "cmnist_lt": MNIST,
    "image_folder": dict(LARGE, batch_size=128),
    "image_list": dict(LARGE, batch_size=128),
    "synthetic": dict(epochs=40, batch_size=32, lr_steps=(28, 36), lr_factor=0.01, wd=5e-4, warmup=2),
}
# fmt: on
SEQL, EQLV2 = dict(loss=("seql",)), dict(loss=("eqlv2",))


@dataclass
class Args(cli.Args):
    loss: str = cli.option(
        "seql",
        "seql: softmax equalization loss; eqlv2: equalization loss v2; softmax_eql: its softmax form; ce: "
        "cross-entropy",
        choices=("seql", "eqlv2", "softmax_eql", "ce"),
    )
    gamma: float = cli.option(0.9, "probability that a rare class drops out", least=0, most=1, needs=SEQL)
    tail_share: float | None = cli.option(
        None, "lambda: classes with less than this share of the images are rare", least=0, most=1, needs=SEQL
    )
    tail_ratio: float = cli.option(0.1, "finds lambda: share of all rare ones", least=0, most=1, needs=SEQL)
    slope: float = cli.option(12.0, "gamma of f(g) = 1 / (1 + exp(-gamma (g - mu)))", above=0, needs=EQLV2)
    mu: float = cli.option(0.8, "mu of f", needs=EQLV2)
    alpha: float = cli.option(4.0, "positive weight 1 + alpha (1 - f(g))", least=0, needs=EQLV2)
    tau: float = cli.option(1.0, "factor on log G_k", least=0, needs=dict(loss=("softmax_eql",)))
    long: bool = cli.option(False, "on CIFAR: the recipe of the paper, longer, with AutoAugment and Cutout")
    nesterov: bool = cli.option(False, "Nesterov momentum")
    warmup: int = cli.option(0, "epochs of linear warm-up", least=0)
    warmup_from: float = cli.option(0.0, "learning rate at which the warm-up begins", least=0)
    lr_factor: float = cli.option(0.1, "factor on the learning rate at each of --lr-steps", above=0)

    def __post_init__(self):
        super().__post_init__()
        if self.long and not self.dataset.startswith("cifar"):
            cli.fail(
                f"--long: is a recipe of cifar10_lt and cifar100_lt, not of {self.dataset}; leave it out"
            )
        if self.tail_share is not None and self.tail_ratio != Args.tail_ratio:
            given = f"--tail-ratio {self.tail_ratio:g}"
            cli.fail(f"{given}: --tail-share {self.tail_share:g} takes its place; leave one out")


def share_for_tail_ratio(class_counts, ratio):
    """The largest share below which classes are rare that leaves them at most `ratio` of all images."""
    counts = class_counts.double().sort()[0]
    shares = counts / counts.sum()
    # rare are those strictly below the share of the first class that would be too much
    too_much = (shares.cumsum(0) > ratio + 1e-9).nonzero()
    return shares[too_much[0, 0]].item() if len(too_much) else math.inf


def rare_classes(class_counts, tail_share):
    """bool [K]: T(k), whether class k has less than tail_share of the training images, class_counts [K]."""
    return class_counts.double() / class_counts.sum() < tail_share


def dropped(labels, rare, gamma, draws):
    """bool [B, K]: the classes that drop out, with probability gamma each of the rare ones but the label's.

    draws [B, K], uniform in 0..1.
    """
    return (draws < gamma) & rare & ~F.one_hot(labels, len(rare)).bool()


def seql(logits, labels, drop):
    """Softmax equalization loss of each image [B]: cross-entropy without the classes of `drop` [B, K]."""
    return F.cross_entropy(logits.masked_fill(drop, -math.inf), labels, reduction="none")


class Gradients(nn.Module):
    """Sums of the positive and negative gradients that each class has had, float64 [K]; in checkpoints."""

    def __init__(self, num_classes):
        super().__init__()
        self.register_buffer("positive", torch.zeros(num_classes, dtype=torch.float64))
        self.register_buffer("negative", torch.zeros(num_classes, dtype=torch.float64))

    def ratio(self):
        """g_k = positive / negative; 100 before the first step, which leaves all weights at 1."""
        before = self.positive + self.negative == 0
        return torch.where(before, 100.0, self.positive / (self.negative + 1e-10))

    def add(self, accelerator, positive, negative):
        """Add a batch's gradients [K], those of all processes."""
        both = accelerator.reduce(torch.stack([positive, negative]), reduction="sum")
        self.positive += both[0]
        self.negative += both[1]


def eqlv2_weights(ratio, slope=12.0, mu=0.8, alpha=4.0):
    """(positive q_k = 1 + alpha (1 - f(g_k)), negative r_k = f(g_k)), [K] each; f is a sigmoid about mu."""
    f = torch.sigmoid(slope * (ratio - mu))
    return 1 + alpha * (1 - f), f


def eqlv2(logits, labels, positive, negative):
    """(loss of each image [B], positive and negative gradients [K] of the batch); weights [K] each.

    The loss is the sum over K sigmoids of q_k at the label and r_k elsewhere times their cross-entropy. The
    gradients are of the sum over the batch by the logits, with the weights, in absolute value.
    """
    onehot = F.one_hot(labels, logits.shape[1]).to(logits)
    weights = torch.where(onehot > 0, positive.to(logits), negative.to(logits))
    losses = weights * F.binary_cross_entropy_with_logits(logits, onehot, reduction="none")
    gradients = (weights * (logits.detach().sigmoid() - onehot).abs()).double()
    return losses.sum(1), (onehot * gradients).sum(0), ((1 - onehot) * gradients).sum(0)


def softmax_eql(logits, labels, positive, tau=1.0):
    """(loss of each image [B], positive gradients [K] of the batch) with tau log G_k added to logit k.

    positive: G [K], at least 1e-4 is taken, so that the first step is cross-entropy.
    """
    logits = logits + tau * positive.clamp(min=1e-4).log().to(logits)
    p = logits.detach().softmax(1).gather(1, labels[:, None])[:, 0].double()
    gradients = torch.zeros_like(positive).index_add_(0, labels, 1 - p)
    return F.cross_entropy(logits, labels, reduction="none"), gradients


def make_network(train_set, args):
    network = models.build(args.arch, train_set.num_classes, args.seed, train_set.shape)
    if args.loss == "eqlv2":  # so that K sigmoids begin near 1 / K
        nn.init.constant_(network.classifier.bias, -math.log(train_set.num_classes - 1))
    return network


def find_rare(train_set, args):
    """rare_classes of the training set, told to the user. Refuses a share that makes none or all rare."""
    counts, given = train_set.class_counts, f"--tail-ratio {args.tail_ratio:g}"
    share = share_for_tail_ratio(counts, args.tail_ratio) if args.tail_share is None else args.tail_share
    if args.tail_share is not None:
        given = f"--tail-share {share:g}"
    rare = rare_classes(counts, share)
    if not rare.any() or rare.all():
        which, remedy = ("all classes", "lower") if rare.all() else ("no class", "raise")
        cli.fail(f"{given}: makes {which} rare, so that nothing is left to equalize; {remedy} it")
    images = 100 * counts[rare].sum().item() / counts.sum().item()
    sizes = f"of up to {counts[rare].max()} images, {images:.1f} % of all images"
    cli.say(f"rare: {rare.sum()} of {len(rare)} classes, {sizes}")
    return rare


def learning_rate(epoch, args):
    """Learning rate of the 0-based `epoch`: linear warm-up, then times lr_factor at each of lr_steps."""
    warm = min(1.0, (epoch + 1) / max(args.warmup, 1))
    rate = args.warmup_from * (1 - warm) + args.lr * warm
    return rate * args.lr_factor ** sum(epoch >= step for step in args.lr_steps)


def train_one_epoch(run, model, loader, optimizer, gradients, rare, args):
    model.train()
    accelerator = run.accelerator
    rank, processes = accelerator.process_index, accelerator.num_processes
    for images, labels in run.steps(loader):
        logits = model(images)
        if args.loss == "seql":  # of the whole batch's draws those of this process
            draws = torch.rand(processes, *logits.shape, device=logits.device)[rank]
            losses = seql(logits, labels, dropped(labels, rare, args.gamma, draws))
        elif args.loss == "eqlv2":
            weights = eqlv2_weights(gradients.ratio(), args.slope, args.mu, args.alpha)
            losses, positive, negative = eqlv2(logits, labels, *weights)
            gradients.add(accelerator, positive, negative)
        elif args.loss == "softmax_eql":
            losses, positive = softmax_eql(logits, labels, gradients.positive, args.tau)
            gradients.add(accelerator, positive, torch.zeros_like(positive))
        else:
            losses = F.cross_entropy(logits, labels, reduction="none")
        loss = losses.mean()
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        run.record(loss=loss)


def learned(gradients, args):
    """What the log says of the gradients that each class has had."""
    if args.loss == "eqlv2":
        return {"class_gradient_ratio": gradients.ratio().tolist()}
    if args.loss == "softmax_eql":
        return {"class_positive_gradient": gradients.positive.tolist()}
    return {}


def main(args: Args) -> dict:
    config = DataLoaderConfiguration(split_batches=True, non_blocking=True)
    accelerator = Accelerator(dataloader_config=config)
    run = runs.start(accelerator, args)
    train_set, test_set = datasets.load(args)
    run.set_data(train_set, test_set)
    rare = find_rare(train_set, args).to(accelerator.device) if args.loss == "seql" else None
    options = datasets.loader_options(train_set)
    sampler = datasets.EpochSampler(train_set, args.seed)
    train_loader = DataLoader(train_set, args.batch_size, sampler=sampler, drop_last=True, **options)
    test_loader = DataLoader(test_set, args.batch_size, **options)
    model = make_network(train_set, args)
    gradients = Gradients(train_set.num_classes).to(accelerator.device)
    how = dict(momentum=0.9, weight_decay=args.wd, nesterov=args.nesterov)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, **how)
    model, optimizer = accelerator.prepare(model, optimizer)
    train_loader, test_loader = accelerator.prepare(train_loader, test_loader)
    for epoch in run.track(range(args.epochs), model=model, optimizer=optimizer, gradients=gradients):
        run.begin_epoch(epoch, train_loader)
        optimizer.param_groups[0]["lr"] = learning_rate(epoch, args)
        train_one_epoch(run, model, train_loader, optimizer, gradients, rare, args)
        accuracy = evaluation.per_split(accelerator, model, test_loader, train_set.class_counts, args)
        run.end_epoch(epoch, {**accuracy, **learned(gradients, args)})
    return run.finish()


if __name__ == "__main__":
    main(cli.parse(Args, RECIPES, __doc__))
