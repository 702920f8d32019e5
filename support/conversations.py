"""Conversations in a file: the released shape of the SFT data and what is close to it (`--data`, `--dump`).

    [{"image": "000123.png",                         a file beside this one, in tasks with pictures
      "conversations": [{"from": "human", "value": "<image>\\nPROMPT"}, {"from": "gpt", "value": "REPLY"}, ...]}, ...]

Read as well: one record a line; "messages", "role" and "content", the roles user, assistant and model; "images", a list
with one picture; texts in parts; a system text, as the first turn or under the record's key "system". A reply with
"loss": false, "train": false or "weight": 0 is context of later ones only. What else would change what a record means is
refused by name; other keys are passed over.
"""
import json
import re
import shutil
from pathlib import Path

from support import running
from support.cards import open_picture

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
         "system": "system"}
WRITTEN = {"user": "human", "assistant": "gpt", "system": "system"}
MARKS = ("loss", "train", "weight")              # of a reply: whether it is learnt
FOREIGN = ("tools", "functions", "tool_calls", "function_call", "tool_call_id", "reasoning_content", "thinking",
           "system_prompt", "system_message", "history", "chosen", "rejected", "video", "videos", "audio", "audios", "mask",
           "masked", "train_on_turn", "learn", "loss_weight")


def refuse_foreign(record, keys, of=""):
    """ValueError names a key that holds something and would change what is learnt."""
    for key in keys:
        if record.get(key) not in (None, "", [], {}):
            raise ValueError(f"key {key!r}{of} is not understood, and without it another thing would be learnt")


def read_records(path):
    """The records of a JSON list, or of a file with one on each line; ValueError names the file."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        if Path(path).suffix == ".jsonl" or re.match(r"\s*{[^\n]*\n\s*{", text):
            text = "[" + ",\n".join(line for line in text.split("\n") if line.strip()) + "]"
        records = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"data file {path}: {error}") from None
    if not isinstance(records, list) or not records:
        raise ValueError(f"data file {path}: expected a non-empty list of records, got {type(records).__name__}")
    return records


def read_picture(record, folder, vision):
    """The path of a record's picture, a file that can be read; None in a task without pictures."""
    key = "images" if record.get("images") else "image"
    names = [record[key]] if isinstance(record.get(key), str) and record[key] else record.get(key) or []
    if not (isinstance(names, list) and len(names) == vision and all(isinstance(name, str) for name in names)
            and not (record.get("image") and record.get("images"))):
        raise ValueError(f"key {key!r}: a task with pictures needs one file per record, another none; "
                         f"got {str(record.get(key))[:60]!r}")
    try:
        for name in names:
            open_picture(folder / name)
    except ValueError as error:
        raise ValueError(f"key {key!r}: {error}") from None
    return folder / names[0] if names else None


def read_text(value, name, slots, image_token):
    """The text of a turn, in parts or in one, that begins with <image> if it has a slot; without that."""
    if isinstance(value, list):
        parts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in value]
        value = "".join(parts) if parts and all(isinstance(part, str) for part in parts) else None
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text (a picture is a file that the record's key 'image' names)")
    if half := re.search("[\ud800-\udfff]", value):
        raise ValueError(f"{name} holds half a character, {half[0]!r}, which no tokenizer reads")
    if value.count("<image>") != slots or image_token in value:
        raise ValueError(f"{name} must hold <image> {slots} times and no {image_token}; it has "
                         f"{value.count('<image>')} and {value.count(image_token)}")
    if slots and not value.lstrip().startswith("<image>"):
        raise ValueError(f"{name} must begin with <image>, as a picture stands before the text; it begins with "
                         f"{value[:40]!r}")
    return re.sub(r"\s*<image>\n?", "", value) if slots else value


def is_learnt(turn, role, of):
    """Whether a turn is a target; ValueError if it is marked as something that only a reply can be."""
    marks = {key: turn[key] for key in MARKS if turn.get(key) is not None}
    for key, mark in marks.items():
        if mark not in (0, 1) or mark and role != "assistant":
            raise ValueError(f"key {key!r}{of} must be false or true, and true of a reply only, got {mark!r}")
    return role == "assistant" and all(marks.values())


def read_record(record, folder, vision, image_token):
    """(messages, reply) pairs, one for every reply of a record that is learnt; ValueError names the key."""
    turns = [record[key] for key in ("conversations", "messages") if record.get(key)] if isinstance(record, dict) else []
    if len(turns) != 1 or not isinstance(turns[0], list):
        raise ValueError("key 'conversations' or 'messages', one of them, must be a list of human and gpt turns in pairs")
    refuse_foreign(record, FOREIGN)
    for key in MARKS:
        if record.get(key, 1) not in (None, 1):
            raise ValueError(f"key {key!r} belongs to a turn, not to a record")
    picture, pairs, messages = read_picture(record, folder, vision), [], []
    if record.get("system"):
        messages = [{"role": "system", "content": read_text(record["system"], "key 'system'", 0, image_token)}]
    for at, turn in enumerate(turns[0]):
        if not isinstance(turn, dict):
            raise ValueError(f"turn {at} must be an object such as {{'from': 'human', 'value': 'PROMPT'}}")
        who, what = "from" if "from" in turn else "role", "value" if "value" in turn else "content"
        role, answers = ROLES.get(str(turn.get(who))), messages and messages[-1]["role"] == "user"
        awaited = "assistant" if answers else "user"
        if role != awaited and (role != "system" or messages):
            names = " or ".join(repr(name) for name in ROLES if ROLES[name] == awaited)
            raise ValueError(f"key {who!r} of turn {at} must be {names}, got {str(turn.get(who))[:40]!r}")
        refuse_foreign(turn, FOREIGN + ("image", "images"), f" of turn {at}")
        slots = int(vision and role == "user" and not any(message["role"] == "user" for message in messages))
        content = text = read_text(turn.get(what), f"key {what!r} of turn {at}", slots, image_token)
        if is_learnt(turn, role, f" of turn {at}"):
            pairs.append((messages, text))
        if slots:
            content = [{"type": "image", "image": picture}, {"type": "text", "text": text}]
        messages = messages + [{"role": role, "content": content}]
    if messages[-1]["role"] != "assistant":
        raise ValueError("key 'conversations' or 'messages' must be a list of human and gpt turns in pairs")
    return pairs


def read_conversations(path, vision, image_token):
    """(messages, reply) pairs from a file, one for every reply in it that is to be learnt.

    With `vision` every record has one picture; in the messages stands its path, which is relative to the data file's
    folder. No text may hold `image_token`, which the model's template writes. ValueError names file, record and key.
    """
    records, pairs = read_records(path), []
    for index, record in enumerate(running.progress(records, nested=True, desc="pictures") if vision else records):
        try:
            pairs += read_record(record, Path(path).parent, vision, image_token)
        except ValueError as error:
            raise ValueError(f"data file {path}, record {index}: {error}") from None
    if not pairs:
        raise ValueError(f"data file {path}: no reply in it is to be learnt")
    return pairs


def open_pictures(messages):
    """Messages with the pictures themselves where `read_conversations` has left their paths."""
    def opened(part):
        return {**part, "image": open_picture(part["image"])} if part["type"] == "image" else part
    return [message if isinstance(message["content"], str) else {**message, "content": [*map(opened, message["content"])]}
            for message in messages]


def write_conversations(path, option, dialogues):
    """Write dialogues, each the messages up to and with the last reply, in the released shape, pictures in a folder beside the
    file: all of it or nothing. A message's "loss" goes with it. ValueError names the option if the path is not a new one."""
    path, folder = Path(path), Path(path).with_suffix("")
    partial = folder.with_name(f"{folder.name}.unfinished")
    if path.exists() or folder.exists() or path == folder:
        raise ValueError(f"{option} {path}: must be a new file with a suffix, such as data.json, and no folder {folder} may be "
                         "there yet")
    if not path.parent.is_dir():
        raise ValueError(f"{option} {path}: there is no folder {path.parent}")
    try:
        records = []
        shutil.rmtree(partial, ignore_errors=True)                   # of a run that was killed
        (partial / "pictures").mkdir(parents=True)
        for i, messages in enumerate(dialogues):
            record, turns = {}, []
            for message in messages:
                text, slots = message["content"], ""
                if not isinstance(text, str):
                    picture, text = text[0]["image"], text[1]["text"]
                    record["image"], slots = f"{folder.name}/{i:06d}.png", "<image>\n"
                    picture.save(partial / "pictures" / f"{i:06d}.png")
                if "<image>" in text:
                    raise ValueError(f"{option}: a text holds <image>, which marks the picture in the released shape")
                marks = {key: message[key] for key in MARKS if key in message}
                turns.append({"from": WRITTEN[message["role"]], "value": slots + text, **marks})
            records.append({**record, "conversations": turns})
        (partial / "data.json").write_text(json.dumps(records, indent=1) + "\n")
        if any((partial / "pictures").iterdir()):
            (partial / "pictures").rename(folder)
        (partial / "data.json").rename(path)
    except OSError as error:
        raise ValueError(f"{option} {path}: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def dump(samples, config):
    """Write the first `num` samples of sft.py."""
    if config.failed_tries:
        raise ValueError(f"--dump with --failed-tries {config.failed_tries}: in the released shape every reply is a "
                         "target, failed ones would be learnt; make such dialogues on the fly")
    if config.data:
        raise ValueError(f"--dump with --data {config.data}: that is such a file already")
    if running.RANK == 0:
        made = map(samples.__getitem__, running.progress(range(config.num), desc="dump"))
        write_conversations(config.dump, "--dump", ([*messages, {"role": "assistant", "content": reply}] for messages, reply in made))
