"""CMO: Context-rich Minority Oversampling.

Paper:    S. Park, Y. Hong, B. Heo, S. Yun, J. Y. Choi, "The Majority Can Help the Minority: Context-rich
          Minority Oversampling for Long-tailed Classification", CVPR 2022, arXiv:2112.00412.
Method:   1. draw backgrounds as they come, foregrounds with weight n_k^-r per image    Eq. (2), image_weights
          2. paste a box of each foreground onto a background                              Eq. (1), random_box
          3. loss = lam * loss(y of background) + (1 - lam) * loss(y of foreground)    Alg. 1, train_one_epoch
          The loss is cross-entropy, LDAM or Balanced Softmax, with or without deferred re-weighting (DRW).
Differs:  as in the released code, Eq. (2) is per image, half of the batches are mixed, none in the first 4
          and last 3 epochs. docs/cmo.md has the rest, and a command for every row of the paper's tables.
Expected: cifar100_lt, imbalance 100, ResNet-32: CE 43.9, CE-DRW 47.0, LDAM-DRW 47.2, BS 46.6 (paper).
Run:      accelerate launch cmo.py --dataset cifar100_lt --loss ce --drw
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator, DataLoaderConfiguration
from torch.optim import SGD
from torchvision.transforms import v2

from common import cli, datasets, evaluation, models, recipes
from common.runs import Run

# Settings of the paper, one row per data set, and ours where it has none. --recipe long: its 400 epochs.
# fmt: off
CIFAR = dict(arch="resnet32", epochs=200, lr_steps=(160, 180), lr_factor=0.01, warmup=5, wd=2e-4,
             drw_epoch=160)
CIFAR_LONG = dict(arch="resnet32", epochs=400, lr_steps=(321, 361), warmup=10, wd=2e-4, drw_epoch=320,
                  augment="strong")
IMAGENET = dict(arch="resnet50", epochs=100, batch_size=256, lr_steps=(60, 80), warmup=5, wd=2e-4,
                drw_epoch=80, imbalance=None, augment="jitter")
INAT = dict(arch="resnet50", epochs=200, batch_size=512, lr_steps=(75, 160), warmup=5, wd=2e-4,
            drw_epoch=160, imbalance=None, splits=(100, 21))
LONG = dict(arch="resnet50", epochs=400, batch_size=256, lr=0.02, cosine=True, warmup=10, wd=5e-4,
            drw_epoch=320, imbalance=None, augment="strong")
MNIST = dict(recipes.MNIST, drw_epoch=6, mix_start=0, mix_end=1)
FILES = dict(recipes.FILES, drw_epoch=80)
RECIPES = {
    "synthetic": dict(recipes.SYNTHETIC, drw_epoch=28, mix_start=1, mix_end=1),
    "cifar10_lt": CIFAR,
    "cifar10_lt long": CIFAR_LONG,
    "cifar100_lt": CIFAR,
    "cifar100_lt long": CIFAR_LONG,
    "imagenet_lt": IMAGENET,
    "imagenet_lt long": LONG,
    "inat2018": INAT,
    "inat2018 long": dict(LONG, wd=1e-4, splits=(100, 21)),
    "mnist_lt": MNIST,
    "fashion_mnist_lt": MNIST,
    "cmnist_lt": MNIST,
    "image_folder": FILES,
    "image_list": FILES,
}
# fmt: on
STREAMS = ("foreground", "background", "both", "none")
SCALE = 30.0  # LDAM's factor on the cosines
REPLACE = {"blur": v2.GaussianBlur(13, (0.1, 2.0)), "jitter": v2.ColorJitter(0.4, 0.4, 0.4, 0.1)}


@dataclass
class Args(cli.Args):
    loss: str = cli.option("ce", "cross-entropy, LDAM or Balanced Softmax", choices=("ce", "ldam", "bs"))
    drw: bool = cli.option(False, "deferred re-weighting: effective-number weights from --drw-epoch on")
    drw_epoch: int = cli.option(160, "first 0-based epoch with these weights", least=0, is_epoch=True)
    mix: str = cli.option(
        "cutmix",
        "CMO pastes a box; mixup and Remix blend; blur, jitter: foregrounds replace backgrounds",
        choices=("cutmix", "mixup", "remix", "blur", "jitter"),
    )
    p_mix: float = cli.option(0.5, "probability that a batch is mixed; 0 trains without CMO", least=0, most=1)
    alpha: float = cli.option(1.0, "lambda ~ Beta(alpha, alpha)", above=0)
    mix_start: int = cli.option(4, "first 0-based epoch with mixed batches", least=0, is_epoch=True)
    mix_end: int = cli.option(3, "epochs without them at the end", least=0, is_epoch=True)
    r: float = cli.option(1.0, "exponent of Eq. (2): 0 natural, 1 class-balanced, 2 reversed", least=0)
    effective: bool = cli.option(False, "weights by effective numbers instead of Eq. (2), its ablation E(k)")
    weighted: str = cli.option("foreground", "drawn by Eq. (2); none: the batch, shuffled", choices=STREAMS)


def image_weights(dataset, r=1.0, effective=False):
    """Eq. (2): n_k^-r for each image of class k, [N]; so class k is drawn with ~ n_k^(1 - r). Or by E(k)."""
    if effective:
        return effective_weights(dataset.class_counts)[dataset.labels]
    return dataset.class_counts.double().pow(-r)[dataset.labels]


def effective_weights(class_counts, beta=0.9999):
    """Weight of each class [K] by its effective number, ~ (1 - beta) / (1 - beta^n_k), mean 1."""
    weights = (1 - beta) / (1 - beta ** class_counts.double())
    return (weights / weights.mean()).float()


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
    """(mixed images [B, C, H, W], the background's share of them), Eq. (1). Overwrites images."""
    lam = rng.beta(args.alpha, args.alpha)
    if args.mix == "cutmix":
        height, width = images.shape[2:]
        top, bottom, left, right = random_box(lam, height, width, rng)
        images[:, :, top:bottom, left:right] = foregrounds[:, :, top:bottom, left:right]
        return images, 1 - (bottom - top) * (right - left) / (height * width)  # what is left after clipping
    if args.mix in REPLACE:
        return torch.stack([REPLACE[args.mix](image) for image in foregrounds]), 0.0
    return lam * images + (1 - lam) * foregrounds, lam


def image_losses(logits, labels, class_counts, loss):
    """Loss of each image [B] in nats. logits [B, K] (LDAM: SCALE * cosine), labels [B], class_counts [K]."""
    if loss == "ldam":  # SCALE * (cosine - margin) at the label, the margin ~ n_k^(-1/4), at most 0.5
        margins = 0.5 * (class_counts.min() / class_counts).pow(0.25)
        logits = logits - SCALE * margins * F.one_hot(labels, len(class_counts))
    if loss == "bs":  # log N cancels in the softmax
        logits = logits + class_counts.log()
    return F.cross_entropy(logits, labels, reduction="none")


def weighted_mean(accelerator, losses, weights):
    """sum(w l) / sum(w) over all processes. These average gradients, so the divisor is their mean sum(w)."""
    return (weights * losses).sum() / accelerator.reduce(weights.sum(), reduction="mean")


def make_model(dataset, args):
    scale = SCALE if args.loss == "ldam" else None
    return models.build(args.arch, dataset, args.seed, cosine=scale, pretrained=args.pretrained)


def train_one_epoch(run, model, backgrounds, foregrounds, optimizer, class_counts, epoch, args):
    """One epoch. images: uint8 pixels [B, C, H, W], which the network normalises; class_counts [K]."""
    model.train()
    mixing = args.mix_start <= epoch < args.epochs - args.mix_end
    class_weights = torch.ones_like(class_counts)
    if args.drw and epoch >= args.drw_epoch:
        class_weights = effective_weights(class_counts)

    def batch_loss(logits, labels, share):
        losses = share * image_losses(logits, labels, class_counts, args.loss)
        return weighted_mean(run.accelerator, losses, class_weights[labels])

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
    weights = image_weights(train_set, args.r, args.effective)
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
