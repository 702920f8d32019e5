"""A message in the Hugging Face chat format, as the environments write it.

A picture stands before the text.
"""
import json


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


def within_quotes(text):
    """A text as it stands between the quotes of a JSON object."""
    return json.dumps(text)[1:-1]
