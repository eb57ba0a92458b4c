"""class_rectification.py: the example worked out beforehand, a slow reference, gradients and limits."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator

import class_rectification as crl
from class_rectification import Args
from common import datasets, recipes
from tests.conftest import TINY, close, launch, lines_of, parse, refusal, result_of, run_here, state_of

SCRIPT = "class_rectification.py"
FORMS, LEVELS = ("relative", "absolute", "distribution"), ("class", "instance")
LABELS = torch.tensor([0, 0, 0, 0, 0, 1, 1, 2])
P = torch.tensor(
    [[7, 2, 1], [6, 3, 1], [4, 5, 1], [8, 1, 1], [5, 3, 2], [3, 6, 1], [6, 3, 1], [3, 3, 4]],
    dtype=torch.float64,
)
P = P / 10


def pairs_of(p, kappa_positive, kappa_negative):
    """(positives, is_positive), (negatives, is_negative) of the example."""
    is_own = LABELS[:, None] == LABELS
    is_anchor = crl.minority(LABELS, 3, 0.5)[LABELS] & (is_own.sum(1) > 1)
    closeness, _, _ = crl.class_level(p, LABELS)
    positives, is_positive = crl.hardest(-closeness, is_own & is_anchor[:, None], kappa_positive)
    is_positive &= positives != torch.arange(8)[:, None]
    negatives, is_negative = crl.hardest(closeness, ~is_own & is_anchor[:, None], kappa_negative)
    return (positives, is_positive), (negatives, is_negative)


def example(p=P):
    """Distances of the example, and which are pairs, with one hard positive of a class and two negatives."""
    (positives, is_positive), (negatives, is_negative) = pairs_of(p, 1, 2)
    _, to_positive, to_negative = crl.class_level(p, LABELS)
    return to_positive.gather(1, positives), to_negative.gather(1, negatives), is_positive, is_negative


# Imbalance


@pytest.mark.parametrize(
    "largest, classes, alphas",
    [(5000, 10, (0.2944, 0.4383, 0.4894, 0.5315)), (500, 100, (0.2720, 0.4155, 0.4642, 0.5059))],
)
def test_alpha_of_the_cifars(largest, classes, alphas):
    for factor, alpha in zip((10, 50, 100, 200), alphas, strict=True):
        counts = torch.tensor(datasets.long_tail_counts(largest, classes, factor))
        close(crl.find_alpha(counts, Args()), alpha, 5e-5)


def test_imbalance():
    assert crl.imbalance(torch.tensor([7, 7, 7])) == 0
    for positive in (3, 50, 80):  # of two classes |share of one - 50|
        assert crl.imbalance(torch.tensor([positive, 100 - positive])) == pytest.approx(abs(positive - 50))
    assert crl.imbalance(torch.bincount(LABELS)) == pytest.approx(29.17, abs=0.005)
    assert crl.imbalance(torch.tensor([10**9, 1, 1, 1])) == pytest.approx(75, abs=1e-5)  # 100 (1 - 1 / K)


# Minority


@pytest.mark.parametrize(
    "sizes, rho, expected",
    [
        ((5, 2, 1), 0.5, [1, 2]),
        ((4, 4), 0.5, [0]),  # the smaller index first
        ((3, 5), 0.5, [0]),
        ((5, 3), 0.5, [1]),
        ((8, 0), 0.5, []),
        ((2, 2, 2, 2), 0.5, [0, 1]),
        ((2, 0, 2, 2, 0, 2), 0.75, [0, 2, 3]),
        ((1, 6, 2, 3), 0.5, [0, 2, 3]),  # 1 + 2 + 3 is half of the batch
        ((1, 6, 2, 4), 0.5, [0, 2]),
        ((5, 2, 1), 1.0, [0, 1, 2]),
        ((5, 2, 1), 0.1, []),
        ((58, 42), 0.58, [1]),
        ((42, 58), 0.58, [0]),
        ((58, 142), 0.29, [0]),  # 0.29 * 200 is a little less than 58
    ],
)
def test_minority(sizes, rho, expected):
    labels = torch.repeat_interleave(torch.tensor(sizes))
    for order in (torch.arange(len(labels)), torch.randperm(len(labels))):
        found = crl.minority(labels[order], len(sizes), rho)
        assert found.dtype == torch.bool and found.nonzero().flatten().tolist() == expected


# The example


def test_hard_pairs_of_the_example():
    anchors = crl.minority(LABELS, 3, 0.5)[LABELS]
    assert anchors.nonzero().flatten().tolist() == [5, 6, 7]
    closeness, _, _ = crl.class_level(P, LABELS)
    close(closeness, P[:, LABELS].T, 0)
    (positives, is_positive), (negatives, is_negative) = pairs_of(P, 1, 2)
    assert positives[5].tolist() == positives[6].tolist() == [6]
    assert closeness[5, negatives[5]].tolist() == closeness[6, negatives[6]].tolist() == [0.5, 0.3]
    assert is_positive.nonzero().tolist() == [[5, 0]]  # 6 is no pair of itself, class 2 has one image
    assert is_negative.nonzero().tolist() == [[5, 0], [5, 1], [6, 0], [6, 1]]


def test_relative_of_the_example():
    positive, negative, is_positive, is_negative = example()
    close(positive[5] + 0.5 - negative[5], [0.7, 0.5], 1e-12)
    close(crl.relative(*example(), 0.5), 0.6, 1e-12)


def test_absolute_of_the_example():
    positive, negative, is_positive, is_negative = example()
    close(positive[is_positive], [0.3], 1e-12)
    close(negative[is_negative], [0.1, 0.3, -0.2, 0], 1e-12)
    close(crl.absolute(*example(), 0.5), 0.1625, 1e-12)


def test_distribution():
    nodes, every = torch.tensor([0, 0.5, 1]).double(), torch.ones(1, 2, dtype=torch.bool)
    positive, negative = torch.tensor([[0.25, 0.75]]).double(), torch.tensor([[0.5, 1]]).double()
    close(crl.histogram(positive, every, nodes), [0.25, 0.5, 0.25], 1e-12)
    close(crl.histogram(negative, every, nodes), [0, 0.5, 0.5], 1e-12)
    close(crl.distribution(positive, negative, every, every, nodes), 0.5, 1e-12)
    zeros, ones = torch.zeros(1, 2).double(), torch.ones(1, 2).double()
    assert crl.distribution(zeros, ones, every, every, nodes) == 0
    assert crl.distribution(ones, zeros, every, every, nodes) == 1
    some = torch.tensor([[True, False]])
    close(crl.histogram(positive, some, nodes), [0.5, 0.5, 0], 1e-12)


def test_total_of_the_example():
    ce = F.nll_loss(P.log(), LABELS)
    close(ce, 0.666396, 5e-7)
    close(crl.total(ce, crl.relative(*example(), 0.5), torch.tensor(2), 0.2944), 0.646849, 5e-7)


def test_gradient_of_the_example():
    p = P.clone().requires_grad_()
    crl.relative(*example(p), 0.5).backward()
    assert p.grad[6, 1] < 0 < p.grad[2, 1]
    assert (p.grad[[0, 3, 7]] == 0).all() and (p.grad[:, [0, 2]] == 0).all()


# Against loops


def by_loops(scores, labels, K, form, level, rho, kappa, margin):
    """(L_crl, number of triplets) as the paper's sums, image by image; None without a triplet."""
    B, f = len(labels), scores / scores.norm(dim=1, keepdim=True)
    of = {k: [i for i in range(B) if labels[i] == k] for k in range(K)}
    total, mined = 0, []
    for k in sorted((k for k in range(K) if of[k]), key=lambda k: (len(of[k]), k)):
        total += len(of[k])
        if total > rho * B:
            break
        if len(of[k]) > 1:
            mined.append(k)
    triplets, positive, negative = [], [], []
    for c in mined:
        others = [i for i in range(B) if labels[i] != c]
        for a in of[c]:
            if level == "class":
                P_c = sorted(of[c], key=lambda i: scores[i, c].item())[:kappa]
                N_c = sorted(others, key=lambda i: -scores[i, c].item())[:kappa]
                plus = {i: (scores[a, c] - scores[i, c]).abs() for i in P_c if i != a}
                minus = {i: scores[a, c] - scores[i, c] for i in N_c}
            else:
                far = {i: (f[a] - f[i]).norm() for i in range(B) if i != a}
                same = [i for i in of[c] if i != a]
                plus = {i: far[i] for i in sorted(same, key=lambda i: -far[i].item())[:kappa]}
                minus = {i: far[i] for i in sorted(others, key=lambda i: far[i].item())[:kappa]}
            positive += plus.values()
            negative += minus.values()
            triplets += [
                (margin + p - n).clamp(min=0) for p, n in itertools.product(plus.values(), minus.values())
            ]
    if not triplets:
        return None, 0
    if form == "relative":
        value = sum(triplets) / len(triplets)
    elif form == "absolute":
        pull = sum(d**2 for d in positive) / len(positive)
        push = sum((margin - d).clamp(min=0) ** 2 for d in negative) / len(negative)
        value = 0.5 * (pull + push)
    else:
        low = -1 if level == "class" else 0
        nodes = [low + 0.02 * t for t in range(101)]

        def share(ds, node):
            return (1 - (torch.stack(ds) - node).abs() / 0.02).clamp(min=0).mean()

        below = [share(negative, node) for node in nodes]
        value = sum(share(positive, node) * sum(below[: t + 1]) for t, node in enumerate(nodes))
    return value, len(triplets)


BATCHES = [  # classes, batch, rho, kappa
    (3, 8, 0.5, 2),
    (10, 32, 0.5, 3),
    (10, 24, 0.8, 25),
    (4, 16, 1.0, 1),
    (40, 30, 0.6, 2),
    (2, 20, 0.5, 4),
    (6, 12, 0.3, 100),
]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("form", FORMS)
def test_value_and_gradient_are_those_of_loops(form, level):
    generator, met = torch.Generator().manual_seed(0), 0
    few = 2 if form == "distribution" else 6  # its loops are slow
    for K, B, rho, kappa in BATCHES * few:
        labels = (torch.rand(B, generator=generator) ** 2 * K).long()  # more of the first classes
        size = K if level == "class" else 5
        scores = torch.randn(B, size, generator=generator, dtype=torch.float64)
        scores = scores.softmax(1) if level == "class" else scores
        options = Args(form=form, level=level, rho=rho, kappa=kappa, batch_size=B)
        margin = 0.5 if level == "class" or form == "absolute" else 2 * math.pi / K
        ours, theirs = scores.clone().requires_grad_(), scores.clone().requires_grad_()
        value, triplets = crl.rectification(ours, labels, K, options)
        expected, number = by_loops(theirs, labels, K, form, level, rho, kappa, margin)
        assert triplets == number
        met += number > 0
        if number:
            close(value, expected.detach(), 1e-6)
            gradient, expected = (
                torch.autograd.grad(v, s)[0] for v, s in ((value, ours), (expected, theirs))
            )
            close(gradient, expected, 1e-6)
    assert met > 4 * few


@pytest.mark.parametrize("kappa", [1, 2])
def test_images_with_the_same_features_have_their_pairs(kappa):
    features = torch.tensor([[1.0, 0], [1, 0], [1, 0], [0, 1], [0, 1], [0.6, 0.8], [0.8, 0.6]]).double()
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    options = Args(level="instance", kappa=kappa)
    _, triplets = crl.rectification(features, labels, 2, options)
    assert triplets == by_loops(features, labels, 2, "relative", "instance", 0.5, kappa, 0.0)[1]
    assert triplets == 3 * kappa**2


def test_margin_is_that_given():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(6, (24,), generator=generator)
    scores = torch.randn(24, 6, generator=generator, dtype=torch.float64).softmax(1)
    for form, level in itertools.product(FORMS[:2], LEVELS):
        value, _ = crl.rectification(scores, labels, 6, Args(form=form, level=level, margin=0.3, kappa=4))
        close(value, by_loops(scores, labels, 6, form, level, 0.5, 4, 0.3)[0], 1e-9)


def test_triplets_do_without_the_anchor():
    """Where p_a >= p_+, max(0, m + d(a, +) - d(a, -)) is max(0, m - p_+ + p_-)."""
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(200, 3, generator=generator, dtype=torch.float64)
    a, positive, negative = torch.maximum(p[:, 0], p[:, 1]), p[:, 1], p[:, 2]
    every = torch.ones(1, 1, dtype=torch.bool)
    for i in range(200):
        terms = ((a - positive).abs()[i].view(1, 1), (a - negative)[i].view(1, 1))
        close(crl.relative(*terms, every, every, 0.5), F.relu(0.5 - positive + negative)[i], 1e-12)


# What it does not depend on, and what leaves it out


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("form", FORMS)
def test_order_of_the_batch(form, level):
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(8, (40,), generator=generator)
    scores = torch.randn(40, 8, generator=generator, dtype=torch.float64).softmax(1)
    options = Args(form=form, level=level, kappa=3)
    value, triplets = crl.rectification(scores, labels, 8, options)
    assert triplets > 0 and value > 0
    for _ in range(5):
        order = torch.randperm(40, generator=generator)
        again, number = crl.rectification(scores[order], labels[order], 8, options)
        close(again, value, 1e-12)
        assert number == triplets


@pytest.mark.parametrize("labels", [[0] * 6, [0, 1, 2, 3, 4, 5]])
@pytest.mark.parametrize("rho", [0.5, 1.0])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("form", FORMS)
def test_without_triplets_it_is_cross_entropy(form, level, rho, labels):
    logits, labels = torch.randn(6, 6, generator=torch.manual_seed(0)).requires_grad_(), torch.tensor(labels)
    value, triplets = crl.rectification(
        logits.softmax(1), labels, 6, Args(form=form, level=level, rho=rho, kappa=2)
    )
    plain = F.cross_entropy(logits, labels)
    loss = crl.total(plain, value, triplets, 0.4)
    assert triplets == 0 and torch.equal(loss, plain)
    gradient, expected = (torch.autograd.grad(each, logits, retain_graph=True)[0] for each in (loss, plain))
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("form", FORMS)
def test_images_alike_have_a_finite_gradient(form, level):
    """Distances of 0, a feature of length 0, and softmaxes of 0 and 1."""
    labels = torch.tensor([0, 0, 1, 1, 1, 1, 1, 1])
    for scores in (torch.ones(8, 2) / 2, torch.eye(2)[labels], torch.eye(2)[1 - labels]):
        scores = scores.requires_grad_()
        value, triplets = crl.rectification(scores, labels, 2, Args(form=form, level=level))
        (gradient,) = torch.autograd.grad(value, scores)
        assert triplets > 0 and value.isfinite() and gradient.isfinite().all()


def test_feature_distances():
    features = torch.randn(20, 7, generator=torch.manual_seed(0))
    features[3], features[4] = 2 * features[5], 0
    closeness, to_positive, to_negative = crl.instance_level(features)
    normalised = F.normalize(features, dim=1)
    close(to_positive, (normalised[:, None] - normalised).norm(dim=2), 1e-4)
    assert to_negative.equal(to_positive) and to_positive[3, 5] == 0
    assert (closeness.argmax(1) == torch.arange(20)).all()


def test_images_outside_of_pairs_are_left_alone():
    """Indices carry no gradient: only images of pairs have one, at class level only for the mined classes."""
    p = P.clone().requires_grad_()
    value, triplets = crl.rectification(p, LABELS, 3, Args(kappa=2))
    value.backward()
    assert triplets == 4  # two positives, without itself one an anchor
    assert (p.grad[:, [0, 2]] == 0).all() and (p.grad[[0, 3, 7]] == 0).all()


# The training step


class OneStep:
    """The part of a Run that train_one_epoch uses, for batches that are given."""

    def __init__(self):
        self.accelerator, self.logged = Accelerator(), []

    def steps(self, loader):
        return loader

    def log(self, **values):
        self.logged.append({name: value.item() for name, value in values.items()})


def batch(size=64):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (size, 3, 16, 16), generator=generator, dtype=torch.uint8)
    return images, (torch.rand(size, generator=generator) ** 2 * 10).long()


def train(steps=1, alpha=0.5, epoch=0, lr=0.05, **options):
    """What is logged of a small network that sees the same batch at each step, and its weights."""
    args, run = Args(arch="lenet", **options), OneStep()
    stand_in = SimpleNamespace(num_classes=10, shape=(3, 16, 16), statistics=((0.5,) * 3, (0.25,) * 3))
    model = crl.make_model(stand_in, args)
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    crl.train_one_epoch(run, model, [batch()] * steps, optimizer, alpha, epoch, args)
    return run.logged, list(model.state_dict().values())


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("form", FORMS)
def test_a_step_along_each_form_lowers_it(form, level):
    logged, _ = train(steps=30, alpha=1.0, lr=0.01, form=form, level=level)
    (first, _), (last, loss) = logged[:2], logged[-2:]
    assert last["crl"] < first["crl"] and last["triplets"] > 0
    assert loss["loss"] == last["crl"]
    (parts, loss), _ = train(alpha=0.3, form=form, level=level)
    assert loss["loss"] == pytest.approx(0.3 * parts["crl"] + 0.7 * parts["ce"], rel=1e-5)


def test_limits_of_a_step():
    plain, weights = train(steps=3, alpha=0.0)
    assert all(list(line) == ["loss"] for line in plain)
    before, same = train(steps=3, crl_epoch=2, epoch=1)
    assert before == plain and all(a.equal(b) for a, b in zip(weights, same, strict=True))
    after, other = train(steps=3, crl_epoch=2, epoch=2)
    assert after == train(steps=3)[0] and not all(a.equal(b) for a, b in zip(weights, other, strict=True))


@pytest.mark.parametrize("level, width", [("class", 10), ("instance", 2)])
def test_what_is_ranked(level, width, monkeypatch):
    """Probabilities of the classes, or the features before the classifier."""
    seen, original = [], crl.rectification

    def spy(scores, *rest):
        seen.append(scores)
        return original(scores, *rest)

    monkeypatch.setattr(crl, "rectification", spy)
    train(level=level)
    (scores,) = seen
    assert scores.shape == (64, width)
    assert torch.allclose(scores.sum(1), torch.ones(64)) == (level == "class")


# Runs


def tiny(folder, name, **more):
    return run_here(SCRIPT, **{**TINY, "output_dir": folder / name, **more})


def test_without_it_a_run_is_that_of_cmo(tmp_path):
    short = dict(TINY, epochs=1, lr_steps=(), arch="lenet")
    plain = run_here("cmo.py", **short, output_dir=tmp_path / "cmo", p_mix=0.0)["weights_sha256"]
    result = run_here(SCRIPT, **short, output_dir=tmp_path / "alpha", level="class", alpha=0.0)
    assert result["weights_sha256"] == plain


@pytest.mark.parametrize("level", LEVELS)
def test_float32_under_mixed_precision(level, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    seen, original = set(), crl.rectification

    def spy(scores, *rest):
        seen.add(scores.dtype)
        return original(scores, *rest)

    monkeypatch.setattr(crl, "rectification", spy)
    result = tiny(tmp_path, "run", level=level, epochs=1, lr_steps=(), arch="lenet")
    assert seen == {torch.float32}
    assert result["alpha"] == pytest.approx(0.01 * crl.imbalance(torch.tensor(result["class_counts"])))
    (line,) = lines_of(tmp_path / "run")
    assert line["loss"] < max(line["ce"], line["crl"]) and line["triplets"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "form, level", [("relative", "class"), ("distribution", "class"), ("absolute", "instance")]
)
def test_two_processes_have_the_gradient_of_one(form, level, tmp_path):
    """One step along L_crl alone, of a batch that one or two processes share."""
    step = dict(epochs=1, batch_size=1200, lr_steps=(), lr=30.0, alpha=1.0, arch="lenet", wd=0.0, kappa=7)
    step |= dict(warmup=0, form=form, level=level, imbalance=20, rho=0.8, augment="none")
    tiny(tmp_path, "one", **step)
    result_of(launch(SCRIPT, processes=2, **step, output_dir=tmp_path / "two"))
    tiny(tmp_path, "start", **{**step, "lr": 1e-30})
    one, two, start = (state_of(tmp_path / name) for name in ("one", "two", "start"))
    assert lines_of(tmp_path / "one")[0]["triplets"] == lines_of(tmp_path / "two")[0]["triplets"] > 0
    moved = 0
    for name in one:
        gradient, expected = start[name] - two[name], start[name] - one[name]
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item())
        moved += expected.abs().max() > 1e-5
    assert moved >= len(one) / 2


# Recipes


def test_defaults_are_those_of_the_paper():
    args = Args()
    assert (args.form, args.level, args.rho, args.eta, args.kappa) == ("relative", "class", 0.5, 0.01, 25)
    assert (args.alpha, args.margin, args.crl_epoch) == (None, None, 0)


def test_recipes():
    names = "arch epochs batch_size lr lr_steps lr_factor wd warmup level"
    cifar = ["resnet32", 200, 128, 0.1, (160, 180), 0.01, 2e-4, 5, "class"]
    for dataset in ("cifar10_lt", "cifar100_lt"):
        args = parse(SCRIPT, dataset=dataset)
        assert [getattr(args, name) for name in names.split()] == cifar
    rates = [recipes.learning_rate(epoch, args) for epoch in (0, 4, 159, 160, 180)]
    assert rates == pytest.approx([0.02, 0.1, 0.1, 1e-3, 1e-5])
    assert parse(SCRIPT).level == "instance"
    args = parse(SCRIPT, dataset="inat2018")
    assert (args.epochs, args.batch_size, args.lr_steps, args.augment) == (200, 512, (75, 160), "weak")


# What is refused, and what is told


def test_alpha_beyond_1():
    line = refusal(crl.find_alpha, torch.tensor([500, 5]), Args(eta=0.05))
    assert line == "--eta 0.05: alpha would be 2.45, beyond 1; lower it"


def test_equal_classes_are_told(capsys):
    assert crl.find_alpha(torch.tensor([5, 5]), Args()) == 0
    line = capsys.readouterr().err
    assert line == "0.00 % of the images would have to move for equal classes; alpha 0.0000\n"
    assert crl.find_alpha(torch.tensor([5, 5]), Args(alpha=0.1)) == 0.1
    assert capsys.readouterr().err.endswith("alpha 0.1000\n")
