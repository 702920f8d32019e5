"""The house: which file may import which, and that what the README numbers is marked at the place it names."""
import ast
import re

import pytest

from conftest import ROOT

SIX = ("verify", "envs", "model", "sft", "rl", "evaluate")
SCRIPTS = ("sft", "rl", "evaluate")
ALLOWED = {"verify": set(), "envs": {"verify"}, "model": set(), **{script: {"envs", "model"} for script in SCRIPTS}}


def imported(path):
    """The first names of all modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


@pytest.mark.parametrize("name", SIX)
def test_the_six_files_import_along_the_arrows_only_and_stay_short(name):
    path = ROOT / f"{name}.py"
    assert set(imported(path)) & set(SIX) <= ALLOWED[name]
    assert len(path.read_text().splitlines()) <= 620
    if name in ("verify", "envs"):
        assert not set(imported(path)) & {"torch", "transformers"}


def test_support_uses_none_of_the_six_but_for_the_script_that_reads_the_environments_texts():
    for path in (ROOT / "support").glob("*.py"):
        assert set(imported(path)) & set(SIX) == ({"envs"} if path.name == "tiny.py" else set()), path


def find_code(name):
    """(source, node) of a name such as "envs.GeneralPoints.lay_out"."""
    module, *names = name.split(".")
    path = next(path for path in (ROOT / f"{module}.py", ROOT / "support" / f"{module}.py") if path.is_file())
    source, node = path.read_text(), ast.parse(path.read_text())
    for part in names:
        node = next((child for child in node.body if getattr(child, "name", "") == part
                     or isinstance(child, ast.Assign) and getattr(child.targets[0], "id", "") == part), None)
        assert node, f"{name} is not there"
    return source, node


def test_all_code_that_the_readme_names_is_there():
    named = set(re.findall(r"`((?:%s)\.(?!py\b)[A-Za-z_.]+)" % "|".join(SIX), (ROOT / "README.md").read_text()))
    assert len(named) > 30
    for name in named:
        find_code(name.rstrip("."))


def test_every_numbered_difference_is_marked_once_or_more_in_the_function_that_the_readme_names():
    section = (ROOT / "README.md").read_text().partition("## Where we follow the paper")[2].partition("\n## ")[0]
    items = re.findall(r"^(\d+)\. (.*?)(?=\n\d+\. |\n\n)", section, re.M | re.S)
    assert [int(number) for number, _ in items] == list(range(1, 27))
    for number, text in items:
        name = re.findall(r"`([\w.]+)`", text)[-1]
        source, node = find_code(name)
        place = "\n".join(source.splitlines()[node.lineno - 1:node.end_lineno])
        assert re.search(rf"differs {number}:", place), f"{number} is not marked in {name}"
