"""What the network of a finished run, of any script, says of images.

python -m tools.predict RUN photo.jpg FOLDER     the best five classes of each image, with probabilities
python -m tools.predict RUN --data-dir photos    accuracy by split on other test data, one JSON line

Test data are the images of a list file (--test-list), of a folder with a folder for each class (or with such
ones in test/ or val/), or the run's own set (--dataset NAME, where --data-dir says). Classes go by name in
folders, by number in lists. Every image is treated as the test images of the run were.
"""

import argparse
import csv
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from accelerate import PartialState
from torchvision.datasets.folder import is_image_file
from torchvision.transforms import v2

import tools
from common import datasets, evaluation, models
from common.cli import Refused

BEST = 5  # classes of an image that are printed
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def read_batches(files, shape, batch_size):
    """Batches of uint8 images [B, C, H, W] of `shape`, read from files."""
    channels, size, _ = shape
    transform = datasets.fit(size)

    def read(file):
        image = transform(datasets.read_image(file))
        return v2.functional.rgb_to_grayscale(image) if channels == 1 else image

    with ThreadPoolExecutor() as pool:
        for start in range(0, len(files), batch_size):
            yield torch.stack(list(pool.map(read, files[start : start + batch_size])))


@torch.no_grad()
def predict(network, batches, precision="no"):
    """(best classes [N, 5], best first, their probabilities [N, 5]). precision: as in the run's test."""
    device = PartialState().device
    network.to(device)
    classes, probabilities = [], []
    dtype = PRECISIONS.get(precision)
    for images in batches:
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            logits = network(images.to(device))
        best = logits.float().softmax(1).topk(min(BEST, logits.shape[1]))
        classes.append(best.indices.cpu())
        probabilities.append(best.values.cpu())
    return torch.cat(classes), torch.cat(probabilities)


# ----------------------------------------------------------------------------------------- classes of images


def find_images(paths):
    """The images that the paths name: files, and what is inside folders, however deep."""
    files = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(file for file in path.rglob("[!.]*") if is_image_file(file.name))
            if not inside:
                raise Refused(f"{path}: there is no image in this folder; name another")
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise Refused(f"{path}: no such image or folder; name another")
    return files


def write_text(files, names, classes, probabilities):
    for file, best, shares in zip(files, classes.tolist(), probabilities.tolist(), strict=True):
        said = [f"{names[k]} {share:.3f}" for k, share in zip(best, shares, strict=True)]
        print(f"{file}: {', '.join(said)}")


def write_csv(files, names, classes, probabilities):
    writer = csv.writer(sys.stdout)
    header = ["image"]
    for place in range(1, classes.shape[1] + 1):
        header += [f"class {place}", f"probability {place}"]
    writer.writerow(header)
    for file, best, shares in zip(files, classes.tolist(), probabilities.tolist(), strict=True):
        row = [file]
        for k, share in zip(best, shares, strict=True):
            row += [names[k], f"{share:.6f}"]
        writer.writerow(row)


# -------------------------------------------------------------------------------------------------- accuracy


def test_data(args, images):
    """(labels [N], batches of images) of the test data. args: the run's, with what is given instead.

    images: of the network; they tell classes and shape.
    """
    if args.dataset == "image_folder" and not args.test_list:
        paths, labels = read_test_folder(Path(args.data_dir), images.class_names)
    elif args.test_list or args.dataset in datasets.LISTS:
        given = args.test_list or datasets.LISTS[args.dataset][1]
        file = datasets.find_list(Path(args.data_dir), "test_list", given)
        paths, labels = datasets.read_list(file, images.num_classes)
    else:
        return of_the_set(args, images)
    files = [Path(args.data_dir, path) for path in paths]
    return torch.as_tensor(labels), read_batches(files, images.shape, args.batch_size)


def of_the_set(args, images):
    """The same of a set that is kept in memory."""
    _, test_set = datasets.load(args)
    if (test_set.class_names, list(test_set.shape)) != (images.class_names, list(images.shape)):
        raise Refused(f"--dataset {args.dataset}: has other classes or images than the run")
    positions = torch.arange(len(test_set)).split(args.batch_size)
    return test_set.labels, (test_set.images[part] for part in positions)


def read_test_folder(root, class_names):
    """(paths, labels) of root/test/CLASS/, root/val/CLASS/ or root/CLASS/. Some classes may be missing."""
    folders = [folder for folder in (root / "test", root / "val", root) if folder.is_dir()]
    if not folders:
        raise Refused(f"--data-dir {root}: no such folder; name one that holds a folder for each class")
    paths, labels = [], []
    for entry in sorted(folders[0].iterdir()):
        if not entry.is_dir():
            continue
        if entry.name not in class_names:
            raise Refused(f"{entry}: the run has no class of this name; rename the folder, or move it away")
        for file in sorted(entry.iterdir()):
            if is_image_file(file.name) and file.name[0] != ".":
                paths.append(file.relative_to(root))
                labels.append(class_names.index(entry.name))
    if not paths:
        raise Refused(f"--data-dir {root}: no image in a class folder there; put some there")
    return paths, labels


def evaluate(network, result, args):
    """The number of test images, and what evaluation.summarize has of them, by the run's splits."""
    labels, batches = test_data(args, network.images)
    classes, probabilities = predict(network, batches, result["precision"])
    counts = torch.tensor(result["class_counts"])
    accuracy = evaluation.summarize(labels, classes, probabilities[:, 0], counts, args.splits)
    return {"images": len(labels), **accuracy}


def main(words):
    parser = tools.parser("predict", __doc__)
    parser.add_argument("run", help="folder of a finished run")
    parser.add_argument("images", nargs="*", help="image files, and folders of such")
    parser.add_argument("--csv", action="store_true", help="classes of images as comma-separated values")
    parser.add_argument("--data-dir", help="where the test data are (default: as in the run)")
    parser.add_argument("--test-list", help="list of `relative/path label` lines (default: as in the run)")
    parser.add_argument("--dataset", help="what --data-dir holds (default: as in the run)")
    parser.add_argument("--image-size", type=int, help="pixels (default: as in the run)")
    given = parser.parse_args(words)
    tests = bool(given.data_dir or given.test_list or given.dataset)
    if tests == bool(given.images):
        raise Refused("name either images or, with --data-dir or --test-list, test data")
    result = tools.read_result(given.run)
    network = models.load(given.run)
    if given.image_size is not None:
        if given.image_size < 8 or result["args"]["arch"] == "lenet":
            raise Refused(f"--image-size {given.image_size}: at least 8, and not for lenet; leave it out")
        network.images.shape = (network.images.shape[0], given.image_size, given.image_size)
    args = argparse.Namespace(**result["args"])
    if given.images:
        files = find_images(given.images)
        batches = read_batches(files, network.images.shape, args.batch_size)
        write = write_csv if given.csv else write_text
        write(files, network.images.class_names, *predict(network, batches, result["precision"]))
        return
    for name in ("data_dir", "test_list", "dataset", "image_size"):
        if getattr(given, name):
            setattr(args, name, getattr(given, name))
    line = {"run": given.run, "dataset": args.dataset, "data_dir": args.data_dir}
    line |= evaluate(network, result, args)
    del line["per_class"]
    print(json.dumps(line))


if __name__ == "__main__":
    tools.run(main)
