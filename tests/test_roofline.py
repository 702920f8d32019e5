"""The roofline on paper counts what the code computes, sends and holds (tests/roofline.py)."""
import re
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, MllamaVisionConfig
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.mllama.modeling_mllama import MllamaVisionModel

import model
import rl
import roofline
import sft
from conftest import ROOT, tiny_folder
from support import running
from support.decoder import CacheDecoder, LlamaDecoder, RolloutMemory
from support.tiny import train_tokenizer

LLAMA, MLLAMA = tiny_folder(), tiny_folder(vision=True, size="32x4")
PUBLISHED = {"Llama-3.2-1B": 1.24, "Llama-3.2-3B": 3.21, "Qwen3-4B": 4.02, "Llama-3.1-8B": 8.03,
             "Llama-3.2-11B-Vision": 10.6, "Llama-3.1-70B": 70.6}


@pytest.fixture
def llama():
    """A random Llama of 2 M weights, three queries to a key, with heads wider than its layers."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=500, hidden_size=192, num_attention_heads=6, head_dim=64,
                         num_key_value_heads=2, num_hidden_layers=3, intermediate_size=640)
    return model.Policy(LlamaForCausalLM(config), train_tokenizer(["abc"] * 3, ["1"]))


def make_job(policy, gpus=8, **more):
    sizes = dict(envs=256, turns=8, prompt=290, reply=60, verdict=50, tries=4)
    return roofline.make_job(SimpleNamespace(**{**sizes, **more}), policy, gpus)


# ---- Weights and FLOPs ---------------------------------------------------------------------------

@pytest.mark.parametrize("name", roofline.MODELS)
def test_the_shapes_have_as_many_weights_as_was_published(name):
    total = roofline.Shape(roofline.make_policy(name)).total
    assert total / 1e9 == pytest.approx(PUBLISHED[name], rel=0.01)


@pytest.mark.parametrize("folder", [LLAMA, MLLAMA, str(ROOT / "data/base/gp-l")],
                         ids=["llama", "mllama", "gp-l"])      # names alike in all processes
def test_the_bytes_of_the_weights_are_those_of_the_checkpoint(folder):
    policy, _ = model.load_policy(folder)
    tensors = load_file(f"{folder}/model.safetensors").values()
    assert roofline.Shape(policy).total == sum(tensor.numel() for tensor in tensors)
    assert policy.dtype.itemsize == 4 == roofline.Shape(policy).size


def count_flops(policy, lengths, prompt):
    """FLOPs of forward and backward over rows of these lengths, by torch's own counter.

    Attention runs as plain products, which the counter knows; they compute both halves.
    """
    rows = [[([1] * prompt, [2] * (length - prompt))] for length in lengths]
    batch = model.collate(rows, "cpu")
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        logprobs, _ = policy(batch)
        logprobs.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("length, prompt", [(128, 1), (256, 200)])
def test_a_training_step_has_the_flops_that_torch_counts(llama, length, prompt, checkpointing):
    shape, passes = roofline.Shape(llama), 3 + checkpointing
    if checkpointing:
        running.enable_checkpointing(llama)
    predicted = length - prompt
    expected = 2 * roofline.training_flops(shape, length, predicted, checkpointing)
    upper_half = 2 * passes * shape.attention * length ** 2 / 2
    value_head = 2 * 2 * roofline.matrix_weights(llama.value_head)         # forward alone
    counted = count_flops(llama, [length, length], prompt)
    assert counted == pytest.approx(expected + upper_half + value_head, rel=0.01)
    if prompt == 1 and not checkpointing:      # then every token but the first is predicted
        attention = 2 * 3 * shape.attention * length ** 2
        assert counted == pytest.approx(1e9 * llama.gflops(2 * length) + attention, rel=0.01)


@torch.no_grad()
def test_reading_and_one_more_token_have_the_flops_that_torch_counts(llama):
    shape, decoder = roofline.Shape(llama), LlamaDecoder(llama, RolloutMemory(llama, 4096))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as reading:
        decoder.prefill([[1] * 191 + [i] for i in range(3)], range(3), [None] * 3, 64)
    # What all prompts begin with is read once; the last token is read behind it.
    expected = shape.row_flops(191) + shape.attention * 191 ** 2 / 2
    expected += 3 * shape.row_flops(1, 191, predicted=1)
    assert reading.get_total_flops() == pytest.approx(expected, rel=0.01)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as appending:
        decoder.append(torch.tensor([5, 6, 7]))
    # The step looks at 256 columns, the next multiple of 64.
    flops, _ = roofline.one_token(shape, 3, 256)
    assert appending.get_total_flops() == pytest.approx(flops, rel=0.01)


@torch.no_grad()
def test_a_picture_has_the_flops_that_torch_counts(tiny_vl):
    policy, length, prompt = tiny_vl[0], 128, 100
    shape, vision = roofline.Shape(policy, picture=True), policy.backbone.config.vision_config
    ids = [policy.vision.image_id] + [1] * (prompt - 1)
    batch = model.collate([[(ids, [2] * (length - prompt))]], policy.device,
                          [Image.new("RGB", (48, 48))])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        policy(batch)
    expected = shape.row_flops(length, 0, length - prompt) + shape.picture_flops
    expected += shape.attention * length ** 2 / 2 + 2 * roofline.matrix_weights(policy.value_head)
    # The tower chooses attention by itself, one that the counter doesn't see. It pads the patches.
    layers = vision.num_hidden_layers + vision.num_global_layers
    expected -= 4 * vision.hidden_size * layers * shape.states ** 2
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.03)


# ---- Memory --------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", [LlamaDecoder, CacheDecoder])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.no_grad()
def test_a_token_has_the_keys_and_values_that_the_decoder_allocates(llama, kind, dtype):
    llama.dtype = getattr(torch, dtype)
    shape, decoder = roofline.Shape(llama), kind(llama, RolloutMemory(llama, 4096, 2 ** 30))
    decoder.prefill([[1] * 20, [2] * 30], [0, 1], [None, None], 34)
    if kind is LlamaDecoder:
        buffers = [*decoder.keys, *decoder.values]
    else:
        buffers = [buffer for layer in decoder.cache.layers for buffer in layer.buffers]
    assert sum(buffer.nbytes for buffer in buffers) == 2 * 64 * shape.kv_bytes
    decoder.keep(torch.tensor([], dtype=torch.long))
    assert decoder.memory.num_bytes == (20 + 30) * shape.kv_bytes


def test_what_fits_is_what_training_prints(monkeypatch):
    policy = roofline.make_policy("Llama-3.2-3B")
    needed = roofline.bytes_needed(roofline.Shape(policy), make_job(policy))
    monkeypatch.setattr(running, "WORLD", 8)
    line = running.memory_estimate(policy, sft.Config(gradient_checkpointing=True))
    told = sum(map(float, re.findall(r"([\d.]+) GB", line)))
    assert needed["SFT"] / 1e9 == pytest.approx(told, abs=0.15)
    # PPO adds whole weights, but never beside gradients.
    line = running.memory_estimate(policy, rl.Config(gradient_checkpointing=True))
    shares, copies, _ = map(float, re.findall(r"([\d.]+) GB", line))
    buffers = roofline.sampling_buffers(roofline.Shape(policy), make_job(policy))
    assert (needed["PPO, sampling"] - buffers) / 1e9 == pytest.approx(0.75 * shares + copies,
                                                                      abs=0.15)
    assert needed["PPO, update"] == needed["SFT"]


# ---- Links ---------------------------------------------------------------------------------------

class Collectives(TorchDispatchMode):
    """How often weights are gathered and gradients reduced, and the bytes of the whole tensors."""

    kinds = {"_allgather_base_": "gather", "_reduce_scatter_base_": "reduce"}

    def __init__(self):
        super().__init__()
        self.times, self.bytes = Counter(), Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kind = self.kinds.get(operation.overloadpacket.__name__)
        if kind:
            self.times[kind] += 1
            self.bytes[kind] += args[0 if kind == "gather" else 1].nbytes
        return operation(*args, **(kwargs or {}))


@pytest.fixture
def eight_processes(monkeypatch):
    """FSDP2 in one process that takes itself for the first of eight; nothing is sent."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    monkeypatch.setattr(running, "WORLD", 8)
    monkeypatch.setattr(running, "gather", lambda value: [value])
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_micro_batch_gathers_and_reduces_each_unit_as_often_as_is_counted(
        eight_processes, checkpointing):
    def load(device, on_meta):
        return model.load_policy(LLAMA, device=device, gradient_checkpointing=checkpointing)

    policy, _ = running.load_spread(load, torch.device("cpu"))
    batch = model.collate([[([1, 2, 3], [4, 5])]], "cpu")
    shape = roofline.Shape(policy)
    units = sum(isinstance(module, running.FSDPModule) for module in policy.modules())
    assert units == 2 + 1                      # the layers of the tiny model, and what is left
    value_head = roofline.all_weights(policy.value_head)
    # What stays here is an eighth of the weights.
    kept = sum(p.to_local().numel() for p in policy.parameters())
    assert kept == pytest.approx((shape.total + value_head) / 8, rel=0.01)

    def sent(what):
        """(gathers, reductions) of each unit, after a look at the bytes."""
        with Collectives() as seen:
            what()
        for kind, num_bytes in seen.bytes.items():
            # A share has whole rows, so some hold a few more than an eighth.
            whole = seen.times[kind] / units * 4 * (shape.total + value_head)
            assert num_bytes == pytest.approx(whole, rel=0.01)
        return seen.times["gather"] / units, seen.times["reduce"] / units

    def train():
        logprobs, values = policy(batch)
        (logprobs.sum() + values.sum()).backward()

    both = roofline.GATHERS_FORWARD + roofline.GATHERS_BACKWARD
    assert sent(train) == (both, roofline.REDUCTIONS)
    assert sent(train) == (both, roofline.REDUCTIONS)     # of the same step: nothing is saved up
    with torch.no_grad():
        assert sent(lambda: policy(batch)) == (roofline.GATHERS_FORWARD, 0)
        uniforms = model.sampling_uniforms([(0,)], 4)
        assert sent(lambda: policy.generate([[1, 2, 3]], uniforms, 4, 1.0)) == (1, 0)


class Operations(TorchDispatchMode):
    """What a device would be sent, by name; views of a tensor send nothing."""

    views = {"select", "unsqueeze", "detach", "alias"}

    def __init__(self):
        super().__init__()
        self.times = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.times[operation.overloadpacket.__name__] += 1
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("temperature, most", [(0.0, 12), (0.5, 15)])
def test_beside_the_decoder_a_token_takes_few_operations_and_one_wait(
        llama, monkeypatch, temperature, most):
    """With CUDA graphs the decoder is one launch, so a GPU waits for these."""
    policy = llama
    monkeypatch.setattr(policy, "eos_id", -1)              # no reply ends
    logits = torch.zeros(3, policy.backbone.lm_head.weight.shape[0])
    decoder = SimpleNamespace(graphs=True, append=lambda ids: logits, keep=lambda rows: None)

    def count(num):
        with Operations() as seen:
            policy.sample(decoder, logits, torch.full((3, num), 0.5), num, temperature, 1.0)
        return seen.times

    few, more = count(10), count(20)
    each = {name: (more[name] - few[name]) / 10 for name in more if more[name] != few[name]}
    assert each.pop("_local_scalar_dense") == 1            # int(going.sum()) waits for the device
    assert sum(times for name, times in each.items() if name not in Operations.views) <= most


@pytest.mark.parametrize("side, tiles", [(1200, 4), (2 * 560 + 5, 4), (560, 1), (224, 1)])
def test_the_papers_pictures_leave_no_tile_of_the_tower_empty(side, tiles):
    """A hand of gp-vl and the four views of virl-vl; smaller pictures would leave three of four."""
    processor = MllamaImageProcessorPil(max_image_tiles=4, size={"height": 560, "width": 560})
    inputs = processor(Image.new("RGB", (side, side)), return_tensors="np")
    assert inputs["num_tiles"] == [[tiles]] and inputs["pixel_values"].shape[2] == 4


def test_few_places_of_the_tower_are_padding():
    """As results/speed.md has it: 28 of 6,432 for four tiles of 560 pixels."""
    tower = MllamaVisionModel(MllamaVisionConfig(
        hidden_size=16, attention_heads=2, intermediate_size=16, num_hidden_layers=1,
        num_global_layers=1, intermediate_layers_indices=[0], image_size=560, max_num_tiles=4))
    seen = []

    def look(module, args, kwargs):
        seen.append(kwargs.get("hidden_states", args[0] if args else None).shape[1])
        raise StopIteration
    tower.transformer.register_forward_pre_hook(look, with_kwargs=True)
    ids, mask = torch.tensor([[6]]), torch.ones(1, 1, 4, dtype=torch.long)
    with pytest.raises(StopIteration), torch.no_grad():
        tower(torch.zeros(1, 1, 4, 3, 560, 560), ids, mask)
    assert seen == [6432] and 6432 - tower.num_patches * 4 == 28
    assert "28 of the tower's 6,432" in " ".join(
        (ROOT / "results" / "speed.md").read_text().split())


# ---- The script ----------------------------------------------------------------------------------

def test_the_tables_say_that_nothing_was_measured(capsys):
    roofline.main(["--model", "Llama-3.2-1B"])
    roofline.main(["--model", "Llama-3.2-11B-Vision", "--gpus", "8", "--picture"])
    roofline.main(["--model", "Llama-3.2-3B", "--fits"])
    told = capsys.readouterr().out
    titles = [line for line in told.splitlines() if line.startswith("## ")]
    assert len(titles) == 4
    assert all("computed" in title and "not measured" in title for title in titles)
    for what in ("weights for sampling", "prefill", "decode", "scoring", "update", "SFT step"):
        assert told.count(f"| {what} |") == 3


@pytest.mark.parametrize("flags, told", [
    (["--model", "GPT-2"], "--model GPT-2: allowed are Llama-3.2-1B, "),
    (["--prompt", "0"], "--prompt 0: must be at least 1"),
    (["--envs", "64"], "--envs 64 --turns 8: their product must be a multiple of 1024"),
    (["--gpus", "3"], "--gpus 3 --envs 256 --tries 4: "),
    (["--model", "Qwen3-4B", "--picture"], "--picture: only Llama-3.2-11B-Vision")])
def test_a_wrong_flag_is_named(flags, told, capsys):
    with pytest.raises(SystemExit):
        roofline.main(flags)
    assert told in capsys.readouterr().err


def test_a_longer_prompt_on_fewer_gpus_costs_more_of_everything():
    shape = roofline.Shape(roofline.make_policy("Llama-3.2-1B"))
    small = roofline.phases_of(shape, make_job(shape.policy, gpus=8))
    large = roofline.phases_of(shape, make_job(shape.policy, gpus=1, prompt=600))
    for less, more in zip(small, large):
        assert less.memory < more.memory and less.flops <= more.flops
        assert more.links == 0
    links = {phase.what: phase.links for phase in small if phase.links}
    assert set(links) == {"weights for sampling", "scoring", "update", "update, checkpointing",
                          "SFT step", "SFT step, checkpointing"}
