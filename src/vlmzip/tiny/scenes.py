"""Rendered scenes: up to five coloured shapes, and in some a sign, on a textured background."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .glyphs import GLYPH_HEIGHT, GLYPH_WIDTH, WORDS, letter_bitmap

__all__ = ["COLOURS", "PATCH", "SHAPES", "SIZE", "Rendering", "Scene", "Sign", "Thing",
           "render", "sample_scene"]  # fmt: skip

SIZE, PATCH = 96, 8  # pixels
SHAPES = ("circle", "square", "triangle", "cross", "star", "ring")
COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
_RGB = np.array(
    [(215, 40, 40), (45, 160, 60), (45, 75, 220), (238, 212, 45), (150, 50, 180), (70, 215, 225)],
    dtype=np.float64,
)
_SMALLEST, _LARGEST = 15.0, 46.0  # diameters: a factor of three, nine in area
_OVERSAMPLE = 3

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Thing:
    """One object: its names, its centre (x, y) and its diameter, in pixels."""

    shape: str
    colour: str
    x: float
    y: float
    diameter: float
    turn: float


@dataclass(frozen=True)
class Sign:
    """A plate with a word or a two-digit number; (x, y) is its upper left corner, in pixels."""

    text: str
    x: int
    y: int
    dark: bool

    @property
    def width(self) -> int:
        """Width of the plate in pixels."""
        return len(self.text) * (GLYPH_WIDTH + 2) + 4

    @property
    def height(self) -> int:
        """Height of the plate in pixels."""
        return GLYPH_HEIGHT + 6


@dataclass(frozen=True)
class Scene:
    """What an image shows. Things are listed from left to right by their centres."""

    things: tuple[Thing, ...]
    sign: Sign | None
    background: int  # seed of the texture


@dataclass(frozen=True)
class Rendering:
    """An image [96, 96, 3] uint8 with the share of every patch that each instance covers.

    cover is [n_things + 1, 12, 12] float64 in 0..1 (the last row is the sign); slot is [12, 12]
    int8: which letter of the sign the patch shows, -1 if none.
    """

    image: npt.NDArray[np.uint8]
    cover: Floats
    slot: npt.NDArray[np.int8]


def sample_scene(rng: np.random.Generator, busy: bool = False) -> Scene:
    """Draw a scene. The number of things is uniform over 1..5 and says little about their area.

    Busy scenes, from which the towers learn, have more to learn from: mostly four or five things,
    and a sign in three of four.
    """
    count = int(rng.choice(5, p=(0.08, 0.12, 0.2, 0.25, 0.35))) + 1 if busy else int(rng.integers(1, 6))
    with_sign = rng.random() < (0.75 if busy else 0.4)
    while True:
        sign = _sample_sign(rng) if with_sign else None
        things = _place(rng, _diameters(rng, count, with_sign), sign)
        if things is not None:
            return Scene(things, sign, int(rng.integers(2**31)))


def _diameters(rng: np.random.Generator, count: int, with_sign: bool) -> Floats:
    # Half of the scenes share one area budget among their things, half draw each thing freely:
    # so neither the covered area nor the size of a thing tells how many there are.
    largest = 34.0 if with_sign else _LARGEST
    if rng.random() < 0.5:
        sizes = _SMALLEST * (largest / _SMALLEST) ** rng.random(count)
    else:
        area = rng.uniform(900.0, 0.9 * largest**2 if count == 1 else 2000.0)
        sizes = np.sqrt(area * rng.dirichlet(np.full(count, 1.5)))
    return np.asarray(np.sort(np.clip(sizes, _SMALLEST, largest))[::-1])


def _sample_sign(rng: np.random.Generator) -> Sign:
    number = rng.random() < 0.35
    text = str(rng.integers(10, 100)) if number else WORDS[int(rng.integers(len(WORDS)))]
    blank = Sign(text, 0, 0, bool(rng.random() < 0.5))
    x, y = rng.integers(1, SIZE - blank.width), rng.integers(1, SIZE - blank.height)
    return Sign(text, int(x), int(y), blank.dark)


def _place(rng: np.random.Generator, sizes: Floats, sign: Sign | None) -> tuple[Thing, ...] | None:
    pairs = rng.permutation(len(SHAPES) * len(COLOURS))[: len(sizes)]
    placed: list[Thing] = []
    for size, pair in zip(sizes, pairs, strict=True):
        for _ in range(60):
            x, y = rng.uniform(size / 2 + 1, SIZE - size / 2 - 1, 2)
            if _is_free(x, y, size, placed, sign):
                shape, colour = SHAPES[pair % len(SHAPES)], COLOURS[pair // len(SHAPES)]
                turn = rng.uniform(-0.25, 0.25)
                placed.append(Thing(shape, colour, float(x), float(y), float(size), float(turn)))
                break
        else:
            return None
    return tuple(sorted(placed, key=lambda thing: thing.x))


def _is_free(x: float, y: float, size: float, placed: list[Thing], sign: Sign | None) -> bool:
    for other in placed:
        if (x - other.x) ** 2 + (y - other.y) ** 2 < ((size + other.diameter) / 2 + 2) ** 2:
            return False
    if sign is None:
        return True
    dx = max(sign.x - x, 0.0, x - (sign.x + sign.width))
    dy = max(sign.y - y, 0.0, y - (sign.y + sign.height))
    return bool(dx * dx + dy * dy > (size / 2 + 1) ** 2)


def render(scene: Scene) -> Rendering:
    """Draw a scene; the same scene always gives the same bytes."""
    rng = np.random.default_rng(scene.background)
    canvas = _texture(rng)
    masks = np.zeros((len(scene.things) + 1, SIZE, SIZE))
    for mask, thing in zip(masks, scene.things, strict=False):
        _draw_thing(canvas, mask, thing, rng)
    slot = np.full((SIZE // PATCH, SIZE // PATCH), -1, np.int8)
    if scene.sign is not None:
        _draw_sign(canvas, masks[-1], slot, scene.sign)
    canvas += rng.normal(0.0, 4.0, canvas.shape)
    grid = SIZE // PATCH
    cover = masks.reshape(-1, grid, PATCH, grid, PATCH).mean(axis=(2, 4))
    return Rendering(np.clip(canvas + 0.5, 0, 255).astype(np.uint8), cover, slot)


def _texture(rng: np.random.Generator) -> Floats:
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float64)
    angle, period, phase = rng.uniform(0, np.pi), rng.uniform(6, 30), rng.uniform(0, 30)
    along = np.cos(angle) * x + np.sin(angle) * y + phase
    across = -np.sin(angle) * x + np.cos(angle) * y + phase
    kind = int(rng.integers(5))
    if kind == 0:  # a slope from one side to the other
        pattern = along / SIZE - 0.5
    elif kind == 1:  # stripes
        pattern = np.where(along % period < period / 2, 0.5, -0.5)
    elif kind == 2:  # checks
        pattern = np.where((along % period < period / 2) ^ (across % period < period / 2), 0.5, -0.5)
    elif kind == 3:  # waves
        pattern = 0.5 * np.sin(along * 6.283 / period) * np.sin(across * 6.283 / period)
    else:  # blotches
        coarse = rng.uniform(-0.5, 0.5, (SIZE // PATCH, SIZE // PATCH))
        pattern = np.kron(coarse, np.ones((PATCH, PATCH)))
    base = rng.uniform(95, 185) + rng.uniform(-14, 14, 3)
    return np.asarray(base + pattern[..., None] * rng.uniform(10, 40) * rng.uniform(0.7, 1.0, 3))


def _draw_thing(canvas: Floats, mask: Floats, thing: Thing, rng: np.random.Generator) -> None:
    radius = thing.diameter / 2
    top, left = int(thing.y - radius), int(thing.x - radius)
    side = int(thing.diameter) + 3
    top, left = max(0, min(top, SIZE - side)), max(0, min(left, SIZE - side))
    fine = (np.arange(side * _OVERSAMPLE) + 0.5) / _OVERSAMPLE
    u = (left + fine[None, :] - thing.x) / radius
    v = (top + fine[:, None] - thing.y) / radius
    cos, sin = np.cos(thing.turn), np.sin(thing.turn)
    inside = _inside(thing.shape, cos * u + sin * v, cos * v - sin * u)
    alpha = inside.reshape(side, _OVERSAMPLE, side, _OVERSAMPLE).mean(axis=(1, 3))
    window = (slice(top, top + side), slice(left, left + side))
    mask[window] = alpha
    paint = _RGB[COLOURS.index(thing.colour)] + rng.uniform(-16, 16, 3)
    shade = 1.0 + rng.uniform(-0.12, 0.12) * np.linspace(-1, 1, side)[:, None, None]
    canvas[window] += alpha[..., None] * (paint * shade - canvas[window])


def _inside(shape: str, u: Floats, v: Floats) -> npt.NDArray[np.bool_]:
    if shape == "circle":
        return u * u + v * v <= 0.9
    if shape == "ring":
        r = u * u + v * v
        return (r <= 0.96) & (r >= 0.27)
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) <= 0.72
    if shape == "triangle":
        return (v <= 0.62) & (np.abs(u) * 1.75 <= v + 0.95)
    if shape == "cross":
        narrow, wide = np.minimum(np.abs(u), np.abs(v)), np.maximum(np.abs(u), np.abs(v))
        return (narrow <= 0.26) & (wide <= 0.92)
    # A five-pointed star: fold the plane into one of its ten equal wedges, test one edge.
    turn = np.abs((np.arctan2(u, -v) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
    r = np.hypot(u, v)
    px, py = r * np.cos(turn), r * np.sin(turn)
    inner_x, inner_y = 0.4 * np.cos(np.pi / 5), 0.4 * np.sin(np.pi / 5)
    return np.asarray((px - 1.0) * inner_y - py * (inner_x - 1.0) <= 0)


def _draw_sign(canvas: Floats, mask: Floats, slot: npt.NDArray[np.int8], sign: Sign) -> None:
    plate, ink = (45.0, 235.0) if sign.dark else (235.0, 35.0)
    window = (slice(sign.y, sign.y + sign.height), slice(sign.x, sign.x + sign.width))
    canvas[window] = plate
    mask[window] = 1.0
    overlap = np.zeros((len(sign.text), SIZE))
    for i, letter in enumerate(sign.text):
        left, top = sign.x + 3 + i * (GLYPH_WIDTH + 2), sign.y + 3
        cell = canvas[top : top + GLYPH_HEIGHT, left : left + GLYPH_WIDTH]
        cell[letter_bitmap(letter)] = ink
        overlap[i, left : left + GLYPH_WIDTH] = 1.0
    columns = overlap.reshape(len(sign.text), -1, PATCH).mean(axis=2)
    best = np.where(columns.max(axis=0) >= 0.4, columns.argmax(axis=0), -1)
    rows = np.arange(SIZE // PATCH) * PATCH + PATCH / 2
    on_sign = (rows > sign.y + 1) & (rows < sign.y + sign.height - 1)
    slot[on_sign] = best.astype(np.int8)
