"""Options: one typed dataclass per script becomes its command line.

Where a value comes from, last one wins: the field's default, the script's RECIPES[dataset], the command line.
A recipe's value may go by another option (By).
"""

import argparse
import dataclasses
import difflib
import inspect
import math
import operator
import os
import signal
import sys
import typing
from dataclasses import dataclass

# Data sets of list files, which others may take the place of.
OF_LISTS = ("image_list", "imagenet_lt", "places_lt", "inat2017", "inat2018")


def say(*messages, here=False):
    """One line each on stderr. Under a launcher only the first process speaks, unless `here`."""
    if here or os.environ.get("RANK", "0") == "0":
        for message in messages:
            print(" ".join(str(message).split()), file=sys.stderr, flush=True)


def fail(*messages, here=False):
    """Say what is wrong and stop with exit code 2, without a traceback."""
    say(*messages, here=here)
    raise SystemExit(2)


def option(default, help, *, choices=None, least=None, above=None, most=None, hint="", bare=None, needs=None):
    """A field of an Args class: default, help and limits (least <= value <= most, value > above).

    `hint` ends the line that refuses a value; `bare` is the value of the option given without one. needs:
    {option: values}, of which one has to hold, or this option has no effect and is refused where it is given.
    """
    limits = dict(choices=choices, least=least, above=above, most=most, hint=hint)
    return dataclasses.field(default=default, metadata=dict(help=help, bare=bare, needs=needs, **limits))


class By:
    """A recipe's value that goes by other options, those that the function names: By(lambda lr: 10 * lr)."""

    def __init__(self, function):
        self.function, self.options = function, list(inspect.signature(function).parameters)


def resolve(values):
    """`values` with every By replaced by what it says; the options it goes by may be By themselves."""

    def value_of(name):
        value = values[name]
        return value.function(*map(value_of, value.options)) if isinstance(value, By) else value

    return {name: value_of(name) for name in values}


@dataclass
class Args:
    """The options that all scripts share; a script adds its own in a subclass.

    In Python, Args(...) has the fields' defaults; `build` puts a data set's recipe under what is given.
    """

    dataset: str = option("synthetic", "data set, and with it the recipe")
    data_dir: str = option("data", "folder that holds the data set (README: Data)")
    imbalance: float | None = option(
        100.0,
        "imbalance factor, largest class over smallest, of the exponential cut; fixed lists are not cut",
        least=1,
        hint="(largest class over smallest); write 100 for 1:100",
    )
    train_list: str | None = option(
        None,
        "list file of `relative/path label` lines, maybe in --data-dir",
        needs=dict(dataset=OF_LISTS),
    )
    test_list: str | None = option(None, "the same for the test images", needs=dict(dataset=OF_LISTS))
    image_size: int | None = option(
        None, "side of the square input in pixels; up to 64 the images are kept in memory", least=8
    )
    color_jitter: float = option(
        0.0, "strength of the colour jitter of training images read from files", least=0
    )
    rand_augment: bool = option(False, "RandAugment on training images read from files")
    random_rotation: int = option(
        0, "largest rotation in degrees of training images kept in memory", least=0, most=180
    )
    auto_augment: bool = option(False, "AutoAugment's CIFAR-10 policy on training images kept in memory")
    cutout: int = option(0, "side of a black square in training images kept in memory; 0: none", least=0)
    contrastive: float = option(
        0.0,
        "probability of a training image to be augmented as in contrastive learning instead",
        least=0,
        most=1,
    )
    num_workers: int = option(2, "loader processes per training process, for images read from files", least=0)
    many_over: int = option(100, "many-shot classes have more training images than this", least=1)
    few_under: int = option(20, "few-shot classes have fewer training images than this", least=1)
    many_classes: int | None = option(
        None, "many-shot are this many most frequent classes, instead of --many-over", least=0
    )
    few_classes: int | None = option(
        None, "few-shot are this many rarest classes, instead of --few-under", least=0
    )
    allow_empty_classes: bool = option(
        False, "leave out classes without training images, and their test images"
    )
    check_data: bool = option(
        False, "only look whether every list, folder and image is there, and name those that are not"
    )
    decode: bool = option(
        False, "read every image, too, and name the broken ones", needs=dict(check_data=(True,))
    )
    dry_run: bool = option(
        False,
        "only two steps, two batches of the test and a checkpoint of each stage, and tell how long all takes",
    )
    output_dir: str | None = option(None, "folder of the run (default: runs/SCRIPT/DATASET_IMBALANCE_SEED)")
    resume: str = option(
        "no",
        "go on from the last checkpoint of the output folder; `auto` starts afresh where there is none",
        choices=("no", "yes", "auto"),
        bare="yes",
    )
    overwrite: bool = option(False, "delete the run that the output folder holds")
    seed: int = option(
        0, "seed of initialisation, order and augmentation; the subset has its own", least=0, most=2**32
    )
    arch: str = option(
        "resnet8",
        "network: CIFAR resnet8 to 56, ImageNet resnet10 to 152, resnext50_32x4d to 152, wide_resnet50_2, or "
        "lenet",
    )
    epochs: int = option(10, "number of epochs", least=1)
    batch_size: int = option(128, "images per step over all processes", least=1)
    lr: float = option(0.1, "learning rate", above=0)
    lr_steps: tuple[int, ...] = option((), "0-based epochs at which the learning rate falls", least=0)
    wd: float = option(0.0, "weight decay, on all parameters", least=0)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            check(field, getattr(self, field.name))
        if self.overwrite and self.resume != "no":
            fail("--overwrite: deletes the run that --resume goes on with; leave one of them out")
        if self.few_under > self.many_over + 1:
            given = f"--many-over {self.many_over}, --few-under {self.few_under}"
            fail(f"{given}: a class would be both many- and few-shot; lower the second")


def flag(name):
    return "--" + name.replace("_", "-")


LIMITS = {
    "least": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "most": ("at most", operator.le),
}


def check(field, value):
    """Refuse, with one line, a value outside the field's limits. Tuples are checked by item, None passes."""
    name, limits = flag(field.name), field.metadata
    for item in value if isinstance(value, tuple) else (value,):
        if limits["choices"] and item not in limits["choices"]:
            fail(f"{name} {item}: must be one of {', '.join(map(str, limits['choices']))}")
        if isinstance(item, (int, float)) and not isinstance(item, bool):
            if math.isinf(item):
                fail(f"{name} {item}: must be finite")
            for limit, (words, holds) in LIMITS.items():
                if limits[limit] is not None and not holds(item, limits[limit]):
                    fail(f"{name} {item}: must be {words} {limits[limit]} {limits['hint']}")


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors."""

    def error(self, message):
        fail(message.removeprefix("argument "))


def nearest(name, names):
    return "".join(f"; did you mean {near}?" for near in difflib.get_close_matches(name, names, 1, 0.5))


def integer(text):
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer") from None


def number(text):
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


CONVERT = {int: integer, float: number, str: str}


def make_parser(args_class, doc, defaults):
    parser = Parser(
        usage="%(prog)s [--dataset NAME] [options]",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    hints, shared = typing.get_type_hints(args_class), [field.name for field in dataclasses.fields(Args)]
    own = parser.add_argument_group("options of the method")
    common = parser.add_argument_group("options of every script")
    for field in dataclasses.fields(args_class):
        hint, default, extra = hints[field.name], defaults[field.name], field.metadata
        kind, *rest = typing.get_args(hint) or (hint,)  # of `float | None` and `tuple[int, ...]` the first
        help = extra["help"].replace("%", "%%")
        if extra["needs"]:
            help += f"; for {needed(extra['needs'])}"
        if default is not None and default is not False and default != ():
            shown = "on" if default is True else default
            help += f" (default: {' '.join(map(str, shown)) if isinstance(shown, tuple) else shown})"
        if kind is bool:
            keywords = dict(action=argparse.BooleanOptionalAction)
        else:
            metavar = (
                "{" + ",".join(map(str, extra["choices"])) + "}"
                if extra["choices"]
                else kind.__name__.upper()
            )
            keywords = dict(type=CONVERT[kind], metavar=metavar)
        if rest == [...]:
            keywords |= dict(nargs="*")
        if extra["bare"]:
            keywords |= dict(nargs="?", const=extra["bare"])
        group = common if field.name in shared else own
        group.add_argument(
            flag(field.name), default=argparse.SUPPRESS, help=help, dest=field.name, **keywords
        )
    return parser


def counts(field, args):
    """Whether an option has an effect, by what it `needs`."""
    needs = field.metadata["needs"]
    return not needs or any(getattr(args, name) in values for name, values in needs.items())


def needed(needs):
    """The `needs` of an option in words: --loss ldam or ride."""
    return " or ".join(flag(k) if v == (True,) else f"{flag(k)} {' or '.join(v)}" for k, v in needs.items())


def build(args_class, recipes, **given):
    """Args: the values given over the recipe of given["dataset"] over the fields' defaults."""
    dataset = given.get("dataset", args_class.dataset)
    if dataset not in recipes:
        fail(f"--dataset {dataset}: not one of {', '.join(recipes)}{nearest(dataset, recipes)}")
    fields = {field.name: field for field in dataclasses.fields(args_class)}
    defaults = {name: field.default for name, field in fields.items()}
    args = args_class(**resolve({**defaults, **recipes[dataset], **given}))
    for name, value in given.items():
        if value != defaults[name] and not counts(fields[name], args):
            what = needed(fields[name].metadata["needs"])
            fail(f"{flag(name)} {value}: is for {what}; add that, or leave it out")
    return args


def dashes(word):
    """--batch_size=8 as --batch-size=8: both spellings are accepted, as the launcher does."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word


def parse(args_class, recipes, doc, argv=None):
    """Args from the command line (default: sys.argv). `--help` shows the defaults of the recipe."""
    words = [dashes(word) for word in (sys.argv[1:] if argv is None else argv)]
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--dataset", default=args_class.dataset, nargs="?")
    dataset = first.parse_known_args(words)[0].dataset
    defaults = {field.name: field.default for field in dataclasses.fields(args_class)}
    defaults |= recipes.get(dataset, {}) | {"dataset": dataset}
    hints = typing.get_type_hints(args_class)
    for name in {name for value in defaults.values() if isinstance(value, By) for name in value.options}:
        kind = (typing.get_args(hints[name]) or [hints[name]])[0]
        how = dict(action=argparse.BooleanOptionalAction) if kind is bool else dict(type=CONVERT[kind])
        first.add_argument(flag(name), default=defaults[name], dest=name, **how)
    chosen = vars(first.parse_known_args(words)[0])
    parser = make_parser(args_class, doc, resolve(defaults | chosen))
    parser.add_argument("--print-config", action="store_true", help="print every option and where it is from")
    given, unknown = parser.parse_known_args(words)
    if unknown:
        near = nearest(unknown[0], parser._option_string_actions)
        fail(f"{unknown[0]}: no such option{near or '; --help lists them all'}")
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in vars(given).items()}
    print_config = given.pop("print_config")
    args = build(args_class, recipes, **given)
    if print_config:
        if os.environ.get("RANK", "0") == "0":
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # its reader may close early
            print_sources(args, given, recipes[args.dataset])
        raise SystemExit(0)
    return args


def print_sources(args, given, recipe):
    """Every option on stdout, and whether its value is of the command line, the recipe or the default."""
    for name, value in dataclasses.asdict(args).items():
        source = "command line" if name in given else "recipe" if name in recipe else "default"
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
        print(f"{flag(name):24} {'-' if shown in ('', None) else shown!s:24} {source}")
