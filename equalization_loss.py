"""Equalization losses: rare classes are spared the gradients that images of other classes send them.

Paper:    J. Tan et al., "Equalization Loss for Long-Tailed Object Recognition", CVPR 2020, arXiv:2003.05176
          (seql); "Equalization Loss v2", CVPR 2021, arXiv:2012.08548 (eqlv2); "The Equalization Losses",
          2022, arXiv:2210.05566 (softmax_eql).
Method:   seql         a rare class that is not the label drops out of the image's softmax with probability
                       gamma                                                     rare_classes, dropped, seql
          eqlv2        K sigmoids, each with weights by the ratio of the positive and negative gradients that
                       its class has had                                     Gradients, eqlv2_weights, eqlv2
          softmax_eql  tau log G_k is added to logit k, G_k the sum of the positive gradients that class k
                       has had                                                        Gradients, softmax_eql
          They change the training alone; the prediction is the largest logit.
Differs:  eqlv2 and softmax_eql are losses of detectors, here of a classifier without a background class.
          docs/equalization_loss.md has the rest, and a command for every row of the papers' tables.
Expected: seql, cifar100_lt: 40.5 (CE 38.3); --recipe long --imbalance 200: 43.4 (CE 41.3).
Run:      accelerate launch equalization_loss.py --dataset cifar100_lt
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator, DataLoaderConfiguration
from torch import nn
from torch.optim import SGD

from common import cli, datasets, evaluation, models, recipes
from common.cli import Refused
from common.runs import Run

# Settings of the Bag of Tricks (CIFAR; long: the paper's), of the paper (ImageNet-LT), and ours.
# fmt: off
LONG = dict(arch="resnet32", epochs=346, batch_size=256, lr=0.2, lr_steps=(173, 259), warmup=11,
            warmup_from=0.5, wd=1e-4, nesterov=True, augment="auto")
IMAGENET = dict(arch="resnet10", epochs=106, batch_size=1024, lr=0.4, lr_steps=(30, 60, 90), warmup=4,
                warmup_from=0.25, wd=1e-4, imbalance=None, augment="jitter", tail_share=4.3e-4)
RECIPES = {
    "cifar10_lt": dict(recipes.CIFAR, tail_share=0.03),
    "cifar10_lt long": dict(LONG, tail_share=0.03),
    "cifar100_lt": dict(recipes.CIFAR, tail_share=0.005),
    "cifar100_lt long": dict(LONG, tail_share=0.003, gamma=0.95),
    "imagenet_lt": IMAGENET,
    "inat2018": dict(recipes.INAT, epochs=200, batch_size=512, lr_steps=(75, 160), augment="weak"),
    **recipes.OWN,
}
# fmt: on
LOSSES = ("seql", "eqlv2", "softmax_eql", "ce")


@dataclass
class Args(cli.Args):
    loss: str = cli.option("seql", "one of the three, or cross-entropy", choices=LOSSES)
    gamma: float = cli.option(0.9, "seql: probability that a rare class drops out", least=0, most=1)
    tail_share: float = cli.option(0.0, "seql: share of images below which a class is rare", least=0, most=1)
    tail_ratio: float = cli.option(0.1, "where that is 0: share of all rare classes at most", least=0, most=1)
    slope: float = cli.option(12.0, "eqlv2: gamma of f(g) = 1 / (1 + exp(-gamma (g - mu)))", above=0)
    mu: float = cli.option(0.8, "eqlv2: mu of f")
    alpha: float = cli.option(4.0, "eqlv2: positive weight 1 + alpha (1 - f(g))", least=0)
    tau: float = cli.option(1.0, "softmax_eql: factor on log G_k", least=0)


def share_for_tail_ratio(class_counts, ratio):
    """The largest share below which classes are rare that leaves them at most `ratio` of all images."""
    shares = class_counts.double() / class_counts.sum()
    shares = shares.sort()[0]
    too_much = shares[shares.cumsum(0) > ratio + 1e-9]
    return too_much[0].item() if len(too_much) else math.inf


def rare_classes(class_counts, tail_share):
    """bool [K]: T(k), whether class k has less than tail_share of the training images, class_counts [K]."""
    return class_counts.double() / class_counts.sum() < tail_share


def find_rare(class_counts, args):
    """rare_classes of the training set, told to the user. Refused where they are none or all."""
    share, ratio = args.tail_share, args.tail_ratio
    if share and ratio != Args.tail_ratio:
        raise Refused(f"--tail-ratio {ratio:g}: --tail-share {share:g} takes its place; add --tail-share 0")
    given = f"--tail-share {share:g}, --tail-ratio {ratio:g}"
    if share == 0:
        share = share_for_tail_ratio(class_counts, ratio)
    rare = rare_classes(class_counts, share)
    if rare.all() or not rare.any():
        raise Refused(f"{given}: {rare.sum()} of {len(rare)} classes are rare; change one")
    cli.say(f"rare: {rare.sum()} classes of {class_counts[rare].sum()} images in {class_counts.sum()}")
    return rare


def dropped(labels, rare, gamma, draws):
    """bool [B, K]: rare classes other than the label, where the draw, uniform in 0..1, is below gamma."""
    is_label = F.one_hot(labels, len(rare)).bool()
    return rare & ~is_label & (draws < gamma)


def seql(logits, labels, drop):
    """Softmax equalization loss of each image [B]: cross-entropy without the classes of `drop` [B, K]."""
    logits = logits.masked_fill(drop, -math.inf)
    return F.cross_entropy(logits, labels, reduction="none")


class Gradients(nn.Module):
    """Sums of the positive and negative gradients that each class has had, float64 [K]; in checkpoints."""

    def __init__(self, num_classes):
        super().__init__()
        self.register_buffer("positive", torch.zeros(num_classes, dtype=torch.float64))
        self.register_buffer("negative", torch.zeros(num_classes, dtype=torch.float64))

    def ratio(self):
        """g_k = positive / negative; 100 before the first step, which leaves all weights at 1."""
        is_new = self.positive + self.negative == 0
        ratio = self.positive / (self.negative + 1e-10)
        return ratio.masked_fill(is_new, 100.0)

    def add(self, accelerator, gradients, labels):
        """Add a batch's gradients, [B, K] in absolute value, of all processes."""
        gradients = gradients.double()
        onehot = F.one_hot(labels, gradients.shape[1])
        positive = (onehot * gradients).sum(0)
        negative = ((1 - onehot) * gradients).sum(0)
        self.positive += accelerator.reduce(positive, reduction="sum")
        self.negative += accelerator.reduce(negative, reduction="sum")


def eqlv2_weights(ratio, slope=12.0, mu=0.8, alpha=4.0):
    """(positive q_k = 1 + alpha (1 - f(g_k)), negative r_k = f(g_k)), [K] each; f is a sigmoid about mu."""
    f = torch.sigmoid(slope * (ratio - mu))
    return 1 + alpha * (1 - f), f


def eqlv2(logits, labels, positive, negative):
    """(loss of each image [B], its gradients by the logits in absolute value [B, K]).

    The loss is a sum over K sigmoids, with the weight `positive` [K] at the label, elsewhere `negative` [K].
    """
    onehot = F.one_hot(labels, logits.shape[1]).to(logits)
    weights = torch.where(onehot > 0, positive, negative).to(logits)
    losses = weights * F.binary_cross_entropy_with_logits(logits, onehot, reduction="none")
    p = logits.detach().sigmoid()
    return losses.sum(1), weights * (p - onehot).abs()


def softmax_eql(logits, labels, positive, tau=1.0):
    """(loss of each image [B], its gradients as above) with tau log G_k added to logit k; positive: G [K]."""
    positive = positive.clamp(min=1e-4)  # so that the first step is cross-entropy
    logits = logits + tau * positive.log().to(logits)
    losses = F.cross_entropy(logits, labels, reduction="none")
    p = logits.detach().softmax(1)
    onehot = F.one_hot(labels, logits.shape[1])
    return losses, (p - onehot).abs()


def make_model(dataset, args):
    network = models.build(args.arch, dataset, args.seed, pretrained=args.pretrained)
    if args.loss == "eqlv2":  # so that K sigmoids begin near 1 / K
        nn.init.constant_(network.classifier.bias, -math.log(dataset.num_classes - 1))
    return network


def train_one_epoch(run, model, loader, optimizer, rare, gradients, args):
    model.train()
    rank, processes = run.accelerator.process_index, run.accelerator.num_processes
    generator = torch.Generator(run.accelerator.device)
    generator.manual_seed(int(run.rng.integers(2**31)))  # the same on all processes
    for images, labels in run.steps(loader):
        logits = model(images)
        if args.loss == "seql":
            draws = torch.rand(processes, *logits.shape, generator=generator, device=logits.device)
            drop = dropped(labels, rare, args.gamma, draws[rank])
            losses = seql(logits, labels, drop)
        elif args.loss == "eqlv2":
            positive, negative = eqlv2_weights(gradients.ratio(), args.slope, args.mu, args.alpha)
            losses, new = eqlv2(logits, labels, positive, negative)
            gradients.add(run.accelerator, new, labels)
        elif args.loss == "softmax_eql":
            losses, new = softmax_eql(logits, labels, gradients.positive, args.tau)
            gradients.add(run.accelerator, new, labels)
        else:
            losses = F.cross_entropy(logits, labels, reduction="none")
        loss = losses.mean()
        optimizer.zero_grad()
        run.accelerator.backward(loss)
        optimizer.step()
        run.log(loss=loss)


def main(args: Args) -> dict:
    config = DataLoaderConfiguration(split_batches=True)
    accelerator = Accelerator(dataloader_config=config)
    run = Run(accelerator, args)
    train_set, test_set = datasets.load(args)
    run.set_data(train_set, test_set)
    class_counts = train_set.class_counts.to(accelerator.device)
    rare = find_rare(class_counts, args) if args.loss == "seql" else None
    loader = datasets.train_loader(train_set, args)
    test_loader = datasets.test_loader(test_set, args)
    model = make_model(train_set, args)
    gradients = Gradients(train_set.num_classes).to(accelerator.device)
    optimizer = SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=args.wd, nesterov=args.nesterov)
    model, optimizer = accelerator.prepare(model, optimizer)
    loader, test_loader = accelerator.prepare(loader, test_loader)

    for epoch in run.epochs(range(args.epochs), model=model, optimizer=optimizer, gradients=gradients):
        loader.set_epoch(epoch)
        optimizer.param_groups[0]["lr"] = recipes.learning_rate(epoch, args)
        train_one_epoch(run, model, loader, optimizer, rare, gradients, args)
        facts = {}
        if args.loss in ("eqlv2", "softmax_eql"):
            facts["class_positive_gradient"] = gradients.positive.tolist()
            facts["class_gradient_ratio"] = gradients.ratio().tolist()
        run.end_epoch(epoch, evaluation.per_split(run, model, test_loader), **facts)
    return run.finish()


if __name__ == "__main__":
    cli.run(main, Args, RECIPES, __doc__)
