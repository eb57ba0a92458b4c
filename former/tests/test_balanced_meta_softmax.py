"""balanced_meta_softmax.py: loss, sampler, meta gradient, schedules, stages, against numbers worked out."""

import json

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

import balanced_meta_softmax as bms
import decoupled_crt
import meta_weights
from balanced_meta_softmax import Args
from common import cli, models
from tests import double_backward
from tests.conftest import TINY, close, kill_at, launch, lines_of, refusal, result_of, run_here, state_of

COUNTS = torch.tensor([100, 10, 1])
SHORT = dict(TINY, lr_steps=(), stage2_epochs=2, stage2_lr=0.05, meta_batch_size=40, bn_train_in_stage2=False)


def tiny(tmp_path, name="run", **options):
    return Args(**{**SHORT, "output_dir": str(tmp_path / name), **options})


class Points(torch.utils.data.Dataset):
    """What the sampler asks of a training set."""

    def __init__(self, counts):
        self.class_counts, self.workers = torch.tensor(counts), 0
        self.labels = torch.arange(len(counts)).repeat_interleave(self.class_counts)

    def __len__(self):
        return len(self.labels)


# Balanced Softmax


@pytest.mark.parametrize(
    "tau, expected",
    [
        (1.0, [0.037432, 3.340017, 6.642602]),
        (0.25, [0.222880, 1.798526, 3.374173]),
        (0.0, [0.407606, 1.407606, 2.407606]),
    ],
)
def test_balanced_softmax_loss(tau, expected):
    logits, labels = torch.tensor([[2.0, 1.0, 0.0]]).expand(3, -1), torch.arange(3)
    close(bms.balanced_softmax_loss(logits, labels, bms.log_prior(COUNTS, tau)), expected, 1e-6)
    shares = bms.balanced_softmax_loss(logits, labels, tau * (COUNTS / 111).log())
    close(shares, expected, 1e-6)  # only ratios of counts matter


def test_gradient_of_the_balanced_softmax():
    logits = torch.tensor([[2.0, 1.0, 0.0]], requires_grad=True)
    bms.balanced_softmax_loss(logits, torch.tensor([1]), bms.log_prior(COUNTS)).sum().backward()
    close(logits.grad, [[0.9633, 0.0354 - 1, 0.0013]])


def test_equal_counts_make_it_cross_entropy():
    logits, labels = torch.randn(8, 5), torch.randint(5, (8,))
    plain = F.cross_entropy(logits, labels, reduction="none")
    assert bms.balanced_softmax_loss(logits, labels, bms.log_prior(torch.tensor([7] * 5))).equal(plain)
    assert bms.balanced_softmax_loss(logits, labels, bms.log_prior(torch.arange(1, 6), 0.0)).equal(plain)


def test_class_without_images():
    with pytest.raises(ValueError, match="at least one image of every class"):
        bms.log_prior(torch.tensor([3, 0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_at_the_edges(dtype):
    """The prior is added in float32, whatever the logits."""
    few = torch.tensor([[1280, 600, 5]]).log().to(dtype)
    exact = F.cross_entropy(few.double() + torch.tensor([1280, 600, 5]).log(), torch.tensor([1]))
    found = bms.balanced_softmax_loss(few, torch.tensor([1]), bms.log_prior(torch.tensor([1280, 600, 5])))
    close(found[0], exact, 1e-6)
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]], dtype=dtype, requires_grad=True)
    losses = bms.balanced_softmax_loss(logits, torch.tensor([0, 0]), bms.log_prior(COUNTS))
    losses.sum().backward()
    assert losses.isfinite().all() and logits.grad.isfinite().all()


# The sampler


@pytest.mark.parametrize(
    "power, rates, law",
    [
        (0.0, [0.5, 0.5, 0.5], [0.9009, 0.0901, 0.0090]),
        (0.3, [0.2008, 0.4006, 0.7992], [0.8069, 0.1610, 0.0321]),
        (1.0, [0.0099, 0.0990, 0.9901], [1 / 3, 1 / 3, 1 / 3]),
    ],
)
def test_start_of_the_sampler(power, rates, law):
    s = bms.initial_psi(COUNTS, power).sigmoid()
    close(s, rates, 6e-5)
    close(bms.class_law(s, COUNTS), law, 6e-5)
    if power == 0:
        assert bms.initial_psi(COUNTS, 0.0).equal(torch.zeros(3))


def test_straight_through_among_images():
    """Labels 0, 0, 1, all rates 1/2."""
    psi, labels = torch.zeros(2, requires_grad=True), torch.tensor([0, 0, 1])
    noise = torch.tensor([[1.0, 0.0, 0.5]])
    log_weights = F.logsigmoid(psi)[labels]
    close((log_weights + noise).softmax(1), [[0.5065, 0.1863, 0.3072]], 6e-5)
    chosen, factors = bms.straight_through(log_weights, noise)
    assert chosen.tolist() == [0]
    close(factors, [1.0], 1e-6)
    (psi.grad,) = torch.autograd.grad(factors, psi, torch.tensor([-0.2]))
    close(psi.grad, [-0.015560, 0.015560], 2e-6)
    torch.optim.Adam([psi], 0.01).step()
    close(psi, [0.01, -0.01], 1e-6)


def test_straight_through_among_classes():
    psi = torch.zeros(2, requires_grad=True)
    chosen, factors = bms.straight_through(
        F.logsigmoid(psi) + torch.tensor([2, 1]).log(), torch.tensor([[1.2, 0.5]])
    )
    assert chosen.tolist() == [0]
    (gradient,) = torch.autograd.grad(factors, psi, torch.tensor([-0.2]))
    close(gradient, [-0.01593, 0.01593], 6e-6)


@pytest.mark.parametrize("level", ["class", "instance"])
def test_law_of_the_draws(level):
    """100,000 draws within 3 standard deviations, per class and evenly within a class."""
    data, size = Points([60, 12, 3]), 100_000
    sampler = bms.MetaSampler(data, level=level)
    with torch.no_grad():
        sampler.psi.copy_(torch.tensor([-0.5, 0.4, 1.5]))
        items, factors = sampler.draw(size, torch.Generator().manual_seed(0))
    law = bms.class_law(sampler(), data.class_counts).detach().double()
    drawn = data.labels[items[:, 0]].bincount(minlength=3) / size
    assert ((drawn - law).abs() < 3 * (law * (1 - law) / size).sqrt()).all()
    each = law[data.labels] / data.class_counts[data.labels]
    of_images = items[:, 0].bincount(minlength=75) / size
    assert ((of_images - each).abs() < 4 * (each * (1 - each) / size).sqrt()).all()
    assert items[:, 1].unique().numel() == size and items.min() >= 0
    close(factors, torch.ones(size), 1e-6)


@pytest.mark.parametrize("level", ["class", "instance"])
def test_processes_share_the_draws(level):
    sampler = bms.MetaSampler(Points([60, 12, 3]), level=level)
    whole, factors = sampler.draw(8, torch.Generator().manual_seed(1))
    for share in (slice(0, 4), slice(4, 8)):
        items, own = sampler.draw(8, torch.Generator().manual_seed(1), share)
        assert items.equal(whole[share]) and own.equal(factors[share])


def test_each_batch_goes_by_the_psi_of_its_moment():
    """Nothing is drawn ahead."""
    sampler = bms.MetaSampler(Points([50, 50]))
    sampler.fetch = lambda items: (items, sampler.labels[items[:, 0]])
    batches = sampler.batches([None] * 3, 0, Accelerator(), Args(batch_size=64))
    assert 10 < next(batches)[1].sum() < 54
    for psi, expected in (([-50.0, 50.0], 64), ([50.0, -50.0], 0)):
        with torch.no_grad():
            sampler.psi.copy_(torch.tensor(psi))
        assert next(batches)[1].sum() == expected
    assert next(batches, None) is None


def test_class_cycle():
    """Every batch has each class alike, to one image; lists are gone through before an image comes again."""
    data = Points([5, 3, 1, 4])
    drawn = bms.class_cycle(60 * 10, data.labels, data.class_counts, torch.Generator().manual_seed(0))
    for batch in data.labels[drawn].view(-1, 10):
        counts = batch.bincount(minlength=4)
        assert counts.min() >= 2 and counts.max() <= 4  # a batch cuts two rounds
    for of_round in data.labels[drawn].view(-1, 4):
        assert of_round.sort().values.tolist() == [0, 1, 2, 3]
    of_class_1 = drawn[data.labels[drawn] == 1]
    for again in of_class_1.view(-1, 3):
        assert again.sort().values.tolist() == [5, 6, 7]
    assert len(bms.class_cycle(3, data.labels, data.class_counts, torch.Generator())) == 3


# The meta gradient


def problem(dtype=torch.float64, momentum=True):
    """A classifier in the midst of its training, and batches of the features of a ResNet-8 with BatchNorm."""
    generator = torch.Generator().manual_seed(0)
    network = models.build("resnet8", 3, 0, (3, 16, 16)).to(dtype).requires_grad_(False)
    pairs = []
    for size in (24, 15):
        images = torch.randn(size, 3, 16, 16, generator=generator, dtype=dtype)
        pairs.append((network.features(images), torch.randint(3, (size,), generator=generator)))
    classifier = network.classifier.requires_grad_()
    optimizer = torch.optim.SGD(classifier.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    for _ in range(2 * momentum):
        optimizer.zero_grad()
        F.cross_entropy(classifier(pairs[0][0]), pairs[0][1]).backward()
        optimizer.step()
    return classifier, optimizer, *pairs, bms.log_prior(COUNTS)


def slow_gradient(classifier, optimizer, factors, batch, meta_batch, prior, of):
    """By double backward, through the drawing of the batch (factors), momentum and weight decay."""

    def loss(forward):
        return (factors * bms.balanced_softmax_loss(forward(batch[0]), batch[1], prior)).mean()

    buffers = [optimizer.state[p].get("momentum_buffer") for p in classifier.parameters()]
    return double_backward.through_step(
        classifier,
        loss,
        lambda forward: F.cross_entropy(forward(meta_batch[0]), meta_batch[1]),
        0.1,
        of,
        momentum=0.9,
        wd=5e-4,
        buffers=None if buffers[0] is None else buffers,
    )


def factors_of(kind, psi, labels):
    """Those of a batch that has been drawn by psi."""
    generator = torch.Generator().manual_seed(3)
    if kind == "reweighter":
        return psi.sigmoid()[labels]
    data, log_weights = Points([100, 10, 1]), F.logsigmoid(psi)
    log_weights = log_weights + data.class_counts.log() if kind == "class" else log_weights[data.labels]
    noise = torch.empty(len(labels), len(log_weights), dtype=psi.dtype).exponential_(generator=generator)
    noise = -noise.log()
    return bms.straight_through(log_weights, noise)[1]


@pytest.mark.parametrize("kind", ["class", "instance", "reweighter"])
@pytest.mark.parametrize("momentum", [True, False])
def test_gradient_is_that_of_a_double_backward_pass(kind, momentum):
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        classifier, optimizer, batch, meta_batch, prior = problem(dtype, momentum)
        psi = torch.tensor([-0.3, 0.2, 0.5], dtype=dtype, requires_grad=True)
        factors = factors_of(kind, psi, batch[1])
        arguments = classifier, optimizer, factors, batch, meta_batch, prior
        kept = list(classifier.parameters()), [p.grad for p in classifier.parameters()]
        gradients = bms.factor_gradients(Accelerator(), *arguments)
        (ours,) = torch.autograd.grad(factors, psi, gradients, retain_graph=True)
        slow = slow_gradient(*arguments, psi)
        assert ((ours - slow).norm() / slow.norm()).item() < tolerance and slow.norm() > 1e-6
        assert all(p.grad is None or p.grad is before for p, before in zip(*kept, strict=True))


def test_gradient_in_closed_form():
    """a_b = -(lr / B) r_b . (G_W h_b + G_b), r_b the residual of the Balanced Softmax; of psi by hand."""
    classifier, optimizer, batch, meta_batch, prior = problem()
    (features, labels), data = batch, Points([100, 10, 1])
    psi = torch.tensor([-0.3, 0.2, 0.5], dtype=torch.float64, requires_grad=True)
    factors = factors_of("instance", psi, labels)
    ours = bms.factor_gradients(Accelerator(), classifier, optimizer, factors, batch, meta_batch, prior)
    inner = bms.balanced_softmax_loss(classifier(features), labels, prior).mean()
    inner = torch.autograd.grad(inner, list(classifier.parameters()))
    ahead = bms.virtual_step(classifier, inner, optimizer)
    meta_loss = F.cross_entropy(F.linear(meta_batch[0], ahead["weight"], ahead["bias"]), meta_batch[1])
    of_weight, of_bias = torch.autograd.grad(meta_loss, list(ahead.values()))
    residual = (classifier(features) + prior).softmax(1) - F.one_hot(labels, 3)
    a = -0.1 / len(labels) * (residual * (features @ of_weight.T + of_bias)).sum(1)
    close(ours, a.detach(), 1e-15)
    # dL/dpsi_c = (1 - s_c) sum_b a_b soft_b ([y of the chosen = c] - P_bc), P_bc the soft mass of class c
    generator = torch.Generator().manual_seed(3)
    noise = -torch.empty(24, 111, dtype=torch.float64).exponential_(generator=generator).log()
    soft = (F.logsigmoid(psi)[data.labels] + noise).softmax(1)
    chosen = soft.argmax(1)
    mass = torch.stack([soft[:, data.labels == c].sum(1) for c in range(3)], 1)
    own = soft.gather(1, chosen[:, None])
    hand = (1 - psi.sigmoid()) * (a[:, None] * own * (F.one_hot(data.labels[chosen], 3) - mass)).sum(0)
    close(torch.autograd.grad(factors, psi, ours)[0], hand.detach(), 1e-15)


def test_virtual_step_is_the_optimizers(tmp_path):
    for momentum in (True, False):
        classifier, optimizer, batch, _, prior = problem(momentum=momentum)
        loss = bms.balanced_softmax_loss(classifier(batch[0]), batch[1], prior).mean()
        gradients = torch.autograd.grad(loss, list(classifier.parameters()))
        before = [p.detach().clone() for p in classifier.parameters()]
        ahead = bms.virtual_step(classifier, gradients, optimizer)
        assert all(p.equal(b) for p, b in zip(classifier.parameters(), before, strict=True))
        for p, gradient in zip(classifier.parameters(), gradients, strict=True):
            p.grad = gradient
        optimizer.step()
        for name, p in classifier.named_parameters():
            close(ahead[name], p.detach(), 1e-15)


def test_toy_problem_of_three_gaussians():
    """n = 1000, 100, 10: Balanced Softmax beats cross-entropy; the sampler learns to draw the tail more."""
    generator = torch.Generator().manual_seed(0)
    means = torch.tensor([[0.0, 0.0], [1.5, 0.0], [0.0, 1.5]])

    def points(counts):
        labels = torch.arange(3).repeat_interleave(torch.tensor(counts))
        return means[labels] + torch.randn(len(labels), 2, generator=generator), labels

    counts, (test_x, test_y) = torch.tensor([1000, 100, 10]), points([1000] * 3)
    x, y = points([1000, 100, 10])

    def train(loss, meta):
        torch.manual_seed(0)
        classifier, prior = nn.Linear(2, 3), bms.log_prior(counts, 1.0 if loss == "bs" else 0.0)
        optimizer = torch.optim.SGD(classifier.parameters(), 0.1, momentum=0.9)
        data = Points([1000, 100, 10])
        sampler, draws = bms.MetaSampler(data), torch.Generator().manual_seed(1)
        psi_optimizer = torch.optim.Adam(sampler.parameters(), 0.01)
        cycle = bms.class_cycle(300 * 60, y, counts, draws).view(300, 60)
        for step in range(300):
            items, factors = sampler.draw(64, draws)
            chosen = items[:, 0]
            if meta:
                batches = (x[chosen], y[chosen]), (x[cycle[step]], y[cycle[step]])
                a = bms.factor_gradients(Accelerator(), classifier, optimizer, factors, *batches, prior)
                (sampler.psi.grad,) = torch.autograd.grad(factors, sampler.psi, a)
                psi_optimizer.step()
            optimizer.zero_grad()
            bms.balanced_softmax_loss(classifier(x[chosen]), y[chosen], prior).mean().backward()
            optimizer.step()
        return (classifier(test_x).argmax(1) == test_y).float().mean().item(), sampler()

    (ce, _), (bs, _), (_, rates) = train("ce", False), train("bs", False), train("ce", True)
    assert bs > ce + 0.05
    assert rates[2] > rates[0] + 0.1 and rates[1] > rates[0]


# Schedules


def test_learning_rates():
    args = cli.build(Args, bms.RECIPES, dataset="cifar10_lt", imbalance=200.0)
    assert (args.epochs, args.warmup, args.stage2_epochs) == (591, 37, 96)
    close([bms.learning_rate(e - 1, args) for e in (1, 36, 37, 591)], [0.05, 0.098611, 0.1, 0.0], 5e-7)
    assert bms.learning_rate(590, args) == 0.0
    (_, one, first), (_, two, second) = bms.make_stages(args)
    assert (first, second) == (range(591), range(591, 687))
    close([bms.learning_rate(e - 1, two) for e in (1, 96)], [0.099973, 0.0], 5e-7)
    assert (one.loss, two.loss, one.sampling, two.sampling) == ("ce", "bs", "instance", "instance")


@pytest.mark.parametrize(
    "dataset, imbalance, epochs",
    [
        ("cifar10_lt", 200, (591, 37, 96, 91)),
        ("cifar10_lt", 100, (520, 32, 84, 80)),
        ("cifar10_lt", 10, (325, 20, 52, 50)),
        ("cifar100_lt", 200, (685, 43, 112, 106)),
        ("cifar100_lt", 100, (591, 37, 96, 91)),
        ("cifar100_lt", 10, (334, 21, 53, 52)),
    ],
)
def test_epochs_of_the_cifars(dataset, imbalance, epochs):
    def args(meta):
        return cli.build(Args, bms.RECIPES, dataset=dataset, imbalance=float(imbalance), meta=meta)

    own = args("sampler")
    assert (own.epochs, own.warmup, own.stage2_epochs, args("none").stage2_epochs) == epochs
    assert (own.batch_size, own.wd, own.auto_augment, own.cutout) == (512, 5e-4, True, 16)
    assert (own.psi_lr, own.init_power, own.meta_batch_size) == (0.01, 0.0, 512)


def test_recipes_of_the_large_sets():
    def values(dataset, *names, **given):
        args = cli.build(Args, bms.RECIPES, dataset=dataset, **given)
        return [getattr(args, name) for name in names]

    for dataset in ("imagenet_lt", "places_lt"):
        assert values(dataset, "wd", "color_jitter", "warmup", stage1="x") == [5e-4, 0.4, 0]
    assert values("imagenet_lt", "batch_size") == [512]
    names = "arch", "lr", "epochs", "stage2_lr", "stage2_epochs", "psi_lr", "init_power", "meta_batch_size"
    assert values("imagenet_lt", *names) == ["resnet10", 0.2, 90, 0.5, 20, 0.001, 0.1, 1024]
    assert values("imagenet_lt", *names[3:5], meta="none") == [0.4, 10]
    found = values("places_lt", "arch", "batch_size", *names[3:], stage1="x")
    assert found == ["resnet152", 256, 0.02, 10, 0.001, 0.3, 512]


# Stages


@pytest.fixture(scope="module")
def stage1(tmp_path_factory):
    """A finished stage 1."""
    folder = tmp_path_factory.mktemp("stage1")
    bms.main(tiny(folder, "joint", classifier="joint"))
    return folder / "joint"


@pytest.mark.parametrize("meta", ["sampler", "none"])
@pytest.mark.parametrize("bn", [True, False])
def test_stage_2_leaves_the_backbone(tmp_path, stage1, meta, bn):
    bms.main(tiny(tmp_path, stage1=str(stage1), meta=meta, bn_train_in_stage2=bn))
    before, after = state_of(stage1, 1), state_of(tmp_path / "run", 3)
    moved = {name for name in before if not before[name].equal(after[name])}
    statistics = {n for n in before if n.endswith(("running_mean", "running_var", "num_batches_tracked"))}
    assert moved == {"classifier.weight", "classifier.bias"} | (statistics if bn else set())


def test_statistics_move_three_times_a_step(tmp_path, stage1):
    """By the batch, by the class-balanced batch, and by the batch again; as in the released code."""
    bms.main(tiny(tmp_path, stage1=str(stage1), bn_train_in_stage2=True))
    name, steps = "backbone.1.num_batches_tracked", 1236 // 64
    assert state_of(tmp_path / "run", 3)[name] - state_of(stage1, 1)[name] == 3 * 2 * steps


def test_both_in_one_command_are_one_after_the_other(tmp_path, stage1):
    once = bms.main(tiny(tmp_path, "once"))
    apart = bms.main(tiny(tmp_path, "apart", stage1=str(stage1)))
    assert once["weights_sha256"] == apart["weights_sha256"]
    assert apart["stage1_args"]["classifier"] == "joint"


def test_stage_1_of_a_script_that_has_other_images(tmp_path, capsys):
    own = dict(TINY, method="plain", arch="lenet", lr=0.001, output_dir=str(tmp_path / "theirs"))
    meta_weights.main(meta_weights.Args(**own))
    capsys.readouterr()
    line = refusal(lambda: bms.main(tiny(tmp_path, arch="lenet", stage1=str(tmp_path / "theirs"))), capsys)
    assert line.endswith(
        "a run of meta_weights.py; use one of cmo.py, decoupled_crt.py, balanced_meta_softmax.py"
    )


def test_stage_1_of_another_script(tmp_path):
    """Its way of drawing is no choice here, its weight decay not that of stage 2."""
    own = dict(TINY, classifier="joint", sampling="square-root", wd=0.25, output_dir=str(tmp_path / "theirs"))
    decoupled_crt.main(decoupled_crt.Args(**{**own, "arch": "lenet", "lr": 0.001}))
    args = tiny(tmp_path, arch="lenet", stage1=str(tmp_path / "theirs"), wd=0.5, stage2_lr=0.001)
    result = bms.main(args)
    assert result["stage1_args"]["sampling"] == "square-root" and result["args"]["sampling"] == "instance"
    (group,) = state_of(tmp_path / "run", 3, of="optimizer")["param_groups"]
    assert group["weight_decay"] == 0.5


def test_without_a_meta_step_the_sampler_keeps_its_start(tmp_path, stage1):
    """p = 0 draws images evenly; other powers keep their own law."""
    for power in (0.0, 0.5):
        args = tiny(tmp_path, f"{power}", stage1=str(stage1), psi_lr=0.0, init_power=power)
        result = bms.main(args)
        weights = torch.tensor(result["class_counts"]).double() ** (1 - power)
        close(result["class_rates"], weights / weights.sum(), 1e-6)
    learned = bms.main(tiny(tmp_path, "learned", stage1=str(stage1)))
    assert learned["rates_variance"] > 0


def test_options_of_stage_2_are_not_judged_as_those_of_a_run():
    """tau is of stage 1's Balanced Softmax here, though stage 2 has none."""
    _, (_, two, epochs) = bms.make_stages(Args(loss="bs", tau=0.25, stage2_loss="ce", stage2_lr=0.3))
    assert (two.loss, two.lr, two.warmup, two.epochs, epochs) == ("ce", 0.3, 0, 10, range(10, 20))


def test_tau_zero_is_cross_entropy(tmp_path, stage1):
    options = dict(stage1=str(stage1), meta="none")
    zero = bms.main(tiny(tmp_path, "zero", tau=0.0, **options))
    ce = bms.main(tiny(tmp_path, "ce", stage2_loss="ce", **options))
    bs = bms.main(tiny(tmp_path, "bs", **options))
    assert zero["weights_sha256"] == ce["weights_sha256"] != bs["weights_sha256"]


def test_equal_counts_make_a_run_plain(tmp_path):
    options = dict(classifier="joint", imbalance=1.0, epochs=3, batch_size=500, arch="lenet", lr=0.001)
    ce, bs = (bms.main(tiny(tmp_path, loss, loss=loss, **options)) for loss in ("ce", "bs"))
    assert ce["weights_sha256"] == bs["weights_sha256"]
    losses = [line["loss"] for line in lines_of(tmp_path / "ce")]
    assert losses[1] < losses[0] - 0.01  # it was trained


def test_log(tmp_path, stage1):
    """The class law of every epoch, in the file and not on stdout."""
    result = bms.main(tiny(tmp_path, stage1=str(stage1)))
    for line in lines_of(tmp_path / "run"):
        assert len(line["class_rates"]) == 10 and sum(line["class_rates"]) == pytest.approx(1)
        assert 0 < line["rates_variance"] < 0.25
    assert result["class_rates"] == line["class_rates"]
    weights = bms.main(tiny(tmp_path, "mr", stage1=str(stage1), meta="reweighter"))["class_weights"]
    assert len(weights) == 10 and 0 < min(weights) <= max(weights) < 1


def test_what_is_of_every_class_is_not_printed(tmp_path, stage1, capsys):
    bms.main(tiny(tmp_path, stage1=str(stage1)))
    printed = json.loads(capsys.readouterr().out)
    assert "rates_variance" in printed and not {"class_rates", "class_counts", "per_class"} & printed.keys()


@pytest.mark.parametrize("options", [dict(sampling="class"), dict(stage2_sampling="class", meta="none")])
def test_class_balanced_sampling(tmp_path, monkeypatch, options):
    seen, make_sampler = [], bms.make_sampler

    def spy(dataset, sampling, *rest, **more):
        seen.append(sampling)
        return make_sampler(dataset, sampling, *rest, **more)

    monkeypatch.setattr(bms, "make_sampler", spy)
    bms.main(tiny(tmp_path, **options))
    expected = ["class", "instance", "class"] if "sampling" in options else ["instance", "class"]
    assert seen == expected  # the last but one and the meta batches of the first


@pytest.mark.slow  # test_two_processes_are_one has the first of them
@pytest.mark.parametrize("level", ["class", "instance"])
def test_two_processes_learn_the_same_sampler(tmp_path, level):
    """psi, and the classifier: draws, meta gradient and Adam's steps."""
    options = dict(SHORT, arch="lenet", lr=0.001, stage2_lr=0.01, batch_size=128, sampler_level=level)
    one = run_here("balanced_meta_softmax.py", **options, output_dir=tmp_path / "one")
    done = launch("balanced_meta_softmax.py", processes=2, **options, output_dir=tmp_path / "two")
    assert result_of(done)["num_processes"] == 2
    two = json.loads((tmp_path / "two" / "result.json").read_text())
    rates = [torch.tensor(result["class_rates"]) for result in (one, two)]
    assert ((rates[0] - rates[1]).norm() / rates[0].norm()).item() < 1e-5
    start = torch.tensor(one["class_counts"]) / sum(one["class_counts"])
    assert (rates[0] / start - 1).abs().max() > 0.01
    a, b = (state_of(tmp_path / name, 3) for name in ("one", "two"))
    for name in a:
        assert ((a[name] - b[name]).norm() / a[name].norm()).item() < 1e-5


@pytest.mark.parametrize("meta", ["sampler", pytest.param("reweighter", marks=pytest.mark.slow)])
def test_killed_in_stage_2(tmp_path, stage1, meta):
    """psi and its optimiser go on where they were."""
    options = dict(SHORT, stage1=str(stage1), meta=meta, stage2_epochs=3)
    unbroken = run_here("balanced_meta_softmax.py", **options, output_dir=tmp_path / "unbroken")
    broken = dict(options, output_dir=tmp_path / "broken")
    killed = launch("balanced_meta_softmax.py", env=kill_at(tmp_path, "3:5"), **broken)
    assert killed.returncode != 0 and len(lines_of(tmp_path / "broken")) == 1
    resumed = run_here("balanced_meta_softmax.py", **broken, resume="yes")
    name = "class_rates" if meta == "sampler" else "class_weights"
    assert resumed["weights_sha256"] == unbroken["weights_sha256"] and resumed[name] == unbroken[name]


def test_class_balanced_images_of_a_list(tmp_path, jpeg_lists, monkeypatch, capsys):
    """They are of the list, not augmented; the sampler's are training images."""
    seen, make_sampler = [], bms.make_sampler

    def spy(dataset, sampling, *rest, **more):
        seen.append((len(dataset), sampling, more.get("augment", True)))
        return make_sampler(dataset, sampling, *rest, **more)

    monkeypatch.setattr(bms, "make_sampler", spy)
    options = dict(jpeg_lists, meta_list=str(tmp_path / "dev.txt"), num_workers=0, meta_batch_size=6)
    bms.main(tiny(tmp_path, **{**options, "epochs": 2}))
    assert seen == [(60, "instance", True), (60, "instance", True), (6, "class", False)]
    lines = (tmp_path / "dev.txt").read_text()
    (tmp_path / "dev.txt").write_text(lines.replace("class 0/1.jpg", "class 0/2.jpg"))
    capsys.readouterr()
    with pytest.raises(SystemExit):
        bms.main(tiny(tmp_path, **{**options, "epochs": 2, "resume": "yes"}))
    assert (
        "has other development images or labels; give it its own" in capsys.readouterr().err.splitlines()[-1]
    )


def test_list_that_does_not_fit(tmp_path, jpeg_lists, capsys):
    (tmp_path / "dev.txt").write_text("test/class 0/0.jpg 0")
    for file, words in (
        ("dev.txt", "names no image of class 1; "),
        ("none.txt", "no such list file, nor in "),
    ):
        args = tiny(tmp_path, **{**jpeg_lists, "meta_list": str(tmp_path / file)})
        with pytest.raises(SystemExit):
            bms.main(args)
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith(f"--meta-list {tmp_path / file}: {words}")
    with pytest.raises(SystemExit):
        bms.main(tiny(tmp_path, meta_list="dev.txt"))
    assert "is for data sets of list files, not for --dataset synthetic" in capsys.readouterr().err


# What is refused


@pytest.mark.parametrize(
    "options, line",
    [
        (dict(lr_steps=(3,)), "--lr-steps 3: has no effect on a cosine schedule; leave it out"),
        (
            dict(classifier="joint", tau=0.25),
            "--tau 0.25: is of the Balanced Softmax, which is no loss here; add --loss bs",
        ),
        (dict(stage2_epochs=1), "--stage2-epochs 1: must be at least 2 (in the last one the rate is 0)"),
        (
            dict(epochs=1),
            "--epochs 1: the rate is 0 in the last epoch, so nothing would be trained; use more",
        ),
        (
            dict(meta="none", sampler_level="instance"),
            "--sampler-level instance: there is no Meta Sampler here; leave it out",
        ),
        (
            dict(classifier="joint", meta_list="x.txt"),
            "--meta-list x.txt: nothing is learned from it here; leave it out",
        ),
        (dict(warmup=10), "--warmup 10: not before the end of --epochs 10; lower it"),
        (
            dict(stage2_sampling="class"),
            "--stage2-sampling class: has no effect on --meta sampler; leave it out, or add --meta none",
        ),
        (
            dict(stage1="x", classifier="joint"),
            "--classifier joint: has no stage 2 to go on with from --stage1; use new",
        ),
        (
            dict(dataset="places_lt"),
            "--stage1: places_lt needs one, a run of decoupled_crt.py --classifier joint on it",
        ),
    ],
)
def test_options_that_do_not_fit(capsys, options, line):
    assert refusal(lambda: Args(**options), capsys) == line


@pytest.mark.slow
def test_meta_batch_that_the_processes_cannot_share(tmp_path):
    options = dict(SHORT, meta_batch_size=15, output_dir=tmp_path / "run")
    done = launch("balanced_meta_softmax.py", processes=2, **options)
    assert done.returncode != 0
    assert done.stderr.count("--meta-batch-size 15: not a multiple of 2 processes; use 14 or 16") == 1


@pytest.mark.parametrize("imbalance", ["0", "-1", "0.5", "nan", "inf"])
def test_imbalance_that_makes_no_sense(capsys, imbalance):
    """The recipe's epochs go by it; it is still refused in one line."""
    words = ["--dataset", "cifar10_lt", "--imbalance", imbalance]
    assert refusal(lambda: cli.parse(Args, bms.RECIPES, "", words), capsys).startswith("--imbalance ")
