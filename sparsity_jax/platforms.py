"""How work on many arrays is laid out: in turn on a CPU, together on an accelerator.

A CPU is fast on one array that fits its cache, and waits for nothing between two. An accelerator
waits for the host at every loop whose end depends on data, so there all arrays share each pass.
Both ways give the same masks, and sums that differ by rounding.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, Literal

import jax
from jax import lax

__all__ = ["Way", "compiled", "in_turn", "one_cpu", "one_device", "own", "per_platform", "using"]

Way = Literal["in turn", "together"]
_WAY: ContextVar[Way | None] = ContextVar("way", default=None)


@contextlib.contextmanager
def using(way: Way | None) -> Iterator[None]:
    """Work inside is laid out this way, whatever the platform; None: as the platform likes."""
    token = _WAY.set(way)
    try:
        yield
    finally:
        _WAY.reset(token)


def own() -> Way:
    """The way of the platform on which programs run if nothing else is asked for."""
    return "in turn" if jax.default_backend() == "cpu" else "together"


def in_turn() -> bool:
    """Whether one array is worked on after the other."""
    way = _WAY.get() or own()
    return way == "in turn"


def one_device() -> bool:
    """Whether all arrays lie in one memory, so that packing them gathers nothing.

    Not inside `shard_map`, where what an array is packed with must vary between devices as it does.
    """
    divided = jax.sharding.get_abstract_mesh().manual_axes
    return jax.device_count() == 1 and not divided


def one_cpu() -> bool:
    """Whether there is one CPU device only."""
    return in_turn() and one_device()


def per_platform(function: Callable, *arguments: Any) -> Any:
    """`function(*arguments)`, laid out as the platform likes for which the program is compiled.

    `function` must not change anything outside: on a CPU it is traced for both ways, except where
    `using` says which one. A run says so, as it compiles for its own devices alone.
    """
    if _WAY.get() is not None or own() == "together":
        return function(*arguments)

    def laid_out(way: Way) -> Callable:
        def call(*arguments: Any) -> Any:
            with using(way):
                return function(*arguments)

        return call

    return lax.platform_dependent(*arguments, cpu=laid_out("in turn"), default=laid_out("together"))


def compiled(function: Callable, **options: Any) -> Callable:
    """`jax.jit` for a function that depends on the way: it is compiled for each one.

    Outside `jit` it compiles once per shape, inside nothing changes. options: of `jax.jit`.
    """

    def laid_out(way: Way | None, *arguments: Any, **named: Any) -> Any:
        with using(way):
            return function(*arguments, **named)

    program = jax.jit(laid_out, static_argnums=0, inline=True, **options)

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        return program(_WAY.get(), *arguments, **named)

    return call
