"""The tables of every system: their commands, their figures, what is found of ours, and their pages."""

import contextlib
import io

import pytest

from common import cli
from tests.conftest import ROOT, SCRIPTS, refusal
from tools import tables

SYSTEMS = tables.read_systems()
COMMANDS = sum(system["command"] is not None for system in SYSTEMS)
PAPERS = [
    "CMO",
    "BBN",
    "Balanced Meta-Softmax",
    "Decoupled training",
    "CSA",
    "Meta-learned weights",
    "Bag of tricks",
    "Equalization losses",
    "Class rectification loss",
]
CE = "cmo.py --loss ce --p-mix 0 --dataset cifar100_lt --imbalance 50"


@pytest.mark.parametrize("paper", PAPERS)
def test_every_command_is_understood(paper):
    for system in SYSTEMS:
        if system["paper"] == paper and system["command"]:
            for key in system["published"]:
                assert isinstance(tables.parse(f"{system['command']} --dataset {key}"), cli.Args)


def test_every_line_is_a_system():
    names = [(system["paper"], system["system"]) for system in SYSTEMS]
    assert len(set(names)) == len(names) and tables.papers() == PAPERS
    for published in [system["published"] for system in SYSTEMS]:
        assert published and all(figure is None or 0 < figure < 100 for figure in published.values())
        assert len({tables.column(key) for key in published}) == len(published)


def test_none_is_lost():
    """Systems and figures of the papers' tables; every script has some."""
    assert COMMANDS >= 204 and sum(len(system["published"]) for system in SYSTEMS) == 888
    assert {system["command"].split()[0] for system in SYSTEMS if system["command"]} == set(SCRIPTS)


def test_settings_of_an_imbalance_are_told():
    """Where a paper counts iterations, and so has other epochs with another imbalance."""
    balms = [system for system in SYSTEMS if (system["paper"], system["system"]) == (PAPERS[2], "BALMS")]
    epochs = []
    for key in balms[0]["published"]:
        if key.startswith("cifar"):
            args = tables.parse(f"{balms[0]['command']} --dataset {key}")
            epochs.append((args.epochs, args.warmup, args.stage2_epochs))
    assert epochs == [
        (591, 37, 96),
        (520, 32, 84),
        (325, 20, 52),
        (685, 43, 112),
        (591, 37, 96),
        (334, 21, 53),
    ]


# Ours


def recorded(seed, value, command=CE, **changed):
    """A result as it is recorded."""
    with contextlib.redirect_stderr(io.StringIO()):
        args = vars(tables.parse(command)) | dict(seed=seed, output_dir=f"x{seed}", eval_every=5) | changed
    return {"script": "cmo.py", "seed": seed, "all": value, "args": args}


def test_recorded_results_are_found():
    """Those of the same options, whatever the seed."""
    results = [recorded(seed, 10.0) for seed in (0, 1)]
    assert tables.matching(CE, results) == results
    for more in (" --lr 0.05", " --drw", " --epochs 4", " --recipe equal"):
        assert tables.matching(CE + more, results) == []
    assert tables.matching(CE.replace("cifar100_lt", "cifar10_lt"), results) == []
    other = [result | {"script": "csa.py"} for result in results]
    assert tables.matching(CE, other) == []


def test_stage_1_of_the_same_training():
    """Cross-entropy of cmo.py is what decoupled_crt.py begins with (test_decoupled_crt.py has the proof)."""
    command = "decoupled_crt.py --classifier crt --dataset cifar10_lt"
    for folder, found in (("runs/ce/cifar10_lt_100_0", 1), ("runs/cmo/cifar10_lt_100_0", 0)):
        result = recorded(0, 10.0, command, stage1=folder) | {"script": "decoupled_crt.py"}
        assert len(tables.matching(command, [result])) == found


def test_results_of_other_versions_of_a_script():
    """What a result lacks has its default; of an option that is no more the meaning is not known."""
    older = recorded(0, 10.0)
    del older["args"]["weighted"]
    assert tables.matching(CE, [older]) == [older]
    assert tables.matching(CE + " --weighted both", [older]) == []
    former = recorded(0, 10.0, paste="none")
    assert tables.matching(CE, [former]) == []


def test_a_cell():
    system = {"command": "cmo.py --loss ce --p-mix 0", "published": {"cifar100_lt --imbalance 50": 44.0}}
    results = [recorded(0, 40.0), recorded(0, 44.0), recorded(1, 45.0)]
    assert tables.cell(system, "cifar100_lt --imbalance 50", results) == "44.0 / 43.0 (2)"
    assert tables.cell(system, "cifar100_lt --imbalance 50", []) == "44.0 / -"
    system = {"command": None, "published": {"cifar100_lt": None}}
    assert tables.cell(system, "cifar100_lt", results) == "- / -"


def test_recorded_results_are_read():
    results = tables.recorded()
    assert len(results) > 60 and all("script" in result for result in results)


def test_commands(capsys):
    tables.main(["--commands"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 888
    assert f"CMO: CE: 44.0 / -: python {CE}" in [line.replace("(1)", "-") for line in lines]


# Tables


@pytest.mark.parametrize(
    "key, head",
    [
        ("cifar100_lt --imbalance 50 --beta 0.99", "CIFAR-100, 50"),
        ("cifar100_lt --imbalance 200 --recipe long", "CIFAR-100, 200, long"),
        ("imagenet_lt --arch resnext50_32x4d", "ImageNet-LT, ResNeXt-50"),
        ("inat2018 --arch wide_resnet50_2", "iNat 2018, Wide ResNet-50"),
        ("places_lt --stage1 runs/places", "Places-LT"),
    ],
)
def test_heads_of_columns(key, head):
    assert tables.column(key) == head


def test_wide_tables_are_split():
    heads = ["CIFAR-10, 100", "CIFAR-100, 100", "MNIST-LT, 100", "Places-LT"]
    assert tables.split(heads) == [heads]
    many = [f"CIFAR-10, {i}" for i in range(4)] + [f"CIFAR-100, {i}" for i in range(5)]
    assert [len(part) for part in tables.split(many)] == [4, 5]
    assert [len(part) for part in tables.split(many[2:] + heads[2:])] == [7, 1, 1]


def test_a_table_of_systems():
    systems = [
        {"system": "CE", "command": "cmo.py", "published": {"inat2018": 61.0, "cifar100_lt": 38.6}},
        {"system": "IB", "command": None, "published": {"inat2018": 65.4}},
    ]
    assert tables.of_systems(systems, []).splitlines() == [
        "| system | command | CIFAR-100 | iNat 2018 |",
        "| --- | --- | --- | --- |",
        "| CE | `cmo.py` | 38.6 / - | 61.0 / - |",
        "| IB | - |  | 65.4 / - |",
    ]


def test_a_page_is_filled(tmp_path, monkeypatch, capsys):
    """Between its marks alone, and once."""
    text = "a\n<!-- table: systems BBN -->\nold\n<!-- end of table -->\nb\n"
    page = tmp_path / "docs" / "x.md"
    page.parent.mkdir()
    page.write_text(text)
    (tmp_path / "README.md").write_text("no table")
    monkeypatch.setattr(tables, "pages", lambda: [tmp_path / "README.md", page])
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "table", lambda what: f"| {what} |")
    tables.main([])
    assert capsys.readouterr().err == "filled docs/x.md\n"
    filled = "a\n<!-- table: systems BBN -->\n\n| systems BBN |\n\n<!-- end of table -->\nb\n"
    assert page.read_text() == filled == tables.filled(filled)
    tables.main([])
    assert capsys.readouterr().err == ""


def test_a_table_of_recorded_runs():
    lines = tables.table("results/synthetic.jsonl").splitlines()
    assert len(lines) == 25 and lines[0].startswith("| row ") and lines[2].startswith("| CE ")
    lines = tables.table("runs results/cifar10_lt.jsonl").splitlines()
    assert lines[2].startswith("| CE | 70.36 | 70.4 | 77.9 | 40.4 | 70.6 | 0 | no | 1 | b612699 |")
    assert [line.split(" | ")[1] for line in lines[5:8]] == ["77.54", "-", "-"]  # Balanced Softmax, tau, NCM


def test_a_table_of_a_data_set():
    """Every system that any paper has on it, under the same heads."""
    on_places = [system for system in SYSTEMS if any("places_lt" in key for key in system["published"])]
    lines = tables.table("figures places_lt").splitlines()
    assert lines[0] == "| system | paper | script | Places-LT |" and len(lines) == 2 + len(on_places)
    crt = "| cRT | Decoupled training | `decoupled_crt.py` | 36.7 / - |"
    assert crt in lines


def test_tables_that_are_not_there():
    assert refusal(tables.table, "systems XYZ").startswith(
        "table: systems XYZ: no such paper; there are CMO,"
    )
    assert "not a finished run" in refusal(tables.table, "results/nothing.jsonl")


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_pages_are_up_to_date(page):
    text = page.read_text()
    assert tables.filled(text) == text
