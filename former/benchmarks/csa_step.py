"""Cost of a step of csa.py over its passes: `python -m benchmarks.csa_step`.

An epoch of csa.py, with loading, masks, bank and blending, against as many bare steps on resident batches: a
forward pass without gradients, two forward passes, their backward pass, the optimiser. Images are random,
32x32. Both are timed in turn, and the ratio of the medians is printed. Run it on an otherwise idle machine.
"""

import argparse
import json
import sys
import tempfile

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator, DataLoaderConfiguration
from torch.utils.data import DataLoader

import csa
from benchmarks.speed import in_turn
from common import datasets, runs


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", default="resnet32")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=24, help="length of the timed epoch")
    parser.add_argument("--rounds", type=int, default=3)
    with tempfile.TemporaryDirectory() as folder:
        measure(parser.parse_args(), folder)


def measure(options, folder):
    accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(split_batches=True))
    device, size = accelerator.device, options.batch_size
    args = csa.Args(arch=options.arch, batch_size=size, delta=0.0, epochs=1, output_dir=folder)
    labels = np.random.RandomState(0).randint(0, 10, size * options.steps)
    pixels = np.random.RandomState(1).randint(0, 256, (len(labels), 3, 32, 32), dtype=np.uint8)
    facts = np.bincount(labels), [str(k) for k in range(10)], (3, 32, 32), *datasets.CIFAR_STATISTICS
    images = torch.from_numpy(pixels)
    train_set = datasets.ImagesInMemory(images, labels, *facts, padding=4, flip=True, device=device)
    sampler = datasets.PairSampler(*csa.streams(train_set, args))
    keywords = dict(sampler=sampler, drop_last=True, **datasets.loader_options(train_set))
    model = csa.make_model(train_set, args)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=2e-4)
    model, optimizer = accelerator.prepare(model, optimizer)
    loader = accelerator.prepare(DataLoader(datasets.Pairs(train_set), size, **keywords))
    run = runs.start(accelerator, args)
    run.track(range(1), model=model, optimizer=optimizer)
    (images, labels), (others, other_labels) = next(iter(loader))

    def bare_steps():
        for _ in range(options.steps):
            model.eval()
            with torch.no_grad():
                model(images)
            model.train()
            z_u, z_b = model(images, others)
            loss = F.cross_entropy(z_u, labels) + F.cross_entropy(z_b, other_labels)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()

    def our_epoch():
        run.begin_epoch(0, loader)
        csa.train_one_epoch(run, model, loader, optimizer, 0, args)

    ours, bare = in_turn(our_epoch, bare_steps, device, options.rounds)
    line = {"benchmark": "csa_step", "arch": options.arch, "batch_size": size, "steps": options.steps}
    line |= {"device": runs.device_name(device), "precision": accelerator.mixed_precision}
    line |= {"torch": torch.__version__, "threads": torch.get_num_threads(), "commit": runs.commit()}
    line |= {"epoch_ms_per_step": 1e3 * ours / options.steps, "bare_ms_per_step": 1e3 * bare / options.steps}
    line["epoch_over_passes"] = ours / bare
    print(json.dumps(line))
    for name, value in line.items():
        print(f"{name:26} {f'{value:,.3f}' if isinstance(value, float) else value}", file=sys.stderr)


if __name__ == "__main__":
    main()
