"""Decoded images: their size and colours."""

import cv2
import numpy as np
from numpy import ndarray
from PIL import Image

__all__ = ["colours", "fit", "resize"]


def colours(image: ndarray) -> int:
    """Channels of a grey [H, W] or colour [H, W, 3] image."""
    if image.ndim == 2:
        return 1
    return 3


def resize(image: ndarray, height: int, width: int) -> ndarray:
    """uint8 [H, W] or [H, W, 3] at another size, each axis for itself, bilinear and antialiased.

    The rule is Pillow's BILINEAR, torchvision's with `antialias`: an axis that shrinks n times is
    averaged with a triangle of 2 n pixels, one that grows is interpolated. Results are at most one
    grey level from Pillow's, which computes the average here; OpenCV has none such, but
    interpolates several times faster.
    """
    rows, columns = image.shape[:2]
    if height < rows or width < columns:
        if width > columns:
            image = _interpolated(image, rows, width)
        lower = min(rows, height)
        image = _averaged(image, lower, width)
    return _interpolated(image, height, width)


def _interpolated(image: ndarray, height: int, width: int) -> ndarray:
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)


def _averaged(image: ndarray, height: int, width: int) -> ndarray:
    contiguous = np.ascontiguousarray(image)
    picture = Image.fromarray(contiguous)
    resized = picture.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized)


_CHANGES = {  # of the number of channels, and their order
    (1, 3): cv2.COLOR_GRAY2RGB,
    (3, 3): cv2.COLOR_BGR2RGB,
    (3, 1): cv2.COLOR_BGR2GRAY,
}


def fit(image: ndarray, size: int, channels: int) -> ndarray:
    """Grey [H, W] or BGR [H, W, 3] as [h, w, channels] in RGB.

    size: h and w, of the image's central square; 0 leaves its size.
    """
    change = _CHANGES.get((colours(image), channels))
    if change is not None:
        image = cv2.cvtColor(image, change)
    if size:
        height, width = image.shape[:2]
        side = min(height, width)
        top = (height - side) // 2
        left = (width - side) // 2
        square = image[top : top + side, left : left + side]
        image = resize(square, size, size)
    height, width = image.shape[:2]
    return image.reshape(height, width, channels)
