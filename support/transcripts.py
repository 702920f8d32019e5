"""Read the conversations that rl.py kept of a run (turns.jsonl): in the terminal, or as one page.

    python envs.py --read runs/rl
    python envs.py --read runs/rl --html rl.html       # draws the pictures again from their seeds

The page holds all that it shows; it loads nothing from elsewhere.
"""
import base64
import html
import io
from pathlib import Path

from support.chat import printable
from support.logs import read_jsonl, read_run_config
from support.settings import read_settings, read_splits

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem;
       color: #222 }
article { border: 1px solid #ccc; border-radius: 8px; padding: 0 1rem 1rem; margin: 1.5rem 0 }
h2 { font-size: 1rem; font-weight: 600 } img { max-width: 100%; border-radius: 4px }
p { white-space: pre-wrap; overflow-wrap: anywhere; margin: .5rem 0; padding: .5rem .75rem;
    border-radius: 6px }
.user { background: #f2f2f2 } .right { background: #d9f2dd } .wrong { background: #fbe0dd }
small { float: right; color: #555; margin-left: 1rem }"""

# What is read of a run's config.json, and of a conversation.
CONFIG = {"task": str, "split": list, "env": list, "seed": int, "num_envs": int}
KINDS = {str: "a text", int: "a whole number", list: "a list of texts"}
SHOWN = ("step", "env", "episode", "done", "success", "verdicts", "messages")


def read_rows(run):
    """(config, rows of turns.jsonl); ValueError says what is missing or damaged."""
    path = Path(run) / "turns.jsonl"
    if not (Path(run) / "config.json").is_file() or not path.is_file():
        raise ValueError(f"run {str(run)!r}: needs config.json and turns.jsonl, which rl.py writes "
                         "(sft.py does not)")
    config, rows = read_run_config(run), read_jsonl(path)
    for key, kind in CONFIG.items():
        value = config.get(key)
        words = value if kind is list else []
        if type(value) is not kind or not all(isinstance(word, str) for word in words):
            raise ValueError(f"{run}/config.json: key {key!r} must be {KINDS[kind]}, got "
                             f"{str(value)[:40]}; rl.py writes it")
    if not rows:
        raise ValueError(f"{path}: holds no conversation yet")
    if not all("verdicts" in row for row in rows):
        raise ValueError(f"{path}: was written by an earlier version, without verdicts")
    for number, row in enumerate(rows, 1):
        check_conversation(row, f"{path}, conversation {number}")
    return config, rows


def check_conversation(row, where):
    """ValueError unless a row has what is shown of it."""
    if lacking := [key for key in SHOWN if key not in row]:
        raise ValueError(f"{where}: has no {lacking[0]!r}")
    for message in row["messages"]:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ValueError(f"{where}: a message must be an object with a text 'content', got "
                             f"{str(message)[:40]}")
    replies = [message for message in row["messages"] if message.get("role") == "assistant"]
    for verdict in row["verdicts"]:
        if not isinstance(verdict, list) or [type(part) for part in verdict] not in (
                [str, int], [str, float]):
            raise ValueError(f"{where}: a verdict must be [status, reward], got "
                             f"{str(verdict)[:40]}")
    if len(replies) != len(row["verdicts"]):
        raise ValueError(f"{where}: {len(row['verdicts'])} verdicts for {len(replies)} replies")


def title(row):
    ending = ("solved" if row["success"] else "out of tries") if row["done"] else "goes on"
    return f"update {row['step']}, environment {row['env']}, episode {row['episode']}: {ending}"


def replies_with_verdicts(row):
    """(message, status, reward) for every message; only the assistant's have a verdict.

    The others have the status "" and the reward None.
    """
    verdicts = iter(row["verdicts"])
    for message in row["messages"]:
        status, reward = "", None
        if message["role"] == "assistant":
            status, reward = next(verdicts)
        yield message, status, reward


def print_rows(rows):
    for row in rows:
        print(f"---- {title(row)} ----")
        for message, status, reward in replies_with_verdicts(row):
            mark = f"> [{status}, reward {reward:+g}] " if status else ""
            print(f"{mark}{printable(message['content'])}\n")


def picture_again(config, row, make_env):
    """The picture of a row as an <img>, drawn again from its seed; "" for a task in words."""
    split = read_splits(config["split"])[0]
    env = make_env(config["task"], split.name, read_settings(config["env"]), **split.settings)
    if not env.vision:
        return ""
    env.reset(f"{config['seed']}/rl/{row['env']}/{row['episode']}",    # as in rl.Conversation.begin
              row["episode"] * config["num_envs"] + row["env"])
    if "position" in row:
        if row["position"] not in range(len(env.rail)):
            raise ValueError(f"{title(row)}: position {row['position']!r} is not on its route of "
                             f"{len(env.rail)} positions")
        env.at = row["position"]
    png = io.BytesIO()
    env.picture().save(png, "PNG")
    data = base64.b64encode(png.getvalue()).decode()
    return f'<img alt="what the model saw" src="data:image/png;base64,{data}">'


def page(config, rows, name, make_env):
    """The whole page as HTML."""
    articles = []
    for row in rows:
        parts = ["<article>", f"<h2>{html.escape(title(row))}</h2>",
                 picture_again(config, row, make_env)]
        for message, status, reward in replies_with_verdicts(row):
            kind, told = "user", ""
            if status:
                kind = "right" if status == "correct" else "wrong"
                told = f"<small>{html.escape(status)}, reward {reward:+g}</small>"
            text = html.escape(printable(message["content"]))
            parts.append(f'<p class="{kind}">{told}{text}</p>')
        articles.append("\n".join([*parts, "</article>"]))
    return "\n".join([
        '<!doctype html><html lang="en"><meta charset="utf-8">',
        f"<title>{html.escape(name)}</title>",
        f"<style>{STYLE}</style>",
        f"<h1>{html.escape(name)}</h1>",
        f"<div>{len(rows)} dialogues of {html.escape(config['task'])}, "
        "the first of each rollout. Correct replies are green.</div>",
        *articles, "</html>", ""])


def read_run(run, file, make_env):
    """Print the conversations of a run, or write them to a page."""
    config, rows = read_rows(run)
    if not file:
        return print_rows(rows)
    if Path(file).suffix not in (".html", ".htm"):
        raise ValueError(f"--html {file}: must be a file named .html, such as page.html")
    if not Path(file).parent.is_dir():
        raise ValueError(f"--html {file}: there is no folder {Path(file).parent}")
    Path(file).write_text(page(config, rows, str(run), make_env), encoding="utf-8")
    print(f"{file}: {len(rows)} dialogues")
