"""support/tiny.py: a model folder out of nothing."""
import json
import re

import pytest

import envs
import model
from support import tiny


def test_sample_texts_show_prompts_replies_and_verdicts_of_every_split():
    texts = list(tiny.sample_texts("gp-l", 3))
    assert all(isinstance(text, str) for text in texts)
    everything = "\n".join(texts)
    assert "J counts as 10" in everything and "J counts as 11" in everything
    assert "Correct." in everything and "it makes" in everything and '"formula": "' in everything


def test_texts_of_v_irl_are_of_the_training_routes_by_both_rules(city):
    everything = "\n".join(tiny.sample_texts("virl-l", 30, root=str(city)))
    assert re.search(r'"turn_direction\((slightly )?(left|right)\)"', everything)
    assert re.search(r'"turn_direction\(north', everything)


@pytest.mark.parametrize("knobs", [
    {}, {"rule": "face_cards_as_11_12_13"}, {"rule": "random"}, {"rule": "20,30,40"},
    {"target": 36}])
def test_atoms_hold_every_rank_value_and_sign_of_prompts_and_replies(knobs):
    env = envs.make_env("gp-l", "id", **knobs)
    atoms = tiny.atoms_of("gp-l", env)
    assert all(isinstance(atom, str) and atom for atom in atoms)
    for seed in range(100):
        env.reset(seed=seed)
        reply = json.loads(env.expert_reply())
        written = reply["cards"] + list(map(str, reply["number"])) + re.findall(
            r"\d+|\D", reply["formula"])
        assert set(written) <= set(atoms)


def write(folder, **knobs):
    tiny.main(tiny.Config(**{"out": str(folder), "size": "32x2", **knobs}))
    return folder


def test_as_a_script_it_writes_a_folder_that_trains_in_words(tmp_path, run_script):
    done = run_script("support/tiny.py", "--out", "blank", "--size", "32x2")
    assert done.returncode == 0, done.stderr
    policy, processor = model.load_policy(str(tmp_path / "blank"))
    size = sum(p.numel() for p in policy.backbone.parameters())
    assert done.stdout == f"blank: a LlamaForCausalLM of {size:,} parameters\n"
    assert policy.backbone.config.hidden_size == 32 and len(policy.backbone.model.layers) == 2
    assert not policy.picture_tokens
    prompt = model.encode(processor, envs.make_env("gp-l", "rule_ood").reset(0)[0])
    assert len(prompt) < 45
    assert (tmp_path / "blank" / "model.safetensors").read_bytes() == (
        write(tmp_path / "again") / "model.safetensors").read_bytes()
    other = write(tmp_path / "other", seed=1)
    assert (tmp_path / "blank" / "model.safetensors").read_bytes() != (
        other / "model.safetensors").read_bytes()
    assert model.load_policy(str(other))[1].get_vocab() == processor.get_vocab()


def test_with_pictures_it_writes_a_model_that_sees_them(tmp_path):
    policy, processor = model.load_policy(
        str(write(tmp_path / "blank", task="gp-vl", env=("resolution=60",))), vision=True)
    messages, _ = envs.make_env("gp-vl", resolution=60).reset(0)
    assert policy.picture_tokens == 65
    assert model.encode(processor, messages).count(processor.image_token_id) == 1


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_of_another_family_pictures_are_tokens(tmp_path, family, capsys):
    folder = write(tmp_path / "blank", task="gp-vl", env=("resolution=150",), family=family)
    policy, processor = model.load_policy(str(folder), vision=True)
    messages, _ = envs.make_env("gp-vl", resolution=150).reset(0)
    assert policy.backbone.config.model_type == family
    assert model.encode(processor, messages).count(processor.image_token_id) == 9
    assert f"blank: a {type(policy.backbone).__name__} of" in capsys.readouterr().out


def test_its_tokenizer_learns_the_task_by_the_settings_that_it_is_given(tmp_path, city):
    _, processor = model.load_policy(
        str(write(tmp_path / "blank", env=("rule=20,30,40", "target=99", "verify_iter=1"))))
    assert all(len(processor(number, add_special_tokens=False).input_ids) == 1
               for number in ("20", "30", "40", "99"))
    _, processor = model.load_policy(str(write(tmp_path / "walker", task="virl-l",
                                               env=(f"root={city}",))))
    assert len(processor("turn_direction(", add_special_tokens=False).input_ids) == 1


@pytest.mark.parametrize("knobs, told", [
    (dict(out=""), "--out '': must name a new folder"),
    (dict(size="33x2"),
     "--size '33x2': must be WIDTHxLAYERS, WIDTH a multiple of 32 and LAYERS at least 1"),
    (dict(size="32"), "--size '32': must be WIDTHxLAYERS"), (dict(size="0x2"), "--size '0x2'"),
    (dict(size="32x0"), "--size '32x0'"),
    (dict(size="32x1", task="gp-vl"),
     "--size '32x1': must be WIDTHxLAYERS, WIDTH a multiple of 32 and LAYERS at least 2"),
    (dict(task="virl-l"), "root '': V-IRL needs a folder"),
    (dict(env=("target",)), "setting 'target': expected KEY=VALUE")])
def test_what_cannot_be_made_is_named_and_leaves_nothing_behind(tmp_path, capsys, knobs, told):
    with pytest.raises(SystemExit) as ending:
        write(tmp_path / "blank", **knobs)
    err = capsys.readouterr().err
    assert ending.value.code == 2 and told in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_there_is_left_as_it_is(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("!")
    with pytest.raises(SystemExit):
        write(tmp_path / "mine")
    assert "must name a new folder" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_stop_while_it_writes_leaves_no_folder_that_looks_whole(tmp_path, monkeypatch):
    """recipes/base.sh takes a folder that is there."""
    def stop(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(tiny.PreTrainedTokenizerFast, "save_pretrained", stop)
    with pytest.raises(KeyboardInterrupt):
        tiny.main(tiny.Config(out=str(tmp_path / "new" / "blank"), size="32x1"))
    assert list((tmp_path / "new").iterdir()) == []
    monkeypatch.undo()
    (tmp_path / "new" / "blank.unfinished").mkdir()      # as a kill leaves it
    tiny.main(tiny.Config(out=str(tmp_path / "new" / "blank"), size="32x1"))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["blank"]


def test_without_atoms_words_and_numbers_are_the_parts_of_a_text():
    processor = tiny.train_tokenizer(["Say 17 twice.", "Say 42 twice."] * 10, [])
    ids = processor("Say 42 twice.", add_special_tokens=False).input_ids
    assert [processor.decode([i]) for i in ids] == ["Say", " 42", " twice", "."]
    assert tiny.atoms_of("echo", None) == []
