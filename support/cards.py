"""The cards' pictures: four cards in a row on felt, at the official places, drawn by us.

The official pictures come without a licence. Anyone who has them can use them: the setting
`card_dir` names their folder, with files such as HT.png.
"""
import contextlib
import math
import warnings
from functools import lru_cache
from pathlib import Path

from PIL import (ExifTags, Image, ImageChops, ImageDraw, ImageOps,
                 UnidentifiedImageError)

# Other formats that Pillow knows start programs (EPS starts Ghostscript), or are never needed.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
# Beyond this Pillow itself warns. Reading a picture of this size takes 0.7 GB of memory.
MAX_PIXELS = 89_478_485


@contextlib.contextmanager
def picture_file(path):
    """An open picture file; inside, what is wrong with it becomes a ValueError that names it."""
    try:
        with warnings.catch_warnings():
            # Pillow's warning of a large picture is replaced by our error below, in one line.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(path, formats=FORMATS)
        with opened as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise ValueError(f"{picture.width}x{picture.height} is more than {MAX_PIXELS:,} "
                                 "pixels")
            yield picture
    except UnidentifiedImageError:
        raise ValueError(f"{path}: not a picture that can be read: it is none of "
                         f"{', '.join(FORMATS)}") from None
    except Exception as error:   # a broken file can raise anything
        raise ValueError(f"{path}: not a picture that can be read: {error}") from None


def is_turned(picture):
    """Whether a viewer turns or mirrors a picture, by its EXIF block; a broken one says nothing."""
    try:
        return picture.getexif().get(ExifTags.Base.Orientation) in range(2, 9)
    except Exception:   # it can raise anything
        return False


def to_8_bits(picture):
    """A picture with 16 bits a level, brought to 8; `convert` would cut it at 255.

    ValueError if nothing says which level is white.
    """
    if picture.mode[0] not in "IF":
        return picture
    known = (picture.mode.startswith("I;16")
             or (picture.mode == "I" and picture.format in ("PNG", "PPM")))
    # A TIFF of 12 bits has the same mode. Its tag 258 says how many bits a level has.
    bits = getattr(picture, "tag_v2", {}).get(258, (16,))
    if not known or bits != (16,) or picture.has_transparency_data:
        raise ValueError(f"nothing says which of its levels ({picture.mode}, {picture.format}) "
                         "is white: save it with 8 bits a channel")
    return picture.convert("I").point(lambda level: level / 256).convert("L")


def open_picture(path, ground="white"):
    """A picture file as a viewer shows it, in RGB.

    It is upright, stands on a ground where it is transparent, and is the first of several frames.
    It is read to its end. ValueError names a file that is missing or broken, or whose levels could
    mean anything.
    """
    with picture_file(path) as picture:
        picture.load()
        picture = to_8_bits(picture)
        if is_turned(picture):
            picture = ImageOps.exif_transpose(picture)
        if picture.has_transparency_data:
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, ground),
                                            picture.convert("RGBA"))
        return picture.convert("RGB")


# ---- Shapes --------------------------------------------------------------------------------------

MIN_SIZE, MAX_SIZE = 48, 4096       # of a picture, in pixels
# The official geometry, in pixels.
CANVAS = 1200                       # the side of the picture
CARD = (270, 378)                   # width and height of a card
CARDS_X = (5, 302, 599, 896)        # where each of the four begins
CARDS_Y = 411
FELT = (53, 101, 77)
NAVY = (32, 48, 104)
CREAM = (252, 246, 226)
GOLD = (226, 170, 44)
INKS = {"S": (10, 10, 8), "H": (192, 36, 42), "D": (192, 36, 42), "C": (10, 10, 8)}
FINE = 3    # cards are drawn this many times larger and reduced, which smooths the edges


def arc(x, y, across, down, start=0, end=360):
    """Points on an ellipse around (x, y); angles in degrees, 0 is right and 90 is below."""
    angles = [(start + (end - start) * step / 60) * math.pi / 180 for step in range(61)]
    return [(x + across * math.cos(angle), y + down * math.sin(angle)) for angle in angles]


# Ranks as pen strokes, 1 high. They are told apart at 50 x 70 pixels: the 3 has a flat top, unlike
# the 8 and the J; the J has a bar, unlike the 3; the Q has a long tail, unlike the 0.
SIX = [*arc(.53, .69, .52, .69, 268, 180), *arc(.3, .69, .29, .31, 180, 540)]
STROKES = {
    "A": [[(0, 1), (.32, 0), (.64, 1)], [(.11, .68), (.53, .68)]],
    "2": [[*arc(.3, .29, .28, .29, 195, 395), (.02, 1), (.6, 1)]],
    "3": [[(.04, 0), (.55, 0), (.27, .4), *arc(.26, .7, .31, .3, -80, 145)]],
    "4": [[(.45, 1), (.45, 0), (0, .69), (.64, .69)]],
    "5": [[(.54, 0), (.09, 0), (.05, .45), *arc(.27, .69, .31, .31, -120, 140)]],
    "6": [SIX], "9": [[(.6 - x, 1 - y) for x, y in SIX]],
    "7": [[(0, 0), (.58, 0), (.2, 1)]],
    "8": [arc(.3, .24, .24, .24), arc(.3, .74, .3, .26)],
    "10": [[(0, .2), (.13, 0), (.13, 1)], arc(.58, .5, .21, .5)],
    "J": [[(.16, 0), (.66, 0)], [(.44, 0), *arc(.2, .72, .24, .28, 0, 165)]],
    "Q": [arc(.33, .47, .33, .47), [(.36, .66), (.68, 1.03)]],
    "K": [[(0, 0), (0, 1)], [(.58, 0), (0, .62)], [(.2, .42), (.62, 1)]],
}
# Suits as polygons, about 1 high, around (0, 0). The heart is a curve over an angle t.
ANGLES = [step * math.pi / 30 for step in range(60)]
HEART = [(math.sin(t) ** 3 * 16 / 33,
          -(2.5 + 13 * math.cos(t) - 5 * math.cos(2 * t)
            - 2 * math.cos(3 * t) - math.cos(4 * t)) / 31)
         for t in ANGLES]
STEM = [(-.06, -.2), (.06, -.2), (.09, .35), (.22, .5), (-.22, .5), (-.09, .35)]
SIGNS = {
    "S": [[(x, -.92 * y - .06) for x, y in HEART], STEM],
    "H": [HEART],
    "D": [[(.42 * x * abs(x) ** 1.3, .54 * y * abs(y) ** 1.3) for x, y in arc(0, 0, 1, 1)]],
    "C": [arc(0, -.26, .24, .24), arc(-.25, .1, .24, .24), arc(.25, .1, .24, .24), STEM],
}
# Where a card has its suit: (drawn twice, the second time turned by 180 degrees; drawn once).
FOUR, SIDES, CENTRE = [(100, 58), (170, 58)], [(100, 189), (170, 189)], (135, 189)
EIGHT = [*FOUR, (100, 145), (170, 145)]
PIPS = {
    "A": ([], [CENTRE]),
    "2": ([(135, 58)], []),
    "3": ([(135, 58)], [CENTRE]),
    "4": (FOUR, []),
    "5": (FOUR, [CENTRE]),
    "6": (FOUR, SIDES),
    "7": (FOUR, [*SIDES, (135, 123)]),
    "8": ([*FOUR, (135, 123)], SIDES),
    "9": (EIGHT, [CENTRE]),
    "10": ([*EIGHT, (135, 101)], []),
    **dict.fromkeys("JQK", ([(94, 61)], [])),
}


def placed(points, x, y, size):
    """Points of a shape 1 high, in fine pixels, with its (0, 0) at (x, y) of the card."""
    return [(FINE * (x + u * size), FINE * (y + v * size)) for u, v in points]


def draw_suit(pen, suit, x, y, size=40):
    """Fill a suit's sign around (x, y)."""
    for polygon in SIGNS[suit]:
        pen.polygon(placed(polygon, x, y, size), INKS[suit])


def draw_rank(pen, rank, ink, x, y, height, thickness):
    """Write a rank around (x, y) with a round pen."""
    middle = max(u for stroke in STROKES[rank] for u, _ in stroke) / 2
    for stroke in STROKES[rank]:
        points = placed(stroke, x - middle * height, y - height / 2, height)
        pen.line(points, ink, FINE * thickness)
        for point in points:               # rounds ends and joints; joint="curve" leaves notches
            pen.circle(point, FINE * thickness / 2, ink)


def draw_card(rank, suit):
    """One card, an RGB picture of CARD pixels.

    Around its round corners is felt, so that it can be pasted without a mask.
    """
    fine = (FINE * CARD[0], FINE * CARD[1])
    card = Image.new("RGB", fine, FELT)
    twice, once = PIPS[rank]
    pen = ImageDraw.Draw(card)
    pen.rounded_rectangle((0, 0, fine[0] - 1, fine[1] - 1), FINE * 16, "white")
    if rank in "JQK":
        frame = (FINE * 67, FINE * 32, fine[0] - 1 - FINE * 67, fine[1] - 1 - FINE * 32)
        pen.rectangle(frame, CREAM, NAVY, FINE * 4)
    # The corner index, then the suit under it and the pips.
    draw_rank(pen, rank, INKS[suit], 34, 46, 60, 10)
    for x, y in [(34, 108), *twice]:
        draw_suit(pen, suit, x, y)
    # All of it once more, turned by 180 degrees: the darker of two pixels is the drawn one.
    card = ImageChops.darker(card, card.transpose(Image.Transpose.ROTATE_180))
    pen = ImageDraw.Draw(card)
    for x, y in once:
        draw_suit(pen, suit, x, y, 120 if rank == "A" else 40)
    if rank in "JQK":
        draw_rank(pen, rank, INKS[suit], 135, 202, 125, 20)
        steps = {"J": 2, "Q": 4, "K": 8}[rank]     # a crown with a valley between two tips
        crown = [(step / steps - .5, step % 2 * .22) for step in range(steps + 1)]
        pen.polygon(placed([*crown, (.4, .44), (-.4, .44)], 135, 90, 62), GOLD, NAVY, FINE * 2)
        for tip in placed(crown[::2], 135, 90, 62):
            pen.circle(tip, FINE * 5, GOLD, NAVY, FINE * 2)
    return card.resize(CARD, Image.Resampling.LANCZOS)


@lru_cache(maxsize=520)
def card_picture(rank, suit, width, height, card_dir=""):
    """A card scaled to width x height: ours, or a file of `card_dir` by its official name.

    HT.png is the 10 of hearts.
    """
    name = f"{suit}{'T' if rank == '10' else rank}.png"
    # The official code pastes a card without its mask, so outside of the round corners it is black.
    picture = open_picture(Path(card_dir, name), "black") if card_dir else draw_card(rank, suit)
    # differs 32: Lanczos; theirs has Pillow's default
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def check_folder(card_dir, ranks, suits):
    """Read every card's file of a folder, if one is given; ValueError names the first bad file."""
    if card_dir:
        for suit in suits:
            for rank in ranks:
                card_picture(rank, suit, *CARD, card_dir)


def draw_hand(hand, resolution, card_dir=""):
    """Four (rank, suit) cards in a row on felt, RGB, resolution x resolution.

    ValueError names the bad file of a card.
    """
    scale = resolution / CANVAS
    width, height = round(CARD[0] * scale), round(CARD[1] * scale)
    canvas = Image.new("RGB", (resolution, resolution), FELT)
    for (rank, suit), x in zip(hand, CARDS_X):
        card = card_picture(rank, suit, width, height, card_dir)
        canvas.paste(card, (round(x * scale), round(CARDS_Y * scale)))
    return canvas
