"""Every system of the papers' comparison tables: `python -m benchmarks.systems`, the README's tables.

A line of results/systems.jsonl is a system: the command that runs it, or null, and its published figures.
`python COMMAND --dataset KEY` is the run of a figure, KEY its key. Ours is the mean over the recorded results
(results/*.jsonl) with that script and all of its options but the seed, and how many seeds they are.
With --commands: every figure on a line of its own, with its whole command.
"""

import argparse
import dataclasses
import importlib
import json
import re
import shlex
import signal
import statistics
from pathlib import Path

from common import cli
from common.runs import NOT_COMPARED

ROOT = Path(__file__).parent.parent
PAPERS = {
    "CMO": "cmo.py",
    "BBN": "bbn.py",
    "Balanced Meta-Softmax": "balanced_meta_softmax.py",
    "Decoupled training": "decoupled_crt.py",
    "CSA": "csa.py",
    "Meta-learned weights": "meta_weights.py",
    "Bag of tricks": "bag_of_tricks.py",
    "Equalization losses": "equalization_loss.py",
    "Class rectification loss": "class_rectification.py",
}
SETS = {"cifar10_lt": "CIFAR-10", "cifar100_lt": "CIFAR-100", "mnist_lt": "MNIST-LT"}
SETS |= {"fashion_mnist_lt": "Fashion-MNIST-LT", "cmnist_lt": "coloured MNIST-LT"}
SETS |= {"imagenet_lt": "ImageNet-LT", "places_lt": "Places-LT"}
SETS |= {"inat2017": "iNat 2017", "inat2018": "iNat 2018"}
NETWORKS = {"resnet": "ResNet", "resnext": "ResNeXt", "wide_resnet": "Wide ResNet"}
MOST = 8  # columns of figures in a table


def read_systems():
    return [json.loads(line) for line in (ROOT / "results" / "systems.jsonl").open()]


def recorded():
    """The recorded results, but for the diverged runs."""
    files = [file for file in (ROOT / "results").glob("*.jsonl") if file.name != "study_diverged.jsonl"]
    return [result for file in files for result in map(json.loads, file.open()) if "script" in result]


def parse(command):
    """Args of a full command."""
    script, *words = shlex.split(command)
    module = importlib.import_module(script.removesuffix(".py"))
    return cli.parse(module.Args, module.RECIPES, module.__doc__, words)


def matching(command, results):
    """Those of the results that are of the full command."""
    script, dataset = command.split()[0], command.split("--dataset ")[1].split()[0]
    results = [r for r in results if (r["script"], r["dataset"]) == (script, dataset)]
    if not results:
        return []
    args = {k: v for k, v in vars(parse(command)).items() if k not in (*NOT_COMPARED, "seed")}
    args = json.loads(json.dumps(args))  # tuples as the lists that are recorded
    defaults = {field.name: field.default for field in dataclasses.fields(parse(command))}  # of later options
    return [r for r in results if all(r["args"].get(k, defaults[k]) == v for k, v in args.items())]


def cell(system, key, results):
    """`published / ours (seeds)`."""
    published, command = system["published"][key], system["command"]
    published = "-" if published is None else published
    runs = matching(f"{command} --dataset {key}", results) if command else []
    if not runs:
        return f"{published} / -"
    mean, seeds = statistics.mean(run["all"] for run in runs), len({run["seed"] for run in runs})
    return f"{published} / {mean:.1f} ({seeds})"


def column(key):
    """The head of a key's column: its data set, with imbalance factor or network."""
    dataset, *rest = key.split()
    given = dict(zip(rest, rest[1:], strict=False))
    kind, depth = re.match(r"([a-z_]*)(\d*)", given.get("--arch", "")).groups()
    network = f"{NETWORKS[kind]}-{depth}" if kind else None
    long = "--long" if "--long" in rest else None
    return ", ".join(filter(None, [SETS[dataset], given.get("--imbalance"), network, long]))


def split(columns, kinds=("CIFAR|MNIST", "[^,]+")):
    """The columns as those of one table or, where they are too many, of several, by kind of data set."""
    if len(columns) <= MOST or not kinds:
        return [columns]
    parts = {}
    for name in columns:
        parts.setdefault(re.search(f"{kinds[0]}|$", name)[0], []).append(name)
    return [names for part in parts.values() for names in split(part, kinds[1:])]


def tables(systems, results):
    """The tables of one paper, as markdown, unpadded: they are long."""
    rows = [{column(k): cell(system, k, results) for k in system["published"]} for system in systems]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    columns.sort(key=lambda name: list(SETS.values()).index(name.split(",")[0]))
    for names in split(columns):
        table = [["system", "command", *names], ["---"] * (2 + len(names))]
        for system, row in zip(systems, rows, strict=True):
            if not row or any(name in row for name in names):
                command = f"`{system['command']}`" if system["command"] else "-"
                table.append([system["system"], command, *(row.get(name, "") for name in names)])
        yield "\n".join(f"| {' | '.join(row)} |" for row in table)


def text():
    systems, results, parts = read_systems(), recorded(), []
    for paper, script in PAPERS.items():
        of_paper = [system for system in systems if system["paper"] == paper]
        head = f"<details><summary><b>{paper}</b> ({script})</summary>"
        parts += [head, *tables(of_paper, results), "</details>"]
    return "\n\n".join(parts)


def commands():
    """A line for each figure: paper, system, figures and command."""
    results = recorded()
    for system in read_systems():
        for key in system["published"]:
            command = f"python {system['command']} --dataset {key}" if system["command"] else "-"
            yield f"{system['paper']}: {system['system']}: {cell(system, key, results)}: {command}"


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.systems", description=__doc__.splitlines()[0])
    parser.add_argument("--commands", action="store_true", help="a line for each figure, with its command")
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it quietly
    print("\n".join(commands()) if parser.parse_args(argv).commands else text())


if __name__ == "__main__":
    main()
