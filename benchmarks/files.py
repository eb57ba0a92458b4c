"""Images from files: `python -m benchmarks.files [--images 10000] [--data-dir FOLDER]`.

Without a folder, one of generated JPEG files of about 500x375 pixels is made first, in a temporary place.

decode:  images per second of one core, read and decoded by Pillow, and as the scripts do it
sample:  the same with the augmentation of training (random resized crop to 224, flip)
jitter:  the same with colour jitter of 0.4, as on ImageNet-LT
loader:  images per second of our loader with 0, 1 and 2 worker processes
memory:  of the process and two workers towards the end of each of several epochs, in MB (Linux)
"""

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
from torchvision.transforms import v2

import benchmarks
from common import augment, cli, datasets


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


def read_with_pillow(path):
    with Image.open(path) as image:
        return v2.functional.pil_to_tensor(image.convert("RGB"))


def rate(read, transform, paths):
    """Images per second, the median of three rounds after one that is not measured."""

    def all_of_them():
        for path in paths:
            transform(read(path))

    return len(paths) / benchmarks.in_turn([all_of_them], torch.device("cpu"), rounds=3)[0]


def memory():
    """MB of this process and its children, their shared pages counted in each."""
    page, me, total = os.sysconf("SC_PAGE_SIZE"), os.getpid(), 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, parent = int(stat.parent.name), int(stat.read_text().rpartition(")")[2].split()[1])
            if me in (pid, parent):
                total += int((stat.parent / "statm").read_text().split()[1]) * page
        except (OSError, ValueError):  # it has ended
            continue
    return round(total / 1e6)


def epoch_of(loader, batches):
    """(images per second, memory in MB) over the first batches of an epoch."""
    images, begun = 0, time.perf_counter()
    for number, (_, labels) in enumerate(loader, 1):
        images += len(labels)
        if number == batches:
            break
    used = memory()  # while the workers live
    return images / (time.perf_counter() - begun), used


def measure(folder, options):
    torch.set_num_threads(1)
    args = cli.Args(dataset="image_folder", data_dir=str(folder), imbalance=None, image_size=224)
    args.batch_size = 64
    train_set, _ = datasets.load(args)
    paths = [folder / os.fsdecode(path) for path in train_set.images[: options.limit]]
    line = {"benchmark": "files", "images": len(train_set), "measured": len(paths)}
    line["kb_per_file"] = sum(path.stat().st_size for path in paths) / len(paths) / 1e3
    nothing = v2.Identity()
    sample, jitter = augment.of_images("weak", 224), augment.of_images("jitter", 224)
    for name, read in (("pil", read_with_pillow), ("ours", datasets.read_image)):
        line[f"decode_{name}"] = rate(read, nothing, paths)
        line[f"sample_{name}"] = rate(read, sample, paths)
        line[f"jitter_{name}"] = rate(read, jitter, paths)
    batches = min(len(train_set) // args.batch_size, 10 * options.limit // args.batch_size + 1)
    for workers in (0, 1, 2):
        train_set.workers = workers
        loader = datasets.train_loader(train_set, args)
        epochs = [epoch_of(loader, batches) for _ in range(options.epochs if workers == 2 else 2)]
        line[f"loader_{workers}_workers"] = statistics.median(rate for rate, _ in epochs[1:])
    line["memory_mb"] = [used for _, used in epochs]
    versions = {"torchvision": torchvision.__version__, "pillow": PIL.__version__}
    return line | benchmarks.machine(torch.device("cpu")) | versions


def main():
    parser = benchmarks.parser(__doc__)
    parser.add_argument("--images", type=int, default=10_000, help="number of generated images")
    parser.add_argument("--data-dir", help="folder of train/CLASS/ and test/CLASS/ instead")
    parser.add_argument("--epochs", type=int, default=4, help="with two workers; at least 2")
    parser.add_argument("--limit", type=int, default=300, help="images that are decoded one by one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(options.data_dir or place)
        if not options.data_dir:
            generate(folder, options.images)
        benchmarks.show(measure(folder, options))


if __name__ == "__main__":
    main()
