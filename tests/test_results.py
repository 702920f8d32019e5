"""What the README and the pages say is what the rows in results/data/ say."""
import csv
import importlib.util
import re

import pytest

from conftest import ROOT
from support import compare


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
    measure = finding.TASKS[task].measure
    starts, checkpoints = finding.read_rows(finding.TASKS[task])
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


@pytest.mark.parametrize("task, page, said", [
    ("GP-L", "gp_l.md", (8.7, 0.5)), ("V-IRL-L", "virl_l.md", (64.1, 1.7))])
def test_the_paired_difference_of_the_arms_is_that_of_the_rows(finding, task, page, said):
    measure = finding.TASKS[task].measure
    _, checkpoints = finding.read_rows(finding.TASKS[task])
    ends = {}            # (arm, start) -> the other rule at the last checkpoint
    for row in sorted(checkpoints, key=lambda row: int(row["step"])):
        if row["split"] == "rule_ood":
            ends[row["arm"], row["start"]] = float(row[measure])
    starts = sorted({start for _, start in ends})
    differences = [ends["RL", start] - ends["SFT", start] for start in starts]
    mean, error = compare.mean_and_standard_error(differences)
    assert (round(mean, 1), round(error, 1)) == said
    assert f"+{said[0]} ± {said[1]}" in (ROOT / "results" / page).read_text()


def test_the_figure_asks_for_one_file(finding, capsys):
    for arguments in ([], ["a.png", "b.png"], ["no/such/folder/a.png"]):
        with pytest.raises(SystemExit):
            finding.main(arguments)
        assert "expected one file to draw into" in capsys.readouterr().err


def test_the_table_of_the_pretrained_model_is_that_of_its_rows():
    rows = {}
    with open(ROOT / "results" / "data" / "pretrained_every_evaluation.csv") as file:
        for row in csv.DictReader(file):
            arm = row["arm"].split(",")[0]
            rows[arm, row["step"], row["split"]] = row
    page = (ROOT / "results" / "pretrained.md").read_text()
    lines = re.findall(r"^\| (start|SFT|RL)(?:, (\d+) \w+)? \| (.*) \|$", page, re.MULTILINE)
    assert len(lines) >= 7
    for arm, step, cells in lines:
        of_id, of_other = (rows[arm, step or "0", split] for split in ("id", "rule_ood"))

        def cell(row, name):
            return f"{row[name]} ± {row[name + '_error']}"
        assert cells.split(" | ") == [
            f"{int(of_id['gflops']):,}", cell(of_id, "paper_step_accuracy"),
            cell(of_id, "first_try_turn"), cell(of_other, "paper_step_accuracy"),
            cell(of_other, "first_try_turn"), f"{of_id['success']}, {of_other['success']}"]


def test_the_words_of_the_pretrained_model_are_those_of_its_rows():
    page = " ".join((ROOT / "results" / "pretrained.md").read_text().split())
    said = {}
    with open(ROOT / "results" / "data" / "pretrained_words.csv") as file:
        for row in csv.DictReader(file):
            said[row["arm"], row["step"], row["split"]] = row
    assert "36 replies of each rule" in page
    start = said["start", "0", "id"]["turns_compass"], said["start", "0", "rule_ood"][
        "turns_left_right"]
    assert start == ("35", "35") and "rule 35 have a compass word" in page
    assert said["SFT", "20", "rule_ood"]["turns_compass"] == "36" and "all 36 replies" in page
    five = said["RL", "5", "rule_ood"]
    assert (five["turns_left_right"], five["turns_compass"]) == ("26", "7")
    assert "26 of the 36 replies say left or right, and seven a compass word" in page
    for split in ("id", "rule_ood"):
        ten = said["RL", "10", split]
        assert int(ten["forward_without_action"]) > int(ten["forward_with_action"])
    with open(ROOT / "results" / "data" / "pretrained_updates.csv") as file:
        spread = [float(row["approx_kl"]) for row in csv.DictReader(file)]
    assert f"divergence is {min(spread):.2f} to {max(spread):.2f} in an update" in page
