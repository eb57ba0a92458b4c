"""Bag of tricks: mixup, re-weighting, re-sampling, CAM-based sampling and two stages, alone and combined.

Paper:    Y. Zhang, X.-S. Wei, B. Zhou, J. Wu, "Bag of Tricks for Long-Tailed Visual Recognition with Deep
          Convolutional Neural Networks", AAAI 2021.
Method:   1. train with input mixup on the images as they come                              train_one_epoch
          2. from --drw-epoch on draw classes evenly, of the images and of new ones, in which the
             foreground, where the class activation map is above its mean, is flipped, moved, or turned
             and scaled                               quotas, activation_maps, foregrounds, moved, paste
          3. end without mixup and without new images, drawn by --sampling                              main
          Each trick is an option, --recipe plain has none. What re-balances is deferred to --drw-epoch.
Differs:  as in the authors' toolbox, weights are n_min / n_k, and stage 3 draws classes evenly; as in the
          paper, a map's threshold is its mean (toolbox: 0.75 of it). The rest: docs/bag_of_tricks.md.
Expected: imbalance 100: cifar10_lt 80.0, cifar100_lt 47.8; imagenet_lt, ResNet-10: 43.1 (paper).
Run:      accelerate launch bag_of_tricks.py --dataset cifar100_lt
"""

import copy
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import gather_object
from torch.optim import SGD
from torchvision.ops import masks_to_boxes
from torchvision.transforms.v2.functional import affine, to_pil_image

from common import cli, datasets, evaluation, models, recipes
from common.cli import Refused
from common.runs import Run

# Settings of the toolbox (CIFAR, ImageNet-LT), of ImageNet-LT for iNaturalist, and ours where it has none.
# fmt: off
CIFAR = dict(arch="resnet32", epochs=400, lr_steps=(319, 359), lr_factor=0.01, warmup=5, warmup_from=1 / 3,
             wd=2e-4, nesterov=True, drw_epoch=320)
LARGE = dict(arch="resnet10", imbalance=None, epochs=200, batch_size=512, lr=0.2, lr_steps=(119, 159, 199),
             wd=1e-4, nesterov=True, drw_epoch=160)
HALF_CIFAR = dict(epochs=200, lr_steps=(159, 179), drw_epoch=160)
HALF_LARGE = dict(epochs=100, lr_steps=(59, 79), drw_epoch=80)
MNIST = dict(recipes.MNIST, drw_epoch=6, stage3_epochs=1, cam=False)
FILES = dict(recipes.FILES, drw_epoch=80, stage3_epochs=10, cap=100)
RECIPES = {
    "synthetic": dict(recipes.SYNTHETIC, drw_epoch=28, stage3_epochs=4, rotation=10),
    "cifar10_lt": CIFAR,
    "cifar100_lt": dict(CIFAR, beta=0.9),
    "imagenet_lt": dict(LARGE, augment="jitter", cap=100),
    "inat2018": dict(LARGE, arch="resnet50", splits=(100, 21), cap=50),
    "mnist_lt": MNIST,
    "fashion_mnist_lt": MNIST,
    "cmnist_lt": MNIST,
    "image_folder": FILES,
    "image_list": FILES,
}
NO_TRICK = dict(mixup=0.0, sampling="instance", cam=False, finetune=False)
HALF = dict(cifar10_lt=HALF_CIFAR, cifar100_lt=HALF_CIFAR, imagenet_lt=HALF_LARGE, inat2018=HALF_LARGE)
for name, row in list(RECIPES.items()):
    RECIPES[name + " long"] = row | NO_TRICK  # for mixup alone
    RECIPES[name + " plain"] = row | NO_TRICK | HALF.get(name, {})  # for another trick alone
# fmt: on
SCALE = 30.0  # LDAM's factor on the cosines
LOSSES = ("ce", "focal", "smooth", "label-aware", "ldam", "cdt", "bs")
WEIGHTS = ("none", "cost", "square-root", "effective")
SAMPLINGS = ("instance", "class", "square-root", "progressive")


@dataclass
class Args(cli.Args):
    loss: str = cli.option("ce", "smooth: label smoothing; cdt: temperatures; bs: Balanced Softmax", LOSSES)
    reweight: str = cli.option("none", "weights: n_min / n_k, its root, or by effective numbers", WEIGHTS)
    beta: float = cli.option(0.9999, "of effective numbers", least=0, most=0.9999999)
    gamma: float = cli.option(2.0, "exponent of the focal loss", least=0)
    sampling: str = cli.option("class", "of images; class: of a class, then of its images", SAMPLINGS)
    drw_epoch: int = cli.option(160, "first 0-based epoch that re-balances, or last", least=0, is_epoch=True)
    mixup: float = cli.option(1.0, "mixup, lambda ~ Beta(mixup, mixup); 0: none", least=0)
    mix: str = cli.option("input", "images, pooled features, or Remix", ("input", "manifold", "remix"))
    cam: bool = cli.option(True, "CAM-based sampling: new images from --drw-epoch on")
    cam_threshold_scale: float = cli.option(1.0, "foreground: CAM at least this times its mean", above=0)
    cap: int | None = cli.option(None, "of new images: only for classes below this, up to it", least=1)
    rotation: int = cli.option(45, "of new images, in degrees; lower it if that alters a class", least=1)
    finetune: bool = cli.option(True, "stage 3, after --epochs: without mixup and new images")
    stage3_epochs: int = cli.option(20, "epochs of stage 3", least=1, is_epoch=True)

    def __post_init__(self):
        super().__post_init__()
        if self.mix == "manifold" and self.loss == "ldam":
            raise Refused("--mix manifold --loss ldam: its classifier is not linear; use --mix input")
        self.drw_epoch = min(self.drw_epoch, self.epochs - 1)  # a short run has stage 2, too


def effective_weights(class_counts, beta=0.9999):
    """Weight of each class [K] by its effective number, ~ (1 - beta) / (1 - beta^n_k), mean 1."""
    weights = (1 - beta) / (1 - beta ** class_counts.double())
    return (weights / weights.mean()).float()


def class_weights(class_counts, reweight, beta=0.9999):
    """Weight of each class [K]; cost: cost-sensitive, n_min / n_k."""
    if reweight == "effective":
        return effective_weights(class_counts, beta)
    power = {"none": 0.0, "square-root": 0.5, "cost": 1.0}[reweight]
    return (class_counts.min() / class_counts).pow(power)


def image_losses(logits, labels, class_counts, loss, gamma=2.0):
    """Loss of each image [B] in nats. logits [B, K] (LDAM: SCALE * cosine), labels [B], class_counts [K]."""
    onehot = F.one_hot(labels, len(class_counts))
    if loss == "focal":  # of K sigmoids, summed
        against = (1 - 2 * onehot) * logits
        factors = (gamma * F.logsigmoid(against)).exp()
        return (factors * F.softplus(against)).sum(1)
    if loss == "ldam":  # SCALE * (cosine - margin) at the label, the margin ~ n_k^(-1/4), at most 0.5
        margins = 0.5 * (class_counts.min() / class_counts).pow(0.25)
        logits = logits - SCALE * margins * onehot
    if loss == "cdt":  # class-dependent temperatures
        logits = logits / (class_counts.max() / class_counts).pow(0.2)
    if loss == "bs":  # log N cancels in the softmax
        logits = logits + class_counts.log()
    losses = F.cross_entropy(logits, labels, reduction="none")
    eps = 0.1 if loss == "smooth" else 0.0
    if loss == "label-aware":  # 0.1 for the smallest class, 0.4 for the largest, a sine between
        share = (class_counts - class_counts.min()) / (class_counts.max() - class_counts.min()).clamp(min=1)
        eps = (0.1 + 0.3 * torch.sin(torch.pi / 2 * share))[labels]
    return (1 - eps) * losses - eps * logits.log_softmax(1).mean(1)


def weighted_mean(accelerator, losses, weights):
    """sum(w l) / sum(w) over all processes. These average gradients, so the divisor is their mean sum(w)."""
    return (weights * losses).sum() / accelerator.reduce(weights.sum(), reduction="mean")


def remix_share(lam, n_background, n_foreground, kappa=3.0, tau=0.5):
    """Remix: the background's share of each label [B], by the images of both classes, [B] each."""
    share = torch.full_like(n_background, lam)
    share[(n_background >= kappa * n_foreground) & (lam < tau)] = 0.0
    share[(kappa * n_background <= n_foreground) & (1 - lam < tau)] = 1.0
    return share


def class_probabilities(class_counts, sampling, progress=0.0):
    """Probability of drawing each class [K]; progressive: from instance at progress 0 to class at 1."""
    n = class_counts.double()
    if sampling == "progressive":
        return (1 - progress) * n / n.sum() + progress / len(n)
    powers = n.pow({"instance": 1.0, "square-root": 0.5, "class": 0.0}[sampling])
    return powers / powers.sum()


def make_loader(pool, train_set, args):
    """Batches by --sampling, of the training set or of a pool that has new images, too; as many of each."""
    if args.sampling == "instance" and pool is train_set:
        return datasets.train_loader(train_set, args)

    def order(generator, epoch):
        start = args.drw_epoch if args.cam else 0  # with new images stage 2 is a run of its own
        progress = min(1.0, (epoch + 1 - start) / (args.epochs - start))  # in stage 3 it is 1
        p = class_probabilities(train_set.class_counts, args.sampling, progress)
        weights = (p / pool.class_counts)[pool.labels]
        return datasets.draw(weights, len(train_set), generator)

    return datasets.train_loader(pool, args, order=order, size=len(train_set))


def quotas(class_counts, cap=None):
    """New images per class [K]: n_max + n_min - n_k; with a cap none from cap images on, else at most cap."""
    numbers = class_counts.max() + class_counts.min() - class_counts
    if cap is None:
        return numbers
    return torch.where(class_counts < cap, numbers.clamp(max=cap), 0)


def activation_maps(maps, rows, size):
    """sum_k W[y, k] F_k, scaled to 0..1 and resized, [B, H, W]. maps: F [B, D, h, w], rows: W[y] [B, D]."""
    cam = torch.einsum("bdhw,bd->bhw", maps, rows)[:, None]
    cam = cam - cam.amin((2, 3), keepdim=True)
    cam = cam / cam.amax((2, 3), keepdim=True).clamp(min=1e-12)
    return F.interpolate(cam, size, mode="bilinear", align_corners=False)[:, 0]


def foregrounds(cam, scale=1.0):
    """bool [B, H, W]: where the map is at least scale * its mean, to rounding; nowhere where it is 0."""
    mean = cam.mean((1, 2), keepdim=True)
    return (cam >= scale * mean - 1e-6) & (mean > 0)


def moved(layers, rng, rotation=45):
    """layers [L, H, W], the last but one the foreground, flipped, translated, or turned and scaled."""
    operation = rng.integers(3)
    if operation == 0 or not layers[-2].any():
        return layers.flip(2)
    left, top, right, bottom = masks_to_boxes(layers[-2:-1])[0].int().tolist()
    if operation == 1:
        across = rng.integers(-left, layers.shape[2] - right)
        down = rng.integers(-top, layers.shape[1] - bottom)
        return affine(layers, 0.0, [across, down], 1.0, [0.0])
    angle = float(rng.integers(-rotation, rotation))
    scale = rng.integers(80, 120) / 100
    middle = [(left + right + 1) / 2, (top + bottom + 1) / 2]
    return affine(layers, angle, [0, 0], scale, [0.0], center=middle)


def paste(layers, new):
    """The image [C, H, W], but moved where its foreground was or is then. new: layers, moved.
    layers [C + 2, H, W]: image, foreground, and ones, which become 0 where nothing comes from inside."""
    where = (layers[-2] | new[-2]) & new[-1]
    return torch.where(where.bool(), new, layers)[:-2]


@torch.no_grad()
def with_new_images(run, network, train_set, args):
    """The training set and new images by `quotas`. Where its images are files, so are these: new_images/."""
    rng = np.random.default_rng(datasets.epoch_seed(args.seed, 0, stream=1))
    images_of = train_set.by_class()
    numbers = quotas(train_set.class_counts, args.cap).tolist()
    sources = [rng.choice(images_of[k], number) for k, number in enumerate(numbers)]
    sources = rng.permutation(np.concatenate(sources))
    cli.say(f"making {len(sources)} new images")
    if len(sources) == 0:
        return train_set
    parts = np.array_split(np.arange(len(sources)), run.accelerator.num_processes)
    mine = parts[run.accelerator.process_index]
    in_files = not torch.is_tensor(train_set.images)
    folder = run.folder.absolute() / "new_images"
    made = []
    weight = network.eval().classifier.weight
    rows = weight.T if args.loss == "ldam" else weight
    for images, labels in datasets.test_loader(train_set.subset(sources[mine]).plain(), args):
        maps = network.feature_map(images.to(run.accelerator.device))
        cam = activation_maps(maps, rows[labels], images.shape[2:])
        masks = foregrounds(cam, args.cam_threshold_scale)[:, None].to(images)
        batch = torch.cat([images, masks, torch.ones_like(masks)], dim=1).cpu()
        for layers in batch:
            i = mine[len(made)]
            rng = np.random.default_rng([args.seed, i])
            new = paste(layers, moved(layers, rng, args.rotation))
            if in_files:
                folder.mkdir(exist_ok=True)
                to_pil_image(new).save(folder / f"{i:07d}.jpg", quality=95)
                new = folder / f"{i:07d}.jpg"
            made.append(new)
    made = gather_object(made)
    if in_files:
        images = np.concatenate([train_set.images, datasets.as_bytes(made)])
    else:
        images = torch.cat([train_set.images, torch.stack(made).to(train_set.images.device)])
    return train_set.of(images, torch.cat([train_set.labels, train_set.labels[sources]]))


def make_model(dataset, args):
    scale = SCALE if args.loss == "ldam" else None
    return models.build(args.arch, dataset, args.seed, cosine=scale, pretrained=args.pretrained)


def learning_rate(epoch, args):
    """Of the 0-based `epoch`; stage 3 has lr / 100, a tenth of it after 2/5 of its epochs and after 4/5."""
    if epoch < args.epochs:
        return recipes.learning_rate(epoch, args)
    done = (epoch + 1 - args.epochs) / args.stage3_epochs
    return args.lr / 100 * 0.1 ** sum(done >= step for step in (0.4, 0.8))


def train_one_epoch(run, model, loader, optimizer, class_counts, epoch, args):
    model.train()
    loss_name, reweight = args.loss, args.reweight
    start = args.drw_epoch - 1 if args.loss == "ldam" else args.drw_epoch  # as in the toolbox
    if epoch < start:
        reweight = "none"
        loss_name = "ce" if args.loss in ("cdt", "bs") else args.loss
    weights = class_weights(class_counts, reweight, args.beta)

    def batch_loss(logits, labels, share):
        losses = share * image_losses(logits, labels, class_counts, loss_name, args.gamma)
        if args.loss == "focal":  # of sigmoids: the scale of the weights counts
            return (weights[labels] * losses).mean()
        return weighted_mean(run.accelerator, losses, weights[labels])

    for images, labels in run.steps(loader):
        if args.mixup and epoch < args.epochs:  # not in stage 3
            lam = run.rng.beta(args.mixup, args.mixup)
            order = torch.randperm(len(labels), device=labels.device)
            other_labels = labels[order]
            if args.mix == "manifold":  # the classifier is linear: as if features were mixed
                logits = model(images)
                logits = lam * logits + (1 - lam) * logits[order]
            else:
                logits = model(lam * images + (1 - lam) * images[order])
            share = lam
            if args.mix == "remix":
                share = remix_share(lam, class_counts[labels], class_counts[other_labels])
            loss = batch_loss(logits, labels, share) + batch_loss(logits, other_labels, 1 - share)
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
    test_loader = datasets.test_loader(test_set, args)
    model = make_model(train_set, args)
    maps = model.eval().feature_map(torch.zeros(1, *train_set.shape))
    if args.cam and (args.arch == "lenet" or maps[0, 0].numel() == 1):
        raise Refused(f"--arch {args.arch}: no places in its feature map; use resnet32, or --no-cam")
    optimizer = SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=args.wd, nesterov=args.nesterov)
    model, optimizer, test_loader = accelerator.prepare(model, optimizer, test_loader)
    class_counts = train_set.class_counts.float().to(accelerator.device)

    def train(epochs, loader, **kept):
        loader = accelerator.prepare(loader)
        for epoch in run.epochs(epochs, model=model, optimizer=optimizer, **kept):
            loader.set_epoch(epoch)
            optimizer.param_groups[0]["lr"] = learning_rate(epoch, args)
            train_one_epoch(run, model, loader, optimizer, class_counts, epoch, args)
            run.end_epoch(epoch, evaluation.per_split(run, model, test_loader))

    train(range(args.drw_epoch), datasets.train_loader(train_set, args))  # stage 1
    pool, kept = train_set, {}
    if args.cam and run.done + 1 < args.epochs:
        network = copy.deepcopy(run.unwrap(model))
        if run.checkpoint:  # of stage 2, which has the network of stage 1, too
            network.load_state_dict(run.checkpoint["state"]["stage1"])
        pool = with_new_images(run, network, train_set, args)
        kept["stage1"] = network
        optimizer.state.clear()
    train(range(args.drw_epoch, args.epochs), make_loader(pool, train_set, args), **kept)  # stage 2
    if args.finetune:
        optimizer.state.clear()
        last = args.epochs + args.stage3_epochs
        train(range(args.epochs, last), make_loader(train_set, train_set, args))  # stage 3
    return run.finish()


if __name__ == "__main__":
    cli.run(main, Args, RECIPES, __doc__)
