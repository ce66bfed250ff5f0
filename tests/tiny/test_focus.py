"""What the towers are told an image shows, and whether their attention finds it."""

from math import comb

import numpy as np
import pytest
import torch

from vlmzip import VisionZip, compress_tower
from vlmzip.tiny.focus import focus
from vlmzip.tiny.labels import PHRASES, patch_labels, rendered_split, scene_of
from vlmzip.tiny.scenes import COLOURS, SHAPES, render
from vlmzip.tiny.targets import phrases_shown
from vlmzip.tiny.tower import blindfold, build_tower, pixels


def test_phrases_shown_are_those_of_the_scene():
    scenes = [scene_of("pretraining", i) for i in range(40)]
    labels = np.stack([patch_labels(scene, render(scene)) for scene in scenes])
    for scene, row in zip(scenes, phrases_shown(torch.from_numpy(labels)), strict=True):
        said = {PHRASES[i] for i in row.nonzero()[:, 0].tolist()}
        wanted = {f"{thing.colour} {thing.shape}" for thing in scene.things}
        if scene.sign is not None:
            wanted.add(f"sign {scene.sign.text}")
        assert said == wanted


@pytest.mark.parametrize("name", ["tiny-llava", "tiny-siglip"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_who_is_blindfolded_sees_others_in_the_layer_that_is_read_and_no_earlier(name, attention):
    torch.manual_seed(0)
    tower = build_tower(name).eval()
    tower.set_attn_implementation(attention)
    first, second = torch.randn(2, 2, 3, 96, 96)
    own = 0 if name == "tiny-llava" else 100  # CLS, or a patch that both pairs of images share
    second[..., 64:72, 32:40] = first[..., 64:72, 32:40]
    blind = torch.zeros(2, 145 - (own > 0), dtype=torch.bool)
    blind[0, own] = True
    with blindfold(tower, blind):
        seen = [tower(pair, output_hidden_states=True).hidden_states for pair in (first, second)]
    plain = tower(first, output_hidden_states=True).hidden_states  # the hooks are gone
    changed = [
        bool((one[0, own] - other[0, own]).abs().max() > 1e-5) for one, other in zip(*seen, strict=True)
    ]
    assert changed == [False] * 5 + [True] * 2  # the embeddings and six layers
    assert (seen[0][4][0, own + 1] - seen[1][4][0, own + 1]).abs().max() > 1e-3
    assert (plain[4][0, own] - seen[0][4][0, own]).abs().max() > 1e-3
    assert torch.allclose(plain[-1][1], seen[0][-1][1], atol=1e-4)  # the second row is not blind


@pytest.mark.parametrize("name", ["tiny-llava", "tiny-siglip"])
def test_focus_counts_as_a_plain_loop_does(name, tmp_path):
    torch.manual_seed(0)
    tower = build_tower(name).eval()
    data = rendered_split("validation", 6, tmp_path)
    found = focus(tower, data, tokens=16, count=6)
    with compress_tower(tower, VisionZip(tokens=16)) as compressed, torch.no_grad():
        out = compressed(pixels(torch.from_numpy(data.images.copy())))
    cls = name == "tiny-llava"
    hits, chance, things, found_by_chance = [], [], [], []
    for image in range(6):
        scene = scene_of("validation", image)
        kind, colour = data.labels[image][0], data.labels[image][1]
        kept = [i - cls for i in out.dominant[image].tolist() if i >= cls]
        owners = [
            {p for p in range(144) if kind[p] == 6}
            if thing is None
            else {p for p in range(144) if _is(thing, kind[p], colour[p])}
            for thing in (*scene.things, None)
        ]
        owned = set().union(*owners)
        hits += [p in owned for p in kept]
        chance.append(len(owned) / 144)
        for owner in filter(None, owners):
            things.append(bool(owner & set(kept)))
            found_by_chance.append(1 - comb(144 - len(owner), len(kept)) / comb(144, len(kept)))
    expected = (np.mean(hits), np.mean(chance), np.mean(things), np.mean(found_by_chance))
    measured = [found[key] for key in ("hits", "hits_random", "found", "found_random")]
    assert measured == pytest.approx(expected, abs=6e-4)


def _is(thing, kind, colour):
    return kind == SHAPES.index(thing.shape) and colour == COLOURS.index(thing.colour)
