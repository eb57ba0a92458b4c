"""ride.py: every equation against numbers worked out beforehand, and its limits. What it shares with cmo.py
is tested there; here, that it is the same."""

import inspect
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator

import cmo
import ride
from common import models, recipes
from ride import Args
from tests import conftest
from tests.conftest import TINY, parse, run_here

COUNTS = torch.tensor([500.0, 50.0, 5.0])
WITHOUT_MARGIN = torch.tensor([1e36, 1.0, 1.0])  # of class 0
EDGES = torch.tensor([500.0, 40.0, 7.0, 2.0, 1.0])
EXPERTS = torch.tensor([[[2.0, 1.0, 0.0], [1.0, 1.0, 1.0], [0.0, 2.0, 1.0]]])  # logits of three, of an image


def close(actual, expected, tolerance=1e-6):
    conftest.close(actual, expected, tolerance)


# The same as in cmo.py


@pytest.mark.parametrize("name", ["effective_weights", "random_box", "remix_share", "weighted_mean"])
def test_the_same_as_in_cmo(name):
    assert inspect.getsource(getattr(ride, name)) == inspect.getsource(getattr(cmo, name))


def test_image_weights():
    images = SimpleNamespace(class_counts=COUNTS, labels=torch.tensor([0, 2, 1, 2]))
    assert ride.image_weights(images).equal(cmo.image_weights(images))


@pytest.mark.parametrize("kind", ["cutmix", "remix"])
def test_mix(kind):
    backgrounds, foregrounds = torch.rand(2, 2, 3, 32, 32)
    mixed, share = ride.mix(backgrounds.clone(), foregrounds, np.random.default_rng(0), Args(mix=kind))
    of_cmo = cmo.mix(backgrounds.clone(), foregrounds, np.random.default_rng(0), cmo.Args(mix=kind))
    assert mixed.equal(of_cmo[0]) and share == of_cmo[1]
    assert not mixed.equal(backgrounds)


# The loss


def test_losses_of_experts():
    label = torch.tensor([0])
    close(ride.image_losses(EXPERTS, label, WITHOUT_MARGIN), [3.913824], 1e-5)
    close(ride.image_losses(EXPERTS, label, COUNTS), [16.572285], 1e-5)


def test_equal_experts_are_one_network_with_ldam():
    logits, labels = torch.randn(8, 3), torch.randint(3, (8,))
    experts = logits[:, None].expand(8, 4, 3)
    close(
        ride.image_losses(experts, labels, COUNTS), 4 * cmo.image_losses(logits, labels, COUNTS, "ldam"), 1e-4
    )
    close(ride.disagreement(experts, ride.class_temperatures(COUNTS, 0.05)), torch.zeros(8), 1e-5)


def test_disagreement():
    close(ride.disagreement(EXPERTS, torch.ones(3)), [0.507889])
    each = [EXPERTS[:, [i]].expand(1, 3, 3) for i in range(3)]  # KL(q || p_i), q being the mean of all
    q = EXPERTS.mean(1).softmax(1)
    close(
        [F.kl_div(z[0, 0].log_softmax(0), q[0], reduction="sum") for z in each],
        [0.253944, 0.036035, 0.217910],
    )
    hot = torch.full((3,), 2.0)
    close(ride.disagreement(2 * EXPERTS, hot), [0.507889])


def test_no_gradient_through_the_mean():
    logits = EXPERTS.clone().requires_grad_()
    ride.disagreement(logits, torch.ones(3)).sum().backward()
    close(logits.grad, EXPERTS.softmax(2) - EXPERTS.mean(1, keepdim=True).softmax(2))


def test_class_temperatures():
    close(ride.class_temperatures(COUNTS, 0.05), [1, 0.887920, 0.876712])
    close(ride.class_temperatures(COUNTS, 0.05).mean(), 0.921544)
    close(ride.class_temperatures(COUNTS, 0.02), [1, 0.952953, 0.948249])
    close(ride.class_temperatures(COUNTS, 0.0), [1, 1, 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("labels", [[0, 1, 2, 3, 4, 0], [4] * 6], ids=["every class", "one class"])
@pytest.mark.parametrize("size", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("name", ["image_losses", "disagreement"])
def test_losses_at_the_edges(name, size, labels, dtype):
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    logits = (size * (logits.sign() if size > 1 else logits)).to(dtype).requires_grad_()
    experts = torch.stack([logits, -logits], 1)
    if name == "image_losses":
        losses = ride.image_losses(experts, torch.tensor(labels), EDGES)
    else:
        losses = ride.disagreement(experts, ride.class_temperatures(EDGES, 0.05))
    losses.sum().backward()
    assert losses.isfinite().all() and logits.grad.isfinite().all()


# The training step


class Recorder(torch.nn.Module):
    """Answers every image with the same logits."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(logits.clone())

    def forward(self, images):
        return self.logits


class Draws:
    """Stands for a NumPy Generator: every batch is mixed, the box covers a quarter of the image."""

    def random(self):
        return 0.0

    def beta(self, *_):
        return 0.75

    def integers(self, high):
        return high // 2


def step_loss(epoch=0, labels=(0,), other_labels=(2,), counts=COUNTS, epochs=200, **options):
    """Loss of a step on images of which each has the logits EXPERTS; mixed with p_mix 1."""
    images = torch.zeros(len(labels), 3, 32, 32)
    model, losses = Recorder(EXPERTS.expand(len(labels), 3, 3)), []
    run = SimpleNamespace(accelerator=Accelerator(), rng=Draws(), steps=iter)
    run.log = lambda loss: losses.append(loss.detach())
    args = Args(epochs=epochs, mix_start=0, **options)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    batches = [(images, torch.tensor(labels))], [(images, torch.tensor(other_labels))]
    ride.train_one_epoch(run, model, *batches, optimizer, counts, epoch, args)
    return losses[0]


def test_loss():
    close(step_loss(diversity=-0.45, counts=WITHOUT_MARGIN), 3.685274, 1e-5)
    close(step_loss(diversity=-0.2, counts=WITHOUT_MARGIN), 3.812246, 1e-5)
    close(step_loss(), 16.343735, 1e-5)


def test_without_diversity_the_loss_is_the_sum_of_the_experts():
    close(step_loss(diversity=-1e-9), 16.572285, 1e-5)
    close(step_loss(diversity=-1e-9, counts=WITHOUT_MARGIN), 3.913824, 1e-5)


def test_diversity_0_trains_the_mean_of_the_experts():
    """As in the released code. By hand: 3 * (log(e^1 + e^(4/3) + e^(2/3)) - 1)."""
    close(step_loss(diversity=0.0, counts=WITHOUT_MARGIN), 3.405933, 1e-5)


def test_from_the_switch_on_temperatures_and_weights_hold():
    """One image: its weight cancels, so that the rest is the term of the experts' disagreement."""
    close(step_loss(160) - 16.572285, -0.205419, 1e-5)
    close(step_loss(159), 16.343735, 1e-5)
    close(step_loss(160, drw=False), 16.343735, 1e-5)
    temperatures = ride.class_temperatures(COUNTS, 0.5)
    apart = ride.disagreement(EXPERTS, temperatures) * temperatures.mean() ** 2
    close(step_loss(160, spread=0.5, diversity=-1.0), 16.572285 - apart.squeeze(), 1e-5)
    weights = ride.effective_weights(COUNTS)[[0, 2]]
    each = ride.image_losses(EXPERTS.expand(2, 3, 3), torch.tensor([0, 2]), COUNTS)
    close(step_loss(160, labels=(0, 2)), (weights * each).sum() / weights.sum() - 0.205419, 1e-5)


@pytest.mark.parametrize("mix", ["cutmix", "remix"])
def test_disagreement_counts_once_in_a_mixed_batch(mix):
    loss = step_loss(p_mix=1.0, mix=mix)
    first, second = ride.image_losses(EXPERTS.expand(2, 3, 3), torch.tensor([0, 2]), COUNTS)
    close(loss - (0.75 * first + 0.25 * second), -0.45 * 0.507889, 1e-5)


# The network


def make_experts(arch, num_classes, size=32, **options):
    statistics = (0.5,) * 3, (0.25,) * 3
    dataset = SimpleNamespace(num_classes=num_classes, shape=(3, size, size), statistics=statistics)
    return ride.make_model(dataset, Args(arch=arch, **options))


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameters_of_experts():
    network = make_experts("resnet32", 100)
    assert count(network) == 783_856
    assert count(network.trunk) == 23_824
    assert [count(expert) for expert in network.experts] == [253_344] * 3
    assert count(make_experts("resnet32", 100, experts=4)) == 783_856 + 253_344


@pytest.mark.parametrize("num_classes, parameters", [(1000, 43_677_248), (8142, 76_587_584)])
def test_parameters_of_large_experts(num_classes, parameters):
    with torch.device("meta"):
        assert count(make_experts("resnet50", num_classes)) == parameters


def test_stages_of_experts():
    network = make_experts("resnet50", 5, experts=2)
    third, fourth = network.experts[0].backbone
    assert network.trunk[-1][-1].conv3.out_channels == 512 and (len(third), len(fourth)) == (6, 3)
    assert third[0].conv2.stride == fourth[0].conv2.stride == (2, 2)  # not in the 1x1 convolutions
    assert (third[-1].conv3.out_channels, fourth[-1].conv3.out_channels) == (768, 1536)
    assert third[1].conv2.weight.std().item() == pytest.approx((2 / (9 * 192)) ** 0.5, rel=0.02)
    small = make_experts("resnet8", 5, experts=2).experts[0].backbone
    assert [stage[0].conv1.out_channels for stage in small] == [24, 48]
    assert small[0][0].padding == 4 and small[1][0].padding == 12


def test_experts_predict_with_their_mean():
    network, images = make_experts("resnet8", 5), 255 * torch.rand(2, 3, 32, 32)
    first, second = (expert.classifier.weight for expert in network.experts[:2])
    assert not first.equal(second)  # each begins with weights of its own
    assert not first.equal(make_experts("resnet8", 5, seed=1).experts[0].classifier.weight)
    assert first.equal(make_experts("resnet8", 5, experts=2).experts[0].classifier.weight)
    assert {expert.classifier.scale for expert in network.experts} == {30.0}
    each = network.eval()(images)
    maps = network.trunk(images)
    close(each, torch.stack([expert(maps) for expert in network.experts]).mean(0), 1e-5)
    assert each.shape == (2, 5) and network.train()(images).shape == (2, 3, 5)


def test_experts_of_lenet():
    """They share the convolutions and have the rest each."""
    network = make_experts("lenet", 10, size=28)
    assert [name for name, _ in network.experts[0].backbone.named_parameters()] == []
    assert network.train()(torch.rand(2, 3, 28, 28)).shape == (2, 3, 10)


# Recipes


@pytest.mark.parametrize(
    "dataset, batch, wd, epochs, lr, lr_steps, drw_epoch, diversity, spread, augment",
    [
        ("cifar10_lt", 128, 5e-4, 200, 0.1, (160, 180), 160, -0.45, 0.05, "rotate"),
        ("cifar100_lt", 128, 5e-4, 200, 0.1, (160, 180), 160, -0.45, 0.05, "rotate"),
        ("imagenet_lt", 256, 2e-4, 100, 0.1, (60, 80), 80, -0.2, 0.02, "jitter"),
        ("inat2018", 512, 2e-4, 100, 0.2, (60, 80), 80, -0.2, 0.015, "weak"),
    ],
)
def test_recipes_are_the_published_ones(
    dataset, batch, wd, epochs, lr, lr_steps, drw_epoch, diversity, spread, augment
):
    args = parse("ride.py", dataset=dataset)
    assert (args.batch_size, args.experts, args.p_mix, args.weighted) == (batch, 3, 0, "foreground")
    assert (args.wd, args.epochs, args.lr, args.lr_steps) == (wd, epochs, lr, lr_steps)
    assert (args.diversity, args.spread, args.augment) == (diversity, spread, augment)
    assert args.drw and args.drw_epoch == drw_epoch
    assert args.splits == ((100, 21) if dataset == "inat2018" else (100, 20))
    rates = [recipes.learning_rate(epoch, args) / lr for epoch in (0, 3, 4, *lr_steps)]
    factor = 0.01 if dataset.startswith("cifar") else 0.1
    close(rates, [0.2, 0.8, 1, factor, factor**2], 1e-12)


@pytest.mark.parametrize("dataset", ride.RECIPES)
def test_recipes(dataset):
    args = parse("ride.py", dataset=dataset)
    assert all(0 < step < args.epochs for step in args.lr_steps)
    assert args.mix_start < args.epochs - args.mix_end and args.drw_epoch < args.epochs
    assert args.drw and args.drw_epoch == parse("cmo.py", dataset=dataset, epochs=args.epochs).drw_epoch


def test_optimiser(tmp_path, monkeypatch):
    def spy(run, model, backgrounds, foregrounds, optimizer, *_):
        seen.append(optimizer.param_groups[0])
        raise InterruptedError

    seen = []
    monkeypatch.setattr(ride, "train_one_epoch", spy)
    with pytest.raises(InterruptedError):
        run_here("ride.py", **TINY, nesterov=True, output_dir=tmp_path / "run")
    assert all(parse("ride.py", dataset=name).nesterov for name in ("cifar10_lt", "imagenet_lt", "inat2018"))
    assert (seen[0]["momentum"], seen[0]["weight_decay"], seen[0]["nesterov"]) == (0.9, 5e-4, True)


# Runs


def test_a_run_and_its_network(tmp_path):
    """With CMO and re-weighting; the saved network gives the mean of the experts."""
    options = dict(TINY, epochs=1, lr_steps=(), p_mix=0.5, mix_start=0, drw_epoch=0)
    result = run_here("ride.py", **options, output_dir=tmp_path / "run")
    assert 0 <= result["all"] <= 100 and np.isfinite(result["loss"])
    network = models.load(tmp_path / "run")
    pixels = torch.randint(256, (2, 3, 24, 24), dtype=torch.uint8)
    assert len(network.experts) == 3 and network(pixels).shape == (2, 10)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        dict(weighted="background"),
        dict(p_mix=0.5, mix="remix", weighted="none", drw_epoch=0),
        dict(experts=4, drw=False),
        dict(arch="lenet", p_mix=1.0),
    ],
    ids=str,
)
def test_runs(tmp_path, options):
    result = run_here("ride.py", **TINY, **options, mix_start=0, mix_end=0, output_dir=tmp_path / "run")
    assert 0 <= result["all"] <= 100 and np.isfinite(result["loss"])
