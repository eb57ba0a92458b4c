"""bag_of_tricks.py: every weight, loss, law and map against numbers worked out beforehand, and its limits."""

import copy
import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator

import bag_of_tricks as bag
from bag_of_tricks import Args
from common import datasets, models
from tests.conftest import TINY, close, forget, lines_of, parse, refusal, run_here, state_of

SCRIPT = "bag_of_tricks.py"
COUNTS = torch.tensor([500.0, 50.0, 5.0])
Z, Y = torch.tensor([[2.0, -1.0, 0.0], [0.0, 1.0, -2.0]]), torch.tensor([0, 2])
EXACT = torch.tensor([[1.0, 2.0, 0.5]])


def losses(loss, logits=Z, labels=Y, counts=COUNTS, **more):
    return bag.image_losses(logits, labels, counts, loss, **more)


# Re-weighting


def test_cost_sensitive_weights():
    close(bag.class_weights(COUNTS, "cost"), [0.01, 0.1, 1])
    close(bag.class_weights(COUNTS, "square-root"), [0.1, 0.316228, 1])
    close(bag.class_weights(COUNTS, "none"), [1, 1, 1])


@pytest.mark.parametrize(
    "beta, weights",
    [
        (0.9, [0.674593, 0.678088, 1.647318]),
        (0.99, [0.126130, 0.317223, 2.556647]),
        (0.999, [0.034111, 0.275169, 2.690720]),
        (0.9999, [0.027690, 0.270763, 2.701547]),
    ],
)
def test_class_balanced_weights(beta, weights):
    close(bag.class_weights(COUNTS, "effective", beta=beta), weights)


def test_effective_numbers():
    """Weights are inverse to them; with beta near 1 to the counts."""
    for beta, numbers in ((0.9, [10, 9.948462, 4.0951]), (0.99, [99.342952, 39.499393, 4.900995])):
        weights = bag.class_weights(COUNTS, "effective", beta=beta)
        close(weights[0] / weights, torch.tensor(numbers) / numbers[0])
    inverse = [0.027027, 0.270270, 2.702703]
    close(bag.class_weights(COUNTS, "effective", beta=0.9999999), inverse)


def test_class_balanced_weights_of_the_cifars():
    def weights(largest, classes, imbalance, beta):
        counts = torch.tensor(datasets.long_tail_counts(largest, classes, imbalance))
        return bag.class_weights(counts, "effective", beta=beta)

    hundred = [0.050611, 0.076900, 0.121134, 0.195037, 0.318805, 0.524590, 0.868349, 1.442627, 2.409223]
    close(weights(5000, 10, 100, 0.9999), [*hundred, 3.992724])
    ten = [0.292341, 0.358366, 0.444188, 0.555540, 0.699693, 0.885779, 1.126570, 1.437524, 1.841483, 2.358515]
    close(weights(5000, 10, 10, 0.9999), ten)
    close(weights(500, 100, 100, 0.9)[[0, 98, 99]], [0.820194, 2.002866, 2.002866])


def test_losses_per_image():
    close(losses("ce"), [0.169846, 3.349012])
    for gamma, mean in ((0.0, 2.633337), (1.0, 1.812995), (2.0, 1.361491)):
        close(losses("focal", gamma=gamma).mean(), mean)
    close(losses("bs"), [0.006312, 6.846689])
    close(losses("bs").mean(), 3.426501)
    close(losses("cdt"), [0.188424, 1.999319])
    close(losses("cdt").mean(), 1.093871)
    close(losses("smooth"), [0.336513, 3.182346])
    close(losses("label-aware"), [0.836513, 3.182346])


def test_smoothing_of_the_classes():
    """Of a logit of 1 at class 0, the loss of each label tells its share of uniform targets."""
    logits, labels = torch.tensor([[1.0, 0.0, 0.0]]).expand(3, 3), torch.arange(3)
    plain = losses("ce", logits, labels)
    uniform = plain.mean()
    smoothed = losses("label-aware", logits, labels)
    close((smoothed - plain) / (uniform - plain), [0.4, 0.142694, 0.1])


def test_ldam():
    cosines = torch.tensor([[0.9, -0.2, 0.1], [0.3, 0.5, -0.4]])
    first, second = losses("ldam", logits=bag.SCALE * cosines)
    assert first < 1e-6
    close(second, 42.0025)


def test_temperatures_and_margins():
    """Of a logit of 1 at each class in turn, the loss tells what divides or lowers it."""
    counts = COUNTS.double()
    temperatures, margins = [1, 1.584893, 2.511886], [0.158114, 0.281171, 0.5]
    for k in range(3):
        logits, label = torch.zeros(1, 3, dtype=torch.float64), torch.tensor([k])
        logits[0, k] = 1.0
        expected = math.log(math.exp(1 / temperatures[k]) + 2) - 1 / temperatures[k]
        close(losses("cdt", logits, label, counts), [expected])
        lowered = 30 - bag.SCALE * margins[k]
        close(losses("ldam", logits * 30, label, counts), [math.log(math.exp(lowered) + 2) - lowered])


@pytest.mark.parametrize("loss", bag.LOSSES)
def test_gradients_stay_finite(loss):
    for size in (120.0, 1e4):
        logits = torch.tensor([[size, -3, 0], [-size, 0, size]], requires_grad=True)
        losses(loss, logits, torch.tensor([0, 0]), torch.tensor([40.0, 2.0, 1.0]), gamma=0.5).sum().backward()
        assert logits.grad.isfinite().all()


# A step


class Stub:
    """What train_one_epoch asks of a run; keeps the losses."""

    def __init__(self, lam=0.3):
        self.accelerator, self.losses, self.asked = Accelerator(), [], []
        self.rng = SimpleNamespace(beta=lambda a, b: self.asked.append((a, b)) or lam)

    def steps(self, loader):
        return loader

    def log(self, loss):
        self.losses.append(loss.item())


class Linear(torch.nn.Module):
    """Logits are images times weight. Keeps the images that it was called with."""

    def __init__(self, weight):
        super().__init__()
        self.weight, self.calls = torch.nn.Parameter(weight.clone()), []

    def forward(self, images):
        self.calls.append(images)
        return images @ self.weight


def step(images, labels, model, mixup=0.0, epoch=0, counts=COUNTS, **options):
    """The loss of one step at lambda 0.3."""
    run, optimizer = Stub(), torch.optim.SGD(model.parameters(), 0.1)
    args = Args(**{"epochs": 10, "drw_epoch": 0, "mixup": mixup, **options})
    bag.train_one_epoch(run, model, [(images, labels)], optimizer, counts, epoch, args)
    assert run.asked == ([(mixup, mixup)] if mixup and epoch < args.epochs else [])
    return run.losses[0]


def batch_loss(loss, logits=Z, labels=Y, **options):
    """The loss of a step of which these are the logits."""
    return step(logits, labels, Linear(torch.eye(3)), loss=loss, **options)


def test_weighted_means():
    """Softmax losses are divided by the sum of the weights, sigmoid ones by the number of images."""
    close(batch_loss("ce"), 1.759429)
    close(batch_loss("ce", reweight="cost"), 3.317535)  # the plain mean of weighted losses is 1.675355
    close(batch_loss("focal", reweight="effective", beta=0.9999, gamma=1.0), 4.301684)
    close(batch_loss("focal", reweight="effective", beta=0.9, gamma=1.0), 2.769685)


def test_weighted_mean_over_processes():
    """Two halves of a batch, their gradients averaged, are the whole: weights are summed over both."""
    values, weights = torch.tensor([0.5, 3.0, 1.0, 2.0]), torch.tensor([0.01, 0.1, 1.0, 1.0])
    both = SimpleNamespace(reduce=lambda value, reduction: weights.sum() / 2)
    halves = [bag.weighted_mean(both, values[part], weights[part]) for part in (slice(2), slice(2, 4))]
    close(sum(halves) / 2, bag.weighted_mean(Accelerator(), values, weights), 1e-6)


def test_equal_counts_leave_cross_entropy():
    equal = torch.tensor([7.0, 7.0, 7.0])
    for loss in ("bs", "cdt"):
        close(batch_loss(loss, counts=equal), batch_loss("ce"), 1e-6)
    for reweight in ("cost", "square-root", "effective"):
        close(batch_loss("ce", counts=equal, reweight=reweight), batch_loss("ce"), 1e-6)
        close(batch_loss("focal", counts=equal, reweight=reweight), batch_loss("focal"), 1e-6)
    close(batch_loss("ce", reweight="effective", beta=0.0), batch_loss("ce"), 1e-6)


def test_what_is_deferred():
    """Epoch e = 160, counted from 1, is stage 1's last, 161 stage 2's first; LDAM's weights hold at 160."""
    deferred = dict(epochs=200, drw_epoch=160)
    for given in (dict(reweight="cost"), dict(reweight="effective"), dict(loss="bs"), dict(loss="cdt")):
        given = {"loss": "ce", **given}
        before, after, last = (batch_loss(**given, epoch=e - 1, **deferred) for e in (160, 161, 200))
        assert before == batch_loss("ce") and after != before
        assert after == last == batch_loss(**given)
    focal = losses("focal")  # stage 1 has it, without weights
    close(batch_loss("focal", reweight="cost", epoch=159, **deferred), focal.mean())
    weighted = (torch.tensor([0.01, 1.0]) * focal).mean()
    close(batch_loss("focal", reweight="cost", epoch=160, **deferred), weighted)
    ldam = [batch_loss("ldam", reweight="effective", epoch=e - 1, **deferred) for e in (159, 160)]
    assert ldam[0] == batch_loss("ldam") and ldam[0] != ldam[1]  # margins always


@pytest.mark.parametrize(
    "lam, n_i, n_j, share",
    [
        (0.3, 500, 50, 0),
        (0.7, 500, 50, 0.7),
        (0.7, 5, 50, 1),
        (0.3, 5, 50, 0.3),
        (0.3, 50, 40, 0.3),
        (0.5, 500, 50, 0.5),
        (0.49, 150, 50, 0),
        (0.51, 50, 150, 1),
    ],
)
def test_remix(lam, n_i, n_j, share):
    close(bag.remix_share(lam, torch.tensor([float(n_i)]), torch.tensor([float(n_j)])), [share])


IMAGES, LABELS = torch.randn(4, 5, generator=torch.manual_seed(1)), torch.tensor([0, 0, 1, 2])
WEIGHT = torch.randn(5, 3, generator=torch.manual_seed(2))
ORDER = torch.tensor([2, 3, 0, 1])


@pytest.fixture
def order(monkeypatch):
    monkeypatch.setattr(bag.torch, "randperm", lambda size, device: ORDER)


def cross_entropy(logits, labels):
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none")


def blended(images, share=0.3):
    """The mean loss of images mixed at lambda 0.3."""
    z = (0.3 * images + 0.7 * images[ORDER]) @ WEIGHT
    return (share * cross_entropy(z, LABELS) + (1 - share) * cross_entropy(z, LABELS[ORDER])).mean()


def test_a_step_with_input_mixup(order):
    model = Linear(WEIGHT)
    close(step(IMAGES, LABELS, model, mixup=0.7), blended(IMAGES), 1e-5)
    close(model.calls[0], 0.3 * IMAGES + 0.7 * IMAGES[ORDER], 1e-6)
    assert not torch.equal(model.weight, WEIGHT)  # it learned


def test_a_step_with_remix(order):
    """Of classes 0 0 1 2 with 500, 50, 5 images and partners 1 2 0 0, at lambda 0.3: shares 0 0 .3 .3."""
    model = Linear(WEIGHT)
    loss = step(IMAGES, LABELS, model, mixup=1.0, mix="remix")
    close(loss, blended(IMAGES, share=torch.tensor([0, 0, 0.3, 0.3])), 1e-5)
    close(model.calls[0], 0.3 * IMAGES + 0.7 * IMAGES[ORDER], 1e-6)


def test_manifold_mixup_needs_a_linear_classifier():
    line = refusal(Args, mix="manifold", loss="ldam")
    assert line == "--mix manifold --loss ldam: its classifier is not linear; use --mix input"


def test_a_step_with_manifold_mixup(order):
    """The pooled features are blended, not the images."""
    model = Linear(WEIGHT)
    close(step(IMAGES, LABELS, model, mixup=1.0, mix="manifold"), blended(IMAGES), 1e-5)
    assert torch.equal(model.calls[0], IMAGES)
    shape = SimpleNamespace(num_classes=3, shape=(3, 16, 16), statistics=((0.5,) * 3, (0.25,) * 3))
    network = models.build("resnet8", shape, seed=0)
    images = torch.randint(0, 256, (4, 3, 16, 16), generator=torch.manual_seed(3)).to(torch.uint8)
    features = copy.deepcopy(network).train().features(images)
    z = network.classifier(0.3 * features + 0.7 * features[ORDER])
    expected = (0.3 * cross_entropy(z, LABELS) + 0.7 * cross_entropy(z, LABELS[ORDER])).mean()
    close(step(images, LABELS, network, mixup=1.0, mix="manifold"), expected.item(), 1e-5)


def test_a_step_without_mixup():
    model = Linear(WEIGHT)
    close(step(IMAGES, LABELS, model), cross_entropy(IMAGES @ WEIGHT, LABELS).mean().item(), 1e-5)
    assert torch.equal(model.calls[0], IMAGES)


def test_stage_3_has_no_mixup():
    mixed, plain = (step(IMAGES, LABELS, Linear(WEIGHT), m, epoch=10) for m in (0.7, 0.0))
    assert mixed == plain


def test_loss_of_a_mixed_image(monkeypatch):
    """Labels 0 and 2 at lambda 0.3; the second image is mixed with itself."""
    monkeypatch.setattr(bag.torch, "randperm", lambda size, device: torch.tensor([1, 1]))
    both = batch_loss("ce", EXACT.expand(2, 3), Y, mixup=1.0)
    close(2 * both - losses("ce", EXACT, torch.tensor([2])).item(), 1.814369)


# Sampling


def test_class_probabilities():
    close(bag.class_probabilities(COUNTS, "instance"), [0.900901, 0.090090, 0.009009])
    close(bag.class_probabilities(COUNTS, "square-root"), [0.706101, 0.223289, 0.070610])
    close(bag.class_probabilities(COUNTS, "class"), [1 / 3] * 3)
    close(bag.class_probabilities(COUNTS, "progressive", 100 / 200), [0.617117, 0.211712, 0.171171])
    close(bag.class_probabilities(COUNTS, "progressive", 161 / 200), [0.444009, 0.285901, 0.270090])
    close(bag.class_probabilities(COUNTS, "progressive", 1.0), [1 / 3] * 3)
    close(bag.class_probabilities(COUNTS, "progressive", 1 / 40), [0.886712, 0.096171, 0.017117])


@pytest.mark.parametrize(
    "e, cam, progress",
    [(100, False, 100 / 200), (161, False, 161 / 200), (161, True, 1 / 40), (200, True, 1), (210, True, 1)],
)
def test_progress(e, cam, progress, monkeypatch):
    """Of the epoch e, counted from 1; with new images stage 2 is a run of its own, and stage 3 has 1."""
    seen = []
    p = bag.class_probabilities
    monkeypatch.setattr(bag, "class_probabilities", lambda n, s, t: seen.append(t) or p(n, s, t))
    args = Args(sampling="progressive", epochs=200, drw_epoch=160, cam=cam, batch_size=1)
    train_set = pool_of([6, 3, 2])
    loader = bag.make_loader(train_set, train_set, args)
    loader.sampler.set_epoch(e - 1)
    assert len(list(loader.sampler)) == 11
    close(seen, [progress], 1e-12)


def pool_of(counts, side=8):
    """A set of `counts` images, each filled with its own number."""
    labels = np.repeat(np.arange(len(counts)), counts)
    images = torch.arange(len(labels)).view(-1, 1, 1, 1).expand(-1, 3, side, side).to(torch.uint8)
    images = images.contiguous(memory_format=torch.channels_last)
    return datasets.LabelledImages(images, labels, list("abc"), (3, side, side), ((0.5,) * 3, (0.25,) * 3))


def drawn(pool, original, sampling, numbers=range(1), **options):
    """(labels, positions) of the images of the epochs `numbers`, [epochs, size] each; what they are of."""
    args = Args(sampling=sampling, batch_size=1, **{"cam": False, **options})
    loader, indices = bag.make_loader(pool, original, args), []
    for epoch in numbers:
        loader.sampler.set_epoch(epoch)
        indices.append(list(loader.sampler))
        assert len(indices[-1]) == len(loader)
    indices = torch.tensor(indices)
    return loader.dataset.labels[indices], indices, loader.dataset


def test_even_draws_from_a_pool():
    """Each class has a third; of a class, old and new images have their share."""
    labels, indices, _ = drawn(pool_of([505] * 3), pool_of([500, 50, 5]), "class", range(180))  # 99,900 draws
    close(torch.bincount(labels.flatten()) / labels.numel(), [1 / 3] * 3, 0.005)
    middle = indices[labels == 1] - 505
    close((middle < 50).double().mean(), 50 / 505, 0.005)


@pytest.mark.parametrize("sampling", ["instance", "square-root", "progressive", "class"])
def test_laws_of_a_pool_go_by_the_training_images(sampling):
    options = dict(cam=True, epochs=61, drw_epoch=1)
    labels, *_ = drawn(pool_of([505] * 3), pool_of([500, 50, 5]), sampling, range(1, 61), **options)
    law = torch.stack([bag.class_probabilities(COUNTS, sampling, e / 60) for e in range(1, 61)]).mean(0)
    close(torch.bincount(labels.flatten()) / labels.numel(), law, 0.01)
    assert labels.shape == (60, 555)


def test_instance_sampling_is_a_permutation():
    train_set = pool_of([9, 3, 2])
    _, indices, _ = drawn(train_set, train_set, "instance")
    assert indices[0].sort()[0].tolist() == list(range(14))


# CAM-based sampling


def test_quotas():
    assert bag.quotas(COUNTS).tolist() == [5, 455, 500]
    assert bag.quotas(torch.tensor([1280, 150, 100, 99, 5]), 100).tolist() == [0, 0, 0, 100, 100]
    assert bag.quotas(torch.tensor([1000, 60, 49, 2]), 50).tolist() == [0, 0, 50, 50]


@pytest.mark.parametrize(
    "largest, classes, imbalance, new, whole",
    [
        (5000, 10, 100, 38094, 50500),
        (500, 100, 100, 39653, 50500),
        (5000, 10, 50, 37004, 51000),
        (500, 100, 50, 38392, 51000),
    ],
)
def test_quotas_of_the_cifars(largest, classes, imbalance, new, whole):
    counts = torch.tensor(datasets.long_tail_counts(largest, classes, imbalance))
    assert (bag.quotas(counts).sum(), (counts + bag.quotas(counts)).sum()) == (new, whole)


MAPS = torch.tensor([[[[3.0, 1.0], [2.0, 5.0]], [[1.0, 1.0], [1.0, 1.0]]]])
ROWS = torch.tensor([[1.0, -1.0]])


def test_activation_map():
    close(bag.activation_maps(MAPS, ROWS, (2, 2)), [[[0.5, 0], [0.25, 1]]])
    cam = bag.activation_maps(MAPS, ROWS, (4, 4))
    rows = [[0.5, 0.375, 0.125, 0], [0.4375, 0.390625, 0.296875, 0.25]]
    rows += [[0.3125, 0.421875, 0.640625, 0.75], [0.25, 0.4375, 0.8125, 1]]
    close(cam, [rows])
    close(cam.mean(), 0.4375)
    constant = bag.activation_maps(torch.ones(1, 2, 2, 2), ROWS, (4, 4))
    assert (constant == 0).all() and not bag.foregrounds(constant).any()


def mask_of(*rows):
    return torch.tensor([[int(digit) for digit in row] for row in rows], dtype=torch.uint8)


def test_foreground():
    cam = bag.activation_maps(MAPS, ROWS, (4, 4))
    assert torch.equal(bag.foregrounds(cam)[0], mask_of("1000", "1000", "0011", "0111").bool())
    assert torch.equal(bag.foregrounds(cam, 0.75)[0], mask_of("1100", "1100", "0111", "0111").bool())


def layers_of(image, mask):
    """What bag.moved and bag.paste take: [C + 2, H, W]."""
    return torch.cat([image, mask[None], torch.ones_like(mask)[None]])


def operations(monkeypatch, mask, number=6000, **options):
    """(how many are flips, the translations [N, 2], the angle, scale and centre of the others)."""
    translations, turns, affine = [], [], bag.affine

    def record(layers, angle, shift, scale, shear, center=None):
        assert shear == [0.0]
        if center is None:
            assert (angle, scale) == (0.0, 1.0)
            translations.append(tuple(shift))
        else:
            assert shift == [0, 0]
            turns.append((angle, round(100 * scale), tuple(center)))
        return affine(layers, angle, shift, scale, shear, center=center) if len(turns) < 50 else None

    monkeypatch.setattr(bag, "affine", record)
    image = torch.arange(mask.numel()).view(1, *mask.shape).to(torch.uint8)
    layers, rng = layers_of(image, mask), np.random.default_rng(0)
    for _ in range(number):
        before = len(translations) + len(turns)
        new = bag.moved(layers, rng, **options)
        if len(translations) + len(turns) == before:
            assert torch.equal(new, layers.flip(2))
    return number - len(translations) - len(turns), translations, turns


def test_box_and_the_ranges_of_the_operations(monkeypatch):
    mask = torch.zeros(8, 8, dtype=torch.uint8)
    mask[2:6, 1:4] = 1
    flips, translations, turns = operations(monkeypatch, mask)
    for share in (flips, len(translations), len(turns)):
        assert abs(share / 6000 - 1 / 3) < 0.03
    assert {across for across, _ in translations} == {-1, 0, 1, 2, 3, 4}
    assert {down for _, down in translations} == {-2, -1, 0, 1, 2}
    assert {angle for angle, *_ in turns} == set(range(-45, 45))
    assert {scale for _, scale, _ in turns} == set(range(80, 120))
    # The middle of the box is pixel (x, y) = (2, 3.5); torchvision counts from the corner of the first pixel.
    assert {middle for *_, middle in turns} == {(2.5, 4.0)}
    tall = torch.zeros(11, 8, dtype=torch.uint8)
    tall[2:6, 1:4] = 1
    assert {down for _, down in operations(monkeypatch, tall)[1]} == {-2, -1, 0, 1, 2, 3, 4, 5}


def test_rotation_is_an_option(monkeypatch):
    mask = torch.ones(4, 4, dtype=torch.uint8)
    _, translations, turns = operations(monkeypatch, mask, 600, rotation=7)
    assert {angle for angle, *_ in turns} == set(range(-7, 7))
    assert set(translations) == {(0, 0)}  # a box as large as the image has no place to go


class Draws:
    """A generator that gives these integers."""

    def __init__(self, *values):
        self.values = list(values)

    def integers(self, *limits):
        return self.values.pop(0)


def test_the_middle_of_the_box_stays():
    """And what is right of it goes down: angles are clockwise. At scale 0.8 it comes nearer."""
    image = torch.arange(81).view(1, 9, 9).to(torch.uint8)
    mask = torch.zeros(9, 9, dtype=torch.uint8)
    mask[2:5, 3:6] = 1
    layers = layers_of(image, mask)
    for angle in (-45, -10, 30, 44):
        assert bag.moved(layers, Draws(2, angle, 100))[0, 3, 4] == image[0, 3, 4]
    assert bag.moved(layers, Draws(2, 44, 100))[0, 5, 6] == image[0, 3, 7]
    smaller = bag.moved(layers, Draws(2, 0, 80))[0, 3]
    assert smaller.tolist()[4:8] == [31, 32, 33, 35]  # 4, 5.25, 6.5 and 7.75 pixels to the right


IMAGE = torch.arange(1, 17).view(1, 4, 4).to(torch.uint8)
CENTRE = mask_of("0000", "0110", "0110", "0000")
FLIP = (0,)


def shift(x, y):
    """Everything moves x columns to the right and y rows down."""
    return 1, x, y


def pasted(image, mask, draws):
    layers = layers_of(image, mask)
    return bag.paste(layers, bag.moved(layers, Draws(*draws)))


@pytest.mark.parametrize(
    "mask, draws, rows",
    [
        (CENTRE, shift(1, 1), "1 2 3 4 / 5 1 2 8 / 9 5 6 7 / 13 14 10 11"),
        (CENTRE, shift(1, 0), "1 2 3 4 / 5 5 6 7 / 9 9 10 11 / 13 14 15 16"),
        (mask_of("0000", "1100", "1000", "0000"), FLIP, "1 2 3 4 / 8 7 6 5 / 12 10 11 9 / 13 14 15 16"),
        (CENTRE, FLIP, "1 2 3 4 / 5 7 6 8 / 9 11 10 12 / 13 14 15 16"),
        (CENTRE, shift(0, 0), "1 2 3 4 / 5 6 7 8 / 9 10 11 12 / 13 14 15 16"),
    ],
)
def test_pasted_foreground(mask, draws, rows):
    expected = [[int(number) for number in row.split()] for row in rows.split("/")]
    assert pasted(IMAGE, mask, draws)[0].tolist() == expected


def test_what_comes_from_outside_is_not_pasted():
    """A mask at the border, moved away: nothing comes in there, so the old pixels stay."""
    mask = mask_of("1000", "1000", "0000", "0000")
    assert pasted(IMAGE, mask, shift(2, 0))[0].tolist()[:2] == [[1, 2, 1, 4], [5, 6, 5, 8]]


def test_without_foreground_an_image_stays():
    empty = torch.zeros(4, 4, dtype=torch.uint8)
    for operation in range(3):
        assert torch.equal(pasted(IMAGE, empty, (operation,)), IMAGE)


def test_a_moved_square():
    """A white square on grey: it is where it was moved to, and grey elsewhere."""
    image = torch.full((3, 8, 8), 100, dtype=torch.uint8)
    image[:, 2:4, 2:4] = 255
    mask = (image[0] == 255).to(torch.uint8)
    left, flipped = torch.full_like(image, 100), torch.full_like(image, 100)
    left[:, 1:3, 0:2] = flipped[:, 2:4, 4:6] = 255
    assert torch.equal(pasted(image, mask, shift(-2, -1)), left)
    assert torch.equal(pasted(image, mask, FLIP), flipped)


def test_pixels_outside_both_masks_stay():
    generator, rng = torch.manual_seed(0), np.random.default_rng(0)
    shares = []
    for _ in range(30):
        image = torch.randint(0, 256, (3, 16, 16), generator=generator).to(torch.uint8)
        mask = torch.zeros(16, 16, dtype=torch.uint8)
        mask[4:9, 3:12] = 1
        layers = layers_of(image, mask)
        new = bag.moved(layers, rng)
        elsewhere = (mask == 0) & (new[-2] == 0) | (new[-1] == 0)
        assert torch.equal(bag.paste(layers, new)[:, elsewhere], image[:, elsewhere])
        assert torch.equal(bag.paste(layers, new)[:, ~elsewhere], new[:3, ~elsewhere])
        shares.append(elsewhere.double().mean().item())
    assert 0.05 < np.mean(shares) < 0.95


def new_set(folder, train_set, index=0, count=1, network=None, **options):
    accelerator = SimpleNamespace(process_index=index, num_processes=count, device=torch.device("cpu"))
    run = SimpleNamespace(accelerator=accelerator, folder=folder)
    network = network or models.build("resnet8", train_set, 0)
    return bag.with_new_images(run, network, train_set, Args(**{"batch_size": 8, "cam": True, **options}))


def random_pool(counts=(20, 8, 4), side=16):
    pool = pool_of(counts, side)
    pixels = torch.randint(0, 256, pool.images.shape, generator=torch.manual_seed(1)).to(torch.uint8)
    pool.images = pixels.contiguous(memory_format=torch.channels_last)
    return pool


@pytest.mark.parametrize("loss", ["ce", "ldam"])
def test_maps_are_of_the_true_class(loss, tmp_path, monkeypatch):
    """Not of the predicted one; without the bias, which all pixels share; of images as they are."""
    pool, seen, foregrounds = random_pool(), [], bag.foregrounds
    pool.augmentation = torch.zeros_like
    monkeypatch.setattr(bag, "foregrounds", lambda cam, scale: seen.append(cam) or foregrounds(cam, scale))
    network = bag.make_model(pool, Args(loss=loss))
    whole = new_set(tmp_path, pool, network=network, loss=loss)
    rng = np.random.default_rng(datasets.epoch_seed(0, 0, stream=1))
    chosen = [rng.choice(of, n) for of, n in zip(pool.by_class(), [4, 16, 20], strict=True)]
    sources = rng.permutation(np.concatenate(chosen))
    assert torch.equal(pool.labels[sources], whole.labels[32:])
    cams = torch.cat(seen)
    for i, source in enumerate(sources[:12]):
        maps, row = network.feature_map(pool.images[source][None])[0], network.classifier.weight
        label = pool.labels[source]
        row = row[:, label] if loss == "ldam" else row[label]
        raw = (row[:, None, None] * maps).sum(0)
        raw = (raw - raw.min()) / (raw.max() - raw.min())
        expected = torch.nn.functional.interpolate(raw[None, None], (16, 16), mode="bilinear")[0, 0]
        close(cams[i], expected.detach(), 1e-5)


def test_the_set_with_new_images(tmp_path):
    train_set = pool_of([20, 8, 4])
    whole = new_set(tmp_path, train_set)
    assert whole.class_counts.tolist() == [24, 24, 24] and len(whole) == 72
    assert torch.bincount(whole.labels).tolist() == [24] * 3 and whole.images.shape == (72, 3, 8, 8)
    assert torch.equal(whole.images[:32], train_set.images) and train_set.class_counts.tolist() == [20, 8, 4]
    assert whole.images.is_contiguous(memory_format=torch.channels_last)
    # each new image of these flat ones shows the number of an image of its class
    numbers = whole.images[32:].flatten(1)
    assert (numbers == numbers[:, :1]).all()
    assert torch.equal(train_set.labels[numbers[:, 0].long()], whole.labels[32:])
    capped = new_set(tmp_path, train_set, cap=8)
    assert capped.class_counts.tolist() == [20, 8, 12]
    assert not (tmp_path / "new_images").exists()
    assert new_set(tmp_path, train_set, cap=4) is train_set  # no class is below


def test_new_images_depend_on_the_seed_alone(tmp_path):
    train_set = random_pool()
    one, again, other = (new_set(tmp_path, train_set, seed=seed).images for seed in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)
    batches = new_set(tmp_path, train_set, batch_size=5).images
    assert (one != batches).double().mean() < 0.01  # a pixel at the mean of its map may differ
    assert (one[32:] != train_set.images[0]).any()


def files_set(jpegs):
    args = parse(SCRIPT, **{**jpegs, "imbalance": 4.0, "num_workers": 0})
    return datasets.load(args)[0]


def test_each_process_makes_a_part(tmp_path, monkeypatch):
    """Together, in the order of the processes, the parts are what one process makes."""
    train_set, parts = random_pool(), []
    whole = new_set(tmp_path, train_set)
    monkeypatch.setattr(bag, "gather_object", lambda made: parts.append(made) or 40 * made[:1])
    for index in range(3):
        new_set(tmp_path, train_set, index, 3)
    together = torch.stack(sum(parts, []))
    assert together.shape == (40, 3, 16, 16)
    assert (together != whole.images[32:]).double().mean() < 0.01  # a pixel at the mean of its map


def test_new_images_in_files(tmp_path, jpegs, monkeypatch):
    """Each process writes a part; together they are the files that one process writes."""
    train_set, written, parts = files_set(jpegs), {}, []
    counts = train_set.class_counts
    for name, index, count in (("one", 0, 1), ("first", 0, 2), ("second", 1, 2)):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(bag, "gather_object", lambda made: parts.append(made) or parts[0])
        whole = new_set(tmp_path / name, train_set, index, count)
        files = (tmp_path / name / "new_images").iterdir()
        written[name] = {file.name: file.read_bytes() for file in files}
        assert whole.class_counts.tolist() == [int(counts.max() + counts.min())] * 3
        assert len(whole.images) == len(whole.labels) == len(whole)
        assert whole.images[len(train_set)] == str(tmp_path / "one" / "new_images" / "0000000.jpg").encode()
    assert len(written["one"]) == len(whole) - len(train_set)
    assert not written["first"].keys() & written["second"].keys() and len(written["second"]) >= 8
    assert written["first"] | written["second"] == written["one"]
    assert [path.name for path in parts[1] + parts[2]] == [path.name for path in parts[0]]
    (tmp_path / "one" / "new_images" / "mine.jpg").write_bytes(b"a user's")
    whole = new_set(tmp_path / "one", train_set)
    images, labels = whole.__getitems__([0, len(train_set), len(whole) - 1])
    assert images.shape == (3, 3, 72, 72) and torch.equal(labels, whole.labels[[0, len(train_set), -1]])
    assert (tmp_path / "one" / "new_images" / "mine.jpg").read_bytes() == b"a user's"


# Recipes


def test_the_recipes():
    for dataset, beta in (("cifar10_lt", 0.9999), ("cifar100_lt", 0.9)):
        args = parse(SCRIPT, dataset=dataset)
        assert (args.drw_epoch, args.epochs, args.stage3_epochs) == (320, 400, 20)
        assert (args.mixup, args.mix, args.sampling, args.cam, args.finetune) == (
            1,
            "input",
            "class",
            True,
            True,
        )
        assert (args.arch, args.batch_size, args.wd, args.lr, args.warmup) == ("resnet32", 128, 2e-4, 0.1, 5)
        plain = parse(SCRIPT, dataset=dataset, recipe="plain")
        assert (plain.drw_epoch, plain.epochs, plain.cap) == (160, 200, None)
        long = parse(SCRIPT, dataset=dataset, recipe="long")
        assert (long.drw_epoch, long.epochs) == (320, 400)
        for none in (plain, long):
            assert (none.mixup, none.sampling, none.cam, none.finetune) == (0, "instance", False, False)
            assert (none.loss, none.reweight, none.beta, none.gamma) == ("ce", "none", beta, 2)
    args = parse(SCRIPT, dataset="imagenet_lt")
    assert (args.drw_epoch, args.epochs, args.stage3_epochs, args.cap) == (160, 200, 20, 100)
    assert (args.arch, args.batch_size, args.wd, args.lr, args.warmup) == ("resnet10", 512, 1e-4, 0.2, 0)
    inat = parse(SCRIPT, dataset="inat2018")
    assert args.nesterov and inat.nesterov and plain.nesterov
    assert (args.augment, inat.augment, inat.arch, inat.cap) == ("jitter", "weak", "resnet50", 50)
    assert parse(SCRIPT, dataset="image_folder").cap == 100


def rates(epochs, **given):
    """Of the epochs e, counted from 1 as in the spec."""
    args = parse(SCRIPT, **given)
    return [bag.learning_rate(e - 1, args) for e in epochs]


def test_learning_rates():
    plain = rates((1, 5, 159, 160, 179, 180, 200), dataset="cifar10_lt", recipe="plain")
    close(plain, [0.046667, 0.1, 0.1, *[1e-3] * 2, *[1e-5] * 2], 1e-6)
    full = rates((319, 320, 321, 359, 360, 400), dataset="cifar100_lt")
    close(full, [0.1, *[1e-3] * 3, 1e-5, 1e-5], 1e-12)
    third = rates([400 + e for e in (1, 7, 8, 15, 16, 20)], dataset="cifar100_lt")
    close(third, [1e-3, 1e-3, 1e-4, 1e-4, 1e-5, 1e-5], 1e-12)
    baseline = rates((59, 60, 79, 80, 100), dataset="imagenet_lt", recipe="plain")
    close(baseline, [0.2, 0.02, 0.02, 2e-3, 2e-3], 1e-12)
    large = rates((1, 119, 120, 159, 160, 161, 199, 200, 201, 207, 208, 216, 220), dataset="imagenet_lt")
    close(large, [0.2, 0.2, 0.02, 0.02, *[2e-3] * 3, 2e-4, 2e-3, 2e-3, 2e-4, 2e-5, 2e-5], 1e-12)


@pytest.mark.parametrize("epochs, start, third", [(1, 0, 1), (2, 1, 1), (40, 32, 2), (200, 160, 10)])
def test_a_short_run_has_all_stages(epochs, start, third):
    args = parse(SCRIPT, dataset="cifar10_lt", epochs=epochs)
    assert (args.drw_epoch, args.epochs, args.stage3_epochs) == (start, epochs, third)
    assert dataclasses.replace(args) == args  # as models.load makes it from the result


def test_ldam_has_a_cosine_classifier():
    network = bag.make_model(pool_of([4, 4, 4]), Args(loss="ldam"))
    assert isinstance(network.classifier, models.CosineClassifier) and network.classifier.scale == bag.SCALE


# Runs


@pytest.mark.parametrize("cam", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_what_each_stage_trains_on(cam, tmp_path, monkeypatch):
    """Momentum goes on in one run of the toolbox, and begins anew where it has several."""
    train, make, seen, networks = bag.train_one_epoch, bag.with_new_images, [], {}

    def spy(run, model, loader, optimizer, class_counts, epoch, args):
        group = optimizer.param_groups[0]
        facts = {name: group[name] for name in ("lr", "weight_decay", "nesterov", "momentum")}
        facts |= dict(momentum_goes_on=len(optimizer.state) > 0, steps=len(loader))
        facts |= dict(images=len(loader.dataset), counts=class_counts.sum().item())
        seen.append(facts)
        train(run, model, loader, optimizer, class_counts, epoch, args)
        networks[epoch] = copy.deepcopy(model.state_dict())

    def spy_on_images(run, network, train_set, args):
        networks["stage 1"] = copy.deepcopy(network.state_dict())
        return make(run, network, train_set, args)

    monkeypatch.setattr(bag, "train_one_epoch", spy)
    monkeypatch.setattr(bag, "with_new_images", spy_on_images)
    tiny = {**TINY, "drw_epoch": 1, "stage3_epochs": 1, "wd": 3e-4, "nesterov": True}
    result = run_here(SCRIPT, **tiny, cam=cam, output_dir=tmp_path / "run")
    assert len(lines_of(tmp_path / "run")) == 3 and math.isfinite(result["loss"])
    assert [facts["momentum_goes_on"] for facts in seen] == [False, not cam, False]
    assert [facts["images"] for facts in seen] == [1236, 5050 if cam else 1236, 1236]
    close([facts["lr"] for facts in seen], [0.05, 5e-4, 5e-6], 1e-12)
    for facts in seen:
        assert facts["steps"] == 1236 // 64 and facts["counts"] == 1236
        assert (facts["weight_decay"], facts["nesterov"], facts["momentum"]) == (3e-4, True, 0.9)
    if cam:  # new images are made with the network of stage 1
        assert all(torch.equal(value, networks[0][name]) for name, value in networks["stage 1"].items())


@pytest.mark.slow
def test_the_checkpoint_of_stage_2_has_the_network_of_stage_1(tmp_path):
    tiny = {**TINY, "drw_epoch": 1, "finetune": False, "lr_steps": ()}
    run_here(SCRIPT, **tiny, output_dir=tmp_path / "whole")
    run_here(SCRIPT, **tiny, cam=False, output_dir=tmp_path / "other")
    first = state_of(tmp_path / "whole", "stage1")
    assert first.keys() == state_of(tmp_path / "whole").keys()
    assert not all(torch.equal(value, state_of(tmp_path / "whole")[name]) for name, value in first.items())


@pytest.mark.slow
def test_nothing_to_defer_is_plain_training(tmp_path):
    """Equal counts: weights and priors change nothing, nor does the time from which they hold."""
    equal = {**TINY, "recipe": "plain", "imbalance": 1.0, "batch_size": 512, "arch": "lenet", "lr": 0.02}
    plain = run_here(SCRIPT, **equal, output_dir=tmp_path / "plain")
    for i, given in enumerate((dict(reweight="cost"), dict(loss="bs"), dict(loss="cdt"))):
        result = run_here(SCRIPT, **equal, **given, output_dir=tmp_path / str(i))
        close(result["loss"], plain["loss"], 1e-5)
    start = run_here(SCRIPT, **equal, drw_epoch=0, output_dir=tmp_path / "start")
    assert start["weights_sha256"] == plain["weights_sha256"]


# What is refused


@pytest.mark.parametrize("arch", ["lenet", "resnet10"])  # resnet10: one pixel of these images
def test_no_activation_maps(arch, tmp_path):
    line = refusal(run_here, SCRIPT, **TINY, arch=arch, output_dir=tmp_path / "run")
    assert line == f"--arch {arch}: no places in its feature map; use resnet32, or --no-cam"


@pytest.mark.slow
def test_without_tricks_it_is_cross_entropy(tmp_path):
    """Bit for bit that of cmo.py with the same settings, and so is stage 1 where re-balancing is deferred."""
    options = dict(TINY, lr_steps=(), warmup=2, warmup_from=0.0)
    cmo = run_here("cmo.py", **options, p_mix=0.0, output_dir=str(tmp_path / "cmo"))
    forget()
    tricks = dict(mixup=0.0, sampling="instance", cam=False, finetune=False)
    bag_run = run_here("bag_of_tricks.py", **options, **tricks, output_dir=str(tmp_path / "bag"))
    assert bag_run["weights_sha256"] == cmo["weights_sha256"]
