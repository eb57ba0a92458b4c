"""CSA: Context-Shift Augmentation.

Paper:    J.-X. Shi, T. Wei, Y. Xiang, Y.-F. Li, "How Re-sampling Helps for Long-Tail Learning?",
          NeurIPS 2023, arXiv:2310.18236.
Method:   1. one network, two heads: head_u learns from natural batches, head_b from balanced ones    TwoHeads
          2. images of which head_u is sure, p(label) >= delta, go into a bank, with a mask M of what is
             background in them                                                      background_masks, harvest
          3. every balanced image gets the background of one of them and keeps its label:
             lam * M * context + (1 - lam * M) * image, lam ~ U(0, 1)                                    blend
          4. loss = CE(head_u, natural batch) + CE(head_b, balanced batch)             Alg. 1, train_one_epoch
Differs:  as in the released code, the bank is emptied every epoch, head_b learns from epoch 10 on, and M is
          (1 - Grad-CAM)^2. docs/csa.md has the rest, and a command for every row of the paper's tables.
Expected: ResNet-32, imbalance 100: cifar100_lt 45.8 (46.6 with mixup), cifar10_lt 80.6 (82.5) (paper).
Run:      accelerate launch csa.py --dataset cifar100_lt
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator, DataLoaderConfiguration, DistributedDataParallelKwargs
from torch import nn
from torch.optim import SGD

from common import cli, datasets, evaluation, models, recipes
from common.runs import Run

# Settings of the released code, and ours where it has none. splits: the paper's groups at imbalance 100.
# fmt: off
CIFAR = dict(arch="resnet32", epochs=200, lr=0.2, lr_steps=(160, 180), warmup=5, wd=2e-4, start=10)
LARGE = dict(arch="resnet10", imbalance=None, epochs=90, batch_size=256, lr=0.2, cosine=True, wd=5e-4,
             augment="jitter", start=10)
MNIST = dict(recipes.MNIST, arch="resnet8", splits=(1500, 200), start=1)
RECIPES = {
    "synthetic": dict(recipes.SYNTHETIC, start=4),
    "cifar10_lt": dict(CIFAR, splits=(1500, 200)),
    "cifar100_lt": dict(CIFAR, splits=(95, 19)),
    "imagenet_lt": dict(LARGE, splits=(99, 21)),
    "inat2018": dict(recipes.INAT, start=10),
    "mnist_lt": MNIST,
    "fashion_mnist_lt": MNIST,
    "cmnist_lt": MNIST,
    "image_folder": dict(recipes.FILES, start=10),
    "image_list": dict(recipes.FILES, start=10),
}
# fmt: on
HEADS = ("u", "b", "average")


@dataclass
class Args(cli.Args):
    start: int = cli.option(0, "first 0-based epoch in which head_b learns", least=0, is_epoch=True)
    bank: int = cli.option(1, "contexts kept, in batches; 0 blends none, the paper's w/o Q", least=0)
    delta: float = cli.option(0.8, "an image is a context if p(label) is at least this", least=0, most=1)
    mixup: float = cli.option(0.0, "mixup of the natural batch, Beta's parameter; 0: none", least=0)
    mixup_end: int = cli.option(3, "epochs without mixup at the end", least=0, is_epoch=True)
    prediction: str = cli.option("b", "head that predicts, or the mean of their logits", choices=HEADS)


class TwoHeads(nn.Module):
    """A network and two classifiers of its features: the network's own is head_u, the other head_b.

    To train: (z_u of `images`, z_b of `others` or None without them), [B, K] each. To predict: [B, K].
    """

    def __init__(self, network, head_b, prediction):
        super().__init__()
        self.network = network
        self.head_b = head_b
        self.prediction = prediction

    def forward(self, images, others=None):
        if self.training:  # the balanced batch first: the order in which BatchNorm sees them
            z_b = None if others is None else self.head_b(self.network.features(others))
            return self.network(images), z_b
        features = self.network.features(images)
        z_u = self.network.classifier(features)
        z_b = self.head_b(features)
        return {"u": z_u, "b": z_b, "average": (z_u + z_b) / 2}[self.prediction]


def background_masks(maps, weights, size):
    """M = (1 - cam)^2 [B, 1, H, W]: 1 on background, 0 on the object.

    cam = ReLU(sum over channels of weights [B, D] * maps [B, D, h, w]), each image's scaled to 0..1, resized.
    With average pooling and a linear head Grad-CAM's weights are the true class's, up to a factor.
    """
    weights = weights[:, :, None, None]
    cam = F.relu((weights * maps).sum(1, keepdim=True))
    cam = cam - cam.amin((2, 3), keepdim=True)
    cam = cam / cam.amax((2, 3), keepdim=True).clamp(min=1e-12)  # a cam of zeros: all is background
    cam = F.interpolate(cam, size, mode="bicubic", align_corners=False).clamp(0, 1)
    return (1 - cam) ** 2


@torch.no_grad()
def harvest(network, images, labels, delta):
    """Contexts [n, C + 1, H, W]: the images of which head_u is sure, in eval mode, masks behind them."""
    network.eval()
    maps = network.feature_map(images).float()
    masks = background_masks(maps, network.classifier.weight[labels], images.shape[2:])
    p = network.classifier(network.pool(maps)).softmax(1)
    sure = p.gather(1, labels[:, None])[:, 0] >= delta
    contexts = torch.cat([images, masks], dim=1)
    network.train()
    return contexts[sure]


def blend(images, contexts, lam):
    """lam * M * context + (1 - lam * M) * image, [B, C, H, W]. contexts [B, C + 1, H, W], M behind them."""
    backgrounds, masks = contexts[:, :-1], contexts[:, -1:]
    return (1 - lam * masks) * images + lam * masks * backgrounds


def make_model(dataset, args):
    network = models.build(args.arch, dataset, args.seed, pretrained=args.pretrained)
    another = models.build(args.arch, dataset, args.seed + 1)  # of which the classifier alone is used
    if args.bank:
        maps = network.eval().feature_map(torch.zeros(1, *dataset.shape))
        if maps.shape[1] != network.classifier.in_features or maps[0, 0].numel() == 1:  # LeNet, or one pixel
            raise cli.Refused(f"--arch {args.arch}: no places in its feature map; use resnet32, or --bank 0")
    if args.start >= args.epochs and args.prediction != "u":
        raise cli.Refused(f"--start {args.start}: head_b learns nothing; use less, or --prediction u")
    return TwoHeads(network, another.classifier, args.prediction)


def train_one_epoch(run, model, loader, balanced_loader, optimizer, epoch, args):
    """One epoch of Alg. 1. images: uint8 pixels [B, C, H, W], which the network normalises."""
    model.train()
    two_heads = run.unwrap(model)  # without what wraps it for several processes
    bank = torch.empty(0, device=run.accelerator.device)  # line 3, in every epoch, as in the released code
    bank_size = args.bank * args.batch_size // run.accelerator.num_processes
    balanced = iter(balanced_loader)
    for images, labels in run.steps(loader):
        others = None
        # Drawn in every step: all processes draw the same, and their banks fill at other times.
        lam = run.rng.uniform()
        if epoch >= args.start:
            others, other_labels = next(balanced)
            if args.bank:
                with run.accelerator.autocast():
                    contexts = harvest(two_heads.network, images, labels, args.delta)
                bank = torch.cat([bank, contexts])[-bank_size:]  # lines 11 to 13
                if len(bank) >= len(images):
                    chosen = torch.randperm(len(bank), device=bank.device)[: len(images)]
                    others = blend(others, bank[chosen], lam)  # lines 19 to 21
                else:
                    others = None  # line 27: too few contexts, no balanced batch in this step

        if args.mixup and epoch < args.epochs - args.mixup_end:
            share = run.rng.beta(args.mixup, args.mixup)
            order = torch.randperm(len(labels), device=labels.device)
            mixed = share * images + (1 - share) * images[order]
            z_u, z_b = model(mixed, others)
            loss = share * F.cross_entropy(z_u, labels)
            loss = loss + (1 - share) * F.cross_entropy(z_u, labels[order])
        else:
            z_u, z_b = model(images, others)
            loss = F.cross_entropy(z_u, labels)
        if z_b is not None:
            loss = loss + F.cross_entropy(z_b, other_labels)  # line 30
        optimizer.zero_grad()
        run.accelerator.backward(loss)
        optimizer.step()
        run.log(loss=loss, balanced=loss.new_full((), z_b is not None))


def main(args: Args) -> dict:
    config = DataLoaderConfiguration(split_batches=True)
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)  # head_b's, while the bank fills
    accelerator = Accelerator(dataloader_config=config, kwargs_handlers=[unused])
    run = Run(accelerator, args)
    train_set, test_set = datasets.load(args)
    run.set_data(train_set, test_set)
    loader = datasets.train_loader(train_set, args, stream=0)
    balanced_loader = datasets.train_loader(train_set, args, order=datasets.class_aware(train_set), stream=1)
    test_loader = datasets.test_loader(test_set, args)
    model = make_model(train_set, args)
    optimizer = SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=args.wd, nesterov=args.nesterov)
    model, optimizer = accelerator.prepare(model, optimizer)
    loader, balanced_loader, test_loader = accelerator.prepare(loader, balanced_loader, test_loader)

    for epoch in run.epochs(range(args.epochs), model=model, optimizer=optimizer):
        loader.set_epoch(epoch)
        balanced_loader.set_epoch(epoch)
        optimizer.param_groups[0]["lr"] = recipes.learning_rate(epoch, args)
        train_one_epoch(run, model, loader, balanced_loader, optimizer, epoch, args)
        run.end_epoch(epoch, evaluation.per_split(run, model, test_loader))

    predictions = {}
    for head in HEADS:
        run.unwrap(model).prediction = head
        accuracy = evaluation.per_split(run, model, test_loader)
        predictions[head] = {name: accuracy[name] for name in evaluation.SPLITS}
    return run.finish(predictions=predictions)


if __name__ == "__main__":
    cli.run(main, Args, RECIPES, __doc__)
