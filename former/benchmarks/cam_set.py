"""Cost of the new images of bag_of_tricks.py: `python -m benchmarks.cam_set --data-dir data`.

The new images of CIFAR-10-LT, 38,094 at imbalance 100, from the forward pass to the extended training set,
against one inference pass over these images, both with their loading. The weights are random. Both are timed
in turn, and the ratio of the medians is printed. Run it on an otherwise idle machine.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

import bag_of_tricks as bag
from benchmarks.speed import in_turn
from common import cli, datasets, models, runs


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", default="data", help="folder that holds cifar-10-batches-py/")
    parser.add_argument("--arch", default="resnet32")
    parser.add_argument("--imbalance", type=float, default=100.0)
    parser.add_argument("--rounds", type=int, default=2)
    with tempfile.TemporaryDirectory() as folder:
        measure(parser.parse_args(), Path(folder))


def measure(options, folder):
    given = dict(arch=options.arch, imbalance=options.imbalance, data_dir=options.data_dir)
    args = cli.build(bag.Args, bag.RECIPES, dataset="cifar10_lt", **given)
    accelerator = Accelerator()
    train_set, _ = datasets.load(args)
    network = models.build(args.arch, 10, 0).to(accelerator.device).eval()
    run = SimpleNamespace(accelerator=accelerator, folder=folder, save_grid=lambda *columns: None)
    whole = bag.with_new_images(run, network, train_set, args)
    new = whole.subset(torch.arange(len(train_set), len(whole)).numpy())

    @torch.no_grad()
    def inference():
        for images, _ in DataLoader(new, args.batch_size, **datasets.loader_options(new)):
            network(images)

    def building():
        bag.with_new_images(run, network, train_set, args)

    ours, bare = in_turn(building, inference, accelerator.device, options.rounds)
    line = {"benchmark": "cam_set", "arch": args.arch, "batch_size": args.batch_size, "new_images": len(new)}
    line |= {"device": runs.device_name(accelerator.device), "precision": accelerator.mixed_precision}
    line |= {"torch": torch.__version__, "threads": torch.get_num_threads(), "commit": runs.commit()}
    line |= {"building_s": ours, "inference_s": bare, "building_over_inference": ours / bare}
    print(json.dumps(line))
    for name, value in line.items():
        print(f"{name:26} {f'{value:,.3f}' if isinstance(value, float) else value}", file=sys.stderr)


if __name__ == "__main__":
    main()
