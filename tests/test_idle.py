"""Row-steps counted from the lengths of replies are those of the sampling loop (tests/idle.py)."""
import random

import pytest

import idle
import model
from conftest import tiny_folder
from support.decoder import LlamaDecoder, up_to_64

LLAMA = tiny_folder()


def one_step(self, ids):
    """What `LlamaDecoder.compute` does on a GPU, without a graph."""
    self.end += 1
    self.width = up_to_64(self.end)
    return self.step(ids)


@pytest.mark.parametrize("graphs, rule", [(False, "a tenth ended"),
                                          (True, "half ended, CUDA graphs")])
def test_the_loop_makes_as_many_row_steps_as_the_lengths_say(monkeypatch, graphs, rule):
    policy, appended = model.load_policy(LLAMA)[0], []
    policy.eos_id = 0                          # a uniform of 0 draws it
    policy.banned.fill_(False)
    monkeypatch.setattr(LlamaDecoder, "graphs", graphs)
    monkeypatch.setattr(LlamaDecoder, "compute",
                        lambda self, ids: (appended.append(len(ids)), one_step(self, ids))[1])
    for seed in range(3):
        rng = random.Random(seed)
        lengths = [min(24, 1 + int(rng.expovariate(1 / 6))) for _ in range(30)]
        uniforms = model.sampling_uniforms([(seed, i) for i in range(30)], 24).clip(min=0.1)
        uniforms[range(30), [length - 1 for length in lengths]] = 0
        appended.clear()
        replies = policy.generate([[5, 6, 7]] * 30, uniforms, 24, 1.0)
        assert [len(ids) for ids, _ in replies] == lengths
        assert sum(appended) == idle.row_steps(lengths, idle.DROPPED_BELOW[rule])


def test_the_shares_of_a_small_example():
    # Ten rows: nine replies of 3 tokens and one of 5. Two steps for ten rows; then nine have ended.
    groups = [[3] * 9 + [5]]
    assert idle.useful_steps(groups[0]) == 22 == idle.row_steps(groups[0], 0.9)
    assert idle.waiting_share(groups) == pytest.approx(1 - 22 / 40)
    # One of ten has ended: it is carried along until a second one ends.
    assert idle.idle_share([[2] + [4] * 9], 0.9) == pytest.approx(2 / 30)
    # Two of ten have ended: dropped by one rule, carried along by the other.
    assert idle.idle_share([[2] * 2 + [4] * 8], 0.9) == 0
    assert idle.idle_share([[2] * 2 + [4] * 8], 0.5) == pytest.approx(4 / 30)
    # Equal replies waste nothing.
    assert idle.waiting_share([[7] * 4, [3] * 4]) == idle.idle_share([[7] * 4], 0.5) == 0


def test_the_script_plays_a_rollout_and_prints_the_shares(capsys):
    idle.main(["--envs", "4"])
    told = capsys.readouterr().out
    assert "gp-l: 5 groups of 4 rows" in told and told.count("%") == 3
