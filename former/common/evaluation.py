"""Accuracy on the test set, exact over any number of processes, by many-, medium- and few-shot classes."""

import itertools
import time

import torch

ACCURACIES = ("all", "many", "medium", "few")


def split_classes(class_counts, many_over=100, few_under=20, many_classes=None, few_classes=None):
    """{"many", "medium", "few": bool [K]} by training images: over many_over, between, under few_under.

    With many_classes, many-shot are the so many most frequent classes; with few_classes, few-shot the so many
    rarest; of equal counts the class of the lower number counts as the more frequent.
    """
    counts = torch.as_tensor(class_counts)
    many, few = counts > many_over, counts < few_under
    rank = counts.argsort(descending=True, stable=True).argsort()
    if many_classes is not None:
        many = rank < many_classes
    if few_classes is not None:
        few = rank >= len(counts) - few_classes
    return {"many": many, "medium": ~many & ~few, "few": few}


def calibration_error(confidences, correct, bins=15):
    """Expected calibration error in percent, over equal bins of confidence. confidences [N], correct [N]."""
    bin_of = (confidences * bins).long().clamp(max=bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64).index_add_(
        0, bin_of, correct.double() - confidences.double()
    )
    return 100 * gap.abs().sum().item() / len(correct)


def summarize(
    labels, top, confidences, class_counts, many_over=100, few_under=20, many_classes=None, few_classes=None
):
    """A result's numbers: top-1 accuracy in percent, over all images and averaged over each split's classes.

    labels [N], top [N, 5] best first (narrower where there are fewer classes), confidences [N]. A split or
    class without test images is None. Where a number of classes makes a split, "by_counts" has the others.
    """
    num_classes, correct = len(class_counts), top[:, 0] == labels
    hits = torch.bincount(labels[correct], minlength=num_classes).double()
    totals = torch.bincount(labels, minlength=num_classes)
    per_class, tested = 100 * hits / totals.clamp(min=1), totals > 0

    def means(*split):
        groups = {name: per_class[g & tested] for name, g in split_classes(class_counts, *split).items()}
        return {name: group.mean().item() if len(group) else None for name, group in groups.items()}

    result = {"all": 100 * correct.double().mean().item()}
    result |= means(many_over, few_under, many_classes, few_classes)
    if many_classes is not None or few_classes is not None:
        result["by_counts"] = means(many_over, few_under)
    result["top5"] = 100 * (top == labels[:, None]).any(1).double().mean().item()
    result["ece"] = calibration_error(confidences, correct)
    result["class_counts"] = [int(count) for count in class_counts]
    result["per_class"] = [
        value if seen else None for value, seen in zip(per_class.tolist(), tested.tolist(), strict=True)
    ]
    return result


@torch.no_grad()
def predict(accelerator, model, loader):
    """(labels [N], best classes [N, 5], confidence of the best [N]) of every test image once, on the CPU.

    A model that makes M predictions, [B, M, K], gives [N, M, 5] and [N, M].
    """
    model.eval()
    parts = []
    for images, labels in loader:
        logits = model(images).float()
        confidences, top = logits.softmax(-1).topk(min(5, logits.shape[-1]))
        parts.append(accelerator.gather_for_metrics((labels, top, confidences[..., 0])))
    model.train()
    return [torch.cat(part).cpu() for part in zip(*parts, strict=True)]


def first_two(loader, times):
    """The first two batches. times: a list that gets the time at the begin and after each."""
    times.append(time.perf_counter())
    for batch in itertools.islice(loader, 2):
        yield batch
        times.append(time.perf_counter())


def per_split(accelerator, model, loader, class_counts, args, names=None):
    """`summarize` of the model on the prepared `loader`; class_counts [K] of the training set.

    names: of the predictions of a model that makes several; then that of args.prediction, and under
    "predictions" the accuracies of each. In a dry run of two batches, and "test_seconds" has those of the
    first one, which starts the loader, and of another, and how many there are.
    """
    times = []
    batches = first_two(loader, times) if args.dry_run else loader
    labels, top, confidences = predict(accelerator, model, batches)
    split = args.many_over, args.few_under, args.many_classes, args.few_classes
    if names is None:
        result = summarize(labels, top, confidences, class_counts, *split)
    else:
        several = zip(names, top.unbind(1), confidences.unbind(1), strict=True)
        results = {name: summarize(labels, *one, class_counts, *split) for name, *one in several}
        accuracies = {name: {k: result[k] for k in ACCURACIES} for name, result in results.items()}
        result = {**results[args.prediction], "predictions": accuracies}
    if args.dry_run:
        result["test_seconds"] = times[1] - times[0], times[-1] - times[-2], len(loader)
    return result
