"""Long-tailed data sets, their samplers and loaders.

`load(args)` gives (train, test). Two ways through, one interface: `for images, labels in loader` yields
normalised float32 images [B, C, H, W] and labels [B] on the device. Small images live in memory on the
device, where a batch is one index operation; large ones are decoded and augmented by worker processes.

An item asked for by its index comes plain; asked for by (index, augmentation seed), as the samplers do,
it comes augmented, and that seed alone decides how.
"""

import copy
import dataclasses
import hashlib
import itertools
import json
import os
import shutil
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from accelerate import PartialState
from accelerate.utils import gather_object, send_to_device
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import v2
from tqdm import tqdm

from common import augment, cli

try:
    from torchvision.io import decode_jpeg
except ImportError:  # torchvision is to drop it one day
    decode_jpeg = None

warnings.filterwarnings("ignore", "Palette images with Transparency")  # of PIL; read_image takes them

# --------------------------------------------------------------------------------------- long-tailed subsets


def long_tail_counts(largest, num_classes, imbalance):
    """Images per class k = 0..K-1: int(largest * (1/imbalance)^(k/(K-1))), truncated, in this very form."""
    return [int(largest * (1 / imbalance) ** (k / max(num_classes - 1, 1))) for k in range(num_classes)]


def long_tail_subset(labels, counts, generator):
    """Positions of counts[k] images of each class k, drawn at random, grouped by class. labels [N].

    The draws are those of the released LDAM-DRW code, so a CIFAR subset is image for image the published one:
    legacy NumPy generator, classes ascending, each class's ascending positions shuffled, the first ones kept.
    """
    labels, kept = np.asarray(labels), []
    for k, count in enumerate(counts):
        positions = np.flatnonzero(labels == k)
        generator.shuffle(positions)
        kept.append(positions[:count])
    return np.concatenate(kept)


def by_class(labels, class_counts):
    """Positions of each class's images, ascending, a tuple of K tensors. labels [N], class_counts [K]."""
    return labels.argsort(stable=True).split(class_counts.tolist())


def cut(labels, num_classes, imbalance, largest=None, generator=None):
    """Positions of the exponential cut of `labels` [N]; `largest` is n_0, by default the largest class.

    The generator is by default NumPy's legacy one of seed 0: the subset is the same in every run.
    """
    available = np.bincount(labels, minlength=num_classes)
    counts = np.array(long_tail_counts(largest or available.max(), num_classes, imbalance))
    if (counts == 0).any():
        cli.fail(f"--imbalance {imbalance:g}: leaves a class without an image; use a lower factor")
    counts = np.minimum(counts, available)  # MNIST's class 0 has less than n_0
    return long_tail_subset(labels, counts, generator or np.random.RandomState(0))


# -------------------------------------------------------------------------------------------------- samplers


def epoch_seed(seed, epoch, stream=0):
    """A 64-bit seed that is a pure function of (seed, epoch, stream)."""
    return int(np.random.SeedSequence([seed, epoch, stream]).generate_state(1, np.uint64)[0])


def shuffled(size, epoch, generator):
    """Each of `size` images once."""
    return torch.randperm(size, generator=generator)


def draw(weights, size, generator):
    """`size` draws with replacement of 0..len(weights)-1 by `weights`; torch.multinomial stops at 2^24."""
    cumulative = torch.as_tensor(weights, dtype=torch.float64).cumsum(0)
    draws = torch.rand(size, dtype=torch.float64, generator=generator) * cumulative[-1]
    return torch.searchsorted(cumulative, draws, right=True).clamp(max=len(cumulative) - 1)


def forever(items, generator):
    """The items over and over, in a new random order each time round."""
    while True:
        for i in torch.randperm(len(items), generator=generator).tolist():
            yield items[i]


def next_images(classes, labels, class_counts, generator):
    """For each of `classes` the next image of that class's own shuffled list, as indices. labels [N]."""
    lists = [forever(of.tolist(), generator) for of in by_class(labels, class_counts)]
    return torch.tensor([next(lists[k]) for k in classes])


def class_aware(size, labels, class_counts, generator, in_a_row=4):
    """`size` indices: rounds over all classes in random order, of each the next 4 of its shuffled images."""
    rounds = forever(range(len(class_counts)), generator)
    classes = itertools.chain.from_iterable(itertools.repeat(k, in_a_row) for k in rounds)
    return next_images(itertools.islice(classes, size), labels, class_counts, generator)


class EpochSampler(Sampler):
    """One epoch of (index, augmentation seed), a pure function of (seed, epoch, stream).

    Equal on all processes, and a resumed run repeats it. Samplers of one run take different streams.
    The images are a permutation, N draws by `weights` [N], or what order(size, epoch, generator) returns,
    `size` indices, N by default. augment=False: without seeds, for images as they are.
    """

    def __init__(self, dataset, seed, stream=0, weights=None, order=shuffled, size=None, augment=True):
        self.size, self.seed, self.stream, self.epoch = size or len(dataset), seed, stream, 0
        self.augment = augment
        self.order = order if weights is None else lambda size, _, generator: draw(weights, size, generator)

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return self.size

    def __iter__(self):
        generator = torch.Generator().manual_seed(epoch_seed(self.seed, self.epoch, self.stream))
        indices = self.order(self.size, self.epoch, generator)
        seeds = torch.randint(2**62, (self.size,), generator=generator)
        return zip(indices.tolist(), seeds.tolist(), strict=True) if self.augment else iter(indices.tolist())


class PairSampler(Sampler):
    """Two samplers side by side, for `Pairs`: items (first, second), or (first, None) where none is wanted.

    `wanted(epoch)` tells for each batch of `batch_size` whether it needs the second (default: all do), so
    that nothing is loaded in vain. `second` may be None.
    """

    def __init__(self, first, second, batch_size=1, wanted=None):
        self.first, self.second, self.batch_size, self.wanted = first, second, batch_size, wanted
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch
        for sampler in (self.first, self.second):
            if sampler is not None:
                sampler.set_epoch(epoch)

    def __len__(self):
        return len(self.first)

    def __iter__(self):
        wanted = self.wanted(self.epoch) if self.wanted else [True] * len(self)
        for i, (first, second) in enumerate(zip(self.first, self.second or [None] * len(self), strict=True)):
            batch = i // self.batch_size  # an incomplete last one is dropped by the loader
            yield first, second if batch < len(wanted) and wanted[batch] else None


class Pairs(Dataset):
    """`dataset` read by a PairSampler. A batch is ((images, labels), (images, labels) or None)."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitems__(self, items):
        first, second = zip(*items, strict=True)
        if second[0] is None:
            return self.dataset.__getitems__(first), None
        return tuple(self.dataset.batches(first, second))


class OnDemand:
    """Batches whose images are chosen step by step, by a sampler that learns.

    Called with items, int64 [B, 2] of (index, augmentation seed), it gives images and labels on their device.
    Worker processes share a batch of files between them; nothing is read ahead.
    """

    def __init__(self, dataset, share=16):
        self.dataset, self.items = dataset, []
        options = dict(loader_options(dataset), persistent_workers=dataset.workers > 0)
        self.loader = DataLoader(dataset, share, sampler=self.items, **options)

    def __call__(self, items):
        if isinstance(self.dataset, ImagesInMemory):
            return self.dataset.__getitems__(items)
        self.items[:] = map(tuple, items.tolist())
        parts = [part.to(items.device) for part in self.loader]
        return tuple(torch.cat(part) for part in zip(*parts, strict=True))


# -------------------------------------------------------------------------------------- the two ways through


class LabelledImages(Dataset):
    """labels [N], class_counts [K] of the TRAINING images, class_names [K], num_classes, shape (C, H, W).

    classes [K]: the numbers of its classes among all_names, which has those that were left out, too. listed:
    SHA-256 of the paths of the files that were read for it, or for what it is a part of.
    """

    listed = None

    def __init__(self, labels, class_counts, class_names, shape, mean, std):
        self.labels = torch.as_tensor(labels, dtype=torch.int64)
        self.class_counts = torch.as_tensor(class_counts, dtype=torch.int64)
        self.class_names, self.num_classes, self.shape = class_names, len(class_names), shape
        self.all_names, self.classes = class_names, list(range(len(class_names)))
        self.mean = 255 * torch.tensor(mean).view(-1, 1, 1)  # of the stored pixels, 0 to 255
        self.std = 255 * torch.tensor(std).view(-1, 1, 1)

    def __len__(self):
        return len(self.labels)

    def sha256(self):
        """Of the names of classes and images and the labels; the pixels are not read for it."""
        facts = [self.all_names, self.classes, self.listed, self.labels.tolist()]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def subset(self, positions):
        """The images at `positions` (NumPy) as a data set of its own, class_counts included."""
        part = copy.copy(self)
        for name in self.per_image:
            setattr(part, name, getattr(self, name)[positions])
        part.class_counts = torch.bincount(part.labels, minlength=self.num_classes)
        return part

    def batches(self, *lists):
        """The batch of each list of items."""
        return [self.__getitems__(items) for items in lists]

    def pixels(self, images):
        """The uint8 images [B, C, H, W] of normalised ones."""
        return (images * self.std.to(images.device) + self.mean.to(images.device)).round().to(torch.uint8)

    def extended(self, accelerator, positions, make, batch_size, folder, once=False):
        """This data set and behind it new images, each made from the one at `positions` [M], with its label.

        make(images, labels, at): new uint8 images [B, C, H, W] of normalised ones, at [B] in 0..M-1. In
        memory each process makes all, of files a share, kept in `folder`. class_counts are of the whole.
        once: the images of one batch stand for all of them, again and again.
        """
        labels, repeated = self.labels[positions], np.arange(len(positions)) % batch_size
        positions = positions[:batch_size] if once else positions
        batches, whole = torch.arange(len(positions)).split(batch_size), copy.copy(self)
        if isinstance(self, ImageFiles):
            batches = batches[accelerator.process_index :: accelerator.num_processes]
        lists = [positions[at].tolist() for at in batches]
        loader = zip(batches, DataLoader(self, batch_sampler=lists, **loader_options(self)), strict=True)
        made = ((at, make(*send_to_device(batch, accelerator.device), at)) for at, batch in loader)
        new = self.stored(made, labels, folder)
        for name in self.per_image:
            parts = getattr(self, name), new[name][repeated] if once and "labels" not in name else new[name]
            setattr(whole, name, np.concatenate(parts) if name == "paths" else torch.cat(parts))
        whole.class_counts = torch.bincount(whole.labels, minlength=self.num_classes)
        return whole


def hold_out(dataset, per_class, seed=0):
    """(rest, held out) of a training set: `per_class` random images of each class with twice as many or more.

    The draws are those of `long_tail_subset`, the same in every run.
    """
    sizes = [per_class if count >= 2 * per_class else 0 for count in dataset.class_counts]
    held = long_tail_subset(dataset.labels, sizes, np.random.RandomState(seed))
    return dataset.subset(np.setdiff1d(np.arange(len(dataset)), held)), dataset.subset(held)


class ImagesInMemory(LabelledImages):
    """uint8 images [N, C, H, W] on `device`; augmented by a crop after zero `padding` and a flip.

    Where they are set, a rotation of up to `random_rotation` degrees, AutoAugment and one hole of `cutout`
    pixels a side follow. With probability `contrastive` a contrastive view takes the place of all that.
    """

    workers, random_rotation, auto_augment, cutout, contrastive = 0, 0, False, 0, 0.0
    per_image = "labels", "device_labels", "padded"

    def __init__(self, images, labels, *facts, padding=0, flip=False, device="cpu"):
        super().__init__(labels, *facts)
        images = images.contiguous(memory_format=torch.channels_last)
        self.padded = F.pad(images, (padding,) * 4).to(device)
        self.padding, self.flip, self.device_labels = padding, flip, self.labels.to(device)
        self.mean, self.std = self.mean.to(device), self.std.to(device)

    def stored(self, batches, labels, folder):
        """What `per_image` names of new images, in `batches` of (positions, uint8 images)."""
        padded = torch.cat([F.pad(images, (self.padding,) * 4) for _, images in batches])
        return dict(labels=labels, device_labels=labels.to(padded.device), padded=padded)

    @property
    def crops(self):
        """All crops of all images, a view: [N, 2 * padding + 1, 2 * padding + 1, C, H, W]."""
        size = self.shape[-1]
        return self.padded.unfold(2, size, 1).unfold(3, size, 1).permute(0, 2, 3, 1, 4, 5)

    def __getitems__(self, items):
        items = torch.as_tensor(items)
        drawn = items.to(self.device_labels.device, non_blocking=True)
        if drawn.ndim == 1:
            indices, images = drawn, self.crops[drawn, self.padding, self.padding]
        else:
            (indices, seeds), side = drawn.unbind(1), 2 * self.padding + 1
            images, used = self.crops[indices, seeds % side, seeds // side % side], 2 * side**2
            if self.flip:
                flipped = (seeds // side**2 % 2 == 1).view(-1, 1, 1, 1)
                images = torch.where(flipped, images.flip(-1), images)
            if self.random_rotation:
                images = augment.rotate(images, seeds, self.random_rotation)
            if self.auto_augment:
                images = augment.auto_augment(images, items[:, 1] // used)
            if self.cutout:
                images = augment.cutout(images, seeds // (used * augment.AUTO_AUGMENT_RANGE), self.cutout)
            if self.contrastive:
                plain = self.crops[indices, self.padding, self.padding]
                images = augment.contrastive(plain, images, seeds, self.contrastive)
        return images.float().sub_(self.mean).div_(self.std), self.device_labels[indices]


class ImageFiles(LabelledImages):
    """Images decoded from files; augmented by a random resized crop, a flip, maybe jitter and RandAugment.

    With probability `contrastive` a contrastive view takes the place of all that.
    """

    per_image = "labels", "paths"

    def __init__(
        self, root, paths, labels, *facts, color_jitter=0.0, rand_augment=False, contrastive=0.0, workers=2
    ):
        super().__init__(labels, *facts)
        self.root, self.workers, size = root, workers, self.shape[-1]
        self.paths = np.array([os.fsencode(path) for path in paths])  # one block: workers do not copy it
        crop, flip, jitter, more = v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), [], []
        if color_jitter:
            jitter = [v2.ColorJitter(color_jitter, color_jitter, color_jitter)]
        if rand_augment:
            more = augment.rand_augment(fill=self.mean.flatten().round().int().tolist())
        self.augment = v2.Compose([crop, flip, *jitter, *more])
        if contrastive:  # as CMO's code (PaCo's) has it for ImageNet-LT
            blur = v2.RandomApply([v2.Lambda(augment.blur)], 0.5)
            view = [crop, *(jitter or [v2.ColorJitter(0.4, 0.4, 0.4)]), v2.RandomGrayscale(0.2), blur, flip]
            self.augment = v2.RandomChoice([v2.Compose(view), self.augment], [contrastive, 1 - contrastive])
        self.centre = v2.Compose([v2.Resize(round(size / 0.875)), v2.CenterCrop(size)])

    def stored(self, batches, labels, folder):
        """The same, with the images written as JPEG files."""
        paths, problem = [os.fsencode(folder.absolute() / f"{i:07d}.jpg") for i in range(len(labels))], None
        try:
            folder.mkdir(exist_ok=True)
            for positions, images in batches:
                for i, image in zip(positions.tolist(), images.cpu(), strict=True):
                    v2.functional.to_pil_image(image).save(os.fsdecode(paths[i]), quality=95)
        except OSError as e:
            problem = e.strerror or str(e)
        problems = [one for one in gather_object([problem]) if one]  # waits for all processes
        if problems:
            cli.fail(
                f"{folder}: cannot be written ({problems[0]}); mend that, and --resume goes on from here"
            )
        return dict(labels=labels, paths=np.array(paths))

    def __getitems__(self, items):
        return self.batches(items)[0]

    def batches(self, *lists):
        """The batch of each list of items; an image that several items name is decoded once."""
        lists = [[item if isinstance(item, tuple) else (item, None) for item in items] for items in lists]
        left, decoded = Counter(index for items in lists for index, _ in items), {}

        def image(index, seed):
            if index not in decoded:
                decoded[index] = read_pixels(os.path.join(self.root, os.fsdecode(self.paths[index])))
            left[index] -= 1
            pixels = decoded[index] if left[index] else decoded.pop(index)
            if seed is None:
                return self.centre(pixels)
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)  # of the CPU alone
                return self.augment(pixels)

        def batch(items):
            try:
                images = torch.stack([image(*item) for item in items])
            except OSError as e:
                return RawBatch(error=str(e))  # told in one line by the training process
            return RawBatch(images, self.labels[[index for index, _ in items]], self.mean, self.std)

        return [batch(items) for items in lists]


class RawBatch:
    """uint8 images and labels on their way from a worker; to(device) gives normalised (images, labels)."""

    def __init__(self, images=None, labels=None, mean=None, std=None, error=None):
        self.images, self.labels, self.mean, self.std, self.error = images, labels, mean, std, error

    def pin_memory(self):
        if not self.error:
            self.images, self.labels = self.images.pin_memory(), self.labels.pin_memory()
        return self

    def to(self, device, non_blocking=False):
        if self.error:
            cli.fail(self.error, here=True)
        images = self.images.to(device, non_blocking=non_blocking, memory_format=torch.channels_last)
        mean, std = (t.to(device, non_blocking=non_blocking) for t in (self.mean, self.std))
        images = images.float().sub_(mean).div_(std)
        return images, self.labels.to(device, non_blocking=non_blocking)


def read_image(path):
    """RGB PIL image; grey, palette, transparent and CMYK files are converted. OSError names the file."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):  # convert would cut the values off at 255
                raise ValueError("more than 8 bits a channel; make it 8")
            return image.convert("RGB")
    except FileNotFoundError:
        raise OSError(f"{path}: no such image; check --data-dir and the list") from None
    except Exception as e:  # decoders fail in many ways
        raise OSError(f"{path}: not readable as an image ({e}); replace it or leave it out") from None


def read_pixels(path):
    """The same as uint8 [3, H, W]: of a JPEG by torchvision.io, which is faster and gives equal pixels.

    CMYK, another format or a broken file is left to read_image.
    """
    if decode_jpeg is not None:
        try:
            image = decode_jpeg(torch.from_numpy(np.fromfile(path, np.uint8)))
            if len(image) <= 3:
                return image.expand(3, -1, -1)
        except (OSError, RuntimeError):
            pass  # told below
    return v2.functional.pil_to_tensor(read_image(path))


def loader_options(dataset):
    """Keywords for a DataLoader of `dataset`, which hands out whole batches: there is nothing to collate."""
    pin = dataset.workers > 0 and torch.cuda.is_available()
    return dict(num_workers=dataset.workers, pin_memory=pin, collate_fn=whole_batch)


def whole_batch(batch):
    return batch


# ---------------------------------------------------------------------------------------------- the data sets

CIFAR_STATISTICS = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
IMAGENET_STATISTICS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
INAT_STATISTICS = (0.466, 0.471, 0.380), (0.195, 0.194, 0.192)
TORCHVISION = {  # class, folder of its files, images of the largest class before the cut
    "mnist_lt": (torchvision.datasets.MNIST, "MNIST/raw", 6000),
    "fashion_mnist_lt": (torchvision.datasets.FashionMNIST, "FashionMNIST/raw", 6000),
    "cmnist_lt": (torchvision.datasets.MNIST, "MNIST/raw", 6000),
    "cifar10_lt": (torchvision.datasets.CIFAR10, "cifar-10-batches-py", 5000),
    "cifar100_lt": (torchvision.datasets.CIFAR100, "cifar-100-python", 500),
}
LISTS = {  # training list, test list, classes, statistics
    "imagenet_lt": ("ImageNet_LT_train.txt", "ImageNet_LT_test.txt", 1000, IMAGENET_STATISTICS),
    "places_lt": ("Places_LT_train.txt", "Places_LT_test.txt", 365, IMAGENET_STATISTICS),
    "inat2017": ("train2017.json", "val2017.json", 5089, INAT_STATISTICS),
    "inat2018": ("train2018.json", "val2018.json", 8142, INAT_STATISTICS),
}
NAMES = ("synthetic", *TORCHVISION, *LISTS, "image_folder", "image_list")
IN_MEMORY_SIZE = 64  # images up to this side are kept in memory
MOST_CLASSES = 10**6  # more in a list are a mistake


def load(args):
    """(train, test) of args.dataset. Stops with one line where something is missing or wrong."""
    train, test = read(args)
    tell(args, train.class_counts, len(test), train.shape[-1])
    return train, test


def tell(args, class_counts, tests, size):
    counts = f"{len(class_counts)} classes of {class_counts.min()} to {class_counts.max()}"
    images = f"{class_counts.sum()} training images in {counts}, {tests} test images"
    cli.say(f"{args.dataset}: {images}, of {size} pixels a side")


def find_list(args, option, default=None):
    """The list file that `option` names, maybe in --data-dir, or the data set's own."""
    given = getattr(args, option)
    places = [Path(given), Path(args.data_dir, given)] if given else [Path(args.data_dir, default)]
    there, where = f"{cli.flag(option)} {given}", f"--data-dir {args.data_dir}"
    if args.dataset not in cli.OF_LISTS:
        cli.fail(f"{there}: is for data sets of list files, not for --dataset {args.dataset}; leave it out")
    for file in places:
        if file.is_file():
            return file
    if given:
        cli.fail(f"{there}: no such list file, nor in {where}; put it there or name another")
    cli.fail(f"{where}: holds no {default}; put it there (README: Data), or name it by {cli.flag(option)}")


def read_another(args, option, all_names, classes):
    """(paths, labels) of the list file that `option` names; labels count `classes`, with an image of each."""
    paths, labels = read_list(find_list(args, option), len(all_names))
    missing = np.setdiff1d(classes, labels)
    if len(missing):
        there = f"{cli.flag(option)} {getattr(args, option)}"
        cli.fail(f"{there}: names no image of class {missing[0]}; give a list with images of each")
    kept = np.flatnonzero(np.isin(labels, classes))
    return [paths[i] for i in kept], np.searchsorted(classes, labels[kept])


def load_list(args, option, train_set):
    """The images of the list file that `option` names, as those of `train_set`; some of each class."""
    paths, labels = read_another(args, option, train_set.all_names, train_set.classes)
    images, labels = copy.copy(train_set), torch.from_numpy(labels)
    if isinstance(train_set, ImageFiles):
        own = dict(labels=labels, paths=np.array(list(map(os.fsencode, paths))))
    else:
        own = train_set.stored(
            [(None, read_all(Path(args.data_dir), paths, train_set.shape[-1]))], labels, None
        )
    for name, value in own.items():
        setattr(images, name, value)
    images.class_counts, images.listed = torch.bincount(labels), hash_of(paths)
    return images


def hash_of(paths):
    return hashlib.sha256(b"\0".join(map(os.fsencode, paths))).hexdigest()


def read(args):
    if args.dataset not in NAMES:
        cli.fail(f"--dataset {args.dataset}: must be one of {', '.join(NAMES)}")
    if args.dataset == "synthetic":
        train, test = load_synthetic(args)
    else:
        train, test = load_torchvision(args) if args.dataset in TORCHVISION else load_files(args)
    refuse_misfits(args, len(train), train.num_classes, train.shape)
    for name in ("random_rotation", "auto_augment", "cutout", "contrastive"):
        for part in (train, test):  # nothing is augmented without a seed
            setattr(part, name, getattr(args, name))
    return train, test


def refuse_misfits(args, images, classes, shape):
    """Stop at options that do not fit so many training images and classes, or images of `shape` (C, H, W)."""
    if args.batch_size > images:
        cli.fail(
            f"--batch-size {args.batch_size}: there are only {images} training images; use a smaller one"
        )
    if (args.many_classes or 0) + (args.few_classes or 0) > classes:
        given = [
            f"{cli.flag(k)} {getattr(args, k)}" for k in ("many_classes", "few_classes") if getattr(args, k)
        ]
        cli.fail(f"{', '.join(given)}: there are only {classes} classes; lower them")
    small, large = f" of up to {IN_MEMORY_SIZE} pixels", f" of more than {IN_MEMORY_SIZE} pixels"
    ours = small if shape[-1] <= IN_MEMORY_SIZE else large
    kinds = dict(
        random_rotation=small, auto_augment=small, cutout=small, rand_augment=large, contrastive=ours
    )
    for name, kind in kinds.items():
        if getattr(args, name) and (kind != ours or shape[0] != 3):
            cli.fail(f"{cli.flag(name)}: is for RGB images{kind}; leave it out")


def in_memory(train, test, class_names, statistics, **augmentation):
    """(train, test) from (images [N, C, H, W] uint8, labels) of each, on the device of this process."""
    counts = np.bincount(train[1], minlength=len(class_names))
    facts = counts, class_names, tuple(train[0].shape[1:]), *statistics
    device = PartialState().device
    return tuple(ImagesInMemory(*part, *facts, **augmentation, device=device) for part in (train, test))


def load_torchvision(args):
    """MNIST-style sets come without augmentation and normalisation, the CIFARs with both."""
    (make, folder, largest), root = TORCHVISION[args.dataset], Path(args.data_dir)
    is_new = not root.exists()
    with PartialState().main_process_first():
        try:
            train, test = (make(root, train=part) for part in (True, False))
        except RuntimeError:  # not there
            try:
                train, test = (make(root, train=part, download=True) for part in (True, False))
            except Exception as e:  # a download fails in many ways
                if is_new:
                    shutil.rmtree(root, ignore_errors=True)
                cli.fail(f"--data-dir {root}: {folder} is not complete there and cannot be downloaded ({e})")
    labels, test_labels = (np.asarray(part.targets) for part in (train, test))
    generator = np.random.RandomState(0)
    kept = cut(labels, len(train.classes), args.imbalance or 1, largest, generator)
    labels, images, test_images = labels[kept], torch.as_tensor(train.data[kept]), torch.as_tensor(test.data)
    if args.dataset == "cmnist_lt":
        labels = noisy(labels, 0.25, generator)
        images = coloured(images, draw_colours(labels, generator, own=(5, 6, 7, 8, 9)))
        test_images = coloured(test_images, draw_colours(test_labels, np.random.RandomState(0)))
    elif images.ndim == 3:
        images, test_images = images[:, None], test_images[:, None]
    else:
        images, test_images = images.permute(0, 3, 1, 2), test_images.permute(0, 3, 1, 2)
    parts = (images, labels), (test_images, test_labels)
    if args.dataset.startswith("cifar"):
        return in_memory(*parts, train.classes, CIFAR_STATISTICS, padding=4, flip=True)
    return in_memory(*parts, train.classes, ((0.0,), (1.0,)))


# Coloured MNIST of the re-sampling study: many colours in the head classes, one in each tail class, any in
# the test set, and a quarter of the training labels wrong. Drawn in the study's order, by its generator.
COLOURS = "1f77b4 ff7f0e 2ca02c d62728 9467bd 8c564b e377c2 7f7f7f bcbd22 17becf"


def noisy(labels, ratio, generator):
    """labels [N] of which int(ratio * N), drawn at random, become another class k with probability ~ n_k."""
    order, counts = np.arange(len(labels)), np.bincount(labels).astype(float)
    generator.shuffle(order)
    labels = labels.copy()
    for i in np.sort(order[: int(ratio * len(labels))]):
        others = np.where(np.arange(len(counts)) == labels[i], 0, counts)
        labels[i] = generator.choice(len(counts), p=others / others.sum())
    return labels


def draw_colours(labels, generator, own=()):
    """A number of COLOURS for each image [N]: for the classes in `own` that of the label, else any."""
    one, any_of_them = np.eye(10), np.full(10, 0.1)
    return np.array([generator.choice(10, p=one[k] if k in own else any_of_them) for k in labels])


def coloured(images, colours):
    """Grey uint8 [N, H, W] as RGB [N, 3, H, W] in COLOURS[colours], on black, rounded down."""
    palette = torch.tensor([list(bytes.fromhex(colour)) for colour in COLOURS.split()])
    colours = palette[torch.as_tensor(colours)][:, :, None, None]
    return (images[:, None].long() * colours // 255).to(torch.uint8)


def find_files(args):
    """(folder, class names, numbers of the classes that are not left out, statistics, (train paths, labels),
    (test paths, labels)); labels count those classes. No image is opened.
    """
    root = Path(args.data_dir)
    read = read_folders if args.dataset == "image_folder" else read_lists
    try:
        if not root.is_dir():
            held = ", ".join((*LISTS.get(args.dataset, ())[:2], f"the images of {args.dataset}"))
            cli.fail(f"--data-dir {root}: no such folder; it should hold {held} (README: Data)")
        names, statistics, (paths, labels), test = read(root, args)
    except OSError as e:
        cli.fail(f"{e.filename or root}: cannot be read ({e.strerror}); mend that")
    if args.imbalance and args.dataset in LISTS:
        cli.fail(f"--imbalance {args.imbalance:g}: {args.dataset} is a fixed list; leave the option out")
    trained = np.bincount(labels, minlength=len(names)) > 0
    if not trained.any():
        cli.fail(f"--data-dir {root}: no training image; put them there")
    if not trained.all():
        empty = [name for name, some in zip(names, trained, strict=True) if not some]
        what = f"no training image of {len(empty)} of {len(names)} classes: {', '.join(empty[:3])}"
        if not args.allow_empty_classes:
            cli.fail(f"--data-dir {root}: {what}; add images, or --allow-empty-classes leaves them out")
        kept = np.flatnonzero(trained[test[1]])
        cli.say(f"note: {what}; left out, with {len(test[1]) - len(kept)} test images")
        number = trained.cumsum() - 1
        labels, test = number[labels], ([test[0][i] for i in kept], number[test[1][kept]])
    if not test[0]:
        cli.fail(f"--data-dir {root}: no test image of these classes; put them there")
    classes = np.flatnonzero(trained).tolist()
    if args.imbalance:
        kept = cut(labels, len(classes), args.imbalance)
        paths, labels = [paths[i] for i in kept], labels[kept]
    return root, names, classes, statistics, (paths, labels), test


def load_files(args):
    """Folders or lists. Images of a small --image-size, or small and square ones, go to memory."""
    root, all_names, classes, statistics, (paths, labels), (test_paths, test_labels) = find_files(args)
    both = set(paths) & set(test_paths)
    if both:
        cli.say(f"note: {len(both)} test images are training images, too, such as {min(both)}")
    size, names = args.image_size or native_size(root / paths[0]), [all_names[k] for k in classes]
    if size <= IN_MEMORY_SIZE:
        parts = (read_all(root, paths, size), labels), (read_all(root, test_paths, size), test_labels)
        sets = in_memory(*parts, names, statistics, padding=size // 8, flip=True)
    else:
        facts = np.bincount(labels), names, (3, size, size), *statistics
        augmentation = "color_jitter", "rand_augment", "contrastive"
        options = {name: getattr(args, name) for name in augmentation} | dict(workers=args.num_workers)
        parts = (paths, labels), (test_paths, test_labels)
        sets = tuple(ImageFiles(root, *part, *facts, **options) for part in parts)
    for part, of in zip(sets, (paths, test_paths), strict=True):
        part.all_names, part.classes = all_names, classes
        part.listed = hash_of(of)
    return sets


def check(args):
    """--check-data: names the first images that are missing, in both parts or, with --decode, broken.

    Fails if there are such; a dry run only where one is missing. An image in both parts is one file or, with
    --decode, also a copy of it; the training part has the images of other lists, too.
    """
    if args.dataset not in ("image_folder", *cli.OF_LISTS):
        if args.check_data:
            load(args)
        return
    root, names, classes, _, (paths, labels), (test_paths, _) = find_files(args)
    lists = {field.name for field in dataclasses.fields(args) if field.name.endswith("_list")}
    others = [name for name in lists - {"train_list", "test_list"} if getattr(args, name)]
    more = [read_another(args, name, names, classes)[0] for name in others]
    every = list(dict.fromkeys(itertools.chain(paths, test_paths, *more)))

    def look(path):  # (what is wrong, what the file is known by)
        try:
            if args.decode or not (root / path).is_file():
                read_pixels(root / path)
            content = (root / path).read_bytes() if args.decode else b""
            return None, hashlib.sha256(content).digest() if args.decode else os.path.realpath(root / path)
        except OSError as e:
            return str(e), None

    with ThreadPoolExecutor() as pool:
        looked = tqdm(pool.map(look, every), "checking", len(every), leave=False, disable=None)
        found = dict(zip(every, looked, strict=True))
    problems = [problem for problem, _ in found.values() if problem]
    trained = {found[path][1] for path in itertools.chain(paths, *more)} - {None}
    both = {path for path in test_paths if found[path][1] in trained}
    if both and args.dry_run and not problems:
        cli.say(f"note: {len(both)} test images are trained on, too, such as {min(both)}")
    elif problems or both:
        missing = sum(": no such image" in one for one in problems)
        counts = f"{missing} missing, {len(problems) - missing} broken, {len(both)} for training and test"
        hint = "; is it another edition of the data set?" if missing > len(every) / 2 else ""
        twice = [f"{path}: for training and test" for path in sorted(both)]
        cli.fail(*problems[:10], *twice[:10], f"--check-data: of {len(every)} images {counts}{hint}")
    size = args.image_size or native_size(root / paths[0])
    refuse_misfits(args, len(paths), len(classes), (3, size, size))
    if args.check_data:
        tell(args, np.bincount(labels), len(test_paths), size)
    cli.say(f"all {len(every)} images are there" + " and can be read" * args.decode)


def native_size(path):
    """The side of a small square image, else 224."""
    try:
        width, height = read_image(path).size
    except OSError as e:
        cli.fail(e)
    return width if 8 <= width == height <= IN_MEMORY_SIZE else 224


def read_all(root, paths, size):
    """uint8 tensor [N, 3, size, size]; other images are resized by the short side, then centre-cropped."""
    fit = v2.Compose([v2.Resize(size), v2.CenterCrop(size)])

    def read(path):
        image = read_pixels(root / path)
        return image if image.shape[1:] == (size, size) else fit(image)

    try:
        with ThreadPoolExecutor() as pool:
            return torch.stack(list(pool.map(read, paths)))
    except OSError as e:
        cli.fail(e)


def read_folders(root, args):
    """(class names, statistics, (train paths, labels), (test paths, labels)) of train/ and test/ or val/."""
    tests = [root / name for name in ("test", "val") if (root / name).is_dir()] or [root / "test"]
    parts = root / "train", tests[0]
    if len(tests) > 1:
        cli.say(f"note: tested on {tests[0]}; {tests[1]} is left alone")
    classes = []
    for part in parts:
        if not part.is_dir():
            cli.fail(
                f"--data-dir {root}: needs train/CLASS/ and test/CLASS/ (or val/CLASS/); there is no {part}"
            )
        entries = [entry for entry in part.iterdir() if entry.name[0] != "."]
        for entry in entries:
            if not entry.exists():
                cli.fail(f"{entry}: is a link to what is not there; mend it")
        classes.append(sorted(entry.name for entry in entries if entry.is_dir()))
        if not classes[-1]:
            cli.fail(f"{part}: holds no class folder; put the images into {part}/CLASS/")
    for here, there in ((0, 1), (1, 0)):
        lacking = sorted(set(classes[here]) - set(classes[there]))
        if lacking:
            what = f"lacks {len(lacking)} classes of {parts[here]}: {', '.join(lacking[:3])}"
            cli.fail(f"{parts[there]}: {what}; make a folder of that name, be it empty")
    listed = []
    for part in parts:
        files = [sorted(f.name for f in (part / name).iterdir() if f.name[0] != ".") for name in classes[0]]
        paths = [
            f"{part.name}/{name}/{file}" for name, of in zip(classes[0], files, strict=True) for file in of
        ]
        listed.append((paths, np.repeat(np.arange(len(files)), [len(of) for of in files])))
    return classes[0], IMAGENET_STATISTICS, *listed


def read_lists(root, args):
    """The same of two list files, or of a competition's two JSON files."""
    *defaults, classes, statistics = LISTS.get(args.dataset, (None, None, None, IMAGENET_STATISTICS))
    listed = []
    for option, default in zip(("train_list", "test_list"), defaults, strict=True):
        if not (getattr(args, option) or default):
            cli.fail(f"{cli.flag(option)}: {args.dataset} needs it, a file of `relative/path label` lines")
        file = find_list(args, option, default)
        listed.append(read_list(file, classes))
        classes = classes or int(listed[0][1].max()) + 1
        if classes > len(listed[0][0]) and not args.allow_empty_classes:
            given = f"{file}: labels up to {classes - 1}, but {len(listed[0][0])} images"
            cli.fail(f"{given}; number the classes from 0 on, or --allow-empty-classes leaves out empty ones")
    return [str(k) for k in range(classes)], statistics, *listed


def read_list(file, classes=None):
    """(paths, labels [N]) of a list file; labels are in 0..classes-1."""
    file, paths, labels, end = Path(file), [], [], classes or MOST_CLASSES
    try:
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix == ".json":
            content = json.loads(text)
            label_of = {entry["image_id"]: entry["category_id"] for entry in content["annotations"]}
            entries = [(e["id"], [e["file_name"], label_of.get(e["id"], "none")]) for e in content["images"]]
        else:
            lines = enumerate(text.split("\n"), 1)
            entries = [(number, line.rsplit(maxsplit=1)) for number, line in lines if line.strip()]
        if any(b"\0" in os.fsencode(path) for _, (path, *_) in entries):
            raise ValueError("a NUL byte")
    except OSError as e:
        cli.fail(f"{file}: cannot be read ({e.strerror}); mend that")
    except (ValueError, KeyError, TypeError) as e:
        cli.fail(f"{file}: not a list file in UTF-8 or a JSON file with images and annotations ({e})")
    for number, (path, *label) in entries:
        try:
            labels.append(int(label[0]))
            paths.append(str(Path(path.strip())))  # ./a.jpg is a.jpg
        except (IndexError, ValueError):
            what = f"label {label[0]!r} is no integer" if label else f"no label after {path!r}"
            cli.fail(f"{file}:{number}: {what}; a line is `relative/path label`")
        if not 0 <= labels[-1] < end:
            cli.fail(f"{file}:{number}: label {labels[-1]} is out of range; labels are 0 to {end - 1}")
    if not paths:
        cli.fail(f"{file}: names no image; a line is `relative/path label`")
    twice = len(paths) - len(set(paths))
    if twice:
        cli.say(f"note: {file}: {twice} lines name an image that is named before")
    return paths, np.array(labels)


# ----------------------------------------------------------------------------------------- the synthetic set

SHAPES = {  # the inside of each shape in its own coordinates: u to the right, v down, r the radius
    "disk": lambda u, v, r: r < 0.9,
    "square": lambda u, v, r: torch.maximum(u.abs(), v.abs()) < 0.8,
    "plus": lambda u, v, r: (torch.minimum(u.abs(), v.abs()) < 0.3) & (r < 1.05),
    "ring": lambda u, v, r: (r > 0.55) & (r < 1.05),
    "triangle": lambda u, v, r: (v < 0.75) & (2 * u.abs() - v < 0.9),
    "flat bar": lambda u, v, r: (u.abs() < 1.05) & (v.abs() < 0.4),
    "cross": lambda u, v, r: (torch.minimum((u + v).abs(), (u - v).abs()) < 0.42) & (r < 1.05),
    "frame": lambda u, v, r: (torch.maximum(u.abs(), v.abs()) - 0.7).abs() < 0.2,
    "tall bar": lambda u, v, r: (v.abs() < 1.05) & (u.abs() < 0.4),
    "diamond": lambda u, v, r: u.abs() + v.abs() < 1.1,
}


def draw_synthetic(labels, contexts, seed, size=24):
    """uint8 images [N, 3, size, size]: shape labels[i], in any colour and place, on background contexts[i].

    A context is a hue with stripes of its own direction. labels, contexts [N] in 0..9.
    """
    generator, n = torch.Generator().manual_seed(seed), len(labels)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, 1, 1, generator=generator)

    def hue(turns):  # [N, 1, 1] -> RGB [N, 3, 1, 1] in 0..1
        return 0.5 + 0.5 * torch.cos(2 * torch.pi * (turns[:, None] - torch.arange(3).view(3, 1, 1) / 3))

    y, x = torch.meshgrid(*[torch.linspace(-1, 1, size)] * 2, indexing="ij")
    turns = contexts.view(-1, 1, 1) / 10
    along = x * torch.cos(torch.pi * turns) + y * torch.sin(torch.pi * turns)
    stripes = torch.cos(10 * along + uniform(0, 2 * torch.pi))[:, None]
    background = (0.4 + 0.2 * stripes) * hue(turns + uniform(-0.02, 0.02)) + 0.1
    angle, radius = uniform(-0.2, 0.2), uniform(0.6, 0.85)  # radians, half images
    dx, dy = x - uniform(-0.2, 0.2), y - uniform(-0.2, 0.2)
    u = (dx * torch.cos(angle) + dy * torch.sin(angle)) / radius
    v = (dy * torch.cos(angle) - dx * torch.sin(angle)) / radius
    shapes = torch.stack([inside(u, v, (u**2 + v**2).sqrt()) for inside in SHAPES.values()])
    colour = uniform(0.7, 1.0, 1) * hue(uniform(0, 1))
    images = torch.where(shapes[labels, torch.arange(n)][:, None], colour, background)
    images = images + 0.08 * torch.randn(images.shape, generator=generator)
    return (255 * images.clamp(0, 1)).to(torch.uint8)


def load_synthetic(args):
    """A class of n training images occurs in n/10 of the 10 contexts, a tail class in one; the test in all.

    500 images of class 0 down to 500 / imbalance of class 9; 1,000 test images, 10 per class and context.
    """
    everything = np.repeat(np.arange(10), 500)
    labels = torch.from_numpy(everything[cut(everything, 10, args.imbalance or 1)])
    counts = torch.bincount(labels)
    rank = torch.cat([torch.arange(n) for n in counts])  # of an image in its class
    contexts = (labels + rank % (counts // 10).clamp(1, 10)[labels]) % 10
    cells = torch.arange(1000)
    test_labels, test_contexts = cells // 100, cells % 10
    train = draw_synthetic(labels, contexts, seed=0), labels.numpy()
    test = draw_synthetic(test_labels, test_contexts, seed=1), test_labels.numpy()
    return in_memory(train, test, list(SHAPES), ((0.5,) * 3, (0.25,) * 3), padding=2, flip=True)
