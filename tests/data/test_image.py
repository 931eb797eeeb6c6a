import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageOps

from mmtrain.data.documents import BadSample
from mmtrain.data.image import PAD_COLOUR, Canvas, decode_image

SQUARE = Canvas(32, 32)


def photo(width: int, height: int) -> Image.Image:
    """A smooth picture that no flip or turn leaves alone."""
    rows, columns = np.mgrid[0:height, 0:width]
    red = 255 * columns / width
    green = 255 * rows / height
    blue = 128 + 100 * np.sin(6 * columns / width) * np.cos(4 * rows / height)
    return Image.fromarray(np.stack([red, green, blue], axis=-1).astype(np.uint8))


def stored(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def rows(pixels: np.ndarray) -> np.ndarray:
    """[3, H, W] as [H, W, 3] numbers that can be subtracted."""
    return pixels.transpose(1, 2, 0).astype(int)


def near(pixels: np.ndarray, expected: Image.Image, most: float = 3.0) -> bool:
    return bool(np.abs(rows(pixels) - np.asarray(expected.convert("RGB"), int)).mean() <= most)


def squashed(image: Image.Image) -> Image.Image:
    return image.convert("RGB").resize((32, 32), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("size", [(300, 200), (20, 20), (400, 100), (32, 32)])
def test_every_format_becomes_the_canvas(form: str, size: tuple[int, int]) -> None:
    options = {"quality": 95} if form == "JPEG" else {"lossless": True} if form == "WEBP" else {}
    pixels = decode_image(stored(photo(*size), form, **options), SQUARE)
    assert pixels.shape == (1, 3, 32, 32) and pixels.dtype == np.uint8
    assert near(pixels[0], squashed(photo(*size)))


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("resize", ["squash", "pad", "shortest_crop"])
def test_exif_orientation_is_applied(form: str, orientation: int, resize: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = stored(photo(300, 120), form, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    canvas = Canvas(24, 40, resize)
    expected = decode_image(stored(upright, "PNG"), canvas)
    assert near(decode_image(data, canvas)[0], Image.fromarray(expected[0].transpose(1, 2, 0)))


def test_a_turned_jpeg_is_decoded_as_large_as_its_turned_sides_need() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    stripes = np.repeat(np.tile(np.uint8([0, 0, 255, 255]), 25)[:, None, None], 400, axis=1).repeat(3, axis=2)
    data = stored(Image.fromarray(stripes), "JPEG", quality=95, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert near(decode_image(data, Canvas(10, 100))[0], upright.resize((100, 10), Image.Resampling.BICUBIC))


def test_a_jpeg_with_broken_exif_stays_as_it_is() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = stored(photo(64, 64), "JPEG", exif=exif)
    start = data.index(b"Exif\x00\x00") + 6
    broken = data[:start] + b"\xff" * 8 + data[start + 8 :]
    assert near(decode_image(broken, SQUARE)[0], squashed(photo(64, 64)))


def _transparent() -> Image.Image:
    image = photo(32, 32).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize((32, 32)))
    return image


def _on_white(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    alpha = np.asarray(image, float)[..., 3:] / 255
    return Image.fromarray((np.asarray(image, float)[..., :3] * alpha + 255 * (1 - alpha)).round().astype(np.uint8))


def _grey16() -> Image.Image:
    values = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    return Image.fromarray(values)


def _grey16_as_8() -> Image.Image:
    return Image.fromarray((np.linspace(0, 65535, 32 * 32).reshape(32, 32) / 257).astype(np.uint8))


def _palette_with_hole() -> Image.Image:
    image = Image.new("P", (32, 32), 1)
    image.putpalette([0, 0, 0, 200, 10, 10])
    image.paste(0, (0, 0, 16, 32))
    image.info["transparency"] = 0
    return image


def _half_white() -> Image.Image:
    image = Image.new("RGB", (32, 32), (200, 10, 10))
    image.paste((255, 255, 255), (0, 0, 16, 32))
    return image


@pytest.mark.parametrize(
    ("make", "expected", "form"),
    [
        (_transparent, lambda: _on_white(_transparent()), "PNG"),
        (_transparent, lambda: _on_white(_transparent()), "WEBP"),
        (lambda: _transparent().convert("LA"), lambda: _on_white(_transparent().convert("LA")), "PNG"),
        (_palette_with_hole, _half_white, "PNG"),
        (lambda: photo(32, 32).quantize(64), lambda: photo(32, 32).quantize(64), "PNG"),
        (lambda: photo(32, 32).convert("L"), lambda: photo(32, 32).convert("L"), "PNG"),
        (lambda: photo(32, 32).convert("L"), lambda: photo(32, 32).convert("L"), "JPEG"),
        (lambda: photo(32, 32).convert("1"), lambda: photo(32, 32).convert("1"), "PNG"),
        (_grey16, _grey16_as_8, "PNG"),
        (lambda: photo(32, 32).convert("CMYK"), lambda: photo(32, 32), "JPEG"),
    ],
)
def test_every_mode_becomes_rgb(
    make: Callable[[], Image.Image], expected: Callable[[], Image.Image], form: str
) -> None:
    options = {"lossless": True, "exact": True} if form == "WEBP" else {}
    assert near(decode_image(stored(make(), form, **options), SQUARE)[0], expected(), 3.5)


def test_pad_keeps_the_aspect_on_neutral_ground() -> None:
    pixels = rows(decode_image(stored(photo(400, 100), "PNG"), Canvas(40, 40, "pad"))[0])
    assert (pixels[:15] == PAD_COLOUR).all() and (pixels[25:] == PAD_COLOUR).all()
    inside = photo(400, 100).resize((40, 10), Image.Resampling.BICUBIC)
    assert np.array_equal(pixels[15:25], np.asarray(inside, int))


def test_shortest_crop_keeps_the_middle() -> None:
    pixels = decode_image(stored(photo(400, 100), "PNG"), Canvas(50, 50, "shortest_crop"))[0]
    middle = photo(400, 100).crop((150, 0, 250, 100)).resize((50, 50), Image.Resampling.BICUBIC)
    assert near(pixels, middle, 1.0)


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_a_larger_image_becomes_an_overview_and_its_quarters(form: str) -> None:
    canvas = Canvas(20, 30, sub_images=4)
    options = {"quality": 95} if form == "JPEG" else {}
    pixels = decode_image(stored(photo(400, 300), form, **options), canvas)
    assert pixels.shape == (5, 3, 20, 30)
    whole = photo(400, 300)
    assert near(pixels[0], whole.resize((30, 20), Image.Resampling.BICUBIC))
    large = whole.resize((60, 40), Image.Resampling.BICUBIC)
    for number, corner in enumerate([(0, 0), (30, 0), (0, 20), (30, 20)]):
        assert near(pixels[1 + number], large.crop((*corner, corner[0] + 30, corner[1] + 20)))


def test_the_number_of_panels_follows_the_stored_size() -> None:
    canvas = Canvas(20, 30, sub_images=4)
    sizes = {(30, 20): 1, (31, 5): 5, (5, 21): 5, (20, 20): 1}
    for (width, height), panels in sizes.items():
        assert canvas.panels(width, height) == panels
        assert len(decode_image(stored(photo(width, height), "PNG"), canvas)) == panels
    assert Canvas(20, 30).panels(1000, 1000) == 1


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_too_many_pixels_are_refused_before_decoding(form: str) -> None:
    data = stored(photo(100, 100), form)
    assert len(decode_image(data, Canvas(8, 8, max_pixels=10_000))) == 1
    with pytest.raises(BadSample, match=r"100 x 100 pixels, more than the 9999 of data.max_image_pixels"):
        decode_image(data, Canvas(8, 8, max_pixels=9999))


def test_our_limit_replaces_pillows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow would warn, then refuse
    assert len(decode_image(stored(photo(50, 50), "PNG"), SQUARE)) == 1
    assert Image.MAX_IMAGE_PIXELS == 100


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_damaged_files_are_bad_samples(form: str) -> None:
    data = stored(photo(200, 200), form)
    for broken in (data[: len(data) // 2], data[:20], b"", b"not an image at all", data[:3] + b"\0" * 100):
        with pytest.raises(BadSample):
            decode_image(broken, SQUARE)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_flipped_bytes_give_pixels_or_a_bad_sample(form: str) -> None:
    data = bytearray(stored(photo(60, 40), form))
    random = np.random.default_rng(0)
    for _ in range(300):
        broken = bytearray(data)
        for at in random.integers(0, len(data), 3):
            broken[at] = random.integers(0, 256)
        try:
            assert decode_image(bytes(broken), Canvas(16, 16, max_pixels=1_000_000)).shape == (1, 3, 16, 16)
        except BadSample:
            continue


def test_other_formats_are_refused() -> None:
    with pytest.raises(BadSample, match="unreadable image"):
        decode_image(stored(photo(10, 10), "BMP"), SQUARE)
