"""The synthetic city: the released file format, the same bytes every time, boards in sight."""
import ast
import json
import math
import pickle
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from conftest import ROOT, tiny_folder
from support.conversations import read_conversations

sys.path.insert(0, str(ROOT / "data"))
import synthetic_city  # noqa: E402

SETS = ("train", "unseen", "mini")


def generate(folder, *flags):
    """Run the generator in a process of its own and return its folder."""
    command = [sys.executable, str(ROOT / "data" / "synthetic_city.py"), "--out", str(folder),
               *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*")) if path.is_file()}


def read(folder):
    """(routes, mapping) of one set."""
    routes, cursor = json.loads((folder / "route_infos.json").read_text())
    assert cursor == len(routes)
    return routes, pickle.loads((folder / "gps_pano_mapping.pkl").read_bytes())


def blocks(route):
    """The milestones as dicts: every block is a Python literal."""
    return [ast.literal_eval(text.strip() + "}")
            for text in route["milestone_info"].split("}") if text.strip()]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return generate(tmp_path_factory.mktemp("words") / "city", "--routes", 300, "--no-pictures")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return generate(tmp_path_factory.mktemp("drawn") / "city", "--routes", 1, "--unseen", 1,
                    "--size", 256, "--workers", 2)


@pytest.fixture(scope="module")
def scene():
    return synthetic_city.scene_of(0, 4)      # its boards have no frame


def test_two_processes_write_the_same_words(words, tmp_path):
    assert (contents(generate(tmp_path / "city", "--routes", 300, "--no-pictures"))
            == contents(words))
    other = generate(tmp_path / "other", "--routes", 300, "--no-pictures", "--seed", 1)
    assert not set(contents(other).values()) & set(contents(words).values())


def test_another_process_paints_the_same_pictures_whoever_else_paints(drawn, tmp_path):
    """Two workers painted the fixture; this process paints some of it again, last ones first."""
    for name, number in [("train", 0), ("mini", 4)]:
        ids = synthetic_city.scene_of(0, number).city.ids
        panos = [ids.index(pano) for pano in read(drawn / name)[1].values() if pano in ids][:12]
        for pano in panos[::-1]:
            synthetic_city.write_picture((0, number, "names", pano, 256, [tmp_path]))
            for file in (f"{ids[pano]}.jpg", f"{ids[pano]}.metadata.json"):
                assert ((tmp_path / file).read_bytes()
                        == (drawn / name / "street_views" / file).read_bytes())


def test_words_and_mapping_do_not_depend_on_pictures(drawn, tmp_path):
    without = generate(tmp_path / "city", "--routes", 1, "--unseen", 1, "--no-pictures")
    assert contents(without) == {name: data for name, data in contents(drawn).items()
                                 if "street_views" not in name}


def test_a_route_does_not_depend_on_how_many_are_drawn(words, drawn):
    routes = read(words / "train")[0]
    assert routes[:1] + routes[1:2] == read(drawn / "train")[0] + read(drawn / "unseen")[0]


def test_unseen_routes_are_not_among_the_training_routes(words):
    seen, unseen = ({route["milestone_info"] + str(route["start_place"]["relocated_geocode"])
                     for route in read(words / name)[0]} for name in ("train", "unseen"))
    assert len(seen) == 300 and len(unseen) == 48 and not seen & unseen


def test_all_eight_compass_words_occur(words):
    said = {re.search(r"\((\w+)\)", block["to_next_intersection_heading"])[1]
            for route in read(words / "train")[0] for block in blocks(route)}
    assert said == set(synthetic_city.COMPASS)


def test_every_route_has_the_shape_of_the_released_ones(words):
    for name, lengths, num in [("train", range(2, 9), 300), ("unseen", range(2, 9), 48),
                               ("mini", (2, 3), 18)]:
        routes, _ = read(words / name)
        assert (len(routes) == num
                and {len(route["route_results"]["geocode_list"]) for route in routes}
                == set(lengths))
        for route in routes:
            points = route["route_results"]["geocode_list"]
            k, milestones = len(points), blocks(route)
            assert len(milestones) == k and len(route["route_results"]["landmark_list"]) == k - 1
            assert route["init_heading"] == 0 and milestones[-1]["landmarks"].startswith(
                f"The destination {route['dest_place']['name']} is on your ")
            walked = [route["start_place"]["relocated_geocode"], *points]
            landmarks = [*route["route_results"]["landmark_list"], None]
            for block, landmark, a, b in zip(milestones, landmarks, walked, points):
                heading, word = re.fullmatch(r"(\d+) \((\w+)\)",
                                             block["to_next_intersection_heading"]).groups()
                assert int(heading) == int(synthetic_city.bearing(a, b))
                assert word == synthetic_city.COMPASS[round(int(heading) / 45) % 8]
                place = landmark or (route["dest_place"] if block is milestones[-1] else None)
                if place is None:
                    assert block["landmarks"] == "No landmark nearby"
                    continue
                side = round(
                    (synthetic_city.bearing(b, place["geocode"]) - int(heading)) % 360 / 45) % 8
                assert block["landmarks"].endswith(f"{place['name']} is on your "
                                                   f"{synthetic_city.SIDES[side]}")


def test_names_obey_the_rules_and_no_two_cities_share_one():
    owner = {}
    for number in range(10):
        city = synthetic_city.City(0, number)
        for place in [*city.landmarks, *(street.place for street in city.streets)]:
            if place:
                assert owner.setdefault(place.name, number) == number
                assert place.name.isascii() and not re.search(r"[{}\n\"]|^'|intersection",
                                                              place.name)
    assert len(owner) > 1000


def test_the_mini_set_visits_cities_one_to_nine_in_order(words):
    regions = [route["dest_place"]["region"] for route in read(words / "mini")[0]]
    assert regions == [f"city {number}" for number in range(1, 10) for _ in range(2)]
    # City 1 has the palette of the training city, each of the others a new one.
    assert synthetic_city.scene_of(0, 0).palette == synthetic_city.scene_of(0, 1).palette
    assert len(set(synthetic_city.PALETTES)) == 9


def test_every_point_the_environment_may_ask_for_is_in_the_mapping(words):
    """A rail by brute force: the small mapping answers as that of the whole city does."""
    city = synthetic_city.City(0, 0)
    whole = dict(zip(city.geocodes, city.ids))
    for name in ("train", "unseen"):
        routes, mapping = read(words / name)
        # The mapping keeps the order of the city.
        assert list(mapping.items()) == [item for item in whole.items() if item[0] in mapping]
        asked = set()
        for route in routes:
            prev = tuple(route["start_place"]["relocated_geocode"])
            for point in map(tuple, route["route_results"]["geocode_list"]):
                assert prev in mapping and point in mapping
                asked |= {tuple(p * (1 - s / 5) + q * s / 5 for p, q in zip(prev, point))
                          for s in range(1, 5)}
                prev = point
        asked, found = np.radians(sorted(asked)[:1500]), []
        for entries in (whole, mapping):
            keys, ids = np.radians(list(entries)), list(entries.values())
            half = np.sin((asked[:, None] - keys) / 2) ** 2
            squares = half[..., 0] + np.cos(asked[:, :1]) * np.cos(keys[:, 0]) * half[..., 1]
            metres = 2 * 6371e3 * np.arcsin(np.sqrt(squares))
            assert metres.min(1).max() < 20
            found.append([ids[i] for i in metres.argmin(1)])
        assert found[0] == found[1]


def test_every_panorama_has_its_picture_twice_as_wide_as_high(drawn):
    for name in SETS:
        _, mapping = read(drawn / name)
        views = drawn / name / "street_views"
        names = {pano + end for pano in mapping.values() for end in (".jpg", ".metadata.json")}
        assert {path.name for path in views.iterdir()} == names
        for pano in mapping.values():
            assert Image.open(views / f"{pano}.jpg").size == (256, 128)
            assert json.loads((views / f"{pano}.metadata.json").read_text()) == {"rotation": 180}


def announced(city, route):
    """(place, panorama, heading of arrival) for every board that the route's text promises."""
    for a, b in zip(route.points, route.points[1:]):
        place = route.last.place if b == route.points[-1] else city.landmarks[b]
        if place:
            yield place, b, synthetic_city.direction(city.panos[a], city.panos[b])


def is_cut(city, place, pano, heading):
    """Whether an edge between two of the four views runs through a board."""
    here = city.panos[pano]
    half = math.degrees(math.atan(synthetic_city.BOARD_WIDTH / 2 / math.dist(here, place.at)))
    return abs((synthetic_city.direction(here, place.at) - heading) % 90 - 45) < half


def test_no_house_hides_an_announced_board_and_no_view_edge_cuts_it():
    sets = synthetic_city.make_sets(0, 60, 1, 8)
    for city, routes in sets["train"] + sets["mini"][:4]:
        scene = synthetic_city.scene_of(0, city.number)
        for place, pano, heading in (board for route in routes for board in announced(city, route)):
            assert (scene.in_sight(city.panos[pano], place)
                    and not is_cut(city, place, pano, heading))
            assert math.dist(city.panos[pano], place.at) < 16


def test_a_house_in_between_does_hide_a_board(scene):
    place = scene.places[-1]
    across = scene.lot_middle[0] - place.at
    assert not scene.in_sight(tuple(scene.lot_middle[0] + 8 * across / np.linalg.norm(across)),
                              place)


def test_a_board_is_painted_where_the_text_says(scene):
    """Its colour is in the panorama where bearing and height say, with north in the middle."""
    for place in scene.places[::9]:
        here = scene.city.panos[place.pano]
        picture = np.asarray(synthetic_city.panorama(scene, place.pano, 1024), float)
        metres, heading = math.dist(here, place.at), synthetic_city.direction(here, place.at)
        column = round((heading / 360 + 0.5) % 1 * 1023)
        bottom = synthetic_city.BOARD_TOP - synthetic_city.BOARD_HEIGHT - synthetic_city.EYE
        row = round((0.5 - math.degrees(math.atan2(bottom, metres)) / 180) * 511) - 2
        inside = np.median(picture[row - 1:row + 1, np.arange(column - 12, column + 12) % 1024],
                           (0, 1))
        assert np.abs(
            inside - synthetic_city.rgb(synthetic_city.PLACES[place.kind][1])[0]).max() < 40, place


def test_zebra_bars_tell_a_crossing_from_the_middle_of_a_street(scene):
    """A crossing has bars within 16 m; the middle of a street has a few lane dashes."""
    bars = scene.ground[(scene.ground_far == synthetic_city.MARKS_FAR)].mean(1)
    for street in scene.city.streets:
        for pano, low, high in [(street.ends[0], 12, 999),
                                (street.panos[len(street.panos) // 2], 1, 6)]:
            near = np.linalg.norm(bars - scene.city.panos[pano], axis=1) < 16
            assert low <= near.sum() <= high


@pytest.mark.parametrize("flags, said", [
    (["--routes", "0"], "--routes 0: must be at least 1"), (["--unseen", "-1"], "--unseen -1"),
    (["--size", "100"], "--size 100: must be"), (["--workers", "0"], "--workers 0"),
    (["--routes", "x"], "invalid int")])
def test_a_bad_value_is_one_line(flags, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        synthetic_city.parse_arguments(["--out", str(tmp_path / "city"), *flags])
    assert stop.value.code == 2 and said in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_folder_that_holds_something_is_left_alone(tmp_path, capsys):
    (tmp_path / "city").mkdir()
    (tmp_path / "city" / "mine.txt").write_text("precious")
    for out in ("city", "city/mine.txt"):
        with pytest.raises(SystemExit) as stop:
            synthetic_city.main(["--out", str(tmp_path / out), "--routes", "1", "--no-pictures"])
        assert stop.value.code == 2 and "not an empty folder" in capsys.readouterr().err
    assert contents(tmp_path) == {"city/mine.txt": b"precious"}
    (tmp_path / "empty").mkdir()
    assert len(contents(generate(tmp_path / "empty", "--routes", 1, "--no-pictures"))) == 6


@pytest.mark.parametrize("how, left", [(signal.SIGTERM, 0), (signal.SIGKILL, 1)])
def test_a_stopped_run_leaves_nothing_that_looks_whole(how, left, tmp_path):
    script = str(ROOT / "data" / "synthetic_city.py")
    command = [sys.executable, script, "--out", str(tmp_path / "city"), "--size", "256"]
    workers = "1" if how == signal.SIGKILL else "2"
    process = subprocess.Popen([*command, "--workers", workers], stderr=subprocess.DEVNULL)
    deadline = time.time() + 60
    sign = "*/train/route_infos.json" if how == signal.SIGKILL else "*/train/street_views/*.jpg"
    while not list(tmp_path.glob(sign)):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.02)
    process.send_signal(how)
    assert process.wait(timeout=30) != 0
    assert not (tmp_path / "city").exists() and len(list(tmp_path.iterdir())) == left


def test_no_panorama_stands_so_close_to_a_crossing_that_it_looks_like_one():
    city = synthetic_city.City(0, 0)
    for street in city.streets:
        for pano in street.panos:
            assert min(math.dist(city.panos[pano], city.panos[node]) for node in street.ends) > 15


# ---- Dialogues with a model's own failures -------------------------------------------------------

@pytest.mark.parametrize("task, env, told",
                         [("gp-l", (), "No JSON object"),
                          ("gp-vl", ("resolution=48",), "Try another formula")])
def test_a_models_own_failed_replies_stand_before_the_experts_and_are_not_learnt(
        tmp_path, task, env, told):
    import own_failures
    vision = task == "gp-vl"
    config = own_failures.Config(out=str(tmp_path / "own.json"), model=tiny_folder(vision), num=20,
                                 failed_tries=2, max_new_tokens=6, task=task, env=env,
                                 mix=("id", "rule_ood"), dtype="float32", device="cpu",
                                 side_by_side=16)
    own_failures.main(config)
    records = json.loads((tmp_path / "own.json").read_text())
    tries = [len(record["conversations"]) // 2 - 1 for record in records]
    # A blank model always fails.
    assert set(tries) == {0, 1, 2} and len(records) == 20
    for record in records:
        *earlier, last = record["conversations"]
        assert (all(turn["loss"] is False for turn in earlier if turn["from"] == "gpt")
                and "loss" not in last)
        assert ('"formula": "' in last["value"]
                and all(told in turn["value"] for turn in earlier[2::2]))
    pairs = read_conversations(tmp_path / "own.json", vision, "<|image|>")
    assert len(list(tmp_path.glob("own/*.png"))) == 20 * vision
    assert ([pair.reply for pair in pairs]
            == [record["conversations"][-1]["value"] for record in records])
    own_failures.main(replace(config, out=str(tmp_path / "again.json")))
    assert ((tmp_path / "again.json").read_text().replace("again/", "own/")
            == (tmp_path / "own.json").read_text())
    for knobs in ({}, {"out": str(tmp_path / "new.json"), "env": (*env, "reward=random")}):
        with pytest.raises(SystemExit):
            own_failures.main(replace(config, **knobs))
    assert not (tmp_path / "new.json").exists()
