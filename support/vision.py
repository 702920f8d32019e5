"""How a vision model takes a picture: one class for each family, by the model type of config.json.

Mllama (Llama-3.2-Vision) looks at a picture by cross-attention, from some of its layers. The
picture adds one token to the prompt. In the Qwen-VL models the states of a picture stand in the
text as tokens, more for a larger picture. model.py and support/decoder.py use of a family:

    parts                   what --freeze names -> a pattern of parameter names
    load_processor, check   the processor of a folder; ValueError if it does not fit the model
    picture_tokens          tokens of a picture beside those in the prompt
    num_patches(picture)    what the encoder computes for it
    inputs(...)             what the model takes beside the ids in an update; the encoder runs,
                            with gradients
    see(pictures)           what the encoder makes of each picture: a list of tensors, which
                            RolloutMemory keeps
    read(...)               what the model takes beside the ids in sampling, from what `see` made

    S states of a picture   D hidden size   B rows   T tokens   P columns of prompts

At the end stand the functions that find a picture in messages and make room for it in a prompt.
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
# This one needs no torchvision.
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

# Else the patches of a float32 model are multiplied in less than float32.
torch.backends.cudnn.allow_tf32 = False


def by_cudnn_attention(forward, *args, **kwargs):
    """A layer's forward with cuDNN's attention, where that can be had.

    The layers of a tower see few shapes. With a mask over 6,400 places of a picture this takes less
    than half the time on an H100 (results/speed.md). Elsewhere it is off (support/decoder.py).
    """
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION,
             SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(order, set_priority=True):
        return forward(*args, **kwargs)


class MllamaVision:
    """A picture is cut into tiles, and the vision tower and a projector make states of them.

    Some layers of the language model look at those states, so the picture adds nothing to the keys
    and values of the text. The mask hides it from the tokens before <|image|>, but transformers
    lets a little through. We leave that as it is.
    """

    parts = {"vision": r"model\.vision_model\.", "projector": r"model\.multi_modal_projector\."}

    @staticmethod
    def load_processor(folder, config):
        return AutoProcessor.from_pretrained(folder, trust_remote_code=False)

    @staticmethod
    def check(path, backbone, processor):
        tiles = processor.image_processor.max_image_tiles
        taken = backbone.config.vision_config.max_num_tiles
        if tiles > taken:
            raise ValueError(f"model {path!r}: its processor cuts a picture into up to {tiles} "
                             f"tiles, the model takes {taken} (max_image_tiles of its "
                             "preprocessor)")

    def __init__(self, backbone, processor):
        self.model, vision = backbone.model, backbone.config.vision_config
        self.image_processor, self.image_id = processor.image_processor, processor.image_token_id
        tower = self.model.vision_model
        for layer in (*tower.transformer.layers, *tower.global_transformer.layers):
            layer.forward = partial(by_cudnn_attention, layer.forward)
        # A picture counts all tiles, used or not.
        tokens_of_tile = (vision.image_size // vision.patch_size) ** 2 + 1
        self.picture_tokens = vision.max_num_tiles * tokens_of_tile

    def num_patches(self, picture):
        return self.picture_tokens

    def tensors(self, pictures):
        """Inputs of the tower for B pictures: pixel_values (B, 1, tiles, 3, size, size),
        aspect_ratio_ids (B, 1), and aspect_ratio_mask (B, 1, tiles).

        The mask is 1 for tiles that hold a part of the picture.
        """
        tensors = self.image_processor([[picture] for picture in pictures], return_tensors="pt")
        names = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
        return {name: tensors[name].to(self.model.device) for name in names}

    def cross_attention_mask(self, input_ids, tiles):
        """Which tiles a token looks at: all of the picture, from <|image|> on.

        (B, T) ids and (B, 1, tiles) -> (B, T, 1, tiles).
        """
        sees = (input_ids == self.image_id).cumsum(1) > 0
        return sees[:, :, None, None] * tiles[:, None]

    def inputs(self, input_ids, pictures):
        tensors = self.tensors(pictures)
        mask = self.cross_attention_mask(input_ids, tensors["aspect_ratio_mask"])
        return tensors | {"cross_attention_mask": mask}

    def see(self, pictures):
        """Of each: states (S, D), S = tiles x patches, and which tiles are used (1, tiles)."""
        tensors = self.tensors(pictures)
        hidden = self.model.vision_model(**tensors).last_hidden_state
        states = self.model.multi_modal_projector(hidden)
        return list(zip(states.flatten(1, -2), tensors["aspect_ratio_mask"]))

    def read(self, input_ids, mask, start, seen):
        """`input_ids` and `mask` are (B, P). The mask that is returned grows with every token."""
        states, tiles = (torch.stack(part).to(input_ids.device) for part in zip(*seen))
        return {"cross_attention_states": states,
                "cross_attention_mask": self.cross_attention_mask(input_ids, tiles)}


class QwenProcessor:
    """Tokenizer and image processor of a Qwen-VL folder.

    The class of transformers wants torchvision, for videos. `files` are the folder's settings of
    pictures and videos, name -> text. A checkpoint gets them as they are.
    """

    def __init__(self, image_processor, tokenizer, image_token_id, files=()):
        self.image_processor, self.tokenizer, self.files = image_processor, tokenizer, dict(files)
        self.image_token_id = image_token_id
        self.image_token = tokenizer.convert_ids_to_tokens(image_token_id)

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
    """The encoder makes a state of every 2 x 2 patches (`merge_size`).

    The states stand in the text in place of as many placeholders. Their positions are counted in
    rows and columns of the picture (M-RoPE). Qwen3-VL adds states of earlier layers of the encoder
    to the first layers of the language model (deepstack).
    """

    parts = {"vision": r"model\.visual\.(?!merger|deepstack_merger)",
             "projector": r"model\.visual\.(merger|deepstack_merger)"}
    picture_tokens = 0                         # all stand in the prompt

    @staticmethod
    def load_processor(folder, config):
        folder = Path(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        # In older folders the processor has another template, which goes first.
        template = folder / "chat_template.json"
        if template.is_file():
            tokenizer.chat_template = json.loads(template.read_text())["chat_template"]
        files = {}
        for name in ("preprocessor", "video_preprocessor", "processor"):
            path = folder / f"{name}_config.json"
            if path.is_file():
                files[path.name] = path.read_text()
        # Qwen2-VL's folders may have the limits of a picture within `size`.
        settings, _ = Qwen2VLImageProcessorPil.get_image_processor_dict(folder)
        size, limits = settings.get("size") or {}, {}
        for name in ("min_pixels", "max_pixels"):
            if name in size:
                limits[name] = size[name]
        images = Qwen2VLImageProcessorPil.from_pretrained(folder, **limits)
        return QwenProcessor(images, tokenizer, config.image_token_id, files)

    @staticmethod
    def check(path, backbone, processor):
        # Without this argument the model would play blind.
        if "mm_encoder_outputs" not in inspect.signature(backbone.model.forward).parameters:
            raise ValueError(f"model {path!r}: transformers {transformers.__version__} takes no "
                             "states of pictures in Qwen-VL; requirements.txt names one that does")
        if processor.image_token is None:
            raise ValueError(f"model {path!r}: its image_token_id {backbone.config.image_token_id} "
                             "is no token of its tokenizer")
        size = processor.image_processor.size
        if not size.shortest_edge or not size.longest_edge:
            raise ValueError(f"model {path!r}: \"size\" of its preprocessor must have "
                             "shortest_edge and longest_edge (or min_pixels and max_pixels), both "
                             f"above 0; got {size.shortest_edge} and {size.longest_edge}")
        for name, name_in_model in (("patch_size", "patch_size"),
                                    ("merge_size", "spatial_merge_size"),
                                    ("temporal_patch_size", "temporal_patch_size")):
            cut = getattr(processor.image_processor, name)
            taken = getattr(backbone.config.vision_config, name_in_model)
            if cut != taken:
                raise ValueError(f"model {path!r}: its processor cuts pictures with {name} {cut}, "
                                 f"the model takes {taken}")

    def __init__(self, backbone, processor):
        self.model = backbone.model
        self.image_processor, self.image_id = processor.image_processor, processor.image_token_id

    def num_patches(self, picture):
        return self.image_processor.get_number_of_image_patches(picture.height, picture.width)

    def tensors(self, pictures):
        """Inputs of the encoder: pixel_values (patches of all pictures, values), and image_grid_thw
        (B, 3), which is 1, rows, columns."""
        return self.image_processor(pictures, return_tensors="pt").to(self.model.device)

    def positions(self, input_ids, grids, mask=None):
        """Positions (3, B, T) of ids (B, T) with the placeholders of one picture in each row.

        Columns where the mask (B, T) is 0 do not count.
        """
        kinds = (input_ids == self.image_id).int()             # 0 for text, 1 for a picture
        return self.model.get_rope_index(input_ids, mm_token_type_ids=kinds, image_grid_thw=grids,
                                         attention_mask=mask)[0]

    def inputs(self, input_ids, pictures):
        tensors = self.tensors(pictures)
        return dict(tensors, position_ids=self.positions(input_ids, tensors["image_grid_thw"]))

    def see(self, pictures):
        """Of each: its grid (3,), its states (S, D) and those of deepstack, each (S, D)."""
        tensors = self.tensors(pictures)
        made = self.model.get_image_features(**tensors, return_dict=True)
        deepstack = getattr(made, "deepstack_features", ())
        return list(zip(tensors["image_grid_thw"], made.pooler_output, *deepstack))

    def read(self, input_ids, mask, start, seen):
        """`input_ids` and `mask` are (B, P). Columns before `start` have been read before, so of a
        picture only the states behind them are given."""
        grids, *parts = zip(*seen)
        grids = torch.stack(grids).to(input_ids.device)
        left = (input_ids[:, start:] == self.image_id).sum(1).tolist()         # states of each row
        behind = []
        for part in parts:
            behind.append([t[len(t) - num:].to(input_ids.device) for t, num in zip(part, left)])
        states, *deepstack = behind
        outputs = SimpleNamespace(pooler_output=states, deepstack_features=deepstack)
        return {"position_ids": self.positions(input_ids, grids, mask),
                "mm_encoder_outputs": {"image": outputs}}


FAMILIES = {"mllama": MllamaVision, "qwen2_5_vl": QwenVision, "qwen3_vl": QwenVision}


# ---- Pictures in messages and prompts ------------------------------------------------------------

def picture_of(messages):
    """The picture in chat messages, or None; ValueError if there are several."""
    pictures = []
    for message in messages:
        if not isinstance(message["content"], str):
            pictures += [part["image"] for part in message["content"] if part["type"] == "image"]
    if len(pictures) > 1:
        raise ValueError(f"{len(pictures)} pictures in one dialogue: at most one is allowed")
    return pictures[0] if pictures else None


def num_placeholders(processor, picture):
    """How many tokens of a prompt stand for a picture."""
    if picture and isinstance(processor, QwenProcessor):
        return processor.num_placeholders(picture)
    return 1


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
        raise ValueError(f"{found:.3g} {processor.image_token} tokens in a dialogue with "
                         f"{expected} pictures: the template must write one for each, and the text "
                         f"of a message must not hold {processor.image_token}")
    return repeated
