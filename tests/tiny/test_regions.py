"""What the second part of a tower's training asks, with answers given by hand."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from vlmzip.tiny.labels import PHRASES, patch_labels, scene_of
from vlmzip.tiny.language import build_tokenizer
from vlmzip.tiny.regions import REGION_WEIGHTS, RegionLesson
from vlmzip.tiny.scenes import render
from vlmzip.tiny.targets import (
    central_patches,
    centre_columns_and_rows,
    count_of_things,
    nearest_centres,
    phrases_of_patches,
)
from vlmzip.tiny.tower import TowerLesson

IMAGES = 4


@pytest.fixture(scope="module")
def drawn():
    return [(scene, render(scene)) for scene in (scene_of("pretraining", i) for i in range(IMAGES))]


@pytest.fixture(scope="module")
def labels(drawn):
    return torch.from_numpy(np.stack([patch_labels(*pair) for pair in drawn]))


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(params=["tiny-llava", "tiny-siglip"])
def lesson(request, tokenizer):
    torch.manual_seed(0)
    ids = [torch.tensor(tokenizer(text, add_special_tokens=False).input_ids) for text in PHRASES]
    phrases = pad_sequence(ids, True, -1)
    return RegionLesson(TowerLesson(request.param, len(tokenizer), phrases[:50]), phrases)


def test_cls_or_else_the_background_is_blind_in_every_second_image(lesson, labels):
    blind = lesson.blind(labels)
    for image in range(IMAGES):
        for token in range(blind.shape[1]):
            hidden = token == 0 if lesson.lesson.cls else labels[image, 0, token] == 7
            assert bool(blind[image, token]) == (image % 2 == 0 and bool(hidden))


def test_every_task_counts_by_its_weight_and_every_weight_has_a_task(lesson, drawn, labels, monkeypatch):
    summed = {}

    def total(losses, weights):
        summed.update(losses)
        assert weights is REGION_WEIGHTS
        return sum(losses.values())

    monkeypatch.setattr(lesson.lesson, "total", total)
    images = torch.from_numpy(np.stack([image.image for _, image in drawn]))
    loss = lesson.loss(images, labels, torch.zeros(IMAGES, 3, dtype=torch.long))
    assert torch.isfinite(loss)
    missing = set(REGION_WEIGHTS) - set(summed)
    assert missing == (set() if lesson.lesson.cls else {"early phrases", "centres", "centerness"})


def test_right_answers_cost_nothing_and_those_of_another_image_much(lesson, labels):
    """Each head is replaced by one that reads a ready answer from the patch's own features."""
    other = labels.roll(1, 0)
    lesson.region_norm = lesson.lesson.early_norm = nn.Identity()
    lesson.lesson.image_side = nn.Identity()
    lesson.nearest = lesson.count = lesson.centres = lesson.centerness = nn.Identity()

    def one_hot(target, size):
        return 30.0 * torch.eye(size + 1)[target.clamp(min=-1)][..., :size]

    phrase = lesson.lesson.read(lesson.lesson.phrases).detach()
    lesson.lesson.read = lambda texts: torch.eye(len(phrase))
    lesson.lesson.phrase_scale.data.fill_(4.0)
    where = nearest_centres(labels)
    count = count_of_things(labels)[1][:, None].expand(-1, 144)
    central = torch.where(central_patches(labels), 30.0, -30.0)[..., None]
    answers = [
        (lesson.regions_loss, one_hot(phrases_of_patches(labels), len(PHRASES)) + 1e-6),
        (lesson.nearest_loss, torch.cat([one_hot(axis, 12) for axis in where.unbind(1)], -1)),
        (lesson.count_loss, one_hot(count, 5)),
        (lesson.centerness_loss, central),
        (lesson.centres_loss, 60 * centre_columns_and_rows(labels).flatten(1) - 30),
    ]
    for loss, features in answers:
        assert loss(features, labels) < 1e-3, loss.__name__
        assert loss(features, other) > 1, loss.__name__
