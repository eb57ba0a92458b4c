"""meta_weights.py: weights, losses, gradients, data, parts, against numbers worked out beforehand."""

import copy
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

import meta_weights
from common import datasets, models
from common.cli import Refused
from common.runs import Run
from meta_weights import Args
from tests import double_backward
from tests.conftest import TINY, close, launch, lines_of, parse, result_of, run_here, state_of

COUNTS = torch.tensor([100.0, 10.0, 1.0])
# 3 steps an epoch on the synthetic set's 1,236 images. The development images draw from the generator of the
# augmentation, so that runs are compared without one.
SHORT = dict(TINY, arch="lenet", lr=0.001, batch_size=412, augment="none", dev_per_class=5)


# Class weights and losses


@pytest.mark.parametrize(
    "beta, expected", [(0.9999, [0.0272, 0.2704, 2.7025]), (0.9, [0.2393, 0.3674, 2.3932])]
)
def test_class_weights(beta, expected):
    weights = meta_weights.effective_weights(COUNTS, beta)
    close(weights, expected)
    close(weights.sum(), 3, 1e-6)


CIFAR10 = {  # head of 4990
    10: [0.2923, 0.3583, 0.4441, 0.5554, 0.6995, 0.8860, 1.1265, 1.4382, 1.8409, 2.3588],
    100: [0.0502, 0.0763, 0.1201, 0.1935, 0.3162, 0.5208, 0.8636, 1.4389, 2.3859, 4.0345],
    200: [0.0275, 0.0446, 0.0758, 0.1321, 0.2337, 0.4175, 0.7501, 1.3551, 2.4593, 4.5043],
}


@pytest.mark.parametrize("imbalance", CIFAR10)
def test_class_weights_of_cifar10(imbalance):
    counts = torch.tensor(datasets.long_tail_counts(4990, 10, imbalance))
    close(meta_weights.effective_weights(counts, 0.9999), CIFAR10[imbalance], 6e-5)


def test_class_weights_with_the_papers_beta():
    counts = torch.tensor(datasets.long_tail_counts(4990, 10, 10))
    expected = [0.2676, 0.3366, 0.4258, 0.5411, 0.6901, 0.8828, 1.1312, 1.4530, 1.8686, 2.4031]
    close(meta_weights.effective_weights(counts, 1 - 1 / int(counts.sum())), expected, 6e-5)


def test_class_weights_of_cifar100():
    counts = torch.tensor(datasets.long_tail_counts(490, 100, 100))
    close(meta_weights.effective_weights(counts)[[0, 49, 99]], [0.04422, 0.42394, 5.28710], 6e-6)


def test_equal_counts_weigh_nothing():
    assert meta_weights.effective_weights(torch.tensor([50] * 7)).equal(torch.ones(7))


def test_ldam():
    logits = 30 * torch.tensor([[0.5, 0.2, -0.1]]).expand(3, -1)
    losses = meta_weights.image_losses(logits, torch.arange(3), COUNTS, "ldam")
    close(losses, [0.014073, 17.435120, 33.000123], 1e-5)


def test_margins_of_ldam():
    """The loss of zero cosines is log(1 + 2 exp(30 * margin)): 30 * margin + log 2, nearly."""
    losses = meta_weights.image_losses(torch.zeros(3, 3), torch.arange(3), COUNTS, "ldam")
    margins = losses.exp().sub(1).div(2).log() / 30
    close(margins, [0.1581, 0.2812, 0.5])


def test_focal():
    p = torch.tensor(-1.2).exp()
    logits, labels = torch.stack([p, 1 - p]).log()[None], torch.tensor([0])
    close(meta_weights.image_losses(logits, labels, None, "focal"), [0.838567], 1e-5)
    plain = meta_weights.image_losses(logits, labels, None, "ce")
    assert meta_weights.image_losses(logits, labels, None, "focal", gamma=0.0).equal(plain)
    close(plain, [1.2], 1e-6)


@pytest.mark.parametrize("loss", ["ce", "focal", "ldam"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_at_the_edges(loss, dtype):
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]], dtype=dtype, requires_grad=True)
    losses = meta_weights.image_losses(logits, torch.tensor([0, 0]), COUNTS, loss, gamma=0.5)
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    assert losses.isfinite().all() and gradient.isfinite().all()


# The gradient by the weights


class Line(nn.Module):
    """theta x with theta = 0: the toy problem of one dimension."""

    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        return self.theta * x


TARGETS = torch.tensor([2.0, 2.0, 3.0], dtype=torch.float64)  # by label
TOY = torch.tensor([1.0, 2.0], dtype=torch.float64), torch.tensor([0, 1])
TOY_DEV = torch.tensor([1.0], dtype=torch.float64), torch.tensor([2])
TOY_W = torch.tensor([0.5, 1.5, 0.0], dtype=torch.float64)


def half_square(outputs, labels, **unused):
    return 0.5 * (outputs - TARGETS[labels]) ** 2


@pytest.mark.parametrize("lr, g", [(0.1, [-0.46, -0.92]), (0.05, [-0.265, -0.53])], ids=["sum", "mean"])
def test_toy_problem(lr, g):
    """lr 0.05 along the sum of two losses is 0.1 along their mean, as the paper has it."""
    gradients = meta_weights.weight_gradients(Accelerator(), Line(), TOY, TOY_DEV, lr, half_square, TOY_W[:2])
    close(gradients, g, 1e-12)


def test_toy_problem_of_l2rw():
    """At w = 0 the step ahead does not move: raw gradients -0.6 and -1.2, weights 1/3 and 2/3 times B."""
    w = torch.zeros(2, dtype=torch.float64)
    gradients = meta_weights.weight_gradients(Accelerator(), Line(), TOY, TOY_DEV, 0.1, half_square, w)
    close(gradients, [-0.6, -1.2], 1e-12)
    close(meta_weights.mean_one(Accelerator(), -gradients), [2 / 3, 4 / 3], 1e-12)


def test_mean_one_of_zeros():
    assert meta_weights.mean_one(Accelerator(), torch.zeros(3)).equal(torch.zeros(3))


def example(dtype=torch.float64, arch="resnet8", cosine=None, size=12):
    """(network, batch, development batch) of random images."""
    stand_in = SimpleNamespace(num_classes=3, shape=(3, 16, 16), statistics=((0.0,) * 3, (1 / 255,) * 3))
    network = models.build(arch, stand_in, 0, cosine=cosine).to(dtype)
    generator = torch.Generator().manual_seed(0)
    batches = []
    for n in (size, 9):
        images = torch.randn(n, 3, 16, 16, generator=generator, dtype=dtype)
        batches.append((images, torch.randint(3, (n,), generator=generator)))
    return network, *batches


def ours(network, batch, dev_batch, weights, lr, loss):
    return meta_weights.weight_gradients(Accelerator(), network, batch, dev_batch, lr, loss, weights)


def losses_of(name):
    return partial(meta_weights.image_losses, class_counts=COUNTS, loss=name)


@pytest.mark.parametrize("loss", ["ce", "focal", "ldam"])
def test_gradient_is_that_of_a_double_backward_pass(loss):
    """On a ResNet-8 with BatchNorm in training mode, in float64 and float32."""
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        network, batch, dev_batch = example(dtype, cosine=30.0 if loss == "ldam" else None)
        weights = torch.linspace(0.1, 2, len(batch[1]), dtype=dtype)
        g = ours(network, batch, dev_batch, weights, 1e-3, losses_of(loss))
        slow = double_backward.weight_gradients(
            network, batch, dev_batch, weights, 1e-3, losses_of(loss), losses_of(loss)
        )
        assert ((g - slow).norm() / slow.norm()).item() < tolerance


def test_gradient_is_the_inner_product():
    """g_i = -lr <grad l_i, v>, with the gradient of each image's loss worked out on its own."""
    network, batch, dev_batch = example(size=5)
    weights, lr, loss = torch.ones(5, dtype=torch.float64), 0.01, losses_of("ce")
    g = ours(network, batch, dev_batch, weights, lr, loss)
    parameters = list(network.parameters())
    own = [torch.autograd.grad(loss(network(batch[0]), batch[1])[i], parameters) for i in range(5)]
    with torch.no_grad():
        for p, *gradients in zip(parameters, *own, strict=True):
            p -= lr * sum(gradients)
    v = torch.autograd.grad(loss(network(dev_batch[0]), dev_batch[1]).mean(), parameters)
    products = [sum((a * b).sum() for a, b in zip(one, v, strict=True)) for one in own]
    close(g, -lr * torch.stack(products), 1e-12)


def test_gradient_of_a_linear_classifier():
    """<grad l_i, v> = (p_i - onehot_i) . (V_W h_i + V_b)."""
    torch.manual_seed(0)
    head, lr = nn.Linear(4, 3).double(), 0.1
    h, y = torch.randn(6, 4).double(), torch.randint(3, (6,))
    dev = torch.randn(5, 4).double(), torch.arange(5) % 3
    g = ours(head, (h, y), dev, torch.zeros(6).double(), lr, losses_of("ce"))
    v = torch.autograd.grad(F.cross_entropy(head(dev[0]), dev[1]), (head.weight, head.bias))
    residual = head(h).softmax(1) - F.one_hot(y, 3)
    close(g, -lr * (residual * (h @ v[0].T + v[1])).sum(1), 1e-12)


def test_gradient_of_a_frozen_backbone():
    """It is that of the classifier alone, on the features of the network in eval mode."""
    network, batch, dev_batch = example()
    network(batch[0])  # statistics other than 0 and 1
    network.eval().requires_grad_(False).classifier.requires_grad_(True)
    weights = torch.linspace(0.1, 2, 12, dtype=torch.float64)
    g = ours(network, batch, dev_batch, weights, 0.1, losses_of("ce"))
    features = [(network.features(images), labels) for images, labels in (batch, dev_batch)]
    close(g, ours(network.classifier, *features, weights, 0.1, losses_of("ce")), 1e-12)
    assert g.abs().max() > 1e-3


def test_statistics_move_in_the_real_pass_alone():
    network, batch, dev_batch = example()
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    ours(network, batch, dev_batch, torch.ones(12, dtype=torch.float64), 0.1, losses_of("ce"))
    assert all(buffer.equal(before[name]) for name, buffer in network.named_buffers())
    assert all(p.grad is None for p in network.parameters())


def test_step_of_the_weight_network():
    """Its gradient is that of the development loss, through the weights V(l) / sum V(l) of the step ahead."""
    network, batch, dev_batch = example()
    net = meta_weights.WeightNet(0, 1e-5).double()
    net.sgd = torch.optim.SGD(net.parameters(), 0.1)
    losses = losses_of("ce")(network(batch[0]), batch[1]).detach()
    assert net(losses).shape == losses.shape and 0 < net(losses).min() <= net(losses).max() < 1

    def loss(forward):
        v = net(losses)
        return (v / v.sum() * losses_of("ce")(forward(batch[0]), batch[1])).sum()

    def dev_loss(forward):
        return losses_of("ce")(forward(dev_batch[0]), dev_batch[1]).mean()

    weight = net[3].weight
    slow = double_backward.through_step(network, loss, dev_loss, 0.1, weight)
    before = weight.detach().clone()
    accelerator = Accelerator()
    gradients = partial(
        meta_weights.weight_gradients, accelerator, network, batch, dev_batch, 0.1, losses_of("ce")
    )
    meta_weights.mwnet_weights(accelerator, gradients, losses, net)
    close(weight.grad, slow, 1e-12)
    close(weight, before - 0.1 * slow, 1e-12)
    assert slow.abs().max() > 1e-3


def test_weight_network_in_a_step():
    """The step ahead has weights V(l) / sum V(l), the real one B times as much by the V that has learned."""
    net, losses, gradients, seen = (
        meta_weights.WeightNet(0, 0.5),
        torch.linspace(0.1, 3, 12),
        torch.linspace(-1, 1, 12),
        [],
    )

    def stub(weights):
        seen.append(weights)
        return gradients

    before = net(losses).detach()
    weights = meta_weights.mwnet_weights(Accelerator(), stub, losses, net)
    (ahead,) = seen
    after = net(losses).detach()
    close(ahead, before / before.sum(), 1e-6)
    close(weights, 12 * after / after.sum(), 1e-5)
    close(weights.mean(), 1, 1e-6)
    assert (after - before).abs().max() > 1e-3
    assert (after / after.sum() * gradients).sum() < (before / before.sum() * gradients).sum()  # downhill


def test_optimiser_of_the_weight_network():
    (group,) = meta_weights.WeightNet(0, 1e-5).sgd.param_groups
    found = [group[name] for name in ("lr", "momentum", "nesterov", "weight_decay")]
    assert found == [1e-5, 0.9, True, 5e-4]


# A step


def one_epoch(network, batch, dev_batch, method="meta", class_counts=COUNTS, lr=0.1, **options):
    """Facts and losses of train_one_epoch with one step, along the gradient itself."""
    logged = []
    run = SimpleNamespace(
        accelerator=Accelerator(),
        class_counts=class_counts,
        steps=lambda loader: loader,
        log=lambda loss: logged.append(loss.item()),
    )
    optimizer = torch.optim.SGD(network.parameters(), 1.0)
    args = Args(method=method, lr=lr, batch_size=len(batch[1]), **options)
    facts = meta_weights.train_one_epoch(
        run, network, copy.copy(network), optimizer, [batch], [dev_batch], None, method, 0, args
    )
    return facts, logged


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(meta_weights, "image_losses", half_square)
    monkeypatch.setattr(meta_weights, "effective_weights", lambda class_counts, beta: TOY_W)


@pytest.mark.parametrize("lr, eps, real", [(0.1, 0.0046, -3.523), (0.05, 0.00265, -3.51325)])
def test_toy_problem_in_a_step(toy, lr, eps, real):
    """Of the released sum and the paper's mean: eps, the weights, and the gradient of the real step."""
    network = Line()
    facts, _ = one_epoch(network, TOY, TOY_DEV, lr=lr)
    close(network.theta, -real, 1e-12)
    close(facts["class_eps"][:2], [eps, 2 * eps], 1e-12)
    close(facts["class_weights"][:2], [0.5 + eps, 1.5 + 2 * eps], 1e-12)
    assert facts["class_eps"][2] is None is facts["class_weights"][2]
    close(facts["largest_eps_over_w"], 2 * eps, 1e-12)
    close(facts["eps_over_w"], (eps / 0.5 + 2 * eps / 1.5) / 2, 1e-12)


def test_toy_problem_of_l2rw_in_a_step(toy):
    """Weights 2/3 and 4/3: the mean of their gradients -2 and -4, weighted."""
    network = Line()
    facts, _ = one_epoch(network, TOY, TOY_DEV, "l2rw")
    close(network.theta, (2 / 3 * 2 + 4 / 3 * 4) / 2, 1e-12)
    close(facts["class_weights"][:2], [2 / 3, 4 / 3], 1e-12)
    assert list(facts) == ["class_weights"]


def test_l2rw_clips(toy, monkeypatch):
    seen = []

    def stub(accelerator, network, batch, dev_batch, lr, loss, weights):
        seen.append(weights)
        return torch.tensor([-3.0, 1.0], dtype=torch.float64)

    monkeypatch.setattr(meta_weights, "weight_gradients", stub)
    facts, _ = one_epoch(Line(), TOY, TOY_DEV, "l2rw")
    close(facts["class_weights"][:2], [2, 0], 1e-12)
    assert not seen[0].any()


def test_class_weights_and_plain_training_of_the_toy_problem(toy):
    for method, real in (("cb", (0.5 * 2 + 1.5 * 4) / 2), ("plain", 3.0), ("finetune", 3.0)):
        network = Line()
        assert one_epoch(network, TOY, TOY_DEV, method)[0] == {}
        close(network.theta, real, 1e-12)


def test_without_a_meta_step_it_is_class_weighting():
    """Bit for bit; so the meta part leaves the statistics alone, too."""
    weights = {}
    for name, options in {"cb": dict(method="cb"), "off": dict(tau=0.0), "on": dict(tau=1.0)}.items():
        network, batch, dev_batch = example(torch.float32)
        facts, _ = one_epoch(network, batch, dev_batch, **options)
        weights[name] = network.state_dict()
        if name != "cb":
            assert (facts["largest_eps_over_w"] > 0) == (facts["eps_over_w"] > 0) == (name == "on")
    assert all(tensor.equal(weights["off"][name]) for name, tensor in weights["cb"].items())
    assert not weights["cb"]["classifier.weight"].equal(weights["on"]["classifier.weight"])
    assert weights["on"]["backbone.2.num_batches_tracked"] == 1


def test_equal_counts_make_class_weighting_plain():
    weights = {}
    for method in ("cb", "plain"):
        network, batch, dev_batch = example(torch.float32)
        one_epoch(network, batch, dev_batch, method, class_counts=torch.tensor([50, 50, 50]))
        weights[method] = network.state_dict()
    assert all(tensor.equal(weights["plain"][name]) for name, tensor in weights["cb"].items())


def test_development_images_have_the_loss_of_all():
    """LDAM's, margins and all: the step's eps is that of a double backward pass with it."""
    network, batch, dev_batch = example(torch.float32, cosine=3.0)
    prior = meta_weights.effective_weights(COUNTS)[batch[1]]
    facts, _ = one_epoch(copy.deepcopy(network), batch, dev_batch, loss="ldam", lr=1e-3)
    eps = {}
    for name in ("ldam", "ce"):
        slow = double_backward.weight_gradients(
            network, batch, dev_batch, prior, 1e-3, losses_of("ldam"), losses_of(name)
        )
        eps[name] = torch.tensor(meta_weights.class_means(-0.01 * slow, batch[1], 3))
    close(torch.tensor(facts["class_eps"]) / eps["ldam"], torch.ones(3), 1e-4)
    assert (eps["ce"] / eps["ldam"] - 1).abs().max() > 0.01


# Data


class Images:
    """What `load` asks of a data set."""

    workers = 0

    def __init__(self, labels, origin=None):
        self.labels, self.num_classes = torch.as_tensor(labels), int(max(labels)) + 1
        self.class_counts = self.labels.bincount(minlength=self.num_classes)
        self.origin = np.arange(len(labels)) if origin is None else origin

    def __len__(self):
        return len(self.labels)

    def subset(self, positions):
        return Images(self.labels[positions], self.origin[positions])


CUTS = {  # training images, class counts or the last of them
    ("cifar10_lt", 200): (11177, [4990, 2769, 1537, 853, 473, 262, 145, 80, 44, 24]),
    ("cifar10_lt", 100): (12380, [4990, 2991, 1793, 1075, 644, 386, 231, 138, 83, 49]),
    ("cifar10_lt", 50): (13967, [4990, 3230, 2091, 1354, 877, 567, 367, 238, 154, 99]),
    ("cifar10_lt", 20): (16989, [4990, 3577, 2564, 1838, 1317, 944, 677, 485, 348, 249]),
    ("cifar10_lt", 10): (20391, [4990, 3863, 2991, 2316, 1793, 1388, 1075, 832, 644, 499]),
    ("cifar100_lt", 200): (9304, [3, 2, 2, 2, 2]),
    ("cifar100_lt", 100): (10626, [5, 5, 5, 5, 4]),
    ("cifar100_lt", 50): (12354, []),
    ("cifar100_lt", 20): (15594, []),
    ("cifar100_lt", 10): (19183, [53, 52, 51, 50, 49]),
}


@pytest.mark.parametrize("dataset, imbalance", CUTS)
def test_cifar_development_images_are_set_aside_before_the_cut(monkeypatch, dataset, imbalance):
    num_classes = 10 if dataset == "cifar10_lt" else 100
    everything, seen = Images(np.repeat(np.arange(num_classes), 50000 // num_classes)), []
    monkeypatch.setattr(datasets, "load", lambda args: seen.append(args.imbalance) or (everything, None))
    args = parse("meta_weights.py", dataset=dataset, imbalance=imbalance)
    train, _, dev = meta_weights.load(args)
    size, counts = CUTS[dataset, imbalance]
    assert seen == [None] and len(train) == size
    assert train.class_counts.tolist()[num_classes - len(counts) :] == counts
    assert dev.class_counts.tolist() == [10] * num_classes
    assert len(np.intersect1d(train.origin, dev.origin)) == 0


def test_methods_without_development_images_train_on_the_same(monkeypatch):
    everything = Images(np.repeat(np.arange(10), 500))
    monkeypatch.setattr(datasets, "load", lambda args: (everything, None))
    options = dict(dataset="cifar10_lt", imbalance=10)
    train, _, _ = meta_weights.load(parse("meta_weights.py", **options))
    again, _, _ = meta_weights.load(parse("meta_weights.py", **options, method="cb"))
    assert (again.origin == train.origin).all()


def test_draws_of_the_released_seeds(monkeypatch):
    """The first of them, as drawn by the first version; all of them were compared."""
    everything = Images(np.repeat(np.arange(10), 5000))
    monkeypatch.setattr(datasets, "load", lambda args: (everything, None))
    train, _, dev = meta_weights.load(parse("meta_weights.py", dataset="cifar10_lt"))
    assert dev.origin[:4].tolist() == [2191, 529, 2541, 2416]
    assert train.origin[:4].tolist() == [1279, 4645, 3854, 1225]


def test_development_images_of_the_training_set(monkeypatch):
    everything = Images([0] * 9 + [1] * 3)
    monkeypatch.setattr(datasets, "load", lambda args: (everything, None))
    train, _, dev = meta_weights.load(Args(dev_per_class=3))
    assert train is everything and dev.class_counts.tolist() == [3, 3]
    assert len(meta_weights.load(Args(dev_per_class=3, method="cb"))) == 2


def test_too_many_development_images(monkeypatch):
    everything = Images([0] * 9 + [1] * 5)
    monkeypatch.setattr(datasets, "load", lambda args: (everything, None))
    with pytest.raises(Refused) as refused:
        meta_weights.load(Args(dev_per_class=6))
    assert str(refused.value) == "--dev-per-class 6: one class has 5 images; use less"


def test_development_images_apart_without_a_cut(monkeypatch):
    everything = Images([0] * 9 + [1] * 4)
    monkeypatch.setattr(datasets, "load", lambda args: (everything, None))
    train, _, dev = meta_weights.load(Args(dev_per_class=2, dev="apart", imbalance=None))
    assert train.class_counts.tolist() == [7, 2] and dev.class_counts.tolist() == [2, 2]


def test_development_images_of_a_list(tmp_path, jpeg_lists):
    options = dict(jpeg_lists, dev_list=str(tmp_path / "dev.txt"), dev_per_class=2)
    train, test, dev = meta_weights.load(parse("meta_weights.py", **options))
    assert dev.class_counts.tolist() == [2, 2, 2] and train.class_counts.tolist() == [20] * 3
    assert sorted(dev.images.tolist()) == [
        b"train/class %d/%d.jpg" % (k, i) for k in range(3) for i in range(2)
    ]
    assert dev.augmentation is train.augmentation is not None and len(test) == 9


def test_batches_of_development_images():
    """Without replacement in a batch; all of them in each where they fit."""
    data = Images(np.repeat(np.arange(3), 4))
    for size, steps in ((12, 5), (5, 7)):
        loader = meta_weights.make_dev_loader(data, steps, 1, Args(dev_batch_size=size))
        drawn = torch.tensor(list(loader.batch_sampler))
        assert drawn.shape == (steps, size)
        assert all(len(batch.unique()) == size for batch in drawn)
        assert len({tuple(batch) for batch in drawn.tolist()}) == steps


@pytest.mark.parametrize("images, processes, size", [(50, 1, 50), (50, 3, 48), (200, 3, 99), (200, 1, 100)])
def test_batch_that_fits(images, processes, size):
    args = Args(dev_batch_size=99 if processes == 3 else 100)
    loader = meta_weights.make_dev_loader(Images([0] * images), 2, processes, args)
    assert [len(batch) for batch in loader.batch_sampler] == [size, size]


def test_balanced_subset():
    data = Images([0] * 9 + [1] * 3)
    assert data.subset(meta_weights.per_class(data, 3)).class_counts.tolist() == [3, 3]


# Schedules and parts


def test_learning_rates():
    args = parse("meta_weights.py", dataset="cifar10_lt")
    rates = [meta_weights.recipes.learning_rate(e, args) for e in (0, 158, 159, 178, 179, 199)]
    close(rates, [0.1] * 2 + [1e-3] * 2 + [1e-5] * 2, 1e-12)
    inner = [meta_weights.inner_learning_rate(e, args) for e in (159, 160, 179, 180)]
    close(inner, [0.1, 1e-3, 1e-3, 1e-5], 1e-12)
    mean = parse("meta_weights.py", dataset="cifar10_lt", inner_scale=0.01)
    close(meta_weights.inner_learning_rate(160, mean), 1e-5, 1e-15)
    assert (args.epochs, args.pretrain_epochs, args.batch_size, args.wd) == (200, 160, 100, 5e-4)
    assert args.nesterov
    mwnet = parse("meta_weights.py", dataset="cifar10_lt", recipe="mwnet")
    assert (mwnet.method, mwnet.epochs, mwnet.pretrain_epochs) == ("mwnet", 100, 0)
    rates = [meta_weights.inner_learning_rate(e, mwnet) for e in (79, 80, 90)]
    close(rates, [0.1, 0.01, 0.001], 1e-12)


@pytest.fixture
def spied(monkeypatch):
    """(method, images by class, in training mode or not, weights) of each epoch; nothing is tested."""
    epochs, train = [], meta_weights.train_one_epoch

    def spy(run, model, network, optimizer, loader, dev_loader, weight_net, method, epoch, args):
        counts = loader.dataset.class_counts.tolist()
        facts = train(run, model, network, optimizer, loader, dev_loader, weight_net, method, epoch, args)
        weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        epochs.append((method, counts, model.training, weights))
        return facts

    monkeypatch.setattr(meta_weights, "train_one_epoch", spy)
    monkeypatch.setattr(meta_weights.evaluation, "per_split", lambda run, model, loader: {"all": 0.0})
    return epochs


def test_two_parts(tmp_path, monkeypatch):
    """Part 1 is plain training; in part 2 eps is logged; the step ahead has the rate of the epoch before."""
    rates, gradients = [], meta_weights.weight_gradients

    def spy(accelerator, network, batch, dev_batch, lr, loss, weights):
        rates.append(lr)
        return gradients(accelerator, network, batch, dev_batch, lr, loss, weights)

    monkeypatch.setattr(meta_weights, "weight_gradients", spy)
    options = dict(SHORT, epochs=4, lr_steps=(2,), lr_factor=0.1, wd=5e-4, nesterov=True)
    result = run_here("meta_weights.py", **options, pretrain_epochs=1, output_dir=tmp_path / "run")
    close(rates[::3], [0.001, 0.001, 0.0001], 1e-9)
    lines = lines_of(tmp_path / "run")
    close([line["lr"] for line in lines], [0.001] * 2 + [0.0001] * 2, 1e-9)
    assert "class_eps" not in lines[0] and len(lines) == 4
    prior = meta_weights.effective_weights(torch.tensor(result["class_counts"])).tolist()
    line = lines[1]
    seen = [k for k in range(10) if line["class_weights"][k] is not None]
    for k in seen:
        assert line["class_weights"][k] == pytest.approx(prior[k] + line["class_eps"][k], rel=1e-4)
        assert line["class_eps"][k] != 0
    assert len(seen) > 5 and 0 < line["eps_over_w"] < line["largest_eps_over_w"]
    (group,) = state_of(tmp_path / "run", "optimizer")["param_groups"]
    assert (group["nesterov"], group["momentum"], group["weight_decay"]) == (True, 0.9, 5e-4)

    plain = dict(options, epochs=1, lr_steps=(), method="plain", output_dir=tmp_path / "plain")
    run_here("meta_weights.py", **plain)
    assert lines_of(tmp_path / "plain")[0]["loss"] == lines[0]["loss"]


def test_frozen_backbone(tmp_path, spied):
    """In part 2 the classifier alone is trained, and BatchNorm's statistics stay."""
    options = dict(SHORT, arch="resnet8", batch_size=1236, lr=0.05, wd=5e-4, pretrain_epochs=1)
    run_here("meta_weights.py", **options, freeze_backbone=True, output_dir=tmp_path / "run")
    (first, _, *is_training, before), (second, _, *is_training_2, after) = spied
    assert (first, is_training, second, is_training_2) == ("plain", [True], "meta", [False])
    moved = {name for name in before if not before[name].equal(after[name])}
    assert moved == {"classifier.weight", "classifier.bias"}


def test_fine_tuning_sees_as_many_images_of_each_class(tmp_path, spied):
    options = dict(SHORT, method="finetune", pretrain_epochs=1, batch_size=50, output_dir=tmp_path / "run")
    run_here("meta_weights.py", **options)
    assert [call[0] for call in spied] == ["plain", "finetune"]
    assert max(spied[0][1]) == 500 and spied[1][1] == [5] * 10


@pytest.mark.slow
def test_momentum_goes_on_in_the_second_part(tmp_path):
    """With no weights learned and equal classes the two parts are one plain training."""
    options = dict(SHORT, imbalance=1.0, batch_size=500, lr_steps=(1,))
    parts = run_here("meta_weights.py", **options, tau=0.0, pretrain_epochs=1, output_dir=tmp_path / "parts")
    plain = run_here("meta_weights.py", **options, method="plain", output_dir=tmp_path / "plain")
    assert parts["weights_sha256"] == plain["weights_sha256"]


def test_short_runs_keep_an_epoch_of_the_method(spied, tmp_path):
    """160 epochs of 200 are 1 of 2; where all are asked for, one is left."""
    assert parse("meta_weights.py", dataset="cifar10_lt", epochs=2).pretrain_epochs == 1
    options = dict(SHORT, arch="lenet", epochs=1, lr_steps=(), pretrain_epochs=2, eval_every=5)
    run_here("meta_weights.py", **options, loss="ldam", output_dir=tmp_path / "run")
    assert [call[0] for call in spied] == ["meta"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["meta", "l2rw", "mwnet"])
def test_two_processes_learn_the_same_weights(tmp_path, method):
    """Of the images and of the network. Few steps at a low rate: this network amplifies rounding errors."""
    options = dict(SHORT, method=method, dev_batch_size=40, batch_size=256, pretrain_epochs=1)
    options |= dict(mwnet_lr=0.1) if method == "mwnet" else {}
    run_here("meta_weights.py", **options, output_dir=tmp_path / "one")
    done = launch("meta_weights.py", processes=2, **options, output_dir=tmp_path / "two")
    assert result_of(done)["num_processes"] == 2
    one, two = lines_of(tmp_path / "one")[-1], lines_of(tmp_path / "two")[-1]
    for name in ["class_weights"] + ["class_eps"] * (method == "meta"):
        a, b = (torch.tensor([value or 0.0 for value in line[name]]) for line in (one, two))
        assert ((a - b).norm() / a.norm()).item() < 1e-5
    a, b = (state_of(tmp_path / name) for name in ("one", "two"))
    for name in a:
        assert ((a[name] - b[name]).norm() / a[name].norm()).item() < 1e-5


@pytest.mark.slow
def test_weight_network_is_resumed(tmp_path, monkeypatch):
    """Stopped at the end of its second epoch; test_scripts.py does the same to the method itself."""
    options = dict(SHORT, method="mwnet", epochs=3, mwnet_lr=0.1)
    unbroken = run_here("meta_weights.py", **options, output_dir=tmp_path / "unbroken")
    end_epoch = Run.end_epoch

    def stop(self, epoch, accuracy, **facts):
        if epoch == 1:
            raise KeyboardInterrupt
        end_epoch(self, epoch, accuracy, **facts)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "end_epoch", stop)
        run_here("meta_weights.py", **options, output_dir=tmp_path / "broken")
    assert len(lines_of(tmp_path / "broken")) == 1
    resumed = run_here("meta_weights.py", **options, resume=True, output_dir=tmp_path / "broken")
    assert resumed["weights_sha256"] == unbroken["weights_sha256"]
    assert resumed["class_weights"] == unbroken["class_weights"]
