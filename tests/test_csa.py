"""csa.py: masks, bank, blending, streams and schedule against numbers worked out beforehand; its limits."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator

import csa
from common import datasets, models, recipes, synthetic
from common.cli import Refused
from common.evaluation import split_classes
from tests.conftest import TINY, close, lines_of, parse, run_here, state_of

MAPS = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]], [[4.0, 0.0], [0.0, 0.0]]]])  # [1, 2, 2, 2]
WEIGHTS = torch.tensor([[1.0, -0.5]])
SHAPE = (3, 32, 32)


def data_set(num_classes=5, shape=SHAPE):
    """What a model is made for."""
    statistics = ((0.5,) * shape[0], (0.25,) * shape[0])
    return SimpleNamespace(num_classes=num_classes, shape=shape, statistics=statistics)


def model(num_classes=5, arch="resnet8", seed=0, shape=SHAPE, **options):
    args = parse("csa.py", arch=arch, seed=seed, **options)
    return csa.make_model(data_set(num_classes, shape), args)


def pixels(number=8, seed=0):
    return torch.randint(256, (number, *SHAPE), generator=torch.Generator().manual_seed(seed)).float()


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


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


def gradient_weights(network, maps, labels):
    """Grad-CAM's weights [B, D] as in the released code, by a backward pass from the label's logit."""
    maps = maps.detach().requires_grad_()
    logits = network.classifier(network.pool(maps))
    (gradient,) = torch.autograd.grad(logits.gather(1, labels[:, None]).sum(), maps)
    return gradient.mean((2, 3))


@pytest.mark.parametrize("arch", ["resnet8", "resnet10"])
def test_closed_form_is_the_gradient(arch):
    """With average pooling and a linear head: the masks of harvest are those by the gradient."""
    shape = (3, 64, 64)
    network = models.build(arch, data_set(7, shape), 0).eval()
    images, labels = 255 * torch.rand(6, *shape), torch.tensor([0, 1, 2, 3, 4, 6])
    maps = network.feature_map(images).detach()
    weights = gradient_weights(network, maps, labels)
    closed = network.classifier.weight[labels] / maps[0, 0].numel()
    torch.testing.assert_close(closed.detach(), weights, atol=1e-6, rtol=1e-5)
    masks = csa.harvest(network, images, labels, 0.0)[:, -1:]
    torch.testing.assert_close(masks, csa.background_masks(maps, weights, (64, 64)), atol=1e-5, rtol=0)
    assert masks.std() > 0.1


def test_mask_of_a_network_by_hand():
    """Logit 1 = 2 * mean of channel 0 - mean of channel 1: weights ~ [1, -0.5], the mask of above."""
    network = models.Network(torch.nn.Identity(), torch.nn.Linear(2, 2))
    network.classifier.weight.data = torch.tensor([[1.0, 1.0], [2.0, -1.0]])
    close(gradient_weights(network, MAPS, torch.tensor([1])), [[0.5, -0.25]])
    (context,) = csa.harvest(network, MAPS, torch.tensor([1]), 0.0)
    assert context[:2].equal(MAPS[0])
    close(context[2], [[1.0, 0.25], [0.0625, 0.0]])
    assert not context.requires_grad and network.classifier.weight.grad is None


@pytest.mark.parametrize("arch, shape", [("lenet", (1, 28, 28)), ("resnet10", SHAPE)])
def test_a_map_without_places_is_refused(arch, shape):
    """LeNet has layers between map and head, and of 32 pixels ResNet-10 makes one."""
    with pytest.raises(
        Refused, match=f"--arch {arch}: no places in its feature map; use resnet32, or --bank 0"
    ):
        model(arch=arch, shape=shape)
    assert model(arch=arch, shape=shape, bank=0).eval()(torch.zeros(1, *shape)).shape == (1, 5)


def test_a_head_that_learns_nothing_does_not_predict():
    model(epochs=5, start=5, prediction="u")
    with pytest.raises(Refused, match="--start 5: head_b learns nothing; use less, or --prediction u"):
        model(epochs=5, start=5)


# Harvest and blend


def fit(logits, labels, delta):
    """Which images harvest takes of a network with these logits [B, K]."""
    num_classes = logits.shape[1]
    network = models.Network(torch.nn.Identity(), torch.nn.Linear(num_classes, num_classes))
    network.classifier.weight.data = torch.eye(num_classes)
    torch.nn.init.zeros_(network.classifier.bias)
    maps = logits[:, :, None, None].expand(-1, -1, 2, 2)
    return [len(csa.harvest(network, maps[i, None], labels[i, None], delta)) == 1 for i in range(len(labels))]


def test_fit():
    logits = torch.tensor([[2.0, 1.0, 0.0]] * 3)  # softmax .6652 .2447 .0900
    close(logits.softmax(1)[0], [0.6652, 0.2447, 0.0900])
    labels = torch.tensor([0, 1, 2])
    assert fit(logits, labels, 0.8) == [False, False, False]
    assert fit(logits, labels, 0.6) == [True, False, False]
    assert fit(logits, labels, 0.0) == [True, True, True]
    even = torch.zeros(1, 2)  # one half, exactly
    assert fit(even, torch.tensor([1]), 0.5) == [True]


def test_harvest_goes_by_the_label_in_eval_mode():
    heads = model().train()
    for module in heads.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean)
    before = {name: value.clone() for name, value in heads.state_dict().items()}
    images, labels = pixels(40), torch.arange(40) % 5
    contexts = csa.harvest(heads.network, images, labels, 0.2)
    assert 0 < len(contexts) < 40
    assert all(value.equal(before[name]) for name, value in heads.state_dict().items())
    assert all(module.training for module in heads.modules())
    assert all(parameter.grad is None for parameter in heads.parameters())
    assert contexts.shape[1:] == (4, 32, 32) and not contexts.requires_grad
    one = [csa.harvest(heads.network, images[i : i + 1], labels[i : i + 1], 0.2) for i in range(40)]
    torch.testing.assert_close(contexts, torch.cat(one), atol=1e-4, rtol=0)  # no batch statistics
    heads.eval()
    p = heads.network(images).softmax(1)[torch.arange(40), labels]  # head_u
    assert contexts[:, :3].equal(images[p >= 0.2])
    all_masks = csa.harvest(heads.network, images, labels, 0.0)[:, -1:]
    other_masks = csa.harvest(heads.network, images, (labels + 1) % 5, 0.0)[:, -1:]
    assert not other_masks.allclose(all_masks, atol=0.1)


def test_blend():
    image, context = torch.full((1, 3, 2, 2), 2.0), torch.full((1, 3, 2, 2), 8.0)

    def blend(mask, lam):
        return csa.blend(image, torch.cat([context, torch.full((1, 1, 2, 2), mask)], 1), lam)

    assert blend(0.25, 0.5).eq(2.75).all()
    assert blend(0.25, 0.0).equal(image)
    assert blend(0.0, 0.7).equal(image)
    assert blend(1.0, 1.0).equal(context)
    image = pixels(2).byte().contiguous(memory_format=torch.channels_last)
    blended = csa.blend(image, torch.rand(2, 4, 32, 32), 0.5)
    assert blended.is_contiguous(memory_format=torch.channels_last)  # as the network's weights


# The network


def test_parameter_counts():
    for classes, total in ((100, 476_504), (10, 464_804)):
        heads = model(classes, "resnet32")
        assert count(heads.network.backbone) == 463_504
        assert count(heads) == total
        assert count(heads.network.classifier) == count(heads.head_b) == 65 * classes


def test_heads_are_initialised_apart():
    heads = model(10)
    plain = models.build("resnet8", data_set(10), 0)
    assert all(value.equal(heads.network.state_dict()[name]) for name, value in plain.state_dict().items())
    head_u = heads.network.classifier
    assert not heads.head_b.weight.equal(head_u.weight)
    assert heads.head_b.weight.std().item() == pytest.approx(head_u.weight.std().item(), rel=0.2)
    assert not model(10, seed=1).head_b.weight.equal(heads.head_b.weight)


def test_predictions():
    heads, images = model().eval(), pixels()
    features = heads.network.features(images)
    torch.testing.assert_close(heads(images), heads.head_b(features))
    u, b, average = (model(prediction=head).eval()(images) for head in csa.HEADS)
    torch.testing.assert_close(u, heads.network.classifier(features))
    torch.testing.assert_close(b, heads.head_b(features))
    torch.testing.assert_close(average, (u + b) / 2)


def test_each_batch_has_its_statistics_the_balanced_one_first():
    heads, twin, images, others = model().train(), model().train(), pixels(), 0.5 * pixels(seed=1)
    z_u, z_b = heads(images, others)
    theirs_b = twin.head_b(twin.network.features(others))  # two passes, one after the other
    theirs_u = twin.network(images)
    torch.testing.assert_close((z_u, z_b), (theirs_u, theirs_b))
    normalize, convolution, norm = heads.network.backbone[:3]
    expected = torch.zeros(16)
    for batch in (others, images):
        expected = 0.9 * expected + 0.1 * convolution(normalize(batch)).mean((0, 2, 3)).detach()
    torch.testing.assert_close(norm.running_mean, expected, atol=1e-5, rtol=1e-5)
    assert norm.num_batches_tracked == 2


# Schedule and recipes


def rates(epochs, **options):
    args = parse("csa.py", **options)
    return [recipes.learning_rate(epoch, args) for epoch in epochs]


def test_learning_rate():
    epochs = (0, 1, 4, 5, 159, 160, 179, 180, 199)
    expected = [0.04, 0.08, 0.2, 0.2, 0.2, 0.02, 0.02, 0.002, 0.002]
    assert rates(epochs, dataset="cifar100_lt") == pytest.approx(expected)
    assert rates((0, 45, 89), dataset="imagenet_lt") == pytest.approx([0.2, 0.1, 0.00006], abs=2e-6)


def test_recipes_are_the_published_ones():
    def values(dataset):
        names = "arch epochs batch_size lr lr_steps lr_factor warmup cosine wd augment start"
        args = parse("csa.py", dataset=dataset)
        assert (args.mixup_end, args.delta) == (3, 0.8)
        assert args.mixup == 0 and args.bank == 1 and args.prediction == "b"
        return [getattr(args, name) for name in names.split()]

    cifar = ["resnet32", 200, 128, 0.2, (160, 180), 0.1, 5, False, 2e-4, "weak", 10]
    assert values("cifar10_lt") == values("cifar100_lt") == cifar
    large = ["resnet10", 90, 256, 0.2, (), 0.1, 0, True, 5e-4, "jitter", 10]
    assert values("imagenet_lt") == large


@pytest.mark.parametrize(
    "dataset, counts, groups",
    [
        ("cifar10_lt", datasets.long_tail_counts(5000, 10, 100), (3, 4, 3)),
        ("cifar100_lt", datasets.long_tail_counts(500, 100, 100), (36, 35, 29)),
        ("mnist_lt", [5923, *datasets.long_tail_counts(6000, 10, 100)[1:]], (3, 4, 3)),
        ("fashion_mnist_lt", datasets.long_tail_counts(6000, 10, 100), (3, 4, 3)),
        ("cmnist_lt", [5513, 3643, 2282, 1389, 860, 490, 281, 194, 106, 51], (3, 4, 3)),
    ],
)
def test_groups_are_the_papers(dataset, counts, groups):
    """Many, medium and few: fixed numbers of classes, by thresholds that give them at imbalance 100."""
    splits = split_classes(torch.tensor(counts), *parse("csa.py", dataset=dataset).splits)
    assert tuple(int(members.sum()) for members in splits.values()) == groups
    assert splits["many"][: groups[0]].all() and splits["few"][-groups[2] :].all()


@pytest.mark.parametrize("dataset", csa.RECIPES)
def test_short_runs_scale(dataset):
    """Also where the second head learns in one epoch alone."""
    args = parse("csa.py", dataset=dataset, epochs=2)
    assert args.start < 2 and args.mixup_end < 2 and max(args.lr_steps, default=0) <= 2


# One step


class Steps:
    """A run that yields the batches given and keeps what is logged."""

    def __init__(self, batches, seed=0):
        self.accelerator, self.batches, self.logged = Accelerator(), batches, []
        self.rng = np.random.default_rng(seed)

    def steps(self, loader):
        return loader

    def unwrap(self, model):
        return model

    def log(self, **values):
        self.logged.append({name: value.item() for name, value in values.items()})


def train(batches, epoch=0, heads=None, lr=0.1, seed=0, **options):
    """train_one_epoch on the batches; (model, what was logged, what the model was given)."""
    args = parse("csa.py", **{"batch_size": 8, "start": 0, "delta": 0.0, **options})
    torch.manual_seed(0)  # as Run.epochs does
    heads, run, given = heads or model(), Steps(batches, seed), []
    handle = heads.register_forward_pre_hook(lambda _, inputs: given.append(inputs))
    optimizer = torch.optim.SGD(heads.parameters(), lr, weight_decay=0.1)
    natural, balanced = zip(*batches, strict=True)
    csa.train_one_epoch(run, heads, natural, balanced, optimizer, epoch, args)
    handle.remove()
    return heads, run.logged, given


def batches(number=3, size=8):
    generator = torch.Generator().manual_seed(1)
    draw = [torch.randint(256, (2, size, *SHAPE), generator=generator).float() for _ in range(number)]
    labels = [torch.randint(5, (2, size), generator=generator) for _ in range(number)]
    return [((x[0], y[0]), (x[1], y[1])) for x, y in zip(draw, labels, strict=True)]


def test_step():
    """Natural images as they are; balanced ones blended, by one lambda, with contexts of this batch."""
    (batch,) = data = batches(1)
    (images, labels), (others, other_labels) = batch
    masks = csa.harvest(model().network, images, labels, 0.0)[:, -1:]
    twin, (logged,), ((natural, balanced),) = train(data)
    assert natural.equal(images)
    lams = []
    for image, blended in zip(others, balanced, strict=True):
        candidates = []
        for context, mask in zip(images, masks, strict=True):
            change, direction = (blended - image).flatten(), (mask * (context - image)).flatten()
            lam = (change @ direction) / (direction @ direction)
            candidates.append(((change - lam * direction).abs().max().item(), lam.item()))
        error, lam = min(candidates)
        assert error < 1e-2  # of 255
        lams.append(lam)
    assert max(lams) - min(lams) < 1e-4 and 0 < lams[0] < 1
    heads = model().train()
    z_u, z_b = heads(natural, balanced)
    loss = F.cross_entropy(z_u, labels) + F.cross_entropy(z_b, other_labels)
    assert logged == {"loss": pytest.approx(loss.item(), rel=1e-6), "balanced": 1}
    optimizer = torch.optim.SGD(heads.parameters(), 0.1, weight_decay=0.1)
    loss.backward()
    optimizer.step()
    for ours, theirs in zip(twin.parameters(), heads.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_contexts_are_harvested_by_the_weights_at_hand():
    """Of the second step, whose blends hold contexts of the network after the first."""
    _, _, inputs = train(batches(2))
    _, _, other_inputs = train(batches(2), lr=1e-9)
    assert inputs[0][1].equal(other_inputs[0][1]) and not inputs[1][1].equal(other_inputs[1][1])


@pytest.mark.parametrize("options", [dict(delta=1.0), dict(start=1)])
def test_a_short_bank_leaves_head_b_alone(options):
    """No gradient at all, so that weight decay does not touch it either."""
    before, data = model().head_b.state_dict(), batches(2)
    heads, logged, given = train(data, **options)
    assert all(value.equal(before[name]) for name, value in heads.head_b.state_dict().items())
    assert heads.head_b.weight.grad is None and all(inputs[1] is None for inputs in given)
    assert [line["balanced"] for line in logged] == [0, 0]
    images, labels = data[0][0]
    plain = F.cross_entropy(model().train().network(images), labels)
    assert logged[0]["loss"] == pytest.approx(plain.item(), rel=1e-6)


def test_balanced_batches_are_not_asked_for_before_the_start():
    heads, args = model(), parse("csa.py", batch_size=8, start=1)
    ((images, labels), _) = batches(1)[0]
    run = Steps(None)
    optimizer = torch.optim.SGD(heads.parameters(), 0.1)
    csa.train_one_epoch(run, heads, [(images, labels)], [], optimizer, 0, args)
    assert run.logged[0]["balanced"] == 0


def test_a_bank_that_fills_later():
    _, logged, _ = train(batches(4), bank=3)
    assert [line["balanced"] for line in logged] == [1] * 4  # it need not be full
    half = model()
    torch.nn.init.zeros_(half.network.classifier.weight)
    half.network.classifier.bias.data = torch.tensor([9.0, 9.0, 0, 0, 0])  # sure, to one half, of 0 and 1
    data = batches(4)
    numbers = [int((labels < 2).sum()) for (_, labels), _ in data]
    assert all(0 < number < 8 for number in numbers)
    _, logged, given = train(data, heads=half, delta=0.45, lr=1e-9)
    filled = [sum(numbers[: i + 1]) >= 8 for i in range(4)]
    assert [line["balanced"] for line in logged] == filled and filled[0] < filled[-1]
    assert [inputs[1] is not None for inputs in given] == filled


def test_each_epoch_begins_with_an_empty_bank():
    """Of two epochs in which all images, then none are fit."""
    heads, logged, _ = train(batches(2))
    _, again, _ = train(batches(2), epoch=1, heads=heads, delta=1.0)
    assert [line["balanced"] for line in (*logged, *again)] == [1, 1, 0, 0]


class Constant(torch.nn.Module):
    """In place of TwoHeads: the same logits for every image, in no time."""

    def __init__(self):
        super().__init__()
        self.network = None
        self.logits = torch.nn.Parameter(torch.zeros(1, 5))

    def forward(self, images, others):
        z = self.logits.expand(len(images), 5)
        return z, None if others is None else z


@pytest.fixture
def banks(monkeypatch):
    """(numbers of the contexts that each step harvests, options) -> the contexts that each step blends.

    A context is an image filled with its number, with a hundredth of it as its mask.
    """

    def of(numbers, size=4, **options):
        harvests, blended = iter(numbers), []

        def harvest(*_):
            values = torch.tensor(next(harvests), dtype=torch.float32).view(-1, 1, 1, 1)
            images = values.expand(-1, 3, 32, 32)
            return torch.cat([images, images[:, :1] / 100], dim=1)

        def blend(images, contexts, lam):
            shown = contexts[:, 0, 0, 0]
            close(contexts[:, -1, 0, 0], shown / 100)  # each with its own mask
            assert len(shown) == len(images) == len(set(shown.tolist()))  # without replacement
            blended.append(shown.tolist())
            return images

        monkeypatch.setattr(csa, "harvest", harvest)
        monkeypatch.setattr(csa, "blend", blend)
        data = batches(len(numbers), size)
        _, logged, _ = train(data, heads=Constant(), **{"batch_size": size, **options})
        assert len(blended) == sum(line["balanced"] for line in logged)
        return blended

    return of


def test_bank_keeps_the_last(banks):
    """Of 1 2 3, then 4 5 6, four fit: 3 to 6. Drawing takes none out."""
    blended = banks([[1, 2, 3], [4, 5, 6], [], []])
    assert [sorted(contexts) for contexts in blended] == [[3, 4, 5, 6]] * 3
    assert len(set(map(tuple, blended))) > 1  # in random order


def test_bank_takes_what_comes(banks):
    blended = banks([[2], [], [7], [9, 10, 12, 14, 16, 18], [20]])
    assert [sorted(contexts) for contexts in blended] == [[12, 14, 16, 18], [14, 16, 18, 20]]


def test_a_larger_bank(banks):
    """Of two batches: at first all that there are, then the last 8."""
    blended = banks([[1, 2, 3, 4, 5], *[[]] * 20, list(range(6, 16)), *[[]] * 20], bank=2)
    assert {n for contexts in blended[:21] for n in contexts} == {1, 2, 3, 4, 5}
    assert {n for contexts in blended[21:] for n in contexts} == set(range(8, 16))


@pytest.mark.parametrize("bank, kept", [(1, 4), (2, 8)])
def test_a_process_keeps_its_share(banks, bank, kept, monkeypatch):
    """Of a batch of 8 over two processes, 4 images come to each of them."""
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    blended = banks([list(range(20)), *[[]] * 30], bank=bank, batch_size=8)
    assert {n for contexts in blended for n in contexts} == set(range(20 - kept, 20))


def test_lambda_is_drawn_anew_by_batch(monkeypatch):
    used, blend = [], csa.blend
    monkeypatch.setattr(csa, "blend", lambda *given: used.append(given[2]) or blend(*given))

    def lams(**options):
        used.clear()
        train(batches(4), lr=1e-9, **options)
        return list(used)

    first = lams()
    assert len(set(first)) == 4 and all(0 < lam < 1 for lam in first)
    assert lams() == first != lams(seed=1)


def test_without_the_bank_balanced_images_stay_as_they_are(monkeypatch):
    monkeypatch.setattr(csa, "harvest", None)
    data = batches(2)
    _, logged, given = train(data, bank=0, delta=0.8)
    assert all(inputs[1].equal(other[0]) for inputs, (_, other) in zip(given, data, strict=True))
    assert [line["balanced"] for line in logged] == [1] * 2


@pytest.fixture
def empty_blends(monkeypatch):
    """lambda 0, which blends nothing."""
    blend = csa.blend
    monkeypatch.setattr(csa, "blend", lambda images, contexts, lam: blend(images, contexts, 0.0))


def test_empty_blends_are_those_without_a_bank(empty_blends):
    """delta 0 takes every image, so that the bank is full at once."""
    first, second = (train(batches(3), bank=bank)[0] for bank in (1, 0))
    assert all(a.equal(b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_mixup_is_of_the_natural_batch_after_the_harvest(monkeypatch):
    seen, harvest = [], csa.harvest
    monkeypatch.setattr(csa, "harvest", lambda *given: seen.append(given[1]) or harvest(*given))
    data = batches(1)
    (images, labels), (_, other_labels) = data[0]
    order = torch.tensor([1, 2, 3, 4, 5, 6, 7, 0])
    monkeypatch.setattr(torch, "randperm", lambda *_, **__: order)
    _, (logged,), ((natural, balanced),) = train(data, mixup=1.0, epochs=10, mixup_end=3)
    assert seen[0].equal(images)  # clean
    change, direction = (natural - images).flatten(), (images[order] - images).flatten()
    share = 1 - ((change @ direction) / (direction @ direction)).item()
    torch.testing.assert_close(natural, share * images + (1 - share) * images[order], atol=1e-2, rtol=1e-5)
    z_u, z_b = model().train()(natural, balanced)
    first, second = F.cross_entropy(z_u, labels), F.cross_entropy(z_u, labels[order])
    loss = share * first + (1 - share) * second + F.cross_entropy(z_b, other_labels)
    assert logged["loss"] == pytest.approx(loss.item(), rel=1e-5) and 0.01 < share < 0.99


def test_mixup_ends_before_the_last_epochs():
    """Of 200 epochs with the recipe: not in the last 3, nor without --mixup."""
    data = batches(1)

    def is_mixed(epoch, **options):
        natural = train(data, epoch, dataset="cifar10_lt", arch="resnet8", **options)[2][0][0]
        return not natural.equal(data[0][0][0])

    assert [is_mixed(epoch, mixup=1.0) for epoch in (0, 196, 197, 199)] == [True, True, False, False]
    assert not is_mixed(0)


def test_head_b_learns_from_epoch_10_on():
    options = dict(dataset="cifar10_lt", arch="resnet8", start=None)
    learns = [train(batches(1), epoch, **options)[1][0]["balanced"] for epoch in (0, 9, 10, 199)]
    assert learns == [0, 0, 1, 1]


def test_mixup_draws_from_beta(monkeypatch):
    """0.1: mostly near 0 or 1; 100: near one half."""
    monkeypatch.setattr(torch, "randperm", lambda size, **_: torch.arange(size).roll(1))

    def near_half(beta):
        shares = []
        given = train(batches(8), lr=1e-9, mixup=beta)[2]
        for inputs, ((images, _), _) in zip(given, batches(8), strict=True):
            direction = (images.roll(1, 0) - images).flatten()
            shares.append(1 - ((inputs[0] - images).flatten() @ direction) / (direction @ direction))
        return sum(0.3 < share < 0.7 for share in shares)

    assert near_half(100.0) == 8 and near_half(0.1) <= 2


def test_mixup_with_itself_is_none(monkeypatch, empty_blends):
    monkeypatch.setattr(torch, "randperm", lambda size, **_: torch.arange(size))
    mixed, plain = (train(batches(2), mixup=beta)[1] for beta in (1.0, 0.0))
    assert [a["loss"] for a in mixed] == pytest.approx([b["loss"] for b in plain], rel=1e-4)


# Whole runs


def test_streams(tmp_path, monkeypatch):
    """Natural: each image once. Balanced: class after class, 4 images of each in a row."""

    class Seen(Exception):
        pass

    def spy(run, model, loader, balanced_loader, optimizer, epoch, args):
        raise Seen(loader, balanced_loader, optimizer)

    monkeypatch.setattr(csa, "train_one_epoch", spy)
    with pytest.raises(Seen) as seen:
        run_here("csa.py", **TINY, output_dir=tmp_path / "run", wd=2e-4)
    loader, balanced_loader, optimizer = seen.value.args
    natural, balanced = loader.batch_sampler.sampler, balanced_loader.batch_sampler.sampler
    assert sorted(natural) == list(range(1236))
    order = list(balanced)
    assert list(balanced) == order and len(order) == 1236
    assert (natural.stream, balanced.stream) == (0, 1)
    groups = loader.dataset.labels[order].view(-1, 4)
    assert (groups == groups[:, :1]).all()
    rounds = groups[:300, 0].view(-1, 10)
    assert rounds.sort(1).values.equal(torch.arange(10).expand(30, 10))
    balanced.set_epoch(1)
    assert list(balanced) != order
    group = optimizer.param_groups[0]
    assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.9, 2e-4, False)


@pytest.mark.slow
def test_head_u_alone_is_plain_training(tmp_path):
    """The network of cmo.py --p-mix 0, bit for bit; weight decay leaves head_b alone."""
    options = {**TINY, "epochs": 1, "lr_steps": (), "wd": 1e-3}
    ours = run_here("csa.py", **options, output_dir=tmp_path / "ours", start=1, prediction="u")
    plain = run_here("cmo.py", **options, output_dir=tmp_path / "plain", p_mix=0.0)
    assert ours["loss"] == pytest.approx(plain["loss"], rel=1e-4) and ours["balanced"] == 0
    state = state_of(tmp_path / "ours")
    for name, value in state_of(tmp_path / "plain").items():
        assert value.equal(state[f"network.{name}"]), name
    train_set, _ = datasets.load(parse("csa.py"))
    assert state["head_b.weight"].equal(csa.make_model(train_set, parse("csa.py")).head_b.weight)


def test_runs(tmp_path):
    """The result has the accuracy of each head, and the finished run's network predicts by the one chosen."""
    options = dict(TINY, epochs=1, delta=0.2, mixup=0.2, bank=2, prediction="average")
    result = run_here("csa.py", **options, output_dir=tmp_path / "run")
    (line,) = lines_of(tmp_path / "run")
    assert 0 < line["balanced"] <= 1
    assert set(result["predictions"]) == set(csa.HEADS)
    assert all(result[name] == value for name, value in result["predictions"]["average"].items())
    network = models.load(tmp_path / "run")
    assert network.prediction == "average"
    assert network(255 * torch.rand(4, *network.images.shape)).shape == (4, 10)


def objects_of(train_set):
    """bool [N, H, W] of the synthetic training images: the object, which is what no context changes."""
    labels, counts = train_set.labels, train_set.class_counts
    ranks = torch.cat([torch.arange(n) for n in counts])
    contexts = (labels + ranks % (counts // 10).clamp(1, 10)[labels]) % 10
    drawn, moved = (synthetic.draw_images(labels, (contexts + k) % 10, seed=0) for k in (0, 5))
    assert drawn.equal(train_set.images)
    return (drawn == moved).all(1)


@pytest.mark.slow
def test_masks_cover_background_and_not_the_object(tmp_path):
    """After the default run, over all training images that are fit."""
    run_here("csa.py", output_dir=tmp_path / "run")
    train_set, _ = datasets.load(parse("csa.py"))
    network = models.load(tmp_path / "run").network
    with torch.no_grad():
        p = network(train_set.images).softmax(1)
    is_fit = p.gather(1, train_set.labels[:, None])[:, 0] >= 0.8
    masks = csa.harvest(network, train_set.images, train_set.labels, 0.8)[:, -1]
    on_object = objects_of(train_set)[is_fit]
    assert is_fit.float().mean() > 0.9 and len(masks) == is_fit.sum()
    assert masks[on_object].mean() + 0.2 < masks[~on_object].mean()
