"""csa.py: masks, bank, blending, streams and schedule against numbers worked out beforehand; its limits."""

import json

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image

import cmo
import csa
from common import cli, datasets, models, runs
from csa import Args
from tests.conftest import TINY, launch, refusal, result_of, synthetic_objects

MAPS = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]], [[4.0, 0.0], [0.0, 0.0]]]])  # [1, 2, 2, 2]
WEIGHTS = torch.tensor([[1.0, -0.5]])
SHAPE = (3, 32, 32)


def tiny(tmp_path, name="run", **options):
    return Args(**{**TINY, "start_aug": 1, "output_dir": str(tmp_path / name), **options})


def model(num_classes=5, arch="resnet8", seed=0, **options):
    train_set = type("Set", (), dict(num_classes=num_classes, shape=SHAPE))
    return csa.make_model(train_set, Args(arch=arch, seed=seed, **options))


# Masks


def test_mask_by_hand():
    """Weighted sum [[-1, 2], [3, 4]], of it the positive part over its largest value, (1 - that)^2."""
    masks = csa.background_masks(MAPS, WEIGHTS, (2, 2))
    torch.testing.assert_close(masks, torch.tensor([[[[1.0, 0.25], [0.0625, 0.0]]]]))
    for factor in (1e-3, 0.25, 40.0):
        torch.testing.assert_close(csa.background_masks(MAPS, factor * WEIGHTS, (2, 2)), masks)


def test_each_image_is_scaled_by_itself():
    both = csa.background_masks(torch.cat([MAPS, 100 * MAPS]), WEIGHTS.expand(2, 2), (2, 2))
    torch.testing.assert_close(both[0], both[1])
    lifted = csa.background_masks(MAPS + torch.tensor([5.0, 0.0]).view(1, 2, 1, 1), WEIGHTS, (2, 2))
    torch.testing.assert_close(lifted, torch.tensor([[[[1.0, 0.16], [0.04, 0.0]]]]))  # [[4, 7], [8, 9]]


@pytest.mark.parametrize("maps", [-MAPS[:, :1], torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 3.0)])
def test_a_map_without_a_peak_masks_nothing(maps):
    assert csa.background_masks(maps, torch.ones(1, 1), (8, 8)).equal(torch.ones(1, 1, 8, 8))


def test_masks_are_resized_and_stay_within_0_and_1():
    generator = torch.Generator().manual_seed(0)
    maps, weights = torch.randn(50, 8, 6, 6, generator=generator), torch.randn(50, 8, generator=generator)
    small, large = (csa.background_masks(maps, weights, (size, size)) for size in (6, 24))
    assert large.shape == (50, 1, 24, 24) and large.min() == 0 and large.max() == 1
    assert small.amin((1, 2, 3)).eq(0).all() and small.amax((1, 2, 3)).eq(1).all()
    cam = 1 - small.sqrt()  # bicubic, corners not aligned; overshoot is cut off
    resized = F.interpolate(cam, (24, 24), mode="bicubic", align_corners=False)
    assert resized.max() > 1 and resized.min() < 0
    torch.testing.assert_close(large, (1 - resized.clamp(0, 1)) ** 2, atol=1e-5, rtol=0)


@pytest.mark.parametrize("arch", ["resnet8", "resnet10"])
def test_closed_form_is_the_gradient(arch):
    """With average pooling and a linear head: the same weights up to h * w, the same masks."""
    network, images = models.build(arch, 7, 0, (3, 64, 64)).eval(), torch.randn(6, 3, 64, 64)
    labels = torch.tensor([0, 1, 2, 3, 4, 6])
    maps = network.feature_map(images).detach()
    closed, gradient = (f(network, maps, labels) for f in (csa.channel_weights, csa.gradient_weights))
    torch.testing.assert_close(closed / maps[0, 0].numel(), gradient, atol=1e-6, rtol=1e-5)
    masks = [csa.background_masks(maps, weights, (64, 64)) for weights in (closed, gradient)]
    torch.testing.assert_close(*masks, atol=1e-5, rtol=0)
    assert masks[0].std() > 0.1


def test_gradient_by_hand():
    """Logit 1 = 2 * mean of channel 0 - mean of channel 1: the mean over 4 pixels of its gradient."""
    network = models.Network(torch.nn.Identity(), torch.nn.Linear(2, 2))
    network.classifier.weight.data = torch.tensor([[1.0, 1.0], [2.0, -1.0]])
    weights = csa.gradient_weights(network, MAPS, torch.tensor([1]))
    torch.testing.assert_close(weights, torch.tensor([[0.5, -0.25]]))
    assert not weights.requires_grad and network.classifier.weight.grad is None


def test_lenet_takes_the_gradient():
    """Its layers between map and head are not linear, so that the weights go by the image."""
    torch.manual_seed(0)
    network, images = models.build("lenet", 5, 0, (1, 28, 28)).double(), torch.rand(3, 1, 28, 28).double()
    maps, labels = network.feature_map(images).detach(), torch.tensor([1, 1, 1])
    weights = csa.channel_weights(network, maps, labels)
    assert weights.shape == (3, 16) and not weights[0].allclose(weights[1])
    for channel in range(16):  # moved everywhere at once
        step = torch.zeros(1, 16, 1, 1).double()
        step[0, channel] = 1e-7
        up, down = (network.classifier(network.pool(maps + sign * step))[:, 1] for sign in (1, -1))
        slope = (up - down) / 2e-7 / maps[0, 0].numel()
        torch.testing.assert_close(weights[:, channel], slope.detach(), atol=1e-6, rtol=1e-4)


# Harvest, bank, blend


def test_fit():
    logits = torch.tensor([[2.0, 1.0, 0.0]] * 3)  # softmax .6652 .2447 .0900
    torch.testing.assert_close(
        logits.softmax(1)[0], torch.tensor([0.6652, 0.2447, 0.0900]), atol=1e-4, rtol=0
    )
    labels = torch.tensor([0, 1, 2])
    assert csa.is_fit(logits, labels, 0.8).tolist() == [False, False, False]
    assert csa.is_fit(logits, labels, 0.6).tolist() == [True, False, False]
    assert csa.is_fit(logits, labels, 0.0).tolist() == [True, True, True]
    even = torch.zeros(1, 2)  # one half, exactly
    assert csa.is_fit(even, torch.tensor([1]), 0.5).item()


@pytest.mark.parametrize("arch", ["resnet8", "lenet"])
def test_harvest_goes_by_the_label_in_eval_mode(arch):
    heads, accelerator = model(arch=arch).train(), Accelerator()
    for module in heads.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean)
    before = {name: value.clone() for name, value in heads.state_dict().items()}
    images, labels = torch.randn(40, *SHAPE), torch.arange(40) % 5
    masks, fit = csa.harvest(accelerator, heads, images, labels, 0.2)
    assert 0 < fit.sum() < 40
    assert all(value.equal(before[name]) for name, value in heads.state_dict().items())
    assert all(module.training for module in heads.modules())
    assert all(parameter.grad is None for parameter in heads.parameters())
    assert masks.shape == (40, 1, 32, 32) and not masks.requires_grad
    one = [csa.harvest(accelerator, heads, images[i : i + 1], labels[i : i + 1], 0.2) for i in range(40)]
    torch.testing.assert_close(
        masks, torch.cat([m for m, _ in one]), atol=1e-4, rtol=0
    )  # no batch statistics
    heads.eval()
    logits = heads(images)[:, 0]  # head_u
    assert fit.tolist() == csa.is_fit(logits, labels, 0.2).tolist()
    others = (labels + 1) % 5
    assert not csa.harvest(accelerator, heads, images, others, 0.2)[0].allclose(masks, atol=0.1)


def contexts(*numbers):
    """Images and masks that carry their numbers."""
    numbers = torch.tensor(numbers, dtype=torch.float32).view(-1, 1, 1, 1)
    return numbers.expand(-1, 3, 2, 2), numbers.expand(-1, 1, 2, 2) / 100


def kept(bank):
    return bank.entries[bank.flags][:, 0, 0, 0].tolist()


def test_bank_keeps_the_last():
    bank = csa.Bank(4)
    bank.push(*contexts(1, 2, 3), torch.tensor([True] * 3))
    assert kept(bank) == [1, 2, 3] and bank.holds(3) and not bank.holds(4)
    bank.push(*contexts(4, 5, 6), torch.tensor([True] * 3))
    assert kept(bank) == [3, 4, 5, 6] and bank.holds(4)


def test_bank_takes_only_what_is_fit():
    bank = csa.Bank(3)
    bank.push(*contexts(1, 2, 3, 4), torch.tensor([False, True, False, False]))
    assert kept(bank) == [2] and bank.holds(1) and not bank.holds(3)
    bank.push(*contexts(5, 6), torch.tensor([False, False]))
    assert kept(bank) == [2] and not bank.holds(3)
    bank.push(*contexts(7, 8), torch.tensor([True, False]))
    assert kept(bank) == [2, 7] and not bank.holds(3)
    bank.push(*contexts(*range(10, 20)), torch.arange(10) % 2 == 0)
    assert kept(bank) == [14, 16, 18] and bank.holds(3)
    assert len(bank.entries) == 3


def test_drawing_is_without_replacement_and_takes_nothing_out():
    bank = csa.Bank(8)
    bank.push(*contexts(*range(12)), torch.arange(12) % 2 == 1)  # 1, 3, 5, 7, 9, 11
    seen = set()
    for _ in range(40):
        images, masks = bank.draw(4)
        numbers = images[:, 0, 0, 0].tolist()
        assert images.shape == (4, 3, 2, 2) and masks.shape == (4, 1, 2, 2)
        assert len(set(numbers)) == 4 and set(numbers) <= {1, 3, 5, 7, 9, 11}
        torch.testing.assert_close(masks[:, 0, 0, 0], torch.tensor(numbers) / 100)  # each with its own mask
        seen.add(tuple(numbers))
    assert len(seen) > 20 and kept(bank) == [1, 3, 5, 7, 9, 11]


def test_blend():
    image, context = torch.full((1, 3, 2, 2), 2.0), torch.full((1, 3, 2, 2), 8.0)
    quarter, one, zero = (torch.full((1, 1, 2, 2), value) for value in (0.25, 1.0, 0.0))
    assert csa.blend(image, context, quarter, 0.5).eq(2.75).all()
    assert csa.blend(image, context, quarter, 0.0).equal(image)
    assert csa.blend(image, context, zero, 0.7).equal(image)
    assert csa.blend(image, context, one, 1.0).equal(context)
    image = torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last)
    blended = csa.blend(image, torch.rand(2, 3, 4, 4), torch.rand(2, 1, 4, 4), 0.5)
    assert blended.is_contiguous(memory_format=torch.channels_last)  # as the network's weights


# The balanced stream


def test_probabilities_by_q():
    counts = torch.tensor([500, 50, 5])
    for q, expected in (
        (1, [0.900901, 0.090090, 0.009009]),
        (0, [1 / 3] * 3),
        (0.5, [0.706101, 0.223289, 0.070610]),
    ):
        probabilities = csa.class_probabilities(counts, q)
        torch.testing.assert_close(probabilities, torch.tensor(expected).double(), atol=1e-6, rtol=0)


@pytest.fixture
def train_set():
    args = Args()
    return datasets.load(args)[0]


def test_streams(train_set):
    labels = train_set.labels
    natural, balanced = csa.streams(train_set, Args())
    order = [index for index, _ in natural]
    assert sorted(order) == list(range(len(train_set)))
    first, again = list(balanced), list(balanced)
    assert first == again and len(first) == len(train_set)
    groups = labels[[index for index, _ in first]]
    assert {seed for _, seed in natural}.isdisjoint(seed for _, seed in first)  # streams of their own
    assert (groups[:1236].view(-1, 4) == groups[:1236:4, None]).all()
    balanced.set_epoch(1)
    assert list(balanced) != first
    for q, shares in ((0.0, [0.1] * 10), (1.0, train_set.class_counts / len(train_set))):
        _, weighted = csa.streams(train_set, Args(q=q))
        found = []
        for epoch in range(60):
            weighted.set_epoch(epoch)
            found += [index for index, _ in weighted]
        drawn = torch.bincount(labels[found], minlength=10) / len(found)
        torch.testing.assert_close(drawn, torch.as_tensor(shares), atol=0.01, rtol=0)


# The network


def test_parameter_counts():
    for classes, total in ((100, 476_504), (10, 464_804)):
        heads = model(classes, "resnet32")
        assert models.count_parameters(heads.network.backbone) == 463_504
        assert models.count_parameters(heads) == total
        assert models.count_parameters(heads.head_u) == models.count_parameters(heads.head_b) == 65 * classes


def test_heads_are_initialised_apart():
    heads = model(10)
    plain = models.build("resnet8", 10, 0, SHAPE)
    assert all(value.equal(heads.network.state_dict()[name]) for name, value in plain.state_dict().items())
    assert not heads.head_b.weight.equal(heads.head_u.weight)
    assert heads.head_b.weight.std().item() == pytest.approx(heads.head_u.weight.std().item(), rel=0.2)
    assert not model(10, seed=1).head_b.weight.equal(heads.head_b.weight)


def test_predictions():
    heads, images = model().eval(), torch.randn(4, *SHAPE)
    u, b, average = heads(images).unbind(1)
    features = heads.network.features(images)
    torch.testing.assert_close(u, heads.network.classifier(features))
    torch.testing.assert_close(b, heads.head_b(features))
    torch.testing.assert_close(average, (u + b) / 2)


def test_each_batch_has_its_statistics_the_balanced_one_first():
    heads, images, others = model(), torch.randn(8, *SHAPE), 3 + 2 * torch.randn(8, *SHAPE)
    twin = model()
    z_u, z_b = heads(images, others)
    theirs_b = twin.head_b(twin.network.features(others))  # two passes, one after the other
    theirs_u = twin.network(images)
    torch.testing.assert_close((z_u, z_b), (theirs_u, theirs_b))
    norm, expected = heads.network.backbone[1], torch.zeros(16)
    for batch in (others, images):
        expected = 0.9 * expected + 0.1 * heads.network.backbone[0](batch).mean((0, 2, 3)).detach()
    torch.testing.assert_close(norm.running_mean, expected, atol=1e-5, rtol=1e-5)
    assert norm.num_batches_tracked == 2


def test_new_last_block_on_a_frozen_trunk():
    heads = model(arch="resnet10", last_block=True, bank=False).train()
    plain = models.build("resnet10", 5, 0, SHAPE)
    *_, (last,) = heads.network.backbone
    trained = {id(p) for part in (last, heads.head_u, heads.head_b) for p in part.parameters()}
    for name, parameter in heads.named_parameters():
        assert parameter.requires_grad == (id(parameter) in trained), name
    assert not last.conv1.weight.equal(plain.backbone[-1][-1].conv1.weight)
    before = {name: value.clone() for name, value in heads.network.backbone.state_dict().items()}
    for _ in range(2):  # back and forth, as in training
        heads.eval()
        heads.train()
    sum(z.sum() for z in heads(torch.randn(4, *SHAPE), torch.randn(4, *SHAPE))).backward()
    for name, value in heads.network.backbone.state_dict().items():
        moved = name.startswith("7.0.") and ("running" in name or "tracked" in name)
        assert value.equal(before[name]) != moved, name
    assert last.conv1.weight.grad is not None and heads.network.backbone[0].weight.grad is None


# Schedule and recipes


def rates(epochs, **given):
    args = cli.build(Args, csa.RECIPES, **given)
    return [csa.learning_rate(epoch, args) for epoch in epochs]


def test_learning_rate():
    epochs = (0, 1, 4, 5, 159, 160, 179, 180, 199)
    expected = [0.04, 0.08, 0.2, 0.2, 0.2, 0.02, 0.02, 0.002, 0.002]
    assert rates(epochs, dataset="cifar100_lt") == pytest.approx(expected)
    for dataset in ("imagenet_lt", "places_lt"):
        assert rates((0, 45, 89), dataset=dataset) == pytest.approx([0.2, 0.1, 0.00006], abs=2e-6)
    expected = [0.1, 0.09619, 0.08536, 0.06913, 0.05, 0.03087, 0.01464, 0.00381]
    assert rates(range(8), dataset="mnist_lt") == pytest.approx(expected, abs=1e-5)


def test_schedule_of_200_epochs():
    args = cli.build(Args, csa.RECIPES, dataset="cifar10_lt", mixup_alpha=1.0)
    assert [epoch for epoch in range(200) if csa.balances(epoch, args)] == list(range(10, 200))
    assert [epoch for epoch in range(200) if csa.mixes(epoch, args)] == list(range(197))
    plain = cli.build(Args, csa.RECIPES, dataset="cifar10_lt")
    assert not any(csa.mixes(epoch, plain) for epoch in range(200))


def test_recipes_are_the_published_ones():
    def values(dataset):
        names = "arch epochs batch_size bank_size lr lr_steps lr_factor warmup cosine wd color_jitter"
        args = cli.build(Args, csa.RECIPES, dataset=dataset)
        assert (args.start_aug, args.end_aug, args.delta, args.lam_min, args.lam_max) == (10, 3, 0.8, 0, 1)
        assert args.mixup_alpha == 0 and args.bank and args.q is None and args.prediction == "b"
        return [getattr(args, name) for name in names.split()]

    cifar = ["resnet32", 200, 128, None, 0.2, (160, 180), 0.1, 5, False, 2e-4, 0]
    assert values("cifar10_lt") == values("cifar100_lt") == cifar
    large = [90, 256, None, 0.2, (), 0.1, 0, True, 5e-4, 0.4]
    assert values("imagenet_lt") == ["resnet10", *large]
    assert values("places_lt") == ["resnet152", *large]
    places = cli.build(Args, csa.RECIPES, dataset="places_lt")
    assert places.pretrained and places.last_block and places.imbalance is None
    groups = {
        name: (recipe.get("many_classes"), recipe.get("few_classes")) for name, recipe in csa.RECIPES.items()
    }
    assert groups["cifar10_lt"] == groups["mnist_lt"] == groups["cmnist_lt"] == (3, 3)
    assert groups["cifar100_lt"] == (36, 29)
    assert groups["imagenet_lt"] == (390, 165) and groups["places_lt"] == (131, 77)
    assert groups["image_folder"] == groups["synthetic"] == (None, None)


@pytest.mark.parametrize(
    "options, line",
    [
        (
            dict(bank_size=100),
            "--bank-size 100: less than --batch-size 128, so that head_b would never learn",
        ),
        (dict(bank=False, delta=0.5), "--delta 0.5: has no effect with --no-bank; leave it out"),
        (dict(bank=False, bank_size=256), "--bank-size 256: has no effect with --no-bank; leave it out"),
        (dict(lam_min=0.6, lam_max=0.5), "--lam-min 0.6: above --lam-max 0.5; lower it"),
        (
            dict(start_aug=10, prediction="u", delta=0.5),
            "--delta 0.5: has no effect with --start-aug 10; leave it out",
        ),
        (
            dict(start_aug=10, prediction="u", q=0.0),
            "--q 0.0: has no effect with --start-aug 10; leave it out",
        ),
        (dict(end_aug=2), "--end-aug 2: has no effect without --mixup-alpha; leave it out"),
        (dict(delta=1.5), "--delta 1.5: must be at most 1"),
        (dict(q=1.5), "--q 1.5: must be at most 1"),
        (
            dict(start_aug=10),
            "--start-aug 10: not before the end of --epochs 10; lower it, or --prediction u",
        ),
        (
            dict(mixup_alpha=1.0, end_aug=10),
            "--end-aug 10: leaves nothing of --epochs 10 to mix; lower it",
        ),
        (
            dict(cosine=True, lr_steps=(3,)),
            "--lr-steps: have no effect on a cosine; leave them out, or add --no-cosine",
        ),
        (
            dict(last_block=True, arch="lenet"),
            "--last-block: lenet has no residual blocks; use another --arch, or --no-last-block",
        ),
        (
            dict(visualize=True, bank=False),
            "--visualize: without a bank there are no contexts to draw; leave it out",
        ),
    ],
)
def test_options_that_cannot_work_are_refused(options, line, capsys):
    assert refusal(lambda: Args(**{"start_aug": 1, **options}), capsys) == line


# One step


class Steps:
    """A run that yields the batches given and keeps what is recorded."""

    def __init__(self, batches):
        self.accelerator, self.batches, self.recorded = Accelerator(), batches, []

    def steps(self, loader):
        yield from self.batches

    def record(self, **values):
        self.recorded.append({name: value.item() for name, value in values.items()})


def train(batches, epoch=0, heads=None, lr=0.1, **options):
    """train_one_epoch on the batches; (model, what was recorded, what the model was given)."""
    args = Args(**{"batch_size": 8, "start_aug": 0, "delta": 0.0, **options})
    torch.manual_seed(0)  # as Run.begin_epoch does
    heads, run, given = model() if heads is None else heads, Steps(batches), []
    heads.register_forward_pre_hook(lambda _, inputs: given.append(inputs))
    optimizer = torch.optim.SGD(heads.parameters(), lr, weight_decay=0.1)
    csa.train_one_epoch(run, heads, None, optimizer, epoch, args)
    return heads, run.recorded, given


def batches(number=3, size=8):
    generator = torch.Generator().manual_seed(1)
    draw = [torch.randn(2, size, *SHAPE, generator=generator) for _ in range(number)]
    labels = [torch.randint(5, (2, size), generator=generator) for _ in range(number)]
    return [((x[0], y[0]), (x[1], y[1])) for x, y in zip(draw, labels, strict=True)]


def test_step():
    """Natural images as they are; balanced ones blended, by one lambda, with contexts of this batch."""
    (batch,) = data = batches(1)
    (images, labels), (others, other_labels) = batch
    masks, _ = csa.harvest(Accelerator(), model(), images, labels, 0.0)
    twin, (recorded,), ((natural, balanced),) = train(data)
    assert natural.equal(images)
    lams = []
    for image, blended in zip(others, balanced, strict=True):
        candidates = []
        for context, mask in zip(images, masks, strict=True):
            change, direction = (blended - image).flatten(), (mask * (context - image)).flatten()
            lam = (change @ direction) / (direction @ direction)
            candidates.append(((change - lam * direction).abs().max().item(), lam.item()))
        error, lam = min(candidates)
        assert error < 1e-4
        lams.append(lam)
    assert max(lams) - min(lams) < 1e-4 and 0 < lams[0] < 1
    heads = model().train()
    z_u, z_b = heads(natural, balanced)
    loss = F.cross_entropy(z_u, labels) + F.cross_entropy(z_b, other_labels)
    assert recorded == {"loss": pytest.approx(loss.item(), rel=1e-6), "fit": 1, "balanced": 1}
    optimizer = torch.optim.SGD(heads.parameters(), 0.1, weight_decay=0.1)
    loss.backward()
    optimizer.step()
    for ours, theirs in zip(twin.parameters(), heads.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_contexts_are_harvested_by_the_weights_at_hand():
    """Of the second step, whose blends hold contexts of the network after the first."""
    _, _, inputs = train(batches(2), lam_min=1.0)
    _, _, other_inputs = train(batches(2), lam_min=1.0, lr=1e-9)
    assert inputs[0][1].equal(other_inputs[0][1]) and not inputs[1][1].equal(other_inputs[1][1])


def test_a_short_bank_leaves_head_b_alone():
    """No gradient at all, so that weight decay does not touch it either."""
    before = model().head_b.state_dict()
    for options in (dict(delta=1.0), dict(start_aug=1, prediction="u")):
        data = batches(2) if "delta" in options else [(first, None) for first, _ in batches(2)]
        options = {"delta": 0.8, **options}
        heads, recorded, given = train(data, **options)
        assert all(value.equal(before[name]) for name, value in heads.head_b.state_dict().items())
        assert heads.head_b.weight.grad is None and all(inputs[1] is None for inputs in given)
        assert [line["balanced"] for line in recorded] == [0, 0]
        labels = data[0][0][1]
        plain = F.cross_entropy(model().train().network(data[0][0][0]), labels)
        assert recorded[0]["loss"] == pytest.approx(plain.item(), rel=1e-6)


def test_a_bank_that_fills_later():
    _, recorded, given = train(batches(4), bank_size=24)
    assert [line["balanced"] for line in recorded] == [1] * 4  # it need not be full
    half = model()
    torch.nn.init.zeros_(half.head_u.weight)
    half.head_u.bias.data = torch.tensor([9.0, 9.0, 0.0, 0.0, 0.0])  # sure, to one half, of classes 0 and 1
    data = batches(4)
    numbers = [int((labels < 2).sum()) for (_, labels), _ in data]
    assert all(0 < number < 8 for number in numbers)
    _, recorded, given = train(data, heads=half, delta=0.45, lr=1e-9)
    assert [8 * line["fit"] for line in recorded] == numbers
    filled = [sum(numbers[: i + 1]) >= 8 for i in range(4)]
    assert [line["balanced"] for line in recorded] == filled and filled[0] < filled[-1]
    assert [inputs[1] is not None for inputs in given] == filled


def test_each_epoch_begins_with_an_empty_bank():
    heads, run = model(), Steps(batches(2))
    optimizer = torch.optim.SGD(heads.parameters(), 0.1)
    for epoch, delta in ((0, 0.0), (1, 1.0)):  # all images are fit, then none
        args = Args(batch_size=8, delta=delta)
        csa.train_one_epoch(run, heads, None, optimizer, epoch, args)
    assert [line["balanced"] for line in run.recorded] == [1, 1, 0, 0]


@pytest.mark.parametrize("options, processes, size", [({}, 1, 8), ({}, 2, 4), (dict(bank_size=20), 2, 10)])
def test_size_of_the_bank(options, processes, size, monkeypatch):
    """V, by default the batch size, over all processes."""
    sizes, bank = [], csa.Bank
    monkeypatch.setattr(csa, "Bank", lambda size: sizes.append(size) or bank(size))
    heads, run = model(), Steps(batches(1, 8 // processes))
    monkeypatch.setattr(type(run.accelerator), "num_processes", processes)
    optimizer = torch.optim.SGD(heads.parameters(), 0.1)
    csa.train_one_epoch(run, heads, None, optimizer, 0, Args(batch_size=8, delta=0.0, **options))
    assert sizes == [size] and run.recorded[0]["balanced"] == 1


def test_lambda_is_drawn_anew_by_batch_from_seed_and_epoch(monkeypatch):
    used, blend = [], csa.blend
    monkeypatch.setattr(csa, "blend", lambda *given: used.append(given[3]) or blend(*given))

    def lams(**options):
        used.clear()
        given = train(batches(4), lr=1e-9, **options)[2]
        return list(used), given

    first, _ = lams()
    assert len(set(first)) == 4 and all(0 < lam < 1 for lam in first)
    assert lams()[0] == first != lams(epoch=1)[0] and lams(seed=1)[0] != first
    narrow, _ = lams(lam_min=0.5, lam_max=0.6)
    assert narrow == pytest.approx([0.5 + 0.1 * lam for lam in first])
    none, given = lams(lam_max=0.0)
    assert none == [0] * 4
    assert all(inputs[1].equal(other[0]) for inputs, (_, other) in zip(given, batches(4), strict=True))


def test_without_the_bank_balanced_images_stay_as_they_are(monkeypatch):
    monkeypatch.setattr(csa, "harvest", None)
    data = batches(2)
    heads, recorded, given = train(data, bank=False, delta=0.8)
    assert all(inputs[1].equal(other[0]) for inputs, (_, other) in zip(given, data, strict=True))
    assert [(line.get("fit"), line["balanced"]) for line in recorded] == [(None, 1)] * 2


def test_mixup_is_of_the_natural_batch_after_the_harvest(monkeypatch):
    seen, harvest = [], csa.harvest
    monkeypatch.setattr(csa, "harvest", lambda *given: seen.append(given[2]) or harvest(*given))
    data = batches(1)
    (images, labels), (_, other_labels) = data[0]
    order = torch.tensor([1, 2, 3, 4, 5, 6, 7, 0])
    monkeypatch.setattr(torch, "randperm", lambda *_, **__: order)
    _, (recorded,), ((natural, balanced),) = train(data, mixup_alpha=1.0, epochs=10)
    assert seen[0].equal(images)  # clean
    change, direction = (natural - images).flatten(), (images[order] - images).flatten()
    share = 1 - ((change @ direction) / (direction @ direction)).item()
    torch.testing.assert_close(natural, share * images + (1 - share) * images[order], atol=1e-5, rtol=1e-5)
    z_u, z_b = model().train()(natural, balanced)
    first, second = F.cross_entropy(z_u, labels), F.cross_entropy(z_u, labels[order])
    loss = share * first + (1 - share) * second + F.cross_entropy(z_b, other_labels)
    assert recorded["loss"] == pytest.approx(loss.item(), rel=1e-5) and 0.01 < share < 0.99
    _, _, ((natural, _),) = train(data, mixup_alpha=1.0, epochs=10, epoch=7)  # one of the last three
    assert natural.equal(images)


def test_mixup_draws_from_beta(monkeypatch):
    """alpha 0.1: mostly near 0 or 1; 100: near one half."""
    monkeypatch.setattr(torch, "randperm", lambda size, **_: torch.arange(size).roll(1))

    def near_half(alpha):
        shares = []
        for inputs, ((images, _), _) in zip(
            train(batches(8), lr=1e-9, mixup_alpha=alpha)[2], batches(8), strict=True
        ):
            direction = (images.roll(1, 0) - images).flatten()
            shares.append(1 - ((inputs[0] - images).flatten() @ direction) / (direction @ direction))
        return sum(0.3 < share < 0.7 for share in shares)

    assert near_half(100.0) == 8 and near_half(0.1) <= 2


def test_mixup_with_itself_is_none(monkeypatch):
    monkeypatch.setattr(torch, "randperm", lambda size, **_: torch.arange(size))
    mixed, plain = (train(batches(2), mixup_alpha=alpha, lam_max=0.0)[1] for alpha in (1.0, 0.0))
    assert [a["loss"] for a in mixed] == pytest.approx([b["loss"] for b in plain], rel=1e-4)


# Whole runs


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


def test_head_u_alone_is_plain_training(tmp_path):
    """The network of cmo.py --paste none, bit for bit; weight decay leaves head_b alone."""
    ours = csa.main(tiny(tmp_path, "ours", start_aug=2, prediction="u", wd=1e-3))
    options = {**TINY, "output_dir": str(tmp_path / "plain"), "lr_factor": 0.1, "wd": 1e-3}
    plain = cmo.main(cmo.Args(paste="none", mix_start=0, **options))
    for a, b in zip(metrics(tmp_path / "ours"), metrics(tmp_path / "plain"), strict=True):
        assert (a["lr"], a["all"]) == (b["lr"], b["all"])
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)  # the order in which a mean is taken
    assert ours["per_class"] == plain["per_class"]
    weights, plain = (runs.read_finished(tmp_path / name)[1] for name in ("ours", "plain"))
    assert all(value.equal(weights[f"network.{name}"]) for name, value in plain.items())


def test_empty_blends_are_those_without_a_bank(tmp_path):
    """delta 0 takes every image, so that the bank is full at once; lambda 0 blends nothing."""
    results = [
        csa.main(tiny(tmp_path, str(i), **options))
        for i, options in enumerate((dict(delta=0.0, lam_max=0.0), dict(bank=False)))
    ]
    assert results[0]["weights_sha256"] == results[1]["weights_sha256"]


@pytest.mark.parametrize(
    "options",
    [
        dict(delta=0.2, mixup_alpha=0.2, end_aug=1, visualize=True),
        dict(delta=0.2, q=0.0, bank_size=100, lam_min=0.2, lam_max=0.4, prediction="average"),
        dict(arch="lenet", lr=0.02, delta=0.2, cosine=True, lr_steps=()),
        dict(last_block=True, delta=0.2),
    ],
)
def test_runs(tmp_path, options):
    result = csa.main(tiny(tmp_path, **{"epochs": 3, **options}))
    lines = metrics(tmp_path / "run")
    assert lines[0]["balanced"] == 0 and "fit" not in lines[0]
    assert lines[-1]["balanced"] > 0 < lines[-1]["fit"]
    best = {head: max(line["predictions"][head]["all"] for line in lines) for head in csa.HEADS}
    assert {head: result["predictions"][head].pop("best_on_test") for head in csa.HEADS} == best
    for line in (*lines, result):
        chosen = line["predictions"][options.get("prediction", "b")]
        assert set(line["predictions"]) == {"u", "b", "average"}
        assert all(line[name] == value for name, value in chosen.items())
    assert (tmp_path / "run" / "contexts.png").exists() == ("visualize" in options)


@pytest.mark.slow
def test_masks_cover_background_and_not_the_object(tmp_path):
    """After the default run, over all training images that are fit."""
    args = cli.build(Args, csa.RECIPES, output_dir=str(tmp_path / "run"))
    csa.main(args)
    train_set, _ = datasets.load(args)
    heads = csa.make_model(train_set, args)
    heads.load_state_dict(runs.read_finished(tmp_path / "run")[1])
    labels, on_object = train_set.labels, synthetic_objects(train_set)
    images, _ = train_set.__getitems__(list(range(len(labels))))
    masks, fit = csa.harvest(Accelerator(), heads, images, labels, args.delta)
    masks, on_object = masks[fit][:, 0], on_object[fit]
    assert fit.float().mean() > 0.9
    assert masks[on_object].mean() + 0.2 < masks[~on_object].mean()


def test_a_map_of_one_pixel_is_refused(capsys):
    line = refusal(lambda: model(arch="resnet10"), capsys)
    why = "its map of images of 32 pixels is one pixel; use resnet32"
    assert line == f"--arch resnet10: {why}"
    assert model(arch="resnet10", bank=False).training  # has no use for a map


def test_a_frozen_trunk_should_be_pretrained(capsys):
    model(last_block=True)
    note = "note: --last-block without --pretrained: what is frozen has random weights"
    assert capsys.readouterr().err.splitlines() == [note]


def test_picture(tmp_path, capsys):
    """8 rows of natural image, mask, what it leaves, balanced image, blend; also of a finished run."""
    small = dict(delta=0.2, start_aug=0, epochs=1, lr_steps=())
    csa.main(tiny(tmp_path, **small))
    capsys.readouterr()
    before = (tmp_path / "run" / "result.json").read_text()
    csa.main(tiny(tmp_path, **small, visualize=True, resume="yes"))
    assert capsys.readouterr().err.splitlines()[-1] == f"drew {tmp_path}/run/contexts.png"
    assert (tmp_path / "run" / "result.json").read_text() == before
    first = (tmp_path / "run" / "contexts.png").read_bytes()
    csa.main(tiny(tmp_path, **small, visualize=True, resume="yes"))
    assert (tmp_path / "run" / "contexts.png").read_bytes() == first
    with Image.open(tmp_path / "run" / "contexts.png") as image:
        pixels = datasets.v2.functional.pil_to_tensor(image).float() / 255
    assert pixels.shape == (3, 8 * 98 + 2, 5 * 98 + 2)
    rows = pixels[:, 2:, 2:].unfold(1, 98, 98).unfold(2, 98, 98)[..., :96, :96]  # [3, 8, 5, 96, 96]
    context, mask, left, balanced, blend = rows.unbind(2)
    torch.testing.assert_close(left, mask * context, atol=0.01, rtol=0)
    torch.testing.assert_close(blend, csa.blend(balanced, context, mask, 0.5), atol=0.01, rtol=0)


def test_when_nothing_is_fit(tmp_path, capsys):
    csa.main(tiny(tmp_path, delta=1.0, visualize=True))
    lines = capsys.readouterr().err.splitlines()
    assert "note: head_b learned nothing: too few images with p(label) >= 1.0 for a batch" in lines
    assert lines[-1] == "note: --visualize: fewer than 8 images with p(label) >= 1.0; none drawn"


def test_two_processes_have_a_bank_each(tmp_path):
    """Banks fill at different steps, so that a process may learn head_b while the other does not."""
    options = {**TINY, "start_aug": 1, "delta": 0.5, "bank_size": 128, "output_dir": tmp_path / "run"}
    result = result_of(launch("csa.py", processes=2, **options))
    assert result["num_processes"] == 2 and 0 < result["balanced"] < 1
