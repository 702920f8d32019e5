"""How a vision model takes a picture: one class for each family, chosen by the model type of config.json.

Mllama (Llama-3.2-Vision) looks at a picture from some of its layers, by cross-attention, so that it adds one token to the
prompt. In the Qwen-VL models a picture's states stand in the text as tokens of their own, more for a larger picture.
model.py and support/decoder.py use of a family:

    parts                   what --freeze names -> a pattern of parameter names
    load_processor, check   the processor of a folder, and ValueError if it or transformers does not fit the model
    picture_tokens          tokens of a picture beside those in the prompt
    num_patches(picture)    what the encoder computes for it
    inputs(...)             what the model takes beside the ids in an update; the encoder runs, with gradients
    see(pictures)           what the encoder makes of each picture: a list of tensors that RolloutMemory keeps
    read(...)               what the model takes beside the ids in sampling, by `see`

    S states of a picture   D hidden size   B rows   T tokens   P columns of prompts
"""
import inspect
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoProcessor, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil   # needs no torchvision

torch.backends.cudnn.allow_tf32 = False             # else a float32 model's patches are multiplied in less than float32


def by_cudnn_attention(forward, *args, **kwargs):
    """A layer's forward with cuDNN's attention where it can be had: a tower's layers see few shapes, and with a mask over 6,400
    places of a picture it takes less than half the time on an H100 (results/h100.md). Elsewhere it is off (support/decoder.py)."""
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(order, set_priority=True):
        return forward(*args, **kwargs)


class MllamaVision:
    """A picture is cut into tiles, the vision tower and a projector make states of them, and some layers of the language
    model look at those: the picture adds nothing to the keys and values of the text.

    In transformers the tokens before <|image|> see a little of the picture, too: we leave that as it is.
    """

    parts = {"vision": r"model\.vision_model\.", "projector": r"model\.multi_modal_projector\."}

    @staticmethod
    def load_processor(folder, config):
        return AutoProcessor.from_pretrained(folder, trust_remote_code=False)

    @staticmethod
    def check(path, backbone, processor):
        tiles, taken = processor.image_processor.max_image_tiles, backbone.config.vision_config.max_num_tiles
        if tiles > taken:
            raise ValueError(f"model {path!r}: its processor cuts a picture into up to {tiles} tiles, the model takes "
                             f"{taken} (max_image_tiles of its preprocessor)")

    def __init__(self, backbone, processor):
        self.model, vision = backbone.model, backbone.config.vision_config
        self.image_processor, self.image_id = processor.image_processor, processor.image_token_id
        tower = self.model.vision_model
        for layer in (*tower.transformer.layers, *tower.global_transformer.layers):
            layer.forward = partial(by_cudnn_attention, layer.forward)
        # a picture counts all tiles, used or not
        self.picture_tokens = vision.max_num_tiles * ((vision.image_size // vision.patch_size) ** 2 + 1)

    def num_patches(self, picture):
        return self.picture_tokens

    def tensors(self, pictures):
        """Inputs of the tower for B pictures: pixel_values (B, 1, tiles, 3, size, size), aspect_ratio_ids (B, 1) and
        aspect_ratio_mask (B, 1, tiles), 1 for tiles that hold a part of the picture."""
        tensors = self.image_processor([[picture] for picture in pictures], return_tensors="pt")
        return {name: tensors[name].to(self.model.device) for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}

    def cross_attention_mask(self, input_ids, tiles):
        """Which tiles a token looks at, from <|image|> on all: (B, T) and (B, 1, tiles) to (B, T, 1, tiles)."""
        sees = (input_ids == self.image_id).cumsum(1) > 0
        return sees[:, :, None, None] * tiles[:, None]

    def inputs(self, input_ids, pictures):
        tensors = self.tensors(pictures)
        return tensors | {"cross_attention_mask": self.cross_attention_mask(input_ids, tensors["aspect_ratio_mask"])}

    def see(self, pictures):
        """Of each: states (S, D), S = tiles x patches, and which tiles hold something (1, tiles)."""
        tensors = self.tensors(pictures)
        states = self.model.multi_modal_projector(self.model.vision_model(**tensors).last_hidden_state)
        return list(zip(states.flatten(1, -2), tensors["aspect_ratio_mask"]))

    def read(self, input_ids, mask, start, seen):
        """(B, P) twice. The mask is of all columns: it grows with every token."""
        states, tiles = (torch.stack(part).to(input_ids.device) for part in zip(*seen))
        return {"cross_attention_states": states, "cross_attention_mask": self.cross_attention_mask(input_ids, tiles)}


class QwenProcessor:
    """Tokenizer and image processor of a Qwen-VL folder; transformers' own class wants torchvision, for videos.

    `files` are the folder's own settings of pictures and videos, name -> text, which a checkpoint gets as they are.
    """

    def __init__(self, image_processor, tokenizer, image_token_id, files=()):
        self.image_processor, self.tokenizer, self.files = image_processor, tokenizer, dict(files)
        self.image_token_id, self.image_token = image_token_id, tokenizer.convert_ids_to_tokens(image_token_id)

    @property
    def chat_template(self):
        return self.tokenizer.chat_template

    def num_placeholders(self, picture):
        patches = self.image_processor.get_number_of_image_patches(picture.height, picture.width)
        return patches // self.image_processor.merge_size ** 2

    def save_pretrained(self, folder):
        self.tokenizer.save_pretrained(folder)
        if not self.files:
            self.image_processor.save_pretrained(folder)
        for name, text in self.files.items():
            Path(folder, name).write_text(text)


class QwenVision:
    """The encoder makes a state of every 2 x 2 patches (`merge_size`); they stand in the text in place of as many
    placeholders, whose positions are counted in rows and columns of the picture (M-RoPE). Qwen3-VL adds states of
    earlier layers of the encoder to the first layers of the language model (deepstack)."""

    parts = {"vision": r"model\.visual\.(?!merger|deepstack_merger)", "projector": r"model\.visual\.(merger|deepstack_merger)"}
    picture_tokens = 0                                             # all stand in the prompt

    @staticmethod
    def load_processor(folder, config):
        folder, tokenizer = Path(folder), AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if (folder / "chat_template.json").is_file():              # older folders: the processor's, which goes first
            tokenizer.chat_template = json.loads((folder / "chat_template.json").read_text())["chat_template"]
        paths = [folder / f"{name}_config.json" for name in ("preprocessor", "video_preprocessor", "processor")]
        return QwenProcessor(Qwen2VLImageProcessorPil.from_pretrained(folder), tokenizer, config.image_token_id,
                             {path.name: path.read_text() for path in paths if path.is_file()})

    @staticmethod
    def check(path, backbone, processor):
        if "mm_encoder_outputs" not in inspect.signature(backbone.model.forward).parameters:     # it would play blind
            raise ValueError(f"model {path!r}: transformers {transformers.__version__} takes no states of pictures in "
                             "Qwen-VL; requirements.txt names one that does")
        if processor.image_token is None:
            raise ValueError(f"model {path!r}: its image_token_id {backbone.config.image_token_id} is no token of its tokenizer")
        names = {"patch_size": "patch_size", "merge_size": "spatial_merge_size", "temporal_patch_size": "temporal_patch_size"}
        for name, of_model in names.items():
            cut, taken = getattr(processor.image_processor, name), getattr(backbone.config.vision_config, of_model)
            if cut != taken:
                raise ValueError(f"model {path!r}: its processor cuts pictures with {name} {cut}, the model takes {taken}")

    def __init__(self, backbone, processor):
        self.model, self.image_processor, self.image_id = backbone.model, processor.image_processor, processor.image_token_id

    def num_patches(self, picture):
        return self.image_processor.get_number_of_image_patches(picture.height, picture.width)

    def tensors(self, pictures):
        """Inputs of the encoder: pixel_values (patches of all, values), image_grid_thw (B, 3): 1, rows, columns."""
        return self.image_processor(pictures, return_tensors="pt").to(self.model.device)

    def positions(self, input_ids, grids, mask=None):
        """Positions (3, B, T) of ids (B, T) with the placeholders of one picture in each row; none where the mask is 0."""
        kinds = (input_ids == self.image_id).int()                 # 0 for text, 1 for a picture
        return self.model.get_rope_index(input_ids, mm_token_type_ids=kinds, image_grid_thw=grids, attention_mask=mask)[0]

    def inputs(self, input_ids, pictures):
        tensors = self.tensors(pictures)
        return dict(tensors, position_ids=self.positions(input_ids, tensors["image_grid_thw"]))

    def see(self, pictures):
        """Of each: its grid (3,), its states (S, D) and those of deepstack, each (S, D)."""
        tensors = self.tensors(pictures)
        made = self.model.get_image_features(**tensors, return_dict=True)
        return list(zip(tensors["image_grid_thw"], made.pooler_output, *getattr(made, "deepstack_features", ())))

    def read(self, input_ids, mask, start, seen):
        """(B, P) twice. Columns before `start` have been read before: of a picture, only the states behind them."""
        grids, *parts = zip(*seen)
        grids = torch.stack(grids).to(input_ids.device)
        left = (input_ids[:, start:] == self.image_id).sum(1).tolist()
        states, *deep = [[t[len(t) - num:].to(input_ids.device) for t, num in zip(part, left)] for part in parts]
        return {"position_ids": self.positions(input_ids, grids, mask),
                "mm_encoder_outputs": {"image": SimpleNamespace(pooler_output=states, deepstack_features=deep)}}


FAMILIES = {"mllama": MllamaVision, "qwen2_5_vl": QwenVision, "qwen3_vl": QwenVision}


def num_placeholders(processor, picture):
    """How many tokens of a prompt stand for a picture."""
    return processor.num_placeholders(picture) if picture and isinstance(processor, QwenProcessor) else 1


def repeat_image_tokens(processor, kept, ids, picture):
    """`ids`, in which the one image token of a template stands as often as the picture needs.

    `kept` are the ids before them, whose image tokens are repeated already. ValueError unless the
    dialogue has the tokens of its picture, and none without a picture.
    """
    image_id, num = processor.image_token_id, num_placeholders(processor, picture)
    repeated = []
    for i in ids:
        repeated += [i] * (num if i == image_id else 1)
    found = (kept + repeated).count(image_id) / num
    expected = 0 if picture is None else 1
    if found != expected:
        raise ValueError(f"{found:.3g} {processor.image_token} tokens in a dialogue with {expected} "
                         "pictures: the template must write one for each, and the text of a message "
                         f"must not hold {processor.image_token}")
    return repeated
