"""Settings of every test: compilation cache, 8 virtual devices, few hypothesis examples, no
deadline for XLA.
"""

import gc
import os
import pathlib
import tempfile

import hypothesis
import pytest

CACHE = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(
    pathlib.Path(tempfile.gettempdir()) / "sparsity_jax_test_cache"
)
os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE  # also for the command lines that tests start
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 " + os.environ.get(
    "XLA_FLAGS", ""
)

hypothesis.settings.register_profile(
    "suite", max_examples=40, deadline=None, derandomize=True, database=None
)
hypothesis.settings.load_profile("suite")


@pytest.fixture(scope="module", autouse=True)
def compile_quickly(request):
    """Compiles with few optimizations, for most of a test's time is compilation, but in files with
    OPTIMIZED = True.

    Drops a file's compiled programs after it: a worker that keeps thousands of them needs 5 GB and
    slows down.
    """
    import jax  # after the settings above

    optimized = getattr(request.module, "OPTIMIZED", False)
    jax.config.update("jax_disable_most_optimizations", not optimized)
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def as_users_compile(request, compile_quickly):
    """With all optimizations, for a test of what the compiler makes of a program."""
    import jax

    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update(
        "jax_disable_most_optimizations", not getattr(request.module, "OPTIMIZED", False)
    )
