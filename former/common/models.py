"""Networks: CIFAR ResNets, torchvision's ImageNet ResNets, LeNet, and the linear and cosine classifiers.

Every network has feature_map(images) -> [B, C, h, w], pool(maps) -> [B, D], classifier(features) -> [B, K];
features(images) is pool(feature_map(images)), forward(images) is classifier(features(images)).
"""

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from accelerate import PartialState
from torch import nn
from torchvision.models import get_model_weights, resnet

from common import cli


class CosineClassifier(nn.Module):
    """scale * cosine of feature and class weight, [B, D] -> [B, K]; weight [D, K], at first unit columns."""

    def __init__(self, in_features, num_classes, scale):
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(F.normalize(torch.empty(in_features, num_classes).uniform_(-1, 1), dim=0))

    def forward(self, features):
        return self.scale * F.normalize(features, dim=1) @ F.normalize(self.weight, dim=0)


class ScaledClassifier(nn.Module):
    """scale * (W x + b), [B, D] -> [B, K], of a linear classifier; a scale per class [K], at first 1."""

    def __init__(self, linear):
        super().__init__()
        self.linear, self.scale = linear, nn.Parameter(linear.weight.new_ones(linear.out_features))

    def forward(self, features):
        return self.scale * self.linear(features)


class Network(nn.Module):
    """Backbone, global average pooling (C = D) and classifier in one."""

    def __init__(self, backbone, classifier):
        super().__init__()
        self.backbone, self.classifier = backbone, classifier

    def feature_map(self, images):
        return self.backbone(images)

    def pool(self, maps):
        return maps.mean((2, 3))

    def features(self, images):
        return self.pool(self.feature_map(images))

    def forward(self, images):
        return self.classifier(self.features(images))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; shortcut "option A", without parameters: every second pixel, zero channels."""

    def __init__(self, in_channels, channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.padding = stride, (channels - in_channels) // 2

    def forward(self, x):
        shortcut = x
        if self.stride > 1 or self.padding:
            shortcut = F.pad(
                x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding)
            )
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + shortcut)


def cifar_backbone(depth, channels, narrow=1.0):
    """3x3 stem of 16 channels, then 3 stages of (depth - 2) / 6 blocks with 16, 32, 64 channels.

    narrow: a factor on the last two.
    """
    stages, blocks, second, third = [], (depth - 2) // 6, round(32 * narrow), round(64 * narrow)
    for before, width, stride in ((16, 16, 1), (16, second, 2), (second, third, 2)):
        first = BasicBlock(before, width, stride)
        stages.append(nn.Sequential(first, *(BasicBlock(width, width, 1) for _ in range(blocks - 1))))
    return nn.Sequential(nn.Conv2d(channels, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), *stages)


class LeNet(Network):
    """LeNet with a 2-dimensional feature, so that features can be drawn. Made for 28x28 images."""

    def __init__(self, channels, size, classifier):
        if size < 12:
            cli.fail(f"--arch lenet: images of {size} pixels are too small; raise --image-size to 12 or more")
        conv = [
            nn.Conv2d(channels, 6, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5),
            nn.ReLU(),
        ]
        super().__init__(nn.Sequential(*conv, nn.MaxPool2d(2)), classifier)
        flat = 16 * ((size // 2 - 4) // 2) ** 2
        self.neck = nn.Sequential(
            nn.Linear(flat, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 2)
        )

    def pool(self, maps):
        return self.neck(maps.flatten(1))


IMAGENET = {  # block, blocks per stage, groups and width of the bottleneck
    "resnet10": (resnet.BasicBlock, [1, 1, 1, 1], 1, 64),
    "resnet18": (resnet.BasicBlock, [2, 2, 2, 2], 1, 64),
    "resnet50": (resnet.Bottleneck, [3, 4, 6, 3], 1, 64),
    "resnet101": (resnet.Bottleneck, [3, 4, 23, 3], 1, 64),
    "resnet152": (resnet.Bottleneck, [3, 8, 36, 3], 1, 64),
    "resnext50_32x4d": (resnet.Bottleneck, [3, 4, 6, 3], 32, 4),
    "resnext101_32x4d": (resnet.Bottleneck, [3, 4, 23, 3], 32, 4),
    "resnext152_32x4d": (resnet.Bottleneck, [3, 8, 36, 3], 32, 4),
    "wide_resnet50_2": (resnet.Bottleneck, [3, 4, 6, 3], 1, 128),
}
CIFAR = {f"resnet{depth}": depth for depth in (8, 20, 32, 44, 56)}
NAMES = (*CIFAR, *IMAGENET, "lenet")


def imagenet_backbone(arch, channels, pretrained, narrow=1.0):
    block, blocks, groups, width = IMAGENET[arch]
    net = resnet.ResNet(block, blocks, groups=groups, width_per_group=width)
    if narrow != 1:  # the stages made again
        net.inplanes, third, fourth = 128 * block.expansion, round(256 * narrow), round(512 * narrow)
        net.layer3 = net._make_layer(block, third, blocks[2], stride=2)
        net.layer4 = net._make_layer(block, fourth, blocks[3], stride=2)
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    if pretrained:
        try:  # from torchvision's cache, else downloaded
            with PartialState().main_process_first():
                net.load_state_dict(get_model_weights(arch).IMAGENET1K_V1.get_state_dict(check_hash=True))
        except Exception as e:  # a download fails in many ways
            cli.fail(f"--pretrained: no ImageNet weights for --arch {arch} ({e}); use --no-pretrained")
    if channels != 3:
        net.conv1 = nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
    stages = (net.layer1, net.layer2, net.layer3, net.layer4)
    backbone = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool, *stages)
    return backbone, net.inplanes


@contextmanager
def seeded(seed):
    """Draw what is drawn inside from `seed`, and leave the generator outside alone."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # of the CPU alone
        yield


def check_name(arch):
    """Stops with one line where there is no such network."""
    if arch not in NAMES:
        cli.fail(f"--arch {arch}: must be one of {', '.join(NAMES)}{cli.nearest(arch, NAMES)}")


def build(arch, num_classes, seed, shape=(3, 32, 32), *, cosine=None, pretrained=False, narrow=1.0):
    """The network `arch` for images of `shape` (C, H, W); `seed` alone decides its first weights.

    CIFAR ResNets and LeNet: kaiming-normal convolutions and linear layers. ImageNet ResNets: torchvision's.
    cosine: the scale of a CosineClassifier (LDAM), which then replaces the linear one.
    pretrained: the backbone starts from torchvision's ImageNet weights.
    narrow: a factor on the channels of a ResNet's last two stages (RIDE's experts).
    """
    check_name(arch)
    if pretrained and arch not in IMAGENET:
        cli.fail(f"--pretrained: there are no ImageNet weights for --arch {arch}; use --no-pretrained")
    channels, size, _ = shape

    def make_classifier(width, num_classes):
        return CosineClassifier(width, num_classes, cosine) if cosine else nn.Linear(width, num_classes)

    with seeded(seed):
        if arch in IMAGENET:
            backbone, width = imagenet_backbone(arch, channels, pretrained, narrow)
            return Network(backbone, make_classifier(width, num_classes)).to(
                memory_format=torch.channels_last
            )
        if arch == "lenet":
            net = LeNet(channels, size, make_classifier(2, num_classes))
        else:
            backbone, width = cifar_backbone(CIFAR[arch], channels, narrow), round(64 * narrow)
            net = Network(backbone, make_classifier(width, num_classes))
        for module in net.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)
        return net.to(memory_format=torch.channels_last)  # as the images: faster, on CPUs too


def split_last_block(network):
    """(trunk, last block with pooling): features(images) is block(trunk(images)); the modules are shared.

    The last residual block of a ResNet; LeNet's linear layers below the classifier.
    """
    if isinstance(network, LeNet):
        return network.backbone, nn.Sequential(nn.Flatten(), network.neck)
    *before, stage = network.backbone
    trunk = nn.Sequential(*before, nn.Sequential(*stage[:-1]))
    return trunk, nn.Sequential(stage[-1], nn.AdaptiveAvgPool2d(1), nn.Flatten())


def load_weights(network, weights, source):
    """Give the network `weights`, a state dict; one line that begins with `source` where they do not fit."""
    own = network.state_dict()
    for name in sorted({*weights, *own}):
        there, here = (tuple(d[name].shape) if name in d else "missing" for d in (weights, own))
        if there != here:
            what = f"{name} is {there} there and {here} here"
            cli.fail(f"{source}: its network does not fit: {what}; use one with the same layers")
    network.load_state_dict(weights)


@torch.no_grad()
def check_map(network, shape, arch):
    """Refuse a network whose feature map of images of `shape` (C, H, W) is one pixel: it shows no place."""
    height, width = network.eval().feature_map(torch.zeros(1, *shape)).shape[2:]
    network.train()
    if height * width == 1:
        cli.fail(f"--arch {arch}: its map of images of {shape[1]} pixels is one pixel; use resnet32")


def count_parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())
