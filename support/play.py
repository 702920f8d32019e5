"""Play an episode of an environment yourself, or look at one: what `python envs.py` does."""
import os
import random
import tempfile
from pathlib import Path

HELP = """A reply may be the JSON object that the prompt asks for, or just the answer:
    {example}
help   this text       prompt   the whole prompt again       quit   leave (also Ctrl-D, Ctrl-C)"""


def text_of(message):
    content = message["content"]
    return content if isinstance(content, str) else content[-1]["text"]


def has_picture(env):
    """Whether this place can be drawn: of a task in words too, if a city's street views are there."""
    return env.vision or getattr(env, "folder", None) is not None and (env.folder / "street_views").is_dir()


def show(env, seed, folder):
    """Print a prompt, the expert's reply and the verdict; with a folder write there what every position has."""
    messages, _ = env.reset(seed=seed)
    if folder:
        Path(folder).mkdir(parents=True)
    print(text_of(messages[-1]))
    while not env.done:
        reply = env.expert_reply()
        if folder:
            file = Path(folder) / f"{env.turn:02d}.txt"
            file.write_text(f"{text_of(messages[-1])}\n\n> {reply}\n")
            if has_picture(env):
                env.picture().save(file.with_suffix(".png"))
        messages, reward, _, _, info = env.step(reply)
        print(f"\n> {reply}\n{text_of(messages[-1])}   [{info['status']}, reward {reward:+g}]")
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
        else:
            return said if "{" in said else env.format_reply(said.split("=")[0].strip())


def play_episode(env, seed, pictures):
    """One episode, read from the keyboard; False if the player leaves."""
    messages, _ = env.reset(seed=seed)
    shown, reward_sum = "", 0.0
    example = "(1+2)*8*1" if env.kinds == ("formula",) else "forward()"
    while not env.done:
        if env.tries == 0:
            text = text_of(messages[-1])
            new = text[len(os.path.commonprefix([shown, text])):] if shown else text
            print("\n" + (new.split("\nReply with a JSON")[0].lstrip("\n") if shown else text))
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
