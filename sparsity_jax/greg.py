"""Stages of growing regularisation: `grow` removes groups of weights after pushing them to zero,
`remove` at once.

Also `oracle` (the best of all choices, of a tiny network), and what is done to a pruned network
before it is trained again, `reinit`, or measured on it, `noise` and `jacobian`. Filters and
channels go with all that is coupled to them, so that `structured.compact` really removes them.
Source: Wang, Qin, Zhang, Fu 2021, arXiv:2012.09243, and its published code; see `growing` and
    `ratios`.
"""

import dataclasses
import functools
import math
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from sparsity_jax import (
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

PyTree = Any
Keep = Mapping[str, Any]  # bools by name of layer, True = keep
Granularity = Literal["filter", "channel", "weight", "group"]
Reading = ratios.Reading
Table = ratios.Table
SPEEDUP = re.compile(r"(\d+(?:\.\d*)?)x")


# What is removed ----------------------------------------------------------------------------------


class Choosing(interface.Stage):
    """A stage that says which units it removes: by `ratios` of layers, or as another run did."""

    needs: ClassVar[tuple[str, ...]] = ("train",)
    makes_network: ClassVar[bool] = True
    ratios: str | tuple
    skip: str
    granularity: Any
    pick: growing.Pick = "min"
    inherit: str = ""
    inherit_as: str = "index"
    reading: Reading = "correct"

    def check(self) -> None:
        if bool(self.ratios) == bool(self.inherit):
            raise tables.ConfigError(
                "",
                why=f"has {'both' if self.ratios else 'neither'} of ratios and inherit",
                allowed="either ratios, e.g. '[0,0.5,0.5,0.5,0]', '[1-15:0.7]' or '2x', or "
                "inherit, the workdir of a pruned run",
            )
        if self.inherit and self.granularity == "group":
            raise tables.ConfigError(
                "granularity", "group", allowed="filter, channel and weight with inherit"
            )
        if self.skip and (self.inherit or self.granularity == "group"):
            instead = "inherit" if self.inherit else "granularity 'group'"
            raise tables.ConfigError("skip", self.skip, allowed=f"'' with {instead}")
        if self.inherit and self.inherit_as == "index" and self.pick != "min":
            raise tables.ConfigError(
                "pick", self.pick, why="but inherit_as 'index' leaves nothing to pick"
            )
        if self.inherit_as == "ratio" and not self.inherit:
            raise tables.ConfigError(
                "inherit_as", "ratio", why="but there is no run to inherit from"
            )

    def check_network(self, problem: Problem, visits: int) -> None:
        if self.inherit:
            _check_inherited(problem, self.inherit)
        field = "inherit" if self.inherit else "ratios"
        try:
            layers = self.layers(problem)
        except tables.ConfigError:
            raise
        except ValueError as error:
            raise tables.ConfigError(field, getattr(self, field), why=str(error)) from None
        if all(layer.num_pruned == 0 for layer in layers):
            raise tables.ConfigError(
                field, getattr(self, field), why="with which no layer loses anything"
            )
        if self.pick != "min" and any(layer.num_pruned is None for layer in layers):
            raise tables.ConfigError("pick", self.pick, allowed="'min' with a ratio of 'gap'")

    def layers(self, problem: Problem) -> tuple[units.Layer, ...]:
        """The layers of the run's network and how many units each loses, in the order in which it
        uses them. Raises ConfigError, or ValueError, where ratios do not fit.
        """
        fields = ("ratios", "skip", "granularity", "inherit", "inherit_as", "reading")
        key = ("layers", *(getattr(self, name) for name in fields))
        return problem.once(key, lambda: self._layers(problem))

    def _layers(self, problem: Problem) -> tuple[units.Layer, ...]:
        shapes = train.shapes_of(problem)
        if self.granularity == "group":
            channels = structured.channels_of(problem)
            with tables.within("ratios"):
                by_name = trees.match_rules(dict.fromkeys(channels.groups, 0), self._rules())
            in_order = {name: by_name[name] for name in channels.groups}  # as the network uses them
            return growing.coupled(channels, shapes, in_order)
        table = self._table(problem)
        if self.granularity == "weight":
            return growing.layers(shapes, table, "weight")
        channels = structured.channels_of(problem, "separate")
        for _, member in units.deciding(channels, "filter"):
            path = member.path.removeprefix("params/")
            if member.role == "depthwise" and path in table:
                table[path] = 0.0  # its filters and channels are those of the layer before
        return growing.layers(shapes, table, self.granularity, channels=channels)

    def _rules(self) -> tuple:
        """The ratios of groups."""
        if not isinstance(self.ratios, str):
            return self.ratios
        try:
            return ((".*", float(self.ratios)),)
        except ValueError:
            raise tables.ConfigError(
                "",
                self.ratios,
                allowed="with granularity 'group' one number for all groups, e.g. '0.5', or pairs "
                "of a pattern of their names and a ratio",
            ) from None

    def _table(self, problem: Problem) -> Table:
        """The ratio of every kernel, by path in the params."""
        paths = kernels_of(problem)
        if self.inherit:
            return ratios.inherited(masks_of(self.inherit), paths, granularity=self.granularity)
        target = SPEEDUP.fullmatch(self.ratios) if isinstance(self.ratios, str) else None
        parse = functools.partial(
            ratios.parse,
            layers=paths,
            granularity=self.granularity,
            skip=self.skip,
            reading=self.reading,
        )
        if target is None:
            return parse(self.ratios)
        if self.granularity != "filter":
            raise tables.ConfigError(
                "ratios", self.ratios, why="a speed-up", allowed="with granularity 'filter' only"
            )
        eligible = {path for path, ratio in parse(((".*", 0.5),)).items() if ratio}
        return _for_speedup(problem, float(target[1]), eligible)

    def kept_there(self, problem: Problem) -> dict[str, np.ndarray]:
        """The very units that the run in `inherit` keeps, by layer; empty if they are to be picked
        anew.
        """
        if not self.inherit or self.inherit_as == "ratio":
            return {}
        masks_there, paths = masks_of(self.inherit), kernels_of(problem)
        return ratios.kept_groups(masks_there, paths, granularity=self.granularity)

    def removed(self, problem: Problem, state: State, keep: Keep) -> State:
        """`state` of one member without the units that `keep` leaves out, nor what is coupled to
        them.
        """
        kept = units.without(state.masks, self.layers(problem), keep)
        if self.granularity == "weight":
            return state._replace(params=masks.apply(state.params, kept), masks=kept)
        if self.granularity == "group":
            return structured.without(state, structured.channels_of(problem), keep, kept)
        channels = structured.channels_of(problem, "separate")
        by_path = {f"params/{path}": bools for path, bools in keep.items()}
        coupled = units.coupled(channels, by_path, self.granularity)
        return structured.without(state, channels, coupled, kept)


def _for_speedup(problem: Problem, target: float, eligible: set[str]) -> Table:
    """One ratio that reaches a speed-up, for all layers whose channels are eligible."""
    channels = structured.channels_of(problem)
    even = dict.fromkeys(kernels_of(problem), 0.0)
    for group in channels.groups.values():
        makers = [member for member in group.members if member.role == "producer"]
        paths = {member.path.removeprefix("params/") for member in makers}
        if paths <= eligible:
            even.update(dict.fromkeys(paths, 1.0))
    price = cost.of_channels(channels, "flops")

    def flops(table: dict[str, float]) -> float:
        by_path = {f"params/{path}": ratio for path, ratio in table.items()}
        return price(ratios.keep_of(channels, by_path))

    return ratios.for_speedup(flops, target, even)


def kernels_of(problem: Problem) -> list[str]:
    """Paths of the kernels in the params, in the order in which the network uses them."""

    def in_order() -> list[str]:
        paths = ratios.order(*structured.traceable(problem))
        return [path.removeprefix("params/") for path in paths]

    return problem.once("kernels", in_order)


def masks_of(workdir: str) -> dict[str, np.ndarray]:
    """The masks of the network at the end of a finished run of one network, by path."""
    arrays = checkpoint.arrays(workdirs.newest(pathlib.Path(workdir)))
    below = [path for path in arrays if path.startswith("masks/")]
    return {path.removeprefix("masks/"): np.asarray(arrays[path]) for path in below}


def _check_inherited(problem: Problem, workdir: str) -> None:
    """Raises ConfigError unless a workdir holds a finished run of the same network."""
    if not workdirs.is_finished(pathlib.Path(workdir)):
        raise tables.ConfigError("inherit", workdir, why="which holds no finished run")
    there, shapes = masks_of(workdir), trees.named_leaves(train.shapes_of(problem))
    for path in kernels_of(problem):
        shape = there[path].shape if path in there else None
        if shape != shapes[path].shape:
            raise tables.ConfigError(
                "inherit",
                workdir,
                why=f"whose mask of {path} has the shape {shape}",
                allowed=f"{shapes[path].shape}, a run of the same network",
            )


def shares_removed(state: State) -> dict[str, Any]:
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
class Removing(Choosing):
    """The options of `remove` and `grow` that say what is removed, see `Remove`."""

    ratios: str | tuple = ""
    skip: str = ""
    granularity: Granularity = "filter"
    pick: growing.Pick = "min"
    inherit: str = ""
    inherit_as: Literal["index", "ratio"] = "index"
    reading: Reading = "correct"


@tables.option
class Remove(Removing):
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

    def run(
        self,
        problem: Problem,
        state: State,
        settings: Sequence[Any],
        place: Place,
        rows: list[list[dict]],
    ) -> Iterator[Update]:
        layers, given = self.layers(problem), self.kept_there(problem)

        def cut(state: State) -> State:
            key = train.stage_key(state.key, place.position)
            keep = growing.pick(state.params, layers, pick=self.pick, key=key) | given
            return self.removed(problem, state, keep)

        yield _last(problem, jax.jit(problem.lift(cut))(state), step=0)


def _last(problem: Problem, state: State, step: int) -> Update:
    """The update of a stage that has removed its units."""
    shares = problem.lift(shares_removed)(state)
    return Update(state, train.member_rows(problem, shares, step=step), 1.0)


# grow ---------------------------------------------------------------------------------------------


class Growth(NamedTuple):
    """What `train.Fit.growth` needs, and when and what to log."""

    removing: Removing
    penalty: growing.Penalty
    penalty_only: bool
    log_every: int
    log_scores: bool

    def make(self, problem: Problem, key: Array) -> optax.GradientTransformation:
        tx = growing.growing_l2(
            self.removing.layers(problem),
            key=jax.random.fold_in(jax.random.wrap_key_data(key), 2**31 - 1),
            keep=self.removing.kept_there(problem),
            **vars(self.penalty),
        )
        if not self.penalty_only:
            return tx
        return optax.chain(optax.stateless(_without_kernels), tx)


def _without_kernels(grads: PyTree, params: PyTree) -> PyTree:
    del params
    off = lambda path, g: jnp.zeros_like(g) if trees.is_kernel(path) else g
    return trees.map_named(off, grads)


@tables.option
class Grow(Removing, growing.Penalty):
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

    def settings(self) -> "Growing":
        self.check()
        self.plan()  # raises ConfigError for limits that are never reached
        training = ("batch_size", "optimizer", "loss", "augment", "evaluate_every")
        fit = stages.Train(epochs=1, **{name: getattr(self, name) for name in training}).settings()
        growth = Growth(
            _part(Removing, self),
            _part(growing.Penalty, self),
            self.penalty_only,
            self.log_every,
            self.log_scores,
        )
        return dataclasses.replace(_part(Growing, fit), growth=growth)


def _part(options: Any, whole: Any) -> Any:
    """An object of a class of options whose fields `whole` has."""
    names = [field.name for field in dataclasses.fields(options)]
    return options(**{name: getattr(whole, name) for name in names})


class Growing(train.Fit):
    """A checked `grow` stage: a training that ends by removing what it pushed to zero."""

    def sized(self, problem: Problem) -> "Growing":
        """With as many epochs as growth may take, and one more, which it never ends."""
        steps = self.growth.penalty.most_steps()
        epochs = math.ceil(steps / self.steps_per_epoch(problem)) + 1
        return dataclasses.replace(self, epochs=epochs)

    def check_network(self, problem: Problem, visits: int) -> None:
        super().check_network(problem, visits)
        self.growth.removing.check_network(problem, visits)

    def begin(
        self,
        problem: Problem,
        state: State,
        settings: Sequence[Any],
        place: Place,
    ) -> State:
        fits = [fit.sized(problem) for fit in settings]
        return train.begin_members(problem, state, fits, _numbers(problem, state, settings))

    def look(self, problem: Problem, state: State) -> dict[str, Any]:
        """Fields of a row."""
        progress = growing.progress(state.opt_state)
        row = dict(
            finished=growing.finished(state.opt_state),
            growth={name: numbers._asdict() for name, numbers in progress.items()},
        )
        if self.growth.log_scores:
            keep = growing.kept(state.opt_state)
            norms = growing.scores(state.params, self.growth.removing.layers(problem))
            row |= dict(keep=keep, scores={name: norms[name] for name in keep})
        return row

    def run(
        self,
        problem: Problem,
        state: State,
        settings: Sequence[Any],
        place: Place,
        rows: list[list[dict]],
    ) -> Iterator[Update]:
        fit = self.sized(problem)
        spe = fit.steps_per_epoch(problem)
        look = functools.partial(fit.look, problem)
        compiled = problem.once(("look", fit.program()), lambda: jax.jit(problem.lift(look)))
        numbers = _numbers(problem, state, settings)
        where = (place.position, place.name)
        for update in train.fit_epochs(problem, state, fit, numbers, *where, rows[0]):
            step = int(np.ravel(update.state.step)[0])
            if step % spe % fit.growth.log_every:
                yield update
                continue
            growth = train.member_rows(problem, compiled(update.state), step=step)
            ended = [row.pop("finished") for (row,) in growth]
            together = _joined(update.rows, growth)
            if not all(ended):
                yield update._replace(rows=together)
                continue
            train.check_finite(update.state, spe, place.name)
            stages.check_weights(problem, update.state, f"{place.name}, before it removes")
            last = fit.without_pushed(problem, update.state, step)
            yield last._replace(rows=_joined(together, last.rows))
            return

    def without_pushed(self, problem: Problem, state: State, step: int) -> Update:
        def cut(state: State) -> State:
            return self.growth.removing.removed(problem, state, growing.kept(state.opt_state))

        return _last(problem, jax.jit(problem.lift(cut))(state), step)


def _joined(rows: list[list[dict]], more: list[list[dict]]) -> list[list[dict]]:
    """Rows of each member, then further ones of it."""
    return [[*first, *second] for first, second in zip(rows, more)]


def _numbers(problem: Problem, state: State, settings: Sequence[Growing]) -> dict[str, Any]:
    return train.numbers_of_fits(problem, state, settings) | dict(key=state.key)


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
        self.counts(problem)

    def losing(self, problem: Problem) -> list[units.Layer]:
        return [layer for layer in self.layers(problem) if layer.num_pruned != 0]

    def counts(self, problem: Problem) -> dict[str, tuple[int, int]]:
        """(units, how many go) of the layers that lose any; raises ConfigError where that cannot be
        tried exhaustively.
        """
        counts = {}
        for layer in self.losing(problem):
            if layer.num_pruned is None:
                raise tables.ConfigError("ratios", self.ratios, allowed="numbers, no 'gap'")
            counts[layer.name] = (layer.size, layer.num_pruned)
        with tables.blaming("limit", self.limit):
            probes.check_counts(counts, self.limit)
        return counts

    def run(
        self,
        problem: Problem,
        state: State,
        settings: Sequence[Any],
        place: Place,
        rows: list[list[dict]],
    ) -> Iterator[Update]:
        rows_found, states = interface.rows_per_member(problem), []
        for i, member in structured.members_of(problem, state):
            stage = settings[i]
            alone = problem._replace(members=None, compiled={})
            fits = place.others[stage.retrain][i : i + 1] if stage.retrain else []
            evaluate = stage.evaluated(alone, member)
            if fits:
                evaluate = stage.trained(alone, member, fits, place)
            counts = stage.counts(problem)
            batch = 1 if fits else stage.batch
            result = probes.oracle(evaluate, counts, batch=batch, limit=stage.limit)
            by_norm = growing.pick(member.params, stage.losing(problem))
            row = dict(
                choices=len(result.losses),
                loss=float(result.losses.min()),
                loss_by_norm=float(result.losses[probes.row_of(result, by_norm)]),
                rank=probes.rank(result, by_norm),
                losses=np.sort(result.losses)[:10_000].tolist(),
            )
            rows_found[i].append(row)
            best = jax.tree.map(jnp.asarray, result.best)
            states.append(stage.removed(problem, member, best))
        yield Update(structured.stacked(problem, states), rows_found, 1.0)

    def evaluated(self, problem: Problem, state: State) -> Callable:
        """Training losses of a batch of choices, in one compiled call."""
        measure = train.evaluation(problem, "train")

        @jax.jit
        def losses_of(state: State, keeps: PyTree, *data: Array) -> Array:
            def loss(keep: Keep) -> Array:
                cut = self.removed(problem, state, keep)
                return measure(cut.params, cut.batch_stats, *data)[0]

            return jax.lax.map(loss, keeps)

        return lambda keeps: losses_of(state, keeps, *train.arrays(problem, "train"))

    def trained(
        self,
        problem: Problem,
        state: State,
        fits: list[train.Fit],
        place: Place,
    ) -> Callable:
        """The training loss after training what one choice leaves."""
        numbers = train.numbers_of_fits(problem, state, fits)
        cut = jax.jit(lambda keep: self.removed(problem, state, keep))
        where = (place.position, place.name)

        def evaluate(keeps: PyTree) -> np.ndarray:
            current = cut({name: jnp.asarray(keep[0]) for name, keep in keeps.items()})
            current = train.begin_members(problem, current, fits, numbers)
            for update in train.fit_epochs(problem, current, fits[0], numbers, *where):
                current = update.state
            loss, _ = train.evaluate(problem, current.params, current.batch_stats, "train")
            return np.asarray(loss)[None]

        return evaluate


# Changes and measurements without training --------------------------------------------------------


@tables.option
class Reinit(interface.Stage):
    """Draws the weights that are left anew, and starts the running statistics anew: is it the
    structure that matters?

    method: `normal` (He et al.) or `orthogonal`, with the fan-in of what is left; see
        `surgery.reinitialize`.
    """

    kind: ClassVar[str] = "reinit"
    method: str = "normal"

    def check(self) -> None:
        tables.lookup(surgery.METHODS, self.method, "method")

    def run(
        self,
        problem: Problem,
        state: State,
        settings: Sequence[Any],
        place: Place,
        rows: list[list[dict]],
    ) -> Iterator[Update]:
        def draw(state: State) -> State:
            key = train.stage_key(state.key, place.position)
            params = surgery.reinitialize(state.params, state.masks, key, method=self.method)
            fresh = problem.init(jax.random.wrap_key_data(state.key))["batch_stats"]
            return state._replace(params=params, batch_stats=fresh)

        drawn = jax.jit(problem.lift(draw))(state)
        yield Update(drawn, interface.rows_per_member(problem), 1.0)


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

    def run(
        self,
        problem: Problem,
        state: State,
        settings: Sequence[Any],
        place: Place,
        rows: list[list[dict]],
    ) -> Iterator[Update]:
        def disturbed(state: State, draw: int) -> PyTree:
            key = jax.random.fold_in(train.stage_key(state.key, place.position), draw)
            return surgery.add_noise(
                state.params,
                key,
                std=self.std,
                relative=self.relative,
                pattern=self.parameters,
                kept=state.masks,
            )

        compiled = jax.jit(problem.lift(disturbed, (0, None)))
        for draw in range(len(rows[0]), self.num):
            params = compiled(state, draw)
            loss, accuracy = train.evaluate(problem, params, state.batch_stats, "test")
            numbers = dict(loss=loss, accuracy=accuracy)
            found = train.member_rows(problem, numbers, draw=draw, std=self.std)
            yield Update(state, found, (draw + 1) / self.num)


@tables.option
class Jacobian(interface.Stage):
    """Singular values of the Jacobian of the logits in the image, of `num_examples` train images:
    mean, spread and range. Which ones: see `config.sample`.

    Mean 1 and spread 0 is dynamical isometry. The network stays as it is.
    """

    kind: ClassVar[str] = "jacobian"
    num_examples: tables.Count = 100

    def run(
        self,
        problem: Problem,
        state: State,
        settings: Sequence[Any],
        place: Place,
        rows: list[list[dict]],
    ) -> Iterator[Update]:
        images = problem.images(problem.examples("train", self.num_examples)[0])

        def measure(state: State, images: Array) -> dict[str, Any]:
            variables = {"params": state.params, "batch_stats": state.batch_stats}
            values = probes.jacobian_singular_values(problem.model.apply, variables, images)
            return dict(probes.isometry(values)._asdict(), mean_by_rank=values.mean(0))

        numbers = jax.jit(problem.lift(measure, (0, None)))(state, images)
        found = train.member_rows(problem, numbers, num_examples=len(images))
        yield Update(state, found, 1.0)


STAGES = (Grow, Remove, Oracle, Reinit, Noise, Jacobian)
