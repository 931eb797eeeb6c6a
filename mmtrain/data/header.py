"""What an image file's header says, without decoding its pixels."""

import io
import warnings
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError

SUFFIX_OF_FORMAT = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
"""Formats that shards hold -> ending of the member (MPO: a JPEG with more pictures behind it, as some phones write)."""


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
            with Image.open(io.BytesIO(data)) as image:
                width, height = image.size
                suffix = SUFFIX_OF_FORMAT.get(image.format or "")
                found = image.format
    except UnidentifiedImageError:
        raise ValueError("not an image (no known header)") from None
    except Image.DecompressionBombError:
        raise ValueError(f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0)} pixels (decompression bomb)") from None
    except (OSError, ValueError, SyntaxError) as error:  # what Pillow's plugins raise on garbled headers
        raise ValueError(f"unreadable image header: {error}") from None
    if suffix is None:
        raise ValueError(f"image format {found}, expected JPEG, PNG or WebP")
    return ImageHeader(width, height, suffix)
