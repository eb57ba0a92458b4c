"""Images from files: `python -m benchmarks.files [--images 10000] [--data-dir FOLDER]`.

Without a folder, one of generated JPEG files of about 500x375 pixels is made first, in a temporary place.

decode:  images per second of one core, read and decoded by PIL as an image, by PIL as a tensor, and as the
         scripts do it, by torchvision.io where that serves
sample:  the same with the augmentation of training (random resized crop to 224, flip)
jitter:  the same with colour jitter of 0.4, as on ImageNet-LT
loader:  images per second of our loader with 0, 1 and 2 worker processes
streams: images per second of one core in pairs, the second one drawn class by class, of a long-tailed cut
         by 100; with an image of both streams decoded once, or each for itself
memory:  of the process and its workers after each of several epochs, in MB

Run it on an otherwise idle machine.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import PIL
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from common import cli, datasets, runs


def generate(folder, count, classes=10):
    """JPEG files of about 500x375: smooth noise of a few scales, which gives the usual 30 to 60 kB a file."""
    generator = np.random.RandomState(0)
    for part, images in (("train", count), ("test", classes)):
        for i in range(images):
            width, height = 500 + generator.randint(-50, 51), 375 + generator.randint(-40, 41)
            pixels = np.zeros((height, width, 3), np.float32)
            for scale, strength in ((8, 90), (32, 45), (128, 25)):
                noise = generator.randint(0, 256, (scale, scale, 3), dtype=np.uint8)
                fine = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
                pixels += strength / 128 * (np.asarray(fine, np.float32) - 128)
            path = folder / part / str(i % classes) / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((pixels + 128).clip(0, 255).astype(np.uint8)).save(path, quality=90)


def as_tensor(path):
    return v2.functional.pil_to_tensor(datasets.read_image(path))


def rate(work, paths, rounds=3):
    """Images per second, the median of several rounds after one that is not measured."""
    times = []
    for _ in range(rounds + 1):
        begun = time.perf_counter()
        for path in paths:
            work(path)
        times.append(time.perf_counter() - begun)
    return len(paths) / statistics.median(times[1:])


def memory():
    """MB of this process and its children, their shared pages counted in each."""
    page, total = os.sysconf("SC_PAGE_SIZE"), 0
    me = os.getpid()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, parent = int(stat.parent.name), int(stat.read_text().rpartition(")")[2].split()[1])
            if me in (pid, parent):
                total += int((stat.parent / "statm").read_text().split()[1]) * page
        except (OSError, ValueError):  # it has ended
            continue
    return total / 1e6


def streams(data, batches, batch_size=128):
    """Images per second in pairs: each decoded for itself, and an image of both streams once."""
    imbalance = min(100, data.class_counts.max().item())
    data = data.subset(datasets.cut(data.labels, data.num_classes, imbalance))
    sampler = datasets.PairSampler(
        datasets.EpochSampler(data, 0),
        datasets.EpochSampler(data, 0, 1, weights=(1 / data.class_counts)[data.labels]),
    )
    items = list(sampler)[: batches * batch_size]
    batches = [items[i : i + batch_size] for i in range(0, len(items), batch_size)]
    pairs = datasets.Pairs(data)

    def apart(batch):
        return [data.__getitems__(of) for of in zip(*batch, strict=True)]

    images = 2 * len(items) / len(batches)
    rates = [images * rate(way, batches) for way in (apart, pairs.__getitems__)]
    return dict(zip(("streams_apart", "streams"), rates, strict=True))


def measure(folder, epochs, limit):
    torch.set_num_threads(1)
    args = cli.Args(
        dataset="image_folder", data_dir=str(folder), imbalance=None, image_size=224, batch_size=64
    )
    train_set, _ = datasets.load(args)
    paths = [folder / os.fsdecode(path) for path in train_set.paths[:limit]]
    crop = v2.Compose([v2.RandomResizedCrop(224), v2.RandomHorizontalFlip()])
    jitter = v2.Compose([crop, v2.ColorJitter(0.4, 0.4, 0.4)])
    line = {"benchmark": "files", "images": len(train_set), "measured": len(paths)}
    line["kb_per_file"] = sum(path.stat().st_size for path in paths) / len(paths) / 1e3
    ways = ("pil", datasets.read_image), ("pil_tensor", as_tensor), ("ours", datasets.read_pixels)
    for name, decode in ways:
        line[f"decode_{name}"] = rate(decode, paths)
        line[f"sample_{name}"] = rate(lambda path, decode=decode: crop(decode(path)), paths)
        line[f"jitter_{name}"] = rate(lambda path, decode=decode: jitter(decode(path)), paths)
    line |= streams(train_set, max(limit // 128, 1))
    sampler, most = datasets.EpochSampler(train_set, 0), min(len(train_set) // 64 * 64, 10 * limit)
    for workers in (0, 1, 2):
        train_set.workers, seen = workers, []
        loader = DataLoader(train_set, 64, sampler=sampler, **datasets.loader_options(train_set))
        for epoch in range(2 if workers < 2 else epochs):
            sampler.set_epoch(epoch)
            begun, count = time.perf_counter(), 0
            for batch in loader:
                count += len(batch.labels)
                if count >= most:
                    used = memory()  # while the workers live
                    break
            seen.append(count / (time.perf_counter() - begun))
            if workers == 2:
                line.setdefault("memory_mb", []).append(round(used))
        line[f"loader_{workers}_workers"] = statistics.median(seen[1:] or seen)
    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__, "pillow": PIL.__version__}
    return line | {"device": runs.device_name(torch.device("cpu")), "threads": 1, **versions}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=10_000, help="number of generated images")
    parser.add_argument(
        "--data-dir", help="folder of train/CLASS/ and test/CLASS/ instead of generated images"
    )
    parser.add_argument("--epochs", type=int, default=4, help="epochs over which the memory is looked at")
    parser.add_argument("--limit", type=int, default=300, help="images that are decoded one by one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(options.data_dir or place)
        if not options.data_dir:
            generate(folder, options.images)
        print(json.dumps(measure(folder, options.epochs, options.limit) | {"commit": runs.commit()}))


if __name__ == "__main__":
    main()
