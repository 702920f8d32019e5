"""Makes a city that does not exist, in the file format of the V-IRL data (paper 4.2, B.1).

    python data/synthetic_city.py --out city0                  # 1,000 routes, 140 MB: a minute
    python data/synthetic_city.py --out city0 --no-pictures    # the words only: a second
    python data/synthetic_city.py --out city0 --signs shapes   # boards that a tiny model can read

    city0/train/     --routes routes of city 0            for training, and for tests of the rule
    city0/unseen/    48 more routes of city 0             never trained on
    city0/mini/      cities 1 to 9, two routes each       the visual test: streets and names are
                                                          new; city 1 looks like city 0, the
                                                          others do not

Each folder holds the three things of the released data. It has only the panoramas that a walk
along its routes can visit:

    route_infos.json        [routes, number of routes]; the environment reads "milestone_info"
    gps_pano_mapping.pkl    {(latitude, longitude): panorama id}, in the order of the whole city
    street_views/           {id}.jpg, equirectangular, north in the middle; {id}.metadata.json

A city is a warped grid of streets with a few diagonal avenues. A crossing without diagonals may
have a place, a landmark. The middle of each street has one, a destination. Each place has a board
with its name, at most 4 m wide. The board stands 12 to 16 m from the panorama that announces it,
with no house in between. The four views look ahead, right, back and left, 90 degrees wide each;
no edge between two of them cuts a board.

With --signs there are six kinds of place, and a place is called by its kind, such as Bank. A board
is 7 m wide and shows the white shape of its kind, a disc for a bank. With `--signs shapes` the
colour of the board tells the kind, too, but in city 0 alone. With `--signs any-colour` it tells it
nowhere. Most panoramas between crossings have such a board, 13 m to the right or left, which hangs
for this panorama alone. No other board in a street is of its destination's kind. So whoever walks
along the last street must read them to know where to stop. A route has a further key, "passed":
what is seen at the panoramas between its points.

The same arguments give the same bytes, in any number of processes. Pictures need the same Pillow
for that. Left out: legs that pass a crossing without a milestone.
"""
import argparse
import hashlib
import json
import math
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import sys
import threading
import time
from collections import namedtuple
from dataclasses import dataclass, field
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from zlib import crc32

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont, features
from tqdm import tqdm

# A part of every random stream: raise it when a change moves a street or a name.
CITY_VERSION = 1
GRID, MINI_GRID = 13, 7         # nodes per side of city 0 and of the cities of the mini set
PAVEMENT = 3.0                  # metres from the kerb to the houses
BOARD_WIDTH, BOARD_HEIGHT, BOARD_TOP = 4.0, 2.2, 6.2       # metres
# Of the square boards of --signs; in the streets they stand so far away, on the right or the left.
SIGN_WIDTH, SIGN_TOP, SIGN_METRES = 7.0, 7.0, 13.0
SIGN_KINDS = ("names", "shapes", "any-colour")
EARTH = 6371e3                  # radius for the haversine formula, metres
EQUATOR, ECCENTRICITY2 = 6378137.0, 0.00669438              # of WGS84
INTERPOLATION = 5               # the environment tries points at 1/5 to 4/5 of every leg
RELOCATION = 20.0               # and moves them to the nearest panorama within so many metres
QUALITY = 75                    # of the JPEG pictures
COMPASS = ("north", "northeast", "east", "southeast", "south", "southwest", "west", "northwest")
SIDES = ("front", "right front", "right", "right behind", "behind", "left behind", "left",
         "left front")

# Where the cities lie: near the paper's, so that latitudes and signs vary as they do there. The
# streets are invented.
ANCHORS = ((40.74, -73.99), (40.84, -73.88), (45.47, 9.19), (28.62, 77.21), (-34.61, -58.39),
           (51.51, -0.12), (22.30, 114.17), (-37.81, 144.96), (6.51, 3.37), (37.77, -122.43))

# The 20 place types of the mini set, how we name them, and the colour of their board.
PLACES = {
    "bank": ("{} Bank", "#1f4e8c"), "restaurant": ("{} Kitchen", "#a33b20"),
    "supermarket": ("{} Market", "#2f7d32"), "bakery": ("{} Bakery", "#9a5b13"),
    "cafe": ("{} Cafe", "#6b4226"), "pharmacy": ("{} Pharmacy", "#00796b"),
    "hospital": ("{} Hospital", "#b71c1c"), "spa": ("{} Spa", "#7b3f9d"),
    "school": ("Old {} School", "#4a5a1f"), "convenience_store": ("{} Mini Mart", "#c2410c"),
    "library": ("{} Library", "#3f3f7f"), "park": ("{} Park", "#1b5e20"),
    "lodging": ("The {} Hotel", "#7a1f4b"), "laundry": ("{} Laundry", "#0b6fa4"),
    "movie_theater": ("{} Cinema", "#8e1538"), "book_store": ("{} & Co Books", "#37474f"),
    "clothing_store": ("{} Tailors", "#5d3a66"), "jewelry_store": ("{} Jewels", "#856404"),
    "gym": ("{} Gym", "#d32f2f"), "bar": ("The {} Tavern", "#263238"),
}
# With --signs the name of a place is its kind, and its board shows a shape. These are the kinds and
# the colours that their boards have in city 0; elsewhere each board has any of SIGN_COLOURS.
SIGNS = {"Bank": "#1f4e8c", "Bakery": "#a35a00", "Hotel": "#8e1563", "Pharmacy": "#1b7a2f",
         "Library": "#b71c1c", "Cafe": "#00707a"}
SIGN_COLOURS = (*SIGNS.values(), "#5b2fa0", "#4a4f1f", "#303030", "#c2410c")
# Shares of a board's side, which is square: the corners of what is painted, or a disc's box.
SIGN_SHAPES = {
    "Bank": [("disc", .15, .15, .85, .85)],                                      # a coin
    "Bakery": [("disc", .1, .1, .9, .9), ("hole", .32, .32, .68, .68)],          # a ring
    "Hotel": [("area", .5, .1, .92, .88, .08, .88)],                             # a roof
    "Pharmacy": [("area", .38, .1, .62, .1, .62, .9, .38, .9),                   # a cross
                 ("area", .1, .38, .9, .38, .9, .62, .1, .62)],
    "Library": [("area", .1, .1, .9, .1, .9, .28, .1, .28),                      # three books
                ("area", .1, .41, .9, .41, .9, .59, .1, .59),
                ("area", .1, .72, .9, .72, .9, .9, .1, .9)],
    "Cafe": [("area", .1, .1, .5, .1, .5, .5, .1, .5),                           # a tablecloth
             ("area", .5, .5, .9, .5, .9, .9, .5, .9)],
}
# The syllables of invented names: the root of a name has one of each.
ONSETS = "B Br C Cr D Dr F Fl G Gr H K Kl L M N P Pl R S St T Tr V".split()
NUCLEI = "a e i o u ai ea ie oa ou".split()
CODAS = "b d l ld m n nd r rn st".split()
TAILS = "a en er ie in o ow um y yl".split()


# ---- Drawing lots and measuring ------------------------------------------------------------------

def stream(*tag):
    """A random generator for one purpose: a further draw from it leaves all others as they were."""
    return random.Random("|".join(map(str, ("city", CITY_VERSION, *tag))))


def between(rng, low, high):
    # Only .random() is promised to stay the same across Pythons.
    return low + (high - low) * rng.random()


def pick(rng, items):
    return items[int(rng.random() * len(items))]


def make_id(*tag):
    return hashlib.sha256("|".join(map(str, (CITY_VERSION, *tag))).encode()).hexdigest()[:22]


def direction(a, b):
    """Degrees clockwise from north of the line a -> b, both (east, north) in metres."""
    return math.degrees(math.atan2(b[0] - a[0], b[1] - a[1])) % 360


def ahead(point, heading, metres):
    """Where one stands after walking `metres` with this heading."""
    east = point[0] + metres * math.sin(math.radians(heading))
    north = point[1] + metres * math.cos(math.radians(heading))
    return east, north


def bearing(a, b):
    """Degrees clockwise from north of the great circle a -> b, both (latitude, longitude)."""
    lat_a, lat_b, east = math.radians(a[0]), math.radians(b[0]), math.radians(b[1] - a[1])
    x = math.cos(lat_a) * math.sin(lat_b) - math.sin(lat_a) * math.cos(lat_b) * math.cos(east)
    return math.degrees(math.atan2(math.sin(east) * math.cos(lat_b), x)) % 360


def haversine(a, b):
    """Metres between two (latitude, longitude), as the environment measures to relocate a point.

    metres = 2 EARTH asin(sqrt(sin(dlat / 2)^2 + cos(lat_a) cos(lat_b) sin(dlon / 2)^2))
    """
    lat_a, lat_b, east = math.radians(a[0]), math.radians(b[0]), math.radians(b[1] - a[1])
    across = math.cos(lat_a) * math.cos(lat_b) * math.sin(east / 2) ** 2
    h = math.sin((lat_b - lat_a) / 2) ** 2 + across
    return 2 * EARTH * math.asin(math.sqrt(h))


def turn_between(old, new):
    """The turn from one heading to another, -180 to 180 degrees."""
    return (new - old + 180) % 360 - 180


def nearest_of(words, degrees):
    """One of eight words of 45 degrees each, the first centred on 0; the earlier one wins a tie."""
    return min((abs(turn_between(45 * i, degrees)), i, word) for i, word in enumerate(words))[2]


# ---- The city ------------------------------------------------------------------------------------

@dataclass
class Place:
    name: str
    kind: str
    at: tuple            # (east, north) of its board
    pano: int            # the panorama that announces it
    key: str
    sign: str = ""       # with --signs: the colour of the board


@dataclass
class Street:
    ends: tuple          # two node numbers
    half: float          # metres from the middle to the kerb
    diagonal: bool
    panos: list = field(default_factory=list)     # those inside, from the first end to the second
    place: Place = None
    passed: list = field(default_factory=list)    # with --signs: places beside the destination


class City:
    """Streets, panoramas and places of one city.

    `panos` has (east, north) in metres of each panorama. The first `num_nodes` of them are the
    nodes: the crossings and corners where streets end. `signs` is one of SIGN_KINDS.
    """

    def __init__(self, seed, number, signs="names"):
        self.seed, self.number, self.signs = seed, number, signs
        self.lat, self.lon = ANCHORS[number]
        # Metres per degree at the anchor.
        w2 = 1 - ECCENTRICITY2 * math.sin(math.radians(self.lat)) ** 2
        self.per_lat = math.radians(EQUATOR * (1 - ECCENTRICITY2) / w2 ** 1.5)
        self.per_lon = math.radians(EQUATOR / math.sqrt(w2) * math.cos(math.radians(self.lat)))
        self.build_streets(stream("streets", seed, number), GRID if number == 0 else MINI_GRID)
        self.build_panos()
        if signs == "names":
            self.build_places(stream("places", seed, number))
        else:
            self.build_places(stream("signs", seed, number))
            self.build_passed(stream("passed", seed, number))
        self.legs = {}

    def build_streets(self, rng, n):
        """An uneven grid, turned a little, and four diagonal avenues across its cells."""
        lines = [[0.0], [0.0]]
        for line in lines:
            while len(line) < n:
                line.append(line[-1] + between(rng, 72, 88))
        tilt = math.radians(between(rng, -8, 8))
        self.panos = []
        for y in lines[1]:
            for x in lines[0]:
                self.panos.append((x * math.cos(tilt) + y * math.sin(tilt),
                                   y * math.cos(tilt) - x * math.sin(tilt)))
        self.num_nodes = n * n
        avenues = [(row * n + i, (row + 1) * n + i) for row in range(n - 1) for i in range(n)]
        crossing = [(row * n + i, row * n + i + 1) for row in range(n) for i in range(n - 1)]
        cells = {}                                # at most one diagonal per cell
        for chain in range(4):
            rising, shift = chain % 2, int(between(rng, -n / 3, n / 3))
            for i in range(n - 1):
                row = i + shift if rising else n - 2 - i + shift
                if 0 <= row < n - 1:
                    corner = row * n + i
                    ends = (corner, corner + n + 1) if rising else (corner + n, corner + 1)
                    cells.setdefault((row, i), ends)
        self.streets = [Street(ends, half=7.0, diagonal=False) for ends in avenues]
        self.streets += [Street(ends, half=5.0, diagonal=False) for ends in crossing]
        self.streets += [Street(ends, half=6.0, diagonal=True) for ends in cells.values()]
        self.around = [[] for _ in range(self.num_nodes)]      # node -> (street, its other node)
        for street in self.streets:
            a, b = street.ends
            self.around[a].append((street, b))
            self.around[b].append((street, a))

    def build_panos(self):
        """A panorama at every node and about every 10 m of every street; a table to find them by.

        None stands within 15 m of a node: a picture from there looks like the crossing, but the
        environment does not count it as one.
        """
        for street in self.streets:
            a, b = (self.panos[node] for node in street.ends)
            steps = round(math.dist(a, b) / 10)
            for i in range(2, steps - 1):
                street.panos.append(len(self.panos))
                self.panos.append(tuple(p + (q - p) * i / steps for p, q in zip(a, b)))
        self.geocodes = [self.geocode(point) for point in self.panos]
        self.ids = [make_id("pano", self.seed, self.number, i) for i in range(len(self.panos))]
        # Squares of 20 m: what lies within 20 m of a point is in its square or a neighbour.
        self.squares = {}
        for i, (x, y) in enumerate(self.panos):
            self.squares.setdefault((x // RELOCATION, y // RELOCATION), []).append(i)

    def build_places(self, rng):
        """Landmarks at some crossings without diagonals; a destination in each street."""
        names = self.names(rng)
        self.landmarks = [None] * self.num_nodes
        for node, around in enumerate(self.around):
            if any(street.diagonal for street, _ in around) or rng.random() >= 0.6:
                continue
            ways = [direction(self.panos[node], self.panos[other]) for _, other in around]
            # Headings that no street goes on with: straight on where a street ends.
            ends = []
            for way in ways:
                if all(abs(turn_between(way + 180, other)) > 45 for other in ways):
                    ends.append(way + 180)
            if ends and rng.random() < 0.5:
                heading = pick(rng, ends) + between(rng, -15, 15)
            else:
                # 30 degrees beside a street: inside the view along it.
                heading = pick(rng, ways)
                # A wider board stands nearer to the street: no edge between views cuts it.
                beside = between(rng, 27, 33 if self.signs == "names" else 30)
                heading += beside if rng.random() < 0.5 else -beside
            self.landmarks[node] = self.new_place(rng, names, node, heading, 13.5, 15.5)
        for street in self.streets:
            middle = street.panos[len(street.panos) // 2]
            a, b = street.ends
            side = direction(self.panos[a], self.panos[b])
            side += 90 if rng.random() < 0.5 else -90
            if self.signs != "names":
                street.place = self.new_sign(rng, pick(rng, list(SIGNS)), middle, side, SIGN_METRES)
                continue
            heading = side + between(rng, -30, 30)
            street.place = self.new_place(rng, names, middle, heading, 12.5, 15)

    def build_passed(self, rng):
        """Most other panoramas of a street have a place, too. None is of the destination's kind."""
        for street in self.streets:
            a, b = (self.panos[node] for node in street.ends)
            kinds = [kind for kind in SIGNS if kind != street.place.kind]
            for pano in street.panos:
                if pano != street.place.pano and rng.random() < 0.75:
                    side = direction(a, b) + (90 if rng.random() < 0.5 else -90)
                    street.passed.append(
                        self.new_sign(rng, pick(rng, kinds), pano, side, SIGN_METRES))

    def new_place(self, rng, names, pano, heading, least, most):
        if self.signs != "names":
            metres = between(rng, least, most)
            return self.new_sign(rng, pick(rng, list(SIGNS)), pano, heading, metres)
        kind = pick(rng, list(PLACES))
        name = PLACES[kind][0].format(next(names))
        at = ahead(self.panos[pano], heading, between(rng, least, most))
        return Place(name, kind, at, pano, make_id("place", self.seed, self.number, name))

    def new_sign(self, rng, kind, pano, heading, metres):
        """A place that is called by its kind."""
        colour = pick(rng, SIGN_COLOURS)
        if self.signs == "shapes" and self.number == 0:
            colour = SIGNS[kind]
        key = make_id("sign", self.seed, self.number, pano)
        at = ahead(self.panos[pano], heading, metres)
        return Place(kind, kind, at, pano, key, colour)

    def names(self, rng):
        """Invented roots in random order. Each belongs to one city number: no two share a name."""
        roots = [a + b + c + d for a in ONSETS for b in NUCLEI for c in CODAS for d in TAILS]
        roots = [root for root in roots if crc32(root.encode()) % 16 == self.number]
        while roots:
            yield roots.pop(int(rng.random() * len(roots)))

    def geocode(self, point):
        """(latitude, longitude) of a point (east, north)."""
        east, north = point
        return round(self.lat + north / self.per_lat, 7), round(self.lon + east / self.per_lon, 7)

    def relocate(self, geocode):
        """The nearest panorama within 20 m, or None; of two equally near ones the first."""
        x = (geocode[1] - self.lon) * self.per_lon // RELOCATION
        y = (geocode[0] - self.lat) * self.per_lat // RELOCATION
        near = []                                 # (metres, panorama)
        for dx in (-1, 0, 1):
            for dy in (-1, 0, 1):
                for i in self.squares.get((x + dx, y + dy), ()):
                    near.append((haversine(geocode, self.geocodes[i]), i))
        metres, pano = min(near, default=(RELOCATION, None))
        return pano if metres < RELOCATION else None

    def leg(self, a, b):
        """Every panorama that the environment may visit between two panoramas, both included.

        The environment drops candidates that are near an end. They belong here, too: without them
        in the mapping the same point would be moved somewhere else.
        """
        if (a, b) not in self.legs:
            found = [a]
            for step in range(1, INTERPOLATION):
                share = step / INTERPOLATION
                ends = zip(self.geocodes[a], self.geocodes[b])
                pano = self.relocate(tuple(p * (1 - share) + q * share for p, q in ends))
                if pano is not None:
                    found.append(pano)
            self.legs[a, b] = [*found, b]
        return self.legs[a, b]


# ---- Routes --------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Route:
    """A way through a city."""
    points: tuple        # panorama numbers: the start, the turning points (nodes), the destination
    first: Street        # the street of the start
    last: Street         # the street of the destination


def draw_route(city, rng, turning_points, longest=math.inf):
    """A route from inside a street to its end, and on until it has as many turning points as drawn.

    It turns by 20 to 150 degrees at each node, and visits no node twice. A route that cannot go on,
    or is longer than `longest` metres, is given up and another one begun.
    """
    while True:
        first = pick(rng, city.streets)
        start = pick(rng, first.panos)
        back, node = first.ends if rng.random() < 0.5 else first.ends[::-1]
        num_nodes = pick(rng, turning_points)
        points, seen = [start, node], {back, node}
        while True:
            heading = direction(city.panos[points[-2]], city.panos[node])
            ways = []
            for street, other in city.around[node]:
                turn = turn_between(heading, direction(city.panos[node], city.panos[other]))
                if other not in seen and 20 <= abs(turn) <= 150:
                    ways.append((street, other))
            if not ways:
                break
            street, other = pick(rng, ways)
            if len(points) <= num_nodes:
                node = other
                points.append(node)
                seen.add(node)
                continue
            points.append(street.place.pano)
            legs = zip(points, points[1:])
            if sum(math.dist(city.panos[a], city.panos[b]) for a, b in legs) <= longest:
                return Route(tuple(points), first, street)
            break


def draw_routes(city, num, turning_points, longest=math.inf):
    """`num` different routes. Route i is the same however many are drawn."""
    routes, known = [], set()
    while len(routes) < num:
        rng = stream("route", city.seed, city.number, len(routes))
        while (route := draw_route(city, rng, turning_points, longest)).points in known:
            pass
        known.add(route.points)
        routes.append(route)
    return routes


def place_entry(city, place, street_point):
    """A place as the released file describes it, reached from the panorama `street_point`."""
    rng = stream("reviews", place.key)
    return {"name": place.name, "geocode": list(city.geocode(place.at)),
            "rating": round(between(rng, 3, 5), 1), "place_id": place.key,
            "distance": round(math.dist(place.at, city.panos[street_point]), 2),
            "n_reviews": int(10 ** between(rng, 1, 3.5)),
            "heading": round(direction(city.panos[street_point], place.at), 1),
            "photo_reference": "", "place_types": [place.kind], "plus_code": {},
            "vicinity": f"city {city.number}", "region": f"city {city.number}",
            "relocated_geocode": list(city.geocodes[street_point])}


def side_of(city, place, pano, heading):
    """Where a place is for somebody who arrives at a panorama with this heading: one of SIDES."""
    return nearest_of(SIDES, bearing(city.geocodes[pano], city.geocode(place.at)) - heading)


def route_entry(city, route):
    """One object of route_infos.json. Its milestones tell what is seen on arrival at each point."""
    milestones, heading = "", 0
    landmarks, words, distances = [], [], []
    for i, (a, b) in enumerate(zip(route.points, route.points[1:]), start=1):
        arriving = int(bearing(city.geocodes[a], city.geocodes[b]))
        words.append(nearest_of(COMPASS, arriving))
        distances.append(round(math.dist(city.panos[a], city.panos[b])))
        if i == len(route.points) - 1:
            place = route.last.place
            seen = f"The destination {place.name} is on your {side_of(city, place, b, arriving)}"
        elif (place := city.landmarks[b]) is None:
            seen = "No landmark nearby"
            landmarks.append(None)
        else:
            side = side_of(city, place, b, arriving)
            seen = f"{place.name} is on your {side}"
            landmarks.append({**place_entry(city, place, b), "spatial_relation": side,
                              "expression": seen})
        block = {"intersection_idx": i, "landmarks": seen, "distance": f"{distances[-1]} meters",
                 "human_heading": heading,
                 "to_next_intersection_heading": f"{arriving} ({words[-1]})"}
        lines = "".join(f'"{key}": "{value}",\n' for key, value in block.items())
        milestones += "\n{\n" + lines + "}\n"
        heading = arriving
    seconds = [round(metres / 1.4) for metres in distances]      # at walking pace
    instructions = [f"Head {word} for {metres} meters" for word, metres in zip(words, distances)]
    results = {"geocode_list": [list(city.geocodes[pano]) for pano in route.points[1:]],
               "polyline": [],
               "instructions": instructions,
               "distance_list": distances,
               "time_list": seconds,
               "time": sum(seconds),
               "distance": sum(distances),
               "n_landmarks": sum(mark is not None for mark in landmarks),
               "landmark_list": landmarks}
    return {"dest_place": place_entry(city, route.last.place, route.points[-1]),
            "start_place": place_entry(city, route.first.place, route.points[0]),
            "route_results": results,
            "init_heading": 0,
            "instruction": f"Walk to {route.last.place.name}.",
            "milestone_info": milestones,
            **passed_entry(city, route)}


def passed_entry(city, route):
    """{"passed": {panorama: what is seen there}} of the places between a route's points, if any.

    Only --signs makes such places. The released files do not have this key.
    """
    places = {place.pano: place for street in city.streets for place in street.passed}
    if not places:
        return {}
    places |= {street.place.pano: street.place for street in city.streets}
    told = {}
    for a, b in zip(route.points, route.points[1:]):
        arriving = int(bearing(city.geocodes[a], city.geocodes[b]))
        for pano in city.leg(a, b)[1:-1]:
            if pano in places and pano != b:
                side = side_of(city, places[pano], pano, arriving)
                told[city.ids[pano]] = f"{places[pano].name} is on your {side}"
    return {"passed": told}


def visited(city, routes):
    """The panoramas that walks along these routes can visit, in the order of the city."""
    panos = set()
    for route in routes:
        for a, b in zip(route.points, route.points[1:]):
            panos.update(city.leg(a, b))
    return sorted(panos)


# ---- What stands in the streets ------------------------------------------------------------------

EYE = 2.6                       # metres from the ground to the camera
NEAR = 0.4                      # nearer parts of a piece are clipped
# Up to how many metres walls, road markings, windows and boards are painted.
FAR, MARKS_FAR, WINDOWS_FAR, BOARDS_FAR = 130.0, 50.0, 45.0, 40.0

# A tree of one metre that faces the camera, (sideways, up): a trunk, a crown of three pieces.
TREE = np.array([[(-.05, 0), (.05, 0), (.05, .5), (-.05, .5)],
                 [(-.18, .35), (.18, .35), (.36, .52), (-.36, .52)],
                 [(-.36, .52), (.36, .52), (.36, .78), (-.36, .78)],
                 [(-.36, .78), (.36, .78), (.18, 1), (-.18, 1)]])
TRUNK = "#5a4632"

Palette = namedtuple("Palette", "sky horizon ground road walk mark walls window leaves heights "
                     "trees bars panes board")
# The looks of cities 0 and 1, then of each of the cities 2 to 9. `heights` are those of houses,
# `trees` is their share, `bars` the spacing of the zebra, `panes` spacing and width of windows.
# `board` says how a name is written: on colour (plain, framed) or in colour on white (reverse).
PALETTES = (
    Palette("#5b9bd5", "#dbe9f4", "#8fa36b", "#4f5256", "#b5b1a8", "#e8e8e8",
            "#a65f46 #c8a27a #8d7b6c #b98b6a #d9c7a8", "#3b4a5a", "#4c7a3a", (9, 18), 0.5, 1.1,
            (3.0, 1.3), "plain"),
    Palette("#e8b26a", "#f8e7c6", "#c9b184", "#6b5d52", "#d8c3a0", "#fff3c4",
            "#e3b778 #d89a5b #f0d3a0 #c98550 #e9c79b", "#6b3f24", "#7d8a3c", (6, 11), 0.2, 1.5,
            (3.8, 1.0), "reverse"),
    Palette("#8f9aa6", "#c3c8cc", "#6f7568", "#33363a", "#8d9092", "#f4f4f4",
            "#7d8287 #999c9e #6a6e75 #aeb0ae #878b84", "#d7c98a", "#3d5240", (14, 28), 0.15, 0.9,
            (2.2, 1.2), "framed"),
    Palette("#38b6c9", "#d5f5ee", "#6dbb5a", "#5d5a66", "#e6dccb", "#ffffff",
            "#f28b82 #fbc15e #7fc8a9 #f3e08b #8ea9e8", "#fdfdfd", "#2e8b57", (6, 10), 0.7, 1.3,
            (3.4, 1.5), "plain"),
    Palette("#2b2f55", "#d9765f", "#4a4552", "#2a2833", "#5c5666", "#e0c060",
            "#4d4668 #5b4a5f #3f4a6b #6a5468 #50506a", "#ffd166", "#2f4036", (10, 22), 0.3, 1.1,
            (2.6, 1.4), "framed"),
    Palette("#d4dde6", "#f4f6f8", "#eef1f3", "#8a8f96", "#d6dade", "#f2c230",
            "#8c4a3c #b0624d #71413a #c9b8a6 #9a5a48", "#2c3440", "#6f8578", (8, 14), 0.4, 1.0,
            (3.0, 1.1), "reverse"),
    Palette("#79c2f2", "#eaf7ff", "#b8a070", "#7a4f3d", "#c98f6c", "#f5e6c8",
            "#f5f5f0 #e9edf2 #fdfaf0 #dfe7ec #f1e9de", "#2a62a8", "#5c8a3e", (5, 9), 0.35, 1.4,
            (4.2, 1.2), "plain"),
    Palette("#9fc59b", "#e6f0d8", "#4e7d46", "#3e4a44", "#9fae94", "#ffe14d",
            "#5f8a6d #88a878 #3f6f63 #b7c29a #6e9486", "#16302b", "#1f6b3a", (10, 16), 0.9, 0.9,
            (2.8, 1.6), "framed"),
    Palette("#b79ad9", "#f3e3f2", "#8d8aa0", "#565068", "#c9bfd6", "#ffffff",
            "#b56fa0 #8f6fb5 #d59bc0 #6f7fc2 #c7a8dc", "#fff2a8", "#8a4f7d", (7, 20), 0.5, 1.2,
            (3.2, 1.7), "reverse"),
)


def rgb(*colours):
    return np.array([ImageColor.getrgb(colour) for colour in colours], float)


def rectangle(point, heading, near, far, left, right):
    """Corners of a rectangle `near` to `far` metres ahead of a point, anticlockwise."""
    return [ahead(ahead(point, heading, along), heading + 90, across)
            for along, across in ((near, left), (near, right), (far, right), (far, left))]


def overlap(p, q):
    """Whether two convex polygons share more than an edge.

    If they do not, the line along some side of one of them has the other on its far side.
    """
    for corners in (p, q):
        for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1]):
            of_p = [(x1 - x0) * (y - y0) - (y1 - y0) * (x - x0) for x, y in p]
            of_q = [(x1 - x0) * (y - y0) - (y1 - y0) * (x - x0) for x, y in q]
            if max(of_p) <= min(of_q) or max(of_q) <= min(of_p):
                return False
    return True


def board_ends(point, place, more=0.0):
    """Left and right end of a board, and `more` metres beyond; it faces whoever looks at it."""
    half = (SIGN_WIDTH if place.sign else BOARD_WIDTH) / 2 + more
    across = direction(point, place.at) + 90
    return [ahead(place.at, across, -half), ahead(place.at, across, half)]


@lru_cache(maxsize=None)
def paint_sign(kind, colour, side=240):
    """A square board with the shape of a kind of place, in white."""
    picture = Image.new("RGB", (side, side), colour)
    draw = ImageDraw.Draw(picture)
    for what, *shares in SIGN_SHAPES[kind]:
        corners = [round(share * side) for share in shares]
        if what == "area":
            draw.polygon(corners, fill="white")
        else:
            draw.ellipse(corners, fill=colour if what == "hole" else "white")
    return picture


class Scene:
    """All there is to see in a city, as flat pieces of four corners."""

    def __init__(self, city):
        self.city, self.palette = city, PALETTES[max(city.number - 1, 0)]
        self.places = [place for place in city.landmarks if place]
        self.places += [street.place for street in city.streets]
        self.places += [place for street in city.streets for place in street.passed]
        self.windows, self.boards = {}, {}         # both filled as they are seen
        self.lay_streets()
        self.build_houses(stream("houses", city.seed, city.number))
        self.plant_trees(stream("trees", city.seed, city.number))

    def lay_streets(self):
        """Pavements, then roads, then markings: in the order in which they are painted."""
        walks, roads, marks, palette = [], [], [], self.palette
        for street in self.city.streets:
            for node, other in (street.ends, street.ends[::-1]):       # half of it from each end
                point, half = self.city.panos[node], street.half
                out = direction(point, self.city.panos[other])
                middle = math.dist(point, self.city.panos[other]) / 2
                corner = 0 if street.diagonal else 12 - half           # the far kerb it runs up to
                side = half + PAVEMENT
                walks.append(rectangle(point, out, -corner - PAVEMENT, middle, -side, side))
                roads.append(rectangle(point, out, -corner, middle, -half, half))
                for along in range(20, int(middle) - 3, 8):
                    marks.append(rectangle(point, out, along, along + 3, -.15, .15))
                # Zebra bars on every way out of a crossing. With diagonals the kerbs part later.
                has_diagonals = any(way.diagonal for way, _ in self.city.around[node])
                near = 14 if has_diagonals else 12.8 - half
                gap = palette.bars
                num = int((2 * half - 0.4) / gap)
                for i in range(num):
                    left, right = gap * (i - num / 2 + .22), gap * (i - num / 2 + .78)
                    marks.append(rectangle(point, out, near, near + 3, left, right))
        layers = np.repeat([0, 1, 2], [len(walks), len(roads), len(marks)])
        self.ground = np.array(walks + roads + marks)                                  # (G, 4, 2)
        self.ground_middle = self.ground.mean(1)
        self.ground_far = np.array([FAR, FAR, MARKS_FAR])[layers]
        self.ground_colours = rgb(palette.walk, palette.road, palette.mark)[layers]

    def build_houses(self, rng):
        """Houses along every street; none in a street, none between a board and its panorama."""
        taken = {}                                # 20 m square -> polygons

        def squares(shape):
            easts, norths = zip(*shape)
            columns = range(int(min(easts) // 20), int(max(easts) // 20) + 1)
            rows = range(int(min(norths) // 20), int(max(norths) // 20) + 1)
            return [(x, y) for x in columns for y in rows]

        def is_free(lot):
            for square in squares(lot):
                if any(overlap(lot, other) for other in taken.get(square, ())):
                    return False
            return True

        def take(shape):
            for square in squares(shape):
                taken.setdefault(square, []).append(shape)

        for street in self.city.streets:
            a, b = (self.city.panos[node] for node in street.ends)
            reach = street.half + PAVEMENT
            take(rectangle(a, direction(a, b), -reach, math.dist(a, b) + reach, -reach, reach))
        for place in self.places:
            point = self.city.panos[place.pano]
            take([point, *board_ends(point, place, more=0.5)[::-1]])
        houses = []                               # (corners, height, wall colour)
        for street in self.city.streets:
            a, b = (self.city.panos[node] for node in street.ends)
            for side in (-1, 1):
                along = 8.0
                while along < math.dist(a, b) - 17:
                    width, front = between(rng, 9, 15), street.half + PAVEMENT + 0.1
                    depth = sorted((side * front, side * (front + between(rng, 10, 14))))
                    lot = rectangle(a, direction(a, b), along, along + width, *depth)
                    if not is_free(lot):
                        along += 2
                        continue
                    take(lot)
                    colour = rgb(pick(rng, self.palette.walls.split()))[0]
                    houses.append((lot, between(rng, *self.palette.heights), colour))
                    along += width + (between(rng, 1, 4) if rng.random() < 0.3 else 0)
        self.lots = [lot for lot, _, _ in houses]
        self.lot_middle = np.array(self.lots).mean(1)
        flat, tops = np.array(self.lots), np.array([height for _, height, _ in houses])
        low = np.concatenate([flat, np.zeros((*flat.shape[:2], 1))], 2)
        high = np.concatenate([flat, np.broadcast_to(tops[:, None, None], (*flat.shape[:2], 1))], 2)
        walls = np.stack([low, np.roll(low, -1, 1), np.roll(high, -1, 1), high], 2)
        self.walls = walls.reshape(-1, 1, 4, 3)                        # four pieces for each house
        self.wall_middle = self.walls[:, 0, :2, :2].mean(1)
        along = self.walls[:, 0, 1, :2] - self.walls[:, 0, 0, :2]
        lengths = np.linalg.norm(along, axis=1, keepdims=True)
        self.wall_out = np.stack([along[:, 1], -along[:, 0]], 1) / lengths
        light = 0.84 + 0.16 * self.wall_out @ (0.6, -0.8)              # the sun is in the southeast
        self.wall_colours = np.repeat([colour for _, _, colour in houses], 4, 0) * light[:, None]

    def plant_trees(self, rng):
        """Trees along the kerbs."""
        trees = []                                                     # (east, north, height)
        for street in self.city.streets:
            a, b = (self.city.panos[node] for node in street.ends)
            for side in (-1, 1):
                for along in range(20, int(math.dist(a, b)) - 17, 9):
                    if rng.random() < self.palette.trees:
                        kerb = ahead(a, direction(a, b), along + between(rng, -2, 2))
                        at = ahead(kerb, direction(a, b) + 90, side * (street.half + 1))
                        trees.append((*at, between(rng, 4.5, 7.5)))
        self.trees = np.array(trees).reshape(-1, 3)

    def panes(self, wall):
        """The windows of a wall, (n, 4, 3)."""
        if wall not in self.windows:
            (a, b, top, _), (spacing, width) = self.walls[wall, 0], self.palette.panes
            length, height = np.linalg.norm(b - a), top[2]
            columns, rows = int(length / spacing), int((height - 0.6) / 3.2)
            windows = np.zeros((rows, columns, 4, 3))
            middle = length * (np.arange(columns)[:, None] + 0.5) / columns
            left = middle + np.array([-1, 1, 1, -1]) * width / 2
            windows[:] = a + left[..., None] * (b - a) / length
            windows[..., 2] = 3.2 * np.arange(rows)[:, None, None] + np.array([1.1, 1.1, 2.7, 2.7])
            self.windows[wall] = windows.reshape(-1, 4, 3)
        return self.windows[wall]

    def pieces(self, point):
        """What is seen from a point, in the order of painting: the ground, then far pieces first.

        Returns corners (n, 4, 3), each east, north and up, and colours (n, 3).
        """
        near = np.linalg.norm(self.ground_middle - point, axis=1) < self.ground_far
        flat = np.concatenate([self.ground[near], np.zeros((near.sum(), 4, 1))], 2)
        shapes, colours = [flat], [self.ground_colours[near]]
        toward = self.wall_middle - point
        wall_metres = np.linalg.norm(toward, axis=1).tolist()
        tree_metres = np.linalg.norm(self.trees[:, :2] - point, axis=1).tolist()
        faces_us = np.einsum("hi,hi->h", self.wall_out, toward) < 0
        seen = []                                 # (metres, is it a tree, its number)
        for i, metres in enumerate(wall_metres):
            if metres < FAR and faces_us[i]:
                seen.append((metres, 0, i))
        for i, metres in enumerate(tree_metres):
            if metres < FAR / 2:
                seen.append((metres, 1, i))
        horizon, window, trunk, leaves = rgb(self.palette.horizon, self.palette.window, TRUNK,
                                             self.palette.leaves)
        for metres, is_tree, i in sorted(seen, reverse=True):
            if is_tree:
                *at, height = self.trees[i]
                across = np.array([at[1] - point[1], point[0] - at[0]]) / metres
                shape = np.concatenate([at + height * TREE[:, :, :1] * across,
                                        height * TREE[:, :, 1:]], 2)
                paint = np.stack([trunk, leaves * 0.8, leaves, leaves * 1.08])
            else:
                shape, paint = self.walls[i], self.wall_colours[i:i + 1]
                if metres < WINDOWS_FAR:
                    shape = np.concatenate([shape, self.panes(i)])
                    paint = np.concatenate([paint, np.tile(window, (len(shape) - 1, 1))])
            shapes.append(shape)
            colours.append(paint + (horizon - paint) * 0.5 * metres / FAR)
        return np.concatenate(shapes), np.concatenate(colours).clip(0, 255).astype(int)

    def in_sight(self, point, place):
        """Whether no house stands between a point and any part of a board."""
        sight, reach = [point, *board_ends(point, place)[::-1]], math.dist(point, place.at) + 12
        near = np.flatnonzero(np.linalg.norm(self.lot_middle - point, axis=1) < reach)
        return not any(overlap(sight, self.lots[i]) for i in near)

    def board(self, place):
        """A place's board as a picture: its name in one or two lines, or the shape of its kind."""
        if place.sign:
            return paint_sign(place.kind, place.sign)
        if place.name not in self.boards:
            colour, text, style = PLACES[place.kind][1], "#ffffff", self.palette.board
            if style == "reverse":
                colour, text = text, colour
            picture = Image.new("RGB", (240, 132), colour)
            draw = ImageDraw.Draw(picture)
            if style != "plain":
                draw.rectangle((3, 3, 236, 128), outline=text, width=6)
            words = place.name.split()
            # Cut the name in two lines, so that the longer one is as short as can be.
            cuts = [[" ".join(words[:i]), " ".join(words[i:])] for i in range(1, len(words))]
            lines = min(cuts, key=lambda pair: max(map(len, pair)))
            size = 54
            while max(draw.textlength(line, ImageFont.load_default(size)) for line in lines) > 216:
                size -= 2
            for line, middle in zip(lines, (38, 90)):
                font = ImageFont.load_default(size)
                draw.text((120, middle), line, fill=text, font=font, anchor="mm")
            self.boards[place.name] = picture
        return self.boards[place.name]


# ---- Panoramas -----------------------------------------------------------------------------------

@lru_cache(maxsize=1)
def lookup(width):
    """Where the middle half of a panorama finds its pixels on the four faces, side by side.

    A face is a picture of 90 degrees, F wide and sqrt(2) F high. So it holds all latitudes up to 45
    degrees, and a square view of 90 degrees needs no more.

    Returns (numbers of the face pixels, (width / 2, width)) and (latitude of each pixel of a face,
    (sqrt(2) F, F), in degrees, down positive).
    """
    face = width * 2 // 5                          # finer than the panorama: straighter edges
    high, height = math.ceil(math.sqrt(2) * face), width // 2
    across = (np.arange(face) - face / 2) / (face / 2)
    down = (np.arange(high) - high / 2)[:, None] / (face / 2)
    latitude = np.degrees(np.arctan2(down, np.hypot(1, across)))
    lon = (np.arange(width) / (width - 1) - 0.5) * 360
    middle_half = np.arange(height // 4, height // 4 + height // 2)
    lat = np.radians((middle_half / (height - 1) - 0.5) * 180)[:, None]
    number = np.floor((lon + 45) / 90)
    off = np.radians(lon - 90 * number)
    columns = np.clip(np.rint(face / 2 * np.tan(off) + face / 2), 0, face - 1) + face * (number % 4)
    rows = np.clip(np.rint(face / 2 * np.tan(lat) / np.cos(off) + high / 2), 0, high - 1)
    return (rows * 4 * face + columns).astype(np.int64), latitude


@lru_cache(maxsize=None)
def backdrop(palette, width):
    """Sky and ground of one face: paler towards the horizon."""
    latitude = lookup(width)[1]
    sky, horizon, ground = rgb(palette.sky, palette.horizon, palette.ground)
    share = np.clip(np.abs(latitude) / np.where(latitude < 0, 40, 12), 0, 1)[..., None]
    colours = horizon + (np.where(latitude[..., None] < 0, sky, ground) - horizon) * share
    filler = np.full_like(share, 255)
    return Image.fromarray(np.concatenate([colours, filler], 2).astype(np.uint8), "RGBA")


def clip(corners):
    """The part of a polygon that is at least NEAR metres ahead; corners are (right, ahead, up)."""
    kept = []
    for p, q in zip(corners, corners[1:] + corners[:1]):
        if p[1] >= NEAR:
            kept.append(p)
        if (p[1] >= NEAR) != (q[1] >= NEAR):
            share = (NEAR - p[1]) / (q[1] - p[1])
            kept.append([a + (b - a) * share for a, b in zip(p, q)])
    return kept


def paint_face(picture, heading, shapes, colours):
    """Paint pieces, (n, 4, 3) seen from the camera, on a picture of 90 degrees around a heading."""
    face, high = picture.size
    sin, cos = round(math.sin(math.radians(heading))), round(math.cos(math.radians(heading)))
    east, north = shapes[..., 0], shapes[..., 1]
    right = east * cos - north * sin
    front = east * sin + north * cos
    inside = (front > NEAR).any(1) & (right < front).any(1) & (-right < front).any(1)
    right, front, up, colours = right[inside], front[inside], shapes[inside, :, 2], colours[inside]
    whole = (front >= NEAR).all(1).tolist()
    depth = np.maximum(front, NEAR)
    x = face / 2 + face / 2 * right / depth
    y = high / 2 - face / 2 * up / depth
    flat = np.rint(np.stack([x, y], 2)).reshape(-1, 8)
    draw = ImageDraw.Draw(picture)
    for i, (points, colour) in enumerate(zip(flat.tolist(), map(tuple, colours.tolist()))):
        if not whole[i]:
            corners = clip(np.stack([right[i], front[i], up[i]], 1).tolist())
            points = [(round(face / 2 + face / 2 * x / z), round(high / 2 - face / 2 * y / z))
                      for x, z, y in corners]
        draw.polygon(points, fill=colour)


def panorama(scene, pano, width):
    """The picture of a panorama number, `width` x `width` / 2, with north in the middle."""
    point, height = scene.city.panos[pano], width // 2
    shapes, colours = scene.pieces(point)
    shapes = shapes - np.array([*point, EYE])
    empty, faces = backdrop(scene.palette, width), []
    for heading in (0, 90, 180, 270):
        face = empty.copy()
        paint_face(face, heading, shapes, colours)
        faces.append(np.asarray(face).view(np.uint32)[..., 0])
    middle = np.concatenate(faces, 1).reshape(-1)[lookup(width)[0]]
    picture = Image.new("RGB", (width, height), scene.palette.ground)
    picture.paste(scene.palette.sky, (0, 0, width, height // 4))
    middle = Image.fromarray(middle.view(np.uint8).reshape(*middle.shape, 4), "RGBA").convert("RGB")
    picture.paste(middle, (0, height // 4))
    hang_boards(picture, scene, point)
    return picture


def hang_boards(picture, scene, point):
    """Boards go on the finished panorama, far ones first: on the faces a seam could cut a name."""
    width, height = picture.size

    def row(up, metres):
        return round((0.5 - math.degrees(math.atan2(up - EYE, metres)) / 180) * (height - 1))

    near = []                                     # (metres, number of the place)
    for i, place in enumerate(scene.places):
        metres = math.dist(point, place.at)
        if metres < BOARDS_FAR:
            near.append((metres, i))
    for metres, i in sorted(near, reverse=True):
        place = scene.places[i]
        if not scene.in_sight(point, place):
            continue
        wide, high, upper = BOARD_WIDTH, BOARD_HEIGHT, BOARD_TOP
        if place.sign:
            wide, high, upper = SIGN_WIDTH, SIGN_WIDTH, SIGN_TOP
            if scene.city.panos[place.pano] != point:      # it hangs for its own panorama alone
                continue
        centre = (turn_between(0, direction(point, place.at)) / 360 + 0.5) * (width - 1)
        half = math.degrees(math.atan(wide / 2 / metres)) / 360 * (width - 1)
        top, bottom, foot = (row(up, metres) for up in (upper, upper - high, 0))
        board = scene.board(place).resize((round(2 * half), bottom - top), Image.Resampling.LANCZOS)
        for shift in (-(width - 1), 0, width - 1):         # it may cross the seam in the south
            post = round(centre + shift)
            picture.paste("#3c3c3c", (post - 1, bottom, post + 1, foot))
            picture.paste(board, (round(centre - half) + shift, top))


# ---- Files ---------------------------------------------------------------------------------------

def make_sets(seed, num_routes, num_unseen, most_legs, signs="names"):
    """{folder: [(city, its routes), ...]}"""
    city = City(seed, 0, signs)
    routes = draw_routes(city, num_routes + num_unseen, range(1, most_legs))
    mini = [City(seed, number, signs) for number in range(1, 10)]
    return {"train": [(city, routes[:num_routes])], "unseen": [(city, routes[num_routes:])],
            "mini": [(city, draw_routes(city, 2, (1, 2), longest=150)) for city in mini]}


def write_words(folder, parts):
    """route_infos.json and gps_pano_mapping.pkl of one set.

    Returns the panoramas that it needs, [(city, number), ...].
    """
    folder.mkdir()
    entries = [route_entry(city, route) for city, routes in parts for route in routes]
    (folder / "route_infos.json").write_text(json.dumps([entries, len(entries)]), encoding="utf-8")
    needed = [(city, pano) for city, routes in parts for pano in visited(city, routes)]
    mapping = {city.geocodes[pano]: city.ids[pano] for city, pano in needed}
    (folder / "gps_pano_mapping.pkl").write_bytes(pickle.dumps(mapping, protocol=4))
    return needed


@lru_cache(maxsize=None)
def scene_of(seed, number, signs="names"):
    """A city's scene, built once in every process."""
    return Scene(City(seed, number, signs))


def write_picture(job):
    """One panorama into every folder that needs it; returns the bytes written."""
    seed, number, signs, pano, width, folders = job
    if not folders[0].is_dir():                   # the first process gave up
        return 0
    scene, data = scene_of(seed, number, signs), BytesIO()
    panorama(scene, pano, width).save(data, "JPEG", quality=QUALITY)
    for folder in folders:
        (folder / f"{scene.city.ids[pano]}.jpg").write_bytes(data.getvalue())
        # The centre column looks at heading 180 - rotation: north.
        metadata = folder / f"{scene.city.ids[pano]}.metadata.json"
        metadata.write_text('{"rotation": 180}', encoding="utf-8")
    return len(data.getvalue()) * len(folders)


def become_painter(first):
    """A worker leaves Ctrl-C to the first process, and ends without a word when that is gone."""
    # Without this it may wait for ever for a lock that another process held as it ended.
    def leave_with_it():
        while os.getppid() == first:
            time.sleep(0.5)
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    threading.Thread(target=leave_with_it, daemon=True).start()


def write_pictures(needed, seed, signs, width, workers):
    """street_views/ of all sets, {folder: [(city, panorama number), ...]}.

    Returns (number of pictures, their bytes).
    """
    folders = {}                                  # a panorama of two sets is painted once
    for folder, panos in needed.items():
        (folder / "street_views").mkdir()
        for city, pano in panos:
            folders.setdefault((city.number, pano), []).append(folder / "street_views")
    jobs = [(seed, number, signs, pano, width, places)
            for (number, pano), places in folders.items()]
    for number in dict.fromkeys(number for number, _ in folders):
        scene_of(seed, number, signs)             # forks of this process need not build it again
    # Ctrl-C reaches every process: the workers leave it to this one.
    if workers > 1:
        pool = multiprocessing.Pool(workers, become_painter, (os.getpid(),))
        done = pool.imap_unordered(write_picture, jobs, chunksize=16)
    else:
        pool = None
        done = map(write_picture, jobs)
    try:
        rarely = {} if sys.stderr.isatty() else {"mininterval": 30}      # in a log
        num_bytes = sum(tqdm(done, total=len(jobs), desc="street views", unit="picture", **rarely))
    except BaseException:
        for folder in needed:                     # then what is left to paint takes no time
            shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        if pool:
            # Not terminate(): it may kill a worker that holds the queue's lock, and then wait for
            # that lock for ever.
            pool.close()
            pool.join()
    return sum(map(len, folders.values())), num_bytes


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--out", required=True, help="folder to write, new or empty")
    parser.add_argument("--routes", type=int, default=1000,
                        help="routes of the training set [1000]")
    parser.add_argument("--unseen", type=int, default=48,
                        help="further routes, never trained on [48]")
    parser.add_argument("--most-legs", type=int, default=8,
                        help="a route of train or unseen has 2 to this many legs [8]")
    parser.add_argument("--seed", type=int, default=0, help="another seed is another city [0]")
    parser.add_argument("--signs", choices=SIGN_KINDS, default="names",
                        help="what boards show: names; shapes of six kinds, in city 0 each in a "
                             "colour of its own; or these shapes in any colour [names]")
    parser.add_argument("--no-pictures", action="store_true", help="leave out street_views/")
    parser.add_argument("--size", type=int, default=1408,
                        help="width of a panorama in pixels, about pi times that of a view [1408]")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1,
                        help="processes that paint [all cores]")
    args = parser.parse_args(argv)
    for name in ("routes", "unseen", "workers"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: must be at least 1")
    if not 2 <= args.most_legs <= 8:
        parser.error(f"--most-legs {args.most_legs}: must be from 2 to 8")
    if args.size % 8 or not 256 <= args.size <= 4096:
        parser.error(f"--size {args.size}: must be a multiple of 8 from 256 to 4096")
    if not args.no_pictures and not features.check("freetype2"):
        parser.error("this Pillow was built without FreeType and cannot write names on boards: "
                     "install another build of it, or use --no-pictures")
    out = Path(args.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        parser.error(f"--out {out}: exists and is not an empty folder; name a new one")
    return args


def main(argv=None):
    args = parse_arguments(argv)
    began = time.monotonic()
    sets = make_sets(args.seed, args.routes, args.unseen, args.most_legs, args.signs)
    out = Path(args.out).absolute()
    # A stopped run leaves nothing that looks whole.
    partial = out.with_name(f"{out.name}.unfinished")
    pictures = (0, 0)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))          # so that `finally` runs
    try:
        shutil.rmtree(partial, ignore_errors=True)                   # of a run that was killed
        partial.mkdir(parents=True)
        needed = {partial / name: write_words(partial / name, parts)
                  for name, parts in sets.items()}
        if not args.no_pictures:
            pictures = write_pictures(needed, args.seed, args.signs, args.size, args.workers)
        if out.exists():
            out.rmdir()                                              # it was empty
        partial.rename(out)
    except OSError as error:
        print(f"--out {args.out}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("stopped: nothing was written")
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    told = []
    for name, parts in sets.items():
        num_routes = sum(len(routes) for _, routes in parts)
        num_panos = len(needed[partial / name])
        told.append(f"{out / name}: {num_routes} routes, {num_panos} panoramas")
    num_pictures, num_bytes = pictures
    seconds = time.monotonic() - began
    told.append(f"{num_pictures} pictures, {num_bytes / 1e6:.0f} MB, {seconds:.1f} seconds")
    try:
        print("\n".join(told), flush=True)
    except BrokenPipeError:                                # the reader has gone; all is written
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
