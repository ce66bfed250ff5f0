"""Opening image files: whatever Pillow reads becomes 8-bit RGB, or one clear error."""

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# A processor scales the shorter side to its input size; beyond this the longer one fills the memory.
MOST_ELONGATED = 200


@dataclass(frozen=True)
class Picture:
    """An image file that was opened.

    Attributes:
        image: Upright, mode RGB; transparent parts are white.
        frames: Frames, pages or sub-images in the file; ``image`` is the first.
    """

    image: Image.Image
    frames: int


def open_image(path: str | Path) -> Picture:
    """Open an image file of any kind that Pillow reads, and turn it upright.

    Raises:
        ValueError: There is no such file, it is no image or damaged, or its pixels cannot be shown
            in 8 bits without guessing their range; the message names the file.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give an image file")
    if not path.exists():
        raise ValueError(f"there is no file {path}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large images and odd metadata
            with Image.open(path) as opened:
                frames = getattr(opened, "n_frames", 1)
                check_shape(opened.width, opened.height)
                opened.load()
                image = to_rgb(ImageOps.exif_transpose(opened))
    except UnidentifiedImageError:
        empty = path.stat().st_size == 0
        what = "is empty" if empty else "is not an image of a kind that Pillow reads"
        raise ValueError(f"{path} {what}; give a PNG, JPEG, WebP, TIFF, GIF or similar file") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path} is too large: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except (OSError, EOFError, SyntaxError, IndexError, TypeError) as error:
        # Pillow's decoders raise all of these on damaged files.
        raise ValueError(f"{path} cannot be read, it is truncated or damaged: {error}") from error
    return Picture(image, frames)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB: 16 bits are scaled to 8, transparent parts become white.

    Raises:
        ValueError: The pixels are numbers of no agreed range, or Pillow cannot convert the mode.
    """
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Integers of 8 or 16 bits, or floats from 0 to 1, as mode L."""
    pixels = np.asarray(image).astype(np.float64)
    if not np.isfinite(pixels).all():
        raise ValueError("the pixels hold NaN or infinite values")
    low, high = float(pixels.min()), float(pixels.max())
    top = _white(image, high)
    if low < 0 or high > top:
        raise ValueError(
            f"the pixels are {image.mode} numbers from {low:g} to {high:g}, which has no agreed "
            "black and white; save it with 8 or 16 bits a channel"
        )
    return Image.fromarray(np.round(pixels * (255 / top)).astype(np.uint8))


def _white(image: Image.Image, high: float) -> float:
    """The value that means white."""
    if image.mode == "F":
        return 1.0
    # Older Pillows open 16-bit PNG and PGM as 32-bit integers.
    if image.mode.startswith("I;16") or image.format in ("PNG", "PPM") or high > 255:
        return 65535.0
    return 255.0


def check_shape(width: int, height: int) -> None:
    """Refuse images that a processor, which scales the shorter side, would blow up.

    Raises:
        ValueError: One side is more than ``MOST_ELONGATED`` times the other.
    """
    if min(width, height) == 0 or max(width, height) > MOST_ELONGATED * min(width, height):
        raise ValueError(
            f"the image is {width} x {height} pixels; one side may be at most "
            f"{MOST_ELONGATED} times the other: crop or pad it"
        )
