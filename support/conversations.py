"""Conversations in a file: the released shape of the SFT data and what is close to it (`--data`,
`--dump`).

    [{"image": "000123.png",                      a file beside this one or in a folder below; only
                                                  in tasks with pictures (--pictures: elsewhere)
      "conversations": [{"from": "human", "value": "<image>\\nPROMPT"},
                        {"from": "gpt", "value": "REPLY"}, ...]}, ...]

Read as well:

    one record a line                             instead of a list
    "messages", "role", "content"                 for "conversations", "from", "value"
    the roles user, assistant and model           for human and gpt
    "images", a list with one picture             for "image"
    a text in parts                               for one string
    a system text                                 as the first turn, or the record's key "system"

A reply with "loss": false, "train": false or "weight": 0 is only context of later ones. A key that
would change what is learnt, and is not understood, is refused by name. Other keys are passed over.
"""
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from support import running
from support.cards import open_picture
from support.chat import refuse_half_characters
from support.logs import without_twins

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
         "model": "assistant", "system": "system"}
WRITTEN = {"user": "human", "assistant": "gpt", "system": "system"}
MARKS = ("loss", "train", "weight")              # of a reply: whether it is learnt
FOREIGN = ("tools", "functions", "tool_calls", "function_call", "tool_call_id", "reasoning_content",
           "thinking", "system_prompt", "system_message", "history", "chosen", "rejected", "video",
           "videos", "audio", "audios", "mask", "masked", "train_on_turn", "learn", "loss_weight")


class Pair(NamedTuple):
    """A reply that is learnt, what stands before it, and where that comes from."""
    messages: list
    reply: str
    record: int          # its index in the file
    picture_size: tuple  # width and height, None in a task without pictures


def refuse_foreign(record, keys, of=""):
    """ValueError names a key that holds something and would change what is learnt."""
    for key in keys:
        if record.get(key) not in (None, "", [], {}):
            raise ValueError(f"key {key!r}{of} is not understood, and without it another thing "
                             "would be learnt")


def read_records(path):
    """The records of a JSON list, or of a file with one on each line; ValueError names the file."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        if Path(path).suffix == ".jsonl" or re.match(r"\s*{[^\n]*\n\s*{", text):
            text = "[" + ",\n".join(line for line in text.split("\n") if line.strip()) + "]"
        records = json.loads(text, object_pairs_hook=without_twins)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"data file {path}: {error}") from None
    if isinstance(records, dict):                # a file of lines that has a single one
        records = [records]
    if not isinstance(records, list) or not records:
        raise ValueError(f"data file {path}: expected a non-empty list of records, got "
                         f"{type(records).__name__}")
    return records


def read_picture(record, folder, vision):
    """(path, size) of a record's picture, a file that can be read; (None, None) in a task without
    pictures."""
    key = "images" if record.get("images") else "image"
    names = record.get(key) or []
    if isinstance(names, str):
        names = [names]
    both = record.get("image") and record.get("images")
    are_names = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if both or not are_names or len(names) != vision:
        raise ValueError(f"key {key!r}: a task with pictures needs one file per record, another "
                         f"none; got {str(record.get(key))[:60]!r}")
    if not names:
        return None, None
    path = folder / names[0]
    try:
        # What a file from elsewhere names is not read from anywhere on the disk.
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{names[0]!r} is not below the pictures' folder {folder}, links "
                             "followed; --pictures names another")
        return path, open_picture(path).size
    except ValueError as error:
        raise ValueError(f"key {key!r}: {error}") from None


def join_parts(parts):
    """The text of a list of text parts; None if there are none or others."""
    texts = []
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text":
            return None
        if not isinstance(part.get("text"), str):
            return None
        texts.append(part["text"])
    return "".join(texts) if texts else None


def read_text(value, name, slots, image_token):
    """The text of a turn, in parts or in one. If it has a slot it must begin with <image>, which is
    left out of the text."""
    if isinstance(value, list):
        value = join_parts(value)
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text (a picture is a file that the record's key 'image' "
                         "names)")
    refuse_half_characters(value, name)
    if value.count("<image>") != slots or image_token in value:
        raise ValueError(f"{name} must hold <image> {slots} times and no {image_token}; it has "
                         f"{value.count('<image>')} and {value.count(image_token)}")
    if slots and not value.lstrip().startswith("<image>"):
        raise ValueError(f"{name} must begin with <image>, as a picture stands before the text; it "
                         f"begins with {value[:40]!r}")
    return value.lstrip().removeprefix("<image>").removeprefix("\n") if slots else value


def is_learnt(turn, role, of):
    """Whether a turn is a target; ValueError if it has a mark that only a reply can have."""
    marks = {key: turn[key] for key in MARKS if turn.get(key) is not None}
    for key, mark in marks.items():
        if mark not in (0, 1) or mark and role != "assistant":
            raise ValueError(f"key {key!r}{of} must be false or true, and true of a reply only, "
                             f"got {mark!r}")
    return role == "assistant" and all(marks.values())


def check_role(turn, who, at, messages):
    """The role of a turn; ValueError unless it may follow the messages before it.

    User and assistant alternate; a system text may only be the first.
    """
    role = ROLES.get(str(turn.get(who)))
    awaited = "assistant" if messages and messages[-1]["role"] == "user" else "user"
    if role != awaited and (role != "system" or messages):
        names = " or ".join(repr(name) for name in ROLES if ROLES[name] == awaited)
        raise ValueError(f"key {who!r} of turn {at} must be {names}, got "
                         f"{str(turn.get(who))[:40]!r}")
    return role


def read_record(record, index, folder, vision, image_token):
    """Pairs, one for every reply of a record that is learnt; ValueError names the key."""
    turns = []
    if isinstance(record, dict):
        turns = [record[key] for key in ("conversations", "messages") if record.get(key)]
    if len(turns) != 1 or not isinstance(turns[0], list):
        raise ValueError("key 'conversations' or 'messages', one of them, must be a list of human "
                         "and gpt turns in pairs")
    refuse_foreign(record, FOREIGN)
    for key in MARKS:
        if record.get(key, 1) not in (None, 1):
            raise ValueError(f"key {key!r} belongs to a turn, not to a record")
    picture, size = read_picture(record, folder, vision)
    pairs, messages = [], []
    if record.get("system"):
        text = read_text(record["system"], "key 'system'", 0, image_token)
        messages = [{"role": "system", "content": text}]
    for at, turn in enumerate(turns[0]):
        if not isinstance(turn, dict):
            raise ValueError(f"turn {at} must be an object such as {{'from': 'human', 'value': "
                             "'PROMPT'}")
        who = "from" if "from" in turn else "role"
        what = "value" if "value" in turn else "content"
        role = check_role(turn, who, at, messages)
        refuse_foreign(turn, FOREIGN + ("image", "images"), f" of turn {at}")
        # The picture stands in the first text of the user.
        first = role == "user" and not any(message["role"] == "user" for message in messages)
        slots = 1 if vision and first else 0
        text = read_text(turn.get(what), f"key {what!r} of turn {at}", slots, image_token)
        if is_learnt(turn, role, f" of turn {at}"):
            pairs.append(Pair(messages, text, index, size))
        content = text
        if slots:
            content = [{"type": "image", "image": picture}, {"type": "text", "text": text}]
        messages = messages + [{"role": role, "content": content}]
    if messages[-1]["role"] != "assistant":
        raise ValueError("key 'conversations' or 'messages' must be a list of human and gpt turns "
                         "in pairs")
    return pairs


def read_conversations(path, vision, image_token, pictures=""):
    """The pairs of a file, one for every reply in it that is to be learnt.

    With `vision` every record has one picture. In the messages stands its path, which is relative
    to `pictures`, if not given to the data file's folder. No text may hold `image_token`, which the
    model's template writes. ValueError names file, record and key.
    """
    records, pairs, folder = read_records(path), [], Path(pictures or Path(path).parent)
    if vision:
        records = running.progress(records, nested=True, desc="pictures")
    for index, record in enumerate(records):
        try:
            pairs += read_record(record, index, folder, vision, image_token)
        except ValueError as error:
            raise ValueError(f"data file {path}, record {index}: {error}") from None
    if not pairs:
        raise ValueError(f"data file {path}: no reply in it is to be learnt")
    return pairs


def check_pairs(path, pairs, policy, processor, encode_pair):
    """ValueError names file and record of the first pair that the model cannot read, such as one
    that is longer than its context.

    encode_pair(processor, messages, reply) is (prompt_ids, response_ids). Each process looks at its
    part.
    """
    fault = None
    numbers = running.local_part(range(len(pairs)))
    for number in running.progress(numbers, nested=True, desc=f"check of {path}"):
        messages, reply, record, size = pairs[number]
        # A prompt depends on the size of its picture alone.
        picture = size and SimpleNamespace(width=size[0], height=size[1])
        try:
            ids = encode_pair(processor, with_pictures(messages, lambda _: picture), reply)
            policy.check_length(policy.num_tokens(*ids, picture))
        except ValueError as error:
            fault = [number, f"data file {path}, record {record}: {error}"]
            break
    if faults := [fault for fault in running.gather(fault) if fault]:
        raise ValueError(min(faults)[1])


def with_pictures(messages, make):
    """Messages with make(path) where `read_conversations` has left a picture's path."""
    made = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            content = [{**part, "image": make(part["image"])} if part["type"] == "image" else part
                       for part in content]
        made.append({**message, "content": content})
    return made


def open_pictures(messages):
    """Messages with the pictures themselves where `read_conversations` has left their paths."""
    return with_pictures(messages, open_picture)


def make_record(messages, option, picture_name):
    """(record, picture or None) of a dialogue; `picture_name` is the name that its picture gets."""
    record, turns, picture = {}, [], None
    for message in messages:
        text, slot = message["content"], ""
        if not isinstance(text, str):
            picture, text = text[0]["image"], text[1]["text"]
            record["image"], slot = picture_name, "<image>\n"
        if "<image>" in text:
            raise ValueError(f"{option}: a text holds <image>, which marks the picture in the "
                             "released shape")
        marks = {key: message[key] for key in MARKS if key in message}
        turns.append({"from": WRITTEN[message["role"]], "value": slot + text, **marks})
    return {**record, "conversations": turns}, picture


def write_conversations(path, option, dialogues):
    """Write dialogues in the released shape, with pictures in a folder beside the file: all of it
    or nothing.

    A dialogue is the messages up to and with its last reply. A message's "loss" goes with it.
    ValueError names the option if the path is not a new one.
    """
    path, folder = Path(path), Path(path).with_suffix("")
    partial = folder.with_name(f"{folder.name}.unfinished")
    if path.exists() or folder.exists() or path == folder:
        raise ValueError(f"{option} {path}: must be a new file with a suffix, such as data.json, "
                         f"and no folder {folder} may be there yet")
    if not path.parent.is_dir():
        raise ValueError(f"{option} {path}: there is no folder {path.parent}")
    try:
        records = []
        shutil.rmtree(partial, ignore_errors=True)       # of a run that was killed
        (partial / "pictures").mkdir(parents=True)
        for i, messages in enumerate(dialogues):
            record, picture = make_record(messages, option, f"{folder.name}/{i:06d}.png")
            if picture is not None:
                picture.save(partial / "pictures" / f"{i:06d}.png")
            records.append(record)
        (partial / "data.json").write_text(json.dumps(records, indent=1) + "\n")
        if any((partial / "pictures").iterdir()):
            (partial / "pictures").rename(folder)
        (partial / "data.json").rename(path)
    except OSError as error:
        raise ValueError(f"{option} {path}: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def unwritable_texts(processor):
    """Texts that no reply in a file may hold: the mark of a picture, and control tokens."""
    tokenizer = getattr(processor, "tokenizer", processor)
    control = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return ["<image>", *control]


def without_loss(message):
    """The message; a reply is marked as one that is not learnt."""
    return message | {"loss": False} if message["role"] == "assistant" else message


def dump(samples, config):
    """Write the first `num` samples of sft.py."""
    if config.failed_tries:
        raise ValueError(f"--dump with --failed-tries {config.failed_tries}: in the released shape "
                         "every reply is a target, so failed ones would be learnt; make such "
                         "dialogues on the fly")
    if config.out:
        raise ValueError(f"--out {config.out}: has no effect with --dump, which trains nothing")
    if config.data:
        raise ValueError(f"--dump with --data {config.data}: that is such a file already")
    if running.RANK > 0:
        return
    dialogues = (dialogue_of(*samples[i])
                 for i in running.progress(range(config.num), desc="dump"))
    write_conversations(config.dump, "--dump", dialogues)


def dialogue_of(messages, reply):
    """The messages of a dialogue with its reply."""
    return [*messages, {"role": "assistant", "content": reply}]
