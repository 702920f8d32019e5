"""support/compare.py: what stands beside the paper's numbers is its measure, or a named bound."""
import csv
import json
import random

import pytest

import envs
import evaluate
from conftest import ROOT
from envs import TASKS, make_env
from support import compare, running

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

def write_rows(folder, length, rows, **config):
    """A run on GP-L: rows of (step, seed, success)."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model": "start", **length, **config}))
    settings = {"task": "gp-l", "episodes": 100, "env": {"verify_iter": 5}}
    measures = {f"{name}{end}": 0.01 for name in ("success", "first_try", "retries", "repeats")
                for end in ("", "_stderr")}
    for step, seed, success in rows:
        running.log_jsonl(folder / "eval.jsonl", step=step, gflops=10.0 * step, split="id",
                          seed=seed, episodes=100, replies=100, settings=settings,
                          statuses={"correct": round(100 * success)}, reward=success,
                          **{**measures, "success": success})


def study_of(*folders):
    metrics = {name: task.metrics for name, task in envs.TASKS.items()}
    return compare.study_runs(folders, compare.Reference({}, {}, metrics))


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


def test_values_and_differences_are_taken_on_the_hands_that_all_arms_have_played(tmp_path, capsys):
    write_rows(tmp_path / "sft", {"steps": 1}, [(0, 0, 0.3), (1, 0, 0.35), (1, 1, 0.85)])
    write_rows(tmp_path / "rl", {"updates": 1}, [(1, 0, 0.3)])
    study = study_of(tmp_path / "sft", tmp_path / "rl")
    assert "Left out, since not all arms were tested on these hands: SFT on id, seed 1" in (
        capsys.readouterr().out)
    assert study.cells["success", "id", "SFT"].value == pytest.approx(35)
    found = compare.difference(study, "RL", "SFT", "success", "id")
    assert found.value == pytest.approx(-5)
