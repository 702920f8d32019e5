"""Supervised fine-tuning: what the loss sees, data, resume."""
import copy
import json
from types import SimpleNamespace

import pytest
import torch

import envs
import model
import sft
from conftest import tiny_folder
from support import demonstrator, running


def some_samples(processor, num=6):
    env, samples = envs.make_env("gp-l", "id"), []
    for seed in range(num):
        messages, _ = env.reset(seed)
        for _ in range(seed % 3):
            messages, *_ = env.step(env.flawed_reply())
        samples.append((model.encode(processor, messages),
                        model.encode_reply(processor, env.expert_reply()), None))
    return samples


def gradients(policy, samples, token_budget):
    """The gradient of one step before it is applied, as one vector, and the loss."""
    twin = copy.deepcopy(policy)
    kept = {}

    def step():
        kept["g"] = torch.cat([p.grad.flatten() for p in twin.backbone.parameters()])
    optimizer = SimpleNamespace(step=step, zero_grad=lambda **_: None)
    config = sft.Config(micro_batch_tokens=token_budget, max_grad_norm=1e9)
    loss, norm = sft.train_step(twin, optimizer, samples, config)
    return kept["g"], loss, norm


def test_the_loss_equals_that_of_hugging_face_with_masked_labels(tiny):
    policy, processor = tiny
    samples = some_samples(processor)
    T = max(len(p) + len(r) for p, r, _ in samples)
    ids = torch.zeros(len(samples), T, dtype=torch.long)
    labels = torch.full((len(samples), T), -100)
    for row, (prompt, response, _) in enumerate(samples):
        end = len(prompt) + len(response)
        ids[row, :end] = torch.tensor(prompt + response)
        labels[row, len(prompt):end] = torch.tensor(response)
    expected = policy.backbone(ids.to(policy.device), labels=labels.to(policy.device)).loss
    _, loss, _ = gradients(policy, samples, 10 ** 6)
    assert loss == pytest.approx(expected.item(), abs=1e-5)


def test_micro_batches_change_neither_loss_nor_gradient(tiny):
    policy, processor = tiny
    samples = some_samples(processor)
    whole, loss, norm = gradients(policy, samples, 10 ** 6)
    for budget in (1, 300):
        cut, cut_loss, cut_norm = gradients(policy, samples, budget)
        assert cut_loss == pytest.approx(loss, abs=1e-5)
        assert cut_norm == pytest.approx(norm, rel=1e-4)
        torch.testing.assert_close(cut, whole, atol=1e-5, rtol=1e-4)


def test_prompt_tokens_are_no_targets_but_the_end_of_turn_is(tiny):
    policy, processor = tiny
    samples = some_samples(processor)
    policy = tiny[0]
    logprobs, _ = policy(model.collate([[sample[:2]] for sample in samples], policy.device))
    for (_, response, _), row in zip(samples, logprobs):
        assert (row != 0).nonzero()[:, 0].tolist() == list(range(len(response)))
        assert response[-1] == processor.eos_token_id


def test_one_sample_can_be_learnt_by_heart(tiny):
    policy, processor = copy.deepcopy(tiny[0]), tiny[1]
    optimizer = torch.optim.AdamW(policy.backbone.parameters(), lr=1e-2)
    sample = some_samples(processor, 1)
    for _ in range(60):
        loss, _ = sft.train_step(policy, optimizer, sample, sft.Config(micro_batch_tokens=10 ** 6))
    reply = policy.generate([sample[0][0]], torch.zeros(1, 60), 60, 0.0)[0][0]
    assert loss < 0.05 and reply == sample[0][1]


def test_samples_come_from_the_splits_of_the_mix_in_their_shares():
    samples = sft.Samples(sft.Config(mix=("id:0.75", "rule_ood:0.25"), seed=3))
    told = [samples[i][0][0]["content"] for i in range(400)]
    share = sum("K counts as 13" in text for text in told) / 400
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / 400) ** 0.5
    again, other = (sft.Samples(sft.Config(mix=("id:0.75", "rule_ood:0.25"), seed=seed))
                    for seed in (3, 4))
    assert told == [again[i][0][0]["content"] for i in range(400)]
    assert told[:9] != [other[i][0][0]["content"] for i in range(9)]


def test_failed_tries_precede_the_expert_reply_and_are_not_the_target():
    samples = sft.Samples(sft.Config(failed_tries=3))
    counts = set()
    for i in range(60):
        messages, reply = samples[i]
        counts.add(len(messages) // 2)
        assert messages[-1]["role"] == "user" and all(reply != m["content"] for m in messages)
    assert counts == {0, 1, 2, 3}


@pytest.mark.parametrize("mix", ["id:x", "id:0", "id:-1", "id:nan", "elsewhere:1"])
def test_a_bad_mix_is_refused(mix):
    with pytest.raises(ValueError, match="must be a number above 0|elsewhere"):
        sft.Samples(sft.Config(mix=(mix,)))


def test_settings_that_a_data_file_or_failed_tries_would_ignore_are_refused(tmp_path):
    (tmp_path / "data.json").write_text(json.dumps([
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}]))
    for knobs in (dict(failed_tries=2), dict(mix=("id", "suits=S")), dict(mix=("id", "rule_ood")),
                  dict(mix=("rule_ood",))):
        with pytest.raises(ValueError,
                           match="--data: --mix, --failed-tries and --balance are for samples"):
            sft.Samples(sft.Config(data=str(tmp_path / "data.json"), **knobs))
    for knobs in (dict(mix=("id", "verify_iter=2")), dict(env=("verify_iter=2",))):
        with pytest.raises(ValueError, match="verify_iter 2 must be above --failed-tries 2"):
            sft.Samples(sft.Config(failed_tries=2, **knobs))
    assert sft.Samples(sft.Config(failed_tries=2, env=("verify_iter=3",))).envs[0].verify_iter == 3


def test_the_picture_of_a_sample_is_drawn_once(city, monkeypatch):
    """A sample may stand anywhere on a route: the picture at its start would be for nothing."""
    drawn = []
    for task, env in (("gp-vl", ("resolution=48",)), ("virl-l", (f"root={city}",))):
        samples = sft.Samples(sft.Config(task=task, env=env, failed_tries=1))
        monkeypatch.setattr(samples.envs[0], "vision", True)
        monkeypatch.setattr(samples.envs[0], "picture", lambda: drawn.append(task))
        for i in range(10):
            samples[i]
    assert drawn == 10 * ["gp-vl"] + 10 * ["virl-l"]


@pytest.mark.parametrize("where", ["env", "mix"])
def test_a_setting_without_effect_is_refused(where, tmp_path):
    """Else a run would look as if it had been made with it, and a test of the run would take it."""
    def samples(setting, **knobs):
        knobs[where] = (setting,) if where == "env" else ("id", setting)
        return sft.Samples(sft.Config(**knobs))

    with pytest.raises(ValueError, match="reward 'random': has no effect here, since SFT gets no"):
        samples("reward=random")
    with pytest.raises(ValueError, match="faulty_tries '2': .*, since the demonstrator has no fau"):
        samples("faulty_tries=2")
    with pytest.raises(ValueError, match="guided 'true': .*, since no route is played to its end"):
        demonstrator.check_taught({"guided": "true"})
    assert samples("faults=ten:0.5") and samples("solution=random")
    (tmp_path / "data.json").write_text(json.dumps([
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}]))
    for setting in ("faults=ten:0.5", "faulty_tries=2", "solution=random"):
        with pytest.raises(ValueError, match="has no effect here, since replies are learnt as"):
            samples(setting, data=str(tmp_path / "data.json"))


def test_options_of_a_dump_and_of_a_training_are_not_mixed(tmp_path, capsys):
    for knobs, told in (({"num": 7}, "--num 7: is for --dump"),
                        ({"dump": f"{tmp_path}/d.json"}, "has no effect with --dump")):
        with pytest.raises(SystemExit):
            sft.main(sft.Config(out=str(tmp_path / "run"), model=tiny_folder(), **knobs))
        assert told in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_the_learning_rate_falls_to_0_or_stays(tmp_path):
    for schedule in ("cosine", "constant"):
        sft.main(sft.Config(out=str(tmp_path / schedule), model=tiny_folder(), steps=4,
                            batch_size=2, lr=1e-3, warmup_ratio=0.25,
                            schedule=schedule, dtype="float32", device="cpu"))
        rates = [row["lr"] for row in running.read_jsonl(tmp_path / schedule / "metrics.jsonl")]
        assert rates[0] == rates[1] == 1e-3
        assert rates[3] == 1e-3 if schedule == "constant" else rates[3] < 0.3e-3
