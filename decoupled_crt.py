"""Decoupled training: a representation, then a balanced classifier (cRT, LWS, tau-normalised, NCM, LAS).

Paper:    B. Kang, S. Xie, M. Rohrbach, Z. Yan, A. Gordo, J. Feng, Y. Kalantidis, "Decoupling Representation
          and Classifier for Long-Tailed Recognition", ICLR 2020, arXiv:1910.09217.
Method:   1. train network and classifier; class j is drawn with p_j ~ n_j^q      Eq. (1): sampling_order
          2. freeze the network and balance the classifier                      Sec. 4: balance_classifier
             crt: train a new one; lws: train one scale per class; both on classes drawn evenly
             tau: divide each class's weights by their norm^tau                             tau_normalized
             ncm: take the class whose mean feature is nearest                                 NearestMean
             las: lws with label-aware smoothing (MiSLAS, Zhong et al., CVPR 2021)           smoothed_loss
          --classifier joint is stage 1 alone; with --sampling class it is re-sampling throughout (CB-RS).
Differs:  tau is given, or chosen on training images held out from both stages. As in the code: 4 images of a
          class in a row, BatchNorm statistics move in stage 2. More in docs/decoupled_crt.md.
Expected: imagenet_lt, ResNet-50: joint 41.6, cRT 47.3, tau 46.7, LWS 47.7, NCM 44.3.
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

# Settings of the paper (ImageNet-LT, iNaturalist), of the Bag of Tricks for stage 2 on CIFAR, and ours.
# fmt: off
CIFAR = dict(arch="resnet32", epochs=200, lr_steps=(160, 180), lr_factor=0.01, warmup=5, wd=2e-4, in_a_row=1,
             stage2_epochs=30, stage2_wd=5e-4)
LARGE = dict(arch="resnet50", imbalance=None, epochs=90, batch_size=512, lr=0.2, wd=5e-4, cosine=True,
             stage2_lr=0.2, stage2_wd=5e-4)
RECIPES = {
    "cifar10_lt": CIFAR,
    "cifar100_lt": CIFAR,
    "imagenet_lt": dict(LARGE, augment="jitter"),
    "inat2018": dict(LARGE, wd=1e-4, stage2_wd=1e-4, stage2_epochs=30, splits=(100, 21)),
    "image_folder": dict(recipes.FILES, stage2_wd=2e-4),
    "image_list": dict(recipes.FILES, stage2_wd=2e-4),
    "synthetic": dict(recipes.SYNTHETIC, stage2_wd=5e-4, bn_train=False),
}
# fmt: on


@dataclass
class Args(cli.Args):
    classifier: str = cli.option(
        "crt", "what becomes of the classifier", choices=("joint", "crt", "lws", "tau", "ncm", "las")
    )
    stage1: str | None = cli.option(None, "folder of a finished run whose network is taken for stage 1")
    sampling: str = cli.option(
        "instance", "of stage 1", choices=("instance", "square-root", "class", "progressive")
    )
    in_a_row: int = cli.option(4, "images of a class in a row in class-balanced sampling", least=1)
    mixup: float = cli.option(0.0, "mixup in stage 1, lambda ~ Beta(mixup, mixup); 0: none", least=0)
    stage2_epochs: int = cli.option(10, "epochs of stage 2", least=1)
    stage2_lr: float = cli.option(0.1, "its learning rate, along a cosine", above=0)
    stage2_wd: float = cli.option(0.0, "its weight decay", least=0)
    bn_train: bool = cli.option(True, "BatchNorm statistics move in stage 2")
    tau: float | None = cli.option(None, "tau (default: the best of 0, 0.1 .. 2 on held-out images)", least=0)
    held_out: int = cli.option(0, "training images per class to choose tau on", least=0)
    las_head: float = cli.option(0.4, "smoothing of the largest class", least=0, most=1)
    las_tail: float = cli.option(0.1, "smoothing of the smallest class", least=0, most=1)


def class_probabilities(class_counts, sampling, progress=0.0):
    """p_j ~ n_j^q, the probability of each class [K], Eq. (1); progressive: Eq. (2), of a progress 0..1."""
    n = class_counts.double()
    if sampling == "progressive":
        return (1 - progress) * n / n.sum() + progress / len(n)
    powers = n.pow({"instance": 1.0, "square-root": 0.5, "class": 0.0}[sampling])
    return powers / powers.sum()


def sampling_order(train_set, sampling, args):
    """The order of an epoch's images, for EpochSampler."""
    if sampling == "instance":
        return None
    if sampling == "class" and args.in_a_row > 1:
        return datasets.class_aware(train_set, args.in_a_row)

    def order(generator, epoch):
        p = class_probabilities(train_set.class_counts, sampling, epoch / max(args.epochs - 1, 1))
        return datasets.draw((p / train_set.class_counts)[train_set.labels], len(train_set), generator)

    return order


def tau_normalized(weight, tau):
    """Each row of weight [K, D] over its Euclidean norm to the power of tau. The bias is dropped."""
    return weight / weight.norm(dim=1, keepdim=True).pow(tau)


def best_tau(features, labels, weight, num_classes):
    """tau with the best accuracy, averaged over classes; of equals the nearest to 1. features [N, D]."""

    def accuracy(tau):
        right = (features @ tau_normalized(weight, tau).T).argmax(1) == labels
        sums = torch.zeros(num_classes).index_add_(0, labels, right.float())
        counts = torch.bincount(labels, minlength=num_classes)
        return (sums / counts)[counts > 0].mean().item()

    return max((i / 10 for i in range(21)), key=lambda tau: (accuracy(tau), -abs(tau - 1)))


class NearestMean(nn.Module):
    """NCM: minus the squared distance to each class's mean of centred, normalised features, [B, K]."""

    def __init__(self, features, labels, num_classes):
        super().__init__()
        self.register_buffer("centre", features.mean(0))
        sums = (
            torch.zeros(num_classes, features.shape[1])
            .to(features)
            .index_add_(0, labels, self.transform(features))
        )
        self.register_buffer("means", sums / torch.bincount(labels, minlength=num_classes)[:, None])

    def transform(self, features):
        return F.normalize(features - self.centre, dim=1)

    def forward(self, features):
        return -torch.cdist(self.transform(features), self.means).square()


class ScaledClassifier(nn.Module):
    """LWS: scale * (W x + b), a learned scale per class [K], at first 1."""

    def __init__(self, linear):
        super().__init__()
        self.linear, self.scale = linear, nn.Parameter(torch.ones_like(linear.bias))

    def forward(self, features):
        return self.scale * self.linear(features)


def smoothing(class_counts, head, tail):
    """LAS: smoothing of each class [K], `head` of the largest, `tail` of the smallest, a sine between."""
    n = class_counts.double()
    share = (n - n.min()) / (n.max() - n.min()).clamp(min=1)
    return (tail + (head - tail) * torch.sin(math.pi / 2 * share)).float()


def smoothed_loss(logits, labels, eps):
    """(1 - eps_y) (-log p_y) + eps_y mean_k(-log p_k), mean over the batch. eps [K]: 0 is cross-entropy."""
    eps, log_p = eps[labels], logits.log_softmax(1)
    return (-(1 - eps) * log_p.gather(1, labels[:, None])[:, 0] - eps * log_p.mean(1)).mean()


@torch.no_grad()
def extract(accelerator, network, dataset, args):
    """(features [N, D], labels [N]) of all images without augmentation, the same on all processes."""
    network.eval()
    loader = accelerator.prepare(datasets.test_loader(dataset.plain(), args))
    parts = [accelerator.gather_for_metrics((network.features(x).float(), y)) for x, y in loader]
    return [torch.cat(part) for part in zip(*parts, strict=True)]


def balance_classifier(accelerator, network, train_set, held_out, args):
    """Freeze the network and replace its classifier. Facts for the log."""
    network.requires_grad_(False)
    old, facts = network.classifier, {}
    torch.manual_seed(args.seed)
    if args.classifier == "crt":
        network.classifier = nn.Linear(old.in_features, old.out_features)
    elif args.classifier == "lws":
        network.classifier = ScaledClassifier(old)
    elif args.classifier == "las":
        network.classifier = ScaledClassifier(old.requires_grad_(True))
    elif args.classifier == "ncm":
        features, labels = extract(accelerator, network, train_set, args)
        network.classifier = NearestMean(features, labels, train_set.num_classes)
    else:
        tau = args.tau
        if tau is None:
            tau = best_tau(*extract(accelerator, network, held_out, args), old.weight, train_set.num_classes)
        network.classifier = nn.Linear(old.in_features, old.out_features, bias=False)
        network.classifier.weight.data = tau_normalized(old.weight.data, tau)
        facts = {"tau": tau}
    network.classifier.to(accelerator.device)
    return facts


def stage2_learning_rate(epoch, args):
    """Learning rate of the 0-based `epoch` of stage 2: a cosine."""
    return args.stage2_lr * 0.5 * (1 + math.cos(math.pi * epoch / args.stage2_epochs))


def train_one_epoch(run, model, loader, optimizer, eps, mixup, bn_train):
    model.train()
    if not bn_train:
        run.unwrap(model).eval()
    for images, labels in run.steps(loader):
        if mixup:
            lam = run.rng.beta(mixup, mixup)
            order = torch.randperm(len(labels), device=labels.device)
            logits = model(lam * images + (1 - lam) * images[order])
            loss = lam * smoothed_loss(logits, labels, eps) + (1 - lam) * smoothed_loss(
                logits, labels[order], eps
            )
        else:
            loss = smoothed_loss(model(images), labels, eps)
        optimizer.zero_grad()
        run.accelerator.backward(loss)
        optimizer.step()
        run.log(loss=loss)


def main(args: Args) -> dict:
    config = DataLoaderConfiguration(split_batches=True)
    accelerator = Accelerator(dataloader_config=config, log_with=args.log_with)
    run = Run(accelerator, args)
    train_set, test_set = datasets.load(args)
    run.set_data(train_set, test_set)
    class_counts, held_out = train_set.class_counts, None
    if args.held_out:
        train_set, held_out = datasets.hold_out(train_set, args.held_out)
    test_loader = accelerator.prepare(datasets.test_loader(test_set, args))
    network = models.build(args.arch, train_set, args.seed).to(accelerator.device)
    no_smoothing = torch.zeros(len(class_counts), device=accelerator.device)

    def train(epochs, order, lr_at, wd, eps=no_smoothing, mixup=0.0, bn_train=True):
        """Train what is not frozen. lr_at: learning rate of the stage's 0-based epoch."""
        loader = datasets.train_loader(train_set, args, order=order, stream=epochs.start)
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(trained, args.lr, momentum=0.9, weight_decay=wd)
        model, optimizer, loader = accelerator.prepare(network, optimizer, loader)
        for epoch in run.epochs(epochs, model=model, optimizer=optimizer):
            loader.set_epoch(epoch)
            optimizer.param_groups[0]["lr"] = lr_at(epoch - epochs.start)
            train_one_epoch(run, model, loader, optimizer, eps, mixup, bn_train)
            run.end_epoch(epoch, evaluation.per_split(run, model, test_loader))
        accelerator.free_memory()  # the next stage prepares the network anew, for its own part to be trained

    # Stage 1: representation
    if args.stage1:
        models.load_weights(args.stage1, network)
    else:
        order = sampling_order(train_set, args.sampling, args)
        train(
            range(args.epochs),
            order,
            lambda epoch: recipes.learning_rate(epoch, args),
            args.wd,
            mixup=args.mixup,
        )
    if args.classifier == "joint":
        return run.finish()

    # Stage 2: classifier
    facts = balance_classifier(accelerator, network, train_set, held_out, args)
    if args.classifier in ("tau", "ncm"):  # nothing to train
        for epoch in run.epochs(range(args.epochs, args.epochs + 1), model=network):
            run.end_epoch(epoch, evaluation.per_split(run, network, test_loader), **facts)
        return run.finish()
    eps = no_smoothing
    if args.classifier == "las":
        eps = smoothing(class_counts, args.las_head, args.las_tail).to(accelerator.device)
    epochs = range(args.epochs, args.epochs + args.stage2_epochs)
    order = sampling_order(train_set, "class", args)
    train(
        epochs,
        order,
        lambda epoch: stage2_learning_rate(epoch, args),
        args.stage2_wd,
        eps,
        bn_train=args.bn_train,
    )
    return run.finish()


if __name__ == "__main__":
    cli.run(main, Args, RECIPES, __doc__)
