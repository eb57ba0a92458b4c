"""Speed of cmo.py on images in memory: `python -m benchmarks.speed [--parts step loading authors]`.

step:     an epoch of cmo.py against as many bare steps (forward, backward, optimiser on a resident batch)
loading:  images per second of our loading and augmentation, in one process without workers, against
          per-image PIL transforms in 2 worker processes, and its share of the time of a bare step
authors:  an epoch of cmo.py against the same epoch as released code runs it: two loaders with per-image PIL
          transforms in worker processes, and a synchronising .item() per step

Images are random, 32x32, in the class sizes of CIFAR-100-LT, imbalance 100. Each pair is timed in turn, and
the ratio of the medians is printed. Run it on an otherwise idle machine.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator, DataLoaderConfiguration
from PIL import Image
from torch.utils.data import DataLoader, Dataset, RandomSampler, WeightedRandomSampler
from torchvision.transforms import v2

import cmo
from common import datasets, models, runs


class PILImages(Dataset):
    """Images transformed one by one, as the released code does."""

    def __init__(self, images, labels):
        self.images, self.labels = images, labels
        statistics = datasets.CIFAR_STATISTICS
        to_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(*statistics)]
        self.transform = v2.Compose([v2.RandomCrop(32, 4), v2.RandomHorizontalFlip(), *to_tensor])

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.transform(Image.fromarray(self.images[index])), int(self.labels[index])


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(work, device):
    wait(device)
    begun = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - begun


def in_turn(first, second, device, rounds):
    """Median seconds of both, timed alternately after one unmeasured round of each."""
    pairs = [(timed(first, device), timed(second, device)) for _ in range(rounds + 1)][1:]
    return [statistics.median(times) for times in zip(*pairs, strict=True)]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--parts", nargs="+", default=["step", "loading"], choices=["step", "loading", "authors"]
    )
    parser.add_argument("--arch", default="resnet32")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument(
        "--steps", type=int, default=24, help="length of the timed epoch (84 is the whole of it)"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2, help="worker processes of a per-image loader")
    with tempfile.TemporaryDirectory() as folder:
        measure(parser.parse_args(), folder)


def measure(options, folder):
    accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(split_batches=True))
    device, size = accelerator.device, options.batch_size
    args = cmo.Args(
        arch=options.arch, batch_size=size, mix_start=-1, mix_end=0, epochs=1, lr_steps=(), output_dir=folder
    )
    counts = np.array(datasets.long_tail_counts(500, 100, 100))
    labels = np.random.RandomState(0).permutation(np.repeat(np.arange(100), counts))[: size * options.steps]
    counts = np.bincount(labels, minlength=100).clip(1)
    pixels = np.random.RandomState(1).randint(0, 256, (len(labels), 32, 32, 3), dtype=np.uint8)
    facts = counts, [str(k) for k in range(100)], (3, 32, 32), *datasets.CIFAR_STATISTICS
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    train_set = datasets.ImagesInMemory(images, labels, *facts, padding=4, flip=True, device=device)

    def pairs(epoch=0):
        wanted = [draw is not None for draw in cmo.mixing_plan(epoch, options.steps, (32, 32), args)]
        sampler = datasets.PairSampler(*cmo.streams(train_set, args), size, wanted=lambda _: wanted)
        keywords = dict(sampler=sampler, drop_last=True, **datasets.loader_options(train_set))
        return accelerator.prepare(DataLoader(datasets.Pairs(train_set), size, **keywords))

    model = models.build(options.arch, 100, 0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=2e-4)
    model, optimizer = accelerator.prepare(model, optimizer)
    loader, run = pairs(), runs.start(accelerator, args)
    run.track(range(1), model=model, optimizer=optimizer)
    (batch, batch_labels), _ = next(iter(loader))

    def bare_steps():
        model.train()
        for _ in range(options.steps):
            loss = F.cross_entropy(model(batch), batch_labels)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()

    def our_epoch():
        run.begin_epoch(0, loader)
        cmo.train_one_epoch(run, model, loader, optimizer, train_set, 0, args)

    def only_loading():
        for _ in loader:
            pass

    def slow_loaders():
        data = PILImages(pixels, labels)
        weights = cmo.class_weights(train_set.class_counts)[torch.from_numpy(labels)]
        samplers = RandomSampler(data), WeightedRandomSampler(weights, len(data))
        pin = device.type == "cuda"
        return [
            DataLoader(data, size, sampler=s, num_workers=options.workers, drop_last=True, pin_memory=pin)
            for s in samplers
        ]

    def slow_loading():
        for _ in slow_loaders()[0]:
            pass

    def authors_epoch():
        model.train()
        plan = cmo.mixing_plan(0, options.steps, (32, 32), args)
        for (x, y), (x2, y2), draw in zip(*slow_loaders(), plan, strict=True):
            x, y, x2, y2 = (t.to(device, non_blocking=True) for t in (x, y, x2, y2))
            if draw is None:
                loss = F.cross_entropy(model(x), y)
            else:
                x, lam = cmo.mix(x, x2, draw, train_set, args)
                logits = model(x)
                loss = lam * F.cross_entropy(logits, y) + (1 - lam) * F.cross_entropy(logits, y2)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            loss.item()

    line = {"benchmark": "speed", "arch": options.arch, "batch_size": size, "steps": options.steps}
    line |= {
        "device": runs.device_name(device),
        "precision": accelerator.mixed_precision,
        "torch": torch.__version__,
    }
    line |= {"threads": torch.get_num_threads(), "commit": runs.commit()}
    if "step" in options.parts:
        ours, bare = in_turn(our_epoch, bare_steps, device, options.rounds)
        line |= {
            "epoch_ms_per_step": 1e3 * ours / options.steps,
            "bare_ms_per_step": 1e3 * bare / options.steps,
        }
        line["epoch_over_bare_steps"] = ours / bare
    if "loading" in options.parts:
        loaded = sum(len(first[1]) + (len(second[1]) if second else 0) for first, second in loader)
        ours, slow = in_turn(only_loading, slow_loading, device, options.rounds)
        line["our_images_per_second"] = loaded / ours
        line["pil_images_per_second"] = size * options.steps / slow
        line["loading_over_pil"] = line["our_images_per_second"] / line["pil_images_per_second"]
        bare = timed(bare_steps, device)
        line["loading_share_of_a_step"] = ours / bare
    if "authors" in options.parts:
        ours, theirs = in_turn(our_epoch, authors_epoch, device, options.rounds)
        line |= {"epoch_seconds": ours, "authors_epoch_seconds": theirs, "authors_over_ours": theirs / ours}
    print(json.dumps(line))
    for name, value in line.items():
        shown = f"{value:,.3f}" if isinstance(value, float) else value
        print(f"{name:26} {shown}", file=sys.stderr)


if __name__ == "__main__":
    main()
