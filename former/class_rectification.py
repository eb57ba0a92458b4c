"""Class rectification loss: hard pairs of the classes that are rare in a batch are pushed apart.

Paper:    Q. Dong, S. Gong, X. Zhu, "Imbalanced Deep Learning by Minority Class Incremental Rectification",
          TPAMI 2018, arXiv:1804.10851.
Method:   1. the smallest classes of a batch that together hold at most rho of it are its minority    minority
          2. of each of these classes c all images are anchors; hard positives are its kappa images of the
             lowest softmax p_c, hard negatives the kappa images of other classes of the highest p_c;
             with --level instance the features of each anchor decide                       hard_pairs
          3. L_crl compares the distances to positives and to negatives, by triplets (relative), pair by
             pair (absolute) or by their histograms (distribution)        relative, absolute, distribution
          4. loss = alpha L_crl + (1 - alpha) cross-entropy, alpha = eta Omega, Omega the imbalance of the
             training set in percent                                                      imbalance, total
Differs:  there is no released code, and the paper is about attributes: here an image has one label. What we
          could not find in it is set here: Omega is the percentage of images to move for equal classes; of
          classes of equal size the smaller index is first; the absolute form has margin 0.5, the histograms
          have 101 nodes; a batch without a triplet has plain cross-entropy. Classes of one image count
          towards rho, and have no pair. The paper trains on equal classes, too, where Omega is 0:
          --alpha sets alpha itself. The recipes are the other scripts'. With several processes, minority and
          pairs are of the batch of all.
          An incomplete last batch is dropped; the result is the last epoch.
Expected: there are no published figures on these sets. On balanced CIFAR-100, ResNet-32, the paper has 1.2
          points over cross-entropy. Ours: see README.
Run:      accelerate launch class_rectification.py --dataset cifar100_lt
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator, DataLoaderConfiguration
from torch import nn
from torch.utils.data import DataLoader

from common import cli, datasets, evaluation, models, runs

# Our own settings, one row per data set; an option given on the command line wins.
# fmt: off
CIFAR = dict(arch="resnet32", epochs=200, lr_steps=(160, 180), lr_factor=0.01, wd=2e-4, warmup=5)
LARGE = dict(arch="resnet50", imbalance=None, epochs=100, batch_size=256, lr_steps=(60, 80), wd=2e-4,
             warmup=5)
MNIST = dict(arch="lenet", epochs=8, lr=0.01, lr_steps=(6,), lr_factor=0.01)
RECIPES = {
    "cifar10_lt": CIFAR,
    "cifar100_lt": CIFAR,
    "imagenet_lt": dict(LARGE, color_jitter=0.4),
    "inat2018": dict(LARGE, epochs=200, batch_size=512, lr_steps=(75, 160), few_under=21),
    "mnist_lt": MNIST,
    "fashion_mnist_lt": MNIST,
    "cmnist_lt": MNIST,
    "image_folder": dict(LARGE, batch_size=128),
    "image_list": dict(LARGE, batch_size=128),
    # at class level the rarest classes lose on it (README)
    "synthetic": dict(epochs=40, batch_size=32, lr_steps=(28, 36), lr_factor=0.01, wd=5e-4, warmup=2,
                      level="instance"),
}
# fmt: on


@dataclass
class Args(cli.Args):
    form: str = cli.option(
        "relative",
        "L_crl: relative, triplets; absolute, pairs; distribution, histograms",
        choices=("relative", "absolute", "distribution"),
    )
    level: str = cli.option(
        "class",
        "what is hard and distant: class, by softmax; instance, by normalised features",
        choices=("class", "instance"),
    )
    rho: float = cli.option(0.5, "largest share of a batch that is its minority", above=0, most=1)
    eta: float = cli.option(0.01, "alpha is this times the imbalance in percent", above=0)
    kappa: int = cli.option(25, "hard positives and negatives of a class, or anchor", least=1)
    margin: float | None = cli.option(
        None,
        "margin (default: 0.5; relative at instance level 2 pi / number of classes)",
        least=0,
        needs=dict(form=("relative", "absolute")),
    )
    alpha: float | None = cli.option(
        None, "share of L_crl in the loss, instead of --eta; 0 is cross-entropy", least=0, most=1
    )
    crl_epoch: int = cli.option(0, "first 0-based epoch with L_crl", least=0)
    warmup: int = cli.option(0, "epochs of linear warm-up", least=0)
    lr_factor: float = cli.option(0.1, "factor on the learning rate at each of --lr-steps", above=0)

    def __post_init__(self):
        super().__post_init__()
        if self.crl_epoch >= self.epochs:
            cli.fail(f"--crl-epoch {self.crl_epoch}: not before the end of --epochs {self.epochs}; lower it")
        if self.alpha is not None and self.eta != Args.eta:
            cli.fail(f"--eta {self.eta}: --alpha {self.alpha} takes its place; leave one out")
        if self.rho * self.batch_size < 2:
            given = f"--rho {self.rho:g}"
            cli.fail(f"{given}: holds no two images of --batch-size {self.batch_size}; raise one")


def imbalance(class_counts):
    """Omega: percentage of images to move for equal classes, 0 to 100 (1 - 1 / K). class_counts [K]."""
    shares = class_counts.double() / class_counts.sum()
    return 50 * (shares - 1 / len(shares)).abs().sum().item()


def minority(labels, num_classes, rho):
    """bool [K]: the smallest classes of the batch, as many as together hold at most rho of it. labels [B]."""
    sizes = torch.zeros(num_classes, dtype=torch.int64, device=labels.device)
    sizes.index_add_(0, labels, torch.ones_like(labels))
    sizes, classes = sizes.sort(stable=True)  # among equals the smaller index is first
    inside = (sizes > 0) & (sizes.cumsum(0) <= rho * len(labels) + 1e-6)  # 0.58 * 100 is below 58
    return inside[classes.argsort()]


def feature_distances(features):
    """||f_i - f_j|| [B, B] of features [B, D] of length 1 or 0; below 1e-3 it is 0, without gradient."""
    squares = features.square().sum(1)
    squares = squares[:, None] + squares - 2 * features @ features.T
    near = squares < 1e-6  # as far as float32 can tell; the root has no gradient at 0
    return squares.masked_fill(near, 1).sqrt().masked_fill(near, 0)


def hard_pairs(closeness, labels, anchors, kappa):
    """(positives, negatives) of every image, each (indices [B, k], which of them are pairs, bool [B, k]).

    Positives are the kappa least close of its class, without itself, negatives the kappa closest of the other
    classes; all of them where there are fewer. closeness [B, B], in a row that to the image, or its class;
    labels [B]; anchors, bool [B]: which images may have pairs. Classes of one image have none.
    """
    closeness, own = closeness.detach(), labels[:, None] == labels
    k = min(kappa, len(labels))
    low, positives = closeness.masked_fill(~own, math.inf).topk(k, largest=False)
    high, negatives = closeness.masked_fill(own, -math.inf).topk(k)
    itself = positives == torch.arange(len(labels), device=labels.device)[:, None]
    anchors = (anchors & (own.sum(1) > 1))[:, None]
    return (positives, anchors & low.isfinite() & ~itself), (negatives, anchors & high.isfinite())


def distances(closeness, positives, negatives, level):
    """(d(a, +), d(a, -)) at the indices of hard_pairs, [B, k] each; at class level the second is signed."""
    positive, negative = closeness.gather(1, positives), closeness.gather(1, negatives)
    if level == "instance":
        return -positive, -negative
    anchor = closeness.diagonal()[:, None]
    return (anchor - positive).abs(), anchor - negative


def mean_of(values, which, dim=None):
    """Mean of `values` over those that are in `which`, 0 where none is."""
    return values.masked_fill(~which, 0).sum(dim) / which.sum().clamp(min=1)


def relative(positive, negative, is_positive, is_negative, margin):
    """Mean of max(0, margin + d(a, +) - d(a, -)) over all triplets.

    Here and below: distances [B, k], and which of them are pairs, bool [B, k].
    """
    losses = F.relu(margin + positive[:, :, None] - negative[:, None])
    return mean_of(losses, is_positive[:, :, None] & is_negative[:, None])


def absolute(positive, negative, is_positive, is_negative, margin):
    """Half of: mean of d(a, +)^2 and mean of max(0, margin - d(a, -))^2 over all pairs, added."""
    apart = F.relu(margin - negative)
    return (mean_of(positive.square(), is_positive) + mean_of(apart.square(), is_negative)) / 2


def histogram(values, which, nodes):
    """Share of the values [B, k] at each of the equidistant nodes [T]; what is in between goes to both."""
    spacing = (nodes[-1] - nodes[0]) / (len(nodes) - 1)
    shares = F.relu(1 - (values[:, :, None] - nodes).abs() / spacing)
    return mean_of(shares, which[:, :, None], dim=(0, 1))


def distribution(positive, negative, is_positive, is_negative, nodes):
    """Probability that the distance of a positive pair is at least that of a negative one, by histograms."""
    below = histogram(negative, is_negative, nodes).cumsum(0)
    return (histogram(positive, is_positive, nodes) * below).sum()


def rectification(scores, labels, num_classes, args):
    """(L_crl, number of triplets) of the whole batch, (0, 0) where it has no pair.

    scores: softmax [B, K], at instance level features [B, D]; labels [B].
    """
    by_class = args.level == "class"
    if by_class:
        closeness = scores[:, labels].T
    else:  # an image is closest to itself, closer than to one with the same features
        itself = torch.eye(len(labels), dtype=scores.dtype, device=labels.device)
        closeness = itself - feature_distances(F.normalize(scores, dim=1))
    anchors = minority(labels, num_classes, args.rho)[labels]
    (positives, is_positive), (negatives, is_negative) = hard_pairs(closeness, labels, anchors, args.kappa)
    pairs = *distances(closeness, positives, negatives, args.level), is_positive, is_negative
    triplets = (is_positive.sum(1) * is_negative.sum(1)).sum()
    if args.form == "distribution":
        ends = (-1, 1) if by_class else (0, 2)  # of the distances
        nodes = torch.linspace(*ends, 101, dtype=scores.dtype, device=scores.device)
        return distribution(*pairs, nodes), triplets
    margin = args.margin
    if margin is None:
        margin = 0.5 if by_class or args.form == "absolute" else 2 * math.pi / num_classes
    return (relative if args.form == "relative" else absolute)(*pairs, margin), triplets


def total(ce, crl, triplets, alpha):
    """alpha L_crl + (1 - alpha) cross-entropy; cross-entropy alone where there is no triplet."""
    return torch.where(triplets > 0, alpha * crl + (1 - alpha) * ce, ce)


def whole_batch(accelerator, rows):
    """`rows` [b, ...] of all processes [B, ...], in their order. The gradient goes to one's own."""
    if accelerator.num_processes == 1:
        return rows
    first, whole = accelerator.process_index * len(rows), accelerator.gather(rows.detach())
    whole[first : first + len(rows)] = rows
    if rows.requires_grad:  # gradients are averaged over processes, but each has only a part of this one
        whole.register_hook(lambda gradient: accelerator.num_processes * gradient)
    return whole


class WithFeatures(nn.Module):
    """A network that trains with (logits [B, K], features [B, D]) and predicts with logits."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        features = self.network.features(images)
        logits = self.network.classifier(features)
        return (logits, features) if self.training else logits


def find_alpha(class_counts, args):
    """alpha by the imbalance of the training set, or as given; refuses one beyond 1."""
    omega = imbalance(class_counts)
    alpha = args.eta * omega if args.alpha is None else args.alpha
    if alpha > 1:
        most = math.floor(1e4 / omega) / 1e4
        cli.fail(f"--eta {args.eta:g}: alpha would be {alpha:.3g}, beyond 1; use at most {most}")
    cli.say(f"{omega:.2f} % of the images would have to move for equal classes; alpha {alpha:.4f}")
    if alpha == 0 and args.alpha is None:
        cli.say("note: all classes are equal, so this is plain cross-entropy; --alpha sets a share of L_crl")
    return alpha


def learning_rate(epoch, args):
    """Learning rate of the 0-based `epoch`: linear warm-up, then times lr_factor at each of lr_steps."""
    warm = min(1.0, (epoch + 1) / max(args.warmup, 1))
    return args.lr * warm * args.lr_factor ** sum(epoch >= step for step in args.lr_steps)


def train_one_epoch(run, model, loader, optimizer, num_classes, alpha, epoch, args):
    """Records the loss and, once L_crl is part of it, both parts and the number of triplets."""
    model.train()
    accelerator = run.accelerator
    for images, labels in run.steps(loader):
        outputs = model(images)  # float32, whatever the precision
        logits, scores = outputs if args.level == "instance" else (outputs, outputs.softmax(1))
        loss, parts = F.cross_entropy(logits, labels), {}
        if alpha > 0 and epoch >= args.crl_epoch:
            batch = whole_batch(accelerator, scores), whole_batch(accelerator, labels)
            crl, triplets = rectification(*batch, num_classes, args)
            parts = {"ce": loss, "crl": crl, "triplets": triplets}
            loss = total(loss, crl, triplets, alpha)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        run.record(loss=loss, **parts)


def main(args: Args) -> dict:
    config = DataLoaderConfiguration(split_batches=True, non_blocking=True)
    accelerator = Accelerator(dataloader_config=config)
    run = runs.start(accelerator, args)
    train_set, test_set = datasets.load(args)
    run.set_data(train_set, test_set)
    alpha = find_alpha(train_set.class_counts, args)
    options = datasets.loader_options(train_set)
    sampler = datasets.EpochSampler(train_set, args.seed)
    train_loader = DataLoader(train_set, args.batch_size, sampler=sampler, drop_last=True, **options)
    test_loader = DataLoader(test_set, args.batch_size, **options)
    model = models.build(args.arch, train_set.num_classes, args.seed, train_set.shape)
    if args.level == "instance":
        model = WithFeatures(model)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=args.wd)
    model, optimizer = accelerator.prepare(model, optimizer)
    train_loader, test_loader = accelerator.prepare(train_loader, test_loader)
    for epoch in run.track(range(args.epochs), model=model, optimizer=optimizer):
        run.begin_epoch(epoch, train_loader)
        optimizer.param_groups[0]["lr"] = learning_rate(epoch, args)
        train_one_epoch(run, model, train_loader, optimizer, train_set.num_classes, alpha, epoch, args)
        accuracy = evaluation.per_split(accelerator, model, test_loader, train_set.class_counts, args)
        run.end_epoch(epoch, accuracy)
    return run.finish(alpha=alpha)


if __name__ == "__main__":
    main(cli.parse(Args, RECIPES, __doc__))
