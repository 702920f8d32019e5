"""Evaluation: what is counted, error bars, the comparison."""
import json
import math
import sys
from types import SimpleNamespace

import pytest

import envs
import evaluate
import model


class Puppet:
    """Stands in for a policy: replies what `choose(environment)` says, through the same ids as a model's."""

    def __init__(self, processor, environments, choose):
        self.processor, self.waiting, self.choose = processor, environments, choose

    def generate(self, prompts, uniforms, max_new_tokens, temperature, token_budget):
        playing = [env for env in self.waiting if not env.done]
        assert len(playing) == len(prompts) == len(uniforms)
        return [(model.encode_reply(self.processor, self.choose(env)), []) for env in playing]


def played(tiny, split, choose, verify_iter=3, episodes=20):
    environments = [envs.make_env("gp-l", split, verify_iter=verify_iter) for _ in range(episodes)]
    config = SimpleNamespace(max_new_tokens=8, temperature=0.0, generate_tokens=1)
    infos = evaluate.play_episodes(Puppet(tiny[1], environments, choose), tiny[1], environments, 0, config)
    return evaluate.summarise(infos, verify_iter)


@pytest.mark.parametrize("split", envs.GP_SPLITS)
def test_the_expert_succeeds_at_once_and_a_mute_player_never(tiny, split):
    expert = played(tiny, split, lambda env: env.expert_reply())
    assert expert["success"] == expert["first_try"] == expert["numbers_right"] == 1.0 and expert["stderr"] == 0
    assert expert["statuses"] == {"correct": 20} and expert["turn_accuracy"] == [1.0, 0.0, 0.0]
    mute = played(tiny, split, lambda env: "")
    assert mute["success"] == 0 and mute["statuses"] == {"illegal_formula": 60} and mute["reward"] == -10.0


def test_success_within_fewer_tries_is_read_from_the_same_episodes(tiny):
    late = played(tiny, "id", lambda env: env.expert_reply() if env.turn == 1 else env.flawed_reply())
    assert late["success_within"] == [0.0, 1.0, 1.0] and late["turn_accuracy"] == [0.0, 1.0, 0.0]
    assert late["first_try"] == 0 and late["success"] == 1


def test_error_bars_are_binomial_for_one_run_and_over_runs_for_several():
    row = {"success": 0.2, "stderr": math.sqrt(0.2 * 0.8 / 100), "run": "a"}
    assert evaluate.mean_and_error([row]) == pytest.approx((20.0, 4.0))
    rows = [row, {**row, "success": 0.4, "run": "b"}, {**row, "success": 0.6, "run": "c"}]
    assert evaluate.mean_and_error(rows) == pytest.approx((40.0, 20 / math.sqrt(3)))


def write_run(folder, arm, points, start="start", episodes=100):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model": start, **({"updates": 1} if arm == "RL" else {"steps": 1})}))
    for step, gflops, success in points:
        for split in ("id", "rule_ood"):
            model.log_jsonl(folder / "eval.jsonl", step=step, gflops=gflops, split=split, seed=0, success=success,
                            stderr=0.01, settings={"task": "gp-l", "episodes": episodes})


def test_the_table_compares_at_equal_compute_beside_the_paper(tmp_path, capsys, monkeypatch):
    write_run(tmp_path / "sft", "SFT", [(0, 0.0, 0.1), (5, 50.0, 0.08), (10, 100.0, 0.05), (90, 900.0, 0.01)])
    write_run(tmp_path / "rl", "RL", [(1, 60.0, 0.12), (2, 110.0, 0.15)])
    monkeypatch.setitem(sys.modules, "matplotlib", None)      # as if it were not installed
    evaluate.compare([str(tmp_path / "sft"), str(tmp_path / "rl")], str(tmp_path / "fig.png"))
    out = capsys.readouterr().out
    assert "| rule_ood | 10.0 ± 1.0 | 5.0 ± 1.0 (-5.0) | 15.0 ± 1.0 (+5.0) | 11.5 | 3.4 (-8.1) | 15.0 (+3.5) |" in out
    assert "matplotlib is not installed" in out and not (tmp_path / "fig.png").exists()


def test_the_figure_is_drawn_where_matplotlib_is(tmp_path):
    pytest.importorskip("matplotlib")
    write_run(tmp_path / "sft", "SFT", [(0, 0.0, 0.1), (5, 50.0, 0.08)])
    write_run(tmp_path / "rl", "RL", [(1, 60.0, 0.12)])
    evaluate.compare([str(tmp_path / "sft"), str(tmp_path / "rl")], str(tmp_path / "fig.png"))
    assert (tmp_path / "fig.png").stat().st_size > 10_000


def test_runs_of_other_starts_or_settings_are_not_mixed(tmp_path):
    write_run(tmp_path / "sft", "SFT", [(0, 0.0, 0.1), (5, 50.0, 0.08)])
    write_run(tmp_path / "far", "RL", [(1, 60.0, 0.12)], start="elsewhere")
    write_run(tmp_path / "few", "RL", [(1, 60.0, 0.12)], episodes=5)
    with pytest.raises(ValueError, match="started from start, elsewhere"):
        evaluate.compare([str(tmp_path / "sft"), str(tmp_path / "far")], "")
    with pytest.raises(ValueError, match="one set of settings"):
        evaluate.compare([str(tmp_path / "sft"), str(tmp_path / "few")], "")


def test_a_checkpoint_that_one_run_lacks_is_left_out_of_the_curve(tmp_path):
    rows = [{"split": "id", "step": step, "run": run, "gflops": 1.0 * step, "success": 0.5, "stderr": 0.1}
            for run, steps in (("a", (5, 7, 10)), ("b", (5, 10))) for step in steps]
    assert [gflops for gflops, _, _ in evaluate.curve(rows, "id")] == [5.0, 10.0]


def test_comparing_what_was_not_evaluated_says_what_to_run(tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match="run evaluate.py --run"):
        evaluate.compare([str(tmp_path / "run")], "")
