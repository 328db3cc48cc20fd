"""Encoded images as uint8 arrays: which formats are read, what is damaged, and which way is up.

OpenCV decodes all formats but PGM and its relatives. What it would read wrongly, or only in some of
its versions, is refused here, so that every allowed version gives the same images.
`tests/test_decoding.py` compares with Pillow.
"""

import io
import re
import struct
from collections.abc import Iterator

import cv2
import numpy as np
from numpy import ndarray
from PIL import Image

__all__ = ["FORMATS", "SUFFIXES", "decode", "format_of", "jpeg_shape", "orientation", "why_not"]

# 8 bit, grey or BGR, no alpha, not turned
_DECODE = cv2.IMREAD_ANYCOLOR | cv2.IMREAD_IGNORE_ORIENTATION
_JPEGS = (".jfif", ".jpe", ".jpeg", ".jpg")
_PNMS = (".pbm", ".pgm", ".pnm", ".ppm")
SUFFIXES = tuple(sorted((*_JPEGS, *_PNMS, ".bmp", ".dib", ".png", ".tif", ".tiff", ".webp")))
FORMATS = {  # what a file of the format begins with; those that are read
    "JPEG": rb"\xff\xd8\xff",
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "BMP": rb"BM.{12}[\x0c-\x7c]\0\0\0",
    "WebP": rb"RIFF.{4}WEBP",
    "TIFF": rb"II\*\0|MM\0\*",
    "PNM": rb"P[1-6]\s*[\s#][\s\d#]",
}
_OTHER_FORMATS = {  # images that are not read
    "GIF": rb"GIF8",
    "HEIF or AVIF": rb".{4}ftyp(?:avi|hei|hev|mif|msf)",
    "JPEG 2000": rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51",
    "JPEG XL": rb"\xff\x0a|\0\0\0\x0cJXL ",
    "OpenEXR": rb"\x76\x2f\x31\x01",
    "Photoshop": rb"8BPS",
    "PAM or PFM": rb"P[7fF]\n",
}
_STARTS = FORMATS | _OTHER_FORMATS
_EXIF = (b"Exif\0\0", b"eXIf", b"EXIF")  # what begins tags


def format_of(data: bytes) -> str:
    """Name of the image format in which `data` begins, "" if it begins like no image."""
    for name, start in _STARTS.items():
        if re.match(start, data[:32], re.DOTALL):
            return name
    return ""


def decode(data: bytes, *, reduced: int = 0, upright: bool = False) -> ndarray | None:
    """uint8 [H, W] (grey) or [H, W, 3] (BGR, OpenCV's order); None if `data` is not a whole image
    of `FORMATS`.

    16-bit images become 8-bit, of several pages the first counts, alpha is dropped. `why_not` tells
    the reason for None.
    reduced: 0, or OpenCV's flag for 1/2, 1/4, 1/8 of the size: 16, 32, 64.
    upright: turned and mirrored as the EXIF orientation says.
    """
    name = format_of(data)
    if _why_unreadable(data, name):
        return None
    try:
        image = _decode_pnm(data) if name == "PNM" else _decode_with_opencv(data, name, reduced)
    except (cv2.error, ValueError, OverflowError):  # pixels are missing, or are too many
        return None
    if upright and image is not None:
        return _turned(image, orientation(data))
    return image


def _decode_with_opencv(data: bytes, name: str, reduced: int) -> ndarray | None:
    flags = _DECODE | reduced
    if name == "TIFF" and _tiff_tag(data, 262) == 2 and _tiff_tag(data, 277) == 4:
        flags = cv2.IMREAD_UNCHANGED  # RGB with alpha
    image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    if image is None or image.shape[2:] != (4,):
        return image
    opaque = 65535 if image.dtype == np.uint16 else 255
    if image[..., 3].min() < opaque:  # its colours come multiplied by alpha
        return None
    colours = image[..., :3] // (opaque // 255)
    return colours.astype(np.uint8)


def why_not(data: bytes) -> str:
    """Why `decode` gave None, as the end of a sentence that begins with the image's name."""
    damaged = "is not an image that can be decoded; is it damaged?"
    return _why_unreadable(data, format_of(data)) or damaged


def _why_unreadable(data: bytes, name: str) -> str:
    """Why `data` of the format `name` is refused without being decoded, or ""."""
    if not data:
        return "is not an image but empty."
    if name not in FORMATS:
        what = f"a file of the format {name}" if name else "not an image that can be decoded"
        return f"is {what}; allowed: {', '.join(FORMATS)}."
    if name == "JPEG" and not _is_whole_jpeg(data):
        return "is not an image that can be decoded: its end is missing."
    if name == "TIFF" and _tiff_tag(data, 262) in (8, 9, 10):  # OpenCV takes them for others
        return "is a TIFF with CIELAB colours, which are not read; convert it to RGB."
    plain = name != "TIFF" or _tiff_tag(data, 339) == 1
    if plain and (name != "TIFF" or _tiff_tag(data, 258) in (1, 2, 4, 8, 16)):
        return ""
    numbers = "floating-point, signed or wide numbers"
    return f"is a TIFF of {numbers}; allowed: 8 or 16 bits without sign."


# JPEG ---------------------------------------------------------------------------------------------


_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # markers of frame headers
_SCAN = 0xDA


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, start, end) of the segments of a JPEG before its first scan, and of that scan's
    header.
    """
    at = 2 if data[:2] == b"\xff\xd8" else len(data)
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        start = at + 4
        end = at + 2 + int.from_bytes(data[at + 2 : start], "big")
        yield marker, start, end
        if marker == _SCAN:
            return
        at = end


def jpeg_shape(data: bytes) -> tuple[int, int] | None:
    """(height, width) in the frame header of a JPEG; None if `data` is something else, or not a
    plain one.
    """
    for marker, start, end in _jpeg_segments(data):
        if marker in _FRAMES:
            header = data[start + 1 : min(end, start + 5)]
            if len(header) < 4:
                return None
            height, width = struct.unpack(">HH", header)
            if height and width:
                return height, width
            return None
    return None


def _is_whole_jpeg(data: bytes) -> bool:
    """Whether the end-of-image marker follows the first scan; in the pixels themselves it cannot
    occur.
    """
    for marker, _, end in _jpeg_segments(data):
        if marker == _SCAN:
            return b"\xff\xd9" in data[end:]
    return False


# Tags ---------------------------------------------------------------------------------------------


def orientation(data: bytes) -> int:
    """The EXIF orientation of a JPEG, PNG or WebP: 1 (as stored, also where nothing is said) to 8.

    That of a TIFF is part of the format, and applied when it is decoded.
    """
    has_tags = any(start in data for start in _EXIF)
    if not has_tags or format_of(data) not in ("JPEG", "PNG", "WebP"):
        return 1
    try:
        value = int(Image.open(io.BytesIO(data)).getexif()[274])
    except Exception:  # none is said, or damaged images and tags break Pillow's readers
        return 1
    if 1 <= value <= 8:
        return value
    return 1


def _tiff_tag(data: bytes, tag: int) -> int:
    """First value of a whole-number tag of the first page of a TIFF, 1 where there is none."""
    tags = Image.Exif()
    try:
        tags.load(data)
        return int(np.ravel(tags.get(tag, 1))[0])
    except Exception:  # as above
        return 1


def _turned(image: ndarray, orientation: int) -> ndarray:
    """`image` as an EXIF orientation of 1 to 8 says that it is to be seen."""
    if orientation >= 5:
        image = image.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    return np.ascontiguousarray(image)


# PGM and its relatives ----------------------------------------------------------------------------


def _decode_pnm(data: bytes) -> ndarray | None:
    """`decode` of PBM, PGM and PPM, plain or binary, with any maximum.

    A value v of at most `maximum` becomes the whole number nearest to 255 v / maximum. Raises
    ValueError or OverflowError where pixels are missing or no numbers.
    """
    kind = data[1:2]
    bitmap = kind in b"14"
    plain = kind in b"123"
    channels = 3 if kind in b"36" else 1
    field = rb"(?:\s|#[^\n\r]*[\n\r])+0*([1-9]\d{0,8})"
    end = rb"" if plain else rb"\s"
    header = re.match(rb"P\d" + field * (2 if bitmap else 3) + end, data)
    if header is None:
        return None
    width = int(header[1])
    height = int(header[2])
    maximum = 1 if bitmap else int(header[3])
    if maximum > 65535:
        return None
    body = data[header.end() :]
    count = width * height * channels
    if plain:
        text = re.sub(rb"#[^\n\r]*", b" ", body)
        words = re.findall(rb"[01]" if bitmap else rb"\S+", text)
        values = np.array(list(map(int, words[:count])))
    elif bitmap:
        row_bytes = (width + 7) // 8
        packed = np.frombuffer(body, np.uint8, row_bytes * height)
        values = np.unpackbits(packed.reshape(height, row_bytes), axis=1, count=width)
    else:
        values = np.frombuffer(body, np.uint8 if maximum < 256 else ">u2", count)
    levels = values.astype(np.int64).clip(0, maximum)
    if bitmap:
        levels = 1 - levels  # 1 is black
    levels = (255 * levels + maximum // 2) // maximum
    levels = levels.astype(np.uint8)
    if channels == 1:
        return levels.reshape(height, width)
    image = levels.reshape(height, width, channels)
    return np.ascontiguousarray(image[..., ::-1])
