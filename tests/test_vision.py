"""Mllama: against plain transformers, padding, turns, checkpoints, and the scripts on GP-VL."""
import copy
import json
import signal

import pytest
import torch
from PIL import Image
from transformers import (AutoModelForImageTextToText, AutoProcessor, MllamaConfig,
                          MllamaForConditionalGeneration, MllamaProcessor)

import envs
import evaluate
import model
import rl
import sft
from conftest import tiny_folder
from support import run_folder, running
from support.chat import read_text, user_message
from support.conversations import read_conversations
from test_scripts import interrupted, metrics

ONE_BATCH = 10 ** 6
SFT = dict(task="gp-vl", env=("resolution=112",), model=tiny_folder(vision=True), steps=4,
           batch_size=8, lr=1e-3, save_every=2, dtype="float32")
RL = dict(task="gp-vl", env=("resolution=112", "verify_iter=4"), num_envs=4, turns_per_env=3,
          minibatch_turns=6, epochs=2,
          updates=6, lr=1e-4, max_new_tokens=10, temperature=1.0, dtype="float32")


def dialogues(tiny_vl, temperature=0.7, num=4):
    """Two sampled turns about a hand each: ([(prompt, response, log-probs)] * 2, picture).

    Prompts have different lengths.
    """
    policy, processor = tiny_vl
    found, seen = [], model.RolloutMemory(policy, ONE_BATCH, 2 ** 30)
    for turn in range(2):
        prompts, pictures = [], []
        for i in range(num):
            if turn == 0:
                env = envs.make_env("gp-vl", "id", resolution=150)
                messages, _ = env.reset(i)
                found.append(([], model.picture_of(messages), env))
            turns, picture, env = found[i]
            if turn:
                messages, *_ = env.step(model.decode_reply(processor, turns[0][1]))
                messages[-1]["content"] += " again" * i
            prompts.append(model.encode(processor, messages,
                                        turns[0][0] + turns[0][1] if turn else None))
            pictures.append(picture)
        uniforms = model.sampling_uniforms([(turn, i) for i in range(num)], 12)
        replies = policy.generate(prompts, uniforms, 12, temperature, ONE_BATCH, pictures, seen)
        for (turns, _, _), prompt, (response, logprobs) in zip(found, prompts, replies):
            turns.append((prompt, response, logprobs))
    return [(turns, picture) for turns, picture, _ in found]


def logprobs_of(policy, played, pictures, temperature=0.7):
    batch = model.collate([[turn[:2] for turn in turns] for turns, _ in played], policy.device,
                          pictures)
    return policy(batch, temperature)


def test_a_copy_of_a_policy_sees_with_its_own_tower(tiny_vl):
    policy, _ = tiny_vl
    picture, twin = Image.new("RGB", (224, 224), "red"), copy.deepcopy(policy)
    assert torch.equal(policy.see([picture])[0][0], twin.see([picture])[0][0])
    for p in twin.backbone.model.vision_model.transformer.layers.parameters():
        p.data += 0.1
    assert (policy.see([picture])[0][0] - twin.see([picture])[0][0]).abs().max() > 1e-3


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_sampling_and_update_agree_through_left_padding_two_turns_and_a_picture(
        tiny_vl, temperature):
    played = dialogues(tiny_vl, temperature)
    assert len({len(turns[1][0]) for turns, _ in played}) > 1
    logprobs, _ = logprobs_of(tiny_vl[0], played, [picture for _, picture in played], temperature)
    for row, (_, response, seen) in zip(logprobs, (turn for turns, _ in played for turn in turns)):
        torch.testing.assert_close(row[:len(response)].cpu(), torch.tensor(seen), atol=1e-5, rtol=0)


def test_a_batch_equals_its_rows_alone(tiny_vl):
    policy, _ = tiny_vl
    played = dialogues(tiny_vl)
    logprobs, values = logprobs_of(policy, played, [picture for _, picture in played])
    for i, one in enumerate(played):
        alone, alone_values = logprobs_of(policy, [one], [one[1]])
        torch.testing.assert_close(alone, logprobs[2 * i:2 * i + 2, :alone.shape[1]], atol=1e-5,
                                   rtol=0)
        torch.testing.assert_close(alone_values, values[2 * i:2 * i + 2], atol=1e-5, rtol=0)
        prompt, response, _ = one[0][0]
        again = policy.generate([prompt], model.sampling_uniforms([(0, i)], 12), 12, 0.7, 1,
                                [one[1]])
        assert again[0][0] == response


def test_another_picture_changes_the_logprobs_and_the_value(tiny_vl):
    """A model blind to its input fails here."""
    policy, _ = tiny_vl
    played = dialogues(tiny_vl)
    pictures = [picture for _, picture in played]
    logprobs, values = logprobs_of(policy, played, pictures)
    others, other_values = logprobs_of(policy, played, pictures[1:] + pictures[:1])
    assert ((logprobs - others).abs().amax(1) > 1e-4).all()
    assert (values - other_values).abs().max() > 1e-5


def plain_logits(folder, messages, pictures):
    """Logits and ids by transformers alone, its processor included, from a saved folder."""
    plain = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    texts = [model.render(processor, m, add_generation_prompt=True) for m in messages]
    inputs = processor(images=[[p] for p in pictures], text=texts, padding=True,
                       return_tensors="pt", add_special_tokens=False)
    positions = (inputs.attention_mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        return plain(**inputs, position_ids=positions).logits[:, -1], inputs.input_ids


def test_a_saved_model_gives_the_same_logits_in_plain_transformers(tiny_vl, tmp_path):
    policy, processor = tiny_vl
    optimizer = torch.optim.AdamW(policy.parameters())
    folder = run_folder.ensure_checkpoint(tmp_path, 1, policy, processor, optimizer, {})
    check_against_plain(policy, processor, folder, [150, 240])
    again, _ = model.load_policy(str(folder), device=policy.device, vision=True)
    played = dialogues(tiny_vl)
    pictures = [picture for _, picture in played]
    for ours, theirs in zip(logprobs_of(policy, played, pictures),
                            logprobs_of(again, played, pictures)):
        assert torch.equal(ours, theirs)


def check_against_plain(policy, processor, folder, sizes):
    messages, pictures = [], []
    for i, size in enumerate(sizes):
        env = envs.make_env("gp-vl", ("id", "rule_ood")[i % 2], resolution=size)
        env.reset(i)
        height = size // (i % 2 + 1)                             # also one twice as wide as high
        pictures.append(env.picture().crop((0, 0, size, height)))
        messages.append([user_message("12 " * i + env.prompt(), pictures[-1])])
    logits, ids = plain_logits(folder, messages, pictures)
    prompts = [model.encode(processor, m) for m in messages]
    pad = processor.tokenizer.pad_token_id
    assert [[i for i in row if i != pad] for row in ids.tolist()] == prompts
    expected = torch.log_softmax(logits.float(), -1)
    for token in (0, 5, 9):
        ours, _ = policy(model.collate([[(prompt, [token])] for prompt in prompts], policy.device,
                                       pictures))
        torch.testing.assert_close(ours[:, 0].cpu(), expected[:, token], atol=1e-5, rtol=0)


def test_pictures_of_several_tiles_are_cut_and_masked_as_in_transformers(tiny_vl, device, tmp_path):
    """Four tiles as in the real model; a picture twice as wide as high leaves some empty."""
    policy, processor = tiny_vl
    config = policy.backbone.config.to_dict()
    config["vision_config"] |= {"max_num_tiles": 4, "image_size": 56}
    ratios = [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]]
    config["vision_config"]["supported_aspect_ratios"] = ratios
    torch.manual_seed(0)
    backbone = MllamaForConditionalGeneration(MllamaConfig.from_dict(config)).eval()
    for name, parameter in backbone.named_parameters():
        if "gate" in name or "embedding" in name:
            torch.nn.init.normal_(parameter, 0.5)
    images = type(processor.image_processor)(size={"height": 56, "width": 56}, max_image_tiles=4)
    tiled = MllamaProcessor(images, processor.tokenizer, chat_template=processor.chat_template)
    policy = model.Policy(backbone, tiled).to(device).eval()
    assert policy.picture_tokens == 4 * 5
    folder = run_folder.ensure_checkpoint(tmp_path, 1, policy, tiled,
                                          torch.optim.AdamW(policy.parameters()), {})
    check_against_plain(policy, tiled, folder, [60, 112, 200])
    played = dialogues((policy, tiled))
    logprobs, _ = logprobs_of(policy, played, [picture for _, picture in played])
    for row, (_, response, seen) in zip(logprobs, (turn for turns, _ in played for turn in turns)):
        torch.testing.assert_close(row[:len(response)].cpu(), torch.tensor(seen), atol=1e-5, rtol=0)


def test_the_prompt_has_one_bos_and_one_image_token_which_are_never_sampled(tiny_vl):
    policy, processor = tiny_vl
    tokenizer = processor.tokenizer
    for turns, _ in dialogues(tiny_vl, 5.0):
        prompt = turns[1][0]
        assert prompt.count(tokenizer.bos_token_id) == prompt.count(processor.image_token_id) == 1
        assert prompt.index(processor.image_token_id) < 4
    num_logits = policy.backbone.lm_head.weight.shape[0]
    assert processor.image_token_id == num_logits                # there is no logit for it
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    banned = set(policy.banned.nonzero()[:, 0].tolist())
    assert banned == special - {policy.eos_id, processor.image_token_id}


def test_image_tokens_and_pictures_that_do_not_match_are_refused(tiny_vl):
    policy, processor = tiny_vl
    picture = Image.new("RGB", (50, 50))
    with pytest.raises(ValueError, match="2 <|image|> tokens in a dialogue with 1 pictures"):
        model.encode(processor, [user_message("see <|image|>", picture)])
    with pytest.raises(ValueError, match="1 <|image|> tokens in a dialogue with 0 pictures"):
        model.encode(processor, [user_message("see <|image|>")])
    two = {"role": "user", "content": [{"type": "image", "image": picture}] * 2}
    with pytest.raises(ValueError, match="2 pictures in one dialogue"):
        model.encode(processor, [two])
    with pytest.raises(ValueError, match="1 pictures for 2 dialogues"):
        model.collate([[([1], [2])], [([1], [2])]], "cpu", [picture, None])


def test_a_picture_is_looked_at_once_in_a_rollout(tiny_vl, monkeypatch):
    policy, looked = tiny_vl[0], []
    see = model.Policy.see
    monkeypatch.setattr(model.Policy, "see",
                        lambda self, pictures: looked.append(len(pictures)) or see(self, pictures))
    first, second, third = (Image.new("RGB", (60, 60), colour)
                            for colour in ("red", "green", "blue"))
    memory = model.RolloutMemory(policy, 2 * policy.picture_tokens)
    once, again = memory.see([first, second, first, third]), memory.see([third, first])
    assert looked == [2, 1] and once[0] is once[2] is again[1] and once[3] is again[0]
    memory.see([second])
    assert looked == [2, 1, 1]   # the call before did without it, and dropped it
    assert memory.see([None, None]) is None


def test_words_alone_on_a_vision_model(tiny_vl):
    policy, processor = tiny_vl
    env = envs.make_env("gp-l", "id")
    prompts = [model.encode(processor, env.reset(i)[0]) for i in range(3)]
    uniforms = model.sampling_uniforms([(0, i) for i in range(3)], 8)
    replies = policy.generate(prompts, uniforms, 8, 1.0)
    rows = [[(p, r)] for p, (r, _) in zip(prompts, replies)]
    logprobs, _ = policy(model.collate(rows, policy.device), 1.0)
    for row, (response, seen) in zip(logprobs, replies):
        torch.testing.assert_close(row[:len(response)].cpu(), torch.tensor(seen), atol=1e-5, rtol=0)


def step_gradients(policy, played):
    policy.zero_grad()
    logprobs_of(policy, played, [picture for _, picture in played])[0].sum().backward()
    return {name: p.grad.clone()
            for name, p in policy.backbone.named_parameters() if p.grad is not None}


def test_checkpointing_changes_no_gradient_and_frozen_parts_get_none(tiny_vl, device, tmp_path):
    policy, processor = tiny_vl
    played = dialogues(tiny_vl)
    whole = step_gradients(policy, played)
    assert any("vision_model" in name for name in whole)
    assert any("projector" in name for name in whole)
    run_folder.ensure_checkpoint(tmp_path, 1, policy, processor,
                                 torch.optim.AdamW(policy.parameters()), {})
    twin, _ = model.load_policy(str(tmp_path / "step_000001"), device=device, vision=True,
                                gradient_checkpointing=True)
    calls = []
    for layer in running.layers_of(twin):
        layer.mlp.forward = lambda x, mlp=layer.mlp: calls.append(mlp) or type(mlp).forward(mlp, x)
    checked = step_gradients(twin, played)
    layers = running.layers_of(twin)
    assert len(layers) == 4 + 2 + 1                              # the tower's, too
    assert {calls.count(layer.mlp) for layer in layers} == {2}
    assert checked.keys() == whole.keys()
    for name in whole:
        torch.testing.assert_close(checked[name], whole[name], atol=1e-5, rtol=1e-4)
    twin.backbone._no_split_modules = None
    with pytest.raises(ValueError, match="gradient_checkpointing: mllama does not name its layers"):
        running.enable_checkpointing(twin)
    frozen, _ = model.load_policy(str(tmp_path / "step_000001"), device=device, vision=True,
                                  freeze="vision,projector")
    kept = step_gradients(frozen, played)
    assert kept and not any("vision_model" in name or "projector" in name for name in kept)


def test_checkpointing_switches_no_dropout_on(tiny_vl, device, tmp_path):
    policy, processor = tiny_vl
    policy.backbone.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"] |= {"dropout": 0.5, "attention_dropout": 0.5}
    config["vision_config"]["attention_dropout"] = 0.5
    (tmp_path / "config.json").write_text(json.dumps(config))
    twin, _ = model.load_policy(str(tmp_path), device=device, vision=True,
                                gradient_checkpointing=True)
    played = dialogues(tiny_vl)
    pictures = [picture for _, picture in played]
    found, expected = (logprobs_of(one, played, pictures)[0] for one in (twin, policy))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_a_text_that_names_the_image_token_is_refused_before_training(tmp_path, device, capsys):
    (tmp_path / "prompts.json").write_text(json.dumps({"gp_task": "<|image|> Make {target}."}))
    more = dict(env=(f"prompt_file={tmp_path / 'prompts.json'}", "resolution=112"),
                out=str(tmp_path / "run"), device=device)
    sft.main(sft.Config(out=str(tmp_path / "sft"), device=device,
                        **{**SFT, "steps": 1, "save_every": 1}))
    for script, knobs in ((sft, SFT), (rl, {**RL, "model": str(tmp_path / "sft" / "step_000001")})):
        with pytest.raises(SystemExit):
            script.main(script.Config(**{**knobs, **more}))
        assert "2 <|image|> tokens in a dialogue with 1 pictures" in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


def test_a_model_that_does_not_fit_the_task_is_refused_by_name(tiny, tiny_vl, tmp_path):
    text, vision = tmp_path / "text", tmp_path / "vision"
    for folder, (policy, processor) in ((text, tiny), (vision, tiny_vl)):
        policy.backbone.save_pretrained(folder)
        processor.save_pretrained(folder)
    with pytest.raises(ValueError, match="llama reads no pictures; the task needs a vision model"):
        model.load_policy(str(text), vision=True)
    model.load_policy(str(vision))                   # the paper plays in words with one, too
    (vision / "processor_config.json").unlink()
    with pytest.raises(ValueError, match="nor a Llama-3.2-Vision with its processor"):
        model.load_policy(str(vision), vision=True)
    weights = (text / "model.safetensors").read_bytes()
    (text / "model.safetensors").write_bytes(weights[:1000])
    with pytest.raises(ValueError,
                       match="not a causal language model shaped like Llama with its tokenizer"):
        model.load_policy(str(text))
    (text / "config.json").write_text(json.dumps({"model_type": "t5"}))
    told = "not a causal language model shaped like Llama.*nor a Llama-3.2-Vision"
    with pytest.raises(ValueError, match=told):
        model.load_policy(str(text))


def test_a_dump_with_pictures_is_read_back_as_the_same_samples(tmp_path):
    config = sft.Config(dump=str(tmp_path / "data.json"), num=6, task="gp-vl",
                        env=("resolution=100",))
    sft.main(config)
    made, read = sft.Samples(config), sft.Samples(sft.Config(task="gp-vl", data=config.dump))
    told = [[(read_text(messages[0]), reply, messages[0]["content"][0]["image"].tobytes())
             for messages, reply in (samples[i] for i in range(6))] for samples in (made, read)]
    assert sorted(told[0]) == sorted(told[1]) and len(set(told[0])) == 6


def broken(data, tmp_path, change):
    records = json.loads(data.read_text())
    change(records)
    path = data.with_name("broken.json")
    path.write_text(json.dumps(records))
    return path


@pytest.mark.parametrize("change, told", [
    (lambda r: r[1].update(image="data/none.png"), "record 1: key 'image'.*none.png"),
    (lambda r: r[1].update(image="data.json"), "record 1: key 'image'.*it is none of PNG"),
    (lambda r: r[1].update(image="data/cut.png"), "record 1: key 'image'"),
    (lambda r: r[1].pop("image"), "record 1: key 'image': a task with pictures needs one"),
    (lambda r: r[1].update(image=["data/000000.png"] * 2),
     "record 1: key 'image': a task with pictures needs one"),
    (lambda r: r[1]["conversations"][0].update(value="no slot"),
     "turn 0 must hold <image> 1 times.* it has 0"),
    (lambda r: r[1]["conversations"][0].update(value="<image> <image>"),
     "turn 0 must hold <image> 1 times.* it has 2"),
    (lambda r: r[1]["conversations"][0].update(value="<image> <|image|>"), r"no <\|image\|>"),
    (lambda r: r[1]["conversations"][1].update(value="<image>"),
     "turn 1 must hold <image> 0 times"),
])
def test_a_data_file_whose_pictures_do_not_fit_is_refused_by_record(tmp_path, change, told):
    sft.main(sft.Config(dump=str(tmp_path / "data.json"), num=2, task="gp-vl",
                        env=("resolution=100",)))
    whole = (tmp_path / "data" / "000000.png").read_bytes()
    (tmp_path / "data" / "cut.png").write_bytes(whole[:len(whole) // 2])
    read_conversations(tmp_path / "data.json", True, model.IMAGE_TOKEN)
    with pytest.raises(ValueError, match="broken.json.*" + told):
        read_conversations(broken(tmp_path / "data.json", tmp_path, change), True,
                           model.IMAGE_TOKEN)
    told = "record 0: key 'image': a task with pictures needs one file per record, another"
    with pytest.raises(ValueError, match=told):
        read_conversations(tmp_path / "data.json", False, model.IMAGE_TOKEN)


def test_on_pictures_the_chain_runs_and_a_killed_run_goes_on_to_the_same_numbers(
        tmp_path, device, capsys):
    sft_knobs = dict(SFT, device=device)
    sft.main(sft.Config(out=str(tmp_path / "sft"), **sft_knobs))
    trained = metrics(tmp_path / "sft")[0]["tokens_trained"]
    assert trained > 8 * 65                                      # a picture counts its 65 tokens
    start = tmp_path / "sft" / "step_000004"
    knobs = dict(model=start, device=device, save_every=2, **RL)
    rl.main(rl.Config(out=str(tmp_path / "straight"), **{**knobs, "model": str(start)}))
    row = metrics(tmp_path / "straight")[0]
    assert row["ratio_max_first"] == pytest.approx(1, abs=1e-4) and 0 <= row["cards_read"] <= 1
    talk = running.read_jsonl(tmp_path / "straight" / "turns.jsonl")[0]["messages"]
    assert talk[0]["content"].startswith("Make 24") and "picture" in talk[0]["content"]
    assert interrupted("rl.py", knobs, tmp_path / "stopped", signal.SIGKILL, lines=3) == -9
    rl.main(rl.Config(out=str(tmp_path / "stopped"), **{**knobs, "model": str(start)}))
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "straight")
    ours, theirs = ((tmp_path / run / "step_000006" / "model.safetensors").read_bytes()
                    for run in ("stopped", "straight"))
    assert ours == theirs
    evaluate.main(evaluate.Config(run_folder=str(tmp_path / "straight"),
                                  splits=("id", "visual_ood"), env=("verify_iter=2",),
                                  episodes=4, max_new_tokens=8, device=device))
    told = capsys.readouterr().out
    assert "recognition" in told and "visual_ood" in told


def test_recognition_is_read_from_first_replies_and_ranks_from_their_places():
    environments = [envs.make_env("gp-vl", "visual_ood", resolution=60) for _ in range(12)]

    def read(turn, conversations):
        told = []
        for i in conversations:
            env = environments[i]
            wrong = env.cards[:2] + ["joker"] * 2
            cards = env.cards[::-1] if i % 3 == 0 else wrong if i % 3 == 1 else env.cards
            reply = {"cards": cards if turn == 0 else env.cards, "formula": "1+1"}
            told.append((json.dumps(reply), "stop"))
        return told

    for env in environments:
        env.verify_iter = 2
    infos = evaluate.play_episodes(read, environments, 0)
    row = evaluate.summarise(infos, 2)
    assert row["recognition"] == pytest.approx(2 / 3) and row["success"] == 0
    backwards = [sum(a == b for a, b in zip(env.cards, env.cards[::-1]))
                 for env in environments[::3]]
    assert row["rank_accuracy"] == pytest.approx((sum(backwards) + 4 * 2 + 4 * 4) / 48)
