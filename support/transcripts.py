"""Read the dialogues that rl.py and evaluate.py keep: in the terminal, or as one page.

    turns.jsonl        of rl.py: what the first two environments said while they trained
    dialogues.jsonl    of evaluate.py: the first episodes of each checkpoint, split and seed

    python envs.py --read runs/rl                      # turns.jsonl, where there is one
    python envs.py --read runs/rl --only split=id      # dialogues.jsonl: only tests have a split
    python envs.py --read runs/rl/dialogues.jsonl --only failed split=rule_ood
    python envs.py --read runs/rl --html rl.html       # draws the pictures again from their seeds

A page holds all that it shows; it loads nothing from elsewhere.
"""
import base64
import html
import io
import json
import os
import re
from pathlib import Path

from support import digests
from support.chat import printable
from support.logs import check_row, read_jsonl, read_object, read_run_config
from support.settings import by_name, read_settings, read_splits

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
SHOWN_TESTED = ("episode", "position", "expert", "done", "success", "verdicts", "messages")
CONTENT = ("weights", "texts")             # tells models of one path apart (evaluation.content_of)
FILTERS = "failed, solved, face_card, step=4, split=rule_ood, seed=0, episode=3, checkpoint=PATH"


def read_dialogues(path):
    """The rows of dialogues.jsonl, one for each dialogue, with what is known of its evaluation.

    Of an evaluation that was made again the later dialogues count. ValueError names what is
    damaged.
    """
    evaluations = {}
    for number, row in enumerate(read_jsonl(path, "step", "checkpoint", "split", "seed", "settings",
                                            "dialogues"), 1):
        about = {key: value for key, value in row.items() if key != "dialogues"}
        found = []
        for dialogue in row["dialogues"]:
            check_conversation(dialogue, f"{path}, line {number}", SHOWN_TESTED)
            found.append(about | dialogue)
        evaluations[evaluation_of(row)] = found
    return [dialogue for found in evaluations.values() for dialogue in found]


def evaluation_of(row):
    """What tells the evaluation of a row, of eval.jsonl or dialogues.jsonl, from all others."""
    keys = ("checkpoint", "split", "seed", "settings")
    return json.dumps([row.get("step", 0), *[row[key] for key in keys]], sort_keys=True)


def is_of(row, tested):
    """Whether a row is of the model that another row tested, or that `evaluation.content_of` tells.

    A row of an earlier version, which does not tell, passes.
    """
    return all(row.get(name, tested.get(name)) == tested.get(name) for name in CONTENT)


def read_rows(run):
    """(config, rows of turns.jsonl); ValueError says what is missing or damaged."""
    path = Path(run) / "turns.jsonl"
    if not (Path(run) / "config.json").is_file() or not path.is_file():
        inside = sorted({str(path.parent) for name in ("turns", "dialogues")
                         for path in Path(run).glob(f"*/{name}.jsonl")})
        raise ValueError(f"run {str(run)!r}: needs turns.jsonl, which rl.py writes, or "
                         "dialogues.jsonl, which evaluate.py writes when it tests a run"
                         + (f"; folders in it: {', '.join(inside)}" if inside else ""))
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


def check_conversation(row, where, keys=SHOWN):
    """ValueError unless a row has what is shown of it."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a dialogue must be an object, got {str(row)[:40]}")
    if lacking := [key for key in keys if key not in row]:
        raise ValueError(f"{where}: has no {lacking[0]!r}")
    try:
        check_row(row, keys)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    for message in row["messages"]:
        texts = []
        if isinstance(message, dict):
            texts = [message.get("role"), message.get("content")]
        if [type(text) for text in texts] != [str, str]:
            raise ValueError(f"{where}: a message must be an object with the texts 'role' and "
                             f"'content', got {str(message)[:40]}")
    replies = [message for message in row["messages"] if message["role"] == "assistant"]
    for verdict in row["verdicts"]:
        if not isinstance(verdict, list) or [type(part) for part in verdict] not in (
                [str, int], [str, float]):
            raise ValueError(f"{where}: a verdict must be [status, reward], got "
                             f"{str(verdict)[:40]}")
    if len(replies) != len(row["verdicts"]):
        raise ValueError(f"{where}: {len(row['verdicts'])} verdicts for {len(replies)} replies")


def tell_apart(rows):
    """Rows of tests, each with "called": its model, and settings of its split that rows differ in.

    In a run folder a model is known by its step, elsewhere by its path.
    """
    of_a_run = any(row["step"] for row in rows)
    values = {}                        # (split, setting) -> values
    for row in rows:
        for name, value in by_name(row["settings"]).items():
            values.setdefault((row["split"], name), set()).add(str(value))
    found = []
    for row in rows:
        called = [f"step {row['step']}" if of_a_run else row["checkpoint"]]
        for name, value in by_name(row["settings"]).items():
            if name != "env" and len(values[row["split"], name]) > 1:
                called.append(f"{name} {value}")
        found.append({**row, "called": ", ".join(called)})
    return found


def title(row):
    if "split" in row:
        ending = "solved" if row["success"] else "out of tries"
        called = row.get("called") or f"step {row.get('step', 0)}"
        on_route = row["settings"]["task"].startswith("virl")
        place = f", position {row['position']}" if on_route else ""
        return (f"{row['split']}, {called}, seed {row['seed']}, episode {row['episode']}{place}: "
                f"{ending}")
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


def as_text(row):
    """A dialogue with its verdicts, to be printed."""
    parts = [f"---- {title(row)} ----"]
    for message, status, reward in replies_with_verdicts(row):
        mark = f"> [{status}, reward {reward:+g}] " if status else ""
        parts.append(f"{mark}{printable(message['content'])}\n")
    return "\n".join(parts)


def env_of_row(row, make_env, config=None):
    """(the environment of a dialogue, the seed and the number of its episode, a digest of its
    files). config: that of the run, for a row of turns.jsonl."""
    if config:
        split = read_splits(config["split"])[0]
        env = make_env(config["task"], split.name, read_settings(config["env"]), **split.settings)
        # As in rl.Conversation.begin.
        seed = f"{config['seed']}/rl/{row['env']}/{row['episode']}"
        number = row["episode"] * config["num_envs"] + row["env"]
        return env, seed, number, config.get("files")
    chosen = dict(row["settings"]["env"])
    chosen.pop("vision", None)                       # the task fixes it
    env = make_env(row["settings"]["task"], **chosen)
    seed = f"{row['seed']}/evaluate/{row['episode']}"
    return env, seed, row["episode"], row["settings"].get("files")


def lay_out_again(row, env, seed, number, files):
    """The environment of a dialogue (`env_of_row`), at the dialogue's position of its episode.

    ValueError if the city or the cards are not those that the model saw.
    """
    if files and files != digests.files_of([env]):   # earlier versions did not keep them
        raise ValueError(f"{title(row)}: it cannot be drawn again, since a city, card_dir or "
                         "prompt file of its settings has changed: put it back, or leave --html "
                         "and face_card out")
    env.reset(seed, number)
    if "position" in row:
        if row["position"] not in range(len(env.rail)):
            raise ValueError(f"{title(row)}: position {row['position']!r} is not on its route of "
                             f"{len(env.rail)} positions")
        env.at = row["position"]
    return env


def picture_of_row(row, make_env, config=None):
    """The picture of a dialogue (PIL), drawn again from its seed; None for a task in words.

    config: as in `env_of_row`. ValueError as in `lay_out_again`.
    """
    if not config and not row["settings"]["env"].get("vision"):
        return None
    env, *episode = env_of_row(row, make_env, config)
    return lay_out_again(row, env, *episode).picture() if env.vision else None


def as_image(picture):
    """A picture as an <img> that holds it; "" for None."""
    if picture is None:
        return ""
    png = io.BytesIO()
    picture.save(png, "PNG", optimize=True)
    data = base64.b64encode(png.getvalue()).decode()
    return f'<img alt="what the model saw" src="data:image/png;base64,{data}">'


def check_filter(word):
    """ValueError unless --only knows this word."""
    name, _, value = word.partition("=")
    flags = ("failed", "solved", "face_card")
    names = ("step", "split", "seed", "episode", "checkpoint")
    if word not in flags and not (name in names and value):
        raise ValueError(f"--only {word}: allowed are {FILTERS}")


def has_face_card(row, make_env, config=None):
    """Whether a dialogue is about a hand with J, Q or K."""
    if "expert" in row:                # of a test: the expert names the cards
        plays_cards = row["settings"]["task"].startswith("gp")
        return plays_cards and bool(re.search(r"\b[JQK]\b", row["expert"]))
    env = lay_out_again(row, *env_of_row(row, make_env, config))
    return not {"J", "Q", "K"}.isdisjoint(getattr(env, "cards", ()))


def wanted(row, words, make_env, config=None):
    """Whether a dialogue is one that the words of --only name."""
    for word in words:
        name, _, value = word.partition("=")
        if word == "failed":
            # In turns.jsonl a dialogue may still go on. One of a test has ended.
            ended = row["done"] or "split" in row
            fits = ended and row["verdicts"][-1][0] != "correct"
        elif word == "solved":
            fits = row["verdicts"][-1][0] == "correct"
        elif word == "face_card":
            fits = has_face_card(row, make_env, config)
        elif name == "checkpoint":
            fits = row.get(name) == os.path.normpath(value)
        else:
            fits = str(row.get(name)) == value
        if not fits:
            return False
    return True


def page(config, rows, name, make_env):
    """The whole page as HTML; `config` is None for rows of dialogues.jsonl."""
    articles = []
    for row in rows:
        parts = ["<article>", f"<h2>{html.escape(title(row))}</h2>",
                 as_image(picture_of_row(row, make_env, config))]
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
        f"<div>{len(rows)} dialogues. Correct replies are green.</div>",
        *articles, "</html>", ""])


def check_page(file):
    """ValueError unless a page may be written to this path."""
    if Path(file).suffix not in (".html", ".htm"):
        raise ValueError(f"--html {file}: must be a file named .html, such as page.html")
    if not Path(file).parent.is_dir():
        raise ValueError(f"--html {file}: there is no folder {Path(file).parent}")


def read_run(run, file, make_env, only=()):
    """Print the dialogues of a run, or write them to a page.

    run: a run folder, or a file dialogues.jsonl. only: words that say which dialogues (`wanted`).
    """
    for word in only:
        check_filter(word)
    path, config = Path(run), None
    # Only tests have these. Without such a word what was said in training is read.
    of_tests = any(word.startswith(("split=", "seed=", "checkpoint=")) for word in only)
    if of_tests or not (path / "turns.jsonl").is_file():
        path = path / "dialogues.jsonl" if (path / "dialogues.jsonl").is_file() else path
    if path.is_file():
        rows = tell_apart(read_dialogues(path))
    else:
        config, rows = read_rows(run)
        config = {**config, "files": read_object(path / "inputs.json").get("files")}
    rows = [row for row in rows if wanted(row, only, make_env, config)]
    if not rows:
        where, hint = path, ""
        if config:
            where = path / "turns.jsonl"
            hint = "; with split=NAME what was said in tests is read"
        raise ValueError(f"{where}: holds no such dialogue{hint}")
    if file:
        check_page(file)
        Path(file).write_text(page(config, rows, str(run), make_env), encoding="utf-8")
        print(f"{file}: {len(rows)} dialogues")
        return
    for row in rows:
        print(as_text(row))
    if len(rows) > 20:
        print(f"{len(rows)} dialogues; --only shows some of them: {FILTERS}")
