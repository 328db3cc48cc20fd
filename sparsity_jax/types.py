"""Names of the types that many functions take and give."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

__all__ = [
    "AnyPath",
    "Arrays",
    "Config",
    "Fields",
    "MemberRows",
    "Paths",
    "PyTree",
    "Row",
    "Rows",
    "Shape",
]

PyTree = Any
Shape = tuple[int, ...]
Config = Mapping[str, Any]  # settings by name, as a config file holds them
Fields = dict[str, Any]
Row = dict[str, Any]  # what a stage tells of one member, a line of `metrics.jsonl`
Rows = list[Row]
MemberRows = list[Rows]  # one list per member
Arrays = dict[str, np.ndarray]  # by path
Paths = Sequence[str]  # of arrays
AnyPath = str | os.PathLike[str]
