"""A checkpoint means the same elsewhere: in transformers 5, and in the last release of version 4.

TRANSFORMERS4=PYTHON, an interpreter that has transformers 4.57, torch and pillow (for Qwen-VL also
torchvision), opens checkpoints of every family there. Without it only the files are looked at.
"""
import json
import os
import shutil
import subprocess

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

import model
from conftest import tiny_folder
from support import portable, run_folder
from support.chat import user_message
from test_families import WORKING, write_model

PYTHON4 = os.environ.get("TRANSFORMERS4")
OLD_LLAMA = {"rope_theta": 5e5}
LLAMA3 = {"rope_theta": 5e5, "rope_scaling": {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512}}
LONGROPE = {"rope_theta": 1e4, "original_max_position_embeddings": 512, "rope_scaling": {
    "type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]}}
VISION = {"mllama": "32x4", "qwen2_5_vl": "64x2", "qwen3_vl": "64x2"}


def save(folder, step, policy, processor):
    return run_folder.ensure_checkpoint(folder, step, policy, processor,
                                        torch.optim.AdamW(policy.parameters()), {"step": step})


def changed(folder, name, **changes):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---- What is written -----------------------------------------------------------------------------

@pytest.mark.parametrize("model_type, old", [("llama", OLD_LLAMA), ("llama", LLAMA3),
                                             ("phi3", LONGROPE)])
def test_a_config_says_the_rotary_embedding_in_the_old_words_and_the_new(model_type, old, tmp_path):
    folder = tmp_path / "model"
    write_model(folder, model_type, {}, WORKING[model_type][1])
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"]
    (folder / "config.json").write_text(json.dumps(config | old))
    saved = save(tmp_path, 1, *model.load_policy(str(folder)))
    written = json.loads((saved / "config.json").read_text())
    assert {name: written.get(name) for name in old} == old
    assert ("rope_scaling" in written) == ("rope_scaling" in old)
    assert written["rope_parameters"]["rope_theta"] == old["rope_theta"]
    read, expected = (AutoConfig.from_pretrained(path) for path in (saved, folder))
    assert read.rope_parameters == expected.rope_parameters


@pytest.mark.parametrize("config, older", [
    ({"model_type": "gemma3_text", "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}},
     {"rope_theta": 1e6, "rope_local_base_freq": 1e4,
      "rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    ({"model_type": "olmo3", "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 5e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 5e5}}}, {"rope_theta": 5e5}),
    ({"model_type": "glm4", "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
     {"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
    ({"model_type": "llama", "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
     {"rope_theta": 1e4}),
    ({"model_type": "mllama_text_model", "rope_parameters": {
        "rope_type": "default", "rope_theta": 5e5}},
     {"rope_theta": 5e5, "rope_scaling": {"rope_type": "default"}}),
    ({"model_type": "qwen2_5_vl_text", "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}},
     {"rope_theta": 1e6, "rope_scaling": {"rope_type": "default", "mrope_section": [2, 3, 3]}}),
])
def test_each_kind_of_rotary_embedding_has_its_old_words(config, older):
    before = json.dumps(config)
    assert portable.older_rope(config) == older
    assert json.dumps(config) == before


@pytest.mark.parametrize("model_type, full, sliding, told", [
    ("ministral", {"rope_type": "linear", "factor": 8.0}, {"rope_type": "default"},
     "one rotary embedding for each kind of layer"),
    ("olmo3", {"rope_type": "default"}, {"rope_type": "linear", "factor": 8.0},
     "a scaled rotary embedding in layers with a sliding window"),
    ("gemma3_text", {"rope_type": "default"}, None,
     "a kind of layer without a rotary embedding")])
def test_a_rotary_embedding_without_old_words_is_named(model_type, full, sliding, told):
    rope = {"full_attention": full | {"rope_theta": 1e4},
            "sliding_attention": sliding and sliding | {"rope_theta": 1e4}}
    with pytest.raises(ValueError, match=told):
        portable.older_rope({"model_type": model_type, "rope_parameters": rope})


def test_what_version_4_cannot_say_is_told_once_and_is_whole_in_version_5(tmp_path, capsys):
    rope = {"full_attention": {"rope_type": "default", "rope_theta": 5e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    folder = write_model(tmp_path / "model", "olmo3",
                         WORKING["olmo3"][0] | {"rope_parameters": rope}, WORKING["olmo3"][1])
    policy, processor = model.load_policy(folder)
    for step in (1, 2):
        saved = save(tmp_path / "run", step, policy, processor)
    told = capsys.readouterr().out
    assert told.count("transformers 4 has no words for one rotary base for each kind of layer, so "
                      "it would compute something else") == 1
    assert AutoConfig.from_pretrained(saved).rope_parameters == rope
    assert "rope_theta" not in json.loads((saved / "config.json").read_text())


def test_the_tokenizer_is_of_a_class_that_both_versions_have_and_gives_the_same_ids(tmp_path):
    policy, processor = model.load_policy(tiny_folder())
    saved = save(tmp_path, 1, policy, processor)
    config = json.loads((saved / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["additional_special_tokens"] == ["<|system|>", "<|user|>", "<|assistant|>"]
    assert "extra_special_tokens" not in config        # a list there ends version 4
    assert config["model_input_names"] == ["input_ids", "attention_mask"]    # no token_type_ids
    again = AutoTokenizer.from_pretrained(saved)
    text = "<|user|>J+10 ünï<|end_of_turn|>"
    assert again(text).input_ids == processor(text).input_ids
    assert again.all_special_ids == processor.all_special_ids


@pytest.mark.parametrize("stale, expected", [
    ("pad", "end"), (["pad", "bos"], ["pad", "bos", "end"]), (["end", "pad"], ["end", "pad"]),
    (None, "end")])
def test_generation_elsewhere_stops_at_the_end_of_a_turn(stale, expected, tmp_path):
    folder = shutil.copytree(tiny_folder(), tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = {"pad": tokenizer.pad_token_id, "bos": tokenizer.bos_token_id,
           "end": tokenizer.eos_token_id, None: None}

    def ids_of(names):
        return [ids[name] for name in names] if isinstance(names, list) else ids[names]
    for name in ("config.json", "generation_config.json"):
        changed(folder, name, eos_token_id=ids_of(stale))
    saved = save(tmp_path, 1, *model.load_policy(str(folder)))
    assert AutoConfig.from_pretrained(saved).eos_token_id == ids_of(expected)
    assert GenerationConfig.from_pretrained(saved).eos_token_id == ids_of(expected)


def test_the_end_of_a_turn_stands_in_the_config_of_the_words_of_a_vision_model(tmp_path):
    folder = shutil.copytree(tiny_folder(family="mllama", size="32x4"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    policy, processor = model.load_policy(str(folder))
    saved = save(tmp_path, 1, policy, processor)
    assert AutoConfig.from_pretrained(saved).text_config.eos_token_id == policy.eos_id


# ---- What version 4 makes of it ------------------------------------------------------------------

READER = """
import json, os, sys, torch
from pathlib import Path
from PIL import Image
from transformers import (AutoImageProcessor, AutoModelForCausalLM, AutoModelForImageTextToText,
                          AutoProcessor, AutoTokenizer)
found = {}
for folder in sorted(Path(sys.argv[1]).glob("*/step_000001")):
    rows = json.loads((folder.parent / "asked.json").read_text())
    vision = (folder.parent / "0.png").exists()
    kind = AutoModelForImageTextToText if vision else AutoModelForCausalLM
    model = kind.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder) if vision else tokenizer
    if vision:
        # The other kind resizes pictures by torchvision, a little otherwise.
        processor.image_processor = AutoImageProcessor.from_pretrained(folder, use_fast=False)
    num_rows = model.get_output_embeddings().weight.shape[0]
    special = [i for i, token in tokenizer.added_tokens_decoder.items()
               if token.special and i < num_rows and i != tokenizer.eos_token_id]
    found[folder.parent.name] = answers = []
    for i, text in enumerate(rows):
        content = [{"type": "image"}, {"type": "text", "text": text}] if vision else text
        prompt = processor.apply_chat_template([{"role": "user", "content": content}],
                                               add_generation_prompt=True, tokenize=False)
        given = {"text": [prompt]}
        if vision:
            given["images"] = [Image.open(folder.parent / f"{i}.png")]
        batch = processor(**given, add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            logits = model(**batch).logits[0, -1]
        reply = model.generate(**batch, max_new_tokens=12, do_sample=False, use_cache=True,
                               suppress_tokens=special)[0, batch["input_ids"].shape[1]:]
        answers.append({"ids": batch["input_ids"][0].tolist(), "logits": logits.tolist(),
                        "reply": reply.tolist()})
Path(sys.argv[2]).write_text(json.dumps(found))
"""
TEXTS = ["1+2", "Hello there", "ünï  two blanks", "24 = ?", "J Q K"]


def ask(folder, name, path):
    """Save a model, changed a little, and ask it five prompts: what version 4 should find."""
    policy, processor = model.load_policy(str(path))
    if policy.vision is None:
        noise = torch.Generator().manual_seed(3)
        for p in policy.backbone.parameters():
            p.data += 0.3 * torch.randn(p.shape, generator=noise)
    save(folder / name, 1, policy, processor)
    (folder / name / "asked.json").write_text(json.dumps(TEXTS))
    answers = []
    for i, text in enumerate(TEXTS):
        picture = None
        if policy.vision is not None:
            picture = Image.effect_noise((64 + 28 * i, 84), 80).convert("RGB")
            picture.save(folder / name / f"{i}.png")
        ids = model.encode(processor, [user_message(text, picture)])
        batch = model.collate([[(ids, [0])]], policy.device, [picture])
        vision = policy.vision.inputs(batch["input_ids"], [picture]) if picture else {}
        with torch.no_grad():
            logits = policy.backbone(input_ids=batch["input_ids"], **vision).logits[0, -2]
        [(reply, _)] = policy.generate([ids], torch.zeros(1, 12), 12, 0.0, pictures=[picture])
        answers.append({"ids": ids, "logits": logits.tolist(), "reply": reply})
    return answers


@pytest.mark.skipif(not PYTHON4, reason="TRANSFORMERS4 names no Python with transformers 4")
def test_version_4_computes_the_same_from_the_folder_alone(tmp_path):
    expected = {}
    for name, (more, template) in WORKING.items():
        if name != "qwen3_5_text":             # which version 4 has not
            path = write_model(tmp_path / "sources" / name, name, more, template)
            expected[name] = ask(tmp_path / "runs", name, path)
    path = write_model(tmp_path / "sources" / "base", "llama",
                       {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, None)
    expected["llama_base_5e5"] = ask(tmp_path / "runs", "llama_base_5e5", path)
    for family, size in VISION.items():
        expected[family] = ask(tmp_path / "runs", family, tiny_folder(family=family, size=size))
    subprocess.run([PYTHON4, "-c", READER, str(tmp_path / "runs"), str(tmp_path / "found.json")],
                   check=True)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found.keys() == expected.keys()
    for name in expected:
        for ours, theirs in zip(expected[name], found[name], strict=True):
            assert theirs["ids"] == ours["ids"], name
            assert theirs["reply"] == ours["reply"], name
            torch.testing.assert_close(torch.tensor(theirs["logits"]), torch.tensor(ours["logits"]),
                                       atol=1e-4, rtol=0, msg=lambda told: f"{name}: {told}")
