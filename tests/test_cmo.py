"""cmo.py: every equation against numbers worked out beforehand, and where CMO becomes plain training."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator

import cmo
from cmo import Args
from common import cli, datasets, models
from tests import conftest
from tests.conftest import TINY, refusal

COUNTS = torch.tensor([500, 50, 5])
CIFAR100 = torch.tensor(datasets.long_tail_counts(500, 100, 100))
CIFAR10 = torch.tensor(datasets.long_tail_counts(5000, 10, 100))


def close(actual, expected, tolerance=1e-6):
    conftest.close(actual, expected, tolerance)


# Sampling, Eq. (2)


@pytest.mark.parametrize(
    "r, weights, marginals",
    [
        (0, [1, 1, 1], [0.900901, 0.090090, 0.009009]),
        (0.5, [0.211830, 0.669866, 2.118303], [0.706101, 0.223289, 0.070610]),
        (1, [0.027027, 0.270270, 2.702703], [1 / 3, 1 / 3, 1 / 3]),
        (2, [0.000297, 0.029700, 2.970003], [0.009009, 0.090090, 0.900901]),
    ],
)
def test_sampling_weights(r, weights, marginals):
    actual = cmo.class_weights(COUNTS, "inverse", r)
    close(actual, weights)
    drawn = COUNTS * actual
    close(drawn / drawn.sum(), marginals)


def test_sampling_weights_of_cifar100():
    close(cmo.class_weights(CIFAR100)[[0, 50, 69, 99]], [0.043820, 0.456461, 1.095506, 4.382022])
    per_image = cmo.class_weights(COUNTS)
    close(per_image / (COUNTS * per_image).sum(), [0.000667, 0.006667, 0.066667])


@pytest.mark.parametrize(
    "r, mass",
    [
        (0, [0.813, 0.158, 0.028]),
        (0.5, [0.619, 0.273, 0.107]),
        (1, [0.35, 0.35, 0.3]),
        (2, [0.038, 0.194, 0.768]),
    ],
)
def test_mass_of_the_splits_of_cifar100(r, mass):
    drawn = CIFAR100 * cmo.class_weights(CIFAR100, r=r)
    close(torch.stack([part.sum() for part in (drawn / drawn.sum()).split([35, 35, 30])]), mass, 1e-3)


def test_effective_number_weights():
    close(cmo.class_weights(COUNTS, "effective"), [0.027690, 0.270763, 2.701547])
    close(cmo.class_weights(CIFAR100, "effective")[[0, 50, 99]], [0.044876, 0.457055, 4.378313])
    close(
        cmo.class_weights(CIFAR10, "effective"),
        [0.050611, 0.076900, 0.121134, 0.195037, 0.318805, 0.524590, 0.868349, 1.442627, 2.409223, 3.992724],
    )
    close(
        cmo.class_weights(torch.tensor(datasets.long_tail_counts(5000, 10, 10)), "effective"),
        [0.292341, 0.358366, 0.444188, 0.555540, 0.699693, 0.885779, 1.126570, 1.437524, 1.841483, 2.358515],
    )
    drawn = CIFAR100 * cmo.class_weights(CIFAR100, "effective")  # as a sampling law nearly the one of r = 1
    close(
        torch.stack([part.sum() for part in (drawn / drawn.sum()).split([35, 35, 30])]),
        [0.353, 0.349, 0.299],
        1e-3,
    )


class Labels(torch.utils.data.Dataset):
    """What `streams` needs of a training set."""

    def __init__(self, counts):
        self.class_counts = counts
        self.labels = torch.arange(len(counts)).repeat_interleave(counts)

    def __len__(self):
        return len(self.labels)


def drawn_classes(sampler, labels, epochs=20):
    found = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        found += [index for index, _ in sampler]
    return torch.bincount(labels[torch.tensor(found)], minlength=3) / len(found)


@pytest.mark.parametrize(
    "oversample, background, foreground",
    [
        ("foreground", [500 / 555, 50 / 555, 5 / 555], [1 / 3] * 3),
        ("background", [1 / 3] * 3, [500 / 555, 50 / 555, 5 / 555]),
        ("both", [1 / 3] * 3, [1 / 3] * 3),
    ],
)
def test_streams(oversample, background, foreground):
    train_set = Labels(COUNTS)
    backgrounds, foregrounds = cmo.streams(train_set, Args(oversample=oversample))
    close(drawn_classes(backgrounds, train_set.labels), background, 0.02)
    close(drawn_classes(foregrounds, train_set.labels), foreground, 0.02)
    assert list(backgrounds) != list(foregrounds)


@pytest.mark.parametrize("options", [dict(oversample="nothing"), dict(paste="none")])
def test_streams_without_foregrounds(options):
    backgrounds, foregrounds = cmo.streams(Labels(COUNTS), Args(**options))
    assert foregrounds is None
    assert sorted(index for index, _ in backgrounds) == list(range(555))  # every image once


def test_random_oversampling_draws_classes_evenly():
    train_set = Labels(COUNTS)
    backgrounds, foregrounds = cmo.streams(train_set, Args(oversample="background", paste="none"))
    assert foregrounds is None
    close(drawn_classes(backgrounds, train_set.labels), [1 / 3] * 3, 0.02)


# The box


@pytest.mark.parametrize(
    "lam, x, y, size, corners, adjusted",
    [
        (0.75, 16, 16, (32, 32), (8, 8, 24, 24), 0.75),
        (0.5, 16, 16, (32, 32), (5, 5, 27, 27), 0.52734375),
        (0.5, 0, 31, (32, 32), (0, 20, 11, 32), 0.87109375),
        (0.0, 16, 16, (32, 32), (0, 0, 32, 32), 0.0),
        (0.0, 10, 16, (32, 32), (0, 0, 26, 32), 0.1875),
        (0.9985, 7, 7, (32, 32), (7, 7, 7, 7), 1.0),
        (0.36, 12, 20, (24, 32), (3, 8, 21, 32), 0.4375),
        # the trace below
        (0.562583, 21, 18, (32, 32), (11, 8, 31, 28), 0.609375),
        (0.928724, 9, 20, (32, 32), (5, 16, 13, 24), 0.9375),
        (0.868409, 0, 1, (32, 32), (0, 0, 5, 6), 0.970703),
    ],
)
def test_box_and_mix(lam, x, y, size, corners, adjusted):
    x1, x2, y1, y2 = cmo.box(lam, x, y, size)
    assert (x1, y1, x2, y2) == corners
    backgrounds, foregrounds = torch.zeros(2, 3, *size), torch.ones(2, 3, *size)
    mixed, share = cmo.mix(backgrounds, foregrounds, (lam, x, y), None, Args())
    assert share == pytest.approx(adjusted, abs=1e-6)
    assert mixed.mean().item() == pytest.approx(1 - share, abs=1e-6)  # labels go by the pixels that are left
    assert mixed[:, :, x1:x2, y1:y2].eq(1).all()
    assert mixed.sum() == 2 * 3 * (x2 - x1) * (y2 - y1)


def test_pasting_takes_the_same_place_and_leaves_the_foreground_alone():
    foregrounds = torch.randn(4, 3, 8, 8)
    kept = foregrounds.clone()
    mixed, _ = cmo.mix(torch.zeros(4, 3, 8, 8), foregrounds, (0.25, 3, 5), None, Args())
    x1, x2, y1, y2 = cmo.box(0.25, 3, 5, (8, 8))
    assert mixed[:, :, x1:x2, y1:y2].equal(kept[:, :, x1:x2, y1:y2])
    assert foregrounds.equal(kept)


def test_mixup_blends_without_adjusting():
    mixed, share = cmo.mix(
        torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4), (0.3, 0, 0), None, Args(paste="mixup")
    )
    assert share == 0.3 and torch.allclose(mixed, torch.tensor(0.7))


@pytest.mark.parametrize("paste", ["blur", "jitter"])
def test_perturbed_foregrounds_keep_their_labels(paste):
    train_set, _ = datasets.load(Args())
    images = train_set.__getitems__([0, 400, 700])[0]
    mixed, share = cmo.mix(torch.zeros_like(images), images, (0.3, 0, 0), train_set, Args(paste=paste))
    assert share == 0.0  # the loss is the foregrounds' alone
    assert mixed.shape == images.shape and not torch.allclose(mixed, images)
    assert F.cosine_similarity(mixed.flatten(1), images.flatten(1)).min() > 0.5
    if paste == "blur":  # smoother: neighbours differ less
        assert mixed.diff(dim=3).abs().mean() < images.diff(dim=3).abs().mean()


def test_draws_are_those_of_the_released_code():
    generator = np.random.RandomState(0)
    trace = []
    for _ in range(3):  # p_mix 1 makes all four draws; the first is compared with p_mix
        coin = np.random.RandomState()
        coin.set_state(generator.get_state())
        trace.append((coin.random_sample(), *cmo.draw_mix(generator, (32, 32), Args(p_mix=1.0))))
    close([step[0] for step in trace], [0.548814, 0.437587, 0.020218])
    close([step[1] for step in trace], [0.562583, 0.928724, 0.868409])
    corners = [cmo.box(*step[1:], (32, 32)) for step in trace]
    assert corners == [[11, 31, 8, 28], [5, 13, 16, 24], [0, 5, 0, 6]]
    assert trace[0][2:] == (21, 18)


def test_plain_steps_draw_nothing_more():
    generator, other = np.random.RandomState(0), np.random.RandomState(0)
    assert cmo.draw_mix(generator, (32, 32), Args()) is None  # 0.548814 >= 0.5
    other.random_sample()
    assert generator.random_sample() == other.random_sample()


def test_mean_share_of_the_background():
    for side, mean in ((32, 0.70), (224, 0.68)):
        generator, args = np.random.RandomState(1), Args(p_mix=1.0)
        boxes = [cmo.box(*cmo.draw_mix(generator, (side, side), args), (side, side)) for _ in range(20000)]
        shares = [1 - (x2 - x1) * (y2 - y1) / side**2 for x1, x2, y1, y2 in boxes]
        assert np.mean(shares) == pytest.approx(mean, abs=0.01)


@pytest.mark.parametrize(
    "epochs, first, last, count", [(200, 4, 196, 193), (100, 4, 96, 93), (400, 4, 396, 393)]
)
def test_window(epochs, first, last, count):
    args = Args(epochs=epochs)
    assert not cmo.mixing_window(3, args) and not cmo.mixing_window(epochs - 3, args)
    active = [epoch for epoch in range(epochs) if cmo.mixing_window(epoch, args)]
    assert (active[0], active[-1], len(active)) == (first, last, count)


def test_plan_is_a_function_of_seed_and_epoch():
    args = Args(epochs=20)
    plan = cmo.mixing_plan(7, 200, (32, 32), args)
    assert plan == cmo.mixing_plan(7, 200, (32, 32), args)
    assert plan != cmo.mixing_plan(8, 200, (32, 32), args)
    assert plan != cmo.mixing_plan(7, 200, (32, 32), Args(epochs=20, seed=1))
    assert 70 < sum(draw is not None for draw in plan) < 130  # half of the batches
    assert cmo.mixing_plan(3, 5, (32, 32), args) == [None] * 5
    assert cmo.mixing_plan(7, 5, (32, 32), Args(epochs=20, p_mix=0.0)) == [None] * 5


# Losses


def test_ldam():
    close(cmo.ldam_margins(COUNTS), [0.158114, 0.281171, 0.5])
    close(cmo.ldam_margins(CIFAR100)[[0, 50, 99]], [0.158114, 0.284055, 0.5])
    logits = cmo.SCALE * torch.tensor([[0.3, 0.1, 0.2]]).expand(3, 3)
    losses = cmo.image_losses(logits, torch.arange(3), COUNTS, Args(loss="ldam"))
    close(losses, [1.946120, 14.483708, 18.002476], 1e-5)


def test_balanced_softmax():
    logits, labels = torch.tensor([[2.0, 1.0, 0.0]]).expand(3, 3), torch.arange(3)
    plain = cmo.image_losses(logits, labels, COUNTS, Args())
    balanced = cmo.image_losses(logits, labels, COUNTS, Args(loss="bs"))
    close(plain, [0.407606, 1.407606, 2.407606])
    close(balanced, [0.037432, 3.340017, 6.642602], 2e-6)


def test_equal_counts_make_balanced_softmax_plain():
    logits, labels, counts = torch.randn(8, 4), torch.randint(4, (8,)), torch.full((4,), 7)
    plain = F.cross_entropy(logits, labels, reduction="none")
    close(cmo.image_losses(logits, labels, counts, Args(loss="bs")), plain, 1e-5)


def test_without_a_margin_ldam_is_plain():
    logits, labels = torch.randn(8, 3), torch.randint(3, (8,))
    plain = F.cross_entropy(logits, labels, reduction="none")
    close(cmo.image_losses(logits, labels, COUNTS, Args(loss="ldam", max_margin=1e-9)), plain, 1e-5)


def test_deferred_reweighting():
    accelerator = Accelerator()
    logits, args = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0]]), Args(drw=True, drw_epoch=160, epochs=200)

    def loss(labels, epoch):
        return cmo.batch_loss(accelerator, logits, torch.tensor(labels), COUNTS, epoch, args)

    close(loss([0, 1], 160), 1.314829)
    close(loss([0, 1], 159), 0.907606)
    close(loss([0, 0], 160), 1.407606)  # two terms, each normalised on its own, then blended
    close(loss([2, 1], 160), 2.316511)


@pytest.mark.parametrize("loss", ["ce", "bs", "ldam"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_at_the_edges(loss, dtype):
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]], dtype=dtype, requires_grad=True)
    losses = cmo.image_losses(logits, torch.tensor([1, 1]), torch.tensor([1000, 1, 1]), Args(loss=loss))
    losses.mean().backward()
    assert losses.isfinite().all() and logits.grad.isfinite().all()


# Schedule and networks


def test_learning_rate():
    args = cli.build(Args, cmo.RECIPES, dataset="cifar100_lt")
    rates = [cmo.learning_rate(epoch, args) for epoch in (0, 3, 4, 159, 160, 179, 180)]
    close(rates, [0.02, 0.08, 0.1, 0.1, 1e-3, 1e-3, 1e-5], 1e-12)
    args = cli.build(Args, cmo.RECIPES, dataset="imagenet_lt")
    close([cmo.learning_rate(epoch, args) for epoch in (4, 59, 60, 80)], [0.1, 0.1, 0.01, 0.001], 1e-12)
    args = cli.build(Args, cmo.RECIPES, dataset="inat2018")
    close([cmo.learning_rate(epoch, args) for epoch in (74, 75, 160)], [0.1, 0.01, 0.001], 1e-12)


@pytest.mark.parametrize("dataset", cmo.RECIPES)
def test_recipes(dataset):
    args = cli.build(Args, cmo.RECIPES, dataset=dataset, drw=True)
    assert args.dataset == dataset and args.arch in models.NAMES
    assert all(0 < step < args.epochs for step in args.lr_steps)
    assert any(cmo.mixing_window(epoch, args) for epoch in range(args.epochs))


def values(dataset):
    args = cli.build(Args, cmo.RECIPES, dataset=dataset)
    names = "arch epochs batch_size lr lr_steps lr_factor wd warmup drw_epoch mix_start mix_end imbalance"
    return [getattr(args, name) for name in names.split()] + [args.color_jitter, args.few_under]


def test_recipes_are_the_published_ones():
    cifar = ["resnet32", 200, 128, 0.1, (160, 180), 0.01, 2e-4, 5, 160, 3, 3, 100, 0, 20]
    assert values("cifar10_lt") == values("cifar100_lt") == cifar
    assert values("imagenet_lt") == [
        "resnet50",
        100,
        256,
        0.1,
        (60, 80),
        0.1,
        2e-4,
        5,
        80,
        3,
        3,
        None,
        0.4,
        20,
    ]
    assert values("inat2018") == ["resnet50", 200, 512, 0.1, (75, 160), 0.1, 2e-4, 5, 160, 3, 3, None, 0, 21]
    method = (Args().p_mix, Args().r, Args().alpha, Args().max_margin, Args().paste, Args().oversample)
    assert method == (0.5, 1.0, 1.0, 0.5, "cutmix", "foreground")
    assert datasets.CIFAR_STATISTICS == ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
    assert datasets.IMAGENET_STATISTICS == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert datasets.INAT_STATISTICS == ((0.466, 0.471, 0.380), (0.195, 0.194, 0.192))


# The training step, Alg. 1


class Recorder(torch.nn.Module):
    """Answers every image with the same logits and keeps what it was shown."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.shown = torch.nn.Parameter(torch.tensor(logits)), None

    def forward(self, images):
        self.shown = images.clone()
        return self.logits


class OneStep:
    """The part of a Run that train_one_epoch uses, for a loader of one batch."""

    def __init__(self):
        self.accelerator, self.loss = Accelerator(), None

    def steps(self, loader):
        return loader

    def record(self, loss):
        self.loss = loss.item()


@pytest.mark.parametrize(
    "options, logits, background, foreground, draw, expected",
    [
        (dict(), [[2.0, 1.0, 0.0]], [0], [2], (0.5, 16, 16), 1.352918),
        (dict(loss="bs"), [[2.0, 1.0, 0.0]], [0], [2], (0.5, 16, 16), 3.159407),
        (
            dict(drw=True, drw_epoch=7),
            [[2.0, 1.0, 0.0], [0.0, 1.0, 2.0]],
            [0, 0],
            [2, 1],
            (0.75, 16, 16),
            1.634832,
        ),
        (dict(loss="bs"), [[2.0, 1.0, 0.0]], [0], [2], None, 0.037432),
        (dict(paste="blur"), [[2.0, 1.0, 0.0]], [0], [2], (0.5, 16, 16), 2.407606),
    ],
)
def test_one_training_step(monkeypatch, options, logits, background, foreground, draw, expected):
    """The network sees the pasted image, and each label weighs as much as it covers."""
    monkeypatch.setattr(cmo, "mixing_plan", lambda *_: [draw])
    train_set = datasets.load(Args())[0]
    train_set.class_counts, train_set.shape = COUNTS, (3, 32, 32)
    size = len(background)
    black, white = torch.zeros(size, 3, 32, 32), torch.ones(size, 3, 32, 32)
    batch = (black, torch.tensor(background)), (white, torch.tensor(foreground)) if draw else None
    model, run, args = Recorder(logits), OneStep(), Args(epochs=20, **options)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    cmo.train_one_epoch(run, model, [batch], optimizer, train_set, 7, args)
    assert run.loss == pytest.approx(expected, abs=2e-6)
    assert not model.logits.equal(torch.tensor(logits))  # the optimiser has moved
    if draw and args.paste == "cutmix":
        x1, x2, y1, y2 = cmo.box(*draw, (32, 32))
        assert model.shown[:, :, x1:x2, y1:y2].eq(1).all()
        assert model.shown.sum() == size * 3 * (x2 - x1) * (y2 - y1)
    elif not draw:
        assert model.shown.eq(0).all()


def test_plain_cutmix_mixes_the_batch_with_itself(monkeypatch):
    monkeypatch.setattr(cmo, "mixing_plan", lambda *_: [(0.0, 16, 16)])  # a box over the whole image
    train_set = datasets.load(Args())[0]
    train_set.class_counts, train_set.shape = COUNTS, (3, 4, 4)
    images = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 3, 32, 32).clone()
    model, run = Recorder([[2.0, 1.0, 0.0]] * 8), OneStep()
    labels = torch.tensor([0, 0, 0, 0, 0, 0, 0, 2])
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    cmo.train_one_epoch(
        run,
        model,
        [((images.clone(), labels), None)],
        optimizer,
        train_set,
        7,
        Args(epochs=20, oversample="nothing"),
    )
    order = model.shown[:, 0, 0, 0]
    assert order.sort().values.tolist() == list(range(8)) and order.tolist() != list(range(8))
    assert run.loss == pytest.approx((7 * 0.407606 + 2.407606) / 8, abs=2e-6)


def test_optimiser_and_steps(tmp_path, monkeypatch):
    """SGD with momentum 0.9, weight decay on everything, no Nesterov; an incomplete batch is dropped."""
    seen = {}

    def spy(run, model, loader, optimizer, train_set, epoch, args):
        seen.update(optimizer.param_groups[0], steps=len(loader), parameters=list(model.parameters()))
        raise KeyboardInterrupt

    monkeypatch.setattr(cmo, "train_one_epoch", spy)
    with pytest.raises(KeyboardInterrupt):
        cmo.main(tiny(tmp_path, wd=2e-4, warmup=5))
    assert (seen["momentum"], seen["weight_decay"], seen["nesterov"]) == (0.9, 2e-4, False)
    assert seen["lr"] == pytest.approx(0.05 / 5)
    assert len(seen["params"]) == len(seen["parameters"])
    assert seen["steps"] == 1236 // 64
    for imbalance, steps, rest in ((100, 84, 95), (50, 98, 64), (10, 152, 117)):  # CIFAR-100-LT
        assert divmod(sum(datasets.long_tail_counts(500, 100, imbalance)), 128) == (steps, rest)


# Runs


def tiny(tmp_path, name="run", **options):
    return Args(**{**TINY, "mix_start": -1, "mix_end": 0, "output_dir": str(tmp_path / name), **options})


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(loss="ldam", drw=True, drw_epoch=0),
        dict(loss="bs", weighting="effective"),
        dict(oversample="both", r=0.5),
        dict(oversample="background", paste="mixup"),
        dict(oversample="nothing"),
        dict(paste="blur"),
        dict(paste="jitter"),
    ],
    ids=str,
)
def test_runs(tmp_path, options):
    result = cmo.main(tiny(tmp_path, epochs=1, lr_steps=(), **options))
    assert 0 <= result["all"] <= 100 and result["few"] is not None
    assert np.isfinite(result["loss"])


def test_without_mixing_cmo_is_plain_training(tmp_path):
    """No pasting and p_mix 0 are the same: cross-entropy on the data as it is."""
    plain = cmo.main(tiny(tmp_path, "plain", paste="none"))
    never = cmo.main(tiny(tmp_path, "never", p_mix=0.0))
    mixed = cmo.main(tiny(tmp_path, "mixed"))
    assert plain["weights_sha256"] == never["weights_sha256"]
    assert plain["weights_sha256"] != mixed["weights_sha256"]


def test_training_learns(tmp_path):
    cmo.main(tiny(tmp_path, epochs=4, lr_steps=(3,)))
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert losses[-1] < 0.85 * losses[0]


def test_drw_epoch_after_the_end(capsys):
    line = refusal(lambda: Args(drw=True, drw_epoch=10, epochs=10), capsys)
    assert line.startswith("--drw-epoch 10: not before the end of --epochs 10")


def test_nothing_left_to_mix(capsys):
    line = refusal(lambda: Args(epochs=7), capsys)
    assert (
        line
        == "--mix-start 3, --mix-end 3: nothing of --epochs 7 is left to mix; lower them, or --paste none"
    )
