"""The tables of every system: their commands, their figures and what is found of ours."""

import pytest

from benchmarks import systems
from common import cli
from tests.conftest import ROOT

SYSTEMS = systems.read_systems()
CB_RS = "decoupled_crt.py --classifier joint --sampling class --dataset mnist_lt --imbalance 100"


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: f"{system['paper']}: {system['system']}")
def test_every_command_is_understood(system):
    if system["command"]:
        keys = [f" --dataset {key}" for key in system["published"]] or [""]
        assert all(isinstance(systems.parse(system["command"] + key), cli.Args) for key in keys)


def test_every_line_is_a_system():
    names = [(system["paper"], system["system"]) for system in SYSTEMS]
    assert len(set(names)) == len(names) and {paper for paper, *_ in names} == set(systems.PAPERS)
    for published in [system["published"] for system in SYSTEMS]:
        assert published and all(figure is None or 0 < figure < 100 for figure in published.values())
        assert len({systems.column(key) for key in published}) == len(published)


def test_the_readme_has_the_tables():
    readme = (ROOT / "README.md").read_text()
    section = readme.split("<!-- systems -->\n\n")[1].split("\n\n<!-- end of systems -->")[0]
    assert section == systems.text()


def test_recorded_results_are_found():
    """Those of the same options, whatever the seed; not runs of another length, nor diverged ones."""
    results = systems.recorded()
    found = systems.matching(CB_RS, results)
    assert len(found) == 8 and {run["dataset"] for run in found} == {"mnist_lt"}
    assert {run["seed"] for run in found}.isdisjoint({2, 4})
    assert systems.matching(CB_RS + " --epochs 4", results) == []
    assert systems.matching(CB_RS + " --lr 0.05", results) != found
    assert systems.matching(CB_RS.replace("mnist_lt", "image_folder"), results) == []


def test_a_cell():
    system = next(s for s in SYSTEMS if (s["paper"], s["system"]) == ("CSA", "CB-RS"))
    assert systems.cell(system, "mnist_lt --imbalance 100", systems.recorded()) == "90.83 / 90.9 (8)"
    assert systems.cell(system, "mnist_lt --imbalance 100", []) == "90.83 / -"


@pytest.mark.parametrize(
    "key, head",
    [
        ("cifar100_lt --imbalance 50 --beta 0.99", "CIFAR-100, 50"),
        ("imagenet_lt --arch resnext50_32x4d", "ImageNet-LT, ResNeXt-50"),
        ("inat2018 --arch wide_resnet50_2", "iNat 2018, Wide ResNet-50"),
        ("places_lt --stage1 runs/places", "Places-LT"),
    ],
)
def test_heads_of_columns(key, head):
    assert systems.column(key) == head


def test_wide_tables_are_split():
    heads = ["CIFAR-10, 100", "CIFAR-100, 100", "MNIST-LT, 100", "Places-LT"]
    assert systems.split(heads) == [heads]
    many = [f"CIFAR-10, {i}" for i in range(4)] + [f"CIFAR-100, {i}" for i in range(5)]
    assert [len(part) for part in systems.split(many)] == [4, 5]
    assert [len(part) for part in systems.split(many[2:] + heads[2:])] == [7, 1, 1]
