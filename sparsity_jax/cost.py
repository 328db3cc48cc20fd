"""What a network costs: parameters, bytes, FLOPs of any JAX function, and measured time.

    count = cost.flops(model.apply, variables, images)      # arrays or jax.ShapeDtypeStruct; nothing is computed
    count.products, count.elementwise                       # FLOPs; one multiply-add = 2
    pair = cost.compare({"dense": (dense, (images,)), "compact": (compact, (images,))})
    pair.verdict, pair.speedup                              # "faster", 1.9

FLOPs are read off the jaxpr. XLA's own estimate, `jax.jit(f).lower(*args).cost_analysis()`, is `products +
elementwise` with `count_padding=False` (it reports square roots, exponentials and the like apart, as transcendentals).
"""

import math
import pathlib
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsity_jax import flow, groups, stopping, tables, trees

PyTree = Any


# Size ------------------------------------------------------------------------------------------------------------


def num_params(variables: PyTree) -> int:
    """Number of parameters: of `variables["params"]` if there is such an entry, else of the whole tree.

    Leaves: arrays or shape structs. Running statistics are no parameters.
    """
    return trees.size(variables["params"] if isinstance(variables, Mapping) and "params" in variables else variables)


def num_bytes(tree: PyTree) -> int:
    """Bytes of all arrays of `tree` as stored: entries times the size of their type, no headers, no compression.

    Leaves: arrays or shape structs. The compression ratio is that of the dense network over that of the compact one.
    """
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


# FLOPs -----------------------------------------------------------------------------------------------------------


class Equation(NamedTuple):
    """One convolution or matrix product of the program; in a loop, all its runs together."""

    primitive: str  # "conv_general_dilated" or "dot_general"
    where: str  # name stack such as "ResNet/conv1", as Flax modules and `jax.named_scope` set it, or file and line
    flops: int


class Flops(NamedTuple):
    """FLOPs of one call; one multiply-add = 2."""

    products: int  # convolutions and matrix products
    elementwise: int  # one per entry that an elementwise operation or a step of a reduction makes
    equations: tuple[Equation, ...]  # those of `products`, in the program's order
    notes: tuple[str, ...]  # what could not be known: loops counted once, operations of unknown work


_FREE = """
    bitcast_convert_type broadcast_in_dim concatenate copy copy_p device_put dynamic_slice dynamic_update_slice empty
    gather iota layout_constraint optimization_barrier pad random_unwrap random_wrap reshape rev sharding_constraint
    slice split squeeze stack stop_gradient tile transpose unstack
"""
_OPAQUE = """
    cholesky custom_call eig eigh ffi_call fft hessenberg householder_product io_callback lu pallas_call pure_callback
    qr ragged_dot ragged_dot_general schur sort svd top_k triangular_solve tridiagonal tridiagonal_solve
"""
FREE = frozenset(_FREE.split())  # move or create data: no arithmetic
OPAQUE = frozenset(_OPAQUE.split())  # work that the shapes do not tell, or in foreign code
# Reductions and the like: their jaxprs, if any, combine two scalars, and the work follows from the shapes.
SCALAR_BODIES = ("reduce", "scatter", "select_and_scatter", "cum", "argmax", "argmin")


def flops(function: Callable, *args: Any, count_padding: bool = True) -> Flops:
    """FLOPs of `function(*args)` from its jaxpr; nothing is compiled or computed.

    args: pytrees of arrays or `jax.ShapeDtypeStruct`; anything that is no array must be closed over.
    count_padding: whether products with the zeros around a padded image count. True is the literature's convention
        (output positions times kernel size); XLA leaves them out. Zeros between the entries of a dilated image
        (transposed convolution) never count.
    Loops of known length count as often as they run, of a conditional the most expensive branch counts; a `while` loop
    counts once and is listed in `notes`, as are operations whose work the shapes do not tell (they count nothing).
    A function run on shards (`shard_map`) counts for all devices together.
    Raises what tracing `function` raises.
    """
    return _total(jax.make_jaxpr(function)(*args), _Place("", ()), count_padding)


class _Place(NamedTuple):
    """Where an equation is: the name stack of its callers and itself, and those equations, innermost first."""

    stack: str
    equations: tuple[Any, ...]

    def inside(self, eqn: Any) -> "_Place":
        stack = "/".join(part for part in (self.stack, str(eqn.source_info.name_stack)) if part)
        return _Place(stack, (eqn, *self.equations))

    def __str__(self) -> str:
        if re.sub(r"\w+\(|[)/]", "", self.stack):  # more than transformations such as "transpose(jvp())"
            return self.stack
        line = next((line for line in map(_line, self.equations) if line), "unknown place")
        return f"{self.stack} {line}".strip()


def _add(parts: Iterator[Flops]) -> Flops:
    columns = list(zip(Flops(0, 0, (), ()), *parts))
    return Flops(sum(columns[0]), sum(columns[1]), sum(columns[2], ()), sum(columns[3], ()))


def _scale(count: Flops, times: int) -> Flops:
    equations = tuple(equation._replace(flops=equation.flops * times) for equation in count.equations)
    return Flops(count.products * times, count.elementwise * times, equations, count.notes)


def _total(jaxpr: Any, where: _Place, padding: bool) -> Flops:
    return _add(_of_equation(eqn, where, padding) for eqn in jaxpr.eqns)


def _of_equation(eqn: Any, outer: _Place, padding: bool) -> Flops:
    name, params, place = eqn.primitive.name, eqn.params, outer.inside(eqn)
    nothing = Flops(0, 0, (), ())
    if name in ("dot_general", "conv_general_dilated"):
        count = _dot(eqn) if name == "dot_general" else _convolution(eqn, padding)
        return nothing._replace(products=count, equations=(Equation(name, str(place), count),))
    if name in OPAQUE:
        return nothing._replace(notes=(f"{name} at {place}: not counted",))
    if name in FREE:
        return nothing
    if name.startswith(SCALAR_BODIES):
        return nothing._replace(elementwise=_reduction(eqn))
    # a linear solve also carries its transpose and the product, for derivatives
    inner = [params["jaxprs"].solve] if name == "custom_linear_solve" else _jaxprs(params)
    bodies = [_total(body, place, padding) for body in inner]
    if not bodies:
        return nothing._replace(elementwise=sum(getattr(out.aval, "size", 0) for out in eqn.outvars))
    if name == "cond":
        return max(bodies, key=lambda body: (body.products + body.elementwise, body.products))
    count = _add(bodies)
    if name == "scan":
        return _scale(count, params["length"])
    if name == "shard_map":
        return _scale(count, params["mesh"].size)
    if name == "while":
        return count._replace(notes=(*count.notes, f"while at {place}: counted once"))
    return count


def _jaxprs(params: Mapping[str, Any]) -> list[Any]:
    """The jaxprs among an equation's parameters, closed or not, alone or in tuples."""
    values = [item for value in params.values() for item in (value if isinstance(value, (tuple, list)) else (value,))]
    return [value for value in values if hasattr(value, "eqns")]


def _line(eqn: Any) -> str:
    """File and line of the innermost call outside of jax, or an empty text."""
    traceback, jax_folder = eqn.source_info.traceback, str(pathlib.Path(jax.__file__).parent)
    frames = traceback.frames if traceback else ()
    outside = (frame for frame in frames if not frame.file_name.startswith(jax_folder))
    return next((f"{pathlib.Path(frame.file_name).name}:{frame.line_num}" for frame in outside), "")


def _dot(eqn: Any) -> int:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    shape = eqn.invars[0].aval.shape
    return 2 * eqn.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)


def _convolution(eqn: Any, padding: bool) -> int:
    """2 x images x output channels x (input channels of a filter) x pairs of output and kernel position.

    Right for grouped and depthwise convolution too: the kernel's input axis has the channels of one group only.
    """
    return _convolution_of(eqn, eqn.outvars[0].aval.shape, eqn.invars[1].aval.shape, padding)


def _convolution_of(eqn: Any, out: Sequence[int], kernel: Sequence[int], padding: bool) -> int:
    """`_convolution` with other numbers of channels in these shapes."""
    params, image = eqn.params, eqn.invars[0].aval.shape
    image_axes, kernel_axes, out_axes = params["dimension_numbers"]
    pairs = 1
    for i, (low, _) in enumerate(params["padding"]):
        dilation = params["lhs_dilation"][i]
        starts = np.arange(out[out_axes[2 + i]]) * params["window_strides"][i] - low
        offsets = np.arange(kernel[kernel_axes[2 + i]]) * params["rhs_dilation"][i]
        positions = np.add.outer(starts, offsets)
        counted = positions % dilation == 0
        if not padding:
            counted &= (positions >= 0) & (positions < image[image_axes[2 + i]] * dilation)
        pairs *= int(counted.sum())
    return 2 * out[out_axes[0]] * out[out_axes[1]] * kernel[kernel_axes[1]] * pairs


def _reduction(eqn: Any) -> int:
    """Combinations of two entries: entries that vanish, and per entry of a window, cumulative sum or scatter."""
    name, entries, out = eqn.primitive.name, eqn.invars[0].aval.size, eqn.outvars[0].aval.size
    if name == "reduce_precision":
        return out
    if name.startswith("reduce_window"):
        return out * (math.prod(eqn.params["window_dimensions"]) - 1)
    if name.startswith("scatter"):
        return 0 if name == "scatter" else eqn.invars[2].aval.size
    return entries - out if name.startswith(("reduce", "arg")) else entries


# Budgets of channels -------------------------------------------------------------------------------------------------


def of_channels(channels: groups.Channels, unit: Literal["parameters", "flops"]) -> Callable[[Mapping], float]:
    """`price(keep)` of the network that `groups.trace` has seen, without the channels that `keep` leaves out.

    keep: bool [channels] by name of group, all groups. parameters: of the arrays below `params`, or of all if there is
    no such entry. flops: of convolutions and matrix products, one multiply-add = 2, for one example of the batch
    traced (the leading axis of the first input), padded positions included, as `flops`; those inside `shard_map` and
    other operations that the analysis does not enter are left out. Takes milliseconds: nothing is traced again.
    """
    tables.convert(unit, Literal["parameters", "flops"], "unit")
    inside = [path for path in channels.shapes if path.startswith("params/")] or list(channels.shapes)
    batch = channels.traced.inputs[0].shape[0] if channels.traced.inputs and channels.traced.inputs[0].shape else 1

    def parameters(keep):
        found = groups.compact_shapes(channels, keep)
        return float(sum(found[path].size for path in inside))

    def products(keep):
        analysis = channels.traced.analysis
        removed = {int(a) for name, atoms in channels.traced.atoms.items() for a in atoms[~np.asarray(keep[name])]}
        return _products(analysis.program, flow.Alive(analysis.labels, removed)) / batch

    return dict(parameters=parameters, flops=products)[unit]


def _products(program: flow.Program, alive: flow.Alive) -> float:
    """FLOPs of convolutions and matrix products at the sizes that are left."""
    total = 0.0
    for number, eqn in enumerate(program.jaxpr.eqns):
        if number in program.inner:
            found = [_products(inner, alive) for inner in program.inner[number]]
            times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
            total += times * (max(found) if eqn.primitive.name == "cond" else sum(found))
        elif eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            out = alive.shape(program.values[eqn.outvars[0]])
            first, second = (
                np.shape(var.val) if hasattr(var, "val") else alive.shape(program.values[var]) for var in eqn.invars
            )
            if eqn.primitive.name == "dot_general":
                summed = math.prod(first[a] for a in eqn.params["dimension_numbers"][0][0])
                total += 2 * math.prod(out) * summed
            else:
                total += _convolution_of(eqn, out, second, True)
    return total


# Time ------------------------------------------------------------------------------------------------------------


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
    speedup_low: float  # least and greatest quotient of the two spreads: 1 is outside exactly if they do not overlap
    speedup_high: float
    verdict: Literal["faster", "slower", "no measurable difference"]  # of the second against the first


def latency(function: Callable, *args: Any, repeats: int = 30, warmup: int = 3) -> Latency:
    """Measured wall time of compiled `function(*args)` on the default device.

    function: traceable, jitted or `jax.stages.Compiled`; it must not donate its arguments. args: pytrees of arrays,
    moved to the device before. warmup: calls not measured, of which the first compiles.
    Raises ConfigError for repeats below 2 or warmup below 1.
    """
    return _measure([(function, args)], repeats, warmup)[0]


def compare(candidates: Mapping[str, tuple[Callable, tuple]], *, repeats: int = 30, warmup: int = 3) -> Comparison:
    """Whether the second of two functions is measurably faster: their spreads do not overlap.

    candidates: name to (function, tuple of its arguments), exactly two, the reference first. They take turns, and turns
        at going first, so that noise of the machine hits both.
    Raises ValueError for any other number of candidates, otherwise as `latency`.
    """
    if len(candidates) != 2:
        raise ValueError(f"candidates has {len(candidates)} entries; compare takes two: a reference and one other.")
    return comparison(dict(zip(candidates, _measure(list(candidates.values()), repeats, warmup))))


def comparison(latencies: dict[str, Latency]) -> Comparison:
    """What two measured latencies say, the reference first."""
    first, second = latencies.values()
    low, high = first.low / second.high, first.high / second.low
    verdict = "faster" if low > 1 else "slower" if high < 1 else "no measurable difference"
    return Comparison(latencies, first.median / second.median, low, high, verdict)


def summary(samples: Any) -> Latency:
    """Median and quartiles (linear between samples) of `samples`, seconds [repeats]."""
    samples = np.asarray(samples, np.float64)
    low, median, high = np.quantile(samples, (0.25, 0.5, 0.75))
    return Latency(float(median), float(low), float(high), samples)


def _measure(calls: list[tuple[Callable, tuple]], repeats: int, warmup: int) -> list[Latency]:
    tables.convert(repeats, Annotated[int, tables.Range(2)], "repeats")
    tables.convert(warmup, tables.Count, "warmup")
    ready = []
    for function, args in calls:
        compiled = function if isinstance(function, jax.stages.Compiled) else jax.jit(function)
        ready.append((compiled, jax.tree.map(jnp.asarray, tuple(args))))
        for _ in range(warmup):
            jax.block_until_ready(compiled(*ready[-1][1]))
    samples = [[] for _ in ready]
    for turn in range(repeats):
        stopping.check()
        for i in range(len(ready)):
            chosen = (i + turn) % len(ready)
            compiled, args = ready[chosen]
            start = time.perf_counter()
            jax.block_until_ready(compiled(*args))
            samples[chosen].append(time.perf_counter() - start)
    return [summary(each) for each in samples]
