"""cmo.py: every equation against numbers worked out beforehand, and where CMO becomes plain training."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator

import cmo
from cmo import Args
from common import datasets, models, recipes
from tests import conftest
from tests.conftest import TINY, lines_of, parse, run_here

COUNTS = torch.tensor([500.0, 50.0, 5.0])
CIFAR100 = torch.tensor(datasets.long_tail_counts(500, 100, 100)).float()
CIFAR10 = torch.tensor(datasets.long_tail_counts(5000, 10, 100)).float()
EDGES = torch.tensor([500.0, 40.0, 7.0, 2.0, 1.0])


def close(actual, expected, tolerance=1e-6):
    conftest.close(actual, expected, tolerance)


# Sampling, Eq. (2)


def class_weights(counts, **options):
    """Of one image of each class, with mean 1."""
    images = SimpleNamespace(class_counts=counts, labels=torch.arange(len(counts)))
    weights = cmo.image_weights(images, **options)
    return weights / weights.mean()


@pytest.mark.parametrize(
    "r, weights, marginals",
    [
        (0, [1, 1, 1], [0.900901, 0.090090, 0.009009]),
        (0.5, [0.211830, 0.669866, 2.118303], [0.706101, 0.223289, 0.070610]),
        (1, [0.027027, 0.270270, 2.702703], [1 / 3, 1 / 3, 1 / 3]),
        (2, [0.000297, 0.029700, 2.970003], [0.009009, 0.090090, 0.900901]),
    ],
)
def test_sampling_weights(r, weights, marginals):
    actual = class_weights(COUNTS, r=r)
    close(actual, weights)
    drawn = COUNTS * actual
    close(drawn / drawn.sum(), marginals)


def test_sampling_weights_of_cifar100():
    close(class_weights(CIFAR100)[[0, 50, 69, 99]], [0.043820, 0.456461, 1.095506, 4.382022])
    per_image = class_weights(COUNTS)
    close(per_image / (COUNTS * per_image).sum(), [0.000667, 0.006667, 0.066667])


def test_weights_are_of_images():
    images = SimpleNamespace(class_counts=torch.tensor([4, 1]), labels=torch.tensor([0, 1, 0, 0, 0]))
    close(cmo.image_weights(images, r=0.5), [0.5, 1, 0.5, 0.5, 0.5])


def split_mass(counts, weights):
    """What is drawn of the many-, medium- and few-shot classes of CIFAR-100-LT."""
    drawn = counts * weights
    return torch.stack([part.sum() for part in (drawn / drawn.sum()).split([35, 35, 30])])


@pytest.mark.parametrize(
    "r, mass",
    [
        (0, [0.813, 0.158, 0.028]),
        (0.5, [0.619, 0.273, 0.107]),
        (1, [0.35, 0.35, 0.3]),
        (2, [0.038, 0.194, 0.768]),
    ],
)
def test_mass_of_the_splits_of_cifar100(r, mass):
    close(split_mass(CIFAR100, class_weights(CIFAR100, r=r)), mass, 1e-3)


def test_effective_number_weights():
    close(cmo.effective_weights(COUNTS), [0.027690, 0.270763, 2.701547])
    close(cmo.effective_weights(CIFAR100)[[0, 50, 99]], [0.044876, 0.457055, 4.378313])
    close(
        cmo.effective_weights(CIFAR10),
        [0.050611, 0.076900, 0.121134, 0.195037, 0.318805, 0.524590, 0.868349, 1.442627, 2.409223, 3.992724],
    )
    close(
        cmo.effective_weights(torch.tensor(datasets.long_tail_counts(5000, 10, 10))),
        [0.292341, 0.358366, 0.444188, 0.555540, 0.699693, 0.885779, 1.126570, 1.437524, 1.841483, 2.358515],
    )


def test_effective_numbers_draw_nearly_as_r_1():
    close(class_weights(COUNTS, effective=True), [0.027690, 0.270763, 2.701547])
    close(split_mass(CIFAR100, class_weights(CIFAR100, effective=True)), [0.353, 0.349, 0.299], 1e-3)


@pytest.mark.parametrize("options", [dict(r=1.0), dict(effective=True)], ids=str)
def test_weights_of_classes_of_one_image(options):
    weights = class_weights(torch.tensor([10**6, 1, 1]), **options)
    assert weights.isfinite().all() and (weights > 0).all()


class Stop(Exception):
    pass


def arguments_of_the_first_epoch(monkeypatch, tmp_path, **options):
    """What main gives to train_one_epoch."""
    seen = []

    def spy(*arguments):
        seen.extend(arguments)
        raise Stop

    monkeypatch.setattr(cmo, "train_one_epoch", spy)
    with pytest.raises(Stop):
        run_here("cmo.py", **{**TINY, **options}, output_dir=tmp_path / "run")
    return seen


@pytest.mark.parametrize(
    "weighted, is_balanced",
    [
        ("foreground", (False, True)),
        ("background", (True, False)),
        ("both", (True, True)),
        ("none", (False, False)),
    ],
)
def test_streams(weighted, is_balanced, monkeypatch, tmp_path):
    _, _, *loaders, _, class_counts, _, _ = arguments_of_the_first_epoch(
        monkeypatch, tmp_path, weighted=weighted
    )
    natural, balanced = class_counts / class_counts.sum(), torch.full((10,), 0.1)
    drawn = []
    for loader, flag in zip(loaders, is_balanced, strict=True):
        batches = []
        for epoch in range(4):
            loader.set_epoch(epoch)
            batches += [labels for _, labels in loader]
        drawn.append(torch.cat(batches))
        close(drawn[-1].bincount(minlength=10) / len(drawn[-1]), balanced if flag else natural, 0.02)
    assert not drawn[0].equal(drawn[1])


# The box, Eq. (1)


class Draws:
    """Stands for a NumPy Generator: the draws that it is given."""

    def __init__(self, lam, y=16, x=16):
        self.lam, self.centre = lam, [y, x]

    def random(self):
        return 0.0  # below every p_mix

    def beta(self, *_):
        return self.lam

    def integers(self, _):
        self.centre.append(self.centre[0])
        return self.centre.pop(0)


class Legacy(np.random.RandomState):
    """NumPy's legacy generator, of the released code, with the new one's names."""

    def random(self):
        return self.random_sample()

    def integers(self, high):
        return self.randint(high)


@pytest.mark.parametrize(
    "lam, x, y, size, corners, adjusted",
    [
        (0.75, 16, 16, (32, 32), (8, 8, 24, 24), 0.75),
        (0.5, 16, 16, (32, 32), (5, 5, 27, 27), 0.52734375),
        (0.5, 0, 31, (32, 32), (0, 20, 11, 32), 0.87109375),
        (0.0, 16, 16, (32, 32), (0, 0, 32, 32), 0.0),
        (0.0, 10, 16, (32, 32), (0, 0, 26, 32), 0.1875),
        (0.9985, 7, 7, (32, 32), (7, 7, 7, 7), 1.0),
        (0.36, 12, 20, (24, 32), (3, 8, 21, 32), 0.4375),
        # the trace below
        (0.562583, 21, 18, (32, 32), (11, 8, 31, 28), 0.609375),
        (0.928724, 9, 20, (32, 32), (5, 16, 13, 24), 0.9375),
        (0.868409, 0, 1, (32, 32), (0, 0, 5, 6), 0.970703),
    ],
)
def test_box_and_mix(lam, x, y, size, corners, adjusted):
    """x runs along the height, as in the released code."""
    x1, x2, y1, y2 = cmo.random_box(lam, *size, Draws(lam, x, y))
    assert (x1, y1, x2, y2) == corners
    backgrounds, foregrounds = torch.zeros(2, 3, *size), torch.ones(2, 3, *size)
    mixed, share = cmo.mix(backgrounds, foregrounds, Draws(lam, x, y), Args())
    assert share == pytest.approx(adjusted, abs=1e-6)
    assert mixed.mean().item() == pytest.approx(1 - share, abs=1e-6)  # labels go by the pixels that are left
    assert mixed[:, :, x1:x2, y1:y2].eq(1).all()
    assert mixed.sum() == 2 * 3 * (x2 - x1) * (y2 - y1)


def test_pasting_takes_the_same_place_and_leaves_the_foreground_alone():
    foregrounds = torch.randn(4, 3, 8, 8)
    kept = foregrounds.clone()
    mixed, _ = cmo.mix(torch.zeros(4, 3, 8, 8), foregrounds, Draws(0.25, 3, 5), Args())
    x1, x2, y1, y2 = cmo.random_box(0.25, 8, 8, Draws(0.25, 3, 5))
    assert mixed[:, :, x1:x2, y1:y2].equal(kept[:, :, x1:x2, y1:y2])
    assert foregrounds.equal(kept)


@pytest.mark.parametrize("kind", ["mixup", "remix"])
def test_mixup_blends_without_adjusting(kind):
    white = torch.full((2, 3, 4, 4), 200, dtype=torch.uint8)
    mixed, share = cmo.mix(torch.zeros_like(white), white, Draws(0.3), Args(mix=kind))
    assert share == 0.3
    close(mixed, torch.full((2, 3, 4, 4), 140.0), 1e-4)


@pytest.mark.parametrize("kind", ["blur", "jitter"])
def test_perturbed_foregrounds_keep_their_labels(kind):
    images = datasets.load(parse("cmo.py"))[0].__getitems__([0, 400, 700])[0]
    mixed, share = cmo.mix(torch.zeros_like(images), images, Draws(0.3), Args(mix=kind))
    assert share == 0.0  # the loss is the foregrounds' alone
    assert mixed.shape == images.shape and not mixed.equal(images)
    mixed, images = mixed.float(), images.float()
    assert F.cosine_similarity(mixed.flatten(1), images.flatten(1)).min() > 0.5
    if kind == "blur":  # smoother: neighbours differ less
        assert mixed.diff(dim=3).abs().mean() < images.diff(dim=3).abs().mean()


def test_draws_are_those_of_the_released_code():
    """A coin, lambda, the box's two coordinates, in this order."""
    generator, boxes = Legacy(0), []
    for coin, lam in ((0.548814, 0.562583), (0.437587, 0.928724), (0.020218, 0.868409)):
        close(generator.random(), coin)
        state = generator.get_state()
        close(generator.beta(1.0, 1.0), lam)
        generator.set_state(state)
        mixed, _ = cmo.mix(torch.zeros(1, 1, 32, 32), torch.ones(1, 1, 32, 32), generator, Args())
        rows, columns = mixed[0, 0].nonzero(as_tuple=True)
        boxes.append((rows.min(), rows.max() + 1, columns.min(), columns.max() + 1))
    assert boxes == [(11, 31, 8, 28), (5, 13, 16, 24), (0, 5, 0, 6)]


def test_mean_share_of_the_background():
    generator = np.random.default_rng(1)
    for side, mean in ((32, 0.70), (224, 0.68)):
        shares = []
        for lam in generator.uniform(size=20000):
            top, bottom, left, right = cmo.random_box(lam, side, side, generator)
            shares.append(1 - (bottom - top) * (right - left) / side**2)
        assert np.mean(shares) == pytest.approx(mean, abs=0.01)


# Losses


def margins_of(counts):
    """LDAM's margins, from the losses of logits 0: exp(-loss) = e / (e + K - 1) with e = exp(-30 margin)."""
    labels = torch.arange(len(counts))
    losses = cmo.image_losses(torch.zeros(len(counts), len(counts)).double(), labels, counts, "ldam")
    p = torch.exp(-losses)
    return -torch.log((len(counts) - 1) * p / (1 - p)) / 30


def test_ldam():
    close(margins_of(COUNTS), [0.158114, 0.281171, 0.5])
    close(margins_of(CIFAR100)[[0, 50, 99]], [0.158114, 0.284055, 0.5])
    logits = cmo.SCALE * torch.tensor([[0.3, 0.1, 0.2]]).expand(3, 3)
    losses = cmo.image_losses(logits, torch.arange(3), COUNTS, "ldam")
    close(losses, [1.946120, 14.483708, 18.002476], 1e-5)


def test_balanced_softmax():
    logits, labels = torch.tensor([[2.0, 1.0, 0.0]]).expand(3, 3), torch.arange(3)
    close(cmo.image_losses(logits, labels, COUNTS, "ce"), [0.407606, 1.407606, 2.407606])
    close(cmo.image_losses(logits, labels, COUNTS, "bs"), [0.037432, 3.340017, 6.642602], 2e-6)


def test_equal_counts_make_balanced_softmax_plain():
    logits, labels, counts = torch.randn(8, 4), torch.randint(4, (8,)), torch.full((4,), 7.0)
    plain = F.cross_entropy(logits, labels, reduction="none")
    close(cmo.image_losses(logits, labels, counts, "bs"), plain, 1e-5)


def test_without_a_margin_ldam_is_plain():
    """The margin of a class vanishes as its images go to infinity."""
    logits, labels = torch.randn(8, 3), torch.randint(2, (8,))
    plain = F.cross_entropy(logits, labels, reduction="none")
    close(cmo.image_losses(logits, labels, torch.tensor([1e36, 1e36, 1.0]), "ldam"), plain, 1e-5)


def test_weighted_mean():
    losses, weights = torch.tensor([0.407606, 1.407606]), cmo.effective_weights(COUNTS)[:2]
    close(cmo.weighted_mean(Accelerator(), losses, weights), 1.314829)
    close(cmo.weighted_mean(Accelerator(), losses, torch.full((2,), 3.0)), losses.mean())


@pytest.mark.parametrize("loss", ["ce", "bs", "ldam"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("labels", [[0, 1, 2, 3, 4, 0], [4] * 6], ids=["every class", "one class"])
@pytest.mark.parametrize("size", [0.0, 1.0, 1e4])
def test_losses_at_the_edges(loss, size, labels, dtype):
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    logits = (size * (logits.sign() if size > 1 else logits)).to(dtype).requires_grad_()
    losses = cmo.image_losses(logits, torch.tensor(labels), EDGES, loss)
    losses.mean().backward()
    assert losses.isfinite().all() and logits.grad.isfinite().all()


# Remix


@pytest.mark.parametrize(
    "n_background, n_foreground, lam, share",
    [
        (500, 5, 0.4, 0),
        (500, 5, 0.6, 0.6),
        (5, 500, 0.4, 0.4),
        (5, 500, 0.6, 1),
        (500, 400, 0.4, 0.4),
        (150, 50, 0.49, 0),
        (149, 50, 0.49, 0.49),
        (150, 50, 0.5, 0.5),
        (50, 150, 0.51, 1),
        (50, 150, 0.5, 0.5),
    ],
)
def test_remix(n_background, n_foreground, lam, share):
    counts = torch.tensor([n_background, n_foreground]).float()
    close(cmo.remix_share(lam, counts[:1], counts[1:]), [share])


# Schedule and recipes


def rates(epochs, **options):
    args = parse("cmo.py", **options)
    return [recipes.learning_rate(epoch, args) for epoch in epochs]


def test_learning_rate():
    cifar = rates((0, 3, 4, 159, 160, 179, 180), dataset="cifar100_lt")
    close(cifar, [0.02, 0.08, 0.1, 0.1, 1e-3, 1e-3, 1e-5], 1e-12)
    close(rates((4, 59, 60, 80), dataset="imagenet_lt"), [0.1, 0.1, 0.01, 0.001], 1e-12)
    close(rates((74, 75, 160), dataset="inat2018"), [0.1, 0.01, 0.001], 1e-12)


def test_learning_rate_of_400_epochs():
    cifar = rates((0, 9, 10, 320, 321, 360, 361, 399), dataset="cifar100_lt", recipe="long")
    close(cifar, [0.01, 0.1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001], 1e-12)
    imagenet = rates((0, 9, 10, 200, 399), dataset="imagenet_lt", recipe="long")
    close(imagenet, [0.002, 0.02, 0.02, 0.010361, 0], 2e-6)


@pytest.mark.parametrize(
    "dataset, recipe, epochs, batch, wd, lr_steps, drw_epoch, augment",
    [
        ("cifar10_lt", "paper", 200, 128, 2e-4, (160, 180), 160, "weak"),
        ("cifar100_lt", "paper", 200, 128, 2e-4, (160, 180), 160, "weak"),
        ("imagenet_lt", "paper", 100, 256, 2e-4, (60, 80), 80, "jitter"),
        ("inat2018", "paper", 200, 512, 2e-4, (75, 160), 160, "weak"),
        ("cifar10_lt", "long", 400, 128, 2e-4, (321, 361), 320, "strong"),
        ("cifar100_lt", "long", 400, 128, 2e-4, (321, 361), 320, "strong"),
        ("imagenet_lt", "long", 400, 256, 5e-4, (), 320, "strong"),
        ("inat2018", "long", 400, 256, 1e-4, (), 320, "strong"),
    ],
)
def test_recipes_are_the_published_ones(dataset, recipe, epochs, batch, wd, lr_steps, drw_epoch, augment):
    args = parse("cmo.py", dataset=dataset, recipe=recipe)
    assert (args.epochs, args.batch_size, args.wd, args.lr_steps) == (epochs, batch, wd, lr_steps)
    assert (args.drw_epoch, args.augment, args.drw) == (drw_epoch, augment, False)
    is_large = dataset in ("imagenet_lt", "inat2018")
    assert (args.arch, args.imbalance) == (("resnet50", None) if is_large else ("resnet32", 100))
    assert args.cosine == (is_large and recipe == "long")
    assert args.splits == ((100, 21) if dataset == "inat2018" else (100, 20))
    assert (args.p_mix, args.r, args.alpha, args.mix, args.weighted) == (0.5, 1, 1, "cutmix", "foreground")
    assert (args.mix_start, args.mix_end) == (4, 3)


@pytest.mark.parametrize("key", cmo.RECIPES)
def test_recipes(key):
    dataset, *recipe = key.split()
    args = parse("cmo.py", dataset=dataset, recipe=(recipe or ["paper"])[0])
    assert all(0 < step < args.epochs for step in args.lr_steps)
    assert args.mix_start < args.epochs - args.mix_end and args.drw_epoch < args.epochs


@pytest.mark.parametrize("loss, parameters", [("ce", 470_004), ("bs", 470_004), ("ldam", 469_904)])
def test_networks(loss, parameters):
    dataset = SimpleNamespace(num_classes=100, shape=(3, 32, 32), statistics=((0.5,) * 3, (0.25,) * 3))
    network = cmo.make_model(dataset, parse("cmo.py", dataset="cifar100_lt", loss=loss))
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    assert getattr(network.classifier, "scale", None) == (30.0 if loss == "ldam" else None)
    assert isinstance(network, models.Network)


# The training step, Alg. 1


class Recorder(torch.nn.Module):
    """Answers every image with the same logits and keeps what it was shown."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.shown = torch.nn.Parameter(torch.tensor(logits)), None

    def forward(self, images):
        self.shown = images.clone()
        return self.logits


def one_step(logits, labels, other_labels, rng, epoch=7, side=32, **options):
    """(loss, model, images shown) of a step on black backgrounds and white foregrounds. 20 epochs."""
    black = torch.zeros(len(labels), 3, side, side)
    batch = black, torch.tensor(labels)
    other = torch.ones_like(black), torch.tensor(other_labels)
    model, losses = Recorder(logits), []
    run = SimpleNamespace(accelerator=Accelerator(), rng=rng, steps=iter)
    run.log = lambda loss: losses.append(loss.item())
    args = Args(**{"epochs": 20, **options})
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    cmo.train_one_epoch(run, model, [batch], [other], optimizer, COUNTS, epoch, args)
    assert not model.logits.equal(torch.tensor(logits))  # the optimiser has moved
    return losses[0], model.shown


ROW, ROWS = [[2.0, 1.0, 0.0]], [[2.0, 1.0, 0.0], [0.0, 1.0, 2.0]]
DRW = dict(drw=True, drw_epoch=7)


@pytest.mark.parametrize(
    "options, logits, labels, other_labels, lam, expected",
    [
        (dict(), ROW, [0], [2], 0.5, 1.352918),
        (dict(loss="bs"), ROW, [0], [2], 0.5, 3.159407),
        (DRW, ROWS, [0, 0], [2, 1], 0.75, 1.634832),  # two terms, each normalised on its own, then blended
        (dict(mix="blur"), ROW, [0], [2], 0.5, 2.407606),
        (dict(mix="jitter"), ROW, [0], [2], 0.5, 2.407606),
    ],
)
def test_a_mixed_step(options, logits, labels, other_labels, lam, expected):
    """The network sees the pasted image, and each label weighs as much as it covers."""
    loss, shown = one_step(logits, labels, other_labels, Draws(lam), **options)
    assert loss == pytest.approx(expected, abs=2e-6)
    if "mix" not in options:
        top, bottom, left, right = cmo.random_box(lam, 32, 32, Draws(lam))
        assert shown[:, :, top:bottom, left:right].eq(1).all()
        assert shown.sum() == len(labels) * 3 * (bottom - top) * (right - left)


@pytest.mark.parametrize(
    "options, logits, labels, expected",
    [
        (dict(), ROW, [1], 1.407606),
        (dict(loss="bs"), ROW, [0], 0.037432),
        (DRW, ROWS, [0, 1], 1.314829),
        (dict(drw=True, drw_epoch=8), ROWS, [0, 1], 0.907606),  # before its first epoch
        (dict(drw_epoch=7), ROWS, [0, 1], 0.907606),
        (DRW, ROWS, [0, 0], 1.407606),
        (DRW, ROWS, [2, 1], 2.316511),
    ],
)
def test_a_plain_step(options, logits, labels, expected):
    loss, shown = one_step(logits, labels, labels, Legacy(0), **options)  # the first coin is 0.548814
    assert loss == pytest.approx(expected, abs=2e-6) and shown.eq(0).all()


def test_coins():
    """A batch is mixed where the coin is below p_mix."""
    for p_mix, is_mixed in ((0.54, False), (0.56, True)):
        _, shown = one_step(ROW, [0], [2], Legacy(0), p_mix=p_mix)
        assert shown.any() == is_mixed


@pytest.mark.parametrize(
    "options, first, last, count",
    [
        (dict(dataset="cifar100_lt"), 4, 196, 193),
        (dict(dataset="imagenet_lt"), 4, 96, 93),
        (dict(dataset="cifar100_lt", recipe="long"), 4, 396, 393),
        (dict(dataset="synthetic"), 1, 38, 38),
        (dict(dataset="mnist_lt"), 0, 6, 7),
        (dict(dataset="cifar100_lt", epochs=2), 0, 1, 2),
    ],
    ids=str,
)
def test_window(options, first, last, count):
    args = parse("cmo.py", **options)
    window = dict(epochs=args.epochs, mix_start=args.mix_start, mix_end=args.mix_end)
    active = []
    for epoch in range(args.epochs):
        _, shown = one_step(ROW, [0], [2], Draws(0.0, 1, 1), epoch, side=2, **window)
        if shown.any():
            active.append(epoch)
    assert (active[0], active[-1], len(active)) == (first, last, count)


def step_on_its_own(images, labels, rng, **options):
    """(loss, images shown) of a step that mixes a batch with itself."""
    model, losses = Recorder(ROW * len(labels)), []
    run = SimpleNamespace(accelerator=Accelerator(), rng=rng, steps=iter)
    run.log = lambda loss: losses.append(loss.item())
    args = Args(epochs=20, weighted="none", **options)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    batch = images.clone(), torch.tensor(labels)
    cmo.train_one_epoch(run, model, [batch], [], optimizer, COUNTS, 7, args)
    return losses[0], model.shown


def test_plain_cutmix_mixes_the_batch_with_itself():
    images = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 3, 32, 32)
    loss, shown = step_on_its_own(images, [0] * 7 + [2], Draws(0.0))  # a box over the whole image
    order = shown[:, 0, 0, 0]
    assert order.sort().values.tolist() == list(range(8)) and order.tolist() != list(range(8))
    assert loss == pytest.approx((7 * 0.407606 + 2.407606) / 8, abs=2e-6)


def test_a_step_with_remix(monkeypatch):
    """Labels 0 (500 images) and 2 (5): where the rare image is the smaller part, it gives the label alone."""
    monkeypatch.setattr(torch, "randperm", lambda n, device: torch.tensor([1, 0]))
    images = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 32, 32)
    loss, shown = step_on_its_own(images, [0, 2], Draws(0.4), mix="remix")
    close(shown[:, 0, 0, 0], [0.6, 0.4])
    first, second = 2.407606, 0.4 * 2.407606 + 0.6 * 0.407606
    assert loss == pytest.approx((first + second) / 2, abs=2e-6)


def test_optimiser_and_steps(tmp_path, monkeypatch):
    """SGD with momentum 0.9, weight decay on everything, no Nesterov; an incomplete batch is dropped."""
    _, model, backgrounds, foregrounds, optimizer, class_counts, epoch, args = arguments_of_the_first_epoch(
        monkeypatch, tmp_path, wd=2e-4, warmup=5
    )
    (group,) = optimizer.param_groups
    assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.9, 2e-4, False)
    assert group["lr"] == pytest.approx(0.05 / 5) and epoch == 0
    assert len(group["params"]) == len(list(model.parameters()))
    assert len(backgrounds) == len(foregrounds) == 1236 // 64
    assert class_counts.sum() == 1236 and class_counts.dtype == torch.float32
    for imbalance, steps, rest in ((100, 84, 95), (50, 98, 64), (10, 152, 117)):  # CIFAR-100-LT
        assert divmod(sum(datasets.long_tail_counts(500, 100, imbalance)), 128) == (steps, rest)


# Runs


def test_without_mixing_cmo_is_plain_training(tmp_path):
    """p_mix 0 and a window without an epoch are the same: cross-entropy on the data as it is."""
    options = dict(TINY, epochs=1, lr_steps=(), arch="lenet")
    plain = run_here("cmo.py", **options, p_mix=0.0, output_dir=tmp_path / "plain")
    never = run_here("cmo.py", **options, mix_start=1, p_mix=1.0, output_dir=tmp_path / "never")
    mixed = run_here("cmo.py", **options, mix_start=0, output_dir=tmp_path / "mixed")
    assert plain["weights_sha256"] == never["weights_sha256"] != mixed["weights_sha256"]
    assert 0 <= mixed["all"] <= 100 and mixed["few"] is not None


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        dict(loss="ldam", drw=True, drw_epoch=0),
        dict(loss="bs", effective=True),
        dict(weighted="both", r=0.5),
        dict(weighted="background", mix="mixup"),
        dict(weighted="none"),
        dict(mix="blur"),
        dict(mix="jitter"),
        dict(mix="remix", weighted="none", drw=True, drw_epoch=0),
    ],
    ids=str,
)
def test_runs(tmp_path, options):
    result = run_here("cmo.py", **TINY, **options, mix_start=0, mix_end=0, output_dir=tmp_path / "run")
    assert 0 <= result["all"] <= 100 and np.isfinite(result["loss"])


@pytest.mark.slow
def test_training_learns(tmp_path):
    options = dict(TINY, epochs=4, lr_steps=(3,), mix_start=0, mix_end=0)
    run_here("cmo.py", **options, output_dir=tmp_path / "run")
    losses = [line["loss"] for line in lines_of(tmp_path / "run")]
    assert losses[-1] < 0.85 * losses[0]
