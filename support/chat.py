"""A message in the Hugging Face chat format, as the environments write it.

A picture stands before the text.
"""
import json
import re

# Control characters except tab and line break, marks that turn the direction of writing, and halves
# of characters. A reply may hold them, and they can clear or retitle a terminal, or reorder a line.
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

HALF_CHARACTER = re.compile("[\ud800-\udfff]")


def refuse_half_characters(text, name):
    """ValueError if a text holds half of a character, as JSON's \\ud800; `name` says which text."""
    if half := HALF_CHARACTER.search(text):
        raise ValueError(f"{name} holds half a character, {half[0]!r}, which no tokenizer reads")


def user_message(text, picture=None):
    """A user's message."""
    if picture is None:
        return {"role": "user", "content": text}
    content = [{"type": "image", "image": picture}, {"type": "text", "text": text}]
    return {"role": "user", "content": content}


def read_text(message):
    """The text of a message, its picture left out."""
    content = message["content"]
    return content if isinstance(content, str) else content[-1]["text"]


def printable(text):
    """A text as it may be shown to a person: what a terminal would obey becomes "\ufffd"."""
    return UNPRINTABLE.sub("\ufffd", text)


def within_quotes(text):
    """A text as it stands between the quotes of a JSON object."""
    return json.dumps(text)[1:-1]
