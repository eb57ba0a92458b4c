"""Class weights, and on top of them a weight per image that is learned anew for each batch.

Paper:    M. A. Jamal, M. Brown, M.-H. Yang, L. Wang, B. Gong, "Rethinking Class-Balanced Methods for
          Long-Tailed Visual Recognition from a Domain Adaptation Perspective", CVPR 2020, arXiv:2003.10780.
Method:   1. train with the plain loss for --pretrain-epochs
          2. then weigh image i by w_y + eps_i, with w by effective numbers                  class_weights
          3. and eps = -tau * d L_dev / d eps at eps = 0, where L_dev is the loss of a balanced development
             batch one plain SGD step ahead                     Alg. 1, weight_gradients, Weighting.learn
          The loss is cross-entropy, focal or LDAM. --method: class-balanced loss (cb), class-balanced
          fine-tuning (finetune), L2RW, Meta-Weight-Net and plain training, for comparison.
Differs:  the gradient of eps is exact, as in the released code, without its double backward pass. As in the
          code: beta = 0.9999, here on all sets (paper: (N - 1) / N), the step ahead is along the sum of the
          batch's weighted losses though the real one is along their mean, and its rate falls an epoch later;
          eps is neither clipped nor normalised. CIFAR's development images, 10 per class, are set aside
          before the long-tailed cut (seeds 6 and 42, but not image for image the released selection), and
          their batches go through them in turn; on iNaturalist they are training images, on ImageNet-LT and
          Places-LT of the validation lists. Zero padding, and the other scripts' normalisation. The focal
          loss is that of the softmax, gamma 1. For large sets the paper leaves most settings open: ours train
          the classifier alone in the second part, with the last rate of the first; ImageNet-LT has ResNet-10
          (paper: ResNet-32).
          An incomplete last batch is dropped; the result is the last epoch (paper: the best).
Expected: cifar10_lt, imbalance 200 / 100 / 10, ResNet-32, cross-entropy: plain 65.7 / 70.4 / 86.4 all, cb
          68.9 / 72.4 / 86.8, meta 70.7 / 76.4 / 88.9; with LDAM meta 77.2 / 80.0 / 87.4; cifar100_lt,
          cross-entropy: 34.8 / 38.3 / 55.7, 35.7 / 38.6 / 57.1, 39.3 / 43.4 / 59.6. inat2018, ResNet-50:
          plain 63.8, cb 65.3, meta 67.6. imagenet_lt: 25.3, 26.6, 29.9. places_lt: 27.0, 28.9, 30.8 (paper).
          Ours: see README.
Run:      accelerate launch meta_weights.py --dataset cifar10_lt
"""

import copy
import dataclasses
import random
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator, DataLoaderConfiguration
from torch import nn
from torch.func import functional_call, jvp
from torch.utils.data import DataLoader

from common import cli, datasets, evaluation, models, runs

TWO_PARTS = ("meta", "finetune")
WITH_DEV = ("meta", "l2rw", "mwnet")
META, DEV, PARTS = dict(method=("meta",)), dict(method=WITH_DEV), dict(method=TWO_PARTS)

# Settings of the released code (CIFAR), of the paper as far as it has them (the large sets) and our own (the
# rest), one row per data set; an option given on the command line wins.
# fmt: off
CIFAR = dict(arch="resnet32", batch_size=100, wd=5e-4, dev="apart",
             epochs=cli.By(lambda method: 100 if method == "mwnet" else 200),
             lr_steps=cli.By(lambda method: (80, 90) if method == "mwnet" else (159, 179)),
             lr_factor=cli.By(lambda method: 0.1 if method == "mwnet" else 0.01),
             pretrain_epochs=cli.By(lambda method: 160 if method in TWO_PARTS else 0))
LARGE = dict(arch="resnet50", imbalance=None, batch_size=256, lr=0.01, lr_steps=(60, 80), wd=5e-4,
             pretrained=True, freeze_backbone=cli.By(lambda method: method in TWO_PARTS),
             epochs=cli.By(lambda method: 120 if method in TWO_PARTS else 100),
             pretrain_epochs=cli.By(lambda method: 100 if method in TWO_PARTS else 0))
FILES = dict(LARGE, pretrained=False, lr=0.1, dev_per_class=5)
RECIPES = {
    "cifar10_lt": CIFAR,
    "cifar100_lt": CIFAR,
    "imagenet_lt": dict(LARGE, arch="resnet10", lr=0.1, lr_steps=(35, 70), pretrained=False, color_jitter=0.4,
                        dev_list=cli.By(lambda method: "ImageNet_LT_val.txt" if method in WITH_DEV else None),
                        dev_per_class=20),
    "places_lt": dict(LARGE, arch="resnet152", lr_steps=(10, 20), color_jitter=0.4,
                      dev_list=cli.By(lambda method: "Places_LT_val.txt" if method in WITH_DEV else None),
                      epochs=cli.By(lambda method: 50 if method in TWO_PARTS else 30),
                      pretrain_epochs=cli.By(lambda method: 30 if method in TWO_PARTS else 0)),
    "inat2017": dict(LARGE, dev_per_class=5),
    "inat2018": dict(LARGE, dev_per_class=2, few_under=21),
    "image_folder": FILES,
    "image_list": FILES,
    "synthetic": dict(epochs=40, batch_size=32, lr_steps=(28, 36), wd=5e-4, warmup=2, dev_per_class=5,
                      pretrain_epochs=cli.By(lambda method: 28 if method in TWO_PARTS else 0)),
}
# fmt: on
SCALE = 30.0  # LDAM's factor on the cosines


@dataclass
class Args(cli.Args):
    method: str = cli.option(
        "meta",
        "meta: the paper's; cb: class weights alone, from the start; finetune: plain training, then as many "
        "images of each class; l2rw: weights ~ max(-gradient, 0); mwnet: weights by a network of the loss",
        choices=("meta", "cb", "finetune", "l2rw", "mwnet", "plain"),
    )
    loss: str = cli.option("ce", "cross-entropy, focal loss or LDAM", choices=("ce", "focal", "ldam"))
    gamma: float = cli.option(1.0, "exponent of the focal loss", least=0, needs=dict(loss=("focal",)))
    max_margin: float = cli.option(
        0.5, "LDAM's margin of the rarest class", above=0, needs=dict(loss=("ldam",))
    )
    beta: float = cli.option(
        0.9999,
        "of the effective number of images",
        least=0,
        most=0.9999999,
        hint="(below 1)",
        needs=dict(method=("meta", "cb")),
    )
    pretrain_epochs: int = cli.option(0, "epochs of plain training that come first", least=0, needs=PARTS)
    tau: float = cli.option(
        0.01, "step of meta's eps along its gradient; 0 leaves the class weights", least=0, needs=META
    )
    inner_lr: float | None = cli.option(
        None,
        "rate of the step ahead of meta (default: the learning rate of the epoch before)",
        least=0,
        needs=META,
    )
    inner_reduction: str = cli.option(
        "sum", "of the losses along which that goes", choices=("sum", "mean"), needs=META
    )
    meta_loss: str = cli.option(
        "same", "loss of development images, or plain ce", choices=("same", "ce"), needs=DEV
    )
    mwnet_lr: float = cli.option(
        1e-5, "learning rate of Meta-Weight-Net's network", above=0, needs=dict(method=("mwnet",))
    )
    dev: str = cli.option(
        "train",
        "development images: apart, taken out before the long-tailed cut, or training images",
        choices=("apart", "train"),
    )
    dev_per_class: int = cli.option(10, "development images of each class", least=1)
    dev_list: str | None = cli.option(
        None, "list file to take them from instead (also looked for in --data-dir)", needs=DEV
    )
    dev_batch_size: int = cli.option(
        100, "development images per step over all processes", least=1, needs=DEV
    )
    freeze_backbone: bool = cli.option(
        False, "train the classifier alone after --pretrain-epochs", needs=PARTS
    )
    pretrained: bool = cli.option(False, "start from torchvision's ImageNet weights")
    warmup: int = cli.option(0, "epochs of linear warm-up", least=0)
    lr_factor: float = cli.option(0.1, "factor on the learning rate at each of --lr-steps", above=0)

    def __post_init__(self):
        super().__post_init__()
        if self.pretrain_epochs >= self.epochs:
            given = f"--pretrain-epochs {self.pretrain_epochs}"
            cli.fail(f"{given}: not before the end of --epochs {self.epochs}; lower it")
        if self.dev == "apart" and not self.imbalance and not self.dev_list:
            cli.fail("--dev apart: is for a set that is cut here, by --imbalance; use --dev train")


def class_weights(class_counts, beta):
    """w_k ~ (1 - beta) / (1 - beta^n_k) [K], scaled to a sum of K."""
    weights = (1 - beta) / (1 - beta ** class_counts.double())
    return weights * len(weights) / weights.sum()


def ldam_margins(class_counts, max_margin=0.5):
    """LDAM's margin of each class [K], ~ n_k^(-1/4), the largest max_margin."""
    margins = class_counts.double().pow(-0.25)
    return max_margin * margins / margins.max()


def image_losses(logits, labels, margins, args):
    """Loss of each image [B] in nats. logits [B, K] (LDAM: SCALE * cosine), labels [B], ldam_margins [K]."""
    if args.loss == "ldam":  # SCALE * (cosine - margin) at the label
        logits = logits - SCALE * margins.to(logits) * F.one_hot(labels, logits.shape[1])
    losses = F.cross_entropy(logits, labels, reduction="none")
    if args.loss == "focal":  # (1 - p_y)^gamma, whose gradient is infinite at p_y = 1 for gamma < 1
        losses = (-torch.expm1(-losses)).clamp(min=1e-12) ** args.gamma * losses
    return losses


def load(args):
    """(training, development, test images); dev_per_class development images of each class.

    --dev apart: they are taken first, and the long-tailed cut is made of the rest: n_max is less by as many.
    """
    apart, each = args.dev == "apart" and not args.dev_list, args.dev_per_class
    train, test = datasets.load(dataclasses.replace(args, imbalance=1.0) if apart else args)
    if not apart and args.method not in WITH_DEV:
        return train, None, test
    source = datasets.load_list(args, "dev_list", train) if args.dev_list else train
    fewest = int(source.class_counts.min())
    if each + apart > fewest:
        cli.fail(f"--dev-per-class {each}: the smallest class has {fewest} images; use less")
    taken = datasets.long_tail_subset(source.labels, [each] * source.num_classes, np.random.RandomState(6))
    if apart:
        train = train.subset(np.setdiff1d(np.arange(len(train)), taken))
        kept = datasets.cut(train.labels, train.num_classes, args.imbalance, generator=random.Random(42))
        train = train.subset(kept)
        if args.batch_size > len(train):
            cli.fail(f"--batch-size {args.batch_size}: the cut leaves {len(train)} images; use a smaller one")
        cli.say(f"of these {len(taken)} for development, {len(train)} after the cut for training")
    return train, source.subset(taken), test


def fitting(batch_size, dataset, processes):
    """batch_size, or less where there are fewer images; a multiple of the processes."""
    size = min(batch_size, len(dataset)) // processes * processes
    if size == 0:
        cli.fail(f"{len(dataset)} class-balanced images are too few for {processes} processes; use fewer")
    return size


def dev_sampler(dev_set, batch_size, steps, args):
    """`steps` batches of development images, in one random order of them after the other."""
    whole = len(dev_set) // batch_size * batch_size  # no image is in a batch twice

    def orders(size, epoch, generator):
        times = range(0, size, whole)
        return torch.cat([torch.randperm(len(dev_set), generator=generator)[:whole] for _ in times])[:size]

    return datasets.EpochSampler(dev_set, args.seed, stream=1, order=orders, size=steps * batch_size)


def balanced_subset(train_set):
    """As many images of each class as the rarest one has, the same in every run."""
    counts = [int(train_set.class_counts.min())] * train_set.num_classes
    return train_set.subset(datasets.long_tail_subset(train_set.labels, counts, np.random.RandomState(0)))


def weight_gradients(accelerator, module, skeleton, batch, dev_batch, weigh, lr, loss, dev_loss):
    """(g [b], losses l [b]): g_i = d L_dev / d w_i, L_dev at theta ahead, theta - lr * grad sum_i(w_i l_i).

    That is -lr <grad l_i, v>, v the gradient of L_dev there: for all i at once one forward-mode product.
    Batches are (inputs of the module, labels); loss and dev_loss take (outputs, labels) to a loss per image;
    weigh takes l to the weights w [b] of the step. skeleton: a copy of the module, lent its parameters; its
    BatchNorm goes by the batch, and no running statistic of the module moves.
    """
    theta = {name: p.detach().requires_grad_() for name, p in module.named_parameters()}

    def outputs(theta, inputs):
        buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
        return functional_call(skeleton, {**theta, **buffers}, inputs)

    def losses(theta):
        return loss(outputs(theta, batch[0]), batch[1])

    values = losses(theta)
    inner = torch.autograd.grad((weigh(values.detach()) * values).sum(), list(theta.values()))
    inner = zip(theta.items(), accelerator.reduce(inner, reduction="sum"), strict=True)
    ahead = {name: (p.detach() - lr * g).requires_grad_() for (name, p), g in inner}
    dev_value = dev_loss(outputs(ahead, dev_batch[0]), dev_batch[1]).mean()
    v = accelerator.reduce(torch.autograd.grad(dev_value, list(ahead.values())), reduction="mean")
    theta = {name: tensor.detach() for name, tensor in theta.items()}
    along = jvp(losses, (theta,), (dict(zip(theta, v, strict=True)),))[1]
    return -lr * along, values.detach()


def mean_one(accelerator, weights):
    """weights [b] scaled to a mean of 1 over the batch of all processes; zeros stay zeros."""
    mean = accelerator.reduce(weights.mean(), reduction="mean")
    return weights / torch.where(mean > 0, mean, 1.0)


class WeightNet(nn.Sequential):
    """Meta-Weight-Net's V: loss of an image [B] to its weight in 0..1 [B]; layers of 1, 100 and 1."""

    def __init__(self, seed):
        with models.seeded(seed):
            super().__init__(nn.Linear(1, 100), nn.ReLU(), nn.Linear(100, 1), nn.Sigmoid())

    def forward(self, losses):
        return super().forward(losses[:, None])[:, 0]


def step_weight_net(accelerator, weight_net, optimizer, losses, gradients):
    """A step of V along d L_dev / d V, for weights V(l_i) / sum_j V(l_j) of the batch of all processes."""
    weights = weight_net(accelerator.gather(losses))
    optimizer.zero_grad()
    (weights / weights.sum()).backward(accelerator.gather(gradients))
    optimizer.step()


class Weighting:
    """The weights of the losses of a batch by --method, and what the log says of those that are learned."""

    def __init__(self, accelerator, network, class_counts, args):
        self.accelerator, self.network, self.args = accelerator, network, args
        self.prior = class_weights(class_counts, args.beta).float().to(accelerator.device)
        self.margins = ldam_margins(class_counts, args.max_margin).float().to(accelerator.device)
        # The part of the network that takes the step ahead, and a copy of it without numbers of its own.
        self.module = network.classifier if args.freeze_backbone else network
        self.skeleton = copy.deepcopy(self.module).to("meta").train()
        self.net, self.net_optimizer = None, None
        if args.method == "mwnet":
            self.net, how = WeightNet(args.seed), dict(momentum=0.9, nesterov=True, weight_decay=5e-4)
            parameters = self.net.to(accelerator.device).parameters()
            self.net_optimizer = torch.optim.SGD(parameters, args.mwnet_lr, **how)

    def begin_epoch(self):
        self.sums, self.largest = self.prior.new_zeros(4, len(self.prior)), []

    def losses(self, logits, labels):
        return image_losses(logits, labels, self.margins, self.args)

    def gradients(self, batch, dev_batch, weigh, lr):
        """weight_gradients of a batch of images."""
        if self.args.freeze_backbone:
            with torch.no_grad():
                batch, dev_batch = ((self.network.features(x), y) for x, y in (batch, dev_batch))
        dev_loss = F.cross_entropy if self.args.meta_loss == "ce" else self.losses
        pairs, losses = (batch, dev_batch), (self.losses, dev_loss)
        return weight_gradients(self.accelerator, self.module, self.skeleton, *pairs, weigh, lr, *losses)

    def learn(self, batch, dev_batch, lr):
        """Weights [b] of the losses of a batch, for a mean over the batch. lr: rate of the step ahead."""
        accelerator, args, labels = self.accelerator, self.args, batch[1]
        size, prior = len(labels) * accelerator.num_processes, self.prior[labels]

        def of_the_net(losses):
            return mean_one(accelerator, self.net(losses).detach())

        eps = torch.zeros_like(prior)
        if args.method == "meta":
            lr = lr / size if args.inner_reduction == "mean" else lr
            eps = -args.tau * self.gradients(batch, dev_batch, lambda losses: prior, lr)[0]
            weights = prior + eps  # of either sign, neither clipped nor normalised
        elif args.method == "l2rw":
            gradients = self.gradients(batch, dev_batch, torch.zeros_like, lr)[0]
            weights = mean_one(accelerator, (-gradients).clamp(min=0))
        else:
            gradients, losses = self.gradients(batch, dev_batch, lambda losses: of_the_net(losses) / size, lr)
            step_weight_net(accelerator, self.net, self.net_optimizer, losses, gradients)
            weights = of_the_net(losses)
        ratio = (eps / prior).abs()
        self.sums.index_add_(1, labels, torch.stack([torch.ones_like(eps), weights, eps, ratio]))
        self.largest.append(ratio.max())
        return weights

    def facts(self):
        """For the log: mean weight and mean eps of each class over the epoch, mean and largest |eps| / w."""
        if not self.largest:  # no weights were learned
            return {}
        images, weights, eps, ratio = self.accelerator.reduce(self.sums, reduction="sum").cpu()

        def means(sums):  # None for a class that was not drawn
            return [s / n if n else None for s, n in zip(sums.tolist(), images.tolist(), strict=True)]

        facts = {"class_weights": means(weights)}
        if self.args.method == "meta":
            largest = self.accelerator.gather(torch.stack(self.largest).max()).max().item()
            facts |= {"class_eps": means(eps), "eps_over_w": (ratio.sum() / images.sum()).item()}
            facts |= {"largest_eps_over_w": largest}
        return facts


def make_stages(args):
    """(number, epochs) of the plain training, if there is any, and of the method's own."""
    first = [(1, range(args.pretrain_epochs))] if args.pretrain_epochs else []
    return [*first, (2, range(args.pretrain_epochs, args.epochs))]


def learning_rate(epoch, args):
    """Learning rate of the 0-based `epoch`: linear warm-up, then times lr_factor at each of lr_steps."""
    warm = min(1.0, (epoch + 1) / max(args.warmup, 1))
    return args.lr * warm * args.lr_factor ** sum(epoch >= step for step in args.lr_steps)


def inner_learning_rate(epoch, args):
    """Rate of the step ahead: meta's falls one epoch after the learning rate, as in the released code."""
    if args.inner_lr is not None:
        return args.inner_lr
    return learning_rate(max(epoch - 1, 0) if args.method == "meta" else epoch, args)


def train_one_epoch(run, model, loaders, optimizer, weighting, stage, epoch, args):
    """loaders: of training images, and where weights are learned of development images."""
    model.train()
    if stage == 2 and args.freeze_backbone:
        run.accelerator.unwrap_model(model, keep_torch_compile=False).eval()
    weighting.begin_epoch()
    dev_batches = loaders[1] if len(loaders) > 1 else [None] * len(loaders[0])
    for batch, dev_batch in zip(run.steps(loaders[0]), dev_batches, strict=False):
        images, labels = batch
        if dev_batch is not None:
            weights = weighting.learn(batch, dev_batch, inner_learning_rate(epoch, args))
        else:
            weights = weighting.prior[labels] if args.method == "cb" else 1.0
        loss = (weights * weighting.losses(model(images), labels)).mean()
        optimizer.zero_grad()
        run.accelerator.backward(loss)
        optimizer.step()
        run.record(loss=loss)


def main(args: Args) -> dict:
    config = DataLoaderConfiguration(split_batches=True, non_blocking=True)
    accelerator = Accelerator(dataloader_config=config)
    run = runs.start(accelerator, args)
    train_set, dev_set, test_set = load(args)
    run.set_data(train_set, test_set, *([dev_set] if dev_set else []))
    class_counts, processes = train_set.class_counts, accelerator.num_processes
    options = datasets.loader_options(train_set)
    test_loader = accelerator.prepare(DataLoader(test_set, args.batch_size, **options))
    how = dict(cosine=SCALE if args.loss == "ldam" else None, pretrained=args.pretrained)
    network = models.build(args.arch, train_set.num_classes, args.seed, train_set.shape, **how)
    weighting = Weighting(accelerator, network.to(accelerator.device), class_counts, args)
    sets = {1: train_set, 2: balanced_subset(train_set) if args.method == "finetune" else train_set}
    sizes = {stage: fitting(args.batch_size, images, processes) for stage, images in sets.items()}
    dev_size = fitting(args.dev_batch_size, dev_set, processes) if args.method in WITH_DEV else None
    state = None  # of stage 1's optimizer
    for stage, epochs in make_stages(args):
        if stage == 2 and args.freeze_backbone:
            network.requires_grad_(False)
            network.classifier.requires_grad_(True)
        sampler = datasets.EpochSampler(sets[stage], args.seed)
        train_loader = DataLoader(sets[stage], sizes[stage], sampler=sampler, drop_last=True, **options)
        how = dict(momentum=0.9, nesterov=True, weight_decay=args.wd)
        optimizer = torch.optim.SGD(network.parameters(), args.lr, **how)
        if state and not args.freeze_backbone:  # the same training goes on
            optimizer.load_state_dict(state)
        model, optimizer, train_loader = accelerator.prepare(network, optimizer, train_loader)
        loaders, tracked = [train_loader], dict(model=model, optimizer=optimizer)
        if stage == 2 and args.method in WITH_DEV:
            sampler = dev_sampler(dev_set, dev_size, len(train_loader), args)
            dev_loader = DataLoader(dev_set, dev_size, sampler=sampler, drop_last=True, **options)
            loaders.append(accelerator.prepare(dev_loader))
        if stage == 2 and args.method == "mwnet":
            tracked |= dict(weight_net=weighting.net, net_optimizer=weighting.net_optimizer)
        for epoch in run.track(epochs, **tracked):
            run.begin_epoch(epoch, *loaders)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(epoch, args)
            train_one_epoch(run, model, loaders, optimizer, weighting, stage, epoch, args)
            accuracy = evaluation.per_split(accelerator, model, test_loader, class_counts, args)
            run.end_epoch(epoch, {**accuracy, **weighting.facts()})
        state = optimizer.state_dict()
        accelerator.free_memory()  # stage 2 is prepared anew, maybe with only the classifier to be trained
    return run.finish()


if __name__ == "__main__":
    main(cli.parse(Args, RECIPES, __doc__))
