"""Balanced Meta-Softmax (BALMS): Balanced Softmax, and a sampler that learns how often to draw each class.

Paper:    J. Ren, C. Yu, S. Sheng, X. Ma, H. Zhao, S. Yi, H. Li, "Balanced Meta-Softmax for Long-Tailed Visual
          Recognition", NeurIPS 2020, arXiv:2007.10740.
Method:   1. train the network on cross-entropy, freeze it, and train a new classifier      new_classifier
          2. on the Balanced Softmax, cross-entropy of z + log n     Eqs. (3), (4), balanced_softmax_loss
             (--tau 0.25: of the generalisation bound); predict with the plain z
          3. with images of class k drawn with probability ~ n_k sigmoid(psi_k)                MetaSampler
          4. where psi lowers the cross-entropy of class-balanced images after a virtual step of the
             classifier                      virtual_step, factor_gradients, train_one_meta_epoch
          Class-balanced sampling with Balanced Softmax would balance twice: near the end class k weighs like
          1 / n_k^2. The Meta Sampler finds the middle. --meta reweighter learns weights of the classes'
          losses instead, --meta none nothing. --classifier joint is stage 1 alone: softmax, or with --loss bs
          Balanced Softmax end to end.
Differs:  the gradient of psi is exact, as in the released code, without its double backward pass. A class is
          drawn, then one of its images: the law of the released draw among all images, not its estimate of
          the gradient; that is --sampler-level instance. Each batch is drawn by the psi of its own step, and
          all stages and class-balanced batches have one training subset (the code draws several; on large
          sets it takes these batches from a validation list: --meta-list), whose rounds begin anew each
          epoch. AutoAugment is torchvision's. As in the code, not the paper or its talk: the classifier's
          real step is on the batch drawn before psi's, no Nesterov momentum, Adam's usual betas; on large
          sets the rate of psi, its start (--init-power) and the settings of stage 2. In stage 2 BatchNorm
          statistics move (not in our synthetic recipe). Places-LT starts from decoupled_crt.py's stage 1.
          An incomplete last batch is dropped; the result is the last epoch.
Expected: cifar10_lt, imbalance 200 / 100 / 10, ResNet-32: softmax 71.2 / 77.4 / 90.0 all, Balanced Softmax
          end to end 79.0 / 83.1 / 90.9, BALMS 81.5 / 84.9 / 91.3; cifar100_lt: 41.0 / 45.3 / 61.9, 45.9 /
          50.3 / 63.1, 45.5 / 50.8 / 63.0. imagenet_lt, ResNet-10: BALMS 41.8 (50.3 many, 39.5 medium, 25.3
          few; softmax 34.8 with the released code). places_lt: 38.7 (paper). Ours: see README.
Run:      accelerate launch balanced_meta_softmax.py --dataset cifar100_lt
"""

import math
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from accelerate import Accelerator, DataLoaderConfiguration
from torch import nn
from torch.func import functional_call, jvp
from torch.utils.data import DataLoader

from common import cli, datasets, evaluation, models, runs


# fmt: off
def cifar(largest, num_classes):
    """Recipe of a CIFAR: the released numbers of iterations, in epochs of the lengths of its loaders."""

    def epochs(iterations, imbalance, drop_last=False):
        imbalance = imbalance if imbalance >= 1 else 1.0  # less is refused later
        images = sum(datasets.long_tail_counts(largest, num_classes, imbalance))
        return math.ceil(iterations / (images // 512 if drop_last else math.ceil(images / 512)))

    return dict(arch="resnet32", batch_size=512, wd=5e-4, auto_augment=True, cutout=16,
                epochs=cli.By(lambda imbalance: epochs(13000, imbalance)),
                warmup=cli.By(lambda imbalance: epochs(800, imbalance)),
                stage2_epochs=cli.By(lambda imbalance, meta: epochs(2000, imbalance, meta != "none")))


# Settings of the released code (CIFAR, ImageNet-LT, Places-LT) and our own (the rest), one row per data set;
# an option given on the command line wins.
FILES = dict(arch="resnet50", imbalance=None, epochs=90, lr=0.05, wd=5e-4, stage2_lr=0.05, psi_lr=0.001)
RECIPES = {
    "cifar10_lt": cifar(5000, 10),
    "cifar100_lt": cifar(500, 100),
    "imagenet_lt": dict(arch="resnet10", imbalance=None, epochs=90, batch_size=512, lr=0.2, wd=5e-4,
                        color_jitter=0.4, psi_lr=0.001, init_power=0.1, meta_batch_size=1024,
                        stage2_epochs=cli.By(lambda meta: 10 if meta == "none" else 20),
                        stage2_lr=cli.By(lambda meta: 0.4 if meta == "none" else 0.5)),
    "places_lt": dict(arch="resnet152", imbalance=None, batch_size=256, wd=5e-4, color_jitter=0.4,
                      psi_lr=0.001, init_power=0.3, stage2_lr=0.02),
    "image_folder": FILES,
    "image_list": FILES,
    "synthetic": dict(epochs=40, batch_size=32, wd=5e-4, warmup=2, psi_lr=0.1, meta_batch_size=100,
                      bn_train_in_stage2=False),
}
# fmt: on
TRAINING = ("epochs", "lr", "warmup", "loss", "sampling")  # what stage 1 was, of the run of --stage1


@dataclass
class Args(cli.Args):
    classifier: str = cli.option(
        "new",
        "new: stage 2 trains a new classifier on the frozen network; joint: there is no stage 2",
        choices=("new", "joint"),
    )
    stage1: str | None = cli.option(None, "folder of a finished run to take for stage 1 (README: Two stages)")
    loss: str = cli.option("ce", "loss of stage 1, cross-entropy or Balanced Softmax", choices=("ce", "bs"))
    sampling: str = cli.option("instance", "how stage 1 draws images", choices=("instance", "class"))
    tau: float = cli.option(1.0, "exponent of the class counts in the Balanced Softmax", least=0)
    warmup: int = cli.option(0, "epochs in which the rate rises from half of it, linearly", least=0)
    meta: str = cli.option(
        "sampler",
        "what stage 2 learns beside the classifier: the sampling rates of the classes (BALMS), weights of "
        "their losses, or nothing",
        choices=("sampler", "reweighter", "none"),
    )
    stage2_loss: str = cli.option("bs", "loss of stage 2", choices=("ce", "bs"))
    stage2_sampling: str = cli.option(
        "instance", "how stage 2 draws images with --meta none", choices=("instance", "class")
    )
    stage2_epochs: int = cli.option(10, "epochs of stage 2", least=2, hint="(in the last one the rate is 0)")
    stage2_lr: float = cli.option(0.1, "learning rate of stage 2", above=0)
    bn_train_in_stage2: bool = cli.option(
        True, "in stage 2 BatchNorm goes by the batch and its statistics move, as in the released code"
    )
    sampler_level: str = cli.option(
        "class",
        "what the Meta Sampler draws among: classes, or all N images (batch size times N numbers in memory)",
        choices=("class", "instance"),
    )
    init_power: float = cli.option(
        0.0, "p: at first class k is drawn with probability ~ n_k^(1-p)", least=0, most=4
    )
    psi_lr: float = cli.option(0.01, "Adam's learning rate of psi", least=0)
    meta_batch_size: int = cli.option(512, "class-balanced images per step over all processes", least=1)
    meta_list: str | None = cli.option(
        None, "list file of the class-balanced images, not augmented, instead of training images"
    )

    def __post_init__(self):
        super().__post_init__()
        if self.lr_steps:
            cli.fail(f"--lr-steps {self.lr_steps[0]}: has no effect on a cosine schedule; leave it out")
        if self.epochs == 1 and not self.stage1:
            cli.fail("--epochs 1: the rate is 0 in the last epoch, so nothing would be trained; use more")
        if self.warmup >= self.epochs and not self.stage1:
            cli.fail(f"--warmup {self.warmup}: not before the end of --epochs {self.epochs}; lower it")
        if self.meta != "none" and self.stage2_sampling != "instance":
            given = f"--stage2-sampling {self.stage2_sampling}"
            cli.fail(f"{given}: has no effect on --meta {self.meta}; leave it out, or add --meta none")
        losses = [self.loss] * (not self.stage1) + [self.stage2_loss] * (self.classifier == "new")
        if self.tau != 1 and "bs" not in losses:
            cli.fail(f"--tau {self.tau}: is of the Balanced Softmax, which is no loss here; add --loss bs")
        learned = self.meta if self.classifier == "new" else "none"
        if self.sampler_level == "instance" and learned != "sampler":
            cli.fail("--sampler-level instance: there is no Meta Sampler here; leave it out")
        if self.meta_list and learned == "none":
            cli.fail(f"--meta-list {self.meta_list}: nothing is learned from it here; leave it out")
        if self.stage1 and self.classifier == "joint":
            cli.fail("--classifier joint: has no stage 2 to go on with from --stage1; use new")
        if self.dataset == "places_lt" and not self.stage1:
            cli.fail("--stage1: places_lt needs one, a run of decoupled_crt.py --classifier joint on it")


def log_prior(class_counts, tau=1.0):
    """tau * log(n_k / n_max) [K], float32; n_max cancels, and makes equal counts exactly cross-entropy.

    ValueError where a class has no image, as it would have no probability at all.
    """
    if class_counts.min() < 1:
        raise ValueError("Balanced Softmax needs at least one image of every class")
    return (tau * (class_counts.double() / class_counts.max()).log()).float()


def balanced_softmax_loss(logits, labels, prior):
    """-log of n_y^tau e^{z_y} / sum_k n_k^tau e^{z_k} for each image [B], Eq. (4), in nats.

    logits z [B, K], labels [B], prior = log_prior [K]; the sum is in float32 or wider. Where the prior is the
    same for all classes, as with tau = 0 or equal counts, this is cross-entropy.
    """
    return F.cross_entropy(logits + prior, labels, reduction="none")


def class_cycle(size, labels, class_counts, generator):
    """`size` indices: rounds over all classes in random order, of each class the next image of its own list.

    The list of a class is shuffled anew each time round. labels [N], class_counts [K].
    """
    num_classes, indices = len(class_counts), torch.empty(size, dtype=torch.int64)
    rounds = [torch.randperm(num_classes, generator=generator) for _ in range(0, size, num_classes)]
    classes = torch.cat(rounds)[:size]
    for k, images in enumerate(datasets.by_class(labels, class_counts)):
        slots = (classes == k).nonzero()[:, 0]
        times = -(-len(slots) // len(images))
        orders = [torch.randperm(len(images), generator=generator) for _ in range(times)]
        indices[slots] = images[torch.cat(orders)[: len(slots)]] if times else images[:0]
    return indices


def make_sampler(dataset, sampling, stream, args, **how):
    """A permutation of the images ("instance"), or class_cycle ("class"), of N images or how["size"]."""

    def cycle(size, epoch, generator):
        return class_cycle(size, dataset.labels, dataset.class_counts, generator)

    order = cycle if sampling == "class" else datasets.shuffled
    return datasets.EpochSampler(dataset, args.seed, stream, order=order, **how)


def initial_psi(class_counts, power):
    """psi_k = logit(s_k) [K], s_k = m_k / (min m + max m), m_k = (n_k / N)^-power; 0 draws images evenly."""
    m = (class_counts.double() / class_counts.sum()).pow(-power)
    return torch.logit(m / (m.min() + m.max())).float()


def class_law(rates, class_counts):
    """pi_k = n_k s_k / sum_j n_j s_j [K], the probability that the Meta Sampler draws class k."""
    weights = class_counts * rates
    return weights / weights.sum()


def straight_through(log_weights, noise):
    """Gumbel-max: (chosen [B], factors [B]). log_weights [M], noise [B, M] of the standard Gumbel law.

    chosen is i with probability ~ exp(log_weights_i). A factor is 1 and has the gradient of the chosen one's
    share in softmax(log_weights + noise).
    """
    noisy = log_weights + noise
    chosen = noisy.argmax(1)
    soft = noisy.softmax(1).gather(1, chosen[:, None])[:, 0]
    return chosen, soft + (1 - soft).detach()


class ClassRates(nn.Module):
    """s = sigmoid(psi) [K], learned."""

    def __init__(self, class_counts, power):
        super().__init__()
        self.psi = nn.Parameter(initial_psi(class_counts, power))

    def forward(self):
        return self.psi.sigmoid()


class MetaReweighter(ClassRates):
    """Weighs the loss of an image of class k by s_k; draws nothing."""

    def batches(self, loader, epoch, accelerator, args):
        """(images, labels, weights of their losses) of each batch, this process's share."""
        for images, labels in loader:
            yield images, labels, self()[labels]

    def facts(self):
        """For the log: the weight of each class."""
        return {"class_weights": self().tolist()}


class MetaSampler(ClassRates):
    """Draws images with replacement, of class k with probability pi_k ~ n_k s_k.

    level: "class" draws a class, then one of its images evenly; "instance" one of all N images by s_{y_i}.
    """

    def __init__(self, train_set, power=0.0, level="class"):
        super().__init__(train_set.class_counts, power)
        self.level, self.fetch = level, datasets.OnDemand(train_set)
        labels, counts = train_set.labels, train_set.class_counts
        facts = dict(labels=labels, by_class=labels.argsort(stable=True))
        facts |= dict(class_counts=counts, first=counts.cumsum(0) - counts)
        for name, value in facts.items():
            self.register_buffer(name, value, persistent=False)

    def draw(self, size, generator, share=slice(None)):
        """(items [b, 2], factors [b]) of a share of `size` draws; an item is (index, augmentation seed)."""
        log_weights, here = F.logsigmoid(self.psi), self.psi.device
        if self.level == "class":
            log_weights = log_weights + self.class_counts.log()
        else:
            log_weights = log_weights[self.labels]
        noise = torch.empty(size, len(log_weights), device=here).exponential_(generator=generator).log().neg()
        within, seeds = torch.randint(2**62, (2, size), device=here, generator=generator)[:, share]
        chosen, factors = straight_through(log_weights, noise[share])
        if self.level == "class":
            chosen = self.by_class[self.first[chosen] + within % self.class_counts[chosen]]
        return torch.stack([chosen, seeds], 1), factors

    def batches(self, loader, epoch, accelerator, args):
        """(images, labels, factors) of as many batches as the loader's, each drawn by the psi of its step."""
        seed = datasets.epoch_seed(args.seed, epoch, stream=2)
        generator = torch.Generator(self.psi.device).manual_seed(seed)  # the same draws on all processes
        own = args.batch_size // accelerator.num_processes
        share = slice(accelerator.process_index * own, (accelerator.process_index + 1) * own)
        for _ in range(len(loader)):
            items, factors = self.draw(args.batch_size, generator, share)
            yield *self.fetch(items), factors

    def facts(self):
        """For the log: pi_k of each class, and how far the rates s_k are from equal."""
        rates = self().detach()
        law = class_law(rates, self.class_counts).tolist()
        return {"class_rates": law, "rates_variance": rates.var(correction=0).item()}


def make_learner(train_set, args):
    """What --meta learns."""
    if args.meta == "sampler":
        return MetaSampler(train_set, args.init_power, args.sampler_level)
    return MetaReweighter(train_set.class_counts, args.init_power)


def virtual_step(classifier, gradients, optimizer):
    """{name: parameter} of the classifier after the step that SGD would take along `gradients`."""
    (group,), ahead = optimizer.param_groups, {}
    for (name, parameter), gradient in zip(classifier.named_parameters(), gradients, strict=True):
        step = gradient + group["weight_decay"] * parameter.detach()
        momentum = optimizer.state.get(parameter, {}).get("momentum_buffer")  # none before the first step
        if momentum is not None:
            step = step + group["momentum"] * momentum
        ahead[name] = (parameter.detach() - group["lr"] * step).requires_grad_()
    return ahead


def factor_gradients(accelerator, classifier, optimizer, factors, batch, meta_batch, prior):
    """a_b = d L_meta / d factor_b [b], with L_meta the loss of the meta batch after the virtual step.

    The step goes along the gradient of mean_b(factor_b l_b), so a_b = -(lr / B) <grad l_b, G>, G the gradient
    of L_meta: for all b at once one forward-mode product. A batch is (features [b, D], labels [b]).
    """

    def losses(parameters):
        return balanced_softmax_loss(functional_call(classifier, parameters, batch[0]), batch[1], prior)

    parameters = dict(classifier.named_parameters())
    inner = (factors.detach() * losses(parameters)).mean()
    inner = torch.autograd.grad(inner, list(parameters.values()))
    ahead = virtual_step(classifier, accelerator.reduce(inner, reduction="mean"), optimizer)
    # Cross-entropy without a prior: these images are balanced.
    meta_loss = F.cross_entropy(functional_call(classifier, ahead, meta_batch[0]), meta_batch[1])
    outer = accelerator.reduce(torch.autograd.grad(meta_loss, list(ahead.values())), reduction="mean")
    parameters = {name: parameter.detach() for name, parameter in parameters.items()}
    along = jvp(losses, (parameters,), (dict(zip(ahead, outer, strict=True)),))[1]
    return -optimizer.param_groups[0]["lr"] / (len(factors) * accelerator.num_processes) * along


def new_classifier(network, args):
    """Freeze the network and give it a new linear classifier, then the only part that is trained."""
    network.requires_grad_(False)
    (num_classes, width), device = network.classifier.weight.shape, network.classifier.weight.device
    with models.seeded(args.seed):
        network.classifier = nn.Linear(width, num_classes).to(device)


def make_stages(args):
    """(number, options, epochs) of each stage; epochs count on, stage 2's options have stage 1's names."""
    stages = [] if args.stage1 else [(1, args, range(args.epochs))]
    if args.classifier == "new":
        own = {name: getattr(args, f"stage2_{name}") for name in ("epochs", "lr", "loss", "sampling")}
        own |= dict(warmup=0)
        epochs = range(args.epochs, args.epochs + args.stage2_epochs)
        stages.append((2, SimpleNamespace(**{**vars(args), **own}), epochs))
    return stages


def learning_rate(epoch, args):
    """Learning rate of the 0-based `epoch` of a stage: from half of it up, then a cosine that ends at 0."""
    if epoch + 1 < args.warmup:
        return args.lr * 0.5 * (1 + epoch / (args.warmup - 1))
    share = (epoch + 1 - args.warmup) / (args.epochs - args.warmup)
    return args.lr * 0.5 * (1 + math.cos(math.pi * share))


def train_one_epoch(run, model, loader, optimizer, prior, stage, args):
    model.train()
    if stage == 2 and not args.bn_train_in_stage2:
        run.accelerator.unwrap_model(model, keep_torch_compile=False).eval()
    for images, labels in run.steps(loader):
        loss = balanced_softmax_loss(model(images), labels, prior).mean()
        optimizer.zero_grad()
        run.accelerator.backward(loss)
        optimizer.step()
        run.record(loss=loss)


def train_one_meta_epoch(
    run, model, loader, meta_loader, optimizer, learner, psi_optimizer, prior, epoch, args
):
    """An epoch of stage 2 that learns psi, too. learner: a MetaSampler, or a MetaReweighter."""
    accelerator, network = run.accelerator, run.accelerator.unwrap_model(model, keep_torch_compile=False)
    model.train()
    if not args.bn_train_in_stage2:
        network.eval()
    batches = learner.batches(loader, epoch, accelerator, args)
    for meta_batch, (images, labels, factors) in zip(run.steps(meta_loader), batches, strict=False):
        with torch.no_grad(), accelerator.autocast():
            features, meta_features = network.features(images), network.features(meta_batch[0])
        pairs = (features.float(), labels), (meta_features.float(), meta_batch[1])
        gradients = factor_gradients(accelerator, network.classifier, optimizer, factors, *pairs, prior)
        (gradient,) = torch.autograd.grad(factors, learner.psi, gradients)
        learner.psi.grad = accelerator.reduce(gradient, reduction="sum")
        psi_optimizer.step()
        # The real step, on the same images: a sampler's new psi is for the batches to come, a reweighter's
        # weighs this one.
        weights = learner().detach()[labels] if args.meta == "reweighter" else 1.0
        loss = (weights * balanced_softmax_loss(model(images), labels, prior)).mean()
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        run.record(loss=loss)


def main(args: Args) -> dict:
    args, stage1_args, weights = runs.adopt_stage1(args, TRAINING)
    stages = make_stages(args)
    config = DataLoaderConfiguration(split_batches=True, non_blocking=True)
    accelerator = Accelerator(dataloader_config=config)
    run = runs.start(accelerator, args, epochs=stages[-1][2].stop)
    train_set, test_set = datasets.load(args)
    meta_set = datasets.load_list(args, "meta_list", train_set) if args.meta_list else train_set
    run.set_data(train_set, test_set, meta_set)
    class_counts, device = train_set.class_counts, accelerator.device
    options = datasets.loader_options(train_set)
    test_loader = accelerator.prepare(DataLoader(test_set, args.batch_size, **options))
    network = models.build(args.arch, train_set.num_classes, args.seed, train_set.shape).to(device)
    if weights is not None:
        models.load_weights(network, weights, f"--stage1 {args.stage1}")
    for stage, settings, epochs in stages:
        if stage == 2:
            new_classifier(network, args)
        sampler = make_sampler(train_set, settings.sampling, stage - 1, args)
        train_loader = DataLoader(train_set, args.batch_size, sampler=sampler, drop_last=True, **options)
        optimizer = torch.optim.SGD(network.parameters(), settings.lr, momentum=0.9, weight_decay=args.wd)
        model, optimizer, train_loader = accelerator.prepare(network, optimizer, train_loader)
        prior = log_prior(class_counts, args.tau if settings.loss == "bs" else 0.0).to(device)
        loaders, tracked = [train_loader], dict(model=model, optimizer=optimizer)
        learns = stage == 2 and args.meta != "none"
        if learns:
            size = args.meta_batch_size
            how = dict(size=len(train_loader) * size, augment=not args.meta_list)
            sampler = make_sampler(meta_set, "class", 3, args, **how)
            meta_loader = DataLoader(meta_set, size, sampler=sampler, drop_last=True, **options)
            loaders.append(accelerator.prepare(meta_loader))
            learner = make_learner(train_set, args).to(device)
            psi_optimizer = torch.optim.Adam(learner.parameters(), args.psi_lr)
            tracked |= dict(learner=learner, psi_optimizer=psi_optimizer)
        for epoch in run.track(epochs, **tracked):
            run.begin_epoch(epoch, *loaders)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(epoch - epochs.start, settings)
            if learns:
                psi = learner, psi_optimizer
                train_one_meta_epoch(run, model, *loaders, optimizer, *psi, prior, epoch, args)
            else:
                train_one_epoch(run, model, train_loader, optimizer, prior, stage, args)
            accuracy = evaluation.per_split(accelerator, model, test_loader, class_counts, args)
            run.end_epoch(epoch, {**accuracy, **(learner.facts() if learns else {})})
        accelerator.free_memory()  # stage 2 prepares the network anew, for its own part to be trained
    return run.finish(**({"stage1_args": stage1_args} if args.stage1 else {}))


if __name__ == "__main__":
    main(cli.parse(Args, RECIPES, __doc__))
