"""Augmentation, on the device inside the step: uint8 [B, H, W, C] to the same, drawn independently
for each image; pure, for use inside jit.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, random

__all__ = [
    "flip",
    "pad_crop",
    "pad_crop_flip",
    "random_box",
    "resize_box",
    "resized_crop_flip",
    "shift_flip",
]

_SCALE = (0.08, 1.0)  # of the area of a random box
_RATIO = (3 / 4, 4 / 3)  # of its width to its height


def _draw_flips(key: Array, images: Array) -> Array:
    """Whether each image is mirrored, with probability 1/2."""
    return random.bernoulli(key, shape=(len(images),))


def flip(key: Array, images: Array) -> Array:
    """Mirror each image left to right with probability 1/2."""
    flips = _draw_flips(key, images)
    per_image = flips[:, None, None, None]
    mirrored = jnp.flip(images, axis=2)
    return jnp.where(per_image, mirrored, images)


def shift_flip(images: Array, offsets: Array, flips: Array, padding: int) -> Array:
    """Crop [H, W] at `offsets` (int [B, 2], 0..2*padding) from images padded with 0, mirrored where
    `flips` (bool [B]).

    One gather with the mirror folded into its column index: 0.2 ms for 128 CIFAR images on 2 CPU
    cores, where selecting among the 81 shifts takes 10 ms.
    """
    _, height, width, _ = images.shape
    none = (0, 0)
    edges = (padding, padding)
    widths = (none, edges, edges, none)
    padded = jnp.pad(images, widths)
    forward = jnp.arange(width)
    backward = jnp.flip(forward)

    def cropped(image: Array, offset: Array, mirrored: Array) -> Array:
        top, left = offset
        rows = top + jnp.arange(height)
        columns = jnp.where(mirrored, backward, forward)
        columns = left + columns
        rows = rows[:, None]
        return image[rows, columns]

    return jax.vmap(cropped)(padded, offsets, flips)


def pad_crop(key: Array, images: Array, *, padding: int = 4) -> Array:
    """Pad with black (before normalisation, as torchvision's RandomCrop does) and crop the old size
    at random.
    """
    offsets = _draw_offsets(key, images, padding)
    none = jnp.zeros(len(images), bool)
    return shift_flip(images, offsets, none, padding)


def pad_crop_flip(key: Array, images: Array, *, padding: int = 4) -> Array:
    """`pad_crop`, then `flip`: the usual augmentation of CIFAR."""
    crop_key, flip_key = random.split(key)
    offsets = _draw_offsets(crop_key, images, padding)
    flips = _draw_flips(flip_key, images)
    return shift_flip(images, offsets, flips, padding)


def _draw_offsets(key: Array, images: Array, padding: int) -> Array:
    shape = (len(images), 2)
    return random.randint(key, shape, 0, 2 * padding + 1)


def resized_crop_flip(key: Array, images: Array, *, size: int = 0) -> Array:
    """A random box of each image, resized to `size` x `size` (0: the old size) and mirrored with
    probability 1/2.

    The box has 8 % to 100 % of the area and a ratio of width to height of 3/4 to 4/3, drawn as
    torchvision's RandomResizedCrop does: ten attempts, else the largest central box with an allowed
    ratio. Resizing is bilinear, antialiased; at the box's edge it sees the neighbouring pixels of
    the image, where torchvision sees the box only.
    """
    height, width = images.shape[1:3]
    box_key, flip_key = random.split(key)
    draw = partial(random_box, height=height, width=width)
    keys = random.split(box_key, len(images))
    boxes = jax.vmap(draw)(keys)
    if size:
        height = width = size
    resize = partial(resize_box, height=height, width=width)
    resized = jax.vmap(resize)(images, boxes)
    return flip(flip_key, resized)


def random_box(key: Array, height: int, width: int, *, attempts: int = 10) -> Array:
    """(top, left, height, width), float32 whole numbers, of a box inside the image; see
    `resized_crop_flip`.
    """
    area_key, ratio_key, place_key = random.split(key, 3)
    small, large = _SCALE
    ratios = jnp.array(_RATIO)
    low, high = jnp.log(ratios)
    shares = random.uniform(area_key, (attempts,), minval=small, maxval=large)
    logarithms = random.uniform(ratio_key, (attempts,), minval=low, maxval=high)
    areas = height * width * shares
    sizes = _box_sizes(areas, jnp.exp(logarithms))
    image = jnp.array([height, width], jnp.float32)
    small_enough = sizes <= image
    is_inside = small_enough & (sizes >= 1)
    fits = is_inside.all(axis=1)
    number = jnp.argmax(fits)
    first = sizes[number]
    widest = jnp.round(jnp.flip(image) * 4 / 3)
    largest = jnp.minimum(image, widest)
    some_fits = fits.any()
    box = jnp.where(some_fits, first, largest)
    room = image - box
    shares = random.uniform(place_key, (2,))
    places = shares * (room + 1)
    places = jnp.floor(places)
    places = jnp.minimum(places, room)
    corner = jnp.where(some_fits, places, room // 2)
    return jnp.concatenate([corner, box])


def _box_sizes(areas: Array, ratios: Array) -> Array:
    """(height, width) of boxes [B] with these areas and ratios of width to height."""
    heights = jnp.sqrt(areas / ratios)
    widths = jnp.sqrt(areas * ratios)
    sizes = jnp.stack([heights, widths], axis=1)
    return jnp.round(sizes)


def resize_box(image: Array, box: Array, height: int, width: int) -> Array:
    """The part `box` (top, left, height, width; traced) of a uint8 [H, W, C] image, resized to
    [height, width, C].
    """
    corner, sides = jnp.split(box, 2)
    size = jnp.array([height, width], jnp.float32)
    scale = size / sides
    resized = jax.image.scale_and_translate(
        image.astype(jnp.float32),
        (height, width, image.shape[2]),
        spatial_dims=(0, 1),
        scale=scale,
        translation=-corner * scale,
        method="linear",
        antialias=True,
    )
    rounded = jnp.round(resized)
    values = jnp.clip(rounded, 0, 255)
    return values.astype(jnp.uint8)
