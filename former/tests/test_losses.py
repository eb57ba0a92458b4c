"""Every script's losses at the edges: huge logits, a class of one image, a batch of one class, bfloat16."""

import pytest
import torch

import bag_of_tricks
import balanced_meta_softmax
import bbn
import class_rectification
import cmo
import csa
import equalization_loss
import meta_weights

COUNTS = torch.tensor([500, 40, 7, 2, 1])
EVERY, ONE_CLASS = torch.tensor([0, 1, 2, 3, 4, 0]), torch.full((6,), 4)


def rectified(level, form):
    def loss(logits, labels):
        args = class_rectification.Args(level=level, form=form)
        scores = logits.softmax(1) if level == "class" else logits
        return class_rectification.rectification(scores, labels, 5, args)[0]

    return loss


def of_meta_weights(**options):
    args = meta_weights.Args(**options)
    return lambda z, y: meta_weights.image_losses(z, y, meta_weights.ldam_margins(COUNTS), args)


def of_tricks(loss, rebalanced=True, **options):
    args = bag_of_tricks.Args(loss=loss, **options)
    return lambda z, y: bag_of_tricks.image_losses(z, y, COUNTS, rebalanced, args)


def of_cmo(loss):
    args = cmo.Args(loss=loss)
    return lambda z, y: cmo.image_losses(torch.stack([z, -z], 1) if loss == "ride" else z, y, COUNTS, args)


def seql(z, y):
    rare = torch.tensor([False, True, True, True, True])
    drop = equalization_loss.dropped(y, rare, 0.9, torch.zeros(6, 5))
    return equalization_loss.seql(z, y, drop)


def eqlv2(z, y):
    weights = equalization_loss.eqlv2_weights(torch.tensor([0.0, 1e-10, 1.0, 100.0, 1e10]))
    return equalization_loss.eqlv2(z, y, *weights)[0]


LOSSES = {
    "bag_of_tricks focal, gamma 0.5": of_tricks("focal", gamma=0.5),
    **{
        f"bag_of_tricks {one}": of_tricks(one)
        for one in ("ce", "focal", "smooth", "label_aware", "ldam", "cdt", "bs")
    },
    "balanced_meta_softmax": lambda z, y: balanced_meta_softmax.balanced_softmax_loss(
        z, y, balanced_meta_softmax.log_prior(COUNTS)
    ),
    "bbn": lambda z, y: bbn.mixed_loss(z, y, y.flip(0), 0.3),
    **{f"cmo {one}": of_cmo(one) for one in ("ce", "ldam", "bs", "ride")},
    "cmo las": lambda z, y: cmo.smoothed_losses(z, y, COUNTS, cmo.Args(las=True)),
    "cmo disagreement": lambda z, y: cmo.disagreement(
        torch.stack([z, -z], 1), cmo.class_temperatures(COUNTS, 0.05).to(z)
    ),
    **{
        f"class_rectification {level} {form}": rectified(level, form)
        for level in ("class", "instance")
        for form in ("relative", "absolute", "distribution")
    },
    "equalization_loss seql": seql,
    "equalization_loss eqlv2": eqlv2,
    "equalization_loss softmax_eql": lambda z, y: equalization_loss.softmax_eql(
        z, y, torch.tensor([1e9, 10.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    )[0],
    "meta_weights focal": of_meta_weights(loss="focal", gamma=0.5),
    "meta_weights ldam": of_meta_weights(loss="ldam"),
}


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("labels", [EVERY, ONE_CLASS], ids=["every class", "one class"])
@pytest.mark.parametrize("size", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("name", LOSSES)
def test_finite_with_its_gradient(name, size, labels, kind):
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    logits = (size * logits.sign() if size > 1 else size * logits).to(kind).requires_grad_()
    loss = LOSSES[name](logits, labels).sum()
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()


@pytest.mark.parametrize("module", [bag_of_tricks, cmo, meta_weights], ids=lambda module: module.__name__)
def test_weights_of_classes_of_one_image(module):
    laws = dict(
        bag_of_tricks=[dict(reweight=law) for law in ("cost", "effective")],
        cmo=[dict(weighting=law) for law in ("inverse", "effective")],
        meta_weights=[dict(beta=0.9999)],
    )
    for law in laws[module.__name__]:
        weights = module.class_weights(torch.tensor([10**6, 1, 1]), **law)
        assert weights.isfinite().all() and (weights > 0).all()


def test_fit_of_saturated_logits():
    logits = torch.tensor([[1e4, -1e4], [-1e4, 1e4]])
    assert csa.is_fit(logits, torch.tensor([0, 0]), 0.5).tolist() == [True, False]
