"""What the pages say: commands that the programs understand, links, an excerpt of a diff, recorded results.

Tables are tested in test_systems.py.
"""

import argparse
import importlib
import json
import re
import shlex
import subprocess
import sys

import pytest
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser

from common import cli
from tests.conftest import ROOT, SCRIPTS, parse

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
PLACEHOLDERS = {"NAME", "KEY", "COMMAND", "SCRIPT", "N", "..."}  # a command with one is not to be run
CODE_BLOCK = re.compile(r"(?<=\n\n)(?: {4}.*\n|\n(?= {4}))+")
INLINE = re.compile(r"`([^`\n]+)`")
COMMAND = re.compile(
    r"(?:srun )?(?:[A-Z_]+=\S+ )*((?:python3?|accelerate launch|torchrun) .*?(?:\.py|-m \w).*)"
)
OF_TABLE = re.compile(r"(\w+\.py(?: .*)?)")  # of which the table's head has the data set


def code_blocks(text):
    """The lines of each indented block, a list each, without the indentation."""
    return [re.sub("(?m)^ {4}", "", block).splitlines() for block in CODE_BLOCK.findall(text)]


def commands(page):
    """Commands in the page's code blocks and in backticks, without `ENVIRONMENT=value`."""
    text = page.read_text()
    found = []
    for block in code_blocks(text):
        for line in "\n".join(block).replace("\\\n", " ").splitlines():
            for part in re.split(r" (?:&&|[|;>&]) ", line.removeprefix("$ ")):
                found.append(COMMAND.fullmatch(part.strip()))
    for code in INLINE.findall(text):
        found.append(COMMAND.fullmatch(code) or OF_TABLE.fullmatch(code))
    every = dict.fromkeys(match[1] for match in found if match)
    return [command for command in every if PLACEHOLDERS.isdisjoint(command.split())]


def split(command):
    """(script, its words), by the parser of what starts it."""
    command = command.replace("my_method.py", "cmo.py").replace(" --tau 1.5", "")  # the README's copy of it
    words = shlex.split(command, comments=True)
    if words[0] == "accelerate":
        launched = launch_command_parser().parse_args(words[2:])
        return launched.training_script, launched.training_script_args
    if words[0] == "torchrun":
        launched = get_args_parser().parse_args(words[1:])
        return launched.training_script, launched.training_script_args
    if words[0].startswith("python"):
        words = words[1:]
    return words[0], words[1:]


ALL = [(page, command) for page in PAGES for command in commands(page)]
OF_MODULES = dict.fromkeys(command for _, command in ALL if command.startswith("python -m "))


def is_understood(command):
    """Whether its script takes the words; those of a table with one of its data sets."""
    script, words = split(command)
    starts = [[]]
    if OF_TABLE.fullmatch(command) and "--dataset" not in words:
        recipes = importlib.import_module(script.removesuffix(".py")).RECIPES
        starts = [["--dataset", name] for name in recipes if " " not in name]
    for start in starts:
        try:
            parse(script, *start, *[word for word in words if word != "--help"])
            return True
        except cli.Refused as refused:
            print(f"{command}: {refused}")
    return False


def test_commands_are_found():
    """The patterns above miss no script, no launcher and no program."""
    assert {split(command)[0] for _, command in ALL} == {*SCRIPTS, "-m"}
    starts = ("python cmo.py", "python -m tools.", "accelerate launch ", "torchrun ", "cmo.py ")
    for start in starts:
        assert any(command.startswith(start) for _, command in ALL)
    for page in PAGES:
        found = commands(page)
        for line in re.findall(
            r"(?m)^    (?:\$ )?((?:python|accelerate launch|torchrun) .*)", page.read_text()
        ):
            start = re.split(r" (?:\\|&&|\|)", line)[0].strip()
            assert any(command.startswith(start) for command in found), line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_scripts_are_understood(page):
    of_scripts = [command for command in commands(page) if split(command)[0] != "-m"]
    assert [command for command in of_scripts if not is_understood(command)] == []


class Understood(Exception):
    """The parser has read all words."""


def stop_after_parsing(self, *given, parse_args=argparse.ArgumentParser.parse_args):
    self.allow_abbrev = False
    parse_args(self, *given)
    raise Understood


@pytest.mark.parametrize("command", OF_MODULES)
def test_commands_of_programs_are_understood(command, monkeypatch):
    _, [name, *words] = split(command)
    module = importlib.import_module(name)
    if name.startswith(("tools.", "benchmarks.")) and words:  # without words it is just named
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop_after_parsing)
        monkeypatch.setattr(sys, "argv", [name, *words])
        with pytest.raises(Understood):
            module.main(*([words] if name.startswith("tools.") else []))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_exist(page):
    """Links to files, and files of the project that are named in backticks."""
    text = page.read_text()
    links = re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", text)
    targets = [(first or second).partition("#")[0] for first, second in links]
    missing = []
    for target in targets:
        if target and "://" not in target and not (page.parent / target).exists():
            missing.append(target)
    for name in re.findall(r"`((?:results|docs|tools|common|tests|benchmarks)/[\w./]*\w)`", text):
        if not (ROOT / name).exists():
            missing.append(name)
    assert not missing


def test_readme_is_short():
    assert len(README.read_text().splitlines()) <= 250


def test_excerpt_of_a_diff():
    """Lines of the diff, in its order; `...` stands for what is left out."""
    (block,) = [block for block in code_blocks(README.read_text()) if block[0].startswith("$ diff ")]
    words = shlex.split(block[0])[1:]
    assert words[-2:] == ["cmo.py", "ride.py"]
    diff = subprocess.run(words, capture_output=True, text=True, cwd=ROOT).stdout.splitlines()
    excerpt = [line for line in block[1:] if line.strip() not in ("", "...")]
    assert len(excerpt) > 5 and [line for line in excerpt if line not in diff] == []
    rest = iter(diff)
    assert all(line in rest for line in excerpt)


def test_recorded_results_are_whole():
    for file in (ROOT / "results").glob("*.jsonl"):
        if file.name == "systems.jsonl":  # the figures of others
            continue
        for result in map(json.loads, file.open()):
            assert result["commit"], file
            if "script" in result:
                assert (ROOT / result["script"]).exists() and len(result["weights_sha256"]) == 64, file
