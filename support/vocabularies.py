"""The words that V-IRL's turn_direction(x) takes: the paper's two rules, and a family of others.

A vocabulary gives each direction a word of its own. It maps the eight compass words of the
instructions, or the four words for turns, to what an action says:

    read_kinds("letters,clock")           -> ("letters", "clock")
    draw(("letters", "clock"), rng)       -> {"north": "N", "northeast": "NE", ...}, or
                                             {"left": "9", "right": "3", ...}
    draw(("invented",), rng)              -> {"north": "lokor", "northeast": "gudop", ...}
    draw(("relative",), rng)              -> {"left": "left", "right": "right", ...}

The setting `action_space` names one of the paper's two, or the kinds to draw from. A draw takes
each kind equally often; "random" stands for all of them. To keep a kind for a test, name the others
in training. No kind holds a word of the paper, and the prompt defines each word. Words that are
dealt anew cannot be known by heart.

    kind             its words                              stand for
    letters          N, NE, E, ...                          compass words
    degrees          0, 45, 90, ...                         compass words
    exits            1 to 8, dealt anew for each route      compass words
    invented         made up, dealt anew for each route     compass words
    buttons          of A to H, dealt anew for each route   left, right, ...
    initials         L, R, SL, SR                           left, right, ...
    clock            9, 3, 11, 1                            left, right, ...
    ship             port, starboard, half port, ...        left, right, ...
    invented_turns   made up, dealt anew for each route     left, right, ...
"""
from typing import NamedTuple

from support.streets import COMPASS

RELATIVE = ("left", "right", "slightly left", "slightly right")
PAPER = {"absolute": COMPASS, "relative": RELATIVE}

BEGINNINGS = ("ba", "do", "fe", "gu", "ki", "lo", "me", "nu", "po", "ri", "sa", "tu", "ve", "zi")
ENDINGS = ("bek", "dop", "fil", "gam", "kor", "lun", "mis", "net", "pim", "rof", "sul", "tev",
           "vok", "zan")
INVENTED = tuple(first + last for first in BEGINNINGS for last in ENDINGS)


class Kind(NamedTuple):
    """A kind of vocabulary: `words` stand for `meanings` in order, or are `dealt` anew."""
    meanings: tuple
    words: tuple
    dealt: bool = False


KINDS = {
    "letters": Kind(COMPASS, ("N", "NE", "E", "SE", "S", "SW", "W", "NW")),
    "degrees": Kind(COMPASS, ("0", "45", "90", "135", "180", "225", "270", "315")),
    "exits": Kind(COMPASS, ("1", "2", "3", "4", "5", "6", "7", "8"), dealt=True),
    "invented": Kind(COMPASS, INVENTED, dealt=True),
    "buttons": Kind(RELATIVE, ("A", "B", "C", "D", "E", "F", "G", "H"), dealt=True),
    "initials": Kind(RELATIVE, ("L", "R", "SL", "SR")),
    "clock": Kind(RELATIVE, ("9", "3", "11", "1")),
    "ship": Kind(RELATIVE, ("port", "starboard", "half port", "half starboard")),
    "invented_turns": Kind(RELATIVE, INVENTED, dealt=True),
}


def relative_word(angle, wrapped=True):
    """The word for a change of direction, in degrees; straight on counts as slightly left."""
    if wrapped:                              # differs 17: theirs leaves this out
        angle = (angle + 180) % 360 - 180    # -180 to 179
    if abs(angle) > 45:
        return "left" if angle < 0 else "right"
    return "slightly left" if angle <= 0 else "slightly right"


def read_kinds(action_space):
    """The setting as a tuple of names: one of PAPER, or some of KINDS.

    ValueError says what is allowed.
    """
    if action_space in PAPER:
        return (action_space,)
    if action_space == "random":
        return tuple(KINDS)
    names = action_space.split(",") if isinstance(action_space, str) else []
    if names and set(names) <= set(KINDS) and len(set(names)) == len(names):
        return tuple(names)
    raise ValueError(f"action_space {action_space!r}: allowed are {', '.join(PAPER)}, random, or "
                     f"kinds to draw from, each once, such as letters,clock: {', '.join(KINDS)}")


def draw(names, rng):
    """A vocabulary of one of the named kinds: {meaning: word}. One of PAPER takes no draw."""
    if names[0] in PAPER:
        return {word: word for word in PAPER[names[0]]}
    kind = KINDS[rng.choice(names)]
    words = rng.sample(kind.words, len(kind.meanings)) if kind.dealt else kind.words
    return dict(zip(kind.meanings, words))


def words_for(vocabulary, compass, relative):
    """(the right word for a direction, another word for it).

    The instructions name the direction by its `compass` word and its `relative` word. The other
    word is that of a walker who mixes the rules up. It is the compass word, on which the paper
    trains, unless that is right; then it is the relative word.
    """
    word = vocabulary[compass] if compass in vocabulary else vocabulary[relative]
    other = relative if word == compass else compass
    return word, other


def define(vocabulary, template):
    """All words of a vocabulary, in the prompt's list of actions.

    A word that is none of the instructions stands there with its meaning, as `template` says.
    """
    told = []
    for meaning, word in vocabulary.items():
        if word != meaning:
            word = template.replace("{word}", word).replace("{meaning}", meaning)
        told.append(word)
    return ", ".join(told)


def words_of(names):
    """Every word that a vocabulary of these kinds may have, some perhaps twice."""
    words = []
    for name in names:
        words += PAPER[name] if name in PAPER else KINDS[name].words
    return words


def check_told(action_space, prompts):
    """ValueError if a prompt file does not define words that the model cannot know."""
    if action_space in PAPER:
        return
    for name, value in (("nav_actions", "words"), ("nav_word", "word"), ("nav_word", "meaning")):
        if f"{{{value}}}" not in prompts[name]:
            raise ValueError(f"prompt file: template {name!r} lacks {{{value}}}, so it does not "
                             f"define the words of action_space {action_space}")
