"""Play an episode of an environment yourself, or look at one: what `python envs.py` does."""
import argparse
import contextlib
import os
import random
import signal
import sys
import tempfile
from pathlib import Path

from support import demonstrator, settings, transcripts
from support.chat import printable, read_text

HELP = """A reply is the JSON object that the prompt asks for, or just the answer{example}
help   this text       prompt   the whole prompt again       quit   leave (or Ctrl-D, Ctrl-C)"""
FORMAT = "\nReply with a JSON"             # how our prompts begin the part that says how to reply


def has_picture(env):
    """Whether a position can be drawn: in a task in words, if it has a folder of street views."""
    if env.vision:
        return True
    folder = getattr(env, "folder", None)
    return folder is not None and (folder / "street_views").is_dir()


def show(env, seed, folder):
    """Print a prompt, the expert's reply and the verdict.

    With a folder, write there the prompt, reply and picture of every position of the episode.
    """
    messages, _ = env.reset(seed=seed)
    if folder:
        Path(folder).mkdir(parents=True)
    print(printable(read_text(messages[-1])))
    while not env.done:
        reply = env.expert_reply()
        if folder:
            file = Path(folder) / f"{env.turn:02d}.txt"
            file.write_text(f"{read_text(messages[-1])}\n\n> {reply}\n")
            if has_picture(env):
                env.picture().save(file.with_suffix(".png"))
        message = env.judge(reply).message
        messages, reward, _, _, info = env.step(reply)
        print(f"\n> {printable(reply)}\n{message}   [{info['status']}, reward {reward:+g}]")
        if not folder:
            return


def ask(env, text):
    """The next reply that is to be judged; None if the player leaves."""
    while True:
        try:
            typed = input("\n> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return None
        command = typed.lower()
        if command in ("quit", "exit", "q"):
            return None
        if command in ("help", "?", "h", ""):
            example = f", such as\n    {env.example}" if env.example else "."
            print(HELP.format(example=example))
        elif command == "prompt":
            print(text)
        elif "{" in typed:
            return typed
        else:
            try:
                answer = env.read_answer(typed)
            except ValueError as advice:
                print(f"{advice} (No try is lost.)")
                continue
            return env.format_reply(answer)


def play_episode(env, seed, pictures):
    """One episode, read from the keyboard; False if the player leaves."""
    messages, _ = env.reset(seed=seed)
    shown, reward_sum = "", 0.0
    while not env.done:
        if env.tries == 0:
            text = printable(read_text(messages[-1]))
            if shown:                      # print only the lines behind those already shown
                old = os.path.commonprefix([shown, text]).rpartition("\n")[0]
                print(text.removeprefix(old).split(FORMAT)[0])
            else:
                print(f"\n{text}")
            shown = text
            if env.vision:
                path = Path(pictures) / f"{seed}_{env.turn:02d}.png"
                env.picture().save(path)
                print(f"(the picture: {path})")
        reply = ask(env, text)
        solution = env.expert_reply()
        if reply is None:
            print(f"A right reply would have been: {solution}")
            return False
        verdict = env.judge(reply)
        messages, reward, _, truncated, info = env.step(reply)
        reward_sum += reward
        left = ""
        if info["status"] != "correct":
            left = f", tries left: {env.verify_iter - info['try']}"
        if truncated and reward != verdict.reward:
            left += f"; {reward - verdict.reward:+g} of it because the last try failed"
        print(f"{verdict.message}   [{info['status']}, reward {reward:+g}{left}]")
        if truncated:
            print(f"A right reply would have been: {solution}")
    ending = "Solved" if info["success"] else "Not solved"
    replies = "1 reply" if info["turn"] == 1 else f"{info['turn']} replies"
    print(f"{ending} after {replies}, total reward {reward_sum:+g}.")
    return True


def play(env, seed=None):
    """Episodes until the player leaves; with a seed, that one only."""
    once = seed is not None
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401      input() then has a history, and lines can be edited
    print("You are the model. Type the answer alone or the whole JSON object.\n"
          '"help", "prompt" and "quit" cost no try.')
    with tempfile.TemporaryDirectory(prefix="envs_") as pictures:
        while True:
            if not once:
                seed = random.SystemRandom().randrange(10 ** 6)
            print(f"\n---- episode {seed} (--seed {seed} plays it again) ----")
            if not play_episode(env, seed, pictures) or once:
                return


def run(args, tasks, make_env):
    """Play, look at or read, as the command line says; ValueError if that cannot be done."""
    if args.html and not args.read:
        raise ValueError(f"--html {args.html}: needs --read RUN")
    if args.read:
        transcripts.read_run(args.read, args.html, make_env, args.only)
        return
    if not args.task:
        raise ValueError(f"a task is required: {', '.join(tasks)}")
    names = [word for word in args.words if "=" not in word] or ["id"]
    given = [word for word in args.words if "=" in word]       # may stand before the split, too
    split, *more = settings.read_splits([*names, *given])
    if more:
        raise ValueError(f"one split at a time, not {more[0].name} as well")
    demonstrator.refuse_without_effect(split.settings, ["faults", "faulty_tries"], "the expert "
                                       "shows a right reply")
    env = make_env(args.task, split.name, **split.settings)
    if args.show:
        show(env, args.seed or 0, "" if args.show == "-" else args.show)
    else:
        play(env, args.seed)


def command_line(tasks, make_env, description):
    """`python envs.py`: play, look at or read."""
    parser = argparse.ArgumentParser(description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="?", help=", ".join(tasks))
    parser.add_argument("words", nargs="*", metavar="SPLIT KEY=VALUE",
                        help="a split [id], and settings")
    parser.add_argument("--seed", type=int,
                        help="which episode to play; without it, a new one each time")
    parser.add_argument("--show", nargs="?", const="-", metavar="DIR",
                        help="print one prompt, expert reply and verdict; with DIR, write there "
                             "every prompt, expert reply and picture of the episode")
    parser.add_argument("--read", metavar="RUN",
                        help="print the dialogues that rl.py or evaluate.py kept in a run folder, "
                             "or a file dialogues.jsonl")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD",
                        help=f"with --read: only some of them; words are {transcripts.FILTERS}")
    parser.add_argument("--html", metavar="FILE", help="with --read: write them as a page")
    args = parser.parse_intermixed_args()
    try:
        run(args, tasks, make_env)
        sys.stdout.flush()
    except BrokenPipeError:                # a reader who has enough, such as `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except (ValueError, OSError) as error:      # such as a disk that takes no --html or --show
        print(f"envs.py: error: {error}", file=sys.stderr)
        sys.exit(2)
