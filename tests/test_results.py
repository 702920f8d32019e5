"""What the README's table says is what the rows in results/data/ say."""
import importlib.util
import re

import pytest

from conftest import ROOT


@pytest.fixture(scope="module")
def finding():
    spec = importlib.util.spec_from_file_location("finding", ROOT / "recipes" / "finding.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("task", ["GP-L", "V-IRL-L", "GP-VL"])
def test_the_readmes_table_has_the_means_and_errors_of_the_rows(finding, task):
    line = re.search(rf"^\| {task} \(.*$", (ROOT / "README.md").read_text(), re.M)[0]
    cells = [cell.strip().replace("*", "") for cell in line.split("|")[2:8]]
    name, measure, _, rl_setting = finding.TASKS[task]
    starts, checkpoints = finding.read_rows(name, rl_setting)
    expected = []
    for split in ("id", "rule_ood"):
        before = [row for row in starts if row["split"] == split]
        expected.append(finding.curve(before, measure)[-1])
        for arm in ("SFT", "RL"):
            rows = [row for row in checkpoints if (row["arm"], row["split"]) == (arm, split)]
            expected.append(finding.curve(rows, measure)[-1])
    for cell, (_, mean, error) in zip(cells, expected, strict=True):
        said = [float(number) for number in re.findall(r"\d+\.?\d*", cell)]
        digits = 1 if "." in cell else 0
        assert said == [round(mean, digits), round(error, digits)][:len(said)], (cell, mean, error)
