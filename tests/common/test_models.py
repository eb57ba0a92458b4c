"""common.models: parameter counts of the papers, shapes, initialisation."""

import pytest
import torch
import torch.nn.functional as F
from torchvision.models import ResNet50_Weights, resnet

from common import models
from common.datasets import LabelledImages
from tests.conftest import TINY, refusal, run_here


def images(num_classes=10, shape=(3, 32, 32)):
    """What a network is built for; the statistics leave 0..255 as it is."""
    channels = shape[0]
    statistics = (0.0,) * channels, (1 / 255,) * channels
    return LabelledImages([], [], [str(k) for k in range(num_classes)], shape, statistics)


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    "arch, num_classes, cosine, count",
    [
        ("resnet32", 100, None, 470_004),
        ("resnet32", 10, None, 464_154),
        ("resnet32", 100, 30.0, 469_904),
        ("resnet10", 1000, None, 4_905_792 + 513_000),
        ("resnet50", 1000, None, 25_557_032),
        ("wide_resnet50_2", 1000, None, 68_883_240),
    ],
)
def test_parameter_counts(arch, num_classes, cosine, count):
    assert parameters(models.build(arch, images(num_classes), 0, cosine)) == count


def test_lenet_parameters():
    assert parameters(models.build("lenet", images(10, (1, 28, 28)), 0)) == 61_026 + 30
    assert parameters(models.build("lenet", images(10, (3, 28, 28)), 0)) == 61_326 + 30


@pytest.mark.parametrize(
    "arch, shape", [("resnet8", (3, 24, 24)), ("resnet20", (1, 28, 28)), ("resnet10", (3, 64, 64))]
)
@pytest.mark.parametrize("cosine", [None, 30.0])
def test_interface(arch, shape, cosine):
    net = models.build(arch, images(7, shape), 0, cosine).eval()
    pixels = torch.randn(2, *shape)
    features = net.features(pixels)
    torch.testing.assert_close(features, net.feature_map(pixels).mean((2, 3)))
    assert net(pixels).shape == (2, 7)
    assert net(pixels).equal(net.classifier(features))


def test_lenet():
    net = models.build("lenet", images(10, (1, 28, 28)), 0)
    pixels = torch.randn(3, 1, 28, 28)
    assert net.feature_map(pixels).shape == (3, 16, 5, 5)
    assert net.features(pixels).shape == (3, 2)
    assert models.build("lenet", images(10, (3, 24, 24)), 0)(torch.randn(3, 3, 24, 24)).shape == (3, 10)


def test_shortcut_without_parameters():
    """Option A: every second row and column, zero channels on both sides."""
    block = models.BasicBlock(16, 32, 2).eval()
    for parameter in block.parameters():
        torch.nn.init.zeros_(parameter)
    x = torch.rand(2, 16, 8, 8)
    expected = torch.zeros(2, 32, 4, 4)
    expected[:, 8:24] = x[:, :, ::2, ::2]
    assert block(x).equal(expected)


def test_cosine_classifier():
    head = models.CosineClassifier(3, 2, 30.0)
    torch.testing.assert_close(head.weight.norm(dim=0), torch.ones(2))
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[2.0, 0.0], [0.0, 0.0], [0.0, 5.0]]))
    torch.testing.assert_close(head(torch.tensor([[3.0, 0.0, 4.0]])), torch.tensor([[18.0, 24.0]]))


def test_initial_weights_follow_from_the_seed():
    torch.manual_seed(1)
    one = models.build("resnet8", images(10), 5).state_dict()
    state = torch.random.get_rng_state()
    two = models.build("resnet8", images(10), 5).state_dict()
    other = models.build("resnet8", images(10), 6).state_dict()
    assert state.equal(torch.random.get_rng_state())
    assert all(one[name].equal(two[name]) for name in one)
    assert not one["classifier.weight"].equal(other["classifier.weight"])


def test_kaiming_initialisation():
    net = models.build("resnet32", images(100), 0)
    weight = net.backbone[4][2].conv1.weight  # 16 channels in: standard deviation sqrt(2 / (16 * 9))
    assert weight.std().item() == pytest.approx((2 / 144) ** 0.5, rel=0.05)
    assert net.classifier.weight.std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.05)


def test_resnext():
    """torchvision's ResNeXt-50 32x4d without its classifier has 22,979,904 parameters."""
    net = models.build("resnext50_32x4d", images(7), 0)
    assert parameters(net.backbone) == 22_979_904


def test_pretrained_weights_are_torchvision_s(monkeypatch):
    """Asked for by name, put into the backbone; a failed download takes one line."""
    source = resnet.resnet50()
    state = {name: torch.full_like(t, 0.5) for name, t in source.state_dict().items()}
    asked = []

    def get_state_dict(self, **options):
        asked.append(self)
        return state

    monkeypatch.setattr(ResNet50_Weights, "get_state_dict", get_state_dict)
    net = models.build("resnet50", images(7), 0, pretrained=True)
    assert asked == [ResNet50_Weights.IMAGENET1K_V1]
    assert net.backbone[1].weight.eq(0.5).all() and net.backbone[8][2].conv3.weight.eq(0.5).all()
    assert not net.classifier.weight.eq(0.5).any()


def test_pretrained_weights_that_cannot_be_had(monkeypatch):
    def offline(self, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(ResNet50_Weights, "get_state_dict", offline)
    line = refusal(models.build, "resnet50", images(7), 0, pretrained=True)
    assert line.startswith("--pretrained: no ImageNet weights for --arch resnet50 (no route to host)")


def test_cosine_weights_survive_the_initialisation():
    weight = models.build("resnet8", images(10), 0, cosine=30.0).classifier.weight
    torch.testing.assert_close(F.normalize(weight, dim=0), weight)


def test_unknown_network():
    assert refusal(models.build, "resnet33", images(10), 0).startswith(
        "--arch resnet33: must be resnet8, 20, 32"
    )


def test_pixels_are_normalised_by_the_network():
    part = images(2)
    part.statistics = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)
    pixels = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in part.statistics)
    normalised = models.build("resnet8", part, 0).backbone[0](pixels)
    torch.testing.assert_close(normalised, (pixels / 255 - mean) / std)


def test_narrow_stages():
    """RIDE's experts: three quarters of the channels in the last two stages."""
    net = models.build("resnet32", images(100), 0, 30.0, narrow=0.75)
    assert net.classifier.weight.shape == (48, 100) and net.backbone[5][0].conv1.out_channels == 24
    net = models.build("resnet50", images(7), 0, 30.0, narrow=0.75)
    assert net.classifier.weight.shape == (1536, 7)
    assert net(torch.zeros(2, 3, 64, 64)).shape == (2, 7)


@pytest.mark.parametrize("arch", ["resnet8", "resnet10", "lenet"])
def test_last_block(arch):
    net = models.build(arch, images(7), 0).eval()
    pixels = torch.randn(2, 3, 32, 32)
    trunk, block = models.split_last_block(net)
    torch.testing.assert_close(block(trunk(pixels)), net.features(pixels))


def test_refusals():
    line = refusal(models.build, "resnet8", images(), 0, pretrained=True)
    assert line == "--pretrained: there are no ImageNet weights for --arch resnet8; leave it out"


def test_finished_runs_are_loaded(tmp_path):
    result = run_here("cmo.py", **TINY, loss="ldam", output_dir=tmp_path / "run")
    network = models.load(tmp_path / "run")
    assert not network.training and network.images.class_names == result["class_names"]
    assert network(torch.zeros(2, 3, 24, 24, dtype=torch.uint8)).shape == (2, 10)
    for arch, names, cause in (
        ("resnet20", result["class_names"], "its network does not fit (Missing key(s) in state_dict"),
        ("resnet8", result["class_names"][::-1], "its run has other classes, or in another order; name one"),
    ):
        line = refusal(models.load_weights, tmp_path / "run", models.build(arch, images(), 0), names)
        assert line.startswith(f"{tmp_path}/run: {cause}") and len(line) < 300
    assert refusal(models.load, tmp_path).startswith(f"{tmp_path}: holds no finished run of a script")
    (tmp_path / "run" / "model.safetensors").write_bytes(b"damaged")
    line = refusal(models.load, tmp_path / "run")
    assert line == f"{tmp_path}/run: holds no finished run; name another"
