"""The stage `compact`: takes stock of the network without its removed channels."""

from collections.abc import Callable, Mapping
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from sparsity_jax import alone, cost, coupling, groups, structured, tables, train, workdirs
from sparsity_jax.groups import Channels
from sparsity_jax.interface import Place
from sparsity_jax.train import Problem, State
from sparsity_jax.types import Arrays, PyTree, Row

__all__ = [
    "STAGES",
    "Compact",
    "Stock",
    "accuracy",
    "compacted",
    "milliseconds",
    "rounding_of",
    "take_stock",
]


@tables.option
class Compact(alone.EachMember):
    """The network without its removed channels: the same logits, fewer parameters and FLOPs,
    measured time.

    The run's network itself stays masked. batch_size, repeats: of the time measured; 0 repeats:
    none. tolerance: largest difference of compact from masked logits, relative to the largest
    logit, that counts as rounding; 0: that of the arithmetic, see `rounding_of`. A larger one, or a
    network that cannot be compacted, is told by the row's `warning`.
    """

    kind: ClassVar[str] = "compact"
    needs: ClassVar[tuple[str, ...]] = ("train",)
    batch_size: tables.Count = 64
    repeats: tables.Index = 20
    tolerance: tables.NonNegative = 0.0

    def of_member(self, problem: Problem, state: State, place: Place) -> alone.Result:
        try:
            row = take_stock(problem, state, self)
        except ValueError as error:  # an emptied layer
            row = dict(warning=f"the network cannot be compacted: {error}")
        if row["warning"]:
            workdirs.say(f"{place.name}: {row['warning']}")
        return state, [row]


def rounding_of(problem: Problem) -> float:
    """Largest relative difference of two orders of summation of the logits, by the arithmetic of
    the network.

    Accelerators multiply float32 in shorter types (TF32, bfloat16).
    """
    dtype = jnp.dtype(problem.model.dtype)
    if dtype == jnp.bfloat16:
        return 1e-1
    if dtype == jnp.float16 or jax.default_backend() != "cpu":
        return 2e-2
    return 1e-4


class Stock(NamedTuple):
    """A network without its removed channels. variables: its arrays; apply(variables, images) ->
    logits.
    """

    variables: PyTree
    apply: Callable
    keep: Arrays
    channels: Channels


def compacted(problem: Problem, state: State) -> Stock:
    """One member's network, compacted; raises ValueError where all channels of a group are
    masked.
    """
    channels = structured.channels_of(problem)
    keep = coupling.alive(channels, {"params": state.masks})
    small = groups.compact(state.variables, channels, keep)
    apply = groups.elastic(problem.model.apply, channels, keep)
    return Stock(small, apply, keep, channels)


def take_stock(problem: Problem, state: State, stage: Compact) -> Row:
    """Accuracy, size and time of one member's network, dense (masked) and compact, as fields of a
    row.
    """
    stock = compacted(problem, state)
    images, _ = problem.examples("test", stage.batch_size)
    images = problem.images(images)
    networks = {
        "dense": (problem.apply, state.variables),
        "compact": (stock.apply, stock.variables),
    }
    calls = {}
    logits = []
    for name, (apply, variables) in networks.items():
        compiled = jax.jit(apply)
        calls[name] = (compiled, (variables, images))
        logits.append(compiled(variables, images))
    row: Row = dict(accuracy=accuracy(problem, stock))
    tolerance = stage.tolerance or rounding_of(problem)
    row |= _difference(problem, tolerance, *logits)
    keep = stock.keep
    row["kept"] = {name: int(bools.sum()) for name, bools in keep.items()}
    row["sizes"] = stock.channels.sizes
    image = jax.ShapeDtypeStruct((1, *images.shape[1:]), images.dtype)
    for end, (apply, variables) in zip(("", "_compact"), networks.values()):
        row[f"parameters{end}"] = cost.num_params(variables)
        row[f"flops{end}"] = cost.flops(apply, variables, image).products
        row[f"bytes{end}"] = cost.num_bytes(variables)
    if stage.repeats:
        pair = cost.compare(calls, repeats=stage.repeats)
        row |= _times(pair)
        row["batch_size"] = len(images)
    return row


def _difference(problem: Problem, tolerance: float, masked: Array, compact: Array) -> Row:
    """Fields of a row for the difference of two networks' logits, and a warning where it is more
    than `tolerance`.
    """
    largest = jnp.max(jnp.abs(masked))
    error = jnp.max(jnp.abs(masked - compact))
    difference = float(error / jnp.maximum(largest, 1e-30))
    warning = ""
    if not difference <= tolerance:
        warning = (
            "the compact network's logits differ from the masked one's by "
            f"{difference:.2g} of the largest, more than the {tolerance:g} that count as rounding "
            f"in {jnp.dtype(problem.model.dtype).name}"
        )
    return dict(difference=difference, tolerance=tolerance, warning=warning)


def _times(pair: cost.Comparison) -> Row:
    """Fields of a row for the measured times of two networks."""
    fields = ("speedup", "speedup_low", "speedup_high", "verdict")
    row = {field: getattr(pair, field) for field in fields}
    row["device"] = jax.devices()[0].device_kind
    return row | milliseconds(pair.latencies)


def milliseconds(latencies: Mapping[str, cost.Latency]) -> Row:
    """Fields of a row for measured times, by network."""
    row = {}
    for quantile, end in (("median", ""), ("low", "_low"), ("high", "_high")):
        seconds = {name: getattr(latency, quantile) for name, latency in latencies.items()}
        row[f"milliseconds{end}"] = {name: 1e3 * time for name, time in seconds.items()}
    return row


def accuracy(problem: Problem, stock: Stock) -> float:
    """Of the compact network on the test set."""
    model = problem.model._replace(apply=stock.apply)
    compact = problem._replace(model=model, members=None, compiled={})
    params = stock.variables["params"]
    batch_stats = stock.variables["batch_stats"]
    measured = train.measure(compact, params, batch_stats, "test")
    size = problem.size("test") - len(measured.unreadable)
    right = round(float(measured.accuracy) * size)
    return right / size  # not rounded to float32


STAGES = (Compact,)
