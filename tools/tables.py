"""Fills the tables of README.md and docs/*.md: `python -m tools.tables`. A test finds those out of date.

A table lies between `<!-- table: WHAT -->` and `<!-- end of table -->`. WHAT is `methods`, the README's
choice of systems, `systems PAPER`, all of a paper's comparison tables, `figures DATASET`, all papers' figures
on a data set, `runs FILE`, each run of a file beside the first figure that it is a run of, or a file such as
`results/synthetic.jsonl`, whose runs are shown as tools.compare does.

A line of results/systems.jsonl is a system: the command that runs it, or null, and its published figures.
`python COMMAND --dataset KEY` is the run of a figure, KEY its key. Ours is the mean over the recorded results
(results/*.jsonl) with that script and all of its options but the seed, and how many seeds they are.
With --commands: instead every figure on a line of its own, with its whole command.
"""

import dataclasses
import importlib
import json
import re
import shlex
import statistics
from pathlib import Path

import tools
from common import cli
from common.cli import Refused
from tools import compare

ROOT = Path(__file__).parent.parent
MARKED = re.compile(r"(<!-- table: ([^\n]*) -->\n).*?(<!-- end of table -->)", re.DOTALL)
SETS = {
    "cifar10_lt": "CIFAR-10",
    "cifar100_lt": "CIFAR-100",
    "mnist_lt": "MNIST-LT",
    "fashion_mnist_lt": "Fashion-MNIST-LT",
    "cmnist_lt": "coloured MNIST-LT",
    "imagenet_lt": "ImageNet-LT",
    "places_lt": "Places-LT",
    "inat2017": "iNat 2017",
    "inat2018": "iNat 2018",
}
NETWORKS = {"resnet": "ResNet", "resnext": "ResNeXt", "wide_resnet": "Wide ResNet"}
MOST = 8  # columns of figures in a table
METHODS = [  # paper, system: the rows of the README's table
    ("BBN", "CE"),
    ("BBN", "CE-DRW"),
    ("BBN", "LDAM-DRW"),
    ("CMO", "CE-DRW + CMO"),
    ("CMO", "LDAM-DRW + CMO"),
    ("CMO", "BS + CMO"),
    ("CMO", "RIDE (3 experts) + CMO"),
    ("BBN", "BBN"),
    ("CSA", "CSA"),
    ("CSA", "CSA + mixup"),
    ("CSA", "cRT"),
    ("CSA", "LWS"),
    ("Balanced Meta-Softmax", "BS"),
    ("Balanced Meta-Softmax", "BALMS"),
    ("Meta-learned weights", "meta-learned weights, CE"),
    ("Meta-learned weights", "meta-learned weights, LDAM"),
    ("Bag of tricks", "Balanced Softmax"),
    ("Bag of tricks", "DRS CAM class-balanced"),
    ("Bag of tricks", "bag of tricks"),
    ("Equalization losses", "SEQL"),
]


def read_systems():
    return [json.loads(line) for line in (ROOT / "results" / "systems.jsonl").open()]


def papers():
    return list(dict.fromkeys(system["paper"] for system in read_systems()))


def recorded():
    """The recorded results."""
    results = []
    for file in sorted((ROOT / "results").glob("*.jsonl")):
        lines = [json.loads(line) for line in file.open()]
        results += [line for line in lines if "script" in line]
    return results


# ------------------------------------------------------------------------------------------------- its runs


def parse(command):
    """Args of a full command."""
    script, *words = shlex.split(command)
    module = importlib.import_module(script.removesuffix(".py"))
    return cli.parse(module.Args, module.RECIPES, module.__doc__, words)


def compared(options):
    """Those of the options that make a run another, as a file has them.

    A stage 1 in runs/ce is cross-entropy by cmo.py, which is decoupled_crt.py's own stage 1, bit for bit.
    """
    kept = {name: value for name, value in options.items() if name not in compare.NOT_COMPARED}
    if str(kept.get("stage1")).startswith("runs/ce/"):
        kept["stage1"] = None
    return json.loads(json.dumps(kept))  # tuples become lists


def matching(command, results):
    """Those of the results that are of the full command.

    An option that a result lacks, of an older version of its script, has its default. A result with an option
    that the script has no more is of no command.
    """
    words = shlex.split(command)
    kind = words[0], words[words.index("--dataset") + 1]
    results = [result for result in results if (result["script"], result["args"]["dataset"]) == kind]
    if not results:
        return []
    args = parse(command)
    wanted = compared(vars(args))
    defaults = compared({field.name: field.default for field in dataclasses.fields(args)})
    return [result for result in results if defaults | compared(result["args"]) == wanted]


def cell(system, key, results):
    """`published / ours (seeds)`."""
    published = system["published"][key]
    published = "-" if published is None else published
    runs = []
    if system["command"]:
        runs = matching(f"{system['command']} --dataset {key}", results)
    if not runs:
        return f"{published} / -"
    seeds = len({run["seed"] for run in runs})
    return f"{published} / {statistics.mean(run['all'] for run in runs):.1f} ({seeds})"


def commands():
    """A line for each figure: paper, system, figures and command."""
    results = recorded()
    for system in read_systems():
        for key in system["published"]:
            command = f"python {system['command']} --dataset {key}" if system["command"] else "-"
            yield f"{system['paper']}: {system['system']}: {cell(system, key, results)}: {command}"


# ------------------------------------------------------------------------------------------------ the tables


def column(key):
    """The head of a key's column: its data set, with imbalance factor, network and length."""
    dataset, *words = key.split()
    options = dict(zip(words[:-1], words[1:], strict=True))
    head = [SETS[dataset]]
    if "--imbalance" in options:
        head.append(options["--imbalance"])
    if "--arch" in options:
        kind, depth = re.match(r"([a-z_]*)(\d*)", options["--arch"]).groups()
        head.append(f"{NETWORKS[kind]}-{depth}")
    if options.get("--recipe") == "long":
        head.append("long")
    return ", ".join(head)


def split(columns):
    """The columns as those of one table or, where they are too many, of several, by kind of data set."""
    parts = by_start(columns, "CIFAR|MNIST") if len(columns) > MOST else [columns]
    tables = []
    for part in parts:
        tables += by_start(part, "[^,]+") if len(part) > MOST else [part]
    return tables


def by_start(columns, pattern):
    """The columns in groups that have the same match of the pattern, or none."""
    parts = {}
    for name in columns:
        found = re.search(pattern, name)
        parts.setdefault(found and found[0], []).append(name)
    return list(parts.values())


def of_systems(systems, results):
    """The tables of one paper, as markdown, unpadded: they are long."""
    rows = []
    for system in systems:
        command = f"`{system['command']}`" if system["command"] else "-"
        figures = {column(key): cell(system, key, results) for key in system["published"]}
        rows.append(([system["system"], command], figures))
    return in_columns(["system", "command"], rows)


def of_dataset(dataset, results):
    """The tables of one data set: what each paper says of each system, as markdown."""
    rows = []
    for system in read_systems():
        keys = [key for key in system["published"] if key.split()[0] == dataset]
        script = f"`{system['command'].split()[0]}`" if system["command"] else "-"
        figures = {column(key): cell(system, key, results) for key in keys}
        rows.append(([system["system"], system["paper"], script], figures))
    return in_columns(["system", "paper", "script"], rows)


def in_columns(heads, rows):
    """Tables of rows (first cells, {column: figures}). A row without a figure is left out."""
    columns = list(dict.fromkeys(name for _, figures in rows for name in figures))
    columns.sort(key=lambda name: list(SETS.values()).index(name.split(",")[0]))
    tables = []
    for names in split(columns):
        lines = [[*heads, *names], ["---"] * (len(heads) + len(names))]
        for first, figures in rows:
            if any(name in figures for name in names):
                lines.append([*first, *[figures.get(name, "") for name in names]])
        tables.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(tables)


def of_methods(results):
    """A row for each of METHODS, with its figures at imbalance 100 and on ImageNet-LT."""
    systems = {(system["paper"], system["system"]): system for system in read_systems()}
    heads = ["CIFAR-10, 100", "CIFAR-100, 100", "ImageNet-LT"]
    lines = [["method", "paper", "script", *heads], ["---"] * 6]
    for paper, name in METHODS:
        system = systems[paper, name]
        script = system["command"].split()[0]
        page = f"[`{script}`](docs/{script.removesuffix('.py')}.md)"
        row = {}
        for key in system["published"]:
            head, _, network = column(key).partition(", ResNet-")
            row.setdefault(head, cell(system, key, results) + f", ResNet-{network}" * bool(network))
        lines.append([name, paper, page, *[row.get(head, "") for head in heads]])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def of_runs(file):
    """A row for each result in a file: its system, the published figure, ours, and how it was run."""
    results = [json.loads(line) for line in (ROOT / file).open()]
    figures = {}
    for system in read_systems():
        for key, published in system["published"].items():
            command = f"{system['command']} --dataset {key}"
            for result in matching(command, results) if system["command"] else []:
                figures.setdefault(result["command"], (system["system"], published))
    heads = ["system", "published", "ours", "many", "medium", "best tested"]
    facts = ["seed", "precision", "threads", "commit"]
    lines = [[*heads, *facts, "minutes"], ["---"] * 11]
    for result in results:
        name, published = figures.get(result["command"], (result["args"].get("classifier"), "-"))
        numbers = [f"{result[name]:.1f}" for name in ("all", "many", "medium", "best_on_test")]
        told = [str(result[name]) for name in facts]
        lines.append([name, str(published), *numbers, *told, f"{result['seconds'] / 60:.0f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def table(what):
    """The markdown of `methods`, `systems PAPER`, `figures DATASET`, `runs FILE`, or of a file of results."""
    if what == "methods":
        return of_methods(recorded())
    if what.startswith("systems "):
        paper = what.removeprefix("systems ")
        systems = [system for system in read_systems() if system["paper"] == paper]
        if not systems:
            raise Refused(f"table: {what}: no such paper; there are {', '.join(papers())}")
        return of_systems(systems, recorded())
    if what.startswith("figures "):
        return of_dataset(what.removeprefix("figures "), recorded())
    if what.startswith("runs "):
        return of_runs(what.removeprefix("runs "))
    results = compare.read([ROOT / what])
    return compare.markdown(compare.table_of(compare.grouped(results)))


def filled(text):
    """The text of a page with its tables as they should be."""
    return MARKED.sub(lambda found: f"{found[1]}\n{table(found[2])}\n\n{found[3]}", text)


def pages():
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main(words):
    parser = tools.parser("tables", __doc__)
    parser.add_argument("--commands", action="store_true", help="print a line for each figure instead")
    args = parser.parse_args(words)
    if args.commands:
        for line in commands():
            print(line)
        return
    for page in pages():
        text = page.read_text()
        if filled(text) != text:
            page.write_text(filled(text))
            cli.say(f"filled {page.relative_to(ROOT)}")


if __name__ == "__main__":
    tools.run(main)
