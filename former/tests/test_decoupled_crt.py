"""decoupled_crt.py: samplers, classifiers, schedules, stages, against numbers worked out beforehand."""

import dataclasses
import json
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

import balanced_meta_softmax
import decoupled_crt
from common import cli, datasets, evaluation, models, runs
from decoupled_crt import Args
from tests.conftest import TINY, close, kill_at, launch, refusal, result_of, run_here

COUNTS = torch.tensor([100, 10, 1])
# Both stages within seconds; without the biases of an option that is not under test.
SHORT = dict(TINY, stage2_epochs=2, stage2_lr=0.05)


def tiny(tmp_path, name="run", **options):
    return Args(**{**SHORT, "output_dir": str(tmp_path / name), **options})


class Labels(torch.utils.data.Dataset):
    """What the samplers need of a training set."""

    def __init__(self, counts):
        self.class_counts = torch.tensor(counts)
        self.labels = torch.arange(len(counts)).repeat_interleave(self.class_counts)

    def __len__(self):
        return len(self.labels)


def epochs_of(sampler, epochs):
    """Indices that the sampler draws in each of the epochs, [epochs, size]."""
    found = []
    for epoch in epochs:
        sampler.set_epoch(epoch)
        found.append([index for index, _ in sampler])
    return torch.tensor(found)


# Sampling


@pytest.mark.parametrize(
    "q, expected", [(1, [0.9009, 0.0901, 0.0090]), (0.5, [0.7061, 0.2233, 0.0706]), (0, [1 / 3] * 3)]
)
def test_class_probabilities(q, expected):
    close(decoupled_crt.class_probabilities(COUNTS, q), expected)


def test_progressive_probabilities():
    close(decoupled_crt.progressive_probabilities(COUNTS, 2, 5), [0.6171, 0.2117, 0.1712])
    close(decoupled_crt.progressive_probabilities(COUNTS, 44, 90), [0.6203, 0.2103, 0.1693])
    first, last = (decoupled_crt.progressive_probabilities(COUNTS, epoch, 90) for epoch in (0, 89))
    assert first.equal(decoupled_crt.class_probabilities(COUNTS, 1))
    assert last.equal(decoupled_crt.class_probabilities(COUNTS, 0))
    close(decoupled_crt.progressive_probabilities(COUNTS, 0, 1), first, 0)  # a single epoch is the first


def test_exponent_one_draws_images_evenly(monkeypatch):
    """Square-root sampling with exponent 1 instead of 1/2 is instance-balanced sampling."""
    monkeypatch.setitem(decoupled_crt.Q, "square-root", 1.0)
    train_set, seen = Labels([100, 10, 1]), {}
    monkeypatch.setattr(datasets, "EpochSampler", lambda *_, **how: seen.update(how))
    decoupled_crt.make_sampler(train_set, 1, Args(sampling="square-root"))
    close(seen["weights"], [1 / 111] * 111, 1e-12)


@pytest.mark.parametrize(
    "options, law",
    [
        (dict(sampling="instance"), [0.9009, 0.0901, 0.0090]),
        (dict(sampling="square-root"), [0.7061, 0.2233, 0.0706]),
        (dict(sampling="class"), [1 / 3] * 3),
        (dict(sampling="class", samples_per_class=1), [1 / 3] * 3),
        (dict(sampling="class", samples_per_class=0), [1 / 3] * 3),
    ],
    ids=str,
)
def test_marginals_over_epochs(options, law):
    train_set = Labels([100, 10, 1])
    drawn = epochs_of(decoupled_crt.make_sampler(train_set, 1, Args(**options)), range(200))
    assert drawn.shape == (200, 111)  # N images an epoch, whatever the law
    close(train_set.labels[drawn].flatten().bincount(minlength=3) / drawn.numel(), law, 0.012)
    of_class_0 = drawn[train_set.labels[drawn] == 0].bincount(minlength=100)[:100] / drawn.numel()
    close(of_class_0, [law[0] / 100] * 100, 0.0035)  # evenly within the class


def test_progressive_marginals_change_with_the_epoch():
    train_set = Labels([100, 10, 1])
    sampler = decoupled_crt.make_sampler(train_set, 1, Args(sampling="progressive", epochs=3))
    for epoch, law in ((0, [0.9009, 0.0901, 0.0090]), (1, [0.6171, 0.2117, 0.1712]), (2, [1 / 3] * 3)):
        draws = []
        for seed in range(100):
            sampler.seed = seed
            draws.append(epochs_of(sampler, [epoch]))
        labels = train_set.labels[torch.cat(draws)]
        close(labels.flatten().bincount(minlength=3) / labels.numel(), law, 0.015)


def test_instance_balanced_is_a_permutation():
    train_set = Labels([100, 10, 1])
    drawn = epochs_of(decoupled_crt.make_sampler(train_set, 1, Args()), range(2))
    assert drawn.sort().values.equal(torch.arange(111).expand(2, -1)) and not drawn[0].equal(drawn[1])


def test_full_epochs():
    train_set = Labels([100, 10, 1])
    assert len(decoupled_crt.make_sampler(train_set, 1, Args(sampling="class", full_epochs=True))) == 300
    assert len(decoupled_crt.make_sampler(train_set, 1, Args(full_epochs=True))) == 111
    mnist, fashion = (datasets.long_tail_counts(6000, 10, 100) for _ in range(2))
    mnist[0] = 5923  # all there are
    study = cli.build(Args, decoupled_crt.RECIPES, dataset="mnist_lt", sampling="class")
    for counts, size in ((mnist, 59230), (fashion, 60000)):
        assert len(decoupled_crt.make_sampler(Labels(counts), 1, study)) == size
    assert (59230 + 127) // 128 == 463  # the study's steps, with its incomplete last batch


# Classifiers


@pytest.mark.parametrize(
    "tau, ones, mixed",
    [
        (0, [7, 1], [4.3, 1]),
        (0.5, [3.1305, 1], [1.923, 1]),
        (1, [1.4, 1], [0.86, 1]),
        (2, [0.28, 1], [0.172, 1]),
    ],
)
def test_tau_normalized(tau, ones, mixed):
    weight = decoupled_crt.tau_normalized(torch.tensor([[3.0, 4.0], [0.0, 1.0]]), tau)
    close(torch.tensor([1.0, 1.0]) @ weight.T, ones)
    close(torch.tensor([0.1, 1.0]) @ weight.T, mixed, 1e-3)


def network_with(weight, bias):
    network = models.build("resnet8", 2, 0)
    network.classifier = nn.Linear(2, 2)
    network.classifier.weight.data, network.classifier.bias.data = torch.tensor(weight), torch.tensor(bias)
    return network


@pytest.mark.parametrize("bias", [[0.0, 0.0], [100.0, -100.0]])
def test_the_bias_has_no_part_in_tau_normalisation(bias):
    network, args = network_with([[3.0, 4.0], [0.0, 1.0]], bias), Args(classifier="tau", tau=1.0)
    old = decoupled_crt.new_classifier(network, args)
    facts = decoupled_crt.fit_classifier(Accelerator(), network, old, None, None, args)
    assert facts == {"tau": 1.0}
    close(network.classifier(torch.tensor([[0.1, 1.0]])), [[0.86, 1.0]])


def test_tau_curve_averages_over_classes():
    """At tau = 0 class 0 takes all, at 1 class 1 its images: 3 of class 0, 1 of class 1, none of class 2."""
    weight = torch.tensor([[3.0, 4.0], [0.0, 1.0], [0.0, 0.1]])
    features = torch.tensor([[1.0, 0.1], [1.0, 0.1], [1.0, 0.1], [0.1, 1.0]])
    curve = decoupled_crt.tau_curve(features, torch.tensor([0, 0, 0, 1]), weight, [3, 1, 5])
    assert decoupled_crt.TAUS[0] == 0 and decoupled_crt.TAUS[10] == 1 and decoupled_crt.TAUS[20] == 2
    assert len(decoupled_crt.TAUS) == 21
    assert curve[0] == 50.0 and curve[10] == 100.0  # 75 and 100 percent of the images


def test_tau_is_chosen_on_held_out_images(tmp_path):
    result = decoupled_crt.main(tiny(tmp_path, classifier="tau"))
    assert result["args"]["held_out"] == 10
    assert result["tau"] == decoupled_crt.best_tau(result["tau_curve"])
    assert result["class_counts"] == [500, 299, 179, 107, 64, 38, 23, 13, 8, 5]  # the splits go by all images
    joint = decoupled_crt.main(tiny(tmp_path, "joint", classifier="joint"))
    lines = [
        json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0])
        for name in ("run", "joint")
    ]
    assert lines[0]["loss"] != lines[1]["loss"]  # stage 1 has not seen them
    assert joint["args"]["held_out"] == 0


@pytest.mark.parametrize(
    "accuracies, tau",
    [({}, 1.0), ({0.3: 60.0}, 0.3), ({0.3: 60.0, 1.9: 61.0}, 1.9), ({0.3: 60.0, 1.5: 60.0, 1.9: 60.0}, 1.5)],
)
def test_best_tau(accuracies, tau):
    """The highest accuracy; of equal ones the nearest to 1."""
    assert decoupled_crt.best_tau([accuracies.get(t, 50.0) for t in decoupled_crt.TAUS]) == tau


@pytest.mark.parametrize("classifier, images", [("tau", 70), ("ncm", 1236)])
def test_images_that_set_the_classifier(tmp_path, monkeypatch, classifier, images):
    """tau: the held-out images; NCM: the training set. Never the test set of 1,000."""
    asked, extract = [], decoupled_crt.extract
    spy = lambda a, n, dataset, args: asked.append(dataset) or extract(a, n, dataset, args)  # noqa: E731
    monkeypatch.setattr(decoupled_crt, "extract", spy)
    decoupled_crt.main(tiny(tmp_path, classifier=classifier))
    (dataset,) = asked
    assert len(dataset) == images
    if classifier == "tau":
        assert dataset.labels.bincount(minlength=10).tolist() == [10] * 7 + [0] * 3


def test_scaled_classifier():
    linear = nn.Linear(2, 2)
    linear.weight.data, linear.bias.data = torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.tensor([0.0, 0.0])
    scaled, features = models.ScaledClassifier(linear), torch.tensor([[1.0, 1.0]])
    assert scaled(features).equal(linear(features))
    scaled.scale.data = torch.tensor([0.5, 2.0])
    close(scaled(features), [[3.5, 2.0]])
    linear.bias.data = torch.tensor([1.0, 1.0])
    close(scaled(features), [[4.0, 4.0]])  # the bias is scaled too


def test_lws_with_scales_of_one_is_stage_1():
    network, images = models.build("resnet8", 10, 0).eval(), torch.randn(4, 3, 32, 32)
    before = network(images)
    old = decoupled_crt.new_classifier(network, Args(classifier="lws"))
    assert network(images).equal(before) and network.classifier.linear is old
    trained = [p for p in network.parameters() if p.requires_grad]
    assert [p.shape for p in trained] == [(10,)]
    optimizer = decoupled_crt.make_optimizer(network, 2, Args(wd=0.1))
    assert [group["params"] for group in optimizer.param_groups] == [trained]
    assert optimizer.param_groups[0]["weight_decay"] == 0.1


@pytest.mark.parametrize(
    "variant, means, scores",
    [
        ("un", [[2.0, 0.0], [0.0, 3.0]], [-2.0, -5.0]),
        ("l2n", [[1.0, 0.0], [0.0, 1.0]], [-0.5858, -0.5858]),
        ("cl2n", [[0.4, -0.8], [-0.6329, 0.6878]], [-0.2000, -3.2494]),
    ],
)
def test_nearest_mean(variant, means, scores):
    ncm = decoupled_crt.NearestMean(2, 2, variant)
    features = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0], [0.0, 4.0]])
    ncm.fit(features, torch.tensor([0, 0, 1, 1]))
    close(ncm.means, means)
    close(ncm(torch.tensor([[1.0, 1.0]])), [scores])
    ncm.score = "dot"
    query = torch.tensor([[1.0, 1.0]])
    close(ncm(query), ncm.transform(query) @ ncm.means.T / 2)


def test_crt_begins_anew_and_the_study_goes_on():
    network = models.build("resnet8", 10, 0)
    old = decoupled_crt.new_classifier(network, Args())
    new = network.classifier
    assert not new.weight.equal(old.weight)
    assert new.weight.abs().max() <= 1 / 8 and new.weight.std() > 0.05  # uniform within 1 / sqrt(64)
    trained = [name for name, p in network.named_parameters() if p.requires_grad]
    assert trained == ["classifier.weight", "classifier.bias"]
    network = models.build("lenet", 10, 0, (1, 28, 28))
    old = decoupled_crt.new_classifier(network, Args(crt_init="stage1"))
    assert network.classifier.weight.equal(old.weight) and network.classifier.bias.equal(old.bias)
    assert network.classifier.weight.requires_grad and network.classifier is not old


# Schedules and recipes


def rates(epochs, args):
    return [decoupled_crt.learning_rate(epoch - 1, args) for epoch in epochs]  # the specs count from 1


def test_cosine():
    args = Args(lr=0.2, epochs=10, cosine=True, warmup=0)
    close(rates([1, 5, 9, 10], args), [0.19511, 0.1, 0.00489, 0.0], 1e-5)


def test_rates_of_cifar():
    first, second = (
        s[1] for s in decoupled_crt.make_stages(cli.build(Args, decoupled_crt.RECIPES, dataset="cifar10_lt"))
    )
    close(rates([1, 4, 5, 160, 161, 180, 181], first), [0.02, 0.08, 0.1, 0.1, 1e-3, 1e-3, 1e-5], 1e-12)
    close(rates([1, 5, 9, 10, 19, 20, 30], second), [0.02, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001], 1e-12)
    given = dict(mixup_alpha=1.0, lr_factor=0.1)
    mixup = cli.build(Args, decoupled_crt.RECIPES, dataset="cifar100_lt", **given)
    close(rates([160, 161, 181], mixup), [0.1, 0.01, 0.001], 1e-12)
    assert decoupled_crt.make_stages(mixup)[1][1].mixup_alpha == 0  # in stage 1 only


def test_rates_of_the_study():
    first, second = (
        s[1] for s in decoupled_crt.make_stages(cli.build(Args, decoupled_crt.RECIPES, dataset="mnist_lt"))
    )
    expected = [0.1, 0.09619, 0.08536, 0.06913, 0.05, 0.03087, 0.01464, 0.00381]
    close(rates(range(1, 9), first), expected, 1e-5)
    close(rates(range(1, 5), second), expected[:4], 1e-5)


def test_rates_of_imagenet():
    first, second = (
        s[1] for s in decoupled_crt.make_stages(cli.build(Args, decoupled_crt.RECIPES, dataset="imagenet_lt"))
    )
    close(rates([45, 90], first), [0.1, 0.0], 1e-12)
    close(rates([5, 10], second), [0.1, 0.0], 1e-12)


def test_recipes_are_the_published_ones():
    def values(dataset, names, **given):
        args = cli.build(Args, decoupled_crt.RECIPES, dataset=dataset, **given)
        return [getattr(args, name) for name in names.split()]

    names = "arch epochs batch_size lr wd momentum warmup cosine color_jitter imbalance"
    assert values("cifar100_lt", names) == ["resnet32", 200, 128, 0.1, 2e-4, 0.9, 5, False, 0, 100]
    assert values("imagenet_lt", names) == ["resnet50", 90, 512, 0.2, 5e-4, 0.9, 0, True, 0.4, None]
    assert values("inat2018", names) == ["resnet50", 90, 512, 0.2, 1e-4, 0.9, 0, True, 0, None]
    assert values("places_lt", names) == ["resnet152", 30, 256, 0.1, 5e-4, 0.9, 0, True, 0.4, None]
    assert values("mnist_lt", names) == ["lenet", 8, 128, 0.1, 0, 0, 0, True, 0, 100]
    assert values("places_lt", "pretrained last_block backbone_lr") == [True, True, 0.1]
    second = "stage2_epochs stage2_lr stage2_wd stage2_cosine stage2_nesterov samples_per_class"
    assert values("cifar100_lt", second) == [30, 0.1, 5e-4, False, True, 0]
    assert values("imagenet_lt", second) == [10, 0.2, 5e-4, True, False, 4]
    assert values("inat2018", second) == [30, 0.2, 1e-4, True, False, 4]
    assert values("places_lt", second) == [10, 0.1, 5e-4, True, False, 4]
    assert values("mnist_lt", second) == [4, 0.1, 0, True, False, 4]
    lws = [values(d, "stage2_epochs", classifier="lws") for d in ("cifar10_lt", "imagenet_lt", "inat2018")]
    assert lws == [[30], [5], [5]]
    study = "crt_init full_epochs many_classes few_classes"
    assert values("fashion_mnist_lt", study) == ["stage1", True, 3, 3]
    published = ("cifar10_lt", "cifar100_lt", "imagenet_lt", "places_lt", "inat2018")
    assert all(values(dataset, "bn_train_in_stage2") == [True] for dataset in published)
    assert (Args().ncm, Args().ncm_score) == ("cl2n", "euclidean")


def test_the_study_groups_are_classes_0_to_2_3_to_6_7_to_9():
    counts = [5923, 3596, 2156, 1292, 774, 464, 278, 166, 100, 60]
    splits = evaluation.split_classes(counts, many_classes=3, few_classes=3)
    assert [split.nonzero().flatten().tolist() for split in splits.values()] == [
        [0, 1, 2],
        [3, 4, 5, 6],
        [7, 8, 9],
    ]


@pytest.mark.parametrize("arch, width", [("resnet50", 2048), ("resnext50_32x4d", 2048), ("resnet10", 512)])
def test_feature_widths(arch, width):
    assert models.build(arch, 3, 0).classifier.in_features == width


def test_only_the_last_block_and_the_classifier(tmp_path):
    """Stage 1 of Places-LT: the block at a tenth of the rate, the rest frozen."""
    train_set = datasets.load(Args())[0]
    args = Args(last_block=True, backbone_lr=0.1, arch="resnet10")
    network = decoupled_crt.make_network(train_set, None, args)
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    assert all(name.startswith(("backbone.7.0.", "classifier.")) for name in trained) and len(trained) == 11
    groups = decoupled_crt.make_optimizer(network, 1, args).param_groups
    assert [(group["factor"], len(group["params"])) for group in groups] == [(1.0, 2), (0.1, 9)]
    options = dict(last_block=True, backbone_lr=0.1, classifier="joint", epochs=1, lr_steps=())
    decoupled_crt.main(tiny(tmp_path, **options))
    before, after = models.build("resnet8", 10, 0), weights_of(tmp_path / "run")
    for name, parameter in before.named_parameters():
        moved = name.startswith(("backbone.5.0.", "classifier."))
        assert after[name].equal(parameter) != moved, name


def test_pretrained_networks_need_an_imagenet_one(capsys):
    train_set = datasets.load(Args())[0]
    capsys.readouterr()
    line = refusal(lambda: decoupled_crt.make_network(train_set, None, Args(pretrained=True)), capsys)
    assert line == "--pretrained: there are no ImageNet weights for --arch resnet8; use --no-pretrained"


# The training step


class Answer(nn.Module):
    """Answers with the logits it was given and keeps what it was shown."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.shown = nn.Parameter(logits.clone()), None

    def forward(self, images):
        self.shown = images
        return self.logits


class OneStep:
    """The part of a Run that train_one_epoch uses."""

    def __init__(self):
        self.accelerator, self.loss = Accelerator(), None

    def steps(self, loader):
        return loader

    def record(self, loss):
        self.loss = loss.item()


LOGITS, LABELS = torch.tensor([[3.0, 1, 0], [0, 2, 5], [1, 0, 7], [2, 2, 0]]), torch.tensor([0, 1, 2, 0])


def one_step(args):
    model, run = Answer(LOGITS), OneStep()
    images = torch.arange(4.0).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    torch.manual_seed(1)
    decoupled_crt.train_one_epoch(run, model, [(images, LABELS)], optimizer, 1, 0, args)
    assert not model.logits.equal(LOGITS)
    return model.shown[:, 0, 0, 0], run.loss


def test_plain_step():
    shown, loss = one_step(Args())
    assert shown.tolist() == [0.0, 1.0, 2.0, 3.0]
    assert loss == pytest.approx(F.cross_entropy(LOGITS, LABELS).item(), abs=1e-6)


def test_mixup_step(monkeypatch):
    """x' = lam x + (1 - lam) x[order], loss = lam CE(y) + (1 - lam) CE(y[order]), one lam for the batch."""
    lam, asked = 0.75, []

    class Fixed:
        def beta(self, a, b):
            asked.append((a, b))
            return lam

    monkeypatch.setattr(np.random, "RandomState", lambda seed: Fixed())
    torch.manual_seed(1)
    order = torch.randperm(4)
    assert not order[order].equal(torch.arange(4))  # no order that is its own inverse
    shown, loss = one_step(Args(mixup_alpha=0.4))
    close(shown, 0.75 * torch.arange(4) + 0.25 * order, 1e-6)
    expected = 0.75 * F.cross_entropy(LOGITS, LABELS) + 0.25 * F.cross_entropy(LOGITS, LABELS[order])
    assert loss == pytest.approx(expected.item(), abs=1e-6) and asked == [(0.4, 0.4)]
    lam = 1.0  # is the plain step
    assert one_step(Args(mixup_alpha=0.4))[1] == one_step(Args())[1]


# Both stages


def weights_of(folder):
    return runs.load_checkpoint(folder / "checkpoint")["state"]["model"]


@pytest.fixture(scope="module")
def stage1(tmp_path_factory):
    """The folder of a finished stage 1."""
    folder = tmp_path_factory.mktemp("stage1")
    decoupled_crt.main(tiny(folder, "joint", classifier="joint"))
    return folder / "joint"


@pytest.mark.parametrize("classifier", ["crt", "lws"])
@pytest.mark.parametrize("bn", [True, False])
def test_stage_2_leaves_the_backbone(tmp_path, stage1, classifier, bn):
    """Bit for bit; the statistics of BatchNorm move if and only if the flag says so."""
    decoupled_crt.main(tiny(tmp_path, classifier=classifier, stage1=str(stage1), bn_train_in_stage2=bn))
    before, after = weights_of(stage1), weights_of(tmp_path / "run")
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    backbone = [name for name in before if name.startswith("backbone")]
    assert any(name.endswith("running_mean") for name in backbone)
    for name in backbone:
        assert before[name].equal(after[name]) != (bn and name.endswith(statistics)), name
    if classifier == "lws":
        assert after["classifier.linear.weight"].equal(before["classifier.weight"])
        assert not after["classifier.scale"].equal(torch.ones(10))
    else:
        assert not after["classifier.weight"].equal(before["classifier.weight"])


@pytest.mark.parametrize("classifier", ["crt", "lws", "tau", "ncm"])
def test_both_in_one_command_are_one_after_the_other(tmp_path, stage1, classifier):
    options = dict(classifier=classifier, held_out=0, tau=1.0 if classifier == "tau" else None)
    together = decoupled_crt.main(tiny(tmp_path, "both", **options))
    apart = decoupled_crt.main(tiny(tmp_path, "second", stage1=str(stage1), **options))
    assert together["weights_sha256"] == apart["weights_sha256"]
    assert together["all"] == apart["all"]
    lines = [len((tmp_path / name / "metrics.jsonl").read_text().splitlines()) for name in ("both", "second")]
    assert lines[0] == 2 + lines[1]


def test_stage_1_brings_its_options(tmp_path, stage1, capsys):
    """Told, and recorded; what was given for a stage 1 that is not run does not count."""
    given = dict(
        lr=0.3, epochs=7, lr_factor=0.5, warmup=3, wd=0.1, sampling="class", mixup_alpha=1.0, cosine=True
    )
    given |= dict(
        lr_steps=(), backbone_lr=0.5, last_block=True, pretrained=True, stage2_lr=0.02, momentum=0.5
    )
    result = decoupled_crt.main(tiny(tmp_path, stage1=str(stage1), **given))
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert f"note: --lr 0.05 of stage 1 in {stage1}, not 0.3" in notes and len(notes) == 12
    theirs = json.loads((stage1 / "result.json").read_text())["args"]
    assert all(result["args"][name] == theirs[name] for name in decoupled_crt.TRAINING)
    assert (result["args"]["stage2_lr"], result["args"]["momentum"]) == (0.02, 0.5)
    assert json.loads(json.dumps(result["stage1_args"])) == theirs
    again = decoupled_crt.main(tiny(tmp_path, stage1=str(stage1), **given, resume="yes"))
    assert again["weights_sha256"] == result["weights_sha256"]


def test_stage_1_of_every_recipe(tmp_path, stage1, capsys, monkeypatch):
    """Stage 1 of cmo.py has steps, and an own schedule may be longer than the recipe's cosine."""
    import cmo

    for script in (cmo, decoupled_crt):
        for dataset in decoupled_crt.RECIPES:
            joint = {} if script is cmo else dict(classifier="joint", epochs=200, cosine_epochs=200)
            if dataset not in script.RECIPES:
                continue
            theirs = dataclasses.asdict(cli.build(script.Args, script.RECIPES, dataset=dataset, **joint))
            weights = dict.fromkeys(("backbone.0.weight", "classifier.weight"))
            finished = dict(script=script.__name__ + ".py", args=theirs), weights
            monkeypatch.setattr(runs, "read_finished", lambda folder, finished=finished: finished)
            same = {name: theirs[name] for name in runs.SAME if name in theirs}
            args = cli.build(Args, decoupled_crt.RECIPES, **same, stage1=str(stage1))
            adopted = runs.adopt_stage1(args, decoupled_crt.TRAINING)[0]
            assert adopted.epochs == theirs["epochs"] and adopted.cosine == theirs.get("cosine", False)
            assert adopted.stage2_epochs == args.stage2_epochs


def test_stage_1_with_held_out_images(tmp_path, capsys):
    """Every classifier goes on without the images that stage 1 held out."""
    decoupled_crt.main(tiny(tmp_path, "joint", classifier="joint", held_out=10))
    capsys.readouterr()
    for classifier in ("tau", "ncm"):
        args = tiny(tmp_path, classifier, classifier=classifier, stage1=str(tmp_path / "joint"), seed=3)
        result = decoupled_crt.main(args)
        assert result["args"]["held_out"] == 10 and result["stage1_args"]["seed"] == 0
        errors = capsys.readouterr().err
        assert "note: --seed 3 is of stage 2 alone; stage 1 in " in errors
        assert "held out: 70 training images of 7 classes" in errors


@pytest.mark.parametrize("held_out, classes", [(200, 1), (300, 0)])
def test_too_little_to_hold_out(tmp_path, capsys, held_out, classes):
    """Before any training: tau would be chosen on one class, or none."""
    with pytest.raises(SystemExit):
        decoupled_crt.main(tiny(tmp_path, classifier="tau", held_out=held_out))
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == f"--held-out {held_out}: takes images of {classes} classes; use less, or give --tau"
    assert not (tmp_path / "run").exists()


def test_stage_1_with_another_network(tmp_path, capsys):
    import bbn

    bbn.main(bbn.Args(**TINY, output_dir=str(tmp_path / "bbn")))
    capsys.readouterr()
    line = refusal(lambda: decoupled_crt.main(tiny(tmp_path, stage1=str(tmp_path / "bbn"))), capsys)
    names = "cmo.py, decoupled_crt.py, balanced_meta_softmax.py"
    assert line.endswith(f"/bbn: a run of bbn.py; use one of {names}")


@pytest.mark.parametrize(
    "options, length",
    [
        (dict(cosine=True, epochs=1, lr_steps=()), "--epochs"),
        (dict(stage2_cosine=True, stage2_epochs=1, stage2_lr_steps=()), "--stage2-epochs"),
    ],
)
def test_a_rate_of_zero_is_refused(options, length, capsys):
    line = refusal(lambda: Args(**options), capsys)
    assert line == f"{length} 1: its rate is 0, so nothing would be trained; use more"
    assert Args(**options, cosine_start=0).cosine_start == 0  # whole in the first epoch
    assert Args(**{**options, "cosine": False, "classifier": "ncm"}).classifier == "ncm"  # not trained


def test_stage_1_of_other_data(tmp_path, jpegs, capsys):
    """Of as many images, or of the same ones in another order of classes."""
    given = {**jpegs, "image_size": 16, "arch": "resnet8"}
    decoupled_crt.main(tiny(tmp_path, "joint", classifier="joint", **given))
    old, new = (tmp_path / "data" / "train" / "class 0" / name for name in ("0.jpg", "new.jpg"))
    old.rename(new)
    for script in (decoupled_crt, balanced_meta_softmax):
        args = script.Args(
            **{**TINY, **given}, stage1=str(tmp_path / "joint"), output_dir=str(tmp_path / "two")
        )
        with pytest.raises(SystemExit) as stop:
            script.main(args)
        line = capsys.readouterr().err.splitlines()[-1]
        had = f"--stage1 {tmp_path}/joint: its run had other training images"
        assert stop.value.code == 2 and line == f"{had}; give the same data"


def test_stage_1_is_not_overwritten(tmp_path, stage1, capsys, monkeypatch):
    line = refusal(
        lambda: decoupled_crt.main(Args(stage1=str(stage1), output_dir=str(stage1), overwrite=True)), capsys
    )
    assert line == f"--stage1 {stage1}: would be the folder of stage 2, too; name another --output-dir"
    monkeypatch.chdir(tmp_path)
    args = Args(stage1="runs/decoupled_crt/synthetic_100_0")  # the default folder
    assert "name another --output-dir" in refusal(lambda: decoupled_crt.main(args), capsys)
    assert (stage1 / "result.json").exists()


def test_damaged_stage_1(tmp_path, capsys):
    """The epoch before the last is not taken for it."""
    decoupled_crt.main(tiny(tmp_path, "joint", classifier="joint"))
    (tmp_path / "joint/checkpoint/epoch_0001.pt").write_bytes(b"")
    capsys.readouterr()
    line = refusal(lambda: decoupled_crt.main(tiny(tmp_path, stage1=str(tmp_path / "joint"))), capsys)
    assert line.endswith("joint: its last checkpoint is not there or damaged; train it again")


def test_stage_1_may_be_of_another_script(tmp_path):
    import cmo

    cmo.main(cmo.Args(**TINY, paste="none", output_dir=str(tmp_path / "cmo")))
    result = decoupled_crt.main(tiny(tmp_path, classifier="lws", stage1=str(tmp_path / "cmo")))
    assert weights_of(tmp_path / "run")["backbone.0.weight"].equal(
        weights_of(tmp_path / "cmo")["backbone.0.weight"]
    )
    assert result["args"]["epochs"] == TINY["epochs"]


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(stage1="nowhere"), "--stage1 nowhere: holds no finished run (no result.json)"),
        (dict(arch="resnet20"), "--arch resnet20: the run of --stage1 {stage1} has resnet8; give the same"),
        (dict(imbalance=50.0), "--imbalance 50.0: the run of --stage1 {stage1} has 100.0; give the same"),
        (
            dict(classifier="tau"),
            "--held-out 0: tau is chosen on held-out images; use 10 in stage 1, or give --tau",
        ),
        (dict(held_out=5), "--held-out 5: the run of --stage1 {stage1} has 0; give the same"),
    ],
)
def test_stage_1_that_does_not_fit(tmp_path, stage1, capsys, options, words):
    args = tiny(tmp_path, **{"stage1": str(stage1), **options})
    line = refusal(lambda: decoupled_crt.main(args), capsys)
    assert line.startswith(words.format(stage1=stage1))
    assert not (tmp_path / "run").exists()


def test_weights_that_do_not_fit(capsys):
    network = models.build("resnet8", 10, 0)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    line = refusal(
        lambda: models.load_weights(network, models.build("resnet8", 5, 0).state_dict(), "F"), capsys
    )
    what = "classifier.bias is (5,) there and (10,) here"
    assert line == f"F: its network does not fit: {what}; use one with the same layers"
    assert all(network.state_dict()[name].equal(before[name]) for name in before)


def test_options_that_do_not_fit_together(capsys):
    assert refusal(lambda: Args(classifier="tau", held_out=0), capsys).startswith(
        "--held-out 0: tau is chosen"
    )
    options = dict(classifier="joint", tau=0.5)
    line = refusal(lambda: cli.build(Args, decoupled_crt.RECIPES, **options), capsys)
    assert line == "--tau 0.5: is for --classifier tau; add that, or leave it out"
    assert refusal(lambda: Args(classifier="joint", stage1="x"), capsys).startswith(
        "--classifier joint: has no"
    )


def test_joint_training_is_plain_training(tmp_path):
    """Stage 1 alone, cross-entropy and every image once: bit for bit the plain training of cmo.py."""
    import cmo

    ours = decoupled_crt.main(tiny(tmp_path, classifier="joint", wd=1e-3))
    theirs = cmo.main(cmo.Args(**TINY, wd=1e-3, paste="none", output_dir=str(tmp_path / "cmo")))
    assert ours["weights_sha256"] == theirs["weights_sha256"]


@pytest.mark.parametrize(
    "options",
    [
        dict(mixup_alpha=1.0),
        dict(sampling="progressive"),
        dict(sampling="square-root", classifier="joint"),
        dict(classifier="joint", sampling="class", full_epochs=True, epochs=1, lr_steps=()),
        dict(stage2_nesterov=True, stage2_warmup=2, stage2_lr_steps=(1,)),
        dict(classifier="ncm", ncm="un", ncm_score="dot"),
    ],
    ids=str,
)
def test_runs(tmp_path, options):
    result = decoupled_crt.main(tiny(tmp_path, **options))
    assert 0 <= result["all"] <= 100
    assert all(
        np.isfinite(line["loss"] or 0) for line in map(json.loads, (tmp_path / "run/metrics.jsonl").open())
    )


def test_each_stage_has_its_own_rate(tmp_path):
    options = dict(lr=0.05, stage2_lr=0.03, stage2_warmup=2, stage2_lr_steps=(1,), stage2_lr_factor=0.5)
    decoupled_crt.main(tiny(tmp_path, **options))
    rates = [json.loads(line)["lr"] for line in (tmp_path / "run/metrics.jsonl").open()]
    close(rates, [0.05, 0.0005, 0.015, 0.015], 1e-9)


def test_rates_of_the_parts(tmp_path, monkeypatch):
    """Stage 1: the rest of the network at --backbone-lr times the classifier's rate."""
    seen, train = [], decoupled_crt.train_one_epoch

    def spy(run, model, loader, optimizer, *rest):
        seen.append([(len(group["params"]), group["lr"]) for group in optimizer.param_groups])
        train(run, model, loader, optimizer, *rest)

    monkeypatch.setattr(decoupled_crt, "train_one_epoch", spy)
    decoupled_crt.main(
        tiny(tmp_path, backbone_lr=0.1, last_block=True, epochs=1, lr_steps=(), stage2_epochs=1)
    )
    assert seen == [[(2, 0.05), (6, pytest.approx(0.005))], [(2, 0.05)]]


def test_stage_2_is_class_balanced():
    for dataset in decoupled_crt.RECIPES:
        args = cli.build(
            Args, decoupled_crt.RECIPES, dataset=dataset, sampling="progressive", mixup_alpha=1.0
        )
        (_, first, epochs), (_, second, more) = decoupled_crt.make_stages(args)
        assert (first.sampling, second.sampling, second.mixup_alpha) == ("progressive", "class", 0)
        assert epochs == range(args.epochs) and more == range(args.epochs, args.epochs + args.stage2_epochs)
    study = decoupled_crt.make_stages(cli.build(Args, decoupled_crt.RECIPES, dataset="mnist_lt"))[1][1]
    counts = [5923, 3596, 2156, 1292, 774, 464, 278, 166, 100, 60]
    assert len(decoupled_crt.make_sampler(Labels(counts), 2, study)) == 59230


def test_nesterov_and_weight_decay_of_each_stage():
    args = Args(wd=0.1, stage2_wd=0.2, stage2_nesterov=True, momentum=0.8)
    for stage, settings, _ in decoupled_crt.make_stages(args):
        group = decoupled_crt.make_optimizer(models.build("resnet8", 10, 0), stage, settings).param_groups[0]
        assert (group["weight_decay"], group["nesterov"], group["momentum"]) == (0.1 * stage, stage == 2, 0.8)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """processes -> result of the run that is not killed."""
    results = {}

    def of(processes):
        if processes not in results:
            folder = tmp_path_factory.mktemp("unbroken") / "run"
            results[processes] = run_or_launch(processes, **LWS, output_dir=folder)
        return results[processes]

    return of


LWS = {**SHORT, "classifier": "lws"}


def run_or_launch(processes, **options):
    if processes == 1:
        return run_here("decoupled_crt.py", **options)
    return result_of(launch("decoupled_crt.py", processes, **options))


slow = pytest.mark.slow


@pytest.mark.parametrize(
    "moment, processes",
    [
        pytest.param("1:5", 1, id="stage 1", marks=slow),
        pytest.param("2:1", 1, id="between the stages", marks=slow),  # before the first checkpoint of stage 2
        pytest.param("3:5", 1, id="stage 2"),
        pytest.param("1:5", 2, id="stage 1, two processes", marks=slow),
        pytest.param("2:1", 2, id="between the stages, two processes", marks=slow),
        pytest.param("3:5", 2, id="stage 2, two processes", marks=slow),
    ],
)
def test_killed_in_either_stage(tmp_path, unbroken, moment, processes):
    """SIGKILL in epoch E after step S; resumed it ends with the unbroken run's weights."""
    options = {**LWS, "output_dir": tmp_path / "run"}
    killed = launch("decoupled_crt.py", processes, env=kill_at(tmp_path, moment), **options)
    assert killed.returncode != 0 and killed.stdout == ""
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == int(moment[0])
    resumed = run_or_launch(processes, **options, resume="auto")
    assert resumed["num_processes"] == processes
    for name in ("weights_sha256", "all", "few", "best_on_test"):
        assert resumed[name] == unbroken(processes)[name]


@pytest.mark.parametrize("classifier", ["tau", "ncm"])
def test_killed_before_the_result(tmp_path, classifier):
    """After the last epoch a resumed run makes up for the missing result."""
    result = decoupled_crt.main(tiny(tmp_path, classifier=classifier))
    os.remove(tmp_path / "run/result.json")
    again = decoupled_crt.main(tiny(tmp_path, classifier=classifier, resume="yes"))
    for name in ("weights_sha256", "all", "few", "best_on_test", "loss"):
        assert again[name] == result[name]
    assert again.get("tau") == result.get("tau")


def test_best_on_test_is_of_the_last_stage(tmp_path):
    result = decoupled_crt.main(tiny(tmp_path, classifier="ncm"))
    assert result["best_on_test"] == result["all"]


@pytest.mark.parametrize("classifier", ["tau", pytest.param("ncm", marks=slow)])
def test_classifiers_without_training_over_processes(tmp_path, classifier):
    """Features are gathered: tau and the class means are those of one process."""
    options = {**SHORT, "classifier": classifier, "arch": "lenet", "lr": 0.02}
    one = run_or_launch(1, output_dir=tmp_path / "one", **options)
    two = result_of(launch("decoupled_crt.py", 2, output_dir=tmp_path / "two", **options))
    assert two["num_processes"] == 2 and two["all"] == pytest.approx(one["all"], abs=0.3)
    assert two.get("tau") == one.get("tau")


def test_held_out_images_are_not_trained_on():
    train_set, _ = datasets.load(Args())
    rest, held = datasets.hold_out(train_set, 10)
    assert held.labels.bincount(minlength=10).tolist() == [10] * 7 + [0] * 3  # of classes of 20 and more
    assert (rest.class_counts + held.class_counts).equal(train_set.class_counts)
    everything = torch.cat([rest.padded, held.padded]).flatten(1)
    assert sorted(map(bytes, everything.numpy())) == sorted(map(bytes, train_set.padded.flatten(1).numpy()))
    again = datasets.hold_out(train_set, 10)[1]
    assert again.padded.equal(held.padded)
    images, labels = held.__getitems__([0, 15])
    assert labels.tolist() == [0, 1] and images.shape == (2, *train_set.shape)


def test_features_are_of_images_without_augmentation():
    train_set, _ = datasets.load(Args())
    network, accelerator = models.build("resnet8", 10, 0), Accelerator()
    features, labels = decoupled_crt.extract(accelerator, network, train_set, Args())
    assert features.shape == (1236, 64) and labels.equal(train_set.labels)
    images, _ = train_set.__getitems__(list(range(128)))
    with torch.no_grad():
        torch.testing.assert_close(features[:128], network.eval().features(images))
