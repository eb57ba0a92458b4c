"""bag_of_tricks.py: every weight, loss, law and map against numbers worked out beforehand, and its limits."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator

import bag_of_tricks as bag
from bag_of_tricks import Args
from common import cli, datasets, models
from tests.conftest import (
    TINY,
    close,
    kill_at,
    launch,
    lines_of,
    refusal,
    result_of,
    run_here,
    state_of,
    synthetic_objects,
)

SCRIPT = "bag_of_tricks.py"
COUNTS = torch.tensor([500, 50, 5])
Z, Y = torch.tensor([[2.0, -1.0, 0.0], [0.0, 1.0, -2.0]]), torch.tensor([0, 2])
EXACT = torch.tensor([[1.0, 2.0, 0.5]])
LOSSES = next(f.metadata["choices"] for f in dataclasses.fields(Args) if f.name == "loss")
PLAIN = dict(mixup="none", finetune=False, generate="none", sampling="instance")


def options(loss="ce", **more):
    return Args(**{**PLAIN, "loss": loss, **more})


def recipe(dataset, **given):
    return cli.build(Args, bag.RECIPES, dataset=dataset, **given)


def losses(loss, rebalanced=True, logits=Z, labels=Y, **more):
    return bag.image_losses(logits, labels, COUNTS, rebalanced, options(loss, **more))


# Re-weighting


def test_cost_sensitive_weights():
    close(bag.class_weights(COUNTS, "cost"), [0.01, 0.1, 1])
    close(bag.class_weights(COUNTS, "cost", power=0.5), [0.1, 0.316228, 1])


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
    close(losses("cdt", power=0.2), [0.188424, 1.999319])
    close(losses("cdt", power=0.2).mean(), 1.093871)
    close(losses("smooth"), [0.336513, 3.182346])
    close(losses("label_aware"), [0.836513, 3.182346])


def test_smoothing_of_the_classes():
    close(bag.smoothing(COUNTS), [0.4, 0.142694, 0.1])


def test_ldam():
    cosines = torch.tensor([[0.9, -0.2, 0.1], [0.3, 0.5, -0.4]])
    first, second = losses("ldam", logits=bag.SCALE * cosines)
    assert first < 1e-6
    close(second, 42.0025)


def test_temperatures_and_margins():
    """Of a logit of 1 at each class in turn, the loss tells what divides or lowers it."""
    n = COUNTS.double()
    temperatures, margins = [1, 1.584893, 2.511886], [0.158114, 0.281171, 0.5]
    for k in range(3):
        logits, label = torch.zeros(1, 3, dtype=torch.float64), torch.tensor([k])
        logits[0, k] = 1.0
        expected = math.log(math.exp(1 / temperatures[k]) + 2) - 1 / temperatures[k]
        close(bag.image_losses(logits, label, n, True, options("cdt", power=0.2)), [expected])
        shifted = bag.SCALE * margins[k] / 30 * 30
        close(
            bag.image_losses(logits * 30, label, n, True, options("ldam")),
            [math.log(math.exp(30 - shifted) + 2) - (30 - shifted)],
        )


def batch_loss(loss, logits=Z, labels=Y, share=1.0, epoch=0, counts=COUNTS, **more):
    args = options(loss, **{"deferred": False, **more})
    return bag.batch_loss(Accelerator(), logits, labels, share, counts, epoch, args)


def test_weighted_means():
    """Softmax losses are divided by the sum of the weights, sigmoid ones by the number of images."""
    close(batch_loss("ce"), 1.759429)
    close(batch_loss("ce", reweight="cost"), 3.317535)  # the plain mean of weighted losses is 1.675355
    close(batch_loss("focal", reweight="effective", beta=0.9999, gamma=1.0), 4.301684)
    close(batch_loss("focal", reweight="effective", beta=0.9, gamma=1.0), 2.769685)


def test_weighted_mean_over_processes():
    """Two halves of a batch, their gradients averaged, are the whole: weights are summed over both."""
    z, y = torch.cat([Z, Z.flip(0)]), torch.tensor([0, 2, 1, 0])
    whole = batch_loss("ce", z, y, reweight="cost")
    weights = torch.tensor([0.01, 0.1, 1.0])[y]
    mean = SimpleNamespace(reduce=lambda value, reduction: weights.sum() / 2)
    args = options(reweight="cost", deferred=False)
    halves = [
        bag.batch_loss(mean, z[part], y[part], 1.0, COUNTS, 0, args) for part in (slice(2), slice(2, 4))
    ]
    close(sum(halves) / 2, whole, 1e-6)


def test_focal_gradients_stay_finite():
    logits = torch.tensor([[120.0, -3, 0]], requires_grad=True)
    bag.image_losses(logits, torch.tensor([0]), COUNTS, True, options("focal", gamma=0.5)).sum().backward()
    assert logits.grad.isfinite().all()


def test_loss_of_a_mixed_image():
    first, second = (batch_loss("ce", EXACT, torch.tensor([k]), share) for k, share in ((0, 0.3), (2, 0.7)))
    close(first + second, 1.814369)


def test_equal_counts_leave_cross_entropy():
    equal = torch.tensor([7, 7, 7])
    for loss in ("bs", "cdt"):
        close(batch_loss(loss, counts=equal), batch_loss("ce"), 1e-6)
    for reweight in ("cost", "effective"):
        close(batch_loss("ce", counts=equal, reweight=reweight), batch_loss("ce"), 1e-6)
        close(batch_loss("focal", counts=equal, reweight=reweight), batch_loss("focal"), 1e-6)
    close(batch_loss("ce", reweight="cost", power=0.0), batch_loss("ce"), 1e-6)
    close(batch_loss("ce", reweight="effective", beta=0.0), batch_loss("ce"), 1e-6)


def test_what_is_deferred():
    """Epoch e = 160, counted from 1, is stage 1's last, 161 stage 2's first; LDAM's weights hold at 160."""
    for loss, first in (("ce", 161), ("bs", 161), ("focal", 161), ("ldam", 160)):
        args = options(loss, epochs=160)
        assert [bag.rebalances(e - 1, args) for e in (first - 1, first, 400)] == [False, True, True]
    assert bag.rebalances(0, options(epochs=160, deferred=False))
    deferred = dict(epochs=160, deferred=True)
    for given in (dict(reweight="cost"), dict(reweight="effective"), dict(loss="bs"), dict(loss="cdt")):
        before, after = (batch_loss(**{"loss": "ce", **given}, epoch=e, **deferred) for e in (159, 160))
        assert torch.equal(before, batch_loss("ce")) and not torch.equal(after, before)
        assert torch.equal(after, batch_loss(**{"loss": "ce", **given}))
    focal = losses("focal")  # stage 1 has it, without weights
    close(batch_loss("focal", reweight="cost", epoch=159, **deferred), focal.mean())
    weighted = (torch.tensor([0.01, 1.0]) * focal).mean()
    close(batch_loss("focal", reweight="cost", epoch=160, **deferred), weighted)
    ldam = [batch_loss("ldam", reweight="effective", epoch=e, **deferred) for e in (158, 159)]
    assert torch.equal(ldam[0], batch_loss("ldam")) and not torch.equal(*ldam)  # margins always


# Mixup


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
    close(bag.remix_share(lam, torch.tensor([n_i]), torch.tensor([n_j])), [share])


def test_manifold_mixup_blends_the_pooled_features():
    network = models.build("resnet8", 3, seed=0).eval()
    model, images, order = bag.ManifoldMixup(network), torch.randn(4, 3, 16, 16), torch.tensor([1, 0, 3, 2])
    f = network.features(images)
    close(model(images, 0.3, order), network.classifier(0.3 * f + 0.7 * f[order]), 1e-6)
    close(model(images), network(images), 1e-6)


class Stub:
    """What train_one_epoch asks of a run; keeps the losses."""

    def __init__(self):
        self.accelerator, self.losses = Accelerator(), []

    def steps(self, loader):
        return loader

    def record(self, loss):
        self.losses.append(loss.item())


class Linear(torch.nn.Module):
    """A model that keeps what it was called with."""

    def __init__(self):
        super().__init__()
        self.weight, self.calls = torch.nn.Parameter(torch.randn(5, 3, generator=torch.manual_seed(2))), []

    def forward(self, images, *mix):
        self.calls.append((images, *mix))
        return images @ self.weight


def one_step(monkeypatch, mixup, lam=0.3, **more):
    """(calls of the model, loss, images, labels, order) of one step on four images."""
    images, labels = torch.randn(4, 5, generator=torch.manual_seed(1)), torch.tensor([0, 0, 1, 2])
    order, asked = torch.tensor([2, 3, 0, 1]), []
    draws = SimpleNamespace(beta=lambda a, b: asked.append((a, b)) or lam)
    monkeypatch.setattr(bag.np.random, "RandomState", lambda seed: draws)
    monkeypatch.setattr(bag.torch, "randperm", lambda size: order)
    run, model, train_set = Stub(), Linear(), SimpleNamespace(class_counts=COUNTS)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    args = Args(mixup=mixup, finetune=False, **more)
    bag.train_one_epoch(run, model, [(images, labels)], optimizer, train_set, mixup, 0, args)
    assert asked == ([] if mixup == "none" else [(args.alpha, args.alpha)])
    weight = Linear().weight.detach()
    assert not torch.equal(model.weight, weight)  # it learned
    return model.calls, run.losses[0], images, labels, order, weight


def cross_entropy(logits, labels):
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none")


def test_a_step_with_input_mixup(monkeypatch):
    calls, loss, x, y, order, weight = one_step(monkeypatch, "input", alpha=0.7)
    mixed = 0.3 * x + 0.7 * x[order]
    close(calls[0][0], mixed, 1e-6)
    z = mixed @ weight
    close(loss, (0.3 * cross_entropy(z, y) + 0.7 * cross_entropy(z, y[order])).mean(), 1e-5)


def test_a_step_with_remix(monkeypatch):
    """Of classes 0 0 1 2 with 500, 50, 5 images and partners 1 2 0 0, at lambda 0.3: shares 0 0 .3 .3."""
    calls, loss, x, y, order, weight = one_step(monkeypatch, "remix")
    mixed, share = 0.3 * x + 0.7 * x[order], torch.tensor([0, 0, 0.3, 0.3])
    close(calls[0][0], mixed, 1e-6)
    z = mixed @ weight
    close(loss, (share * cross_entropy(z, y) + (1 - share) * cross_entropy(z, y[order])).mean(), 1e-5)


def test_a_step_with_manifold_mixup(monkeypatch):
    calls, loss, x, y, order, weight = one_step(monkeypatch, "manifold")
    assert torch.equal(calls[0][0], x) and calls[0][1] == 0.3 and torch.equal(calls[0][2], order)
    z = x @ weight  # of this model, which does not mix
    close(loss, (0.3 * cross_entropy(z, y) + 0.7 * cross_entropy(z, y[order])).mean(), 1e-5)


def test_a_step_without_mixup(monkeypatch):
    calls, loss, x, y, _, weight = one_step(monkeypatch, "none", generate="none")
    assert torch.equal(calls[0][0], x) and len(calls[0]) == 1
    close(loss, cross_entropy(x @ weight, y).mean(), 1e-5)


def test_lambdas_differ_between_steps_and_epochs(monkeypatch):
    seen, share = [], bag.batch_loss
    monkeypatch.setattr(
        bag, "batch_loss", lambda a, z, y, s, *rest: seen.append(s) or share(a, z, y, s, *rest)
    )
    images, labels = torch.randn(4, 5), torch.tensor([0, 0, 1, 2])
    model, train_set = Linear(), SimpleNamespace(class_counts=COUNTS)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for epoch in (0, 1, 0):
        args = (train_set, "input", epoch, Args())
        bag.train_one_epoch(Stub(), model, [(images, labels)] * 2, optimizer, *args)
    lam = seen[::2]
    assert len(set(lam)) == 4 and lam[:2] == lam[4:] and all(0 < value < 1 for value in lam)


# Sampling


def test_class_probabilities():
    close(bag.class_probabilities(COUNTS, "instance"), [0.900901, 0.090090, 0.009009])
    close(bag.class_probabilities(COUNTS, "square-root"), [0.706101, 0.223289, 0.070610])
    close(bag.class_probabilities(COUNTS, "class"), [1 / 3] * 3)

    def progressive(e, args):
        return bag.class_probabilities(COUNTS, "progressive", bag.progress(e - 1, args))

    whole = options(sampling="progressive", epochs=160, stage2_epochs=40)
    close(progressive(100, whole), [0.617117, 0.211712, 0.171171])
    close(progressive(161, whole), [0.444009, 0.285901, 0.270090])
    close(progressive(200, whole), [1 / 3] * 3)
    anew = options(sampling="progressive", epochs=160, stage2_epochs=40, generate="image-trans")
    close(progressive(161, anew), [0.886712, 0.096171, 0.017117])
    close(progressive(210, anew), [1 / 3] * 3)  # stage 3


def pool_of(counts, original=None):
    """A set of `counts` images, each filled with its own number; some of them may be new."""
    labels = np.repeat(np.arange(len(counts)), counts)
    images = torch.arange(len(labels)).view(-1, 1, 1, 1).expand(-1, 3, 8, 8).to(torch.uint8)
    facts = np.array(original or counts), list("abc"), (3, 8, 8), (0.0,) * 3, (1 / 255,) * 3
    part = datasets.ImagesInMemory(images, labels, *facts)
    part.class_counts = torch.tensor(counts)
    return part


def drawn(pool, original, sampling, epochs=1, **more):
    args = options(sampling=sampling, batch_size=1, epochs=1, **more)
    sampler, indices = bag.make_sampler(pool, torch.tensor(original), sampling, args), []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        indices.append([index for index, _ in sampler])
        assert len(indices[-1]) == len(sampler)
    return torch.tensor(indices)


def test_even_draws_from_a_pool():
    """Each class has a third; of a class, old and new images have their share."""
    counts = [500, 50, 5]
    pool = pool_of([505] * 3)
    indices = drawn(pool, counts, "class", epochs=180).flatten()  # 99,900 draws
    shares = torch.bincount(pool.labels[indices]) / len(indices)
    close(shares, [1 / 3] * 3, 0.005)
    middle = indices[pool.labels[indices] == 1] - 505
    close((middle < 50).double().mean(), 50 / 505, 0.005)


@pytest.mark.parametrize("sampling", ["instance", "square-root", "progressive", "class"])
def test_laws_of_a_pool_go_by_the_training_images(sampling):
    counts, pool = [500, 50, 5], pool_of([505] * 3)
    indices = drawn(pool, counts, sampling, epochs=60, generate="cam", stage2_epochs=60)
    shares = torch.bincount(pool.labels[indices.flatten()]) / indices.numel()
    t = [bag.progress(e, options(generate="cam", epochs=1, stage2_epochs=60)) for e in range(60)]
    law = torch.stack([bag.class_probabilities(COUNTS, sampling, share) for share in t]).mean(0)
    close(shares, law, 0.01)
    assert indices.shape[1] == sum(counts)


def test_over_and_under_sampling():
    counts = [50, 10, 5]
    pool = pool_of(counts)
    over = drawn(pool, counts, "over", epochs=2)
    assert over.shape == (2, 150)
    for epoch in over:
        assert torch.bincount(pool.labels[epoch]).tolist() == [50] * 3
        assert set(epoch.tolist()) == set(range(65))  # every image at least once
    assert not torch.equal(over[0].sort()[0], over[1].sort()[0])  # drawn anew
    under = drawn(pool, counts, "under", epochs=2)
    assert under.shape == (2, 15) and torch.bincount(pool.labels[under[0]]).tolist() == [5] * 3
    assert set(under[0].tolist()) == set(under[1].tolist()) and len(set(under[0].tolist())) == 15
    assert under[0].tolist() != under[1].tolist()
    more = drawn(pool_of([55] * 3), counts, "under")  # of a pool with new images as many
    assert more.shape == (1, 15)
    assert drawn(pool_of([55, 60, 60]), counts, "over").shape == (1, 180)


def test_instance_sampling_is_a_permutation():
    assert drawn(pool_of([9, 3, 2]), [9, 3, 2], "instance")[0].sort()[0].tolist() == list(range(14))


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
    return torch.tensor([[[digit == "1" for digit in row] for row in rows]])


def test_foreground():
    cam = bag.activation_maps(MAPS, ROWS, (4, 4))
    assert torch.equal(bag.foregrounds(cam), mask_of("1000", "1000", "0011", "0111"))
    assert torch.equal(bag.foregrounds(cam, 0.75), mask_of("1100", "1100", "0111", "0111"))


def test_box_and_the_ranges_of_the_operations():
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[0, 2:6, 1:4] = True
    maps = bag.inverse_maps(mask.expand(6000, 8, 8), torch.rand(6000, 5, generator=torch.manual_seed(0)))
    upright = torch.zeros(6000, 11, 8, dtype=torch.bool)
    upright[:, 2:6, 1:4] = True
    tall = bag.inverse_maps(upright, torch.rand(6000, 5, generator=torch.manual_seed(0)))
    down = -tall[(tall[:, :, :2] == torch.eye(2)).all((1, 2))][:, 1, 2]
    assert sorted(set(down.tolist())) == [-2, -1, 0, 1, 2, 3, 4, 5]
    determinants = maps[:, 0, 0] * maps[:, 1, 1] - maps[:, 0, 1] * maps[:, 1, 0]
    flips = maps[determinants < 0]
    assert (flips == torch.tensor([[-1.0, 0, 7], [0, 1, 0]])).all()
    moved = maps[(maps[:, :, :2] == torch.eye(2)).all((1, 2))]
    assert sorted(set((-moved[:, 0, 2]).tolist())) == [-1, 0, 1, 2, 3, 4]
    assert sorted(set((-moved[:, 1, 2]).tolist())) == [-2, -1, 0, 1, 2]
    turned = maps[(determinants > 0) & (maps[:, 0, 1] != 0)]
    for share in (flips, moved, turned):
        assert abs(len(share) / 6000 - 1 / 3) < 0.03
    centre = torch.tensor([2, 3.5, 1])
    close(turned @ centre, centre[:2].expand(len(turned), 2))  # of the box, which stays where it is
    scale = (turned[:, 0, 0] ** 2 + turned[:, 0, 1] ** 2).rsqrt()
    angle = torch.rad2deg(torch.atan2(-turned[:, 1, 0], turned[:, 0, 0]))
    assert set(torch.round(100 * scale).tolist()) == set(range(80, 120))
    assert set(torch.round(angle).tolist()) == set(range(-45, 0)) | set(range(1, 45))
    close(angle, angle.round(), 1e-3)


def test_whole_images_move_by_a_quarter():
    mask = torch.ones(3000, 8, 8, dtype=torch.bool)
    maps = bag.inverse_maps(mask, torch.rand(3000, 5, generator=torch.manual_seed(0)), whole=True)
    moved = maps[(maps[:, :, :2] == torch.eye(2)).all((1, 2))]
    for axis in (0, 1):
        assert sorted(set(moved[:, axis, 2].tolist())) == [-2, -1, 0, 1, 2]
    inside = bag.inverse_maps(mask, torch.rand(3000, 5, generator=torch.manual_seed(0)))
    moved = inside[(inside[:, :, :2] == torch.eye(2)).all((1, 2))]
    assert (moved[:, :, 2] == 0).all()  # a box as large as the image has no place to go


IMAGE = torch.arange(1, 17).view(1, 1, 4, 4).to(torch.uint8)
CENTRE = mask_of("0000", "0110", "0110", "0000")
FLIP = torch.tensor([[[-1.0, 0, 3], [0, 1, 0]]])


def shift(x, y):
    """Everything moves x columns to the right and y rows down."""
    return torch.tensor([[[1.0, 0, -x], [0, 1, -y]]])


@pytest.mark.parametrize(
    "mask, maps, rows",
    [
        (CENTRE, shift(1, 1), "1 2 3 4 / 5 1 2 8 / 9 5 6 7 / 13 14 10 11"),
        (CENTRE, shift(1, 0), "1 2 3 4 / 5 5 6 7 / 9 9 10 11 / 13 14 15 16"),
        (mask_of("0000", "1100", "1000", "0000"), FLIP, "1 2 3 4 / 8 7 6 5 / 12 10 11 9 / 13 14 15 16"),
        (CENTRE, FLIP, "1 2 3 4 / 5 7 6 8 / 9 11 10 12 / 13 14 15 16"),
        (CENTRE, shift(0, 0), "1 2 3 4 / 5 6 7 8 / 9 10 11 12 / 13 14 15 16"),
    ],
)
def test_pasted_foreground(mask, maps, rows):
    expected = [[int(number) for number in row.split()] for row in rows.split("/")]
    assert bag.paste(IMAGE, mask, maps)[0, 0].tolist() == expected


def test_what_comes_from_outside_is_not_pasted():
    """A mask at the border, moved away: nothing comes in there, so the old pixels stay."""
    mask = mask_of("1000", "1000", "0000", "0000")
    assert bag.paste(IMAGE, mask, shift(2, 0))[0, 0].tolist()[:2] == [[1, 2, 1, 4], [5, 6, 5, 8]]


def test_a_moved_square():
    """A white square on grey: it is where it was moved to, and grey elsewhere."""
    images = torch.full((2, 3, 8, 8), 100, dtype=torch.uint8)
    images[:, :, 2:4, 2:4] = 255
    mask = (images[:, 0] == 255).expand(2, 8, 8)
    draws = torch.tensor([[0.5, 0, 0.2, 0, 0], [0.1, 0, 0, 0, 0]])  # two to the left, one up; flip
    new = bag.paste(images, mask, bag.inverse_maps(mask, draws))
    expected = torch.full_like(images, 100)
    expected[0, :, 1:3, 0:2] = expected[1, :, 2:4, 4:6] = 255
    assert torch.equal(new, expected)


def transformed(draws, generate="cam", loss="ce", **more):
    args = options(loss, generate=generate, sampling="class", **more)
    train_set = pool_of([4, 4, 4])
    train_set.padded = torch.randint(0, 256, (12, 3, 16, 16), generator=torch.manual_seed(1)).to(torch.uint8)
    train_set.shape = (3, 16, 16)
    network = models.build("resnet8", 3, 0, cosine=bag.SCALE if loss == "ldam" else None).eval()
    images, labels = train_set.__getitems__(list(range(len(draws))))
    return network, images, labels, bag.transform(network, images, labels, draws, train_set, args), train_set


@pytest.mark.parametrize("loss", ["ce", "ldam"])
def test_maps_are_of_the_true_class(loss):
    """Not of the predicted one; without the bias, which all pixels share."""
    draws = torch.rand(6, 5, generator=torch.manual_seed(0))
    network, images, labels, (pixels, cam, mask, new), train_set = transformed(draws, loss=loss)
    assert torch.equal(pixels, train_set.padded[:6]) and new.dtype == torch.uint8
    for i in range(6):
        maps, row = network.feature_map(images[i : i + 1])[0], network.classifier.weight
        row = row[:, labels[i]] if loss == "ldam" else row[labels[i]]
        raw = (row[:, None, None] * maps).sum(0)
        raw = (raw - raw.min()) / (raw.max() - raw.min())
        expected = torch.nn.functional.interpolate(raw[None, None], (16, 16), mode="bilinear")[0, 0]
        close(cam[i].detach(), expected.detach(), 1e-5)
        assert torch.equal(mask[i], bag.foregrounds(cam[i : i + 1])[0])
    assert (new != pixels).any()


def test_threshold_and_rotation_are_the_options(monkeypatch):
    seen, make = [], bag.inverse_maps
    monkeypatch.setattr(bag, "inverse_maps", lambda *given: seen.append(given) or make(*given))
    draws = torch.rand(4, 5, generator=torch.manual_seed(0))
    *_, (_, cam, mask, _), _ = transformed(draws, cam_threshold=0.5, rotation=7)
    assert torch.equal(mask, bag.foregrounds(cam, 0.5)) and not torch.equal(mask, bag.foregrounds(cam))
    assert seen[0][2:] == (7, False)
    transformed(draws, "image-trans", rotation=8)
    assert seen[1][2:] == (8, True)


def test_pixels_outside_both_masks_stay():
    draws = torch.rand(12, 5, generator=torch.manual_seed(0))
    *_, (pixels, _, mask, new), _ = transformed(draws)
    _, inside = bag.warp(pixels, bag.inverse_maps(mask, draws))
    moved_mask, _ = bag.warp(mask[:, None], bag.inverse_maps(mask, draws))
    elsewhere = ~(mask | moved_mask[:, 0]) | ~inside
    where = elsewhere[:, None].expand_as(new)
    assert torch.equal(new[where], pixels[where]) and 0.05 < elsewhere.double().mean() < 0.95


def test_image_transformation_moves_everything():
    draws = torch.rand(12, 5, generator=torch.manual_seed(0))
    *_, (pixels, _, mask, new), _ = transformed(draws, "image-trans")
    moved, _ = bag.warp(pixels, bag.inverse_maps(mask, draws, whole=True))
    assert mask.all() and torch.equal(new, moved)


def new_set(tmp_path, train_set, args, index=0, count=1):
    facts = dict(process_index=index, num_processes=count, device=torch.device("cpu"))
    accelerator = SimpleNamespace(**facts, wait_for_everyone=lambda: None)
    run = SimpleNamespace(accelerator=accelerator, folder=tmp_path, save_grid=lambda *parts: None)
    network = models.build("resnet8", 3, 0, train_set.shape)
    return bag.with_new_images(run, network, train_set, args)


def test_a_dry_run_makes_one_batch(tmp_path, monkeypatch):
    """Whose images stand for all of them: there are as many steps as in the run, whatever the sampling."""
    made, change = [], bag.transform
    monkeypatch.setattr(
        bag, "transform", lambda net, images, *of: made.append(len(images)) or change(net, images, *of)
    )
    whole = new_set(tmp_path, pool_of([20, 8, 4]), options(generate="cam", batch_size=8, dry_run=True))
    assert made == [8, 8] and len(whole) == 72  # eight are drawn
    assert whole.class_counts.tolist() == [24, 24, 24] and whole.padded[32:40].equal(whole.padded[64:])


def test_the_set_with_new_images(tmp_path):
    train_set = pool_of([20, 8, 4])
    args = options(generate="cam", batch_size=8)
    whole = new_set(tmp_path, train_set, args)
    assert whole.class_counts.tolist() == [24, 24, 24] and len(whole) == 72
    assert torch.bincount(whole.labels).tolist() == [24] * 3
    assert torch.equal(whole.padded[:32], train_set.padded) and train_set.class_counts.tolist() == [20, 8, 4]
    assert torch.equal(whole.device_labels, whole.labels)
    # each new image of these flat ones shows the number of an image of its class
    numbers = whole.padded[32:].flatten(1)
    assert (numbers == numbers[:, :1]).all()
    assert torch.equal(train_set.labels[numbers[:, 0].long()], whole.labels[32:])
    assert torch.equal(new_set(tmp_path, train_set, args).padded, whole.padded)
    other = new_set(tmp_path, train_set, options(generate="cam", batch_size=8, seed=1))
    assert not torch.equal(other.padded, whole.padded)
    capped = new_set(tmp_path, train_set, options(generate="cam", batch_size=8, cap=8))
    assert capped.class_counts.tolist() == [20, 8, 12]


def test_new_images_do_not_depend_on_the_batch(tmp_path):
    train_set = pool_of([20, 8, 4])
    train_set.padded = torch.randint(0, 256, (32, 3, 8, 8), generator=torch.manual_seed(1)).to(torch.uint8)
    one, two = (new_set(tmp_path, train_set, options(generate="cam", batch_size=b)) for b in (8, 5))
    assert (one.padded != two.padded).double().mean() < 0.01  # a pixel at the mean of its map may differ


def test_new_images_in_files(tmp_path, jpegs):
    args = cli.build(Args, bag.RECIPES, **{**jpegs, "imbalance": 4.0, "generate": "cam", "num_workers": 0})
    train_set, _ = datasets.load(args)
    whole = new_set(tmp_path, train_set, args)
    n = train_set.class_counts
    assert whole.class_counts.tolist() == [int(n.max() + n.min())] * 3
    first = whole.paths[len(train_set)]
    assert first == str(tmp_path / "new_images" / "0000000.jpg").encode()
    images, labels = whole.__getitems__([len(train_set), len(whole) - 1]).to("cpu")
    assert images.shape == (2, 3, 72, 72) and labels.tolist() == [0, 2]
    assert len(list((tmp_path / "new_images").iterdir())) == len(whole) - len(train_set)


# Stages


def stages(dataset, **given):
    args = recipe(dataset, **given)
    return [(stage, len(epochs), sampling, mixup) for stage, epochs, sampling, mixup in bag.make_stages(args)]


def test_the_stages_of_the_recipe():
    assert stages("cifar10_lt") == stages("cifar100_lt")
    assert stages("cifar10_lt") == [
        (1, 320, "instance", "input"),
        (2, 80, "class", "input"),
        (3, 20, "class", "none"),
    ]
    assert [stage[1] for stage in stages("imagenet_lt")] == [160, 40, 20]
    plain = [(1, 160, "instance", "none"), (2, 40, "class", "none")]
    assert stages("cifar10_lt", mixup="none") == plain
    start = stages("cifar10_lt", mixup="none", deferred=False)
    assert [stage[2] for stage in start] == ["class", "class"]
    args = recipe("cifar10_lt")
    assert (args.arch, args.batch_size, args.wd, args.lr, args.warmup) == ("resnet32", 128, 2e-4, 0.1, 5)
    args = recipe("imagenet_lt")
    assert (args.arch, args.batch_size, args.wd, args.lr, args.warmup) == ("resnet10", 512, 1e-4, 0.2, 0)
    assert (args.color_jitter, recipe("inat2018").color_jitter, recipe("inat2018").arch) == (
        0.4,
        0,
        "resnet50",
    )
    assert recipe("cifar10_lt", mixup="none").generate == "cam"
    assert recipe("cifar10_lt", sampling="instance").generate == "none"
    assert recipe("cifar10_lt", deferred=False).generate == "none"
    assert (recipe("imagenet_lt").cap, recipe("inat2018").cap, recipe("cifar10_lt").cap) == (100, 50, None)
    focal = dict(loss="focal", reweight="effective")
    assert (recipe("cifar10_lt", **focal).gamma, recipe("cifar100_lt", **focal).gamma) == (1, 1)
    assert (recipe("cifar10_lt", **focal).beta, recipe("cifar100_lt", **focal).beta) == (0.9999, 0.9)
    assert recipe("cifar100_lt", reweight="effective").beta == 0.9
    assert recipe("cifar100_lt", loss="ldam", reweight="effective").beta == 0.9999
    assert recipe("cifar10_lt", loss="cdt").power == 0.2 and recipe("cifar10_lt", loss="focal").gamma == 2


def rate(e, args):
    """Of the epoch e, counted from 1 as in the spec."""
    return bag.learning_rate(e - 1, args)


def test_learning_rates():
    plain = recipe("cifar10_lt", mixup="none")
    close(
        [rate(e, plain) for e in (1, 5, 159, 160, 179, 180, 200)],
        [0.046667, 0.1, 0.1, *[1e-3] * 2, *[1e-5] * 2],
        1e-6,
    )
    full = recipe("cifar100_lt")
    close([rate(e, full) for e in (319, 320, 321, 359, 360, 400)], [0.1, *[1e-3] * 3, 1e-5, 1e-5], 1e-12)
    third = [rate(400 + e, full) for e in (1, 7, 8, 15, 16, 20)]
    close(third, [1e-3, 1e-3, 1e-4, 1e-4, 1e-5, 1e-5], 1e-12)
    short = recipe("cifar100_lt", epochs=100, stage2_epochs=20)  # the rate falls before stage 2 all the same
    close([rate(e, short) for e in (99, 100, 109, 110)], [0.1, 1e-3, 1e-3, 1e-5], 1e-12)
    baseline = recipe("imagenet_lt", mixup="none")
    close([rate(e, baseline) for e in (59, 60, 79, 80, 100)], [0.2, 0.02, 0.02, 2e-3, 2e-3], 1e-12)
    large = recipe("imagenet_lt")
    rates = [rate(e, large) for e in (1, 119, 120, 159, 160, 161, 199, 200, 201, 207, 208, 216, 220)]
    close(rates, [0.2, 0.2, 0.02, 0.02, *[2e-3] * 3, 2e-4, 2e-3, 2e-3, 2e-4, 2e-5, 2e-5], 1e-12)


# Runs

SMALL = {**TINY, "epochs": 1, "lr_steps": (), "stage2_epochs": 1, "stage3_epochs": 1, "stage3_lr": 0.01}


def tiny(folder, name, **more):
    return run_here(SCRIPT, **{**SMALL, "output_dir": folder / name, **more})


SINGLE = dict(mixup="none", sampling="instance")
ROWS_OF_THE_TABLES = {
    "recipe": {},
    "without fine-tuning": dict(finetune=False),
    "mixup": dict(sampling="instance", finetune=False),
    "manifold": dict(mixup="manifold", sampling="instance"),
    "remix": dict(mixup="remix", sampling="instance", finetune=False),
    "over from the start": dict(mixup="none", sampling="over", deferred=False),
    "under from the start": dict(mixup="none", sampling="under", deferred=False, batch_size=16),
    "cam over": dict(mixup="none", sampling="over"),
    "cam under": dict(mixup="none", sampling="under", batch_size=16),
    "cam progressive": dict(mixup="none", sampling="progressive"),
    "image-trans": dict(mixup="none", generate="image-trans"),
    "drs square-root": dict(mixup="none", generate="none", sampling="square-root"),
    **{f"deferred {loss}": dict(SINGLE, loss=loss) for loss in LOSSES},
    "drw cost": dict(SINGLE, reweight="cost", power=0.5),
    "class-balanced focal from the start": dict(SINGLE, loss="focal", reweight="effective", deferred=False),
}


@pytest.mark.parametrize("row", ROWS_OF_THE_TABLES)
def test_every_row_runs(row, tmp_path):
    more = ROWS_OF_THE_TABLES[row]
    result = tiny(tmp_path, "run", **more)
    lines = lines_of(tmp_path / "run")
    assert len(lines) == 2 + result["args"]["finetune"] and math.isfinite(result["loss"])
    assert (tmp_path / "run" / "new_images.png").exists() == (result["args"]["generate"] != "none")


def test_nothing_to_defer_is_plain_training(tmp_path):
    """Equal counts: weights and priors change nothing, nor does the time from which they hold."""
    equal = dict(SINGLE, imbalance=1.0, batch_size=512, arch="lenet", lr=0.02)
    plain = tiny(tmp_path, "plain", **equal)
    for i, given in enumerate((dict(reweight="cost"), dict(loss="bs"), dict(loss="cdt"))):
        close(tiny(tmp_path, str(i), **equal, **given)["loss"], plain["loss"], 1e-5)
    start = tiny(tmp_path, "start", **equal, deferred=False)
    assert start["weights_sha256"] == plain["weights_sha256"]


def stages_of(tmp_path, monkeypatch, **given):
    """What train_one_epoch is given in the one epoch of each stage, as a list of dicts."""
    train, seen = bag.train_one_epoch, []

    def spy(run, model, loader, optimizer, train_set, mixup, epoch, args):
        group = optimizer.param_groups[0]
        facts = {name: group[name] for name in ("lr", "weight_decay", "nesterov", "momentum")}
        facts |= dict(momentum_goes_on=len(optimizer.state) > 0, mixup=mixup, steps=len(loader))
        facts |= dict(images=len(loader.dataset), counts=train_set.class_counts.tolist())
        seen.append(facts)
        train(run, model, loader, optimizer, train_set, mixup, epoch, args)

    monkeypatch.setattr(bag, "train_one_epoch", spy)
    tiny(tmp_path, "run", **given)
    return seen


@pytest.mark.parametrize("generate", ["cam", "none"])
def test_what_each_stage_trains_on(generate, tmp_path, monkeypatch):
    """Momentum goes on in one run of the released code, and begins anew where it has several."""
    given = dict(generate=generate, stage2_lr_steps=(0,), stage3_lr_steps=(), wd=3e-4)
    seen = stages_of(tmp_path, monkeypatch, **given)
    assert [facts["momentum_goes_on"] for facts in seen] == [False, generate == "none", False]
    assert [facts["images"] for facts in seen] == [1236, 5050 if generate == "cam" else 1236, 1236]
    assert [facts["mixup"] for facts in seen] == ["input", "input", "none"]
    close([facts["lr"] for facts in seen], [0.05, 0.005, 0.01], 1e-12)
    for facts in seen:
        assert facts["steps"] == 1236 // 64 and sum(facts["counts"]) == 1236
        assert (facts["weight_decay"], facts["nesterov"], facts["momentum"]) == (3e-4, True, 0.9)


def test_the_law_of_stage_2_goes_by_the_training_images(tmp_path, monkeypatch):
    make, seen = bag.make_sampler, []
    monkeypatch.setattr(bag, "make_sampler", lambda *given: seen.append(given) or make(*given))
    tiny(tmp_path, "run", sampling="square-root")
    for (pool, counts, *_), images in zip(seen, (1236, 5050, 1236), strict=True):
        assert len(pool) == images and counts.sum() == 1236
    assert [sampling for _, _, sampling, _ in seen] == ["instance", "square-root", "square-root"]


def test_new_images_are_made_with_the_network_of_stage_1(tmp_path):
    tiny(tmp_path, "run", stage2_epochs=2, finetune=False)
    last, first = state_of(tmp_path / "run", 2, "stage1"), state_of(tmp_path / "run", 1, "stage1")
    assert all(torch.equal(last[name], first[name]) for name in first)
    tiny(tmp_path, "stage1", stage2_epochs=1, finetune=False)
    end = state_of(tmp_path / "stage1", 0)
    assert all(torch.equal(first[name], end[name]) for name in end)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "moment", ["2:5", *(pytest.param(at, marks=pytest.mark.slow) for at in ("1:5", "3:5"))]
)
def test_killed_in_later_stages(moment, processes, tmp_path):
    """The first and the second epoch of stage 2, stage 3: as if unbroken, bit for bit."""
    long = {**SMALL, "epochs": 1, "stage2_epochs": 2, "stage3_epochs": 1}

    def run(name, **more):
        given = {**long, "output_dir": tmp_path / name, **more}
        return run_here(SCRIPT, **given) if processes == 1 else result_of(launch(SCRIPT, processes, **given))

    unbroken = run("unbroken")
    killed = launch(SCRIPT, processes, env=kill_at(tmp_path, moment), **long, output_dir=tmp_path / "broken")
    assert killed.returncode != 0 and len(lines_of(tmp_path / "broken")) == int(moment[0])
    assert run("broken", resume="auto")["weights_sha256"] == unbroken["weights_sha256"]


@pytest.mark.slow
def test_killed_with_new_images_in_files(tmp_path, jpegs):
    data = {**jpegs, "imbalance": 4.0, "epochs": 1, "stage2_epochs": 2, "stage3_epochs": 1, "batch_size": 8}
    unbroken = run_here(SCRIPT, **data, output_dir=tmp_path / "unbroken")
    killed = launch(SCRIPT, env=kill_at(tmp_path, "2:2"), **data, output_dir=tmp_path / "broken")
    assert killed.returncode != 0
    (tmp_path / "broken" / "new_images" / "0000001.jpg").write_bytes(b"half")  # is made anew
    resumed = run_here(SCRIPT, **data, output_dir=tmp_path / "broken", resume="auto")
    assert resumed["weights_sha256"] == unbroken["weights_sha256"]


def test_processes_share_the_making_of_files(tmp_path, jpegs):
    """Each writes a part; together they are the files that one process writes."""
    args = cli.build(Args, bag.RECIPES, **{**jpegs, "imbalance": 4.0, "num_workers": 0, "batch_size": 8})
    train_set, _ = datasets.load(args)
    folders = {name: tmp_path / name for name in ("one", "first", "second")}
    for name, index, count in (("one", 0, 1), ("first", 0, 2), ("second", 1, 2)):
        folders[name].mkdir()
        new_set(folders[name], train_set, args, index=index, count=count)
    files = {
        name: {file.name: file.read_bytes() for file in (folder / "new_images").iterdir()}
        for name, folder in folders.items()
    }
    assert not files["first"].keys() & files["second"].keys() and len(files["second"]) >= 8
    assert files["first"] | files["second"] == files["one"]


@pytest.mark.slow
def test_foregrounds_are_on_the_object_of_synthetic_images(tmp_path):
    """After stage 1 of the default run; and what moves is inside the union of both masks."""
    args = recipe("synthetic", output_dir=str(tmp_path / "run"), stage2_epochs=1, finetune=False)
    bag.main(args)
    train_set, _ = datasets.load(args)
    network = bag.make_network(train_set, args).eval()
    network.load_state_dict(state_of(tmp_path / "run", args.epochs, "stage1"))
    images, labels = train_set.__getitems__(list(range(len(train_set))))
    draws = torch.rand(len(labels), 5, generator=torch.manual_seed(0))
    pixels, _, mask, new = bag.transform(network, images, labels, draws, train_set, args)
    on_object = synthetic_objects(train_set)
    shares = [mask[where].double().mean().item() for where in (on_object, ~on_object)]
    assert 0.8 < shares[0] < 0.9 and 0.2 < shares[1] < 0.35
    places = torch.meshgrid(torch.arange(24.0), torch.arange(24.0), indexing="ij")
    kept = mask.any((1, 2))  # without constant maps
    down, right = (
        sum(
            sign * (of[kept] * place).sum((1, 2)) / of[kept].sum((1, 2))
            for sign, of in ((1, mask), (-1, on_object))
        )
        for place in places
    )
    assert 1 < right.mean() < 3 and 0 < down.mean() < 2  # too far, by pixels
    changed = (new != pixels).any(1)
    assert 0.94 < changed.any((1, 2)).double().mean() < 0.98  # the others are copies
    assert changed[on_object].double().mean() > changed[~on_object].double().mean() + 0.1


# What is refused


@pytest.mark.parametrize(
    "given, start",
    [
        (dict(mixup="none", finetune=True), "--finetune: goes on without mixup, and there is none"),
        (dict(deferred=False, generate="cam"), "--generate cam: is for stage 2, so not with --no-deferred"),
        (dict(arch="lenet"), "--arch lenet: has no class activation maps"),
        (dict(gamma=1.0), "--gamma 1.0: is for --loss focal; add that, or leave it out"),
        (dict(power=0.5), "--power 0.5: is for --reweight cost or --loss cdt; "),
        (dict(beta=0.5), "--beta 0.5: is for --reweight effective; "),
        (dict(mixup="none", alpha=0.5), "--alpha 0.5: is for --mixup input or manifold or remix; "),
        (dict(generate="image-trans", cam_threshold=0.75), "--cam-threshold 0.75: is for --generate cam; "),
        (dict(generate="none", cap=3), "--cap 3: is for --generate cam or image-trans; "),
        (dict(sampling="instance", rotation=5), "--rotation 5: is for --generate cam or image-trans; "),
        (dict(loss="cdt", reweight="cost"), "--reweight cost: shares --power with --loss cdt"),
        (dict(loss="dive"), "--loss dive: must be one of ce, "),
    ],
)
def test_meaningless_combinations(given, start, capsys):
    assert refusal(lambda: recipe("synthetic", **given), capsys).startswith(start)


@pytest.mark.parametrize(
    "given, start",
    [
        (dict(cap=5), "--cap 5: all classes have as many images or more"),
        (
            dict(sampling="under", batch_size=64),
            "--sampling under: it leaves 50 images, less than --batch-size 64",
        ),
        (dict(arch="resnet10"), "--arch resnet10: its map of images of 24 pixels is one pixel"),
    ],
)
def test_refused_before_training(given, start, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        tiny(tmp_path, "run", **given)
    assert stop.value.code == 2 and capsys.readouterr().err.splitlines()[-1].startswith(start)
    assert not (tmp_path / "run").exists()


def test_a_disk_that_takes_no_images(tmp_path, jpegs, capsys):
    """One line, and stage 1 is kept. The picture alone stops nothing."""
    data = {**jpegs, "imbalance": 4.0, "epochs": 1, "stage2_epochs": 1, "finetune": False, "batch_size": 8}
    data["output_dir"] = tmp_path / "run"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "new_images").write_text("a file")
    (tmp_path / "run" / "new_images.png").symlink_to("/dev/full")
    with pytest.raises(SystemExit) as stop:
        run_here(SCRIPT, **data, resume="auto")
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert lines[-1].endswith(
        "run/new_images: cannot be written (File exists); mend that, and --resume goes on from here"
    )
    (tmp_path / "run" / "new_images").unlink()
    (tmp_path / "run" / "new_images.png").unlink()
    (tmp_path / "run" / "new_images.png").mkdir()
    assert len(lines_of(tmp_path / "run")) == 1
    run_here(SCRIPT, **data, resume="yes")
    assert len(lines_of(tmp_path / "run")) == 2
    assert "new_images.png: not drawn (Is a directory)" in capsys.readouterr().err


@pytest.mark.slow
def test_overwriting_takes_the_new_images_away(tmp_path, jpegs):
    data = {**jpegs, "imbalance": 4.0, "epochs": 1, "stage2_epochs": 1, "finetune": False, "batch_size": 8}
    run_here(SCRIPT, **data, output_dir=tmp_path / "run")
    assert list((tmp_path / "run" / "new_images").iterdir())
    run_here(SCRIPT, **data, output_dir=tmp_path / "run", sampling="instance", overwrite=True)
    assert not list((tmp_path / "run" / "new_images").iterdir())
    assert not (tmp_path / "run" / "new_images.png").exists()


def test_steps_after_a_stage_have_no_effect(tmp_path, capsys):
    args = recipe("cifar10_lt", mixup="none", epochs=150, stage2_epochs=50, lr_steps=(149, 159))
    close([rate(e, args) for e in (149, 150, 160, 174, 175)], [0.1, 1e-3, 1e-3, 1e-3, 1e-5], 1e-12)
    tiny(tmp_path, "run", stage2_lr_steps=(0, 3), stage3_lr_steps=(5,))
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert notes == [
        "note: --stage2-lr-steps 3: not before the end of --stage2-epochs 1, so without effect",
        "note: --stage3-lr-steps 5: not before the end of --stage3-epochs 1, so without effect",
    ]


def test_ldam_has_a_cosine_classifier():
    train_set = pool_of([4, 4, 4])
    network = bag.make_network(train_set, options("ldam", sampling="class", batch_size=8))
    assert isinstance(network.classifier, models.CosineClassifier) and network.classifier.scale == bag.SCALE


@pytest.mark.parametrize("loss", bag.UNDEFERRED)
def test_losses_without_a_deferred_form_say_so(loss, capsys):
    recipe("synthetic", loss=loss)
    assert (
        capsys.readouterr().err
        == f"note: --loss {loss}: has no deferred form; the loss is the same in all stages\n"
    )
    recipe("synthetic", loss=loss, deferred=False)
    recipe("synthetic", loss=loss, reweight="cost")  # whose weights are deferred
    assert capsys.readouterr().err == ""
