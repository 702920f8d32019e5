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


# (task, what was planted) in rl_minus_sft.csv -> the file of its evaluations
EVALUATIONS = {("gp-l", "fault and mix-up, every try"): "gp_l",
               ("gp-l", "fault and mix-up, first tries"): "gp_l_first_tries",
               ("gp-l", "nothing"): "gp_l_no_faults",
               ("virl-l", "fault and mix-up"): "virl_l", ("virl-l", "nothing"): "virl_l_no_faults",
               ("gp-vl", "fault and mix-up"): "gp_vl", ("gp-vl", "nothing"): "gp_vl_no_faults"}


def read_data(name):
    with open(ROOT / "results" / "data" / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def scores_at(rows, method, setting, split, metric):
    """{start, or seed where there is one start: the score}.

    `setting` is a rate, before it RL's temperature, and behind it a checkpoint if not the last.
    """
    scores = {}
    words = setting.split(", ")
    checkpoint = words.pop().split()[0] if words[-1].endswith(("steps", "updates")) else None
    for row in sorted(rows, key=lambda row: int(row["step"])):
        # Rows of a single start name no setting: it has one of each method.
        of_setting = [row[name] for name in ("temperature", "learning_rate") if row.get(name)]
        wanted = row["arm"].upper() == method and row["split"] == split and row["step"] != "0"
        if wanted and of_setting in ([], words) and checkpoint in (None, row["step"]):
            scores[row.get("start", row["seed"])] = float(row[metric])
    return scores


@pytest.mark.parametrize("task, planted", EVALUATIONS)
def test_each_paired_difference_is_that_of_the_evaluations(task, planted):
    evaluations = read_data(f"{EVALUATIONS[task, planted]}_every_evaluation")
    found = [row for row in read_data("rl_minus_sft")
             if (row["task"], row["planted"]) == (task, planted)]
    assert found
    for row in found:
        rl, sft = (scores_at(evaluations, method, row[method.lower()], row["split"], row["metric"])
                   for method in ("RL", "SFT"))
        differences = []
        for i in range(6):
            if said := row[f"pair_{i}"]:
                differences.append(rl[str(i)] - sft[str(i)])
                assert differences[-1] == pytest.approx(float(said), abs=0.01), row
        mean, error = compare.mean_and_standard_error(differences)
        assert [len(differences), round(mean, 1), round(error, 1)] == [
            int(row["n"]), float(row["mean"]), float(row["error"])], row
        p = compare.p_value(mean, error, len(differences))
        assert row["p"] == (f"{p:.1g}" if len(differences) > 2 else ""), row


def lists_by_start():
    """Every list of changes or differences, start by start, in paired.csv and rl_minus_sft.csv."""
    paired = {}
    for row in read_data("paired"):
        for name in ("rl_change", "sft_change", "rl_minus_sft"):
            paired.setdefault((row["task"], row["mix_ups"], name), []).append(float(row[name]))
    lists = list(paired.values())
    for row in read_data("rl_minus_sft"):
        lists.append([float(row[f"pair_{i}"]) for i in range(6) if row[f"pair_{i}"]])
    return lists


@pytest.mark.parametrize("page, line", [
    ("gp_l.md", "RL, change"), ("gp_l.md", "RL - SFT"), ("virl_l.md", "RL"), ("virl_l.md", "SFT"),
    ("virl_l.md", "RL - SFT"), ("gp_vl.md", "RL - SFT at 1e-3"), ("gp_vl.md", "RL - SFT at 3e-4")])
def test_a_line_start_by_start_has_the_mean_error_and_p_of_its_numbers(page, line):
    text = (ROOT / "results" / page).read_text()
    cells = re.search(rf"^\| {line} \| (.*[+-]\d.*) \|$", text, re.M)[1].split(" | ")
    starts = [float(cell) for cell in cells if re.fullmatch(r"[+-][\d.]+", cell)]
    assert starts in lists_by_start()
    means = [i for i, cell in enumerate(cells) if "±" in cell]
    for i, values in zip(means, (starts, starts[3:])):       # promised: starts 3, 4 and 5
        mean, error = compare.mean_and_standard_error(values)
        said = [float(number) for number in cells[i].split(" ± ")]
        assert said == pytest.approx([mean, error], abs=0.101)
        p = compare.p_value(mean, error, len(values))
        under = re.fullmatch(r"< (\S+)", cells[i + 1])
        assert p < float(under[1]) if under else f"{p:.1g}" == f"{float(cells[i + 1]):.1g}"


@pytest.mark.parametrize("page, table", [
    ("gp_l.md", "gp_l_five_starts_table"), ("virl_l.md", "virl_l_six_starts_table"),
    ("gp_vl.md", "gp_vl_table")])
def test_each_score_with_its_change_is_one_of_the_rows(page, table):
    score = r"[\d.]+ \([+-][\d.]+ ± [\d.]+\)"
    said = re.findall(score, (ROOT / "results" / page).read_text())
    rows = {f"{row['end']} ({row['change']} ± {row['change_error']})" for row in read_data(table)}
    assert len(said) >= 8 and set(said) <= rows


def test_rl_ends_above_the_first_checkpoint_of_sft_at_the_smaller_rate():
    """The contrast on GP-L in which SFT is not at 0, and is ahead on the training rule."""
    evaluations = read_data("gp_l_every_evaluation")
    rl = scores_at(evaluations, "RL", "0.2, 5e-5", "rule_ood", "success")
    sft = scores_at(evaluations, "SFT", "3e-4, 40 steps", "rule_ood", "success")
    mean, error = compare.mean_and_standard_error([rl[start] - sft[start] for start in sft])
    said = f"{mean:.1f} ± {error:.1f} above it (p = {compare.p_value(mean, error, len(sft)):.1g})"
    assert len(sft) == 5 and said in " ".join((ROOT / "results" / "gp_l.md").read_text().split())


@pytest.mark.parametrize("table, name, metric", [
    ("gp_l_five_starts_table", "gp_l", "success"), ("gp_l_table", "gp_l", "success"),
    ("gp_l_first_tries_table", "gp_l_first_tries", "success"),
    ("virl_l_six_starts_table", "virl_l", "paper step accuracy"),
    ("virl_l_table", "virl_l", "paper step accuracy"),
    ("gp_vl_table", "gp_vl", "solved and read")])
def test_errors_of_kind_b_have_the_floor_that_the_page_names(table, name, metric):
    """A change's error: over starts, but not below the final score's error over hands or routes."""
    evaluations = read_data(f"{name}_every_evaluation")
    column = metric.replace(" ", "_")
    of_all = "five" in table or "six" in table
    for row in read_data(table):
        if row["metric"] != metric:
            continue
        settings = re.findall(r"\d\S*", row["arm"])
        lr = f"{float(settings[0]):.0e}".replace("-0", "-") if settings else None
        if row["arm"].startswith("RL"):
            lr = lr or {"gp_l": "5e-5", "virl_l": "3e-5"}[name]
            setting = f"{settings[1] if settings else '0.2'}, {lr}"
        else:
            setting = (lr or "1e-3") + (", 160 steps" if name == "gp_vl" else "")
        method = row["arm"].split()[0]
        starts = {each["start"]: float(each[column]) for each in evaluations
                  if each["step"] == "0" and each["split"] == row["split"]}
        ends, over_hands = (scores_at(evaluations, method, setting, row["split"], each)
                            for each in (column, f"{column}_error"))
        played = [start for start in sorted(ends) if of_all or start in ("0", "1", "2")]
        change, error = compare.mean_and_standard_error([ends[i] - starts[i] for i in played])
        floor = sum(over_hands[i] ** 2 for i in played) ** 0.5 / len(played)
        assert [float(row["change"]), float(row["change_error"])] == pytest.approx(
            [change, max(error, floor)], abs=0.12), row


def test_the_figure_asks_for_one_file(finding, capsys):
    for arguments in ([], ["a.png", "b.png"], ["no/such/folder/a.png"]):
        with pytest.raises(SystemExit):
            finding.main(arguments)
        assert "expected one file to draw into" in capsys.readouterr().err


def test_the_gains_of_more_seeds_are_those_of_their_rows():
    scores = {}
    with open(ROOT / "results" / "data" / "virl_l_seeds_of_start_0.csv") as file:
        for row in csv.DictReader(file):
            scores[row["seed"], row["step"], row["split"]] = float(row["paper_step_accuracy"])
    gains = [f"{scores[seed, '10', 'rule_ood'] - scores[seed, '0', 'rule_ood']:.1f}"
             for seed in "123"]
    page = " ".join((ROOT / "results" / "virl_l.md").read_text().split())
    assert f"start 0 gain {gains[0]}, {gains[1]} and {gains[2]} points" in page


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
