"""The house: which file may import which, how long files and pages may be, what pages may name."""
import ast
import re

import pytest

from conftest import ROOT

SIX = ("verify", "envs", "model", "sft", "rl", "evaluate")
SCRIPTS = ("sft", "rl", "evaluate")
ALLOWED = {"verify": set(), "envs": {"verify"}, "model": set(),
           **{script: {"envs", "model"} for script in SCRIPTS}}
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"),
                *(ROOT / "results").rglob("*.md")])
CODE = sorted([*ROOT.glob("*.py"), ROOT / ".ci" / "run",
               *(path for folder in ("support", "recipes", "data", "tests")
                 for path in (ROOT / folder).iterdir() if path.suffix in (".py", ".sh"))])


def name_of(path):
    return str(path.relative_to(ROOT))


def imported(path):
    """The first names of all modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


# ---- Files -------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", SIX)
def test_the_six_files_import_along_the_arrows_only(name):
    path = ROOT / f"{name}.py"
    assert set(imported(path)) & set(SIX) <= ALLOWED[name]
    if name in ("verify", "envs"):
        assert not set(imported(path)) & {"torch", "transformers"}


def test_support_uses_none_of_the_six_but_for_the_script_that_reads_the_environments_texts():
    for path in (ROOT / "support").glob("*.py"):
        allowed = {"envs"} if path.name == "tiny.py" else set()
        assert set(imported(path)) & set(SIX) == allowed, path


def test_no_script_imports_a_script():
    for path in CODE:
        if path.suffix == ".py" and path.parent.name in (ROOT.name, "support", "recipes", "data"):
            assert not set(imported(path)) & set(SCRIPTS), path


def test_the_six_files_can_be_read_in_an_evening():
    lines = {name: len((ROOT / f"{name}.py").read_text().splitlines()) for name in SIX}
    assert max(lines.values()) <= 600, lines
    assert sum(lines.values()) <= 2600, lines


@pytest.mark.parametrize("path", CODE, ids=name_of)
def test_no_line_of_code_is_wider_than_100_columns(path):
    wide = [n for n, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 100]
    assert not wide


# ---- Pages -------------------------------------------------------------------------------------

def num_words(text):
    return len(re.findall(r"\S*\w\S*", text.replace("|", " ")))


def sentences(text):
    """The sentences of a page; code, tables and headings are none. `code` in a line is one word."""
    text = re.sub(r"```.*?```", "\n\n", text, flags=re.S)
    text = re.sub(r"^(\||#|!\[).*$", "", text, flags=re.M)             # tables, headings, pictures
    text = re.sub(r"^\s*(?:[-*]|\d+\.) ", "\n", text, flags=re.M)      # each list item for itself
    text = re.sub(r"`[^`]*`", "code", text)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)               # of a link its words
    for paragraph in re.split(r"\n\s*\n", text):
        yield from re.split(r"(?<=[.!?:;])[\"')*]*\s+", " ".join(paragraph.split()))


def prose_of(docstring):
    """A docstring without examples, formulas and tables: indented lines, and those with gaps."""
    kept = []
    for line in docstring.splitlines():
        is_prose = not line.startswith("    ") and "  " not in line.strip()
        kept.append(line if is_prose else "")
    return "\n".join(kept)


def docstrings(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            yield ast.get_docstring(node) or ""


def test_the_readme_can_be_read_in_a_few_minutes():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 200
    first_command = next(n for n, line in enumerate(lines, 1) if line.startswith("git clone"))
    assert first_command <= 45
    told = dict(re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", "\n".join(lines), re.MULTILINE))
    assert len(told) == 6
    for name, num in told.items():
        assert int(num) == len((ROOT / name).read_text().splitlines()), name


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_no_blank_line_cuts_a_table(path):
    """What follows would be shown as text with bars."""
    lines = path.read_text().splitlines()
    for above, blank, row, below in zip(lines, lines[1:], lines[2:], lines[3:]):
        if above.startswith("|") and not blank and row.startswith("|"):
            assert re.match(r"\|[- :|]+$", below), row


def test_the_results_can_be_read():
    words = {path.name: num_words(path.read_text()) for path in (ROOT / "results").glob("*.md")}
    assert max(words.values()) <= 2500, words
    of_tiny_models = sum(num for name, num in words.items() if name != "pretrained.md")
    assert of_tiny_models <= 12_000, words


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_pages_have_short_lines_and_short_sentences(path):
    text = path.read_text()
    wide = [line for line in re.sub(r"```.*?```", "", text, flags=re.S).splitlines()
            if len(line) > 100 and not line.startswith("|") and "](" not in line]
    assert not wide
    assert not [each for each in sentences(text) if num_words(each) > 25]


@pytest.mark.parametrize("path", [path for path in CODE if path.suffix == ".py"], ids=name_of)
def test_docstrings_have_short_sentences(path):
    for docstring in docstrings(path):
        assert not [each for each in sentences(prose_of(docstring)) if num_words(each) > 25]


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_every_link_leads_somewhere(path):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text()):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target


def test_every_file_that_a_page_names_is_there():
    pattern = r"`((?:data|docs|recipes|results|support|tests)/[\w./-]+\.\w+)`"
    for path in PAGES:
        for named in re.findall(pattern, path.read_text()):
            assert (ROOT / named).exists(), f"{path}: {named}"


# ---- Pages and code ----------------------------------------------------------------------------

def find_code(name):
    """(source, node) of a name such as "envs.GeneralPoints.lay_out"."""
    module, *names = name.split(".")
    files = (ROOT / f"{module}.py", ROOT / "support" / f"{module}.py")
    path = next((path for path in files if path.is_file()), None)
    assert path, f"{name}: there is no such file"
    source, node = path.read_text(), ast.parse(path.read_text())
    for part in names:
        node = next((child for child in node.body if part in names_of(child)), None)
        assert node, f"{name} is not there"
    return source, node


def names_of(node):
    """What a statement defines: the name of a function or class, or of what is assigned."""
    if isinstance(node, ast.Assign):
        return [getattr(target, "id", "") for target in node.targets]
    return [getattr(node, "name", "")]


def test_all_code_that_the_pages_name_is_there():
    pattern = r"`((?:%s|running|reading|loading|compare)\.(?!py\b)[A-Za-z_.]+)`" % "|".join(SIX)
    named = {name for path in PAGES for name in re.findall(pattern, path.read_text())}
    assert len(named) > 30
    for name in named:
        find_code(name)


def test_the_readme_says_how_long_each_of_the_six_is():
    readme = (ROOT / "README.md").read_text()
    for name in SIX:
        said = int(re.search(rf"^\| `{name}\.py` \| (\d+) \|", readme, re.M)[1])
        assert abs(said - len((ROOT / f"{name}.py").read_text().splitlines())) <= 10


def test_every_numbered_difference_is_marked_in_the_function_that_its_list_names():
    page = (ROOT / "docs" / "differences.md").read_text().partition("## Kept on purpose")[0]
    items = re.findall(r"^(\d+)\. (.*?)(?=\n\d+\. |\n\n|\Z)", page, re.M | re.S)
    assert [int(number) for number, _ in items] == list(range(1, 33))
    for number, text in items:
        name = re.findall(r"`([\w.]+)`", text)[-1]
        source, node = find_code(name)
        place = "\n".join(source.splitlines()[node.lineno - 1:node.end_lineno])
        assert re.search(rf"differs {number}:", place), f"{number} is not marked in {name}"
