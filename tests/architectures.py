"""All networks that are written for the tests, by name: makers of (apply, variables, inputs)."""

from foreign import FOREIGN
from foreign_images import IMAGES
from foreign_operations import OPERATIONS
from foreign_text import TEXT

__all__ = ["FOREIGN", "IMAGES", "NETWORKS", "OPERATIONS", "TEXT"]

NETWORKS = {**FOREIGN, **TEXT, **IMAGES, **OPERATIONS}
