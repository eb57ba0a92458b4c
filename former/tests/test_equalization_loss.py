"""equalization_loss.py: losses, weights and thresholds against numbers worked out beforehand, and limits."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator

import equalization_loss as eql
from common import cli, datasets
from equalization_loss import Args
from tests.conftest import TINY, close, launch, lines_of, refusal, result_of, run_here, state_of

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
    losses, *both = eql.eqlv2(logits, labels, *eql.eqlv2_weights(gradients.ratio()))
    close(losses.mean(), 1.6740)
    gradients.add(accelerator, *both)
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
    losses, positive, negative = eql.eqlv2(logits, labels, *weights)
    (grad,) = torch.autograd.grad(losses.sum(), logits)
    onehot = F.one_hot(labels, 4).bool()
    close(positive, (grad.abs() * onehot).sum(0), 1e-6)
    close(negative, (grad.abs() * ~onehot).sum(0), 1e-6)
    assert not positive.requires_grad
    ones = torch.ones(4)
    plain = F.binary_cross_entropy_with_logits(logits, onehot.float(), reduction="none").sum(1)
    close(eql.eqlv2(logits, labels, ones, ones)[0].detach(), plain.detach(), 1e-6)


def test_biases_begin_at_one_of_k(tmp_path):
    train_set = SimpleNamespace(num_classes=10, shape=(3, 16, 16))
    network = eql.make_network(train_set, Args(loss="eqlv2"))
    close(network.classifier.bias.detach().sigmoid(), [0.1] * 10, 1e-6)
    assert (
        not eql.make_network(train_set, Args()).classifier.bias.detach().sigmoid().allclose(torch.tensor(0.1))
    )
    tiny(tmp_path, "run", loss="eqlv2", lr=1e-12, epochs=1, lr_steps=())
    close(state_of(tmp_path / "run", 0)["classifier.bias"].sigmoid(), [0.1] * 10, 1e-6)


# softmax_eql


@pytest.mark.parametrize("label, loss", [(0, 0.0956995), (1, 2.4819939), (2, 4.8682882)])
def test_prior_of_gradients(label, loss):
    actual, positive = eql.softmax_eql(Z, torch.tensor([label]), torch.tensor([4.0, 1, 0.25]).double())
    close(actual, [loss], 1e-6)
    expected = [0.0] * 3
    expected[label] = 1 - math.exp(-loss)
    close(positive, expected, 1e-6)
    shifted, _ = eql.softmax_eql(Z + 5, torch.tensor([label]), torch.tensor([4.0, 1, 0.25]).double())
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
    (losses, *sums), (permuted, *same) = call(torch.arange(6)), call(order)
    close(permuted, losses[order], 1e-6)
    for one, other in zip(sums, same, strict=True):
        close(one, other, 1e-6)


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
        self.accelerator, self.losses = Accelerator(), []

    def steps(self, loader):
        return loader

    def record(self, loss):
        self.losses.append(loss.item())


def train(logits, labels, args, steps=1, rare=None):
    """(loss of each step, gradients) of a network that never changes."""
    model, run, gradients = Recorder(logits), OneStep(), eql.Gradients(logits.shape[1])
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    eql.train_one_epoch(run, model, [(None, labels)] * steps, optimizer, gradients, rare, args)
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
    close(gradients.positive[0], first + second[0].item(), 1e-6)


def test_rare_classes_drop_out_one_by_one():
    """Two of four classes rare: the mean over draws of each class of each image on its own."""
    logits, labels = torch.zeros(40_000, 4), torch.zeros(40_000, dtype=torch.int64)
    rare = torch.tensor([False, False, True, True])
    torch.manual_seed(0)
    (loss,), _ = train(logits, labels, Args(gamma=0.9), rare=rare)
    close(loss, 0.81 * math.log(2) + 0.18 * math.log(3) + 0.01 * math.log(4), 0.003)
    (loss,), _ = train(logits, labels, Args(gamma=1.0), rare=rare)
    close(loss, math.log(2), 1e-6)


# Runs


def tiny(folder, name, **more):
    return run_here(SCRIPT, **{**TINY, "output_dir": folder / name, **more})


@pytest.mark.parametrize("loss", ["eqlv2", "softmax_eql"])
def test_what_is_learned_is_saved_and_logged(loss, tmp_path):
    tiny(tmp_path, "run", loss=loss)
    saved = state_of(tmp_path / "run", 1, "gradients")
    assert (saved["positive"] > state_of(tmp_path / "run", 0, "gradients")["positive"]).all()  # they add up
    assert saved["positive"].dtype == torch.float64 and (saved["positive"] > 0).all()
    logged = lines_of(tmp_path / "run")[-1]
    expected = saved["positive"] / (saved["negative"] + 1e-10) if loss == "eqlv2" else saved["positive"]
    close(next(logged[name] for name in logged if name.startswith("class_") and "gradient" in name), expected)


@pytest.mark.parametrize("loss", ["eqlv2", pytest.param("softmax_eql", marks=pytest.mark.slow)])
def test_two_processes_have_the_same_gradients(loss, tmp_path):
    exact = dict(TINY, epochs=1, lr_steps=(), arch="lenet", lr=0.002, loss=loss)  # rounding grows with both
    tiny(tmp_path, "one", **exact)
    result_of(launch(SCRIPT, processes=2, **exact, output_dir=tmp_path / "two"))
    one, two = (state_of(tmp_path / name, 0, "gradients") for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", ["eqlv2", "softmax_eql", "seql"])
def test_resumed_with_its_gradients(loss, tmp_path):
    unbroken = tiny(tmp_path, "unbroken", loss=loss)
    tiny(tmp_path, "broken", loss=loss)
    for file in (tmp_path / "broken" / "checkpoint").glob("epoch_0001*"):
        file.unlink()
    (tmp_path / "broken" / "result.json").unlink()
    assert tiny(tmp_path, "broken", loss=loss, resume="yes")["weights_sha256"] == unbroken["weights_sha256"]


@pytest.mark.slow  # test_two_processes_are_one has them, too
def test_two_processes_drop_the_same_classes(tmp_path):
    exact = dict(TINY, epochs=1, lr_steps=(), arch="lenet", lr=0.02)
    tiny(tmp_path, "one", **exact)
    result_of(launch(SCRIPT, processes=2, **exact, output_dir=tmp_path / "two"))
    one, two = (lines_of(tmp_path / name)[0]["loss"] for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-5)


def test_learning_rate():
    common = cli.build(Args, eql.RECIPES, dataset="cifar100_lt")
    rates = [eql.learning_rate(epoch, common) for epoch in (0, 4, 159, 160, 180)]
    assert rates == pytest.approx([0.02, 0.1, 0.1, 1e-3, 1e-5])
    paper = cli.build(Args, eql.RECIPES, dataset="cifar100_lt", long=True)
    rates = [eql.learning_rate(epoch, paper) for epoch in (0, 10, 172, 173, 259, 345)]
    assert rates == pytest.approx([0.1 + 0.1 / 11, 0.2, 0.2, 0.02, 0.002, 0.002])
    imagenet = cli.build(Args, eql.RECIPES, dataset="imagenet_lt")
    assert [eql.learning_rate(epoch, imagenet) for epoch in (0, 3)] == pytest.approx([0.175, 0.4])


def values(dataset, names, **given):
    args = cli.build(Args, eql.RECIPES, dataset=dataset, **given)
    return [getattr(args, name) for name in names.split()]


def test_recipes():
    """Published values; those of the paper on CIFAR-100 are iterations: 12,800, falls at 6,400 and 9,600."""
    names = "arch epochs batch_size lr lr_steps lr_factor wd warmup warmup_from nesterov tail_share gamma"
    usual = ["resnet32", 200, 128, 0.1, (160, 180), 0.01, 2e-4, 5, 0, False]
    assert values("cifar100_lt", names) == [*usual, 0.005, 0.9]
    assert values("cifar10_lt", names) == [*usual, 0.03, 0.9]
    assert values("cifar100_lt", "auto_augment cutout") == [False, 0]
    steps = 9_502 // 256
    epochs, *falls = (round(n / steps) for n in (12_800, 6_400, 9_600))
    paper = ["resnet32", epochs, 256, 0.2, tuple(falls), 0.1, 1e-4, round(400 / steps), 0.1, True]
    assert values("cifar100_lt", names, long=True) == [*paper, 0.003, 0.95]
    assert values("cifar100_lt", "auto_augment cutout", long=True) == [True, 16]
    imagenet = ["resnet10", 106, 1024, 0.4, (30, 60, 90), 0.1, 1e-4, 4, 0.1, False, 4.3e-4, 0.9]
    assert values("imagenet_lt", names) == imagenet
    assert [Args().slope, Args().mu, Args().alpha, Args().tau, Args().tail_ratio] == [12, 0.8, 4, 1, 0.1]


def test_rare_classes_of_imagenet():
    counts = torch.tensor([115_846 - 99, 50, 49])
    assert eql.rare_classes(counts, 4.3e-4).tolist() == [False, False, True]


def test_a_tail_ratio_takes_the_place_of_the_published_share(capsys):
    assert values("cifar100_lt", "tail_share tail_ratio", tail_ratio=0.02) == [None, 0.02]
    line = refusal(lambda: values("cifar100_lt", "", tail_ratio=0.02, tail_share=0.01), capsys)
    assert line == "--tail-ratio 0.02: --tail-share 0.01 takes its place; leave one out"


def test_optimiser(tmp_path, monkeypatch):
    seen = {}

    def spy(run, model, loader, optimizer, gradients, rare, args):
        seen.update(optimizer.param_groups[0], rare=rare)
        raise KeyboardInterrupt

    monkeypatch.setattr(eql, "train_one_epoch", spy)
    with pytest.raises(KeyboardInterrupt):
        tiny(tmp_path, "run", nesterov=True, wd=3e-4)
    assert (seen["momentum"], seen["weight_decay"], seen["nesterov"]) == (0.9, 3e-4, True)
    assert seen["rare"].tolist() == [False] * 5 + [True] * 5  # 87 of 1,236 images; with the next class 12 %


def test_cross_entropy_is_that_of_cmo(tmp_path):
    plain = run_here("cmo.py", **TINY, paste="none", output_dir=tmp_path / "cmo")["weights_sha256"]
    assert tiny(tmp_path, "ce", loss="ce")["weights_sha256"] == plain


def test_limits_of_a_run(tmp_path):
    plain = tiny(tmp_path, "ce", loss="ce")["weights_sha256"]
    assert tiny(tmp_path, "gamma", gamma=0.0)["weights_sha256"] == plain
    assert tiny(tmp_path, "tau", loss="softmax_eql", tau=0.0)["weights_sha256"] == plain
    assert tiny(tmp_path, "seql")["weights_sha256"] != plain


@pytest.mark.parametrize(
    "given, start",
    [
        (dict(tail_share=1e-6), "--tail-share 1e-06: makes no class rare"),
        (dict(tail_share=1.0), "--tail-share 1: makes all classes rare"),
        (dict(tail_ratio=0.0), "--tail-ratio 0: makes no class rare"),
    ],
)
def test_shares_that_leave_nothing(given, start, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        tiny(tmp_path, "run", **given)
    assert stop.value.code == 2 and capsys.readouterr().err.splitlines()[-1].startswith(start)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "given, start",
    [
        (dict(loss="ce", gamma=0.5), "--gamma 0.5: is for --loss seql; add that, or leave it out"),
        (dict(loss="seql", tau=0.5), "--tau 0.5: is for --loss softmax_eql; add that, or leave it out"),
        (dict(loss="seql", mu=0.5), "--mu 0.5: is for --loss eqlv2; add that, or leave it out"),
        (dict(gamma=1.5), "--gamma 1.5: must be at most 1"),
        (
            dict(long=True),
            "--long: is a recipe of cifar10_lt and cifar100_lt, not of synthetic; leave it out",
        ),
    ],
)
def test_options_of_another_loss(given, start, capsys):
    assert refusal(lambda: cli.build(Args, eql.RECIPES, **given), capsys).startswith(start)
