"""bbn.py: samplers, alpha, the network and its loss against numbers worked out beforehand; its limits."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

import bbn
from common import datasets, models, recipes
from tests.conftest import TINY, close, lines_of, parse, run_here

COUNTS = torch.tensor([500, 50, 5])
LABELS = torch.arange(3).repeat_interleave(COUNTS)
CIFAR10 = torch.tensor(datasets.long_tail_counts(5000, 10, 100))
CIFAR100 = torch.tensor(datasets.long_tail_counts(500, 100, 100))


def image_set(counts):
    """What image_weights takes of a data set with so many images of each class."""
    return SimpleNamespace(class_counts=counts, labels=torch.arange(len(counts)).repeat_interleave(counts))


def law(counts, q):
    """Probability of drawing each class by image_weights."""
    weights = bbn.image_weights(image_set(counts), q)
    labels = torch.arange(len(counts)).repeat_interleave(counts)
    return torch.zeros(len(counts)).double().index_add_(0, labels, weights) / weights.sum()


def model_of(arch="resnet8", num_classes=5, seed=0, shape=(3, 32, 32), **options):
    """What main trains, in training mode."""
    channels = shape[0]
    dataset = SimpleNamespace(
        num_classes=num_classes, shape=shape, statistics=((0.5,) * channels, (0.25,) * channels)
    )
    return bbn.make_model(dataset, parse("bbn.py", arch=arch, seed=seed, **options)).train()


def plain(arch="resnet8", num_classes=5, seed=0, shape=(3, 32, 32)):
    """The network of one path."""
    statistics = ((0.5,) * shape[0], (0.25,) * shape[0])
    return models.build(
        arch, SimpleNamespace(num_classes=num_classes, shape=shape, statistics=statistics), seed
    )


def images(number=4, seed=0):
    return 255 * torch.rand(number, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


# The second sampler


def test_reversed_probabilities():
    close(law(COUNTS, -1), [0.009009, 0.090090, 0.900901], 1e-6)
    close(law(COUNTS, -1) / COUNTS, [1.8018e-5, 1.8018e-3, 0.180180], 1e-6)
    expected = [0.004024, 0.006713, 0.011202, 0.018680, 0.031191, 0.051985, 0.086717, 0.144736, 0.242389]
    close(law(CIFAR10, -1), [*expected, 0.402365], 1e-6)
    close(law(CIFAR100, -1)[[0, 99]], [0.00043820, 0.0438202], 1e-7)
    assert (500 / CIFAR100).sum().item() == pytest.approx(2282.0514, abs=1e-3)


def test_the_other_samplers():
    close(law(COUNTS, 0), [1 / 3] * 3)
    close(law(COUNTS, 1), [500 / 555, 50 / 555, 5 / 555])


@pytest.mark.parametrize("u, label", [(1.0, 0), (1.01, 1), (55.5, 2)])
def test_cumulative_draw(u, label, monkeypatch):
    """u of w = [1, 10, 100], sum 111: 1.0 is the end of class 0, 1.01 is of class 1, 55.5 of class 2."""
    weights = bbn.image_weights(image_set(COUNTS))
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor([u / 111 - 1e-12], dtype=torch.float64))
    assert LABELS[datasets.draw(weights, 1, None).item()] == label


def test_reversed_draws_have_the_reversed_law():
    weights = bbn.image_weights(image_set(COUNTS))
    drawn = datasets.draw(weights, 100_000, torch.Generator().manual_seed(0))
    close(LABELS[drawn].bincount() / 100_000, [0.009009, 0.090090, 0.900901], 0.005)
    of_class_2 = drawn[LABELS[drawn] == 2].bincount()[550:] / 100_000
    close(of_class_2, [0.180180] * 5, 0.005)  # evenly within a class


class Seen(Exception):
    pass


@pytest.fixture
def handed(tmp_path, monkeypatch):
    """options -> what main hands to train_one_epoch: model, loaders, optimizer."""

    def of(**options):
        def spy(run, model, loader, reversed_loader, optimizer, epoch, args):
            raise Seen(model, loader, reversed_loader, optimizer)

        monkeypatch.setattr(bbn, "train_one_epoch", spy)
        with pytest.raises(Seen) as seen:
            run_here("bbn.py", **{**TINY, "output_dir": tmp_path / "run", "overwrite": True, **options})
        return seen.value.args

    return of


@pytest.mark.parametrize("q", [-1.0, 0.0, 1.0])
def test_both_streams(handed, q):
    """Each image once beside as many draws by the law of q, over 40 epochs; the rest is dropped."""
    _, loader, reversed_loader, _ = handed(q=q)
    labels = loader.dataset.labels
    batches = [(y_c, y_r) for (_, y_c), (_, y_r) in zip(loader, reversed_loader, strict=True)]
    assert len(batches) == 1236 // 64 and all(len(y_c) == len(y_r) == 64 for y_c, y_r in batches)
    natural, second = loader.batch_sampler.sampler, reversed_loader.batch_sampler.sampler
    assert sorted(natural) == list(range(1236))  # each image once
    assert (natural.stream, second.stream) == (0, 1)  # drawn apart
    drawn = []
    for epoch in range(40):
        second.set_epoch(epoch)
        drawn.append(labels[list(second)])
        assert len(drawn[-1]) == 1236
    counts = torch.tensor([500, 299, 179, 107, 64, 38, 23, 13, 8, 5])
    close(torch.cat(drawn).bincount(minlength=10) / (40 * 1236), law(counts, q), 0.01)
    assert not drawn[0].equal(drawn[1])


# Cumulative learning


def alphas(epochs_from_1, *options):
    return [bbn.alpha_at(epoch - 1, *options) for epoch in epochs_from_1]


def test_parabolic_decay():
    expected = [1.0, 0.9375, 0.75, 0.645975, 0.4375, 0.367975, 0.009975]
    close(alphas([1, 51, 101, 120, 151, 160, 200], 200), expected, 1e-9)
    assert bbn.alpha_at(0, 200) == 1.0
    paper = [bbn.alpha_at(epoch, 200) for epoch in (1, 100, 200)]  # counts from 1
    close(paper, [0.999975, 0.75, 0], 1e-9)
    close(alphas([46, 60, 80, 90], 100), [0.7975, 0.6519, 0.3759, 0.2079], 1e-9)
    close(alphas([91, 120, 180], 200), [0.7975, 0.645975, 0.198975], 1e-9)
    close(alphas([51], 500), [0.99], 1e-9)
    assert bbn.alpha_at(30, 20) == 0.0  # where --alpha-epochs ends before --epochs


def test_divisor_of_alpha():
    """100 for 90 epochs, 200 for 180, else the epochs, as in the released code."""

    def divisor(**options):
        args = parse("bbn.py", **options)
        return args.alpha_epochs or args.epochs

    assert divisor(dataset="inat2018") == divisor(dataset="inat2017") == 200
    assert divisor(dataset="inat2018", epochs=90) == 100
    assert divisor(dataset="imagenet_lt") == 100
    assert divisor(dataset="cifar10_lt") == 200
    assert divisor(dataset="cifar10_lt", epochs=300) == 300
    assert divisor(dataset="synthetic") == 40


@pytest.mark.parametrize(
    "adaptor, at_51, at_151",
    [
        ("linear", 0.75, 0.25),
        ("cosine", 0.923880, 0.382683),
        ("increment", 0.0625, 0.5625),
        ("equal", 0.5, 0.5),
    ],
)
def test_adaptors(adaptor, at_51, at_151):
    close(alphas([51, 151], 200, adaptor), [at_51, at_151], 1e-6)


# The network


def toy():
    """Three classes, features [x0, x1] of the images' first pixels on both branches."""

    class Take(nn.Module):
        def forward(self, x):
            return x[:, :2, 0, 0]

    network = bbn.BBN(plain(num_classes=3), plain(num_classes=3))
    network.trunk, network.cb_block, network.rb_block = Take(), nn.Identity(), nn.Identity()
    network.classifier = nn.Linear(4, 3)
    weight = torch.tensor([[1.0, 0, 0, 1], [0, 1, 1, 0], [1, 1, -1, 1]])
    network.classifier.weight.data, network.classifier.bias.data = weight, torch.tensor([0.1, 0.2, 0.3])
    return network


def images_of(features):
    return torch.tensor([features]).view(1, 2, 1, 1).expand(-1, -1, 2, 2)


F_C, F_R = images_of([1.0, 2.0]), images_of([3.0, -1.0])


def test_logits():
    network = toy()
    z = network(F_C, F_R, 0.75)
    close(z, [[1.1, 4.7, 2.8]], 1e-6)
    close(F.cross_entropy(z, torch.tensor([2])), 2.062877, 1e-6)
    close(network(F_C, F_R, 1.0), [[2.1, 4.2, 6.3]], 1e-6)
    both = network(F_C, F_R, 0.5)  # what inference would give if an image had both features
    close(both, [[0.1, 5.2, -0.7]], 1e-6)


def test_inference_uses_both_branches_without_scaling():
    network, x = model_of().eval(), images()
    lower = network.trunk(x)
    features = torch.cat([network.cb_block(lower), network.rb_block(lower)], 1)
    torch.testing.assert_close(network(x), network.classifier(features))
    torch.testing.assert_close(network(x), network(x, x, 0.5))


def test_one_classifier_is_the_sum_of_two():
    network, x_c, x_r, a = model_of().eval(), images(3), images(3, seed=1), 0.3
    f_c, f_r = network.cb_block(network.trunk(x_c)), network.rb_block(network.trunk(x_r))
    w_c, w_r = network.classifier.weight.chunk(2, dim=1)
    z = 2 * (a * f_c @ w_c.T + (1 - a) * f_r @ w_r.T) + network.classifier.bias
    torch.testing.assert_close(network(x_c, x_r, a), z, rtol=0, atol=1e-5)


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
    with torch.device("meta"):
        network = model_of(arch, classes, shape=(3, size, size))
    assert count(network) == total
    assert count(network.cb_block) == count(network.rb_block) == {32: 73_984, 224: 4_462_592}[size]
    assert len(network.trunk[-1]) == {32: 4, 224: 2}[size]  # blocks left in the last stage
    names = {name.split(".")[0] for name, _ in network.named_parameters()}
    assert names == {"trunk", "cb_block", "rb_block", "classifier"}


def test_parameters_of_the_backbones():
    """What BBN adds to the plain backbone is one block."""
    for arch, alone, ours in (("resnet32", 463_504, 537_488), ("resnet50", 23_508_032, 27_970_624)):
        with torch.device("meta"):
            assert count(plain(arch, 10).backbone) == alone
            network = model_of(arch, 10)
        assert count(network) - count(network.classifier) == ours


def test_shapes():
    with torch.device("meta"):
        network, large = model_of("resnet32", 7), model_of("resnet50", 7, shape=(3, 224, 224))
        x, x_large = torch.empty(2, 3, 32, 32), torch.empty(2, 3, 224, 224)
    assert network.trunk(x).shape == (2, 64, 8, 8)
    assert network(x, x, 0.5).shape == (2, 7)
    assert large.trunk(x_large).shape == (2, 2048, 7, 7)


@pytest.mark.parametrize(
    "arch, shape", [("resnet8", (3, 24, 24)), ("resnet10", (3, 64, 64)), ("lenet", (1, 28, 28))]
)
def test_last_block_and_trunk_are_the_network(arch, shape):
    network, x = plain(arch, 4, shape=shape).eval(), 255 * torch.rand(2, *shape)
    trunk, block = models.split_last_block(network)
    torch.testing.assert_close(block(trunk(x)), network.features(x))
    assert model_of(arch, 4, shape=shape)(x).shape == (2, 4)


def test_initialisation():
    first, again, other = (model_of("resnet32", 10, seed) for seed in (3, 3, 4))
    assert all(a.equal(b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not first.classifier.weight.equal(other.classifier.weight)
    assert first.trunk[1].weight.equal(plain("resnet32", 10, 3).backbone[1].weight)  # after Normalize
    assert not first.cb_block[0].conv1.weight.equal(first.rb_block[0].conv1.weight)  # not copies in weight
    assert first.rb_block[0].conv1.weight.std().item() == pytest.approx((2 / 576) ** 0.5, rel=0.05)
    assert first.classifier.weight.abs().max() <= 128**-0.5 and first.classifier.weight.std() > 0.04


def test_two_trunk_passes_see_their_own_batch_statistics():
    network = model_of()
    network(images(), images(seed=1), 0.5)
    assert network.trunk[2].num_batches_tracked == 2
    assert network.cb_block[0].bn1.num_batches_tracked == network.rb_block[0].bn1.num_batches_tracked == 1


# The training step


class OneStep:
    """The part of a Run that train_one_epoch uses; keeps what it logs."""

    def __init__(self, seed=0):
        self.accelerator, self.logged = Accelerator(), []
        self.rng = np.random.default_rng(seed)

    def steps(self, loader):
        return loader

    def log(self, loss):
        self.logged.append(loss.item())


def step(model, natural, rebalanced, epoch=0, run=None, **options):
    """Loss of one training step of the model, whose gradients stay."""
    run = run or OneStep()
    args = parse("bbn.py", **options)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    bbn.train_one_epoch(run, model, [natural], [rebalanced], optimizer, epoch, args)
    return run.logged[-1]


@pytest.mark.parametrize(
    "alpha, y_c, y_r, expected", [(0.75, 2, 0, 2.487877), (1.0, 2, 0, 0.128791), (0.5, 1, 1, 0.008797)]
)
def test_loss(alpha, y_c, y_r, expected, monkeypatch):
    """At alpha 1/2 of z = [0.1, 5.2, -0.7]: log(1 + e^-5.1 + e^-5.9)."""
    monkeypatch.setattr(bbn, "alpha_at", lambda *_: alpha)
    loss = step(toy(), (F_C, torch.tensor([y_c])), (F_R, torch.tensor([y_r])))
    assert loss == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    "adaptor, epoch, silent, heard, half",
    [("parabolic", 0, "rb_block", "cb_block", 1), ("increment", 0, "cb_block", "rb_block", 0)],
)
def test_alpha_one_and_zero_silence_a_branch(adaptor, epoch, silent, heard, half):
    network, labels = model_of(), torch.tensor([0, 1, 2, 3])
    step(network, (images(), labels), (images(seed=1), labels), epoch, adaptor=adaptor)
    assert all(p.grad.eq(0).all() for p in getattr(network, silent).parameters())
    assert all(p.grad.ne(0).any() for p in getattr(network, heard).parameters())
    halves = network.classifier.weight.grad.chunk(2, dim=1)
    assert halves[half].eq(0).all() and halves[1 - half].ne(0).any()


def test_equal_batches_at_one_half_are_the_single_path_network():
    """With equal blocks: output and gradient of the network with one block and classifier W_c + W_r."""
    network, single = model_of(), plain()
    network.rb_block.load_state_dict(network.cb_block.state_dict())
    trunk, block = models.split_last_block(single)
    trunk.load_state_dict(network.trunk.state_dict())
    block.load_state_dict(network.cb_block.state_dict())
    w_c, w_r = network.classifier.weight.data.chunk(2, dim=1)
    single.classifier.weight.data = w_c + w_r
    single.classifier.bias.data = network.classifier.bias.data.clone()
    batch = images(6), torch.tensor([0, 1, 2, 3, 4, 0])
    loss = step(network, batch, batch, adaptor="equal")
    expected = F.cross_entropy(single(batch[0]), batch[1])
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    for ours, theirs in zip(network.trunk.parameters(), trunk.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    for c, r, theirs in zip(
        network.cb_block.parameters(), network.rb_block.parameters(), block.parameters(), strict=True
    ):
        torch.testing.assert_close(c.grad + r.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    for half in network.classifier.weight.grad.chunk(2, dim=1):
        torch.testing.assert_close(half, single.classifier.weight.grad, rtol=1e-4, atol=1e-6)


class Answer(nn.Module):
    """Answers everything with the same logits and keeps what it was asked."""

    def __init__(self, number=2):
        super().__init__()
        self.logits, self.asked = nn.Parameter(torch.tensor([[2.0, 1.0, 0.0]] * number)), []

    def forward(self, *asked):
        self.asked.append(asked)
        return self.logits


ZEROS, ONES = torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
EACH = [0.407606, 1.407606, 2.407606]  # cross-entropy of the logits 2, 1, 0 by label
NATURAL, REBALANCED = (ZEROS, torch.tensor([0, 1])), (ONES, torch.tensor([2, 0]))


def test_step():
    """Epoch 101 of 200, alpha 0.75: the natural batch first, its labels by alpha."""
    model = Answer()
    before = model.logits.detach().clone()
    loss = step(model, NATURAL, REBALANCED, epoch=100, epochs=200)
    ((first, second, alpha),) = model.asked
    assert first is ZEROS and second is ONES and alpha == 0.75
    assert loss == pytest.approx(0.75 * (EACH[0] + EACH[1]) / 2 + 0.25 * (EACH[2] + EACH[0]) / 2, abs=1e-6)
    assert not model.logits.equal(before)


def test_step_uses_alpha_epochs():
    model = Answer()
    step(model, NATURAL, REBALANCED, epoch=99, epochs=200, alpha_epochs=400)
    assert model.asked[0][2] == pytest.approx(1 - 99**2 / 400**2)


def test_step_with_beta(monkeypatch):
    """alpha ~ Beta(0.2, 0.2) of each batch weighs both the features and the labels."""
    run, model = OneStep(), Answer()
    run.rng = SimpleNamespace(beta=lambda a, b: {(0.2, 0.2): 0.9}[a, b])
    loss = step(model, NATURAL, REBALANCED, run=run, beta=0.2)
    assert model.asked[0][2] == 0.9
    assert loss == pytest.approx(0.9 * (EACH[0] + EACH[1]) / 2 + 0.1 * (EACH[2] + EACH[0]) / 2, abs=1e-6)


def test_beta_is_drawn_anew_by_batch():
    def asked(seed):
        model, run, args = Answer(), OneStep(seed), parse("bbn.py", beta=0.2)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        bbn.train_one_epoch(run, model, [NATURAL] * 3, [REBALANCED] * 3, optimizer, 0, args)
        return [alpha for *_, alpha in model.asked]

    first = asked(0)
    assert len(set(first)) == 3 and all(0 <= alpha <= 1 for alpha in first)
    assert first == asked(0) and first != asked(1)


# Manifold mixup of two samplers


def test_manifold_mixup_is_of_features():
    network, x, others = model_of(manifold=True).eval(), images(), images(seed=1)
    alone = network.network
    torch.testing.assert_close(network(x), alone(x))
    torch.testing.assert_close(network(x, others, 1.0), alone(x))
    torch.testing.assert_close(network(x, others, 0.0), alone(others))
    features = 0.3 * alone.features(x) + 0.7 * alone.features(others)
    torch.testing.assert_close(network(x, others, 0.3), alone.classifier(features), rtol=1e-4, atol=1e-5)
    assert all(a.equal(b) for a, b in zip(alone.parameters(), plain().parameters(), strict=True))


def test_loss_of_manifold_mixup():
    """lam = 0.75 ~ Beta(1, 1): cross-entropy of the mixed features with both labels."""
    network, single, run = model_of(manifold=True), plain(), OneStep()
    run.rng = SimpleNamespace(beta=lambda a, b: {(1.0, 1.0): 0.75}[a, b])
    x, others, labels, other_labels = (
        images(),
        images(seed=1),
        torch.tensor([0, 1, 2, 3]),
        torch.tensor([4] * 4),
    )
    loss = step(network, (x, labels), (others, other_labels), run=run, manifold=True, beta=1.0)
    features = 0.75 * single.features(x) + 0.25 * single.features(others)
    z = single.classifier(features)
    expected = 0.75 * F.cross_entropy(z, labels) + 0.25 * F.cross_entropy(z, other_labels)
    assert loss == pytest.approx(expected.item(), rel=1e-5)


# Schedule and recipes


def rates(epochs_from_1, **options):
    args = parse("bbn.py", **options)
    return [recipes.learning_rate(epoch - 1, args) for epoch in epochs_from_1]


def test_learning_rate():
    epochs = [1, 2, 3, 4, 5, 119, 120, 159, 160, 200]
    expected = [0.0466667, 0.06, 0.0733333, 0.0866667, 0.1, 0.1, 0.001, 0.001, 1e-5, 1e-5]
    close(rates(epochs, dataset="cifar10_lt"), expected, 1e-7)
    close(rates([1, 119, 120, 159, 160], dataset="inat2018"), [0.05, 0.05, 0.005, 0.005, 5e-4], 1e-9)
    once = rates([1, 59, 60, 79, 80], dataset="inat2017", epochs=90, lr_steps=(59, 79))
    close(once, [0.05, 0.05, 0.005, 0.005, 5e-4], 1e-9)
    close(rates([1, 46, 90], dataset="imagenet_lt"), [0.1, 0.05, 3.046e-5], 1e-7)


def test_learning_rate_of_the_baseline():
    expected = [0.02, 0.1, 0.1, 0.1, 1e-3, 1e-3, 1e-5]
    options = dict(manifold=True, warmup_from=0.0, lr_steps=(160, 180))  # as in docs/bbn.md
    close(rates([1, 5, 119, 160, 161, 180, 181], dataset="cifar100_lt", **options), expected, 1e-9)


def test_recipes_are_the_published_ones():
    def values(dataset):
        args = parse("bbn.py", dataset=dataset)
        names = "arch epochs batch_size lr lr_steps lr_factor wd warmup imbalance augment"
        return [getattr(args, name) for name in names.split()]

    cifar = ["resnet32", 200, 128, 0.1, (119, 159), 0.01, 2e-4, 5, 100, "weak"]
    assert values("cifar10_lt") == values("cifar100_lt") == cifar
    inat = ["resnet50", 180, 128, 0.05, (119, 159), 0.1, 1e-4, 0, None, "weak"]
    assert values("inat2017") == values("inat2018") == inat
    assert values("imagenet_lt") == ["resnet50", 90, 256, 0.1, (), 0.1, 5e-4, 0, None, "jitter"]
    assert parse("bbn.py", dataset="imagenet_lt").cosine
    assert parse("bbn.py", dataset="inat2018").splits == (100, 21)
    args = parse("bbn.py", dataset="cifar10_lt")
    assert (args.adaptor, args.q, args.beta, args.manifold) == ("parabolic", -1.0, 0.0, False)
    for steps, imbalance in ((96, 100), (109, 50), (159, 10)):
        assert sum(datasets.long_tail_counts(5000, 10, imbalance)) // 128 == steps


@pytest.mark.parametrize("dataset", bbn.RECIPES)
def test_short_runs_scale(dataset):
    args = parse("bbn.py", dataset=dataset, epochs=2)
    assert args.epochs == 2 and (args.alpha_epochs or 2) == 2 and max(args.lr_steps, default=0) <= 2


@pytest.mark.parametrize("nesterov", [False, True])
def test_optimiser(handed, nesterov):
    assert parse("bbn.py", dataset="cifar10_lt").nesterov and parse("bbn.py", dataset="inat2018").nesterov
    model, _, _, optimizer = handed(nesterov=nesterov, wd=2e-4, warmup=5, warmup_from=0.2)
    group = optimizer.param_groups[0]
    assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.9, 2e-4, nesterov)
    assert group["lr"] == pytest.approx(0.05 * 0.36)
    assert len(group["params"]) == len(list(model.parameters()))


# Runs


@pytest.mark.parametrize("options", [dict(beta=0.2, q=0.0, arch="lenet"), dict(manifold=True, beta=1.0)])
def test_runs(tmp_path, options):
    """And the network of the finished run is what was trained."""
    result = run_here("bbn.py", **{**TINY, "epochs": 1, "output_dir": tmp_path / "run", **options})
    (line,) = lines_of(tmp_path / "run")
    assert np.isfinite(line["loss"]) and 0 <= result["all"] <= 100
    network = models.load(tmp_path / "run")
    assert isinstance(network, bbn.ManifoldMixup if options.get("manifold") else bbn.BBN)
    assert network(255 * torch.rand(4, *network.images.shape)).shape == (4, 10)
