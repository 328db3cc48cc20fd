"""One training step, the loop over it, and evaluation: everything a stage does to a network.

State and numbers (learning rate, radii, ...) are arguments of one compiled step. A sweep whose
members share a program puts a leading axis on both and maps the step over it; `Problem.lift` is the
only place that knows.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparsity_jax import (
    data,
    groups,
    interface,
    losses,
    masks,
    models,
    optim,
    polytopes,
    scores,
    stopping,
    stream,
    tables,
    trees,
)

PyTree = Any


class Metrics(NamedTuple):
    """Sums over the steps of an epoch so far. bad_step: first step with a non-finite loss, -1 while
    there is none.
    """

    loss: jax.Array
    correct: jax.Array
    examples: jax.Array
    bad_step: jax.Array


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
    step: jax.Array
    key: jax.Array
    metrics: Metrics


class NonFiniteLossError(FloatingPointError):
    """The training loss became infinite or NaN; the message names stage, epoch and step."""


class Problem(NamedTuple):
    """What stays the same during a run: network, data on the device, and where to compute."""

    model: models.Model
    train_images: (
        jax.Array | None
    )  # uint8 [N, H, W, C]; these four are None where the data is streamed
    train_labels: jax.Array | None  # int32 [N]
    test_images: jax.Array | None
    test_labels: jax.Array | None
    dataset: data.Dataset  # for names, sizes and statistics
    mesh: jax.sharding.Mesh | None
    members: int | None  # size of the leading axis of states; None: no such axis
    eval_batch_size: int
    steps_per_call: int  # 0: automatic
    compiled: dict  # functions by what they depend on, so that visits and members share them
    # dict of arrays by path with which every network starts instead of its fresh ones
    pretrained: PyTree = ()
    keep_zeros: bool = False  # whether weights that are zero in `pretrained` are masked
    sample: data.FixedSample = data.FixedSample()  # the images of `examples`

    def lift(self, function: Callable, in_axes: Any = 0) -> Callable:
        """`function` of one member's state, for the states of all members."""
        return function if self.members is None else jax.vmap(function, in_axes)

    def once(self, name: Any, make: Callable[[], Any]) -> Any:
        """The compiled function `name`, made on first use."""
        if name not in self.compiled:
            self.compiled[name] = make()
        return self.compiled[name]

    def shard(self, batch: jax.Array) -> jax.Array:
        """Splits a batch over the devices of the mesh."""
        if (
            self.mesh is None or len(batch) % self.mesh.size
        ):  # a data set's last batch may not divide
            return batch
        spec = jax.sharding.PartitionSpec("batch", *[None] * (batch.ndim - 1))
        return jax.lax.with_sharding_constraint(batch, jax.sharding.NamedSharding(self.mesh, spec))

    def place(self, tree: PyTree) -> PyTree:
        """`tree` on the device, or copied to every device of the mesh."""
        if self.mesh is None:
            return jax.device_put(tree)
        return jax.device_put(
            tree, jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec())
        )

    @property
    def streamed(self) -> bool:
        return self.train_images is None

    def size(self, split: str) -> int:
        """Number of images of "train" or "test"."""
        return getattr(self.dataset, split).images.shape[0]

    def put(self, batch: tuple[np.ndarray, ...]) -> tuple[jax.Array, ...]:
        """Arrays of a batch on the device, or split over those of the mesh."""
        if self.mesh is None or len(batch[0]) % self.mesh.size:
            return self.place(batch)
        spec = jax.sharding.PartitionSpec("batch")
        return jax.device_put(batch, jax.sharding.NamedSharding(self.mesh, spec))

    def batches(self, split: str, batch_size: int = 0) -> Iterator[stream.Batch]:
        """A streamed split in order, for evaluation; `stream.eval_batches`."""
        batch_size = min(batch_size or self.eval_batch_size, self.size(split))
        return stream.eval_batches(
            getattr(self.dataset, split).images, batch_size=batch_size, put=self.put
        )

    def examples(self, split: str, num: int) -> tuple[jax.Array, jax.Array]:
        """`num` images and labels of a split, or all if it has no more; those of `sample`, streamed
        or in memory.
        """
        size = self.size(split)
        if not self.streamed and num >= size:
            return arrays(self, split)
        indices = self.sample.indices(size, num)
        if self.streamed:
            take = lambda: self.place(stream.examples(getattr(self.dataset, split).images, indices))
        else:
            take = lambda: tuple(array[indices] for array in arrays(self, split))
        return self.once(("examples", split, num), take)

    def images(self, batch: jax.Array) -> jax.Array:
        """uint8 images as the network's normalised input; train images stored larger are resized
        when evaluated.
        """
        inputs, shape = self.shard(batch), self.dataset.test.images.shape[1:]
        inputs = data.preprocess(inputs, self.dataset.mean, self.dataset.std)
        return (
            inputs
            if inputs.shape[1:] == shape
            else jax.image.resize(inputs, (len(inputs), *shape), "linear")
        )

    def init(self, key: jax.Array) -> PyTree:
        """Fresh variables, none of them pretrained; key: a root key."""
        shape = (1, *self.dataset.test.images.shape[1:])
        return self.model.init(jax.random.fold_in(key, 0), jax.ShapeDtypeStruct(shape, jnp.float32))


def build_problem(
    dataset: data.Dataset,
    model: models.Model,
    *,
    mesh: int = 1,
    members: int | None = None,
    eval_batch_size: int = 1000,
    steps_per_call: int = 0,
    sample: data.FixedSample = data.FixedSample(),  # noqa: B008 - a constant
) -> Problem:
    """Puts data in memory on the device; of a stream some images are decoded to find mistakes, see
    `data.look_at`.

    mesh: number of local devices that share each batch, 0 for all. sample: see `Problem.examples`.
    """
    if isinstance(dataset.train.images, data.Stream):
        splits = dict(
            train=data.look_at(dataset.train.images), test=data.look_at(dataset.test.images)
        )
        dataset = dataset._replace(
            **{name: data.Split(images, None) for name, images in splits.items()}
        )
    devices = jax.local_devices()[: mesh or None]
    grid = jax.sharding.Mesh(np.array(devices), ("batch",)) if len(devices) > 1 else None
    problem = Problem(
        model,
        *[None] * 4,
        dataset,
        grid,
        members,
        eval_batch_size,
        steps_per_call,
        {},
        sample=sample,
    )
    if isinstance(dataset.train.images, data.Stream):
        return problem
    arrays = problem.place((*dataset.train, *dataset.test))
    return problem._replace(**dict(zip(Problem._fields[1:5], arrays, strict=True)))


def shapes_of(problem: Problem) -> PyTree:
    """Shape structs of one member's params."""
    return problem.once("shapes", lambda: jax.eval_shape(problem.init, jax.random.key(0))["params"])


def key_of(seed: int) -> jax.Array:
    """Raw data of the root key of `seed`."""
    return jax.random.key_data(jax.random.key(seed))


def no_metrics() -> Metrics:
    return Metrics(
        jnp.zeros(()),
        jnp.zeros((), jnp.int32),
        jnp.zeros((), jnp.int32),
        jnp.asarray(-1, jnp.int32),
    )


def initial_variables(problem: Problem, key: jax.Array, pretrained: PyTree = ()) -> PyTree:
    """The variables a run starts from: fresh ones under the raw `key`, but for those in
    `pretrained`.

    pretrained: `problem.pretrained`, an argument so that compiled programs do not contain its
    arrays. They are copied, since a training step may take over the memory of its state.
    """
    arrays = dict(pretrained)
    first = lambda path, leaf: jnp.copy(arrays[path]) if path in arrays else leaf
    return trees.map_named(first, problem.init(jax.random.wrap_key_data(key)))


def create_state(problem: Problem, key: jax.Array, pretrained: PyTree = ()) -> State:
    """A network as `initial_variables` makes it, dense unless `problem.keep_zeros`; key: from
    `key_of`.
    """
    variables = initial_variables(problem, key, pretrained)
    params = variables["params"]
    kept = masks.nonzero(params) if problem.keep_zeros else masks.full(params)
    return State(
        params, variables["batch_stats"], kept, (), jnp.zeros((), jnp.int32), key, no_metrics()
    )


@tables.option
class Fit(interface.Stage):
    """A checked training: what its compiled step depends on. recipe: from `optim.check`.

    carry: hands its momentum on, and starts from what it is handed. track: options of the tracked
    importance, sorted pairs of `scores.track_saliency`, or () for none. growth: None, or what acts
    on the gradients before the optimizer: hashable, with `make(problem, key) ->
    optax.GradientTransformation`, key: the member's root key (raw), and with `log_every`, the most
    steps between two updates.
    """

    epochs: int
    batch_size: int
    recipe: optim.Recipe
    loss: tuple[str, tuple]
    augment: str
    start: str
    shift_inside: bool
    evaluate_every: int
    carry: bool = False
    track: tuple = ()
    growth: Any = None

    def check_streamed(self) -> None:
        if self.augment == "resized_crop_flip":
            raise tables.ConfigError(
                "augment", self.augment, why="but a stream crops already", allowed="'flip'"
            )

    def check_network(self, problem: Problem, visits: int) -> None:
        devices = problem.mesh.size if problem.mesh else 1
        check_batch(self, problem)
        if self.batch_size % devices:
            raise tables.ConfigError(
                "batch_size", self.batch_size, allowed=f"multiples of {devices}, the devices"
            )
        steps = self.epochs * self.steps_per_epoch(problem)
        if steps >= 2**31:
            raise tables.ConfigError(
                "epochs", self.epochs, why=f"{steps:,} steps", allowed=f"below {2**31:,} steps"
            )
        with tables.within("optimizer"):
            check_recipe(self.recipe, problem)

    def steps_per_epoch(self, problem: Problem) -> int:
        return problem.size("train") // self.batch_size

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
        self, problem: Problem, numbers: dict[str, Any], key: jax.Array
    ) -> optax.GradientTransformationExtraArgs:
        """The optimizer, tracker included. key: raw data of the root key, which the initial weights
        are made of.
        """
        spe = self.steps_per_epoch(problem)
        if self.growth is not None:
            numbers = dict(numbers)
            first = self.growth.make(problem, numbers.pop("key"))
            return optax.chain(first, optim.make(self.recipe, numbers, self.epochs, spe))
        tx = optim.make(self.recipe, numbers, self.epochs, spe)
        if not self.track:
            return tx
        options = dict(self.track)
        use_l2, use_init = options.pop("use_l2"), options.pop("use_init")

        def statistic(params, grads):
            init = (
                initial_variables(problem, key, problem.pretrained)["params"] if use_init else None
            )
            return scores.weight_saliency(params, grads, use_l2=use_l2, init=init)

        return scores.track_saliency(tx, steps_per_epoch=spe, statistic=statistic, **options)

    def hand_on(self, opt_state: PyTree) -> interface.Carried | tuple[()]:
        if not (self.carry or self.track):
            return ()
        momentum = optim.momentum_of(opt_state) if self.carry else ()
        return interface.Carried(
            momentum, optax.tree.get(opt_state, "saliency") if self.track else ()
        )

    def carried(
        self, state: State, before: interface.Carried | tuple[()]
    ) -> interface.Carried | tuple[()]:
        if not (self.carry or self.track):
            return ()
        wide = lambda leaf: jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32))
        steps = jnp.zeros(jax.tree.leaves(state.step)[0].shape, jnp.int32)
        momentum = optim.HeavyBallState(steps, state.params) if self.carry else ()
        return interface.Carried(momentum, jax.tree.map(wide, state.params) if self.track else ())

    def begin(
        self, problem: Problem, state: State, settings: Sequence["Fit"], place: interface.Place
    ) -> State:
        return begin_members(problem, state, settings, numbers_of_fits(problem, state, settings))

    def run(
        self,
        problem: Problem,
        state: State,
        settings: Sequence["Fit"],
        place: interface.Place,
        rows: list[list[dict]],
    ) -> Iterator["Update"]:
        numbers = numbers_of_fits(problem, state, settings)
        yield from fit_epochs(problem, state, self, numbers, place.position, place.name, rows[0])


def check_batch(chosen: Any, problem: Problem) -> None:
    """Raises ConfigError for a batch larger than the train set, or an augmentation that does not
    fit its images.
    """
    size = problem.size("train")
    if chosen.batch_size > size:
        raise tables.ConfigError(
            "batch_size", chosen.batch_size, allowed=f"up to {size}, the train set"
        )
    data.make_augmentation(chosen.augment, problem.dataset)


def check_recipe(recipe: optim.Recipe, problem: Problem) -> None:
    """Raises ConfigError for an optimizer that does not fit the network's params, such as rules
    that decide none.
    """
    optim.numbers(recipe, shapes_of(problem), None)


def check_memory(needed: int, what: str) -> None:
    """Raises ConfigError for arrays of more bytes than the device has. what: takes them, e.g.
    `whose weights`.
    """
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    tables.check_memory(needed, f"{what} take", stats.get("bytes_limit") or 0)


def numbers_of_fits(problem: Problem, state: State, fits: Sequence[Fit]) -> dict[str, Any]:
    """The traced numbers of the optimizers of all members."""
    return numbers_of(problem, state, [fit.recipe for fit in fits])


def begin_members(
    problem: Problem, state: State, fits: Sequence[Fit], numbers: dict[str, Any]
) -> State:
    """The state at the start of a training of all members, see `begin`."""
    if fits[0].start == "init":
        state = initial_state(problem, state.key)
    compiled = problem.once(
        ("begin", *fits[0].beginning()),
        lambda: jax.jit(
            problem.lift(lambda state, numbers: begin(problem, state, fits[0], numbers))
        ),
    )
    return compiled(state, numbers)


def initial_state(problem: Problem, key: jax.Array) -> State:
    """The networks at the start of a run, one per member; key: their root keys, from `key_of`,
    stacked for members.

    One program for the whole run: random numbers of many shapes take longer to compile than most
    stages.
    """
    create = lambda key, arrays: create_state(problem, key, arrays)
    compiled = problem.once("create", lambda: jax.jit(problem.lift(create, (0, None))))
    return compiled(key, problem.pretrained)


def begin(problem: Problem, state: State, fit: Fit, numbers: dict[str, Any]) -> State:
    """The state at the start of a `train` stage, of one member: its weights in the feasible sets.

    A stage that starts from the first weights is given those, see `initial_state`.
    """
    params = state.params
    if fit.shift_inside:
        params = polytopes.shift_inside(params, numbers["sets"])
    params = masks.apply(params, state.masks)
    opt_state = fit.transformation(problem, numbers, state.key).init(params)
    if (
        fit.carry
        and isinstance(state.opt_state, interface.Carried)
        and state.opt_state.momentum != ()
    ):
        opt_state = optim.with_momentum(opt_state, state.opt_state.momentum)
    zero = jnp.zeros((), jnp.int32)
    return state._replace(params=params, opt_state=opt_state, step=zero, metrics=no_metrics())


def numbers_of(problem: Problem, state: State, recipes: list[optim.Recipe]) -> dict[str, Any]:
    """The traced numbers of every member's recipe (stacked if there are members), radii included.

    Norms of the initialisation are measured with the member's own key; the network itself is left
    alone.
    """
    variables = jax.eval_shape(problem.init, jax.random.key(0))
    shapes, order = variables["params"], None
    norms = [None] * len(recipes)
    if any(map(optim.needs_norms, recipes)):
        init = lambda key: problem.init(key)["params"]
        measure = lambda key: polytopes.mean_norms(
            init, jax.random.fold_in(jax.random.wrap_key_data(key), 1)
        )
        measured = problem.once("norms", lambda: jax.jit(problem.lift(measure)))(state.key)
        measured = jax.device_get(measured)
        take = lambda i: (
            measured if problem.members is None else jax.tree.map(lambda leaf: leaf[i], measured)
        )
        norms = [take(i) for i in range(len(recipes))]
        if any(recipe.norms == "per_shape" for recipe in recipes):
            order = problem.once("network order", lambda: network_order(problem, variables))
    each = [
        optim.numbers(recipe, shapes, norm, order)
        for recipe, norm in zip(recipes, norms, strict=True)
    ]
    if problem.members is None:
        return problem.place(each[0])
    return problem.place(jax.tree.map(lambda *leaves: jnp.stack(leaves), *each))


def network_order(problem: Problem, variables: PyTree) -> list[str]:
    """Paths of the params in the network's order. variables: arrays or shape structs; nothing is
    computed.
    """
    image = jnp.zeros((1, *problem.dataset.test.images.shape[1:]))
    others = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), variables["batch_stats"])
    apply = lambda params: problem.model.apply({"params": params, "batch_stats": others}, image)
    return groups.order_of_use(apply, variables["params"])


def make_step(problem: Problem, fit: Fit) -> Callable:
    """`step(state, numbers, order, position, images, labels) -> state`, of one member, on data in
    memory.

    order: int32 [N], this epoch's examples. position: int, the stage's in the pipeline; it decides
        the random numbers.
    """
    spe, step_on = fit.steps_per_epoch(problem), make_batch_step(problem, fit)

    def step(state: State, numbers, order, position, images, labels) -> State:
        chosen = jax.lax.dynamic_slice_in_dim(
            order, (state.step % spe) * fit.batch_size, fit.batch_size
        )
        return step_on(state, numbers, position, images[chosen], labels[chosen])

    return step


def make_batch_step(problem: Problem, fit: Fit) -> Callable:
    """`step(state, numbers, position, images, labels) -> state`, of one member, on one batch."""
    spe = fit.steps_per_epoch(problem)
    augment = data.make_augmentation(fit.augment, problem.dataset)
    loss_rule, loss_options = losses.LOSSES[fit.loss[0]], dict(fit.loss[1])

    def step(state: State, numbers, position, images, labels) -> State:
        key = jax.random.fold_in(stage_key(state.key, position), state.step)
        inputs = problem.images(augment(key, problem.shard(images)))
        targets = problem.shard(labels)

        def loss_fn(params):
            variables = {"params": params, "batch_stats": state.batch_stats}
            logits, batch_stats = problem.model.apply_train(
                variables, inputs, jax.random.fold_in(key, 1)
            )
            return loss_rule(logits, targets, **loss_options).mean(), (batch_stats, logits)

        (loss, (batch_stats, logits)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            state.params
        )
        tx = fit.transformation(problem, numbers, state.key)
        grads = masks.apply(grads, state.masks)
        updates, opt_state = tx.update(grads, state.opt_state, state.params, value=loss)
        params = optax.apply_updates(state.params, updates)
        first = state.step % spe == 0
        old = jax.tree.map(lambda x: jnp.where(first, jnp.zeros_like(x), x), state.metrics)
        bad = state.metrics.bad_step
        metrics = Metrics(
            old.loss + loss,
            old.correct + jnp.sum(losses.correct(logits, targets), dtype=jnp.int32),
            old.examples + fit.batch_size,
            jnp.where((bad < 0) & ~jnp.isfinite(loss), state.step, bad),
        )
        return State(
            masks.apply(params, state.masks),
            batch_stats,
            state.masks,
            opt_state,
            state.step + 1,
            state.key,
            metrics,
        )

    return step


def stage_key(key: jax.Array, position: int) -> jax.Array:
    """The key of the pipeline's stage number `position`; 0 and 1 belong to initialisation."""
    return jax.random.fold_in(jax.random.wrap_key_data(key), 2 + position)


def convolves(params: PyTree, stacked: bool = False) -> bool:
    """Whether some kernel is a convolution's. stacked: params have a leading axis of members."""
    return any(
        trees.is_kernel(path) and leaf.ndim - stacked > 2
        for path, leaf in trees.named_leaves(params).items()
    )


def steps_per_call(problem: Problem, state: State, steps_per_epoch: int) -> int:
    """How many steps a compiled call makes, at most an epoch's.

    XLA's CPU backend compiles convolution gradients inside a scan to a naive loop, so there they
    run one by one; dense networks and accelerators scan a whole epoch.
    """
    size = problem.steps_per_call
    if not size:
        convolutions = convolves(state.params, problem.members is not None)
        size = 1 if convolutions and jax.default_backend() == "cpu" else steps_per_epoch
    return min(size, steps_per_epoch)


class Update(NamedTuple):
    """What a stage reports: its state so far, new rows (one list a member), and the share done."""

    state: State
    rows: list[list[dict]]
    done: float


def fit_epochs(
    problem: Problem,
    state: State,
    fit: Fit,
    numbers: dict[str, Any],
    position: int,
    where: str = "train",
    rows: Sequence[dict] = (),
) -> Iterator[Update]:
    """Trains from `state` (from `begin`, or any state this yielded) to the end; yields after every
    compiled call.

    Rows of an epoch: epoch, step, learning_rate, train_loss, train_accuracy, seconds; on evaluated
    epochs test_loss and test_accuracy. Raises NonFiniteLossError naming the first bad step. rows:
    those that came with the states so far.
    A step on streamed data that met unreadable images has a row of its own, with step, unreadable
    (how many) and unreadable_images (which); the epoch's row sums them up and names the first five.
    Those of the test images are its test_unreadable.
    """
    spe = fit.steps_per_epoch(problem)
    started = time.perf_counter() - max((row.get("seconds", 0.0) for row in rows), default=0.0)
    met = [row for row in rows if "unreadable" in row and "epoch" not in row]
    train_on = calls_on_stream if problem.streamed else calls_in_memory
    with contextlib.closing(
        train_on(problem, state, fit, numbers, position, names_in(met))
    ) as calls:
        for state, step, unreadable in calls:
            new = interface.rows_per_member(problem)
            if unreadable:
                row = dict(step=step, unreadable=len(unreadable), unreadable_images=[*unreadable])
                met.append(row)
                new[0].append(row)
            if step % spe == 0:
                check_finite(state, spe, where)
                seconds = time.perf_counter() - started
                lost = names_in(row for row in met if row["step"] > step - spe)
                sums = dict(unreadable=len(lost), unreadable_images=lost[:5]) if lost else {}
                ends = epoch_rows(problem, state, fit, step // spe, seconds)
                for own, (row,) in zip(new, ends, strict=True):
                    own.append(row | sums)
            yield Update(state, new, step / (fit.epochs * spe))


def names_in(rows: Iterable[dict]) -> list[str]:
    """The unreadable images that rows name."""
    return [name for row in rows for name in row["unreadable_images"]]


# (state after a compiled call, steps so far, images that could not be read) of each call
Calls = Generator[tuple[State, int, Sequence[str]], None, None]


def calls_in_memory(
    problem: Problem,
    state: State,
    fit: Fit,
    numbers: dict[str, Any],
    position: int,
    lost: Sequence[str],
) -> Calls:
    """Training on data in memory: several steps per call, a new order of the examples per epoch."""
    del lost
    spe = fit.steps_per_epoch(problem)
    logged = fit.growth.log_every if fit.growth else spe
    most = steps_per_call(problem, state, spe)

    def shuffle(key: jax.Array, position: int, epoch: int) -> jax.Array:
        key = jax.random.fold_in(stage_key(key, position), 2**31 - 1 - epoch)
        return jax.random.permutation(key, problem.size("train"))

    orders = problem.once("order", lambda: jax.jit(problem.lift(shuffle, (0, None, None))))
    order, ordered = None, -1  # and the epoch it is of
    step = int(np.ravel(state.step)[0])
    while step < fit.epochs * spe:
        stopping.check()
        epoch, at = divmod(step, spe)
        if epoch != ordered:
            order, ordered = orders(state.key, position, epoch), epoch
        # the rest: a checkpoint may be of calls of another size
        size = min(most, spe - at, logged - at % logged)
        compile_it = functools.partial(compile_steps, problem, fit, size)
        call = problem.once((fit.program(), size), compile_it)
        state = call(state, numbers, order, position, problem.train_images, problem.train_labels)
        step += size
        yield state, step, ()


def compile_steps(problem: Problem, fit: Fit, size: int) -> Callable:
    """`size` times `make_step` as a program of all members."""
    step = make_step(problem, fit)

    def call(state: State, *arguments: Any) -> State:
        return jax.lax.scan(lambda state, _: (step(state, *arguments), None), state, None, size)[0]

    axes = (0, 0, 0, None, None, None)
    return jitted(problem.lift(step if size == 1 else call, axes))


def jitted(step: Callable) -> Callable:
    """`step` compiled; it may take over the memory of its state, which costs copies on CPU."""
    return jax.jit(step, donate_argnums=() if jax.default_backend() == "cpu" else (0,))


def calls_on_stream(
    problem: Problem,
    state: State,
    fit: Fit,
    numbers: dict[str, Any],
    position: int,
    lost: Sequence[str],
) -> Calls:
    """Training on streamed data: one step per call, on a batch that was read ahead.

    lost: images that were unreadable before.
    """
    step = int(state.step)
    compile_it = lambda: jitted(make_batch_step(problem, fit))
    call = problem.once((fit.program(), "batch"), compile_it)
    batches = stream.train_batches(
        problem.dataset.train.images,
        [*np.asarray(state.key).tolist(), position],
        batch_size=fit.batch_size,
        epochs=fit.epochs,
        start=step,
        put=problem.put,
        lost=lost,
    )
    with contextlib.closing(batches):
        for batch in batches:
            stopping.check()
            state = call(state, numbers, position, batch.images, batch.labels)
            step += 1
            yield state, step, batch.unreadable


def check_finite(state: State, steps_per_epoch: int, where: str) -> None:
    """Raises NonFiniteLossError if some loss so far was not finite."""
    bad = np.ravel(jax.device_get(state.metrics.bad_step))
    if (bad >= 0).any():
        which = int(np.argmin(np.where(bad >= 0, bad, np.iinfo(bad.dtype).max)))
        member, first = f" of member {which}" if bad.size > 1 else "", int(bad[which])
        raise NonFiniteLossError(
            f"{where}: the training loss{member} is not finite at step {first} (epoch "
            f"{first // steps_per_epoch + 1}). "
            "A lower learning rate, or a smaller tau for Frank-Wolfe, usually helps."
        )


def epoch_rows(
    problem: Problem, state: State, fit: Fit, epoch: int, seconds: float
) -> list[list[dict]]:
    rate = optim.learning_rate(state.opt_state)
    values = {
        "learning_rate": rate,
        "train_loss": state.metrics.loss / fit.steps_per_epoch(problem),
        "train_accuracy": state.metrics.correct / state.metrics.examples,
    }
    unreadable = {}
    if epoch % fit.evaluate_every == 0 or epoch == fit.epochs:
        found = measure(problem, state.params, state.batch_stats, "test")
        values["test_loss"], values["test_accuracy"] = found.loss, found.accuracy
        unreadable = dict(test_unreadable=len(found.unreadable)) if found.unreadable else {}
    step = epoch * fit.steps_per_epoch(problem)
    return member_rows(
        problem, values, epoch=epoch, step=step, seconds=round(seconds, 3), **unreadable
    )


def member_rows(problem: Problem, values: dict[str, Any], **common: Any) -> list[list[dict]]:
    """One row a member of `values` (scalars, or arrays with a leading member axis), fetched at
    once.
    """
    values = jax.device_get(values)
    take = lambda leaf, i: np.asarray(leaf if problem.members is None else leaf[i]).tolist()
    each = range(problem.members or 1)
    return [[{**common, **jax.tree.map(lambda leaf, i=i: take(leaf, i), values)}] for i in each]


def batch_sums(problem: Problem) -> Callable:
    """`(params, batch_stats, images, labels) -> (sum of losses, number of right ones)`, where the
    label is not -1.
    """

    def sums(params, batch_stats, images, labels):
        logits = problem.model.apply(
            {"params": params, "batch_stats": batch_stats}, problem.images(images)
        )
        counts = labels >= 0
        loss = jnp.where(counts, losses.cross_entropy(logits, jnp.maximum(labels, 0)), 0)
        return jnp.sum(loss), jnp.sum(losses.correct(logits, labels), dtype=jnp.int32)

    return sums


def evaluation(problem: Problem, split: str) -> Callable:
    """`(params, batch_stats, images, labels) -> (mean loss, accuracy)` over a whole split in
    memory, of one member.
    """
    size = problem.size(split)
    batch, sums = min(problem.eval_batch_size, size), batch_sums(problem)

    def evaluate(params, batch_stats, images, labels):
        def add(total, start):
            index = start + jnp.arange(batch)
            inside = jnp.minimum(index, size - 1)
            found = sums(
                params, batch_stats, images[inside], jnp.where(index < size, labels[inside], -1)
            )
            return jax.tree.map(jnp.add, total, found), None

        zero = (jnp.zeros(()), jnp.zeros((), jnp.int32))
        (loss, correct), _ = jax.lax.scan(add, zero, jnp.arange(0, size, batch))
        return loss / size, correct / size

    return evaluate


def arrays(problem: Problem, split: str) -> tuple[jax.Array, jax.Array]:
    """Images and labels of "train" or "test", in memory."""
    if split == "train":
        return problem.train_images, problem.train_labels
    return problem.test_images, problem.test_labels


class Measured(NamedTuple):
    """Results on a split; one number a member if there are members. unreadable: images left out."""

    loss: jax.Array
    accuracy: jax.Array
    unreadable: Sequence[str] = ()


def measure(problem: Problem, params: PyTree, batch_stats: PyTree, split: str) -> Measured:
    """Mean cross-entropy in nats and accuracy on a split."""
    if problem.streamed:
        sums = problem.once("sums", lambda: jax.jit(batch_sums(problem)))
        (found,), unreadable = over_stream(
            problem, split, [functools.partial(sums, params, batch_stats)]
        )
        return Measured(*found, unreadable)
    compile_it = lambda: jax.jit(problem.lift(evaluation(problem, split), (0, 0, None, None)))
    found = problem.once(("evaluate", split), compile_it)(
        params, batch_stats, *arrays(problem, split)
    )
    return Measured(*found)


def over_stream(
    problem: Problem, split: str, looks: Sequence[Callable]
) -> tuple[list[tuple[jax.Array, jax.Array]], list[str]]:
    """((mean loss, accuracy) of each look, unreadable images) of a streamed split, read once.

    looks: `(images, labels) -> sums` as of `batch_sums`.
    """
    totals: list = [(0.0, 0)] * len(looks)
    unreadable: list[str] = []
    with contextlib.closing(problem.batches(split)) as batches:
        for batch in batches:
            stopping.check()
            sums = [look(batch.images, batch.labels) for look in looks]
            totals = [jax.tree.map(jnp.add, *pair) for pair in zip(totals, sums, strict=True)]
            unreadable += batch.unreadable
    count = max(problem.size(split) - len(unreadable), 1)
    return [(loss / count, correct / count) for loss, correct in totals], unreadable


def evaluate(
    problem: Problem, params: PyTree, batch_stats: PyTree, split: str
) -> tuple[jax.Array, jax.Array]:
    """(mean cross-entropy in nats, accuracy) on a split; one number a member if there are
    members.
    """
    return measure(problem, params, batch_stats, split)[:2]
