"""Neural-network sparsity research in JAX: pure functions on pytrees, and a runner for whole
studies.

Import the module that you need, e.g. `from sparsity_jax import masks, optim, polytopes`; README.md
lists them by layer.
"""

__version__ = "0.2.0"
