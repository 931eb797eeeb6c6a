"""What an image file's header says, without decoding its pixels."""

import io
import struct
import warnings
from typing import NamedTuple

from PIL import Image, JpegImagePlugin, PngImagePlugin, UnidentifiedImageError, WebPImagePlugin

SUFFIX_OF_FORMAT = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
"""Formats that shards hold -> ending of the member (MPO: a JPEG with more pictures behind it, as some phones write)."""


FORMATS = tuple(
    plugin.format
    for plugin in (
        JpegImagePlugin.JpegImageFile,
        PngImagePlugin.PngImageFile,
        WebPImagePlugin.WebPImageFile,
    )
)
"""What shards may hold. Pillow's other plugins are never asked: each is a parser of hostile bytes."""

OTHER_FORMATS = {b"GIF8": "GIF", b"BM": "BMP", b"II*\0": "TIFF", b"MM\0*": "TIFF", b"\0\0\1\0": "ICO"}
"""First bytes of images that shards may not hold, for the error's sake."""


class ImageHeader(NamedTuple):
    """Size and format of an image file."""

    width: int
    """Pixels, as stored (EXIF rotation is not applied)."""
    height: int
    """Pixels."""
    suffix: str
    """jpg, png or webp, by content, whatever the file is called."""


def read_header(data: bytes) -> ImageHeader:
    """Header of an image file's bytes; ValueError with the reason if it is no image that shards may hold.

    Pixels are not touched, so a broken body behind a good header is not found here.
    """
    try:
        with warnings.catch_warnings():
            # Large pictures are for the recipe's max_image_pixels to judge; only a bomb by Pillow's own limit fails.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                width, height = image.size
                suffix = SUFFIX_OF_FORMAT[image.format or ""]
    except UnidentifiedImageError:
        known = next((name for start, name in OTHER_FORMATS.items() if data.startswith(start)), "")
        if known:
            raise ValueError(f"image format {known}, expected JPEG, PNG or WebP") from None
        raise ValueError("not an image (no known header)") from None
    except Image.DecompressionBombError:
        raise ValueError(f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0)} pixels (decompression bomb)") from None
    # What Pillow's plugins raise on garbled headers.
    except (OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, struct.error, MemoryError) as error:
        raise ValueError(f"unreadable image header: {error}") from None
    return ImageHeader(width, height, suffix)
