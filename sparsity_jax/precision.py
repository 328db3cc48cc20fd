"""How precisely matrix products and convolutions are computed: this is the one place that says so.

Accelerators multiply float32 with fewer bits unless they are told otherwise: TF32 on NVIDIA GPUs,
bfloat16 on TPUs. Training bears that and keeps it (`config.precision`). What a function claims to
be exact does not: a Hessian times a vector is then off by some 3 %. Such functions compute in
`FULL`: every product inside them, inside the functions they are given, and in all derivatives of
both. Their option `precision` names another one, as `jax.default_matmul_precision` does
(`config.curvature_precision` in a run). A product keeps the precision that its own code gives it,
and the arithmetic of a narrower type such as bfloat16 stays as narrow as it is.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax

__all__ = ["FULL", "Precision", "computed"]

Precision = Literal["default", "high", "highest", "bfloat16", "tensorfloat32", "float32"]
FULL: Precision = "highest"


def computed(function: Callable, precision: Precision = FULL) -> Callable:
    """`function`, whose products are in `precision`: of several around a product the innermost."""

    @functools.wraps(function)
    def precise(*args: Any, **options: Any) -> Any:
        with jax.default_matmul_precision(precision):
            return function(*args, **options)

    return precise
