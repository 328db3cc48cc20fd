"""Runs and sweeps in one table: `python -m sparsity_jax.compare DIR...`.

Reads what `report` reads, without jax.
"""

from sparsity_jax.compare.lines import Comparison, compared, markdown, notes, numbers, texts, told
from sparsity_jax.compare.page import PAGE, write

__all__ = [
    "PAGE",
    "Comparison",
    "compared",
    "markdown",
    "notes",
    "numbers",
    "texts",
    "told",
    "write",
]
