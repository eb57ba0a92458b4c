"""Coloured MNIST of the re-sampling study (Shi et al., NeurIPS 2023, arXiv:2310.18236).

Head classes come in many colours, each tail class in one of its own, the test images in any; a quarter of the
training labels is wrong. All is drawn in the study's order, by its generator.
"""

import numpy as np
import torch

COLOURS = "1f77b4 ff7f0e 2ca02c d62728 9467bd 8c564b e377c2 7f7f7f bcbd22 17becf"


def noisy(labels, ratio, generator):
    """labels [N] of which int(ratio * N), drawn at random, become another class k with probability ~ n_k."""
    order = np.arange(len(labels))
    generator.shuffle(order)
    counts = np.bincount(labels).astype(float)
    labels = labels.copy()
    for i in np.sort(order[: int(ratio * len(labels))]):
        others = np.where(np.arange(len(counts)) == labels[i], 0, counts)
        labels[i] = generator.choice(len(counts), p=others / others.sum())
    return labels


def draw_colours(labels, generator, own=()):
    """A number of COLOURS for each image [N]: for the classes in `own` that of the label, else any."""
    only, any_colour = np.eye(10), np.full(10, 0.1)
    return np.array([generator.choice(10, p=only[k] if k in own else any_colour) for k in labels])


def coloured(images, colours):
    """Grey uint8 [N, H, W] as RGB [N, 3, H, W] in COLOURS[colours], on black, rounded down."""
    palette = torch.tensor([list(bytes.fromhex(colour)) for colour in COLOURS.split()])
    colours = palette[torch.as_tensor(colours)][:, :, None, None]
    return (images[:, None].long() * colours // 255).to(torch.uint8)


def colour(images, labels, test_images, test_labels, generator):
    """(images, labels, test images) from grey ones. generator: NumPy's, after the cut was drawn."""
    labels = noisy(labels, 0.25, generator)
    images = coloured(images, draw_colours(labels, generator, own=range(5, 10)))
    return images, labels, coloured(test_images, draw_colours(test_labels, np.random.RandomState(0)))
