"""Options: one dataclass per script becomes its command line; a recipe gives the defaults for a data set.

Where a value comes from, last one wins: the field's default, the script's RECIPES[dataset], the command line.
With other --epochs than the recipe's, its values that count epochs are scaled along, and the log says so.
"""

import argparse
import dataclasses
import difflib
import errno
import math
import os
import sys
import time
import typing
from dataclasses import dataclass

import torch

from common import recipes


class Refused(Exception):
    """Something that the user can mend, told in one line: the argument, its value, the remedy."""


def say(message):
    """One line on stderr, of the first process alone."""
    if os.environ.get("RANK", "0") == "0":
        show(message, sys.stderr)


def show(message, stream):
    """Print a line. A stream that is closed or full, or that nobody reads, does not end a run."""
    try:
        if stream:
            print(message, file=stream, flush=True)
    except (OSError, ValueError):
        pass


def option(default, help, choices=None, least=None, above=None, most=None, is_epoch=False):
    """A field of Args, with least <= value <= most and value > above. is_epoch: it goes with --epochs."""
    limits = dict(choices=choices, least=least, above=above, most=most)
    return dataclasses.field(default=default, metadata=dict(help=help, is_epoch=is_epoch, **limits))


KINDS = ("none", "weak", "jitter", "rotate", "auto", "strong")
TRACKERS = ("tensorboard", "wandb", "trackio", "comet_ml", "mlflow", "aim", "clearml", "dvclive")


@dataclass
class Args:
    """The options of every script. A script adds those of its method in a subclass."""

    dataset: str = option("synthetic", "data set, and with it the recipe")
    recipe: str = option("paper", "paper, or equal: the same training settings in every script")
    data_dir: str = option("data", "folder that holds the data set (docs/data.md)")
    imbalance: float | None = option(100.0, "images of the largest class over the smallest's", least=1)
    train_list: str | None = option(None, "list of `relative/path label` lines, if not the data set's own")
    test_list: str | None = option(None, "the same for the test images")
    image_size: int | None = option(None, "side in pixels; up to 64 images are kept in memory", least=8)
    augment: str = option("weak", "of training images: crop and flip, or more (docs/data.md)", choices=KINDS)
    num_workers: int = option(4, "worker processes of each loader, for images from files", least=0)
    splits: tuple[int, ...] = option((100, 20), "many-shot: more training images than; few-shot: fewer than")
    eval_every: int = option(1, "epochs from one test to the next; the last is always tested", least=1)
    output_dir: str | None = option(None, "folder of the run, if not runs/SCRIPT/DATASET_IMBALANCE_SEED")
    resume: bool = option(False, "go on from the checkpoint in the folder of the run, if there is one")
    overwrite: bool = option(False, "delete the run that the folder holds")
    log_with: str | None = option(None, "tracker that gets the log, too", choices=TRACKERS)
    seed: int = option(0, "seed of weights, order, augmentation; not of the subset", least=0, most=2**31)
    arch: str = option("resnet8", "resnet8 to resnet56 for small images, resnet10 to resnet152, lenet")
    pretrained: bool = option(False, "begin with torchvision's ImageNet weights")
    epochs: int = option(10, "number of epochs", least=1)
    batch_size: int = option(128, "images per step, over all processes", least=1)
    lr: float = option(0.1, "learning rate", above=0)
    lr_steps: tuple[int, ...] = option((), "0-based epochs at which it falls", least=0, is_epoch=True)
    lr_factor: float = option(0.1, "what it is multiplied by then", above=0, most=1)
    cosine: bool = option(False, "it falls along a cosine instead")
    warmup: int = option(0, "epochs of linear warm-up", least=0, is_epoch=True)
    warmup_from: float = option(0.0, "share of the learning rate at which that begins", least=0, most=1)
    wd: float = option(0.0, "weight decay", least=0)
    nesterov: bool = option(False, "Nesterov momentum")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            for item in value if isinstance(value, tuple) else (value,):
                check(flag(field.name), item, **field.metadata)
        if self.splits[1] > self.splits[0] + 1:
            raise Refused(f"--splits {self.splits}: a class would be many- and few-shot; try 100 20")


def check(name, value, help, is_epoch, choices, least, above, most):
    """Refused where a value is not what its option may be."""
    if choices and value is not None and value not in choices:
        raise Refused(f"{name} {value}: must be one of {', '.join(choices)}")
    if value is None or isinstance(value, (bool, str)):
        return
    if not math.isfinite(value):
        raise Refused(f"{name} {value}: must be finite")
    if least is not None and value < least:
        raise Refused(f"{name} {value}: must be at least {least}")
    if above is not None and value <= above:
        raise Refused(f"{name} {value}: must be above {above}")
    if most is not None and value > most:
        raise Refused(f"{name} {value}: must be at most {most}")


def flag(name):
    return "--" + name.replace("_", "-")


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def error(self, message):
        raise Refused(message.removeprefix("argument "))


def parse(args_class, all_recipes, doc, argv=None):
    """Args from the command line (default: sys.argv). `--dataset NAME --help` shows that recipe's values."""
    words = sys.argv[1:] if argv is None else argv
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--dataset", default=args_class.dataset)
    first.add_argument("--recipe", default=args_class.recipe)
    first.add_argument("--epochs", type=int)
    chosen = first.parse_known_args(words)[0]
    defaults = find_recipe(args_class, all_recipes, chosen.dataset, chosen.recipe)
    changed = scaled(args_class, defaults, max(chosen.epochs or defaults["epochs"], 1))
    defaults |= changed

    layout = dict(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser = Parser(usage="%(prog)s [options]", description=doc, **layout)
    own = parser.add_argument_group("options of the method")
    shared = parser.add_argument_group("options of every script")
    hints = typing.get_type_hints(args_class)
    for field in dataclasses.fields(args_class):
        default = defaults[field.name]
        choices = " | ".join(field.metadata["choices"] or ())
        help = f"{field.metadata['help']} [{choices}] (default: {default})".replace(" []", "")
        kind, *rest = typing.get_args(hints[field.name]) or [hints[field.name]]  # of `float | None` the first
        if kind is bool:
            keywords = dict(action=argparse.BooleanOptionalAction)
        else:
            keywords = dict(type=kind, nargs=len(field.default) or "*" if rest == [...] else None)
        group = shared if hasattr(Args, field.name) else own
        group.add_argument(flag(field.name), default=default, help=help.replace("%", "%%"), **keywords)

    given, unknown = parser.parse_known_args(words)
    if unknown:
        near = difflib.get_close_matches(unknown[0], map(flag, hints), 1)
        hint = f"did you mean {near[0]}?" if near else "--help lists them all"
        kind = "no such option" if unknown[0].startswith("-") else "neither an option nor a value of one"
        raise Refused(f"{unknown[0]}: {kind}; {hint}")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in vars(given).items()}
    taken = [f"{flag(name)} {value}" for name, value in changed.items() if values[name] == value]
    if taken:
        say(f"note: for --epochs {chosen.epochs}: {', '.join(taken)}")
    return args_class(**values)


def find_recipe(args_class, all_recipes, dataset, name):
    """Defaults: the field's, or RECIPES[dataset]'s, RECIPES["dataset name"]'s; of `equal` recipes.EQUAL's."""
    known = [key for key in all_recipes if " " not in key]
    if dataset not in known:
        raise Refused(f"--dataset {dataset}: must be one of {', '.join(known)}")
    is_equal = name == "equal" and dataset in recipes.EQUAL
    key = dataset if name == "paper" or is_equal else f"{dataset} {name}"
    if key not in all_recipes:
        names = ["paper", "equal", *[key.split()[1] for key in all_recipes if key.startswith(dataset + " ")]]
        raise Refused(f"--recipe {name}: for --dataset {dataset} there are {', '.join(names)}")
    defaults = {field.name: field.default for field in dataclasses.fields(args_class)} | all_recipes[key]
    if is_equal:
        equal = recipes.PLAIN | recipes.EQUAL[dataset]
        defaults |= scaled(args_class, defaults, equal["epochs"]) | equal
    return defaults


def scaled(args_class, defaults, epochs):
    """Those of the defaults that count epochs and are others in a run of `epochs`, rounded down."""
    changed = {}
    for field in dataclasses.fields(args_class):
        value = defaults[field.name]
        if field.metadata["is_epoch"] and value:
            items = value if isinstance(value, tuple) else (value,)
            least = field.metadata["least"] or 0
            items = tuple(max(item * epochs // defaults["epochs"], least) for item in items)
            changed[field.name] = items if isinstance(value, tuple) else items[0]
    return {name: value for name, value in changed.items() if value != defaults[name]}


def run(main, args_class, all_recipes, doc):
    """What a script does when it is started. Where the user can mend something: one line and exit code 2."""
    try:
        return main(parse(args_class, all_recipes, doc))
    except KeyboardInterrupt:
        say("stopped; --resume goes on after the last whole epoch")
        sys.exit(130)
    except Exception as error:
        line = one_line(error)
        if os.environ.get("WORLD_SIZE", "1") != "1" and (line is None or os.environ.get("RANK") != "0"):
            time.sleep(3)  # the launcher ends this one, where another is the cause or the first says it
        if line is None:
            raise
        show(line, sys.stderr)
        sys.exit(2)


def one_line(error):
    """What the user can do about it; None for an error of the program's own."""
    text = str(error)
    if isinstance(error, Refused):  # of a loader process it has a traceback before it
        return " ".join(text.rpartition("Refused: ")[2].split())
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text:
        return f"out of memory ({text[:75].splitlines()[0]}); halve --batch-size and begin anew"
    if "more than 1 value per channel" in text:  # in the first step
        return "BatchNorm sees one value per channel; raise --batch-size or --image-size"
    if "DataLoader worker (pid" in text or "DataLoader timed out" in text:
        return "a loader process died; lower --num-workers, or raise the memory of /dev/shm"
    if isinstance(error, OSError) and (error.filename or error.errno == errno.ENOSPC):
        return f"{error.filename or 'disk'}: {error.strerror}; mend that, and start again"
    return None
