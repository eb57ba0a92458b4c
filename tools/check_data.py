"""Looks for what is wrong in image data: `python -m tools.check_data --dataset NAME --data-dir FOLDER`.

Names every image that is missing, that is both for training and for testing, or that is in two classes; with
--decode, which reads them all, also every broken one, and copies under other names. Lists are those of the
data set, or --train-list, --test-list and, of development images, --more-lists.
"""

import argparse
import hashlib
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from accelerate.utils import tqdm

import tools
from common import cli, datasets
from common.cli import Refused


def listed(args):
    """[(path, label, whether it is a test image)] of all images, and the class names."""
    root = Path(args.data_dir)
    read = datasets.read_folders if args.dataset == "image_folder" else datasets.read_lists
    try:
        names, _, train, test = read(root, args)
        parts = [(*train, False), (*test, True)]
        for given in args.more_lists:
            file = datasets.find_list(root, "more_lists", given)
            parts.append((*datasets.read_list(file, len(names)), False))
    except OSError as error:
        raise Refused(f"{error.filename}: cannot be read ({error.strerror}); mend that") from None
    images = []
    for paths, labels, is_test in parts:
        for path, label in zip(paths, labels, strict=True):
            images.append((path, int(label), is_test))
    return images, names


def look(file, decode):
    """(what is wrong with the file or None, what tells it from other images)."""
    if not file.is_file():
        return f"{file}: no such image", None
    if not decode:
        return None, os.path.realpath(file)
    try:
        datasets.read_image(file)
        return None, hashlib.sha256(file.read_bytes()).digest()
    except Refused as refused:
        return str(refused), None


def problems_of(images, names, root, decode):
    """(lines that each name a problem, their numbers: missing, broken, in both parts, in two classes)."""
    paths = list(dict.fromkeys(path for path, _, _ in images))
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda path: look(root / path, decode), paths)
        bar = tqdm(found, total=len(paths), leave=False, disable=not sys.stderr.isatty())
        looked = dict(zip(paths, bar, strict=True))

    problems = [problem for problem, _ in looked.values() if problem]
    missing = sum(": no such image" in problem for problem in problems)
    numbers = [missing, len(problems) - missing, 0, 0]
    first = {}  # of each image: the path, label and part under which it was met
    for path, label, is_test in images:
        content = looked[path][1]
        if content is None:
            continue
        other, other_label, other_is_test = first.setdefault(content, (path, label, is_test))
        copy = "" if other == path else f", where it is {other}"
        if is_test != other_is_test:
            problems.append(f"{root / path}: for testing and for training{copy}")
            numbers[2] += 1
        if label != other_label:
            problems.append(f"{root / path}: of class {names[label]} and {names[other_label]}{copy}")
            numbers[3] += 1
    return problems, numbers


def main(words):
    parser = tools.parser("check_data", __doc__)
    of_files = ("image_folder", "image_list", *datasets.LISTS)
    known = (*of_files, *datasets.TORCHVISION, "synthetic")
    parser.add_argument("--dataset", default="image_folder", choices=known, help="default: image_folder")
    parser.add_argument("--data-dir", default="data", help="folder that holds it (default: data)")
    parser.add_argument("--train-list", help="list of `relative/path label` lines")
    parser.add_argument("--test-list", help="the same for the test images")
    parser.add_argument("--more-lists", nargs="*", default=[], help="the same for development images")
    parser.add_argument("--decode", action="store_true", help="read every image, too")
    args = parser.parse_args(words, argparse.Namespace(imbalance=None))
    root = Path(args.data_dir)
    if args.dataset not in of_files:
        datasets.load(cli.Args(dataset=args.dataset, data_dir=args.data_dir))  # torchvision checks its files
        return
    if not root.is_dir():
        raise Refused(f"--data-dir {root}: no such folder; docs/data.md says what {args.dataset} needs there")
    images, names = listed(args)
    problems, (missing, broken, both, two) = problems_of(images, names, root, args.decode)
    if problems:
        counts = f"{missing} missing, {broken} broken, {both} for training and testing, {two} in two classes"
        hint = "; is it another edition of the data set?" if missing > len(images) / 2 else ""
        for problem in problems:
            cli.say(problem)
        raise Refused(f"--data-dir {root}: of {len(images)} images {counts}{hint}")
    print(f"all {len(images)} images of {len(names)} classes are there{' and can be read' * args.decode}")


if __name__ == "__main__":
    tools.run(main)
