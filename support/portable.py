"""The files of a checkpoint as other programs read them, which may know only older spellings.

transformers 5 writes some settings where version 4, and tools that follow it, do not look:

    config.json              the rotary base in `rope_parameters`, not in `rope_theta`
    tokenizer_config.json    a class of tokenizers and a list of special tokens of version 5 alone
    the end of a turn        as the model's first config had it, whatever its tokenizer says now

`make_portable` writes the older spellings beside the new ones.
"""
import json
from pathlib import Path

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedTokenizerFast

ONE_ROPE_A_KIND = ("gemma3", "gemma3_text")    # of layers: version 4 has a word for both bases
# Models that rotate a part of each head. Version 5 passes over the factor in any other, such as a
# Llama; version 4 would take it, and fail.
PARTIAL_ROPE = ("glm", "glm4", "nemotron", "persimmon", "phi", "phi3", "stablelm")


def older_rope(config):
    """The settings of version 4 that say what `rope_parameters` of a config (a dict) says.

    ValueError if version 4 has no words for it.
    """
    rope = config["rope_parameters"]
    older = {}
    if "full_attention" in rope:               # one for each kind of layer
        if None in rope.values():
            raise ValueError("a kind of layer without a rotary embedding")
        local = rope.get("sliding_attention", rope["full_attention"])
        rope = rope["full_attention"]
        if config["model_type"] in ONE_ROPE_A_KIND:
            older["rope_local_base_freq"] = local["rope_theta"]
        elif local["rope_theta"] != rope["rope_theta"]:
            raise ValueError("one rotary base for each kind of layer")
        elif local != rope and config["model_type"] != "olmo3":
            raise ValueError("one rotary embedding for each kind of layer")
        if local.get("rope_type", "default") != "default":
            raise ValueError("a scaled rotary embedding in layers with a sliding window")
    scaling = dict(rope)
    older["rope_theta"] = scaling.pop("rope_theta")
    partial = scaling.pop("partial_rotary_factor", None)
    if partial is not None and config["model_type"] in PARTIAL_ROPE:
        older["partial_rotary_factor"] = partial
    if config["model_type"] == "phi3" and scaling["rope_type"] == "longrope":
        # Here version 4 takes these three and no others.
        scaling = {"type": "longrope", "short_factor": scaling["short_factor"],
                   "long_factor": scaling["long_factor"]}
    plain = scaling == {"rope_type": "default"}
    if not plain or config["model_type"] == "mllama_text_model":      # which cannot do without it
        older["rope_scaling"] = scaling
    return older


def with_older_names(config):
    """A config (a dict), and those within it, with the names of version 4 beside those of 5."""
    both = {}
    for name, value in config.items():
        both[name] = with_older_names(value) if isinstance(value, dict) else value
    if "model_type" not in config:
        return both
    if isinstance(config.get("rope_parameters"), dict):
        both |= older_rope(config)
    if config["model_type"] in CONFIG_MAPPING:
        for older, name in CONFIG_MAPPING[config["model_type"]].attribute_map.items():
            if name in config:                 # as num_experts of Qwen3-MoE
                both[older] = config[name]
    return both


def ending_ids(ids, end_of_turn):
    """`eos_token_id` of a config: the end of a turn, beside the other ids if it was a list."""
    if not isinstance(ids, list):
        return end_of_turn
    return ids if end_of_turn in ids else [*ids, end_of_turn]


def with_end_of_turn(config, end_of_turn):
    """A config (a dict), and those within it, that end a text with the end of a turn."""
    changed = {}
    for name, value in config.items():
        changed[name] = with_end_of_turn(value, end_of_turn) if isinstance(value, dict) else value
    if "eos_token_id" in config:
        changed["eos_token_id"] = ending_ids(config["eos_token_id"], end_of_turn)
    return changed


def older_tokenizer(config, tokenizer):
    """tokenizer_config.json, a dict, in names that both versions know."""
    older = dict(config)
    # Both versions read from tokenizer.json all that this class does. Qwen2's does the same, and
    # the processors of Qwen-VL ask for it.
    if older["tokenizer_class"] != "Qwen2Tokenizer":
        older["tokenizer_class"] = "PreTrainedTokenizerFast"
        older["model_input_names"] = tokenizer.model_input_names
    if isinstance(older.get("extra_special_tokens"), list):
        older["additional_special_tokens"] = older.pop("extra_special_tokens")
    return older


def rewrite(path, change):
    """Write a JSON file anew, as change(...) of what it holds."""
    config = json.loads(path.read_text())
    path.write_text(json.dumps(change(config), indent=2, sort_keys=True) + "\n")


def make_portable(folder, tokenizer):
    """Write the older spellings into a folder that transformers 5 has saved.

    Returns a sentence on what version 4 will read otherwise, or None.
    """
    folder = Path(folder)
    end_of_turn = tokenizer.eos_token_id
    rewrite(folder / "config.json", lambda config: with_end_of_turn(config, end_of_turn))
    if (folder / "generation_config.json").is_file():
        rewrite(folder / "generation_config.json",
                lambda config: with_end_of_turn({"eos_token_id": None} | config, end_of_turn))
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        rewrite(folder / "tokenizer_config.json",
                lambda config: older_tokenizer(config, tokenizer))
    written = (folder / "config.json").read_text()
    expected = AutoConfig.from_pretrained(folder).get_text_config()
    try:
        rewrite(folder / "config.json", with_older_names)
        read = AutoConfig.from_pretrained(folder).get_text_config()
        if getattr(read, "rope_parameters", None) != getattr(expected, "rope_parameters", None):
            raise ValueError("a rotary embedding that this version would read otherwise")
    except (KeyError, ValueError) as error:
        (folder / "config.json").write_text(written)
        return f"transformers 4 has no words for {error}, so it would compute something else"
