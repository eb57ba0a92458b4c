"""BBN: Bilateral-Branch Network with cumulative learning.

Paper:    B. Zhou, Q. Cui, X.-S. Wei, Z.-M. Chen, "BBN: Bilateral-Branch Network with Cumulative Learning for
          Long-Tailed Visual Recognition", CVPR 2020, arXiv:1912.02413.
Method:   1. draw one batch as it comes, one from the reversed sampler, p_k ~ 1 / n_k            image_weights
          2. a trunk for both, then a conventional and a re-balancing block; their features, weighted by
             alpha and 1 - alpha, go through one classifier                                       Eq. (1), BBN
          3. loss = alpha * CE(z, y_c) + (1 - alpha) * CE(z, y_r)                     Eq. (3), train_one_epoch
          4. alpha = 1 - (t / T)^2 falls with the epochs                                              alpha_at
Differs:  as in the released code, features are doubled and share one bias, t counts from 0, and T is 200 for
          180 epochs. docs/bbn.md has the rest, and a command for every row of the paper's tables.
Expected: ResNet-32, imbalance 100: cifar10_lt 79.8, cifar100_lt 42.6 (paper).
Run:      accelerate launch bbn.py --dataset cifar10_lt
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator, DataLoaderConfiguration
from torch import nn
from torch.optim import SGD

from common import cli, datasets, evaluation, models, recipes
from common.runs import Run

# Settings of the released code, of a user of it (ImageNet-LT), and ours where there is none.
# fmt: off
CIFAR = dict(arch="resnet32", epochs=200, lr_steps=(119, 159), lr_factor=0.01, warmup=5, warmup_from=1 / 3,
             wd=2e-4, nesterov=True)
INAT = dict(arch="resnet50", imbalance=None, epochs=180, lr=0.05, lr_steps=(119, 159), wd=1e-4,
            nesterov=True, alpha_epochs=200)
RECIPES = {
    "cifar10_lt": CIFAR,
    "cifar100_lt": CIFAR,
    "imagenet_lt": dict(arch="resnet50", imbalance=None, epochs=90, batch_size=256, cosine=True, wd=5e-4,
                        augment="jitter", nesterov=True, alpha_epochs=100),
    "inat2017": INAT,
    "inat2018": dict(INAT, splits=(100, 21)),
    **recipes.OWN,
}
# fmt: on
ADAPTORS = ("parabolic", "linear", "cosine", "increment", "equal")


@dataclass
class Args(cli.Args):
    adaptor: str = cli.option("parabolic", "how alpha changes with the epochs (Table 5)", choices=ADAPTORS)
    alpha_epochs: int | None = cli.option(None, "T of alpha, if not --epochs", least=1, is_epoch=True)
    q: float = cli.option(-1.0, "second batch draws class k with ~ n_k^q; -1 reversed, 0 balanced, 1 natural")
    beta: float = cli.option(0.0, "alpha ~ Beta(beta, beta), whatever the adaptor; 0: not", least=0)
    manifold: bool = cli.option(False, "one network instead of BBN: manifold mixup of the two batches")


def image_weights(dataset, q=-1.0):
    """n_k^(q - 1) for each image of class k, [N], so that class k is drawn with probability ~ n_k^q."""
    return dataset.class_counts.double().pow(q - 1)[dataset.labels]


def alpha_at(epoch, total, adaptor="parabolic"):
    """alpha of the 0-based `epoch` of T = `total`, by the paper's adaptor or one of its ablations."""
    t = min(epoch / total, 1.0)
    return {
        "parabolic": 1 - t**2,
        "linear": 1 - t,
        "cosine": math.cos(t * math.pi / 2),
        "increment": t**2,
        "equal": 0.5,
    }[adaptor]


class BBN(nn.Module):
    """z = W [2 alpha f_c ; 2 (1 - alpha) f_r] + b, f_c of x_c, f_r of x_r; z [B, K], features [B, D].
    To predict, both blocks see the same images and alpha is 1/2: hence the factor 2."""

    def __init__(self, network, another):
        super().__init__()
        self.trunk, self.cb_block = models.split_last_block(network)
        _, self.rb_block = models.split_last_block(another)
        self.classifier = nn.Linear(2 * network.classifier.in_features, network.classifier.out_features)

    def forward(self, x_c, x_r=None, alpha=0.5):
        maps = self.trunk(x_c)
        f_c = self.cb_block(maps)  # the last block and the pooling
        f_r = self.rb_block(maps if x_r is None else self.trunk(x_r))
        return self.classifier(torch.cat([2 * alpha * f_c, 2 * (1 - alpha) * f_r], dim=1))


class ManifoldMixup(nn.Module):
    """The baseline of one network: z = alpha z_c + (1 - alpha) z_r, as if features were mixed before W."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x_c, x_r=None, alpha=1.0):
        z_c = self.network(x_c)
        return z_c if x_r is None else alpha * z_c + (1 - alpha) * self.network(x_r)


def make_model(dataset, args):
    network = models.build(args.arch, dataset, args.seed, pretrained=args.pretrained)
    if args.manifold:
        return ManifoldMixup(network)
    another = models.build(args.arch, dataset, args.seed + 1, pretrained=args.pretrained)  # other weights
    torch.manual_seed(args.seed)  # for BBN's classifier
    return BBN(network, another)


def train_one_epoch(run, model, loader, reversed_loader, optimizer, epoch, args):
    model.train()
    alpha = alpha_at(epoch, args.alpha_epochs or args.epochs, args.adaptor)
    for (x_c, y_c), (x_r, y_r) in zip(run.steps(loader), reversed_loader, strict=True):
        if args.beta:
            alpha = run.rng.beta(args.beta, args.beta)
        z = model(x_c, x_r, alpha)  # Alg. 1, lines 5 to 7
        loss = alpha * F.cross_entropy(z, y_c) + (1 - alpha) * F.cross_entropy(z, y_r)  # line 9
        optimizer.zero_grad()
        run.accelerator.backward(loss)
        optimizer.step()
        run.log(loss=loss)


def main(args: Args) -> dict:
    config = DataLoaderConfiguration(split_batches=True)
    accelerator = Accelerator(dataloader_config=config)
    run = Run(accelerator, args)
    train_set, test_set = datasets.load(args)
    run.set_data(train_set, test_set)
    loader = datasets.train_loader(train_set, args, stream=0)
    reversed_loader = datasets.train_loader(train_set, args, image_weights(train_set, args.q), stream=1)
    test_loader = datasets.test_loader(test_set, args)
    model = make_model(train_set, args)
    optimizer = SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=args.wd, nesterov=args.nesterov)
    model, optimizer = accelerator.prepare(model, optimizer)
    loader, reversed_loader, test_loader = accelerator.prepare(loader, reversed_loader, test_loader)

    for epoch in run.epochs(range(args.epochs), model=model, optimizer=optimizer):
        loader.set_epoch(epoch)
        reversed_loader.set_epoch(epoch)
        optimizer.param_groups[0]["lr"] = recipes.learning_rate(epoch, args)
        train_one_epoch(run, model, loader, reversed_loader, optimizer, epoch, args)
        run.end_epoch(epoch, evaluation.per_split(run, model, test_loader))
    return run.finish()


if __name__ == "__main__":
    cli.run(main, Args, RECIPES, __doc__)
