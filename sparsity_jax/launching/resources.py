"""What each worker of a launch takes of its machine: `--resources gpu=1,cpu=2`."""

import math
from typing import NamedTuple

from sparsity_jax.tables import ConfigError

__all__ = ["FLAG", "Resources", "memory_share", "read", "told", "workers_on"]

FLAG = "--resources"
_ALLOWED = "NAME=NUMBER with commas between, such as gpu=1,cpu=2; of a GPU also a part, gpu=0.5"
_OF_ALL_MEMORY = 0.9  # of a GPU that several workers share; the rest is CUDA's own


class Resources(NamedTuple):
    """Numbers per worker. other: of the cluster's own kinds of resources, by name."""

    cpu: float = 1.0
    gpu: float = 0.0
    other: tuple[tuple[str, float], ...] = ()

    def by_name(self) -> dict[str, float]:
        """What is taken of each kind, by the names that Ray has for them."""
        every = {"CPU": self.cpu, "GPU": self.gpu, **dict(self.other)}
        return {name: number for name, number in every.items() if number}


def read(text: str) -> Resources:
    """The resources that the flag names; one CPU where it names none.

    Raises ConfigError for anything else.
    """
    numbers: dict[str, float] = {}
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        name = name.strip()
        if not equals or not name or name in numbers:
            raise ConfigError(FLAG, text, allowed=_ALLOWED)
        numbers[name] = _number(name, value, text)
    cpu = numbers.pop("cpu", 1.0)
    gpu = numbers.pop("gpu", 0.0)
    return Resources(cpu, gpu, tuple(numbers.items()))


def _number(name: str, value: str, text: str) -> float:
    """The number of one resource; only a GPU may be shared."""
    try:
        number = float(value)
    except ValueError:
        raise ConfigError(FLAG, text, allowed=_ALLOWED) from None
    is_part = name == "gpu" and 0 < number < 1
    is_whole = math.isfinite(number) and number == int(number) and number >= 0
    if not is_part and not is_whole:
        raise ConfigError(FLAG, text, allowed=_ALLOWED)
    return number


def told(resources: Resources) -> str:
    """As the flag says it: `gpu=1,cpu=2`."""
    named = [("gpu", resources.gpu), ("cpu", resources.cpu), *resources.other]
    return ",".join(f"{name}={number:g}" for name, number in named if number)


def workers_on(resources: Resources, there: dict[str, float]) -> int:
    """How many workers a node has room for; there: its resources by name."""
    taken = resources.by_name()
    if not taken:
        return 1
    return min(int(there.get(name, 0) / number) for name, number in taken.items())


def memory_share(resources: Resources) -> float | None:
    """The share of a GPU's memory that JAX may take in a worker that has a part of one; None: its
    own choice.
    """
    if 0 < resources.gpu < 1:
        return round(resources.gpu * _OF_ALL_MEMORY, 3)
    return None
