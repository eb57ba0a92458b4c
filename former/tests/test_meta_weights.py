"""meta_weights.py: weights, losses, gradients, data, stages, against numbers worked out beforehand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

import meta_weights
from common import cli, datasets, models
from meta_weights import Args
from tests import double_backward
from tests.conftest import TINY, close, kill_at, launch, lines_of, refusal, result_of, run_here, state_of

COUNTS = torch.tensor([100, 10, 1])
SHORT = dict(TINY, pretrain_epochs=1, dev_per_class=5)


def tiny(tmp_path, name="run", **options):
    return Args(**{**SHORT, "output_dir": str(tmp_path / name), **options})


# Class weights and losses


@pytest.mark.parametrize(
    "beta, expected", [(0.9999, [0.0272, 0.2704, 2.7025]), (0.9, [0.2393, 0.3674, 2.3932])]
)
def test_class_weights(beta, expected):
    weights = meta_weights.class_weights(COUNTS, beta)
    close(weights, expected)
    close(weights.sum(), 3, 1e-12)


CIFAR10 = {  # head of 4990
    10: [0.2923, 0.3583, 0.4441, 0.5554, 0.6995, 0.8860, 1.1265, 1.4382, 1.8409, 2.3588],
    100: [0.0502, 0.0763, 0.1201, 0.1935, 0.3162, 0.5208, 0.8636, 1.4389, 2.3859, 4.0345],
    200: [0.0275, 0.0446, 0.0758, 0.1321, 0.2337, 0.4175, 0.7501, 1.3551, 2.4593, 4.5043],
}


@pytest.mark.parametrize("imbalance", CIFAR10)
def test_class_weights_of_cifar10(imbalance):
    counts = torch.tensor(datasets.long_tail_counts(4990, 10, imbalance))
    close(meta_weights.class_weights(counts, 0.9999), CIFAR10[imbalance], 6e-5)


def test_class_weights_with_the_papers_beta():
    counts = torch.tensor(datasets.long_tail_counts(4990, 10, 10))
    expected = [0.2676, 0.3366, 0.4258, 0.5411, 0.6901, 0.8828, 1.1312, 1.4530, 1.8686, 2.4031]
    close(meta_weights.class_weights(counts, 1 - 1 / int(counts.sum())), expected, 6e-5)


def test_class_weights_of_cifar100():
    weights = meta_weights.class_weights(torch.tensor(datasets.long_tail_counts(490, 100, 100)), 0.9999)
    close(weights[[0, 49, 99]], [0.04422, 0.42394, 5.28710], 6e-6)


def test_equal_counts_weigh_nothing():
    assert meta_weights.class_weights(torch.tensor([50] * 7), 0.9999).equal(
        torch.ones(7, dtype=torch.float64)
    )


def test_ldam():
    margins = meta_weights.ldam_margins(COUNTS)
    close(margins, [0.1581, 0.2812, 0.5])
    logits = 30 * torch.tensor([[0.5, 0.2, -0.1]]).expand(3, -1)
    losses = meta_weights.image_losses(logits, torch.arange(3), margins, Args(loss="ldam"))
    close(losses, [0.014073, 17.435120, 33.000123], 1e-5)


def test_focal():
    args, p = Args(loss="focal"), torch.tensor(-1.2).exp()
    logits = torch.stack([p, 1 - p]).log()[None]
    close(meta_weights.image_losses(logits, torch.tensor([0]), None, args), [0.838567], 1e-5)
    args = Args(loss="focal", gamma=0.0)
    plain = meta_weights.image_losses(logits, torch.tensor([0]), None, Args())
    assert meta_weights.image_losses(logits, torch.tensor([0]), None, args).equal(plain)
    close(plain, [1.2], 1e-6)


@pytest.mark.parametrize("loss", ["ce", "focal", "ldam"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_at_the_edges(loss, dtype):
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]], dtype=dtype, requires_grad=True)
    args = Args(loss=loss, **({"gamma": 0.5} if loss == "focal" else {}))
    losses = meta_weights.image_losses(logits, torch.tensor([0, 0]), meta_weights.ldam_margins(COUNTS), args)
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    assert losses.isfinite().all() and gradient.isfinite().all()


# The meta gradient


class Line(nn.Module):
    """theta x with theta = 0: the toy problem of one dimension."""

    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        return self.theta * x


def half_square(outputs, targets):
    return 0.5 * (outputs - targets) ** 2


TOY = [torch.tensor(values, dtype=torch.float64) for values in ([1, 2], [2, 2])]
TOY_DEV = [torch.tensor([value], dtype=torch.float64) for value in (1, 3)]
TOY_W = torch.tensor([0.5, 1.5], dtype=torch.float64)


def toy_gradients(weigh, lr):
    module = Line()
    arguments = Accelerator(), module, Line(), TOY, TOY_DEV, weigh, lr, half_square, half_square
    return meta_weights.weight_gradients(*arguments)[0], module


@pytest.mark.parametrize(
    "lr, g, real", [(0.1, [-0.46, -0.92], -3.523), (0.05, [-0.265, -0.53], None)], ids=["sum", "mean"]
)
def test_toy_problem(lr, g, real):
    """lr 0.1 along the sum of two losses is 0.05 along their mean."""
    gradients, module = toy_gradients(lambda losses: TOY_W, lr)
    close(gradients, g, 1e-12)
    weights = TOY_W - 0.01 * gradients
    (gradient,) = torch.autograd.grad((weights * half_square(module(TOY[0]), TOY[1])).mean(), module.theta)
    if real:
        close(weights - TOY_W, [0.0046, 0.0092], 1e-12)
        close(gradient, real, 1e-12)


def test_toy_problem_with_the_mean_of_the_step_ahead():
    """The released sum and the paper's mean, through Weighting: eps and the gradient of the real step."""
    for reduction, real in (("sum", -3.523), ("mean", -3.51325)):
        weighting = object.__new__(meta_weights.Weighting)
        weighting.args = Args(inner_reduction=reduction)
        weighting.accelerator, weighting.prior = Accelerator(), TOY_W
        weighting.gradients = lambda batch, dev, weigh, lr: (toy_gradients(weigh, lr)[0], None)
        weighting.begin_epoch()
        weights = weighting.learn((TOY[0], torch.tensor([0, 1])), TOY_DEV, 0.1)
        module = Line()
        loss = (weights * half_square(module(TOY[0]), TOY[1])).mean()
        close(torch.autograd.grad(loss, module.theta)[0], real, 1e-9)


def test_toy_problem_of_l2rw():
    """At w = 0 the step ahead does not move: raw gradients -0.6 and -1.2, weights 1/3 and 2/3 times B."""
    gradients, _ = toy_gradients(torch.zeros_like, 0.1)
    close(gradients, [-0.6, -1.2], 1e-12)
    close(meta_weights.mean_one(Accelerator(), -gradients), [2 / 3, 4 / 3], 1e-12)


def test_mean_one_of_zeros():
    assert meta_weights.mean_one(Accelerator(), torch.zeros(3)).equal(torch.zeros(3))


def example(dtype=torch.float64, arch="resnet8", cosine=None, size=12):
    """(network, batch, development batch) of random images."""
    network = models.build(arch, 3, 0, (3, 16, 16), cosine=cosine).to(dtype)
    generator = torch.Generator().manual_seed(0)
    batches = []
    for n in (size, 9):
        images = torch.randn(n, 3, 16, 16, generator=generator, dtype=dtype)
        batches.append((images, torch.randint(3, (n,), generator=generator)))
    return network, *batches


def ours(network, batch, dev_batch, weights, lr, loss):
    import copy

    skeleton = copy.deepcopy(network).to("meta")
    arguments = Accelerator(), network, skeleton, batch, dev_batch, lambda losses: weights, lr, loss, loss
    return meta_weights.weight_gradients(*arguments)


def losses_of(name):
    args = Args(loss=name)
    return lambda z, y: meta_weights.image_losses(z, y, meta_weights.ldam_margins(COUNTS), args)


@pytest.mark.parametrize("loss", ["ce", "focal", "ldam"])
def test_gradient_is_that_of_a_double_backward_pass(loss):
    """On a ResNet-8 with BatchNorm in training mode, in float64 and float32."""
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        network, batch, dev_batch = example(dtype, cosine=30.0 if loss == "ldam" else None)
        weights = torch.linspace(0.1, 2, len(batch[1]), dtype=dtype)
        g, _ = ours(network, batch, dev_batch, weights, 1e-3, losses_of(loss))
        slow = double_backward.weight_gradients(
            network, batch, dev_batch, weights, 1e-3, losses_of(loss), losses_of(loss)
        )
        assert ((g - slow).norm() / slow.norm()).item() < tolerance


def test_gradient_is_the_inner_product():
    """g_i = -lr <grad l_i, v>, with the gradient of each image's loss worked out on its own."""
    network, batch, dev_batch = example(size=5)
    weights, lr, loss = torch.ones(5, dtype=torch.float64), 0.01, losses_of("ce")
    g, _ = ours(network, batch, dev_batch, weights, lr, loss)
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
    h, y, dev = (
        torch.randn(6, 4).double(),
        torch.randint(3, (6,)),
        (torch.randn(5, 4).double(), torch.arange(5) % 3),
    )
    g, _ = ours(head, (h, y), dev, torch.zeros(6).double(), lr, losses_of("ce"))
    v = torch.autograd.grad(F.cross_entropy(head(dev[0]), dev[1]), (head.weight, head.bias))
    residual = head(h).softmax(1) - F.one_hot(y, 3)
    close(g, -lr * (residual * (h @ v[0].T + v[1])).sum(1), 1e-12)


def test_statistics_move_in_the_real_pass_alone():
    network, batch, dev_batch = example()
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    ours(network, batch, dev_batch, torch.ones(12, dtype=torch.float64), 0.1, losses_of("ce"))
    assert all(buffer.equal(before[name]) for name, buffer in network.named_buffers())
    assert all(p.grad is None for p in network.parameters())


def test_step_of_the_weight_network():
    """Its gradient is that of the development loss, through the weights V(l) / sum V(l) of the step ahead."""
    network, batch, dev_batch = example()
    net = meta_weights.WeightNet(0).double()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    losses = losses_of("ce")(network(batch[0]), batch[1]).detach()
    weights = (net(losses) / net(losses).sum()).detach()
    assert weights.shape == losses.shape and 0 < net(losses).min() <= net(losses).max() < 1
    g, _ = ours(network, batch, dev_batch, weights, 0.1, losses_of("ce"))

    def loss(forward):
        v = net(losses)
        return (v / v.sum() * losses_of("ce")(forward(batch[0]), batch[1])).sum()

    def dev_loss(forward):
        return losses_of("ce")(forward(dev_batch[0]), dev_batch[1]).mean()

    slow = double_backward.through_step(network, loss, dev_loss, 0.1, net[2].weight)
    before = net[2].weight.detach().clone()
    meta_weights.step_weight_net(Accelerator(), net, optimizer, losses, g)
    close(net[2].weight.grad, slow, 1e-12)
    close(net[2].weight, before - 0.1 * slow, 1e-12)
    assert slow.abs().max() > 1e-3


# Data


class Images:
    """What `load` asks of a data set."""

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
    args = cli.build(Args, meta_weights.RECIPES, dataset=dataset, imbalance=float(imbalance))
    train, dev, _ = meta_weights.load(args)
    size, counts = CUTS[dataset, imbalance]
    assert seen == [1.0] and len(train) == size
    assert train.class_counts.tolist()[num_classes - len(counts) :] == counts
    assert dev.class_counts.tolist() == [10] * num_classes
    assert not set(train.origin) & set(dev.origin)
    again, _, _ = meta_weights.load(args)
    assert (again.origin == train.origin).all()


def test_development_images_of_the_training_set(monkeypatch):
    everything = Images([0] * 9 + [1] * 3)
    monkeypatch.setattr(datasets, "load", lambda args: (everything, None))
    train, dev, _ = meta_weights.load(Args(dev_per_class=3))
    assert train is everything and dev.class_counts.tolist() == [3, 3]
    assert meta_weights.load(Args(dev_per_class=3, method="cb"))[1] is None


def test_development_images_of_a_list(tmp_path, jpeg_lists):
    args = Args(**jpeg_lists, dev_list=str(tmp_path / "dev.txt"), dev_per_class=2)
    train, dev, test = meta_weights.load(args)
    assert dev.class_counts.tolist() == [2, 2, 2] and train.class_counts.tolist() == [20] * 3
    assert sorted(dev.paths.tolist()) == [
        b"train/class %d/%d.jpg" % (k, i) for k in range(3) for i in range(2)
    ]


def test_batches_of_development_images():
    """Without replacement in a batch; all of them in each where they fit."""
    data = Images(np.repeat(np.arange(3), 4))
    for size, steps in ((12, 5), (5, 7)):
        drawn = torch.tensor([i for i, _ in meta_weights.dev_sampler(data, size, steps, Args())]).view(
            steps, size
        )
        assert all(len(batch.unique()) == size for batch in drawn)
        assert len({tuple(batch) for batch in drawn.tolist()}) == steps


def test_development_images_are_augmented_as_training_images(monkeypatch, jpeg_lists, tmp_path):
    small = {**jpeg_lists, "image_size": 32, "auto_augment": True, "cutout": 8}
    args = Args(**small, dev_list=str(tmp_path / "dev.txt"), dev_per_class=2)
    _, dev, test = meta_weights.load(args)
    assert (dev.auto_augment, dev.cutout) == (True, 8) and len(test) == 9


@pytest.mark.parametrize("images, processes, size", [(50, 1, 50), (50, 3, 48), (200, 3, 99), (200, 1, 100)])
def test_batch_that_fits(images, processes, size):
    assert meta_weights.fitting(99 if processes == 3 else 100, [0] * images, processes) == size


def test_batch_that_does_not_fit(capsys):
    line = refusal(lambda: meta_weights.fitting(100, [0] * 3, 4), capsys)
    assert line == "3 class-balanced images are too few for 4 processes; use fewer"


def test_balanced_subset():
    assert meta_weights.balanced_subset(Images([0] * 9 + [1] * 3)).class_counts.tolist() == [3, 3]


# Schedules and stages


def test_learning_rates():
    args = cli.build(Args, meta_weights.RECIPES, dataset="cifar10_lt")
    close(
        [meta_weights.learning_rate(e, args) for e in (0, 158, 159, 178, 179, 199)],
        [0.1] * 2 + [1e-3] * 2 + [1e-5] * 2,
        1e-12,
    )
    close(
        [meta_weights.inner_learning_rate(e, args) for e in (159, 160, 179, 180)],
        [0.1, 1e-3, 1e-3, 1e-5],
        1e-12,
    )
    assert (args.epochs, args.pretrain_epochs, args.batch_size, args.wd) == (200, 160, 100, 5e-4)
    assert meta_weights.make_stages(args) == [(1, range(160)), (2, range(160, 200))]
    assert meta_weights.inner_learning_rate(170, Args(inner_lr=0.5)) == 0.5
    mwnet = cli.build(Args, meta_weights.RECIPES, dataset="cifar10_lt", method="mwnet")
    assert (mwnet.epochs, mwnet.lr_steps, mwnet.lr_factor, mwnet.pretrain_epochs) == (100, (80, 90), 0.1, 0)
    assert meta_weights.inner_learning_rate(80, mwnet) == meta_weights.learning_rate(80, mwnet)
    assert meta_weights.make_stages(mwnet) == [(2, range(100))]


@pytest.mark.parametrize("off", [dict(tau=0.0), pytest.param(dict(inner_lr=0.0), marks=pytest.mark.slow)])
def test_without_a_meta_step_it_is_class_weighting(tmp_path, off):
    """Bit for bit; so the meta part leaves the random numbers and the statistics alone, too."""
    once = dict(pretrain_epochs=0, epochs=1, lr_steps=())
    plain = meta_weights.main(tiny(tmp_path, "cb", method="cb", **once))
    meta = meta_weights.main(tiny(tmp_path, "meta", **once, **off))
    assert meta["weights_sha256"] == plain["weights_sha256"]
    assert meta["eps_over_w"] == 0 == meta["largest_eps_over_w"]
    other = meta_weights.main(tiny(tmp_path, "other", **once))
    assert other["weights_sha256"] != plain["weights_sha256"] and other["eps_over_w"] > 0


def test_equal_counts_make_class_weighting_plain(tmp_path):
    options = dict(imbalance=1.0, epochs=1, lr_steps=(), pretrain_epochs=0, batch_size=500)
    cb, plain = (meta_weights.main(tiny(tmp_path, m, method=m, **options)) for m in ("cb", "plain"))
    assert cb["weights_sha256"] == plain["weights_sha256"]


def test_pretraining_is_plain_training(tmp_path):
    meta_weights.main(tiny(tmp_path, "meta"))
    meta_weights.main(tiny(tmp_path, "plain", method="plain", pretrain_epochs=0))
    first, second = lines_of(tmp_path / "meta"), lines_of(tmp_path / "plain")
    assert first[0]["loss"] == second[0]["loss"] and first[1]["loss"] != second[1]["loss"]
    assert "class_eps" not in first[0] and "class_eps" not in second[1]


def test_momentum_goes_on_in_the_second_part(tmp_path):
    """With no weights learned and equal classes the two parts are one plain training."""
    options = dict(imbalance=1.0, batch_size=500, arch="lenet", lr=0.001)
    parts = meta_weights.main(tiny(tmp_path, "parts", tau=0.0, **options))
    plain = meta_weights.main(tiny(tmp_path, "plain", method="plain", pretrain_epochs=0, **options))
    assert parts["weights_sha256"] == plain["weights_sha256"]


@pytest.mark.parametrize("method", ["meta", "finetune"])
def test_frozen_backbone(tmp_path, method):
    args = tiny(tmp_path, method=method, freeze_backbone=True, epochs=3, pretrain_epochs=2)
    meta_weights.main(args)
    states = [state_of(tmp_path / "run", epoch) for epoch in (1, 2)]
    moved = {name for name in states[0] if not states[0][name].equal(states[1][name])}
    assert moved == {"classifier.weight", "classifier.bias"}


def test_fine_tuning_sees_as_many_images_of_each_class(tmp_path, monkeypatch):
    sizes, loader = [], meta_weights.DataLoader

    def spy(dataset, size, **options):
        sizes.append((dataset.class_counts.tolist(), size) if "sampler" in options else None)
        return loader(dataset, size, **options)

    monkeypatch.setattr(meta_weights, "DataLoader", spy)
    meta_weights.main(tiny(tmp_path, method="finetune"))
    test, (first, first_size), (second, second_size) = sizes
    assert max(first) == 500 and first_size == 64 and second == [5] * 10 and second_size == 50


def test_development_loss():
    """That of the images, margins and all, or plain cross-entropy of the same logits."""
    network, batch, dev_batch = example(torch.float32, cosine=30.0)
    found = {}
    for name in ("same", "ce"):
        args = Args(loss="ldam", meta_loss=name)
        weighting = meta_weights.Weighting(Accelerator(), network, COUNTS, args)
        found[name] = weighting.gradients(batch, dev_batch, torch.ones_like, 1e-3)[0]
        plain = lambda z, y: F.cross_entropy(z, y, reduction="none")  # noqa: E731
        dev_loss = plain if name == "ce" else losses_of("ldam")
        slow = double_backward.weight_gradients(
            network, batch, dev_batch, torch.ones(12), 1e-3, losses_of("ldam"), dev_loss
        )
        assert ((found[name] - slow).norm() / slow.norm()).item() < 1e-5
    assert ((found["same"] - found["ce"]).norm() / found["ce"].norm()).item() > 0.01


def test_weight_network_in_a_step():
    """The step ahead has weights V(l) / sum V(l), the real one B times as much by the V that has learned."""
    network, batch, dev_batch = example(torch.float32)
    weighting = meta_weights.Weighting(Accelerator(), network, COUNTS, Args(method="mwnet", mwnet_lr=0.5))
    weighting.begin_epoch()
    losses, seen, gradients = torch.linspace(0.1, 3, 12), [], torch.linspace(-1, 1, 12)

    def stub(batch, dev_batch, weigh, lr):
        seen.append((weigh(losses), lr))
        return gradients, losses

    weighting.gradients = stub
    before = weighting.net(losses).detach()
    weights = weighting.learn(batch, dev_batch, 0.1)
    ((ahead, lr),) = seen
    after = weighting.net(losses).detach()
    close(ahead, before / before.sum(), 1e-6)
    close(weights, 12 * after / after.sum(), 1e-5)
    close(weights.mean(), 1, 1e-6)
    assert lr == 0.1 and (after - before).abs().max() > 1e-3
    assert (after / after.sum() * gradients).sum() < (before / before.sum() * gradients).sum()  # downhill


def test_l2rw_in_a_step():
    network, batch, dev_batch = example(torch.float32)
    weighting = meta_weights.Weighting(Accelerator(), network, COUNTS, Args(method="l2rw"))
    weighting.begin_epoch()
    seen = []

    def stub(batch, dev_batch, weigh, lr):
        seen.append(weigh(torch.ones(12)))
        return torch.tensor([-3.0, 1.0] + [-1.0] + [2.0] * 9), None

    weighting.gradients = stub
    close(weighting.learn(batch, dev_batch, 0.1), [9.0, 0.0, 3.0] + [0.0] * 9, 1e-6)
    assert not seen[0].any()


def test_rate_of_the_step_ahead(tmp_path, monkeypatch):
    """It falls one epoch after that of the real step."""
    seen, learn = [], meta_weights.Weighting.learn

    def spy(self, batch, dev_batch, lr):
        seen.append(lr)
        return learn(self, batch, dev_batch, lr)

    monkeypatch.setattr(meta_weights.Weighting, "learn", spy)
    options = dict(arch="lenet", lr=0.001, batch_size=500, epochs=5, lr_steps=(2,), lr_factor=0.1)
    meta_weights.main(tiny(tmp_path, **options))
    close(seen[::2], [0.001, 0.001, 0.0001, 0.0001], 1e-9)
    close([line["lr"] for line in lines_of(tmp_path / "run")[1:]], [0.001] + [0.0001] * 3, 1e-9)


def test_optimiser_and_statistics(tmp_path):
    """Nesterov; the running statistics move once a step, whatever the meta gradient does."""
    meta_weights.main(tiny(tmp_path, batch_size=256, wd=5e-4))
    (group,) = state_of(tmp_path / "run", 1, of="optimizer")["param_groups"]
    assert (group["nesterov"], group["momentum"], group["weight_decay"]) == (True, 0.9, 5e-4)
    assert state_of(tmp_path / "run", 1)["backbone.1.num_batches_tracked"] == 2 * (1236 // 256)


@pytest.mark.parametrize("loss", ["focal", "ldam"])
def test_losses_run(tmp_path, loss, monkeypatch):
    scales, build = [], models.build

    def spy(*arguments, **options):
        network = build(*arguments, **options)
        scales.append(getattr(network.classifier, "scale", None))
        return network

    monkeypatch.setattr(models, "build", spy)
    assert meta_weights.main(tiny(tmp_path, loss=loss, arch="lenet", lr=0.001))["eps_over_w"] > 0
    assert scales == [30.0 if loss == "ldam" else None]


# What is logged


OTHERS_SLOW = ["meta", *(pytest.param(method, marks=pytest.mark.slow) for method in ("l2rw", "mwnet"))]


@pytest.mark.parametrize("method", OTHERS_SLOW)
def test_log(tmp_path, method):
    options = dict(method=method, pretrain_epochs=1 if method == "meta" else 0)
    result = meta_weights.main(tiny(tmp_path, **options))
    line = lines_of(tmp_path / "run")[-1]
    weights = line["class_weights"]
    assert len(weights) == 10 and line["epoch"] == 1 and result["class_weights"] == weights
    seen = [w for w in weights if w is not None]
    if method == "meta":
        prior = meta_weights.class_weights(torch.tensor(result["class_counts"]), 0.9999).tolist()
        found = [
            (w, p, e) for w, p, e in zip(weights, prior, line["class_eps"], strict=True) if w is not None
        ]
        for weight, p, eps in found:
            assert weight == pytest.approx(p + eps, rel=1e-4) and eps != 0
        assert 0 < line["eps_over_w"] < line["largest_eps_over_w"]
    else:
        assert min(seen) >= 0 and max(seen) > 0 and "class_eps" not in line


@pytest.mark.slow  # test_two_processes_are_one has the first of them
@pytest.mark.parametrize("method", ["meta", "l2rw", "mwnet"])
def test_two_processes_learn_the_same_weights(tmp_path, method):
    """Of the images and of the network. Few steps at a low rate: this network amplifies rounding errors."""
    options = dict(TINY, method=method, arch="lenet", lr=0.001, dev_batch_size=40, batch_size=256)
    options |= dict(mwnet_lr=0.1) if method == "mwnet" else {}
    options["pretrain_epochs"] = 1 if method == "meta" else 0
    run_here("meta_weights.py", **options, output_dir=tmp_path / "one")
    done = launch("meta_weights.py", processes=2, **options, output_dir=tmp_path / "two")
    assert result_of(done)["num_processes"] == 2
    one, two = lines_of(tmp_path / "one")[-1], lines_of(tmp_path / "two")[-1]
    for name in ["class_weights"] + ["class_eps"] * (method == "meta"):
        a, b = (torch.tensor([value or 0.0 for value in line[name]]) for line in (one, two))
        assert ((a - b).norm() / a.norm()).item() < 1e-5
    a, b = (state_of(tmp_path / name, 1) for name in ("one", "two"))
    for name in a:
        assert ((a[name] - b[name]).norm() / a[name].norm()).item() < 1e-5


def test_weight_network_is_resumed(tmp_path):
    """Killed in its third epoch; test_scripts.py does the same to the method itself."""
    options = dict(TINY, method="mwnet", epochs=4, mwnet_lr=0.1, arch="lenet", lr=0.001, dev_per_class=5)
    options["pretrain_epochs"] = 0
    unbroken = run_here("meta_weights.py", **options, output_dir=tmp_path / "unbroken")
    broken = dict(options, output_dir=tmp_path / "broken")
    killed = launch("meta_weights.py", env=kill_at(tmp_path, "2:5"), **broken)
    assert killed.returncode != 0 and len(lines_of(tmp_path / "broken")) == 2
    resumed = run_here("meta_weights.py", **broken, resume="yes")
    assert resumed["weights_sha256"] == unbroken["weights_sha256"]
    assert resumed["class_weights"] == unbroken["class_weights"]


# What is refused


@pytest.mark.parametrize(
    "options, line",
    [
        (dict(gamma=3.0), "--gamma 3.0: is for --loss focal; add that, or leave it out"),
        (dict(beta=1.0), "--beta 1.0: must be at most 0.9999999 (below 1)"),
        (dict(method="l2rw", tau=5.0), "--tau 5.0: is for --method meta; add that, or leave it out"),
        (
            dict(method="mwnet", inner_lr=0.0),
            "--inner-lr 0.0: is for --method meta; add that, or leave it out",
        ),
        (
            dict(method="cb", dev_list="x"),
            "--dev-list x: is for --method meta or l2rw or mwnet; add that, or leave it out",
        ),
        (
            dict(method="plain", freeze_backbone=True),
            "--freeze-backbone True: is for --method meta or finetune; add that, or leave it out",
        ),
        (
            dict(method="cb", pretrain_epochs=1),
            "--pretrain-epochs 1: is for --method meta or finetune; add that, or leave it out",
        ),
        (dict(pretrain_epochs=40), "--pretrain-epochs 40: not before the end of --epochs 40; lower it"),
        (
            dict(dev="apart", imbalance=None),
            "--dev apart: is for a set that is cut here, by --imbalance; use --dev train",
        ),
    ],
)
def test_options_that_do_not_fit(capsys, options, line):
    assert refusal(lambda: cli.build(Args, meta_weights.RECIPES, **options), capsys) == line


def test_too_many_development_images(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        meta_weights.main(tiny(tmp_path, dev_per_class=6))
    line = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2
    assert line == "--dev-per-class 6: the smallest class has 5 images; use less"
    assert not (tmp_path / "run").exists()
