"""Speed of cmo.py on images in memory: `python -m benchmarks.speed [--parts step loading authors]`.

step:     an epoch of cmo.py against as many bare steps (forward, backward, optimiser on a resident batch)
loading:  images per second of our loading and augmentation, in one process without workers, against
          per-image PIL transforms in worker processes, and its share of the time of a bare step
authors:  an epoch of cmo.py against the same epoch as released code runs it: two loaders with per-image PIL
          transforms in worker processes, and a synchronising .item() per step

Images are random, 32x32, in the class sizes of CIFAR-100-LT, imbalance 100.
"""

import tempfile

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator, DataLoaderConfiguration
from PIL import Image
from torch.utils.data import DataLoader, Dataset, RandomSampler, WeightedRandomSampler
from torchvision import transforms

import benchmarks
import cmo
from common import augment, datasets
from common.runs import Run


def random_images(class_counts, size, number, device):
    """A training set as of CIFAR: the first `number` of random images in the class sizes, shuffled."""
    classes = len(class_counts)
    labels = np.random.RandomState(0).permutation(np.repeat(np.arange(classes), class_counts))[:number]
    labels[:classes] = np.arange(classes)  # none is empty
    pixels = np.random.RandomState(1).randint(0, 256, (len(labels), 3, size, size), dtype=np.uint8)
    images = torch.from_numpy(pixels).contiguous(memory_format=torch.channels_last).to(device)
    augmentation, _ = augment.of_batches("weak", size, 4)
    names = [str(k) for k in range(classes)]
    facts = names, (3, size, size), datasets.CIFAR_STATISTICS
    data = datasets.LabelledImages(images, labels, *facts)
    data.augmentation = augmentation
    return data


class PILImages(Dataset):
    """Images transformed one by one, as released code does."""

    def __init__(self, train_set):
        self.images = train_set.images.permute(0, 2, 3, 1).cpu().numpy()
        self.labels = train_set.labels
        crop_and_flip = [transforms.RandomCrop(32, 4), transforms.RandomHorizontalFlip()]
        to_tensor = [transforms.ToTensor(), transforms.Normalize(*train_set.statistics)]
        self.transform = transforms.Compose([*crop_and_flip, *to_tensor])

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.transform(Image.fromarray(self.images[index])), int(self.labels[index])


def per_image_loaders(train_set, options):
    """As released code has them: one as it comes, one by weight."""
    data = PILImages(train_set)
    weights = cmo.image_weights(train_set)
    loaders = []
    for sampler in (RandomSampler(data), WeightedRandomSampler(weights, len(data))):
        keywords = dict(num_workers=options.workers, drop_last=True, pin_memory=torch.cuda.is_available())
        loaders.append(DataLoader(data, options.batch_size, sampler=sampler, **keywords))
    return loaders


def measure(options, folder):
    accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(split_batches=True))
    device, steps, batch_size = accelerator.device, options.steps, options.batch_size
    args = cmo.Args(
        arch=options.arch, batch_size=batch_size, epochs=1, mix_start=0, mix_end=0, output_dir=folder
    )
    run = Run(accelerator, args)
    counts = datasets.long_tail_counts(500, 100, 100)
    train_set = random_images(counts, 32, steps * batch_size, device)
    class_counts = train_set.class_counts.float().to(device)
    backgrounds = datasets.train_loader(train_set, args, stream=0)
    foregrounds = datasets.train_loader(train_set, args, cmo.image_weights(train_set), stream=1)
    model = cmo.make_model(train_set, args)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=2e-4)
    model, optimizer = accelerator.prepare(model, optimizer)
    backgrounds, foregrounds = accelerator.prepare(backgrounds, foregrounds)
    images, labels = next(iter(backgrounds))

    def step(loss):
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()

    def bare_steps():
        model.train()
        for _ in range(steps):
            step(F.cross_entropy(model(images), labels))

    def our_epoch():
        for epoch in run.epochs(range(1), model=model, optimizer=optimizer):
            cmo.train_one_epoch(run, model, backgrounds, foregrounds, optimizer, class_counts, epoch, args)
            run.means()

    def our_loading():
        for _ in backgrounds:
            pass

    def per_image_loading():
        for _ in per_image_loaders(train_set, options)[0]:
            pass

    def authors_epoch():
        model.train()
        for batch, other_batch in zip(*per_image_loaders(train_set, options), strict=True):
            images, labels = (tensor.to(device, non_blocking=True) for tensor in batch)
            others, other_labels = (tensor.to(device, non_blocking=True) for tensor in other_batch)
            share = torch.ones(())
            if run.rng.random() < args.p_mix:
                images, share = cmo.mix(images, others, run.rng, args)
            logits = model(images)
            loss = share * F.cross_entropy(logits, labels)
            loss = loss + (1 - share) * F.cross_entropy(logits, other_labels)
            step(loss)
            loss.item()

    line = {"benchmark": "speed", "arch": options.arch, "batch_size": batch_size, "steps": steps}
    line |= benchmarks.machine(device) | {"precision": accelerator.mixed_precision}
    if "step" in options.parts:
        ours, bare = benchmarks.in_turn([our_epoch, bare_steps], device, options.rounds)
        line["epoch_ms_per_step"] = 1e3 * ours / steps
        line["bare_ms_per_step"] = 1e3 * bare / steps
        line["epoch_over_bare_steps"] = ours / bare
    if "loading" in options.parts:
        works = [our_loading, per_image_loading, bare_steps]
        ours, slow, bare = benchmarks.in_turn(works, device, options.rounds)
        line["our_images_per_second"] = steps * batch_size / ours
        line["pil_images_per_second"] = steps * batch_size / slow
        line["loading_over_pil"] = slow / ours
        line["loading_share_of_a_step"] = ours / bare
    if "authors" in options.parts:
        ours, theirs = benchmarks.in_turn([our_epoch, authors_epoch], device, options.rounds)
        line["epoch_seconds"] = ours
        line["authors_epoch_seconds"] = theirs
        line["authors_over_ours"] = theirs / ours
    return line


def main():
    parser = benchmarks.parser(__doc__)
    parts = ("step", "loading", "authors")
    parser.add_argument("--parts", nargs="+", default=["step", "loading"], choices=parts)
    parser.add_argument("--arch", default="resnet32")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=24, help="of the timed epoch (84 is the whole of it)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2, help="worker processes of a per-image loader")
    with tempfile.TemporaryDirectory() as folder:
        benchmarks.show(measure(parser.parse_args(), folder))


if __name__ == "__main__":
    main()
