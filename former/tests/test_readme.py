"""The README's tables are what its recorded results say."""

import json
import re

import pytest

from common import compare
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
TABLES = re.findall(r"<!-- (results/\S+\.jsonl) -->\n\n((?:\|.*\n)+)", README)


def test_every_marker_has_its_table():
    assert len(TABLES) == README.count("<!-- results/") > 0


@pytest.mark.parametrize("file, table", TABLES, ids=[file for file, _ in TABLES])
def test_tables_are_those_of_the_results(file, table):
    results = compare.read([ROOT / file])
    assert table.strip() == compare.markdown(compare.rows(results))


def test_published_figures_are_those_of_the_file():
    """Rows `| data set | row | all (many / medium / few) |` under the marker."""
    table = README.split("<!-- published: results/published.jsonl -->\n\n")[1].split("\n\n")[0]
    for line in map(json.loads, (ROOT / "results/published.jsonl").open()):
        figures = "{all:.1f} | {many:.1f} | {medium:.1f} | {few:.1f}".format(**line)
        assert f"| {line['dataset']} | {line['row']} | {figures} |" in table


def test_recorded_results_are_whole():
    for file in (ROOT / "results").glob("*.jsonl"):
        if file.name in ("published.jsonl", "systems.jsonl"):  # the figures of others
            continue
        for result in map(json.loads, file.open()):
            assert result["commit"]
            if "script" in result:
                assert (ROOT / result["script"]).exists() and len(result["weights_sha256"]) == 64
