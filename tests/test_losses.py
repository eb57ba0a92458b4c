"""Every script's losses at the edges: huge logits, a class of one image, a batch of one class, bfloat16."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

import bag_of_tricks
import balanced_meta_softmax
import bbn
import class_rectification
import cmo
import csa
import decoupled_crt
import equalization_loss
import meta_weights
import ride
from common import models
from tests.conftest import parse

COUNTS = torch.tensor([500.0, 40.0, 7.0, 2.0, 1.0])
LABELS = {"every class": torch.tensor([0, 1, 2, 3, 4, 0]), "one class": torch.full((6,), 4)}


def of_images(script, loss, *more):
    """The image_losses of a script."""
    return lambda z, y: script.image_losses(z, y, COUNTS, loss, *more)


def of_bbn(z, y):
    """The loss of the one step that bbn.train_one_epoch makes on logits z."""
    losses = []
    accelerator = SimpleNamespace(backward=losses.append)
    run = SimpleNamespace(accelerator=accelerator, steps=iter, log=lambda **facts: None)
    optimizer = SimpleNamespace(zero_grad=lambda: None, step=lambda: None)
    args = parse("bbn.py", epochs=10)
    model = torch.nn.Module()
    model.forward = lambda x_c, x_r, alpha: x_c
    bbn.train_one_epoch(run, model, [(z, y)], [(z, y.flip(0))], optimizer, 8, args)
    return losses[0]


def of_experts(z, y):
    """RIDE's loss of two experts that disagree about everything."""
    return ride.image_losses(torch.stack([z, -z], dim=1), y, COUNTS)


def disagreement(z, y, spread):
    temperatures = ride.class_temperatures(COUNTS, spread).to(z)
    return ride.disagreement(torch.stack([z, -z], dim=1), temperatures)


def smoothed(z, y, head, tail):
    eps = decoupled_crt.smoothing(COUNTS, head, tail)
    return decoupled_crt.smoothed_losses(z, y, eps)


def rectified(z, y, level, form):
    args = parse("class_rectification.py", level=level, form=form)
    scores = z.softmax(1) if level == "class" else z
    crl, triplets = class_rectification.rectification(scores, y, 5, args)
    return class_rectification.total(z.sum() * 0, crl, triplets, alpha=0.5)


def seql(z, y):
    rare = torch.tensor([False, True, True, True, True])
    drop = equalization_loss.dropped(y, rare, 0.9, torch.zeros(6, 5))
    return equalization_loss.seql(z, y, drop)


def eqlv2(z, y):
    weights = equalization_loss.eqlv2_weights(torch.tensor([0.0, 1e-10, 1.0, 100.0, 1e10]))
    losses, gradients = equalization_loss.eqlv2(z, y, *weights)
    assert gradients.isfinite().all()
    return losses


def softmax_eql(z, y):
    positive = torch.tensor([1e9, 10.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    losses, gradients = equalization_loss.softmax_eql(z, y, positive)
    assert gradients.isfinite().all()
    return losses


LOSSES = {
    "balanced_meta_softmax bs": of_images(balanced_meta_softmax, "bs"),
    "balanced_meta_softmax bs, tau 0.25": of_images(balanced_meta_softmax, "bs", 0.25),
    "bbn": of_bbn,
    "decoupled_crt las": partial(smoothed, head=0.4, tail=0.1),
    "decoupled_crt las, none of the tail": partial(smoothed, head=0.3, tail=0.0),
    "equalization_loss seql": seql,
    "equalization_loss eqlv2": eqlv2,
    "equalization_loss softmax_eql": softmax_eql,
    "meta_weights ldam": of_images(meta_weights, "ldam"),
    "meta_weights focal": of_images(meta_weights, "focal"),
    "meta_weights focal, gamma 0.5": of_images(meta_weights, "focal", 0.5),
    "ride": of_experts,
    "ride disagreement": partial(disagreement, spread=0.05),
    "ride disagreement, spread 0": partial(disagreement, spread=0.0),
    "bag_of_tricks focal, gamma 0.5": of_images(bag_of_tricks, "focal", 0.5),
}
for name in bag_of_tricks.LOSSES:
    LOSSES[f"bag_of_tricks {name}"] = of_images(bag_of_tricks, name)
for name in ("ce", "ldam", "bs"):
    LOSSES[f"cmo {name}"] = of_images(cmo, name)
for level in class_rectification.LEVELS:
    for form in class_rectification.FORMS:
        LOSSES[f"class_rectification {level} {form}"] = partial(rectified, level=level, form=form)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("size", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("name", LOSSES)
def test_finite_with_its_gradient(name, size, labels, kind):
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    if size > 1:
        logits = logits.sign()
    logits = (size * logits).to(kind).requires_grad_()
    loss = LOSSES[name](logits, LABELS[labels]).sum()
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()


WEIGHTS = {
    "bag_of_tricks cost": partial(bag_of_tricks.class_weights, reweight="cost"),
    "bag_of_tricks square-root": partial(bag_of_tricks.class_weights, reweight="square-root"),
    "bag_of_tricks effective": partial(bag_of_tricks.class_weights, reweight="effective"),
    "cmo effective": cmo.effective_weights,
    "meta_weights effective": meta_weights.effective_weights,
    "ride effective": ride.effective_weights,
    "ride temperatures": partial(ride.class_temperatures, spread=0.05),
    "ride temperatures, spread 1": partial(ride.class_temperatures, spread=1.0),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_of_classes_of_one_image(name):
    for counts in ([1e6, 1.0, 1.0], [1.0, 1.0, 1.0]):
        weights = WEIGHTS[name](torch.tensor(counts))
        assert weights.isfinite().all() and (weights > 0).all()


@pytest.mark.parametrize("counts", [[1e6, 1.0, 1.0], [1.0, 1.0, 1.0]])
def test_smoothing_of_classes_of_one_image(counts):
    eps = decoupled_crt.smoothing(torch.tensor(counts), 0.4, 0.1)
    assert (eps >= 0.1).all() and (eps <= 0.4).all() and eps[1] == eps.new_tensor(0.1)


def test_contexts_of_saturated_logits():
    """csa.harvest takes the image whose p(label) is 1, not that whose p(label) is 0."""
    network = models.Network(torch.nn.Identity(), torch.nn.Linear(2, 2, bias=False))
    network.classifier.weight.data = torch.eye(2)
    images = torch.tensor([[1e4, -1e4], [-1e4, 1e4]])[:, :, None, None].expand(2, 2, 3, 3)
    contexts = csa.harvest(network, images, torch.tensor([0, 0]), 0.5)
    assert contexts.isfinite().all() and contexts[:, :2].equal(images[:1])
