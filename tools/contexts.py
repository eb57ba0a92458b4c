"""The contexts of a finished run of csa.py as a picture: `python -m tools.contexts RUN [--output FILE]`.

In a row: a training image of which head_u is sure, the mask M of its background (white), what that leaves, a
balanced image, and that image on half of the background (lambda = 0.5).
"""

import argparse

import torch
import torch.nn.functional as F
from torchvision.utils import save_image

import csa
import tools
from common import cli, datasets, models
from common.cli import Refused

SIDE = 96  # pixels of a cell, at least


def gather(network, train_set, args, rows):
    """(contexts as csa.harvest has them, balanced images), `rows` of each, on the network's device."""
    device = next(network.parameters()).device
    contexts = []
    for images, labels in datasets.train_loader(train_set, args):
        contexts.append(csa.harvest(network.network, images.to(device), labels.to(device), args.delta))
        if sum(map(len, contexts)) >= rows:
            break
    else:
        raise Refused(f"--rows {rows}: head_u is sure of fewer images; give less, or a lower --delta")
    order = datasets.class_aware(train_set, in_a_row=1)
    balanced, _ = next(iter(datasets.train_loader(train_set, args, order=order)))
    return torch.cat(contexts)[:rows], balanced[:rows].to(device)


def draw(columns, file):
    """Write a picture in which a row shows an image [C, H, W] in 0..1 of each of the columns [N, C, H, W]."""
    channels = max(column.shape[1] for column in columns)
    columns = [column.expand(-1, channels, -1, -1) for column in columns]
    cells = torch.stack(columns, dim=1).flatten(0, 1)
    cells = F.interpolate(cells, scale_factor=max(1, SIDE // cells.shape[-1]))
    try:
        save_image(cells, file, nrow=len(columns))
    except (OSError, ValueError) as error:
        message = f"--output {file}: cannot be written ({error}); name another file, such as x.png"
        raise Refused(message) from None
    cli.say(f"drew {file}")


def main(words):
    parser = tools.parser("contexts", __doc__)
    parser.add_argument("run", help="folder of a finished run of csa.py")
    parser.add_argument("--data-dir", help="where its images are now (default: where they were)")
    parser.add_argument("--delta", type=float, help="p(label) of a context (default: as in the run)")
    parser.add_argument("--rows", type=int, default=8, help="of the picture (default: 8)")
    parser.add_argument("--output", default="contexts.png", help="file to write (default: contexts.png)")
    given = parser.parse_args(words)
    result = tools.read_result(given.run)
    if result["script"] != "csa.py":
        raise Refused(f"{given.run}: is a run of {result['script']}; name one of csa.py")
    args = argparse.Namespace(**result["args"])
    args.data_dir = given.data_dir or args.data_dir
    args.delta = args.delta if given.delta is None else given.delta
    if not 1 <= given.rows <= args.batch_size:
        raise Refused(f"--rows {given.rows}: must be 1 to {args.batch_size}, the batch of the run")
    network = models.load(given.run)
    train_set, _ = datasets.load(args)
    contexts, images = gather(network, train_set.plain(), args, given.rows)
    blended = csa.blend(images, contexts, lam=0.5)
    pictures, masks = contexts[:, :-1] / 255, contexts[:, -1:]
    draw([pictures, masks, masks * pictures, images / 255, blended / 255], given.output)


if __name__ == "__main__":
    tools.run(main)
