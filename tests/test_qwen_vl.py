"""Models whose pictures are tokens in the text, Qwen2.5-VL and Qwen3-VL.

They are compared with plain transformers, through positions, turns, and the scripts on GP-VL.
"""
import json
import shutil

import pytest
import torch
import transformers
from PIL import Image
from transformers import (AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer,
                          ProcessorMixin, Qwen2_5_VLModel, Qwen2_5_VLProcessor, Qwen3VLModel,
                          Qwen3VLProcessor)

import envs
import evaluate
import model
import rl
import sft
from conftest import tiny_folder
from support import run_folder, running
from support.chat import user_message
from support.decoder import CacheDecoder
from test_scripts import metrics
from test_vision import RL, SFT, logprobs_of, step_gradients

FOLDERS = {family: tiny_folder(size="32x3", family=family) for family in ("qwen2_5_vl", "qwen3_vl")}
SIZES = (112, 170), (60, 60), (230, 110)                           # width, height
NUM_TOKENS = 6, 1, 8                                               # 2 x 3, 1 x 1 and 4 x 2


@pytest.fixture(scope="module", params=FOLDERS)
def tiny_qwen(request, device):
    """(policy, processor). Its logits differ, and depend on places, more than a new model's."""
    torch.manual_seed(0)
    policy, processor = model.load_policy(FOLDERS[request.param], device=device, vision=True)
    for p in policy.backbone.parameters():
        p.data += 0.1 * torch.randn(p.shape).to(p)               # drawn on the CPU on every device
    return policy, processor


def picture_of_size(size, seed=0):
    values = torch.randint(0, 256, (size[1] // 10, size[0] // 10, 3),
                           generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(values.byte().numpy()).resize(size)


def saved(policy, processor, folder):
    return run_folder.ensure_checkpoint(folder, 1, policy, processor,
                                        torch.optim.AdamW(policy.parameters()), {})


def play(tiny_qwen, temperature=0.7, turns=3):
    """Sampled dialogues about a picture each: ([(prompt, response, log-probs)], picture).

    They share a memory. The last dialogue begins one turn later.
    """
    policy, processor = tiny_qwen
    memory = model.RolloutMemory(policy, 10 ** 6, 2 ** 30)
    found = [([], picture_of_size(size, i)) for i, size in enumerate(SIZES)]
    for turn in range(turns):
        going = [i for i in range(len(found)) if turn or i < len(found) - 1]
        prompts = []
        for i in going:
            told, picture = found[i]
            messages = [user_message("12 " * (2 * i + 1), picture)]
            for k, (_, response, _) in enumerate(told):
                messages.append({"role": "assistant",
                                 "content": model.decode_reply(processor, response)})
                messages.append(user_message("7 " * (i + k + 1)))
            prompts.append(model.encode(processor, messages,
                                        told[-1][0] + told[-1][1] if told else None))
        uniforms = model.sampling_uniforms([(turn, i) for i in going], 12)
        replies = policy.generate(prompts, uniforms, 12, temperature, 10 ** 6,
                                  [found[i][1] for i in going], memory, going)
        for i, prompt, reply in zip(going, prompts, replies):
            found[i][0].append((prompt, *reply))
    return found


def test_positions_go_along_the_rows_and_columns_of_the_picture_and_on_behind_its_longer_side(
        tiny_qwen):
    policy, processor = tiny_qwen
    picture = processor.image_token_id
    ids = torch.tensor([[5, 6] + 6 * [picture] + [7, 8, 0, 0], [5] + 8 * [picture] + [6, 7, 8]],
                       device=policy.device)
    grids = torch.tensor([[1, 4, 6], [1, 8, 4]], device=policy.device)   # patches: 2 x 2 to a token
    assert policy.vision.positions(ids, grids).tolist() == [
        [[0, 1, 2, 2, 2, 2, 2, 2, 5, 6, 7, 8], [0, 1, 1, 1, 1, 1, 1, 1, 1, 5, 6, 7]],
        [[0, 1, 2, 2, 2, 3, 3, 3, 5, 6, 7, 8], [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 6, 7]],
        [[0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 7, 8], [0, 1, 2, 1, 2, 1, 2, 1, 2, 5, 6, 7]]]


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_sampling_and_update_agree_through_padding_turns_and_pictures_of_several_sizes(
        tiny_qwen, temperature, monkeypatch):
    policy, read, forward = tiny_qwen[0], [], CacheDecoder.forward
    monkeypatch.setattr(CacheDecoder, "forward",
                        lambda self, ids, *args, **kwargs: read.append(ids.shape[1])
                        or forward(self, ids, *args, **kwargs))
    played = play(tiny_qwen, temperature)
    whole = max(len(turns[-1][0]) for turns, _ in played)
    prefills = [num for num in read if num > 1]
    assert len(prefills) == 3
    assert prefills[2] < whole / 2                               # the third turn reads only the new
    logprobs, _ = logprobs_of(policy, played, [picture for _, picture in played], temperature)
    for row, (_, response, seen) in zip(logprobs, (turn for turns, _ in played for turn in turns)):
        torch.testing.assert_close(row[:len(response)].cpu(), torch.tensor(seen), atol=1e-5, rtol=0)


def test_a_batch_equals_its_rows_alone_and_another_picture_is_not_the_same(tiny_qwen):
    policy, _ = tiny_qwen
    played = play(tiny_qwen)
    pictures = [picture for _, picture in played]
    others = [picture_of_size(size, 9) for size in SIZES]
    logprobs, values = logprobs_of(policy, played, pictures)
    changed, other_values = logprobs_of(policy, played, others)
    assert ((logprobs - changed).abs().amax(1) > 1e-2).all()
    assert (values - other_values).abs().min() > 1e-5
    at = 0
    for one in played:
        alone, alone_values = logprobs_of(policy, [one], [one[1]])
        rows = slice(at, at := at + len(one[0]))
        torch.testing.assert_close(alone, logprobs[rows, :alone.shape[1]], atol=1e-5, rtol=0)
        torch.testing.assert_close(alone_values, values[rows], atol=1e-5, rtol=0)
        prompt, response, _ = one[0][0]
        first = model.sampling_uniforms([(len(played[0][0]) - len(one[0]), played.index(one))], 12)
        assert policy.generate([prompt], first, 12, 0.7, 1, [one[1]])[0][0] == response


def plain_model(folder, monkeypatch):
    """The model and processor that transformers makes of a folder.

    Without torchvision the processor has no part for videos.
    """
    monkeypatch.setattr(ProcessorMixin, "check_argument_for_proper_class", lambda *args: None)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = AutoModelForImageTextToText.from_pretrained(folder)
    images = AutoImageProcessor.from_pretrained(folder, backend="pil")
    kinds = {"qwen2_5_vl": Qwen2_5_VLProcessor, "qwen3_vl": Qwen3VLProcessor}
    kind = kinds[plain.config.model_type]
    return plain, kind(images, tokenizer, None, chat_template=tokenizer.chat_template)


@torch.no_grad()
def test_greedy_replies_of_a_saved_model_are_those_of_plain_transformers(
        tiny_qwen, tmp_path, monkeypatch):
    policy, processor = tiny_qwen
    folder = saved(policy, processor, tmp_path)
    again, its_processor = model.load_policy(str(folder), device=policy.device, vision=True)
    again.banned.fill_(False)
    again.eos_id = -1                                             # so that replies have one length
    pictures = [picture_of_size(size, i) for i, size in enumerate(SIZES)]
    messages = [[user_message("12 " * (3 * i + 1), picture)] for i, picture in enumerate(pictures)]
    prompts = [model.encode(its_processor, m) for m in messages]
    assert [prompt.count(processor.image_token_id) for prompt in prompts] == list(NUM_TOKENS)
    replies = again.generate(prompts, torch.zeros(3, 8), 8, 0.0, pictures=pictures)
    turns = [[(prompt, ids)] for prompt, (ids, _) in zip(prompts, replies)]
    rows, _ = policy(model.collate(turns, policy.device, pictures))
    plain, plain_processor = plain_model(folder, monkeypatch)
    for m, picture, prompt, (ours, _), row in zip(messages, pictures, prompts, replies, rows):
        text = model.render(plain_processor, m, add_generation_prompt=True)
        inputs = plain_processor(images=[picture], text=[text], return_tensors="pt",
                                 add_special_tokens=False)
        assert inputs.input_ids[0].tolist() == prompt
        for i, token in enumerate(ours):
            logits = plain(**inputs, use_cache=False).logits[0, -1]
            assert int(logits.argmax()) == token
            expected = torch.log_softmax(logits, -1)[token]
            torch.testing.assert_close(expected, row[i].cpu(), atol=1e-4, rtol=0)
            inputs["input_ids"] = torch.cat([inputs.input_ids, torch.tensor([[token]])], 1)
            for name in ("mm_token_type_ids", "attention_mask"):
                more = torch.full((1, 1), int(name == "attention_mask"))
                inputs[name] = torch.cat([inputs[name], more], 1)


def test_the_encoder_runs_once_for_each_picture_of_a_rollout(tiny_qwen):
    looked = []
    hook = tiny_qwen[0].backbone.model.visual.register_forward_hook(
        lambda module, args, kwargs, output: looked.append(len(kwargs["grid_thw"])),
        with_kwargs=True)
    play(tiny_qwen)
    hook.remove()
    assert looked == [2, 1]   # two dialogues begin, then the third


def test_many_pictures_are_looked_at_as_few_at_a_time_as_the_budget_allows(tiny_qwen, monkeypatch):
    policy, looked = tiny_qwen[0], []
    see = model.Policy.see
    monkeypatch.setattr(model.Policy, "see",
                        lambda self, pictures: looked.append(len(pictures)) or see(self, pictures))
    pictures = [picture_of_size(SIZES[0], seed) for seed in range(5)]
    model.RolloutMemory(policy, 2 * 4 * 6).see(pictures)          # room for two of 24 patches
    assert looked == [2, 2, 1]


def test_placeholders_count_as_tokens_once(tiny_qwen):
    policy, processor = tiny_qwen
    picture = picture_of_size(SIZES[2])
    with_one, without = (model.encode(processor, [user_message("12", p)]) for p in (picture, None))
    assert len(with_one) == len(without) + 8 + 2   # and what a template writes around them
    assert policy.num_tokens(with_one, [1, 2], picture) == len(with_one) + 2
    assert policy.picture_tokens == 0
    policy.check_length(policy.context)
    with pytest.raises(ValueError, match=f"a dialogue of {len(with_one) + policy.context} tokens"):
        policy.generate([with_one], torch.zeros(1, policy.context), policy.context, 1.0,
                        pictures=[picture])


def test_checkpointing_changes_no_gradient_and_frozen_parts_get_none(tiny_qwen, device, tmp_path):
    policy, processor = tiny_qwen
    played = play(tiny_qwen, turns=2)
    whole, folder = step_gradients(policy, played), str(saved(policy, processor, tmp_path))
    towers = {name for name in whole if ".visual." in name}
    mergers = {name for name in towers if "merger" in name}
    assert mergers and towers - mergers
    assert whole.keys() == dict(policy.backbone.named_parameters()).keys()
    twin, _ = model.load_policy(folder, device=device, vision=True, gradient_checkpointing=True)
    calls = []
    for layer in running.layers_of(twin):
        layer.mlp.forward = lambda x, mlp=layer.mlp: calls.append(mlp) or type(mlp).forward(mlp, x)
    checked = step_gradients(twin, played)
    layers = running.layers_of(twin)
    assert len(layers) == 3 + 2 and {calls.count(layer.mlp) for layer in layers} == {2}
    assert checked.keys() == whole.keys()
    for name in whole:
        torch.testing.assert_close(checked[name], whole[name], atol=1e-4, rtol=1e-4)
    for freeze, left in (("vision", whole.keys() - (towers - mergers)),
                         ("projector", whole.keys() - mergers),
                         ("vision,projector", whole.keys() - towers)):
        frozen, _ = model.load_policy(folder, device=device, vision=True, freeze=freeze)
        assert step_gradients(frozen, played).keys() == left


def test_words_alone_on_such_a_model(tiny_qwen):
    policy, processor = tiny_qwen
    env = envs.make_env("gp-l", "id")
    prompts = [model.encode(processor, env.reset(i)[0]) + [9] * i for i in range(3)]
    uniforms = model.sampling_uniforms([(0, i) for i in range(3)], 8)
    replies = policy.generate(prompts, uniforms, 8, 1.0)
    rows = [[(p, r)] for p, (r, _) in zip(prompts, replies)]
    logprobs, _ = policy(model.collate(rows, policy.device), 1.0)
    for row, (response, seen) in zip(logprobs, replies):
        torch.testing.assert_close(row[:len(response)].cpu(), torch.tensor(seen), atol=1e-5, rtol=0)


def test_placeholders_of_pictures_and_videos_in_a_text_are_refused_and_never_sampled(tiny_qwen):
    policy, processor = tiny_qwen
    picture = picture_of_size(SIZES[0])
    with pytest.raises(ValueError, match=r"2 <\|image_pad\|> tokens in a dialogue with 1 pictures"):
        model.encode(processor, [user_message("see <|image_pad|>", picture)])
    with pytest.raises(ValueError, match=r"1 <\|image_pad\|> tokens in a dialogue with 0 pictures"):
        model.encode(processor, [user_message("see <|image_pad|>")])
    with pytest.raises(ValueError, match=r"holds <\|video_pad\|>, a control token"):
        model.encode(processor, [user_message("see <|video_pad|>", picture)])
    special = {i for i, token in processor.tokenizer.added_tokens_decoder.items() if token.special}
    assert processor.image_token_id in special
    assert set(policy.banned.nonzero()[:, 0].tolist()) == special - {policy.eos_id}


@pytest.mark.parametrize("family", FOLDERS)
def test_placeholders_are_never_sampled_though_a_folder_does_not_mark_them_as_special(
        family, tmp_path):
    folder = shutil.copytree(FOLDERS[family], tmp_path / "model")
    values = json.loads((folder / "tokenizer.json").read_text())
    pads = ("<|image_pad|>", "<|video_pad|>")
    for token in values["added_tokens"]:
        token["special"] = token["content"] not in pads
    (folder / "tokenizer.json").write_text(json.dumps(values))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    kept = [token for token in settings["extra_special_tokens"] if token not in pads]
    settings["extra_special_tokens"] = kept
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    policy, processor = model.load_policy(str(folder), vision=True)
    for token in pads:
        i = processor.tokenizer.convert_tokens_to_ids(token)
        assert not processor.tokenizer.added_tokens_decoder[i].special
        assert policy.banned[i]


@pytest.mark.parametrize("family", FOLDERS)
@pytest.mark.parametrize("file, change, told", [
    ("chat_template.jinja", lambda text: text.replace("<|image_pad|>", ""),
     r"0 <\|image_pad\|> tokens in a dialogue with 1 pictures"),
    ("chat_template.jinja", None, "its tokenizer has no chat template"),
    ("preprocessor_config.json", None, "Can't load image processor"),
    ("preprocessor_config.json", lambda text: text.replace('"patch_size": 28', '"patch_size": 14'),
     "its processor cuts pictures with patch_size 14, the model takes 28"),
    ("preprocessor_config.json",
     lambda text: json.dumps(json.loads(text) | {"size": {"min_pixels": 3136}}),
     '"size" of its preprocessor must have shortest_edge and longest_edge .* got 3136 and None'),
    ("config.json", lambda text: json.dumps(json.loads(text) | {"image_token_id": 10 ** 6}),
     "image_token_id 1000000 .* no token"),
])
def test_a_folder_that_cannot_be_used_is_refused_by_name(family, file, change, told, tmp_path):
    folder = shutil.copytree(FOLDERS[family], tmp_path / "model")
    if change:
        (folder / file).write_text(change((folder / file).read_text()))
    else:
        (folder / file).unlink()
    with pytest.raises(ValueError, match=f"model '{folder}': .*{told}"):
        model.load_policy(str(folder), vision=True)


@pytest.mark.parametrize("family, kind",
                         [("qwen2_5_vl", Qwen2_5_VLModel), ("qwen3_vl", Qwen3VLModel)])
def test_a_transformers_that_would_not_show_the_pictures_in_sampling_is_refused(
        family, kind, monkeypatch):
    monkeypatch.setattr(kind, "forward", lambda self, input_ids, **kwargs: None)  # as in 5.17
    told = f"transformers {transformers.__version__} takes no states of pictures"
    with pytest.raises(ValueError, match=told):
        model.load_policy(FOLDERS[family], vision=True)


CUT = {"patch_size": 28, "temporal_patch_size": 2, "merge_size": 2, "image_mean": [0.5] * 3,
       "image_std": [0.5] * 3}
EDGES = {"size": {"shortest_edge": 56 ** 2, "longest_edge": 5 * 56 ** 2}}


@pytest.mark.parametrize("files", [                                # as downloaded, of several ages
    {"preprocessor_config.json": {**CUT, "min_pixels": 56 ** 2, "max_pixels": 5 * 56 ** 2,
                                  "processor_class": "Qwen2_5_VLProcessor",
                                  "image_processor_type": "Qwen2VLImageProcessor"}},
    {"preprocessor_config.json": {**CUT, "size": {"min_pixels": 56 ** 2,
                                                  "max_pixels": 5 * 56 ** 2}}},
    {"preprocessor_config.json": {**CUT, **EDGES,
                                  "image_processor_type": "Qwen2VLImageProcessorFast"},
     "video_preprocessor_config.json": {"fps": 2}},
    {"processor_config.json": {"image_processor": {**CUT, **EDGES,
                                                   "image_processor_type": "Qwen2VLImageProcessor"},
                               "video_processor": {"fps": 2},
                               "processor_class": "Qwen3VLProcessor"}}])
def test_the_settings_of_a_folder_as_one_downloads_it_are_used_and_go_into_checkpoints(
        files, tmp_path):
    folder = shutil.copytree(FOLDERS["qwen2_5_vl"], tmp_path / "model")
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    (folder / "preprocessor_config.json").unlink()
    for name, settings in {"chat_template.json": {"chat_template": template}, **files}.items():
        (folder / name).write_text(json.dumps(settings))
    checkpoint = saved(*model.load_policy(str(folder), vision=True), tmp_path)
    _, processor = model.load_policy(str(checkpoint), vision=True)
    assert processor.chat_template == (checkpoint / "chat_template.jinja").read_text() == template
    assert processor.num_placeholders(picture_of_size((300, 300))) == 4
    assert list(processor.image_processor.image_mean) == CUT["image_mean"]
    paths = checkpoint.glob("*processor_config.json")
    assert {path.name: json.loads(path.read_text()) for path in paths} == files


@pytest.mark.parametrize("family", FOLDERS)
def test_on_pictures_the_chain_runs(family, tmp_path, device, capsys):
    sft.main(sft.Config(out=str(tmp_path / "sft"),
                        **{**SFT, "model": FOLDERS[family], "steps": 2, "device": device}))
    start = str(tmp_path / "sft" / "step_000002")
    rl.main(rl.Config(out=str(tmp_path / "rl"), model=start, save_every=2,
                      **{**RL, "updates": 2, "device": device}))
    row = metrics(tmp_path / "rl")[0]
    assert row["ratio_max_first"] == pytest.approx(1, abs=1e-4)
    evaluate.main(evaluate.Config(run_folder=str(tmp_path / "rl"), splits=("id",),
                                  env=("verify_iter=2",), episodes=4,
                                  max_new_tokens=8, device=device))
    assert "recognition" in capsys.readouterr().out


@pytest.mark.parametrize("family", FOLDERS)
def test_nothing_mixes_tensors_of_a_gpu_with_those_of_the_cpu(family, pretend_cuda):
    with pretend_cuda():
        tiny_qwen = model.load_policy(FOLDERS[family], "bfloat16", "cuda", vision=True)
        played = play(tiny_qwen, turns=1)[:2]
        with torch.no_grad():
            logprobs_of(tiny_qwen[0], played, [picture for _, picture in played])
