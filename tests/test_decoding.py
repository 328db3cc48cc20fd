"""Bytes to images: every format and mode as Pillow reads it, or refused with a reason; nothing cut
off is read.
"""

import io
import itertools

import cv2
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from numpy.random import default_rng
from numpy.testing import assert_array_equal
from PIL import Image, ImageOps

from sparsity_jax import decoding, pixels

TIFF_WAYS = [
    dict(compression=name) for name in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits")
]
WAYS = {  # options of Pillow's writers
    "PNG": [{}],
    "JPEG": [{}, dict(progressive=True), dict(quality=30)],
    "BMP": [{}],
    "TIFF": TIFF_WAYS,
    "WEBP": [{}, dict(lossless=True)],
    "PPM": [{}],
}
SUFFIX_OF = {
    "PNG": ".png",
    "JPEG": ".jpg",
    "BMP": ".bmp",
    "TIFF": ".tif",
    "WEBP": ".webp",
    "PPM": ".ppm",
}


def smooth(height=33, width=46):
    """A colour image without fine detail."""
    coarse = default_rng(0).integers(0, 256, (5, 6, 3), np.uint8)
    return Image.fromarray(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC))


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def as_pillow_reads(data):
    """Grey [H, W] or BGR [H, W, 3] without alpha, 16 bits rounded to 8."""
    image = Image.open(io.BytesIO(data))
    if image.mode.startswith("I"):
        return (np.asarray(image).astype(int) + 128) // 257
    if image.mode in ("1", "L", "LA"):
        return np.asarray(image.convert("LA"))[..., 0]
    return np.asarray(image.convert("RGBA"))[..., 2::-1]


def modes():
    colour = smooth()
    grey = colour.convert("L")
    opaque = colour.convert("RGBA")
    half = opaque.copy()
    half.putalpha(grey)
    return {
        "1": colour.convert("1"),
        "L": grey,
        "LA": colour.convert("LA"),
        "P": colour.quantize(64),
        "RGB": colour,
        "RGBA": opaque,
        "RGBA of any alpha": half,
        "CMYK": colour.convert("CMYK"),
        "YCbCr": colour.convert("YCbCr"),
        "I;16": Image.fromarray(np.asarray(grey).astype(np.uint16) * 250),
    }


def test_every_format_and_mode_is_read_as_by_pillow():
    compared = 0
    for (mode, image), (kind, ways) in itertools.product(modes().items(), WAYS.items()):
        for options in ways:
            try:
                data = encoded(image, kind, **options)
            except (OSError, KeyError):  # the format has no such mode
                continue
            found = decoding.decode(data)
            if (kind, mode) == ("TIFF", "RGBA of any alpha"):
                assert found is None
                continue
            known = as_pillow_reads(data)
            if (kind, mode) == ("PNG", "LA"):
                found = found[..., 0]  # grey with alpha comes in three equal channels
            assert found.dtype == np.uint8, (kind, mode)
            assert found.shape == known.shape, (kind, mode)
            assert np.abs(found.astype(int) - known).max() <= 1, (kind, mode, options)
            compared += 1
    assert compared > 60


REFUSED = {
    "GIF": lambda: encoded(smooth(), "GIF"),
    "JPEG 2000": lambda: encoded(smooth(), "JPEG2000"),
    "CIELAB": lambda: encoded(Image.new("LAB", (5, 4)), "TIFF"),
    "floating-point": lambda: encoded(smooth().convert("F"), "TIFF"),
    "empty": lambda: b"",
    "PNG": lambda: b"a text, not an image",
    "damaged": lambda: encoded(smooth(), "PNG")[:200],
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_not_read_has_a_reason(reason):
    data = REFUSED[reason]()
    assert decoding.decode(data) is None
    assert reason in decoding.why_not(data)


@pytest.mark.parametrize("kind", WAYS)
def test_nothing_cut_off_is_read(kind):
    for options in WAYS[kind]:
        data = encoded(smooth(), kind, **options)
        assert decoding.decode(data) is not None
        for share in (0.0, 0.05, 0.3, 0.6, 0.8, 0.9, 0.95):
            assert decoding.decode(data[: int(share * len(data))]) is None, (options, share)
    if kind == "JPEG":
        assert decoding.decode(data[:-2]) is None
        assert decoding.decode(data + bytes(99)) is not None  # cameras add to the end


SIDES = st.integers(1, 12)


@hypothesis.given(
    st.sampled_from(range(1, 7)),
    SIDES,
    SIDES,
    st.sampled_from((1, 2, 15, 100, 254, 255, 256, 1000, 4095, 65535)),
    st.integers(0, 99),
)
def test_greys_of_any_maximum_are_scaled(kind, height, width, maximum, seed):
    """PBM, PGM and PPM, plain and binary, against the definition and Pillow."""
    rng, colour = default_rng(seed), kind in (3, 6)
    maximum = 1 if kind in (1, 4) else maximum
    values = rng.integers(0, maximum + 1, (height, width, 3 if colour else 1))
    size = b"# a comment\n%d %d\n" % (width, height)
    limit = b"" if kind in (1, 4) else b"%d\n" % maximum
    if kind == 1:
        body = "".join(map(str, values.ravel())).encode()
    elif kind == 4:
        body = np.packbits(values[..., 0], axis=1).tobytes()
    elif kind in (2, 3):
        body = " ".join(map(str, values.ravel())).encode()
    else:
        body = values.astype(np.uint8 if maximum < 256 else ">u2").tobytes()
    data = b"P%d\n" % kind + size + limit + body
    found = decoding.decode(data)
    levels = maximum - values if kind in (1, 4) else values
    known = np.floor(levels * 255 / maximum + 0.5)
    assert_array_equal(found, known[..., ::-1] if colour else known[..., 0])
    assert np.abs(found - as_pillow_reads(data).astype(int)).max() <= 1
    assert decoding.decode(data[: len(data) - len(body) + len(body) // 4]) is None


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("way", range(1, 9))
def test_orientation_is_that_of_exif(kind, way):
    exif = Image.Exif()
    exif[274] = way
    data = encoded(smooth(12, 20), kind, exif=exif)
    assert decoding.orientation(data) == way
    stored = Image.open(io.BytesIO(data))
    upright = np.asarray(ImageOps.exif_transpose(stored).convert("RGB"))
    assert_array_equal(decoding.decode(data, upright=True)[..., ::-1], upright)
    assert_array_equal(decoding.decode(data)[..., ::-1], np.asarray(stored.convert("RGB")))


@hypothesis.given(
    st.sampled_from([encoded(smooth(), kind)[:60] for kind in WAYS]), st.binary(max_size=80)
)
def test_no_bytes_break_it(start, tail):
    for data in (tail, start + tail, start[:12] + tail):
        image = decoding.decode(data, upright=True)
        assert image is None or image.dtype == np.uint8
        assert decoding.orientation(data) in range(1, 9)
        assert decoding.why_not(data)


SIDE = st.integers(1, 90)


@hypothesis.given(SIDE, SIDE, SIDE, SIDE, st.sampled_from([(), (3,)]), st.integers(0, 9))
def test_every_shape_is_resized_as_by_pillow(rows, columns, height, width, channels, seed):
    """Of noise, black and white, whichever axes shrink: no other average comes near."""
    image = 255 * default_rng(seed).integers(0, 2, (rows, columns, *channels), np.uint8)
    known = np.asarray(
        Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    ).astype(int)
    resized = pixels.resize(image, height, width)
    assert resized.dtype == np.uint8
    assert resized.shape == known.shape
    assert np.abs(resized - known).max() <= 1
