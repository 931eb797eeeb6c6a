"""Image files to pixels on the recipe's one canvas: uint8 [K, 3, H, W], K = 1 or an overview and four crops.

JPEG is decoded at the smallest of libjpeg's scales that still covers what is needed; everything else, and any JPEG
that the fast decoder refuses, goes through Pillow. Pixels stay uint8; the model normalises them.
"""

import io
import struct
from typing import Literal, NamedTuple

import numpy as np
import simplejpeg
from PIL import Image, ImageOps

from mmtrain.data.documents import BadSample
from mmtrain.data.header import FORMATS

PAD_COLOUR = (122, 116, 104)
"""Colour around a padded image: CLIP's mean, which normalisation turns into (nearly) zero."""

GRID = 2
"""Crops along each side of the sub-image grid."""

CHANNELS = 3
"""Red, green, blue."""

_SWAPS_SIDES = (5, 6, 7, 8)  # EXIF orientations that turn the picture by 90 degrees


class Canvas(NamedTuple):
    """How every image of a recipe becomes pixels."""

    height: int
    """Rows of the canvas."""
    width: int
    """Columns of the canvas."""
    resize: Literal["squash", "pad", "shortest_crop"] = "squash"
    """How an image of another shape meets the canvas."""
    sub_images: int = 0
    """4: an image larger than the canvas becomes an overview and 4 crops; 0: the overview alone."""
    max_pixels: int = 50_000_000
    """Larger images are refused before decoding."""

    def panels(self, width: int, height: int) -> int:
        """Canvases that an image of this size, as stored in the file, becomes: 1, or 1 + sub_images."""
        return 1 + self.sub_images if width > self.width or height > self.height else 1


class _Picture(NamedTuple):
    """A decoded file, upright."""

    image: Image.Image
    """RGB, at least as large as needed but not always full size."""
    aspect: float
    """Width / height at full size; scaled decoding rounds it."""
    panels: int
    """Canvases that it becomes."""


def decode_image(data: bytes, canvas: Canvas, room: np.ndarray | None = None) -> np.ndarray:
    """Pixels of an image file: uint8 [panels, 3, H, W], the overview first, then crops row by row.

    They lie in the first places of `room` [n, 3, H, W] if they fit there, else in memory of their own.
    BadSample, with the reason, if the file is no readable image or has more pixels than the canvas allows.
    """
    picture = _decode_jpeg(data, canvas) if data[:3] == b"\xff\xd8\xff" else _decode_other(data, canvas)
    if room is not None and picture.panels <= len(room):
        out = room[: picture.panels]
    else:
        out = np.empty((picture.panels, CHANNELS, canvas.height, canvas.width), np.uint8)
    out[0] = _on_canvas(picture, canvas.height, canvas.width, canvas.resize).transpose(2, 0, 1)
    if picture.panels > 1:
        whole = _on_canvas(picture, GRID * canvas.height, GRID * canvas.width, canvas.resize)
        crops = whole.reshape(GRID, canvas.height, GRID, canvas.width, 3).transpose(0, 2, 4, 1, 3)
        out[1:] = crops.reshape(GRID * GRID, 3, canvas.height, canvas.width)
    return out


def _check_size(width: int, height: int, canvas: Canvas) -> None:
    """BadSample if an image of this size must not be decoded."""
    if width * height > canvas.max_pixels:
        raise BadSample(f"{width} x {height} pixels, more than the {canvas.max_pixels} of data.max_image_pixels")
    if not width or not height:
        raise BadSample(f"{width} x {height} pixels")


def _decode_jpeg(data: bytes, canvas: Canvas) -> _Picture:
    """A JPEG, through libjpeg-turbo where it can."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return _decode_other(data, canvas)
    _check_size(width, height, canvas)
    if colours in ("CMYK", "YCCK"):
        return _decode_other(data, canvas)
    panels = canvas.panels(width, height)
    orientation = _exif_orientation(data)
    need_width, need_height = _needed(width, height, canvas, panels, orientation)
    try:
        pixels = simplejpeg.decode_jpeg(data, min_height=need_height, min_width=need_width)
    except ValueError:  # the strict decoder refuses files that Pillow still reads
        return _decode_other(data, canvas)
    return _upright(Image.fromarray(pixels), orientation, width / height, panels)


def _needed(width: int, height: int, canvas: Canvas, panels: int, orientation: int) -> tuple[int, int]:
    """Width and height, before turning, below which scaled decoding would lose what the canvas can show."""
    grid = GRID if panels > 1 else 1
    across, down = grid * canvas.width, grid * canvas.height
    if orientation in _SWAPS_SIDES:
        across, down = down, across
    if canvas.resize == "pad":  # only the tighter side is filled
        scale = min(across / width, down / height)
        across, down = int(width * scale), int(height * scale)
    return min(across, width), min(down, height)


def _decode_other(data: bytes, canvas: Canvas) -> _Picture:
    """Any file, through Pillow."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # the recipe's own limit is checked here
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            _check_size(width, height, canvas)
            orientation = image.getexif().get(0x0112, 1)
            return _upright(_to_rgb(image), orientation, width / height, canvas.panels(width, height))
    except BadSample:
        raise
    # Everything that Pillow's parsers are known to raise on damaged files.
    except (OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, struct.error, MemoryError) as error:
        raise BadSample(f"unreadable image: {error}") from None
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any mode as 8-bit RGB; transparency on white, 16-bit grey scaled to 8 bits (Pillow alone would clip it)."""
    if image.mode.startswith("I"):
        grey = np.asarray(image)
        image = Image.fromarray((grey.astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8))
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        picture = image.convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, picture).convert("RGB")
    if image.mode == "RGB":  # convert() would copy it
        image.load()
        return image
    return image.convert("RGB")


def _exif_orientation(data: bytes) -> int:
    """EXIF orientation of a JPEG, 1 (upright) if it has none or a broken one."""
    if b"Exif\x00\x00" not in data[: 1 << 16]:
        return 1
    exif = Image.Exif()
    try:
        start = data.index(b"Exif\x00\x00")
        length = int.from_bytes(data[start - 2 : start], "big")
        exif.load(data[start : start - 2 + length])
        return int(exif.get(0x0112, 1))
    except (OSError, ValueError, SyntaxError, TypeError, KeyError, struct.error):
        return 1


def _upright(image: Image.Image, orientation: int, aspect: float, panels: int) -> _Picture:
    """An image of this aspect as stored, turned as its EXIF orientation asks."""
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    if orientation in turns:
        image = image.transpose(turns[orientation])
    return _Picture(image, 1 / aspect if orientation in _SWAPS_SIDES else aspect, panels)


def _on_canvas(picture: _Picture, height: int, width: int, resize: str) -> np.ndarray:
    """The picture on a canvas of height x width: uint8 [height, width, 3]."""
    image, bicubic = picture.image, Image.Resampling.BICUBIC
    if image.size == (width, height):
        return np.asarray(image)
    if resize == "squash":
        return np.asarray(image.resize((width, height), bicubic))
    if resize == "shortest_crop":
        return np.asarray(ImageOps.fit(image, (width, height), bicubic))
    across = min(width, round(height * picture.aspect))
    inside = (max(1, across), max(1, min(height, round(across / picture.aspect))))
    canvas = Image.new("RGB", (width, height), PAD_COLOUR)
    canvas.paste(image.resize(inside, bicubic), ((width - inside[0]) // 2, (height - inside[1]) // 2))
    return np.asarray(canvas)
