"""support/compare.py: what stands beside the paper's numbers is its measure, or a named bound."""
import csv
import json
import math
import random

import pytest

import envs
import evaluate
from conftest import ROOT
from envs import TASKS, make_env
from support import collect, compare, errors, evaluation, report, running

READ, SOLVED = 0.6, 0.75


def write_run(folder, step, length):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model": "start", **length}))
    measures = {"solved_and_read": READ, "success": SOLVED}
    for name in ("recognition", "rank_accuracy", "first_try", "retries", "repeats"):
        measures[name] = 0.5
    errors = {f"{name}_stderr": 0.01 for name in measures}
    settings = {"task": "gp-vl", "episodes": 100, "env": {"verify_iter": 5}}
    for at in {0, step}:
        running.log_jsonl(folder / "eval.jsonl", step=at, gflops=10.0 * at, split="rule_ood",
                          seed=0, episodes=100, settings=settings, statuses={},
                          **measures, **errors)


def test_a_bound_of_the_papers_measure_is_named_one_wherever_it_stands_beside_it(tmp_path, capsys):
    write_run(tmp_path / "sft", 5, {"steps": 5})
    write_run(tmp_path / "rl", 5, {"updates": 5})
    evaluate.compare_runs(evaluate.Config(compare=(f"{tmp_path}/sft,{tmp_path}/rl",)))
    told = capsys.readouterr().out
    assert "hands solved and read (lower bound of the paper's measure)\n" in told
    assert "  start             60.0 ± 1.0\n" in told
    assert "lies between solved and read and success" in " ".join(told.split())
    assert "Found, in points of solved and read (lower bound):\n" in told

    row = {"split": "rule_ood", "solved_and_read": READ, "success": SOLVED}
    assert compare.beside_paper("gp-vl", row, evaluate.PAPER) == (
        "solved and read (lower bound) 60.0 % and success 75.0 % (upper bound), in the paper "
        "11.2 at the start, 5.6 after SFT, 14.2 after RL")


def test_what_is_no_bound_is_not_called_one():
    named = {metric for task in TASKS.values() for metric in task.metrics}
    bounds = [metric for metric in named if "bound" in compare.in_words(metric)]
    assert bounds == ["solved_and_read"]


def test_the_papers_measure_of_a_hand_lies_between_solved_and_read_and_success():
    rng, tries = random.Random(3), 5
    hands = [make_env("gp-vl", resolution=56, verify_iter=tries) for _ in range(100)]
    # For each hand and try: whether the formula is right, and whether the cards are.
    drawn = [[(rng.random() < 0.3, rng.random() < 0.6) for _ in range(tries)] for _ in hands]

    def reply(turn, pending):
        texts = []
        for i in pending:
            solves, reads = drawn[i][turn]
            text = json.loads(hands[i].format_reply(hands[i].formula if solves else "1+1"))
            if not reads:
                text["cards"] = ["X"] * 4
            texts.append((json.dumps(text), "stop"))
        return texts

    row = evaluate.summarise(evaluate.play_episodes(reply, hands, seed=0), tries)
    # The official code ends a hand at the first try with both.
    papers = sum(1 for hand in drawn if (True, True) in hand) / len(hands)
    assert row["solved_and_read"] + 0.05 < papers < row["success"] - 0.05


def test_the_published_bound_is_as_tight_as_its_page_says():
    rows = list(csv.DictReader((ROOT / "results/data/gp_vl_every_evaluation.csv").open()))
    apart = [float(row["success"]) - float(row["solved_and_read"]) for row in rows]
    assert len(rows) > 200 and 0 <= min(apart) and 2.5 < max(apart) <= 3.001
    page = " ".join((ROOT / "results" / "gp_vl.md").read_text().split())
    assert "at most 3 points apart" in page


# ---- Rows that do not fit each other -------------------------------------------------------------

def write_rows(folder, length, rows, split="id", **config):
    """A run on GP-L: rows of (step, seed, success)."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model": "start", **length, **config}))
    settings = {"task": "gp-l", "episodes": 100, "env": {"verify_iter": 5}}
    measures = {f"{name}{end}": 0.01 for name in ("success", "first_try", "retries", "repeats")
                for end in ("", "_stderr")}
    for step, seed, success in rows:
        running.log_jsonl(folder / "eval.jsonl", step=step, gflops=10.0 * step, split=split,
                          seed=seed, checkpoint="c", episodes=100, replies=100, settings=settings,
                          statuses={"correct": round(100 * success)}, reward=success,
                          **{**measures, "success": success})


PAPER = compare.Reference({}, {}, {name: task.metrics for name, task in TASKS.items()})


def study_of(*folders):
    return compare.study_runs(folders, PAPER)


def test_a_start_that_was_made_anew_between_two_runs_is_refused(tmp_path):
    write_rows(tmp_path / "sft", {"steps": 1}, [(0, 0, 0.3), (1, 0, 0.33)])
    write_rows(tmp_path / "rl", {"updates": 1}, [(0, 0, 0.48), (1, 0, 0.43)])
    with pytest.raises(ValueError, match="the start start has another result in .*rl than in"):
        study_of(tmp_path / "sft", tmp_path / "rl")


def test_a_run_and_its_longer_twin_are_one(tmp_path):
    write_rows(tmp_path / "sft", {"steps": 1}, [(0, 0, 0.3), (1, 0, 0.33)])
    write_rows(tmp_path / "rl", {"updates": 2}, [(1, 0, 0.4), (2, 0, 0.5)])
    write_rows(tmp_path / "rl3", {"updates": 3}, [(1, 0, 0.4), (2, 0, 0.5), (3, 0, 0.6)])
    with pytest.raises(ValueError, match="have the same row of step 1, so they are one run twice"):
        study_of(tmp_path / "sft", tmp_path / "rl", tmp_path / "rl3")


def test_a_copied_run_that_was_tested_on_other_hands_is_one_run(tmp_path):
    """Its error would be that of two, though both have the same weights."""
    write_rows(tmp_path / "sft", {"steps": 1}, [(0, 0, 0.3), (0, 1, 0.2), (1, 0, 0.33)], seed=0)
    write_rows(tmp_path / "rl", {"updates": 2}, [(1, 0, 0.4)], seed=0)
    write_rows(tmp_path / "copy", {"updates": 2}, [(1, 1, 0.5)], seed=0)
    with pytest.raises(ValueError, match="have one start, method and --seed 0, so they are one ru"):
        study_of(tmp_path / "sft", tmp_path / "rl", tmp_path / "copy")
    write_rows(tmp_path / "copy", {"updates": 2}, [], seed=1)
    write_rows(tmp_path / "sft", {"steps": 1}, [(1, 1, 0.3)], seed=0)
    study_of(tmp_path / "sft", tmp_path / "rl", tmp_path / "copy")


def test_rows_of_two_models_under_one_step_are_refused(tmp_path):
    write_rows(tmp_path / "rl", {"updates": 2}, [(0, 0, 0.3), (1, 0, 0.4), (1, 1, 0.5)])
    write_rows(tmp_path / "sft", {"steps": 1}, [(1, 0, 0.3), (1, 1, 0.3)])
    rows = running.read_jsonl(tmp_path / "rl" / "eval.jsonl")
    for name, refused in ((("a", "a", "a"), False), (("a", "b", "b"), False),
                          (("a", None, "b"), False), (("a", "a", "b"), True)):
        running.write_jsonl(tmp_path / "rl" / "eval.jsonl",
                            [{**row, "weights": weights} for row, weights in zip(rows, name)])
        if not refused:
            study_of(tmp_path / "sft", tmp_path / "rl")
            continue
        with pytest.raises(ValueError, match="the model of step 1 was made anew between two tests"):
            study_of(tmp_path / "sft", tmp_path / "rl")


def test_values_and_differences_are_taken_on_the_hands_that_all_arms_have_played(tmp_path, capsys):
    write_rows(tmp_path / "sft", {"steps": 1}, [(0, 0, 0.3), (1, 0, 0.35), (1, 1, 0.85)])
    write_rows(tmp_path / "rl", {"updates": 1}, [(1, 0, 0.3)])
    study = study_of(tmp_path / "sft", tmp_path / "rl")
    told = "Left out, since not all arms were tested on these hands: SFT on id, seed 1."
    assert compare.left_out(study) == told
    page = report.page(study, PAPER, envs.make_env)
    assert told in page
    compare.print_study(study, PAPER)
    assert told in " ".join(capsys.readouterr().out.split())
    assert study.cells["success", "id", "SFT"].value == pytest.approx(35)
    found = compare.difference(study, "RL", "SFT", "success", "id")
    assert found.value == pytest.approx(-5)


def test_arms_without_hands_in_common_are_refused(tmp_path):
    write_rows(tmp_path / "sft", {"steps": 1}, [(0, 0, 0.3), (1, 0, 0.35)])
    write_rows(tmp_path / "rl", {"updates": 1}, [(0, 1, 0.5), (1, 1, 0.6)])
    told = r"no hands in common \(start: 0, 1; SFT: 0; RL: 1\): evaluate them with the same --seeds"
    with pytest.raises(ValueError, match=told):
        study_of(tmp_path / "sft", tmp_path / "rl")


def test_the_checkpoints_of_the_table_were_played_on_the_same_hands(tmp_path):
    """A run went on, and its new checkpoint was tested with one seed of two."""
    write_rows(tmp_path / "sft", {"steps": 2}, [(0, 0, 0.3), (0, 1, 0.3), (1, 0, 0.4), (1, 1, 0.4),
                                                (2, 0, 0.5)])
    write_rows(tmp_path / "rl", {"updates": 2}, [(2, 0, 0.4), (2, 1, 0.4)])
    told = "on id SFT at step 2 was not tested with seed 1, as the start start and other"
    with pytest.raises(ValueError, match=told):
        study_of(tmp_path / "sft", tmp_path / "rl")


def test_a_run_whose_hands_on_one_split_are_left_out_counts_on_the_others(tmp_path):
    """Each run has its own hands, and RL lacks those of one run on one split."""
    for split, seeds in (("id", (0, 1)), ("rule_ood", (0,))):
        write_rows(tmp_path / "rl", {"updates": 1}, [(1, seed, 0.5) for seed in seeds], split)
        for seed in (0, 1):
            write_rows(tmp_path / f"sft{seed}", {"steps": 1}, [(0, seed, 0.3), (1, seed, 0.4)],
                       split, seed=seed)
    runs = [tmp_path / name for name in ("sft0", "sft1", "rl")]
    study = study_of(*runs)
    assert compare.left_out(study).endswith("start on rule_ood, seed 1; SFT on rule_ood, seed 1.")
    assert study.cells["success", "rule_ood", "SFT"].value == pytest.approx(40)
    # A run that was never tested on a split is named.
    rows = running.read_jsonl(tmp_path / "sft1/eval.jsonl")
    running.write_jsonl(tmp_path / "sft1/eval.jsonl", [row for row in rows if row["split"] == "id"])
    with pytest.raises(ValueError, match="the run .*sft1 was not tested on rule_ood, as others"):
        study_of(*runs)


def test_what_errors_are_over_and_how_many_hands_are_told_arm_by_arm(tmp_path):
    def told(*names):
        study = study_of(*[tmp_path / name for name in names])
        return compare.how_many(study).partition(". ")[2], study.cells["success", "id", "start"]
    write_rows(tmp_path / "sft0", {"steps": 1}, [(0, 0, 0.3), (1, 0, 0.35)])
    write_rows(tmp_path / "sft1", {"steps": 1}, [(1, 0, 0.45)], seed=1)
    write_rows(tmp_path / "rl", {"updates": 1}, [(1, 0, 0.4)])
    assert told("sft0", "rl")[0] == "Each is tested on 100 hands; errors are over hands."
    assert told("sft0", "sft1", "rl")[0] == ("Each is tested on 100 hands; errors are over runs "
                                             "for SFT, over hands for RL and the start.")
    # Two seeds are twice the hands. The start has no runs, and equal scores leave no error of 0.
    write_rows(tmp_path / "sft", {"steps": 1}, [(0, 0, 0.3), (0, 1, 0.3), (1, 0, 0.4), (1, 1, 0.4)])
    write_rows(tmp_path / "rl2", {"updates": 1}, [(1, 0, 0.4), (1, 1, 0.5)])
    words, start = told("sft", "rl2")
    assert words == "Each is tested on 200 hands; errors are over hands."
    assert start == pytest.approx((30.0, 1.0 / math.sqrt(2), 0, 0))


def test_the_error_of_several_starts_is_never_below_that_over_hands():
    rows = [{"start": start, "run": (start, 0), "seed": 0, "step": 0, "success": 0.3,
             "success_stderr": 0.02} for start in "st"]
    assert errors.metric_and_error(rows, "success")[1] == 0
    assert errors.score_and_error(rows, "success") == pytest.approx((30.0, 2.0))
    del rows[0]["success_stderr"]                                        # of an earlier version
    assert errors.score_and_error(rows, "success") == pytest.approx((30.0, 0.0))


def test_a_run_from_before_an_option_has_its_default():
    """Both are one arm; `balance` is off and `schedule` is cosine if nothing is said."""
    old = {"steps": 5, "lr": 1e-6}
    configs = {"old": old, "new": {**old, "schedule": "cosine", "balance": False, "beta2": 0.98}}
    assert set(collect.name_arms(configs).values()) == {"SFT"}
    configs["new"]["schedule"] = "constant"
    assert collect.name_arms(configs) == {"old": "SFT schedule cosine",
                                          "new": "SFT schedule constant"}
    for method, option in (("SFT", "mix"), ("RL", "lr_final"), ("RFT", "first_tries")):
        assert option in collect.defaults_of(method)


def test_a_script_whose_defaults_cannot_be_read_is_named(monkeypatch, capsys, tmp_path):
    """Without them a run from before an option was there is an arm of its own."""
    monkeypatch.setitem(collect.SCRIPTS, "SFT", str(tmp_path / "sft.py"))
    (tmp_path / "sft.py").write_text("class Config:\n    lr: float = flag(1 / 3, 'the rate')\n")
    collect.defaults_of.cache_clear()
    try:
        names = collect.name_arms({"a": {"lr": 0.1}, "b": {"lr": 0.1, "data": ""}})
    finally:
        collect.defaults_of.cache_clear()
    assert names == {"a": "SFT", "b": "SFT"}
    told = capsys.readouterr().out
    assert told.startswith("sft.py: its defaults cannot be read (") and told.count("\n") == 1


def test_without_a_split_of_the_paper_there_are_no_sentences_on_its_signs(tmp_path, capsys):
    write_rows(tmp_path / "sft", {"steps": 1}, [(0, 0, 0.3), (1, 0, 0.35)], "id target=36")
    write_rows(tmp_path / "rl", {"updates": 1}, [(1, 0, 0.4)], "id target=36")
    evaluate.compare_runs(evaluate.Config(compare=(f"{tmp_path}/sft,{tmp_path}/rl",)))
    told = capsys.readouterr().out
    assert "\nFound, in points of success:\nRL minus SFT on id target=36: +5.0" in told
    assert "as in the paper" not in told


def test_files_are_written_before_anything_is_printed(tmp_path, monkeypatch):
    write_rows(tmp_path / "sft", {"steps": 1}, [(0, 0, 0.3), (1, 0, 0.35)])
    write_rows(tmp_path / "rl", {"updates": 1}, [(1, 0, 0.4)])
    page, figure = tmp_path / "page.html", tmp_path / "figure.png"

    def print_study(*_):
        raise BrokenPipeError
    monkeypatch.setattr(compare, "print_study", print_study)
    monkeypatch.setattr(compare, "draw", lambda study, file, paper: figure.write_text("drawn"))
    with pytest.raises(BrokenPipeError):
        evaluate.compare_runs(evaluate.Config(compare=(f"{tmp_path}/sft,{tmp_path}/rl",),
                                              html=str(page), figure=str(figure)))
    assert "</html>" in page.read_text() and figure.read_text() == "drawn"


def test_runs_from_one_path_with_other_weights_there_are_not_compared(tmp_path):
    """The start was made anew between the two runs, and the second was tested without it."""
    runs = []
    for name, length, weights in ("sft", {"steps": 5}, "a"), ("rl", {"updates": 5}, "b"):
        write_run(tmp_path / name, 5, length)
        runs.append(f"{tmp_path}/{name}")
        (tmp_path / name / "inputs.json").write_text(json.dumps({"start": weights}))
    metrics = {name: task.metrics for name, task in TASKS.items()}
    with pytest.raises(ValueError, match="the start start has other weights in .*rl than in .*sft"):
        collect.collect_rows(runs, metrics)
    (tmp_path / "rl/inputs.json").write_text(json.dumps({"start": "a"}))
    assert collect.collect_rows(runs, metrics)


def test_the_table_says_which_arms_were_trained_by_another_rule(tmp_path, capsys):
    write_run(tmp_path / "sft", 5, {"steps": 5, "mix": ["rule_ood"]})
    write_run(tmp_path / "rl", 5, {"updates": 5, "split": ["id"], "env": ["target=30"]})
    evaluate.compare_runs(evaluate.Config(compare=(f"{tmp_path}/sft,{tmp_path}/rl",)))
    told = " ".join(capsys.readouterr().out.split())
    assert "SFT was trained on rule_ood. RL was trained on id target=30." in told


def test_the_table_says_how_tests_were_made_if_that_is_unusual_or_differs(tmp_path, capsys):
    def told(of_id={}, **of_other):
        """What stands above the tables, where the rules were tested with these settings."""
        runs = []
        for name, length in ("sft", {"steps": 5}), ("rl", {"updates": 5}):
            folder = tmp_path / f"{name}_{len(list(tmp_path.iterdir()))}"
            write_run(folder, 5, length)
            rows = []
            for row in running.read_jsonl(folder / "eval.jsonl"):
                usual = {"temperature": 0.0, "feedback": "informative"}
                for split, chosen in ("id", of_id), ("rule_ood", of_other):
                    rows.append({**row, "split": split,
                                 "settings": {**row["settings"], **usual, **chosen}})
            running.write_jsonl(folder / "eval.jsonl", rows)
            runs.append(str(folder))
        evaluate.compare_runs(evaluate.Config(compare=(",".join(runs),)))
        return " ".join(capsys.readouterr().out.partition("\n\n")[0].split())
    assert "ested with" not in told()
    assert ("Splits were not tested alike: feedback informative on the training rule, plain on "
            "the other rule.") in told(feedback="plain")
    both = told({"temperature": 1.0}, temperature=1.0, feedback="plain")
    assert "Tested with temperature 1.0. Splits were not tested alike: feedback" in both


def test_runs_before_and_after_their_city_was_moved_are_one_arm(tmp_path):
    configs = {}
    for name, root, files in ("a", "old", "f"), ("b", "new", "f"), ("c", "other", "g"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "inputs.json").write_text(json.dumps({"files": files}))
        configs[tmp_path / name] = {"updates": 5, "env": [f"root={root}", "resolution=9"]}
    names = collect.name_arms(collect.with_first_paths(configs))
    assert list(names.values()) == ["RL root=old", "RL root=old", "RL root=other"]
    row = {"env": {"root": "old", "guided": True}, "files": "f"}
    assert evaluation.are_settings(row, {"env": {"root": "new", "guided": True}, "files": "f"})
    for other in ({"env": {"root": "old", "guided": True}, "files": "g"},
                  {"env": {"root": "new", "guided": False}, "files": "f"}):
        assert not evaluation.are_settings(row, other)
    # A row without digests may be of an earlier version, or of a test without files.
    plain, official = {"env": {"prompt_file": ""}}, {"env": {"prompt_file": "p.json"}, "files": "f"}
    assert not evaluation.are_settings(plain, official)
    assert evaluation.are_settings(plain, plain)
    assert evaluation.are_settings({"env": official["env"]}, official)


def test_runs_of_one_seed_in_two_numeric_types_are_two(tmp_path):
    metrics = {name: task.metrics for name, task in TASKS.items()}
    for name, dtype, weights in ("a", "float32", "v"), ("b", "bfloat16", "w"):
        write_run(tmp_path / name, 5, {"steps": 5, "seed": 0, "dtype": dtype})
        rows = running.read_jsonl(tmp_path / name / "eval.jsonl")
        for row in rows:
            row["weights"] = weights if row["step"] else "start"
        running.write_jsonl(tmp_path / name / "eval.jsonl", rows)
    write_run(tmp_path / "c", 5, {"updates": 5, "seed": 0, "dtype": "bfloat16"})
    arms = collect.collect_rows([tmp_path / name for name in "abc"], metrics)
    # They are no two seeds of one arm, over which an error could be taken.
    assert {arm: len(rows) for arm, rows in arms.items() if arm != "start"} == {
        "SFT dtype float32": 1, "SFT dtype bfloat16": 1, "RL": 1}


def test_a_copy_of_a_start_is_no_other_start(tmp_path):
    runs, metrics = [], {name: task.metrics for name, task in TASKS.items()}
    for name, length in ("sft", {"steps": 5}), ("rl", {"updates": 5}):
        write_run(tmp_path / name, 5, length)
        runs.append(f"{tmp_path}/{name}")
        (tmp_path / name / "inputs.json").write_text(json.dumps({"start": "a"}))
    config = json.loads((tmp_path / "rl/config.json").read_text())
    (tmp_path / "rl/config.json").write_text(json.dumps({**config, "model": "elsewhere/start"}))
    arms = collect.collect_rows(runs, metrics)
    assert {row["start"] for rows in arms.values() for row in rows} == {"start"}
    # Of the same weights with another template it is another start.
    (tmp_path / "rl/inputs.json").write_text(json.dumps({"start": "a", "start_texts": "t"}))
    arms = collect.collect_rows(runs, metrics)
    assert {row["start"] for row in arms["RL"]} == {"elsewhere/start"}
    # A run of an earlier version tells nothing of the copy that others tell of.
    (tmp_path / "rl/inputs.json").write_text(json.dumps({"start": "a"}))
    write_run(tmp_path / "old", 5, {"updates": 9, "model": "elsewhere/start", "lr": 1})
    found = collect.name_starts({run: running.read_run_config(run) for run in
                                 (tmp_path / "old", tmp_path / "sft", tmp_path / "rl")})
    assert set(found.values()) == {"elsewhere/start"}


@pytest.mark.parametrize("name, told", [
    ("start_texts", "the start start has other tokenizer, template or configs in .*rl than in "),
    ("files", "rl was trained with another prompt file, city or card_dir than .*sft, under the"),
    ("data", "rl was trained with another file of --data than .*sft, under the same name")])
def test_runs_that_were_trained_on_other_files_of_one_name_are_not_compared(tmp_path, name, told):
    runs, metrics = [], {task: each.metrics for task, each in TASKS.items()}
    for arm, length, digest in ("sft", {"steps": 5}, "a"), ("rl", {"updates": 5}, "b"):
        write_run(tmp_path / arm, 5, {**length, "task": "gp-vl", "env": ["prompt_file=p.json"]})
        runs.append(f"{tmp_path}/{arm}")
        (tmp_path / arm / "inputs.json").write_text(json.dumps({"start": "w", name: digest}))
    with pytest.raises(ValueError, match=told):
        collect.collect_rows(runs, metrics)
    (tmp_path / "rl/inputs.json").write_text(json.dumps({"start": "w", name: "a"}))
    assert collect.collect_rows(runs, metrics)
    # What names no file is of no account here, nor is another spelling.
    (tmp_path / "rl/inputs.json").write_text(json.dumps({"start": "w", name: "b"}))
    config = json.loads((tmp_path / "rl/config.json").read_text())
    more = {**config, "env": ["prompt_file=./p.json", "verify_iter=3"]}
    (tmp_path / "rl/config.json").write_text(json.dumps(more))
    with pytest.raises(ValueError, match=told):
        collect.collect_rows(runs, metrics)
    # Of another name they may differ: the arms were given different files.
    (tmp_path / "rl/inputs.json").write_text(json.dumps({"start": "w", "files": "b"}))
    config = json.loads((tmp_path / "rl/config.json").read_text())
    (tmp_path / "rl/config.json").write_text(json.dumps({**config, "env": ["prompt_file=q.json"]}))
    assert collect.collect_rows(runs, metrics)


def test_tests_on_other_files_of_one_name_are_not_compared():
    one, two = {"env": {}, "files": "a"}, {"env": {}, "files": "b"}
    assert collect.differing_settings(one, two) == "files 'a' and 'b'"
    assert collect.differing_settings(one, {"env": {}}) == ""      # an earlier version
    # The same files may lie elsewhere.
    one, two = {"env": {"root": "old"}, "files": "a"}, {"env": {"root": "new"}, "files": "a"}
    assert collect.differing_settings(one, two) == ""
    del one["files"]
    assert collect.differing_settings(one, two) == "root 'old' and 'new'"


def test_a_copy_of_a_run_that_was_tested_again_is_known(tmp_path):
    """Its rows tell more than those of an earlier version."""
    write_run(tmp_path / "a", 5, {"steps": 5})
    rows = [{**row, "start": "start", "run": "a"} for row in
            running.read_jsonl(tmp_path / "a/eval.jsonl")]
    again = [{**row, "run": "b", "weights": "w", "texts": "t"} for row in rows]
    with pytest.raises(ValueError, match="a and b have the same row of step 0"):
        collect.check_no_run_is_there_twice({"SFT": [*rows, *again]})
    # Runs of two seeds may answer alike, as a blank model does.
    rows = [{**row, "weights": "v", "texts": "t"} for row in rows]
    collect.check_no_run_is_there_twice({"SFT": [*rows, *again]})
