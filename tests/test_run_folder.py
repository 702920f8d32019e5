"""Run folders: whose they are, logs, checkpoints, what is damaged in them."""
import json
from dataclasses import dataclass

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import model
from support import run_folder, running
from test_model import some_prompts


def test_a_checkpoint_opens_in_plain_transformers_and_comes_back_whole(tiny, tmp_path):
    policy, processor = tiny
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3)
    samples = [(p, model.encode_reply(processor, "1+2")) for p in some_prompts(processor)]
    logprobs, values = policy(model.collate([[s] for s in samples], policy.device))
    (logprobs.sum() * 0 + values.sum() * 0).backward()
    optimizer.step()
    folder = run_folder.ensure_checkpoint(tmp_path, 7, policy, processor, optimizer, {"step": 7})
    assert folder.name == "step_000007" and not list(tmp_path.glob("*.tmp")) and not list(tmp_path.rglob("*.p*kl"))
    plain = AutoModelForCausalLM.from_pretrained(folder).to(policy.device)
    ids = torch.tensor([samples[0][0]], device=policy.device)
    assert torch.equal(plain(ids).logits, policy.backbone(ids).logits)
    assert AutoTokenizer.from_pretrained(folder)("J+10", add_special_tokens=False).input_ids == processor("J+10", add_special_tokens=False).input_ids
    again, its_processor = model.load_policy(str(folder), device=policy.device)
    for (name, p), (_, q) in zip(policy.named_parameters(), again.named_parameters()):
        assert torch.equal(p, q), name
    fresh = torch.optim.Adam(again.parameters(), lr=1e-3)
    assert run_folder.load_resume(folder, again, fresh) == {"step": 7}
    for p, q in zip(policy.parameters(), again.parameters()):
        assert all(torch.equal(optimizer.state[p][key], fresh.state[q][key]) for key in optimizer.state[p])


def test_weights_stay_and_resume_state_is_kept_for_the_newest_only(tiny, tmp_path):
    policy, processor = tiny
    optimizer = torch.optim.Adam(policy.parameters())
    for step in range(1, 5):
        run_folder.ensure_checkpoint(tmp_path, step, policy, processor, optimizer, {"step": step}, keep_resume=2)
    assert [p.name for p in run_folder.checkpoints(tmp_path)] == [f"step_{s:06d}" for s in range(1, 5)]
    assert [(p / "resume").exists() for p in run_folder.checkpoints(tmp_path)] == [False, False, True, True]


@pytest.mark.parametrize("moment", ["weights", "optimizer", "state"])
def test_a_full_disk_leaves_the_checkpoints_before_it_whole(tiny, tmp_path, monkeypatch, capsys, moment):
    policy, processor = tiny
    optimizer = torch.optim.Adam(policy.parameters())
    run_folder.ensure_checkpoint(tmp_path, 1, policy, processor, optimizer, {"step": 1})
    full = OSError(28, "No space left on device")

    def fill(*_, **__):
        raise full
    with monkeypatch.context() as disk:
        if moment == "weights":
            disk.setattr(type(policy.backbone), "save_pretrained", fill)
        elif moment == "optimizer":
            disk.setattr(run_folder, "save_file", lambda tensors, path: fill() if "optimizer" in str(path) else None)
        else:
            disk.setattr(run_folder.Path, "write_text", fill)
        with pytest.raises(SystemExit):
            run_folder.ensure_checkpoint(tmp_path, 2, policy, processor, optimizer, {"step": 2})
    assert "step_000002.tmp: [Errno 28] No space left on device; the checkpoints before it are whole" in capsys.readouterr().err
    assert [p.name for p in run_folder.checkpoints(tmp_path)] == ["step_000001"]
    assert run_folder.load_resume(tmp_path / "step_000001", policy, optimizer) == {"step": 1}
    assert run_folder.ensure_checkpoint(tmp_path, 2, policy, processor, optimizer, {"step": 2}).name == "step_000002"


def make_run(tmp_path, **changes):
    @dataclass
    class Config:
        out: str = str(tmp_path / "run")
        lr: float = 1.0
    return Config(**changes)


def test_a_run_goes_on_from_the_newest_complete_checkpoint_and_drops_later_log_lines(tiny, tmp_path, capsys):
    policy, processor = tiny
    config = make_run(tmp_path)
    assert run_folder.newest_checkpoint(config) is None and not list(tmp_path.iterdir())
    run_folder.open_run(config, None)
    run, optimizer = tmp_path / "run", torch.optim.Adam(policy.parameters())
    for step in (1, 2):
        run_folder.ensure_checkpoint(run, step, policy, processor, optimizer, {"step": step})
    (run / "step_000003.tmp" / "resume").mkdir(parents=True)          # a save that was killed
    (run / "step_000003.tmp" / "resume" / "state.json").write_text("{}")
    for step in (1, 2, 3):
        running.log_jsonl(run / "metrics.jsonl", step=step)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')                                  # a line that was killed
    newest = run_folder.newest_checkpoint(config)
    assert newest.name == "step_000002"
    run_folder.open_run(config, newest)
    assert "step_000003.tmp" in capsys.readouterr().out
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2]


def test_an_out_folder_of_another_config_or_with_foreign_files_is_refused_untouched(tmp_path):
    run_folder.open_run(make_run(tmp_path), None)
    before = (tmp_path / "run" / "config.json").read_text()
    with pytest.raises(ValueError, match="lr 1.0 there, 2.0 here"):
        run_folder.newest_checkpoint(make_run(tmp_path, lr=2.0))
    assert (tmp_path / "run" / "config.json").read_text() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("!")
    with pytest.raises(ValueError, match="not empty"):
        run_folder.newest_checkpoint(make_run(tmp_path, out=str(tmp_path / "mine")))
