"""Decoupled training: a representation, then a balanced classifier (cRT, LWS, tau-normalised, NCM, LAS).

Paper:    B. Kang, S. Xie, M. Rohrbach, Z. Yan, A. Gordo, J. Feng, Y. Kalantidis, "Decoupling Representation
          and Classifier for Long-Tailed Recognition", ICLR 2020, arXiv:1910.09217.
Method:   1. train network and classifier; class j is drawn with p_j ~ n_j^q    Eqs. (1), (2): sampling_order
          2. freeze the network and balance the classifier                           Sec. 4: new_classifier
             crt: train a new one; lws: train a scale per class; both on classes drawn evenly
             tau: divide each class's weights by their norm^tau                              tau_normalized
             ncm: take the class whose mean feature is nearest                                  NearestMean
             las: train scales and weights on smoothed labels (MiSLAS, CVPR 2021)           smoothed_losses
          --classifier joint is stage 1 alone; with --sampling class it is re-sampling throughout (CB-RS).
Differs:  as in the released code, 4 images of a class come in a row and BatchNorm statistics move in stage 2.
          tau is chosen on held-out training images. docs/decoupled_crt.md has the rest, and all commands.
Expected: imagenet_lt, ResNet-50: joint 41.6, cRT 47.3, tau 46.7, LWS 47.7, NCM 44.3 (paper).
Run:      accelerate launch decoupled_crt.py --dataset cifar100_lt --classifier crt
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator, DataLoaderConfiguration
from torch import nn

from common import cli, datasets, evaluation, models, recipes
from common.runs import Run

# Settings of the paper, of the Bag of Tricks (stage 2 on CIFAR), of MiSLAS, of CSA's study, and ours.
# fmt: off
CIFAR = dict(recipes.CIFAR, in_a_row=False, schedule="steps", stage2_epochs=30)
MISLAS = dict(recipes.CIFAR, classifier="las", lr_factor=0.1, mixup=1.0, stage2_wd=2e-4)
LARGE = dict(arch="resnet50", imbalance=None, epochs=90, batch_size=512, lr=0.2, wd=5e-4, cosine=True,
             schedule="to-zero", stage2_lr=0.2, las=(0.3, 0.0, 0.05))
INAT = dict(LARGE, wd=1e-4, stage2_wd=1e-4, stage2_epochs=30, splits=(100, 21))
MNIST = dict(recipes.MNIST, stage2_epochs=4, stage2_lr=0.01, stage2_wd=0.0)
STUDY = dict(classifier="tune", arch="lenet", epochs=8, momentum=0.0, cosine=True, schedule="study",
             stage2_epochs=4, stage2_wd=0.0, splits=(1500, 200))
RECIPES = {
    **recipes.OWN,
    "synthetic": dict(recipes.SYNTHETIC, bn_train=False),
    "cifar10_lt": CIFAR, "cifar10_lt mislas": dict(MISLAS, las=(0.3, 0.0, 0.5), bn_train=False),
    "cifar100_lt": CIFAR, "cifar100_lt mislas": MISLAS,
    "imagenet_lt": dict(LARGE, augment="jitter"),
    "places_lt": dict(LARGE, arch="resnet152", pretrained=True, last_block_lr=0.01, epochs=30,
                      batch_size=256, lr=0.1, stage2_lr=0.1, augment="jitter"),
    "inat2018": INAT,
    "inat2018 mislas": dict(INAT, classifier="las", epochs=200, batch_size=256, lr=0.1, mixup=0.2,
                            schedule="cosine", stage2_epochs=10, stage2_lr=0.1),
    "mnist_lt": MNIST, "mnist_lt study": STUDY,
    "fashion_mnist_lt": MNIST, "fashion_mnist_lt study": STUDY,
    "cmnist_lt": MNIST, "cmnist_lt study": STUDY,
}
# fmt: on
CLASSIFIERS = ("joint", "crt", "tune", "lws", "las", "tau", "ncm")
SAMPLINGS = ("instance", "square-root", "class", "progressive")


@dataclass
class Args(cli.Args):
    classifier: str = cli.option("crt", "of stage 2; tune: that of stage 1 goes on", choices=CLASSIFIERS)
    stage1: str | None = cli.option(None, "folder of a finished run whose network is taken for stage 1")
    sampling: str = cli.option("instance", "how stage 1 draws images", choices=SAMPLINGS)
    in_a_row: bool = cli.option(True, "class-balanced sampling takes 4 images of a class in a row")
    mixup: float = cli.option(0.0, "mixup in stage 1, lambda ~ Beta(mixup, mixup); 0: none", least=0)
    momentum: float = cli.option(0.9, "momentum of both stages", least=0)
    last_block_lr: float | None = cli.option(None, "rate of the last block; what is below is frozen", above=0)
    stage2_epochs: int = cli.option(10, "epochs of stage 2", least=1)
    stage2_lr: float = cli.option(0.1, "its learning rate", above=0)
    schedule: str = cli.option("cosine", "how it falls", choices=("cosine", "to-zero", "steps", "study"))
    stage2_wd: float = cli.option(5e-4, "its weight decay", least=0)
    bn_train: bool = cli.option(True, "BatchNorm statistics move in stage 2")
    tau: float | None = cli.option(None, "tau (default: the best of 0, 0.1 .. 2 on held-out images)", least=0)
    held_out: int = cli.option(0, "training images per class to choose tau on", least=0)
    las: tuple[float, ...] = cli.option((0.4, 0.1, 0.2), "smoothing of head and tail, factor on W's rate")

    def __post_init__(self):
        super().__post_init__()
        if self.schedule == "to-zero" and 1 in (self.epochs, self.stage2_epochs):
            raise cli.Refused("--schedule to-zero: the one epoch of a stage would have rate 0; use cosine")


def class_probabilities(class_counts, sampling, progress=0.0):
    """p_j ~ n_j^q, the probability of each class [K], Eq. (1); progressive: Eq. (2), of a progress 0..1."""
    n = class_counts.double()
    if sampling == "progressive":
        return (1 - progress) * n / n.sum() + progress / len(n)
    powers = n.pow({"instance": 1.0, "square-root": 0.5, "class": 0.0}[sampling])
    return powers / powers.sum()


def sampling_order(train_set, sampling, size, args):
    """The order of an epoch's images, in which class j is drawn with probability p_j."""
    if sampling == "class" and args.in_a_row:
        return datasets.class_aware(train_set, size=size)

    def order(generator, epoch):
        p = class_probabilities(train_set.class_counts, sampling, epoch / max(args.epochs - 1, 1))
        return datasets.draw((p / train_set.class_counts)[train_set.labels], size, generator)

    return order


def tau_normalized(weight, tau):
    """Each row of weight [K, D] over its Euclidean norm to the power of tau. The bias is dropped."""
    return weight / weight.norm(dim=1, keepdim=True).pow(tau)


def best_tau(features, labels, weight):
    """tau with the best accuracy, averaged over the classes with images; of several the nearest to 1."""
    counts = labels.bincount(minlength=len(weight))
    accuracies = {}
    for i in sorted(range(21), key=lambda i: abs(i - 10)):
        correct = (features @ tau_normalized(weight, i / 10).T).argmax(1) == labels
        hits = labels[correct].bincount(minlength=len(weight))
        accuracies[i / 10] = (hits / counts).nanmean().item()
    return max(accuracies, key=accuracies.get)


class NearestMean(nn.Module):
    """NCM: minus the squared distance to each class's mean of centred, normalised features, [B, K]."""

    def __init__(self, width, num_classes):
        super().__init__()
        self.register_buffer("centre", torch.zeros(width))
        self.register_buffer("means", torch.zeros(num_classes, width))

    def fit(self, features, labels):
        self.centre.copy_(features.mean(0))
        normalized = F.normalize(features - self.centre, dim=1)
        sums = torch.zeros_like(self.means).index_add_(0, labels, normalized)
        self.means.copy_(sums / labels.bincount(minlength=len(sums))[:, None])

    def forward(self, features):
        return -torch.cdist(F.normalize(features - self.centre, dim=1), self.means).square()


class Scales(nn.Module):
    """LWS: a learned factor on the logits of each class, at first 1."""

    def __init__(self, num_classes):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(num_classes))

    def forward(self, logits):
        return self.scale * logits


def smoothing(class_counts, head, tail):
    """LAS: eps_k of each class [K], `head` of the largest, `tail` of the smallest, a sine between."""
    n = class_counts.double()
    share = (n - n.min()) / (n.max() - n.min()).clamp(min=1)
    return (tail + (head - tail) * torch.sin(math.pi / 2 * share)).float()


def smoothed_losses(logits, labels, eps):
    """LAS: (1 - eps_y) (-log p_y) + eps_y mean_k(-log p_k) of each image [B]. eps [K]; 0: cross-entropy."""
    losses = F.cross_entropy(logits, labels, reduction="none")
    return (1 - eps[labels]) * losses - eps[labels] * logits.log_softmax(1).mean(1)


def new_classifier(old, args):
    """What takes the place of stage 1's linear classifier `old`."""
    if args.classifier in ("joint", "tune"):
        return old
    if args.classifier in ("lws", "las"):
        return nn.Sequential(old, Scales(old.out_features))
    if args.classifier == "ncm":
        return NearestMean(old.in_features, old.out_features)
    return nn.Linear(old.in_features, old.out_features, bias=args.classifier == "crt")


def make_model(dataset, args):
    network = models.build(args.arch, dataset, args.seed)
    network.classifier = new_classifier(network.classifier, args)
    return network


def learning_rate(epoch, args):
    """Learning rate of the 0-based `epoch`. Stage 2 begins at args.epochs."""
    ahead = 1 if args.schedule == "to-zero" else 0  # of the released code
    if epoch < args.epochs:
        return recipes.learning_rate(epoch + ahead if args.cosine else epoch, args)
    number = epoch - args.epochs
    if args.schedule == "steps":  # of the Bag of Tricks, with 30 epochs
        warm = 1 / 3 + 2 / 3 * min(6 * (number + 1) / args.stage2_epochs, 1.0)
        return args.stage2_lr * warm * 0.1 ** min(3 * (number + 1) // args.stage2_epochs, 2)
    length = 2 * args.stage2_epochs if args.schedule == "study" else args.stage2_epochs
    return args.stage2_lr * 0.5 * (1 + math.cos(math.pi * (number + ahead) / length))


@torch.no_grad()
def extract(accelerator, network, dataset, args):
    """(features [N, D], labels [N]) of all images without augmentation, the same on all processes."""
    network.eval()
    loader = accelerator.prepare(datasets.test_loader(dataset.plain(), args))
    parts = [accelerator.gather_for_metrics((network.features(x).float(), y)) for x, y in loader]
    return [torch.cat(part) for part in zip(*parts, strict=True)]


def train_one_epoch(run, model, loader, optimizer, eps, epoch, args):
    is_stage2 = epoch >= args.epochs
    model.train(args.bn_train or not is_stage2)
    for images, labels in run.steps(loader):
        if args.mixup and not is_stage2:
            share = run.rng.beta(args.mixup, args.mixup)
            order = torch.randperm(len(labels), device=labels.device)
            z = model(share * images + (1 - share) * images[order])
            loss = share * F.cross_entropy(z, labels) + (1 - share) * F.cross_entropy(z, labels[order])
        elif is_stage2 and args.classifier == "las":
            loss = smoothed_losses(model(images), labels, eps).mean()
        else:
            loss = F.cross_entropy(model(images), labels)
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
    train_set, held_out = datasets.hold_out(train_set, args.held_out)
    if args.classifier == "tau" and args.tau is None and not held_out:
        raise cli.Refused(f"--held-out {args.held_out}: leaves no image to choose tau on; use 10, or --tau 1")
    test_loader = accelerator.prepare(datasets.test_loader(test_set, args))
    network = models.build(args.arch, train_set, args.seed, pretrained=args.pretrained).to(accelerator.device)
    eps = smoothing(train_set.class_counts, *args.las[:2]).to(accelerator.device)

    def train(epochs, sampling, wd, parts):
        """Train parts of the network, {module: factor on the learning rate}; the rest is frozen."""
        size = len(train_set)
        if args.schedule == "study" and sampling == "class":  # all classes as large as the largest
            size = train_set.num_classes * train_set.class_counts.max().item()
        order = None if sampling == "instance" else sampling_order(train_set, sampling, size, args)
        loader = datasets.train_loader(train_set, args, order=order, size=size)
        network.requires_grad_(False)
        groups = []
        for part, factor in parts.items():
            groups.append(dict(params=part.requires_grad_(True).parameters(), factor=factor))
        nesterov = args.momentum > 0 and (args.schedule == "steps" if epochs.start else args.nesterov)
        optimizer = torch.optim.SGD(groups, args.lr, args.momentum, weight_decay=wd, nesterov=nesterov)
        model, optimizer, loader = accelerator.prepare(network, optimizer, loader)
        for epoch in run.epochs(epochs, model=model, optimizer=optimizer):
            loader.set_epoch(epoch)
            for group in optimizer.param_groups:
                group["lr"] = group["factor"] * learning_rate(epoch, args)
            train_one_epoch(run, model, loader, optimizer, eps, epoch, args)
            run.end_epoch(epoch, evaluation.per_split(run, model, test_loader))
        accelerator.free_memory()  # the next stage prepares the network anew, for its own part to be trained

    # Stage 1: representation
    parts = {network: 1.0}
    if args.last_block_lr:
        _, block = models.split_last_block(network)
        parts = {network.classifier: 1.0, block: args.last_block_lr / args.lr}
    if not args.stage1:
        train(range(args.epochs), args.sampling, args.wd, parts)
    elif not run.checkpoint:  # which has the network
        models.load_weights(args.stage1, network, train_set.class_names)

    # Stage 2: classifier
    old = network.classifier
    torch.manual_seed(args.seed)  # the same new classifier also in a resumed run
    network.classifier = new_classifier(old, args).to(accelerator.device)
    parts = {network.classifier: 1.0}
    if args.classifier in ("lws", "las"):
        parts = {network.classifier[1]: 1.0}
    if args.classifier == "las":
        parts[old] = args.las[2]
    if args.classifier in ("crt", "tune", "lws", "las"):
        train(range(args.epochs, args.epochs + args.stage2_epochs), "class", args.stage2_wd, parts)
    elif args.classifier != "joint" or args.stage1:  # nothing to train
        tau = args.tau
        for epoch in run.epochs(range(args.epochs, args.epochs + 1), model=network):
            if args.classifier == "ncm":
                network.classifier.fit(*extract(accelerator, network, train_set, args))
            if args.classifier == "tau":
                if tau is None:
                    tau = best_tau(*extract(accelerator, network, held_out, args), old.weight)
                network.classifier.weight.data = tau_normalized(old.weight.data, tau)
            run.end_epoch(epoch, evaluation.per_split(run, network, test_loader), tau=tau)
    return run.finish()


if __name__ == "__main__":
    cli.run(main, Args, RECIPES, __doc__)
