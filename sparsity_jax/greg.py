"""Stages of growing regularisation: `grow` removes groups of weights after pushing them to zero,
`remove` at once.

Also `oracle` (the best of all choices, of a tiny network), and what is done to a pruned network
before it is trained again, `reinit`, or measured on it, `noise` and `jacobian`. Filters and
channels go with all that is coupled to them, so that `structured.compact` really removes them.
Source: Wang, Qin, Zhang, Fu 2021, arXiv:2012.09243, and its published code; see `growing` and
    `ratios`.
"""

import dataclasses
import math
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from sparsity_jax import (
    alone,
    checkpoint,
    cost,
    growing,
    interface,
    losses,
    masks,
    optim,
    probes,
    ratios,
    stages,
    structured,
    surgery,
    tables,
    train,
    trees,
    units,
    workdirs,
)
from sparsity_jax.interface import Place
from sparsity_jax.train import Problem, State, Update
from sparsity_jax.types import Arrays, Fields, MemberRows, PyTree

Keep = Mapping[str, Any]  # bools by name of layer, True = keep
Reading = ratios.Reading
Table = ratios.Table
SPEEDUP = re.compile(r"(\d+(?:\.\d*)?)x")


# What is removed ----------------------------------------------------------------------------------


class Choosing(alone.EachMember):
    """A stage that says which units it removes: by `ratios` of layers, or as another run did."""

    needs: ClassVar[tuple[str, ...]] = ("train",)
    makes_network: ClassVar[bool] = True
    ratios: str | tuple
    skip: str
    granularity: Any
    # without types, so that they are fields of `remove` and `grow` only
    pick = "min"
    inherit = ""
    inherit_as = "index"
    reading = "correct"

    def check(self) -> None:
        if bool(self.ratios) == bool(self.inherit):
            raise tables.ConfigError(
                "",
                why=f"has {'both' if self.ratios else 'neither'} of ratios and inherit",
                allowed="either ratios, e.g. '[0,0.5,0.5,0.5,0]', '[1-15:0.7]' or '2x', or "
                "inherit, the workdir of a pruned run",
            )
        grouped = self.granularity == "group"
        given = bool(self.inherit) and self.inherit_as == "index"
        for field, default, idle, why in (
            ("skip", "", self.inherit or grouped, "but inherit, or granularity 'group', tells all"),
            ("pick", "min", given, "but inherit_as 'index' leaves nothing to pick"),
            ("inherit_as", "index", not self.inherit, "but there is no run to inherit from"),
        ):
            value = getattr(self, field)
            if idle and value != default:
                raise tables.ConfigError(field, value, why=why, allowed=repr(default))
        if self.inherit and grouped:
            raise tables.ConfigError(
                "granularity", "group", allowed="filter, channel and weight with inherit"
            )

    def check_network(self, problem: Problem, visits: int) -> None:
        numbers = [layer.num_pruned for layer in self.layers(problem)]
        if not any(number != 0 for number in numbers):
            raise tables.ConfigError(*self._asked(), why="with which no layer loses anything")
        if self.pick != "min" and None in numbers:
            raise tables.ConfigError("pick", self.pick, allowed="'min' with a ratio of 'gap'")

    def _asked(self) -> tuple[str, Any]:
        """The field that says how much is removed, and its value."""
        return ("inherit", self.inherit) if self.inherit else ("ratios", self.ratios)

    def layers(self, problem: Problem) -> tuple[units.Layer, ...]:
        """The layers of the run's network and how many units each loses, in the order in which it
        uses them. Raises ConfigError where ratios do not fit.
        """
        return problem.once(("layers", self), lambda: self._layers(problem))

    def _layers(self, problem: Problem) -> tuple[units.Layer, ...]:
        shapes = train.shapes_of(problem)
        table = {} if self.granularity == "group" else self._table(problem)
        with tables.blaming(*self._asked()):
            if self.granularity == "group":
                channels = structured.channels_of(problem)
                rules = self.ratios
                if isinstance(rules, str):  # one ratio for all
                    rules = ((".*", tables.read_text(rules, float)),)
                by_name = trees.match_rules(channels.sizes, rules)
                in_order = {name: by_name[name] for name in channels.sizes}
                return growing.coupled(channels, shapes, in_order)
            if self.granularity == "weight":
                return growing.layers(shapes, table, "weight")
            channels = structured.channels_of(problem, "separate")
            for _, member in units.deciding(channels, "filter"):
                if member.role == "depthwise":
                    # its filters and channels are those of the layer before
                    table[member.path.removeprefix("params/")] = 0.0
            return growing.layers(shapes, table, self.granularity, channels=channels)

    def _table(self, problem: Problem) -> Table:
        """The ratio of every kernel, by path in the params."""
        paths = kernels_of(problem)
        if self.inherit:
            there = masks_there(problem, self.inherit)
            with tables.blaming(*self._asked()):
                return ratios.inherited(there, paths, granularity=self.granularity)
        options = dict(granularity=self.granularity, skip=self.skip, reading=self.reading)
        target = SPEEDUP.fullmatch(self.ratios) if isinstance(self.ratios, str) else None
        if target is None:
            return ratios.parse(self.ratios, paths, **options)
        if self.granularity != "filter":
            raise tables.ConfigError(
                "ratios", self.ratios, why="a speed-up", allowed="with granularity 'filter' only"
            )
        any_ratio = ratios.parse(((".*", 0.5),), paths, **options)
        with tables.blaming(*self._asked()):
            return _for_speedup(problem, float(target[1]), any_ratio)

    def kept_there(self, problem: Problem) -> Arrays:
        """The very units that the run in `inherit` keeps, by layer; empty if they are to be picked
        anew.
        """
        if not self.inherit or self.inherit_as == "ratio":
            return {}
        there = masks_there(problem, self.inherit)
        return ratios.kept_groups(there, list(there), granularity=self.granularity)

    def removed(self, problem: Problem, state: State, keep: Keep) -> State:
        """`state` of one member without the units that `keep` leaves out, nor what is coupled to
        them.
        """
        kept = units.without(state.masks, self.layers(problem), keep)
        if self.granularity == "weight":
            return state._replace(params=masks.apply(state.params, kept), masks=kept)
        channels = structured.channels_of(problem)
        if self.granularity != "group":
            channels = structured.channels_of(problem, "separate")
            by_path = {f"params/{path}": bools for path, bools in keep.items()}
            keep = units.coupled(channels, by_path, self.granularity)
        return structured.without(state, channels, keep, kept)


def _for_speedup(problem: Problem, target: float, any_ratio: Table) -> Table:
    """One ratio that reaches a speed-up, for all layers whose channels may be removed.

    any_ratio: of every layer, not 0 where it may lose filters.
    """
    channels = structured.channels_of(problem)
    price = cost.of_channels(channels, "flops")
    proportions = {f"params/{path}": 0.0 for path in any_ratio}
    removable = {f"params/{path}" for path, ratio in any_ratio.items() if ratio}
    for group in channels.groups.values():
        makers = [member.path for member in group.members if member.role == "producer"]
        if removable.issuperset(makers):
            proportions.update(dict.fromkeys(makers, 1.0))
    flops = lambda table: price(ratios.keep_of(channels, table))
    table = ratios.for_speedup(flops, target, proportions)
    return {path.removeprefix("params/"): ratio for path, ratio in table.items()}


def kernels_of(problem: Problem) -> list[str]:
    """Paths of the kernels in the params, in the order in which the network uses them."""
    paths = problem.once("kernels", lambda: ratios.order(*structured.traceable(problem)))
    return [path.removeprefix("params/") for path in paths]


def masks_there(problem: Problem, workdir: str) -> Arrays:
    """The masks of the kernels at the end of a finished run of the same network, by path in the
    params; raises ConfigError unless it holds one.
    """
    end = workdirs.newest(pathlib.Path(workdir))
    if end is None or not workdirs.is_finished(pathlib.Path(workdir)):
        raise tables.ConfigError("inherit", workdir, why="which holds no finished run")
    arrays = checkpoint.arrays(end)
    shapes = trees.named_leaves(train.shapes_of(problem))
    result = {}
    for path in kernels_of(problem):
        result[path] = np.asarray(arrays.get(f"masks/{path}"))
        shape = result[path].shape
        if shape != shapes[path].shape:
            raise tables.ConfigError(
                "inherit",
                workdir,
                why=f"whose mask of {path} has the shape {shape}",
                allowed=f"{shapes[path].shape}, a run of the same network",
            )
    return result


def shares_removed(state: State) -> Fields:
    """Shares of kernel weights that are masked: of all (`ratio`), and by path (`layers`)."""
    kept = trees.named_leaves(state.masks)
    kernel_masks = {path: mask for path, mask in kept.items() if trees.is_kernel(path)}
    left = sum(map(jnp.sum, kernel_masks.values()))
    return dict(
        ratio=1 - left / trees.size(kernel_masks),
        layers={path: masks.sparsity(mask) for path, mask in kernel_masks.items()},
    )


# remove -------------------------------------------------------------------------------------------


@tables.option
class Remove(Choosing):
    """Removes groups of weights at once: by L1 norm, the smallest or largest, or at random.

    ratios: share removed from every layer. `[0,0.75,0.75,0.32,0]`: of residual networks, before the
    blocks, in each stage of blocks, after them; `[0-4:0.5, 7-10:0.2]`: of others, by number of the
    layer; `2.5x`: one ratio for all layers that makes the network so many times cheaper in FLOPs;
    or pairs of a pattern of paths and a ratio. `gap`, or -1, cuts at the largest gap of the norms.
    Filter pruning leaves the last convolution of a block whole, channel pruning the first, both the
    shortcuts. skip: layers left whole, `[1.0,2.3]`. granularity: `filter` (output channels),
    `channel` (input channels), `weight`, or `group`: whole coupled groups of channels, residual
    ones too, with one ratio or rules on their names. pick: `min`, `max` or `rand`. inherit: workdir
    of a pruned run of the same network, instead of ratios. inherit_as: what that removed (`index`),
    or as much of each layer (`ratio`). reading: `original` reads
    `skip` as prefixes and ignores what is out of range, see `originals.in_place`.
    """

    kind: ClassVar[str] = "remove"
    ratios: str | tuple = ""
    skip: str = ""
    granularity: Literal["filter", "channel", "weight", "group"] = "filter"
    pick: growing.Pick = "min"
    inherit: str = ""
    inherit_as: Literal["index", "ratio"] = "index"
    reading: Reading = "correct"

    def of_member(self, problem: Problem, state: State, place: Place) -> alone.Result:
        layers = self.layers(problem)
        given = self.kept_there(problem)

        def cut(state: State, position: int) -> tuple[State, Fields]:
            key = train.stage_key(state.key, position)
            keep = growing.pick(state.params, layers, pick=self.pick, key=key) | given
            state = self.removed(problem, state, keep)
            return state, shares_removed(state)

        compiled = problem.once(("remove", self), lambda: jax.jit(cut))
        state, shares = compiled(state, place.position)
        (rows,) = train.member_rows(problem, shares, step=0)
        return state, rows


# grow ---------------------------------------------------------------------------------------------


@tables.option
class Pushing(train.Fit):
    """A training under the penalty of the stage `growth`, see `train.Fit`."""

    growth: Any = None  # type: ignore[misc]


@tables.option
class Grow(Remove, growing.Penalty):
    """Trains under a growing penalty until what it pushes is small, then removes that: GReg-1,
    GReg-2, FixReg.

    The stage ends at the first log after all layers are done and have rested for `stabilize_steps`;
    networks of a sweep that run side by side end together, and those done first train on at rest.

    ratios, skip, granularity, pick, inherit, inherit_as, reading: what is removed, see `remove`.
    penalty_only: the loss has no gradient on kernels, so that only penalties move them. log_every:
    steps between logs of the penalties and norms of each layer, counted anew every epoch;
    log_scores: with the norm of every unit.
    """

    kind: ClassVar[str] = "grow"
    optimizer: optim.Config
    batch_size: tables.Count = 128
    augment: str = "none"
    loss: losses.Config = losses.CROSS_ENTROPY
    penalty_only: bool = False
    evaluate_every: tables.Count = 1
    log_every: tables.Count = 100
    log_scores: bool = False

    def check(self) -> None:
        super().check()
        self.plan()  # raises ConfigError for limits that are never reached
        self.training().check()

    def check_streamed(self) -> None:
        self.training().check_streamed()

    def check_network(self, problem: Problem, visits: int) -> None:
        self.training().check_network(problem, visits)
        super().check_network(problem, visits)

    def together(self) -> tuple:
        return self.training().together()

    def steps_per_epoch(self, problem: Problem) -> int:
        return self.training().steps_per_epoch(problem)

    def training(self, epochs: int = 1) -> train.Fit:
        """What trains under the penalty."""
        names = ("batch_size", "optimizer", "loss", "augment", "evaluate_every")
        fields = {name: getattr(self, name) for name in names}
        # members with other numbers of one optimizer share their program
        growth = dataclasses.replace(self, optimizer=tables.Options())
        return Pushing(epochs=epochs, growth=growth, **fields)

    def make(self, problem: Problem, key: Array) -> optax.GradientTransformation:
        """The penalty, for `train.Fit.growth`. key: the member's root key (raw)."""
        options = {name: getattr(self, name) for name in tables.parameters(growing.Penalty)}
        tx = growing.growing_l2(
            self.layers(problem),
            key=jax.random.fold_in(jax.random.wrap_key_data(key), 2**31 - 1),
            keep=self.kept_there(problem),
            **options,
        )
        if not self.penalty_only:
            return tx
        kernels = lambda params: trees.map_named(lambda path, _: trees.is_kernel(path), params)
        return optax.chain(optax.masked(optax.set_to_zero(), kernels), tx)

    def begin(self, problem: Problem, state: State, place: Place) -> State:
        return train.begin_members(problem, state, *_fits_of(problem, state, place.own))

    def look(self, problem: Problem, state: State) -> Fields:
        """Fields of a row, and whether growth has ended."""
        progress = growing.progress(state.opt_state)
        row: Fields = dict(
            finished=growing.finished(state.opt_state),
            growth={name: numbers._asdict() for name, numbers in progress.items()},
        )
        if self.log_scores:
            keep = growing.kept(state.opt_state)
            norms = growing.scores(state.params, self.layers(problem))
            row |= dict(keep=keep, scores={name: norms[name] for name in keep})
        return row

    def run(self, problem: Problem, state: State, place: Place) -> Iterator[Update]:
        fits, numbers = _fits_of(problem, state, place.own)
        fit = fits[0]
        spe = fit.steps_per_epoch(problem)

        def cut(state: State) -> tuple[State, Fields]:
            state = self.removed(problem, state, growing.kept(state.opt_state))
            return state, shares_removed(state)

        def compiled(name: str, function: Callable) -> Callable:
            return problem.once((name, fit.growth), lambda: jax.jit(problem.lift(function)))

        look = compiled("look", lambda state: self.look(problem, state))
        updates = train.fit_epochs(problem, state, fit, numbers, place.position, place.rows[0])
        for update in updates:
            step = int(np.ravel(update.state.step)[0])
            if step % spe % self.log_every:
                yield update
                continue
            logged = train.member_rows(problem, look(update.state), step=step)
            ended = [row.pop("finished") for (row,) in logged]
            update = update._replace(rows=_joined(update.rows, logged))
            if all(ended):
                break
            yield update
        train.check_finite(update.state, spe)
        with train.naming("before it removes"):
            stages.check_weights(problem, update.state)
        state, shares = compiled("grown", cut)(update.state)
        last = train.member_rows(problem, shares, step=step)
        yield Update(state, _joined(update.rows, last), 1.0)


def _fits_of(
    problem: Problem, state: State, settings: Sequence[Grow]
) -> tuple[list[train.Fit], Fields]:
    """The trainings of all members and their traced numbers; as many epochs as growth may take,
    and one more, which it never ends.
    """
    fits = []
    for stage in settings:
        epochs = math.ceil(stage.most_steps() / stage.steps_per_epoch(problem)) + 1
        fits.append(stage.training(epochs))
    return fits, train.numbers_of(problem, state, fits) | dict(key=state.key)


def _joined(rows: MemberRows, more: MemberRows) -> MemberRows:
    """Rows of each member, then further ones of it."""
    return [[*first, *second] for first, second in zip(rows, more)]


# oracle -------------------------------------------------------------------------------------------


@tables.option
class Oracle(Choosing):
    """Tries every choice of groups, all layers together, and removes that of the least training
    loss: tiny networks.

    ratios, skip, granularity: what may go, see `remove`; `gap` is not allowed. limit: choices above
        which it refuses.
    batch: choices a compiled call evaluates. retrain: name of a `train` config that trains the
    network after each choice, before its loss counts; the choices then run one after the other. The
    row tells how many choices are better than that by norm (`rank`, 1: none).
    """

    kind: ClassVar[str] = "oracle"
    ratios: str | tuple
    skip: str = ""
    granularity: Literal["filter", "channel"] = "filter"
    limit: tables.Count = 100_000
    batch: tables.Count = 16
    retrain: str = ""

    def check_streamed(self) -> None:
        raise interface.needs_memory(
            "kind", self.kind, "which evaluates every choice on all images in memory"
        )

    def check_network(self, problem: Problem, visits: int) -> None:
        super().check_network(problem, visits)
        self._counts(problem)

    def _losing(self, problem: Problem) -> list[units.Layer]:
        return [layer for layer in self.layers(problem) if layer.num_pruned != 0]

    def _counts(self, problem: Problem) -> dict[str, tuple[int, int]]:
        """(units, how many go) of the layers that lose any; raises ConfigError where that cannot be
        tried exhaustively.
        """
        counts = {}
        for layer in self._losing(problem):
            if layer.num_pruned is None:
                raise tables.ConfigError("ratios", self.ratios, allowed="numbers, no 'gap'")
            counts[layer.name] = (layer.size, layer.num_pruned)
        with tables.blaming("limit", self.limit):
            probes.check_counts(counts, self.limit)
        return counts

    def of_member(self, problem: Problem, state: State, place: Place) -> alone.Result:
        if self.retrain:
            batch, evaluate = 1, self._trained(problem, state, place)
        else:
            batch, evaluate = self.batch, self._evaluated(problem, state)
        result = probes.oracle(evaluate, self._counts(problem), batch=batch, limit=self.limit)
        by_norm = growing.pick(state.params, self._losing(problem))
        row = dict(
            choices=len(result.losses),
            loss=float(result.losses.min()),
            loss_by_norm=float(result.losses[probes.row_of(result, by_norm)]),
            rank=probes.rank(result, by_norm),
            losses=np.sort(result.losses)[:10_000].tolist(),
        )
        best = jax.tree.map(jnp.asarray, result.best)
        return self.removed(problem, state, best), [row]

    def _evaluated(self, problem: Problem, state: State) -> Callable:
        """Training losses of a batch of choices, in one compiled call."""
        measure = partial(train.evaluation, problem, "train")

        def losses_of(state: State, keeps: PyTree, *data: Array) -> Array:
            cut = lambda keep: self.removed(problem, state, keep)[:2]
            return jax.lax.map(lambda keep: measure(*cut(keep), *data)[0], keeps)

        compiled = problem.once(("choices", self), lambda: jax.jit(losses_of))
        return lambda keeps: compiled(state, keeps, *train.arrays(problem, "train"))

    def _trained(self, problem: Problem, state: State, place: Place) -> Callable:
        """The training loss after training what one choice leaves."""
        fits = place.settings[self.retrain]
        numbers = train.numbers_of(problem, state, fits)
        cut = problem.once(
            ("choice", self),
            lambda: jax.jit(lambda state, keep: self.removed(problem, state, keep)),
        )

        def evaluate(keeps: PyTree) -> np.ndarray:
            current = cut(state, {name: jnp.asarray(keep[0]) for name, keep in keeps.items()})
            current = train.begin_members(problem, current, fits, numbers)
            for update in train.fit_epochs(problem, current, fits[0], numbers, place.position):
                current = update.state
            loss, _ = train.evaluate(problem, current.params, current.batch_stats, "train")
            return np.asarray(loss)[None]

        return evaluate


# Changes and measurements without training --------------------------------------------------------


@tables.option
class Reinit(alone.EachMember):
    """Draws the weights that are left anew, and starts the running statistics anew: is it the
    structure that matters?

    method: `normal` (He et al.) or `orthogonal`, with the fan-in of what is left; see
        `surgery.reinitialize`.
    """

    kind: ClassVar[str] = "reinit"
    method: str = "normal"

    def check(self) -> None:
        tables.lookup(surgery.METHODS, self.method, "method")

    def of_member(self, problem: Problem, state: State, place: Place) -> alone.Result:
        def draw(state: State, position: int) -> State:
            key = train.stage_key(state.key, position)
            params = surgery.reinitialize(state.params, state.masks, key, method=self.method)
            fresh = problem.init(jax.random.wrap_key_data(state.key))["batch_stats"]
            return state._replace(params=params, batch_stats=fresh)

        compiled = problem.once(("reinit", self), lambda: jax.jit(draw))
        return compiled(state, place.position), []


@tables.option
class Noise(interface.Stage):
    """Accuracy and loss of the network with Gaussian noise on its weights, `num` times; the network
    stays as it is.

    num: how often it is drawn. std: of the noise. relative: whether std is a share of the root mean
    square of each array.
    parameters: pattern of the whole paths of the arrays that get it. Masked weights stay zero.
    """

    kind: ClassVar[str] = "noise"
    std: tables.NonNegative = 0.01
    num: tables.Count = 10
    relative: bool = False
    parameters: str = ".*"

    def check(self) -> None:
        trees.check_pattern(self.parameters, "parameters")

    def check_network(self, problem: Problem, visits: int) -> None:
        trees.matching(train.shapes_of(problem), self.parameters, "parameters")

    def run(self, problem: Problem, state: State, place: Place) -> Iterator[Update]:
        def disturbed(state: State, position: int, draw: int) -> PyTree:
            return surgery.add_noise(
                state.params,
                jax.random.fold_in(train.stage_key(state.key, position), draw),
                std=self.std,
                relative=self.relative,
                pattern=self.parameters,
                kept=state.masks,
            )

        lifted = problem.lift(disturbed, (0, None, None))
        compiled = problem.once(("noise", self), lambda: jax.jit(lifted))
        for draw in range(len(place.rows[0]), self.num):
            params = compiled(state, place.position, draw)
            loss, accuracy = train.evaluate(problem, params, state.batch_stats, "test")
            numbers = dict(loss=loss, accuracy=accuracy)
            drawn = train.member_rows(problem, numbers, draw=draw, std=self.std)
            yield Update(state, drawn, (draw + 1) / self.num)


@tables.option
class Jacobian(alone.EachMember):
    """Singular values of the Jacobian of the logits in the image, of `num_examples` train images:
    mean, spread and range. Which ones: see `config.sample`.

    Mean 1 and spread 0 is dynamical isometry. The network stays as it is.
    """

    kind: ClassVar[str] = "jacobian"
    num_examples: tables.Count = 100

    def of_member(self, problem: Problem, state: State, place: Place) -> alone.Result:
        images = problem.images(problem.examples("train", self.num_examples)[0])

        def measure(state: State, images: Array) -> Fields:
            variables = structured.variables_of(state)
            values = probes.jacobian_singular_values(problem.model.apply, variables, images)
            return dict(probes.isometry(values)._asdict(), mean_by_rank=values.mean(0))

        numbers = problem.once("jacobian", lambda: jax.jit(measure))(state, images)
        (rows,) = train.member_rows(problem, numbers, num_examples=len(images))
        return state, rows


STAGES = (Grow, Remove, Oracle, Reinit, Noise, Jacobian)
