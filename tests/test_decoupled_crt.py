"""decoupled_crt.py: samplings, classifiers, rates, stages, against numbers worked out beforehand."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

import decoupled_crt
from common import cli, datasets, evaluation, models
from decoupled_crt import Args
from tests.conftest import TINY, close, forget, lines_of, parse, refusal, run_here, state_of

COUNTS = torch.tensor([100, 10, 1])
CIFAR100 = torch.tensor(datasets.long_tail_counts(500, 100, 100))
MNIST = [5923, 3596, 2156, 1292, 774, 464, 278, 166, 100, 60]
# A stage of one epoch within seconds.
SHORT = dict(TINY, epochs=1, lr_steps=(), stage2_epochs=1, stage2_lr=0.05)
IMAGES = SimpleNamespace(num_classes=10, shape=(3, 32, 32), statistics=((0.5,) * 3, (0.25,) * 3))


def run(folder, **options):
    result = run_here("decoupled_crt.py", **{**SHORT, **options}, output_dir=str(folder))
    forget()
    return result


def network(arch="resnet8"):
    return models.build(arch, IMAGES, 0)


# Sampling


@pytest.mark.parametrize(
    "sampling, expected",
    [
        ("instance", [0.9009, 0.0901, 0.0090]),
        ("square-root", [0.7061, 0.2233, 0.0706]),
        ("class", [1 / 3] * 3),
    ],
)
def test_class_probabilities(sampling, expected):
    close(decoupled_crt.class_probabilities(COUNTS, sampling), expected)


def progressive(epoch, epochs):
    return decoupled_crt.class_probabilities(COUNTS, "progressive", epoch / (epochs - 1))


def test_progressive_probabilities():
    close(progressive(2, 5), [0.6171, 0.2117, 0.1712])
    close(progressive(44, 90), [0.6203, 0.2103, 0.1693])
    assert progressive(0, 90).equal(decoupled_crt.class_probabilities(COUNTS, "instance"))
    assert progressive(89, 90).equal(decoupled_crt.class_probabilities(COUNTS, "class"))


def labelled(counts):
    """Images that are their own numbers, of classes of so many."""
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    names = [str(k) for k in range(len(counts))]
    return datasets.LabelledImages(torch.arange(len(labels)), labels, names, (1, 1, 1), None)


def drawn(train_set, epochs, sampling, args):
    """Indices of the images of each of the epochs, [epochs, N]."""
    order = decoupled_crt.sampling_order(train_set, sampling, len(train_set), args)
    sampler = datasets.train_loader(train_set, args, order=order).sampler
    found = []
    for epoch in epochs:
        sampler.set_epoch(epoch)
        found.append(list(sampler))
    return torch.tensor(found)


@pytest.mark.parametrize(
    "sampling, in_a_row, law",
    [
        ("square-root", True, [0.7061, 0.2233, 0.0706]),
        ("class", True, [1 / 3] * 3),
        ("class", False, [1 / 3] * 3),
    ],
)
def test_marginals_over_epochs(sampling, in_a_row, law):
    train_set = labelled([100, 10, 1])
    indices = drawn(train_set, range(200), sampling, Args(batch_size=10, in_a_row=in_a_row))
    assert indices.shape == (200, 111)  # N images an epoch, whatever the law
    close(train_set.labels[indices].flatten().bincount(minlength=3) / indices.numel(), law, 0.012)
    of_class_0 = indices[train_set.labels[indices] == 0].bincount(minlength=100)[:100] / indices.numel()
    close(of_class_0, [law[0] / 100] * 100, 0.0035)  # evenly within the class


def test_progressive_marginals_change_with_the_epoch():
    train_set = labelled([100, 10, 1])
    for epoch, law in ((0, [0.9009, 0.0901, 0.0090]), (1, [0.6171, 0.2117, 0.1712]), (2, [1 / 3] * 3)):
        draws = []
        for seed in range(100):
            draws.append(drawn(train_set, [epoch], "progressive", Args(batch_size=10, epochs=3, seed=seed)))
        labels = train_set.labels[torch.cat(draws)]
        close(labels.flatten().bincount(minlength=3) / labels.numel(), law, 0.015)


def test_a_single_progressive_epoch_is_the_first():
    train_set = labelled([1000, 10, 1])
    labels = train_set.labels[drawn(train_set, [0], "progressive", Args(batch_size=10, epochs=1))]
    assert (labels == 0).double().mean() > 0.9


def test_exponent_one_draws_images_evenly():
    close(decoupled_crt.class_probabilities(COUNTS, "instance") / COUNTS, [1 / 111] * 3, 1e-12)


def test_four_in_a_row():
    """Rounds over all classes; the one image of class 2 comes four times."""
    train_set = labelled([500, 300, 100, 1])
    indices = drawn(train_set, [0], "class", Args(batch_size=10))[0][:16].view(4, 4)
    labels = train_set.labels[indices]
    assert labels.eq(labels[:, :1]).all() and sorted(labels[:, 0].tolist()) == [0, 1, 2, 3]
    assert sorted(len(set(row)) for row in indices.tolist()) == [1, 4, 4, 4]


def test_steps_of_the_study(monkeypatch, tmp_path):
    """Its class-balanced epochs have K times the images of the largest class; those of stage 1 have N."""
    sizes, make = [], datasets.train_loader

    def train_loader(dataset, args, **keywords):
        sizes.append(len(make(dataset, args, **keywords).sampler))
        return make(dataset, args, **keywords)

    monkeypatch.setattr(datasets, "train_loader", train_loader)
    study = dict(schedule="study", classifier="tune", epochs=1, warmup=0, lr_steps=(), stage2_epochs=1)
    run_here("decoupled_crt.py", **{**TINY, **study}, output_dir=tmp_path)
    assert sizes == [1236, 5000]  # 500 images of the largest of ten classes


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


@pytest.mark.parametrize("bias", [[0.0, 0.0], [100.0, -100.0]])
def test_the_bias_has_no_part_in_tau_normalisation(bias):
    old = nn.Linear(2, 2)
    old.weight.data, old.bias.data = torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.tensor(bias)
    new = decoupled_crt.new_classifier(old, Args(classifier="tau"))
    assert new.bias is None
    new.weight.data = decoupled_crt.tau_normalized(old.weight.data, 1.0)
    close(new(torch.tensor([[0.1, 1.0]])), [[0.86, 1.0]])


def image(label, edge):
    """Features of an image of class 0 (1) that is right with every tau below (above) `edge`.

    With weights (10, 0) and (0, 1) the logits of (1, t) are 10^(1 - tau) and t.
    """
    return [1.0, 10 ** (1 - edge)], label


@pytest.mark.parametrize(
    "above, below, tau",
    [
        ([-1], [3], 1.0),  # right with every tau
        ([0.25], [0.35], 0.3),
        ([0.25], [1.55], 1.0),
        ([1.15], [1.95], 1.2),
        ([0.25], [0.55], 0.5),
        ([1.85], [1.95], 1.9),
    ],
)
def test_best_tau(above, below, tau):
    """The highest accuracy; of equal ones the nearest to 1."""
    images = [image(1, edge) for edge in above] + [image(0, edge) for edge in below]
    features, labels = (torch.tensor(part) for part in zip(*images, strict=True))
    weight = torch.tensor([[10.0, 0.0], [0.0, 1.0]])
    assert decoupled_crt.best_tau(features, labels, weight) == tau


def test_best_tau_averages_over_classes():
    """At 0.5 5 of 5 images of class 0 are right and that of class 1 is not, at 1 it is, and 3 of 5 are."""
    images = [image(0, 3), image(0, 3), image(0, 3), image(0, 0.55), image(0, 0.55), image(1, 0.95)]
    features, labels = (torch.tensor(part) for part in zip(*images, strict=True))
    weight = torch.tensor([[10.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])  # class 2 has no image
    assert decoupled_crt.best_tau(features, labels, weight) == 1.0


def scaled(weight, bias):
    linear = nn.Linear(2, 2)
    linear.weight.data, linear.bias.data = torch.tensor(weight), torch.tensor(bias)
    return decoupled_crt.new_classifier(linear, Args(classifier="lws"))


def test_scaled_classifier():
    classifier, features = scaled([[3.0, 4.0], [0.0, 1.0]], [0.0, 0.0]), torch.tensor([[1.0, 1.0]])
    assert classifier(features).equal(classifier[0](features))
    classifier[1].scale.data = torch.tensor([0.5, 2.0])
    close(classifier(features), [[3.5, 2.0]])
    classifier[0].bias.data = torch.tensor([1.0, 1.0])
    close(classifier(features), [[4.0, 4.0]])  # the bias is scaled too


def test_nearest_mean():
    ncm = decoupled_crt.NearestMean(2, 2)
    features = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0], [0.0, 4.0]])
    ncm.fit(features, torch.tensor([0, 0, 1, 1]))
    close(ncm.centre, [1, 1.5])
    close(ncm.means, [[0.4, -0.8], [-0.6329, 0.6878]])
    close(ncm(torch.tensor([[1.0, 1.0]])), [[-0.2000, -3.2494]])


def test_crt_begins_anew_and_the_study_goes_on():
    old = network().classifier
    torch.manual_seed(0)
    new = decoupled_crt.new_classifier(old, Args())
    assert not new.weight.equal(old.weight)
    assert new.weight.abs().max() <= 1 / 8 and new.weight.std() > 0.05  # uniform within 1 / sqrt(64)
    assert decoupled_crt.new_classifier(old, Args(classifier="tune")) is old


@pytest.mark.parametrize("classifier", decoupled_crt.CLASSIFIERS)
def test_make_model(classifier):
    """What a finished run holds, from its options and the facts of its data alone."""
    model = decoupled_crt.make_model(IMAGES, Args(classifier=classifier)).eval()
    assert model(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape == (2, 10)


# Label-aware smoothing


def test_smoothing():
    close(decoupled_crt.smoothing(torch.tensor([500, 50, 5]), 0.4, 0.1), [0.4, 0.142694, 0.1])
    close(decoupled_crt.smoothing(torch.tensor([500, 50, 5]), 0.3, 0.0), [0.3, 0.042694, 0])
    eps = decoupled_crt.smoothing(CIFAR100, 0.4, 0.1)
    close(eps[[0, 35, 50, 99]], [0.4, 0.187256, 0.140809, 0.1])
    close(decoupled_crt.smoothing(torch.tensor([7, 7]), 0.4, 0.1), [0.1, 0.1])  # of equal classes


def test_smoothed_losses():
    logits, labels = torch.tensor([[2.0, 1.0, 0.0]]).expand(3, 3), torch.arange(3)
    eps = decoupled_crt.smoothing(torch.tensor([500, 50, 5]), 0.4, 0.1)
    close(decoupled_crt.smoothed_losses(logits, labels, eps), [0.807606, 1.407606, 2.307606])
    losses = decoupled_crt.smoothed_losses(logits, labels, torch.zeros(3))
    close(losses, [0.407606, 1.407606, 2.407606])


# Rates and recipes


def recipe(dataset, **options):
    return parse("decoupled_crt.py", dataset=dataset, **options)


def rates(numbers, args, stage=1):
    """Learning rates in epochs of a stage, counted from 1 as in the specification."""
    first = args.epochs if stage == 2 else 0
    return [decoupled_crt.learning_rate(first + number - 1, args) for number in numbers]


def test_cosine_to_zero():
    args = Args(lr=0.2, epochs=10, cosine=True, stage2_lr=0.2, stage2_epochs=10, schedule="to-zero")
    for stage in (1, 2):
        close(rates([1, 5, 9, 10], args, stage), [0.19511, 0.1, 0.00489, 0.0], 1e-5)
    steps = Args(epochs=10, lr_steps=(4,), schedule="to-zero")
    close(rates([4, 5], steps), [0.1, 0.01], 1e-12)  # a stage 1 with steps has its own


def test_rates_of_cifar():
    args = recipe("cifar10_lt")
    close(rates([1, 4, 5, 160, 161, 180, 181], args), [0.02, 0.08, 0.1, 0.1, 1e-3, 1e-3, 1e-5], 1e-12)
    second = [0.14 / 3, 0.06, 0.22 / 3, 0.26 / 3, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
    close(rates([1, 2, 3, 4, 5, 9, 10, 19, 20, 30], args, 2), second, 1e-12)
    mixup = recipe("cifar100_lt", mixup=1.0, lr_factor=0.1)
    close(rates([160, 161, 181], mixup), [0.1, 0.01, 0.001], 1e-12)


def test_rates_of_the_study():
    args = recipe("mnist_lt", recipe="study")
    expected = [0.1, 0.09619, 0.08536, 0.06913, 0.05, 0.03087, 0.01464, 0.00381]
    close(rates(range(1, 9), args), expected, 1e-5)
    close(rates(range(1, 5), args, 2), expected[:4], 1e-5)


def test_rates_of_imagenet():
    args = recipe("imagenet_lt")
    close(rates([45, 90], args), [0.1, 0.0], 1e-12)
    close(rates([5, 10], args, 2), [0.1, 0.0], 1e-12)


def test_rates_of_label_aware_smoothing():
    args = recipe("cifar100_lt", recipe="mislas")
    close(rates([1, 6, 10], args, 2), [0.1, 0.05, 0.05 * (1 + np.cos(0.9 * np.pi))], 1e-9)


def test_recipes_are_the_published_ones():
    def values(dataset, names, **options):
        args = recipe(dataset, **options)
        return [getattr(args, name) for name in names.split()]

    names = "arch epochs batch_size lr wd momentum warmup cosine augment imbalance"
    assert values("cifar100_lt", names) == ["resnet32", 200, 128, 0.1, 2e-4, 0.9, 5, False, "weak", 100]
    assert values("imagenet_lt", names) == ["resnet50", 90, 512, 0.2, 5e-4, 0.9, 0, True, "jitter", None]
    assert values("inat2018", names) == ["resnet50", 90, 512, 0.2, 1e-4, 0.9, 0, True, "weak", None]
    assert values("places_lt", names) == ["resnet152", 30, 256, 0.1, 5e-4, 0.9, 0, True, "jitter", None]
    study = dict(recipe="study")
    assert values("mnist_lt", names, **study) == ["lenet", 8, 128, 0.1, 0, 0, 0, True, "weak", 100]
    assert values("places_lt", "pretrained last_block_lr") == [True, 0.01]
    second = "stage2_epochs stage2_lr stage2_wd schedule in_a_row"
    assert values("cifar100_lt", second) == [30, 0.1, 5e-4, "steps", False]
    assert values("imagenet_lt", second) == [10, 0.2, 5e-4, "to-zero", True]
    assert values("inat2018", second) == [30, 0.2, 1e-4, "to-zero", True]
    assert values("places_lt", second) == [10, 0.1, 5e-4, "to-zero", True]
    assert values("mnist_lt", second, **study) == [4, 0.1, 0, "study", True]
    published = ("cifar10_lt", "cifar100_lt", "imagenet_lt", "places_lt", "inat2018")
    assert all(values(dataset, "bn_train") == [True] for dataset in published)


@pytest.mark.parametrize(
    "dataset, las, bn_train, wd, batch_size",
    [
        ("cifar100_lt", (0.4, 0.1, 0.2), True, 2e-4, 128),
        ("cifar10_lt", (0.3, 0.0, 0.5), False, 2e-4, 128),
        ("inat2018", (0.3, 0.0, 0.05), True, 1e-4, 256),
    ],
)
def test_recipes_of_label_aware_smoothing(dataset, las, bn_train, wd, batch_size):
    args = recipe(dataset, recipe="mislas")
    assert (args.las, args.bn_train, args.stage2_wd, args.batch_size) == (las, bn_train, wd, batch_size)
    assert (args.classifier, args.stage2_epochs, args.stage2_lr) == ("las", 10, 0.1)
    assert (args.schedule, args.in_a_row, args.momentum) == ("cosine", True, 0.9)


@pytest.mark.parametrize("counts", [MNIST, [5513, 3643, 2282, 1389, 860, 490, 281, 194, 106, 51]])
def test_the_study_groups_are_classes_0_to_2_3_to_6_7_to_9(counts):
    """Also of the coloured digits, whose labels are noisy."""
    splits = recipe("mnist_lt", recipe="study").splits
    groups = evaluation.split_classes(torch.tensor(counts), *splits).values()
    assert [group.nonzero().flatten().tolist() for group in groups] == [[0, 1, 2], [3, 4, 5, 6], [7, 8, 9]]


@pytest.mark.parametrize(
    "options, line",
    [
        (dict(las=(0.3, 0.0)), "--las: expected 3 arguments"),
        (
            dict(schedule="to-zero", stage2_epochs=1),
            "--schedule to-zero: the one epoch of a stage would have rate 0; use cosine",
        ),
    ],
)
def test_refused_options(options, line):
    assert refusal(parse, "decoupled_crt.py", **options) == line


# The training step


class Answer(nn.Module):
    """Answers with the logits it was given and keeps what it was shown."""

    def __init__(self):
        super().__init__()
        self.logits, self.shown = nn.Parameter(LOGITS.clone()), None

    def forward(self, images):
        self.shown = images
        return self.logits


class OneStep:
    """The part of a Run that train_one_epoch uses."""

    def __init__(self, lam=None):
        self.accelerator, self.lam, self.asked = Accelerator(), lam, []
        self.rng = SimpleNamespace(beta=self.beta)

    def beta(self, a, b):
        self.asked.append((a, b))
        return self.lam

    def steps(self, loader):
        return loader

    def log(self, loss):
        self.loss = loss.item()


LOGITS, LABELS = torch.tensor([[3.0, 1, 0], [0, 2, 5], [1, 0, 7], [2, 2, 0]]), torch.tensor([0, 1, 2, 0])


def one_step(args, run, epoch=0):
    model = Answer()
    images = torch.arange(4.0).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    torch.manual_seed(1)
    eps = torch.tensor([0.4, 0.2, 0.1])
    decoupled_crt.train_one_epoch(run, model, [(images, LABELS)], optimizer, eps, epoch, args)
    assert not model.logits.equal(LOGITS)
    return model.shown[:, 0, 0, 0], run.loss


def test_plain_step():
    shown, loss = one_step(Args(), OneStep())
    assert shown.tolist() == [0.0, 1.0, 2.0, 3.0]
    assert loss == pytest.approx(F.cross_entropy(LOGITS, LABELS).item(), abs=1e-6)


def test_mixup_step():
    """x' = lam x + (1 - lam) x[order], loss = lam CE(y) + (1 - lam) CE(y[order]), one lam for the batch."""
    torch.manual_seed(1)
    order = torch.randperm(4)
    assert not order[order].equal(torch.arange(4))  # no order that is its own inverse
    run = OneStep(0.75)
    shown, loss = one_step(Args(mixup=0.4), run)
    close(shown, 0.75 * torch.arange(4) + 0.25 * order, 1e-6)
    expected = 0.75 * F.cross_entropy(LOGITS, LABELS) + 0.25 * F.cross_entropy(LOGITS, LABELS[order])
    assert loss == pytest.approx(expected.item(), abs=1e-6) and run.asked == [(0.4, 0.4)]
    assert one_step(Args(mixup=0.4), OneStep(1.0))[1] == one_step(Args(), OneStep())[1]  # the plain step


def test_stage_2_has_no_mixup_and_smooths_with_las_alone():
    plain = one_step(Args(), OneStep())[1]
    assert one_step(Args(mixup=0.4, epochs=3), OneStep(), epoch=3)[1] == plain
    las = Args(classifier="las", mixup=0.4, epochs=3)
    log_p = LOGITS.log_softmax(1)
    own, all_classes = log_p[range(4), LABELS], log_p.mean(1)
    eps = torch.tensor([0.4, 0.2, 0.1, 0.4])
    expected = -((1 - eps) * own + eps * all_classes).mean().item()
    assert one_step(las, OneStep(), epoch=3)[1] == pytest.approx(expected, abs=1e-6)
    assert one_step(Args(classifier="las"), OneStep())[1] == plain  # stage 1


# Both stages


@pytest.fixture(scope="module")
def stage1(tmp_path_factory):
    """The folder of a finished stage 1."""
    folder = tmp_path_factory.mktemp("stage1")
    run(folder, classifier="joint")
    return folder


def check_backbone(before, after, moved):
    """Bit for bit the same; the statistics of BatchNorm move if and only if they are to."""
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    backbone = [name for name in before if name.startswith("backbone")]
    assert any(name.endswith("running_mean") for name in backbone)
    for name in backbone:
        assert before[name].equal(after[name]) != (moved and name.endswith(statistics)), name


@pytest.mark.parametrize(
    "bn_train, classifier",
    [
        (False, "lws"),
        (True, "las"),
        pytest.param(True, "crt", marks=pytest.mark.slow),
        pytest.param(False, "tune", marks=pytest.mark.slow),
    ],
)
def test_stage_2_leaves_the_backbone(tmp_path, stage1, classifier, bn_train):
    run(tmp_path, classifier=classifier, stage1=str(stage1), bn_train=bn_train)
    before, after = state_of(stage1), state_of(tmp_path)
    check_backbone(before, after, bn_train)
    moved = {
        name for name in after if "classifier" in name and not after[name].equal(before.get(name, COUNTS))
    }
    if classifier in ("lws", "las"):
        linear_moved = not after["classifier.0.weight"].equal(before["classifier.weight"])
        assert linear_moved == (classifier == "las")
        assert not after["classifier.1.scale"].equal(torch.ones(10))
    else:
        assert moved == {"classifier.weight", "classifier.bias"}
    loaded = models.load(tmp_path)
    assert all(loaded.state_dict()[name].equal(after[name]) for name in after)


@pytest.mark.slow
@pytest.mark.parametrize("classifier", ["crt", "tune", "lws", "las", "tau", "ncm"])
def test_both_in_one_command_are_one_after_the_other(tmp_path, stage1, classifier):
    options = dict(classifier=classifier, tau=1.0)
    together = run(tmp_path / "both", **options)
    apart = run(tmp_path / "second", stage1=str(stage1), **options)
    assert together["weights_sha256"] == apart["weights_sha256"]
    assert together["all"] == apart["all"]
    assert [len(lines_of(tmp_path / name)) for name in ("both", "second")] == [2, 1]


def test_images_that_set_the_classifier(tmp_path, stage1, monkeypatch):
    """tau: the held-out images; NCM: the training set. Never the test set of 1,000."""
    asked, extract = [], decoupled_crt.extract

    def spy(accelerator, network, dataset, args):
        asked.append(dataset)
        return extract(accelerator, network, dataset, args)

    monkeypatch.setattr(decoupled_crt, "extract", spy)
    result = run(tmp_path / "tau", classifier="tau", held_out=10, stage1=str(stage1))
    assert result["tau"] in [i / 10 for i in range(21)]
    assert result["class_counts"] == [500, 299, 179, 107, 64, 38, 23, 13, 8, 5]  # splits go by all images
    assert asked[0].labels.bincount(minlength=10).tolist() == [10] * 7 + [0] * 3
    run(tmp_path / "ncm", classifier="ncm", stage1=str(stage1))
    assert len(asked[1]) == 1236
    weight = state_of(stage1)["classifier.weight"]
    close(
        state_of(tmp_path / "tau")["classifier.weight"], decoupled_crt.tau_normalized(weight, result["tau"])
    )
    assert models.load(tmp_path / "ncm").classifier.means.equal(
        state_of(tmp_path / "ncm")["classifier.means"]
    )


def test_refused_runs(tmp_path, stage1):
    """Before any training: nothing to choose tau on; a network with other layers."""
    for options, words in (
        (dict(classifier="tau"), "--held-out 0: leaves no image to choose tau on"),
        (dict(classifier="tau", held_out=300), "--held-out 300: leaves no image"),
        (dict(arch="lenet", stage1=str(stage1)), f"{stage1}: its network does not fit"),
        (dict(stage1="nowhere"), "nowhere: holds no finished run"),
    ):
        with pytest.raises(cli.Refused) as refused:
            run_here("decoupled_crt.py", **SHORT, **options, output_dir=str(tmp_path))
        assert str(refused.value).startswith(words)
        forget()


def spy_rates(monkeypatch, folder, **options):
    """(parameters, learning rate, weight decay, Nesterov) of each group in each epoch, without training."""
    seen = []

    def spy(run, model, loader, optimizer, *rest):
        names = ("lr", "weight_decay", "nesterov")
        seen.append([(len(g["params"]), *(g[name] for name in names)) for g in optimizer.param_groups])

    monkeypatch.setattr(decoupled_crt, "train_one_epoch", spy)
    run(folder, **options)
    return seen


def test_what_each_stage_trains(tmp_path, monkeypatch):
    """Stage 1 of Places-LT: the last block at its own rate; LAS: scales, and the classifier at a share."""
    options = dict(classifier="las", las=(0.4, 0.1, 0.3), last_block_lr=0.005, wd=0.1, stage2_wd=0.2)
    seen = spy_rates(monkeypatch, tmp_path, **options, stage2_epochs=2, stage2_lr=0.1)
    first = [(2, 0.05, 0.1, False), (6, pytest.approx(0.005), 0.1, False)]
    second = [(1, 0.1, 0.2, False), (2, pytest.approx(0.03), 0.2, False)]
    third = [(1, 0.05, 0.2, False), (2, pytest.approx(0.015), 0.2, False)]
    assert seen == [first, second, third]


@pytest.mark.slow
def test_nesterov_in_stage_2_of_the_bag_of_tricks(tmp_path, monkeypatch):
    seen = spy_rates(monkeypatch, tmp_path, schedule="steps", stage2_wd=0.2, momentum=0.8)
    assert [[group[3] for group in groups] for groups in seen] == [[False], [True]]


@pytest.mark.slow
def test_only_the_last_block_and_the_classifier(tmp_path):
    run(tmp_path, last_block_lr=0.005, classifier="joint")
    before, after = network(), state_of(tmp_path)
    for name, parameter in before.named_parameters():
        moved = name.startswith(("backbone.6.0.", "classifier."))
        assert after[name].equal(parameter) != moved, name


@pytest.mark.slow
def test_las_without_a_rate_is_stage_1(tmp_path, stage1):
    options = dict(classifier="las", stage2_lr=1e-12, stage2_wd=0.0, bn_train=False, stage1=str(stage1))
    result = run(tmp_path, **options)
    assert result["per_class"] == json.loads((stage1 / "result.json").read_text())["per_class"]


def test_cross_entropy_of_cmo_is_stage_1(tmp_path):
    """Bit for bit, so that one run serves as stage 1 of all classifiers and as the row of cross-entropy."""
    options = dict(TINY, epochs=1, lr_steps=())
    cmo = run_here("cmo.py", **options, p_mix=0.0, output_dir=str(tmp_path / "cmo"))
    joint = run(tmp_path / "joint", **options, classifier="joint")
    assert joint["weights_sha256"] == cmo["weights_sha256"]


@pytest.mark.slow
def test_stage_1_may_be_of_another_script(tmp_path):
    """Here a CMO with LAS on top; --classifier joint tells how good the network is as it came."""
    options = dict(TINY, epochs=1, lr_steps=(), mix_start=0, mix_end=0)
    cmo = run_here("cmo.py", **options, output_dir=str(tmp_path / "cmo"))
    forget()
    joint = run(tmp_path / "joint", classifier="joint", stage1=str(tmp_path / "cmo"))
    assert joint["per_class"] == cmo["per_class"] and joint["weights_sha256"] == cmo["weights_sha256"]
    run(tmp_path / "las", classifier="las", stage1=str(tmp_path / "cmo"))
    check_backbone(state_of(tmp_path / "cmo"), state_of(tmp_path / "las"), moved=False)


@pytest.mark.slow
def test_joint_training_is_plain_training(tmp_path):
    """Stage 1 alone, cross-entropy and every image once: bit for bit the plain training of cmo.py."""
    ours = run(tmp_path / "joint", classifier="joint", wd=1e-3)
    options = dict(TINY, epochs=1, lr_steps=(), wd=1e-3, p_mix=0.0)
    theirs = run_here("cmo.py", **options, output_dir=str(tmp_path / "cmo"))
    assert ours["weights_sha256"] == theirs["weights_sha256"]
