"""V-IRL's released files: routes, the mapping from places to panoramas, the panoramas, and views cut out of them.

A data folder holds route_infos.json, gps_pano_mapping.pkl (a pickle that you downloaded: read by a restricted
unpickler, nothing in it can run) and street_views/ID.jpg with ID.metadata.json. In words the first is enough.
"""
import io
import itertools
import json
import math
import pickle
import re
from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from support.cards import is_turned, open_picture

COMPASS = ("north", "northeast", "east", "southeast", "south", "southwest", "west", "northwest")
NO_LANDMARK = "No landmark nearby"           # as the files spell it
REACH = 20.0                                 # metres: a point is moved to the nearest panorama within this
SPACING = 8.0                                # metres: a place between two points keeps this distance from both
SHORT_LEG = 5.0                              # metres: a leg that is no longer has no places between
POINTS_PER_LEG = 5                           # a leg is cut in so many parts
FOLDERS = {"train": ("train", "nyc_1k_routes"), "unseen": ("unseen",), "mini": ("mini", "VLN_mini")}
FACTORIES = "str int float list dict set tuple unicode long".split()    # of a defaultdict; the last two as Python 2 had


class ScalarType:
    """Stands in for numpy.dtype, whose state a file could set so that bytes are taken for addresses."""

    def __init__(self, name, *_):
        if not re.fullmatch("[iuf][248]|U[0-9]{1,3}", name):
            raise pickle.UnpicklingError(f"numpy type {name} is not allowed in it")
        self.name = "<" + name

    def __setstate__(self, state):
        self.name = self.name.replace("<", ">") if state[1] == ">" else self.name


def flat_only(load_tuple):
    """The reading of a tuple, made to refuse one in it: to hash a deep tuple ends the process."""
    def load(unpickler):
        load_tuple(unpickler)
        if any(isinstance(item, tuple) for item in unpickler.stack[-1]):
            raise pickle.UnpicklingError("a tuple in a tuple is not allowed in it")
    return load


class MappingUnpickler(pickle._Unpickler):
    """Reads numbers, strings, flat tuples, dicts and numpy scalars; the name of anything else ends the reading.

    Nothing that it reads can run or takes more memory than a multiple of the file. It is Python's unpickler in Python,
    as the one in C lets nobody look at tuples: 1.5 s for 500,000 places.
    """
    dispatch = {code: flat_only(load) if code in b"t\x85\x86\x87" else load     # the four opcodes of tuples
                for code, load in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]}

    def find_class(self, module, name):
        if (module, name) == ("collections", "OrderedDict"):
            return lambda: {}
        if (module, name) == ("collections", "defaultdict"):
            return lambda factory=None: {}
        if module in ("builtins", "__builtin__") and name in FACTORIES:
            return None                                             # nobody calls it
        if (module, name) == ("numpy", "dtype"):
            return ScalarType
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "scalar":
            return lambda kind, data: np.frombuffer(data, kind.name).item()
        if (module, name) == ("_codecs", "encode"):                 # how protocol 2 spells bytes
            return lambda text, _: text.encode("latin-1")
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed in it")


def geodesic(a, b):
    """Metres between two (latitude, longitude) points in degrees, on the WGS-84 ellipsoid; for up to a kilometre."""
    latitude = math.radians((a[0] + b[0]) / 2)
    w = 1 - 0.00669437999014 * math.sin(latitude) ** 2
    north = 6378137.0 * (1 - 0.00669437999014) / w ** 1.5 * math.radians(b[0] - a[0])
    return math.hypot(north, 6378137.0 / math.sqrt(w) * math.cos(latitude) * math.radians(b[1] - a[1]))


def read_point(value, where="a key"):
    """(latitude, longitude) from a list of two numbers in degrees; ValueError says where there is none."""
    if not (isinstance(value, list) and len(value) == 2
            and all(type(x) in (int, float) and abs(x) <= 180 for x in value)):
        raise ValueError(f"{where}: expected latitude and longitude, got {str(value)[:40]}")
    return float(value[0]), float(value[1])


class Panoramas:
    """The mapping (latitude, longitude) -> panorama, with the nearest one within REACH of any point.

    Every place is entered in its cell of at least REACH by REACH, so that a search looks at nine cells. Distances are
    on a sphere, as in the official code; the first of equals wins.
    """

    def __init__(self, path):
        try:
            mapping = MappingUnpickler(io.BytesIO(path.read_bytes())).load()
            self.ids = {read_point(list(key)): str(pano) for key, pano in mapping.items()
                        if isinstance(key, tuple) and isinstance(pano, (str, int))}
            if not self.ids or len(self.ids) < len(mapping):
                raise ValueError("it is empty or holds something else")
        except Exception as error:   # a broken pickle can raise anything
            reason = error if isinstance(error, (OSError, ValueError, pickle.UnpicklingError)) else "a broken pickle"
            raise ValueError(f"{path}: not a dict of (latitude, longitude) -> panorama: {reason}") from None
        self.lat_cell = math.degrees(REACH / 6.3e6)
        self.lon_cell = self.lat_cell / max(0.01, min(math.cos(math.radians(lat)) for lat, _ in self.ids))
        self.places, self.cells = list(self.ids), defaultdict(list)
        for number, place in enumerate(self.places):
            self.cells[self.cell(*place)].append(number)

    def cell(self, lat, lon):
        return int(lat // self.lat_cell), int(lon // self.lon_cell)

    def nearest(self, point):
        """The place nearest to `point` that has a panorama, or None if none is within reach."""
        if point in self.ids:
            return point
        lat, lon = map(math.radians, point)
        best, found = math.sin(REACH / 6371e3 / 2) ** 2, None
        row, column = self.cell(*point)
        around = itertools.product((row - 1, row, row + 1), (column - 1, column, column + 1))
        for number in sorted(number for cell in around for number in self.cells.get(cell, ())):
            place = self.places[number]
            lat2, lon2 = math.radians(place[0]), math.radians(place[1])
            haversine = (math.sin((lat2 - lat) / 2) ** 2
                         + math.cos(lat) * math.cos(lat2) * math.sin((lon2 - lon) / 2) ** 2)
            if haversine < best:
                best, found = haversine, place
        return found


@dataclass(frozen=True)
class Route:
    """One route: k milestones, k + 1 points (start, turning points, destination), and what may lie between them."""
    init_heading: int    # degrees; 0 means random
    headings: tuple      # (k,) degrees, of the legs
    directions: tuple    # (k,) the same as compass words
    landmarks: tuple     # (k,) what is said on arrival at points 1..k; "" where there is no landmark
    panos: tuple         # (k + 1,) panorama of each point
    between: tuple       # (k,) of each leg: () if it is too short, else POINTS_PER_LEG panoramas, None where no place fits


@dataclass(frozen=True)
class Position:
    """One place on the rail: what is seen there, what the expert does, which instruction is current."""
    kind: str                    # "turn", "forward" or "stop"
    action: str                  # the expert's, by the rule in force
    pano: str
    heading: int                 # degrees: where the agent looks
    sentence: str                # the current instruction
    landmark: str = ""           # "Aldo Cafe is on your left", or "" if there is none
    intersection: bool = False
    other_action: str = ""       # the action by the other rule, where it is another

    @property
    def landmark_name(self):
        """The name alone: "The destination Aldo Cafe is on your left" -> "Aldo Cafe"."""
        return self.landmark.removeprefix("The destination ").split(" is on your ")[0]


# A field, or the end of a block. A value ends at a quote that ends its line or the block, so that one with a brace or a
# line break in it, as names have them, is read whole; a quote that is missing takes no other field in.
MILESTONE = re.compile(r"""
    (?<![^\n{}]) [ \t]* ["']?(\w+)["']? [ \t]* : [ \t]*
    (?: (["']) ( (?: (?! \n [ \t]* "\w+"[ \t]*: ) . ){0,500}? ) \2  |  ([^\n}]*?) )
    (?= [ \t\r,]* (?: [\n}] | \Z ) )
    | }""", re.VERBOSE | re.DOTALL)


def parse_milestones(text):
    """The blocks of `milestone_info` as a list of dicts: `{`, lines of "key": "value", and `}` (virl data format)."""
    blocks, fields = [], {}
    for key, quote, quoted, bare in MILESTONE.findall(text + "}"):
        if key:
            value = quoted if quote else bare.strip().strip("\"'")
            fields[key] = " ".join(line.strip() for line in value.splitlines())
        elif fields:
            blocks.append(fields)
            fields = {}
    return blocks


def read_key(record, path, where):
    """record["a"]["b"] for the path "a.b"; ValueError names the key that is missing."""
    for key in path.split("."):
        if not isinstance(record, dict) or key not in record:
            raise ValueError(f"{where}: key {path!r} is missing")
        record = record[key]
    return record


def read_route(record, panoramas, where):
    """A Route from one record of route_infos.json; ValueError names file, route and key."""
    start = read_point(read_key(record, "start_place.relocated_geocode", where), f"{where}, relocated_geocode")
    geocodes = read_key(record, "route_results.geocode_list", where)
    if not isinstance(geocodes, list) or not geocodes:
        raise ValueError(f"{where}, key 'geocode_list': expected a list of points")
    points = [start] + [read_point(value, f"{where}, geocode_list {i}") for i, value in enumerate(geocodes)]
    text, init_heading = read_key(record, "milestone_info", where), record.get("init_heading", 0)
    blocks = parse_milestones(text) if isinstance(text, str) else []
    if len(blocks) != len(geocodes):
        raise ValueError(f"{where}: {len(blocks)} blocks in 'milestone_info', {len(geocodes)} points in 'geocode_list'")
    if type(init_heading) not in (int, float) or init_heading not in range(-360, 361):
        raise ValueError(f"{where}, key 'init_heading': expected whole degrees, got {init_heading!r}")
    legs = []
    for i, block in enumerate(blocks):
        heading = re.fullmatch(r"(-?\d{1,3}) \((\w+)\)", block.get("to_next_intersection_heading", ""))
        if heading is None or heading[2] not in COMPASS:
            raise ValueError(f"{where}, 'milestone_info' block {i}: key 'to_next_intersection_heading' must read like "
                             f"'212 (southwest)', got {block.get('to_next_intersection_heading')!r}")
        legs.append((int(heading[1]), heading[2], block.get("landmarks", NO_LANDMARK).replace(NO_LANDMARK, "")))
    nearest, ids = (panoramas.nearest, panoramas.ids) if panoramas else (lambda point: point, defaultdict(str))
    panos, between, previous = [], [], start
    for i, point in enumerate(points):                              # the first leg has no length and so no places
        length = geodesic(previous, point)                          # before the point is moved to its panorama
        place = nearest(point)
        if place is None:
            raise ValueError(f"{where}, {f'geocode_list {i - 1}' if i else 'relocated_geocode'}: no panorama within "
                             f"{REACH:g} m of {point}")
        fitting = []
        # The last place is the point itself and never fits; but a rail draws for it, as in the official code.
        for number in range(1, POINTS_PER_LEG + 1) if length > SHORT_LEG else ():
            share = number / POINTS_PER_LEG
            wanted = tuple(p * (1 - share) + q * share for p, q in zip(previous, place))
            found = nearest(wanted)
            apart = found and geodesic(previous, found) > SPACING and geodesic(place, found) > SPACING
            fitting.append(ids[found] if apart else None)
        panos.append(ids[place])
        between.append(tuple(fitting))
        previous = place
    return Route(int(init_heading), *map(tuple, zip(*legs)), tuple(panos), tuple(between[1:]))


def find_folder(root, data):
    """The folder of a data set; ValueError if `root` has none."""
    names = FOLDERS[data]
    for name in names if root else ():
        if Path(root, name).is_dir():
            return Path(root, name)
    raise ValueError(f"root {str(root)!r}: V-IRL needs a folder that holds {' or '.join(names)}; "
                     "data/synthetic_city.py makes one")


@lru_cache(maxsize=8)
def load_routes(folder, vision):
    """The routes of a data folder; ValueError names file, route and key of what is wrong with it.

    Without a mapping file the rail uses the points as they are, which is enough for words. With `vision` every
    panorama that a rail may visit must be there, twice as wide as high.
    """
    path, panoramas = folder / "route_infos.json", None
    try:
        routes, _ = json.loads(path.read_text(encoding="utf-8"))
        records = list(routes)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: expected [routes, cursor]: {error}") from None
    if (folder / "gps_pano_mapping.pkl").is_file() or vision:
        panoramas = Panoramas(folder / "gps_pano_mapping.pkl")
    routes = [read_route(record, panoramas, f"{path}, route {i}") for i, record in enumerate(records)]
    if not routes:
        raise ValueError(f"{path}: holds no route")
    checked = set()
    for i, route in enumerate(routes if vision else ()):
        for pano in {*route.panos, *itertools.chain(*route.between)} - checked - {None}:
            checked.add(pano)
            for file in (picture := folder / "street_views" / f"{pano}.jpg", picture.with_suffix(".metadata.json")):
                if not file.is_file():
                    raise ValueError(f"{path}, route {i}: {file} is missing; a city made with --no-pictures "
                                     "is for words only")
            check_panorama(picture), read_rotation(picture)
    return routes


# ---- V-IRL: views ------------------------------------------------------------------------------------------

def check_panorama(path):
    """ValueError if a file is no picture twice as wide as high; it is decoded only if it is shown turned."""
    try:
        with Image.open(path) as picture:
            width, height = open_picture(path).size if is_turned(picture) else picture.size
    except Exception as error:   # a broken file can raise anything
        raise ValueError(f"{path}: not a picture: {error}") from None
    if width != 2 * height:
        raise ValueError(f"{path}: a panorama must be twice as wide as high, not {width}x{height}")


def read_rotation(path):
    """The rotation of a panorama in degrees, from the metadata beside it."""
    path = path.with_suffix(".metadata.json")
    try:
        rotation = float(json.loads(path.read_text())["rotation"])
    except (OSError, ValueError, TypeError, LookupError, OverflowError, RecursionError):
        rotation = math.nan
    if not math.isfinite(rotation):
        raise ValueError(f"{path}: expected a JSON object with a number 'rotation', in degrees")
    return rotation


@lru_cache(maxsize=64)
def read_panorama(path):
    """(the panorama (H, W), the four bytes of a pixel as one number; its rotation in degrees)."""
    check_panorama(path)
    pixels = np.asarray(open_picture(path).convert("RGBX"))
    return pixels.view(np.uint32)[..., 0], read_rotation(path)


@lru_cache(maxsize=4)
def view_table(size, width):
    """Where in a panorama of `width` a view of size x size pixels looks that is 90 degrees wide and level.

    Columns in 1/256ths, to which a heading only adds; index of the first pixel of the upper row; weight of the lower
    row in 1/256ths. (size, size) each.
    """
    offset = (np.arange(size) - (size - 1) / 2) / (size / 2)
    u, v = np.meshgrid(offset, offset)                                              # in focal lengths
    x = (np.arctan2(u, 1) / (2 * np.pi) + 0.5) * (width - 1)
    y = (np.arctan2(v, np.hypot(u, 1)) / np.pi + 0.5) * (width // 2 - 1)
    upper = np.minimum(y.astype(np.int32), width // 2 - 2)
    return (x * 256).astype(np.int32), upper * width, ((y - upper) * 256).astype(np.uint16)[..., None]


def crop_view(panorama, rotation, heading, size):
    """The level view (size, size, 3) of 90 degrees towards a compass heading: bilinear, in whole numbers of 8 bits,
    which is several times faster than with floats."""
    width = panorama.shape[1]
    x, row, below = view_table(size, width)
    turn, around = ((heading - 180) % 360 + rotation) % 360, (width - 1) * 256      # 0: towards the centre column
    x = x + int(turn / 360 * around)
    x -= np.where(x >= around, around, 0)
    right, at, flat = (x & 255).astype(np.uint16)[..., None], row + (x >> 8), panorama.reshape(-1)

    def mix(at):
        """Of the pixels at and right of an index, weighted: (size, size, 4), at most 255 * 256."""
        here, beside = (flat.take(index)[..., None].view(np.uint8) for index in (at, at + 1))
        return here * (256 - right) + beside * right

    return (((mix(at) >> 8) * (256 - below) + (mix(at + width) >> 8) * below) >> 8).astype(np.uint8)[..., :3]


@lru_cache(maxsize=64)
def view_grid(path, heading, view_headings, size):
    """Four views as one picture, 2 x 2 with a black line of 5 pixels: the first two above the other two."""
    panorama, rotation = read_panorama(path)
    grid = Image.new("RGB", (2 * size + 5, 2 * size + 5))
    for i, turn in enumerate(view_headings):
        grid.paste(Image.fromarray(crop_view(panorama, rotation, heading + turn, size)),
                   (i % 2 * (size + 5), i // 2 * (size + 5)))
    return grid
