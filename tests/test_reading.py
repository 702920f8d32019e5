"""support/reading.py: the examples of its docstrings, and where its bound lies."""
import pytest

from support import reading
from support.reading import Reading


def test_a_reply_is_read_as_the_docstring_shows():
    keys = ("action", "current observation")
    assert reading.read_reply("So: {'action': stop(),} Done.", keys) == ({"action": "stop()"}, 5)


def test_a_reply_without_an_answer_has_no_values():
    reply = '{"cards": ["3"], "number": [3]}'
    assert reading.read_reply(reply, ("formula", "cards", "number")) == Reading({}, len(reply))


def test_a_cut_object_gives_what_stands_behind_each_key():
    values, at = reading.read_reply('{"cards": ["3", "8"], "formula": "3*8"', ("formula", "cards"))
    assert values == {"formula": "3*8", "cards": ["3", "8"]}
    assert at == len('{"cards": ["3", "8"], ')


def test_an_object_around_the_last_one_counts():
    reply = 'So: {"steps": {"formula": "3*8"}, "formula": "8/(3-8/3)"}'
    found, start = reading.last_object(reply, "formula")
    assert (found["formula"], start) == ("8/(3-8/3)", 4)


@pytest.mark.parametrize("before, answer, after", [
    ("", "3*8", ""), ("", "", ""), ("", "I think. <thinking>", ""), ("<think>a</think>", "b", ""),
    ("a</think>", "b", ""), ("a</think>b</think>", "c", ""), ("", "a", "<think>b"),
    ("</think>", "a", "<think>"), ("<think>a</think>", "b", "<think>c<think>d")])
def test_blanks_stand_in_place_of_a_thought(before, answer, after):
    blanked = " " * len(before) + answer + " " * len(after)
    assert reading.without_thought(before + answer + after) == blanked


@pytest.mark.parametrize("text, value, at", [
    ('"cards": ["3", "8"], "formula": "3*8"', "3*8", 21),
    ("formula: '3*8'", "3*8", 0),
    ("I tried {'formula': '3*8'", "3*8", 9),
    ("so\n  formula: [3, '8']", ["3", "8"], 5),
    ("The formula: '3*8' is wrong", None, -1),
    ('"formula": 24', None, -1)])
def test_a_key_counts_in_double_quotes_or_where_a_key_may_stand(text, value, at):
    assert reading.last_value(text, "formula") == (value, at)


@pytest.mark.parametrize("num_items, is_read", [
    (reading.MAX_SCALARS - 2, True), (reading.MAX_SCALARS - 1, False)])
def test_an_object_that_is_not_json_is_read_up_to_a_number_of_scalars(num_items, is_read):
    found, num_read = reading.read_relaxed("formula: [" + "1," * num_items + "]}", 0)
    assert (found is not None) is is_read
    assert num_read <= reading.MAX_SCALARS + 1


@pytest.mark.parametrize("opening, closing", [("[", "]"), ('{"a": ', "}")])
def test_an_object_is_read_up_to_a_depth_that_is_the_same_in_every_python(opening, closing):
    for depth in (reading.MAX_DEPTH - 1, reading.MAX_DEPTH, 300, 5_000):
        reply = '{"formula": "3*8", "cards": ' + opening * depth + "1" + closing * depth + "}"
        found, _ = reading.read_json(reply, 0)
        assert (found is not None) == (depth < reading.MAX_DEPTH)
        # What stands before the deep list is read in any case.
        assert reading.read_reply(reply, ("formula", "cards")).values["formula"] == "3*8"
    wide = '{"formula": "3*8", "cards": [' + "[1]," * 300 + "[1]]}"
    assert reading.read_json(wide, 0)[0]["cards"] == [[1]] * 301


def test_after_its_work_is_spent_the_search_ends_with_what_it_has():
    noise = "{" * 10 * reading.MAX_WORK
    assert reading.last_object(noise + "formula", "formula")[0] is None
    assert reading.last_object(noise + '{"formula": 1}', "formula")[0] == {"formula": 1}
    assert reading.last_object('{"formula": 1}' + noise + "formula", "formula")[0] is None


@pytest.mark.parametrize("observation, sees", [
    ("I see an intersection", True), ("no intersection", False),
    ("intersection ahead: none", False), ("I don't see any intersection here", False),
    ("no landmark at this intersection", True),
    ("intersection bar on the left", False), ("intersection bar at an intersection", True)])
def test_an_intersection_is_named_unless_it_is_denied_or_part_of_a_name(observation, sees):
    assert reading.names_intersection(observation, "intersection bar") is sees
