"""Writes a tiny random-init model with its tokenizer, as an ordinary model folder.

    python support/tiny.py --task gp-l --out runs/blank                        # a Llama
    python support/tiny.py --task gp-vl --out runs/blank --size 96x4           # sees: an Mllama
    python support/tiny.py --task gp-vl --out runs/blank --family qwen3_vl     # sees: a Qwen3-VL
    python support/tiny.py --task virl-l --out runs/blank --env root=city0
    python support/tiny.py --task virl-l --out runs/blank --env root=city0 --splits id rule_ood

Its tokenizer is trained on prompts, replies and verdicts of the task, so that a prompt is short.
With `--splits` it learns the words of these splits alone: other words then cost more tokens.
"""
import re
import sys
from dataclasses import dataclass
from pathlib import Path

# This script stands in a folder of the repository, whose files it imports.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if __name__ == "__main__":
    from support import startup
    startup.begin(__file__)     # Ctrl-C and a mistyped flag are answered before torch is imported

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (AutoConfig, AutoModelForImageTextToText, LlamaConfig, LlamaForCausalLM,
                          MllamaConfig, MllamaForConditionalGeneration, MllamaProcessor,
                          PreTrainedTokenizerFast)
from transformers import logging as transformers_logging
# Of the picture processors these two need no torchvision.
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import envs
from support import portable, run_folder, running, vocabularies
from support.chat import read_text
from support.loading import tokenizer_of
from support.settings import read_settings
from support.vision import FAMILIES, QwenProcessor

IMAGE_TOKEN = "<|image|>"
QWEN_TOKENS = ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '" + IMAGE_TOKEN + "' }}"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|end_of_turn|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")


@dataclass
class Config:
    """A model of about a million parameters."""
    out: str = running.flag("", "the folder to write, new")
    task: str = running.flag("gp-l", "the task whose words the tokenizer learns; for a -vl task "
                             "the model sees pictures", choices=tuple(envs.TASKS))
    env: tuple = running.flag((), "settings of the task, such as root=city0 (envs.py lists them)")
    splits: tuple = running.flag((), "the splits whose words the tokenizer learns; if not given, "
                                 "all that are played with the training data")
    family: str = running.flag("", "the kind of vision model; if not given, mllama",
                               choices=("", *FAMILIES))
    size: str = running.flag("128x4", "WIDTHxLAYERS")
    seed: int = running.flag(0, "fixes the weights", low=0)


def hand_atoms(env):
    """Ranks, values and signs of GeneralPoints."""
    values = [*range(1, 14), *(env.rule_jqk or ()), env.target]
    return list(dict.fromkeys([*envs.RANKS, *map(str, values), *"+-*/()="]))


def route_atoms(env):
    """Directions and actions of V-IRL, and what may border on a name there."""
    words = vocabularies.words_of(dict.fromkeys([*vocabularies.PAPER, *env.word_kinds]))
    return [*words, "front", "behind", "turn_direction(", "forward()",
            "stop()", "\n", ", where ", "The destination ", " is on your ", "; ",
            '{"current observation": "', '", "current instruction": "']


ATOMS = {"gp-l": hand_atoms, "gp-vl": hand_atoms, "virl-l": route_atoms, "virl-vl": route_atoms}


def atoms_of(task, env):
    """The strings that a small tokenizer keeps whole; none for a task that is not in ATOMS."""
    return ATOMS[task](env) if task in ATOMS else []


def splits_in_training(task):
    """The splits that are played with the training data: other data sets may not be there."""
    return [split for split, chosen in envs.TASKS[task].splits.items()
            if chosen.get("data", "train") == "train"]


def atoms_of_splits(task, splits, **settings):
    """The strings that a tokenizer for these splits keeps whole, some perhaps twice."""
    atoms = []
    for split in splits:
        atoms += atoms_of(task, envs.make_env(task, split, **settings))
    return atoms


def sample_texts(task, num=200, splits=(), **settings):
    """Prompts, replies and verdicts of a task in words, to train a tokenizer on.

    They are of these splits, or of all that need only the training data.
    """
    for split in splits or splits_in_training(task):
        env = envs.make_env(task, split, **settings | {"verify_iter": 2})
        env.picture = lambda: None                     # only words are needed; drawing takes time
        yield " ".join(atoms_of(task, env) * 2)
        for i in range(num):
            env.reset(seed=f"texts/{i}", begin=False)
            messages = env.skip_ahead(env.rng, balance=False)
            yield read_text(messages[-1])
            for reply in (env.flawed_reply(), env.expert_reply()):
                messages, *_ = env.step(reply)
                yield reply
                yield read_text(messages[-1])


def train_tokenizer(texts, atoms, vocab_size=4096):
    """A byte-level BPE tokenizer trained on `texts`, in which each string of `atoms` is one token.

    Whatever stands between two atoms may grow into one token, however long it is. So the constant
    wording of a prompt costs next to nothing. Without atoms the parts are words and numbers. Any
    string can be encoded and comes back unchanged.
    """
    def longest_first(atom):
        return -len(atom), atom      # the order of a set would differ between processes

    words = sorted({re.escape(a) for a in atoms if a.isalnum()}, key=longest_first)
    marks = sorted({re.escape(a) for a in atoms if not a.isalnum()}, key=longest_first)
    patterns = [rf"\b(?:{'|'.join(words)})\b", *marks] if words else marks
    tokenizer = Tokenizer(models.BPE())
    if patterns:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex("|".join(patterns)), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    else:                            # words, as GPT-2 parts a text
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin_of_text|>", eos_token="<|end_of_turn|>",
        pad_token="<|pad|>", extra_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        chat_template=CHAT_TEMPLATE, padding_side="left", clean_up_tokenization_spaces=False)


def make_tiny_qwen(family, tokenizer, common):
    """A Qwen-VL that sees a picture as at most 16 tokens.

    Each token is a square of 56 pixels, in 4 patches.
    """
    tokenizer.add_tokens(QWEN_TOKENS, special_tokens=True)
    tokenizer.chat_template = CHAT_TEMPLATE.replace(IMAGE_TOKEN, "".join(QWEN_TOKENS[:3]))
    names = ("vision_start_token_id", "image_token_id", "vision_end_token_id", "video_token_id")
    ids = dict(zip(names, tokenizer.convert_tokens_to_ids(QWEN_TOKENS)))
    width, heads = common["hidden_size"], common["num_attention_heads"]
    rope = {**common["rope_parameters"], "mrope_section": [6, 5, 5]}
    text = dict(common, vocab_size=len(tokenizer), head_dim=32, rope_parameters=rope)
    vision = dict(depth=2, hidden_size=width, num_heads=heads, intermediate_size=2 * width,
                  patch_size=28, out_hidden_size=width)
    if family == "qwen2_5_vl":
        vision.update(window_size=112, fullatt_block_indexes=[1])
    else:
        vision.update(num_position_embeddings=64, deepstack_visual_indexes=[0, 1])
    backbone = AutoModelForImageTextToText.from_config(AutoConfig.for_model(
        family, **ids, tie_word_embeddings=common["tie_word_embeddings"],
        text_config=text, vision_config=vision))
    images = Qwen2VLImageProcessorPil(
        patch_size=28, size={"shortest_edge": 56 ** 2, "longest_edge": 224 ** 2})
    return backbone, QwenProcessor(images, tokenizer, ids["image_token_id"])


def make_tiny(size, family, texts, atoms):
    """(backbone, processor) of random weights from torch's seed; `size` is WIDTHxLAYERS.

    `family` is one of these:

    llama     reads words only
    mllama    sees a picture as one tile of 224 pixels in 64 patches; its vision tower has the same
              width, and every second layer looks at the picture
    another   of support/vision.py
    """
    vision = family != "llama"
    least = 2 if family == "mllama" else 1
    match = re.fullmatch(r"(\d+)x(\d+)", size)
    width, layers = map(int, match.groups()) if match else (0, 0)
    if width % 32 or not width or layers < least:
        raise ValueError(f"--size {size!r}: must be WIDTHxLAYERS, WIDTH a multiple of 32 "
                         f"and LAYERS at least {least}")
    tokenizer = train_tokenizer(texts, atoms)
    common = dict(
        vocab_size=len(tokenizer), hidden_size=width, num_hidden_layers=layers,
        num_attention_heads=width // 32, num_key_value_heads=width // 32,
        intermediate_size=width * 8 // 3 // 32 * 32, max_position_embeddings=4096,
        tie_word_embeddings=not vision,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id)
    if not vision:
        return LlamaForCausalLM(LlamaConfig(**common)), tokenizer
    if family != "mllama":
        return make_tiny_qwen(family, tokenizer, common)
    # The id of this token is beyond lm_head, so it is never sampled.
    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    images = MllamaImageProcessorPil(size={"height": 224, "width": 224}, max_image_tiles=1)
    processor = MllamaProcessor(images, tokenizer, chat_template=CHAT_TEMPLATE)
    backbone = MllamaForConditionalGeneration(MllamaConfig(
        image_token_index=processor.image_token_id,
        text_config=dict(common, cross_attention_layers=list(range(1, layers, 2))),
        vision_config=dict(
            hidden_size=width, attention_heads=width // 32, intermediate_size=2 * width,
            patch_size=28, image_size=224, num_hidden_layers=2, num_global_layers=1,
            intermediate_layers_indices=[0, 1], vision_output_dim=3 * width, max_num_tiles=1,
            supported_aspect_ratios=[[1, 1]])))
    for name, parameter in backbone.named_parameters():
        if name.endswith("gate"):    # these are 0 in a new Mllama, which makes it blind
            nn.init.constant_(parameter, 0.5)
    return backbone, processor


def main(config):
    with running.one_line_errors():
        if not config.out or Path(config.out).exists():
            raise ValueError(f"--out {config.out!r}: must name a new folder")
        settings = read_settings(config.env)
        env = envs.make_env(config.task, **settings)
        torch.manual_seed(config.seed)
        family = config.family or ("mllama" if env.vision else "llama")
        splits = config.splits or splits_in_training(config.task)
        texts = sample_texts(config.task, splits=splits, **settings)
        atoms = atoms_of_splits(config.task, splits, **settings)
        backbone, processor = make_tiny(config.size, family, texts, atoms)
    transformers_logging.disable_progress_bar()
    with run_folder.whole(config.out) as folder:
        backbone.save_pretrained(folder)
        processor.save_pretrained(folder)
        portable.make_portable(folder, tokenizer_of(processor))
    size = sum(p.numel() for p in backbone.parameters())
    print(f"{config.out}: a {type(backbone).__name__} of {size:,} parameters")


if __name__ == "__main__":
    running.run(main, Config)
