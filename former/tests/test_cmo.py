"""cmo.py: every equation against numbers worked out beforehand, and where CMO becomes plain training."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator

import cmo
from cmo import Args
from common import cli, datasets, models
from tests import conftest
from tests.conftest import TINY, kill_at, launch, lines_of, refusal, result_of, run_here, state_of

COUNTS = torch.tensor([500, 50, 5])
CIFAR100 = torch.tensor(datasets.long_tail_counts(500, 100, 100))
CIFAR10 = torch.tensor(datasets.long_tail_counts(5000, 10, 100))


def close(actual, expected, tolerance=1e-6):
    conftest.close(actual, expected, tolerance)


# Sampling, Eq. (2)


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
    actual = cmo.class_weights(COUNTS, "inverse", r)
    close(actual, weights)
    drawn = COUNTS * actual
    close(drawn / drawn.sum(), marginals)


def test_sampling_weights_of_cifar100():
    close(cmo.class_weights(CIFAR100)[[0, 50, 69, 99]], [0.043820, 0.456461, 1.095506, 4.382022])
    per_image = cmo.class_weights(COUNTS)
    close(per_image / (COUNTS * per_image).sum(), [0.000667, 0.006667, 0.066667])


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
    drawn = CIFAR100 * cmo.class_weights(CIFAR100, r=r)
    close(torch.stack([part.sum() for part in (drawn / drawn.sum()).split([35, 35, 30])]), mass, 1e-3)


def test_effective_number_weights():
    close(cmo.class_weights(COUNTS, "effective"), [0.027690, 0.270763, 2.701547])
    close(cmo.class_weights(CIFAR100, "effective")[[0, 50, 99]], [0.044876, 0.457055, 4.378313])
    close(
        cmo.class_weights(CIFAR10, "effective"),
        [0.050611, 0.076900, 0.121134, 0.195037, 0.318805, 0.524590, 0.868349, 1.442627, 2.409223, 3.992724],
    )
    close(
        cmo.class_weights(torch.tensor(datasets.long_tail_counts(5000, 10, 10)), "effective"),
        [0.292341, 0.358366, 0.444188, 0.555540, 0.699693, 0.885779, 1.126570, 1.437524, 1.841483, 2.358515],
    )
    drawn = CIFAR100 * cmo.class_weights(CIFAR100, "effective")  # as a sampling law nearly the one of r = 1
    close(
        torch.stack([part.sum() for part in (drawn / drawn.sum()).split([35, 35, 30])]),
        [0.353, 0.349, 0.299],
        1e-3,
    )


class Labels(torch.utils.data.Dataset):
    """What `streams` needs of a training set."""

    def __init__(self, counts):
        self.class_counts = counts
        self.labels = torch.arange(len(counts)).repeat_interleave(counts)

    def __len__(self):
        return len(self.labels)


def drawn_classes(sampler, labels, epochs=20):
    found = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        found += [index for index, _ in sampler]
    return torch.bincount(labels[torch.tensor(found)], minlength=3) / len(found)


@pytest.mark.parametrize(
    "oversample, background, foreground",
    [
        ("foreground", [500 / 555, 50 / 555, 5 / 555], [1 / 3] * 3),
        ("background", [1 / 3] * 3, [500 / 555, 50 / 555, 5 / 555]),
        ("both", [1 / 3] * 3, [1 / 3] * 3),
    ],
)
def test_streams(oversample, background, foreground):
    train_set = Labels(COUNTS)
    backgrounds, foregrounds = cmo.streams(train_set, Args(oversample=oversample))
    close(drawn_classes(backgrounds, train_set.labels), background, 0.02)
    close(drawn_classes(foregrounds, train_set.labels), foreground, 0.02)
    assert list(backgrounds) != list(foregrounds)


@pytest.mark.parametrize("options", [dict(oversample="nothing"), dict(paste="none")])
def test_streams_without_foregrounds(options):
    backgrounds, foregrounds = cmo.streams(Labels(COUNTS), Args(**options))
    assert foregrounds is None
    assert sorted(index for index, _ in backgrounds) == list(range(555))  # every image once


def test_random_oversampling_draws_classes_evenly():
    train_set = Labels(COUNTS)
    backgrounds, foregrounds = cmo.streams(train_set, Args(oversample="background", paste="none"))
    assert foregrounds is None
    close(drawn_classes(backgrounds, train_set.labels), [1 / 3] * 3, 0.02)


# The box


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
    x1, x2, y1, y2 = cmo.box(lam, x, y, size)
    assert (x1, y1, x2, y2) == corners
    backgrounds, foregrounds = torch.zeros(2, 3, *size), torch.ones(2, 3, *size)
    mixed, share = cmo.mix(backgrounds, foregrounds, (lam, x, y), None, Args())
    assert share == pytest.approx(adjusted, abs=1e-6)
    assert mixed.mean().item() == pytest.approx(1 - share, abs=1e-6)  # labels go by the pixels that are left
    assert mixed[:, :, x1:x2, y1:y2].eq(1).all()
    assert mixed.sum() == 2 * 3 * (x2 - x1) * (y2 - y1)


def test_pasting_takes_the_same_place_and_leaves_the_foreground_alone():
    foregrounds = torch.randn(4, 3, 8, 8)
    kept = foregrounds.clone()
    mixed, _ = cmo.mix(torch.zeros(4, 3, 8, 8), foregrounds, (0.25, 3, 5), None, Args())
    x1, x2, y1, y2 = cmo.box(0.25, 3, 5, (8, 8))
    assert mixed[:, :, x1:x2, y1:y2].equal(kept[:, :, x1:x2, y1:y2])
    assert foregrounds.equal(kept)


def test_mixup_blends_without_adjusting():
    mixed, share = cmo.mix(
        torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4), (0.3, 0, 0), None, Args(paste="mixup")
    )
    assert share == 0.3 and torch.allclose(mixed, torch.tensor(0.7))


@pytest.mark.parametrize("paste", ["blur", "jitter"])
def test_perturbed_foregrounds_keep_their_labels(paste):
    train_set, _ = datasets.load(Args())
    images = train_set.__getitems__([0, 400, 700])[0]
    mixed, share = cmo.mix(torch.zeros_like(images), images, (0.3, 0, 0), train_set, Args(paste=paste))
    assert share == 0.0  # the loss is the foregrounds' alone
    assert mixed.shape == images.shape and not torch.allclose(mixed, images)
    assert F.cosine_similarity(mixed.flatten(1), images.flatten(1)).min() > 0.5
    if paste == "blur":  # smoother: neighbours differ less
        assert mixed.diff(dim=3).abs().mean() < images.diff(dim=3).abs().mean()


def test_draws_are_those_of_the_released_code():
    generator = np.random.RandomState(0)
    trace = []
    for _ in range(3):  # p_mix 1 makes all four draws; the first is compared with p_mix
        coin = np.random.RandomState()
        coin.set_state(generator.get_state())
        trace.append((coin.random_sample(), *cmo.draw_mix(generator, (32, 32), Args(p_mix=1.0))))
    close([step[0] for step in trace], [0.548814, 0.437587, 0.020218])
    close([step[1] for step in trace], [0.562583, 0.928724, 0.868409])
    corners = [cmo.box(*step[1:], (32, 32)) for step in trace]
    assert corners == [[11, 31, 8, 28], [5, 13, 16, 24], [0, 5, 0, 6]]
    assert trace[0][2:] == (21, 18)


def test_plain_steps_draw_nothing_more():
    generator, other = np.random.RandomState(0), np.random.RandomState(0)
    assert cmo.draw_mix(generator, (32, 32), Args()) is None  # 0.548814 >= 0.5
    other.random_sample()
    assert generator.random_sample() == other.random_sample()


def test_mean_share_of_the_background():
    for side, mean in ((32, 0.70), (224, 0.68)):
        generator, args = np.random.RandomState(1), Args(p_mix=1.0)
        boxes = [cmo.box(*cmo.draw_mix(generator, (side, side), args), (side, side)) for _ in range(20000)]
        shares = [1 - (x2 - x1) * (y2 - y1) / side**2 for x1, x2, y1, y2 in boxes]
        assert np.mean(shares) == pytest.approx(mean, abs=0.01)


@pytest.mark.parametrize(
    "epochs, first, last, count", [(200, 4, 196, 193), (100, 4, 96, 93), (400, 4, 396, 393)]
)
def test_window(epochs, first, last, count):
    args = Args(epochs=epochs)
    assert not cmo.mixing_window(3, args) and not cmo.mixing_window(epochs - 3, args)
    active = [epoch for epoch in range(epochs) if cmo.mixing_window(epoch, args)]
    assert (active[0], active[-1], len(active)) == (first, last, count)


def test_plan_is_a_function_of_seed_and_epoch():
    args = Args(epochs=20)
    plan = cmo.mixing_plan(7, 200, (32, 32), args)
    assert plan == cmo.mixing_plan(7, 200, (32, 32), args)
    assert plan != cmo.mixing_plan(8, 200, (32, 32), args)
    assert plan != cmo.mixing_plan(7, 200, (32, 32), Args(epochs=20, seed=1))
    assert 70 < sum(draw is not None for draw in plan) < 130  # half of the batches
    assert cmo.mixing_plan(3, 5, (32, 32), args) == [None] * 5
    assert cmo.mixing_plan(7, 5, (32, 32), Args(epochs=20, p_mix=0.0)) == [None] * 5


# Losses


def test_ldam():
    close(cmo.ldam_margins(COUNTS), [0.158114, 0.281171, 0.5])
    close(cmo.ldam_margins(CIFAR100)[[0, 50, 99]], [0.158114, 0.284055, 0.5])
    logits = cmo.SCALE * torch.tensor([[0.3, 0.1, 0.2]]).expand(3, 3)
    losses = cmo.image_losses(logits, torch.arange(3), COUNTS, Args(loss="ldam"))
    close(losses, [1.946120, 14.483708, 18.002476], 1e-5)


def test_balanced_softmax():
    logits, labels = torch.tensor([[2.0, 1.0, 0.0]]).expand(3, 3), torch.arange(3)
    plain = cmo.image_losses(logits, labels, COUNTS, Args())
    balanced = cmo.image_losses(logits, labels, COUNTS, Args(loss="bs"))
    close(plain, [0.407606, 1.407606, 2.407606])
    close(balanced, [0.037432, 3.340017, 6.642602], 2e-6)


def test_equal_counts_make_balanced_softmax_plain():
    logits, labels, counts = torch.randn(8, 4), torch.randint(4, (8,)), torch.full((4,), 7)
    plain = F.cross_entropy(logits, labels, reduction="none")
    close(cmo.image_losses(logits, labels, counts, Args(loss="bs")), plain, 1e-5)


def test_without_a_margin_ldam_is_plain():
    logits, labels = torch.randn(8, 3), torch.randint(3, (8,))
    plain = F.cross_entropy(logits, labels, reduction="none")
    close(cmo.image_losses(logits, labels, COUNTS, Args(loss="ldam", max_margin=1e-9)), plain, 1e-5)


def test_deferred_reweighting():
    accelerator = Accelerator()
    logits, args = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0]]), Args(drw=True, drw_epoch=160, epochs=200)

    def loss(labels, epoch, share=1.0):
        return cmo.batch_loss(accelerator, logits, torch.tensor(labels), share, COUNTS, epoch, args)

    close(loss([0, 1], 160), 1.314829)
    close(loss([0, 1], 159), 0.907606)
    close(loss([0, 0], 160), 1.407606)  # two terms, each normalised on its own, then blended
    close(loss([2, 1], 160), 2.316511)
    close(loss([0, 0], 160, 0.75) + loss([2, 1], 160, 0.25), 1.634832)


@pytest.mark.parametrize("loss", ["ce", "bs", "ldam"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_at_the_edges(loss, dtype):
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]], dtype=dtype, requires_grad=True)
    losses = cmo.image_losses(logits, torch.tensor([1, 1]), torch.tensor([1000, 1, 1]), Args(loss=loss))
    losses.mean().backward()
    assert losses.isfinite().all() and logits.grad.isfinite().all()


# RIDE

EXPERTS = torch.tensor([[[2.0, 1.0, 0.0], [1.0, 1.0, 1.0], [0.0, 2.0, 1.0]]])
RIDE = dict(loss="ride", epochs=200, drw_epoch=160)


def ride_loss(epoch=0, share=1.0, labels=(0,), logits=EXPERTS, **options):
    args = Args(**{**RIDE, "max_margin": 1e-9, **options})
    return cmo.batch_loss(Accelerator(), logits, torch.tensor(labels), share, COUNTS, epoch, args)


def test_losses_of_experts():
    label = torch.tensor([0])
    close(cmo.image_losses(EXPERTS, label, COUNTS, Args(loss="ride", max_margin=1e-9)), [3.913824], 1e-5)
    close(cmo.image_losses(EXPERTS, label, COUNTS, Args(loss="ride")), [16.572285], 1e-5)
    close(cmo.disagreement(EXPERTS, torch.ones(3)), [0.507889], 1e-6)
    close(ride_loss(diversity=-0.45), 3.685274, 1e-5)
    close(ride_loss(diversity=-0.2), 3.812246, 1e-5)
    close(ride_loss(max_margin=0.5), 16.343735, 1e-5)


def test_class_temperatures():
    close(cmo.class_temperatures(COUNTS, 0.05), [1, 0.887920, 0.876712])
    close(cmo.class_temperatures(COUNTS, 0.05).mean(), 0.921544)
    close(cmo.class_temperatures(COUNTS, 0.02), [1, 0.952953, 0.948249])
    close(cmo.class_temperatures(COUNTS, 0.0), [1, 1, 1])


def test_from_the_switch_on_temperatures_and_weights_hold():
    """One image: its weight cancels, so that the rest is the term of the experts' disagreement."""
    term = ride_loss(160, drw=True) - 3.913824
    close(term, -0.205419, 1e-5)
    close(ride_loss(159, drw=True), 3.685274, 1e-5)
    close(ride_loss(160, drw=False), 3.685274, 1e-5)
    temperatures = cmo.class_temperatures(COUNTS, 0.5)
    apart = cmo.disagreement(EXPERTS, temperatures) * temperatures.mean() ** 2
    close(ride_loss(160, drw=True, spread=0.5, diversity=-1.0), (3.913824 - apart).squeeze(), 1e-5)
    logits = EXPERTS.expand(2, 3, 3)
    weights = cmo.class_weights(COUNTS, "effective")[[0, 2]]
    each = torch.stack([ride_loss(labels=(label,), diversity=0.0) for label in (0, 2)])
    close(
        ride_loss(160, labels=(0, 2), logits=logits, drw=True),
        (weights * each).sum() / weights.sum() - 0.205419,
        1e-5,
    )


def test_disagreement_counts_once_in_a_mixed_batch():
    for share in (0.25, torch.tensor([0.25])):
        both = ride_loss(share=share, labels=(0,)) + ride_loss(share=1 - share, labels=(2,))
        apart = 0.25 * ride_loss(labels=(0,), diversity=0.0) + 0.75 * ride_loss(labels=(2,), diversity=0.0)
        close(both - apart, -0.45 * 0.507889, 1e-5)


def test_no_gradient_through_the_mean():
    logits = EXPERTS.clone().requires_grad_()
    cmo.disagreement(logits, torch.ones(3)).sum().backward()
    close(logits.grad, EXPERTS.softmax(2) - EXPERTS.mean(1, keepdim=True).softmax(2), 1e-6)


def experts(arch, num_classes, count=3, seed=0):
    train_set = SimpleNamespace(num_classes=num_classes, shape=(3, 32, 32))
    return cmo.make_network(train_set, Args(arch=arch, loss="ride", experts=count, seed=seed))


def test_parameters_of_experts():
    network = experts("resnet32", 100)
    assert models.count_parameters(network) == 783_856
    assert models.count_parameters(network.trunk) == 23_824
    assert [models.count_parameters(expert) for expert in network.experts] == [253_344] * 3
    assert models.count_parameters(experts("resnet32", 100, 4)) == 783_856 + 253_344
    assert models.count_parameters(experts("resnet50", 1000)) == 43_677_248


def test_parameters_of_experts_of_inaturalist():
    assert models.count_parameters(experts("resnet50", 8142)) == 76_587_584


def test_stages_of_experts():
    network = experts("resnet50", 5, 2)
    third, fourth = network.experts[0].backbone
    assert network.trunk[-1][-1].conv3.out_channels == 512 and (len(third), len(fourth)) == (6, 3)
    assert third[0].conv2.stride == fourth[0].conv2.stride == (2, 2)  # not in the 1x1 convolutions
    assert (third[-1].conv3.out_channels, fourth[-1].conv3.out_channels) == (768, 1536)
    assert third[1].conv2.weight.std().item() == pytest.approx((2 / (9 * 192)) ** 0.5, rel=0.02)
    small = experts("resnet8", 5, 2).experts[0].backbone
    assert [stage[0].conv1.out_channels for stage in small] == [24, 48]
    assert small[0][0].padding == 4 and small[1][0].padding == 12


def test_experts_predict_with_their_mean():
    network, images = experts("resnet8", 5), torch.randn(2, 3, 32, 32)
    first, second = (expert.classifier.weight for expert in network.experts[:2])
    assert not first.equal(second)  # each begins with weights of its own
    assert not first.equal(experts("resnet8", 5, seed=1).experts[0].classifier.weight)
    assert {expert.classifier.scale for expert in network.experts} == {30.0}
    train_set = SimpleNamespace(num_classes=5, shape=(3, 32, 32))
    assert cmo.make_network(train_set, Args(loss="ldam")).classifier.scale == 30.0
    each = network.eval()(images)
    maps = network.trunk(images)
    close(each, torch.stack([expert(maps) for expert in network.experts]).mean(0), 1e-5)
    assert each.shape == (2, 5) and network.train()(images).shape == (2, 3, 5)


# Remix


@pytest.mark.parametrize(
    "n_i, n_j, lam, share",
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
def test_remix(n_i, n_j, lam, share):
    close(cmo.remix_share(lam, torch.tensor([n_i]), torch.tensor([n_j])), [share])


# Label-aware smoothing


def test_smoothing():
    close(cmo.smoothing(COUNTS, 0.4, 0.1), [0.4, 0.142694, 0.1])
    close(cmo.smoothing(COUNTS, 0.3, 0.0), [0.3, 0.042694, 0])
    close(cmo.smoothing(CIFAR100)[[0, 35, 50, 99]], [0.4, 0.187256, 0.140809, 0.1])
    close(cmo.smoothing(torch.tensor([7, 7])), [0.1, 0.1])  # of equal classes


def test_smoothed_losses():
    logits, labels = torch.tensor([[2.0, 1.0, 0.0]]).expand(3, 3), torch.arange(3)
    args = Args(las=True, las_head=0.4, las_tail=0.1)
    close(cmo.smoothed_losses(logits, labels, COUNTS, args), [0.807606, 1.407606, 2.307606])
    accelerator = Accelerator()
    loss = cmo.batch_loss(accelerator, logits, labels, 1.0, COUNTS, args.epochs, args)  # of stage 2
    close(loss, (0.807606 + 1.407606 + 2.307606) / 3)
    none = Args(las=True, las_head=0.0, las_tail=0.0)
    close(cmo.smoothed_losses(logits, labels, COUNTS, none), [0.407606, 1.407606, 2.407606])


def test_stage_2_is_of_the_classifier_alone(tmp_path):
    result = cmo.main(tiny(tmp_path, las=True, las_epochs=2, las_batch_size=64))
    first, last = (state_of(tmp_path / "run", epoch) for epoch in (2, 3))
    names = [name for name in first if not first[name].equal(last[name])]
    moving = [name for name in names if "running" not in name and "num_batches" not in name]
    assert sorted(moving) == ["classifier.linear.bias", "classifier.linear.weight", "classifier.scale"]
    assert any("running_mean" in name for name in names)  # BatchNorm's statistics go on
    assert result["epochs"] == 2 and [line["epoch"] for line in lines_of(tmp_path / "run")] == [0, 1, 2, 3]


def test_stage_2_with_fixed_statistics(tmp_path):
    cmo.main(tiny(tmp_path, las=True, las_epochs=2, las_batch_size=64, las_shift_bn=False))
    first, last = (state_of(tmp_path / "run", epoch) for epoch in (2, 3))
    assert all(first[name].equal(last[name]) for name in first if "classifier" not in name)


def test_stage_2_without_a_rate_is_stage_1(tmp_path):
    plain = cmo.main(tiny(tmp_path, "plain"))
    options = dict(las=True, las_epochs=1, las_batch_size=64, las_shift_bn=False, las_lr=1e-12, las_wd=0.0)
    assert cmo.main(tiny(tmp_path, "las", **options))["per_class"] == plain["per_class"]


def test_rates_and_batches_of_stage_2(tmp_path):
    args = tiny(tmp_path, las=True, las_batch_size=50, las_factor=0.2)
    rates = [cmo.learning_rate(2 + epoch, args) for epoch in (0, 5, 9)]
    close(rates, [0.1, 0.05, 0.05 * (1 + np.cos(0.9 * np.pi))], 1e-9)
    close(cmo.learning_rate(3, tiny(tmp_path, las=True, las_epochs=2)), 0.05, 1e-9)
    assert not any(cmo.mixing_window(epoch, args) for epoch in range(2, 12))
    train_set = datasets.load(args)[0]
    loader = cmo.make_loader(train_set, 2, args)
    assert len(loader) == -(-1236 // 50) + 1
    classes = torch.cat([labels for (_, labels), foreground in loader if foreground is None])
    assert classes.view(-1, 4).eq(classes.view(-1, 4)[:, :1]).all()  # four of a class in a row
    assert sorted(classes[:40:4].tolist()) == list(range(10))
    network = models.build("resnet8", 10, 0)
    network.classifier = models.ScaledClassifier(network.classifier)
    scale, linear = cmo.make_optimizer(network, 2, args).param_groups
    assert (scale["factor"], linear["factor"], linear["weight_decay"]) == (1.0, 0.2, 2e-4)
    assert scale["params"] == [network.classifier.scale] and len(linear["params"]) == 2
    assert not scale["nesterov"] and scale["momentum"] == 0.9


def test_rates_of_scales_and_classifier(tmp_path, monkeypatch):
    seen = []

    def spy(run, model, loader, optimizer, train_set, epoch, args):
        seen.append([group["lr"] for group in optimizer.param_groups])

    monkeypatch.setattr(cmo, "train_one_epoch", spy)
    cmo.main(tiny(tmp_path, las=True, las_epochs=2, las_factor=0.3))
    close(torch.tensor(seen[2:]), [[0.1, 0.03], [0.05, 0.015]], 1e-7)
    assert [len(rates) for rates in seen] == [1, 1, 2, 2]


@pytest.mark.slow
def test_experts_in_two_processes(tmp_path):
    """The same but for BatchNorm's statistics, which are each process's own."""
    options = dict(TINY, epochs=1, lr_steps=(), loss="ride", drw=True, drw_epoch=0, mix_start=-1, mix_end=0)
    one = run_here("cmo.py", **options, output_dir=tmp_path / "one")
    two = result_of(launch("cmo.py", 2, **options, output_dir=tmp_path / "two"))
    assert two["num_processes"] == 2 and two["loss"] == pytest.approx(one["loss"], rel=0.1)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "moment", ["2:5", *(pytest.param(at, marks=pytest.mark.slow) for at in ("1:5", "3:5"))]
)
def test_killed_in_either_stage(moment, processes, tmp_path):
    options = dict(TINY, mix_start=-1, mix_end=0, las=True, las_epochs=2, las_batch_size=64)

    def run(**given):
        return run_here("cmo.py", **given) if processes == 1 else result_of(launch("cmo.py", 2, **given))

    unbroken = run(**options, output_dir=tmp_path / "unbroken")
    killed = launch(
        "cmo.py", processes, env=kill_at(tmp_path, moment), **options, output_dir=tmp_path / "run"
    )
    assert killed.returncode != 0 and len(lines_of(tmp_path / "run")) == int(moment[0])
    resumed = run(**options, output_dir=tmp_path / "run", resume="yes")
    assert resumed["weights_sha256"] == unbroken["weights_sha256"]


# Schedule and networks


def test_learning_rate_of_400_epochs():
    cifar = cli.build(Args, cmo.RECIPES, dataset="cifar100_lt", loss="bs", long=True)
    rates = [cmo.learning_rate(epoch, cifar) for epoch in (0, 9, 10, 320, 321, 360, 361, 399)]
    close(rates, [0.01, 0.1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001], 1e-12)
    imagenet = cli.build(Args, cmo.RECIPES, dataset="imagenet_lt", loss="bs", long=True)
    rates = [cmo.learning_rate(epoch, imagenet) for epoch in (0, 9, 10, 200, 399)]
    close(rates, [0.002, 0.02, 0.02, 0.010361, 0], 2e-6)


def test_recipes_of_400_epochs():
    args = cli.build(Args, cmo.RECIPES, dataset="cifar100_lt", loss="bs", long=True)
    assert (args.epochs, args.auto_augment, args.cutout, args.contrastive) == (400, True, 16, 0.5)
    assert (args.wd, args.lr, args.batch_size, args.drw_epoch) == (2e-4, 0.1, 128, 320)
    assert [cmo.mixing_window(epoch, args) for epoch in (3, 4, 396, 397)] == [False, True, True, False]
    for dataset, wd in (("imagenet_lt", 5e-4), ("inat2018", 1e-4)):
        args = cli.build(Args, cmo.RECIPES, dataset=dataset, loss="bs", long=True)
        assert (args.epochs, args.rand_augment, args.contrastive, args.color_jitter) == (400, True, 0.5, 0.4)
        assert (args.wd, args.batch_size, args.lr, args.cosine) == (wd, 256, 0.02, True)
        assert args.drw_epoch == 320
        usual = cli.build(Args, cmo.RECIPES, dataset=dataset)
        assert not (usual.rand_augment or usual.contrastive or usual.cosine)


@pytest.mark.parametrize(
    "dataset, batch, wd, epochs, lr, lr_steps, drw_epoch, diversity, spread, rotation",
    [
        ("cifar100_lt", 128, 5e-4, 200, 0.1, (160, 180), 160, -0.45, 0.05, 15),
        ("imagenet_lt", 256, 2e-4, 100, 0.1, (60, 80), 80, -0.2, 0.02, 0),
        ("inat2018", 512, 2e-4, 100, 0.2, (60, 80), 80, -0.2, 0.015, 0),
    ],
)
def test_recipes_of_ride(dataset, batch, wd, epochs, lr, lr_steps, drw_epoch, diversity, spread, rotation):
    args = cli.build(Args, cmo.RECIPES, dataset=dataset, loss="ride")
    assert args.batch_size == batch and args.experts == 3
    assert (args.wd, args.epochs, args.lr, args.lr_steps) == (wd, epochs, lr, lr_steps)
    assert (args.diversity, args.spread, args.random_rotation) == (diversity, spread, rotation)
    assert args.drw and args.drw_epoch == drw_epoch
    assert cmo.make_optimizer(models.build("resnet8", 10, 0), 1, args).param_groups[0]["nesterov"]
    assert not cli.build(Args, cmo.RECIPES, dataset=dataset).drw


@pytest.mark.parametrize(
    "dataset, imbalance, head, tail, factor, shift_bn",
    [
        ("cifar100_lt", 100, 0.4, 0.1, 0.2, True),
        ("cifar100_lt", 50, 0.3, 0.0, 0.1, True),
        ("cifar100_lt", 10, 0.2, 0.0, 0.1, True),
        ("cifar10_lt", 100, 0.3, 0.0, 0.5, False),
        ("cifar10_lt", 50, 0.2, 0.0, 0.2, False),
        ("cifar10_lt", 10, 0.1, 0.0, 0.2, False),
        ("imagenet_lt", None, 0.3, 0.0, 0.05, True),
        ("inat2018", None, 0.3, 0.0, 0.05, True),
    ],
)
def test_recipes_of_smoothing(dataset, imbalance, head, tail, factor, shift_bn):
    given = {} if imbalance is None else dict(imbalance=float(imbalance))
    args = cli.build(Args, cmo.RECIPES, dataset=dataset, las=True, **given)
    assert (args.las_head, args.las_tail, args.las_factor, args.las_shift_bn) == (
        head,
        tail,
        factor,
        shift_bn,
    )
    assert (args.las_epochs, args.las_lr) == (10, 0.1)
    own = {"imagenet_lt": (5e-4, 256), "inat2018": (1e-4, 256)}
    assert (args.las_wd, args.las_batch_size) == own.get(dataset, (2e-4, 128))


@pytest.mark.parametrize(
    "given, start",
    [
        (
            dict(long=True),
            "--long: is a recipe of cifar10_lt, cifar100_lt, imagenet_lt, inat2018, and not of sy",
        ),
        (
            dict(long=True, dataset="cifar10_lt", loss="ride"),
            "--long: is a recipe of cifar10_lt, cifar100_lt, ",
        ),
        (
            dict(cosine=True),
            "--cosine: takes the place of --lr-steps; add --lr-steps without any, or leave it",
        ),
        (dict(loss="ride", arch="lenet"), "--arch lenet: has no stages to make experts of; use a ResNet"),
        (dict(loss="ldam", las=True), "--las: is for linear classifiers, not for --loss ldam; use ce or bs"),
        (dict(loss="ride", las=True), "--las: is for linear classifiers, not for --loss ride; use ce or bs"),
        (dict(experts=4), "--experts 4: is for --loss ride; add that, or leave it out"),
        (dict(drw_epoch=3), "--drw-epoch 3: is for --drw; add that, or leave it out"),
        (dict(las_lr=0.2), "--las-lr 0.2: is for --las; add that, or leave it out"),
        (
            dict(loss="ride", epochs=10),
            "--drw-epoch 28: not before the end of --epochs 10; lower it, or add --no",
        ),
        (dict(loss="ride", experts=1), "--experts 1: must be at least 2"),
    ],
)
def test_refusals(given, start, capsys):
    assert refusal(lambda: cli.build(Args, cmo.RECIPES, **given), capsys).startswith(start)


def test_remix_is_of_a_batch():
    for dataset in cmo.RECIPES:
        remix = cli.build(Args, cmo.RECIPES, dataset=dataset, paste="remix")
        usual = cli.build(Args, cmo.RECIPES, dataset=dataset)
        assert (remix.oversample, usual.oversample) == ("nothing", "foreground")


def test_cosine_that_ends_with_its_warm_up():
    args = Args(epochs=9, warmup=10, cosine=True, mix_end=0)
    close([cmo.learning_rate(epoch, args) for epoch in (0, 8)], [0.01, 0.09], 1e-9)


def test_learning_rate():
    args = cli.build(Args, cmo.RECIPES, dataset="cifar100_lt")
    rates = [cmo.learning_rate(epoch, args) for epoch in (0, 3, 4, 159, 160, 179, 180)]
    close(rates, [0.02, 0.08, 0.1, 0.1, 1e-3, 1e-3, 1e-5], 1e-12)
    args = cli.build(Args, cmo.RECIPES, dataset="imagenet_lt")
    close([cmo.learning_rate(epoch, args) for epoch in (4, 59, 60, 80)], [0.1, 0.1, 0.01, 0.001], 1e-12)
    args = cli.build(Args, cmo.RECIPES, dataset="inat2018")
    close([cmo.learning_rate(epoch, args) for epoch in (74, 75, 160)], [0.1, 0.01, 0.001], 1e-12)


@pytest.mark.parametrize("dataset", cmo.RECIPES)
def test_recipes(dataset):
    args = cli.build(Args, cmo.RECIPES, dataset=dataset, drw=True)
    assert args.dataset == dataset and args.arch in models.NAMES
    assert all(0 < step < args.epochs for step in args.lr_steps)
    assert any(cmo.mixing_window(epoch, args) for epoch in range(args.epochs))


def values(dataset):
    args = cli.build(Args, cmo.RECIPES, dataset=dataset)
    names = "arch epochs batch_size lr lr_steps lr_factor wd warmup drw_epoch mix_start mix_end imbalance"
    return [getattr(args, name) for name in names.split()] + [args.color_jitter, args.few_under]


def test_recipes_are_the_published_ones():
    cifar = ["resnet32", 200, 128, 0.1, (160, 180), 0.01, 2e-4, 5, 160, 3, 3, 100, 0, 20]
    assert values("cifar10_lt") == values("cifar100_lt") == cifar
    assert values("imagenet_lt") == [
        "resnet50",
        100,
        256,
        0.1,
        (60, 80),
        0.1,
        2e-4,
        5,
        80,
        3,
        3,
        None,
        0.4,
        20,
    ]
    assert values("inat2018") == ["resnet50", 200, 512, 0.1, (75, 160), 0.1, 2e-4, 5, 160, 3, 3, None, 0, 21]
    method = (Args().p_mix, Args().r, Args().alpha, Args().max_margin, Args().paste, Args().oversample)
    assert method == (0.5, 1.0, 1.0, 0.5, "cutmix", "foreground")
    assert datasets.CIFAR_STATISTICS == ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
    assert datasets.IMAGENET_STATISTICS == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert datasets.INAT_STATISTICS == ((0.466, 0.471, 0.380), (0.195, 0.194, 0.192))


# The training step, Alg. 1


class Recorder(torch.nn.Module):
    """Answers every image with the same logits and keeps what it was shown."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.shown = torch.nn.Parameter(torch.tensor(logits)), None

    def forward(self, images):
        self.shown = images.clone()
        return self.logits


class OneStep:
    """The part of a Run that train_one_epoch uses, for a loader of one batch."""

    def __init__(self):
        self.accelerator, self.loss = Accelerator(), None

    def steps(self, loader):
        return loader

    def record(self, loss):
        self.loss = loss.item()


@pytest.mark.parametrize(
    "options, logits, background, foreground, draw, expected",
    [
        (dict(), [[2.0, 1.0, 0.0]], [0], [2], (0.5, 16, 16), 1.352918),
        (dict(loss="bs"), [[2.0, 1.0, 0.0]], [0], [2], (0.5, 16, 16), 3.159407),
        (
            dict(drw=True, drw_epoch=7),
            [[2.0, 1.0, 0.0], [0.0, 1.0, 2.0]],
            [0, 0],
            [2, 1],
            (0.75, 16, 16),
            1.634832,
        ),
        (dict(loss="bs"), [[2.0, 1.0, 0.0]], [0], [2], None, 0.037432),
        (dict(paste="blur"), [[2.0, 1.0, 0.0]], [0], [2], (0.5, 16, 16), 2.407606),
    ],
)
def test_one_training_step(monkeypatch, options, logits, background, foreground, draw, expected):
    """The network sees the pasted image, and each label weighs as much as it covers."""
    monkeypatch.setattr(cmo, "mixing_plan", lambda *_: [draw])
    train_set = datasets.load(Args())[0]
    train_set.class_counts, train_set.shape = COUNTS, (3, 32, 32)
    size = len(background)
    black, white = torch.zeros(size, 3, 32, 32), torch.ones(size, 3, 32, 32)
    batch = (black, torch.tensor(background)), (white, torch.tensor(foreground)) if draw else None
    model, run, args = Recorder(logits), OneStep(), Args(epochs=20, **options)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    cmo.train_one_epoch(run, model, [batch], optimizer, train_set, 7, args)
    assert run.loss == pytest.approx(expected, abs=2e-6)
    assert not model.logits.equal(torch.tensor(logits))  # the optimiser has moved
    if draw and args.paste == "cutmix":
        x1, x2, y1, y2 = cmo.box(*draw, (32, 32))
        assert model.shown[:, :, x1:x2, y1:y2].eq(1).all()
        assert model.shown.sum() == size * 3 * (x2 - x1) * (y2 - y1)
    elif not draw:
        assert model.shown.eq(0).all()


def test_plain_cutmix_mixes_the_batch_with_itself(monkeypatch):
    monkeypatch.setattr(cmo, "mixing_plan", lambda *_: [(0.0, 16, 16)])  # a box over the whole image
    train_set = datasets.load(Args())[0]
    train_set.class_counts, train_set.shape = COUNTS, (3, 4, 4)
    images = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 3, 32, 32).clone()
    model, run = Recorder([[2.0, 1.0, 0.0]] * 8), OneStep()
    labels = torch.tensor([0, 0, 0, 0, 0, 0, 0, 2])
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    cmo.train_one_epoch(
        run,
        model,
        [((images.clone(), labels), None)],
        optimizer,
        train_set,
        7,
        Args(epochs=20, oversample="nothing"),
    )
    order = model.shown[:, 0, 0, 0]
    assert order.sort().values.tolist() == list(range(8)) and order.tolist() != list(range(8))
    assert run.loss == pytest.approx((7 * 0.407606 + 2.407606) / 8, abs=2e-6)


def test_a_step_with_remix(monkeypatch):
    """Labels 0 (500 images) and 2 (5): where the rare image is the smaller part, it gives the label alone."""
    monkeypatch.setattr(cmo, "mixing_plan", lambda *_: [(0.4, 16, 16)])
    monkeypatch.setattr(torch, "randperm", lambda n: torch.tensor([1, 0]))
    train_set = datasets.load(Args())[0]
    train_set.class_counts = COUNTS
    images = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 32, 32).clone()
    model, run = Recorder([[2.0, 1.0, 0.0]] * 2), OneStep()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    args = Args(epochs=20, paste="remix", oversample="nothing")
    cmo.train_one_epoch(run, model, [((images, torch.tensor([0, 2])), None)], optimizer, train_set, 7, args)
    close(model.shown[:, 0, 0, 0], [0.6, 0.4])
    first, second = 2.407606, 0.4 * 2.407606 + 0.6 * 0.407606
    assert run.loss == pytest.approx((first + second) / 2, abs=2e-6)


def test_optimiser_and_steps(tmp_path, monkeypatch):
    """SGD with momentum 0.9, weight decay on everything, no Nesterov; an incomplete batch is dropped."""
    seen = {}

    def spy(run, model, loader, optimizer, train_set, epoch, args):
        seen.update(optimizer.param_groups[0], steps=len(loader), parameters=list(model.parameters()))
        raise KeyboardInterrupt

    monkeypatch.setattr(cmo, "train_one_epoch", spy)
    with pytest.raises(KeyboardInterrupt):
        cmo.main(tiny(tmp_path, wd=2e-4, warmup=5))
    assert (seen["momentum"], seen["weight_decay"], seen["nesterov"]) == (0.9, 2e-4, False)
    assert seen["lr"] == pytest.approx(0.05 / 5)
    assert len(seen["params"]) == len(seen["parameters"])
    assert seen["steps"] == 1236 // 64
    for imbalance, steps, rest in ((100, 84, 95), (50, 98, 64), (10, 152, 117)):  # CIFAR-100-LT
        assert divmod(sum(datasets.long_tail_counts(500, 100, imbalance)), 128) == (steps, rest)


# Runs


def tiny(tmp_path, name="run", **options):
    return Args(**{**TINY, "mix_start": -1, "mix_end": 0, "output_dir": str(tmp_path / name), **options})


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(loss="ldam", drw=True, drw_epoch=0),
        dict(loss="bs", weighting="effective"),
        dict(oversample="both", r=0.5),
        dict(oversample="background", paste="mixup"),
        dict(oversample="nothing"),
        dict(paste="blur"),
        dict(paste="jitter"),
        dict(paste="remix", oversample="nothing", drw=True, drw_epoch=0),
        dict(loss="ride", drw=True, drw_epoch=0),
    ],
    ids=str,
)
def test_runs(tmp_path, options):
    result = cmo.main(tiny(tmp_path, epochs=1, lr_steps=(), **options))
    assert 0 <= result["all"] <= 100 and result["few"] is not None
    assert np.isfinite(result["loss"])


def test_without_mixing_cmo_is_plain_training(tmp_path):
    """No pasting and p_mix 0 are the same: cross-entropy on the data as it is."""
    plain = cmo.main(tiny(tmp_path, "plain", paste="none"))
    never = cmo.main(tiny(tmp_path, "never", p_mix=0.0))
    mixed = cmo.main(tiny(tmp_path, "mixed"))
    assert plain["weights_sha256"] == never["weights_sha256"]
    assert plain["weights_sha256"] != mixed["weights_sha256"]


def test_training_learns(tmp_path):
    cmo.main(tiny(tmp_path, epochs=4, lr_steps=(3,)))
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert losses[-1] < 0.85 * losses[0]


def test_drw_epoch_after_the_end(capsys):
    line = refusal(lambda: Args(drw=True, drw_epoch=10, epochs=10), capsys)
    assert line.startswith("--drw-epoch 10: not before the end of --epochs 10")


def test_nothing_left_to_mix(capsys):
    line = refusal(lambda: Args(epochs=7), capsys)
    assert (
        line
        == "--mix-start 3, --mix-end 3: nothing of --epochs 7 is left to mix; lower them, or --paste none"
    )
