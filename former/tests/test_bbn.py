"""bbn.py: samplers, alpha, the network and its loss against numbers worked out beforehand; its limits."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

import bbn
from bbn import Args
from common import cli, datasets, models
from tests.conftest import TINY, close, refusal

COUNTS = torch.tensor([500, 50, 5])
CIFAR10 = torch.tensor(datasets.long_tail_counts(5000, 10, 100))
CIFAR100 = torch.tensor(datasets.long_tail_counts(500, 100, 100))


def tiny(tmp_path, name="run", **options):
    return Args(**{**TINY, "output_dir": str(tmp_path / name), **options})


# The second sampler


def test_reversed_probabilities():
    probabilities = bbn.class_probabilities(COUNTS, bbn.Q["reversed"])
    close(probabilities, [0.009009, 0.090090, 0.900901], 1e-6)
    close(probabilities / COUNTS, [1.8018e-5, 1.8018e-3, 0.180180], 1e-6)
    close(
        bbn.class_probabilities(CIFAR10, -1),
        [0.004024, 0.006713, 0.011202, 0.018680, 0.031191, 0.051985, 0.086717, 0.144736, 0.242389, 0.402365],
        1e-6,
    )
    close(bbn.class_probabilities(CIFAR100, -1)[[0, 99]], [0.00043820, 0.0438202], 1e-7)
    assert (500 / CIFAR100).sum().item() == pytest.approx(2282.0514, abs=1e-3)


def test_the_other_samplers():
    close(bbn.class_probabilities(COUNTS, bbn.Q["class"]), [1 / 3] * 3)
    close(bbn.class_probabilities(COUNTS, bbn.Q["instance"]), [500 / 555, 50 / 555, 5 / 555])


@pytest.mark.parametrize("u, image", [(1.0, 499), (1.01, 500), (55.5, 554)])
def test_cumulative_draw(u, image, monkeypatch):
    """u of w = [1, 10, 100], sum 111: 1.0 is the end of class 0, 1.01 is of class 1, 55.5 of class 2."""
    weights = (bbn.class_probabilities(COUNTS, -1) / COUNTS)[torch.arange(3).repeat_interleave(COUNTS)]
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor([u / 111 - 1e-12], dtype=torch.float64))
    drawn = datasets.draw(weights, 1, None).item()
    label = torch.arange(3).repeat_interleave(COUNTS)[drawn]
    assert label == torch.arange(3).repeat_interleave(COUNTS)[image]


@pytest.fixture
def loaders(tmp_path, monkeypatch):
    """options -> what main hands to train_one_epoch: its loader, model and optimizer."""

    def of(**options):
        seen = {}

        def spy(run, model, loader, optimizer, epoch, args):
            seen.update(loader=loader, model=model, optimizer=optimizer)
            raise KeyboardInterrupt

        monkeypatch.setattr(bbn, "train_one_epoch", spy)
        with pytest.raises(KeyboardInterrupt):
            bbn.main(tiny(tmp_path, overwrite=True, **options))
        return seen

    return of


@pytest.mark.parametrize("rebalancing", bbn.Q)
def test_both_streams(loaders, rebalancing):
    """Each image once beside as many draws by the rebalancing law, over 40 epochs; the rest is dropped."""
    loader = loaders(rebalancing=rebalancing)["loader"]
    natural, second = loader.batch_sampler.sampler.first, loader.batch_sampler.sampler.second
    assert sorted(index for index, _ in natural) == list(range(1236))  # each image once
    assert (natural.stream, second.stream) == (0, 1)  # drawn apart
    counts = torch.tensor([500, 299, 179, 107, 64, 38, 23, 13, 8, 5])
    natural, drawn = [], []
    for epoch in range(40):
        loader.set_epoch(epoch)
        batches = [(first[1], second[1], first[0], second[0]) for first, second in loader]
        assert len(batches) == 1236 // 64 and all(len(a) == len(b) == 64 for a, b, *_ in batches)
        natural.append(torch.cat([batch[0] for batch in batches]))
        drawn.append(torch.cat([batch[1] for batch in batches]))
    # An epoch lacks the 20 images of the incomplete batch.
    assert all((counts - labels.bincount(minlength=10)).ge(0).all() for labels in natural)
    law = bbn.class_probabilities(counts, bbn.Q[rebalancing])
    frequencies = torch.cat(drawn).bincount(minlength=10) / torch.cat(drawn).numel()
    close(frequencies, law, 0.01)
    assert not drawn[0].equal(drawn[1])


def test_reversed_draws_have_the_reversed_law():
    weights = (bbn.class_probabilities(COUNTS, -1) / COUNTS)[torch.arange(3).repeat_interleave(COUNTS)]
    drawn = datasets.draw(weights, 100_000, torch.Generator().manual_seed(0))
    labels = torch.arange(3).repeat_interleave(COUNTS)[drawn]
    close(labels.bincount() / 100_000, [0.009009, 0.090090, 0.900901], 0.005)
    of_class_2 = drawn[labels == 2].bincount()[550:] / 100_000
    close(of_class_2, [0.180180] * 5, 0.005)  # evenly within a class


# Cumulative learning


def alphas(epochs_from_1, epochs, *options):
    return [bbn.alpha_at(epoch - 1, epochs, *options) for epoch in epochs_from_1]


def test_parabolic_decay():
    expected = [1.0, 0.9375, 0.75, 0.645975, 0.4375, 0.367975, 0.009975]
    close(alphas([1, 51, 101, 120, 151, 160, 200], 200), expected, 1e-9)
    close(alphas([1, 100, 200], 200, "parabolic", "paper"), [0.999975, 0.75, 0], 1e-9)
    assert bbn.alpha_at(0, 200) == 1.0
    close(alphas([46, 60, 80, 90], 90), [0.7975, 0.6519, 0.3759, 0.2079], 1e-9)  # D = 100
    close(alphas([91, 120, 180], 180), [0.7975, 0.645975, 0.198975], 1e-9)  # D = 200
    close(alphas([51], 90, "parabolic", "code", 500), [0.99], 1e-9)  # --alpha-epochs


@pytest.mark.parametrize(
    "adaptor, at_51, at_151",
    [
        ("linear", 0.75, 0.25),
        ("cosine", 0.923880, 0.382683),
        ("increment", 0.0625, 0.5625),
        ("equal", 0.5, 0.5),
        ("stages", 1.0, 0.0),
    ],
)
def test_adaptors(adaptor, at_51, at_151):
    close(alphas([51, 151], 200, adaptor), [at_51, at_151], 1e-6)


def test_separated_stages():
    assert alphas([120, 121], 200, "stages") == [1.0, 0.0]
    assert alphas([60, 61], 100, "stages") == [1.0, 0.0]  # the same share of other lengths


def test_beta_is_drawn_by_batch():
    assert bbn.alpha_at(50, 200, "beta") is None


# The network


def toy(joint_trunk=False):
    """Three classes, features [x0, x1] of the images' first pixels on both branches."""

    class Take(nn.Module):
        def forward(self, x):
            return x[:, :2, 0, 0] if x.ndim == 4 else x

    network = bbn.BBN("resnet8", 3, 0, (3, 32, 32), joint_trunk)
    network.trunk, network.cb_block, network.rb_block = Take(), nn.Identity(), nn.Identity()
    network.classifier = nn.Linear(4, 3)
    weight = torch.tensor([[1.0, 0, 0, 1], [0, 1, 1, 0], [1, 1, -1, 1]])
    network.classifier.weight.data, network.classifier.bias.data = weight, torch.tensor([0.1, 0.2, 0.3])
    return network


def images_of(features):
    return torch.tensor([features]).view(1, 2, 1, 1).expand(-1, -1, 2, 2)


@pytest.mark.parametrize("joint_trunk", [False, True])
def test_logits_and_loss(joint_trunk):
    network, f_c, f_r = toy(joint_trunk), images_of([1.0, 2.0]), images_of([3.0, -1.0])
    z = network(f_c, f_r, 0.75)
    close(z, [[1.1, 4.7, 2.8]], 1e-6)
    y_c, y_r = torch.tensor([2]), torch.tensor([0])
    close(F.cross_entropy(z, y_c), 2.062877, 1e-6)
    close(bbn.mixed_loss(z, y_c, y_r, 0.75), 2.487877, 1e-6)
    close(bbn.mixed_loss(z, y_r, y_c, 0.25), 2.487877, 1e-6)
    z = network(f_c, f_r, 1.0)
    close(z, [[2.1, 4.2, 6.3]], 1e-6)
    close(bbn.mixed_loss(z, y_c, y_r, 1.0), 0.128791, 1e-6)
    both = network(f_c, f_r, 0.5)  # what inference would give if an image had both features
    close(both, [[0.1, 5.2, -0.7]], 1e-6)


def test_inference_uses_both_branches_without_scaling():
    network = bbn.BBN("resnet8", 5, 0, (3, 32, 32)).eval()
    images = torch.randn(3, 3, 32, 32)
    lower = network.trunk(images)
    features = torch.cat([network.cb_block(lower), network.rb_block(lower)], 1)
    torch.testing.assert_close(network(images), network.classifier(features))
    torch.testing.assert_close(network(images), network(images, images, 0.5))
    assert network(images, alpha=0.9).equal(network(images))


def test_one_classifier_is_the_sum_of_two():
    network = bbn.BBN("resnet8", 5, 0, (3, 32, 32)).eval()
    x_c, x_r, a = torch.randn(3, 3, 32, 32), torch.randn(3, 3, 32, 32), 0.3
    f_c, f_r = network.cb_block(network.trunk(x_c)), network.rb_block(network.trunk(x_r))
    w_c, w_r = network.classifier.weight.chunk(2, dim=1)
    z = 2 * (a * f_c @ w_c.T + (1 - a) * f_r @ w_r.T) + network.classifier.bias
    torch.testing.assert_close(network(x_c, x_r, a), z, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "arch, classes, total",
    [
        ("resnet32", 10, 538_778),
        ("resnet32", 100, 550_388),
        ("resnet50", 8142, 27_970_624 + 33_357_774),
        ("resnet50", 5089, 27_970_624 + 20_849_633),
    ],
)
def test_parameter_counts(arch, classes, total):
    size = 224 if arch == "resnet50" else 32
    network = bbn.BBN(arch, classes, 0, (3, size, size))
    assert models.count_parameters(network) == total
    block = models.count_parameters(network.cb_block)
    assert block == models.count_parameters(network.rb_block) == {32: 73_984, 224: 4_462_592}[size]
    assert len(network.trunk[-1]) == {32: 4, 224: 2}[size]  # blocks left in the last stage
    names = {name.split(".")[0] for name, _ in network.named_parameters()}
    assert names == {"trunk", "cb_block", "rb_block", "classifier"}


def test_parameters_of_the_backbones():
    """What BBN adds to the plain backbone is one block."""
    for arch, plain, ours in (("resnet32", 463_504, 537_488), ("resnet50", 23_508_032, 27_970_624)):
        assert models.count_parameters(models.build(arch, 10, 0).backbone) == plain
        network = bbn.BBN(arch, 10, 0, (3, 32, 32))
        assert models.count_parameters(network) - models.count_parameters(network.classifier) == ours


def test_shapes():
    network = bbn.BBN("resnet32", 7, 0, (3, 32, 32))
    assert network.trunk(torch.randn(2, 3, 32, 32)).shape == (2, 64, 8, 8)
    assert network(torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32), 0.5).shape == (2, 7)
    with torch.no_grad():
        large = bbn.BBN("resnet50", 7, 0, (3, 224, 224))
        assert large.trunk(torch.randn(2, 3, 224, 224)).shape == (2, 2048, 7, 7)


@pytest.mark.parametrize(
    "arch, shape", [("resnet8", (3, 24, 24)), ("resnet10", (3, 64, 64)), ("lenet", (1, 28, 28))]
)
def test_last_block_and_trunk_are_the_network(arch, shape):
    network, images = models.build(arch, 4, 0, shape).eval(), torch.randn(2, *shape)
    trunk, block = models.split_last_block(network)
    torch.testing.assert_close(block(trunk(images)), network.features(images))
    assert bbn.BBN(arch, 4, 0, shape)(images).shape == (2, 4)


def test_initialisation():
    first, again, other = (bbn.BBN("resnet32", 10, seed, (3, 32, 32)) for seed in (3, 3, 4))
    assert all(a.equal(b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not first.classifier.weight.equal(other.classifier.weight)
    assert first.trunk[0].weight.equal(models.build("resnet32", 10, 3).backbone[0].weight)
    assert not first.cb_block[0].conv1.weight.equal(first.rb_block[0].conv1.weight)  # not copies in weight
    assert first.rb_block[0].conv1.weight.std().item() == pytest.approx((2 / 576) ** 0.5, rel=0.05)
    assert first.classifier.weight.abs().max() <= 128**-0.5 and first.classifier.weight.std() > 0.04


def test_alpha_one_and_zero_silence_a_branch():
    x_c, x_r, y = torch.randn(4, 3, 32, 32), torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    for alpha, silent, heard, half in ((1.0, "rb_block", "cb_block", 1), (0.0, "cb_block", "rb_block", 0)):
        network = bbn.BBN("resnet8", 5, 0, (3, 32, 32))
        bbn.mixed_loss(network(x_c, x_r, alpha), y, y, alpha).backward()
        assert all(p.grad.eq(0).all() for p in getattr(network, silent).parameters())
        assert all(p.grad.ne(0).any() for p in getattr(network, heard).parameters())
        halves = network.classifier.weight.grad.chunk(2, dim=1)
        assert halves[half].eq(0).all() and halves[1 - half].ne(0).any()


def test_equal_batches_at_one_half_are_the_single_path_network():
    """With equal blocks: output and gradient of the network with one block and classifier W_c + W_r."""
    network = bbn.BBN("resnet8", 5, 0, (3, 32, 32))
    network.rb_block.load_state_dict(network.cb_block.state_dict())
    single = models.build("resnet8", 5, 0)
    trunk, block = models.split_last_block(single)
    trunk.load_state_dict(network.trunk.state_dict())
    block.load_state_dict(network.cb_block.state_dict())
    w_c, w_r = network.classifier.weight.data.chunk(2, dim=1)
    single.classifier.weight.data, single.classifier.bias.data = (
        w_c + w_r,
        network.classifier.bias.data.clone(),
    )
    images, labels = torch.randn(6, 3, 32, 32), torch.tensor([0, 1, 2, 3, 4, 0])
    z, plain = network(images, images, 0.5), single(images)
    torch.testing.assert_close(z, plain)
    bbn.mixed_loss(z, labels, labels, 0.5).backward()
    F.cross_entropy(plain, labels).backward()
    for ours, theirs in zip(network.trunk.parameters(), trunk.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    for c, r, theirs in zip(
        network.cb_block.parameters(), network.rb_block.parameters(), block.parameters(), strict=True
    ):
        torch.testing.assert_close(c.grad + r.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    for half in network.classifier.weight.grad.chunk(2, dim=1):
        torch.testing.assert_close(half, single.classifier.weight.grad, rtol=1e-4, atol=1e-6)


def test_two_trunk_passes_see_their_own_batch_statistics():
    """Two updates of the running statistics a step, or with --joint-trunk one over both batches."""
    x_c, x_r = torch.zeros(4, 3, 32, 32), torch.ones(4, 3, 32, 32)
    apart, joint = (bbn.BBN("resnet8", 5, 0, (3, 32, 32), joint) for joint in (False, True))
    apart(x_c, x_r, 0.5)
    joint(x_c, x_r, 0.5)
    assert apart.trunk[1].num_batches_tracked == 2 and joint.trunk[1].num_batches_tracked == 1
    assert apart.cb_block[0].bn1.num_batches_tracked == apart.rb_block[0].bn1.num_batches_tracked == 1


# The baselines


@pytest.mark.parametrize("layer", ["input", "layer1", "layer2", "layer3", "pooled"])
def test_mixing_at_every_layer(layer):
    network = bbn.Mixed(models.build("resnet8", 5, 0), layer).eval()
    images, others = torch.randn(4, 3, 32, 32), torch.randn(4, 3, 32, 32)
    plain = network(images)
    torch.testing.assert_close(plain, network.network(images))
    torch.testing.assert_close(network.upper(network.lower(images)), plain)
    torch.testing.assert_close(network(images, 1.0, others=others), plain)
    torch.testing.assert_close(network(images, 0.0, others=others), network(others))
    order = torch.tensor([1, 2, 3, 0])
    torch.testing.assert_close(network(images, 0.3, order), network(images, 0.3, others=images[order]))
    hidden = 0.3 * network.lower(images) + 0.7 * network.lower(others)
    torch.testing.assert_close(network(images, 0.3, others=others), network.upper(hidden))


def test_layers_are_the_stages():
    shapes = {"layer1": (16, 32, 32), "layer2": (32, 16, 16), "layer3": (64, 8, 8), "pooled": (64,)}
    for layer, shape in shapes.items():
        hidden = bbn.Mixed(models.build("resnet8", 5, 0), layer).lower(torch.randn(2, 3, 32, 32))
        assert hidden.shape == (2, *shape)
    hidden = bbn.Mixed(models.build("resnet10", 5, 0), "layer2").lower(torch.randn(2, 3, 64, 64))
    assert hidden.shape == (2, 128, 8, 8)


@pytest.mark.parametrize(
    "options, line",
    [
        (
            dict(method="manifold", mix_layer="layer1", arch="lenet"),
            "--mix-layer layer1: lenet has no such stage; use pooled",
        ),
        (dict(alpha_epochs=2), "--alpha-epochs 2: at least --epochs 40, or alpha ends below 0"),
        (
            dict(alpha_epochs=50, alpha_index="paper"),
            "--alpha-epochs: is of --alpha-index code; leave one of them out",
        ),
        (
            dict(cosine=True, lr_steps=(3,)),
            "--lr-steps: have no effect on a cosine; leave them out, or add --no-cosine",
        ),
        (
            dict(method="ce", adaptor="linear"),
            "--adaptor linear: is for --method bbn; add that, or leave it out",
        ),
        (
            dict(method="mixup", rebalancing="class"),
            "--rebalancing class: is for --method bbn or manifold2; add that, or leave it out",
        ),
        (
            dict(adaptor="equal", alpha_epochs=20),
            "--alpha-epochs, --alpha-index: have no effect on --adaptor equal; leave them out",
        ),
        (
            dict(mix_alpha=0.2),
            "--mix-alpha 0.2: is for --method mixup or manifold or manifold2; add that, or leave it out",
        ),
    ],
)
def test_options_without_effect_are_refused(options, line, capsys):
    assert refusal(lambda: cli.build(Args, bbn.RECIPES, **options), capsys) == line


def test_mixed_accuracy():
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0]])
    labels, others = torch.tensor([0, 2]), torch.tensor([0, 1])
    assert bbn.mixed_accuracy(logits, labels, others, 0.75).item() == 0.75 * 100 + 0.25 * 50


# Schedule and recipes


def rates(epochs_from_1, **given):
    args = cli.build(Args, bbn.RECIPES, **given)
    return [bbn.learning_rate(epoch - 1, args) for epoch in epochs_from_1]


def test_learning_rate():
    epochs = [1, 2, 3, 4, 5, 119, 120, 159, 160, 200]
    expected = [0.0466667, 0.06, 0.0733333, 0.0866667, 0.1, 0.1, 0.001, 0.001, 1e-5, 1e-5]
    close(rates(epochs, dataset="cifar10_lt"), expected, 1e-7)
    close(rates([1, 119, 120, 159, 160], dataset="inat2018"), [0.05, 0.05, 0.005, 0.005, 5e-4], 1e-9)
    once = rates([1, 59, 60, 79, 80], dataset="inat2017", epochs=90, lr_steps=(59, 79))
    close(once, [0.05, 0.05, 0.005, 0.005, 5e-4], 1e-9)
    close(rates([1, 46, 90], dataset="imagenet_lt"), [0.1, 0.05, 3.046e-5], 1e-7)


def test_learning_rate_of_the_baselines():
    epochs = [1, 5, 119, 160, 161, 180, 181]
    expected = [0.02, 0.1, 0.1, 0.1, 1e-3, 1e-3, 1e-5]
    close(rates(epochs, dataset="cifar100_lt", method="mixup"), expected, 1e-9)
    given = rates([12, 13], dataset="cifar100_lt", method="ce", lr_steps=(12,))  # the command line wins
    close(given, [0.1, 1e-3], 1e-9)
    given = dict(method="mixup", cosine=True, lr_steps=())
    close(rates([101], dataset="cifar10_lt", **given), [0.05], 1e-9)


def test_recipes_are_the_published_ones():
    def values(dataset):
        args = cli.build(Args, bbn.RECIPES, dataset=dataset)
        names = "arch epochs batch_size lr lr_steps lr_factor wd warmup imbalance color_jitter"
        return [getattr(args, name) for name in names.split()]

    cifar = ["resnet32", 200, 128, 0.1, (119, 159), 0.01, 2e-4, 5, 100, 0]
    assert values("cifar10_lt") == values("cifar100_lt") == cifar
    inat = ["resnet50", 180, 128, 0.05, (119, 159), 0.1, 1e-4, 0, None, 0]
    assert values("inat2017") == values("inat2018") == inat
    assert values("imagenet_lt") == ["resnet50", 90, 256, 0.1, (), 0.01, 5e-4, 0, None, 0.4]
    assert cli.build(Args, bbn.RECIPES, dataset="imagenet_lt").cosine
    assert (Args().adaptor, Args().alpha_index, Args().rebalancing) == ("parabolic", "code", "reversed")
    for steps, imbalance in ((96, 100), (109, 50), (159, 10)):
        assert sum(datasets.long_tail_counts(5000, 10, imbalance)) // 128 == steps


@pytest.mark.parametrize("method, nesterov", [("bbn", True), ("ce", False), ("manifold2", False)])
def test_optimiser(loaders, method, nesterov):
    seen = loaders(method=method, wd=2e-4, warmup=5)
    group = seen["optimizer"].param_groups[0]
    assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.9, 2e-4, nesterov)
    assert group["lr"] == pytest.approx(0.05 * (0.466667 if nesterov else 0.2), rel=1e-5)
    assert len(group["params"]) == len(list(seen["model"].parameters()))


# The training step


class Answer(nn.Module):
    """Answers everything with the same logits and keeps what it was asked."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.asked = nn.Parameter(torch.tensor(logits)), None

    def forward(self, *asked, **named):
        self.asked = (*asked, named)
        return self.logits


class OneStep:
    """The part of a Run that train_one_epoch uses."""

    def __init__(self):
        self.accelerator, self.recorded = Accelerator(), {}

    def steps(self, loader):
        return loader

    def record(self, **values):
        self.recorded = {name: value.item() for name, value in values.items()}


def one_step(args, epoch, batch):
    model, run = Answer([[2.0, 1.0, 0.0]] * len(batch[0][1])), OneStep()
    before = model.logits.detach().clone()
    torch.manual_seed(0)
    bbn.train_one_epoch(run, model, [batch], torch.optim.SGD(model.parameters(), 0.1), epoch, args)
    assert not model.logits.equal(before)
    return model.asked, run.recorded


ZEROS, ONES = torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
EACH = [0.407606, 1.407606, 2.407606]  # cross-entropy of the logits 2, 1, 0 by label


def test_step_of_bbn():
    """Epoch 101 of 200, alpha 0.75: the natural batch first, its labels by alpha."""
    batch = (ZEROS, torch.tensor([0, 1])), (ONES, torch.tensor([2, 0]))
    (first, second, alpha, _), recorded = one_step(Args(epochs=200), 100, batch)
    assert first is ZEROS and second is ONES and alpha == 0.75
    expected = 0.75 * (EACH[0] + EACH[1]) / 2 + 0.25 * (EACH[2] + EACH[0]) / 2
    assert recorded["loss"] == pytest.approx(expected, abs=1e-6)
    assert recorded["train_accuracy"] == 50.0


def test_step_with_beta_draws_a_new_alpha(monkeypatch):
    class Fixed:
        def beta(self, a, b):
            assert (a, b) == (0.2, 0.2)
            return 0.9

    monkeypatch.setattr(np.random, "RandomState", lambda seed: Fixed())
    batch = (ZEROS, torch.tensor([0, 1])), (ONES, torch.tensor([2, 0]))
    (_, _, alpha, _), recorded = one_step(Args(adaptor="beta"), 3, batch)
    expected = 0.9 * (EACH[0] + EACH[1]) / 2 + 0.1 * (EACH[2] + EACH[0]) / 2
    assert alpha == 0.9 and recorded["loss"] == pytest.approx(expected, abs=1e-6)


def test_beta_is_drawn_anew_by_batch_from_seed_and_epoch():
    def asked(seed, epoch):
        model, run, batch = Answer([[2.0, 1.0, 0.0]] * 2), OneStep(), (ZEROS, torch.tensor([0, 1]))
        seen, forward = [], model.forward
        model.forward = lambda *a: seen.append(a[2]) or forward(*a)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        bbn.train_one_epoch(
            run, model, [(batch, batch)] * 3, optimizer, epoch, Args(adaptor="beta", seed=seed)
        )
        return seen

    first = asked(0, 1)
    assert len(set(first)) == 3 and all(0 <= alpha <= 1 for alpha in first)
    assert first == asked(0, 1) and first != asked(0, 2) and first != asked(1, 1)


@pytest.mark.parametrize(
    "options, alpha", [(dict(alpha_index="paper"), 0.75), (dict(alpha_epochs=400), 1 - 99**2 / 400**2)]
)
def test_step_uses_the_options_of_alpha(options, alpha):
    """Epoch 100 of 200."""
    batch = (ZEROS, torch.tensor([0, 1])), (ONES, torch.tensor([2, 0]))
    assert one_step(Args(epochs=200, **options), 99, batch)[0][2] == pytest.approx(alpha)


def test_steps_of_the_baselines(monkeypatch):
    wanted = []

    class Fixed:
        def beta(self, a, b):
            wanted.append((a, b))
            return 0.75

    monkeypatch.setattr(np.random, "RandomState", lambda seed: Fixed())
    labels, others = torch.tensor([0, 1]), torch.tensor([2, 0])
    asked, recorded = one_step(Args(method="ce"), 0, ((ZEROS, labels), None))
    assert len(asked) == 2 and recorded["loss"] == pytest.approx((EACH[0] + EACH[1]) / 2, abs=1e-6)
    (first, lam, named), recorded = one_step(Args(method="manifold2"), 0, ((ZEROS, labels), (ONES, others)))
    assert first is ZEROS and lam == 0.75 and named["others"] is ONES
    expected = 0.75 * (EACH[0] + EACH[1]) / 2 + 0.25 * (EACH[2] + EACH[0]) / 2
    assert recorded["loss"] == pytest.approx(expected, abs=1e-6)
    assert wanted == [(1.0, 1.0)]


@pytest.mark.parametrize("method", ["mixup", "manifold"])
def test_labels_go_with_the_order(method, monkeypatch):
    """Row i is blended with row order[i], and so are the labels; lambda ~ Beta of --mix-alpha."""
    wanted = []

    class Fixed:
        def beta(self, a, b):
            wanted.append((a, b))
            return 0.75

    monkeypatch.setattr(np.random, "RandomState", lambda seed: Fixed())
    logits, labels = torch.tensor([[3.0, 1, 0], [0, 2, 5], [1, 0, 7], [2, 2, 0]]), torch.tensor([0, 1, 2, 0])
    model, run = Answer(logits.tolist()), OneStep()
    torch.manual_seed(1)
    order = torch.randperm(4)
    assert not order[order].equal(torch.arange(4))  # no order that is its own inverse
    torch.manual_seed(1)
    images = torch.zeros(4, 3, 4, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    args = Args(method=method, mix_alpha=0.4)
    bbn.train_one_epoch(run, model, [((images, labels), None)], optimizer, 0, args)
    first, lam, asked, _ = model.asked
    assert first is images and lam == 0.75 and asked.equal(order) and wanted == [(0.4, 0.4)]
    expected = 0.75 * F.cross_entropy(logits, labels) + 0.25 * F.cross_entropy(logits, labels[order])
    assert run.recorded["loss"] == pytest.approx(expected.item(), abs=1e-6)


def test_models_of_the_methods():
    train_set = datasets.load(Args())[0]
    for method, layer in (
        ("ce", "input"),
        ("mixup", "input"),
        ("manifold", "layer2"),
        ("manifold2", "layer2"),
    ):
        given = dict(mix_layer="layer2") if method in bbn.MANIFOLD else {}
        assert bbn.make_model(train_set, Args(method=method, **given)).layer == layer
        assert (bbn.streams(train_set, Args(method=method))[1] is None) == (method != "manifold2")
    for joint in (False, True):
        assert bbn.make_model(train_set, Args(joint_trunk=joint)).joint_trunk == joint


# Runs


@pytest.mark.parametrize(
    "options",
    [
        dict(adaptor="beta", rebalancing="class"),
        dict(alpha_index="paper", joint_trunk=True),
        dict(adaptor="stages", rebalancing="instance", arch="lenet"),
        dict(method="mixup"),
        dict(method="manifold", mix_layer="layer2"),
        dict(method="manifold2"),
    ],
    ids=str,
)
def test_runs(tmp_path, options):
    result = bbn.main(tiny(tmp_path, **options))
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    assert all(np.isfinite(line["loss"]) for line in lines) and 0 <= result["all"] <= 100
    assert 0 < result["train_accuracy"] <= 100


def test_plain_training_is_that_of_cmo(tmp_path):
    """--method ce is the plain training of cmo.py, but for the order in which a mean is taken."""
    import cmo

    ours = bbn.main(tiny(tmp_path, method="ce", wd=1e-3))
    theirs = cmo.main(cmo.Args(**TINY, wd=1e-3, paste="none", output_dir=str(tmp_path / "cmo")))
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
    assert ours["all"] == pytest.approx(theirs["all"], abs=0.2)
