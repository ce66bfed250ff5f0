"""Questions about scenes: seven kinds, each with answers that the question's text does not give away."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .scenes import COLOURS, SHAPES, SIZE, Scene, Thing

__all__ = ["KINDS", "Question", "answers_of", "ask", "caption"]

_CLEAR = 6.0  # pixels from the image's middle before a thing counts as being on one side


@dataclass(frozen=True)
class Question:
    """A question, its one right answer, and its kind."""

    text: str
    answer: str
    kind: str


def ask(kind: str, scene: Scene, rng: np.random.Generator, answer: str | None = None) -> Question | None:
    """A question of a kind about a scene, with a given answer if one is named; None if none fits."""
    return KINDS[kind](scene, rng, answer)


def answers_of(kind: str) -> tuple[str, ...]:
    """The answers over which a kind is balanced; signs are drawn evenly by the scenes themselves."""
    return {
        "colour": COLOURS,
        "shape": SHAPES,
        "existence": ("yes", "no"),
        "counting": ("1", "2", "3", "4", "5"),
        "position": ("top left", "top right", "bottom left", "bottom right"),
        "relation": ("left", "right", "above", "below"),
        "reading": (),
    }[kind]


def _pick(options: list[Question], answer: str | None, rng: np.random.Generator) -> Question | None:
    fitting = [q for q in options if answer is None or q.answer == answer]
    return fitting[int(rng.integers(len(fitting)))] if fitting else None


def _variant(rng: np.random.Generator, *texts: str) -> str:
    return texts[int(rng.integers(len(texts)))]


def _name(thing: Thing) -> str:
    return f"{thing.colour} {thing.shape}"


def _colour(scene: Scene, rng: np.random.Generator, answer: str | None) -> Question | None:
    shapes = [thing.shape for thing in scene.things]
    form = _variant(rng, "What color is the {}?", "What is the color of the {}?")
    options = [
        Question(form.format(thing.shape), thing.colour, "colour")
        for thing in scene.things
        if shapes.count(thing.shape) == 1
    ]
    return _pick(options, answer, rng)


def _shape(scene: Scene, rng: np.random.Generator, answer: str | None) -> Question | None:
    colours = [thing.colour for thing in scene.things]
    form = _variant(rng, "What shape is the {} object?", "Which shape is {}?")
    options = [
        Question(form.format(thing.colour), thing.shape, "shape")
        for thing in scene.things
        if colours.count(thing.colour) == 1
    ]
    return _pick(options, answer, rng)


def _existence(scene: Scene, rng: np.random.Generator, answer: str | None) -> Question | None:
    if answer is None:
        answer = _variant(rng, "yes", "no")
    present = {(thing.colour, thing.shape) for thing in scene.things}
    if answer == "yes":
        pairs = sorted(present)
    else:
        # Half of the absent ones have their colour and their shape in the scene, but apart.
        absent = [(c, s) for c in COLOURS for s in SHAPES if (c, s) not in present]
        colours, shapes = {c for c, _ in present}, {s for _, s in present}
        near = [(c, s) for c, s in absent if c in colours and s in shapes]
        pairs = near if near and rng.random() < 0.5 else absent
    colour, shape = pairs[int(rng.integers(len(pairs)))]
    form = _variant(rng, "Is there a {} {}?", "Can you see a {} {}?")
    return Question(form.format(colour, shape), answer, "existence")


def _counting(scene: Scene, rng: np.random.Generator, answer: str | None) -> Question | None:
    form = _variant(rng, "How many shapes are there?", "How many shapes can you see?")
    return _pick([Question(form, str(len(scene.things)), "counting")], answer, rng)


def _position(scene: Scene, rng: np.random.Generator, answer: str | None) -> Question | None:
    form = _variant(rng, "Where is the {}?", "In which corner is the {}?")
    options = [
        Question(form.format(_name(thing)), _corner(thing), "position")
        for thing in scene.things
        if min(abs(thing.x - SIZE / 2), abs(thing.y - SIZE / 2)) >= _CLEAR
    ]
    return _pick(options, answer, rng)


def _corner(thing: Thing) -> str:
    return f"{'top' if thing.y < SIZE / 2 else 'bottom'} {'left' if thing.x < SIZE / 2 else 'right'}"


def _relation(scene: Scene, rng: np.random.Generator, answer: str | None) -> Question | None:
    form = _variant(rng, "On which side of the {1} is the {0}?", "Where is the {0} from the {1}?")
    options = []
    for one in scene.things:
        for other in scene.things:
            dx, dy = one.x - other.x, one.y - other.y
            far, near = max(abs(dx), abs(dy)), min(abs(dx), abs(dy))
            if one is not other and far >= 10.0 and far >= 1.5 * near:
                side = ("left" if dx < 0 else "right") if abs(dx) == far else (
                    "above" if dy < 0 else "below")  # fmt: skip
                text = form.format(_name(one), _name(other))
                options.append(Question(text, side, "relation"))
    return _pick(options, answer, rng)


def _reading(scene: Scene, rng: np.random.Generator, answer: str | None) -> Question | None:
    if scene.sign is None:
        return None
    form = _variant(rng, "What does the sign say?", "What is written on the sign?")
    return _pick([Question(form, scene.sign.text, "reading")], answer, rng)


KINDS: dict[str, Callable[[Scene, np.random.Generator, str | None], Question | None]] = {
    "colour": _colour,
    "shape": _shape,
    "existence": _existence,
    "counting": _counting,
    "position": _position,
    "relation": _relation,
    "reading": _reading,
}


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption that lists what the scene shows, in a random order."""
    parts = [f"{_name(thing)} {_corner(thing)}" for thing in scene.things]
    if scene.sign is not None:
        parts.append(f"sign {scene.sign.text}")
    return ", ".join(parts[i] for i in rng.permutation(len(parts)))
