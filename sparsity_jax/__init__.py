"""Neural-network sparsity research in JAX: pure functions on pytrees, and a runner for whole
studies.

    from sparsity_jax import masks, optim, polytopes
    import sparsity_jax as sj

    kept = sj.masks.full(params)  # modules are imported when they are first used

docs/layout.md lists the modules by layer.
"""

import importlib
import types

__version__ = "0.2.0"
_MODULES = (
    "allocate",
    "batches",
    "budgets",
    "compare",
    "cost",
    "data",
    "decoding",
    "evaluate",
    "export",
    "extend",
    "filters",
    "geometry",
    "gradinit",
    "groups",
    "growing",
    "kernels",
    "linops",
    "losses",
    "masks",
    "meshes",
    "models",
    "optim",
    "pipeline",
    "platforms",
    "polytopes",
    "precision",
    "prepare",
    "pretrained",
    "probes",
    "ratios",
    "report",
    "run",
    "runs",
    "saliency",
    "scores",
    "shares",
    "spectrum",
    "surgery",
    "tables",
    "train",
    "trees",
    "units",
    "width",
)


def __getattr__(name: str) -> types.ModuleType:
    """The public module of that name, imported at its first use."""
    if name in _MODULES:
        return importlib.import_module(f"sparsity_jax.{name}")
    raise AttributeError(
        f"module 'sparsity_jax' has no attribute {name!r}; allowed: {', '.join(_MODULES)}."
    )


def __dir__() -> list[str]:
    """The public modules beside what is there already."""
    return sorted({*globals(), *_MODULES})
