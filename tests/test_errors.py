import pickle

import pytest

from uvit.errors import UserError, differences


def test_a_user_error_is_a_value_error_so_that_callers_in_python_may_catch_it() -> None:
    with pytest.raises(ValueError, match="--flag 3: too small"):
        raise UserError("--flag 3: too small")


def test_details_stand_below_the_sentence_and_survive_the_way_from_another_process() -> None:
    error = pickle.loads(pickle.dumps(UserError("--flag 3: differs", ["a: was 1, now 2", "b: was 3, now 4"])))
    assert str(error) == "--flag 3: differs\n  a: was 1, now 2\n  b: was 3, now 4"
    assert error.details == ("a: was 1, now 2", "b: was 3, now 4")


SHA256 = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("before", "now", "lines"),
    [
        ({}, {}, []),
        ({"a": 1, "b": [1, 2]}, {"b": (1, 2), "a": 1}, []),
        ({"a": 1}, {"a": 2, "b": "x"}, ["a: was 1, now 2", "b: was not set, now x"]),
        ({"gone": ""}, {}, ["gone: was empty, now not set"]),
        ({"a": None, "b": False}, {"a": 0.5, "b": True}, ["a: was not set, now 0.5", "b: was False, now True"]),
        (
            {"vae": {"name": "x", "sha256": SHA256}},
            {"vae": {"name": "x", "sha256": SHA256[::-1]}},
            ["vae.sha256: was 0123456789ab, now fedcba987654"],
        ),
        ({"vae": None}, {"vae": {"name": "x"}}, ["vae.name: was not set, now x"]),
        ({"a": {"b": {"c": 1, "d": 2}}}, {"a": {"b": {"c": 1, "d": 3}}}, ["a.b.d: was 2, now 3"]),
        ({"shape": (8, 4, 4)}, {"shape": [8, 4, 8]}, ["shape: was [8, 4, 4], now [8, 4, 8]"]),
        ({"list": [1]}, {"list": [1, "two"]}, ["list: was [1], now [1, two]"]),
        ({"merged": [{"a": 1}, {"a": 2}]}, {"merged": [{"a": 1}, {"a": 3}]}, ["merged.1.a: was 2, now 3"]),
        ({"merged": [{"a": 1}]}, {"merged": [{"a": 1}, {"a": 3}]}, ["merged.1.a: was not set, now 3"]),
        ({"merged": []}, {"merged": [{"a": 1}]}, ["merged.0.a: was not set, now 1"]),
        ({"a": {"b": 1}}, {"a": 5}, ["a: was {'b': 1}, now 5"]),
        ({"a": {}}, {"a": None}, []),
        ({"a": 0, "b": ""}, {"a": False, "b": None}, ["b: was empty, now not set"]),
        ({"text": "two\nlines"}, {"text": "one"}, ["text: was two lines, now one"]),
        ({"nan": float("inf")}, {"nan": 1}, ["nan: was inf, now 1"]),
    ],
)
def test_each_difference_has_a_line(before: dict[str, object], now: dict[str, object], lines: list[str]) -> None:
    assert list(differences(before, now).values()) == lines


def test_long_values_are_shown_where_they_differ() -> None:
    [line] = differences({"path": "a" * 500 + "/one/" + "b" * 500}, {"path": "a" * 500 + "/two"}).values()
    assert line.startswith("path: was ..." + "a" * 19 + "/one/bb") and line.endswith(", now ..." + "a" * 19 + "/two")
    assert len(line) < 250


def test_other_words_and_keys() -> None:
    assert differences({"a": {"b": 1}}, {"a": {"b": 2}}, ("there", "here")) == {"a.b": "a.b: there 1, here 2"}
