"""Requests for a compressed server: good ones of every kind, malformed ones of every kind."""

import base64
import io
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

# Pixels of the images; a budget, a turn and a question are drawn for each request.
SIZES = ((120, 96), (64, 200), (336, 336), (640, 480), (33, 47), (900, 100))
WORDS = ("what", "is", "in", "this", "picture", "and", "where", "are", "they")
MOST_IMAGES = 3
MOST_VISUAL_TOKENS = 40
MOST_PROMPT = 1024

Body = dict[str, Any]


@dataclass(frozen=True)
class Request:
    """What is sent, and what must come back.

    Attributes:
        kind: What it tests.
        body: The JSON body, or bytes that are none.
        good: It must be answered, and as when sent alone. Otherwise it must be refused: 4xx, a reason.
    """

    kind: str
    body: Body | bytes
    good: bool


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    """Coloured blocks: no two pictures alike, small as a file."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (6, 6, 3)).astype(np.uint8)
    return Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def part(data: bytes, kind: str = "png") -> Body:
    """Bytes as an image of a message."""
    return url_part(f"data:image/{kind};base64,{base64.b64encode(data).decode()}")


def url_part(url: str) -> Body:
    return {"type": "image_url", "image_url": {"url": url}}


def text_part(text: str) -> Body:
    return {"type": "text", "text": text}


def chat(*parts: Body, tokens: int = 4, **fields: Any) -> Body:
    """A greedy request; its answer is compared token by token."""
    return {
        "messages": [{"role": "user", "content": list(parts)}],
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        **fields,
    }


def good_request(seed: int) -> Request:
    """Nought to three images of mixed sizes, one turn or two, mostly a budget of its own."""
    draw = random.Random(seed)
    images = draw.choice((0, 1, 1, 1, 1, 2, 2, MOST_IMAGES))
    parts = [
        part(encoded(picture(draw.randrange(60), draw.choice(SIZES)), kind), kind.lower())
        for kind in draw.choices(("PNG", "JPEG"), k=images)
    ]
    words = " ".join(draw.choices(WORDS, k=6))
    fields: Body = {}
    if images and draw.random() < 0.6:
        most = MOST_VISUAL_TOKENS
        fields["mm_processor_kwargs"] = {"visual_tokens": draw.choice((1, 2, 7, 16, 31, most))}
    body = chat(*parts, text_part(words), tokens=draw.randint(1, 8), **fields)
    if draw.random() < 0.4:
        body["messages"] += [
            {"role": "assistant", "content": draw.choice(("a cat", "three red squares", "no"))},
            {"role": "user", "content": [text_part("and " + words[::-1])]},
        ]
    turns = len(body["messages"]) // 2 + 1
    budget = "own budget" if fields else "default budget"
    return Request(f"{images} images, {turns} turns, {budget}", body, good=True)


def bad_requests(seed: int) -> list[Request]:
    """One malformed request of every kind."""
    png = encoded(picture(seed, (120, 96)))
    jpeg = encoded(picture(seed, (640, 480)), "JPEG")
    good, ask = part(png), text_part(f"what is it? {seed}")

    def budget(value: object) -> Body:
        return chat(good, ask, mm_processor_kwargs={"visual_tokens": value})

    bodies: dict[str, Body | bytes] = {
        "broken base64": chat(url_part("data:image/png;base64,@@@not base64@@@"), ask),
        "base64 of no image": chat(part(b"this is no image " * 9), ask),
        "empty image": chat(part(b""), ask),
        "truncated JPEG": chat(part(jpeg[: len(jpeg) // 2], "jpeg"), ask),
        "truncated PNG": chat(part(png[: len(png) // 2]), ask),
        "8000 x 10 image": chat(part(encoded(picture(seed, (8000, 10)))), ask),
        "10 x 8000 image": chat(part(encoded(picture(seed, (10, 8000)))), ask),
        "a placeholder too many": chat(good, text_part("what is <image>?")),
        "too many images": chat(*[good] * (MOST_IMAGES + 1), ask),
        "oversized prompt": chat(good, text_part("why? " * MOST_PROMPT)),
        "budget 0": budget(0),
        "budget -1": budget(-1),
        "budget 10^9": budget(10**9),
        "budget above the maximum": budget(MOST_VISUAL_TOKENS + 1),
        "budget x": budget("x"),
        "budget 1.5": budget(1.5),
        "budget true": budget(True),
        "budget null": budget(None),
        "budget list": budget([16]),
        "unknown processor field": chat(good, ask, mm_processor_kwargs={"visual_token": 16}),
        "processor fields no object": chat(good, ask, mm_processor_kwargs=16),
        "unknown part": chat({"type": "picture", "picture": "x"}, ask),
        "image without url": chat({"type": "image_url", "image_url": {}}, ask),
        "unknown scheme": chat(url_part("gopher://example.org/x.png"), ask),
        "unknown role": {"messages": [{"role": "cat", "content": 5}]},
        "no messages": {"max_tokens": 4},
        "negative max_tokens": chat(good, ask, tokens=-1),
        "unknown model": chat(good, ask, model="nobody"),
        "no JSON": b'{"messages": [',
    }
    return [Request(kind, body, good=False) for kind, body in bodies.items()]


def odd_requests(seed: int) -> list[Request]:
    """Requests that look wrong and are not: they must be answered."""
    ask = text_part(f"what is it? {seed}")
    bodies = {
        "1 x 1 image": chat(part(encoded(picture(seed, (1, 1)))), ask),
        "grey image": chat(part(encoded(picture(seed, (50, 60)).convert("L"))), ask),
        "transparent image": chat(part(encoded(picture(seed, (50, 60)).convert("RGBA"))), ask),
        "one-bit image": chat(part(encoded(picture(seed, (50, 60)).convert("1"))), ask),
        # vLLM takes it for text: its requests without images never reach a model's own checks.
        "placeholder without an image": chat(text_part("what is <image>?")),
        "field that vLLM ignores": chat(
            part(encoded(picture(seed, (50, 60)))), ask, colour_of_the_sky="blue"
        ),
    }
    return [Request(kind, body, good=True) for kind, body in bodies.items()]
