"""Where networks look, what they learn and what they confuse, as pictures of finished runs of any script.

python -m tools.pictures cam RUN [RUN ...]        Grad-CAM of the same test images, a column for each run
python -m tools.pictures features RUN [RUN ...]   features of training and test images in two dimensions
python -m tools.pictures classes RUN [RUN ...]    accuracy of each class over its training images
"""

import argparse
import os
import textwrap
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState

import tools
from common import datasets, evaluation, models
from common.cli import Refused
from tools import predict
from tools.compare import LINES, MARKERS

WIDTH = 11  # inches of a picture: 1,210 pixels
MOST_ROWS = 40  # images of which it can be drawn where networks look
MOST_NAMED = 20  # classes in a legend, or with figures in their confusions
MOST_CONFUSED = 100  # classes whose confusions can be read
SHAPES = {"many": "o", "medium": "s", "few": "^"}  # of the points of a split's classes


def read_results(folders, same_images):
    """The results of the finished runs. Refused where their classes differ, or (same_images) test images."""
    results = [tools.read_result(folder) for folder in folders]
    for folder, result in zip(folders, results, strict=True):
        for name in ("class_names", "class_counts", "per_class", "data_sha256", "shape"):
            if name not in result:
                raise Refused(f"{folder}: its result.json has no {name}; run its script anew")
        if result["class_names"] != results[0]["class_names"]:
            raise Refused(f"{folder}: has other classes than {folders[0]}; draw it by itself")
        if same_images and test_images_of(result) != test_images_of(results[0]):
            raise Refused(f"{folder}: has other test images than {folders[0]}; draw it by itself")
    return results


def test_images_of(result):
    return result["data_sha256"][1], result["shape"]


def load_data(folder, result, data_dir):
    """(training set, not augmented, test set, options) of the finished run in `folder`."""
    args = argparse.Namespace(**result["args"])
    args.data_dir = data_dir or args.data_dir
    train_set, test_set = datasets.load(args)
    if test_set.sha256() != result["data_sha256"][1]:
        raise Refused(f"--data-dir {args.data_dir}: has other test images than the run in {folder} had")
    return train_set.plain(), test_set, args


def new_figure(width, height):
    """matplotlib's, of inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise Refused("tools.pictures: needs matplotlib; pip install matplotlib") from None
    return Figure(figsize=(width, height), layout="constrained")


def shades(number):
    """Colours [number, 4], from dark to light, which differ in grey, too."""
    from matplotlib import colormaps

    return colormaps["viridis"](np.linspace(0, 0.85, number))


def largest_first(class_counts):
    """The classes from the most frequent to the rarest."""
    return np.argsort(-np.array(class_counts), kind="stable").tolist()


def titles_of(folders, letters=22):
    """The folders without the parts that all have in common, in lines of so many letters."""
    parts = [Path(folder).parts for folder in folders]
    while min(map(len, parts)) > 1 and len({part[0] for part in parts}) == 1:
        parts = [part[1:] for part in parts]
    while min(map(len, parts)) > 1 and len({part[-1] for part in parts}) == 1:
        parts = [part[:-1] for part in parts]
    return [textwrap.fill(os.path.join(*part), letters) for part in parts]


def shorten(name, letters=18):
    return name if len(name) <= letters else name[: letters - 1] + "…"


# --------------------------------------------------------------------------------------------------- Grad-CAM


def last_maps(network, images):
    """(logits [B, K], the last feature maps, [B, D, h, w] each), with gradients.

    A map is what a module returns, of more than one pixel. It is a last one if no module makes another of it:
    most networks have one, two branches two, experts one each.
    """
    stack = [[]]  # of the modules that are at work: the last maps inside of each

    def before(module, inputs):
        stack.append([])

    def after(module, inputs, output):
        inside = stack.pop()
        if torch.is_tensor(output) and output.ndim == 4 and output[0, 0].numel() > 1:
            inside = [output]
            for maps in stack:
                maps[:] = [one for one in maps if all(one is not given for given in inputs)]
        stack[-1] += inside

    hooks = []
    for module in network.modules():
        hooks += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    logits = network(images)
    for hook in hooks:
        hook.remove()
    return logits, stack[0]


def grad_cam(network, images, classes=None):
    """(Grad-CAM [B, 1, H, W] of `classes` [B], by default the predicted ones; logits [B, K]). images: pixels.

    ReLU(sum over channels of the mean gradient of the class's logit * map), each image's scaled to 0..1 and
    enlarged. Several last maps are as one that has the channels of all.
    """
    logits, maps = last_maps(network, images)
    if not maps:
        raise Refused("cam: the network has no feature map of more than a pixel; nothing is to be drawn")
    classes = logits.argmax(1) if classes is None else classes
    score = logits.gather(1, classes[:, None]).sum()  # in eval mode images do not see each other
    gradients = torch.autograd.grad(score, maps, materialize_grads=True)
    cam = 0
    for one, gradient in zip(maps, gradients, strict=True):
        part = (gradient.mean((2, 3), keepdim=True) * one).sum(1, keepdim=True)
        cam = cam + F.interpolate(part, maps[-1].shape[2:], mode="bilinear")  # if their sizes differ
    cam = F.relu(cam).detach()
    cam = cam - cam.amin((2, 3), keepdim=True)
    cam = cam / cam.amax((2, 3), keepdim=True).clamp(min=1e-12)
    cam = F.interpolate(cam, images.shape[2:], mode="bicubic", align_corners=False).clamp(0, 1)
    return cam, logits.detach()


def find_class(word, class_names):
    """The class that a word of --classes names, or has the number of."""
    if word in class_names:
        return class_names.index(word)
    if word.isdecimal() and int(word) < len(class_names):
        return int(word)
    raise Refused(f"--classes {word}: no such class; there are {shorten(', '.join(class_names), 60)}")


def choose(test_set, class_counts, given):
    """Positions of test images: of --classes, or half of frequent classes and half of rare ones."""
    names = test_set.class_names
    if given.classes:
        classes = [find_class(word, names) for word in given.classes]
    else:
        known = [k for k in largest_first(class_counts) if test_set.class_counts[k] > 0]
        head = (given.images + 1) // 2
        ranks = [*range(head), *range(len(known) - given.images + head, len(known))]
        classes = [known[rank % len(known)] for rank in ranks]
    if not 1 <= len(classes) <= MOST_ROWS:
        raise Refused(f"{len(classes)} rows: give --images, or --classes, for 1 to {MOST_ROWS}")
    images_of = test_set.by_class()
    generator = np.random.RandomState(given.seed % 2**32)
    images_of = [generator.permutation(positions).tolist() for positions in images_of]
    for k in classes:
        if classes.count(k) > len(images_of[k]):
            raise Refused(f"class {names[k]}: has {len(images_of[k])} test images; ask for fewer")
    return [images_of[k].pop() for k in classes]


def draw_cam(given):
    results = read_results(given.runs, same_images=True)
    names, counts = results[0]["class_names"], results[0]["class_counts"]
    _, test_set, _ = load_data(given.runs[0], results[0], given.data_dir)
    images, labels = test_set.__getitems__(choose(test_set, counts, given))
    images, labels = images.to(PartialState().device), labels.to(PartialState().device)
    columns = len(given.runs) + 1
    cell = min(max((WIDTH - 2) / columns, 1.2), 2)  # inches
    figure = new_figure(columns * cell + 2, len(labels) * (cell + 0.35) + 1)
    panels = figure.subplots(len(labels), columns, squeeze=False)
    networks = [models.load(folder).to(images.device) for folder in given.runs]
    for row, image, label in zip(panels, images, labels, strict=True):
        picture = image.permute(1, 2, 0).cpu().numpy()
        row[0].imshow(picture, cmap="gray", vmin=0, vmax=255)
        name = f"{textwrap.fill(names[label], 14)}\n{counts[label]} training\nimages"
        row[0].set_ylabel(name, rotation=0, ha="right", va="center")
        for axes, network in zip(row[1:], networks, strict=True):
            cam, logits = grad_cam(network, image[None], label[None] if given.true_class else None)
            cam = cam[0, 0].cpu().numpy()
            p, k = logits[0].softmax(0).max(0)
            axes.imshow(picture.mean(2), cmap="gray", vmin=0, vmax=255)
            heat = axes.imshow(cam, cmap="inferno", vmin=0, vmax=1, alpha=0.5)
            if cam.max() > 0.5:
                axes.contour(cam, [0.5], colors="white", linewidths=1)
            mark, colour = ("✓", "darkgreen") if k == label else ("✗", "darkred")
            axes.set_xlabel(f"{mark} {shorten(names[k], int(12 * cell - 7))} {p:.2f}", color=colour)
    for axes, title in zip(panels[0, 1:], titles_of(given.runs, int(11 * cell)), strict=True):
        axes.set_title(title, fontsize="medium")
    for axes in panels.flat:
        axes.set(xticks=[], yticks=[])
    whose = "true" if given.true_class else "predicted"
    label = f"Grad-CAM of the {whose} class; white line: half of its maximum"
    figure.colorbar(heat, ax=panels, location="bottom", label=label, fraction=0.03, pad=0.01, aspect=60)
    return figure


# --------------------------------------------------------------------------------------------------- features


@torch.no_grad()
def features_of(network, loader):
    """What goes into the classifier, [N, D] as NumPy; of several experts one beside the other."""
    parts, found = [], []

    def keep(module, inputs):
        found.append(inputs[0].cpu())

    hooks = []
    for name, module in network.named_modules():
        if name.split(".")[-1] == "classifier":
            hooks.append(module.register_forward_pre_hook(keep))
    if not hooks:
        raise Refused("features: the network has no module called classifier, whose input they are")
    device = next(network.parameters()).device
    for images, _ in loader:
        found.clear()
        network(images.to(device))
        parts.append(torch.cat(found, dim=1))
    for hook in hooks:
        hook.remove()
    return torch.cat(parts).numpy()


def some_of_each_class(dataset, most):
    """At most `most` images; of each class as many, if it has them."""
    counts = dataset.class_counts.clamp(max=max(most // dataset.num_classes, 1))
    return dataset.subset(datasets.draw_subset(dataset.labels.numpy(), counts, np.random.RandomState(0)))


def in_two_dimensions(features, tsne):
    """(points [N, 2], what their coordinates are): two features as they are, of more the main components."""
    if features.shape[1] == 2:
        return features, ("feature 1", "feature 2")
    if tsne:
        try:
            from sklearn.manifold import TSNE
        except ImportError:
            raise Refused("--tsne: needs scikit-learn; pip install scikit-learn, or leave it out") from None
        points = TSNE(perplexity=min(30, len(features) / 4), random_state=0).fit_transform(features)
        return points, ("t-SNE 1", "t-SNE 2")
    centred = features - features.mean(0)
    _, values, directions = np.linalg.svd(centred, full_matrices=False)
    shares = 100 * values**2 / (values**2).sum()
    labels = [f"component {i + 1} ({shares[i]:.0f} % of the variance)" for i in (0, 1)]
    return centred @ directions[:2].T, labels


def draw_features(given):
    results = read_results(given.runs, same_images=False)
    names, counts = results[0]["class_names"], results[0]["class_counts"]
    many_over, few_under = given.splits or results[0]["args"]["splits"]
    if few_under > many_over + 1:
        raise Refused(f"--splits {many_over} {few_under}: the first is the larger one, as in 100 20")
    splits = evaluation.split_classes(torch.tensor(counts), many_over, few_under)
    panel = min(max((WIDTH - 2.5) / len(given.runs), 2.8), 4.5)
    figure = new_figure(panel * len(given.runs) + 2.5, 2 * panel + 0.5)
    panels = figure.subplots(2, len(given.runs), squeeze=False, sharex="col", sharey="col")
    colours = np.empty((len(counts), 4))
    colours[largest_first(counts)] = shades(len(counts))
    titles = titles_of(given.runs)
    for i, folder in enumerate(given.runs):
        *sets, args = load_data(folder, results[i], given.data_dir)
        sets = [some_of_each_class(dataset, given.points) for dataset in sets]
        network = models.load(folder).to(PartialState().device)
        features = [features_of(network, datasets.test_loader(dataset, args)) for dataset in sets]
        points, (across, up) = in_two_dimensions(np.concatenate(features), given.tsne)
        parts = np.split(points, [len(features[0])])
        for axes, dataset, part in zip(panels[:, i], sets, parts, strict=True):
            for split, members in splits.items():
                shown = members[dataset.labels].numpy()
                look = dict(marker=SHAPES[split], s=16, edgecolors="white", linewidths=0.3)
                axes.scatter(*part[shown].T, c=colours[dataset.labels[shown]], **look)
            axes.set_ylabel(up)
        panels[0, i].set_title(f"{titles[i]}\n{len(parts[0])} training images")
        panels[1, i].set(title=f"{len(parts[1])} test images", xlabel=across)
    for split, members in splits.items():
        classes = [k for k in largest_first(counts) if members[k]]
        if len(names) > MOST_NAMED and classes:
            label = f"{split}-shot: {len(classes)} classes"
            axes.scatter([], [], color=colours[classes[len(classes) // 2]], marker=SHAPES[split], label=label)
        for k in classes if len(names) <= MOST_NAMED else []:
            label = f"{shorten(names[k])} ({counts[k]})"
            axes.scatter([], [], color=colours[k], marker=SHAPES[split], label=label)
    title = "class (training images)\ncircle: many-shot\nsquare: medium-shot\ntriangle: few-shot"
    figure.legend(*axes.get_legend_handles_labels(), title=title, loc="outside right center")
    return figure


# ---------------------------------------------------------------------------------------------------- classes


def draw_classes(given):
    results = read_results(given.runs, same_images=False)
    if len(results) > len(MARKERS):
        raise Refused(f"classes: {len(results)} runs are too many to tell apart; name {len(MARKERS)}")
    figure = new_figure(WIDTH, 6)
    axes = figure.subplots()
    for i, (title, result) in enumerate(zip(titles_of(given.runs), results, strict=True)):
        counts = np.array(result["class_counts"])
        accuracies = np.array(result["per_class"], dtype=float)  # NaN without test images
        known = [k for k in largest_first(counts) if not np.isnan(accuracies[k])]
        tenths = np.array_split(known, min(len(known), 10))
        centres = [np.exp(np.log(counts[tenth]).mean()) for tenth in tenths]
        means = [accuracies[tenth].mean() for tenth in tenths]
        colour, line, marker = shades(len(results))[i], LINES[i % 4], MARKERS[i]
        axes.plot(centres, means, line, color=colour)
        axes.plot(counts, accuracies, marker, color=colour, markersize=5)
        axes.plot([], [], marker + line, color=colour, markersize=5, label=title.replace("\n", " "))
    axes.set(xscale="log", xlabel="training images of the class", ylabel="test accuracy of the class (%)")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.3)
    if all(result["class_counts"] == results[0]["class_counts"] for result in results):
        name_classes(axes, results[0]["class_counts"], results[0]["class_names"])
    figure.legend(loc="outside lower center", ncols=4)
    return figure


def name_classes(axes, counts, names):
    """Names above the places of the classes, of those for which there is room."""
    room = (max(counts) / min(counts)) ** (1 / 40)
    places, labels = [], []
    for k in largest_first(counts):
        if not places or places[-1] >= room * counts[k]:
            places.append(counts[k])
            labels.append(shorten(names[k]))
    above = axes.secondary_xaxis("top")
    above.set_xticks(places, labels, rotation=90, fontsize="small")
    above.set_xticks([], minor=True)


def confusion_of(folder, result, test_set, args):
    """The share in percent of the test images of class i that the run takes for class j, [K, K]."""
    batches = (images for images, _ in datasets.test_loader(test_set, args))
    best, _ = predict.predict(models.load(folder), batches, result["precision"])
    size = test_set.num_classes
    pairs = (size * test_set.labels + best[:, 0]).bincount(minlength=size**2).view(size, size)
    return 100 * pairs / pairs.sum(1, keepdim=True).clamp(min=1)


def draw_confusion(given):
    results = read_results(given.runs, same_images=True)
    size, by_size = len(results[0]["class_names"]), largest_first(results[0]["class_counts"])
    names = [shorten(results[0]["class_names"][k]) for k in by_size]
    if size > MOST_CONFUSED:
        raise Refused(f"--confusion: of {size} classes nothing could be read; at most {MOST_CONFUSED}")
    _, test_set, args = load_data(given.runs[0], results[0], given.data_dir)
    columns = min(len(results), 3) if size <= MOST_NAMED else 1
    rows = -(-len(results) // columns)
    panel = min((WIDTH - 2) / columns, 6 if size <= MOST_NAMED else WIDTH)
    points = min(10, 60 * panel / size)
    figure = new_figure(columns * panel + 2, rows * (panel + 1))
    panels = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat)
    titles = titles_of(given.runs)
    for n, folder in enumerate(given.runs):
        axes = panels[n]
        shares = confusion_of(folder, results[n], test_set, args)[by_size][:, by_size].numpy()
        roots = np.sqrt(shares)  # so that rare confusions are seen
        picture = axes.imshow(roots, cmap="Greys", vmin=0, vmax=10, aspect="auto")
        axes.set_title(titles[n])
        axes.set_xticks(range(size), names, rotation=90, fontsize=points)
        axes.set_yticks(range(size), names, fontsize=points)
        for i, j in np.argwhere(shares.round()) if size <= MOST_NAMED else []:
            look = dict(ha="center", va="center", fontsize=points)
            look["color"] = "white" if shares[i, j] > 25 else "black"
            axes.text(j, i, f"{shares[i, j]:.0f}", **look)
        axes.set(xlabel="predicted class", ylabel="class")
        axes.label_outer()
    for axes in panels[len(results) :]:
        axes.axis("off")
    bar = figure.colorbar(picture, ax=panels, fraction=0.03, aspect=40, shrink=0.8)
    bar.set_ticks([0, 1, 2, 5, 10], labels=[0, 1, 4, 25, 100])
    bar.set_label("share of the test images of the class (%)")
    return figure


def parse(words):
    parser = tools.parser("pictures", __doc__)
    pictures = parser.add_subparsers(dest="picture", required=True)
    cam = pictures.add_parser("cam", help="Grad-CAM of the same test images, a column for each run")
    features = pictures.add_parser("features", help="features in two dimensions, a column for each run")
    classes = pictures.add_parser("classes", help="accuracy of each class over its training images")
    for name, part in pictures.choices.items():
        part.add_argument("runs", nargs="+", metavar="RUN", help="folder of a finished run")
        part.add_argument("--output", default=f"{name}.png", help="file to write (default: %(default)s)")
        part.add_argument("--data-dir", help="where the images are now, if not where they were")
    rows = cam.add_mutually_exclusive_group()
    rows.add_argument("--images", type=int, default=6, help="rows, half of rare classes (default: 6)")
    rows.add_argument("--classes", nargs="+", metavar="CLASS", help="names or numbers, a row for each")
    cam.add_argument("--true-class", action="store_true", help="Grad-CAM of that, not of the predicted class")
    cam.add_argument("--seed", type=int, default=0, help="other images of the classes (default: 0)")
    features.add_argument("--points", type=int, default=2000, help="images in a panel (default: 2000)")
    features.add_argument("--splits", type=int, nargs=2, help="as of a script (default: of the first run)")
    features.add_argument("--tsne", action="store_true", help="t-SNE instead of principal components")
    classes.add_argument("--confusion", action="store_true", help="which class is taken for which, instead")
    return parser.parse_args(words)


def draw(given):
    """The figure that the command line asks for."""
    if given.picture == "cam":
        return draw_cam(given)
    if given.picture == "features":
        return draw_features(given)
    return draw_confusion(given) if given.confusion else draw_classes(given)


def main(words):
    given = parse(words)
    tools.save_picture(draw(given), given.output)


if __name__ == "__main__":
    tools.run(main)
