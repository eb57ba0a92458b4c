"""Networks: CIFAR ResNets, torchvision's ImageNet ResNets, LeNet, and the linear and cosine classifiers.

Every network takes pixels of 0..255, uint8 or float, and normalises them itself. It has
feature_map(images) -> [B, D, h, w], features(images) -> [B, D] and classifier(features) -> [B, K].
"""

import importlib
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import PartialState
from safetensors.torch import load_file
from torch import nn
from torchvision.models import get_model_weights, resnet

from common.cli import Refused
from common.datasets import LabelledImages


class Normalize(nn.Module):
    """(pixels / 255 - mean) / std, by channel."""

    def __init__(self, mean, std):
        super().__init__()
        self.register_buffer("mean", 255 * torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(std).view(-1, 1, 1))

    def forward(self, images):
        return (images - self.mean) / self.std


class CosineClassifier(nn.Module):
    """scale * cosine of feature and class weight, [B, D] -> [B, K]; weight [D, K]."""

    def __init__(self, in_features, num_classes, scale):
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(F.normalize(torch.empty(in_features, num_classes).uniform_(-1, 1), dim=0))

    def forward(self, features):
        return self.scale * F.normalize(features, dim=1) @ F.normalize(self.weight, dim=0)


class Network(nn.Module):
    """Backbone, global average pooling (of LeNet its neck instead) and classifier."""

    def __init__(self, backbone, classifier, neck=None):
        super().__init__()
        self.backbone, self.classifier, self.neck = backbone, classifier, neck

    def feature_map(self, images):
        return self.backbone(images)

    def pool(self, maps):
        if self.neck is None:
            return maps.mean((2, 3))
        return self.neck(maps.flatten(1))

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
        self.stride = stride
        self.padding = (channels - in_channels) // 2

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.padding or self.stride > 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(y + x)


def cifar_backbone(depth, channels, narrow):
    """3x3 stem, then 3 stages of (depth - 2) / 6 blocks, as a list; and the number of features."""
    modules = [nn.Conv2d(channels, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    before = 16
    for width, stride in ((16, 1), (round(32 * narrow), 2), (round(64 * narrow), 2)):
        blocks = [BasicBlock(before, width, stride)]
        blocks += [BasicBlock(width, width, 1) for _ in range((depth - 2) // 6 - 1)]
        modules.append(nn.Sequential(*blocks))
        before = width
    return modules, before


def lenet_neck(size):
    """LeNet's layers to a 2-dimensional feature, so that it can be drawn. Made for 28x28 images."""
    flat = 16 * ((size // 2 - 4) // 2) ** 2
    layers = nn.Linear(flat, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 2)
    return nn.Sequential(*layers)


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


def imagenet_backbone(arch, channels, narrow, pretrained):
    """torchvision's network without its classifier, as a list; and the number of features."""
    block, blocks, groups, width = IMAGENET[arch]
    net = resnet.ResNet(block, blocks, groups=groups, width_per_group=width)
    if pretrained:
        try:
            with PartialState().main_process_first():  # which downloads them, where they are not there
                net.load_state_dict(get_model_weights(arch).IMAGENET1K_V1.get_state_dict(check_hash=True))
        except Exception as error:  # a download fails in many ways
            raise Refused(f"--pretrained: no ImageNet weights for --arch {arch} ({error})") from None
    if narrow != 1:  # the last two stages made again
        net.inplanes = 128 * block.expansion
        net.layer3 = net._make_layer(block, round(256 * narrow), blocks[2], stride=2)
        net.layer4 = net._make_layer(block, round(512 * narrow), blocks[3], stride=2)
        for module in [*net.layer3.modules(), *net.layer4.modules()]:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    if channels != 3:
        net.conv1 = nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
    stages = [net.layer1, net.layer2, net.layer3, net.layer4]
    return [net.conv1, net.bn1, net.relu, net.maxpool, *stages], net.inplanes


def build(arch, dataset, seed, cosine=None, pretrained=False, narrow=1.0):
    """The network `arch` for the images and classes of `dataset`; `seed` alone decides its first weights.

    cosine: scale of a CosineClassifier (LDAM), which then replaces the linear one. pretrained: the backbone
    starts from torchvision's ImageNet weights. narrow: factor on the channels of the last two stages (RIDE).
    """
    channels, size, _ = dataset.shape
    if pretrained and arch not in IMAGENET:
        raise Refused(f"--pretrained: there are no ImageNet weights for --arch {arch}; leave it out")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # of the CPU alone
        if arch in IMAGENET:
            modules, width = imagenet_backbone(arch, channels, narrow, pretrained)
        elif arch.startswith("resnet") and arch[6:] in ("8", "20", "32", "44", "56"):
            modules, width = cifar_backbone(int(arch[6:]), channels, narrow)
        elif arch == "lenet":
            first, second = nn.Conv2d(channels, 6, 5, padding=2), nn.Conv2d(6, 16, 5)
            modules, width = [first, nn.ReLU(), nn.MaxPool2d(2), second, nn.ReLU(), nn.MaxPool2d(2)], 2
        else:
            raise Refused(f"--arch {arch}: must be resnet8, 20, 32, 44, 56, lenet, {', '.join(IMAGENET)}")
        if cosine:
            classifier = CosineClassifier(width, dataset.num_classes, cosine)
        else:
            classifier = nn.Linear(width, dataset.num_classes)
        backbone = nn.Sequential(Normalize(*dataset.statistics), *modules)
        network = Network(backbone, classifier, lenet_neck(size) if arch == "lenet" else None)
        if arch not in IMAGENET:
            for module in network.modules():
                if isinstance(module, (nn.Conv2d, nn.Linear)):
                    nn.init.kaiming_normal_(module.weight)
    return network.to(memory_format=torch.channels_last)  # as the images: faster, on CPUs too


def split_last_block(network):
    """(trunk, last block with pooling): features(images) is block(trunk(images)); the modules are shared."""
    if network.neck is not None:
        return network.backbone, nn.Sequential(nn.Flatten(), network.neck)
    *before, stage = network.backbone
    trunk = nn.Sequential(*before, nn.Sequential(*stage[:-1]))
    return trunk, nn.Sequential(stage[-1], nn.AdaptiveAvgPool2d(1), nn.Flatten())


def load(folder):
    """The trained network of the finished run in `folder`, to predict: network(pixels) -> logits [B, K].

    Made by the script of the run, which must be at hand. Its `images` tells classes and shape (C, H, W).
    """
    try:
        result = json.loads(Path(folder, "result.json").read_text())
        options = {name: tuple(v) if isinstance(v, list) else v for name, v in result["args"].items()}
        images = LabelledImages([], [], result["class_names"], result["shape"], result["statistics"])
        script = importlib.import_module(Path(result["script"]).stem)
        args = script.Args(**{**options, "pretrained": False})
    except (OSError, ValueError, LookupError, TypeError, ImportError, AttributeError) as error:
        raise Refused(f"{folder}: holds no finished run of a script that is at hand ({error})") from None
    network = script.make_model(images, args)
    load_weights(folder, network, images.class_names)
    network.images = images
    return network.eval()


def load_weights(folder, network, class_names):
    """Give the network the weights of the finished run in `folder`, which has to be of the same classes."""
    try:
        names = json.loads(Path(folder, "result.json").read_text())["class_names"]
        weights = load_file(Path(folder, "model.safetensors"))
    except Exception:  # not there, or damaged
        raise Refused(f"{folder}: holds no finished run; name another") from None
    if names != class_names:
        raise Refused(f"{folder}: its run has other classes, or in another order; name one with the same")
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:  # keys or shapes
        cause = str(error).splitlines()[1].strip()[:60]
        raise Refused(f"{folder}: its network does not fit ({cause} ..); give its --arch") from None
