"""Long-tailed data sets, their samplers and loaders.

A loader yields (images, labels): uint8 [B, C, H, W] and int64 [B]; networks normalise. Small images are kept
in memory, on the GPU if there is one. Large ones are decoded and augmented by worker processes.
"""

import copy
import hashlib
import itertools
import json
import math
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torchvision
from accelerate import PartialState
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.datasets.folder import is_image_file
from torchvision.transforms import v2

from common import augment, cmnist, synthetic
from common.cli import Refused, flag, say

decode_jpeg = getattr(torchvision.io, "decode_jpeg", None)  # which torchvision is to drop one day


def long_tail_counts(largest, num_classes, imbalance):
    """Images of each class k = 0..K-1: int(largest * (1 / imbalance)^(k / (K - 1)))."""
    counts = [int(largest * (1 / imbalance) ** (k / max(num_classes - 1, 1))) for k in range(num_classes)]
    if min(counts) == 0:
        raise Refused(f"--imbalance {imbalance:g}: leaves a class without an image; use a lower factor")
    return counts


def draw_subset(labels, counts, generator):
    """Positions of counts[k] random images of each class k, drawn as in the LDAM-DRW code. labels [N]."""
    kept = []
    for k, count in enumerate(counts):
        positions = np.flatnonzero(labels == k)
        generator.shuffle(positions)
        kept.append(positions[:count])
    return np.concatenate(kept)


def cut(labels, num_classes, imbalance, largest=None, generator=None):
    """Positions of the long tail of `labels` [N], equal in all runs. largest: of class 0, if not all."""
    available = np.bincount(labels, minlength=num_classes)
    counts = np.array(long_tail_counts(largest or available.max(), num_classes, imbalance))
    if (counts > available).any():
        counts = np.minimum(counts, available)
        reached = f"{counts.min()} to {counts.max()} images"
        say(f"note: --imbalance {imbalance:g}: some classes have fewer, so that the cut leaves {reached}")
    return draw_subset(labels, counts, generator or np.random.RandomState(0))


def hold_out(dataset, per_class, seed=0):
    """(rest, held out): `per_class` random images of each class that has at least twice as many."""
    counts = [per_class if count >= 2 * per_class else 0 for count in dataset.class_counts]
    held = draw_subset(dataset.labels.numpy(), counts, np.random.RandomState(seed))
    rest = np.setdiff1d(np.arange(len(dataset)), held)
    return dataset.subset(rest), dataset.subset(held)


def epoch_seed(seed, epoch, stream=0):
    """A 64-bit seed that is a pure function of (seed, epoch, stream)."""
    return int(np.random.SeedSequence([seed, epoch, stream]).generate_state(1, np.uint64)[0])


class EpochSampler(Sampler):
    """order(generator, epoch) [size], a pure function of (seed, epoch, stream): equal on all processes."""

    def __init__(self, order, size, seed, stream=0):
        self.order, self.size, self.seed, self.stream, self.epoch = order, size, seed, stream, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return self.size

    def __iter__(self):
        generator = torch.Generator().manual_seed(epoch_seed(self.seed, self.epoch, self.stream))
        return iter(self.order(generator, self.epoch).tolist())


def draw(weights, size, generator):
    """`size` draws with replacement of 0..len(weights)-1, i with probability ~ weights[i]."""
    cumulative = torch.as_tensor(weights, dtype=torch.float64).cumsum(0)  # torch.multinomial stops at 2^24
    points = torch.rand(size, dtype=torch.float64, generator=generator) * cumulative[-1]
    return torch.searchsorted(cumulative, points, right=True).clamp(max=len(cumulative) - 1)


def class_aware(dataset, in_a_row=4, size=None):
    """An order of `size` images (default: N): of each class in turn the next `in_a_row`, all shuffled."""

    def forever(items, generator):
        while True:
            for i in torch.randperm(len(items), generator=generator).tolist():
                yield items[i]

    def order(generator, epoch):
        images_of = [forever(positions.tolist(), generator) for positions in dataset.by_class()]
        classes = forever(range(len(images_of)), generator)
        images = (next(images_of[k]) for k in classes for _ in range(in_a_row))
        return torch.tensor(list(itertools.islice(images, size or len(dataset))))

    return order


def train_loader(dataset, args, weights=None, order=None, size=None, stream=0):
    """Whole batches of N images: each once, or drawn by `weights` [N], or in `order`, of `size` if not N."""
    size = size or len(dataset)
    if size < args.batch_size:
        raise Refused(f"--batch-size {args.batch_size}: there are {size} training images; use a smaller one")

    def usual_order(generator, epoch):
        if weights is None:
            return torch.randperm(size, generator=generator)
        return draw(weights, size, generator)

    sampler = EpochSampler(order or usual_order, size, args.seed, stream)
    return loader(dataset, args.batch_size, sampler=sampler, drop_last=True)


def test_loader(dataset, args):
    """Every image once, in order."""
    return loader(dataset, args.batch_size)


def loader(dataset, batch_size=1, **keywords):
    """A DataLoader. Data sets hand out whole batches, so that there is nothing to collate."""
    keywords |= dict(num_workers=dataset.workers, collate_fn=tuple)
    if dataset.workers:
        keywords |= dict(pin_memory=torch.cuda.is_available(), timeout=600)
    return DataLoader(dataset, batch_size, **keywords)


class LabelledImages(Dataset):
    """labels [N], class_counts [K], class_names [K], shape (C, H, W), statistics: mean and std of pixels.

    images: uint8 [N, C, H, W] on a device, augmented as batches; or, as bytes, the paths [N] below `root`
    of files, which `workers` processes decode and augment one by one. augmentation: a function, or None.
    """

    def __init__(self, images, labels, class_names, shape, statistics, root=None, workers=0):
        self.images, self.labels = images, torch.as_tensor(labels, dtype=torch.int64)
        self.class_names, self.num_classes = class_names, len(class_names)
        self.class_counts = torch.bincount(self.labels, minlength=self.num_classes)
        self.shape, self.statistics, self.augmentation = shape, statistics, None
        self.root, self.workers = root, workers

    def __len__(self):
        return len(self.labels)

    def __getitems__(self, indices):
        if torch.is_tensor(self.images):
            images = self.images[indices]
            if self.augmentation:
                images = self.augmentation(images)
        else:
            transform = self.augmentation or fit(self.shape[-1])
            files = [self.root / os.fsdecode(self.images[i]) for i in indices]
            images = torch.stack([transform(read_image(file)) for file in files])
        return images, self.labels[indices]

    def by_class(self):
        """Positions of each class's images, a tuple of K tensors."""
        return self.labels.argsort(stable=True).split(self.class_counts.tolist())

    def of(self, images, labels):
        """Other images, stored alike, of the same classes."""
        other = copy.copy(self)
        if torch.is_tensor(images):
            images = images.contiguous(memory_format=torch.channels_last).to(self.images.device)
        other.images, other.labels = images, torch.as_tensor(labels, dtype=torch.int64)
        other.class_counts = torch.bincount(other.labels, minlength=self.num_classes)
        return other

    def subset(self, positions):
        """The images at `positions` as a data set of its own."""
        return self.of(self.images[positions], self.labels[positions])

    def plain(self):
        """The same images, not augmented."""
        plain = copy.copy(self)
        plain.augmentation = None
        return plain

    def sha256(self):
        """Of the class names, the labels, and the images in memory or the paths of files."""
        images = self.images.cpu().contiguous().numpy() if torch.is_tensor(self.images) else self.images
        digest = hashlib.sha256(json.dumps(self.class_names).encode())
        digest.update(self.labels.numpy())
        digest.update(images)
        return digest.hexdigest()


def fit(size):
    """Transform of an image to a square of `size` pixels; of a large one only the centre is shown."""
    side = size if size <= IN_MEMORY_SIZE else round(size / 0.875)
    return v2.Compose([v2.Resize(side), v2.CenterCrop(size)])


def read_image(path):
    """uint8 [3, H, W]. Grey, palette, transparent and CMYK images become RGB."""
    if decode_jpeg is not None:  # faster than Pillow, with equal pixels
        try:
            image = decode_jpeg(torch.from_numpy(np.fromfile(path, np.uint8)))
            if len(image) <= 3:
                return image.expand(3, -1, -1)
        except (OSError, RuntimeError):
            pass  # no JPEG, or told below
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError("more than 8 bits a channel; make it 8")
            return v2.functional.pil_to_tensor(image.convert("RGB"))
    except Exception as error:  # decoders fail in many ways
        raise Refused(f"{path}: not readable as an image ({error}); replace it or leave it out") from None


CIFAR_STATISTICS = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
IMAGENET_STATISTICS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
INAT_STATISTICS = (0.466, 0.471, 0.380), (0.195, 0.194, 0.192)
TORCHVISION = {  # class, images of the largest class before the cut
    "mnist_lt": (torchvision.datasets.MNIST, 6000),
    "fashion_mnist_lt": (torchvision.datasets.FashionMNIST, 6000),
    "cmnist_lt": (torchvision.datasets.MNIST, 6000),
    "cifar10_lt": (torchvision.datasets.CIFAR10, 5000),
    "cifar100_lt": (torchvision.datasets.CIFAR100, 500),
}
LISTS = {  # training list, test list, classes, statistics
    "imagenet_lt": ("ImageNet_LT_train.txt", "ImageNet_LT_test.txt", 1000, IMAGENET_STATISTICS),
    "places_lt": ("Places_LT_train.txt", "Places_LT_test.txt", 365, IMAGENET_STATISTICS),
    "inat2017": ("train2017.json", "val2017.json", 5089, INAT_STATISTICS),
    "inat2018": ("train2018.json", "val2018.json", 8142, INAT_STATISTICS),
}
SHARED = "/dev/shm"  # through which loader processes hand over batches
IN_MEMORY_SIZE = 64  # images up to this side are kept in memory


def load(args):
    """(train, test) of args.dataset. Refused where something is missing or wrong."""
    takes_lists = args.dataset == "image_list" or args.dataset in LISTS
    if (args.train_list or args.test_list) and not takes_lists:
        raise Refused(f"--train-list, --test-list: {args.dataset} has none; use --dataset image_list")
    if args.dataset == "synthetic":
        train, test = load_synthetic(args)
    elif args.dataset in TORCHVISION:
        train, test = load_torchvision(args)
    else:
        train, test = load_files(args)
    ahead = 2 * train.workers * args.batch_size * math.prod(train.shape)  # bytes that loader processes keep
    if os.path.isdir(SHARED) and ahead > shutil.disk_usage(SHARED).free:
        raise Refused(f"--num-workers {train.workers}: needs {ahead / 1e6:.0f} MB in {SHARED}; lower it")
    counts = f"{train.num_classes} classes of {train.class_counts.min()} to {train.class_counts.max()}"
    size = f"{train.shape[-1]} pixels a side"
    say(f"{args.dataset}: {len(train)} training images in {counts}, {len(test)} test images, {size}")
    return train, test


def in_memory(train, test, class_names, statistics, padding, args):
    """(train, test) from (images, labels) of each. padding: of crops, 0 for sets that are not augmented."""
    (images, labels), augmentation, in_workers = train, None, False
    if padding and args.augment != "none":
        augmentation, in_workers = augment.of_batches(args.augment, images.shape[-1], padding)
    images = images.contiguous(memory_format=torch.channels_last)
    if not in_workers:
        images = images.to(PartialState().device)
    train = LabelledImages(images, labels, class_names, tuple(images.shape[1:]), statistics)
    test = train.of(*test)
    train.augmentation, train.workers = augmentation, args.num_workers if in_workers else 0
    return train, test


def load_synthetic(args):
    train, test = synthetic.draw(long_tail_counts(500, 10, args.imbalance or 1))
    return in_memory(train, test, list(synthetic.SHAPES), ((0.5,) * 3, (0.25,) * 3), 2, args)


def load_torchvision(args):
    """Downloaded where they are not there. MNIST-style sets come without augmentation and normalisation."""
    (make, largest), root = TORCHVISION[args.dataset], Path(args.data_dir)
    with PartialState().main_process_first():
        try:
            train, test = (make(root, train=part, download=True) for part in (True, False))
        except Exception as error:  # a download fails in many ways
            reason = str(error).splitlines()[0]
            raise Refused(f"--data-dir {root}: no {args.dataset}, and no download ({reason})") from None
    generator = np.random.RandomState(0)
    labels, test_labels = np.asarray(train.targets), np.asarray(test.targets)
    kept = cut(labels, len(train.classes), args.imbalance or 1, largest, generator)
    images, labels = torch.as_tensor(train.data[kept]), labels[kept]
    test_images, statistics, padding = torch.as_tensor(test.data), ((0.0,), (1.0,)), 0
    if args.dataset == "cmnist_lt":
        images, labels, test_images = cmnist.colour(images, labels, test_images, test_labels, generator)
    elif images.ndim == 3:
        images, test_images = images[:, None], test_images[:, None]
    else:
        images, test_images = images.permute(0, 3, 1, 2), test_images.permute(0, 3, 1, 2)
        statistics, padding = CIFAR_STATISTICS, 4
    return in_memory((images, labels), (test_images, test_labels), train.classes, statistics, padding, args)


def load_files(args):
    """Folders or lists. With a small --image-size all images go to memory."""
    root = Path(args.data_dir)
    if not root.is_dir():
        raise Refused(f"--data-dir {root}: no such folder; docs/data.md says what {args.dataset} needs there")
    read = read_folders if args.dataset == "image_folder" else read_lists
    names, statistics, (paths, labels), (test_paths, test_labels) = read(root, args)
    if len(names) < 2:
        raise Refused(f"--data-dir {root}: {len(names)} classes; at least two are needed")
    both = set(paths) & set(test_paths)
    if both or (root / "train").resolve() == (root / "test").resolve():
        say(f"note: {len(both) or 'all'} test images are training images, too")
    if args.imbalance:
        kept = cut(labels, len(names), args.imbalance)
        paths, labels = [paths[i] for i in kept], labels[kept]
    missing = np.setdiff1d(np.arange(len(names)), labels)
    if len(missing):
        start = "; labels count from 0" if missing[0] == 0 and args.dataset != "image_folder" else ""
        raise Refused(f"--data-dir {root}: no training image of class {names[missing[0]]}; add some{start}")
    if not test_paths:
        raise Refused(f"--data-dir {root}: no test image; put some there")
    for path in [*paths, *test_paths]:
        if not (root / path).is_file():
            raise Refused(f"{root / path}: no such image; check --data-dir and the list")

    size = args.image_size or 224
    if size <= IN_MEMORY_SIZE:
        train = read_all(root, paths, size), labels
        test = read_all(root, test_paths, size), test_labels
        return in_memory(train, test, names, statistics, size // 8, args)
    shape = 3, size, size
    train = LabelledImages(as_bytes(paths), labels, names, shape, statistics, root, args.num_workers)
    test = train.of(as_bytes(test_paths), test_labels)
    if args.augment != "none":
        train.augmentation = augment.of_images(args.augment, size)
    return train, test


def load_list(args, name, train):
    """The images of the list file that the option `name` gives, as those of `train`; some of each class."""
    root = Path(args.data_dir)
    paths, labels = read_list(find_list(root, name, getattr(args, name)), train.num_classes)
    missing = np.setdiff1d(np.arange(train.num_classes), labels)
    if len(missing):
        raise Refused(f"{flag(name)} {getattr(args, name)}: names no image of class {missing[0]}")
    if torch.is_tensor(train.images):
        return train.of(read_all(root, paths, train.shape[-1]), labels)
    return train.of(as_bytes(paths), labels)


def as_bytes(paths):
    """One block of memory, which loader processes do not copy."""
    return np.array([os.fsencode(path) for path in paths])


def read_all(root, paths, size):
    """uint8 [N, 3, size, size]."""
    with ThreadPoolExecutor() as pool:
        return torch.stack(list(pool.map(lambda path: fit(size)(read_image(root / path)), paths)))


def read_folders(root, args):
    """(class names, statistics, (train paths, labels), (test paths, labels)) of train/ and test/ or val/."""
    parts = root / "train", root / ("test" if (root / "test").is_dir() else "val")
    classes = []
    for part in parts:
        if not part.is_dir():
            raise Refused(f"--data-dir {root}: needs train/CLASS/, and test/CLASS/ or val/CLASS/; no {part}")
        classes.append(sorted(entry.name for entry in part.iterdir() if entry.is_dir()))
    for odd in sorted(set(classes[0]) ^ set(classes[1])):
        sides = f"{parts[0].name}/ and {parts[1].name}/"
        raise Refused(f"{root}: class {odd} is in one of {sides} alone; remove it there, or add it")
    listed, others = [], []
    for part in parts:
        paths, labels = [], []
        for k, name in enumerate(classes[0]):
            for entry in sorted((part / name).iterdir()):
                if entry.is_dir():
                    raise Refused(f"{entry}: a folder inside a class folder; move its images up, or it away")
                if is_image_file(entry.name) and entry.name[0] != ".":
                    paths.append(str(entry.relative_to(root)))
                    labels.append(k)
                else:
                    others.append(entry)
        listed.append((paths, np.array(labels, dtype=np.int64)))
    if others:
        say(f"note: {len(others)} files that are no images by their names are left out, such as {others[0]}")
    return classes[0], IMAGENET_STATISTICS, *listed


def read_lists(root, args):
    """The same of two list files, or of a competition's two JSON files."""
    *defaults, classes, statistics = LISTS.get(args.dataset, (None, None, None, IMAGENET_STATISTICS))
    if args.imbalance and args.dataset in LISTS:
        raise Refused(f"--imbalance {args.imbalance:g}: {args.dataset} is a fixed list; leave it out")
    listed = []
    for name, default in zip(("train_list", "test_list"), defaults, strict=True):
        given = getattr(args, name) or default
        if given is None:
            raise Refused(f"{flag(name)}: {args.dataset} needs one, a file of `relative/path label` lines")
        listed.append(read_list(find_list(root, name, given), classes))
        classes = classes or int(listed[0][1].max()) + 1
    return [str(k) for k in range(classes)], statistics, *listed


def find_list(root, name, given):
    """The list file `given`, as it is or in --data-dir."""
    for file in (Path(given), root / given):
        if file.is_file():
            return file
    raise Refused(f"{flag(name)} {given}: no such file, nor in --data-dir {root}")


def read_list(file, classes=None):
    """(paths, labels [N]) of a list file, or of a JSON file with images and annotations."""
    place = "annotation" if file.suffix == ".json" else "line"
    try:
        text = file.read_text(encoding="utf-8-sig", errors="surrogateescape")  # names of other bytes
        if file.suffix == ".json":
            content = json.loads(text)
            file_of = {entry["id"]: entry["file_name"] for entry in content["images"]}
            lines = [f"{file_of[e['image_id']]} {e['category_id']}" for e in content["annotations"]]
        else:
            lines = text.replace("\t", " ").split("\n")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        kind = "JSON with images and annotations" if place == "annotation" else "a list in UTF-8"
        raise Refused(f"{file}: cannot be read as {kind} ({type(error).__name__}: {error})") from None
    label_at, classes = {}, classes or len(lines)
    for number, line in enumerate(lines, 1):
        path, _, label = line.strip().rpartition(" ")
        path, here = path.strip().removeprefix("./"), f"{file}, {place} {number}"
        if not line.strip():
            continue
        if not (path and label.isdecimal() and len(label) < 10):
            raise Refused(f"{here}: {path} {label}: not `relative/path label`, labels being 0, 1, ..")
        if path.startswith("/") or "\\" in path:
            raise Refused(f"{here}: {path}: write paths relative to --data-dir, with /")
        if int(label) >= classes:
            raise Refused(f"{here}: label {label} is too large; labels are 0 to {classes - 1}")
        if label_at.setdefault(path, int(label)) != int(label):
            raise Refused(f"{here}: {path} has label {label} here and {label_at[path]} before")
    if not label_at:
        raise Refused(f"{file}: names no image")
    return list(label_at), np.array(list(label_at.values()))
