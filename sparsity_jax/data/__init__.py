"""Image classification sets as uint8 arrays in memory, and the augmentation that runs on the device
inside the step.

`load` reads the digits inside scikit-learn, any prepared TFDS set (without TensorFlow) or a folder
of images, decodes it once and keeps it in memory; or it leaves the images where they are, for
`stream` to read. Nothing is downloaded here: `python -m sparsity_jax.prepare` does that.
"""

from sparsity_jax.data.augment import (
    flip,
    pad_crop,
    pad_crop_flip,
    random_box,
    resize_box,
    resized_crop_flip,
    shift_flip,
)
from sparsity_jax.data.inputs import (
    AUGMENTATIONS,
    NORMALIZATIONS,
    Normalization,
    make_augmentation,
    preprocess,
    published,
    statistics,
)
from sparsity_jax.data.loading import check, load
from sparsity_jax.data.sets import Dataset, FixedSample, Options, Split, spread
from sparsity_jax.data.streams import Stream, look_at
from sparsity_jax.decoding import decode

__all__ = [
    "AUGMENTATIONS",
    "NORMALIZATIONS",
    "Dataset",
    "FixedSample",
    "Normalization",
    "Options",
    "Split",
    "Stream",
    "check",
    "decode",
    "flip",
    "load",
    "look_at",
    "make_augmentation",
    "pad_crop",
    "pad_crop_flip",
    "preprocess",
    "published",
    "random_box",
    "resize_box",
    "resized_crop_flip",
    "shift_flip",
    "spread",
    "statistics",
]
