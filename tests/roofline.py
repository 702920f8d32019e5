"""A roofline on paper: what H100s would allow for the paper's runs. COMPUTED, NOT MEASURED.

    python tests/roofline.py                                     # four models, on 1 and on 8 GPUs
    python tests/roofline.py --model Llama-3.2-3B --gpus 8 --prompt 290 --reply 60
    python tests/roofline.py --fits                              # model x GPUs: what fits in 80 GB

Each phase of a PPO update and of an SFT step gets its FLOPs, its bytes from memory and its bytes
over links. All are of one GPU. The peak rates make times of them. The longest of the three times
is the least that the phase can take, and says what bounds it. The phases' rows:

    weights    what `Policy.generate` does first: gathers and casts the weights
    prefill    reads what is new in the prompts
    One token  one more token for one group of rows, in the middle of a reply
    decode     all tokens but each reply's first, which prefill gives
    scoring    log-probs and values without a gradient
    update     all epochs, forward, backward and Adam
    SFT step   the same on one batch of first tries

The counts are least ones. Attention counts the half below the diagonal. Padding, norms and sums
count nowhere. Activations are written once and read once. All replies are equally long, so nobody
waits for a longest one (tests/idle.py measures that). Sizes that no option sets are the defaults of
rl.py and sft.py. tests/test_roofline.py compares the counts with torch's own and with buffers.
"""
import argparse
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn as nn
from transformers import LlamaConfig, MllamaConfig, Qwen3Config

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import rl
import sft
from model import Policy, micro_batches
from support import loading, running, tiny

# Peaks of one H100 SXM, by NVIDIA's data sheet (without sparsity): dense bfloat16, HBM3, and NVLink
# of the fourth generation, 900 GB/s in both directions together. Nothing reaches a peak: on an H100
# results/speed.md has 699 TFLOP/s for a matrix product and 2.73 TB/s for a copy.
PEAK_FLOPS = 989e12
PEAK_MEMORY = 3.35e12
PEAK_LINK = 450e9
MEMORY = 80e9              # bytes of a GPU that a run may fill

# FSDP2 as support/running.py sets it up: how often a unit's weights are gathered, and its gradients
# are summed and cut, in a micro-batch. reshard_after_forward drops the weights between forward and
# backward. Gradients are reduced behind every micro-batch, in float32.
GATHERS_FORWARD, GATHERS_BACKWARD, REDUCTIONS = 1, 1, 1
BYTES_OF_GRADIENT = 4


def llama(layers, hidden_size, heads, intermediate_size, tied):
    config = dict(vocab_size=128256, num_hidden_layers=layers, hidden_size=hidden_size,
                  num_attention_heads=heads, num_key_value_heads=8,
                  intermediate_size=intermediate_size, tie_word_embeddings=tied)
    return LlamaConfig, config


# Numbers of the published config.json files. Mllama's text model is the default of transformers.
MODELS = {
    "Llama-3.2-1B": llama(16, 2048, 32, 8192, True),
    "Llama-3.2-3B": llama(28, 3072, 24, 8192, True),
    "Qwen3-4B": (Qwen3Config, dict(vocab_size=151936, num_hidden_layers=36, hidden_size=2560,
                                   num_attention_heads=32, num_key_value_heads=8, head_dim=128,
                                   intermediate_size=9728, tie_word_embeddings=True)),
    "Llama-3.1-8B": llama(32, 4096, 32, 14336, False),
    "Llama-3.2-11B-Vision": (MllamaConfig, dict(vision_config={"image_size": 560})),
    "Llama-3.1-70B": llama(80, 8192, 64, 28672, False),
}
USUAL = ("Llama-3.2-1B", "Llama-3.2-3B", "Qwen3-4B", "Llama-3.2-11B-Vision")


# ---- A model's numbers ---------------------------------------------------------------------------

def make_policy(name):
    """The policy of a published shape, on the meta device: shapes without values."""
    config_class, numbers = MODELS[name]
    config = config_class(**numbers)
    backbone, _ = loading.load_backbone(None, config, torch.float32, on_meta=True)
    processor = tiny.train_tokenizer(["abc"] * 3, ["1"])
    if config.model_type == "mllama":
        processor = SimpleNamespace(tokenizer=processor, image_processor=None,
                                    image_token_id=config.image_token_index)
    return Policy(backbone, processor, "bfloat16")


def matrix_weights(module):
    """Weights that multiply: those of linear layers and convolutions."""
    return sum(part.weight.numel() for part in module.modules()
               if isinstance(part, (nn.Linear, nn.Conv2d)))


def all_weights(module):
    return sum(p.numel() for p in module.parameters())


class Shape:
    """What the arithmetic needs of a policy, read off its modules.

    Without a picture a model plays in words. Then Mllama's encoder and the layers that look at
    pictures are passed over: they compute nothing, and FSDP2 gathers none of them in training.
    """

    def __init__(self, policy, picture=False):
        self.policy, backbone = policy, policy.backbone
        text, size = backbone.config.get_text_config(), policy.dtype.itemsize
        language = getattr(backbone.model, "language_model", backbone.model)
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        crossing = [language.layers[i] for i in getattr(text, "cross_attention_layers", ())]
        plain = [layer for layer in language.layers if layer not in crossing]
        width = text.num_attention_heads * head_dim
        kv_bytes = 2 * text.num_key_value_heads * head_dim * size

        self.size, self.total = size, all_weights(backbone)
        self.head = backbone.lm_head.weight.numel()
        self.body = sum(map(matrix_weights, plain))          # weights that multiply each token
        # The last product of a layer, which checkpointing need not repeat: nothing behind it in the
        # layer asks for its result.
        self.last = sum(layer.mlp.down_proj.weight.numel() for layer in plain)
        self.attention = 4 * width * len(plain)              # FLOPs of a token for each it sees
        self.kv_bytes = kv_bytes * len(plain)                # keys and values of a token
        # Of a picture: its states, and what they cost.
        self.states = self.picture_flops = self.picture_bytes = 0
        self.gathered = self.total
        if policy.vision and picture:
            encoder, vision = backbone.model.vision_model, backbone.config.vision_config
            looked = sum(matrix_weights(part) for layer in crossing
                         for part in (layer.cross_attn.k_proj, layer.cross_attn.v_proj))
            self.states = policy.picture_tokens
            self.body += sum(map(matrix_weights, crossing)) - looked
            weights = sum(map(matrix_weights, (encoder, backbone.model.multi_modal_projector)))
            layers = vision.num_hidden_layers + vision.num_global_layers
            # The encoder runs once for a picture in a rollout; keys and values are made of its
            # states in each `generate`.
            self.encoder_flops = (2 * weights * self.states
                                  + 4 * vision.hidden_size * layers * self.states ** 2)
            self.looked_flops = 2 * looked * self.states
            self.picture_flops = self.encoder_flops + self.looked_flops
            self.picture_bytes = kv_bytes * len(crossing) * self.states
            self.crossing = 4 * width * len(crossing)
        elif policy.vision:
            unused = [layer for layer in running.layers_of(policy) if layer not in plain]
            self.gathered -= sum(map(all_weights, unused))

    def row_flops(self, new, there=0, predicted=0):
        """FLOPs of reading `new` tokens behind others that are there, without the picture's own."""
        looking = self.crossing * new * self.states if self.states else 0
        return (2 * self.body * new + 2 * self.head * predicted
                + self.attention * new * (there + new / 2) + looking)


def training_flops(shape, length, predicted, checkpointing):
    """FLOPs of a row of this length, forward and backward, with so many predicted tokens.

    The backward pass costs twice the forward pass. Checkpointing computes the layers again, but for
    the last product of each.
    """
    layers = shape.row_flops(length) + shape.picture_flops
    again = layers - 2 * shape.last * length if checkpointing else 0
    return 3 * layers + again + 3 * 2 * shape.head * predicted


# ---- Phases --------------------------------------------------------------------------------------

class Phase(NamedTuple):
    """The work of one GPU, `times` times in an update or step; all amounts are of all times."""
    what: str
    times: int
    flops: float = 0.0
    memory: float = 0.0      # bytes
    links: float = 0.0       # bytes that it receives

    def limits(self):
        return {"matrix": self.flops / PEAK_FLOPS, "memory": self.memory / PEAK_MEMORY,
                "link": self.links / PEAK_LINK}

    @property
    def bound(self):
        limits = self.limits()
        return max(limits, key=limits.get)

    @property
    def seconds(self):
        return max(self.limits().values())


def lengths_of_tries(job):
    """(prompt tokens, those that are new behind the try before) of each turn of an environment."""
    turns = []
    for turn in range(job.rl.turns_per_env):
        earlier = turn % job.tries
        prompt = job.prompt + earlier * (job.reply + job.verdict)
        # A reply's last token was sampled, but not yet read.
        turns.append((prompt, job.verdict + 1 if earlier else prompt))
    return turns


def sampling_groups(shape, job, prompt):
    """Rows of each group that one GPU decodes in one turn, by `model.micro_batches`."""
    rows, budget = job.rl.num_envs // job.gpus, job.rl.generate_tokens
    length = prompt + shape.states + job.rl.max_new_tokens
    return [len(group) for group in micro_batches([length] * rows, budget, rows * budget)]


def one_token(shape, rows, there):
    """(FLOPs, bytes from memory) of one more token for `rows` rows, with `there` tokens each."""
    flops = rows * shape.row_flops(1, there, predicted=1)
    weights = (shape.body + shape.head) * shape.size
    return flops, weights + rows * (there * shape.kv_bytes + shape.picture_bytes)


def rollout_phases(shape, job):
    """The rollout of an update, of one GPU."""
    turns, rows, size = job.rl.turns_per_env, job.rl.num_envs // job.gpus, shape.size
    parts, others = job.memory, (job.gpus - 1) / job.gpus
    # A single process reads the master weights and writes them in the type it computes in.
    moved = parts.computed_with + 2 * parts.fused + (4 * shape.total if job.gpus == 1 else 0)
    weights = Phase("weights for sampling", turns, 0, turns * moved,
                    turns * others * shape.total * size)
    read_flops = read_bytes = flops = moved = groups = 0
    middle = None
    for prompt, new in lengths_of_tries(job):
        # --kept-gib holds the beginnings of so many dialogues; the others are read anew.
        there = prompt - new
        kept = min(rows, job.rl.kept_gib * 2 ** 30 // (there * shape.kv_bytes)) if there else 0
        read_flops += kept * shape.row_flops(new, there, 1)
        read_flops += (rows - kept) * shape.row_flops(prompt, 0, 1)
        if shape.states:
            read_flops += rows * (shape.looked_flops + (0 if there else shape.encoder_flops))
        sizes = sampling_groups(shape, job, prompt)
        groups += len(sizes)
        read_bytes += len(sizes) * (shape.body + shape.head) * size
        read_bytes += rows * (prompt * shape.kv_bytes + shape.picture_bytes)
        for size_of_group in sizes:
            for step in range(1, job.reply):
                more = one_token(shape, size_of_group, prompt + step)
                flops, moved = flops + more[0], moved + more[1]
        if middle is None:
            middle = Phase(f"One token for {max(sizes)} rows", 1,
                           *one_token(shape, max(sizes), prompt + job.reply // 2))
    return [weights, Phase("prefill", groups, read_flops, read_bytes), middle,
            Phase("decode", groups * (job.reply - 1), flops, moved)]


def pass_phase(shape, job, what, rows, length, predicted, steps, backward, checkpointing=False):
    """`steps` passes over so many rows on one GPU, each in micro-batches; with Adam if backward."""
    micro = len(micro_batches([length + shape.states] * rows, job.rl.micro_batch_tokens))
    times, others = micro * steps, (job.gpus - 1) / job.gpus
    tokens = steps * rows * length
    activations = job.memory.micro_batch / job.rl.micro_batch_tokens * tokens
    gathers, reads, moved = GATHERS_FORWARD, 1, 0
    flops = shape.row_flops(length, 0, predicted) + shape.picture_flops
    if backward:
        flops = training_flops(shape, length, predicted, checkpointing)
        gathers, reads = GATHERS_FORWARD + GATHERS_BACKWARD, 3 if checkpointing else 2
        # Adam reads weight, gradient and two moments, and writes three of them: float32.
        moved = 2 * activations + steps * 7 * 4 * shape.gathered / job.gpus
    # Each micro-batch reads the weights, and writes their gradient.
    moved += times * (reads + backward) * (shape.body + shape.head) * shape.size
    received = gathers * shape.size + backward * REDUCTIONS * BYTES_OF_GRADIENT
    return Phase(what, times, steps * rows * flops, moved,
                 times * received * shape.gathered * others)


def update_phases(shape, job):
    """Scores and update of PPO, of one GPU: with and without checkpointing."""
    config = job.rl
    turns = config.num_envs * config.turns_per_env
    length = job.prompt + job.tries * job.reply + (job.tries - 1) * job.verdict
    minibatches = turns // config.minibatch_turns
    rows = config.minibatch_turns // job.tries // job.gpus
    fixed = dict(rows=rows, length=length, predicted=job.tries * job.reply)
    return [pass_phase(shape, job, "scoring", steps=minibatches, backward=False, **fixed),
            pass_phase(shape, job, "update, checkpointing", steps=config.epochs * minibatches,
                       backward=True, checkpointing=True, **fixed),
            pass_phase(shape, job, "update", steps=config.epochs * minibatches, backward=True,
                       **fixed)]


def sft_phases(shape, job):
    """An SFT step of one GPU: with and without checkpointing."""
    fixed = dict(rows=job.batch_size // job.gpus, length=job.prompt + job.reply,
                 predicted=job.reply, steps=1, backward=True)
    return [pass_phase(shape, job, "SFT step, checkpointing", checkpointing=True, **fixed),
            pass_phase(shape, job, "SFT step", **fixed)]


# ---- What fits -----------------------------------------------------------------------------------

def memory_of(policy, config, gpus):
    """`running.memory_parts` as it would be with so many processes."""
    with mock.patch.object(running, "WORLD", gpus):
        return running.memory_parts(policy, config)


def sampling_buffers(shape, job):
    """Bytes of keys and values: those of a group that is decoded, and those that are kept."""
    prompt = max(prompt for prompt, _ in lengths_of_tries(job))
    rows, group = job.rl.num_envs // job.gpus, max(sampling_groups(shape, job, prompt))
    columns = -(-(prompt + job.rl.max_new_tokens) // 64) * 64
    kept = min(job.rl.kept_gib * 2 ** 30, rows * (prompt + job.reply) * shape.kv_bytes)
    return group * (columns * shape.kv_bytes + shape.picture_bytes) + kept


def bytes_needed(shape, job):
    """Bytes on each GPU, at the largest moment of each job: a name -> bytes.

    It follows `running.memory_parts`. While PPO samples there are no gradients.
    """
    policy, gpus = shape.policy, job.gpus
    config = vars(job.rl) | {"gradient_checkpointing": True}
    sft_config = {name: value for name, value in config.items() if name != "generate_tokens"}
    of_rl = memory_of(policy, SimpleNamespace(**config), gpus)
    of_sft = memory_of(policy, SimpleNamespace(**sft_config), gpus)
    trained = of_sft.weights + of_sft.gradients + of_sft.moments + of_sft.computed_with
    buffers = sampling_buffers(shape, job)
    copies = of_rl.computed_with + of_rl.fused
    # evaluate.py reads the weights in the type that it computes in, as several processes gather
    # them.
    alone = memory_of(policy, SimpleNamespace(**config), 2)
    return {"SFT": trained + of_sft.micro_batch, "PPO, update": trained + of_rl.micro_batch,
            "PPO, sampling": of_rl.weights + of_rl.moments + copies + buffers,
            "evaluate.py": alone.computed_with + alone.fused + buffers}


# ---- Printing ------------------------------------------------------------------------------------

def make_job(args, policy, gpus):
    """The sizes of a run, and its memory on each of so many GPUs."""
    config = rl.Config(num_envs=args.envs, turns_per_env=args.turns)
    return SimpleNamespace(rl=config, gpus=gpus, prompt=args.prompt, reply=args.reply,
                           verdict=args.verdict, tries=args.tries,
                           batch_size=sft.Config().batch_size,
                           memory=memory_of(policy, config, gpus))


def phases_of(shape, job):
    return rollout_phases(shape, job) + update_phases(shape, job) + sft_phases(shape, job)


def print_phases(name, shape, job):
    config = job.rl
    print(f"\n## {name}, {shape.total / 1e9:.2f} B weights, on {job.gpus} H100: computed from peak "
          f"rates, not measured\n\n{config.num_envs} environments x {config.turns_per_env} turns, "
          f"{job.tries} tries to a dialogue; prompt {job.prompt}, reply {job.reply}, verdict "
          f"{job.verdict} tokens{', a picture each' if shape.states else ', in words'}\n\n"
          "| of one GPU | times | TFLOP | GB memory | GB links | at the peak | bound by |\n"
          "|---|---|---|---|---|---|---|")
    phases = phases_of(shape, job)
    for each in phases:
        print(f"| {each.what} | {each.times} | {each.flops / 1e12:,.2f} | "
              f"{each.memory / 1e9:,.1f} | {each.links / 1e9:,.1f} | "
              f"{each.seconds * 1e3:,.1f} ms | {each.bound} |")
    print()
    for sentence in advice(shape, phases, job):
        print(f"- {sentence}")


def advice(shape, phases, job):
    """Where the design stays below the roof, and what would change it: sentences."""
    weights, prefill, token, decode, scoring, update, _, step, _ = phases
    config, turns, rows = job.rl, job.rl.turns_per_env, job.rl.num_envs // job.gpus
    rollout = weights.seconds + prefill.seconds + decode.seconds
    share = rollout / (rollout + scoring.seconds + update.seconds)
    busy = token.flops / PEAK_FLOPS / token.seconds
    yield (f"The rollout is {share:.0%} of an update, and decoding {decode.seconds / rollout:.0%} "
           f"of the rollout. {token.what} keeps the matrix units {busy:.0%} busy, since all "
           "weights are read for one group. More rows side by side would share that reading: more "
           "environments to a GPU, or rows refilled as replies end (continuous batching).")
    groups = prefill.times / turns
    if groups > 1:
        yield (f"--generate-tokens {config.generate_tokens} makes {groups:.1f} groups of a turn, "
               "decoded one after another. Each reply reserves --max-new-tokens "
               f"{config.max_new_tokens}, and each picture {shape.states} tokens.")
    prompt, new = lengths_of_tries(job)[job.tries - 1]
    kept = int(min(rows, config.kept_gib * 2 ** 30 // ((prompt - new) * shape.kv_bytes)))
    if kept < rows:
        yield (f"--kept-gib {config.kept_gib} holds {kept} of {rows} dialogues before their last "
               "try. The others are read anew.")
    if shape.states:
        held = config.micro_batch_tokens // (shape.states + job.prompt + job.reply)
        yield (f"--micro-batch-tokens {config.micro_batch_tokens} holds {held} pictures. So "
               "weights travel often for few tokens; a larger number would help.")
    if job.gpus == 1:
        return
    yield (f"Weights are gathered whole in each of {turns} calls of `generate`, "
           f"{weights.seconds / rollout:.0%} of the rollout, while nothing computes. They could be "
           "kept for the whole rollout. Or each GPU could decode with its share of every matrix "
           "(tensor parallel).")
    for what, phase in (("PPO update", update), ("SFT step", step)):
        ratio = phase.links / PEAK_LINK / (phase.flops / PEAK_FLOPS)
        yield (f"In the {what} links take {ratio:.0%} of the matrix time. FSDP2 can hide that only "
               "as far as it gathers the next layer meanwhile. Half of it is for gradients, which "
               "are reduced behind every micro-batch. Once for a step would do, with whole "
               "gradients on each GPU.")


def print_fits(shapes, args):
    names = ("SFT", "PPO, update", "PPO, sampling", "evaluate.py")
    print(f"\n## What fits in {MEMORY / 1e9:.0f} GB: computed, not measured\n\nGB on each GPU, "
          "with --gradient-checkpointing and float32 master weights; a `no` is more than fits\n\n"
          f"| model | GPUs | {' | '.join(names)} |\n|---|---|{'---|' * len(names)}")
    for name, shape in shapes.items():
        for gpus in args.gpus:
            needed = bytes_needed(shape, make_job(args, shape.policy, gpus))
            cells = [f"{needed[what] / 1e9:.0f}{'' if needed[what] <= MEMORY else ' no'}"
                     for what in names]
            print(f"| {name} | {gpus} | {' | '.join(cells)} |")


def parse_args(argv=None):
    parser = running.OneLineParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help=f"one of {', '.join(MODELS)}")
    parser.add_argument("--gpus", type=int, help="number of GPUs [1 and 8; for --fits also 2, 4]")
    parser.add_argument("--fits", action="store_true", help="print what fits, and nothing else")
    parser.add_argument("--picture", action="store_true", help="a picture in each dialogue")
    numbers = {"envs": (rl.Config.num_envs, "environments"),
               "turns": (rl.Config.turns_per_env, "turns of each in an update"),
               "tries": (4, "turns of a dialogue"),
               "prompt": (290, "tokens of a first prompt; recipes/gp_l.sh has 350 with the reply"),
               "reply": (60, "tokens of a reply"),
               "verdict": (50, "tokens between a reply and the next")}
    for name, (default, told) in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{told} [{default}]")
    args = parser.parse_args(argv)
    for name in ("gpus", *numbers):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name} {value}: must be at least 1")
    if args.model and args.model not in MODELS:
        parser.error(f"--model {args.model}: allowed are {', '.join(MODELS)}")
    if args.picture and args.model != "Llama-3.2-11B-Vision":
        parser.error("--picture: only Llama-3.2-11B-Vision takes pictures here; name it by --model")
    args.gpus = [args.gpus] if args.gpus else [1, 2, 4, 8] if args.fits else [1, 8]
    minibatch = rl.Config.minibatch_turns
    if args.envs * args.turns % minibatch:
        parser.error(f"--envs {args.envs} --turns {args.turns}: their product must be a multiple "
                     f"of {minibatch}, the turns of a minibatch")
    for gpus in args.gpus:
        if args.envs % gpus or minibatch % (args.tries * gpus):
            parser.error(f"--gpus {gpus} --envs {args.envs} --tries {args.tries}: the environments "
                         f"must divide into the GPUs, and {minibatch} turns into tries x GPUs")
    return args


def main(argv=None):
    args = parse_args(argv)
    names = [args.model] if args.model else list(MODELS if args.fits else USUAL)
    shapes = {name: Shape(make_policy(name), args.picture) for name in names}
    if args.fits:
        return print_fits(shapes, args)
    for name, shape in shapes.items():
        for gpus in args.gpus:
            print_phases(name, shape, make_job(args, shape.policy, gpus))


if __name__ == "__main__":
    main()
