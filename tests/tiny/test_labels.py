"""What the towers and the projector are taught of a patch, against plain loops over the scene."""

import numpy as np
import pytest
import torch
from torch import nn

from vlmzip.tiny.alignment import Alignment
from vlmzip.tiny.labels import GRID, HEADS, IGNORE, patch_labels, scene_of
from vlmzip.tiny.language import build_tokenizer
from vlmzip.tiny.scenes import COLOURS, SHAPES, render
from vlmzip.tiny.targets import (
    central_patches,
    centre_columns_and_rows,
    count_of_things,
    nearest_centres,
)


@pytest.fixture(scope="module")
def scenes():
    return [scene_of("pretraining", i) for i in range(12)]


@pytest.fixture(scope="module")
def labels(scenes):
    return torch.from_numpy(np.stack([patch_labels(scene, render(scene)) for scene in scenes]))


def head(labels, image, name):
    return labels[image, list(HEADS).index(name)].tolist()


def test_the_count_is_known_where_something_is_shown(scenes, labels):
    shown, count = count_of_things(labels)
    assert count.tolist() == [len(scene.things) - 1 for scene in scenes]
    for image in range(len(scenes)):
        assert shown[image].tolist() == [c != IGNORE for c in head(labels, image, "column")]


def test_the_nearest_centre_is_that_of_the_nearest_patch(labels):
    found = nearest_centres(labels)
    for image in range(len(labels)):
        columns, rows = head(labels, image, "column"), head(labels, image, "row")
        owned = [p for p in range(GRID * GRID) if columns[p] != IGNORE]
        for patch in range(GRID * GRID):
            away = [(p % GRID - patch % GRID) ** 2 + (p // GRID - patch // GRID) ** 2 for p in owned]
            nearest = [p for p, d in zip(owned, away, strict=True) if d == min(away)]
            assert (int(found[image, 0, patch]), int(found[image, 1, patch])) in {
                (columns[p], rows[p]) for p in nearest
            }


def centres(scene):
    """Column and row of every object's centre, and of the sign's."""
    places = [(int(thing.x // 8), int(thing.y // 8)) for thing in scene.things]
    if scene.sign is not None:
        sign = scene.sign
        places.append((int((sign.x + sign.width / 2) // 8), int((sign.y + sign.height / 2) // 8)))
    return places


def test_columns_and_rows_are_occupied_where_something_has_its_centre(scenes, labels):
    found = centre_columns_and_rows(labels)
    for image, scene in enumerate(scenes):
        for axis in (0, 1):
            held = {place[axis] for place in centres(scene)}
            assert found[image, axis].tolist() == [float(i in held) for i in range(GRID)]


def test_everything_has_one_central_patch_its_own_nearest_to_its_centre(scenes, labels):
    found = central_patches(labels)
    for image, scene in enumerate(scenes):
        kinds, ranks = head(labels, image, "kind"), head(labels, image, "rank")
        wanted = set()
        for number, (x, y) in enumerate(centres(scene)):
            is_sign = number == len(scene.things)
            owned = [p for p in range(GRID * GRID) if (kinds[p] == 6 if is_sign else ranks[p] == number)]
            wanted.add(min(owned, key=lambda p: (p % GRID - x) ** 2 + (p // GRID - y) ** 2))
        assert set(found[image].nonzero()[:, 0].tolist()) == wanted


def test_an_aligned_projector_costs_nothing_and_a_wrong_one_much(scenes, labels):
    """Features that hold a patch's own words, projected as they are, are what the loss asks for."""
    tokenizer = build_tokenizer()
    words = nn.Embedding(len(tokenizer), len(tokenizer))
    words.weight.data.copy_(torch.eye(len(tokenizer)))
    alignment = Alignment(nn.Identity(), words, tokenizer)

    def token(name):
        return tokenizer(f" {name}", add_special_tokens=False).input_ids[-1]

    features = torch.zeros(len(scenes), GRID * GRID, len(tokenizer))
    for image, scene in enumerate(scenes):
        named = {(COLOURS.index(t.colour), SHAPES.index(t.shape)): t for t in scene.things}
        kinds, colours = head(labels, image, "kind"), head(labels, image, "colour")
        for patch, (kind, colour) in enumerate(zip(kinds, colours, strict=True)):
            owner = named.get((colour, kind)) if kind < len(SHAPES) else None
            if kind == len(SHAPES) and scene.sign is not None:
                owner = scene.sign
                x, y = owner.x + owner.width / 2, owner.y + owner.height / 2
                said = [owner.text] if owner.text.isalpha() else []
            elif owner is not None:
                x, y, said = owner.x, owner.y, [owner.colour, owner.shape]
            else:
                continue
            said += ["left" if x < 48 else "right", "top" if y < 48 else "bottom"]
            for name in [*said, str(len(scene.things))]:
                features[image, patch, token(name)] = 1.0
    assert alignment.loss(features, labels) < 0.02
    assert alignment.loss(features.roll(1, 0), labels) > 1.0
