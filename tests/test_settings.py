"""Settings and splits as a user writes them: one syntax for all scripts, and words out of place."""
import json

import pytest

import evaluate
import rl
import sft
from conftest import tiny_folder
from support import running, training
from support.chat import read_text
from support.settings import Split, read_settings, read_splits, read_value
from test_scripts import RL, flags


def test_settings_are_words_with_an_equals_sign():
    assert read_settings(("rule=11,11,11", "target=36", "root=", "prompt_file=a=b.json")) == {
        "rule": "11,11,11", "target": "36", "root": "", "prompt_file": "a=b.json"}
    assert read_settings(("target=36", "target=7")) == {"target": "7"} and read_settings(()) == {}


@pytest.mark.parametrize("word", ["verify_iter", "=3", ""])
def test_a_setting_without_a_key_or_a_value_is_named(word):
    with pytest.raises(ValueError,
                       match=f"setting '{word}': expected KEY=VALUE, such as verify_iter=3"):
        read_settings(("target=36", word))


def test_settings_behind_a_split_are_for_it_alone():
    assert read_splits(("id:0.75", "rule=11,11,11", "target=36", "rule_ood", "id:2"),
                       weighted=True) == [
        Split("id", {"rule": "11,11,11", "target": "36"}, 0.75), Split("rule_ood", {}, 1.0),
        Split("id", {}, 2.0)]
    assert [split.label for split in read_splits(("id:0.75", "rule=11,11,11", "target=36",
                                                  "rule_ood"), weighted=True)] == [
        "id rule=11,11,11 target=36", "rule_ood"]


@pytest.mark.parametrize("words, told", [
    (("rule=11,11,11", "id"),
     "setting 'rule=11,11,11': the name of a split must stand before it, such as id rule=11,11,11"),
    (("id", "=3"), "setting '=3': expected KEY=VALUE"), ((), "no split is named"),
    (("id:x",), "split 'id:x': its weight 'x' must be a number above 0, as in id:0.7"),
    (("id:0",), "weight '0' must be a number above 0"),
    (("id", "rule_ood:-1"), "split 'rule_ood:-1'"),
    (("id:nan",), "weight 'nan'"), (("id:inf",), "weight 'inf'")])
def test_a_split_that_cannot_be_read_is_named(words, told):
    with pytest.raises(ValueError) as error:
        read_splits(words, weighted=True)
    assert told in str(error.value)


def test_a_weight_without_a_mix_is_named():
    with pytest.raises(ValueError, match="split 'id:0.5': only --mix has weights"):
        read_splits(("rule_ood", "id:0.5"))


@pytest.mark.parametrize("value, default, read", [
    ("5", 24, 5), ("-1", 0, -1), ("24", "", "24"), ("true", False, True), ("false", True, False),
    ("true", "", "true"),
    (5, "", 5), (None, 24, None), (0.5, 24, 0.5)])
def test_a_text_becomes_what_the_default_is_and_anything_else_stays(value, default, read):
    found = read_value("knob", value, default)
    assert found == read and type(found) is type(read)


@pytest.mark.parametrize("value, default, told", [
    ("2.5", 24, "knob '2.5': must be a whole number"), ("", 24, "knob '': must be a whole number"),
    ("yes", False, "knob 'yes': allowed are true, false"),
    ("True", False, "allowed are true, false"), ("1", True, "allowed are")])
def test_a_text_that_is_not_of_the_type_of_the_default_is_named(value, default, told):
    with pytest.raises(ValueError, match=told):
        read_value("knob", value, default)


# ---- What they do in the scripts

def config_of(script, **knobs):
    """The config that a command line gives."""
    return running.parse_config(script.Config, flags(**knobs))


def test_a_setting_in_the_mix_of_sft_holds_for_its_split_and_no_other():
    samples = sft.Samples(config_of(sft, mix=("id", "suits=HD", "rule_ood:0.5"),
                                    env=("feedback=plain",)))
    suits = {}
    for i in range(300):
        told = read_text(samples[i][0][0])
        env = samples.envs["K counts as 13" in told]
        assert json.dumps(env.cards) in told
        suits.setdefault("K counts as 13" in told, set()).update(suit for _, suit in env.hand)
    assert suits == {False: set("HD"), True: set("SHDC")}
    assert [env.feedback for env in samples.envs] == ["plain", "plain"]


def test_a_rule_of_ones_own_is_trained_on_and_stands_in_the_rows_of_the_test(tmp_path, device):
    own = ("id", "rule=11,11,11")
    rl.main(config_of(rl, out=tmp_path / "rl", device=device,
                      **{**RL, "model": tiny_folder(), "updates": 1, "split": own,
                         "env": ("verify_iter=2",)}))
    prompts = [row["messages"][0]["content"]
               for row in running.read_jsonl(tmp_path / "rl" / "turns.jsonl")]
    assert prompts
    assert all("J counts as 11, Q counts as 11 and K counts as 11." in prompt for prompt in prompts)
    evaluate.main(config_of(evaluate, run_folder=tmp_path / "rl", splits=("id", *own), episodes=3,
                            max_new_tokens=8, device=device,
                            no_start=True))
    rows = running.read_jsonl(tmp_path / "rl" / "eval.jsonl")
    assert [row["split"] for row in rows] == ["id", "id rule=11,11,11"]
    assert [row["settings"]["env"]["rule"] for row in rows] == ["face_cards_as_10", "11,11,11"]
    assert [row["replies"] for row in rows] == [6, 6]              # verify_iter is the run's


def test_one_split_only_is_trained_on_by_rl(tmp_path):
    with pytest.raises(ValueError,
                       match="--split id rule_ood: one split only, not rule_ood as well"):
        training.check_rl(rl.Config(out=str(tmp_path), model="a", split=("id", "rule_ood")))
