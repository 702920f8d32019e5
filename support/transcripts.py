"""Read the conversations that rl.py kept of a run (turns.jsonl): in the terminal, or as one page.

    python envs.py --read runs/rl
    python envs.py --read runs/rl --html rl.html       # draws the pictures again from their seeds

The page holds all that it shows; it loads nothing from elsewhere.
"""
import base64
import html
import io
import json
from pathlib import Path

from support.chat import printable
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


def read_rows(run):
    """(config, rows of turns.jsonl); ValueError says what is missing."""
    config, path = Path(run) / "config.json", Path(run) / "turns.jsonl"
    if not config.is_file() or not path.is_file():
        raise ValueError(f"run {str(run)!r}: needs config.json and turns.jsonl, which rl.py writes "
                         "(sft.py does not)")
    lines = path.read_text().splitlines(keepends=True)
    try:
        rows = [json.loads(line) for line in lines if line.endswith("\n") and line.strip()]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not rows:
        raise ValueError(f"{path}: holds no conversation yet")
    if not all("verdicts" in row for row in rows):
        raise ValueError(f"{path}: was written by an earlier version, without verdicts")
    return json.loads(config.read_text()), rows


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
