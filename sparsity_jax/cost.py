"""What a network costs: parameters, bytes, FLOPs of any JAX function, and measured time.

    count = cost.flops(model.apply, variables, images)      # arrays or jax.ShapeDtypeStruct
    count.products, count.elementwise                       # FLOPs; one multiply-add = 2
    pair = cost.compare({"dense": (dense, (images,)), "compact": (compact, (images,))})
    pair.verdict, pair.speedup                              # "faster", 1.9

FLOPs are read off the jaxpr. XLA's own estimate, `jax.jit(f).lower(*args).cost_analysis()`, is
`products + elementwise` with `count_padding=False` (it reports square roots, exponentials and the
like apart, as transcendentals).
"""

import functools
import math
import operator
import re
import time
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsity_jax import groups, stopping, tables, trees
from sparsity_jax.channels import walk
from sparsity_jax.channels.values import Program
from sparsity_jax.types import PyTree, Shape

__all__ = [
    "WARMUP",
    "Comparison",
    "Equation",
    "Flops",
    "Latency",
    "Path",
    "Unit",
    "Verdict",
    "compare",
    "comparison",
    "flops",
    "latency",
    "num_bytes",
    "num_params",
    "of_channels",
    "summary",
]

Verdict = Literal["faster", "slower", "no measurable difference"]
WARMUP = 3  # calls before those whose time is measured


# Size --------------------------------------------------------------------------------------------


def num_params(variables: PyTree) -> int:
    """Number of parameters: of `variables["params"]` if there is such an entry, else of the whole
    tree.

    Leaves: arrays or shape structs. Running statistics are no parameters.
    """
    if isinstance(variables, Mapping) and "params" in variables:
        variables = variables["params"]
    return trees.size(variables)


def num_bytes(tree: PyTree) -> int:
    """Bytes of all arrays of `tree` as stored: entries times the size of their type, no headers, no
    compression.

    Leaves: arrays or shape structs. The compression ratio is that of the dense network over that of
    the compact one.
    """
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


# FLOPs -----------------------------------------------------------------------------------------


class Equation(NamedTuple):
    """One convolution or matrix product of the program; in a loop, all its runs together."""

    primitive: str  # "conv_general_dilated" or "dot_general"
    where: str  # name stack such as "ResNet/conv1" (Flax, `jax.named_scope`), or file and line
    flops: int


class Flops(NamedTuple):
    """FLOPs of one call; one multiply-add = 2."""

    products: int  # convolutions and matrix products
    elementwise: int  # one per entry that an elementwise operation or a step of a reduction makes
    equations: tuple[Equation, ...]  # those of `products`, in the program's order
    # what could not be known: loops counted once, operations of unknown work
    notes: tuple[str, ...]


_NOTHING = Flops(0, 0, (), ())
_MOVES_DATA = """
bitcast_convert_type broadcast_in_dim concatenate copy copy_p device_put dynamic_slice
dynamic_update_slice empty gather iota layout_constraint optimization_barrier pad random_unwrap
random_wrap reshape rev sharding_constraint slice split squeeze stack stop_gradient tile transpose
unstack
"""
_FREE = frozenset(_MOVES_DATA.split())  # move or create data: no arithmetic

Path = tuple[Any, ...]  # an equation and those it is inside of, outermost first


def flops(function: Callable, *args: Any, count_padding: bool = True) -> Flops:
    """FLOPs of `function(*args)` from its jaxpr; nothing is compiled or computed.

    args: pytrees of arrays or `jax.ShapeDtypeStruct`; anything that is no array must be closed
    over.
    count_padding: whether products with the zeros around a padded image count. True is the
    literature's convention
        (output positions times kernel size); XLA leaves them out. Zeros between the entries of a
        dilated image (transposed convolution) never count.
    Loops of known length count as often as they run, of a conditional the most expensive branch
    counts; a `while` loop counts once and is listed in `notes`, as are operations whose work the
    shapes do not tell (they count nothing). A function run on shards (`shard_map`) counts for all
    devices together. Raises what tracing `function` raises.
    """
    full_size = lambda value: value.shape
    return _total(walk.read(function, *args).program, full_size, count_padding)


def _total(program: Program, shape_of: Callable, padding: bool, path: Path = ()) -> Flops:
    """FLOPs of a program if the factors and results of its products have the shapes
    `shape_of(value)`."""
    total = _NOTHING
    for eqn, inner in program.equations():
        inside = (*path, eqn)
        bodies = [_total(body, shape_of, padding, inside) for body in inner]
        if bodies:
            count = _repeated(eqn, bodies, inside)
        elif eqn.primitive.name in walk.PRODUCTS:
            values = program.known((*eqn.invars, *eqn.outvars))
            count = _product(eqn, inside, padding, *map(shape_of, values))
        else:
            count = _work(eqn, inside)
        total = _add(total, count)
    return total


def _add(first: Flops, second: Flops) -> Flops:
    return Flops(*map(operator.add, first, second))


def _repeated(eqn: Any, bodies: list[Flops], path: Path) -> Flops:
    """FLOPs of an equation from those of the programs inside of it."""
    name = eqn.primitive.name
    if name == "cond":
        return max(bodies, key=lambda body: (body.products + body.elementwise, body.products))
    count = functools.reduce(_add, bodies)
    if name == "scan":
        return _scale(count, eqn.params["length"])
    if name == "shard_map":
        return _scale(count, eqn.params["mesh"].size)
    if name == "while":
        return _add(count, _noted(f"while at {_where(path)}: counted once"))
    return count


def _scale(count: Flops, times: int) -> Flops:
    equations = tuple(eqn._replace(flops=eqn.flops * times) for eqn in count.equations)
    products = count.products * times
    elementwise = count.elementwise * times
    return Flops(products, elementwise, equations, count.notes)


def _noted(note: str) -> Flops:
    return _NOTHING._replace(notes=(note,))


def _work(eqn: Any, path: Path) -> Flops:
    """FLOPs of one equation that is no product."""
    name = eqn.primitive.name
    if name in walk.OPAQUE:
        return _noted(f"{name} at {_where(path)}: not counted")
    entries = 0
    if name.startswith(walk.SCALAR_BODIES):
        entries = _reduction(eqn)
    elif name not in _FREE:
        entries = sum(getattr(out.aval, "size", 0) for out in eqn.outvars)
    return _NOTHING._replace(elementwise=entries)


def _where(path: Path) -> str:
    """Name stack of an equation and its callers; file and line where it says nothing of the
    place."""
    stacks = [str(eqn.source_info.name_stack) for eqn in path]
    stack = "/".join(filter(None, stacks))
    if re.sub(r"\w+\(|[)/]", "", stack):  # more than transformations such as "transpose(jvp())"
        return stack
    for eqn in reversed(path):
        if line := walk.line_of(eqn):
            return f"{stack} {line}".strip()
    return f"{stack} unknown place".strip()


def _product(eqn: Any, path: Path, padding: bool, first: Shape, second: Shape, out: Shape) -> Flops:
    """FLOPs of a matrix product or convolution of operands and a result of these shapes."""
    name = eqn.primitive.name
    if name == "conv_general_dilated":
        count = _convolution(eqn, out, second, padding)
    else:
        (contracted, _), _ = eqn.params["dimension_numbers"]
        summed = math.prod(first[axis] for axis in contracted)
        count = 2 * math.prod(out) * summed
    equation = Equation(name, _where(path), count)
    return _NOTHING._replace(products=count, equations=(equation,))


def _convolution(eqn: Any, out: Shape, kernel: Shape, padding: bool) -> int:
    """2 x images x output channels x (input channels of a filter) x pairs of output and kernel
    position.

    Right for grouped and depthwise convolution too: the kernel's input axis has the channels of one
    group only.
    """
    params = eqn.params
    spec = params["dimension_numbers"]
    image = eqn.invars[0].aval.shape
    batch, features, *outs = (out[a] for a in spec.out_spec)
    _, inputs, *window = (kernel[a] for a in spec.rhs_spec)
    pairs = 1
    for d, axis in enumerate(spec.lhs_spec[2:]):
        low, _ = params["padding"][d]
        apart = params["lhs_dilation"][d]
        starts = np.arange(outs[d]) * params["window_strides"][d]
        offsets = np.arange(window[d]) * params["rhs_dilation"][d]
        positions = np.add.outer(starts - low, offsets)
        counted = positions % apart == 0
        if not padding:
            counted &= (positions >= 0) & (positions < image[axis] * apart)
        pairs *= int(counted.sum())
    return 2 * batch * features * inputs * pairs


def _reduction(eqn: Any) -> int:
    """Combinations of two entries: entries that vanish, and per entry of a window, cumulative sum
    or scatter."""
    name = eqn.primitive.name
    entries = eqn.invars[0].aval.size
    out = eqn.outvars[0].aval.size
    if name == "scatter":
        return 0
    if name == "reduce_precision":
        return out
    if name.startswith("reduce_window"):
        window = math.prod(eqn.params["window_dimensions"])
        return out * (window - 1)
    if name.startswith("scatter"):
        return eqn.invars[2].aval.size
    if name.startswith(("reduce", "arg")):
        return entries - out
    return entries


# Budgets of channels ---------------------------------------------------------------------------


Unit = Literal["parameters", "flops"]


def of_channels(channels: groups.Channels, unit: Unit) -> Callable:
    """`price(keep)` of the network that `groups.trace` has seen, without the channels that `keep`
    leaves out.

    keep: bool [channels] by name of group, all groups. parameters: of the arrays below `params`, or
    of all if there is no such entry. flops: of convolutions and matrix products, one multiply-add =
    2, for one example of the batch traced (the leading axis of the first input), padded positions
    included, as `flops`. Takes milliseconds: nothing is traced again.
    Raises ValueError for flops of a program of symbolic sizes.
    """
    tables.convert(unit, Unit, "unit")
    inside = [path for path in channels.shapes if path.startswith("params/")]
    inside = inside or list(channels.shapes)
    if unit == "flops" and channels.walked.stand_ins:
        raise ValueError(
            f"the program has the symbolic sizes {', '.join(channels.walked.stand_ins)}; allowed "
            "for FLOPs: channels traced with numbers."
        )
    _, inputs, _ = channels.signature
    batch, *_ = (*inputs[0].shape, 1) if inputs else (1,)

    def parameters(keep: Mapping) -> float:
        shapes = groups.compact_shapes(channels, keep)
        return float(sum(shapes[path].size for path in inside))

    def products(keep: Mapping) -> float:
        shape_of = channels.alive(keep).shape
        return _total(channels.walked.program, shape_of, padding=True).products / batch

    return parameters if unit == "parameters" else products


# Time --------------------------------------------------------------------------------------------


class Latency(NamedTuple):
    """Seconds per call, start to result."""

    median: float
    low: float  # lower quartile
    high: float  # upper quartile
    samples: np.ndarray  # float64 [repeats], in the order measured


class Comparison(NamedTuple):
    """Two functions measured in alternation; their spreads are quartiles."""

    latencies: dict[str, Latency]
    speedup: float  # median of the first over median of the second: above 1, the second is faster
    # least and greatest quotient of the two spreads: 1 is outside exactly if they do not overlap
    speedup_low: float
    speedup_high: float
    # of the second against the first
    verdict: Verdict


def latency(function: Callable, *args: Any, repeats: int = 30) -> Latency:
    """Measured wall time of compiled `function(*args)` on the default device.

    function: traceable, jitted or `jax.stages.Compiled`; it must not donate its arguments. args:
    pytrees of arrays, moved to the device before. The first WARMUP calls, of which one compiles,
    are not measured. Raises ConfigError for repeats below 2.
    """
    return _measure([(function, args)], repeats)[0]


def compare(candidates: Mapping[str, tuple], *, repeats: int = 30) -> Comparison:
    """Whether the second of two functions is measurably faster: their spreads do not overlap.

    candidates: name to (function, tuple of its arguments), exactly two, the reference first. They
    take turns, and turns
        at going first, so that noise of the machine hits both.
    Raises ValueError for any other number of candidates, otherwise as `latency`.
    """
    if len(candidates) != 2:
        raise ValueError(
            f"candidates has {len(candidates)} entries; compare takes two: a reference and one "
            "other."
        )
    latencies = _measure(list(candidates.values()), repeats)
    return comparison(dict(zip(candidates, latencies)))


def comparison(latencies: dict[str, Latency]) -> Comparison:
    """What two measured latencies say, the reference first."""
    first, second = latencies.values()
    speedup = first.median / second.median
    low = first.low / second.high
    high = first.high / second.low
    verdict: Verdict = "no measurable difference"
    if low > 1:
        verdict = "faster"
    elif high < 1:
        verdict = "slower"
    return Comparison(latencies, speedup, low, high, verdict)


def summary(samples: Any) -> Latency:
    """Median and quartiles (linear between samples) of `samples`, seconds [repeats]."""
    samples = np.asarray(samples, np.float64)
    low, median, high = np.quantile(samples, (0.25, 0.5, 0.75)).tolist()
    return Latency(median, low, high, samples)


def _measure(calls: list[tuple], repeats: int) -> list[Latency]:
    tables.convert(repeats, Annotated[int, tables.Range(2)], "repeats")
    ready = [_warm(function, args) for function, args in calls]
    samples = np.zeros((len(ready), repeats))
    for turn in range(repeats):
        stopping.check()
        for i in np.roll(range(len(ready)), -turn):
            call = ready[i]
            start = time.perf_counter()
            jax.block_until_ready(call())
            samples[i, turn] = time.perf_counter() - start
    return list(map(summary, samples))


def _warm(function: Callable, args: tuple) -> Callable:
    """`function(*args)` as a call without arguments, compiled and called WARMUP times."""
    if not isinstance(function, jax.stages.Compiled):
        function = jax.jit(function)
    args = jax.tree.map(jnp.asarray, tuple(args))
    call: Callable = functools.partial(function, *args)
    for _ in range(WARMUP):
        jax.block_until_ready(call())
    return call
