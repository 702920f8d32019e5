"""Evaluation: what is counted, error bars, the comparison."""
import json
import math
import shutil
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import envs
import evaluate
import model
from conftest import tiny_folder
from support import collect, command_line, compare, errors, evaluation, running, settings
from support.settings import Split

SMALL = tiny_folder()


def puppet(environments, choose):
    """Stands in for a model: replies what `choose(environment)` says."""
    def reply(turn, conversations):
        assert list(conversations) == [i for i, env in enumerate(environments) if not env.done]
        for i, (messages, _) in conversations.items():
            assert environments[i].messages == messages
        return [(choose(environments[i]), "stop") for i in conversations]
    return reply


def choose_expert(env):
    return env.expert_reply()


def played(split, choose, verify_iter=3, episodes=20, task="gp-l", **knobs):
    environments = [envs.make_env(task, split, verify_iter=verify_iter, **knobs)
                    for _ in range(episodes)]
    infos = evaluate.play_episodes(puppet(environments, choose), environments, 0)
    return evaluate.summarise(infos, verify_iter)


@pytest.mark.parametrize("split", envs.GP_SPLITS)
def test_the_expert_succeeds_at_once_and_a_mute_player_never(split):
    expert = played(split, lambda env: env.expert_reply())
    assert expert["success"] == expert["first_try"] == expert["numbers_right"] == 1.0
    assert expert["success_stderr"] == 0 and expert["statuses"] == {"correct": 20}
    assert expert["replies"] == 20
    mute = played(split, lambda env: "")
    assert mute["success"] == 0 and mute["statuses"] == {"illegal_formula": 60}
    assert mute["reward"] == -10.0


def test_success_within_fewer_tries_is_read_from_the_same_episodes():
    late = played("id", lambda env: env.expert_reply() if env.turn == 1 else env.flawed_reply())
    assert late["retries"] == 1 and late["repeats"] == 0
    stubborn = played("id", lambda env: "no" if env.turn < 2 else env.expert_reply())
    assert stubborn["retries"] == 0.5 and stubborn["repeats"] == 0.5
    assert stubborn["retries_stderr"] == 0
    assert late["success_within"] == [0.0, 1.0, 1.0] and late["first_try"] == 0
    assert late["solved"] == "1" * late["episodes"]
    assert late["success"] == 1
    # one of two, in every episode
    assert late["step_accuracy"] == 0.5 and late["step_accuracy_stderr"] == 0


def test_v_irl_counts_replies_turns_apart_and_routes(city):
    """Played by someone who misses every turn once, and by one who never turns."""
    def miss_once(env):
        first_at_turn = env.position.kind == "turn" and not env.tries
        return env.flawed_reply() if first_at_turn else env.expert_reply()
    late = played("id", miss_once, verify_iter=2, task="virl-l", root=city)
    assert late["success"] == 1 and late["success_within"] == [0, 1]
    assert late["step_accuracy_turn"] == 0.5 and late["first_try_turn"] == 0
    assert late["step_accuracy_forward"] == late["step_accuracy_stop"] == 1
    assert 0.5 < late["step_accuracy"] < 1
    assert late["first_try"] < late["step_accuracy"] and late["step_accuracy_stderr"] > 0
    straight = played("rule_ood", lambda env: env.format_reply("forward()"), verify_iter=2,
                      task="virl-l", root=city)
    # it begins with a turn
    assert straight["success"] == straight["step_accuracy"] == 0 and straight["replies"] == 40


def test_the_papers_step_accuracy_counts_a_wrong_reply_more_where_an_episode_was_cut_short(city):
    """Half of the routes go as the expert goes; half fail at the first position, in two replies."""
    environments = [envs.make_env("virl-l", root=city) for _ in range(20)]
    fails = environments[::2]

    def choose(env):
        return env.flawed_reply() if env in fails else env.expert_reply()
    infos = evaluate.play_episodes(puppet(environments, choose), environments, 0)
    row, right = evaluate.summarise(infos, 2), sum(len(env.rail) for env in environments[1::2])
    assert row["step_accuracy"] == pytest.approx(right / (right + 20))
    assert row["paper_step_accuracy"] == pytest.approx(right / (right + 30))
    assert row["paper_step_accuracy_stderr"] > 0
    assert row["success"] == 0.5


def test_a_guided_route_has_the_papers_measures_of_the_plain_one(city):
    """What comes behind the first failed position is in the measures by position alone."""
    rows = []
    for guided in (False, True):
        def fails_at_the_end(env):
            last = env.at == len(env.rail) - 1 or env.at == 2
            return env.format_reply("turn_direction(x)") if last else env.expert_reply()
        rows.append(played("id", fails_at_the_end, verify_iter=2, task="virl-l", root=city,
                           guided=guided))
    plain, guided = rows
    for name in ("success", "paper_step_accuracy", "paper_step_accuracy_stderr"):
        assert plain[name] == guided[name]
    assert guided["replies"] > plain["replies"] and guided["first_try"] > plain["first_try"]


def test_a_hand_is_solved_and_read_only_if_the_solving_reply_names_its_cards():
    def choose(env):
        if env in seeing:
            return env.expert_reply()
        return env.format_reply(env.formula).replace('"cards": [', '"cards": ["7", ')
    environments = [envs.make_env("gp-vl", resolution=48) for _ in range(8)]
    seeing = environments[:2]
    infos = evaluate.play_episodes(puppet(environments, choose), environments, 0)
    row = evaluate.summarise(infos, 5)
    assert (row["success"], row["solved_and_read"], row["recognition"]) == (1, 0.25, 0.25)


def test_rows_without_todays_measures_are_evaluated_again_and_not_compared(tmp_path, monkeypatch):
    write_run(tmp_path / "sft", "SFT", [(0, 0.0, 0.1), (5, 50.0, 0.08)])
    today = replace(envs.TASKS["gp-l"], metrics=("success", "novelty"))
    monkeypatch.setitem(envs.TASKS, "gp-l", today)
    told = ("eval.jsonl is from an earlier version, without novelty; "
            "run evaluate.py --run-folder .*sft again")
    with pytest.raises(ValueError, match=told):
        compare_runs([str(tmp_path / "sft")])


def test_what_is_said_of_an_expert_makes_no_other_evaluation(monkeypatch):
    """None plays in a test: runs trained on an imperfect one stand beside runs that were not."""
    monkeypatch.setattr(evaluate, "LocalModel", lambda *_: SimpleNamespace(
        reply=lambda of, split, seed, turn, pending: [("", "length") for _ in pending],
        forget=lambda of: None))
    rows = []
    expert = ("solution=random", "faults=leave_out:0.6", "faulty_tries=5")
    for env, num in (((), 1), (expert, 1), (("target=7",), 2)):
        config = evaluate.Config(task="gp-l", splits=("id",), episodes=2, env=env)
        evaluate.evaluate_model("x", "x", list(rows), config, lambda row, said: rows.append(row))
        assert len(rows) == num


def evaluated(monkeypatch, side_by_side, folder, episodes=11):
    """The row of an evaluation by a real player, of so many episodes at once."""
    rows = []
    monkeypatch.setattr(evaluate, "SIDE_BY_SIDE", side_by_side)
    config = evaluate.Config(task="gp-l", splits=("rule_ood",), episodes=episodes, temperature=1.0,
                             env=("verify_iter=2",), max_new_tokens=4, dtype="float32",
                             device="cpu")
    evaluate.evaluate_model(SMALL, "small", [], config, lambda row, said: rows.append(row),
                            folder / "eval_unfinished")
    return rows[0]


def test_episodes_in_blocks_make_the_row_that_all_at_once_make(monkeypatch, tmp_path):
    """And no more environments are there at once than two blocks have."""
    made, alive = [], []
    make_env = envs.make_env

    def counted(*args, **knobs):
        env = make_env(*args, **knobs)
        made.append(weakref.ref(env))
        alive.append(sum(1 for made_before in made if made_before() is not None))
        return env
    at_once = evaluated(monkeypatch, 500, tmp_path)
    assert at_once["replies"] == 22 and at_once["episodes"] == 11
    monkeypatch.setattr(envs, "make_env", counted)
    assert evaluated(monkeypatch, 3, tmp_path) == at_once
    # one more reads the settings
    assert len(made) == 12 and max(alive) <= 7

    monkeypatch.setattr(envs, "make_env", make_env)
    generate, calls = model.Policy.generate, []

    def stop_in_the_second_block(*args, **knobs):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return generate(*args, **knobs)
    monkeypatch.setattr(model.Policy, "generate", stop_in_the_second_block)
    with pytest.raises(KeyboardInterrupt):
        evaluated(monkeypatch, 3, tmp_path)
    assert list(tmp_path.glob("eval_unfinished_*"))
    assert evaluated(monkeypatch, 3, tmp_path) == at_once
    # two turns of each of the four blocks, without three that were known, but the one stopped again
    assert len(calls) == 3 + 1 + 5
    assert not list(tmp_path.glob("eval_unfinished_*"))

    # Kept replies of other weights are not gone on with, though they have the same path.
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        evaluated(monkeypatch, 3, tmp_path)
    monkeypatch.setattr(evaluation, "content_of", lambda path: "others")
    assert evaluated(monkeypatch, 3, tmp_path) == at_once
    assert len(calls) == 4 + 8


def test_the_visual_test_plays_the_routes_in_order_and_tells_the_cities_apart(city):
    """Played by someone who only knows the streets of the first two cities."""
    def choose(env):
        return env.expert_reply() if env.number < 4 else env.flawed_reply()
    environments = [envs.Navigation(root=city, data="mini", in_order=True, verify_iter=1)
                    for _ in range(36)]
    infos = evaluate.play_episodes(puppet(environments, choose), environments, 0)
    row = evaluate.summarise(infos, 1)
    assert row["success_by_city"] == [1, 1] + [0] * 7 and row["success"] == pytest.approx(4 / 18)
    plain = played("id", choose_expert, episodes=2, task="virl-l", root=city)
    assert "success_by_city" not in plain
    # The 18 routes came round twice: still 18 samples.
    once = evaluate.summarise(infos[:18], 1)
    assert row["routes"] == once["routes"] == 18
    assert row["success_stderr"] == pytest.approx(once["success_stderr"])
    assert once["success_stderr"] == pytest.approx(math.sqrt(4 / 18 * 14 / 18 / 18))


def test_routes_in_file_order_are_the_same_hands_whatever_the_seed(tmp_path):
    """So another seed, or another round of the same routes, makes no error smaller."""
    def rows(solved, step, seeds, rounds):
        found = []
        for seed in seeds:
            found.append({"start": "s", "run": "r", "split": "visual_ood", "seed": seed,
                          "step": step, "success": solved.count("1") / 18, "routes": 18,
                          "success_stderr": 0.5 / math.sqrt(18), "solved": rounds * solved})
        return found

    found = set()
    for seeds, rounds in (((0,), 1), ((0, 1), 1), ((0,), 3), ((0, 1), 2)):
        before = rows(9 * "0" + 9 * "1", 0, seeds, rounds)
        after = rows(18 * "1", 5, seeds, rounds)
        assert errors.score_and_error(before, "success")[1] == pytest.approx(50 / math.sqrt(18))
        found.add(round(errors.change_and_error(after, before, "success")[1], 9))
    assert found == {round(100 * math.sqrt(0.25 / 17), 9)}


def test_the_error_of_a_success_is_binomial_and_that_of_steps_is_over_episodes():
    binomial = math.sqrt(0.5 * 0.5 / 4)
    assert evaluate.share([1, 0, 0, 1], [1, 1, 1, 1]) == pytest.approx((0.5, binomial))
    # one route right, one wrong: two samples, not twenty
    mean, error = evaluate.share([10, 0], [10, 10])
    assert mean == 0.5 and error == pytest.approx(math.sqrt(0.5 * 0.5 / 2))


def test_the_paper_plays_234_hands_48_routes_and_18_of_the_visual_test():
    for task, split, expected in (("gp-l", "id", 234), ("virl-l", "rule_ood", 48),
                                  ("virl-vl", "visual_ood", 18), ("gp-vl", "visual_ood", 234)):
        config = SimpleNamespace(paper=True, task=task)
        assert evaluate.num_episodes(config, Split(split, {})) == expected


def test_a_row_stands_beside_the_papers_numbers_where_it_has_some():
    row = {"split": "rule_ood", "success": 0.1234, "paper_step_accuracy": 0.5}
    def beside(task, row):
        return compare.beside_paper(task, row, evaluate.PAPER)
    assert beside("gp-l", row) == ("success 12.3 %, in the paper 11.5 at the start, 3.4 after SFT, "
                                   "15.0 after RL")
    assert beside("virl-l", row).startswith(
        "paper step accuracy 50.0 %, in the paper 80.8 at the start")
    assert beside("gp-l", row | {"split": "id"}) == ""
    assert beside("gp-l", row | {"split": "rule_ood target=36"}) == ""


def test_error_bars_are_binomial_for_one_run_and_over_runs_for_several():
    row = {"success": 0.2, "success_stderr": math.sqrt(0.2 * 0.8 / 100), "run": "a", "start": "s"}
    assert errors.metric_and_error([row], "success") == pytest.approx((20.0, 4.0))
    rows = [row, {**row, "success": 0.4, "run": "b"}, {**row, "success": 0.6, "run": "c"}]
    assert errors.metric_and_error(rows, "success") == pytest.approx((40.0, 20 / math.sqrt(3)))
    rows += [{**row, "start": "t", "run": "d", "success": 0.6}]           # two starts: 40 and 60
    assert errors.metric_and_error(rows, "success") == pytest.approx((50.0, 10.0))


def test_success_is_compared_hand_by_hand_and_a_repeated_hand_counts_once():
    def row(start, run, solved, seed=0):
        share = solved.count("1") / len(solved)
        return {"start": start, "seed": seed, "run": run, "success": share, "solved": solved,
                "success_stderr": math.sqrt(share * (1 - share) / len(solved)), "split": "id"}

    starts, run = [row("s", ("s", 0), "10000000")], [row("s", "a", "11100000")]
    # Two hands of eight are new: 2 (1 - 2/8)^2 + 6 (2/8)^2 = 1.5, over 7, over 8.
    assert errors.error_over_hands(run, starts, "success") == pytest.approx(
        100 * math.sqrt(1.5 / 7 / 8))
    assert errors.change_and_error(run, starts, "success") == pytest.approx(
        (25.0, 100 * math.sqrt(1.5 / 7 / 8)))
    # The same change on other hands is less certain, though both scores are the same.
    other = [row("s", "a", "01110000")]
    assert errors.error_over_hands(other, starts, "success") > 1.3 * errors.error_over_hands(
        run, starts, "success")
    # Runs from two starts on the same hands are no sixteen hands. On other hands they are.
    both = [*starts, row("t", ("t", 0), "10000000")], [*run, row("t", "b", "11100000")]
    error = errors.error_over_hands(both[1], both[0], "success")
    assert error == errors.error_over_hands(run, starts, "success")
    apart = ([*starts, row("t", ("t", 1), "10000000", 1)], [*run, row("t", "b", "11100000", 1)])
    assert errors.error_over_hands(apart[1], apart[0], "success") == pytest.approx(
        error / math.sqrt(2))
    # Other metrics, other numbers of hands and rows without hands are not paired.
    assert errors.error_over_hands(run, starts, "first_try") is None
    assert errors.error_over_hands([row("s", "a", "1110")], starts, "success") is None
    assert errors.error_over_hands([{**run[0], "seed": 1}], starts, "success") is None
    del starts[0]["solved"]
    assert errors.error_over_hands(run, starts, "success") is None


def test_a_change_is_that_of_each_run_from_its_own_start_on_the_same_hands():
    def row(start, seed, success, run=None):
        return {"start": start, "seed": seed, "run": run or (start, seed), "success": success,
                "success_stderr": 0.03, "split": "id"}

    def change(rows):
        return errors.change_and_error(rows, starts, "success")
    starts = [row("s", 0, 0.2), row("s", 1, 0.4), row("t", 0, 0.1)]
    one = [row("s", 0, 0.25, "a")]
    assert change(one) == pytest.approx((5.0, 100 * math.hypot(0.03, 0.03)))
    seeds = [*one, row("s", 1, 0.47, "b")]                               # +5 and +7
    assert change(seeds) == pytest.approx((6.0, 3.0))    # over episodes; over runs it is 1
    # On the hands of seed 0 both runs share the error of the start, and of their hands.
    twice = [*one, row("s", 0, 0.27, "b")]                               # +5 and +7
    assert change(twice) == pytest.approx((6.0, math.hypot(3, 3)))
    seeds = [row("s", 0, 0.25, "a"), row("s", 1, 0.61, "b")]             # +5 and +21
    assert change(seeds) == pytest.approx((13.0, 8.0))
    assert change([*seeds, row("t", 0, 0.2, "c")]) == pytest.approx((11.5, math.hypot(3, 3) / 2))
    # A seed that the start was not tested with is left out.
    assert change([*one, row("s", 9, 0.9, "a")])[0] == pytest.approx(5.0)
    with pytest.raises(ValueError, match="a was tested on id with seed 9, but its start s never"):
        change([row("s", 9, 0.25, "a")])
    del seeds[0]["success_stderr"]                                       # of an earlier version
    assert change(seeds) == pytest.approx((13.0, 8.0)) and math.isnan(change(seeds[:1])[1])


def task_metrics():
    return {name: task.metrics for name, task in envs.TASKS.items()}


def load_arms(folders):
    return collect.load_arms(folders, task_metrics())[0]


def compare_runs(folders, figure=""):
    evaluate.compare_runs(evaluate.Config(compare=tuple(folders), figure=figure))


def write_run(folder, arm, points, start="start", episodes=100, knobs={}, **env):
    folder.mkdir(parents=True)
    length = {"RL": {"updates": 1}, "RFT": {"rounds": 2, "steps": 1}}.get(arm, {"steps": 1})
    (folder / "config.json").write_text(json.dumps({"model": start, **length, **knobs}))
    settings = {"task": "gp-l", "episodes": episodes,
                "env": {"verify_iter": 5, "target": 24, **env}}
    for step, gflops, success in points:
        for split in ("id", "rule_ood"):
            running.log_jsonl(
                folder / "eval.jsonl", step=step, gflops=gflops, split=split, seed=0,
                episodes=episodes,
                success=success, success_stderr=0.01, first_try=0.05, first_try_stderr=0.02,
                retries=0.0, retries_stderr=0.0, repeats=0.5,
                statuses={"correct": 5, "wrong_value": 95}, settings=settings)


def test_the_table_compares_at_equal_compute_beside_the_paper(tmp_path, capsys, monkeypatch):
    write_run(tmp_path / "sft", "SFT",
              [(0, 0.0, 0.1), (5, 50.0, 0.08), (10, 100.0, 0.05), (90, 900.0, 0.01)])
    write_run(tmp_path / "rl", "RL", [(1, 60.0, 0.12), (2, 110.0, 0.15)])
    monkeypatch.setitem(sys.modules, "matplotlib", None)      # as if it were not installed
    compare_runs([str(tmp_path / "sft"), str(tmp_path / "rl")], str(tmp_path / "fig.png"))
    out = capsys.readouterr().out
    assert """
hands solved within 5 tries
                   the training rule    the other rule
  start             10.0 ± 1.0           10.0 ± 1.0
  SFT                5.0 (-5.0 ± 1.4)     5.0 (-5.0 ± 1.4)
  RL                15.0 (+5.0 ± 1.4)    15.0 (+5.0 ± 1.4)
  paper: start                           11.5
  paper: SFT                              3.4
  paper: RL                              15.0

hands solved at the first try
                   the training rule    the other rule
  start              5.0 ± 2.0            5.0 ± 2.0
  SFT                5.0 (+0.0 ± 2.8)     5.0 (+0.0 ± 2.8)
""" in out
    # rows of an earlier version have no error of it
    assert "  start             50.0 ± nan           50.0 ± nan\n" in out
    assert max(map(len, out.splitlines()[:-1])) <= 80       # the last line has the figure's path
    assert "matplotlib is not installed" in out and not (tmp_path / "fig.png").exists()


def test_the_figure_is_drawn_where_matplotlib_is(tmp_path):
    pytest.importorskip("matplotlib")
    write_run(tmp_path / "sft", "SFT", [(0, 0.0, 0.1), (5, 50.0, 0.08)])
    write_run(tmp_path / "rl", "RL", [(1, 60.0, 0.12)])
    compare_runs([str(tmp_path / "sft"), str(tmp_path / "rl")], str(tmp_path / "fig.png"))
    assert (tmp_path / "fig.png").stat().st_size > 10_000


def test_runs_of_other_starts_or_settings_are_not_mixed(tmp_path):
    write_run(tmp_path / "sft", "SFT", [(0, 0.0, 0.1), (5, 50.0, 0.08)])
    write_run(tmp_path / "far", "RL", [(1, 60.0, 0.12)], start="elsewhere")
    write_run(tmp_path / "few", "RL", [(1, 60.0, 0.12)], episodes=5)
    told = "of start it found SFT, start; these started from start, elsewhere"
    with pytest.raises(ValueError, match=told):
        compare_runs([str(tmp_path / "sft"), str(tmp_path / "far")])
    told = "one set of settings for a split; on id .*sft and .*few differ: episodes 100 and 5$"
    with pytest.raises(ValueError, match=told):
        compare_runs([str(tmp_path / "sft"), str(tmp_path / "few")])
    write_run(tmp_path / "short", "RL", [(1, 60.0, 0.12)], verify_iter=3)
    with pytest.raises(ValueError, match="differ: verify_iter 5 and 3$"):
        compare_runs([str(tmp_path / "sft"), str(tmp_path / "short")])


def test_errors_are_over_starts_where_every_seed_has_its_own(tmp_path, capsys):
    for number, success in enumerate((0.1, 0.3)):
        write_run(tmp_path / f"sft{number}", "SFT", [(0, 0.0, success), (5, 50.0, 0.08)],
                  start=f"start{number}")
        write_run(tmp_path / f"rl{number}", "RL", [(1, 60.0, 0.12)], start=f"start{number}")
    compare_runs([str(tmp_path / f"{arm}{number}") for number in (0, 1) for arm in ("sft", "rl")])
    out = capsys.readouterr().out
    assert "from 2 starts: " in out and "errors are over\nstarts." in out
    assert "  start             20.0 ± 10.0 " in out
    assert "  SFT                8.0 (-12.0 ± 10.0) " in out
    # t = 1.2
    assert ("SFT on the training rule: -12.0 ± 10.0 points (p = 0.44), undecided; in the\n"
            "  paper it goes up.") in out


def test_what_rl_has_more_than_sft_is_paired_by_start(tmp_path, capsys):
    for number, (sft, rl) in enumerate(((0.08, 0.12), (0.20, 0.28))):
        write_run(tmp_path / f"sft{number}", "SFT", [(0, 0.0, 0.1), (5, 50.0, sft)],
                  start=f"start{number}")
        write_run(tmp_path / f"rl{number}", "RL", [(1, 60.0, rl)], start=f"start{number}")
    one, two = [[str(tmp_path / f"{arm}{number}") for arm in ("sft", "rl")] for number in (0, 1)]
    compare_runs(one + two)
    # 4 and 8 points: t = 3 with one degree of freedom
    out = " ".join(capsys.readouterr().out.split())
    assert ("RL minus SFT on the other rule: +6.0 ± 2.0 points (2 starts: +4.0, +8.0; p = 0.2); "
            "first tries +0.0 ± 2.8 points (2 starts: +0.0, +0.0; p = 1).") in out
    compare_runs(one)
    assert ("RL minus SFT on the other rule: +4.0 ± 1.4 points; first tries +0.0 ± 2.8\n"
            "  points.") in capsys.readouterr().out


@pytest.mark.parametrize("change, told", [
    ({"settings": {"task": "gp-vl", "episodes": 100, "env": {}}}, "tested on gp-l, .*rl on gp-vl"),
    ({"split": "unseen"}, None)])
def test_rows_of_another_task_are_refused_and_a_split_without_its_start_is_named(
        tmp_path, capsys, change, told):
    write_run(tmp_path / "sft", "SFT", [(0, 0.0, 0.1), (5, 50.0, 0.02)])
    write_run(tmp_path / "rl", "RL", [(1, 60.0, 0.12)])
    row = {**running.read_jsonl(tmp_path / "rl/eval.jsonl")[0], **change}
    if told:
        row["solved_and_read"] = row["recognition"] = row["rank_accuracy"] = 0.5
    running.append_line(tmp_path / "rl/eval.jsonl", row)
    if told:
        with pytest.raises(ValueError, match=told):
            load_arms([tmp_path / "sft", tmp_path / "rl"])
        return
    compare_runs([str(tmp_path / "sft"), str(tmp_path / "rl")])
    assert ("Not shown: unseen, on which the start was not tested."
            in " ".join(capsys.readouterr().out.split()))


def test_a_start_that_lacks_a_split_and_a_run_that_was_copied_are_refused(tmp_path):
    for start in "st":
        write_run(tmp_path / f"sft_{start}", "SFT", [(0, 0.0, 0.1), (5, 50.0, 0.02)], start=start)
        write_run(tmp_path / f"rl_{start}", "RL", [(1, 60.0, 0.12)], start=start)
    runs = sorted(tmp_path.iterdir())
    load_arms(runs)
    shutil.copytree(tmp_path / "rl_s", tmp_path / "rl_copy")
    with pytest.raises(ValueError, match="rl_copy have the same row of step 1, so they are one"):
        load_arms([*runs, tmp_path / "rl_copy"])
    log = tmp_path / "sft_t/eval.jsonl"
    rows = running.read_jsonl(log)
    running.write_jsonl(log, [row for row in rows if row["step"] or row["split"] == "id"])
    with pytest.raises(ValueError, match="the start t was not tested on rule_ood, as others were"):
        load_arms(runs)


def test_two_settings_never_have_one_name():
    """The fold is of the split before it; and with a cosine schedule steps are part of the rate."""
    mixes = (["id", "fold=train", "rule_ood"], ["id", "rule_ood", "fold=train"])
    names = collect.name_arms({i: {"steps": 200, "mix": mix} for i, mix in enumerate(mixes)})
    assert list(names.values()) == ["SFT mix id fold=train rule_ood",
                                    "SFT mix id rule_ood fold=train"]
    names = collect.name_arms({0: {"steps": 200}, 1: {"steps": 1000}, 2: {"updates": 5},
                               3: {"updates": 9}})
    assert list(names.values()) == ["SFT steps 200", "SFT steps 1000", "RL", "RL"]


def test_a_curve_of_several_settings_has_the_checkpoints_that_all_of_them_have(tmp_path):
    """A run that was stopped has one more."""
    for lr, points in ((1, (2, 4)), (2, (2, 4)), (3, (2, 3, 4))):
        write_run(tmp_path / f"sft{lr}", "SFT",
                  [(0, 0.0, 0.1), *((step, 10.0 * step, 0.1 * step) for step in points)],
                  knobs={"lr": lr})
    write_run(tmp_path / "rl", "RL", [(1, 40.0, 0.12)])
    paper = compare.Reference({}, {}, task_metrics())
    study = compare.study_runs(sorted(tmp_path.iterdir()), paper)

    class Axis:
        def plot(self, gflops, values, **_):
            self.points = list(zip(gflops, values))

        def fill_between(self, *_, **__):
            pass

    axis = Axis()
    compare.draw_method(axis, study, "SFT", ["orange"], "success", "id")
    assert axis.points == [(0.0, 10.0), (20.0, pytest.approx(20)), (40.0, pytest.approx(40))]


def test_no_error_decides_nothing():
    assert errors.judge_sign("up", 5.0, math.nan) == "undecided"


def test_the_evaluation_that_was_asked_for_last_counts_though_it_is_an_older_one(tmp_path):
    def row(episodes):
        return {"checkpoint": "c", "split": "id", "seed": 0, "step": 4,
                "settings": {"episodes": episodes}}
    for episodes in (32, 4):
        evaluation.log_evaluation(tmp_path, row(episodes), [])
    known = evaluation.open_logs(tmp_path, "step")
    split = settings.read_splits(("id",))[0]
    found = evaluation.finished_rows(known, split, {"episodes": 32}, ())
    assert found[0]["settings"] == {"episodes": 32} and evaluation.is_hidden(found[0], known)
    evaluation.log_evaluation(tmp_path, found[0], [], step=4)
    known = evaluation.open_logs(tmp_path, "step")
    assert [each["settings"]["episodes"] for each in known] == [32, 4, 32]
    found = evaluation.finished_rows(known, split, {"episodes": 32}, ())
    assert not evaluation.is_hidden(found[0], known)


@pytest.mark.parametrize("options, told", [
    ({"compare": ("a",), "splits": ("id",)}, "--splits id: has no effect with --compare"),
    ({"compare": ("a",), "start": False}, "--no-start: has no effect with --compare"),
    ({"model": "m", "start": False}, "--no-start: has no effect with --model"),
    ({"model": "m", "api_model": "x"}, "--api-model x: has no effect with --model"),
    ({"run_folder": "r", "api_timeout": 5.0}, "--api-timeout 5.0: has no effect with --run-folder"),
    ({"run_folder": "r", "paper": True, "episodes": 5},
     "--episodes 5: has no effect with --run-folder and --paper"),
    ({"api_url": "u", "api_model": "m", "out": "o", "kept_gib": 1.0},
     "--kept-gib 1.0: has no effect with --api-url"),
    ({"model": "m", "env": ("faults=ten:0.5",)}, "faults 'ten:0.5': has no effect here, since no"),
    ({"run_folder": "r", "splits": ("id", "faulty_tries=2")}, "faulty_tries '2': has no effect"),
    ({"model": "m", "top_p": 0.5}, "--top-p 0.5: has no effect at --temperature 0"),
    ({"run_folder": "r", "top_p": 0.5}, "--top-p 0.5: has no effect at --temperature 0")])
def test_an_option_without_effect_is_refused(options, told):
    with pytest.raises(ValueError, match=told):
        evaluation.check_options(evaluate.Config(**options))


def test_processes_are_started_before_the_folder_of_rows_is_opened(tmp_path, monkeypatch):
    """Opening it makes them wait for each other."""
    calls = []
    monkeypatch.setattr(evaluate.running, "start_processes",
                        lambda device: calls.append("start") or "cpu")
    monkeypatch.setattr(evaluation, "open_out",
                        lambda *_: calls.append("open") or ([], None))
    monkeypatch.setattr(evaluate, "evaluate_model", lambda *_: None)
    evaluate.evaluate_checkpoint(evaluate.Config(model="m", out="o", dtype="float32"))
    assert calls == ["start", "open"]


def test_a_third_arm_stands_beside_the_two(tmp_path, capsys):
    write_run(tmp_path / "sft", "SFT", [(0, 0.0, 0.1), (5, 50.0, 0.02)])
    write_run(tmp_path / "rl", "RL", [(1, 60.0, 0.12)])
    write_run(tmp_path / "rft", "RFT", [(2, 55.0, 0.07)])
    compare_runs([str(tmp_path / arm) for arm in ("sft", "rl", "rft")],
                 str(tmp_path / "fig.png"))
    out = capsys.readouterr().out
    assert "  RFT                7.0 (-3.0 ± 1.4) " in out
    assert "\nRFT on the" not in out            # the paper has no sign for it
    for pair, points in (("RL minus SFT", 10), ("RL minus RFT", 5), ("RFT minus SFT", 5)):
        assert f"{pair} on the other rule: +{points}.0 ± 1.4 points; first tries" in out
    assert "Of these 4 changes" in out


def test_one_start_and_one_run_under_several_spellings_are_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "city").mkdir()
    (tmp_path / "link").symlink_to("city")
    (tmp_path / "again").symlink_to("rl")
    starts = ["start/step_000004", "./start/step_000004/", f"{tmp_path}/start/step_000004"]
    write_run(tmp_path / "sft", "SFT", [(0, 0.0, 0.1), (5, 50.0, 0.08)], starts[0], root="city")
    write_run(tmp_path / "sft2", "SFT", [(0, 0.0, 0.1), (5, 50.0, 0.08)], starts[1], root="link")
    write_run(tmp_path / "rl", "RL", [(0, 0.0, 0.1), (1, 60.0, 0.12)], starts[2], root="./city/")
    arms = load_arms(["sft", "sft2/", "rl", f"{tmp_path}/rl", "again"])
    assert {arm: len(rows) for arm, rows in arms.items()} == {"start": 2, "SFT": 4, "RL": 2}
    assert {row["run"] for row in arms["start"]} == {("start/step_000004", 0)}
    compare_runs(["sft", "rl"])
    assert ("Runs from 1 start: SFT 1, RL 1. Each is tested on 100 hands; errors are over\nhands."
            ) in capsys.readouterr().out
    (tmp_path / "rl" / "config.json").unlink()
    with pytest.raises(ValueError, match="run 'rl': its config.json is gone, or names no model"):
        load_arms(["sft", "rl"])


def test_a_start_that_two_runs_hold_counts_once(tmp_path):
    write_run(tmp_path / "sft", "SFT", [(0, 0.0, 0.1), (5, 50.0, 0.08)])
    write_run(tmp_path / "rl", "RL", [(0, 0.0, 0.1), (1, 60.0, 0.12)])
    start = load_arms([tmp_path / "sft", tmp_path / "rl"])["start"]
    assert sorted(row["split"] for row in start) == ["id", "rule_ood"]


def test_a_checkpoint_that_one_run_lacks_is_left_out_of_the_curve(tmp_path):
    rows = [{"split": "id", "step": step, "run": run, "gflops": 1.0 * step}
            for run, steps in (("a", (5, 7, 10)), ("b", (5, 10))) for step in steps]
    assert [gflops for gflops, _ in collect.common_checkpoints(rows, "id")] == [5.0, 10.0]


def test_comparing_what_was_not_evaluated_says_what_to_run(tmp_path):
    for name in ("sft", "rl"):
        write_run(tmp_path / name, name.upper(), [(0, 0.0, 0.1)])
    (tmp_path / "rl" / "eval.jsonl").unlink()
    with pytest.raises(ValueError, match="run 'rl'|run evaluate.py --run-folder .*rl first"):
        compare_runs([str(tmp_path / "sft"), str(tmp_path / "rl")])
    (tmp_path / "rl" / "config.json").write_text('{"out": "rl"}')
    with pytest.raises(ValueError, match=rf"is no run folder; run folders in it: {tmp_path}/rl$"):
        compare_runs([str(tmp_path)])


TRAINED = {"model": "x", "task": "gp-vl", "env": ["resolution=112", "verify_iter=4"],
           "dtype": "float32"}


def take_settings(config, trained):
    return evaluation.take_settings(config, "runs/a", trained, envs.make_env, envs.TASKS)


@pytest.mark.parametrize("flags, task, env, dtype, told", [
    ({}, "gp-vl", ("resolution=112", "verify_iter=4"), "float32", ""),
    ({"env": ("verify_iter=4",)}, "gp-vl", ("resolution=112", "verify_iter=4"), "float32", ""),
    ({"env": ("verify_iter=2", "target=7")},
     "gp-vl", ("resolution=112", "verify_iter=2", "target=7"), "float32",
     " but for verify_iter=2 instead of 4, target=7 given here"),
    ({"task": "gp-vl", "dtype": "bfloat16"},
     "gp-vl", ("resolution=112", "verify_iter=4"), "bfloat16", ""),
    ({"task": "gp-l", "env": ("target=7",)}, "gp-l", ("target=7",), "float32",
     " but for target=7 given here, task gp-l instead of gp-vl")])
def test_a_run_is_evaluated_as_it_was_trained_but_for_what_flags_say_and_that_is_said(
        capsys, flags, task, env, dtype, told):
    config = take_settings(evaluate.Config(run_folder="runs/a", **flags), TRAINED)
    assert (config.task, config.env, config.dtype) == (task, env, dtype)
    assert config.run_folder == "runs/a"
    words = " ".join([task, *env])
    assert capsys.readouterr().out == f"runs/a: task {words}, as in its training{told}\n"


def test_a_checkpoint_alone_is_evaluated_as_in_the_run_that_it_lies_in(tmp_path, capsys):
    run = tmp_path / "run"
    for folder in "step_000004", "named", "step_000004/inside/step_000001":
        (run / folder).mkdir(parents=True)
    (run / "config.json").write_text(json.dumps(TRAINED))

    def settled(model, **flags):
        given = evaluate.Config(model=str(model), **flags)
        config = evaluation.as_in_its_run(given, envs.make_env, envs.TASKS)
        return config.task, config.env, capsys.readouterr().out
    as_trained = "gp-vl", ("resolution=112", "verify_iter=4")
    told = f"{run}: task gp-vl resolution=112 verify_iter=4, as in its training\n"
    assert settled(run / "step_000004") == (*as_trained, told)
    (tmp_path / "start_0").symlink_to(run / "step_000004")
    assert settled(tmp_path / "start_0") == (*as_trained, told)
    assert settled(run / "step_000004", env=("resolution=60",))[1][0] == "resolution=60"
    # Of a folder that is no checkpoint of a run nothing is known.
    for other in run / "named", run / "step_000004/inside/step_000001", tmp_path / "none":
        assert settled(other) == ("", (), "")
    (run / "config.json").write_text('{"model_type": "llama"}')
    assert settled(run / "step_000004") == ("", (), "")


def test_settings_of_a_run_give_way_to_a_split_that_has_them_of_its_own(capsys):
    trained = {**TRAINED, "task": "gp-l", "env": ["fold=train", "verify_iter=3"]}
    config = take_settings(evaluate.Config(splits=("id", "unseen")), trained)
    assert config.env == ("verify_iter=3",)
    assert "but for fold, which split unseen has of its own" in capsys.readouterr().out
    assert "fold=train" in take_settings(evaluate.Config(splits=("id",)), trained).env
    # The other splits are played as they were in training, and are called as without that split.
    assert config.splits == (Split("id", {"fold": "train"}, of_training=("fold",)),
                             Split("unseen", {}))
    assert [split.label for split in config.splits] == ["id", "unseen"]
    given = take_settings(evaluate.Config(splits=("id fold=all".split() + ["unseen"])), trained)
    assert [split.label for split in given.splits] == ["id fold=all", "unseen"]
    # A rule makes another split.
    trained = {**TRAINED, "task": "virl-l", "env": ["action_space=relative"]}
    config = take_settings(evaluate.Config(splits=("id", "rule_ood")), trained)
    assert [split.label for split in config.splits] == ["id action_space=relative", "rule_ood"]


def test_a_row_is_the_same_whichever_splits_are_tested_beside_it():
    trained = {**TRAINED, "task": "gp-l", "env": ["fold=train"]}
    chosen = []
    for splits in (("rule_ood",), ("rule_ood", "unseen"), ("rule_ood", "rule_ood")):
        config = take_settings(evaluate.Config(splits=splits, dtype="float32"), trained)
        first, *more = settings.read_splits(config.splits)
        assert len(more) == len(set(splits)) - 1                 # each is played once
        env = envs.make_env("gp-l", first.name, settings.read_settings(config.env),
                            **first.settings)
        chosen.append((first.label, evaluation.chosen_settings(config, env)))
    assert chosen[0][0] == "rule_ood" and chosen[0][1]["env"]["fold"] == "train"
    assert chosen[1] == chosen[2] == chosen[0]


@pytest.mark.parametrize("trained, told", [
    ({"mix": ["id"]}, True), ({"mix": ["id", "fold=train"]}, False), ({}, True),
    ({"split": ["id"], "env": ["fold=train"]}, False), ({"data": "d.json"}, True),
    ({"mix": ["id:0.9", "fold=train", "rule_family:0.1"]}, True)])
def test_held_out_hands_that_a_run_may_have_trained_on_are_said(trained, told, capsys):
    trained = {"model": "x", "task": "gp-l", "dtype": "float32", **trained}
    for splits in ("id", "unseen"), ("id", "rule_ood", "fold=test"):
        take_settings(evaluate.Config(splits=splits), trained)
        said = capsys.readouterr().out
        assert ("so it may know the hands of " + " ".join(splits[1:]) in said) == told
    take_settings(evaluate.Config(splits=("id", "rule_ood")), trained)
    assert "may know the hands" not in capsys.readouterr().out


def test_a_run_that_was_to_be_saved_every_0_steps_can_be_tested(tmp_path):
    (tmp_path / "step_000002").mkdir()
    running.log_jsonl(tmp_path / "metrics.jsonl", step=2, gflops=1.0, gflops_paper=1.0)
    trained = {"model": "m", "save_every": 0}
    found = evaluation.list_checkpoints(tmp_path, trained, with_start=False)
    assert [point.step for point in found] == [2]


def test_a_checkpoint_that_was_trained_anew_is_tested_anew(monkeypatch, tmp_path):
    """As after a change in rl.py: its rows are not those of the checkpoint of the same step."""
    played = []
    monkeypatch.setattr(evaluate, "LocalModel", lambda *_: SimpleNamespace(
        reply=lambda of, split, seed, turn, pending: [("", "length") for _ in pending],
        forget=lambda of: played.append(of)))
    run = tmp_path / "run"
    (run / "step_000001").mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"task": "gp-l", "model": "m", "env": []}))
    running.log_jsonl(run / "metrics.jsonl", step=1, gflops=1.0, gflops_paper=1.0)
    config = evaluate.Config(run_folder=str(run), start=False, splits=("id",), episodes=2,
                             dtype="float32", device="cpu")
    for weights, times in ((b"1", 1), (b"1", 1), (b"2", 2), (b"2", 2)):
        (run / "step_000001" / "model.safetensors").write_bytes(weights)
        evaluate.evaluate_run(config)
        assert len(played) == times
    # A row of an earlier version does not tell.
    rows = running.read_jsonl(run / "eval.jsonl")
    running.write_jsonl(run / "eval.jsonl", [{k: v for k, v in rows[0].items() if k != "weights"}])
    evaluate.evaluate_run(config)
    assert len(rows) == 2 and len(played) == 2


def test_a_start_that_was_made_anew_behind_its_run_is_not_tested_for_it(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"1")
    point = evaluation.Checkpoint(0, tmp_path, 0.0, 0.0)
    known = [{"step": 0, **point.numbers()}, {"step": 0}, {"step": 1}]
    assert point.rows(known) == known[:2]
    (tmp_path / "model.safetensors").write_bytes(b"2")
    with pytest.raises(ValueError, match="start .* has other weights .*: use --no-start"):
        point.rows(known)
    assert point.rows(known[1:]) == [{"step": 0}]


def test_the_last_lines_of_an_evaluation_hold_its_own_rows_alone(tmp_path, capsys):
    config = evaluate.Config(task="gp-l", splits=("id",), episodes=10, dtype="float32")
    for step, episodes, temperature, success in ((1, 500, 0.0, 0.9), (1, 10, 0.0, 0.2),
                                                 (2, 10, 0.0, 0.3), (2, 10, 1.0, 0.8)):
        used = replace(config, episodes=episodes, temperature=temperature)
        row = {"split": "id", "seed": 0, "success": success,
               "settings": evaluation.chosen_settings(used, envs.make_env("gp-l", "id"))}
        running.log_jsonl(tmp_path / "eval.jsonl", step=step, **row)
    running.log_jsonl(tmp_path / "eval.jsonl", step=3, **{**row, "split": "rule_ood"})
    evaluation.print_path(tmp_path, config, envs.make_env, "success")
    assert capsys.readouterr().out == "id, seed 0: success in % (step): 20.0 (1), 30.0 (2)\n"


def test_arms_are_compared_where_every_run_of_both_has_been(tmp_path, capsys):
    """A long run beside a short one of its arm moves no column to where the short one never was."""
    write_run(tmp_path / "sft", "SFT", [(0, 0.0, 0.1), (5, 50.0, 0.08), (20, 200.0, 0.02)])
    write_run(tmp_path / "long", "RL", [(1, 50.0, 0.12), (4, 200.0, 0.3)])
    write_run(tmp_path / "short", "RL", [(1, 50.0, 0.14)])
    compare_runs([str(tmp_path / name) for name in ("sft", "long", "short")])
    out = capsys.readouterr().out
    assert "SFT                8.0 (-2.0 ± 1.4) " in out
    assert "RL                13.0 (+3.0 ± 1.4) " in out       # both on the same hands
    assert "\nCompared: SFT at 50 and RL at 50 GFLOPs of post-training.\n" in out


def test_an_arm_is_named_by_what_is_on_in_it_and_not_in_all_of_its_kind():
    sft = {"steps": 1, "lr": 1e-3, "freeze": False, "failed_tries": 0, "env": ["root=city"],
           "mix": ["id", "fold=train"]}
    rl = {"updates": 1, "lr": 1e-5, "env": ["root=city"]}
    configs = {"a": sft, "b": sft | {"freeze": True},
               "c": sft | {"failed_tries": 2, "mix": ["rule_family", "fold=train"]},
               "d": rl, "e": rl | {"env": ["root=city", "reward=random"]}}
    assert collect.name_arms(configs) == {
        "a": "SFT mix id", "b": "SFT freeze mix id", "c": "SFT failed_tries 2 mix rule_family",
        "d": "RL", "e": "RL reward=random"}


def test_panels_of_a_study_are_told_by_arm_with_changes_since_the_own_start(
        tmp_path, monkeypatch, capsys):
    def told(folder, *flags):
        monkeypatch.setattr(sys, "argv", ["panels.py", str(folder), *flags])
        panels.main()
        return capsys.readouterr().out.splitlines()
    monkeypatch.syspath_prepend(Path(evaluate.__file__).parent / "recipes")
    import panels
    for panel, start, before in (("virl", "x", 0.1), ("virl", "y", 0.3), ("deeper/cell", "x", 0.1)):
        (tmp_path / "study" / panel).mkdir(parents=True, exist_ok=True)
        for arm, success in (("RL", before + 0.1), ("SFT", before / 2)):
            # one run has evaluated the start for both
            points = [(0, 0.0, before)] if arm == "RL" else []
            write_run(tmp_path / "study" / panel / f"{arm}_{start}", arm,
                      [*points, (1, 5.0, 0.9), (2, 9.0, success)], start=start,
                      knobs={"task": "gp-l"})
    lines = told(tmp_path / "study")
    assert len(lines) == 2 + 2 * 4
    assert lines[2] == "| deeper/cell | RL | 1 | id | 10.0 | 10.0 |", lines
    assert "| virl | RL | 2 | rule_ood | 20.0 ± 10.0 | 10.0 ± 0.0 |" in lines
    assert "| virl | SFT | 2 | id | 20.0 ± 10.0 | -10.0 ± 5.0 |" in lines
    assert told(tmp_path / "study" / "deeper", "--every")[-1] == (
        "| SFT_x | 2 | 9 | rule_ood | 5.0 ± 1.0 | 5.0 ± 2.0 | 0.0 ± 0.0 | 50 | "
        "correct 5, wrong_value 95 |")
    every = tmp_path / "every.csv"
    told(tmp_path / "study" / "deeper", "--every", "--csv", str(every))
    assert every.read_text().splitlines()[0] == (
        "panel,run,step,gflops,split,success,success_error,first_try,first_try_error,retries,"
        "retries_error,repeats,replies_correct,replies_wrong_value")
    assert every.read_text().splitlines()[-1] == (
        "cell,SFT_x,2,9,rule_ood,5.0,1.0,5.0,2.0,0.0,0.0,50,5,95")
    write_run(tmp_path / "study" / "virl" / "RL_x2", "RL", [(1, 5.1, 0.9), (2, 9.1, 0.4)],
              start="./x", knobs={"task": "gp-l", "seed": 1})
    (tmp_path / "linked").symlink_to(tmp_path / "study" / "virl")
    with pytest.raises(SystemExit):
        told(tmp_path / "linked", "--gate", str(tmp_path / "gate.png"))
    message = "linked: --gate needs one of its panels two_by_two/fault_alone, gate/share_0.05"
    assert message in capsys.readouterr().err
    # seeds of a start are averaged first: 20, not 16.7
    for study, name in (("study", "virl"), ("linked", ".")):
        line = f"| {name} | RL | 2 | rule_ood | 20.0 ± 10.0 | 15.0 ± 5.0 |"
        assert line in told(tmp_path / study)
    table, lines = tmp_path / "panels.csv", told(tmp_path / "study")
    assert told(tmp_path / "study", "--csv", str(table)) == [*lines, "", f"rows: {table}"]
    written = table.read_text().splitlines()
    assert written[0] == "panel,arm,runs,split,start,start_error,change,change_error"
    assert "deeper/cell,RL,1,id,10.0,,10.0," in written
    assert "virl,RL,2,id,20.0,10.0,15.0,5.0" in written
    assert told(table) == lines                     # what was written is read again
    for text, flags, message in (
            ("# A page", [], "panels.csv: no table; its first line must be panel,arm,runs"),
            (written[0] + "\n", [], "change_error, and rows must follow"),
            (written[0] + "\nvirl,RL,2,id,20.0,x,1.0,\n", [], "panels.csv, line 2: could not"),
            (written[0] + "\nvirl,RL\n", [], "panels.csv, line 2: expected 8 fields"),
            ("x" * 200_000, [], "field larger than field limit"),
            (written[0] + '\nvirl,"' + "x" * 200_000, [], "field larger than field limit"),
            ("", ["--every"], "--paths and --every need the runs")):
        table.write_text(text)
        with pytest.raises(SystemExit):
            told(table, *flags)
        assert message in capsys.readouterr().err
    (tmp_path / "study" / "virl" / "RL_y" / "eval.jsonl").unlink()
    # Rows that were written twice, runs that are there twice, and runs with other settings.
    log = tmp_path / "study" / "deeper" / "cell" / "SFT_x" / "eval.jsonl"
    lines = told(tmp_path / "study" / "deeper", "--every")
    log.write_text(2 * log.read_text())
    assert told(tmp_path / "study" / "deeper", "--every") == lines
    told(tmp_path / "study" / "deeper", "--every", "--csv", str(every))
    assert len(every.read_text().splitlines()) == len(lines) - 1
    shutil.copytree(log.parent, log.parent.with_name("copy"))
    write_run(tmp_path / "few" / "cell", "RL", [(0, 0.0, 0.1)], episodes=500,
              knobs={"task": "gp-l"})
    write_run(tmp_path / "few" / "RL", "RL", [(1, 5.0, 0.2)], episodes=10, knobs={"task": "gp-l"})
    for folder, message in ((tmp_path / "study" / "deeper", "are one run twice: leave one out"),
                            (tmp_path / "few", "differ: episodes 10 and 500")):
        with pytest.raises(SystemExit):
            told(folder)
        assert message in capsys.readouterr().err
    shutil.rmtree(log.parent.with_name("copy"))
    nothing = "other: no evaluated run in a folder of a folder there"
    for folder, message, *flags in (("study", "has evaluated its start y on id"),
                                    ("other", nothing), ("other", nothing, "--every")):
        with pytest.raises(SystemExit):
            told(tmp_path / folder, *flags)
        assert message in capsys.readouterr().err


def test_an_error_that_one_process_meets_alone_is_told_by_it(monkeypatch, capsys):
    def too_long(*_, **__):
        raise ValueError("its 125 tokens are too many")
    monkeypatch.setattr(evaluate, "play_episodes", too_long)
    monkeypatch.setattr(command_line, "RANK", 1)
    with pytest.raises(SystemExit):
        evaluate.main(evaluate.Config(model=tiny_folder(), device="cpu", dtype="float32"))
    assert capsys.readouterr().err.endswith(
        f"error: {tiny_folder()}, id, seed 0: its 125 tokens are too many\n")


def test_an_arm_is_averaged_at_the_last_step_that_all_of_its_runs_have(tmp_path, monkeypatch,
                                                                      capsys):
    monkeypatch.syspath_prepend(Path(evaluate.__file__).parent / "recipes")
    import panels
    for seed, scores in enumerate(([(0, 0.0, 0.1), (1, 5.0, 0.2)],
                                   [(0, 0.0, 0.1), (1, 5.0, 0.4), (2, 10.0, 0.9)])):
        write_run(tmp_path / f"rl{seed}", "RL", scores, knobs={"task": "gp-l", "seed": seed})
    row, *_ = panels.rows_of({"panel": panels.read_panel(tmp_path)})
    assert (row.runs, round(row.change, 6)) == (2, 20)
    told = capsys.readouterr().err
    assert f"RL: step 2 on id is left out, since {tmp_path}/rl0 was not tested there\n" in told
    # A test that was stopped between two splits.
    rows = [{"step": 1, "split": split, "run": run} for split, run in
            (("id", "a"), ("id", "b"), ("rule_ood", "a"))]
    assert panels.of_all_runs("RL", rows) == rows[:2]
    # Of one run that was tested with two seeds the change has no error over runs.
    pairs = panels.over_starts({"start": {"run": [(10, 20), (20, 40)]}})
    assert pairs == [(15, 30)]


def test_the_gates_picture_holds_the_shares_that_were_run(tmp_path, monkeypatch):
    plt = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.syspath_prepend(Path(evaluate.__file__).parent / "recipes")
    import panels
    # shares 0.15 and 0.3, and a panel of no share
    names = ("two_by_two/both", "gate/share_0.3", "virl")
    for name in names:
        (tmp_path / name).mkdir(parents=True)
        for arm in ("SFT", "RL"):
            write_run(tmp_path / name / arm, arm, [(0, 0.0, 0.1), (1, 5.0, 0.2)],
                      knobs={"task": "gp-l"})
    found = {name: panels.read_panel(tmp_path / name) for name in names}
    figure, axes = panels.draw_gate(plt, panels.rows_of(found))
    for axis in axes.flat:
        curves = [line for line in axis.get_lines() if line.get_marker() == "o"]
        points = [line.get_xydata().round(6).tolist() for line in curves]
        assert points == 2 * [[[0.15, 10], [0.3, 10]]]
    plt.close(figure)


def test_several_settings_of_an_arm_stand_side_by_side(tmp_path, capsys):
    for name, lr, seed, success in (("a", 1e-3, 0, 0.02), ("b", 1e-3, 1, 0.04),
                                    ("c", 1e-4, 0, 0.2), ("d", 1e-4, 1, 0.22)):
        write_run(tmp_path / name, "SFT", [(0, 0.0, 0.1), (5, 50.0, success)],
                  knobs={"lr": lr, "seed": seed, "env": ["root=city"], "save_every": seed})
    write_run(tmp_path / "rl", "RL", [(1, 50.0, 0.15)], knobs={"lr": 1e-5, "temperature": 0.2})
    compare_runs([str(tmp_path / name) for name in ("c", "rl", "a", "b", "d")])
    out = capsys.readouterr().out
    assert "Runs from 1 start: SFT lr 0.0001 2, SFT lr 0.001 2, RL 1. Each is tested" in out
    assert """
  start             10.0 ± 1.0           10.0 ± 1.0
  SFT lr 0.0001     21.0 (+11.0 ± 1.4)   21.0 (+11.0 ± 1.4)
  SFT lr 0.001       3.0 (-7.0 ± 1.4)     3.0 (-7.0 ± 1.4)
  RL                15.0 (+5.0 ± 1.4)    15.0 (+5.0 ± 1.4)
""" in out
    assert "SFT lr 0.0001 on the other rule: +11.0 ± 1.4 points (p = 0.081), " in out
    assert "Of these 6 changes 4 go as in the paper, 2 go the other way, 0 are undecided" in out
    write_run(tmp_path / "other", "RL", [(1, 50.0, 0.15)], start="other",
              knobs={"lr": 1e-5, "temperature": 0.2})
    told = (r"of each start all arms \(start, SFT lr 0.0001, SFT lr 0.001, RL\); "
            "of other it found RL")
    with pytest.raises(ValueError, match=told):
        compare_runs([str(tmp_path / name) for name in ("a", "c", "rl", "other")])


def test_a_run_named_twice_and_rows_that_came_twice_count_once(tmp_path):
    write_run(tmp_path / "sft", "SFT", [(0, 0.0, 0.1), (5, 50.0, 0.08), (5, 50.0, 0.08)])
    write_run(tmp_path / "rl", "RL", [(1, 60.0, 0.12)], start="./start/")
    arms = load_arms([f"{tmp_path}/sft", f"{tmp_path}/./rl/", f"{tmp_path}/rl"])
    assert {arm: len(rows) for arm, rows in arms.items()} == {"start": 2, "SFT": 2, "RL": 2}


def test_the_sentence_judges_each_split_by_the_papers_own_measure_beyond_two_standard_errors(
        tmp_path, capsys):
    judged = [errors.judge_sign("up", change, 1.0) for change in (2.1, 1.9, -1.9, -2.1)]
    assert judged == ["met", "undecided", "undecided", "not met"]
    assert errors.judge_sign("down", -2.1, 1.0) == "met"
    # Student's t that 5 % exceed, by the number of runs
    table = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 10: 2.262}
    found = [errors.p_value(-t, 1.0, num) for num, t in table.items()]
    assert found == pytest.approx([0.05] * 5, rel=1e-3)
    assert [errors.p_value(change, 0.0, 3) for change in (0.0, 1.0)] == pytest.approx([1, 0])
    paper = compare.Reference(evaluate.PAPER, evaluate.SIGNS, task_metrics())
    assert paper.metric("virl-vl", "visual_ood") == "success"
    assert paper.metric("virl-vl", "id") == "paper_step_accuracy"
    write_run(tmp_path / "sft", "SFT", [(0, 0.0, 0.1), (5, 50.0, 0.05)])
    write_run(tmp_path / "rl", "RL", [(1, 50.0, 0.15)])
    compare_runs([str(tmp_path / "sft"), str(tmp_path / "rl")])
    told = capsys.readouterr().out.split("Found, in points of success:\n")[1]
    assert told.startswith("""\
SFT on the training rule: -5.0 ± 1.4 points, unlike the paper, where it goes up.
RL on the training rule: +5.0 ± 1.4 points, as in the paper, where it goes up.
SFT on the other rule: -5.0 ± 1.4 points, as in the paper, where it goes down.
RL on the other rule: +5.0 ± 1.4 points, as in the paper, where it goes up.
""")
    assert "Of these 4 changes 3 go as in the paper, 1 go the other way, 0 are undecided" in told


def test_only_the_replies_of_what_is_done_are_forgotten(tmp_path):
    mine, other = tmp_path / "eval_unfinished_7.jsonl", tmp_path / "eval_unfinished_8.jsonl"
    for of in ("a", "b"):
        running.append_line(mine, {"of": of, "turn": 0, "replies": {}})
    running.append_line(other, {"of": "a", "turn": 0, "replies": {}})
    evaluation.KeptReplies(tmp_path / "eval_unfinished").forget("a")
    assert [row["of"] for row in running.read_jsonl(mine)] == ["b"] and not other.exists()
