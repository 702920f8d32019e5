"""Models that people bring: a tiny random one of each class samples, learns, is saved and loaded.

The table in docs/models.md ("Which models work") says the same in words. Each family that it names
as working is here.
"""
import json
import shutil

import pytest
import torch
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText,
                          AutoTokenizer)

import envs
import model
from conftest import tiny_folder
from support import run_folder

SHAPE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             intermediate_size=64, max_position_embeddings=2048)
SLIDING = dict(layer_types=["sliding_attention", "full_attention"], sliding_window=1024)
CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n"
          "{{ m.content }}{{ eos_token }}\n{% endfor %}")
CHATML_PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
# As Qwen3's, this template hides the thoughts of earlier replies and closes those of the next.
THINKING = ("{% for m in messages %}<|im_start|>{{ m.role }}\n"
            "{{ m.content.split('</think>')[-1] }}{{ eos_token }}\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n"
            "{% if enable_thinking is defined and enable_thinking is false %}"
            "<think>\n\n</think>\n\n{% endif %}{% endif %}")
INST = ("{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
        "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}")
TURNS = ("{% for m in messages %}"
         "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
         "{{ m.content | trim }}{{ eos_token }}\n"
         "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}")
TAGS = ("{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}")
LLAMA_ROPE = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
              "high_freq_factor": 4.0, "original_max_position_embeddings": 512}
# Model type: what its tiny one has beside SHAPE, and its template.
WORKING = {
    "llama": (dict(tie_word_embeddings=True, rope_parameters=LLAMA_ROPE), None),
    "qwen2": (dict(tie_word_embeddings=True), CHATML + CHATML_PROMPT),
    "qwen3": (dict(head_dim=16, tie_word_embeddings=True), THINKING),
    "qwen3_moe": (dict(head_dim=16, num_experts=4, num_experts_per_tok=2,
                       moe_intermediate_size=32), THINKING),
    "qwen3_5_text": (dict(head_dim=16, layer_types=["linear_attention", "full_attention"],
                          linear_num_key_heads=2, linear_num_value_heads=4,
                          linear_key_head_dim=8, linear_value_head_dim=8), THINKING),
    "lfm2": (dict(layer_types=["conv", "full_attention"]), CHATML + CHATML_PROMPT),
    "smollm3": (dict(no_rope_layers=[1, 0]), THINKING),
    "gemma3_text": (dict(head_dim=8, tie_word_embeddings=True, **SLIDING), TURNS),
    "mistral": (dict(sliding_window=None), INST),
    "ministral": (dict(head_dim=8, **SLIDING), INST),
    "phi3": (dict(), TAGS),
    "olmo2": (dict(), TAGS),
    "olmo3": (SLIDING, TAGS),
    "granite": (dict(logits_scaling=8.0, embedding_multiplier=12.0, residual_multiplier=0.22,
                     attention_multiplier=0.2, tie_word_embeddings=True), TAGS),
    "glm4": (dict(head_dim=8), TAGS),
    "exaone4": (SLIDING, TAGS),
    "seed_oss": (dict(head_dim=8), CHATML + CHATML_PROMPT),
    "hunyuan_v1_dense": (dict(head_dim=8), TAGS),
}
TOWER = dict(hidden_size=32, patch_size=14, intermediate_size=64)
# Released with an encoder of pictures, which is not used here.
WITH_TOWER = {
    "qwen3_5": (WORKING["qwen3_5_text"][0],
                dict(TOWER, depth=1, num_heads=2, out_hidden_size=32, num_position_embeddings=64),
                {}),
    "gemma3": (dict(head_dim=8, **SLIDING),
               dict(TOWER, num_hidden_layers=1, num_attention_heads=2, image_size=56),
               dict(mm_tokens_per_image=4)),
}
REFUSED = {                                                        # and why
    "gemma2": (dict(head_dim=8, **SLIDING), "its logits are not plain products"),  # soft-capped
    "cohere2": (SLIDING, "its logits are not plain products"),
}


def write_model(folder, model_type, more, template):
    """A folder as one downloads it, with random weights of this class and our small tokenizer.

    Its template has the family's form.
    """
    shutil.copytree(tiny_folder(), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if template:
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    ids = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
               pad_token_id=tokenizer.pad_token_id)
    shape = {**SHAPE, "vocab_size": len(tokenizer), **ids, **more}
    config = AutoConfig.for_model(model_type, **shape)
    backbone = AutoModelForCausalLM.from_config(config)
    for p in backbone.parameters():
        p.data += 0.05 * torch.randn_like(p)   # its logits differ more than those of a new model
    backbone.save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def greedy(backbone, prompt, num):
    """Plain transformers without a cache, one prompt alone."""
    ids = list(prompt)
    for _ in range(num):
        input_ids = torch.tensor([ids], device=backbone.device)
        logits = backbone(input_ids=input_ids, use_cache=False).logits
        ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt):]


@pytest.mark.parametrize("model_type", WORKING)
def test_a_model_of_today_samples_learns_and_is_saved_like_any_other(model_type, tmp_path, device):
    folder = write_model(tmp_path / "model", model_type, *WORKING[model_type])
    policy, processor = model.load_policy(folder, device=device)
    memory = model.RolloutMemory(policy, 10 ** 6, 2 ** 28)
    dialogues, messages = [[] for _ in range(3)], [None] * 3
    envs_of = [envs.make_env("gp-l", "id") for _ in range(3)]
    for turn in range(2):
        prompts = []
        for i, env in enumerate(envs_of):
            if turn == 0:
                messages[i], _ = env.reset(i)
                messages[i][-1]["content"] += " again" * i         # so that rows are padded
            else:
                messages[i], *_ = env.step(model.decode_reply(processor, dialogues[i][0][1]))
            prior = dialogues[i][0][0] + dialogues[i][0][1] if turn else None
            prompts.append(model.encode(processor, messages[i], prior))
            if turn:
                # The sampled ids, but for an end-of-turn perhaps.
                assert prompts[i][:len(prior) - 1] == prior[:-1]
        uniforms = model.sampling_uniforms([(turn, i) for i in range(3)], 8)
        replies = policy.generate(prompts, uniforms, 8, 0.7, memory=memory)
        for dialogue, prompt, (ids, logprobs) in zip(dialogues, prompts, replies):
            dialogue.append((prompt, ids, logprobs))
    pairs = [[turn[:2] for turn in dialogue] for dialogue in dialogues]
    found, _ = policy(model.collate(pairs, policy.device), 0.7)
    for row, (_, ids, logprobs) in zip(found, sum(dialogues, [])):
        torch.testing.assert_close(row[:len(ids)].cpu(), torch.tensor(logprobs), atol=1e-4, rtol=0)

    policy.banned.fill_(False)
    policy.eos_id = -1                                             # so that replies have one length
    for (ids, _), prompt in zip(policy.generate(prompts, torch.zeros(3, 6), 6, 0.0), prompts):
        assert ids == greedy(policy.backbone, prompt, 6)

    saved = run_folder.ensure_checkpoint(tmp_path, 1, policy, processor,
                                         torch.optim.AdamW(policy.parameters()), {})
    again, plain = model.load_policy(str(saved))[0], AutoModelForCausalLM.from_pretrained(saved)
    ids = torch.tensor([prompts[0]])
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, again.backbone(ids).logits)
        torch.testing.assert_close(plain(ids).logits, policy.backbone.cpu()(ids).logits)
    config = json.loads((saved / "config.json").read_text())
    assert config["model_type"] == model_type
    tied = policy.backbone.config.tie_word_embeddings
    for backbone in (plain, again.backbone, policy.backbone):
        assert (backbone.lm_head.weight is backbone.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("model_type", WITH_TOWER)
def test_a_folder_with_an_encoder_of_pictures_that_is_unknown_here_is_a_model_of_words(
        model_type, tmp_path, device):
    text, tower, more = WITH_TOWER[model_type]
    folder = shutil.copytree(tiny_folder(), tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = dict(SHAPE, vocab_size=len(tokenizer), **text)
    config = AutoConfig.for_model(model_type, text_config=text, vision_config=tower, **more)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    policy, processor = model.load_policy(str(folder), device=device)
    prompts = [model.encode(processor, envs.make_env("gp-l", "id").reset(i)[0]) for i in range(3)]
    uniforms = model.sampling_uniforms([(0, i) for i in range(3)], 8)
    replies = policy.generate(prompts, uniforms, 8, 0.7)
    rows = [[(p, ids)] for p, (ids, _) in zip(prompts, replies)]
    found, _ = policy(model.collate(rows, policy.device), 0.7)
    for row, (ids, logprobs) in zip(found, replies):
        torch.testing.assert_close(row[:len(ids)].cpu(), torch.tensor(logprobs), atol=1e-4, rtol=0)
    saved = run_folder.ensure_checkpoint(tmp_path, 1, policy, processor,
                                         torch.optim.AdamW(policy.parameters()), {})
    again, ids = model.load_policy(str(saved))[0], torch.tensor([prompts[0]])
    with torch.no_grad():
        torch.testing.assert_close(again.backbone(ids).logits, policy.backbone.cpu()(ids).logits)
    with pytest.raises(ValueError, match="reads no pictures"):
        model.load_policy(str(folder), vision=True)


@pytest.mark.parametrize("model_type", REFUSED)
def test_a_model_that_cannot_be_right_here_is_refused_by_name(model_type, tmp_path):
    more, reason = REFUSED[model_type]
    folder = write_model(tmp_path / "model", model_type, more, None)
    with pytest.raises(ValueError, match=f"model .*{reason}.*"):
        model.load_policy(folder)


def test_thinking_is_turned_off_in_the_template_itself_and_stays_off_in_checkpoints(tmp_path):
    folder = write_model(tmp_path / "model", "qwen3", dict(head_dim=16),
                         "{% set enable_thinking = false %}" + THINKING)
    policy, processor = model.load_policy(folder)
    saved = run_folder.ensure_checkpoint(tmp_path, 1, policy, processor,
                                         torch.optim.AdamW(policy.parameters()), {})
    for path in (folder, saved):
        tokenizer = AutoTokenizer.from_pretrained(path)
        user = {"role": "user", "content": "1"}
        first = model.encode(tokenizer, [user])
        assert tokenizer.decode(first).endswith("<think>\n\n</think>\n\n")
        reply = model.encode_reply(tokenizer, "<think>2</think>3")
        second = model.encode(tokenizer, [user, {"role": "assistant", "content": "3"}, user],
                              first + reply)
        assert second[:len(first + reply)] == first + reply
        assert tokenizer.decode(second).endswith("<think>\n\n</think>\n\n")
