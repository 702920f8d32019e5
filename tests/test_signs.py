"""The synthetic city with --signs: six kinds of place, each with a shape on its board."""
import hashlib
import json
import math
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from conftest import ROOT
from envs import make_env
from support.conversations import read_conversations

sys.path.insert(0, str(ROOT / "data"))
import captions  # noqa: E402
import synthetic_city  # noqa: E402

NUM_ROUTES = 12


@pytest.fixture(scope="module")
def signs(tmp_path_factory):
    out = tmp_path_factory.mktemp("signs") / "city"
    synthetic_city.main(["--out", str(out), "--signs", "shapes", "--routes", str(NUM_ROUTES),
                         "--unseen", "1", "--most-legs", "3", "--size", "352",
                         "--workers", "1"])
    return out


@pytest.fixture(scope="module")
def cities():
    return {(signs, number): synthetic_city.City(0, number, signs)
            for signs, number in (("shapes", 0), ("shapes", 4), ("any-colour", 0))}


def places_of(city):
    found = [place for place in city.landmarks if place]
    for street in city.streets:
        found += [street.place, *street.passed]
    return found


def test_each_kind_has_a_colour_of_its_own_in_city_0_and_any_colour_elsewhere(cities):
    colours = {}
    for key, city in cities.items():
        colours[key] = {kind: {place.sign for place in places_of(city) if place.kind == kind}
                        for kind in synthetic_city.SIGNS}
    assert all(colours["shapes", 0][kind] == {colour}
               for kind, colour in synthetic_city.SIGNS.items())
    assert len(set(synthetic_city.SIGNS.values())) == len(synthetic_city.SIGNS)
    for key in (("shapes", 4), ("any-colour", 0)):
        assert all(len(found) > 8 for found in colours[key].values())
        shared = set.intersection(*colours[key].values())
        assert len(shared) > 5             # such a colour tells no kind


def test_the_shapes_of_two_kinds_differ_at_the_size_at_which_a_model_sees_them():
    shapes = []
    for kind in synthetic_city.SIGNS:
        board = synthetic_city.paint_sign(kind, "#000000").resize((24, 24))
        shapes.append(np.asarray(board, float)[..., 0] / 255)
    for i, one in enumerate(shapes):
        assert 0.2 < one.mean() < 0.8
        for other in shapes[:i]:
            assert np.abs(one - other).mean() > 0.12


def test_no_other_place_of_a_street_is_of_its_destinations_kind(cities):
    for city in cities.values():
        num = 0
        for street in city.streets:
            assert street.place.kind not in {place.kind for place in street.passed}
            assert street.place.pano not in {place.pano for place in street.passed}
            num += len(street.passed)
        assert num > 2 * len(city.streets)


def test_no_view_edge_cuts_the_board_of_a_street_and_no_house_hides_it(cities):
    city = cities["shapes", 4]
    scene = synthetic_city.Scene(city)
    for street in city.streets:
        a, b = (city.panos[node] for node in street.ends)
        for place in (street.place, *street.passed):
            here = city.panos[place.pano]
            half = math.degrees(math.atan(synthetic_city.SIGN_WIDTH / 2
                                          / math.dist(here, place.at)))
            off = (synthetic_city.direction(here, place.at)
                   - synthetic_city.direction(a, b)) % 90 - 45
            assert abs(off) > half and scene.in_sight(here, place)


def test_a_board_hangs_for_its_own_panorama_alone(cities):
    """So a picture shows one board at most."""
    scene = synthetic_city.Scene(cities["shapes", 0])
    street = next(street for street in scene.city.streets if len(street.passed) > 2)
    everything = scene.places
    for place in street.passed:
        pictures = []
        for scene.places in (everything, [place], []):
            picture = synthetic_city.panorama(scene, place.pano, 352)
            pictures.append(np.asarray(picture, int))
        whole, alone, bare = pictures
        assert (whole == alone).all()
        # The board is where the text says: `heading` is the middle of what it changes.
        changed = np.flatnonzero((alone != bare).any((0, 2)))
        heading = synthetic_city.direction(scene.city.panos[place.pano], place.at)
        off = ((changed / 351 - 0.5) * 360 - heading + 180) % 360 - 180
        assert len(changed) > 18 and np.abs(off).max() < 16


def test_the_expert_walks_and_names_what_each_picture_shows(signs):
    named = 0
    env = make_env("virl-vl", "id", root=signs, resolution=48)
    for seed in range(40):
        messages, _ = env.reset(seed)
        done = False
        while not done:
            said = json.loads(env.expert_reply())["current observation"]
            kind, _, side = said.partition(" is on your ")
            if env.position.kind == "forward" and side:
                assert kind in synthetic_city.SIGNS and side in ("left", "right")
                # On the last street no board but the destination's is of its kind.
                assert (env.position.sentence != env.sentences[-1]
                        or kind != env.rail[-1].landmark_name)
                named += 1
            messages, reward, done, _, info = env.step(env.expert_reply())
            if not done and side:          # the history tells it from then on
                assert f"{said} -> " in messages[0]["content"][1]["text"]
            assert reward == 1
        assert info["success"]
    assert named > 60


def test_captions_tell_what_the_pictures_show(signs, tmp_path):
    config = captions.Config(out=str(tmp_path / "told.json"), root=str(signs), num=30,
                             resolution=110)
    captions.main(config)
    pairs = read_conversations(tmp_path / "told.json", True, "<|image|>")
    assert 20 < len(pairs) <= 30           # a route may have no panorama between its points
    told = clear = 0
    for i, pair in enumerate(pairs):
        picture = np.asarray(Image.open(tmp_path / "told" / f"{i:06d}.png"), int)
        assert picture.shape == (225, 225, 3)
        kind, _, side = pair.reply.partition(" is on your ")
        views = {"right": picture[40:62, 115:], "left": picture[155:177, 115:]}
        seen = {}
        for name, view in views.items():
            middle = view[:, 43:67]
            colour = synthetic_city.rgb(synthetic_city.SIGNS.get(kind, "#000000"))[0]
            seen[name] = (np.abs(middle - colour).max(2) < 50).mean()
        if side:
            other = {"right": "left", "left": "right"}[side]
            assert seen[side] > 0.15
            told += 1
            clear += seen[side] > seen[other]
        else:
            assert pair.reply == "No landmark"
    assert told > 10 and clear > 0.8 * told         # a house may have the board's colour
    with pytest.raises(SystemExit):
        captions.main(config)              # a second time it would replace what is there


def test_a_city_whose_captions_would_all_be_alike_is_refused(signs, tmp_path, capsys):
    """The boards of names stand at the points of a route alone."""
    shutil.copytree(signs / "train", tmp_path / "city" / "train")
    path = tmp_path / "city" / "train" / "route_infos.json"
    routes, num = json.loads(path.read_text())
    for route in routes:
        del route["passed"]
    path.write_text(json.dumps([routes, num]))
    with pytest.raises(SystemExit):
        captions.main(captions.Config(out=str(tmp_path / "told.json"), root=str(tmp_path / "city")))
    assert "nothing is seen between the points" in capsys.readouterr().err
    assert not list(tmp_path.glob("told*"))


def test_a_missed_place_costs_more_and_in_words_the_same_is_told(signs):
    env = make_env("virl-vl", "id", root=signs, resolution=48)
    words = make_env("virl-l", "id", root=signs)
    rewards = set()
    for seed in range(20):
        env.reset(seed)
        words.reset(seed)
        assert env.rail == words.rail
        at = [at for at, there in enumerate(env.rail) if there.kind == "forward"
              and there.landmark]
        if at:
            env.at = at[0]
            env.begin_dialogue()
            blind = env.format_reply("stop()", env.rail[0])
            seeing = env.format_reply("stop()")
            rewards.add((env.step(blind)[1], env.step(seeing)[1]))
    assert rewards == {(-1.5, -2.0)}       # the second one is also the last try


def test_the_visual_test_has_two_routes_of_each_new_city(signs):
    env = make_env("virl-vl", "visual_ood", root=signs, resolution=48)
    assert len(env.routes) == 18
    for number in range(18):
        env.reset(0, episode=number)
        assert env.number == number and env.rail[-1].landmark_name in synthetic_city.SIGNS
    for name in ("train", "mini"):
        assert Image.open(next((signs / name / "street_views").glob("*.jpg"))).size == (352, 176)


def test_the_city_without_signs_is_the_one_of_the_results(tmp_path):
    """Its words: a digest, from before there were signs. Floats are rounded to 7 decimals."""
    synthetic_city.main(["--out", str(tmp_path / "city"), "--routes", "3", "--no-pictures"])
    digest = hashlib.sha256()
    for name in ("train", "unseen", "mini"):
        for file in ("route_infos.json", "gps_pano_mapping.pkl"):
            digest.update((tmp_path / "city" / name / file).read_bytes())
    assert digest.hexdigest() == (
        "ea9baf7e41536d1ca7e131329ded0d9edd05e9ee0317967f1776aa6d04b3d24b")


@pytest.mark.parametrize("passed", [["Bank"], {"a": 1}, "Bank"])
def test_what_is_passed_must_be_told_in_words(signs, tmp_path, passed):
    (tmp_path / "train").mkdir()
    routes, _ = json.loads((signs / "train" / "route_infos.json").read_text())
    routes[0]["passed"] = passed
    (tmp_path / "train" / "route_infos.json").write_text(json.dumps([routes, len(routes)]))
    with pytest.raises(ValueError, match="route 0, key 'passed': expected panorama: what is seen"):
        make_env("virl-l", "id", root=tmp_path)


@pytest.mark.parametrize("flags, said", [
    (["--signs", "icons"], "--signs: invalid choice: 'icons'")])
def test_a_bad_value_is_one_line(flags, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        synthetic_city.parse_arguments(["--out", str(tmp_path / "city"), *flags])
    assert stop.value.code == 2 and said in capsys.readouterr().err.strip().splitlines()[-1]
