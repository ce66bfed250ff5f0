"""How many tokens stay: the rule in budget.py, and the settings that VisionZip accepts."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import reference
from vlmzip import VisionZip
from vlmzip.budget import Budget, split

CHECKED: list[Any] = [Budget, VisionZip]


# --- the split --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "parts"),
    [
        (1, (1, 0)),
        (2, (2, 0)),
        (17, (14, 3)),
        (32, (27, 5)),
        (64, (54, 10)),
        (128, (108, 20)),
        (192, (162, 30)),
    ],
)
def test_split_of_the_paper(k: int, parts: tuple[int, int]) -> None:
    assert split(k) == parts
    assert Budget(tokens=k).split(k) == parts


@given(st.integers(1, 5000))
def test_split_equals_the_reference(k: int) -> None:
    dominant, contextual = split(k)
    assert (dominant, contextual) == reference.split(k)
    assert dominant >= 1
    assert contextual >= 0
    assert dominant + contextual == k


def test_explicit_split_is_kept_only_where_it_fits() -> None:
    budget = Budget(dominant=30, contextual=34)
    assert budget.count(577) == 64
    assert budget.split(64) == (30, 34)
    assert budget.split(32) == (27, 5)
    assert Budget(dominant=64, contextual=0).split(64) == (64, 0)
    assert Budget(keep=0.5).split(64) == (54, 10)
    assert Budget(total_tokens=640).split(128) == (108, 20)


@pytest.mark.parametrize("k", [0, -1])
def test_split_of_nothing(k: int) -> None:
    with pytest.raises(ValueError, match=str(k)):
        split(k)


# --- the count --------------------------------------------------------------------------------

positive = st.integers(1, 700)
settings_of_a_budget = st.one_of(
    st.builds(lambda t: {"tokens": t}, positive),
    st.builds(lambda d, c: {"dominant": d, "contextual": c}, positive, st.integers(0, 100)),
    st.builds(lambda r: {"keep": r}, st.floats(0, 1, exclude_min=True)),
    st.builds(lambda t: {"total_tokens": t}, st.integers(2, 4000)),
)


@given(settings_of_a_budget, st.integers(1, 700), st.integers(1, 12), st.booleans())
def test_count_equals_the_reference(given_: dict[str, Any], n: int, views: int, dynamic: bool) -> None:
    budget = Budget(**given_)
    try:
        expected = reference.budget(n, views=views, dynamic=dynamic, **given_)
    except ValueError:
        with pytest.raises(ValueError):
            budget.count(n, views=views, dynamic=dynamic)
        return
    k = budget.count(n, views=views, dynamic=dynamic)
    assert type(k) is int
    assert k == expected
    assert 1 <= k <= n
    dominant, contextual = budget.split(k)
    assert dominant >= 1
    assert dominant + contextual == k


@pytest.mark.parametrize(
    ("given_", "n", "views", "k"),
    [
        ({"tokens": 64}, 577, 1, 64),
        ({"tokens": 64}, 577, 5, 64),  # a count is a view's
        ({"tokens": 577}, 577, 1, 577),
        ({"dominant": 54, "contextual": 10}, 577, 5, 64),
        ({"keep": 0.10}, 577, 1, 58),  # 57.7
        ({"keep": 0.5}, 577, 1, 289),  # 288.5 rounds up
        ({"keep": 0.5}, 5, 1, 3),  # 2.5 too, where round() would give 2
        ({"keep": 0.0001}, 577, 1, 1),
        ({"keep": 1.0}, 577, 1, 577),
        ({"total_tokens": 640}, 577, 5, 128),
        ({"total_tokens": 320}, 577, 5, 64),
        ({"total_tokens": 160}, 577, 5, 32),
        ({"total_tokens": 10}, 577, 5, 2),
    ],
)
def test_counts_of_the_design(given_: dict[str, Any], n: int, views: int, k: int) -> None:
    assert Budget(**given_).count(n, views=views) == k


def test_more_tokens_than_there_are() -> None:
    for budget in (Budget(tokens=578), Budget(dominant=570, contextual=8)):
        with pytest.raises(ValueError, match=r"578.*577"):
            budget.count(577)
        assert budget.count(577, dynamic=True) == 577
        assert budget.count(578, dynamic=True) == 578
        assert budget.count(579, dynamic=True) == 578


def test_total_under_two_a_view() -> None:
    with pytest.raises(ValueError, match=r"9.*5"):
        Budget(total_tokens=9).count(577, views=5)
    with pytest.raises(ValueError, match=r"9.*5"):
        Budget(total_tokens=9).count(577, views=5, dynamic=True)


@pytest.mark.parametrize(
    "arguments",
    [
        {"n": 0},
        {"n": -1},
        {"n": 0, "dynamic": True},
        {"n": -1, "dynamic": True},
        {"n": 577.5},
        {"n": "577"},
        {"n": 577, "views": 0},
        {"n": 577, "views": -2},
        {"n": 577, "views": 1.5},
    ],
    ids=str,
)
def test_count_refuses_nonsense(arguments: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)):
        Budget(total_tokens=64).count(**arguments)


# --- settings ---------------------------------------------------------------------------------

# What is given, and what the message must speak of.
BAD: dict[str, tuple[dict[str, Any], list[str]]] = {
    "nothing": ({}, ["tokens", "keep", "total_tokens"]),
    "two": ({"tokens": 64, "keep": 0.1}, ["tokens", "keep"]),
    "tokens-and-split": (
        {"tokens": 64, "dominant": 54, "contextual": 10},
        ["tokens", "dominant"],
    ),
    "tokens-and-half-a-split": ({"tokens": 64, "contextual": 10}, ["contextual"]),
    "keep-and-total": ({"keep": 0.1, "total_tokens": 640}, ["keep", "total_tokens"]),
    "dominant-alone": ({"dominant": 54}, ["dominant", "contextual"]),
    "contextual-alone": ({"contextual": 10}, ["dominant", "contextual"]),
    "dominant-0": ({"dominant": 0, "contextual": 10}, ["dominant", "0"]),
    "dominant-negative": ({"dominant": -5, "contextual": 10}, ["dominant", "-5"]),
    "dominant-float": ({"dominant": 54.0, "contextual": 10}, ["dominant", "54.0"]),
    "dominant-true": ({"dominant": True, "contextual": 10}, ["dominant", "True"]),
    "contextual-negative": ({"dominant": 54, "contextual": -1}, ["contextual", "-1"]),
    "contextual-string": ({"dominant": 54, "contextual": "10"}, ["contextual", "'10'"]),
    "contextual-false": ({"dominant": 54, "contextual": False}, ["contextual", "False"]),
}
for name in ("tokens", "total_tokens"):
    for value in (0, -64, 64.5, 64.0, "64", True, float("nan"), float("inf"), [64]):
        BAD[f"{name}-{value!r}"] = ({name: value}, [name, repr(value)])
for value in (0, 0.0, -0.1, 1.0001, 10, float("nan"), float("inf"), "0.1", True, [0.1]):
    BAD[f"keep-{value!r}"] = ({"keep": value}, ["keep", repr(value)])


@pytest.mark.parametrize("settings_class", CHECKED)
@pytest.mark.parametrize("case", BAD)
def test_bad_settings(settings_class: Any, case: str) -> None:
    given_, words = BAD[case]
    with pytest.raises((ValueError, TypeError)) as caught:
        settings_class(**given_)
    for word in words:
        assert caught.match(re.escape(word))


@pytest.mark.parametrize(
    ("given_", "words"),
    [
        ({"merge": "mean"}, ["merge", "mean", "reference", "average"]),
        ({"merge": None}, ["merge", "None"]),
        ({"merge": True}, ["merge", "True"]),
        ({"order": "sorted"}, ["order", "sorted", "grouped", "raster"]),
        ({"order": 1}, ["order", "1"]),
        ({"send_cls": "yes"}, ["send_cls", "yes"]),
        ({"send_cls": None}, ["send_cls", "None"]),
    ],
    ids=str,
)
def test_bad_options(given_: dict[str, Any], words: list[str]) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        VisionZip(tokens=64, **given_)
    for word in words:
        assert caught.match(word)


def test_unknown_option() -> None:
    with pytest.raises(TypeError, match="token_count"):
        VisionZip(token_count=64)


GOOD: list[dict[str, Any]] = [
    {"tokens": 64},
    {"tokens": 1},
    {"dominant": 54, "contextual": 10},
    {"dominant": 1, "contextual": 0},
    {"keep": 0.1},
    {"keep": 1.0},
    {"total_tokens": 640},
]


@pytest.mark.parametrize("settings_class", CHECKED)
@pytest.mark.parametrize("given_", GOOD, ids=str)
def test_good_settings_are_frozen_values(settings_class: Any, given_: dict[str, Any]) -> None:
    made = settings_class(**given_)
    assert made == settings_class(**given_)
    assert hash(made) == hash(settings_class(**given_))
    assert copy.deepcopy(made) == made
    assert pickle.loads(pickle.dumps(made)) == made
    with pytest.raises((dataclasses.FrozenInstanceError, AttributeError)):
        made.tokens = 32


@pytest.mark.parametrize("merge", ["reference", "average"])
@pytest.mark.parametrize("order", ["grouped", "raster", None])
@pytest.mark.parametrize("send_cls", [True, False])
def test_good_options(merge: str, order: str | None, send_cls: bool) -> None:
    made = VisionZip(tokens=64, merge=merge, order=order, send_cls=send_cls)
    assert made != VisionZip(tokens=65, merge=merge, order=order, send_cls=send_cls)
    assert VisionZip(tokens=64) == VisionZip(tokens=64, merge="reference", order=None, send_cls=True)


@pytest.mark.parametrize("settings_class", CHECKED)
def test_numpy_numbers_are_numbers(settings_class: Any) -> None:
    assert settings_class(tokens=np.int64(64)) == settings_class(tokens=64)
    assert settings_class(dominant=np.int32(54), contextual=np.int64(10)) == settings_class(
        dominant=54, contextual=10
    )
    settings_class(keep=np.float64(0.5))
    settings_class(total_tokens=np.int64(640))


def test_numpy_numbers_count() -> None:
    k = Budget(tokens=np.int64(64)).count(np.int64(577))
    assert type(k) is int
    assert k == 64
