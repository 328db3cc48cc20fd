"""Settings of every test: compilation cache, 8 virtual devices, few hypothesis examples, no
deadline for XLA.

In a file of tests with PAGES = True runs draw their reports.
"""

import contextlib
import functools
import gc
import inspect
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
gc.set_threshold(300_000, 20, 50)  # tracing makes millions of objects that live on
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 " + os.environ.get(
    "XLA_FLAGS", ""
)

hypothesis.settings.register_profile(
    "suite", max_examples=40, deadline=None, derandomize=True, database=None
)
hypothesis.settings.load_profile("suite")


KEPT = 2.5e9  # bytes of a process above which it drops its compiled programs


def pytest_collection_finish():
    gc.freeze()  # modules stay


def resident_bytes() -> float:
    """Memory of this process; infinite where the system does not tell."""
    try:
        pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
    except OSError:
        return float("inf")
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def compiling(options: list[tuple]):
    """With these options of the compiler, which no public setting has for all programs."""
    from jax._src import compiler

    make = inspect.unwrap(compiler.get_compile_options)

    @functools.wraps(make)
    def made(*args, **kwargs):
        with_options = make(*args, **kwargs)
        with_options.env_option_overrides += options
        return with_options

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "get_compile_options", made)
        yield


@pytest.fixture(scope="session", autouse=True)
def processes_compile_quickly():
    """Those that tests start; this one has read its own flags by then."""
    import tiny

    flags = f"{os.environ['XLA_FLAGS']} {tiny.flags()}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", flags)
        yield


@pytest.fixture(scope="module", autouse=True)
def as_this_file_wants(request):
    """Compiles quickly and for this machine only, for most of a test's time is compilation, and
    draws no reports.

    Drops compiled programs when they fill the memory.
    """
    import jax
    import tiny

    from sparsity_jax import platforms

    if resident_bytes() > KEPT:
        jax.clear_caches()
        gc.collect()
    drawn = getattr(request.module, "PAGES", False)
    own_devices = platforms.using(platforms.own())
    with compiling(tiny.quickly()), tiny.pages(drawn), tiny.same_programs(), own_devices:
        yield


@pytest.fixture
def as_users_compile(as_this_file_wants):
    """With all optimizations, for a test of what the compiler makes of a program."""
    with compiling([]):
        yield


@pytest.fixture
def eight_devices():
    """For a test that divides arrays among devices, of which a GPU machine may have one."""
    import jax

    if jax.default_backend() != "cpu":
        pytest.skip("needs eight devices, as a CPU has them here")
    assert jax.device_count() == 8


@pytest.fixture
def pages(as_this_file_wants):
    """With reports, in a file whose runs draw none."""
    import tiny

    with tiny.pages(True):
        yield


@pytest.fixture
def sketches(as_this_file_wants):
    """Reports have all sections but no drawn figures, which take most of their time."""
    import tiny

    with tiny.sketches():
        yield
