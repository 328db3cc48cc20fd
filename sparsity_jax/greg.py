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
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparsity_jax import (
    checkpoint,
    cost,
    groups,
    growing,
    interface,
    losses,
    masks,
    probes,
    ratios,
    stages,
    structured,
    surgery,
    tables,
    train,
    trees,
    workdirs,
)

PyTree = Any
Granularity = Literal["filter", "channel", "weight", "group"]
SPEEDUP = re.compile(r"(\d+(?:\.\d*)?)x")


# What goes ----------------------------------------------------------------------------------------


class Choice(NamedTuple):
    """Which groups of weights go; the fields are options of the stages, see `Remove`."""

    ratios: Any
    skip: str
    granularity: str
    reading: str
    pick: str
    inherit: str
    inherit_as: str


def choice(ratios: Any, inherit: str, **fields: Any) -> Choice:
    """A checked Choice; raises ConfigError unless exactly one of `ratios` and `inherit` is
    given.
    """
    if bool(ratios) == bool(inherit):
        raise tables.ConfigError(
            "",
            why=f"has {'both' if ratios else 'neither'} of ratios and inherit",
            allowed="either ratios, e.g. '[0,0.5,0.5,0.5,0]', '[1-15:0.7]' or '2x', or inherit, "
            "the workdir of a pruned run",
        )
    if inherit and fields["granularity"] == "group":
        raise tables.ConfigError(
            "granularity", "group", allowed="filter, channel and weight with inherit"
        )
    if fields["skip"] and (inherit or fields["granularity"] == "group"):
        instead = "inherit" if inherit else "granularity 'group'"
        raise tables.ConfigError("skip", fields["skip"], allowed=f"'' with {instead}")
    if inherit and fields["inherit_as"] == "index" and fields["pick"] != "min":
        raise tables.ConfigError(
            "pick", fields["pick"], why="but inherit_as 'index' leaves nothing to pick"
        )
    if fields["inherit_as"] == "ratio" and not inherit:
        raise tables.ConfigError("inherit_as", "ratio", why="but there is no run to inherit from")
    frozen = (
        tuple(tuple(rule) if isinstance(rule, list) else rule for rule in ratios) if ratios else ""
    )
    return Choice(ratios if isinstance(ratios, str) else frozen, inherit=inherit, **fields)


def layers_of(problem: train.Problem, chosen: Choice) -> tuple[growing.Layer, ...]:
    """The layers of the run's network and how many groups each loses, in the order in which it uses
    them.

    Raises ConfigError where ratios do not fit.
    """
    return problem.once(("greg layers", chosen._replace(pick="")), lambda: _layers(problem, chosen))


def _layers(problem: train.Problem, chosen: Choice) -> tuple[growing.Layer, ...]:
    shapes = train.shapes_of(problem)
    if chosen.granularity == "group":
        channels = structured.channels_of(problem)
        rules = chosen.ratios
        if isinstance(rules, str):
            try:
                rules = ((".*", float(rules)),)
            except ValueError:
                raise tables.ConfigError(
                    "ratios",
                    rules,
                    allowed="with granularity 'group' one number for all groups, e.g. '0.5', or "
                    "pairs of a pattern of their names and a ratio",
                ) from None
        with tables.within("ratios"):
            by_name = trees.match_rules(dict.fromkeys(channels.groups, 0), rules)
        in_order = {name: by_name[name] for name in channels.groups}  # as the network uses them
        return growing.coupled(channels, shapes, in_order)
    table = table_of(problem, chosen)
    traced = None if chosen.granularity == "weight" else structured.channels_of(problem, "separate")
    return growing.layers(shapes, table, chosen.granularity, channels=traced)


def table_of(problem: train.Problem, chosen: Choice) -> ratios.Table:
    """The ratio of every kernel, by path in the params; 0 of depthwise ones, whose filters and
    channels are others'.
    """
    table = _given_table(problem, chosen)
    if chosen.granularity == "weight":
        return table
    found = structured.channels_of(problem, "separate").groups.values()
    members = (member for group in found for member in group.members)
    passing = {
        member.path.removeprefix("params/") for member in members if member.role == "depthwise"
    }
    return {path: 0.0 if path in passing else ratio for path, ratio in table.items()}


def _given_table(problem: train.Problem, chosen: Choice) -> ratios.Table:
    paths = kernels_of(problem)
    if chosen.inherit:
        return ratios.inherited(masks_of(chosen.inherit), paths, granularity=chosen.granularity)
    own = dict(
        granularity=chosen.granularity,
        skip=chosen.skip,
        reading=chosen.reading,
    )
    target = SPEEDUP.fullmatch(chosen.ratios) if isinstance(chosen.ratios, str) else None
    if not target:
        return ratios.parse(chosen.ratios, paths, **own)
    if chosen.granularity != "filter":
        raise tables.ConfigError(
            "ratios", chosen.ratios, why="a speed-up", allowed="with granularity 'filter' only"
        )
    channels = structured.channels_of(problem)
    eligible = {
        f"params/{path}": ratio
        for path, ratio in ratios.parse(((".*", 0.5),), paths, **own).items()
    }
    made = [
        {m.path for m in group.members if m.role == "producer"}
        for group in channels.groups.values()
    ]
    removable = {
        path for producers in made if all(map(eligible.get, producers)) for path in producers
    }
    even = {path: float(path in removable) for path in eligible}
    price = cost.of_channels(channels, "flops")
    with tables.blaming("ratios", chosen.ratios):
        found = ratios.for_speedup(
            lambda table: price(ratios.keep_of(channels, table)), float(target[1]), even
        )
    return {path.removeprefix("params/"): ratio for path, ratio in found.table.items()}


def kernels_of(problem: train.Problem) -> list[str]:
    """Paths of the kernels in the params, in the order in which the network uses them."""
    image = jax.ShapeDtypeStruct((2, *problem.dataset.test.images.shape[1:]), jnp.float32)
    variables = jax.eval_shape(problem.init, jax.random.key(0))
    make = lambda: [
        path.removeprefix("params/") for path in ratios.order(problem.model.apply, variables, image)
    ]
    return problem.once("kernels", make)


def masks_of(workdir: str) -> dict[str, np.ndarray]:
    """The masks of the network at the end of a finished run of one network, by path."""
    found = checkpoint.arrays(workdirs.newest(pathlib.Path(workdir)))
    return {
        path.removeprefix("masks/"): np.asarray(a)
        for path, a in found.items()
        if path.startswith("masks/")
    }


def check_choice(problem: train.Problem, chosen: Choice) -> tuple[growing.Layer, ...]:
    """The layers; raises ConfigError for a choice that does not fit the network.

    Such as ratios, patterns that match no array, and a run to inherit from that is not there.
    """
    if chosen.inherit:
        if not workdirs.is_finished(pathlib.Path(chosen.inherit)):
            raise tables.ConfigError("inherit", chosen.inherit, why="which holds no finished run")
        found, shapes = masks_of(chosen.inherit), trees.named_leaves(train.shapes_of(problem))
        for path in kernels_of(problem):
            there = found[path].shape if path in found else None
            if there != shapes[path].shape:
                raise tables.ConfigError(
                    "inherit",
                    chosen.inherit,
                    why=f"whose mask of {path} has the shape {there}",
                    allowed=f"{shapes[path].shape}, a run of the same network",
                )
    field, value = ("inherit", chosen.inherit) if chosen.inherit else ("ratios", chosen.ratios)
    try:
        layers = layers_of(problem, chosen)
    except tables.ConfigError:
        raise
    except ValueError as error:
        raise tables.ConfigError(field, value, why=str(error)) from None
    if all(layer.num_pruned == 0 for layer in layers):
        raise tables.ConfigError(field, value, why="with which no layer loses anything")
    if chosen.pick != "min" and any(layer.num_pruned is None for layer in layers):
        raise tables.ConfigError(
            "pick", chosen.pick, allowed="'min' with a ratio of -1, the largest gap"
        )
    return layers


def inherited_keep(problem: train.Problem, chosen: Choice) -> dict[str, np.ndarray]:
    """The very groups that the run in `inherit` keeps, by layer; empty if they are to be picked
    anew.
    """
    if not chosen.inherit or chosen.inherit_as == "ratio":
        return {}
    return ratios.kept_groups(
        masks_of(chosen.inherit), kernels_of(problem), granularity=chosen.granularity
    )


def removed(
    problem: train.Problem, state: train.State, chosen: Choice, keep: Mapping[str, jax.Array]
) -> train.State:
    """`state` of one member without the groups that `keep` (by layer) leaves out, nor what is
    coupled to them.
    """
    if chosen.granularity == "weight":
        kept = trees.map_named(
            lambda path, mask: mask & keep[path] if path in keep else mask, state.masks
        )
        return state._replace(params=masks.apply(state.params, kept), masks=kept)
    if chosen.granularity == "group":
        channels, coupled, kept = structured.channels_of(problem), dict(keep), state.masks
    else:
        channels = structured.channels_of(problem, "separate")
        coupled, kept = (
            _coupled(channels, keep, chosen.granularity),
            _alone(state.masks, keep, chosen.granularity),
        )
    tree = groups.mask(dict(params=kept, batch_stats=state.batch_stats), channels, coupled)
    return state._replace(params=masks.apply(state.params, tree["params"]), masks=tree["params"])


def _coupled(
    channels: groups.Channels, keep: Mapping[str, jax.Array], granularity: str
) -> dict[str, jax.Array]:
    """`keep` of the channel groups that the filters, or input channels, of some layers are."""
    roles = ("producer",) if granularity == "filter" else ("consumer",)
    found: dict[str, jax.Array] = {}
    for name, group in channels.groups.items():
        for member in group.members:
            own = keep.get(member.path.removeprefix("params/"))
            if own is None or member.role not in roles or member.index.shape[1] != 1:
                continue
            part = own[member.index[:, 0]]
            found[name] = found[name] & part if name in found else part
    return found


def _alone(kept: PyTree, keep: Mapping[str, jax.Array], granularity: str) -> PyTree:
    """Masks of the layers' own kernels: all there is to remove where no other array goes with
    them.
    """
    axis = -1 if granularity == "filter" else -2

    def cut(path, mask):
        if path not in keep:
            return mask
        return mask & keep[path].reshape(
            [-1 if i == axis % mask.ndim else 1 for i in range(mask.ndim)]
        )

    return trees.map_named(cut, kept)


def ratio_of(state: train.State) -> jax.Array:
    """Share of all kernel weights that is masked."""
    kernels = [
        mask for path, mask in trees.named_leaves(state.masks).items() if trees.is_kernel(path)
    ]
    return 1 - sum(map(jnp.sum, kernels)) / sum(mask.size for mask in kernels)


def layers_removed(state: train.State) -> dict[str, jax.Array]:
    """Share of every kernel's weights that is masked, by path."""
    return {
        path: masks.sparsity(mask)
        for path, mask in trees.named_leaves(state.masks).items()
        if trees.is_kernel(path)
    }


# remove -------------------------------------------------------------------------------------------


@tables.option
class Removing(interface.Stage):
    """A stage that removes groups of weights, see `Remove`."""

    needs: ClassVar[tuple[str, ...]] = ("train",)
    makes_network: ClassVar[bool] = True
    ratios: str | tuple = ""
    skip: str = ""
    granularity: Granularity = "filter"
    pick: growing.Pick = "min"
    inherit: str = ""
    inherit_as: Literal["index", "ratio"] = "index"
    reading: Literal["correct", "original"] = "correct"

    def choice(self) -> Choice:
        """What it removes; raises ConfigError."""
        names = ("skip", "granularity", "pick", "inherit_as", "reading")
        fields = {name: getattr(self, name) for name in names}
        return choice(self.ratios, self.inherit, **fields)


@tables.option
class Remove(Removing):
    """Removes groups of weights at once: by L1 norm, the smallest or largest, or at random.

    ratios: share removed from every layer. `[0,0.75,0.75,0.32,0]`: of residual networks, before the
    blocks, in each stage of blocks, after them; `[0-4:0.5, 7-10:0.2]`: of others, by number of the
    layer; `2.5x`: one ratio for all layers that makes the network so many times cheaper in FLOPs;
    or pairs of a pattern of paths and a ratio. -1 cuts at the largest gap of the norms. Filter
    pruning leaves the last convolution of a block whole, channel pruning the first, both the
    shortcuts. skip: layers left whole, `[1.0,2.3]`. granularity: `filter` (output channels),
    `channel` (input channels), `weight`, or `group`: whole coupled groups of channels, residual
    ones too, with one ratio or rules on their names. pick: `min`, `max` or `rand`. inherit: workdir
    of a pruned run of the same network instead of
    ratios: what it removed (`index`), or as much of each layer (`ratio`). reading: `original` reads
    `skip` as prefixes and ignores what is out of range, see `ratios.parse`.
    """

    kind: ClassVar[str] = "remove"

    def check(self) -> None:
        self.choice()

    def check_network(self, problem: train.Problem, visits: int) -> None:
        check_choice(problem, self.choice())

    def run(self, problem, state, settings, place, rows) -> Iterator[train.Update]:
        chosen = self.choice()
        layers, given = layers_of(problem, chosen), inherited_keep(problem, chosen)

        def cut(state):
            key = train.stage_key(state.key, place.position)
            keep = growing.pick(state.params, layers, pick=chosen.pick, key=key) | given
            return removed(problem, state, chosen, keep)

        yield _last(problem, jax.jit(problem.lift(cut))(state), step=0)


def _last(problem: train.Problem, state: train.State, step: int) -> train.Update:
    """The update of a stage that has removed its groups."""
    found = problem.lift(lambda state: dict(ratio=ratio_of(state), layers=layers_removed(state)))(
        state
    )
    return train.Update(state, train.member_rows(problem, found, step=step), 1.0)


# grow ---------------------------------------------------------------------------------------------


class Growth(NamedTuple):
    """What `train.Fit.growth` needs, and when and what to log. options: of `growing.plan`, sorted
    pairs.
    """

    choice: Choice
    options: tuple
    penalty_only: bool
    log_every: int
    log_scores: bool

    def make(self, problem: train.Problem, key: jax.Array) -> optax.GradientTransformation:
        layers, keep = layers_of(problem, self.choice), inherited_keep(problem, self.choice)
        key = jax.random.fold_in(jax.random.wrap_key_data(key), 2**31 - 1)
        tx = growing.growing_l2(
            layers, key=key, keep=keep, pick=self.choice.pick, **dict(self.options)
        )
        if not self.penalty_only:
            return tx
        off = lambda path, g: jnp.zeros_like(g) if trees.is_kernel(path) else g
        return optax.chain(optax.stateless(lambda grads, _: trees.map_named(off, grads)), tx)

    def most_steps(self) -> int:
        """Steps after which growth has ended at the latest."""
        chosen = growing.plan(**dict(self.options))
        return (
            chosen.update_every * (chosen.pick_updates + chosen.push_updates)
            + chosen.stabilize_steps
            + 1
        )


@tables.option
class Grow(Removing):
    """Trains under a growing penalty until what it pushes is small, then removes that: GReg-1,
    GReg-2, FixReg.

    ratios, skip, granularity, pick, inherit, inherit_as, reading: what goes, see `remove`. method,
    update_every (steps) and the fields after it up to counting: how the penalty grows, see
    `growing.plan`. The stage ends at the first log after all layers are done and have rested for
    `stabilize_steps`; networks of a sweep that run side by side end together, and those done first
    train on at rest. penalty_only: the loss has no gradient on kernels, so that only penalties move
    them. log_every: steps between logs of the penalties and norms of each layer, counted anew every
    epoch; log_scores: with the norm of every group.
    """

    kind: ClassVar[str] = "grow"
    optimizer: dict
    method: Literal["greg1", "greg2", "fixreg"] = "greg1"
    batch_size: tables.Count = 128
    augment: str = "none"
    loss: dict = losses.CROSS_ENTROPY
    update_every: tables.Count = 5
    granularity_prune: tables.Positive = 1e-4
    granularity_pick: tables.Positive = 1e-5
    granularity_recover: float = -1e-4
    upper_limit: tables.Positive = 1.0
    upper_limit_pick: tables.Positive = 1e-2
    mag_ratio_limit: tables.Positive = 1000.0
    stabilize_steps: tables.Index = 40_000
    fix_steps: tables.Index = 10_000
    counting: Literal["exact", "float32", "float64"] = "exact"
    penalty_only: bool = False
    evaluate_every: tables.Count = 1
    log_every: tables.Count = 100
    log_scores: bool = False

    def settings(self) -> "Growing":
        names = ("batch_size", "optimizer", "loss", "augment", "evaluate_every")
        training = stages.Train(epochs=1, **{name: getattr(self, name) for name in names})
        fit = training.settings()
        options = {name: getattr(self, name) for name in PENALTY}
        growing.plan(**options)
        growth = Growth(
            self.choice(),
            tuple(sorted(options.items())),
            self.penalty_only,
            self.log_every,
            self.log_scores,
        )
        fields = {field.name: getattr(fit, field.name) for field in dataclasses.fields(fit)}
        return Growing(**{**fields, "growth": growth})


PENALTY = tuple(name for name in tables.parameters(growing.plan) if name != "pick")


class Growing(train.Fit):
    """A checked `grow` stage: a training that ends by removing what it pushed to zero."""

    def sized(self, problem: train.Problem) -> "Growing":
        """With as many epochs as growth may take, and one more, which it never ends."""
        epochs = math.ceil(self.growth.most_steps() / self.steps_per_epoch(problem)) + 1
        return dataclasses.replace(self, epochs=epochs)

    def check_network(self, problem: train.Problem, visits: int) -> None:
        super().check_network(problem, visits)
        check_choice(problem, self.growth.choice)

    def begin(self, problem, state, settings, place) -> train.State:
        fits = [own.sized(problem) for own in settings]
        return train.begin_members(problem, state, fits, _numbers(problem, state, settings))

    def run(self, problem, state, settings, place, rows) -> Iterator[train.Update]:
        fit = self.sized(problem)
        growth, spe = fit.growth, fit.steps_per_epoch(problem)
        layers = layers_of(problem, growth.choice)

        def look(state):
            numbers = {
                name: one._asdict() for name, one in growing.progress(state.opt_state).items()
            }
            found = dict(finished=growing.finished(state.opt_state), growth=numbers)
            if not growth.log_scores:
                return found
            keep, norms = growing.kept(state.opt_state), growing.scores(state.params, layers)
            return found | dict(keep=keep, scores={name: norms[name] for name in keep})

        looks = problem.once(("look", fit.program()), lambda: jax.jit(problem.lift(look)))
        cut = lambda state: removed(problem, state, growth.choice, growing.kept(state.opt_state))
        numbers = _numbers(problem, state, settings)
        for update in train.fit_epochs(
            problem, state, fit, numbers, place.position, place.name, rows[0]
        ):
            step = int(np.ravel(update.state.step)[0])
            if step % spe % growth.log_every:
                yield update
                continue
            found = train.member_rows(problem, looks(update.state), step=step)
            ended = all([row.pop("finished") for (row,) in found])  # noqa: C419 - of every row
            together = [[*own, *more] for own, more in zip(update.rows, found)]
            if ended:
                train.check_finite(update.state, spe, place.name)
                stages.check_weights(problem, update.state, f"{place.name}, before it removes")
                last = _last(problem, jax.jit(problem.lift(cut))(update.state), step)
                yield last._replace(rows=[[*own, *more] for own, more in zip(together, last.rows)])
                return
            yield update._replace(rows=together)


def _numbers(
    problem: train.Problem, state: train.State, settings: Sequence[Growing]
) -> dict[str, Any]:
    return train.numbers_of_fits(problem, state, settings) | dict(key=state.key)


# oracle -------------------------------------------------------------------------------------------


@tables.option
class Oracle(interface.Stage):
    """Tries every choice of groups, all layers together, and removes that of the least training
    loss: tiny networks.

    ratios, skip, granularity: what may go, see `remove`; -1 is not allowed. limit: choices above
        which it refuses.
    batch: choices a compiled call evaluates. retrain: name of a `train` config that trains the
    network after each choice, before its loss counts; the choices then run one after the other. The
    row tells how many choices are better than that by norm (`rank`, 1: none).
    """

    kind: ClassVar[str] = "oracle"
    needs: ClassVar[tuple[str, ...]] = ("train",)
    makes_network: ClassVar[bool] = True
    ratios: str | tuple
    skip: str = ""
    granularity: Literal["filter", "channel"] = "filter"
    limit: tables.Count = 100_000
    batch: tables.Count = 16
    retrain: str = ""

    def choice(self) -> Choice:
        """What may go; raises ConfigError."""
        fields = dict(skip=self.skip, granularity=self.granularity)
        fields |= dict(pick="min", inherit_as="index", reading="correct")
        return choice(self.ratios, "", **fields)

    def check(self) -> None:
        self.choice()

    def check_streamed(self) -> None:
        raise interface.needs_memory(
            "kind", self.kind, "which evaluates every choice on all images in memory"
        )

    def check_network(self, problem: train.Problem, visits: int) -> None:
        oracle_counts(check_choice(problem, self.choice()), self)

    def run(self, problem, state, settings, place, rows) -> Iterator[train.Update]:
        found, parts = interface.rows_per_member(problem), []
        for i, own in structured.members_of(problem, state):
            chosen = settings[i]
            removing = chosen.choice()
            losing = [layer for layer in layers_of(problem, removing) if layer.num_pruned != 0]
            alone = problem._replace(members=None, compiled={})
            fits = place.others[chosen.retrain][i : i + 1] if chosen.retrain else []
            evaluate = (
                _trained(alone, own, removing, fits, place)
                if fits
                else _evaluated(alone, own, removing)
            )
            counts = oracle_counts(losing, chosen)
            result = probes.oracle(
                evaluate, counts, batch=1 if fits else chosen.batch, limit=chosen.limit
            )
            by_norm = growing.pick(own.params, losing)
            found[i].append(
                dict(
                    choices=len(result.losses),
                    loss=float(result.losses.min()),
                    loss_by_norm=float(result.losses[probes.row_of(result, by_norm)]),
                    rank=probes.rank(result, by_norm),
                    losses=np.sort(result.losses)[:10_000].tolist(),
                )
            )
            keep = {name: jnp.asarray(kept) for name, kept in result.best.items()}
            parts.append(removed(problem, own, removing, keep))
        together = (
            parts[0]
            if problem.members is None
            else jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
        )
        yield train.Update(together, found, 1.0)


def oracle_counts(layers: Sequence[growing.Layer], chosen: Oracle) -> dict[str, tuple[int, int]]:
    """(groups, how many go) of the layers that lose any; raises ConfigError where that cannot be
    tried exhaustively.
    """
    counts = {
        layer.name: (layer.size, layer.num_pruned) for layer in layers if layer.num_pruned != 0
    }
    if None in [number for _, number in counts.values()]:
        raise tables.ConfigError("ratios", chosen.ratios, allowed="numbers of groups, not -1")
    with tables.blaming("limit", chosen.limit):
        probes.check_counts(counts, chosen.limit)
    return counts


def _evaluated(problem: train.Problem, state: train.State, chosen: Choice) -> Callable:
    """Training losses of a batch of choices, in one compiled call."""
    measure = train.evaluation(problem, "train")

    def one(state, keep, images, labels):
        cut = removed(problem, state, chosen, keep)
        return measure(cut.params, cut.batch_stats, images, labels)[0]

    every = jax.jit(
        lambda state, keeps, *data: jax.lax.map(lambda keep: one(state, keep, *data), keeps)
    )
    return lambda keeps: every(state, keeps, *train.arrays(problem, "train"))


def _trained(
    problem: train.Problem,
    state: train.State,
    chosen: Choice,
    fits: list[train.Fit],
    place: interface.Place,
) -> Callable:
    """The training loss after training what one choice leaves."""
    numbers = train.numbers_of_fits(problem, state, fits)
    cut = jax.jit(lambda keep: removed(problem, state, chosen, keep))

    def evaluate(keeps):
        current = cut({name: jnp.asarray(keep[0]) for name, keep in keeps.items()})
        current = train.begin_members(problem, current, fits, numbers)
        for update in train.fit_epochs(
            problem, current, fits[0], numbers, place.position, place.name
        ):
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

    def run(self, problem, state, settings, place, rows) -> Iterator[train.Update]:
        def draw(state):
            key = train.stage_key(state.key, place.position)
            params = surgery.reinitialize(state.params, state.masks, key, method=self.method)
            fresh = problem.init(jax.random.wrap_key_data(state.key))["batch_stats"]
            return state._replace(params=params, batch_stats=fresh)

        yield train.Update(
            jax.jit(problem.lift(draw))(state), interface.rows_per_member(problem), 1.0
        )


@tables.option
class Noise(interface.Stage):
    """Accuracy and loss of the network with Gaussian noise on its weights, `num` times; the network
    stays as it is.

    std: of the noise, or with `relative` of that over the root mean square of each array.
    parameters: pattern of the whole paths of the arrays that get it. Masked weights stay zero.
    """

    kind: ClassVar[str] = "noise"
    std: tables.NonNegative = 0.01
    num: tables.Count = 10
    relative: bool = False
    parameters: str = ".*"

    def check(self) -> None:
        trees.check_pattern(self.parameters, "parameters")

    def check_network(self, problem: train.Problem, visits: int) -> None:
        trees.matching(train.shapes_of(problem), self.parameters, "parameters")

    def run(self, problem, state, settings, place, rows) -> Iterator[train.Update]:
        done = len(rows[0])

        def disturb(state, draw):
            key = jax.random.fold_in(train.stage_key(state.key, place.position), draw)
            options = dict(
                std=self.std, relative=self.relative, pattern=self.parameters, kept=state.masks
            )
            return surgery.add_noise(state.params, key, **options)

        compiled = jax.jit(problem.lift(disturb, (0, None)))
        for draw in range(done, self.num):
            loss, accuracy = train.evaluate(
                problem, compiled(state, draw), state.batch_stats, "test"
            )
            found = train.member_rows(
                problem, dict(loss=loss, accuracy=accuracy), draw=draw, std=self.std
            )
            yield train.Update(state, found, (draw + 1) / self.num)


@tables.option
class Jacobian(interface.Stage):
    """Singular values of the Jacobian of the logits in the image, of `num_examples` train images:
    mean, spread and range. Which ones: see `config.sample`.

    Mean 1 and spread 0 is dynamical isometry. The network stays as it is.
    """

    kind: ClassVar[str] = "jacobian"
    num_examples: tables.Count = 100

    def run(self, problem, state, settings, place, rows) -> Iterator[train.Update]:
        images = problem.images(problem.examples("train", self.num_examples)[0])

        def measure(state, images):
            variables = {"params": state.params, "batch_stats": state.batch_stats}
            values = probes.jacobian_singular_values(problem.model.apply, variables, images)
            return dict(probes.isometry(values)._asdict(), mean_by_rank=values.mean(0))

        found = jax.jit(problem.lift(measure, (0, None)))(state, images)
        yield train.Update(state, train.member_rows(problem, found, num_examples=len(images)), 1.0)


STAGES = (Grow, Remove, Oracle, Reinit, Noise, Jacobian)
