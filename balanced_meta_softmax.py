"""Balanced Meta-Softmax (BALMS): Balanced Softmax, and a sampler that learns how often to draw each class.

Paper:    J. Ren, C. Yu, S. Sheng, X. Ma, H. Zhao, S. Yi, H. Li, "Balanced Meta-Softmax for Long-Tailed Visual
          Recognition", NeurIPS 2020, arXiv:2007.10740.
Method:   1. train the network on cross-entropy, freeze it and train a new classifier                    main
          2. on the Balanced Softmax, cross-entropy of z + log n; predict with z         Eq. (4), image_losses
          3. with images of class k drawn with probability ~ n_k sigmoid(psi_k)                   draw_images
          4. psi lowers the cross-entropy of class-balanced images after a virtual step of the classifier
                                                        virtual_step, factor_gradients, train_one_epoch
          Class-balanced sampling would balance twice, to weights ~ 1 / n_k^2; the sampler finds the middle.
          --meta reweighter learns weights of the classes' losses instead. --classifier joint: stage 1 alone.
Differs:  a class is drawn, then one of its images; the gradient is exact, without double backward. As in the
          code, the classifier's step is on the batch drawn before psi's, and BatchNorm moves in stage 2.
          docs/balanced_meta_softmax.md has the rest, and a command for every row of the paper's tables.
Expected: ResNet-32, imbalance 100, softmax / Balanced Softmax / BALMS: cifar10_lt 77.4 / 83.1 / 84.9,
          cifar100_lt 45.3 / 50.3 / 50.8.
Run:      accelerate launch balanced_meta_softmax.py --dataset cifar100_lt
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from accelerate import Accelerator, DataLoaderConfiguration
from torch import nn
from torch.optim import SGD

from common import cli, datasets, evaluation, models, recipes
from common.runs import Run

# Settings of the released code (CIFAR: its iterations as epochs of imbalance 100), and ours where it has none
# fmt: off
CIFAR = dict(arch="resnet32", batch_size=512, cosine=True, warmup_from=0.5, wd=5e-4, augment="auto")
IMAGENET = dict(arch="resnet10", imbalance=None, epochs=90, batch_size=512, lr=0.2, cosine=True, wd=5e-4,
                augment="jitter", stage2_epochs=20, stage2_lr=0.5, init_power=0.1, psi_lr=0.001,
                meta_batch_size=1024)
PLACES = dict(arch="resnet152", imbalance=None, batch_size=256, wd=5e-4, augment="jitter",
              stage1="runs/places", stage2_lr=0.02, init_power=0.3, psi_lr=0.001)
FILES = dict(recipes.FILES, stage2_lr=0.05, psi_lr=0.001)
RECIPES = {
    "synthetic": dict(recipes.SYNTHETIC, bn_train=False, psi_lr=0.1, meta_batch_size=100),
    "cifar10_lt": dict(CIFAR, epochs=520, warmup=32, stage2_epochs=84),
    "cifar100_lt": dict(CIFAR, epochs=591, warmup=37, stage2_epochs=96),
    "imagenet_lt": IMAGENET,
    "places_lt": PLACES,
    "inat2018": dict(recipes.INAT, stage2_lr=0.05, psi_lr=0.001),
    "mnist_lt": recipes.MNIST,
    "fashion_mnist_lt": recipes.MNIST,
    "cmnist_lt": recipes.MNIST,
    "image_folder": FILES,
    "image_list": FILES,
}
# fmt: on


@dataclass
class Args(cli.Args):
    classifier: str = cli.option("new", "new: of stage 2; joint: no stage 2", choices=("new", "joint"))
    stage1: str | None = cli.option(None, "folder of a finished run whose network is taken for stage 1")
    loss: str = cli.option("ce", "loss of stage 1, cross-entropy or Balanced Softmax", choices=("ce", "bs"))
    sampling: str = cli.option("instance", "how stage 1 draws images", choices=("instance", "class"))
    tau: float = cli.option(1.0, "exponent of the class counts in the Balanced Softmax", least=0)
    meta: str = cli.option(
        "sampler",
        "what stage 2 learns, too: how often to draw each class (BALMS), weights of their losses, or nothing",
        choices=("sampler", "reweighter", "none"),
    )
    stage2_loss: str = cli.option("bs", "loss of stage 2", choices=("ce", "bs"))
    stage2_sampling: str = cli.option("instance", "how stage 2 draws them", choices=("instance", "class"))
    stage2_epochs: int = cli.option(10, "epochs of stage 2, in the last of which the rate is 0", least=2)
    stage2_lr: float = cli.option(0.1, "its learning rate, along a cosine", above=0)
    bn_train: bool = cli.option(True, "BatchNorm statistics move in stage 2")
    init_power: float = cli.option(0.0, "p: at first class k is drawn with probability ~ n_k^(1-p)", least=0)
    psi_lr: float = cli.option(0.01, "Adam's learning rate of psi", least=0)
    meta_batch_size: int = cli.option(512, "class-balanced images per step, over all processes", least=1)
    meta_list: str | None = cli.option(None, "list of the class-balanced images, if not training images")

    def __post_init__(self):
        super().__post_init__()
        if self.stage1 and self.classifier == "joint":
            raise cli.Refused("--classifier joint: trains nothing after --stage1; use new")
        if self.cosine and self.epochs == 1 and not self.stage1:
            raise cli.Refused("--epochs 1: trains nothing, the cosine is 0 in the last epoch; use more")
        if self.nesterov and self.meta != "none" and self.classifier == "new":
            raise cli.Refused("--nesterov: the step ahead of --meta goes without it; leave it out")


def image_losses(logits, labels, class_counts, loss, tau=1.0):
    """Loss of each image [B] in nats. logits [B, K], labels [B], class_counts [K]."""
    if loss == "bs":  # Eq. (4); n_max cancels in the softmax, and makes equal counts exactly cross-entropy
        logits = logits + tau * (class_counts / class_counts.max()).log()
    return F.cross_entropy(logits, labels, reduction="none")


def initial_psi(class_counts, power):
    """psi_k = logit(s_k) [K], s_k = m_k / (min m + max m), m_k = (n_k / N)^-power; 0 draws images evenly."""
    m = (class_counts.double() / class_counts.sum()).pow(-power)
    return torch.logit(m / (m.min() + m.max())).float()


def class_law(rates, class_counts):
    """pi_k = n_k s_k / sum_j n_j s_j [K], the probability that the Meta Sampler draws class k."""
    weights = class_counts * rates
    return weights / weights.sum()


def learned(psi, class_counts, meta):
    """For the log, of each class: the probability of being drawn, or the weight."""
    rates = psi.detach().sigmoid()
    if meta == "none":
        return {}
    if meta == "reweighter":
        return {"class_weights": rates.tolist()}
    law = class_law(rates, class_counts)
    return {"class_rates": law.tolist(), "rates_variance": rates.var(correction=0).item()}


def straight_through(log_weights, noise):
    """Gumbel-max: (chosen [B], k with probability ~ exp(log_weights_k); factors [B]), noise [B, K] Gumbel's.

    A factor is 1 and has the gradient of the chosen one's share in softmax(log_weights + noise).
    """
    noisy = log_weights + noise
    chosen = noisy.argmax(1)
    soft = noisy.softmax(1).gather(1, chosen[:, None])[:, 0]
    return chosen, soft + (1 - soft).detach()


def draw_images(psi, images_of, size, rng):
    """The Meta Sampler: (indices [size], factors [size]). images_of: the indices of each class's images."""
    counts = torch.tensor([len(images) for images in images_of])
    noise = torch.from_numpy(rng.gumbel(size=(size, len(psi)))).to(psi)
    classes, factors = straight_through(counts.to(psi).log() + F.logsigmoid(psi), noise)
    classes = classes.cpu()
    within = torch.from_numpy(rng.integers(counts[classes].numpy()))  # a class draws its images evenly
    return torch.cat(images_of)[(counts.cumsum(0) - counts)[classes] + within], factors


def virtual_step(theta, gradients, optimizer):
    """The list of parameters theta after the step that SGD would take along `gradients`."""
    group = optimizer.param_groups[0]
    ahead = []
    for parameter, gradient in zip(theta, gradients, strict=True):
        momentum = optimizer.state[parameter].get("momentum_buffer", 0.0)  # none before the first step
        step = gradient + group["weight_decay"] * parameter + group["momentum"] * momentum
        ahead.append((parameter - group["lr"] * step).detach().requires_grad_())
    return ahead


def factor_gradients(accelerator, classifier, optimizer, factors, batch, meta_batch, losses):
    """a_b = d L_meta / d factor_b [b], with L_meta the loss of the meta batch after the virtual step.

    The step goes along the gradient of mean_b(factor_b l_b), so a_b = -(lr / B) <grad l_b, G>, G the gradient
    of L_meta: dl_b / dlogits_b times the logits of G, as they are linear. A batch: (features [b, D], labels).
    """
    (features, labels), (meta_features, meta_labels) = batch, meta_batch
    theta = list(classifier.parameters())  # weight and bias
    logits = classifier(features)
    (residuals,) = torch.autograd.grad(losses(logits, labels).sum(), logits)
    along = factors.detach()[:, None] * residuals / len(labels)
    gradients = torch.autograd.grad(logits, theta, along)
    ahead = virtual_step(theta, accelerator.reduce(gradients, reduction="mean"), optimizer)
    # Cross-entropy, whatever the loss of the step: these images are balanced.
    meta_loss = F.cross_entropy(F.linear(meta_features, *ahead), meta_labels)
    meta_gradients = torch.autograd.grad(meta_loss, ahead)
    meta_gradients = accelerator.reduce(meta_gradients, reduction="mean")
    products = (residuals * F.linear(features, *meta_gradients)).sum(1)
    size = len(labels) * accelerator.num_processes
    return -optimizer.param_groups[0]["lr"] / size * products


def learning_rate(epoch, args):
    """Of the 0-based `epoch` of stage 1. The released cosine is stepped before an epoch: the last has 0."""
    if not args.cosine:
        return recipes.learning_rate(epoch, args)
    if epoch + 1 < args.warmup:
        return args.lr * (args.warmup_from + (1 - args.warmup_from) * epoch / (args.warmup - 1))
    share = (epoch + 1 - args.warmup) / max(args.epochs - args.warmup, 1)
    return args.lr * 0.5 * (1 + math.cos(math.pi * share))


def stage2_learning_rate(epoch, args):
    """Of the 0-based `epoch` of stage 2: the same cosine without warm-up."""
    return args.stage2_lr * 0.5 * (1 + math.cos(math.pi * (epoch + 1) / args.stage2_epochs))


def make_model(dataset, args):
    return models.build(args.arch, dataset, args.seed, pretrained=args.pretrained and not args.stage1)


def train_one_epoch(run, model, loader, meta_loader, optimizer, rates, adam, losses, meta, args):
    accelerator, network, dataset = run.accelerator, run.unwrap(model), loader.dataset
    images_of, psi = dataset.by_class(), rates["psi"]
    share = slice(accelerator.process_index, None, accelerator.num_processes)
    # What a step draws is read in that step, by loader processes that have a part of the batch each.
    parts = []
    drawn_loader = datasets.loader(dataset, batch_sampler=parts, persistent_workers=dataset.workers > 0)

    batches, meta_batches = iter(loader), iter(meta_loader)
    for _ in run.steps(range(len(loader))):
        if meta == "sampler":
            indices, factors = draw_images(psi, images_of, args.batch_size, run.rng)  # alike on all processes
            factors = factors[share]
            parts[:] = [part.tolist() for part in indices[share].chunk(max(dataset.workers, 1))]
            images, labels = zip(*drawn_loader, strict=True)
            images, labels = torch.cat(images).to(psi.device), torch.cat(labels).to(psi.device)
        else:
            images, labels = next(batches)
        if meta == "reweighter":
            factors = psi.sigmoid()[labels]

        if meta != "none":
            meta_images, meta_labels = next(meta_batches)
            with torch.no_grad(), accelerator.autocast():
                batch = network.features(images).float(), labels
                meta_batch = network.features(meta_images).float(), meta_labels
            gradients = factor_gradients(
                accelerator, network.classifier, optimizer, factors, batch, meta_batch, losses
            )
            (gradient,) = torch.autograd.grad(factors, psi, gradients)
            psi.grad = accelerator.reduce(gradient, reduction="sum")
            adam.step()

        # The real step, on the same images: the new psi of a sampler is for the batches to come.
        weights = psi.detach().sigmoid()[labels] if meta == "reweighter" else 1.0
        loss = (weights * losses(model(images), labels)).mean()
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        run.log(loss=loss)


def main(args: Args) -> dict:
    config = DataLoaderConfiguration(split_batches=True)
    accelerator = Accelerator(dataloader_config=config)
    run = Run(accelerator, args)
    train_set, test_set = datasets.load(args)
    meta_set = datasets.load_list(args, "meta_list", train_set).plain() if args.meta_list else train_set
    run.set_data(train_set, test_set, meta_set)
    class_balanced = datasets.class_aware(meta_set, in_a_row=1)
    size = len(train_set) // args.batch_size * args.meta_batch_size

    def meta_order(generator, epoch):
        passes = [class_balanced(generator, epoch) for _ in range(0, size, len(meta_set))]
        return torch.cat(passes)[:size]

    sampler = datasets.EpochSampler(meta_order, size, args.seed, stream=1)
    meta_loader = datasets.loader(meta_set, args.meta_batch_size, sampler=sampler)
    test_loader = datasets.test_loader(test_set, args)
    meta_loader, test_loader = accelerator.prepare(meta_loader, test_loader)
    network = make_model(train_set, args).to(accelerator.device)
    class_counts = train_set.class_counts.float().to(accelerator.device)
    rates = nn.ParameterDict({"psi": initial_psi(class_counts, args.init_power)})
    adam = torch.optim.Adam(rates.parameters(), args.psi_lr)

    def train(epochs, sampling, loss, rate_at, meta="none", bn_train=True):
        """Train what is not frozen. rate_at: learning rate of the stage's 0-based epoch."""
        order = datasets.class_aware(train_set, in_a_row=1) if sampling == "class" else None
        loader = datasets.train_loader(train_set, args, order=order)
        losses = partial(image_losses, class_counts=class_counts, loss=loss, tau=args.tau)
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        optimizer = SGD(trained, args.lr, momentum=0.9, weight_decay=args.wd, nesterov=args.nesterov)
        model, optimizer, loader = accelerator.prepare(network, optimizer, loader)
        objects = dict(model=model, optimizer=optimizer, rates=rates, adam=adam)
        for epoch in run.epochs(epochs, **objects):
            loader.set_epoch(epoch)
            meta_loader.set_epoch(epoch)
            optimizer.param_groups[0]["lr"] = rate_at(epoch - epochs.start, args)
            model.train()
            if not bn_train:
                network.eval()
            train_one_epoch(run, model, loader, meta_loader, optimizer, rates, adam, losses, meta, args)
            facts = learned(rates["psi"], class_counts, meta)
            run.end_epoch(epoch, evaluation.per_split(run, model, test_loader), **facts)
        accelerator.free_memory()  # the next stage prepares the network anew, for its own part to be trained

    # Stage 1: the network
    if not args.stage1:
        train(range(args.epochs), args.sampling, args.loss, learning_rate)
    elif not run.checkpoint:  # which has the network
        models.load_weights(args.stage1, network, train_set.class_names)
    if args.classifier == "joint":
        return run.finish()

    # Stage 2: a new classifier
    network.requires_grad_(False)
    torch.manual_seed(args.seed)  # the same new classifier also in a resumed run
    old = network.classifier
    network.classifier = nn.Linear(old.in_features, old.out_features).to(accelerator.device)
    epochs = range(args.epochs, args.epochs + args.stage2_epochs)
    train(epochs, args.stage2_sampling, args.stage2_loss, stage2_learning_rate, args.meta, args.bn_train)
    return run.finish()


if __name__ == "__main__":
    cli.run(main, Args, RECIPES, __doc__)
