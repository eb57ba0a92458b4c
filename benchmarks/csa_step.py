"""Cost of a step of csa.py over its passes: `python -m benchmarks.csa_step`.

An epoch of csa.py, with loading, masks, bank and blending, against as many bare steps on resident batches: a
forward pass without gradients, two forward passes, their backward pass, the optimiser. Images are random,
32x32.
"""

import tempfile

import torch
import torch.nn.functional as F
from accelerate import Accelerator, DataLoaderConfiguration

import benchmarks
import csa
from benchmarks.speed import random_images
from common import datasets
from common.runs import Run


def measure(options, folder):
    accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(split_batches=True))
    device, steps, batch_size = accelerator.device, options.steps, options.batch_size
    args = csa.Args(arch=options.arch, batch_size=batch_size, delta=0.0, epochs=1, output_dir=folder)
    run = Run(accelerator, args)
    train_set = random_images([steps * batch_size // 10] * 10, 32, steps * batch_size, device)
    loader = datasets.train_loader(train_set, args, stream=0)
    balanced_loader = datasets.train_loader(train_set, args, order=datasets.class_aware(train_set), stream=1)
    model = csa.make_model(train_set, args)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=2e-4)
    model, optimizer = accelerator.prepare(model, optimizer)
    loader, balanced_loader = accelerator.prepare(loader, balanced_loader)
    images, labels = next(iter(loader))
    others, other_labels = next(iter(balanced_loader))

    def bare_steps():
        for _ in range(steps):
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
        for epoch in run.epochs(range(1), model=model, optimizer=optimizer):
            csa.train_one_epoch(run, model, loader, balanced_loader, optimizer, epoch, args)
            run.means()

    ours, bare = benchmarks.in_turn([our_epoch, bare_steps], device, options.rounds)
    line = {"benchmark": "csa_step", "arch": options.arch, "batch_size": batch_size, "steps": steps}
    line |= benchmarks.machine(device) | {"precision": accelerator.mixed_precision}
    line["epoch_ms_per_step"] = 1e3 * ours / steps
    line["bare_ms_per_step"] = 1e3 * bare / steps
    line["epoch_over_passes"] = ours / bare
    return line


def main():
    parser = benchmarks.parser(__doc__)
    parser.add_argument("--arch", default="resnet32")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=24, help="length of the timed epoch")
    parser.add_argument("--rounds", type=int, default=3)
    with tempfile.TemporaryDirectory() as folder:
        benchmarks.show(measure(parser.parse_args(), folder))


if __name__ == "__main__":
    main()
