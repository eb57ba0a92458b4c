"""RIDE: Routing Diverse Distribution-Aware Experts, without the router; also with CMO.

Paper:    X. Wang, L. Lian, Z. Miao, Z. Liu, S. X. Yu, "Long-tailed Recognition by Routing Diverse
          Distribution-Aware Experts", ICLR 2021, arXiv:2010.01809.
Method:   1. experts: one trunk, for each the last two stages, narrower, and a cosine classifier     Experts
          2. loss = sum over experts of LDAM's loss                                             image_losses
                    + diversity * mean(T)^2 * KL(all experts || this one at temperature T)      disagreement
             diversity is below 0, so that experts differ; rare classes have a lower T    class_temperatures
          3. predict with the mean of the experts' logits                                            Experts
          --p-mix 0.5 is RIDE + CMO (Park et al., CVPR 2022), as in cmo.py.
Differs:  the router, which saves computation, is left out; RIDE + CMO was never released: the disagreement,
          without labels, counts once in a mixed batch. docs/ride.md has the rest, and all commands.
Expected: cifar100_lt, ResNet-32, with CMO 50.0; at imbalance 50: 51.4, with CMO 53.0 (CMO's paper).
Run:      accelerate launch ride.py --dataset cifar100_lt
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator, DataLoaderConfiguration
from torch import nn
from torch.optim import SGD

from common import cli, datasets, evaluation, models, recipes
from common.runs import Run

# Settings of the released code, one row per data set, and ours where it has none.
# fmt: off
CIFAR = dict(arch="resnet32", epochs=200, lr_steps=(160, 180), lr_factor=0.01, warmup=5, wd=5e-4,
             nesterov=True, drw_epoch=160, augment="rotate")
IMAGENET = dict(arch="resnet50", epochs=100, batch_size=256, lr_steps=(60, 80), warmup=5, wd=2e-4,
                nesterov=True, drw_epoch=80, imbalance=None, augment="jitter", diversity=-0.2, spread=0.02)
INAT = dict(arch="resnet50", epochs=100, batch_size=512, lr=0.2, lr_steps=(60, 80), warmup=5, wd=2e-4,
            nesterov=True, drw_epoch=80, imbalance=None, splits=(100, 21), diversity=-0.2, spread=0.015)
MNIST = dict(recipes.MNIST, drw_epoch=6, mix_start=0, mix_end=1)
FILES = dict(recipes.FILES, drw_epoch=80, diversity=-0.2)
RECIPES = {
    "synthetic": dict(recipes.SYNTHETIC, drw_epoch=28, mix_start=1, mix_end=1),
    "cifar10_lt": CIFAR,
    "cifar100_lt": CIFAR,
    "imagenet_lt": IMAGENET,
    "inat2018": INAT,
    "mnist_lt": MNIST,
    "fashion_mnist_lt": MNIST,
    "cmnist_lt": MNIST,
    "image_folder": FILES,
    "image_list": FILES,
}
# fmt: on
STREAMS = ("foreground", "background", "both", "none")
SCALE = 30.0  # LDAM's factor on the cosines


@dataclass
class Args(cli.Args):
    experts: int = cli.option(3, "number of experts", least=2)
    diversity: float = cli.option(-0.45, "factor on their disagreement; 0: their mean learns instead")
    spread: float = cli.option(0.05, "how far temperatures differ between classes", least=0, most=1)
    drw: bool = cli.option(True, "deferred re-weighting: effective-number weights from --drw-epoch on")
    drw_epoch: int = cli.option(160, "first 0-based epoch with these weights", least=0, is_epoch=True)
    mix: str = cli.option("cutmix", "a box is pasted (CMO), or Remix", choices=("cutmix", "remix"))
    p_mix: float = cli.option(0.0, "probability that a batch is mixed; CMO has 0.5", least=0, most=1)
    alpha: float = cli.option(1.0, "lambda ~ Beta(alpha, alpha)", above=0)
    mix_start: int = cli.option(4, "first 0-based epoch with mixed batches", least=0, is_epoch=True)
    mix_end: int = cli.option(3, "epochs without them at the end", least=0, is_epoch=True)
    weighted: str = cli.option("foreground", "drawn by Eq. (2); none: the batch reordered", choices=STREAMS)


def image_weights(dataset):
    """1 / n_k for each image of class k, [N]. Draws are then class-balanced, Eq. (2) of CMO with r = 1."""
    return dataset.class_counts.double().pow(-1)[dataset.labels]


def effective_weights(class_counts, beta=0.9999):
    """Weight of each class [K] by its effective number, ~ (1 - beta) / (1 - beta^n_k), mean 1."""
    weights = (1 - beta) / (1 - beta ** class_counts.double())
    return (weights / weights.mean()).float()


def class_temperatures(class_counts, spread):
    """T_k = t_k / max(t) of each class [K], with t_k = 1 + spread * (K n_k / N - 1)."""
    t = 1 + spread * (class_counts / class_counts.mean() - 1)
    return t / t.max()


def random_box(lam, height, width, rng):
    """(top, bottom, left, right): a box of area 1 - lam at a random place, clipped at the border."""
    y, x = rng.integers(height), rng.integers(width)
    half_height = int(height * (1 - lam) ** 0.5) // 2  # an odd side loses a pixel, as in the released code
    half_width = int(width * (1 - lam) ** 0.5) // 2
    top = max(y - half_height, 0)
    bottom = min(y + half_height, height)
    left = max(x - half_width, 0)
    right = min(x + half_width, width)
    return top, bottom, left, right


def remix_share(lam, n_background, n_foreground, kappa=3.0, tau=0.5):
    """Remix: the background's share of each label [B], by the images of both classes, [B] each."""
    share = torch.full_like(n_background, lam)
    share[(n_background >= kappa * n_foreground) & (lam < tau)] = 0.0
    share[(kappa * n_background <= n_foreground) & (1 - lam < tau)] = 1.0
    return share


def mix(images, foregrounds, rng, args):
    """(mixed images [B, C, H, W], the background's share of them), Eq. (1) of CMO. Overwrites images."""
    lam = rng.beta(args.alpha, args.alpha)
    if args.mix == "cutmix":
        height, width = images.shape[2:]
        top, bottom, left, right = random_box(lam, height, width, rng)
        images[:, :, top:bottom, left:right] = foregrounds[:, :, top:bottom, left:right]
        return images, 1 - (bottom - top) * (right - left) / (height * width)  # what is left after clipping
    return lam * images + (1 - lam) * foregrounds, lam


class Experts(nn.Module):
    """A trunk, and experts: the last two stages and the classifier of each of the networks.

    To train: logits of all experts [B, E, K]. To predict: their mean [B, K].
    """

    def __init__(self, networks):
        super().__init__()
        self.trunk = networks[0].backbone[:-2]
        for network in networks:
            network.backbone = network.backbone[-2:]
        self.experts = nn.ModuleList(networks)

    def forward(self, images):
        maps = self.trunk(images)
        logits = torch.stack([expert(maps) for expert in self.experts], dim=1)
        return logits if self.training else logits.mean(1)


def image_losses(logits, labels, class_counts):
    """Sum of the experts' losses of each image [B] in nats. logits [B, E, K]: SCALE * cosine, labels [B]."""
    # SCALE * (cosine - margin) at the label, the margin ~ n_k^(-1/4), at most 0.5
    margins = 0.5 * (class_counts.min() / class_counts).pow(0.25)
    margins = margins * F.one_hot(labels, len(class_counts))
    logits = logits - SCALE * margins[:, None]
    return sum(F.cross_entropy(z, labels, reduction="none") for z in logits.unbind(1))


def disagreement(logits, temperatures):
    """Sum over experts of KL(q || softmax(z / T)) of each image [B]. logits z [B, E, K], temperatures T [K].

    q = softmax(mean of z / T), through which no gradient goes.
    """
    mean = logits.mean(1, keepdim=True).detach()
    q = (mean / temperatures).softmax(2)
    log_p = (logits / temperatures).log_softmax(2)
    return F.kl_div(log_p, q, reduction="none").sum((1, 2))


def weighted_mean(accelerator, losses, weights):
    """sum(w l) / sum(w) over all processes. These average gradients, so the divisor is their mean sum(w)."""
    return (weights * losses).sum() / accelerator.reduce(weights.sum(), reduction="mean")


def make_model(dataset, args):
    networks = []
    for i in range(args.experts):
        seed = args.seed + 1000 * i
        networks.append(models.build(args.arch, dataset, seed, SCALE, args.pretrained, narrow=0.75))
    return Experts(networks)


def train_one_epoch(run, model, backgrounds, foregrounds, optimizer, class_counts, epoch, args):
    """One epoch. images: uint8 pixels [B, C, H, W], which the network normalises; class_counts [K]."""
    model.train()
    mixing = args.mix_start <= epoch < args.epochs - args.mix_end
    class_weights = torch.ones_like(class_counts)
    temperatures = torch.ones_like(class_counts)
    if args.drw and epoch >= args.drw_epoch:
        class_weights = effective_weights(class_counts)
        temperatures = class_temperatures(class_counts, args.spread)
    factor = args.diversity * temperatures.mean() ** 2

    def batch_loss(logits, labels, share):
        if args.diversity == 0:  # all experts learn from their mean, as in the released code
            logits = logits.mean(1, keepdim=True).expand_as(logits)
        losses = share * image_losses(logits, labels, class_counts)
        apart = share * disagreement(logits, temperatures)
        return weighted_mean(run.accelerator, losses, class_weights[labels]) + factor * apart.mean()

    foregrounds = iter(foregrounds)
    for images, labels in run.steps(backgrounds):  # Alg. 1, line 5
        if mixing and run.rng.random() < args.p_mix:
            if args.weighted == "none":
                order = torch.randperm(len(labels), device=labels.device)
                others, other_labels = images[order], labels[order]
            else:
                others, other_labels = next(foregrounds)  # line 6
            images, share = mix(images, others, run.rng, args)
            if args.mix == "remix":
                share = remix_share(share, class_counts[labels], class_counts[other_labels])
            logits = model(images)
            loss = batch_loss(logits, labels, share) + batch_loss(logits, other_labels, 1 - share)  # line 9
        else:
            loss = batch_loss(model(images), labels, 1.0)
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
    weights = image_weights(train_set)
    background_weights = weights if args.weighted in ("background", "both") else None
    foreground_weights = weights if args.weighted in ("foreground", "both") else None
    backgrounds = datasets.train_loader(train_set, args, background_weights, stream=0)
    foregrounds = datasets.train_loader(train_set, args, foreground_weights, stream=1)
    test_loader = datasets.test_loader(test_set, args)
    model = make_model(train_set, args)
    optimizer = SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=args.wd, nesterov=args.nesterov)
    model, optimizer = accelerator.prepare(model, optimizer)
    backgrounds, foregrounds, test_loader = accelerator.prepare(backgrounds, foregrounds, test_loader)
    class_counts = train_set.class_counts.float().to(accelerator.device)

    for epoch in run.epochs(range(args.epochs), model=model, optimizer=optimizer):
        backgrounds.set_epoch(epoch)
        foregrounds.set_epoch(epoch)
        optimizer.param_groups[0]["lr"] = recipes.learning_rate(epoch, args)
        train_one_epoch(run, model, backgrounds, foregrounds, optimizer, class_counts, epoch, args)
        run.end_epoch(epoch, evaluation.per_split(run, model, test_loader))
    return run.finish()


if __name__ == "__main__":
    cli.run(main, Args, RECIPES, __doc__)
