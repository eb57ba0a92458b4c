"""common.models: parameter counts of the papers, shapes, initialisation."""

import pytest
import torch
import torch.nn.functional as F
from torchvision.models import ResNet50_Weights, resnet

from common import models
from tests.conftest import refusal


@pytest.mark.parametrize(
    "arch, num_classes, cosine, parameters",
    [
        ("resnet32", 100, None, 470_004),
        ("resnet32", 10, None, 464_154),
        ("resnet32", 100, 30.0, 469_904),
        ("resnet10", 1000, None, 4_905_792 + 513_000),
        ("resnet50", 1000, None, 25_557_032),
        ("wide_resnet50_2", 1000, None, 68_883_240),
    ],
)
def test_parameter_counts(arch, num_classes, cosine, parameters):
    assert models.count_parameters(models.build(arch, num_classes, 0, cosine=cosine)) == parameters


def test_lenet_parameters():
    assert models.count_parameters(models.build("lenet", 10, 0, (1, 28, 28))) == 61_026 + 30
    assert models.count_parameters(models.build("lenet", 10, 0, (3, 28, 28))) == 61_326 + 30


@pytest.mark.parametrize(
    "arch, shape", [("resnet8", (3, 24, 24)), ("resnet20", (1, 28, 28)), ("resnet10", (3, 64, 64))]
)
@pytest.mark.parametrize("cosine", [None, 30.0])
def test_interface(arch, shape, cosine):
    net = models.build(arch, 7, 0, shape, cosine=cosine).eval()
    images = torch.randn(2, *shape)
    features = net.features(images)
    torch.testing.assert_close(features, net.feature_map(images).mean((2, 3)))
    assert net(images).shape == (2, 7)
    assert net(images).equal(net.classifier(features))


def test_lenet():
    net = models.build("lenet", 10, 0, (1, 28, 28))
    images = torch.randn(3, 1, 28, 28)
    assert net.feature_map(images).shape == (3, 16, 5, 5)
    assert net.features(images).shape == (3, 2)
    assert models.build("lenet", 10, 0, (3, 24, 24))(torch.randn(3, 3, 24, 24)).shape == (3, 10)


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
    one = models.build("resnet8", 10, 5).state_dict()
    state = torch.random.get_rng_state()
    two = models.build("resnet8", 10, 5).state_dict()
    other = models.build("resnet8", 10, 6).state_dict()
    assert state.equal(torch.random.get_rng_state())
    assert all(one[name].equal(two[name]) for name in one)
    assert not one["classifier.weight"].equal(other["classifier.weight"])


def test_kaiming_initialisation():
    net = models.build("resnet32", 100, 0)
    weight = net.backbone[3][2].conv1.weight  # 16 channels in: standard deviation sqrt(2 / (16 * 9))
    assert weight.std().item() == pytest.approx((2 / 144) ** 0.5, rel=0.05)
    assert net.classifier.weight.std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.05)


def test_resnext():
    """torchvision's ResNeXt-50 32x4d without its classifier has 22,979,904 parameters."""
    net = models.build("resnext50_32x4d", 7, 0)
    assert models.count_parameters(net.backbone) == 22_979_904


def test_pretrained_weights_are_torchvision_s(monkeypatch):
    """Asked for by name, put into the backbone; a failed download takes one line."""
    source = resnet.resnet50()
    state = {name: torch.full_like(t, 0.5) for name, t in source.state_dict().items()}
    asked = []

    def get_state_dict(self, **options):
        asked.append(self)
        return state

    monkeypatch.setattr(ResNet50_Weights, "get_state_dict", get_state_dict)
    net = models.build("resnet50", 7, 0, pretrained=True)
    assert asked == [ResNet50_Weights.IMAGENET1K_V1]
    assert net.backbone[0].weight.eq(0.5).all() and net.backbone[7][2].conv3.weight.eq(0.5).all()
    assert not net.classifier.weight.eq(0.5).any()


def test_pretrained_weights_that_cannot_be_had(monkeypatch, capsys):
    def offline(self, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(ResNet50_Weights, "get_state_dict", offline)
    line = refusal(lambda: models.build("resnet50", 7, 0, pretrained=True), capsys)
    assert line.startswith("--pretrained: no ImageNet weights for --arch resnet50 (no route to host)")


def test_cosine_weights_survive_the_initialisation():
    weight = models.build("resnet8", 10, 0, cosine=30.0).classifier.weight
    torch.testing.assert_close(F.normalize(weight, dim=0), weight)


def test_unknown_network(capsys):
    assert refusal(lambda: models.build("resnet33", 10, 0), capsys).startswith(
        "--arch resnet33: must be one of"
    )
