"""Image files of every kind: the pixels are what a viewer would show, or the error is clear."""

import contextlib
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlmzip.images import open_image, to_rgb

RED = (200, 30, 40)


def written(folder: Path, image: Image.Image, name: str, **options: object) -> Path:
    path = folder / name
    image.save(path, **options)
    return path


def colour(path: Path, at: tuple[int, int] = (1, 1)) -> tuple[int, ...]:
    image = open_image(path).image
    assert image.mode == "RGB"
    pixel = image.getpixel(at)
    assert isinstance(pixel, tuple)
    return pixel


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif", "a.webp", "a.ppm", "a.tga", "a.pcx"])
def test_plain_colours_survive(tmp_path: Path, name: str) -> None:
    options = {"lossless": True} if name.endswith("webp") else {}
    path = written(tmp_path, Image.new("RGB", (6, 4), RED), name, **options)
    assert colour(path) == RED


def test_cmyk_jpeg_is_close_to_its_colours(tmp_path: Path) -> None:
    path = written(tmp_path, Image.new("RGB", (16, 16), RED).convert("CMYK"), "a.jpg", quality=95)
    assert np.abs(np.subtract(colour(path), RED)).max() < 12


@pytest.mark.parametrize(
    ("mode", "name"), [("I;16", "a.png"), ("I;16", "a.tif"), ("I;16B", "b.tif"), ("I;16", "a.pgm")]
)
def test_16_bits_are_scaled_and_not_clipped(tmp_path: Path, mode: str, name: str) -> None:
    values = np.array(
        [[0, 257 * 100 + 60], [257 * 200 - 70, 65535]], dtype=">u2" if mode.endswith("B") else "<u2"
    )
    image = Image.frombytes(mode, (2, 2), values.tobytes())
    if name.endswith("pgm"):
        path = tmp_path / name
        path.write_bytes(b"P5 2 2 65535\n" + values.astype(">u2").tobytes())
    else:
        path = written(tmp_path, image, name)
    pixels = np.asarray(open_image(path).image)
    np.testing.assert_array_equal(pixels[..., 0], [[0, 100], [200, 255]])
    np.testing.assert_array_equal(pixels[..., 0], pixels[..., 2])


def test_32_bit_integers_count_as_8_or_16_bits(tmp_path: Path) -> None:
    for values, wanted in ([[0, 255]], [0, 255]), ([[0, 65535]], [0, 255]):
        path = written(tmp_path, Image.fromarray(np.array(values, dtype=np.int32)), "a.tif")
        assert np.asarray(open_image(path).image)[0, :, 1].tolist() == wanted


def test_floats_from_0_to_1(tmp_path: Path) -> None:
    path = written(tmp_path, Image.fromarray(np.array([[0.0, 0.4, 1.0]], dtype=np.float32)), "a.tif")
    assert np.asarray(open_image(path).image)[0, :, 0].tolist() == [0, 102, 255]


@pytest.mark.parametrize("values", [[[0.0, 7.5]], [[-0.5, 1.0]], [[np.nan, 1.0]], [[np.inf, 1.0]]])
def test_other_floats_are_refused(tmp_path: Path, values: list[list[float]]) -> None:
    path = written(tmp_path, Image.fromarray(np.array(values, dtype=np.float32)), "a.tif")
    with pytest.raises(ValueError, match=r"no agreed black and white|NaN or infinite"):
        open_image(path)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_becomes_white(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGBA", (2, 1), (*RED, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    path = written(tmp_path, image.convert(mode), "a.png")
    pixels = np.asarray(open_image(path).image)
    assert pixels[0, 1].tolist() == [255, 255, 255]
    assert pixels[0, 0].tolist() == list(RED) or mode == "LA"
    half = Image.new("RGBA", (1, 1), (0, 0, 0, 128))
    assert abs(colour(written(tmp_path, half, "half.png"), (0, 0))[0] - 127) <= 1


@pytest.mark.parametrize("name", ["a.png", "a.gif"])
def test_palette_with_transparency_becomes_white(tmp_path: Path, name: str) -> None:
    image = Image.new("P", (2, 1), 1)
    image.putpalette([0, 0, 0, *RED, 10, 200, 10])
    image.putpixel((1, 0), 2)
    path = written(tmp_path, image, name, transparency=2)
    pixels = np.asarray(open_image(path).image)
    assert pixels[0].tolist() == [list(RED), [255, 255, 255]]


def test_transparent_colour_of_a_png_without_alpha_becomes_white(tmp_path: Path) -> None:
    path = written(tmp_path, Image.new("RGB", (2, 2), RED), "a.png", transparency=RED)
    assert colour(path) == (255, 255, 255)


def test_one_bit(tmp_path: Path) -> None:
    image = Image.new("1", (2, 1))
    image.putpixel((1, 0), 1)
    assert np.asarray(open_image(written(tmp_path, image, "a.png")).image)[0, :, 0].tolist() == [0, 255]


@pytest.mark.parametrize("name", ["a.gif", "a.tif", "a.png", "a.webp"])
def test_the_first_of_several_frames(tmp_path: Path, name: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, (0, 255, 0), (0, 0, 255))]
    options = {"lossless": True} if name.endswith("webp") else {}
    path = written(tmp_path, frames[0], name, save_all=True, append_images=frames[1:], **options)
    assert open_image(path).frames == 3
    assert np.abs(np.subtract(colour(path), RED)).max() < 6


def test_a_photo_is_turned_upright(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 4))
    image.putpixel((0, 0), RED)
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera turned: show it rotated by 90 degrees clockwise
    path = written(tmp_path, image, "a.png", exif=exif)
    opened = open_image(path).image
    assert opened.size == (4, 8)
    assert opened.getpixel((3, 0)) == RED


@pytest.mark.parametrize("mode", ["YCbCr", "HSV"])
def test_other_colour_spaces(mode: str) -> None:
    pixel = to_rgb(Image.new("RGB", (4, 4), RED).convert(mode)).getpixel((1, 1))
    assert np.abs(np.subtract(pixel, RED)).max() < 6


def test_lab(tmp_path: Path) -> None:
    image = Image.new("LAB", (4, 4), (112, 192, 170))  # L of 255, a and b + 128
    assert np.abs(np.subtract(colour(written(tmp_path, image, "a.tif")), RED)).max() < 6


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (5, 1), (3, 40), (40, 3), (1, 200), (200, 1)])
def test_small_and_long_images_reach_the_model_in_their_colour(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    """An image three pixels high must not be taken for one with channels first."""
    from vlmzip.tiny.random.llava import build

    _, processor = build(112)
    image = open_image(written(tmp_path, Image.new("RGB", size, RED), "a.png")).image
    seen = processor(images=[image], text=["<image>"], return_tensors="np")["pixel_values"][0]
    settings = processor.image_processor
    shown = seen * np.reshape(settings.image_std, (3, 1, 1)) + np.reshape(settings.image_mean, (3, 1, 1))
    np.testing.assert_allclose(
        255 * shown, np.broadcast_to(np.reshape(RED, (3, 1, 1)), shown.shape), atol=2
    )


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (2, 401)])
def test_images_too_long_for_a_processor_are_refused(tmp_path: Path, size: tuple[int, int]) -> None:
    path = written(tmp_path, Image.new("RGB", size), "a.png")
    with pytest.raises(ValueError, match=rf"{size[0]} x {size[1]} pixels; one side may be at most 200"):
        open_image(path)


def test_a_decompression_bomb_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(60_000, 60_000))
    with pytest.raises(ValueError, match=r"bomb.png is too large: .*decompression bomb"):
        open_image(path)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.gif", "a.webp", "a.tif", "a.bmp"])
@pytest.mark.parametrize("part", [0.02, 0.1, 0.5, 0.9])
def test_truncated_files_are_refused(tmp_path: Path, name: str, part: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = written(tmp_path, Image.fromarray(noise), name)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(ValueError, match=r"truncated or damaged|not an image"):
        open_image(path)


def test_damaged_bytes_never_end_in_another_error(tmp_path: Path) -> None:
    """Whatever is in the file: an image or a ValueError."""
    rng = np.random.default_rng(1)
    noise = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8))
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PCX", "TGA", "ICO", "PPM"):
        buffer = io.BytesIO()
        noise.save(buffer, kind)
        for _ in range(30):
            data = bytearray(buffer.getvalue())
            for place in rng.integers(0, min(len(data), 200), 4):
                data[place] = rng.integers(0, 256)
            path = tmp_path / "damaged"
            path.write_bytes(data)
            with contextlib.suppress(ValueError):
                assert open_image(path).image.mode == "RGB"


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds nothing."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND")
    )


def chunk(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
