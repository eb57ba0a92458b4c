"""balanced_meta_softmax.py: loss, sampler, meta gradient, schedules, stages, against numbers worked out."""

import gc
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

import balanced_meta_softmax as bms
from common import augment, datasets, models
from tests import double_backward
from tests.conftest import ROOT, close, forget, lines_of, parse, refusal, run_here, state_of

SCRIPT = "balanced_meta_softmax.py"
COUNTS = torch.tensor([100, 10, 1])
SMALL = [64, 16, 8]  # images of each class in the runs of this file
SHORT = dict(epochs=2, batch_size=16, lr=0.05, lr_steps=(), warmup=0, meta_batch_size=12, psi_lr=0.1)
SHORT |= dict(stage2_epochs=2, stage2_lr=0.05, splits=(50, 10))


def points(counts):
    """For each class the indices of its images, as the sampler takes them."""
    return torch.arange(sum(counts)).split(counts)


def balanced_softmax(counts, tau=1.0, loss="bs"):
    return partial(bms.image_losses, class_counts=counts, loss=loss, tau=tau)


# Balanced Softmax


@pytest.mark.parametrize(
    "tau, expected",
    [
        (1.0, [0.037432, 3.340017, 6.642602]),
        (0.25, [0.222880, 1.798526, 3.374173]),
        (0.0, [0.407606, 1.407606, 2.407606]),
    ],
)
def test_balanced_softmax(tau, expected):
    logits, labels = torch.tensor([[2.0, 1.0, 0.0]]).expand(3, -1), torch.arange(3)
    close(bms.image_losses(logits, labels, COUNTS, "bs", tau), expected, 1e-6)
    close(bms.image_losses(logits, labels, COUNTS / 111, "bs", tau), expected, 1e-6)  # only ratios matter
    plain = F.cross_entropy(logits, labels, reduction="none")
    assert bms.image_losses(logits, labels, COUNTS, "ce", tau).equal(plain)


def test_gradient_of_the_balanced_softmax():
    logits = torch.tensor([[2.0, 1.0, 0.0]], requires_grad=True)
    bms.image_losses(logits, torch.tensor([1]), COUNTS, "bs").sum().backward()
    close(logits.grad, [[0.9633, 0.0354 - 1, 0.0013]])


def test_equal_counts_make_it_cross_entropy():
    logits, labels = torch.randn(8, 5), torch.randint(5, (8,))
    plain = F.cross_entropy(logits, labels, reduction="none")
    assert bms.image_losses(logits, labels, torch.tensor([7] * 5), "bs").equal(plain)
    assert bms.image_losses(logits, labels, torch.arange(1, 6), "bs", 0.0).equal(plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_at_the_edges(dtype):
    """The prior is added in float32, whatever the logits."""
    counts = torch.tensor([1280, 600, 5])
    few = counts[None].log().to(dtype)
    exact = F.cross_entropy(few.double() + counts.log(), torch.tensor([1]))
    close(bms.image_losses(few, torch.tensor([1]), counts.float(), "bs")[0], exact, 1e-6)
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]], dtype=dtype, requires_grad=True)
    losses = bms.image_losses(logits, torch.tensor([0, 0]), COUNTS, "bs")
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


def test_draws_are_those_of_straight_through():
    """The same generator, with the sampler's own noise."""
    psi = torch.tensor([-0.5, 0.4, 1.5], requires_grad=True)
    indices, factors = bms.draw_images(psi, points([2, 1, 1]), 50, np.random.default_rng(0))
    noise = torch.from_numpy(np.random.default_rng(0).gumbel(size=(50, 3))).float()
    chosen, expected = bms.straight_through(F.logsigmoid(psi) + torch.tensor([2, 1, 1]).log(), noise)
    assert torch.tensor([0, 0, 1, 2])[indices].equal(chosen)
    weights = torch.rand(50)
    (ours,) = torch.autograd.grad(factors, psi, weights)
    close(ours, torch.autograd.grad(expected, psi, weights)[0], 1e-7)


def test_law_of_the_draws():
    """100,000 draws within 3 standard deviations, per class and evenly within a class."""
    counts, size = [60, 12, 3], 100_000
    psi, labels = torch.tensor([-0.5, 0.4, 1.5]), torch.arange(3).repeat_interleave(torch.tensor(counts))
    indices, factors = bms.draw_images(psi, points(counts), size, np.random.default_rng(0))
    law = bms.class_law(psi.sigmoid(), torch.tensor(counts)).double()
    drawn = labels[indices].bincount(minlength=3) / size
    assert ((drawn - law).abs() < 3 * (law * (1 - law) / size).sqrt()).all()
    each = law[labels] / torch.tensor(counts)[labels]
    of_images = indices.bincount(minlength=75) / size
    assert ((of_images - each).abs() < 4 * (each * (1 - each) / size).sqrt()).all()
    close(factors, torch.ones(size), 1e-6)


# The meta gradient


def problem(dtype=torch.float64, momentum=True):
    """A classifier in the midst of its training, and batches of the features of a ResNet-8 with BatchNorm."""
    generator = torch.Generator().manual_seed(0)
    dataset = SimpleNamespace(num_classes=3, shape=(3, 16, 16), statistics=((0.0,) * 3, (1 / 255,) * 3))
    network = models.build("resnet8", dataset, 0).to(dtype).requires_grad_(False)
    batches = []
    for size in (24, 15):
        images = torch.randn(size, 3, 16, 16, generator=generator, dtype=dtype)
        batches.append((network.features(images), torch.randint(3, (size,), generator=generator)))
    classifier = network.classifier.requires_grad_()
    optimizer = torch.optim.SGD(classifier.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    for _ in range(2 * momentum):
        optimizer.zero_grad()
        F.cross_entropy(classifier(batches[0][0]), batches[0][1]).backward()
        optimizer.step()
    return classifier, optimizer, *batches


def slow_gradient(classifier, optimizer, factors, batch, meta_batch, losses, of):
    """By double backward, through the drawing of the batch (factors), momentum and weight decay."""

    def loss(forward):
        return (factors * losses(forward(batch[0]), batch[1])).mean()

    buffers = [optimizer.state.get(p, {}).get("momentum_buffer") for p in classifier.parameters()]
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
    """Those of a batch that has been drawn by psi, among classes or among all 111 images; or weights."""
    generator = torch.Generator().manual_seed(3)
    if kind == "reweighter":
        return psi.sigmoid()[labels]
    log_weights = F.logsigmoid(psi)
    if kind == "class":
        log_weights = log_weights + COUNTS.log()
    else:
        log_weights = log_weights[torch.arange(3).repeat_interleave(COUNTS)]
    noise = torch.empty(len(labels), len(log_weights), dtype=psi.dtype).exponential_(generator=generator)
    return bms.straight_through(log_weights, -noise.log())[1]


@pytest.mark.parametrize("kind", ["class", "instance", "reweighter"])
@pytest.mark.parametrize("momentum", [True, False])
def test_gradient_is_that_of_a_double_backward_pass(kind, momentum):
    double, single = torch.float64, torch.float32
    for loss, dtype, tolerance in (("bs", double, 1e-10), ("bs", single, 1e-5), ("ce", double, 1e-10)):
        classifier, optimizer, batch, meta_batch = problem(dtype, momentum)
        psi = torch.tensor([-0.3, 0.2, 0.5], dtype=dtype, requires_grad=True)
        factors = factors_of(kind, psi, batch[1])
        arguments = classifier, optimizer, factors, batch, meta_batch, balanced_softmax(COUNTS, loss=loss)
        kept = list(classifier.parameters()), [p.grad for p in classifier.parameters()]
        gradients = bms.factor_gradients(Accelerator(), *arguments)
        assert not gradients.requires_grad
        (ours,) = torch.autograd.grad(factors, psi, gradients, retain_graph=True)
        slow = slow_gradient(*arguments, psi)
        assert ((ours - slow).norm() / slow.norm()).item() < tolerance and slow.norm() > 1e-6
        assert all(p.grad is None or p.grad is before for p, before in zip(*kept, strict=True))


def test_gradient_in_closed_form():
    """a_b = -(lr / B) r_b . (G_W h_b + G_b), r_b the residual of the Balanced Softmax; of psi by hand."""
    classifier, optimizer, batch, meta_batch = problem()
    features, labels = batch
    psi = torch.tensor([-0.3, 0.2, 0.5], dtype=torch.float64, requires_grad=True)
    factors, losses = factors_of("instance", psi, labels), balanced_softmax(COUNTS.double())
    ours = bms.factor_gradients(Accelerator(), classifier, optimizer, factors, batch, meta_batch, losses)
    inner = losses(classifier(features), labels).mean()
    inner = torch.autograd.grad(inner, list(classifier.parameters()))
    ahead = bms.virtual_step(list(classifier.parameters()), inner, optimizer)
    meta_loss = F.cross_entropy(F.linear(meta_batch[0], *ahead), meta_batch[1])
    of_weight, of_bias = torch.autograd.grad(meta_loss, ahead)
    prior = (COUNTS.double() / 100).log()
    residual = (classifier(features) + prior).softmax(1) - F.one_hot(labels, 3)
    a = -0.1 / len(labels) * (residual * (features @ of_weight.T + of_bias)).sum(1)
    close(ours, a.detach(), 1e-15)
    # dL/dpsi_c = (1 - s_c) sum_b a_b soft_b ([y of the chosen = c] - P_bc), P_bc the soft mass of class c
    generator, of_images = torch.Generator().manual_seed(3), torch.arange(3).repeat_interleave(COUNTS)
    noise = -torch.empty(24, 111, dtype=torch.float64).exponential_(generator=generator).log()
    soft = (F.logsigmoid(psi)[of_images] + noise).softmax(1)
    chosen = soft.argmax(1)
    mass = torch.stack([soft[:, of_images == c].sum(1) for c in range(3)], 1)
    own = soft.gather(1, chosen[:, None])
    hand = (1 - psi.sigmoid()) * (ours[:, None] * own * (F.one_hot(of_images[chosen], 3) - mass)).sum(0)
    close(torch.autograd.grad(factors, psi, ours)[0], hand.detach(), 1e-15)


@pytest.mark.parametrize("momentum", [True, False])
def test_virtual_step_is_the_optimizers(momentum):
    classifier, optimizer, batch, _ = problem(momentum=momentum)
    parameters = list(classifier.parameters())
    loss = balanced_softmax(COUNTS)(classifier(batch[0]), batch[1]).mean()
    gradients = torch.autograd.grad(loss, parameters)
    before = [p.detach().clone() for p in parameters]
    ahead = bms.virtual_step(parameters, gradients, optimizer)
    assert all(p.equal(b) for p, b in zip(parameters, before, strict=True))
    for p, gradient in zip(parameters, gradients, strict=True):
        p.grad = gradient
    optimizer.step()
    for value, p in zip(ahead, parameters, strict=True):
        close(value.detach(), p.detach(), 1e-15)


def test_toy_problem_of_three_gaussians():
    """n = 1000, 100, 10: Balanced Softmax beats cross-entropy; the sampler learns to draw the tail more."""
    generator = torch.Generator().manual_seed(0)
    means = torch.tensor([[0.0, 0.0], [1.5, 0.0], [0.0, 1.5]])

    def gaussians(counts):
        labels = torch.arange(3).repeat_interleave(torch.tensor(counts))
        return means[labels] + torch.randn(len(labels), 2, generator=generator), labels

    accelerator, counts, (test_x, test_y) = Accelerator(), [1000, 100, 10], gaussians([1000] * 3)
    x, y = gaussians(counts)

    def train(loss, meta):
        torch.manual_seed(0)
        classifier, losses = nn.Linear(2, 3), balanced_softmax(torch.tensor(counts), loss=loss)
        optimizer = torch.optim.SGD(classifier.parameters(), 0.1, momentum=0.9)
        psi, rng = nn.Parameter(torch.zeros(3)), np.random.default_rng(1)
        psi_optimizer = torch.optim.Adam([psi], 0.01)
        for _ in range(300):
            chosen, factors = bms.draw_images(psi, points(counts), 64, rng)
            if meta:
                meta_images = torch.cat(
                    [images[torch.randint(len(images), (20,))] for images in points(counts)]
                )
                batches = (x[chosen], y[chosen]), (x[meta_images], y[meta_images])
                a = bms.factor_gradients(accelerator, classifier, optimizer, factors, *batches, losses)
                (psi.grad,) = torch.autograd.grad(factors, psi, a)
                psi_optimizer.step()
            optimizer.zero_grad()
            losses(classifier(x[chosen]), y[chosen]).mean().backward()
            optimizer.step()
        return (classifier(test_x).argmax(1) == test_y).float().mean().item(), psi.detach().sigmoid()

    (ce, _), (bs, _), (_, rates) = train("ce", False), train("bs", False), train("ce", True)
    assert bs > ce + 0.05
    assert rates[2] > rates[0] + 0.1 and rates[1] > rates[0]


# Schedules and recipes

# Epochs, warm-up, epochs of stage 2 with the sampler and with nothing learned.
EPOCHS = {
    ("cifar10_lt", 200): (591, 37, 96, 91),
    ("cifar10_lt", 100): (520, 32, 84, 80),
    ("cifar10_lt", 10): (325, 20, 52, 50),
    ("cifar100_lt", 200): (685, 43, 112, 106),
    ("cifar100_lt", 100): (591, 37, 96, 91),
    ("cifar100_lt", 10): (334, 21, 53, 52),
}


def test_learning_rates():
    args = parse(SCRIPT, dataset="cifar10_lt", epochs=591, warmup=37, stage2_epochs=96)
    close([bms.learning_rate(e - 1, args) for e in (1, 36, 37, 591)], [0.05, 0.098611, 0.1, 0.0], 5e-7)
    assert bms.learning_rate(590, args) == 0.0
    close([bms.stage2_learning_rate(e - 1, args) for e in (1, 96)], [0.099973, 0.0], 5e-7)
    whole = parse(SCRIPT, dataset="cifar10_lt", epochs=3, warmup=5)  # warm-up to the end
    close([bms.learning_rate(e, whole) for e in range(3)], [0.05, 0.0625, 0.075], 1e-12)


@pytest.mark.parametrize("dataset, imbalance", EPOCHS)
def test_epochs_of_the_cifars(dataset, imbalance):
    """The released numbers of iterations, in epochs of the lengths of its loaders; in recipe and docs."""
    largest, classes = {"cifar10_lt": (5000, 10), "cifar100_lt": (500, 100)}[dataset]
    images = sum(datasets.long_tail_counts(largest, classes, imbalance))
    batches = math.ceil(images / 512), math.ceil(images / 512), images // 512, math.ceil(images / 512)
    epochs = EPOCHS[dataset, imbalance]
    found = [math.ceil(n / size) for n, size in zip((13000, 800, 2000, 2000), batches, strict=True)]
    assert tuple(found) == epochs
    if imbalance == 100:
        args = parse(SCRIPT, dataset=dataset)
        assert (args.epochs, args.warmup, args.stage2_epochs) == epochs[:3]
        assert (args.batch_size, args.wd, args.augment) == (512, 5e-4, "auto")
        assert (args.lr, args.stage2_lr) == (0.1, 0.1)
        assert (args.psi_lr, args.init_power, args.meta_batch_size) == (0.01, 0.0, 512)
        assert augment.cutout.__defaults__ == (16,)
    page = (ROOT / "docs" / "balanced_meta_softmax.md").read_text()
    assert f"| {dataset} | {imbalance} | {' | '.join(map(str, epochs))} |" in page


def test_recipes_of_the_large_sets():
    def values(dataset, *names):
        args = parse(SCRIPT, dataset=dataset)
        return [getattr(args, name) for name in names]

    for dataset in ("imagenet_lt", "places_lt"):
        assert values(dataset, "wd", "augment", "warmup", "imbalance") == [5e-4, "jitter", 0, None]
    assert values("imagenet_lt", "batch_size", "cosine", "stage1") == [512, True, None]
    names = "arch", "lr", "epochs", "stage2_lr", "stage2_epochs", "psi_lr", "init_power", "meta_batch_size"
    assert values("imagenet_lt", *names) == ["resnet10", 0.2, 90, 0.5, 20, 0.001, 0.1, 1024]
    found = values("places_lt", "arch", "batch_size", *names[3:], "stage1")
    assert found == ["resnet152", 256, 0.02, 10, 0.001, 0.3, 512, "runs/places"]


@pytest.mark.parametrize(
    "options, line",
    [
        (dict(stage1="x", classifier="joint"), "--classifier joint: trains nothing after --stage1; use new"),
        (dict(nesterov=True), "--nesterov: the step ahead of --meta goes without it; leave it out"),
        (
            dict(dataset="cifar10_lt", epochs=1),
            "--epochs 1: trains nothing, the cosine is 0 in the last epoch; use more",
        ),
        (dict(stage2_epochs=1), "--stage2-epochs 1: must be at least 2"),
    ],
)
def test_options_that_do_not_fit(options, line):
    assert refusal(parse, SCRIPT, **options) == line


# Stages


def image_set(counts, seed):
    labels = torch.arange(3).repeat_interleave(torch.tensor(counts))
    noise = torch.randint(128, (len(labels), 3, 12, 12), generator=torch.Generator().manual_seed(seed))
    images = (64 * labels[:, None, None, None] + noise).to(torch.uint8)
    return datasets.LabelledImages(images, labels, list("abc"), (3, 12, 12), ((0.5,) * 3, (0.25,) * 3))


@pytest.fixture(scope="module", autouse=True)
def small():
    """The synthetic set of this file has 88 noisy images of 3 classes, so that a run takes half a second."""
    loaded, load = (image_set(SMALL, 0), image_set([4] * 3, 1)), datasets.load
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load", lambda args: loaded if args.dataset == "synthetic" else load(args))
        yield


def run(folder, **options):
    forget()
    return run_here(SCRIPT, **{**SHORT, "output_dir": folder, **options})


@pytest.fixture(scope="module")
def stage1(tmp_path_factory, small):
    """A finished stage 1."""
    folder = tmp_path_factory.mktemp("stage1")
    run(folder, classifier="joint")
    return folder


@pytest.mark.parametrize("meta, bn", [("sampler", True), ("reweighter", False), ("none", True)])
def test_stage_2_leaves_the_backbone(tmp_path, stage1, capsys, meta, bn):
    """Its statistics move three times a step: the batch, the class-balanced one, and the batch again."""
    result = run(tmp_path, stage1=stage1, meta=meta, bn_train=bn)
    before, after = state_of(stage1), state_of(tmp_path)
    statistics = {n for n in before if n.endswith(("running_mean", "running_var", "num_batches_tracked"))}
    moved = {name for name in before if not before[name].equal(after[name])}
    assert moved == {"classifier.weight", "classifier.bias"} | (statistics if bn else set())
    times = after["backbone.2.num_batches_tracked"] - before["backbone.2.num_batches_tracked"]
    assert times == bn * 2 * (sum(SMALL) // 16) * (1 if meta == "none" else 3)
    # What is learned is in the log of every epoch, what is of every class not on stdout.
    lines, printed = lines_of(tmp_path), capsys.readouterr().out
    assert len(lines) == 2 and "class_" not in printed.replace("class_mean", "")
    for line in lines:
        assert {name for name in line if name.startswith("class_")} == {"class_mean", *LEARNED[meta]}
    if meta == "sampler":
        assert sum(line["class_rates"]) == pytest.approx(1) and '"rates_variance"' in printed
        assert 0 < line["rates_variance"] < 0.25 and result["class_rates"] == line["class_rates"]
    if meta == "reweighter":
        assert len(result["class_weights"]) == 3 and 0 < min(line["class_weights"])
        assert max(line["class_weights"]) < 1 and len(set(line["class_weights"])) == 3


LEARNED = {"sampler": ["class_rates"], "reweighter": ["class_weights"], "none": []}


def test_both_in_one_command_are_one_after_the_other(tmp_path, stage1):
    once = run(tmp_path / "once")
    apart = run(tmp_path / "apart", stage1=stage1)
    assert once["weights_sha256"] == apart["weights_sha256"]
    assert models.load(tmp_path / "once")(torch.zeros(2, 3, 12, 12)).shape == (2, 3)


@pytest.mark.parametrize("power", [0.0, 0.5])
def test_without_a_meta_step_the_sampler_keeps_its_start(tmp_path, stage1, power):
    """p = 0 draws images evenly; other powers keep their own law."""
    result = run(tmp_path, stage1=stage1, psi_lr=0.0, init_power=power)
    weights = torch.tensor(SMALL).double() ** (1 - power)
    close(result["class_rates"], weights / weights.sum(), 1e-6)


def test_tau_zero_is_cross_entropy(tmp_path, stage1):
    options = dict(stage1=stage1, meta="none")
    zero = run(tmp_path / "zero", tau=0.0, **options)
    ce = run(tmp_path / "ce", stage2_loss="ce", **options)
    bs = run(tmp_path / "bs", **options)
    assert zero["weights_sha256"] == ce["weights_sha256"] != bs["weights_sha256"]


def test_equal_counts_make_a_run_plain(tmp_path, monkeypatch):
    even = image_set([16] * 3, 0), image_set([4] * 3, 1)
    monkeypatch.setattr(datasets, "load", lambda args: even)
    ce, bs = (run(tmp_path / loss, loss=loss, classifier="joint") for loss in ("ce", "bs"))
    assert ce["weights_sha256"] == bs["weights_sha256"]
    losses = [line["loss"] for line in lines_of(tmp_path / "ce")]
    assert losses[1] < losses[0] - 0.01  # it was trained


@pytest.fixture
def batches(monkeypatch):
    """(labels, labels of the class-balanced images) of the meta steps of a run."""
    seen, gradients_of = [], bms.factor_gradients

    def spy(accelerator, classifier, optimizer, factors, batch, meta_batch, losses):
        seen.append((batch[1], meta_batch[1]))
        return gradients_of(accelerator, classifier, optimizer, factors, batch, meta_batch, losses)

    monkeypatch.setattr(bms, "factor_gradients", spy)
    return seen


def test_each_batch_goes_by_the_psi_of_its_moment(tmp_path, stage1, monkeypatch, batches):
    """Nothing is drawn ahead: what psi is in a step decides its batch. Meta batches have each class alike."""
    draw = bms.draw_images

    def draw_by_another(psi, images_of, size, rng):
        with torch.no_grad():
            psi.copy_(100.0 * F.one_hot(torch.tensor(len(batches) % 3), 3) - 50)
        return draw(psi, images_of, size, rng)

    monkeypatch.setattr(bms, "draw_images", draw_by_another)
    run(tmp_path, stage1=stage1)
    assert [labels.unique().tolist() for labels, _ in batches] == [[0], [1], [2]] * 3 + [[0]]
    assert all(labels.bincount().tolist() == [4, 4, 4] for _, labels in batches)


def test_many_class_balanced_images(tmp_path, stage1, batches):
    """Rounds over the classes begin anew where the images of an epoch are more than the set has."""
    run(tmp_path, stage1=stage1, meta_batch_size=30)
    for _, labels in batches:
        counts = labels.bincount(minlength=3)
        assert len(labels) == 30 and counts.max() - counts.min() <= 2


def test_class_balanced_sampling(tmp_path, stage1, monkeypatch):
    seen, train_one_epoch = [], bms.train_one_epoch

    def spy(run, model, loader, *rest):
        indices = list(loader.batch_sampler.sampler)  # those of the epoch
        counts = loader.dataset.labels[indices].bincount()
        seen.append((counts.max() - counts.min()).item() <= 1)
        train_one_epoch(run, model, loader, *rest)

    monkeypatch.setattr(bms, "train_one_epoch", spy)
    run(tmp_path / "both", sampling="class", meta="none")
    run(tmp_path / "second", stage1=stage1, meta="none", stage2_sampling="class")
    assert seen == [True, True, False, False, True, True]


class Stopped(Exception):
    pass


@pytest.mark.parametrize("meta", ["sampler", pytest.param("reweighter", marks=pytest.mark.slow)])
def test_resumed_in_either_stage(tmp_path, monkeypatch, meta):
    """Stopped in stage 1, between the stages and in stage 2. psi and its optimizer go on where they were."""
    unbroken = run(tmp_path / "unbroken", meta=meta)
    train_one_epoch = bms.train_one_epoch
    for done in (1, 2, 3):

        def stopping(run, *rest, done=done):
            if run.epoch == done:
                raise Stopped
            train_one_epoch(run, *rest)

        monkeypatch.setattr(bms, "train_one_epoch", stopping)
        with pytest.raises(Stopped):
            run(tmp_path / "broken", meta=meta, resume=True)
        gc.collect()  # with the lock of its folder
        assert len(lines_of(tmp_path / "broken")) == done
    monkeypatch.setattr(bms, "train_one_epoch", train_one_epoch)
    resumed = run(tmp_path / "broken", meta=meta, resume=True)
    (name,) = LEARNED[meta]
    assert resumed["weights_sha256"] == unbroken["weights_sha256"] and resumed[name] == unbroken[name]


# Images from files


def test_drawn_images_from_files(tmp_path, jpegs):
    """Read by loader processes, which have a part of a batch each: the same images."""
    files = {**jpegs, "arch": "lenet", "lr": 0.002, "stage2_lr": 0.01, "augment": "none", "epochs": 1}
    alone, shared = (run(tmp_path / f"{n}", **files, num_workers=n) for n in (0, 2))
    assert alone["weights_sha256"] == shared["weights_sha256"] and alone["rates_variance"] > 0


@pytest.mark.slow
def test_drawn_images_from_files_are_augmented_the_same_again(tmp_path, jpegs):
    files = {**jpegs, "arch": "lenet", "lr": 0.002, "stage2_lr": 0.01, "num_workers": 2}
    first, second = (run(tmp_path / name, **files) for name in "ab")
    plain = run(tmp_path / "plain", **{**files, "augment": "none"})
    assert first["weights_sha256"] == second["weights_sha256"] != plain["weights_sha256"]


def test_class_balanced_images_of_a_list(tmp_path, jpeg_lists, monkeypatch):
    """They are of the list, not augmented; the sampler's are training images."""
    seen, train_one_epoch = [], bms.train_one_epoch

    def spy(run, model, loader, meta_loader, *rest):
        seen.append(
            [(len(part), part.augmentation is None) for part in (loader.dataset, meta_loader.dataset)]
        )
        train_one_epoch(run, model, loader, meta_loader, *rest)

    monkeypatch.setattr(bms, "train_one_epoch", spy)
    own = dict(arch="lenet", lr=0.002, image_size=16, augment="weak", meta_list=tmp_path / "dev.txt")
    options = {**jpeg_lists, **own, "meta_batch_size": 6}
    run(tmp_path / "run", **options)
    assert seen == [[(60, False), (6, True)]] * 4
    lines = (tmp_path / "dev.txt").read_text()
    (tmp_path / "dev.txt").write_text(lines.replace("class 0/1.jpg", "class 0/2.jpg"))
    gc.collect()
    line = refusal(run, tmp_path / "run", **options, resume=True)
    assert line.startswith("--resume: ") and "has other images or labels" in line


def test_list_that_does_not_fit(tmp_path, jpeg_lists):
    (tmp_path / "dev.txt").write_text("test/class 0/0.jpg 0")
    for file, words in (("dev.txt", "names no image of class 1"), ("none.txt", "no such file, nor in ")):
        options = {**jpeg_lists, "meta_list": tmp_path / file, "output_dir": tmp_path / file[:3]}
        line = refusal(run_here, SCRIPT, **{**SHORT, **options})
        assert line.startswith(f"--meta-list {tmp_path / file}: {words}")
