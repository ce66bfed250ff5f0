from collections import Counter

import numpy as np
import pytest

from vlmzip.tiny.accuracy import blind_accuracy
from vlmzip.tiny.labels import SPLITS, scene_of
from vlmzip.tiny.questions import KINDS, answers_of, ask, caption
from vlmzip.tiny.scenes import SIZE, Scene, Thing
from vlmzip.tiny.testset import (
    SUBSET,
    TEST_HASH,
    exam_hash,
    exam_questions,
    pair_questions,
)


@pytest.fixture(scope="module")
def questions():
    return exam_questions()


def thing(shape, colour, x, y, diameter=20.0):
    return Thing(shape, colour, x, y, diameter, 0.0)


SCENE = Scene(
    (thing("ring", "red", 15, 20), thing("star", "blue", 50, 75), thing("star", "red", 80, 22)),
    None,
    0,
)


def every(kind, scene=SCENE, tries=200):
    made = (ask(kind, scene, np.random.default_rng(i)) for i in range(tries))
    return {(q.text, q.answer) for q in made if q is not None}


def test_answers_are_those_of_a_scene_read_by_hand():
    assert {a for q, a in every("colour") if "ring" in q} == {"red"}
    assert not any("star" in q for q, _ in every("colour"))  # two stars: no single colour
    assert {a for q, a in every("shape") if "blue" in q} == {"star"}
    assert {a for _, a in every("counting")} == {"3"}
    assert {a for q, a in every("position") if "red ring" in q} == {"top left"}
    assert {a for q, a in every("position") if "red star" in q} == {"top right"}
    assert not any("blue star" in q for q, _ in every("position"))  # too near to the middle
    assert every("reading") == set()


def test_relations_run_from_the_second_thing_to_the_first():
    wordings = dict(every("relation"))
    assert wordings["Where is the red ring from the red star?"] == "left"
    assert wordings["On which side of the red ring is the red star?"] == "right"
    assert wordings["Where is the blue star from the red ring?"] == "below"


def test_existence_is_true_to_the_scene():
    present = {"red ring", "blue star", "red star"}
    for text, answer in every("existence"):
        name = " ".join(text.rstrip("?").split()[-2:])
        assert (name in present) == (answer == "yes")


def test_captions_name_everything():
    text = caption(SCENE, np.random.default_rng(0))
    assert sorted(text.split(", ")) == [
        "blue star bottom right",
        "red ring top left",
        "red star top right",
    ]


def test_the_test_set_is_the_one_that_was_published(questions):
    assert len(questions) == 3150
    assert exam_hash(questions) == TEST_HASH


def test_a_shorter_list_is_a_prefix(questions):
    assert exam_questions(SUBSET) == questions[:SUBSET]
    kinds = Counter(q.kind for q in questions[:SUBSET])
    assert max(kinds.values()) - min(kinds.values()) <= 1


@pytest.mark.parametrize("count", [0, -1, 3151])
def test_a_count_that_is_not_there_is_refused(count):
    with pytest.raises(ValueError, match="between 1 and 3150"):
        exam_questions(count)


def test_answers_are_balanced_in_every_kind(questions):
    for kind in KINDS:
        given = Counter(q.answer for q in questions if q.kind == kind)
        assert sum(given.values()) == 450
        if wanted := answers_of(kind):
            assert set(given) == set(wanted)
            assert max(given.values()) - min(given.values()) <= 1
        else:
            assert max(given.values()) < 30


def test_blind_answers_are_near_chance(questions):
    chance = {"colour": 1 / 6, "shape": 1 / 6, "existence": 1 / 2, "counting": 1 / 5,
              "position": 1 / 4, "relation": 1 / 4, "reading": 1 / 20}  # fmt: skip
    for kind, figures in blind_accuracy(questions)["by_kind"].items():
        assert figures["accuracy"] < chance[kind] + 0.06


def test_splits_draw_from_seeds_of_their_own():
    assert len(set(SPLITS.values())) == len(SPLITS)


def test_no_test_scene_is_a_training_scene(questions):
    trained_on = {scene_of("train", i) for i in range(2000)}
    assert not trained_on & {scene for q in questions for scene in q.scenes}


def test_pairs_ask_about_the_image_they_name():
    pairs = pair_questions(28)
    singles = exam_questions(28)
    for pair, single in zip(pairs, singles, strict=True):
        named = pair.scenes[0] if "first image" in pair.question else pair.scenes[1]
        assert named == single.scenes[0]
        assert pair.answer == single.answer
        assert [image.size for image in pair.images] == [(SIZE, SIZE)] * 2
    assert {"first", "second"} == {pair.question.split()[2] for pair in pairs}
