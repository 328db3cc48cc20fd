"""What each algorithm exchanges and holds on each device, as formulas: those of docs/scale.md.

Exchanges go round a ring: of x bytes that all devices have in the end each receives x (D - 1) / D,
and for a sum over devices twice that.
"""

import itertools
import math
import operator
from collections.abc import Callable
from typing import NamedTuple

__all__ = ["BATCH", "MEASURED", "PREDICTED", "WIDTHS", "Expected", "Sizes", "expected"]

_KEYS = 31  # bits of the order of magnitudes of float32
_BITS = 3  # of a pass, with a count for each of 7 bounds
NUMBER = 4  # bytes


class Sizes(NamedTuple):
    """Of a network: entries P, arrays n, entries of the largest array, filters of the largest
    layer, Lanczos products m, and the numbers of a batch.
    """

    entries: int
    arrays: int
    largest: int
    layer: int = 1
    matvecs: int = 64
    batch: int = 0


WIDTHS = (256, 384, 384, 384, 128)  # of the dense network that is measured
BATCH = 64
MEASURED = Sizes(
    entries=sum(itertools.starmap(operator.mul, itertools.pairwise(WIDTHS))),
    arrays=len(WIDTHS) - 1,
    largest=max(itertools.starmap(operator.mul, itertools.pairwise(WIDTHS))),
    layer=max(WIDTHS),
    matvecs=4,
    batch=BATCH * (WIDTHS[0] + WIDTHS[-1]),
)


class Expected(NamedTuple):
    """Bytes per device. exchanged: received. held: arguments and results, whatever an optimizer
    keeps included. exact: whether no less is exchanged.
    """

    exchanged: float
    held: float
    exact: bool = True


def gathered(size: float, devices: int) -> float:
    return size * (devices - 1) / devices


def reduced(size: float, devices: int) -> float:
    return 2 * gathered(size, devices)


def passes(bits: int) -> int:
    return math.ceil(bits / _BITS)


def search(arrays: int, ranked: int) -> int:
    """Bytes of the counts by which the k largest are found, ties included. ranked: entries of the
    largest group that is ranked as one.
    """
    ties = (2 * ranked).bit_length()
    counts = (2**_BITS - 1) * (passes(_KEYS) + passes(ties)) + 2
    return NUMBER * counts * arrays


def projection(arrays: int) -> int:
    """Bytes of the sums by which the nearest points of K-sparse polytopes are found."""
    sums = (2**_BITS - 1) * passes(_KEYS) + 6
    return NUMBER * sums * arrays


def _alone(sums: Callable[[Sizes], float], shares: float) -> Callable[[Sizes, int], Expected]:
    """Of an algorithm on parameters alone. sums: bytes; shares: arrays held, in those of params."""

    def formula(sizes: Sizes, devices: int) -> Expected:
        share = NUMBER * sizes.entries / devices
        return Expected(reduced(sums(sizes), devices), shares * share)

    return formula


def _passing(gathers: float, sums: int, shares: float) -> Callable[[Sizes, int], Expected]:
    """Of forward and backward passes, in sizes of all parameters."""

    def formula(sizes: Sizes, devices: int) -> Expected:
        whole = NUMBER * sizes.entries
        exchanged = gathered(gathers * whole, devices) + reduced(sums * whole + NUMBER, devices)
        held = (shares * whole + NUMBER * sizes.batch) / devices
        return Expected(exchanged, held, exact=False)

    return formula


def _update(of_search: Callable[[Sizes], float], more: int) -> Callable[[Sizes], float]:
    """Bytes of the sums of two updates. more: bytes of other sums per array."""
    return lambda sizes: 2 * (of_search(sizes) + more * sizes.arrays)


def _ranked_alone(sizes: Sizes) -> int:
    return search(sizes.arrays, sizes.largest)


def _ranked_as_one(sizes: Sizes) -> int:
    return search(sizes.arrays, sizes.entries)


def _of_filters(sizes: Sizes) -> int:
    layers = sizes.arrays - 1  # the last makes the outputs
    return search(layers, sizes.layer) + 2 * NUMBER * layers


def _lanczos(sizes: Sizes, sums: int) -> int:
    """Bytes of all steps. sums: of a step and an array."""
    return NUMBER * sizes.arrays * (2 + sizes.matvecs * sums)


FORMULAS: dict[str, Callable[[Sizes, int], Expected]] = {
    "training": _passing(2, 1, 4),
    "product": _passing(4, 2, 3),
    "curve": _passing(1.25, 0, 2),
    "importance": _passing(2, 1, 3),
    "masks": _alone(_ranked_as_one, 2.25),
    "masks by layer": _alone(lambda s: _ranked_alone(s) + NUMBER * s.arrays, 2.5),
    "masks of filters": _alone(_of_filters, 1.25),
    "sgd, penalties, saliency": _alone(lambda _: 0, 5),
    "sgd, projected": _alone(_update(lambda s: projection(s.arrays), 8), 4),
    "sfw": _alone(_update(_ranked_alone, 32), 4),
    "adagrad_sfw": _alone(_update(lambda s: 2 * _ranked_alone(s), 40), 5),
    "pruned": _alone(_update(_ranked_as_one, 1), 4.25),
    "growing_l2, weights": _alone(_update(_ranked_alone, 12), 3.25),
    "Lanczos, full": _alone(lambda s: _lanczos(s, 2 * s.matvecs + 4), 3),
    "Lanczos, none": _alone(lambda s: _lanczos(s, 3), 3),
}


def expected(algorithm: str, sizes: Sizes, devices: int) -> Expected:
    """What the program of one algorithm exchanges and holds."""
    return FORMULAS[algorithm](sizes, devices)


# What they predict --------------------------------------------------------------------------------


class Machine(NamedTuple):
    """Of each device: arithmetic per second that a network reaches, bytes per second from other
    devices and from its own memory, seconds until an exchange begins.
    """

    speed: float
    link: float
    memory: float
    latency: float


class Prediction(NamedTuple):
    """Of one device, in seconds and bytes.

    compute, exchange: a training step's arithmetic and gathers; they overlap at best. update: of
    `sfw`. product: a Hessian product's gathers. state: parameters, gradients and momentum. whole:
    the largest array. basis: Lanczos with all its vectors in float32. counts: exchanged by an
    update.
    """

    compute: float
    exchange: float
    update: float
    product: float
    state: float
    whole: float
    basis: float
    counts: float


# NVIDIA H100 SXM, taken as 989 teraFLOP/s of dense bfloat16, of which 40 % are assumed; 900
# GB/s of NVLink in both directions; 3.35 TB/s of memory. Between machines 400 Gb/s for each device,
# as a DGX H100 has them. 20 microseconds are assumed.
_REACHED = 0.4 * 989e12
INSIDE = Machine(_REACHED, 450e9, 3.35e12, 20e-6)
BETWEEN = INSIDE._replace(link=50e9)
RESNET_50 = Sizes(entries=25_557_032, arrays=161, largest=2_359_296)
TRANSFORMER = Sizes(entries=6_738_415_616, arrays=291, largest=131_072_000)
IMAGE = 3 * 2 * 4.09e9  # arithmetic of a training step and image: backward takes twice the forward
TOKEN = 6 * TRANSFORMER.entries


def predicted(sizes: Sizes, devices: int, machine: Machine, arithmetic: float) -> Prediction:
    """arithmetic: of a step, of all devices. Sums of gradients leave each device its share."""
    whole = NUMBER * sizes.entries
    share = whole / devices
    reads = passes(_KEYS) + passes((2 * sizes.largest).bit_length()) + 6
    counts = reduced(_ranked_alone(sizes) + 32 * sizes.arrays, devices)
    return Prediction(
        compute=arithmetic / devices / machine.speed,
        exchange=gathered(3 * whole, devices) / machine.link,
        update=reads * (share / machine.memory + machine.latency) + counts / machine.link,
        product=gathered(6 * whole, devices) / machine.link,
        state=3 * share,
        whole=NUMBER * sizes.largest,
        basis=(sizes.matvecs + 3) * share,
        counts=counts,
    )


PREDICTED = {
    "ResNet-50": predicted(RESNET_50, 8, INSIDE, 256 * IMAGE),
    "transformer": predicted(TRANSFORMER, 64, BETWEEN, 2**20 * TOKEN),
}
