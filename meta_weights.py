"""Class weights, and on top of them a weight per image that is learned anew for each batch.

Paper:    M. A. Jamal, M. Brown, M.-H. Yang, L. Wang, B. Gong, "Rethinking Class-Balanced Methods for
          Long-Tailed Visual Recognition from a Domain Adaptation Perspective", CVPR 2020, arXiv:2003.10780.
Method:   1. train with the plain loss for --pretrain-epochs                                  image_losses
          2. then weigh image i by w_y + eps_i, with w by effective numbers              effective_weights
          3. and eps = -tau * d L_dev / d eps at eps = 0, where L_dev is the loss of a balanced development
             batch one plain SGD step ahead                     Alg. 1, weight_gradients, train_one_epoch
          For comparison, --method cb: w alone, throughout; finetune: part 2 has as many images of each class;
          l2rw: weights ~ max(-gradient, 0); mwnet: a network of the loss gives them; plain: no weights.
Differs:  as in the released code, the step ahead is along the sum of the losses, the real one along their
          mean (--inner-scale); beta is 0.9999. docs/meta_weights.md: the rest, and a command for every row.
Expected: cifar10_lt, imbalance 100, ResNet-32: plain 70.4, cb 72.4, meta 76.4, with LDAM 80.0 (paper).
Run:      accelerate launch meta_weights.py --dataset cifar10_lt
"""

import copy
from dataclasses import dataclass, replace
from functools import partial
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator, DataLoaderConfiguration, DistributedDataParallelKwargs
from torch import nn
from torch.func import functional_call, jvp
from torch.optim import SGD

from common import cli, datasets, evaluation, models, recipes
from common.runs import Run

# Settings of the released code (CIFAR; mwnet: Meta-Weight-Net's), the paper's few (large sets), and ours.
# fmt: off
CIFAR = dict(arch="resnet32", epochs=200, batch_size=100, lr_steps=(159, 179), lr_factor=0.01, wd=5e-4,
             nesterov=True, pretrain_epochs=160, dev="apart")
MWNET = dict(CIFAR, method="mwnet", epochs=100, lr_steps=(80, 90), lr_factor=0.1, pretrain_epochs=0)
LARGE = dict(arch="resnet50", imbalance=None, epochs=120, batch_size=256, lr=0.01, lr_steps=(60, 80), wd=5e-4,
             nesterov=True, pretrained=True, pretrain_epochs=100, freeze_backbone=True)
MNIST = dict(recipes.MNIST, pretrain_epochs=6)
FILES = dict(recipes.FILES, pretrain_epochs=80, freeze_backbone=True, dev_per_class=5)
RECIPES = {
    "synthetic": dict(recipes.SYNTHETIC, pretrain_epochs=28, dev_per_class=5),
    "cifar10_lt": CIFAR,
    "cifar10_lt mwnet": MWNET,
    "cifar100_lt": CIFAR,
    "cifar100_lt mwnet": MWNET,
    "imagenet_lt": dict(LARGE, arch="resnet10", lr=0.1, lr_steps=(35, 70), pretrained=False, augment="jitter",
                        dev_list="ImageNet_LT_val.txt", dev_per_class=20),
    "places_lt": dict(LARGE, arch="resnet152", epochs=50, lr_steps=(10, 20), pretrain_epochs=30,
                      augment="jitter", dev_list="Places_LT_val.txt"),
    "inat2017": dict(LARGE, dev_per_class=5),
    "inat2018": dict(LARGE, dev_per_class=2, splits=(100, 21)),
    "mnist_lt": MNIST,
    "fashion_mnist_lt": MNIST,
    "cmnist_lt": MNIST,
    "image_folder": FILES,
    "image_list": FILES,
}
# fmt: on
SCALE = 30.0  # LDAM's factor on the cosines
METHODS = ("meta", "cb", "finetune", "l2rw", "mwnet", "plain")
LEARNED = ("meta", "l2rw", "mwnet")  # with development images


@dataclass
class Args(cli.Args):
    method: str = cli.option("meta", "the paper's, or another (see above)", choices=METHODS)
    loss: str = cli.option("ce", "cross-entropy, focal loss or LDAM", choices=("ce", "focal", "ldam"))
    gamma: float = cli.option(1.0, "exponent of the focal loss", least=0)
    beta: float = cli.option(0.9999, "of the effective number of images", least=0, most=0.9999999)
    pretrain_epochs: int = cli.option(0, "plain training before meta or finetune", least=0, is_epoch=True)
    freeze_backbone: bool = cli.option(False, "train the classifier alone after these")
    tau: float = cli.option(0.01, "step of eps; 0: class weights alone", least=0)
    inner_scale: float = cli.option(1.0, "factor on the rate of the step ahead; 1/B: a mean", above=0)
    mwnet_lr: float = cli.option(1e-5, "learning rate of Meta-Weight-Net's network", above=0)
    dev: str = cli.option("train", "where development images come from", choices=("train", "apart"))
    dev_per_class: int = cli.option(10, "development images of each class", least=1)
    dev_list: str | None = cli.option(None, "list file to take them from instead")
    dev_batch_size: int = cli.option(100, "development images per step, at most all", least=1)


def per_class(dataset, number):
    """Positions of `number` random images of each class, the same in every run."""
    fewest = dataset.class_counts.min().item()
    if number > fewest:
        raise cli.Refused(f"--dev-per-class {number}: one class has {fewest} images; use less")
    counts = [number] * dataset.num_classes
    return datasets.draw_subset(dataset.labels.numpy(), counts, np.random.RandomState(6))


def load(args):
    """[training, test, development images], the last only where they are used."""
    if args.dev == "apart" and not args.dev_list:  # with the seeds of the released code
        everything, test_set = datasets.load(replace(args, imbalance=None))
        rest, dev_set = datasets.hold_out(everything, args.dev_per_class, seed=6)
        labels = rest.labels.numpy()
        kept = datasets.cut(labels, rest.num_classes, args.imbalance or 1, generator=Random(42))
        cli.say(f"{len(dev_set)} of these for development, {len(kept)} for training")
        return [rest.subset(kept), test_set, dev_set]
    train_set, test_set = datasets.load(args)
    if args.method not in LEARNED:
        return [train_set, test_set]
    source = datasets.load_list(args, "dev_list", train_set) if args.dev_list else train_set
    return [train_set, test_set, source.subset(per_class(source, args.dev_per_class))]


def make_dev_loader(dev_set, steps, processes, args):
    """A batch of development images for each of an epoch's steps, drawn without replacement."""
    size = min(args.dev_batch_size, len(dev_set)) // processes * processes

    def order(generator, epoch):
        return torch.cat([torch.randperm(len(dev_set), generator=generator)[:size] for _ in range(steps)])

    args = replace(args, batch_size=size)
    return datasets.train_loader(dev_set, args, order=order, size=steps * size, stream=1)


def effective_weights(class_counts, beta=0.9999):
    """Weight of each class [K], ~ (1 - beta) / (1 - beta^n_k), mean 1."""
    weights = (1 - beta) / (1 - beta ** class_counts.double())
    return (weights / weights.mean()).float()


def image_losses(logits, labels, class_counts, loss, gamma=1.0):
    """Loss of each image [B] in nats. logits [B, K] (LDAM: SCALE * cosine), labels [B], class_counts [K]."""
    if loss == "ldam":  # SCALE * (cosine - margin) at the label, the margin ~ n_k^(-1/4), at most 0.5
        margins = 0.5 * (class_counts.min() / class_counts).pow(0.25)
        logits = logits - SCALE * margins * F.one_hot(labels, len(class_counts))
    losses = F.cross_entropy(logits, labels, reduction="none")
    if loss == "focal":  # (1 - p_y)^gamma, whose gradient is infinite at p_y = 1 for gamma < 1
        losses = (-torch.expm1(-losses)).clamp(min=1e-12) ** gamma * losses
    return losses


def logits_at(network, theta, images):
    """The network's logits with the parameters `theta`. Running statistics do not move."""
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    return functional_call(network, {**theta, **buffers}, images)


def weight_gradients(accelerator, network, batch, dev_batch, lr, loss, weights):
    """d L_dev / d w_i for each image, [b], with L_dev ahead, at theta - lr * grad sum_i(w_i l_i).

    That is -lr <grad l_i, v>, v the gradient of L_dev there: for all i at once one forward-mode product.
    """

    def losses_at(theta):
        return loss(logits_at(network, theta, batch[0]), batch[1])

    theta = {name: p for name, p in network.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad((weights * losses_at(theta)).sum(), list(theta.values()))
    gradients = accelerator.reduce(gradients, reduction="sum")
    ahead = {}
    for (name, p), gradient in zip(theta.items(), gradients, strict=True):
        ahead[name] = (p - lr * gradient).detach().requires_grad_()
    dev_loss = loss(logits_at(network, ahead, dev_batch[0]), dev_batch[1]).mean()
    v = torch.autograd.grad(dev_loss, list(ahead.values()))
    v = accelerator.reduce(v, reduction="mean")
    theta = {name: p.detach() for name, p in theta.items()}
    _, products = jvp(losses_at, (theta,), (dict(zip(theta, v, strict=True)),))
    return -lr * products


def mean_one(accelerator, weights):
    """weights [b] scaled to a mean of 1 over the batch of all processes; zeros stay zeros."""
    mean = accelerator.reduce(weights.mean(), reduction="mean")
    return weights / torch.where(mean > 0, mean, 1.0)


class WeightNet(nn.Sequential):
    """Meta-Weight-Net's V: loss of an image [B] to its weight in 0..1 [B]; layers of 1, 100 and 1."""

    def __init__(self, seed, lr):
        torch.manual_seed(seed)
        layers = nn.Linear(1, 100), nn.ReLU(), nn.Linear(100, 1), nn.Sigmoid()
        super().__init__(nn.Unflatten(0, (-1, 1)), *layers, nn.Flatten(0))
        self.sgd = SGD(self.parameters(), lr, momentum=0.9, weight_decay=5e-4, nesterov=True)


def mwnet_weights(accelerator, gradients, losses, weight_net):
    """Meta-Weight-Net: V(l_i) / mean V(l) [b], after a step of V along d L_dev / d V. losses: l [b]."""
    all_losses = accelerator.gather(losses)
    weights = mean_one(accelerator, weight_net(losses).detach()) / len(all_losses)  # those of all have sum 1
    all_gradients = accelerator.gather(gradients(weights))
    values = weight_net(all_losses)
    weight_net.sgd.zero_grad()
    (values / values.sum()).backward(all_gradients)
    weight_net.sgd.step()
    return mean_one(accelerator, weight_net(losses).detach())


def class_means(values, labels, num_classes):
    """Mean of values [N] over the images of each class, for the log; None where there is none."""
    sums = values.new_zeros(num_classes).index_add_(0, labels, values).tolist()
    counts = torch.bincount(labels, minlength=num_classes).tolist()
    return [total / n if n else None for total, n in zip(sums, counts, strict=True)]


def inner_learning_rate(epoch, args):
    """Rate of the step ahead. That of meta falls an epoch late, as in the released code."""
    late = 1 if args.method == "meta" else 0
    return args.inner_scale * recipes.learning_rate(max(epoch - late, 0), args)


def make_model(dataset, args):
    cosine = SCALE if args.loss == "ldam" else None
    return models.build(args.arch, dataset, args.seed, cosine, args.pretrained)


def train_one_epoch(run, model, network, optimizer, loader, dev_loader, weight_net, method, epoch, args):
    """Facts for the log. network: that of `model`, in full precision."""
    accelerator = run.accelerator
    model.train(next(network.parameters()).requires_grad)  # a frozen BatchNorm keeps its statistics
    class_counts = run.class_counts.float().to(accelerator.device)
    class_weights = effective_weights(class_counts, args.beta)
    loss_of = partial(image_losses, class_counts=class_counts, loss=args.loss, gamma=args.gamma)
    inner_lr = inner_learning_rate(epoch, args)
    dev_batches = iter(dev_loader)
    learned = []

    for batch in run.steps(loader):
        images, labels = batch
        weights = class_weights[labels]
        eps = torch.zeros_like(weights)
        if method in LEARNED:
            dev_batch = next(dev_batches)
            gradients = partial(weight_gradients, accelerator, network, batch, dev_batch, inner_lr, loss_of)
        if method == "meta":
            eps = -args.tau * gradients(weights)  # neither clipped nor normalised
            weights = weights + eps
        elif method == "l2rw":
            weights = mean_one(accelerator, (-gradients(torch.zeros_like(weights))).clamp(min=0))
        elif method == "mwnet":
            losses = loss_of(logits_at(network, {}, images), labels).detach()
            weights = mwnet_weights(accelerator, gradients, losses, weight_net)
        elif method != "cb":
            weights = torch.ones_like(weights)
        loss = (weights * loss_of(model(images), labels)).mean()
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        run.log(loss=loss)
        learned.append((labels, weights, eps))

    if method not in LEARNED:
        return {}
    labels, weights, eps = (accelerator.gather(torch.cat(part)).cpu() for part in zip(*learned, strict=True))
    facts = {"class_weights": class_means(weights, labels, len(class_weights))}
    if method == "meta":
        ratio = (eps / class_weights.cpu()[labels]).abs()
        facts["class_eps"] = class_means(eps, labels, len(class_weights))
        facts["eps_over_w"] = ratio.mean().item()
        facts["largest_eps_over_w"] = ratio.max().item()
    return facts


def main(args: Args) -> dict:
    config = DataLoaderConfiguration(split_batches=True)
    unused = DistributedDataParallelKwargs(find_unused_parameters=args.freeze_backbone)
    accelerator = Accelerator(dataloader_config=config, kwargs_handlers=[unused])
    run = Run(accelerator, args)
    train_set, test_set, *dev_sets = load(args)
    run.set_data(train_set, test_set, *dev_sets)
    first_loader = second_loader = dev_loader = datasets.train_loader(train_set, args)
    if args.method == "finetune":
        balanced_set = train_set.subset(per_class(train_set, train_set.class_counts.min()))
        second_loader = datasets.train_loader(balanced_set, args)
    if args.method in LEARNED:
        dev_loader = make_dev_loader(dev_sets[0], len(first_loader), accelerator.num_processes, args)
    test_loader = datasets.test_loader(test_set, args)
    network = make_model(train_set, args)
    full_precision = copy.copy(network)  # the same parameters, never in half precision
    optimizer = SGD(network.parameters(), args.lr, momentum=0.9, weight_decay=args.wd, nesterov=args.nesterov)
    weight_net = WeightNet(args.seed, args.mwnet_lr).to(accelerator.device)
    model, optimizer, first_loader, second_loader, dev_loader, test_loader = accelerator.prepare(
        network, optimizer, first_loader, second_loader, dev_loader, test_loader
    )

    start = min(args.pretrain_epochs, args.epochs - 1) if args.method in ("meta", "finetune") else 0
    objects = dict(model=model, optimizer=optimizer, weight_net=weight_net, net_optimizer=weight_net.sgd)
    for epoch in run.epochs(range(args.epochs), **objects):
        method, loader = args.method, second_loader
        if epoch < start:
            method, loader = "plain", first_loader
        elif start and args.freeze_backbone:
            network.requires_grad_(False)
            network.classifier.requires_grad_(True)
        loader.set_epoch(epoch)
        dev_loader.set_epoch(epoch)
        optimizer.param_groups[0]["lr"] = recipes.learning_rate(epoch, args)
        facts = train_one_epoch(
            run, model, full_precision, optimizer, loader, dev_loader, weight_net, method, epoch, args
        )
        run.end_epoch(epoch, evaluation.per_split(run, model, test_loader), **facts)
    return run.finish()


if __name__ == "__main__":
    cli.run(main, Args, RECIPES, __doc__)
