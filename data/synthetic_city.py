"""A city that does not exist, written in the file format of the V-IRL navigation data (paper Section 4.2, B.1).

    python data/synthetic_city.py --out city0                  # 1,000 routes with street views
    python data/synthetic_city.py --out city0 --no-pictures    # the words only: a second

    city0/train/     --routes routes of city 0                 training, in-distribution and rule tests
    city0/unseen/    48 more routes of city 0                  routes never trained on
    city0/mini/      cities 1 to 9, two routes each            the visual test: streets and names are new everywhere;
                                                               city 1 looks like city 0, the others do not

Each folder holds the three things of the released data, and only the panoramas that a walk along its routes can visit:

    route_infos.json        [routes, number of routes]; a route's "milestone_info" is what the environment reads
    gps_pano_mapping.pkl    {(latitude, longitude): panorama id}, in the order of the whole city
    street_views/           {id}.jpg, equirectangular, north in the middle; {id}.metadata.json

A city is a warped grid of streets with a few diagonal avenues. At a crossing without diagonals there may be a place
(a landmark), in the middle of every street there is one (a destination). Every place has a board with its name, at
most 4 m wide and 12 to 15 m from the point that announces it, at a bearing where no edge between two of the four
views (heading +0, 90, 180, 270, each 90 degrees wide) cuts it. No house stands in between.

Same arguments, same bytes (pictures: with the same Pillow). Left out: crossings without a milestone on a leg.
"""
import argparse
import functools
import hashlib
import json
import math
import os
import pickle
import random
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from zlib import crc32

CITY_VERSION = 1                # in every random stream: raise it when a change moves a street or a name
GRID, MINI_GRID = 13, 7         # nodes per side of city 0 and of the cities of the mini set
PAVEMENT = 3.0                  # metres from the kerb to the houses
BOARD_WIDTH, BOARD_HEIGHT, BOARD_TOP = 4.0, 2.2, 6.2            # metres
EARTH, EQUATOR, ECCENTRICITY2 = 6371e3, 6378137.0, 0.00669438    # haversine radius; WGS84
INTERPOLATION = 5               # the environment tries points at 1/5 .. 4/5 of every leg ...
RELOCATION = 20.0               # ... and moves them to the nearest panorama within so many metres
COMPASS = ("north", "northeast", "east", "southeast", "south", "southwest", "west", "northwest")
SIDES = ("front", "right front", "right", "right behind", "behind", "left behind", "left", "left front")

# Where the cities lie: near the paper's, so that latitudes and signs vary as they do there. The streets are invented.
ANCHORS = ((40.74, -73.99), (40.84, -73.88), (45.47, 9.19), (28.62, 77.21), (-34.61, -58.39), (51.51, -0.12),
           (22.30, 114.17), (-37.81, 144.96), (6.51, 3.37), (37.77, -122.43))

# The 20 place types of the mini set, how we name them, and the colour of their board.
PLACES = {
    "bank": ("{} Bank", "#1f4e8c"), "restaurant": ("{} Kitchen", "#a33b20"), "supermarket": ("{} Market", "#2f7d32"),
    "bakery": ("{} Bakery", "#9a5b13"), "cafe": ("{} Cafe", "#6b4226"), "pharmacy": ("{} Pharmacy", "#00796b"),
    "hospital": ("{} Hospital", "#b71c1c"), "spa": ("{} Spa", "#7b3f9d"), "convenience_store": ("{} Mini Mart", "#c2410c"),
    "school": ("Old {} School", "#4a5a1f"), "library": ("{} Library", "#3f3f7f"), "park": ("{} Park", "#1b5e20"),
    "lodging": ("The {} Hotel", "#7a1f4b"), "laundry": ("{} Laundry", "#0b6fa4"), "movie_theater": ("{} Cinema", "#8e1538"),
    "book_store": ("{} & Co Books", "#37474f"), "clothing_store": ("{} Tailors", "#5d3a66"),
    "jewelry_store": ("{} Jewels", "#856404"), "gym": ("{} Gym", "#d32f2f"), "bar": ("The {} Tavern", "#263238"),
}
ONSETS = "B Br C Cr D Dr F Fl G Gr H K Kl L M N P Pl R S St T Tr V".split()
NUCLEI = "a e i o u ai ea ie oa ou".split()
CODAS = "b d l ld m n nd r rn st".split()
TAILS = "a en er ie in o ow um y yl".split()


# ---- Drawing lots and measuring ----------------------------------------------------------------------------

def stream(*tag):
    """A random generator of its own for every purpose: adding a draw to one leaves all others as they were."""
    return random.Random("|".join(map(str, ("city", CITY_VERSION, *tag))))


def between(rng, low, high):
    return low + (high - low) * rng.random()      # .random() alone is promised to stay the same across Pythons


def pick(rng, items):
    return items[int(rng.random() * len(items))]


def make_id(*tag):
    return hashlib.sha256("|".join(map(str, (CITY_VERSION, *tag))).encode()).hexdigest()[:22]


def direction(a, b):
    """Degrees clockwise from north of the line a -> b, both (east, north) in metres."""
    return math.degrees(math.atan2(b[0] - a[0], b[1] - a[1])) % 360


def ahead(point, heading, metres):
    """Where one stands after walking `metres` with this heading."""
    return point[0] + metres * math.sin(math.radians(heading)), point[1] + metres * math.cos(math.radians(heading))


def bearing(a, b):
    """Degrees clockwise from north of the great circle a -> b, both (latitude, longitude)."""
    lat_a, lat_b, east = math.radians(a[0]), math.radians(b[0]), math.radians(b[1] - a[1])
    x = math.cos(lat_a) * math.sin(lat_b) - math.sin(lat_a) * math.cos(lat_b) * math.cos(east)
    return math.degrees(math.atan2(math.sin(east) * math.cos(lat_b), x)) % 360


def haversine(a, b):
    """Metres between two (latitude, longitude), as the environment measures when it relocates a point."""
    lat_a, lat_b, east = math.radians(a[0]), math.radians(b[0]), math.radians(b[1] - a[1])
    h = math.sin((lat_b - lat_a) / 2) ** 2 + math.cos(lat_a) * math.cos(lat_b) * math.sin(east / 2) ** 2
    return 2 * EARTH * math.asin(math.sqrt(h))


def turn_between(old, new):
    """The turn from one heading to another, -180 to 180 degrees."""
    return (new - old + 180) % 360 - 180


def nearest_of(words, degrees):
    """One of eight words, 45 degrees each and the first centred on 0; a tie goes to the lower index."""
    return min((abs(turn_between(45 * i, degrees)), i, word) for i, word in enumerate(words))[2]


# ---- The city ----------------------------------------------------------------------------------------------

@dataclass
class Place:
    name: str
    kind: str
    at: tuple            # (east, north) of its board
    pano: int            # the panorama that announces it
    key: str


@dataclass
class Street:
    ends: tuple          # two node numbers
    half: float          # metres from the middle to the kerb
    diagonal: bool
    panos: list = field(default_factory=list)     # those inside, from the first end to the second
    place: Place = None


class City:
    """Streets, panoramas and places of one city; `panos` is (east, north) in metres, nodes first."""

    def __init__(self, seed, number):
        self.seed, self.number = seed, number
        self.lat, self.lon = ANCHORS[number]
        w2 = 1 - ECCENTRICITY2 * math.sin(math.radians(self.lat)) ** 2       # metres per degree at the anchor
        self.per_lat = math.radians(EQUATOR * (1 - ECCENTRICITY2) / w2 ** 1.5)
        self.per_lon = math.radians(EQUATOR / math.sqrt(w2) * math.cos(math.radians(self.lat)))
        self.build_streets(stream("streets", seed, number), GRID if number == 0 else MINI_GRID)
        self.build_panos()
        self.build_places(stream("places", seed, number))
        self.legs = {}

    def build_streets(self, rng, n):
        """A grid with uneven spacing, turned a little, and four diagonal avenues that run across its cells."""
        lines = [[0.0], [0.0]]
        for line in lines:
            while len(line) < n:
                line.append(line[-1] + between(rng, 72, 88))
        tilt = math.radians(between(rng, -8, 8))
        self.panos = [(x * math.cos(tilt) + y * math.sin(tilt), y * math.cos(tilt) - x * math.sin(tilt))
                      for y in lines[1] for x in lines[0]]
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
                    cells.setdefault((row, i), (corner, corner + n + 1) if rising else (corner + n, corner + 1))
        self.streets = [Street(ends, half, diagonal) for group, half, diagonal in
                        ((avenues, 7.0, False), (crossing, 5.0, False), (cells.values(), 6.0, True)) for ends in group]
        self.around = [[] for _ in range(self.num_nodes)]      # node -> (street, node at its other end)
        for street in self.streets:
            a, b = street.ends
            self.around[a].append((street, b))
            self.around[b].append((street, a))

    def build_panos(self):
        """A panorama about every 10 m of every street, and the table that finds the nearest one."""
        for street in self.streets:
            a, b = (self.panos[node] for node in street.ends)
            steps = round(math.dist(a, b) / 10)
            for i in range(1, steps):
                street.panos.append(len(self.panos))
                self.panos.append(tuple(p + (q - p) * i / steps for p, q in zip(a, b)))
        self.geocodes = [self.geocode(point) for point in self.panos]
        self.ids = [make_id("pano", self.seed, self.number, i) for i in range(len(self.panos))]
        self.squares = {}                         # 20 m squares: a radius of 20 m stays within the neighbours
        for i, (x, y) in enumerate(self.panos):
            self.squares.setdefault((x // RELOCATION, y // RELOCATION), []).append(i)

    def build_places(self, rng):
        """Landmarks at some crossings without diagonals, a destination beside the middle of every street."""
        names = self.names(rng)
        self.landmarks = [None] * self.num_nodes
        for node, around in enumerate(self.around):
            if not any(street.diagonal for street, _ in around) and rng.random() < 0.6:
                # 30 degrees beside a street: the board hangs over its pavement, wholly inside the view along it.
                street_heading = direction(self.panos[node], self.panos[pick(rng, around)[1]])
                off_axis = between(rng, 27, 33) * (1 if rng.random() < 0.5 else -1)
                self.landmarks[node] = self.new_place(rng, names, node, street_heading + off_axis, 13.5, 15.5)
        for street in self.streets:
            middle = street.panos[len(street.panos) // 2]
            side = direction(*(self.panos[node] for node in street.ends)) + (90 if rng.random() < 0.5 else -90)
            street.place = self.new_place(rng, names, middle, side + between(rng, -30, 30), 12.5, 15)

    def new_place(self, rng, names, pano, heading, least, most):
        kind = pick(rng, list(PLACES))
        name = PLACES[kind][0].format(next(names))
        at = ahead(self.panos[pano], heading, between(rng, least, most))
        return Place(name, kind, at, pano, make_id("place", self.seed, self.number, name))

    def names(self, rng):
        """Invented roots in random order. A root belongs to one city number only, so no two cities share a name."""
        roots = [a + b + c + d for a in ONSETS for b in NUCLEI for c in CODAS for d in TAILS]
        roots = [root for root in roots if crc32(root.encode()) % 16 == self.number]
        while roots:
            yield roots.pop(int(rng.random() * len(roots)))

    def geocode(self, point):
        return round(self.lat + point[1] / self.per_lat, 7), round(self.lon + point[0] / self.per_lon, 7)

    def relocate(self, geocode):
        """The nearest panorama within 20 m, or None; of two equally near ones the first."""
        x = (geocode[1] - self.lon) * self.per_lon // RELOCATION
        y = (geocode[0] - self.lat) * self.per_lat // RELOCATION
        near = [i for dx in (-1, 0, 1) for dy in (-1, 0, 1) for i in self.squares.get((x + dx, y + dy), ())]
        metres, pano = min(((haversine(geocode, self.geocodes[i]), i) for i in near), default=(RELOCATION, None))
        return pano if metres < RELOCATION else None

    def leg(self, a, b):
        """Every panorama the environment may visit on the way from one to another, both included.

        Candidates that it would drop because they are near an end belong to it too: without them in the mapping the
        same point would be moved somewhere else.
        """
        if (a, b) not in self.legs:
            shares = [s / INTERPOLATION for s in range(1, INTERPOLATION)]
            points = [tuple(p * (1 - s) + q * s for p, q in zip(self.geocodes[a], self.geocodes[b])) for s in shares]
            self.legs[a, b] = [a, *(pano for pano in map(self.relocate, points) if pano is not None), b]
        return self.legs[a, b]


# ---- Routes ------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Route:
    """Panorama numbers: the start, the turning points (nodes) and the destination; and the streets at both ends."""
    points: tuple
    first: Street
    last: Street


def draw_route(city, rng, turning_points, longest=math.inf):
    """From inside a street to its end, then a turn of 20 to 150 degrees at every node, no node twice."""
    while True:
        first = pick(rng, city.streets)
        start, (back, node) = pick(rng, first.panos), first.ends if rng.random() < 0.5 else first.ends[::-1]
        points, seen, num_nodes = [start, node], {back, node}, pick(rng, turning_points)
        while True:
            heading = direction(city.panos[points[-2]], city.panos[node])
            ways = [(street, other) for street, other in city.around[node] if other not in seen and
                    20 <= abs(turn_between(heading, direction(city.panos[node], city.panos[other]))) <= 150]
            if not ways:
                break
            street, other = pick(rng, ways)
            if len(points) <= num_nodes:
                node = other
                points.append(node)
                seen.add(node)
                continue
            points.append(street.place.pano)
            if sum(math.dist(city.panos[a], city.panos[b]) for a, b in zip(points, points[1:])) <= longest:
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
    """A place as the released file describes it; `street_point` is the panorama it is reached from."""
    rng = stream("reviews", place.key)
    return {"name": place.name, "geocode": list(city.geocode(place.at)), "rating": round(between(rng, 3, 5), 1),
            "place_id": place.key, "distance": round(math.dist(place.at, city.panos[street_point]), 2),
            "n_reviews": int(10 ** between(rng, 1, 3.5)),
            "heading": round(direction(city.panos[street_point], place.at), 1), "photo_reference": "",
            "place_types": [place.kind], "plus_code": {}, "vicinity": f"city {city.number}",
            "region": f"city {city.number}", "relocated_geocode": list(city.geocodes[street_point])}


def side_of(city, place, pano, heading):
    """Where a place is for someone who arrives at a panorama with this heading, in one of eight words."""
    return nearest_of(SIDES, bearing(city.geocodes[pano], city.geocode(place.at)) - heading)


def route_entry(city, route):
    """One object of route_infos.json. Its milestones tell, point by point, what is seen on arrival there."""
    milestones, landmarks, words, distances, heading = "", [], [], [], 0
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
            landmarks.append({**place_entry(city, place, b), "spatial_relation": side, "expression": seen})
        block = {"intersection_idx": i, "landmarks": seen, "distance": f"{distances[-1]} meters",
                 "human_heading": heading, "to_next_intersection_heading": f"{arriving} ({words[-1]})"}
        milestones += "\n{\n" + "".join(f'"{key}": "{value}",\n' for key, value in block.items()) + "}\n"
        heading = arriving
    seconds = [round(metres / 1.4) for metres in distances]      # at walking pace
    return {"dest_place": place_entry(city, route.last.place, route.points[-1]),
            "start_place": place_entry(city, route.first.place, route.points[0]),
            "route_results": {"geocode_list": [list(city.geocodes[pano]) for pano in route.points[1:]], "polyline": [],
                              "instructions": [f"Head {word} for {metres} meters"
                                               for word, metres in zip(words, distances)],
                              "distance_list": distances, "time_list": seconds, "time": sum(seconds),
                              "distance": sum(distances), "n_landmarks": sum(mark is not None for mark in landmarks),
                              "landmark_list": landmarks},
            "init_heading": 0, "instruction": f"Walk to {route.last.place.name}.", "milestone_info": milestones}


def visited(city, routes):
    """The panoramas that walks along these routes can visit, in the order of the city."""
    return sorted({pano for route in routes for a, b in zip(route.points, route.points[1:]) for pano in city.leg(a, b)})


def announced(city, route):
    """(place, panorama, heading of arrival) for every board that the route's text promises."""
    for a, b in zip(route.points, route.points[1:]):
        place = route.last.place if b == route.points[-1] else city.landmarks[b]
        if place:
            yield place, b, direction(city.panos[a], city.panos[b])


def is_cut(city, place, pano, heading):
    """Whether an edge between two of the four views runs through a board."""
    here = city.panos[pano]
    half = math.degrees(math.atan(BOARD_WIDTH / 2 / math.dist(here, place.at)))
    return abs((direction(here, place.at) - heading) % 90 - 45) < half


# ---- Files -------------------------------------------------------------------------------------------------

def make_sets(seed, num_routes):
    """{folder: [(city, its routes), ...]}"""
    city = City(seed, 0)
    routes = draw_routes(city, num_routes + 48, range(1, 8))
    mini = [City(seed, number) for number in range(1, 10)]
    return {"train": [(city, routes[:num_routes])], "unseen": [(city, routes[num_routes:])],
            "mini": [(city, draw_routes(city, 2, (1, 2), longest=150)) for city in mini]}


def write_words(folder, parts):
    """route_infos.json and gps_pano_mapping.pkl of one set; returns the panoramas it needs: [(city, number), ...]."""
    folder.mkdir()
    entries = [route_entry(city, route) for city, routes in parts for route in routes]
    (folder / "route_infos.json").write_text(json.dumps([entries, len(entries)]), encoding="utf-8")
    needed = [(city, pano) for city, routes in parts for pano in visited(city, routes)]
    mapping = {city.geocodes[pano]: city.ids[pano] for city, pano in needed}
    (folder / "gps_pano_mapping.pkl").write_bytes(pickle.dumps(mapping, protocol=4))
    return needed


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--out", required=True, help="folder to write, new or empty")
    parser.add_argument("--routes", type=int, default=1000, help="routes of the training set [1000]")
    parser.add_argument("--seed", type=int, default=0, help="another seed is another city [0]")
    parser.add_argument("--no-pictures", action="store_true", help="leave out street_views/")
    args = parser.parse_args(argv)
    if args.routes < 1:
        parser.error(f"--routes {args.routes}: must be at least 1")
    out = Path(args.out)
    if out.is_dir() and any(out.iterdir()):
        parser.error(f"--out {out}: the folder is not empty; name a new one")
    if out.exists() and not out.is_dir():
        parser.error(f"--out {out}: is a file; name a new folder")
    return args


def main(argv=None):
    args = parse_arguments(argv)
    began = time.time()
    sets = make_sets(args.seed, args.routes)
    out = Path(args.out).absolute()
    partial = out.with_name(f"{out.name}.{os.getpid()}.partial")     # a stopped run leaves nothing that looks whole
    try:
        partial.mkdir(parents=True)
        needed = {name: write_words(partial / name, parts) for name, parts in sets.items()}
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except OSError as error:
        sys.exit(f"--out {args.out}: {error}")
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    boards = [is_cut(city, *board) for parts in sets.values() for city, routes in parts for route in routes
              for board in announced(city, route)]
    print(", ".join(f"{name}: {sum(len(routes) for _, routes in parts)} routes, {len(needed[name])} panoramas"
                    for name, parts in sets.items()))
    print(f"{len(boards)} boards announced, {100 * sum(boards) / len(boards):.1f} % cut by the edge of a view")
    print(f"{time.time() - began:.1f} seconds")


if __name__ == "__main__":
    main()
