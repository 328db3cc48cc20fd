"""Training: its options, the compiled step, the loop over it, and evaluation.

State and numbers (learning rate, radii, ...) are arguments of one compiled step. A sweep whose
members share a program puts a leading axis on both and maps the step over it; `Problem.lift` is the
only place that knows.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import cached_property, partial
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, ShapeDtypeStruct, eval_shape, lax, local_devices, random
from jax.sharding import Mesh, Sharding

from sparsity_jax import (
    data,
    groups,
    hosts,
    interface,
    losses,
    masks,
    meshes,
    models,
    optim,
    polytopes,
    saliency,
    stopping,
    streaming,
    tables,
    trees,
)
from sparsity_jax.data import Dataset, FixedSample, make_augmentation
from sparsity_jax.interface import Carried, Place
from sparsity_jax.precision import FULL, Precision
from sparsity_jax.tables import ConfigError, Count, lookup, within
from sparsity_jax.types import Fields, MemberRows, PyTree

__all__ = [
    "TRACKERS",
    "Fit",
    "Measured",
    "Metrics",
    "Network",
    "NonFiniteLossError",
    "Problem",
    "State",
    "Update",
    "arrays",
    "begin",
    "begin_members",
    "build_problem",
    "bytes_of",
    "check_batch",
    "check_finite",
    "check_memory",
    "check_recipe",
    "convolves",
    "create_state",
    "evaluate",
    "evaluation",
    "fit_epochs",
    "initial_state",
    "initial_variables",
    "key_of",
    "measure",
    "measure_all",
    "member_of",
    "member_rows",
    "naming",
    "no_metrics",
    "no_tracker",
    "numbers_of",
    "on_host",
    "saliency_tracker",
    "shapes_of",
    "stage_key",
    "step_on_batch",
    "steps_in_memory",
    "steps_per_call",
    "together",
    "trained",
]


class Metrics(NamedTuple):
    """Sums over the steps of an epoch so far. bad_step: first step with a non-finite loss, -1 while
    there is none.
    """

    loss: Array
    correct: Array
    examples: Array
    bad_step: Array


class State(NamedTuple):
    """All that a run carries from step to step. key: the root PRNG key (raw data); keys of steps
    are folded from it.

    opt_state: of the optimizer while a `train` stage runs; between stages () or what it hands on,
        `Carried`.
    """

    params: PyTree
    batch_stats: PyTree
    masks: PyTree
    opt_state: PyTree
    step: Array
    key: Array
    metrics: Metrics

    @property
    def variables(self) -> PyTree:
        """What a model is applied to."""
        return {"params": self.params, "batch_stats": self.batch_stats}


class Update(NamedTuple):
    """What a stage reports: its state so far (None: that of the update before), new rows per
    member, and the share done.
    """

    state: Any
    rows: MemberRows
    done: float


class NonFiniteLossError(FloatingPointError):
    """The training loss became infinite or NaN; the message names stage, epoch and step."""


@contextmanager
def naming(part: str) -> Iterator[None]:
    """Begins the message of a NonFiniteLossError that the block raises with `part`, e.g. `fit`."""
    try:
        yield
    except NonFiniteLossError as error:
        raise NonFiniteLossError(f"{part}: {error}") from None


# What stays the same during a run -----------------------------------------------------------------


class Problem(NamedTuple):
    """What stays the same during a run: network, data on the device, and where to compute."""

    model: models.Model
    dataset: Dataset  # for names, sizes and statistics
    mesh: Mesh | None
    division: meshes.Division | None  # of the parameters; None: every device has all
    members: int | None  # size of the leading axis of states; None: no such axis
    eval_batch_size: int
    steps_per_call: int  # 0: automatic
    compiled: dict  # functions by what they depend on, so that visits and members share them
    # dict of arrays by path with which every network starts instead of its fresh ones
    pretrained: PyTree = ()
    keep_zeros: bool = False  # whether weights that are zero in `pretrained` are masked
    sample: FixedSample = FixedSample()  # the images of `examples`
    precision: Precision = "default"  # of training and evaluation
    curvature_precision: Precision = FULL  # of curvature and all that claims to be exact
    # uint8 [N, H, W, C] and int32 [N]; None where the data is streamed
    train_images: Any = None
    train_labels: Any = None
    test_images: Any = None
    test_labels: Any = None

    def lift(self, function: Callable, in_axes: Any = 0) -> Callable:
        """`function` of one member's state, for the states of all members."""
        if self.members is None:
            return function
        return jax.vmap(function, in_axes)

    def once(self, name: Any, make: Callable[[], Any]) -> Any:
        """What `make` gives, made on first use of the hashable `name`."""
        if name not in self.compiled:
            self.compiled[name] = make()
        return self.compiled[name]

    def program(
        self, function: Callable, *fixed: Any, key: Any = None, axes: Any = 0, **options: Any
    ) -> Callable:
        """`function(problem, *fixed, ...)` of one member, compiled for all members.

        It is compiled once per `key`, by default `fixed`. axes: of `lift`, of the other arguments.
        options: of `jax.jit`.
        """
        lifted = self.lift(partial(function, self, *fixed), axes)
        compiled = lambda: jax.jit(self.dividing(lifted), **options)
        return self.once((function, fixed if key is None else key), compiled)

    def dividing(self, function: Callable) -> Callable:
        """`function`, inside a program, whose results are divided as the parameters are."""
        division = self.division
        if division is None:
            return function
        return lambda *arguments: division.kept(function(*arguments))

    def with_members(self, members: int | None) -> "Problem":
        """This problem for states of so many members, with programs of its own."""
        if members == self.members:
            return self
        compiled = self.once(("with members", members), dict)
        return self._replace(members=members, compiled=compiled)

    def over_devices(self, batch: Any) -> Sharding | None:
        """How a batch is split over the mesh; None: it is not, as a data set's last one may be."""
        if self.mesh is None or len(batch) % self.mesh.size:
            return None
        return meshes.over_batch(self.mesh)

    def shard(self, batch: Array) -> Array:
        """Splits a batch over the devices of the mesh, inside a program."""
        sharding = self.over_devices(batch)
        if sharding is None:
            return batch
        return lax.with_sharding_constraint(batch, sharding)

    def place(self, tree: PyTree) -> PyTree:
        """`tree` on the device, or copied to every device of the mesh."""
        # there to stay, as a checkpoint is read: the same programs after an interruption
        return meshes.put(tree, meshes.whole(self.mesh))

    def shardings(self, tree: PyTree) -> PyTree:
        """Where the arrays of a tree belong, parameters and what has their paths and shapes divided
        as they are.
        """
        if self.division is None:
            return jax.tree.map(lambda _: meshes.whole(self.mesh), tree)
        return self.division.shardings(tree)

    def divide(self, tree: PyTree) -> PyTree:
        """`tree` where its arrays belong, see `shardings`."""
        return meshes.put(tree, self.shardings(tree))

    @property
    def streamed(self) -> bool:
        """Whether images are read while the run goes on."""
        return self.train_images is None

    def split(self, name: str) -> data.Split:
        """The images and labels of "train" or "test", wherever they are."""
        return getattr(self.dataset, name)

    def size(self, split: str) -> int:
        """Number of images of "train" or "test"."""
        return self.split(split).images.shape[0]

    def evaluation_batch(self, split: str) -> int:
        """Images per batch of an evaluation, what lacks in a split included."""
        images = min(self.eval_batch_size, self.size(split))
        return meshes.filled_up(images, self.mesh)

    def image(self, count: int) -> ShapeDtypeStruct:
        """So many images as the network takes them, of which only the shape is known."""
        shape = self.dataset.test.images.shape
        return ShapeDtypeStruct((count, *shape[1:]), jnp.float32)

    def shapes(self) -> PyTree:
        """Shape structs of one member's variables."""
        return self.once("shapes", lambda: eval_shape(self.init, random.key(0)))

    def examples(self, split: str, num: int) -> tuple[Array, Array]:
        """`num` images and labels of a split, or all if it has no more; those of `sample`, streamed
        or in memory.
        """
        size = self.size(split)

        def take() -> tuple[Array, Array]:
            indices = self.sample.indices(size, num)
            if self.streamed:
                return streaming.examples(self, split, indices)
            images, labels = arrays(self, split)
            return images[indices], labels[indices]

        if self.streamed or num < size:
            return self.once(("examples", split, num), take)
        return arrays(self, split)

    def images(self, batch: Array) -> Array:
        """uint8 images as the network's normalised input; train images stored larger are resized
        when evaluated.
        """
        shape = self.image(len(batch)).shape
        inputs = data.preprocess(self.shard(batch), self.dataset.mean, self.dataset.std)
        if inputs.shape == shape:
            return inputs
        return jax.image.resize(inputs, shape, "linear")

    def init(self, key: Array) -> PyTree:
        """Fresh variables, none of them pretrained; key: a root key."""
        create = self.dividing(self.model.init)
        return create(random.fold_in(key, 0), self.image(1))

    def apply(self, variables: PyTree, images: Array) -> Array:
        """What the network answers to its inputs, in inference mode; `Model.apply`."""
        return self._gathering(self.model.apply)(variables, images)

    def apply_train(
        self, variables: PyTree, images: Array, key: Array | None
    ) -> tuple[Array, PyTree]:
        """The same in training mode, and its new batch statistics; `Model.apply_train`."""
        return self._gathering(self.model.apply_train)(variables, images, key)

    def _gathering(self, function: Callable) -> Callable:
        """A function of variables, which it finds whole."""
        if self.division is None:
            return function
        return self.division.gathering(function)

    def logits(self, params: PyTree, batch_stats: PyTree, images: Array) -> Array:
        """What the network answers to uint8 images, in inference mode."""
        variables = {"params": params, "batch_stats": batch_stats}
        return self.apply(variables, self.images(images))


def build_problem(
    dataset: Dataset,
    model: models.Model,
    *,
    mesh: int | Mapping[str, int] = 1,
    mesh_rule: meshes.Rule = meshes.largest_axis,
    members: int | None = None,
    eval_batch_size: int = 1000,
    steps_per_call: int = 0,
    sample: data.FixedSample = FixedSample(),  # noqa: B008 - a constant
    precision: Precision = "default",
    curvature_precision: Precision = FULL,
) -> Problem:
    """Puts data in memory on the device; of a stream some images are decoded to find mistakes, see
    `data.look_at`.

    mesh: number of local devices that share each batch, 0 for all, or how many along each of the
    named `meshes.AXES`. mesh_rule: divides the parameters over the axis `params`, see
    `meshes.division`. sample: see `Problem.examples`.
    """
    streamed = isinstance(dataset.train.images, data.Stream)
    if streamed:
        train, test = (data.look_at(split.images) for split in dataset[1:3])
        dataset = dataset._replace(train=data.Split(train, None), test=data.Split(test, None))
    grid = meshes.of_hosts(mesh)
    problem = Problem(
        model,
        dataset,
        grid,
        None,
        members,
        eval_batch_size,
        steps_per_call,
        compiled={},
        sample=sample,
        precision=precision,
        curvature_precision=curvature_precision,
    )
    if grid is not None and "params" in grid.axis_names:
        division = meshes.division(shapes_of(problem), grid, mesh_rule)
        problem = problem._replace(division=division)
    if streamed:
        return problem
    names = ("train_images", "train_labels", "test_images", "test_labels")
    placed = problem.place((*dataset.train, *dataset.test))
    return problem._replace(**dict(zip(names, placed, strict=True)))


def arrays(problem: Problem, split: str) -> tuple[Array, Array]:
    """Images and labels of "train" or "test", in memory."""
    if split == "train":
        return problem.train_images, problem.train_labels
    return problem.test_images, problem.test_labels


def shapes_of(problem: Problem) -> PyTree:
    """Shape structs of one member's params."""
    return problem.shapes()["params"]


def convolves(params: PyTree) -> bool:
    """Whether some kernel is a convolution's."""
    leaves = trees.named_leaves(params).items()
    return any(trees.is_kernel(path) and leaf.ndim > 2 for path, leaf in leaves)


def on_host(problem: Problem) -> bool:
    """Whether batches should be compiled calls of their own, see `spectrum.over_batches`.

    XLA's CPU backend compiles convolution gradients inside a scan to a naive loop.
    """
    return convolves(shapes_of(problem)) and jax.default_backend() == "cpu"


def bytes_of(problem: Problem, tree: PyTree) -> int:
    """Bytes of arrays, or shape structs, on one device, where parameters and what has their paths
    and shapes are divided; on all devices where they share the memory of the host.
    """
    leaves = jax.tree.leaves(tree)
    shapes = [leaf.shape for leaf in leaves]
    if problem.division is not None and jax.default_backend() != "cpu":
        own = jax.tree.leaves(problem.shardings(tree))
        shapes = [sharding.shard_shape(shape) for sharding, shape in zip(own, shapes)]
    return sum(math.prod(shape) * leaf.dtype.itemsize for shape, leaf in zip(shapes, leaves))


def check_memory(needed: int, what: str) -> None:
    """Raises ConfigError for arrays of more bytes than the device has. what: takes them, e.g.
    `whose weights`.
    """
    stats = local_devices()[0].memory_stats() or {}
    tables.check_memory(needed, f"{what} take", stats.get("bytes_limit") or 0)


# Networks at the start ----------------------------------------------------------------------------


def key_of(seed: int) -> Array:
    """Raw data of the root key of `seed`."""
    return random.key_data(random.key(seed))


def stage_key(key: Array, position: int) -> Array:
    """The key of the pipeline's stage number `position`; 0 and 1 belong to initialisation."""
    return random.fold_in(random.wrap_key_data(key), 2 + position)


def no_metrics() -> Metrics:
    """Sums over no step."""
    none = jnp.zeros((), jnp.int32)
    return Metrics(jnp.zeros(()), none, none, none - 1)


def initial_variables(problem: Problem, key: Array, pretrained: PyTree = ()) -> PyTree:
    """The variables a run starts from: fresh ones under the raw `key`, but for those in
    `pretrained`.

    pretrained: `problem.pretrained`, an argument so that compiled programs do not contain its
    arrays. They are copied, since a training step may take over the memory of its state.
    """
    given = dict(pretrained)
    first = lambda path, leaf: jnp.copy(given[path]) if path in given else leaf
    return trees.map_named(first, problem.init(random.wrap_key_data(key)))


def create_state(problem: Problem, key: Array, pretrained: PyTree = ()) -> State:
    """A network as `initial_variables` makes it, dense unless `problem.keep_zeros`; key: from
    `key_of`.
    """
    variables = initial_variables(problem, key, pretrained)
    params = variables["params"]
    kept = masks.nonzero(params) if problem.keep_zeros else masks.full(params)
    step = jnp.zeros((), jnp.int32)
    return State(params, variables["batch_stats"], kept, (), step, key, no_metrics())


def initial_state(problem: Problem, key: Array) -> State:
    """The networks at the start of a run, one per member; key: their root keys, from `key_of`,
    stacked for members.

    One program for the whole run: random numbers of many shapes take longer to compile than most
    stages.
    """
    return problem.program(create_state, axes=(0, None))(key, problem.pretrained)


# The stage ----------------------------------------------------------------------------------------


def no_tracker() -> None:
    """Tracks nothing."""


def saliency_tracker(
    *,
    alpha: tables.Fraction = 0.8,
    track_batches: Count = 20,
    use_l2: bool = False,
    use_init: bool = False,
) -> None:
    """Options of `saliency.track` of `saliency.of_weights`; use_init: relative to the
    initial weights.
    """


TRACKERS = {"none": no_tracker, "saliency": saliency_tracker}


@tables.option
class Fit(interface.Stage):
    """Trains the network.

    start: go on from the current weights, or from the run's initial ones, without masks (several
        arms of a comparison).
    shift_inside: moves the weights into the feasible sets first. evaluate_every: epochs between
    evaluations on the test set.
    carry: goes on with the momentum of the training before it if that has carry too, also through
    stages of kind `cut`, and no others (sgd only).
    track: `dict(name="saliency", alpha=0.8, track_batches=20, use_l2=False, use_init=False)` keeps
    a running average of every weight's importance over the last batches of each epoch, for a cut by
    `biased_loss_tracked`.
    label: name of the trained network in the report (default: the stage's).
    """

    kind: ClassVar[str] = "train"
    trains: ClassVar[bool] = True
    # None, or what acts on the gradients before the optimizer: hashable, with
    # `make(problem, key) -> optax.GradientTransformation`, key: the member's root key (raw), and
    # with `log_every`, the most steps between two updates
    growth: ClassVar[Any] = None
    epochs: Count
    batch_size: Count = 128
    optimizer: optim.Config
    loss: losses.Config = losses.CROSS_ENTROPY
    augment: str = "none"
    start: Literal["current", "init"] = "current"
    shift_inside: bool = True
    evaluate_every: Count = 1
    carry: bool = False
    track: Annotated[dict, tables.Named(TRACKERS)] = tables.Options(name="none")
    label: str = ""

    # Checks

    def check(self) -> None:
        with within("loss"):
            losses.of(self.loss)
        lookup(data.AUGMENTATIONS, self.augment, "augment")
        with within("optimizer"):
            recipe = self.recipe
        schedule, options = recipe.schedule
        with tables.blaming("optimizer.schedule"):  # options that do not fit the epochs
            optim.SCHEDULES[schedule](1.0, self.epochs, 10**6, **options)
        if self.carry and recipe.name != "sgd":
            raise ConfigError(
                "carry", True, why=f"but the optimizer is {recipe.name!r}", allowed="with sgd"
            )
        with within("track"):
            if self.tracked.get("use_init") and not self.tracked["use_l2"]:
                raise ConfigError(
                    "use_init", True, why="which replaces the factor |w| of use_l2, but is False"
                )

    def check_streamed(self) -> None:
        if self.augment == "resized_crop_flip":
            raise ConfigError(
                "augment", self.augment, why="but a stream crops already", allowed="'flip'"
            )

    def check_network(self, problem: Problem, visits: int) -> None:
        devices = problem.mesh.size if problem.mesh else 1
        check_batch(self, problem)
        if self.batch_size % devices:
            raise ConfigError(
                "batch_size", self.batch_size, allowed=f"multiples of {devices}, the devices"
            )
        steps = self.steps_in_all(problem)
        if steps >= 2**31:
            raise ConfigError(
                "epochs", self.epochs, why=f"{steps:,} steps", allowed=f"below {2**31:,} steps"
            )
        with within("optimizer"):
            check_recipe(self.recipe, problem)

    # What it means

    @cached_property
    def recipe(self) -> optim.Recipe:
        """The checked optimizer."""
        return optim.check_config(self.optimizer)

    @cached_property
    def tracked(self) -> Fields:
        """Options of the tracked importance; {} where nothing is tracked."""
        return tables.entry(TRACKERS, self.track, "none")[1]

    def steps_per_epoch(self, problem: Problem) -> int:
        return problem.size("train") // self.batch_size

    def steps_in_all(self, problem: Problem) -> int:
        return self.epochs * self.steps_per_epoch(problem)

    def program(self) -> tuple:
        """Everything but the traced numbers, hashable: equal programs share one compilation."""
        fields = (self.epochs, self.batch_size, self.loss, self.augment, self.track, self.growth)
        return (optim.program(self.recipe), *fields)

    def beginning(self) -> tuple:
        """What the program of `begin` depends on."""
        return (self.program(), self.start, self.shift_inside, self.carry)

    def together(self) -> tuple:
        return (*self.beginning(), self.evaluate_every)

    def transformation(
        self, problem: Problem, numbers: Fields, key: Array
    ) -> optax.GradientTransformationExtraArgs:
        """The optimizer, tracker included. key: raw data of the root key, which the initial weights
        are made of.
        """
        spe = self.steps_per_epoch(problem)
        numbers = dict(numbers)
        grower = numbers.pop("key", None)
        tx = optim.make(self.recipe, numbers, self.epochs, spe)
        if self.growth is not None:
            return optax.chain(self.growth.make(problem, grower), tx)
        if not self.tracked:
            return tx
        options = dict(self.tracked)
        use_l2 = options.pop("use_l2")
        use_init = options.pop("use_init")

        def statistic(params: PyTree, grads: PyTree) -> PyTree:
            init = None
            if use_init:
                init = initial_variables(problem, key, problem.pretrained)["params"]
            return saliency.of_weights(params, grads, use_l2=use_l2, init=init)

        return saliency.track(tx, steps_per_epoch=spe, statistic=statistic, **options)

    # Running

    def begin(self, problem: Problem, state: State, place: Place) -> State:
        return begin_members(problem, state, place.own, numbers_of(problem, state, place.own))

    def run(self, problem: Problem, state: State, place: Place) -> Iterator[Update]:
        numbers = numbers_of(problem, state, place.own)
        yield from fit_epochs(problem, state, self, numbers, place.position, place.rows[0])

    def hand_on(self, opt_state: PyTree) -> Carried | tuple[()]:
        momentum = optim.momentum_of(opt_state)._asdict() if self.carry else ()
        saliency = optax.tree.get(opt_state, "saliency") if self.tracked else ()
        if self.carry or self.tracked:
            return Carried(momentum, saliency)
        return ()


def check_batch(stage: Any, problem: Problem) -> None:
    """Raises ConfigError for a batch larger than the train set, or that several processes cannot
    divide, and for an augmentation that does not fit the images.
    """
    size = problem.size("train")
    if stage.batch_size > size:
        raise ConfigError("batch_size", stage.batch_size, allowed=f"up to {size}, the train set")
    devices = problem.mesh.size if hosts.several() and problem.mesh else 1
    if stage.batch_size % devices:
        allowed = f"multiples of {devices}, the devices of all processes"
        raise ConfigError("batch_size", stage.batch_size, allowed=allowed)
    make_augmentation(stage.augment, problem.dataset)


def check_recipe(recipe: optim.Recipe, problem: Problem) -> None:
    """Raises ConfigError for an optimizer that does not fit the network's params, such as rules
    that decide none.
    """
    optim.numbers(recipe, shapes_of(problem), None)


def begin_members(problem: Problem, state: State, fits: Sequence[Fit], numbers: Fields) -> State:
    """The state at the start of a training of all members, see `begin`."""
    if fits[0].start == "init":
        state = initial_state(problem, state.key)
    return problem.program(begin, fits[0], key=fits[0].beginning())(state, numbers)


def begin(problem: Problem, fit: Fit, state: State, numbers: Fields) -> State:
    """The state at the start of a `train` stage, of one member: its weights in the feasible sets.

    A stage that starts from the first weights is given those, see `initial_state`.
    """
    params = state.params
    left = state.opt_state
    if fit.shift_inside:
        params = polytopes.shift_inside(params, numbers["sets"])
    params = masks.apply(params, state.masks)
    opt_state = fit.transformation(problem, numbers, state.key).init(params)
    if fit.carry and isinstance(left, Carried) and left.momentum:
        opt_state = optim.with_momentum(opt_state, optim.HeavyBallState(**left.momentum))
    zero = jnp.zeros((), jnp.int32)
    return state._replace(params=params, opt_state=opt_state, step=zero, metrics=no_metrics())


def numbers_of(problem: Problem, state: State, stages: Sequence[Any]) -> Fields:
    """The traced numbers of the `recipe` of each member's stage (stacked if there are members),
    radii included.

    Norms of the initialisation are measured with the member's own key; the network itself is left
    alone.
    """
    recipes = [stage.recipe for stage in stages]
    shapes = shapes_of(problem)
    norms = None
    order = None
    if any(map(optim.needs_norms, recipes)):
        norms = meshes.fetch(problem.program(_initial_norms)(state.key))
        if any(recipe.norms == "per_shape" for recipe in recipes):
            order = problem.once("network order", lambda: _network_order(problem))
    numbers = []
    for member, recipe in enumerate(recipes):
        own_norms = member_of(problem, norms, member)
        numbers.append(optim.numbers(recipe, shapes, own_norms, order))
    return problem.place(together(problem, numbers))


def _initial_norms(problem: Problem, key: Array) -> PyTree:
    init = lambda key: problem.init(key)["params"]
    return polytopes.mean_norms(init, random.fold_in(random.wrap_key_data(key), 1))


def member_of(problem: Problem, tree: PyTree, member: int) -> PyTree:
    """The part of one member of a tree that has a leading axis if there are members."""
    if problem.members is None:
        return tree
    return jax.tree.map(lambda leaf: leaf[member], tree)


def together(problem: Problem, trees: Sequence[PyTree]) -> PyTree:
    """One tree of those of all members, with a leading axis if there are members."""
    if problem.members is None:
        return trees[0]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _network_order(problem: Problem) -> list[str]:
    """Paths of the params in the network's order; nothing is computed."""
    shapes = problem.shapes()
    zeros = lambda leaf: jnp.zeros(leaf.shape, leaf.dtype)
    others = jax.tree.map(zeros, shapes["batch_stats"])
    image = zeros(problem.image(1))
    apply = lambda params: problem.model.apply({"params": params, "batch_stats": others}, image)
    return groups.order_of_use(apply, shapes["params"])


# Steps --------------------------------------------------------------------------------------------


def step_on_batch(
    problem: Problem,
    fit: Fit,
    state: State,
    numbers: Fields,
    position: Any,
    images: Array,
    labels: Array,
) -> State:
    """The state of one member after a step on one batch.

    position: int, the stage's in the pipeline; it decides the random numbers.
    """
    key = random.fold_in(stage_key(state.key, position), state.step)
    augment = make_augmentation(fit.augment, problem.dataset)
    inputs = problem.images(augment(key, problem.shard(images)))
    targets = problem.shard(labels)
    loss_of = losses.of(fit.loss)

    def mean_loss(params: PyTree) -> tuple[Array, tuple[PyTree, Array]]:
        variables = {"params": params, "batch_stats": state.batch_stats}
        dropout = random.fold_in(key, 1)
        logits, batch_stats = problem.apply_train(variables, inputs, dropout)
        return loss_of(logits, targets).mean(), (batch_stats, logits)

    with_gradient = jax.value_and_grad(mean_loss, has_aux=True)
    (loss, (batch_stats, logits)), grads = with_gradient(state.params)
    tx = fit.transformation(problem, numbers, state.key)
    grads = masks.apply(grads, state.masks)
    updates, opt_state = tx.update(grads, state.opt_state, state.params, value=loss)
    params = masks.apply(optax.apply_updates(state.params, updates), state.masks)
    first = state.step % fit.steps_per_epoch(problem) == 0
    bad = state.metrics.bad_step
    anew = lambda x: jnp.where(first, jnp.zeros_like(x), x)
    before = jax.tree.map(anew, state.metrics)
    metrics = Metrics(
        before.loss + loss,
        before.correct + jnp.sum(losses.correct(logits, targets), dtype=jnp.int32),
        before.examples + fit.batch_size,
        jnp.where((bad < 0) & ~jnp.isfinite(loss), state.step, bad),
    )
    step = state.step + 1
    return State(params, batch_stats, state.masks, opt_state, step, state.key, metrics)


def steps_in_memory(
    problem: Problem,
    fit: Fit,
    size: int,
    state: State,
    numbers: Fields,
    order: Array,
    position: Any,
    images: Array,
    labels: Array,
) -> State:
    """The state of one member after `size` steps on data in memory, see `step_on_batch`.

    order: int32 [N], this epoch's examples.
    """

    one_step = problem.dividing(step_on_batch)

    def step(state: State, _: None) -> tuple[State, None]:
        start = (state.step % fit.steps_per_epoch(problem)) * fit.batch_size
        index = lax.dynamic_slice_in_dim(order, start, fit.batch_size)
        batch = images[index], labels[index]
        return one_step(problem, fit, state, numbers, position, *batch), None

    if size == 1:
        return step(state, None)[0]
    return lax.scan(step, state, None, size)[0]


def _donated() -> Fields:
    """Options of `jax.jit` by which a step takes over the memory of its state; on CPU that costs
    copies.
    """
    if jax.default_backend() == "cpu":
        return {}
    return dict(donate_argnums=0)


def steps_per_call(problem: Problem, steps_per_epoch: int) -> int:
    """How many steps a compiled call makes, at most an epoch's; see `on_host`."""
    size = problem.steps_per_call
    if not size:
        size = 1 if on_host(problem) else steps_per_epoch
    return min(size, steps_per_epoch)


def fit_epochs(
    problem: Problem,
    state: State,
    fit: Fit,
    numbers: Fields,
    position: int,
    rows: Sequence[dict] = (),
) -> Iterator[Update]:
    """Trains from `state` (from `begin`, or any state this yielded) to the end; yields after every
    compiled call.

    Rows of an epoch: epoch, step, learning_rate, train_loss, train_accuracy, seconds; on evaluated
    epochs test_loss and test_accuracy. Raises NonFiniteLossError naming the first bad step. rows:
    those that came with the states so far.
    A step on streamed data that met unreadable images has a row of its own, with step, unreadable
    (how many) and unreadable_images (which); the epoch's row sums them up and names the first five.
    Those of the test images are its test_unreadable. Raises what `optim.check` does, if the weights
    started inside.
    """
    spe = fit.steps_per_epoch(problem)
    before = [row.get("seconds", 0.0) for row in rows]
    started = time.perf_counter() - max(before, default=0.0)
    met = [row for row in rows if "unreadable" in row and "epoch" not in row]
    if problem.streamed:
        step_on = problem.program(step_on_batch, fit, key=fit.program(), **_donated())
        step_with = lambda state, *batch: step_on(state, numbers, position, *batch)
        calls = streaming.steps(problem, fit, state, step_with, position, _names_in(met))
    else:
        calls = _calls_in_memory(problem, state, fit, numbers, position)
    with closing(calls):
        for state, step, unreadable in calls:
            new = interface.rows_per_member(problem)
            if unreadable:
                row = dict(step=step, unreadable=len(unreadable), unreadable_images=[*unreadable])
                met.append(row)
                new[0].append(row)
            if step % spe == 0:
                check_finite(state, spe)
                lost = _names_in(row for row in met if row["step"] > step - spe)
                seconds = time.perf_counter() - started
                last = _epoch_rows(problem, state, fit, step, seconds, lost)
                new = interface.rows_joined(new, last)
            yield Update(state, new, step / (fit.epochs * spe))
    if fit.shift_inside:
        optim.check(state.opt_state)


def trained(
    problem: Problem, state: State, fits: Sequence[Fit], numbers: Fields, position: int
) -> State:
    """The state at the end of a training of all members that begins with `state`."""
    state = begin_members(problem, state, fits, numbers)
    for update in fit_epochs(problem, state, fits[0], numbers, position):
        state = update.state
    return state


def _names_in(rows: Iterable[dict]) -> list[str]:
    """The unreadable images that rows name."""
    return [name for row in rows for name in row["unreadable_images"]]


def _calls_in_memory(
    problem: Problem, state: State, fit: Fit, numbers: Fields, position: int
) -> streaming.Calls:
    """Training on data in memory: several steps per call, a new order of the examples per epoch."""
    spe = fit.steps_per_epoch(problem)
    logged = fit.growth.log_every if fit.growth else spe
    most = steps_per_call(problem, spe)
    new_order = problem.program(_shuffled, axes=(0, None, None))
    order = None
    step = int(np.ravel(state.step)[0])
    while step < fit.epochs * spe:
        stopping.check()
        epoch, at = divmod(step, spe)
        if order is None or at == 0:
            order = new_order(state.key, position, epoch)
        # the rest: a checkpoint may be of calls of another size
        size = min(most, spe - at, logged - at % logged)
        call = problem.program(
            steps_in_memory,
            fit,
            size,
            key=(fit.program(), size),
            axes=(0, 0, 0, None, None, None),
            **_donated(),
        )
        state = call(state, numbers, order, position, *arrays(problem, "train"))
        step += size
        yield state, step, ()


def _shuffled(problem: Problem, key: Array, position: int, epoch: int) -> Array:
    """The order of the examples in an epoch of one member."""
    key = random.fold_in(stage_key(key, position), 2**31 - 1 - epoch)
    return random.permutation(key, problem.size("train"))


def check_finite(state: State, steps_per_epoch: int) -> None:
    """Raises NonFiniteLossError if some loss so far was not finite."""
    bad = np.ravel(meshes.fetch(state.metrics.bad_step))
    if (bad < 0).all():
        return
    first = bad[bad >= 0].min()
    member = f" of member {bad.tolist().index(first)}" if bad.size > 1 else ""
    raise NonFiniteLossError(
        f"the training loss{member} is not finite at step {first} (epoch "
        f"{first // steps_per_epoch + 1}). "
        "A lower learning rate, or a smaller tau for Frank-Wolfe, usually helps."
    )


# Rows and evaluation ------------------------------------------------------------------------------


def _epoch_rows(
    problem: Problem, state: State, fit: Fit, step: int, seconds: float, lost: Sequence[str]
) -> MemberRows:
    """One row per member after `step`, the last one of an epoch. lost: its unreadable images."""
    spe = fit.steps_per_epoch(problem)
    epoch = step // spe
    values = {
        "learning_rate": optim.learning_rate(state.opt_state),
        "train_loss": state.metrics.loss / spe,
        "train_accuracy": state.metrics.correct / state.metrics.examples,
    }
    common = dict(epoch=epoch, step=step, seconds=round(seconds, 3))
    if epoch % fit.evaluate_every == 0 or epoch == fit.epochs:
        test = measure(problem, state.params, state.batch_stats, "test")
        values |= dict(test_loss=test.loss, test_accuracy=test.accuracy)
        if test.unreadable:
            common["test_unreadable"] = len(test.unreadable)
    rows = member_rows(problem, values, **common)
    if lost:
        for (row,) in rows:
            row |= dict(unreadable=len(lost), unreadable_images=lost[:5])
    return rows


def member_rows(problem: Problem, values: Fields, **common: Any) -> MemberRows:
    """One row per member of `values` (scalars, or arrays with a leading member axis), fetched at
    once.
    """
    values = meshes.fetch(values)
    rows = []
    for i in range(problem.members or 1):
        own = jax.tree.map(lambda leaf: leaf.tolist(), member_of(problem, values, i))
        rows.append([{**common, **own}])
    return rows


def _batch_sums(
    problem: Problem, params: PyTree, batch_stats: PyTree, images: Array, labels: Array
) -> tuple[Array, Array]:
    """(sum of losses, number of right ones) where the label is not -1."""
    logits = problem.logits(params, batch_stats, images)
    loss = losses.cross_entropy(logits, jnp.maximum(labels, 0))
    correct = jnp.sum(losses.correct(logits, labels), dtype=jnp.int32)
    return jnp.sum(jnp.where(labels >= 0, loss, 0)), correct


def evaluation(
    problem: Problem, split: str, params: PyTree, batch_stats: PyTree, images: Array, labels: Array
) -> tuple[Array, Array]:
    """(mean loss, accuracy) of one member over a whole split in memory; traceable."""
    size = problem.size(split)
    batch = problem.evaluation_batch(split)

    def add(total: tuple, start: Array) -> tuple:
        index = start + jnp.arange(batch)
        inside = jnp.minimum(index, size - 1)
        counted = jnp.where(index < size, labels[inside], -1)
        sums = _batch_sums(problem, params, batch_stats, images[inside], counted)
        return jax.tree.map(jnp.add, total, sums), None

    zero = (jnp.zeros(()), jnp.zeros((), jnp.int32))
    (loss, correct), _ = lax.scan(add, zero, jnp.arange(0, size, batch))
    return loss / size, correct / size


class Measured(NamedTuple):
    """Results on a split; one number per member if there are members. unreadable: images left
    out.
    """

    loss: Array
    accuracy: Array
    unreadable: Sequence[str] = ()


Network = tuple[PyTree, PyTree]  # params and batch_stats


def measure_all(problem: Problem, networks: Sequence[Network], split: str) -> list[Measured]:
    """Mean cross-entropy in nats and accuracy of each network on a split; a stream is read once."""
    if problem.streamed:
        sums = problem.program(_batch_sums)
        return [Measured(*own) for own in streaming.measured(problem, networks, split, sums)]
    evaluate = problem.program(evaluation, split, axes=(0, 0, None, None))
    return [Measured(*evaluate(*network, *arrays(problem, split))) for network in networks]


def measure(problem: Problem, params: PyTree, batch_stats: PyTree, split: str) -> Measured:
    """Mean cross-entropy in nats and accuracy on a split."""
    return measure_all(problem, [(params, batch_stats)], split)[0]


def evaluate(
    problem: Problem, params: PyTree, batch_stats: PyTree, split: str
) -> tuple[Array, Array]:
    """(mean cross-entropy in nats, accuracy) on a split; one number per member if there are
    members.
    """
    return measure(problem, params, batch_stats, split)[:2]
