"""Accuracy on the test set, exact over any number of processes, by many-, medium- and few-shot classes."""

import torch

from common.cli import Refused

SPLITS = ("all", "many", "medium", "few")


def split_classes(class_counts, many_over=100, few_under=20):
    """{"many", "medium", "few": bool [K]} by training images: over many_over, between, under few_under."""
    many = class_counts > many_over
    few = class_counts < few_under
    return {"many": many, "medium": ~many & ~few, "few": few}


def calibration_error(confidences, correct, bins=15):
    """Expected calibration error in percent, over equal bins of confidence. confidences [N], correct [N]."""
    bin_of = (confidences * bins).long().clamp(max=bins - 1)
    gaps = torch.zeros(bins, dtype=torch.float64)
    gaps.index_add_(0, bin_of, correct.double() - confidences.double())
    return 100 * gaps.abs().sum().item() / len(correct)


def summarize(labels, top, confidences, class_counts, splits=(100, 20)):
    """Top-1 accuracy in percent, over all images and averaged over the classes of each split.

    labels [N], top [N, 5] best first, confidences of the best [N]. What has no test image is None.
    """
    correct = top[:, 0] == labels
    tests = torch.bincount(labels, minlength=len(class_counts))
    hits = torch.bincount(labels[correct], minlength=len(class_counts))
    per_class = 100 * hits.double() / tests

    result = {"all": 100 * correct.double().mean().item()}
    for name, members in split_classes(class_counts, *splits).items():
        tested = per_class[members & (tests > 0)]
        result[name] = tested.mean().item() if len(tested) else None
    result["class_mean"] = per_class[tests > 0].mean().item()
    result["top5"] = 100 * (top == labels[:, None]).any(1).double().mean().item()
    result["ece"] = calibration_error(confidences, correct)
    values = zip(per_class.tolist(), tests.tolist(), strict=True)
    result["per_class"] = [value if n else None for value, n in values]
    return result


@torch.no_grad()
def predict(accelerator, model, loader):
    """(labels [N], best classes [N, 5], confidence of the best [N]) of every test image once, on the CPU."""
    model.eval()
    parts = []
    for images, labels in loader:
        probabilities = model(images).float().softmax(1)
        confidences, top = probabilities.topk(min(5, probabilities.shape[1]))
        parts.append(accelerator.gather_for_metrics((labels, top, confidences[:, 0])))
    labels, top, confidences = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    if not confidences.isfinite().all():
        raise Refused("the network's outputs are not finite; lower --lr")
    return labels, top, confidences


def per_split(run, model, loader):
    """`summarize` of the model on the prepared test loader; {} in the epochs that --eval-every leaves out."""
    if (run.epoch + 1) % run.args.eval_every and run.epoch != run.last_epoch:
        return {}
    return summarize(*predict(run.accelerator, model, loader), run.class_counts, run.args.splits)
