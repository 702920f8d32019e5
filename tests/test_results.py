"""What the README and the pages say is what the rows in results/data/ say."""
import csv
import importlib.util
import re

import pytest

from conftest import ROOT
from support import errors


@pytest.fixture(scope="module")
def finding():
    spec = importlib.util.spec_from_file_location("finding", ROOT / "recipes" / "finding.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("task", ["GP-L", "V-IRL-L", "GP-VL", "V-IRL-VL"])
def test_the_readmes_table_has_the_means_and_errors_of_the_rows(finding, task):
    line = re.search(rf"^\| \[{task}\]\(.*$", (ROOT / "README.md").read_text(), re.M)[0]
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
    mean, error = errors.mean_and_standard_error(differences)
    assert (round(mean, 1), round(error, 1)) == said
    assert f"+{said[0]} ± {said[1]}" in (ROOT / "results" / page).read_text()


# (task, what was planted) in rl_minus_sft.csv -> the file of its evaluations
EVALUATIONS = {("gp-l", "fault and mix-up, every try"): "gp_l",
               ("gp-l", "fault and mix-up, first tries"): "gp_l_first_tries",
               ("gp-l", "nothing"): "gp_l_no_faults",
               ("virl-l", "fault and mix-up"): "virl_l", ("virl-l", "nothing"): "virl_l_no_faults",
               ("gp-vl", "fault and mix-up"): "gp_vl", ("gp-vl", "nothing"): "gp_vl_no_faults",
               ("virl-vl", "fault and mix-up"): "virl_vl"}


def read_data(name):
    with open(ROOT / "results" / "data" / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_every_file_of_rows_is_listed_with_as_many_as_it_has():
    folder = ROOT / "results" / "data"
    page = (folder / "README.md").read_text()
    assert {path.stem for path in folder.glob("*.csv")} == set(re.findall(r"`(\w+)\.csv`", page))
    told = re.findall(r"^\| `(\w+)\.csv` \| (\d+) \|", page, re.M)
    assert len(told) > 20
    assert told == [(name, str(len(read_data(name)))) for name, _ in told]


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
        mean, error = errors.mean_and_standard_error(differences)
        assert [len(differences), round(mean, 1), round(error, 1)] == [
            int(row["n"]), float(row["mean"]), float(row["error"])], row
        p = errors.p_value(mean, error, len(differences))
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
    ("virl_l.md", "RL - SFT"), ("gp_vl.md", "RL - SFT at 1e-3"), ("gp_vl.md", "RL - SFT at 3e-4"),
    ("virl_vl.md", "training rule, RL - SFT"), ("virl_vl.md", "other rule, RL - SFT"),
    ("virl_vl.md", "another look, RL - SFT")])
def test_a_line_start_by_start_has_the_mean_error_and_p_of_its_numbers(page, line):
    text = (ROOT / "results" / page).read_text()
    cells = re.search(rf"^\| {line} \| (.*[+-]\d.*) \|$", text, re.M)[1].split(" | ")
    starts = [float(cell) for cell in cells if re.fullmatch(r"[+-][\d.]+", cell)]
    assert starts in lists_by_start()
    means = [i for i, cell in enumerate(cells) if "±" in cell]
    for i, values in zip(means, (starts, starts[3:])):       # promised: starts 3, 4 and 5
        mean, error = errors.mean_and_standard_error(values)
        said = [float(number) for number in cells[i].split(" ± ")]
        assert said == pytest.approx([mean, error], abs=0.101)
        p = errors.p_value(mean, error, len(values))
        under = re.fullmatch(r"< (\S+)", cells[i + 1])
        assert p < float(under[1]) if under else f"{p:.1g}" == f"{float(cells[i + 1]):.1g}"


@pytest.mark.parametrize("page, table", [
    ("gp_l.md", "gp_l_five_starts_table"), ("virl_l.md", "virl_l_six_starts_table"),
    ("gp_vl.md", "gp_vl_table"), ("virl_vl.md", "virl_vl_table")])
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
    mean, error = errors.mean_and_standard_error([rl[start] - sft[start] for start in sft])
    said = f"{mean:.1f} ± {error:.1f} above it (p = {errors.p_value(mean, error, len(sft)):.1g})"
    assert len(sft) == 5 and said in " ".join((ROOT / "results" / "gp_l.md").read_text().split())


@pytest.mark.parametrize("table, name, metric", [
    ("gp_l_five_starts_table", "gp_l", "success"), ("gp_l_table", "gp_l", "success"),
    ("gp_l_first_tries_table", "gp_l_first_tries", "success"),
    ("virl_l_six_starts_table", "virl_l", "paper step accuracy"),
    ("virl_l_table", "virl_l", "paper step accuracy"),
    ("gp_vl_table", "gp_vl", "solved and read"),
    ("virl_vl_table", "virl_vl", "paper step accuracy")])
def test_errors_of_kind_b_have_the_floor_that_the_page_names(table, name, metric):
    """A change's error: over starts, but not below the final score's error over hands or routes."""
    evaluations = read_data(f"{name}_every_evaluation")
    column = metric.replace(" ", "_")
    of_all = "five" in table or "six" in table
    for row in read_data(table):
        # In other cities all starts walk the same 18 routes, so their errors are not independent.
        if row["metric"] != metric or (name, row["split"]) == ("virl_vl", "visual_ood"):
            continue
        settings = re.findall(r"\d\S*", row["arm"])
        lr = f"{float(settings[0]):.0e}".replace("-0", "-") if settings else None
        if row["arm"].startswith("RL"):
            lr = lr or {"gp_l": "5e-5"}.get(name, "3e-5")
            setting = f"{settings[1] if settings else '0.2'}, {lr}"
        else:
            setting = (lr or "1e-3") + (", 160 steps" if name == "gp_vl" else "")
        method = row["arm"].split()[0]
        starts = {each["start"]: float(each[column]) for each in evaluations
                  if each["step"] == "0" and each["split"] == row["split"]}
        ends, over_hands = (scores_at(evaluations, method, setting, row["split"], each)
                            for each in (column, f"{column}_error"))
        played = [start for start in sorted(ends) if of_all or start in ("0", "1", "2")]
        change, error = errors.mean_and_standard_error([ends[i] - starts[i] for i in played])
        floor = sum(over_hands[i] ** 2 for i in played) ** 0.5 / len(played)
        assert [float(row["change"]), float(row["change_error"])] == pytest.approx(
            [change, max(error, floor)], abs=0.12), row


def test_what_is_said_of_v_irl_vl_is_that_of_its_rows():
    page, log = (" ".join((ROOT / "results" / name).read_text().split())
                 for name in ("virl_vl.md", "log.md"))
    evaluations, metric = read_data("virl_vl_every_evaluation"), "paper_step_accuracy"
    ends = scores_at(evaluations, "RL", "0.2, 3e-5", "rule_ood", metric)
    starts = {row["start"]: float(row[metric]) for row in evaluations
              if row["step"] == "0" and row["split"] == "rule_ood"}
    lost = max(starts[start] - ends[start] for start in ends)
    assert f"From no start does it end more than {lost:.1f} points lower" in page
    first = scores_at(evaluations, "SFT", "1e-3, 25 steps", "rule_ood", metric)
    assert len(first) == 3 and max(first.values()) < 0.3
    assert "SFT loses the other rule at its first checkpoint" in page
    trial = {(row["run"], row["step"]): float(row[metric]) for row in read_data("virl_vl_trial")}
    gain = trial["rl_0_90", "15"] - trial["rl_0_90", "0"]
    assert f"where it gained {gain:.0f} points" in page
    of_five = trial["rl_1_90", "5"], trial["rl_0_90", "5"]
    assert "after five updates ({} % and {} %)".format(*of_five) in log


def test_the_figure_asks_for_one_file(finding, capsys):
    for arguments in ([], ["a.png", "b.png"], ["no/such/folder/a.png"], ["--help"]):
        with pytest.raises(SystemExit):
            finding.main(arguments)
        assert "expected one file to draw into" in capsys.readouterr().err


def test_the_gains_of_more_seeds_are_those_of_their_rows():
    scores = {}
    with open(ROOT / "results" / "data" / "virl_l_seeds_of_start_0.csv") as file:
        for row in csv.DictReader(file):
            scores[row["seed"], row["step"], row["split"]] = float(row["paper_step_accuracy"])
    gains = [f"{scores[seed, '10', 'rule_ood'] - scores[seed, '0', 'rule_ood']:.1f}"
             for seed in "0123"]
    page = " ".join((ROOT / "results" / "virl_l.md").read_text().split())
    assert f"start 0 gain {gains[1]}, {gains[2]} and {gains[3]} points" in page
    assert f"The table's seed, run again, gains {gains[0]} instead of 7.1" in page


def test_sft_that_is_stopped_early_is_beside_rl_as_its_page_says():
    page = " ".join((ROOT / "results" / "gp_l.md").read_text().split())
    found, spent = {}, {}      # (start, step, split) -> success; (start, step) -> GFLOPs
    for row in read_data("gp_l_stopped_by_many_rules"):
        found[row["start"], int(row["step"]), row["split"]] = float(row["success"])
        spent[row["start"], int(row["step"])] = int(row["gflops"])
    best = {}          # start -> the step that scores best on many rules, the earliest of equals
    for start in "013":
        scores = {step: found[start, step, "rule_family"] for step in range(20, 201, 20)}
        best[start] = max(scores, key=scores.get)
    rl = {}
    for row in read_data("gp_l_every_evaluation"):
        if (row["arm"], row["learning_rate"], row["temperature"]) == ("RL", "5e-5", "0.2"):
            if row["step"] == "24" and row["start"] in "013":
                rl[row["start"], row["split"]] = float(row["success"])

    def cells(steps):
        means = []
        for split in "id", "rule_family", "rule_ood":
            values = [found[start, steps[start], split] for start in "013"]
            means.append("{:.1f} ± {:.1f}".format(*errors.mean_and_standard_error(values)))
        return " | ".join(means)
    for name, steps in (("start | 0", dict.fromkeys("013", 0)),
                        ("SFT, 20 steps | 1,393", dict.fromkeys("013", 20)),
                        ("SFT, where it is best on many rules | 6,963 to 12,534", best),
                        ("SFT, 200 steps | 13,925", dict.fromkeys("013", 200))):
        assert f"| {name} | {cells(steps)} |" in page
    assert (spent["0", 20], spent["0", 200]) == (1393, 13925)
    at_best = [spent[start, best[start]] for start in "013"]
    assert (min(at_best), max(at_best)) == (6963, 12534)
    of_rl = ["{:.1f} ± {:.1f}".format(*errors.mean_and_standard_error(
        [rl[start, split] for start in "013"])) for split in ("id", "rule_ood")]
    assert f"| RL, 24 updates | 14,016 | {of_rl[0]} | | {of_rl[1]} |" in page
    ahead, error = errors.mean_and_standard_error(
        [rl[start, "rule_ood"] - found[start, best[start], "rule_ood"] for start in "013"])
    p = errors.p_value(ahead, error, 3)
    assert f"RL is {ahead:.1f} ± {error:.1f} points ahead on the other rule (p = {p:.2f})" in page


def test_what_one_start_tells_is_that_of_its_rows():
    end = {row["split"]: row["solved_and_read"] for row in read_data("gp_vl_small_rate")
           if row["step"] == "200"}
    rl = {row["split"]: row["solved_and_read"] for row in read_data("gp_vl_every_evaluation")
          if (row["run"], row["step"]) == ("rl_0_0", "24")}
    page = " ".join((ROOT / "results" / "gp_vl.md").read_text().split())
    assert f"ends at {end['id']} % on the training rule and {end['rule_ood']} % on the oth" in page
    assert f"ends at {rl['id']} and {rl['rule_ood']}." in page
    rft = {(row["round"], row["split"]): row["paper_step_accuracy"]
           for row in read_data("virl_l_rft") if row["temperature"] == "0.2"}
    page = " ".join((ROOT / "results" / "virl_l.md").read_text().split())
    assert (f"ends at {rft['8', 'id']} % on the training rule and at {rft['8', 'rule_ood']} % on "
            "the other") in page
    end = [row["paper_step_accuracy"] for row in read_data("virl_l_rft")
           if (row["temperature"], row["round"]) == ("1.0", "8")]
    assert "At 1.0 it ends at {} and {} %.".format(*end) in page
    assert f"The start has {rft['0', 'id']} and {rft['0', 'rule_ood']} %." in page


def test_rft_on_gp_l_is_beside_rl_as_its_page_says():
    page = " ".join((ROOT / "results" / "gp_l.md").read_text().split())
    found = {}
    for row in read_data("gp_l_rft_every_evaluation"):
        if row["form"] == "all right tries":
            found[row["start"], row["round"], row["split"]] = row
    rl = {}            # (start, updates, split) -> success
    for row in read_data("gp_l_every_evaluation"):
        if (row["arm"], row["learning_rate"], row["temperature"]) == ("RL", "5e-5", "0.2"):
            rl[row["start"], row["step"], row["split"]] = row["success"]
    for start in "013":
        rows = [found[start, number, "rule_ood"] for number in ("0", "2", "8")]
        before, early, end = [row["success"] for row in rows]
        read = ", ".join(row["numbers_right"] for row in rows)
        cells = [before, early, rl[start, "8", "rule_ood"], end, rl[start, "24", "rule_ood"], read]
        assert f"| start {start} | {' | '.join(cells)} |" in page

    def over_starts(value):
        return errors.mean_and_standard_error([value(start) for start in "013"])

    def behind(split):
        return over_starts(lambda start: float(found[start, "8", split]["success"])
                           - float(rl[start, "24", split]))
    rounds, _ = over_starts(lambda start: float(found[start, "2", "id"]["gflops"]))
    assert round(rounds, -2) == 4100 and "take about 4,100 GFLOPs, eight updates 4,600" in page
    change = over_starts(lambda start: float(found[start, "8", "rule_ood"]["success"])
                         - float(found[start, "0", "rule_ood"]["success"]))
    assert "Its change since the start is then {:+.1f} ± {:.1f}".format(*change) in page
    early = over_starts(lambda start: float(found[start, "2", "rule_ood"]["success"]))
    of_rl = over_starts(lambda start: float(rl[start, "8", "rule_ood"]))
    assert "it is at {:.1f} ± {:.1f} %, RL at the same compute at {:.1f} ± {:.1f}".format(
        *early, *of_rl) in page
    below, error = behind("rule_ood")
    p = errors.p_value(below, error, 3)
    assert f"ends {-below:.1f} ± {error:.1f} points below RL (p = {p:.2f}, three starts)" in page
    assert "ends {:.1f} ± {:.1f} points above".format(*behind("id")) in page


# An arm of the pretrained model's page, and its name in the rows.
PRETRAINED = {"start": ("start",), "SFT": ("SFT, 5e-5, first steps", "SFT, 5e-5"),
              "SFT on many rules": ("SFT, many rules",),
              "RFT": ("RFT, temperature 0.7",),
              "RL": ("RL, temperature 0.5, 3e-5, one step",),
              "RL's first setting": ("RL, temperature 0.5, 2e-5",)}


def pretrained_rows(name, start="0"):
    """(arm, step, split) -> row of a file of the pretrained model, of this start."""
    with open(ROOT / "results" / "data" / f"pretrained_{name}.csv") as file:
        return {(row["arm"], row["step"], row["split"]): row for row in csv.DictReader(file)
                if row["start"] == start}


@pytest.mark.parametrize("start, headings", [
    ("0", ["The result", "RL's first setting"]), ("1", ["The second start"]),
    ("both 0", ["A third start, which knows both rules"])])
def test_the_tables_of_the_pretrained_model_are_those_of_its_rows(start, headings):
    rows = pretrained_rows("every_evaluation", start)
    page = ""
    for heading in headings:
        behind = (ROOT / "results" / "pretrained.md").read_text().partition(f"\n## {heading}\n")[2]
        page += behind.partition("\n## ")[0]
    arms = "|".join(sorted(PRETRAINED, key=len, reverse=True))
    lines = re.findall(rf"^\| ({arms})(?:, (\d+) \w+)? \| (.*) \|$", page, re.MULTILINE)
    assert len(lines) >= 9
    if start == "0":
        assert len(lines) >= 14 and {arm for arm, _, _ in lines} == set(PRETRAINED)
    for arm, step, cells in lines:
        name = next(name for name in PRETRAINED[arm] if (name, step or "0", "id") in rows)
        of_id, of_other = (rows[name, step or "0", split] for split in ("id", "rule_ood"))

        def cell(row, name):
            return f"{row[name]} ± {row[name + '_error']}"
        assert cells.split(" | ") == [
            f"{int(of_id['gflops']):,}", cell(of_id, "paper_step_accuracy"),
            cell(of_id, "first_try_turn"), cell(of_other, "paper_step_accuracy"),
            cell(of_other, "first_try_turn"), f"{of_id['success']}, {of_other['success']}"]


def test_what_the_pretrained_model_says_is_that_of_its_rows():
    page = " ".join((ROOT / "results" / "pretrained.md").read_text().split())
    said = pretrained_rows("words")
    assert "a direction must be named 36 times" in page
    start = said["start", "0", "id"]["turns_compass"], said["start", "0", "rule_ood"][
        "turns_left_right"]
    assert start == ("35", "35") and "rule 35 of its replies have a compass word" in page
    assert said["SFT, 5e-5", "20", "rule_ood"]["turns_compass"] == "36"
    assert "After 20 steps of SFT all 36 replies name a compass word" in page
    of_rl = [said["RL, temperature 0.5, 3e-5, one step", step, "rule_ood"]["turns_compass"]
             for step in ("4", "8", "12")]
    assert of_rl == ["6", "28", "35"] and "After 12 updates of RL 35 do" in page
    assert "six of 36 replies have a compass word. Four updates later 28 have one" in page
    assert said["RFT, temperature 0.7", "2", "rule_ood"]["turns_compass"] == "35"
    kept = [row["right_replies_kept"] for row in read_data("pretrained_rft")]
    assert "RFT learns from {} right replies, then from {}".format(*kept) in page
    many = said["SFT, many rules", "40", "id"], said["SFT, many rules", "40", "rule_ood"]
    assert (many[0]["turns_compass"], many[1]["turns_left_right"]) == ("36", "36")
    for split in ("id", "rule_ood"):
        ten = said["RL, temperature 0.5, 2e-5", "10", split]
        assert int(ten["forward_without_action"]) > int(ten["forward_with_action"])
    updates = {}
    with open(ROOT / "results" / "data" / "pretrained_updates.csv") as file:
        for row in csv.DictReader(file):
            updates[row["start"], row["setting"], row["step"]] = row
    spread = [float(row["approx_kl"]) for (start, setting, _), row in updates.items()
              if (start, setting) == ("0", "2e-5, four steps")]
    assert f"divergence was {min(spread):.2f} to {max(spread):.2f} in an update" in page
    shares = [round(100 * float(updates["9", setting, step]["step_accuracy"]))
              for setting, step in (("5e-6, four steps", "3"), ("3e-5, one step", "7"),
                                    ("5e-6, four steps", "1"), ("3e-5, one step", "1"))]
    assert shares == [25, 70, 19, 19]
    assert "25 % of the replies were right in the third update" in page
    assert "70 % were in the seventh. In the first update it was 19 % for both" in page


def test_what_is_said_of_the_second_pretrained_start_is_that_of_its_rows():
    page = " ".join((ROOT / "results" / "pretrained.md").read_text().split())
    said, rl = pretrained_rows("words", "1"), "RL, temperature 0.5, 3e-5, one step"
    of_other = said[rl, "16", "rule_ood"]
    assert (of_other["turns_left_right"], of_other["turns_compass"]) == ("22", "4")
    assert "By then 22 of 38 replies still have a word of that rule, four a compass word" in page
    assert said["SFT, 5e-5, first steps", "12", "rule_ood"]["turns_compass"] == "38"
    assert "After 12 steps all 38 replies name a compass word" in page
    kept, lost = [], []          # per-step accuracy on the other rule
    for start in "01":
        rows = pretrained_rows("every_evaluation", start)
        for (arm, step, split), row in rows.items():
            if split == "id" and (arm == rl or arm.startswith("SFT, 5e-5")):
                other = float(rows[arm, step, "rule_ood"]["paper_step_accuracy"])
                (lost if float(row["paper_step_accuracy"]) > 60 else kept).append(other)
    assert (round(max(lost)), min(kept)) == (8, 34.0) and len(kept + lost) == 19
    assert "above 60 % on the training rule, less than 8 % is left" in page
    scores = [pretrained_rows("every_evaluation", "1")[key]["paper_step_accuracy"] for key in (
        (rl, "16", "id"), (rl, "16", "rule_ood"), ("SFT, many rules", "20", "rule_ood"),
        ("SFT, many rules", "40", "rule_ood"), ("start", "0", "rule_ood"))]
    assert "scores {} % on the training rule".format(scores[0]) in page
    assert "ends at its lowest, {} ± 5.0 %".format(scores[1]) in page
    assert "scores {} and then {} % on the other rule; the start scores {}".format(
        *scores[2:]) in page


def test_what_is_said_of_the_third_pretrained_start_is_that_of_its_rows():
    page = " ".join((ROOT / "results" / "pretrained.md").read_text().split())
    said, rl = pretrained_rows("words", "both 0"), "RL, temperature 0.5, 3e-5, one step"
    sft, of_rl = (said[arm, step, "rule_ood"]["turns_compass"]
                  for arm, step in (("SFT, 5e-5, first steps", "20"), (rl, "16")))
    assert f"{sft} of 36 replies name a compass word after SFT, and {of_rl} after RL" in page
    for (arm, step, split), row in pretrained_rows("every_evaluation", "both 0").items():
        stops = float(row["first_try_stop"])
        assert stops == 0 if arm == rl else stops > 90
    updates = {(row["setting"], row["step"]): row for row in read_data("pretrained_updates")
               if row["start"] == "both 0"}
    first, second = (f"{float(updates['3e-5, one step', step]['value']):.2f}" for step in "12")
    assert f"One step took the value head's mean from {first} to {second}" in page
    for setting in "3e-5, one step", "3e-5, one step, value rate 1e-4":
        stops = [updates[setting, step]["step_accuracy_stop"] for step in "1234"]
        assert stops == ["1.0", "1.0", "0.25", "0.0"]


def test_the_speed_on_the_pretrained_model_is_that_of_its_rows():
    page = " ".join((ROOT / "results" / "pretrained.md").read_text().split())
    with open(ROOT / "results" / "data" / "bench_pretrained.csv") as file:
        rows = list(csv.DictReader(file))
    steps = [row for row in rows if row["section"] in ("sft", "trl") and row["ratio"]]
    assert len(steps) == 5
    for row in steps:
        theirs, ours = (f"{float(row[side].split()[0]):.1f}" for side in ("baseline", "ours"))
        assert f", {row['dtype']} | {theirs} s | {ours} s | {row['ratio']} |" in page
    for row in rows:
        if row["section"] == "turns" and "anew" not in row["what"]:
            assert (f", {row['dtype']} | {row['baseline']} | {row['ours']} | {row['ratio']} |"
                    in page)
    share, = (row for row in rows if row["what"].startswith("share of the float32 matrix rate"))
    ours, theirs = (round(float(share[side].split()[0])) for side in ("ours", "baseline"))
    assert f"our step runs at {ours} % of the rate of a plain matrix product" in page
    assert f"Hugging Face's at {theirs} %" in page
    spent = {"products": 0.0, "attention": 0.0}
    for row in rows:
        kind = "products" if row["what"].endswith("aten::mm") else "attention"
        if kind == "products" or "_attention_" in row["what"]:
            spent[kind] += float(re.search(r"\(([\d.]+)%", row["ours"])[1])
    assert f"products take {spent['products']:.1f} % of a step" in page
    assert f"torch's attention {spent['attention']:.1f} %" in page
    for row in rows:
        if row["section"] == "idle":
            assert row["ours"].split("%")[0] + " %" in page
