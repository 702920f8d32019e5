"""A model's folder with its tokenizer and chat template, and all that may be wrong with them.

`model.load_policy` is the short story. It calls, in this order:

    load_folder        the backbone and its processor, from files that may be odd
    check_model        whether they behave as `model.encode` and `model.Policy` take for granted
    freeze_parts       the parts of a vision model that are not trained
    load_value_head    the weights of the value head, if the folder has any

model.py also takes from here what it needs of a tokenizer, a template and a config.
"""
import contextlib
import logging
import re
import signal
import threading
from functools import lru_cache
from pathlib import Path

import torch
from jinja2 import Environment, TemplateSyntaxError
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText,
                          AutoTokenizer, DynamicCache)
from transformers import logging as transformers_logging

from support import command_line, running
from support.chat import user_message
from support.decoder import cache_argument
from support.vision import FAMILIES

transformers_logging.set_verbosity_error()     # no bars and no hints of the library among our lines
transformers_logging.disable_progress_bar()

# What `--freeze` may name: the picture encoder, and what makes its states tokens or keys (Fig. 16).
FREEZABLE = ("vision", "projector")
# For one dialogue: a template can loop for ever.
TEMPLATE_SECONDS = 20
# What a config may call tokens that stand for pictures and videos.
PICTURE_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id",
               "boi_token_id", "eoi_token_id")
# Some templates print today's date (Llama 3.2, SmolLM3). Prompts must not change overnight.
DATE = "01 Jan 2025"

# ---- Tokenizer and chat template -----------------------------------------------------------------


def tokenizer_of(processor):
    """A text model's processor is its tokenizer; that of a vision model holds one."""
    return getattr(processor, "tokenizer", processor)


def template_of(processor):
    """The chat template; of several named ones "default", and None if there is none."""
    template = processor.chat_template
    return template.get("default") if isinstance(template, dict) else template


def has_power(template):
    """Whether a template computes a power. 7 ** 300000000 holds the interpreter for minutes, and no
    alarm is heard before it ends."""
    before = None
    for _, kind, text in Environment().lex(template):
        # Behind these it passes named arguments on: f(a, **named).
        if kind == "operator" and text == "**" and before not in ("(", ","):
            return True
        if kind != "whitespace":
            before = text
    return False


@contextlib.contextmanager
def template_alarm():
    """TimeoutError in what takes longer than TEMPLATE_SECONDS. Only the main thread hears it."""
    def ring(*_):
        raise TimeoutError(f"it does not come to an end within {TEMPLATE_SECONDS} s")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGALRM, ring)
    # It rings again each second, since some places in Python swallow an error.
    signal.setitimer(signal.ITIMER_REAL, TEMPLATE_SECONDS, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler or signal.SIG_DFL)


def render(processor, messages, **kwargs):
    """The dialogue as the model's chat template writes it, a string."""
    template = "{% macro strftime_now(format) %}" + DATE + "{% endmacro %}" + template_of(processor)
    try:
        with template_alarm():
            return tokenizer_of(processor).apply_chat_template(
                messages, chat_template=template, tokenize=False, date_string=DATE, **kwargs)
    except Exception as error:                 # a template is a program, and can raise anything
        raise ValueError(f"the chat template cannot write this dialogue: {reason(error)}") from None


def as_shown(processor, reply):
    """A reply without the blanks at its ends that the chat template cuts off, as Llama 3's does.

    So a model learns a reply as it will see it in the dialogue.
    """
    def shown(text):
        return render(processor, [user_message("1"), {"role": "assistant", "content": text}])

    while reply[:1].isspace() and shown(reply[1:]) == shown(reply):
        reply = reply[1:]
    while reply[-1:].isspace() and shown(reply[:-1]) == shown(reply):
        reply = reply[:-1]
    return reply


def reason(error):
    """The words of an error, or its name if it has none."""
    return str(error).strip() or repr(error)


def check_text(tokenizer, text):
    """ValueError if a text holds what the tokenizer reads as a control token.

    The name of a landmark, a prompt file and a data file may hold one. A verdict that repeats a
    reply holds none, since `reading.plain` replaces its characters.
    """
    for token in control_tokens(tokenizer):
        if token in text:
            raise ValueError(f"the text {text[:60]!r}... holds {token}, a control token of the "
                             "model")


@lru_cache(maxsize=4)      # the tokenizer builds its table anew each time that it is asked
def control_tokens(tokenizer):
    """The texts of a tokenizer's control tokens."""
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]


def never_sampled(tokenizer, config, num_rows):
    """A mask (num_rows,) of the rows of lm_head that are never sampled.

    These are the special ids but the end-of-turn, those that stand for pictures and videos, and
    rows that stand for no token. A special token may have no row, as Mllama's <|image|>.
    """
    shut_out = [i for i, token in tokenizer.added_tokens_decoder.items() if token.special]
    for name in PICTURE_IDS:
        shut_out.append(getattr(config, name, None))
    mask = torch.zeros(num_rows, dtype=torch.bool)
    mask[len(tokenizer):] = True
    for i in shut_out:
        if i is not None and i < num_rows and i != tokenizer.eos_token_id:
            mask[i] = True
    return mask


def context_of(config):
    """How many tokens a row may have.

    Beyond its sliding window, or its chunk of attention, a model would see other tokens in a padded
    row than in the row alone. Beyond the original length of longrope (Phi-3-128k), one long row
    would change the rotary embedding of all rows beside it.
    """
    limits = [config.max_position_embeddings]
    rope = getattr(config, "rope_parameters", None) or {}
    for part in (rope, *rope.values()):        # one of the model, or one of each kind of layer
        if isinstance(part, dict) and part.get("rope_type") == "longrope":
            limits.append(part["original_max_position_embeddings"])
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    if window and (layer_types is None or "sliding_attention" in layer_types):
        limits.append(window)
    if "chunked_attention" in (layer_types or ()):
        limits.append(config.attention_chunk_size)
    return min(limits)


# ---- Reading a folder ----------------------------------------------------------------------------

class Warnings(logging.Handler):
    """Prints what transformers warns of, in one line each."""

    def __init__(self, path):
        super().__init__()
        self.path = path

    def emit(self, record):
        told = " ".join(record.getMessage().split())
        if "fix_mistral_regex" in told:        # the advice is for programmers
            told += ' For that, write "fix_mistral_regex": true into its tokenizer_config.json.'
        running.print0(f"model {self.path!r}: transformers warns: {told}")


@contextlib.contextmanager
def warnings_passed_on(path):
    """While a folder is read, what transformers warns of is printed: it may be that texts are cut
    into wrong tokens."""
    logger, handler = logging.getLogger("transformers"), Warnings(path)
    transformers_logging.set_verbosity_warning()
    transformers_logging.disable_default_handler()
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        transformers_logging.enable_default_handler()
        transformers_logging.set_verbosity_error()


def mend_tokenizer(path, tokenizer):
    """Turn off what would give one text other ids each time, or cut control tokens into letters.

    Some folders keep these settings from their training. What is turned off is printed.
    """
    if tokenizer.split_special_tokens:
        running.print0(f"model {path!r}: split_special_tokens of its tokenizer is turned off, "
                       "since a chat template writes control tokens")
        tokenizer.split_special_tokens = tokenizer.init_kwargs["split_special_tokens"] = False
    merges = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    if getattr(merges, "dropout", None):
        running.print0(f"model {path!r}: dropout {merges.dropout:.3g} of its tokenizer is turned "
                       "off, since a text must always have the same tokens")
        merges.dropout = None


def load_folder(path, vision, dtype, on_meta):
    """(backbone, processor) from a Hugging Face folder, with weights of this type.

    `vision` demands a model that reads pictures. With `on_meta` the weights take no memory and have
    no values. ValueError says why the folder cannot be used.
    """
    folder = Path(path)
    command_line.check_model(path)
    try:
        with warnings_passed_on(path):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            if getattr(config, "quantization_config", None):
                raise ValueError("its weights are quantized (quantization_config); "
                                 "take the model as it was before")
            family = FAMILIES.get(config.model_type)
            backbone, faults = load_backbone(folder, config, dtype, on_meta)
            # Else a model returns tuples without names.
            backbone.config.return_dict = True
            for name in backbone.config.sub_configs:
                getattr(backbone.config, name).return_dict = True
            if family:
                processor = family.load_processor(folder, config)
            else:
                processor = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        mend_tokenizer(path, tokenizer_of(processor))
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:                 # the libraries raise anything on files that are odd
        raise ValueError(f"model {path!r}: not a causal language model shaped like Llama with its "
                         "tokenizer, nor a Llama-3.2-Vision with its processor, nor a Qwen2.5-VL "
                         f"or Qwen3-VL: {reason(error).splitlines()[0]}") from None
    check_weights(path, faults)
    if vision and not family:
        raise ValueError(f"model {path!r}: {config.model_type} reads no pictures; the task needs a "
                         f"vision model, supported are {', '.join(FAMILIES)}")
    if not hasattr(backbone, "model") or not hasattr(backbone, "lm_head"):
        raise ValueError(f"model {path!r}: architecture {config.model_type} is not supported; "
                         f"supported are {', '.join(FAMILIES)} and causal LMs shaped like Llama "
                         "(.model and .lm_head)")
    if family:
        family.check(path, backbone, processor)
    return backbone, processor


def load_backbone(folder, config, dtype, on_meta):
    """The model, and what transformers tells of weights that do not fit: kind -> names."""
    model_class = AutoModelForCausalLM
    if config.model_type in FAMILIES:
        model_class = AutoModelForImageTextToText
    if on_meta:
        with torch.device("meta"):
            return model_class.from_config(config, dtype=dtype), {}
    return model_class.from_pretrained(folder, dtype=dtype, trust_remote_code=False,
                                       output_loading_info=True, ignore_mismatched_sizes=True)


def check_weights(path, faults):
    """ValueError unless the folder's weights are those of the model, each in its shape.

    Else transformers would fill what is missing with random numbers.
    """
    for kind in ("missing", "unexpected", "mismatched"):
        names = sorted(map(str, faults.get(f"{kind}_keys", ())))
        if names:
            more = f", and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"model {path!r}: its weights do not fill the model: "
                             f"{names[0]} is {kind}{more}")


# ---- Does it behave ------------------------------------------------------------------------------

def is_finite(weight):
    """Whether all values of a tensor are finite numbers."""
    return not weight.numel() or bool(torch.stack(weight.detach().aminmax()).isfinite().all())


def check_finite(weights, where):
    """ValueError unless all values of (name, tensor), ... are finite numbers."""
    for name, weight in weights:
        if not is_finite(weight):
            raise ValueError(f"{where}: its weights {name} hold values that are no finite numbers")


def check_template(path, processor, vision, encode, encode_reply):
    """The ids (P,) of a first prompt; ValueError unless `encode` can use the chat template.

    `encode` and `encode_reply` are those of model.py. They try a first and a second prompt, and the
    template alone tries a longer dialogue.
    """
    tokenizer, template = tokenizer_of(processor), template_of(processor)
    if template is None or tokenizer.eos_token is None:
        raise ValueError(f"model {path!r}: its tokenizer has no chat template (or none called "
                         "default), or no end-of-sequence token")
    if not isinstance(template, str):
        raise ValueError(f"model {path!r}: \"chat_template\" of its tokenizer_config.json is "
                         f"{template!r}, not a text")
    picture = Image.new("RGB", (64, 64)) if vision else None
    reply = {"role": "assistant", "content": "2"}
    messages = [user_message("1", picture), reply, user_message("3")]
    try:
        if has_power(template):
            raise ValueError("it computes a power (**), which may never come to an end")
        first = encode(processor, messages[:1])
        encode(processor, messages, first + encode_reply(processor, "2"))
        render(processor, messages + 8 * [reply, user_message("3")], add_generation_prompt=True)
    except (ValueError, TemplateSyntaxError) as error:
        raise ValueError(f"model {path!r}: its chat template cannot be used: {error}") from None
    if tokenizer.bos_token and first[:2] == 2 * [tokenizer.bos_token_id]:
        raise ValueError(f"model {path!r}: its chat template must write {tokenizer.bos_token} "
                         "once, not twice")
    return first


def check_model(path, backbone, processor, vision, encode, encode_reply):
    """ValueError unless model and template behave as `encode` and `Policy` take for granted."""
    # The template lets a dialogue go on, and comes to an end.
    ids = check_template(path, processor, vision, encode, encode_reply)

    # Each token has an embedding, and the end-of-turn a logit.
    num_logits = backbone.lm_head.weight.shape[0]
    num_embeddings = backbone.get_input_embeddings().weight.shape[0]
    tokenizer = tokenizer_of(processor)
    if max(ids) >= num_embeddings or tokenizer.eos_token_id >= num_logits:
        raise ValueError(f"model {path!r}: its tokenizer has more tokens ({len(tokenizer)}) than "
                         f"the model ({num_logits}): resize the model's embeddings")

    # A number that is none may be where no text below leads: at a rare token, in a vision tower.
    check_finite(backbone.named_parameters(), f"model {path!r}")

    with torch.no_grad():
        text = torch.tensor([[i for i in ids if i < num_logits]])      # <|image|> has no row
        expected = backbone(text).logits
        product = backbone.lm_head(backbone.model(text).last_hidden_state)
        # Sampling drops the rows of replies that have ended.
        try:
            cache = DynamicCache(config=backbone.config.get_text_config())
            backbone.model(input_ids=text, use_cache=True,
                           **{cache_argument(backbone.model): cache})
            cache.reorder_cache(torch.tensor([0]))
        except (AttributeError, RuntimeError, TypeError, ValueError, IndexError):
            raise ValueError(f"model {path!r}: rows of its cache cannot be dropped "
                             f"({backbone.config.model_type}), which sampling needs") from None

    # The logits are numbers, and the plain product that `TokenLogprobs` computes.
    if not torch.isfinite(expected).all():
        raise ValueError(f"model {path!r}: its weights give logits that are no finite numbers")
    product = product / getattr(backbone.config.get_text_config(), "logits_scaling", 1.0)
    if backbone.lm_head.bias is not None or not torch.allclose(expected, product, atol=1e-4):
        raise ValueError(f"model {path!r}: its logits are not plain products of hidden states and "
                         f"lm_head ({backbone.config.model_type}), which is not supported")


def check_drawn(logprobs):
    """ValueError if a log-prob of a sampled token is no number.

    Then the logits were none, as of a model whose training diverged, and the token means nothing.
    """
    if logprobs.isnan().any():
        raise ValueError("the model's logits are no finite numbers, so no reply can be sampled: "
                         "its training may have diverged")


# ---- Parts ---------------------------------------------------------------------------------------

def freeze_parts(backbone, names):
    """Take the parts of these names, comma-separated, out of training; ValueError for any other."""
    family = FAMILIES.get(backbone.config.model_type)
    for name in filter(None, names.split(",")):
        if name not in FREEZABLE or not family:
            raise ValueError(f"freeze {name!r}: allowed are {', '.join(FREEZABLE)}, "
                             "and only in a vision model")
        for parameter_name, parameter in backbone.named_parameters():
            if re.match(family.parts[name], parameter_name):
                parameter.requires_grad_(False)


def load_value_head(path, value_head):
    """Put the folder's weights into the value head; without such a file it stays as it is."""
    file = Path(path) / "value_head.safetensors"
    if file.is_file():
        try:
            weights = load_file(file)
            value_head.load_state_dict(weights)
        except (OSError, SafetensorError, RuntimeError) as error:
            told = " ".join(str(error).split())
            raise ValueError(f"{file}: not this model's value head: {told}") from None
        check_finite(weights.items(), file)
