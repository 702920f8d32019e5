"""V-IRL: released files are read, the rail laid, views cropped, replies judged as in the paper."""
import base64
import copy
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import time
from collections import OrderedDict, defaultdict
from functools import partial

import numpy as np
import pytest
from PIL import ExifTags, Image

import envs
from conftest import ROOT, write_conversations
from envs import Navigation, make_env
from support import digests, streets, transcripts, vocabularies
from support.chat import read_text
from support.conversations import read_conversations
from support.streets import Panoramas, crop_view, geodesic, parse_milestones, read_panorama
from verify import LAST_TRY_PENALTY, judge_navigation

# a metre, in degrees, at this latitude
EAST, NORTH = np.array([0, 1 / 84_400]), np.array([1 / 111_050, 0])
START = np.array([40.72, -74.0])


def block(landmarks, heading, **more):
    fields = {"intersection_idx": "1", **({"landmarks": landmarks} if landmarks else {}),
              "distance": "159 meters",
              "human_heading": "0", "to_next_intersection_heading": heading, **more}
    return "\n{\n" + "".join(f'"{key}": "{value}",\n' for key, value in fields.items()) + "}\n"


def make_record(points, headings, landmarks, init_heading=0):
    """A record as the collector writes it, with keys that nobody reads."""
    return {"dest_place": {"name": "Aldo Books", "rating": 4.5, "place_types": ["book_store"],
                           "plus_code": {}},
            "start_place": {"name": "Marn Cafe",
                            "relocated_geocode": [float(x) for x in points[0]]},
            "route_results": {"geocode_list": [[float(x) for x in p] for p in points[1:]],
                              "polyline": ["xyz"],
                              "landmark_list": [None], "n_landmarks": 0},
            "init_heading": init_heading, "instruction": "",
            "milestone_info": "".join(map(block, landmarks, headings))}


def write_data(root, change=lambda records: None, mapping=True):
    """`root/train`: 160 m north, then 150 m east, and the way back; a panorama every 10 m."""
    corner, end = START + 160 * NORTH, START + 160 * NORTH + 150 * EAST
    records = [make_record([START, corner, end], ["0 (north)", "90 (east)"],
                           ["Marn Cafe is on your left front",
                            "The destination Aldo Books is on your left"], 200),
               make_record([end, corner, START], ["270 (west)", "180 (south)"],
                           ["No landmark nearby", "The destination Marn Cafe is on your right"])]
    records = change(records) or records
    folder = root / "train"
    folder.mkdir(parents=True)
    (folder / "route_infos.json").write_text(json.dumps([records, 7]))
    places = [START + d * NORTH for d in range(0, 161, 10)] + [
        corner + d * EAST for d in range(10, 151, 10)]
    if mapping:
        (folder / "gps_pano_mapping.pkl").write_bytes(pickle.dumps(
            {(np.float64(lat), float(lon)): f"pano{i}" for i, (lat, lon) in enumerate(places)},
            protocol=2))
    return root


@pytest.fixture
def two_routes(tmp_path):
    return write_data(tmp_path / "data")


def finish(env):
    """Let the expert play to the end; the rewards and the last info."""
    rewards, info = [], None
    while not env.done:
        _, reward, *_, info = env.step(env.expert_reply())
        rewards.append(reward)
    return rewards, info


# ---- Reading the data ----------------------------------------------------------------------------

def test_a_handwritten_folder_in_the_released_shape_loads(two_routes):
    first, second = make_env("virl-l", "id", root=two_routes).routes
    assert first.init_heading == 200 and first.headings == (0, 90)
    assert first.directions == ("north", "east")
    assert first.landmarks == ("Marn Cafe is on your left front",
                               "The destination Aldo Books is on your left")
    assert second.landmarks[0] == "" and second.directions == ("west", "south")
    assert first.panos == ("pano0", "pano16", "pano31")
    assert first.between == (("pano3", "pano6", "pano10", "pano13", None),
                             ("pano19", "pano22", "pano25", "pano28", None))


@pytest.mark.parametrize("names",
                         [("train", "nyc_1k_routes"), ("unseen", "unseen"), ("mini", "VLN_mini")])
def test_the_released_folder_names_are_known(tmp_path, names):
    write_data(tmp_path)
    (tmp_path / "train").rename(tmp_path / names[1])
    assert len(Navigation(tmp_path, data=names[0]).routes) == 2


def test_words_need_no_mapping_and_pictures_do(tmp_path):
    write_data(tmp_path, mapping=False)
    env = make_env("virl-l", "id", root=tmp_path)
    env.reset(seed=0)
    assert finish(env)[1]["success"]
    with pytest.raises(ValueError, match="gps_pano_mapping.pkl"):
        make_env("virl-vl", "id", root=tmp_path)


def test_milestones_are_read_as_the_collector_wrote_them():
    assert parse_milestones(
        '\n{\n"a": "b: c",,\nno colon here\n"a": "last",\n}\n\n{\n"x": "1 (y)"\n}\n') == [
        {"a": "last"}, {"x": "1 (y)"}]
    assert parse_milestones('{"landmarks": "Bo\'s Bar is on your left",}')[0][
        "landmarks"] == "Bo's Bar is on your left"
    assert parse_milestones(
        "{\n'a': 'Bo\'s',\r\n  b: 7,\nc: \"cut,\n\"d\": \"\"}{\"e\": \"x\"") == [
        {"a": "Bo's", "b": "7", "c": "cut", "d": ""}, {"e": "x"}]


@pytest.mark.parametrize("name, read", [
    ("Marn\u2028Cafe", "Marn Cafe"), ("Marn\u0085Cafe", "Marn Cafe"),
    ("Marn \nCafe: the best", "Marn Cafe: the best"),
    ("The } Cafe", "The } Cafe"), ("{Marn} Cafe", "{Marn} Cafe"),
    ('The "Marn" Cafe', 'The "Marn" Cafe'), ("Marn\u00a0Cafe",) * 2])
def test_a_name_is_read_whole_whatever_it_holds(tmp_path, name, read):
    text = "".join(block(f"{start}{name} is on your left", heading)
                   for start, heading in (("", "0 (north)"), ("The destination ", "90 (east)")))
    write_data(tmp_path, put(text, "milestone_info"))
    env = make_env("virl-l", "id", root=tmp_path, in_order=True)
    assert env.routes[1].landmarks == (f"{read} is on your left",
                                       f"The destination {read} is on your left")
    env.reset(seed=0, episode=1)
    assert finish(env)[1]["success"] and f"{read} is on your left" in env.messages[0]["content"]


@pytest.mark.parametrize("protocol", range(5))
def test_mappings_of_numbers_and_numpy_scalars_are_read_in_every_protocol(tmp_path, protocol):
    mapping = {(40.5, -74.25): "a", (np.float64(40.75), np.float32(-74.5)): np.str_("b")}
    (tmp_path / "m.pkl").write_bytes(pickle.dumps(mapping, protocol=protocol))
    assert Panoramas(tmp_path / "m.pkl").ids == {(40.5, -74.25): "a", (40.75, -74.5): "b"}


@pytest.mark.parametrize("protocol", range(6))
def test_a_mapping_in_another_kind_of_dict_is_read_as_a_plain_one(tmp_path, protocol):
    mapping = {(40.5, -74.25): "a", (40.75, -74.5): "b"}
    for other in (OrderedDict(mapping), *(defaultdict(kind, mapping)
                                          for kind in (None, str, int, list, dict))):
        (tmp_path / "m.pkl").write_bytes(pickle.dumps(other, protocol=protocol))
        assert Panoramas(tmp_path / "m.pkl").ids == mapping


# What stands in for OrderedDict, defaultdict and list is called with a pair, as a factory, and as a
# list.
@pytest.mark.parametrize("data", [
    b"\x80\x02ccollections\nOrderedDict\n]K\x01K\x02\x86a\x85R.",
    b"\x80\x02ccollections\ndefaultdict\ncbuiltins\neval\n\x85R.",
    b"\x80\x02cbuiltins\nlist\n)R."])
def test_what_stands_in_for_other_dicts_does_nothing_more(tmp_path, data):
    (tmp_path / "m.pkl").write_bytes(data)
    with pytest.raises(ValueError, match="m.pkl.*(a broken pickle|eval is not allowed)"):
        Panoramas(tmp_path / "m.pkl")


# a tuple in a tuple in ... as a key
NESTED = [b"\x80\x04})" + b"\x85" * 10 ** 6 + b"K\x01s.",
          b"\x80\x04}" + b"(" * 10 ** 6 + b"t" * 10 ** 6 + b"K\x01s.",
          b"\x80\x04})" + b"N\x86" * 10 ** 6 + b"K\x01s.",
          b"\x80\x04})" + b"\x85\x94" * 10 ** 6 + b"\x91."]
# lists in lists
HARMLESS = [b"\x80\x04}K\x01" + b"]" * 10 ** 6 + b"a" * (10 ** 6 - 1) + b"s.",
            # "10 GB of bytes follow"
            b"\x80\x05\x96" + (10 ** 10).to_bytes(8, "little") + b".",
            # a number of 2 GB, a far place to keep it
            b"\x80\x04\x8b\xff\xff\xff\x7f1.", b"\x80\x04]r\xff\xff\xff\xff.",
            # an extension, an id of another store
            b"\x80\x04\x82\x01.", b"\x80\x04K\x01Q."]


def test_a_hostile_mapping_ends_with_one_line_and_takes_no_memory(tmp_path):
    """In a process apart, with 1 GB: hashing a deep tuple would end it, without an exception."""
    for i, data in enumerate(NESTED + HARMLESS):
        (tmp_path / f"{i}.pkl").write_bytes(data)
    code = (
        "import resource, sys\nfrom pathlib import Path\nfrom support.streets import Panoramas\n"
            "resource.setrlimit(resource.RLIMIT_AS, (10 ** 9, 10 ** 9))\n"
            "for path in sys.argv[1:]:\n    try:\n        Panoramas(Path(path))\n"
            "    except ValueError as error:\n        print(error)\n")
    paths = [tmp_path / f"{i}.pkl" for i in range(len(NESTED + HARMLESS))]
    done = subprocess.run([sys.executable, "-c", code, *map(str, paths)], cwd=ROOT,
                          capture_output=True, text=True, timeout=60,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    told = done.stdout.splitlines()
    assert done.returncode == 0 and len(told) == len(paths), (done.returncode, told, done.stderr)
    assert all(f"{path.name}: not a dict of" in line for path, line in zip(paths, told))
    assert all("a tuple in a tuple is not allowed" in line for line in told[:len(NESTED)])


def test_a_large_mapping_is_read_in_seconds(tmp_path):
    rng = random.Random(0)
    mapping = {(40.7 + rng.random() / 10, -74 + rng.random() / 10): f"{i:022x}"
               for i in range(100_000)}
    (tmp_path / "m.pkl").write_bytes(pickle.dumps(mapping))
    started = time.process_time()
    assert len(Panoramas(tmp_path / "m.pkl").ids) == 100_000
    # 0.6 s, of which the unpickler 0.35
    assert time.process_time() - started < 2


class Harm:
    def __init__(self, function, *arguments):
        self.parts = function, arguments

    def __reduce__(self):
        return self.parts


@pytest.mark.parametrize("function", [os.system, eval, os.mkdir, getattr])
def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(tmp_path, function):
    touched = tmp_path / "touched"
    arguments = {os.system: (f"touch {touched}",), eval: (f"open({str(touched)!r}, 'w')",),
                 os.mkdir: (str(touched),),
                 getattr: ("", "join")}[function]
    (tmp_path / "m.pkl").write_bytes(pickle.dumps({(1.0, 2.0): Harm(function, *arguments)}))
    with pytest.raises(ValueError, match=rf"m.pkl.*\.{function.__name__} is not allowed"):
        Panoramas(tmp_path / "m.pkl")
    assert not touched.exists()


# {7: a numpy scalar of a dtype "O8"}. Its state says that its 8 bytes hold no reference, and numpy
# would follow them.
ADDRESS = (b"\x80\x02}K\x07cnumpy._core.multiarray\nscalar\ncnumpy\ndtype\n"
           b"X\x02\x00\x00\x00O8\x89\x88\x87R"
           b"(K\x03X\x01\x00\x00\x00|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
           b"C\x08AAAAAAAA\x86Rs.")


@pytest.mark.parametrize("data, told", [
    (ADDRESS, "numpy type O8 is not allowed"),
    (pickle.dumps({(1.0, 2.0): np.zeros(1, "V8")[0]}), "numpy type V8 is not allowed"),
    (pickle.dumps({(1.0, 2.0): np.zeros(3)}), "is not allowed"),
    (pickle.dumps({(1.0, 2.0): ("b",)}), "something else")])
def test_numpy_gives_numbers_and_text_and_nothing_else(tmp_path, data, told):
    (tmp_path / "m.pkl").write_bytes(data)
    with pytest.raises(ValueError, match=told):
        Panoramas(tmp_path / "m.pkl")


@pytest.mark.parametrize("mapping", [{}, {(math.nan, 1.0): "a"}, {(math.inf, 1.0): "a"},
                                     {(1e308, 1.0): "a"}, {"12": "a"},
                                     {(1.0, 2.0): "a", (1.0, 3.0): ("b",)}])
def test_a_mapping_of_other_things_is_named(tmp_path, mapping):
    (tmp_path / "m.pkl").write_bytes(pickle.dumps(mapping))
    with pytest.raises(ValueError, match="m.pkl: not a dict"):
        Panoramas(tmp_path / "m.pkl")


def test_the_nearest_place_is_the_one_that_trying_all_finds(tmp_path):
    rng = random.Random(0)
    for lat, lon in ((40.7, -74.0), (-37.8, 144.9), (0.0, 0.0), (69.6, 18.9)):
        mapping = {(lat + rng.uniform(-1e-3, 1e-3), lon + rng.uniform(-2e-3, 2e-3)): str(i)
                   for i in range(200)}
        (tmp_path / "m.pkl").write_bytes(pickle.dumps(mapping))
        panoramas = Panoramas(tmp_path / "m.pkl")

        def metres(a, b):
            (a1, a2), (b1, b2) = np.radians(a), np.radians(b)
            haversine = (math.sin((b1 - a1) / 2) ** 2
                         + math.cos(a1) * math.cos(b1) * math.sin((b2 - a2) / 2) ** 2)
            return 2 * 6371e3 * math.asin(math.sqrt(haversine))
        found = 0
        for _ in range(300):
            point = lat + rng.uniform(-1.2e-3, 1.2e-3), lon + rng.uniform(-2.2e-3, 2.2e-3)
            nearest = min(mapping, key=lambda place: metres(point, place))
            assert panoramas.nearest(point) == (nearest if metres(point, nearest) < 20 else None)
            found += metres(point, nearest) < 20
        assert 30 < found < 290
        assert all(panoramas.nearest(place) == place for place in mapping)


def test_geodesic_is_right_on_the_meridian_and_at_the_equator():
    # a(1 degree) = 111.31949 km
    assert geodesic((0.0, 0.0), (0.0, 0.001)) == pytest.approx(111.31949, abs=1e-4)
    # WGS-84 tables, at 45 degrees
    assert geodesic((45.0, 7.0), (45.001, 7.0)) == pytest.approx(111.1325, abs=1e-3)


def cut(*path):
    def change(records):
        target = records[1]
        for key in path[:-1]:
            target = target[key]
        del target[path[-1]]
    return change


def put(value, *path):
    def change(records):
        target = records[1]
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = value
    return change


@pytest.mark.parametrize("change, named", [
    (cut("start_place", "relocated_geocode"),
     "route 1: key 'start_place.relocated_geocode' is missing"),
    (cut("milestone_info"), "route 1: key 'milestone_info' is missing"),
    (cut("route_results", "geocode_list"), "route 1: key 'route_results.geocode_list' is missing"),
    (put(block("", "0 (north)"), "milestone_info"),
     "route 1: 1 blocks in 'milestone_info', 2 points in 'geocode_list'"),
    (put(7, "milestone_info"), "route 1: 0 blocks"),
    (put(block("", "0 (north)") + block("", "up"), "milestone_info"),
     "route 1, 'milestone_info' block 1.*got 'up'"),
    (put(block("", "0 (north)") + block("", "9 (up)"), "milestone_info"),
     "route 1.*block 1.*to_next_intersection_heading"),
    (put([], "route_results", "geocode_list"), "route 1, key 'geocode_list'"),
    (put([[1.0]], "route_results", "geocode_list"), "route 1"),
    (put([40.73, -74.0], "start_place", "relocated_geocode"),
     "route 1, relocated_geocode: no panorama within 20 m"),
    (put([[40.73, -74.0]] * 2, "route_results", "geocode_list"),
     "route 1, geocode_list 0: no panorama within 20 m"),
    (put("north", "init_heading"), "route 1, key 'init_heading'.*'north'"),
    (lambda records: ["nothing"], "route 0: key 'start_place"),
    (lambda records: {"a": 1}, "route 0"),
    (put([1e308, -74.0], "start_place", "relocated_geocode"),
     "route 1, relocated_geocode: expected"),
    (put([math.nan, -74.0], "start_place", "relocated_geocode"),
     "route 1, relocated_geocode: expected"),
    (put([[40.7, 10 ** 400]] * 2, "route_results", "geocode_list"),
     "route 1, geocode_list 0: expected"),
    (put(block("", "0 (north)") + block("", "9" * 5000 + " (north)"), "milestone_info"),
     "route 1.*block 1"),
    (put(10 ** 500, "init_heading"), "route 1, key 'init_heading'"),
    (put(block("", "0 (north)") + block("", "999 (south)"), "milestone_info"),
     "route 1.*block 1.*at most 360 degrees, got '999 .south.'"),
    (put(block("", "0 (north)") + block("", "-361 (south)"), "milestone_info"), "route 1.*block 1"),
    (put(block("", "0 (north)") + block("", "\u0661 (north)"), "milestone_info"),
     "route 1.*block 1"),
    (put(block("", "0 (north)") + block("\ud800 Cafe", "0 (north)"), "milestone_info"),
     "route 1: key 'milestone_info' holds half a character, '.ud800'"),
    (put(360.5, "init_heading"),
     "route 1, key 'init_heading': expected degrees from -360 to 360, got 360.5"),
    (put(math.nan, "init_heading"), "route 1, key 'init_heading'"),
    (put(1e308, "init_heading"), "route 1, key 'init_heading'"),
    (put(True, "init_heading"), "route 1, key 'init_heading'"),
    (put("12", "init_heading"), "route 1, key 'init_heading'"),
])
def test_a_broken_route_is_an_error_that_names_file_route_and_key(tmp_path, change, named):
    write_data(tmp_path, change)
    with pytest.raises(ValueError, match=f"route_infos.json, {named}"):
        make_env("virl-l", "id", root=tmp_path)


def test_an_initial_heading_may_be_written_with_a_point(tmp_path):
    write_data(tmp_path, put(12.0, "init_heading"))
    heading = make_env("virl-l", "id", root=tmp_path).routes[1].init_heading
    assert heading == 12 and type(heading) is int


@pytest.mark.parametrize("written, word", [(38.9, "slightly left"), (45.0, "slightly left"),
                                           (45.1, "left"), (-44.9, "slightly right")])
def test_an_initial_heading_with_a_fraction_is_turned_from_as_it_is(tmp_path, written, word):
    write_data(tmp_path, lambda records: [records[0] | {"init_heading": written}])
    env = make_env("virl-l", "id", root=tmp_path)
    env.reset(0)
    assert env.rail[0].heading == written
    assert env.sentences[0] == f"First turn {word} to face north."


def test_milestones_of_many_commas_or_blanks_are_read_in_a_second():
    for filler in (",", " ", "\t", ", ", ",\r", "\"", "\",", "'", "a", "a:", "{", "}", "\n",
                   "\n\""):
        for start in ("", "key: ", "key: \"", "\"key\": \"", "key"):
            text = start + filler * (300_000 // len(filler)) + "x"
            began = time.process_time()
            parse_milestones(text)
            assert time.process_time() - began < 1, (start, filler)
    assert parse_milestones("{a: b , c,,\t\r\n'd': 'e', \n f: ,\n}") == [
        {"a": "b , c", "d": "e", "f": ""}]


@pytest.mark.parametrize("text",
                         ["", "{}", "[]", "[1, 2]", "[[], 0]", "[[1], 2, 3]", "[" * 100_000])
def test_a_file_that_holds_no_routes_is_named(tmp_path, text):
    write_data(tmp_path)
    (tmp_path / "train" / "route_infos.json").write_text(text)
    with pytest.raises(ValueError, match="route_infos.json"):
        make_env("virl-l", "id", root=tmp_path)


@pytest.mark.parametrize("content", [b"", b"nonsense", pickle.dumps([1, 2]), pickle.dumps({1: 2}),
                                     pickle.dumps({("a", "b"): "c"})])
def test_a_mapping_that_is_none_is_named(tmp_path, content):
    (tmp_path / "m.pkl").write_bytes(content)
    with pytest.raises(ValueError, match="m.pkl"):
        Panoramas(tmp_path / "m.pkl")


@pytest.mark.parametrize("knobs, named", [
    (dict(root=""), "root ''.*synthetic_city"),
    (dict(root="nowhere"), "root 'nowhere'.*train or nyc_1k_routes"),
    (dict(action_space="up"), "action_space 'up': allowed are absolute, relative"),
    (dict(view_headings="x"), "view_headings 'x': allowed are prompt, official"),
    (dict(verify_iter=-1), "verify_iter -1"),
    (dict(resolution=0.5), "resolution 0.5: must be a whole number, 1 or more"),
    (dict(fold="train"), "fold 'train': virl-l has no such setting"),
    (dict(feedback="loud"), "feedback 'loud'")])
def test_a_setting_that_is_not_allowed_is_named(two_routes, knobs, named):
    task = "virl-vl" if set(knobs) & set(envs.PICTURE_SETTINGS) else "virl-l"
    with pytest.raises(ValueError, match=named):
        make_env(task, "id", **{"root": two_routes, **knobs})


def test_visual_ood_needs_pictures_and_its_data_set(two_routes):
    with pytest.raises(ValueError, match="split 'visual_ood': virl-l has id, rule_ood, unseen"):
        make_env("virl-l", "visual_ood", root=two_routes)
    with pytest.raises(ValueError, match="holds mini or VLN_mini"):
        make_env("virl-vl", "visual_ood", root=two_routes)


# ---- The rail ------------------------------------------------------------------------------------

def test_the_rail_of_a_hand_worked_route(two_routes, monkeypatch):
    monkeypatch.setattr(envs, "DROP_RATE", 0.0)
    env = Navigation(two_routes, in_order=True)
    env.reset(seed=0, episode=0)
    kinds = "turn forward forward forward forward turn forward forward forward forward stop".split()
    assert [position.kind for position in env.rail] == kinds
    assert [env.rail[i].action for i in (0, 1, 5, 10)] == [
        "turn_direction(north)", "forward()", "turn_direction(east)", "stop()"]
    # a turn is taken on leaving
    assert [position.heading for position in env.rail] == [200] + [0] * 5 + [90] * 5
    assert [position.pano for position in env.rail[:7]] == [
        "pano0", "pano3", "pano6", "pano10", "pano13", "pano16", "pano19"]
    # neither the start nor the stop
    assert [i for i, position in enumerate(env.rail) if position.intersection] == [5]
    assert {i: position.landmark for i, position in enumerate(env.rail) if position.landmark} == {
        5: "Marn Cafe is on your left front", 10: "The destination Aldo Books is on your left"}
    assert env.sentences == [
        "First turn right to face north.",
        "Go on to the next intersection, where Marn Cafe is on your left front.",
        "Turn right to face east.",
        "Go on until you are there: The destination Aldo Books is on your left."]
    assert [position.sentence for position in env.rail] == [
        env.sentences[i] for i in [0] + [1] * 4 + [2] + [3] * 5]


def test_relative_actions_are_the_same_rail_in_other_words(two_routes):
    absolute, relative = (Navigation(two_routes, action_space=space)
                          for space in ("absolute", "relative"))
    for seed in range(20):
        absolute.reset(seed=seed), relative.reset(seed=seed)
        assert len(absolute.rail) == len(relative.rail)
        for a, r in zip(absolute.rail, relative.rail):
            assert (a.kind, a.pano, a.heading, a.sentence) == (
                r.kind, r.pano, r.heading, r.sentence)
            if a.kind == "turn":
                assert r.action[15:-1] in vocabularies.RELATIVE
            else:
                assert a.action == r.action


def test_turns_are_named_modulo_360():
    assert [vocabularies.relative_word(d)
            for d in (0, 20, 45, 46, 179, -20, -45, -46, -179, 350, -350, 270, -270, 360)] == [
        "slightly left", "slightly right", "slightly right", "right", "right", "slightly left",
        "slightly left", "left",
        "left", "slightly left", "slightly right", "left", "right", "slightly left"]


def test_a_quarter_of_the_steps_fall_on_the_rail_as_often_as_the_drop_rate_says(two_routes):
    env = Navigation(two_routes)
    lengths = []
    for seed in range(400):
        env.reset(seed=seed)
        lengths.append(len(env.rail))
    # 3 + 8 x 0.5
    assert 3 <= min(lengths) and max(lengths) <= 11 and 6.6 < np.mean(lengths) < 7.4


def test_a_leg_shorter_than_five_metres_has_no_steps_and_keeps_the_sentences_right(
        tmp_path, monkeypatch):
    monkeypatch.setattr(envs, "DROP_RATE", 0.0)
    write_data(tmp_path, put([[float(x) for x in START + 160 * NORTH + 150 * EAST + 3 * NORTH],
                              [float(x) for x in START + 160 * NORTH]], "route_results",
                             "geocode_list"))
    env = Navigation(tmp_path, in_order=True)
    env.reset(seed=0, episode=1)
    assert [position.kind for position in env.rail] == [
        "turn", "turn", "forward", "forward", "forward", "forward", "stop"]
    assert [env.sentences.index(position.sentence) for position in env.rail] == [
        0, 2, 3, 3, 3, 3, 3]


def test_an_initial_heading_of_zero_is_drawn_and_another_is_kept(two_routes):
    env = Navigation(two_routes, in_order=True)
    headings = set()
    for seed in range(30):
        env.reset(seed=seed, episode=0)
        assert env.rail[0].heading == 200
        env.reset(seed=seed, episode=1)
        headings.add(env.rail[0].heading)
    assert len(headings) > 20 and min(headings) >= 0 and max(headings) < 360


def test_file_order_goes_round_and_a_seed_fixes_an_episode(city):
    env = Navigation(city, data="mini", in_order=True)
    first = [(env.reset(seed=1, episode=i), env.sentences)[1] for i in range(36)]
    assert first[:18] != first[1:19] and len({tuple(s[1:]) for s in first[:18]}) == 18
    # the first turn depends on a drawn heading
    assert [s[1:] for s in first[:18]] == [s[1:] for s in first[18:]]
    env = make_env("virl-l", "id", root=city)
    one, two = copy.deepcopy((env.reset(seed="a"), env.rail)), (env.reset(seed="a"), env.rail)
    assert one == two and one != (env.reset(seed="b"), env.rail)


# ---- Playing -------------------------------------------------------------------------------------

@pytest.mark.parametrize("split", ["id", "rule_ood", "unseen"])
def test_the_expert_earns_one_per_position_and_succeeds_on_every_route(city, split):
    env = make_env("virl-l", split, root=city)
    env.in_order = True
    for episode in range(len(env.routes)):
        env.reset(seed=episode, episode=episode)
        num = len(env.rail)
        rewards, info = finish(env)
        assert rewards == [1.0] * num and info["success"] and info["turn"] == num


def test_a_wrong_reply_moves_nobody_and_the_limit_truncates(city):
    env = make_env("virl-l", "id", root=city, verify_iter=3)
    for seed in range(30):
        env.reset(seed=seed)
        for _ in range(seed % 4):
            env.step(env.expert_reply())
        before = env.position
        for tries in (1, 2, 3):
            reply = env.flawed_reply()
            messages, reward, terminated, truncated, info = env.step(reply)
            assert env.position == before and not terminated and not info["success"]
            assert not info["new_dialogue"]
            assert reward == (-1.5 if info["status"] == "wrong_observation"
                              else -1.0) + LAST_TRY_PENALTY * (tries == 3)
            assert messages[-2] == {"role": "assistant", "content": reply}
            assert len(messages) == 1 + 2 * tries
            assert info["try"] == tries and truncated == (tries == 3)
        with pytest.raises(RuntimeError, match="reset"):
            env.step("")


def test_a_correct_action_begins_a_new_dialogue_that_tells_what_was_done_and_no_failed_try(city):
    env = make_env("virl-l", "id", root=city)
    env.reset(seed=0)
    flawed = env.flawed_reply()
    env.step(flawed)
    expert = env.expert_reply()
    messages, *_, info = env.step(expert)
    assert info["new_dialogue"] and len(messages) == 1 and info["try"] == 2
    assert f"No landmark -> {json.loads(expert)['action']}\n" in messages[0]["content"]
    assert json.loads(flawed)["action"] + "\n" not in messages[0]["content"].split("So far:")[1]


def test_the_prompt_names_the_words_that_an_action_takes_and_no_others(city):
    for split, own, other in (("id", vocabularies.COMPASS, vocabularies.RELATIVE),
                              ("rule_ood", vocabularies.RELATIVE, vocabularies.COMPASS)):
        env = make_env("virl-l", split, root=city)
        prompt = env.reset(seed=0)[0][0]["content"]
        words = re.search(r"x is one of (.*)\.", prompt)[1].split(", ")
        assert tuple(words) == own and not set(words) & set(other)


def test_every_turn_stands_in_the_instructions_in_both_vocabularies(city):
    absolute, relative = (make_env("virl-l", split, root=city) for split in ("id", "rule_ood"))
    for seed in range(50):
        absolute.reset(seed=seed), relative.reset(seed=seed)
        for a, r in zip(absolute.rail, relative.rail):
            if a.kind == "turn":
                assert re.search(rf"\bturn {r.action[15:-1]} to face {a.action[15:-1]}\.",
                                 a.sentence, re.I)


def test_skipping_ahead_shows_what_the_expert_would_see_there(city):
    env, walker = (make_env("virl-l", "id", root=city) for _ in range(2))
    rng = random.Random(0)
    for seed in range(50):
        env.reset(seed=seed), walker.reset(seed=seed)
        messages = env.skip_ahead(rng, balance=seed % 2 == 0)
        while walker.at < env.at:
            walker.step(walker.expert_reply())
        assert messages == walker.messages and env.expert_reply() == walker.expert_reply()


def test_balance_shows_turns_forwards_and_stops_equally_often(city):
    env, rng = make_env("virl-l", "id", root=city), random.Random(0)
    counts = {}
    for balance in (False, True):
        kinds = []
        for seed in range(600):
            env.reset(seed=seed)
            env.skip_ahead(rng, balance)
            kinds.append(env.position.kind)
        counts[balance] = [kinds.count(kind) / 600 for kind in ("turn", "forward", "stop")]
    assert counts[False][1] > 0.5 and counts[False][2] < 0.15
    assert all(0.25 < share < 0.42 for share in counts[True])


def test_two_environments_share_their_routes_and_nothing_else(city):
    one, two = (make_env("virl-l", "id", root=city) for _ in range(2))
    assert one.routes is two.routes
    one.reset(seed=0), two.reset(seed=0)
    for _ in range(3):
        one.step(one.expert_reply())
    assert two.at == 0 and two.turn == 0


def test_a_step_in_words_takes_less_than_a_fifth_of_a_millisecond(city):
    env = make_env("virl-l", "id", root=city)
    best = math.inf
    for _ in range(5):
        steps, started = 0, time.process_time()
        for seed in range(40):
            env.reset(seed=seed)
            steps += len(finish(env)[0])
        best = min(best, (time.process_time() - started) / steps)
    assert best < 0.2e-3


def test_a_prompt_file_can_number_sentences_and_steps(city, tmp_path):
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps({"nav_sentence": "{n}. {sentence}\n",
                                "nav_past": "O_{n}: {observation}\nA_{n}: {action}\n",
                                "nav_between": "{landmark}; "}))
    env = make_env("virl-l", "id", root=city, prompt_file=str(path))
    env.reset(seed=0)
    prompt = env.step(env.expert_reply())[0][0]["content"]
    assert "1. First turn" in prompt and "O_1: No landmark; \nA_1: turn_direction(" in prompt
    assert "A_2: \n" in prompt
    path.write_text('{"nav_turn": "{n}. go"}')
    with pytest.raises(ValueError, match=r"'nav_turn' uses \{n\}; allowed: dir, rel"):
        make_env("virl-l", "id", root=city, prompt_file=str(path))


# ---- Pictures ------------------------------------------------------------------------------------

def paint(path, width=512, **metadata):
    """A panorama whose colour tells where it looks.

    Red is the longitude, green the latitude, blue the hemisphere.
    """
    column, row = np.meshgrid(np.arange(width) / (width - 1),
                              np.arange(width // 2) / (width // 2 - 1))
    pixels = np.stack([255 * np.abs(2 * column - 1), 255 * row, 255 * (column > 0.5)], -1)
    Image.fromarray(pixels.round().astype(np.uint8)).save(path, quality=100, subsampling=0)
    path.with_suffix(".metadata.json").write_text(json.dumps({"rotation": 0, **metadata}))


@pytest.fixture
def pictures(two_routes):
    (two_routes / "train" / "street_views").mkdir()
    for i in range(32):
        paint(two_routes / "train" / "street_views" / f"pano{i}.jpg", rotation=30)
    return two_routes


def pack(panorama):
    """(H, W, 3) bytes as the numbers that read_panorama gives."""
    return np.asarray(Image.fromarray(panorama).convert("RGBX")).view(np.uint32)[..., 0]


def test_a_view_looks_where_its_formula_says():
    """Against the ray of each pixel, as in the official street_view.py, but bilinear."""
    rng = np.random.default_rng(0)
    panorama = np.asarray(
        Image.fromarray(rng.integers(0, 255, (8, 16, 3), dtype=np.uint8)).resize((128, 64)))
    size, height, width = 21, 64, 128
    for heading, rotation in ((0, 0), (37, 120), (300, 255.5)):
        view = crop_view(pack(panorama), rotation, heading, size)
        theta = math.radians((heading - 180) % 360 + rotation)
        for v, u in itertools.product(range(0, size, 4), repeat=2):
            x, y, z = (u - (size - 1) / 2) / (size / 2), (v - (size - 1) / 2) / (size / 2), 1.0
            x, z = x * math.cos(theta) + z * math.sin(theta), z * math.cos(theta) - x * math.sin(
                theta)
            X = (math.atan2(x, z) / (2 * math.pi) + 0.5) * (width - 1)
            Y = (math.asin(y / math.sqrt(x * x + y * y + z * z)) / math.pi + 0.5) * (height - 1)
            left, top = int(X) % (width - 1), int(Y)
            fx, fy = X - int(X), Y - top
            block = panorama[top:top + 2, left:left + 2].astype(float)
            expected = (block[0, 0] * (1 - fx) + block[0, 1] * fx) * (1 - fy) + (
                block[1, 0] * (1 - fx) + block[1, 1] * fx) * fy
            assert np.abs(view[v, u] - expected).max() < 3


def test_the_grid_shows_front_right_back_and_left_as_the_prompt_says(pictures):
    env = make_env("virl-vl", "id", root=pictures, resolution=64)
    messages, _ = env.reset(seed=0)
    picture, text = messages[0]["content"]
    grid = np.asarray(picture["image"])
    assert grid.shape == (133, 133, 3) and not grid[64:69].any() and not grid[:, 64:69].any()
    panorama, rotation = read_panorama(env.folder / "street_views" / f"{env.position.pano}.jpg")
    for i, turn in enumerate((0, 90, 180, 270)):
        x, y = i % 2 * 69, i // 2 * 69
        view = crop_view(panorama, rotation, env.position.heading + turn, 64)
        assert (grid[y:y + 64, x:x + 64] == view).all()
    assert "front and right above, back and left below" in text["text"]
    assert "So far:\nThe picture -> \n" in text["text"]


def test_views_turn_with_the_agent_and_official_headings_can_be_asked_for(pictures):
    ours, theirs = (make_env("virl-vl", "id", root=pictures, resolution=32, view_headings=name)
                    for name in ("prompt", "official"))
    ours.reset(seed=0), theirs.reset(seed=0)
    assert ours.position == theirs.position and ours.picture() != theirs.picture()
    first = ours.picture()
    ours.step(ours.expert_reply())
    assert ours.picture() != first


def test_pictures_change_no_rail_and_the_expert_still_tells_what_is_there(pictures):
    words, views = (make_env(task, "id", root=pictures, **more)
                    for task, more in (("virl-l", {}), ("virl-vl", {"resolution": 16})))
    for seed in range(5):
        words.reset(seed=seed), views.reset(seed=seed)
        assert words.rail == views.rail
        while not words.done:
            assert words.expert_reply() == views.expert_reply()
            words.step(words.expert_reply())
            *_, info = views.step(views.expert_reply())
        assert info["success"]


def test_landmarks_are_not_told_in_words_where_they_are_shown(pictures):
    env = make_env("virl-vl", "id", root=pictures, resolution=16)
    env.reset(seed=0)
    while env.position.kind != "stop":
        env.step(env.expert_reply())
    assert env.position.landmark not in env.messages[0]["content"][1]["text"].split("So far:")[1]


@pytest.mark.parametrize("spoil, named", [
    (lambda folder: (folder / "pano16.jpg").unlink(), "route 0: .*pano16.jpg is missing"),
    (lambda folder: (folder / "pano16.metadata.json").unlink(),
     "route 0: .*pano16.metadata.json is missing"),
    (lambda folder: (folder / "pano16.jpg").write_text("text"), "pano16.jpg: not a picture"),
    (lambda folder: Image.new("RGB", (512, 300)).save(folder / "pano16.jpg"),
     "pano16.jpg.*twice as wide as high, not 512x300")])
def test_a_spoilt_picture_is_named_at_load_time(pictures, spoil, named):
    spoil(pictures / "train" / "street_views")
    with pytest.raises(ValueError, match=named):
        make_env("virl-vl", "id", root=pictures)
    make_env("virl-l", "id", root=pictures)                       # words do not mind


def test_a_panorama_that_is_shown_turned_is_measured_and_cropped_as_it_is_shown(pictures):
    path, exif = pictures / "train" / "street_views" / "pano16.jpg", Image.Exif()
    upright, exif[ExifTags.Base.Orientation] = Image.open(path), 6
    upright.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif, quality=100, subsampling=0)
    make_env("virl-vl", "id", root=pictures)
    streets.read_panorama.cache_clear()
    pixels = read_panorama(path)[0]
    assert pixels.shape == (256, 512)
    assert np.abs(
        pixels.view(np.uint8).reshape(256, 512, 4)[..., :3] - np.asarray(upright, int)).max() < 30
    # 2:1 in the file, 1:2 on the screen
    upright.save(path, exif=exif)
    streets.load_routes.cache_clear()
    with pytest.raises(ValueError,
                       match="pano16.jpg: a panorama must be twice as wide as high, not 256x512"):
        make_env("virl-vl", "id", root=pictures)


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", "7", '{"rotation": null}',
                                  '{"rotation": NaN}', '{"rotation": [1]}'])
def test_a_rotation_that_is_none_is_named_at_load_time(pictures, text):
    (pictures / "train" / "street_views" / "pano16.metadata.json").write_text(text)
    with pytest.raises(
        ValueError, match=r"pano16.metadata.json: expected a JSON object with a number 'rotation'"):
        make_env("virl-vl", "id", root=pictures)


def test_half_a_picture_is_named_when_it_is_read(pictures):
    for path in (pictures / "train" / "street_views").glob("*.jpg"):
        path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"pano\d+.jpg: "):
        make_env("virl-vl", "id", root=pictures).reset(seed=0)


def test_show_writes_the_views_and_the_prompt_of_every_position(pictures, tmp_path):
    done = subprocess.run([sys.executable, "envs.py", "virl-l", f"root={pictures}", "--show",
                           str(tmp_path / "shown")],
                          cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    texts, views = (sorted((tmp_path / "shown").glob(f"*.{kind}")) for kind in ("txt", "png"))
    assert len(texts) == len(views) >= 3
    assert texts[0].read_text().startswith("Walk to a destination")
    assert Image.open(views[0]).size == (901, 901)
    for path in (pictures / "train" / "street_views").glob("*.jpg"):
        path.unlink()
    done = subprocess.run([sys.executable, "envs.py", "virl-l", f"root={pictures}", "--show",
                           str(tmp_path / "again")],
                          cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "not a picture" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("in_order, more", [
    (False, []), (True, []), (False, ["reward=random", "faults=walk_past:0.5"])])
def test_the_page_of_a_run_shows_the_views_of_every_position(pictures, tmp_path, in_order, more):
    env = make_env("virl-vl", root=str(pictures), resolution=16, in_order=in_order)
    # of 3 environments the second, its third episode
    env.reset("5/rl/1/2", episode=2 * 3 + 1)
    rows = [{"step": 1, "env": 1, "episode": 2, "position": at, "done": False, "success": False,
             "verdicts": [], "messages": []}
            for at in range(len(env.rail))]
    run = write_conversations(tmp_path / "run", *rows, task="virl-vl",
                              env=[f"root={pictures}", "resolution=16", *more],
                              split=["id", f"in_order={str(in_order).lower()}"], seed=5, num_envs=3)
    transcripts.read_run(run, tmp_path / "page.html", make_env)
    shown = re.findall(r'src="data:image/png;base64,([^"]+)"', (tmp_path / "page.html").read_text())
    assert len(set(shown)) > 2
    for env.at, data in enumerate(shown):
        assert Image.open(io.BytesIO(base64.b64decode(data))).tobytes() == env.picture().tobytes()
    assert env.at == len(env.rail) - 1


def test_pictures_of_another_city_of_the_same_name_are_not_drawn(pictures, tmp_path):
    city = tmp_path / "city"
    shutil.copytree(pictures, city)
    env = make_env("virl-vl", root=str(city), resolution=16)
    env.reset("5/rl/0/0", episode=0)
    turn = {"step": 1, "env": 0, "episode": 0, "position": 0, "done": False, "success": False,
            "verdicts": [], "messages": []}
    run = write_conversations(tmp_path / "run", turn, task="virl-vl",
                              env=[f"root={city}", "resolution=16"], split=["id"], seed=5)
    files = digests.files_of([env])
    (run / "inputs.json").write_text(json.dumps({"files": files}))
    row = {"split": "id", "seed": 0, "episode": 0, "position": 0, "success": True,
           "settings": {"task": "virl-vl", "env": dict(env.settings), "files": files}}
    transcripts.read_run(run, tmp_path / "page.html", make_env)
    assert transcripts.picture_of_row(row, make_env)
    routes = city / "train" / "route_infos.json"
    routes.write_text(routes.read_text() + "\n")
    for draw in (partial(transcripts.read_run, run, tmp_path / "page.html", make_env),
                 partial(transcripts.picture_of_row, row, make_env)):
        with pytest.raises(ValueError, match="cannot be drawn again, since a city, card_dir"):
            draw()


def test_a_dump_writes_the_pictures_beside_the_released_shape(pictures, tmp_path):
    import sft
    sft.main(sft.Config(task="virl-vl", env=(f"root={pictures}",), dump=str(tmp_path / "sft.json"),
                        num=3))
    records = json.loads((tmp_path / "sft.json").read_text())
    for i, record in enumerate(records):
        assert record["image"] == f"sft/{i:06d}.png"
        assert Image.open(tmp_path / record["image"]).size == (901, 901)
        human, gpt = record["conversations"]
        assert human["from"] == "human" and human["value"].startswith("<image>\nWalk to")
        assert gpt["from"] == "gpt"
        assert json.loads(gpt["value"])["action"]
    samples = sft.Samples(sft.Config(task="virl-vl", env=(f"root={pictures}",)))
    pairs = read_conversations(tmp_path / "sft.json", True, "<|image|>")
    assert [(read_text(pair.messages[0]), pair.reply) for pair in pairs] == [
        (read_text(messages[0]), reply) for messages, reply in (samples[i] for i in range(3))]
    with pytest.raises(ValueError,
                       match="record 0: key 'image': a task with pictures needs one file per "
                             "record, another"):
        read_conversations(tmp_path / "sft.json", False, "<|image|>")


# ---- Judging -------------------------------------------------------------------------------------

def reply(action, observation):
    return json.dumps({"current observation": observation, "current instruction": "",
                       "action": action})


@pytest.mark.parametrize("stated, observed, status, reward", [
    ("forward()", "Marn Cafe; intersection", "correct", 1.0),
    ("forward()", "nothing at all", "correct", 1.0),                       # a right action is right
    ("stop()", "Marn Cafe is on your left; intersection", "wrong_action", -1.0),
    ("stop()", "MARN  cafe, an Intersection", "wrong_action", -1.0),
    ("stop()", "Marn Cafe", "wrong_observation", -1.5),
    ("stop()", "intersection", "wrong_observation", -1.5),
    ("stop()", "Marn Cafe, no intersection", "wrong_observation", -1.5),
    ("forward", "Marn Cafe; intersection", "wrong_action", -1.0),
    ("Forward()", "Marn Cafe; intersection", "correct", 1.0),              # in any spelling
    (" forward ( ). ", "", "correct", 1.0),
    ("'forward()'", "", "correct", 1.0),
    ("stop()", "Marn Cafe, not an intersection", "wrong_observation", -1.5),
    ("stop()", "No landmark but Marn Cafe at this intersection", "wrong_action", -1.0),
    (["forward()"], "Marn Cafe; intersection", "wrong_action", -1.0),
    (None, "Marn Cafe; intersection", "wrong_action", -1.0),
    ("stop()", None, "wrong_observation", -1.5),
    ("stop()", 7, "wrong_observation", -1.5),
])
def test_every_row_of_the_papers_table(stated, observed, status, reward):
    verdict = judge_navigation(reply(stated, observed), "forward()", "Marn Cafe", True)
    assert (verdict.status, verdict.reward) == (status, reward)


def test_an_intersection_where_there_is_none_is_a_wrong_observation():
    for observed, status in (("No landmark", "wrong_action"), ("no intersection", "wrong_action"),
                             ("I am not at an intersection", "wrong_action"),
                             ("there isn\u2019t an intersection", "wrong_action"),
                             ("I do not see any intersection", "wrong_action"),
                             ("no sign of an intersection", "wrong_action"),
                             ("no crossing or intersection", "wrong_action"),
                             ("I see no busy intersection", "wrong_action"),
                             ("intersection: none", "wrong_action"),
                             ("no landmark at this intersection", "wrong_observation"),
                             ("not far; intersection", "wrong_observation"),
                             ("an intersection", "wrong_observation")):
        assert judge_navigation(reply("stop()", observed), "forward()", "", False).status == status
    assert judge_navigation(reply("stop()", "The Intersection Bar"), "forward()",
                            "The Intersection Bar", False).status == "wrong_action"


@pytest.mark.parametrize("stated, action",
                         [("Turn_Direction( Slightly  Left )", "turn_direction(slightly left)"),
                                            ('turn_direction("north").', "turn_direction(north)"),
                          ("STOP()", "stop()")])
def test_an_action_is_read_in_any_spelling(stated, action):
    assert judge_navigation(reply(stated, ""), action, "", False).status == "correct"
    assert judge_navigation(reply(stated, ""), "turn_direction(left)", "",
                            False).status == "wrong_action"


@pytest.mark.parametrize("observed", ["Cafe\u0301 d\u2019Or is on your left", "CAFÉ D'OR"])
def test_a_name_is_read_in_any_spelling_of_its_accents_and_apostrophes(observed):
    for name in ("Caf\u00e9 d'Or", "Cafe\u0301 d\u2019Or"):
        assert judge_navigation(reply("stop()", observed), "forward()", name,
                                False).status == "wrong_action"


def test_an_action_is_read_from_an_object_that_is_not_whole():
    whole = reply("forward()", "Marn Cafe")
    for text in (whole[:-1], whole[1:-1], whole.replace(",", ""),
                 whole.replace("Marn Cafe", 'the "Marn" Cafe'),
                 whole.replace("{", "{ // where am I?\n")):
        verdict = judge_navigation(text, "forward()", "Marn Cafe", False)
        assert verdict.status == "correct" and text[verdict.answer_at:].startswith('"action"')


def test_the_verdict_says_what_was_wrong_and_never_what_is_right():
    told = [judge_navigation(text, "turn_direction(east)", "Marn Cafe", True).message for text in
            (reply("stop()", "Marn Cafe; intersection"), reply("stop()", ""),
             reply("stop()", "Marn Cafe"), "mumble")]
    assert told[0] == "The action stop() is wrong here."
    assert told[1] == told[0] + " You did not name the landmark in sight."
    assert told[2] == told[0] + " You did not see the intersection."
    assert told[3].startswith('No JSON object with an "action" was found in your reply.')
    assert not any("east" in text or "Marn" in text for text in told)
    assert judge_navigation("mumble", "stop()", "Marn Cafe", True,
                            "plain").message == "That is not correct."


def test_replies_as_models_write_them_are_read():
    for text in (
            "```json\n{'current observation': 'Marn Cafe; intersection', 'action': 'forward()',}\n"
            "```",
            'I go on. {"action": "stop()"} no: {current observation: x, action: forward()}',
            '{"current observation": "Marn Cafe is on your left", "current instruction": "Go.", '
            '"action": "forward()",}'):
        assert judge_navigation(text, "forward()", "Marn Cafe", True).status == "correct", text


def test_every_verdict_can_be_encoded(city):
    """Half a character, as JSON can spell it, must not reach the tokenizer."""
    env = make_env("virl-l", "id", root=city)
    env.reset(seed=0)
    messages, *_ = env.step('{"action": "\\ud83d"}')
    assert "The action ? is wrong here." in messages[-1]["content"]
    messages[-1]["content"].encode("utf-8")


def test_any_string_is_judged(city):
    rng = random.Random(0)
    pieces = ['{', '}', '"', "'", '"action"', ":", "forward()", "current observation", ",", "[",
              "]", "\\", "\n", "é", "null", "1e999"]
    for _ in range(5000):
        text = "".join(rng.choice(pieces) for _ in range(rng.randint(0, 30)))
        assert judge_navigation(text, "forward()", "Marn Cafe",
                                rng.random() < 0.5).reward in (1.0, -1.0, -1.5)
    env = make_env("virl-l", "id", root=city)
    env.reset(seed=0)
    assert env.step("")[1] == -1.0 and env.step("{" * 10_000)[1] == -2.0


def test_an_imperfect_demonstrator_walks_past_intersections_and_takes_the_other_rules_word(city):
    env, seen = make_env("virl-l", "rule_ood", root=str(city),
                         faults="walk_past:0.5,other_word:0.2"), []
    for seed in range(200):
        env.reset(seed)
        while not env.done:
            reply, here = json.loads(env.demonstrate()), env.position
            if reply["action"] != here.action:
                assert here.kind == "turn"
                seen.append("past" if reply["action"] == "forward()" else "word")
                if seen[-1] == "past":
                    following = env.rail[env.at + 1]
                    assert here.intersection and reply["current instruction"] in env.sentences[1::2]
                    assert following.kind != "forward" or reply[
                        "current instruction"] == following.sentence
                else:
                    assert reply["action"][15:-1] in vocabularies.COMPASS
                    assert env.format_reply(reply["action"]) == json.dumps(reply)
            elif here.intersection:
                seen.append("right")
            env.step(env.expert_reply())
    at_intersections = seen.count("past") / (seen.count("past") + seen.count("right"))
    assert 0.5 < at_intersections < 0.7 and 20 < seen.count("word")


def test_a_long_observation_of_accents_takes_no_time():
    began = time.thread_time()
    judge_navigation(reply("stop()", "e" + "\u0301\u0323" * 20_000), "forward()", "Marn Cafe",
                     False)
    assert time.thread_time() - began < 0.1


def test_of_the_words_that_the_teacher_says_as_many_are_mixed_up_as_paper_md_says(tmp_path):
    """Positions are drawn as recipes/base.sh has them drawn, on routes of two or three legs."""
    subprocess.run([sys.executable, str(ROOT / "data" / "synthetic_city.py"), "--out",
                    str(tmp_path / "city"), "--routes", "300", "--most-legs", "3",
                    "--no-pictures"], check=True, capture_output=True)
    for share, said, printed in ((0.05, 13, "1 in 13"), (0.15, 4, "1 in 4"),
                                 (0.3, 2, "nearly 1 in 2")):
        faults = f"walk_past:0.6,other_word:{share}"
        env = make_env("virl-l", "id", root=str(tmp_path / "city"), faults=faults)
        passed = words = mixed_up = 0
        for seed in range(6000):
            env.reset(seed)
            env.skip_ahead(random.Random(seed), balance=True)
            if env.position.kind != "turn":
                continue
            action = json.loads(env.demonstrate())["action"]
            if action == "forward()":
                passed += 1
            else:
                words += 1
                mixed_up += action != env.position.action
        # As many are mixed up as if all directions were named, so of fewer it is a larger share.
        named = words / (passed + words)
        assert round(named / share) == said
        assert mixed_up / words == pytest.approx(share / named, rel=0.15)
        # Not 0.6: the first direction of a route is never passed.
        assert 0.32 < passed / (passed + words) < 0.39
        assert f"|{printed}|" in (ROOT / "results" / "paper.md").read_text()


def test_a_guide_goes_on_where_all_tries_have_failed(city):
    """One early mistake does not hide what comes later. Success still means the whole route."""
    plain = make_env("virl-l", "id", root=city)
    env = make_env("virl-l", "id", root=city, guided="true")
    for seed in range(5):
        plain.reset(seed)
        env.reset(seed)
        assert [place.action for place in env.rail] == [place.action for place in plain.rail]
        wrong_at = {0, 2}
        tried, ended = [], False
        while not ended:
            at = env.at
            tried.append(at)
            reply = env.format_reply("stop(x)") if at in wrong_at else env.expert_reply()
            messages, reward, terminated, truncated, info = env.step(reply)
            ended = terminated or truncated
            assert ("guided" in info) == (at > 0)      # the first position fails
            if at in wrong_at and info["try"] == 2:
                assert reward == -1.0 + LAST_TRY_PENALTY and info["new_dialogue"] == (not ended)
                assert env.at == at + 1 and len(messages) == 1     # a prompt alone
        positions = list(range(len(env.rail)))
        assert sorted(tried) == sorted([*positions, *wrong_at]) and not info["success"]
        assert terminated and env.done
        # The prompt tells the expert's way, not what was said.
        assert "stop(x)" not in messages[0]["content"]
        # Without a failed position it is the environment as it is.
        env.reset(seed)
        plain.reset(seed)
        while not env.done:
            assert env.step(env.expert_reply()) == plain.step(plain.expert_reply())
    with pytest.raises(ValueError, match="guided: gp-l has one position only"):
        make_env("gp-l", "id", guided=True)
    env.reset(0)
    for _ in range(2 * len(env.rail)):
        last = env.step("no")
    assert last[3] and env.done and not last[4]["success"]
