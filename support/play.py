"""Play an episode of an environment yourself, or look at one: what `python envs.py` does."""
import argparse
import os
import random
import re
import sys
import tempfile
from pathlib import Path

from support import settings, transcripts
from support.chat import read_text

HELP = """A reply may be the JSON object that the prompt asks for, or just the answer:
    {example}
help   this text       prompt   the whole prompt again       quit   leave (also Ctrl-D, Ctrl-C)"""


def has_picture(env):
    """Whether this place can be drawn: of a task in words too, if a city's street views are there."""
    return env.vision or getattr(env, "folder", None) is not None and (env.folder / "street_views").is_dir()


def show(env, seed, folder):
    """Print a prompt, the expert's reply and the verdict; with a folder write there what every position has."""
    messages, _ = env.reset(seed=seed)
    if folder:
        Path(folder).mkdir(parents=True)
    print(read_text(messages[-1]))
    while not env.done:
        reply = env.expert_reply()
        if folder:
            file = Path(folder) / f"{env.turn:02d}.txt"
            file.write_text(f"{read_text(messages[-1])}\n\n> {reply}\n")
            if has_picture(env):
                env.picture().save(file.with_suffix(".png"))
        message = env.judge(reply).message
        messages, reward, _, _, info = env.step(reply)
        print(f"\n> {reply}\n{message}   [{info['status']}, reward {reward:+g}]")
        if not folder:
            return


def ask(env, text, answer):
    """The next reply that is to be judged; None to leave."""
    while True:
        try:
            said = input("\n> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return None
        if said.lower() in ("quit", "exit", "q"):
            return None
        if said.lower() in ("help", "?", "h", ""):
            print(HELP.format(example=answer))
        elif said.lower() == "prompt":
            print(text)
        elif env.kinds == ("formula",) and "{" not in said and re.search(r"\b[AJQK]\b", said):
            print("Write the number that a card counts as, not its letter. (No try is lost.)")
        else:
            return said if "{" in said else env.format_reply(said.split("=")[0].strip())


def play_episode(env, seed, pictures):
    """One episode, read from the keyboard; False if the player leaves."""
    messages, _ = env.reset(seed=seed)
    shown, reward_sum = "", 0.0
    example = "(1+2)*8*1" if env.kinds == ("formula",) else "forward()"
    while not env.done:
        if env.tries == 0:
            text = read_text(messages[-1])
            old = os.path.commonprefix([shown, text]).rpartition("\n")[0]      # whole lines that were shown before
            print(text.removeprefix(old).split("\nReply with a JSON")[0] if shown else f"\n{text}")
            shown = text
            if env.vision:
                path = Path(pictures) / f"{seed}_{env.turn:02d}.png"
                env.picture().save(path)
                print(f"(the picture: {path})")
        reply = ask(env, text, example)
        if reply is None:
            print(f"A right reply would have been: {env.expert_reply()}")
            return False
        solution, message = env.expert_reply(), env.judge(reply).message
        messages, reward, _, truncated, info = env.step(reply)
        reward_sum += reward
        left = "" if info["status"] == "correct" else f", tries left: {env.verify_iter - info['try']}"
        print(f"{message}   [{info['status']}, reward {reward:+g}{left}]")
        if truncated:
            print(f"A right reply would have been: {solution}")
    print(f"{'Solved' if info['success'] else 'Not solved'} after {info['turn']} replies, reward {reward_sum:+g} in all.")
    return True


def play(env, seed=None):
    """Episodes until the player leaves; with a seed, that one only."""
    fixed, pictures = seed is not None, tempfile.mkdtemp(prefix="envs_") if env.vision else ""
    print('You are the model. Type the answer alone or the whole JSON object; "help", "prompt" and "quit" cost no try.')
    while True:
        seed = seed if fixed else random.SystemRandom().randrange(10 ** 6)
        print(f"\n---- episode {seed} (--seed {seed} plays it again) ----")
        if not play_episode(env, seed, pictures) or fixed:
            return


def command_line(tasks, make_env, description):
    """`python envs.py`: play, look at or read."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="?", help=", ".join(tasks))
    parser.add_argument("words", nargs="*", metavar="SPLIT KEY=VALUE", help="a split [id], and settings")
    parser.add_argument("--seed", type=int, help="which episode; without: a new one each time")
    parser.add_argument("--show", nargs="?", const="-", metavar="DIR",
                        help="print one prompt, expert reply and verdict; with DIR write there every prompt, expert "
                             "reply and picture of the episode")
    parser.add_argument("--read", metavar="RUN", help="the conversations that rl.py kept of a run")
    parser.add_argument("--html", metavar="FILE", help="with --read: write them as a page")
    args = parser.parse_intermixed_args()
    try:
        if args.html and not args.read:
            raise ValueError(f"--html {args.html}: needs --read RUN")
        if args.read:
            return transcripts.read_run(args.read, args.html, make_env)
        if not args.task:
            raise ValueError(f"a task is required: {', '.join(tasks)}")
        named = [word for word in args.words if "=" not in word] or ["id"]           # before or behind its settings
        split, *more = settings.read_splits([*named, *(word for word in args.words if "=" in word)])
        if more:
            raise ValueError(f"one split at a time, not {more[0].name} as well")
        env = make_env(args.task, split.name, **split.settings)
        if args.show:
            show(env, args.seed or 0, "" if args.show == "-" else args.show)
        else:
            play(env, args.seed)
    except (ValueError, FileExistsError) as error:
        print(f"envs.py: error: {error}", file=sys.stderr)
        sys.exit(2)
