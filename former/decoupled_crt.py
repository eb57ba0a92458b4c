"""Decoupled training: first a representation, then a balanced classifier (cRT, LWS, tau-normalisation, NCM).

Paper:    B. Kang, S. Xie, M. Rohrbach, Z. Yan, A. Gordo, J. Feng, Y. Kalantidis, "Decoupling Representation
          and Classifier for Long-Tailed Recognition", ICLR 2020, arXiv:1910.09217.
Method:   1. train network and classifier; class j is drawn with p_j ~ n_j^q      Eq. (1), class_probabilities
             or with q from 1 to 0 over the epochs                          Eq. (2), progressive_probabilities
          2. freeze the network and balance the classifier                             Sec. 4, new_classifier
             cRT: train a new one; LWS: train one scale per class          classes drawn evenly, make_sampler
             tau: divide each class's weights by their norm^tau                              tau_normalized
             NCM: take the class whose mean feature is nearest                                  NearestMean
          --classifier joint is stage 1 alone: cross-entropy or, with --sampling class, re-sampling for the
          whole training (CB-RS). --mixup-alpha in stage 1 gives cRT+mixup and LWS+mixup.
Differs:  tau is chosen on training images held out from both stages, never on test images, so that classes of
          less than 20 images have no say, and of equal accuracies the tau nearest to 1 is taken; the authors
          use a validation set, on iNaturalist the test set. Class-balanced sampling begins a new round each
          epoch. As in the code, not the paper: 4 images of a class in a row, BatchNorm statistics that move
          in stage 2 (not in our synthetic recipe, see README), LWS for 5 epochs, cRT on
          iNaturalist for 30. Places-LT follows the authors' answers to questions, from torchvision's
          weights. For CIFAR the authors have no setting: stage 1 is LDAM's, stage 2 that of the Bag of
          Tricks, but for its warm-up, linear from lr / 5. With mixup use --lr-factor 0.1, as those rows do.
          MNIST-style recipes are of CSA's re-sampling study: cRT goes on from stage 1's classifier for 4
          epochs of a cosine over 8, a class-balanced epoch has K times the images of the largest class, the
          groups are classes 0-2, 3-6, 7-9.
          An incomplete last batch is dropped; the result is the last epoch.
Expected: imagenet_lt, ResNet-50: joint 41.6 all (64.0 many, 33.8 medium, 5.8 few), cRT 47.3 (58.8, 44.0,
          26.1), tau 46.7, LWS 47.7, NCM 44.3 (paper; users measured 1 to 1.5 less on the test set).
          cifar100_lt, imbalance 100, ResNet-32: cRT 41.6 to 42.3, LWS 42.3, cRT+mixup 45.1 (later papers).
          mnist_lt: joint 65.8, cRT 82.5, CB-RS 90.8 (CSA's study). Ours: see README.
Run:      accelerate launch decoupled_crt.py --dataset cifar100_lt --classifier crt
"""

import dataclasses
import math
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator, DataLoaderConfiguration
from torch import nn
from torch.utils.data import DataLoader

from common import cli, datasets, evaluation, models, runs

# Settings of the paper (ImageNet-LT, iNaturalist), of others (CIFAR, Places-LT, MNIST-style: see Differs) and
# our own (the rest), one row per data set; an option given on the command line wins.
# fmt: off
CIFAR = dict(arch="resnet32", epochs=200, lr_steps=(160, 180), wd=2e-4, samples_per_class=0,
             stage2_epochs=30, stage2_lr_steps=(9, 19), stage2_warmup=5, stage2_wd=5e-4,
             stage2_nesterov=True)
LARGE = dict(arch="resnet50", imbalance=None, epochs=90, batch_size=512, lr=0.2, wd=5e-4, warmup=0,
             cosine=True, stage2_epochs=cli.By(lambda classifier: 5 if classifier == "lws" else 10),
             stage2_lr=0.2, stage2_wd=5e-4, stage2_cosine=True)
MNIST = dict(arch="lenet", epochs=8, momentum=0.0, warmup=0, cosine=True, cosine_start=0, cosine_epochs=8,
             stage2_epochs=4, crt_init="stage1", stage2_cosine=True, bn_train_in_stage2=False,
             full_epochs=True, many_classes=3, few_classes=3)
FILES = dict(LARGE, batch_size=128, lr=0.05, stage2_lr=0.05)
RECIPES = {
    "cifar10_lt": CIFAR,
    "cifar100_lt": CIFAR,
    "imagenet_lt": dict(LARGE, color_jitter=0.4),
    "places_lt": dict(LARGE, arch="resnet152", pretrained=True, last_block=True, epochs=30, batch_size=256,
                      lr=0.1, backbone_lr=0.1, stage2_lr=0.1, color_jitter=0.4),
    "inat2018": dict(LARGE, wd=1e-4, stage2_wd=1e-4, few_under=21,
                     stage2_epochs=cli.By(lambda classifier: 5 if classifier == "lws" else 30)),
    "mnist_lt": MNIST,
    "fashion_mnist_lt": MNIST,
    "cmnist_lt": MNIST,
    "image_folder": FILES,
    "image_list": FILES,
    "synthetic": dict(epochs=40, batch_size=32, lr_steps=(28, 36), wd=5e-4, warmup=2,
                      stage2_epochs=10, stage2_cosine=True, stage2_wd=5e-4, bn_train_in_stage2=False),
}
# fmt: on
Q = {"instance": 1.0, "square-root": 0.5, "class": 0.0}  # of Eq. (1)
TAUS = [round(0.1 * i, 1) for i in range(21)]
# What stage 1 was, of the run that --stage1 names.
TRAINING = ("epochs", "lr", "lr_steps", "lr_factor", "warmup", "wd", "cosine", "sampling")
TRAINING += ("mixup_alpha", "pretrained", "last_block", "backbone_lr")
NCM = dict(classifier=("ncm",))


@dataclass
class Args(cli.Args):
    classifier: str = cli.option(
        "crt",
        "what becomes of the classifier in stage 2; joint: there is no stage 2",
        choices=("joint", "crt", "lws", "tau", "ncm"),
    )
    stage1: str | None = cli.option(None, "folder of a finished run to take for stage 1 (README: Two stages)")
    sampling: str = cli.option("instance", "how stage 1 draws images", choices=(*Q, "progressive"))
    samples_per_class: int = cli.option(
        4, "images of a class in a row in class-balanced sampling; 0 draws each image on its own", least=0
    )
    full_epochs: bool = cli.option(
        False, "class-balanced epochs as long as classes times images of the largest class (MNIST study)"
    )
    mixup_alpha: float = cli.option(0.0, "mixup in stage 1, lambda ~ Beta(alpha, alpha); 0: none", least=0)
    momentum: float = cli.option(0.9, "momentum, of both stages", least=0)
    warmup: int = cli.option(5, "epochs of linear warm-up", least=0)
    lr_factor: float = cli.option(0.01, "factor on the learning rate at each of --lr-steps", above=0)
    cosine: bool = cli.option(False, "cosine schedule instead of --lr-steps")
    cosine_start: int = cli.option(
        1, "1: a cosine is 0 in its last epoch; 0: it is still whole in its first", choices=(0, 1)
    )
    cosine_epochs: int | None = cli.option(None, "length of a cosine, if not its stage's epochs", least=1)
    pretrained: bool = cli.option(False, "start from torchvision's ImageNet weights")
    last_block: bool = cli.option(False, "train only the last residual block and the classifier in stage 1")
    backbone_lr: float = cli.option(1.0, "factor on the learning rate of all but the classifier", above=0)
    stage2_epochs: int = cli.option(10, "epochs of stage 2, of cRT and LWS", least=1)
    crt_init: str = cli.option("new", "classifier that cRT starts from", choices=("new", "stage1"))
    stage2_lr: float = cli.option(0.1, "learning rate of stage 2", above=0)
    stage2_lr_steps: tuple[int, ...] = cli.option((), "epochs of stage 2 at which it falls", least=0)
    stage2_lr_factor: float = cli.option(0.1, "factor on it at each of these", above=0)
    stage2_warmup: int = cli.option(0, "epochs of linear warm-up in stage 2", least=0)
    stage2_cosine: bool = cli.option(False, "cosine schedule in stage 2")
    stage2_wd: float = cli.option(0.0, "weight decay of stage 2", least=0)
    stage2_nesterov: bool = cli.option(False, "Nesterov momentum in stage 2")
    bn_train_in_stage2: bool = cli.option(
        True, "in stage 2 BatchNorm goes by the batch and its statistics move, as in the released code"
    )
    tau: float | None = cli.option(
        None,
        "tau (default: the best of 0, 0.1 .. 2 on held-out images)",
        least=0,
        needs=dict(classifier=("tau",)),
    )
    held_out: int | None = cli.option(
        None,
        "training images to hold out of each class that has at least twice as many, to choose tau on them "
        "(default: that of --stage1, else 10 if tau has to be chosen, else 0)",
        least=0,
    )
    ncm: str = cli.option(
        "cl2n",
        "features that NCM averages: un as they are, l2n normalised, cl2n centred, then normalised",
        choices=("un", "l2n", "cl2n"),
        needs=NCM,
    )
    ncm_score: str = cli.option("euclidean", "NCM's closeness", choices=("euclidean", "dot"), needs=NCM)

    def __post_init__(self):
        super().__post_init__()
        chosen = self.classifier == "tau" and self.tau is None
        if self.held_out is None and not self.stage1:  # else it is that of stage 1
            self.held_out = 10 if chosen else 0
        if chosen and self.held_out == 0:
            cli.fail("--held-out 0: tau is chosen on held-out images; use 10 in stage 1, or give --tau")
        for prefix in ("stage2_",) if self.stage1 else ("", "stage2_"):
            if getattr(self, f"{prefix}cosine") and getattr(self, f"{prefix}lr_steps"):
                flags = cli.flag(f"{prefix}lr_steps"), cli.flag(f"no_{prefix}cosine")
                cli.fail(f"{flags[0]}: have no effect on a cosine; leave them out, or add {flags[1]}")
            length, trains = f"{prefix}epochs", not prefix or self.classifier in ("crt", "lws")
            is_zero = (self.cosine_epochs or getattr(self, length)) <= self.cosine_start
            if getattr(self, f"{prefix}cosine") and trains and is_zero:
                cli.fail(f"{cli.flag(length)} 1: its rate is 0, so nothing would be trained; use more")
        if self.stage2_nesterov and not self.momentum:
            cli.fail("--momentum 0: Nesterov needs momentum; add --no-stage2-nesterov")
        for name in ("stage2_epochs",) if self.stage1 else ("epochs", "stage2_epochs"):
            if self.cosine_epochs and getattr(self, name) > self.cosine_epochs:
                given = f"{cli.flag(name)} {getattr(self, name)}"
                cli.fail(f"{given}: the cosine ends after {self.cosine_epochs}; raise --cosine-epochs, too")
        if self.stage1 and self.classifier == "joint":
            cli.fail(
                "--classifier joint: has no stage 2 to go on with from --stage1; use crt, lws, tau or ncm"
            )


def class_probabilities(class_counts, q):
    """Probability p_j = n_j^q / sum_k n_k^q of drawing each class [K], Eq. (1)."""
    powers = class_counts.double().pow(q)
    return powers / powers.sum()


def progressive_probabilities(class_counts, epoch, epochs):
    """Eq. (2), [K]: instance-balanced (q = 1) in the first epoch (0-based), class-balanced in the last."""
    share = epoch / max(epochs - 1, 1)
    return (1 - share) * class_probabilities(class_counts, 1) + share * class_probabilities(class_counts, 0)


def make_sampler(train_set, stage, args):
    """The sampler of args.sampling. An epoch has N images, with --full-epochs K times the largest class."""
    labels, counts = train_set.labels, train_set.class_counts
    size = len(counts) * int(counts.max()) if args.full_epochs and args.sampling == "class" else len(labels)

    def progressive(size, epoch, generator):
        classes = datasets.draw(progressive_probabilities(counts, epoch, args.epochs), size, generator)
        return datasets.next_images(classes.tolist(), labels, counts, generator)

    def rounds(size, epoch, generator):
        return datasets.class_aware(size, labels, counts, generator, args.samples_per_class)

    how = {"size": size}
    if args.sampling == "progressive":
        how["order"] = progressive
    elif args.sampling == "class" and args.samples_per_class:
        how["order"] = rounds
    elif args.sampling != "instance":  # each image on its own: those of class j share its p_j
        how["weights"] = (class_probabilities(counts, Q[args.sampling]) / counts)[labels]
    return datasets.EpochSampler(train_set, args.seed, stream=stage - 1, **how)


def tau_normalized(weight, tau):
    """Each row of weight [K, D] over its Euclidean norm to the power of tau. The bias is dropped."""
    return weight / weight.norm(dim=1, keepdim=True).pow(tau)


def tau_curve(features, labels, weight, class_counts):
    """Accuracy in percent, averaged over classes, with each of TAUS. features [N, D], labels [N]."""
    curve = []
    for tau in TAUS:
        confidences, top = (features @ tau_normalized(weight, tau).T).softmax(1).topk(1)
        per_class = evaluation.summarize(labels, top, confidences[:, 0], class_counts)["per_class"]
        curve.append(float(np.mean([value for value in per_class if value is not None])))
    return curve


def best_tau(curve):
    """Of TAUS the one with the best accuracy in `curve`; of several the nearest to 1, equal norms."""
    return min((-accuracy, abs(tau - 1), tau) for tau, accuracy in zip(TAUS, curve, strict=True))[2]


class NearestMean(nn.Module):
    """NCM: minus the squared distance to each class mean, or dot product with it / D, [B, D] -> [B, K]."""

    def __init__(self, width, num_classes, variant="cl2n", score="euclidean"):
        super().__init__()
        self.variant, self.score = variant, score
        self.register_buffer("centre", torch.zeros(width))
        self.register_buffer("means", torch.zeros(num_classes, width))

    def transform(self, features):
        if self.variant == "cl2n":
            features = features - self.centre
        return features if self.variant == "un" else F.normalize(features, dim=1)

    def fit(self, features, labels):
        """Set the mean of all features [N, D], and by labels [N] the means of the transformed ones."""
        self.centre.copy_(features.mean(0))
        sums = torch.zeros_like(self.means).index_add_(0, labels, self.transform(features))
        self.means.copy_(sums / torch.bincount(labels, minlength=len(sums))[:, None])

    def forward(self, features):
        features = self.transform(features)
        if self.score == "dot":
            return features @ self.means.T / features.shape[1]
        return -torch.cdist(features, self.means).square()


def new_classifier(network, args):
    """Freeze the network and replace its classifier by the one to be trained; returns the old one."""
    network.requires_grad_(False)
    old = network.classifier
    num_classes, width = old.weight.shape
    torch.manual_seed(args.seed)
    if args.classifier == "crt":
        network.classifier = nn.Linear(width, num_classes)
        if args.crt_init == "stage1":
            network.classifier.load_state_dict(old.state_dict())
    elif args.classifier == "lws":
        network.classifier = models.ScaledClassifier(old)
    elif args.classifier == "tau":
        network.classifier = nn.Linear(width, num_classes, bias=False)
    else:
        network.classifier = NearestMean(width, num_classes, args.ncm, args.ncm_score)
    network.classifier.to(old.weight.device)
    return old


@torch.no_grad()
def extract(accelerator, network, dataset, args):
    """(features [N, D], labels [N]) of all images without augmentation, the same on all processes."""
    loader = DataLoader(dataset, args.batch_size, **datasets.loader_options(dataset))
    network.eval()
    parts = []
    for images, labels in accelerator.prepare(loader):
        parts.append(accelerator.gather_for_metrics((network.features(images).float(), labels)))
    return [torch.cat(part) for part in zip(*parts, strict=True)]


@torch.no_grad()
def fit_classifier(accelerator, network, old, train_set, held_out, args):
    """Set the new classifier by tau-normalisation of the old or by NCM; returns what the log says of tau."""
    if args.classifier == "ncm":
        network.classifier.fit(*extract(accelerator, network, train_set, args))
        return {}
    tau, facts = args.tau, {}
    if tau is None:
        features, labels = (part.cpu() for part in extract(accelerator, network, held_out, args))
        curve = tau_curve(features, labels, old.weight.cpu(), held_out.class_counts)
        tau, facts = best_tau(curve), {"tau_curve": curve}
    network.classifier.weight.copy_(tau_normalized(old.weight, tau))
    return {"tau": tau, **facts}


def make_network(train_set, weights, args):
    """The network of stage 1; already trained where there are weights."""
    shape, pretrained = train_set.shape, args.pretrained and weights is None
    network = models.build(args.arch, train_set.num_classes, args.seed, shape, pretrained=pretrained)
    if args.last_block:
        network.requires_grad_(False)
        models.split_last_block(network)[1].requires_grad_(True)
        network.classifier.requires_grad_(True)
    if weights is not None:
        models.load_weights(network, weights, f"--stage1 {args.stage1}")
    return network


def make_stages(args):
    """(number, options, epochs) of each stage; epochs count on, stage 2's options have stage 1's names."""
    stages = [] if args.stage1 else [(1, args, range(args.epochs))]
    epochs = {"joint": 0, "tau": 1, "ncm": 1}.get(args.classifier, args.stage2_epochs)
    if epochs:
        names = ("lr", "lr_steps", "lr_factor", "warmup", "cosine", "wd")
        own = {name: getattr(args, f"stage2_{name}") for name in names}
        own |= dict(epochs=epochs, sampling="class", mixup_alpha=0.0, backbone_lr=1.0)
        settings = SimpleNamespace(**{**vars(args), **own})
        stages.append((2, settings, range(args.epochs, args.epochs + epochs)))
    return stages


def make_optimizer(network, stage, args):
    """SGD on what is not frozen; "factor" of a group is that on its learning rate."""
    head = [p for p in network.classifier.parameters() if p.requires_grad]
    rest = [p for p in network.parameters() if p.requires_grad and all(p is not q for q in head)]
    groups = [dict(params=head, factor=1.0)] + [dict(params=rest, factor=args.backbone_lr)] * bool(rest)
    nesterov = stage == 2 and args.stage2_nesterov
    return torch.optim.SGD(groups, args.lr, momentum=args.momentum, weight_decay=args.wd, nesterov=nesterov)


def learning_rate(epoch, args):
    """Learning rate of the 0-based `epoch` of a stage: linear warm-up, then steps or a cosine."""
    warm = min(1.0, (epoch + 1) / max(args.warmup, 1))
    if args.cosine:
        share = (epoch + args.cosine_start) / (args.cosine_epochs or args.epochs)
        return args.lr * warm * 0.5 * (1 + math.cos(math.pi * share))
    return args.lr * warm * args.lr_factor ** sum(epoch >= step for step in args.lr_steps)


def train_one_epoch(run, model, loader, optimizer, stage, epoch, args):
    model.train()
    accelerator = run.accelerator
    if stage == 2 and not args.bn_train_in_stage2:
        accelerator.unwrap_model(model, keep_torch_compile=False).eval()
    draws = np.random.RandomState(datasets.epoch_seed(args.seed, epoch, stream=3) % 2**32)
    for images, labels in run.steps(loader):
        if args.mixup_alpha:  # each process permutes its share of the batch
            lam = draws.beta(args.mixup_alpha, args.mixup_alpha)
            order = torch.randperm(len(labels)).to(labels.device, non_blocking=True)
            logits = model(lam * images + (1 - lam) * images[order])
            loss = lam * F.cross_entropy(logits, labels) + (1 - lam) * F.cross_entropy(logits, labels[order])
        else:
            loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        run.record(loss=loss)


def main(args: Args) -> dict:
    args, stage1_args, weights = runs.adopt_stage1(args, TRAINING)
    if args.stage1:
        held_out = stage1_args.get("held_out", 0)
        if args.held_out not in (None, held_out):
            where = f"the run of --stage1 {args.stage1}"
            cli.fail(f"--held-out {args.held_out}: {where} has {held_out}; give the same")
        args = dataclasses.replace(args, held_out=held_out)
    stages = make_stages(args)
    config = DataLoaderConfiguration(split_batches=True, non_blocking=True)
    accelerator = Accelerator(dataloader_config=config)
    run = runs.start(accelerator, args, epochs=stages[-1][2].stop)
    train_set, test_set = datasets.load(args)
    run.set_data(train_set, test_set)
    class_counts = train_set.class_counts  # with the held-out images: what many, medium and few go by
    held_out = None
    if args.held_out:
        train_set, held_out = datasets.hold_out(train_set, args.held_out)
        voters = int((held_out.class_counts > 0).sum())
        if voters < 2:
            cli.fail(f"--held-out {args.held_out}: takes images of {voters} classes; use less, or give --tau")
        cli.say(f"held out: {len(held_out)} training images of {voters} classes")
    options = datasets.loader_options(train_set)
    test_loader = accelerator.prepare(DataLoader(test_set, args.batch_size, **options))
    network = make_network(train_set, weights, args).to(accelerator.device)
    for stage, settings, epochs in stages:
        if stage == 2:
            old = new_classifier(network, args)
        if stage == 2 and args.classifier in ("tau", "ncm"):  # nothing to train
            for epoch in run.track(epochs, model=network):
                run.begin_epoch(epoch)
                facts = fit_classifier(accelerator, network, old, train_set, held_out, args)
                accuracy = evaluation.per_split(accelerator, network, test_loader, class_counts, args)
                run.end_epoch(epoch, {**accuracy, **facts})
            break
        sampler = make_sampler(train_set, stage, settings)
        train_loader = DataLoader(train_set, args.batch_size, sampler=sampler, drop_last=True, **options)
        optimizer = make_optimizer(network, stage, settings)
        model, optimizer, train_loader = accelerator.prepare(network, optimizer, train_loader)
        for epoch in run.track(epochs, model=model, optimizer=optimizer):
            run.begin_epoch(epoch, train_loader)
            for group in optimizer.param_groups:
                group["lr"] = group["factor"] * learning_rate(epoch - epochs.start, settings)
            train_one_epoch(run, model, train_loader, optimizer, stage, epoch, settings)
            accuracy = evaluation.per_split(accelerator, model, test_loader, class_counts, args)
            run.end_epoch(epoch, accuracy)
        accelerator.free_memory()  # stage 2 prepares the network anew, for its own part to be trained
    return run.finish(**({"stage1_args": stage1_args} if args.stage1 else {}))


if __name__ == "__main__":
    main(cli.parse(Args, RECIPES, __doc__))
