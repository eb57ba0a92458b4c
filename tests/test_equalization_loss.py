"""equalization_loss.py: losses, weights and thresholds against numbers worked out beforehand, and limits."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator

import equalization_loss as eql
from common import datasets, recipes
from equalization_loss import Args
from tests.conftest import TINY, close, launch, lines_of, parse, refusal, result_of, run_here, state_of

SCRIPT = "equalization_loss.py"
Z, COUNTS = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([900, 90, 9])
RARE = torch.tensor([False, False, True])


def seql_at(label, draw, logits=Z, gamma=0.9):
    """(loss, gradient) of one image, with the same draw for all of its classes."""
    logits, labels = logits.clone().requires_grad_(), torch.tensor([label])
    drop = eql.dropped(labels, RARE, gamma, torch.full(logits.shape, draw))
    loss = eql.seql(logits, labels, drop)
    loss.sum().backward()
    return loss.detach(), logits.grad


# seql


def test_rare_classes():
    assert eql.rare_classes(COUNTS, 0.05).tolist() == [False, False, True]
    assert eql.rare_classes(torch.tensor([90, 10]), 0.1).tolist() == [False, False]  # strictly less


@pytest.mark.parametrize(
    "label, loss, gradient",
    [
        (0, 0.3132617, [-0.268941, 0.268941, 0]),
        (1, 1.3132617, [0.731059, -0.731059, 0]),
        (2, 2.4076060, [0.665241, 0.244728, -0.909969]),
    ],
)
def test_dropped_out(label, loss, gradient):
    actual, grad = seql_at(label, draw=0.0)
    close(actual, [loss], 1e-6)
    close(grad, [gradient], 1e-6)
    assert (grad[0, 2] == 0) == (label != 2)


@pytest.mark.parametrize("label, loss", [(0, 0.4076060), (1, 1.4076060), (2, 2.4076060)])
def test_not_dropped_out(label, loss):
    actual, grad = seql_at(label, draw=0.95)
    close(actual, [loss], 1e-6)
    close(grad, Z.softmax(1) - F.one_hot(torch.tensor([label]), 3), 1e-6)


def test_limits_of_seql():
    logits, labels = torch.randn(50, 3, generator=torch.manual_seed(0)), torch.arange(50) % 3
    draws = torch.rand(50, 3, generator=torch.manual_seed(1))
    plain = F.cross_entropy(logits, labels, reduction="none")
    for rare, gamma in ((RARE, 0.0), (eql.rare_classes(COUNTS, 0.0), 1.0)):
        assert torch.equal(eql.seql(logits, labels, eql.dropped(labels, rare, gamma, draws)), plain)
    everything = eql.dropped(labels, torch.ones(3, dtype=torch.bool), 1.0, draws)
    assert (eql.seql(logits, labels, everything) == 0).all()
    shifted = eql.seql(logits + 7, labels, eql.dropped(labels, RARE, 0.9, draws))
    close(shifted, eql.seql(logits, labels, eql.dropped(labels, RARE, 0.9, draws)), 1e-5)


@pytest.mark.parametrize("draw", [0.0, 0.95])
@pytest.mark.parametrize("label", [0, 1, 2])
def test_huge_logits(label, draw):
    loss, grad = seql_at(label, draw, logits=torch.tensor([[1e4, 0.0, -1e4]]))
    assert loss.isfinite().all() and grad.isfinite().all()


def test_numbers_of_the_bag_of_tricks():
    """z = [1, 2, 0.5], label 0, classes below 0.05 of the images always dropped."""
    logits = torch.tensor([[1.0, 2.0, 0.5]])
    close(seql_at(0, draw=0.0, logits=logits)[0], [1.313262], 1e-6)
    close(seql_at(0, draw=0.0, logits=logits, gamma=0.0)[0], [1.464369], 1e-6)


def test_expected_loss():
    labels = torch.zeros(100_000, dtype=torch.int64)
    draws = torch.rand(100_000, 3, generator=torch.manual_seed(0))
    losses = eql.seql(torch.zeros(100_000, 3), labels, eql.dropped(labels, RARE, 0.9, draws))
    close(losses.mean(), 0.9 * math.log(2) + 0.1 * math.log(3), 0.003)
    close(0.9 * math.log(2) + 0.1 * math.log(3), 0.733694, 1e-6)


@pytest.mark.parametrize(
    "largest, classes, imbalance, share, found",
    [
        (500, 100, 10, 3e-3, (8, 58, 2.20)),
        (500, 100, 100, 3e-3, (41, 32, 5.38)),
        (500, 100, 100, 5e-3, (52, 53, 9.68)),
        (500, 100, 50, 5e-3, (47, 61, 10.45)),
        (500, 100, 200, 5e-3, (56, 47, 8.83)),
        (5000, 10, 100, 3e-2, (4, 232, 4.06)),
        (5000, 10, 10, 3e-2, (1, 500, 2.45)),
        (5000, 10, 200, 5e-2, (6, 474, 9.23)),
    ],
)
def test_rare_classes_of_the_cifars(largest, classes, imbalance, share, found):
    counts = torch.tensor(datasets.long_tail_counts(largest, classes, imbalance))
    rare = eql.rare_classes(counts, share)
    assert (rare.sum().item(), counts[rare].max().item()) == found[:2]
    close(100 * counts[rare].sum() / counts.sum(), found[2], 0.005)


def test_share_for_a_tail_ratio():
    for imbalance in (10, 50, 100, 200):
        counts = torch.tensor(datasets.long_tail_counts(500, 100, imbalance))
        share = eql.share_for_tail_ratio(counts, 0.1)
        rare = eql.rare_classes(counts, share)
        one_more = eql.rare_classes(counts, math.nextafter(share, 1))
        assert counts[rare].sum() / counts.sum() <= 0.1 < counts[one_more].sum() / counts.sum()
    shares = eql.share_for_tail_ratio(torch.tensor([7, 2, 1]), 0.3)
    assert eql.rare_classes(torch.tensor([7, 2, 1]), shares).tolist() == [False, True, True]
    equal = torch.tensor([5, 5, 5])
    assert not eql.rare_classes(equal, eql.share_for_tail_ratio(equal, 0.5)).any()
    assert eql.share_for_tail_ratio(COUNTS, 1.0) == math.inf


# eqlv2


@pytest.mark.parametrize(
    "g, negative, positive",
    [
        (100, 1, 1),
        (1, 0.916827, 1.332691),
        (0.8, 0.5, 3),
        (0.5, 0.026597, 4.893612),
        (0.1, 0.000224817, 4.999101),
        (0, 6.7724e-5, 4.999729),
    ],
)
def test_weights_of_a_ratio(g, negative, positive):
    actual = eql.eqlv2_weights(torch.tensor([g], dtype=torch.float64))
    close(actual[0], [positive], 1e-5)
    close(actual[1], [negative], 1e-6)


def test_two_steps():
    logits, labels = torch.tensor([[0, 0, 0], [0, math.log(3), -math.log(3)]]), torch.tensor([0, 1])
    gradients, accelerator = eql.Gradients(3), Accelerator()
    losses, new = eql.eqlv2(logits, labels, *eql.eqlv2_weights(gradients.ratio()))
    close(losses.mean(), 1.6740)
    gradients.add(accelerator, new, labels)
    close(gradients.positive, [0.5, 0.25, 0], 1e-6)
    close(gradients.negative, [0.5, 0.5, 0.75], 1e-6)
    close(gradients.ratio(), [1, 0.5, 0], 1e-6)
    weights = eql.eqlv2_weights(gradients.ratio())
    close(weights[1], [0.91683, 0.026597, 6.77e-5], 1e-5)
    close(weights[0], [1.3327, 4.8936, 4.9997])
    again = eql.Gradients(3)
    again.load_state_dict(gradients.state_dict())
    for module in (gradients, again):
        close(eql.eqlv2(logits, labels, *eql.eqlv2_weights(module.ratio()))[0].mean(), 1.4928)


def test_the_gradients_are_those_of_autograd():
    logits = torch.randn(6, 4, generator=torch.manual_seed(0)).requires_grad_()
    labels, weights = torch.tensor([0, 1, 2, 3, 0, 0]), (torch.rand(4) + 1, torch.rand(4))
    losses, new = eql.eqlv2(logits, labels, *weights)
    (grad,) = torch.autograd.grad(losses.sum(), logits)
    close(new, grad.abs(), 1e-6)
    assert not new.requires_grad
    gradients, onehot = eql.Gradients(4), F.one_hot(labels, 4).bool()
    gradients.add(Accelerator(), new, labels)
    close(gradients.positive, (grad.abs() * onehot).sum(0), 1e-6)
    close(gradients.negative, (grad.abs() * ~onehot).sum(0), 1e-6)
    ones = torch.ones(4)
    plain = F.binary_cross_entropy_with_logits(logits, onehot.float(), reduction="none").sum(1)
    close(eql.eqlv2(logits, labels, ones, ones)[0].detach(), plain.detach(), 1e-6)
    losses, new = eql.softmax_eql(logits, labels, torch.rand(4).double())
    (grad,) = torch.autograd.grad(losses.sum(), logits)
    close(new, grad.abs(), 1e-6)
    assert not new.requires_grad


def test_biases_begin_at_one_of_k():
    stand_in = SimpleNamespace(num_classes=10, shape=(3, 16, 16), statistics=((0.5,) * 3, (0.25,) * 3))
    network = eql.make_model(stand_in, Args(loss="eqlv2"))
    close(network.classifier.bias.detach().sigmoid(), [0.1] * 10, 1e-6)
    plain = eql.make_model(stand_in, Args()).classifier.bias.detach()
    assert not plain.sigmoid().allclose(torch.tensor(0.1))


# softmax_eql


@pytest.mark.parametrize("label, loss", [(0, 0.0956995), (1, 2.4819939), (2, 4.8682882)])
def test_prior_of_gradients(label, loss):
    labels, prior = torch.tensor([label]), torch.tensor([4.0, 1, 0.25]).double()
    actual, new = eql.softmax_eql(Z, labels, prior)
    close(actual, [loss], 1e-6)
    gradients, expected = eql.Gradients(3), [0.0] * 3
    gradients.add(Accelerator(), new, labels)
    expected[label] = 1 - math.exp(-loss)
    close(gradients.positive, expected, 1e-6)
    shifted, _ = eql.softmax_eql(Z + 5, labels, prior)
    close(shifted, actual, 1e-5)


def test_without_gradients_it_is_cross_entropy():
    labels = torch.tensor([0, 1, 2])
    for given in (dict(positive=torch.zeros(3).double()), dict(positive=torch.rand(3).double(), tau=0.0)):
        losses, _ = eql.softmax_eql(Z.expand(3, 3), labels, **given)
        close(losses, [0.4076060, 1.4076060, 2.4076060], 1e-6)


@pytest.mark.parametrize("loss", ["seql", "eqlv2", "softmax_eql"])
def test_the_order_of_a_batch_does_not_matter(loss):
    logits, labels = torch.randn(6, 4, generator=torch.manual_seed(0)), torch.tensor([0, 1, 2, 3, 0, 0])
    order, drop = torch.tensor([3, 1, 5, 0, 2, 4]), torch.rand(6, 4) < 0.3
    drop &= ~F.one_hot(labels, 4).bool()
    g, weights = torch.tensor([3.0, 1, 0.2, 0]).double(), (torch.rand(4) + 1, torch.rand(4))
    call = dict(
        seql=lambda at: (eql.seql(logits[at], labels[at], drop[at]),),
        eqlv2=lambda at: eql.eqlv2(logits[at], labels[at], *weights),
        softmax_eql=lambda at: eql.softmax_eql(logits[at], labels[at], g),
    )[loss]
    (losses, *new), (permuted, *same) = call(torch.arange(6)), call(order)
    close(permuted, losses[order], 1e-6)
    for one, other in zip(new, same, strict=True):
        close(other, one[order], 1e-6)


def test_eqlv2_is_not_of_a_softmax():
    ones, label = torch.ones(3), torch.tensor([0])
    assert eql.eqlv2(Z, label, ones, ones)[0] != eql.eqlv2(Z + 1, label, ones, ones)[0]


# The training step


class Recorder(torch.nn.Module):
    """Answers every image with the same logits."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, images):
        return self.logits


class OneStep:
    """The part of a Run that train_one_epoch uses, for batches that are given."""

    def __init__(self):
        self.accelerator, self.rng, self.losses = Accelerator(), np.random.default_rng(0), []

    def steps(self, loader):
        return loader

    def log(self, loss):
        self.losses.append(loss.item())


def train(logits, labels, args, steps=1, rare=None):
    """(loss of each step, gradients) of a network that never changes."""
    model, run, gradients = Recorder(logits), OneStep(), eql.Gradients(logits.shape[1])
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    eql.train_one_epoch(run, model, [(None, labels)] * steps, optimizer, rare, gradients, args)
    return run.losses, gradients


def test_two_steps_of_training():
    """The weights of a step are of the ratio before it; check G of the specification."""
    logits, labels = torch.tensor([[0, 0, 0], [0, math.log(3), -math.log(3)]]), torch.tensor([0, 1])
    losses, gradients = train(logits, labels, Args(loss="eqlv2"), steps=2)
    close(losses, [1.6740, 1.4928])
    one, _ = train(logits, labels, Args(loss="eqlv2", slope=5.0, mu=0.5, alpha=1.0), steps=2)
    weights = eql.eqlv2_weights(torch.tensor([1.0, 0.5, 0.0]), 5.0, 0.5, 1.0)
    close(one[1], eql.eqlv2(logits, labels, *weights)[0].mean())


def test_a_step_has_the_prior_of_the_steps_before():
    losses, gradients = train(Z, torch.tensor([0]), Args(loss="softmax_eql", tau=0.5), steps=2)
    first = 1 - math.exp(-0.4076060)
    expected, second = eql.softmax_eql(Z, torch.tensor([0]), torch.tensor([first, 0, 0]).double(), 0.5)
    close(losses, [0.4076060, expected.item()], 1e-6)
    close(gradients.positive[0], first + second[0, 0].item(), 1e-6)


def test_rare_classes_drop_out_one_by_one():
    """Two of four classes rare: the mean over draws of each class of each image on its own."""
    logits, labels = torch.zeros(40_000, 4), torch.zeros(40_000, dtype=torch.int64)
    rare = torch.tensor([False, False, True, True])
    (loss,), _ = train(logits, labels, Args(gamma=0.9), rare=rare)
    close(loss, 0.81 * math.log(2) + 0.18 * math.log(3) + 0.01 * math.log(4), 0.003)
    (loss,), _ = train(logits, labels, Args(gamma=1.0), rare=rare)
    close(loss, math.log(2), 1e-6)


# Runs


def tiny(folder, name, **more):
    return run_here(SCRIPT, **{**TINY, "output_dir": folder / name, **more})


@pytest.mark.parametrize("loss", ["eqlv2", pytest.param("softmax_eql", marks=pytest.mark.slow)])
def test_what_is_learned_is_saved_logged_and_resumed(loss, tmp_path, monkeypatch):
    options = dict(loss=loss, arch="lenet")
    unbroken = tiny(tmp_path, "unbroken", **options)
    saved = state_of(tmp_path / "unbroken", "gradients")
    first, last = lines_of(tmp_path / "unbroken")
    assert saved["positive"].dtype == torch.float64 and (saved["positive"] > 0).all()
    assert (saved["positive"] > torch.tensor(first["class_positive_gradient"])).all()  # they add up
    close(last["class_positive_gradient"], saved["positive"])
    close(last["class_gradient_ratio"], saved["positive"] / (saved["negative"] + 1e-10))

    original = eql.train_one_epoch

    def dies_in_the_second(run, *rest):
        if run.epoch == 1:
            raise KeyboardInterrupt
        original(run, *rest)

    monkeypatch.setattr(eql, "train_one_epoch", dies_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        tiny(tmp_path, "broken", **options)
    monkeypatch.setattr(eql, "train_one_epoch", original)
    resumed = tiny(tmp_path, "broken", **options, resume=True)
    assert resumed["weights_sha256"] == unbroken["weights_sha256"]
    for name, value in state_of(tmp_path / "broken", "gradients").items():
        assert value.equal(saved[name])


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["seql", "eqlv2", "softmax_eql"])
def test_two_processes_have_the_same_gradients_and_drops(loss, tmp_path):
    exact = dict(TINY, epochs=1, lr_steps=(), arch="lenet", lr=0.002, augment="none", loss=loss)
    tiny(tmp_path, "one", **exact)  # rounding grows with the rate
    result_of(launch(SCRIPT, processes=2, **exact, output_dir=tmp_path / "two"))
    one, two = (state_of(tmp_path / name, "gradients") for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-6)
    one, two = (lines_of(tmp_path / name)[0]["loss"] for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-5)


# Recipes


def test_learning_rate():
    common = parse(SCRIPT, dataset="cifar100_lt")
    rates = [recipes.learning_rate(epoch, common) for epoch in (0, 4, 159, 160, 180)]
    assert rates == pytest.approx([0.02, 0.1, 0.1, 1e-3, 1e-5])
    paper = parse(SCRIPT, dataset="cifar100_lt", recipe="long")
    rates = [recipes.learning_rate(epoch, paper) for epoch in (0, 10, 172, 173, 259, 345)]
    assert rates == pytest.approx([0.1 + 0.1 / 11, 0.2, 0.2, 0.02, 0.002, 0.002])
    imagenet = parse(SCRIPT, dataset="imagenet_lt")
    assert [recipes.learning_rate(epoch, imagenet) for epoch in (0, 3)] == pytest.approx([0.175, 0.4])


def values(dataset, names, **given):
    args = parse(SCRIPT, dataset=dataset, **given)
    return [getattr(args, name) for name in names.split()]


def test_recipes():
    """Published values; those of the paper on CIFAR-100 are iterations: 12,800, falls at 6,400 and 9,600."""
    names = "arch epochs batch_size lr lr_steps lr_factor wd warmup warmup_from nesterov tail_share gamma"
    usual = ["resnet32", 200, 128, 0.1, (160, 180), 0.01, 2e-4, 5, 0, False]
    assert values("cifar100_lt", names) == [*usual, 0.005, 0.9]
    assert values("cifar10_lt", names) == [*usual, 0.03, 0.9]
    assert values("cifar100_lt", "augment") == ["weak"]
    steps = 9_502 // 256
    epochs, *falls = (round(n / steps) for n in (12_800, 6_400, 9_600))
    paper = ["resnet32", epochs, 256, 0.2, tuple(falls), 0.1, 1e-4, round(400 / steps), 0.5, True]
    assert values("cifar100_lt", names, recipe="long") == [*paper, 0.003, 0.95]
    assert values("cifar10_lt", names, recipe="long") == [*paper, 0.03, 0.9]
    assert values("cifar100_lt", "augment", recipe="long") == ["auto"]
    imagenet = ["resnet10", 106, 1024, 0.4, (30, 60, 90), 0.1, 1e-4, 4, 0.25, False, 4.3e-4, 0.9]
    assert values("imagenet_lt", names) == imagenet
    assert values("inat2018", "epochs batch_size augment splits") == [200, 512, "weak", (100, 21)]
    assert [Args().slope, Args().mu, Args().alpha, Args().tau, Args().tail_ratio] == [12, 0.8, 4, 1, 0.1]


def test_rare_classes_of_imagenet():
    counts = torch.tensor([115_846 - 99, 50, 49])
    assert eql.rare_classes(counts, 4.3e-4).tolist() == [False, False, True]


def test_optimiser(tmp_path, monkeypatch):
    seen = {}

    def spy(run, model, loader, optimizer, rare, gradients, args):
        seen.update(optimizer.param_groups[0], rare=rare)
        raise KeyboardInterrupt

    monkeypatch.setattr(eql, "train_one_epoch", spy)
    with pytest.raises(KeyboardInterrupt):
        tiny(tmp_path, "run", nesterov=True, wd=3e-4)
    assert (seen["momentum"], seen["weight_decay"], seen["nesterov"]) == (0.9, 3e-4, True)
    assert seen["rare"].tolist() == [False] * 5 + [True] * 5  # 87 of 1,236 images; with the next class 12 %


# What it does not depend on, and what is refused


def test_limits_of_training():
    """Where nothing drops out, and without the prior, the steps are those of cross-entropy."""
    logits = torch.randn(40, 10, generator=torch.manual_seed(0))
    labels, rare = torch.arange(40) % 10, torch.arange(10) > 6
    plain, gradients = train(logits.clone(), labels, Args(loss="ce"), steps=2)
    assert (gradients.positive == 0).all()
    assert train(logits.clone(), labels, Args(gamma=0.0), steps=2, rare=rare)[0] == plain
    assert train(logits.clone(), labels, Args(loss="softmax_eql", tau=0.0), steps=2)[0] == plain
    assert train(logits.clone(), labels, Args(), steps=2, rare=rare)[0] != plain


def test_cross_entropy_is_that_of_cmo(tmp_path):
    short = dict(TINY, epochs=1, lr_steps=(), arch="lenet")
    plain = run_here("cmo.py", **short, output_dir=tmp_path / "cmo", p_mix=0.0)["weights_sha256"]
    result = run_here(SCRIPT, **short, output_dir=tmp_path / "ce", loss="ce")
    assert result["weights_sha256"] == plain


@pytest.mark.parametrize(
    "given, line",
    [
        (dict(tail_share=1e-6), "--tail-share 1e-06, --tail-ratio 0.1: 0 of 3 classes are rare; change one"),
        (dict(tail_share=1.0), "--tail-share 1, --tail-ratio 0.1: 3 of 3 classes are rare; change one"),
        (dict(tail_ratio=0.0), "--tail-share 0, --tail-ratio 0: 0 of 3 classes are rare; change one"),
        (
            dict(tail_share=0.05, tail_ratio=0.02),
            "--tail-ratio 0.02: --tail-share 0.05 takes its place; add --tail-share 0",
        ),
    ],
)
def test_shares_that_are_refused(given, line):
    assert refusal(eql.find_rare, COUNTS, Args(**given)) == line


def test_rare_classes_are_told(capsys):
    assert eql.find_rare(COUNTS, Args(tail_share=0.05)).tolist() == [False, False, True]
    assert capsys.readouterr().err == "rare: 1 classes of 9 images in 999\n"
    assert eql.find_rare(COUNTS, Args()).tolist() == [False, True, True]  # 9.9 %
