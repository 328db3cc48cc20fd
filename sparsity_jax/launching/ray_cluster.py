"""Workers as actors of Ray, on a cluster that is there or on a local one that lives as long as the
command.
"""

import concurrent.futures
import contextlib
import importlib.metadata
import logging
import os
import platform
import secrets
import shutil
import signal
import socket
import tempfile
import threading
import time
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import sparsity_jax
from sparsity_jax.launching import resources, worker
from sparsity_jax.launching.resources import Resources
from sparsity_jax.tables import ConfigError, reason_of
from sparsity_jax.types import Fields

__all__ = ["Cluster", "Handle", "Seen", "compare", "connected", "versions"]

_ADDRESS = "RAY_ADDRESS"
_WHERE = "HOST:PORT of a cluster's head, given on one of its machines"
_SECONDS = 10.0  # after which an address counts as one where nothing listens
_ANSWER_SECONDS = 60.0  # after which what listens there counts as no cluster
_SURVEY_SECONDS = 120.0  # after which a node does
_GONE_SECONDS = 40.0  # in which Ray notices that a node is gone, with some to spare
_AGAIN_SECONDS = 1.0  # between two questions to a node that may be gone
_STORE_BYTES = 256 * 2**20  # of a local cluster, which hands nothing large around
_LIBRARIES = ("jax", "jaxlib", "ray")
_PARTS = {"compute": 1, "talk": 1}  # threads of a worker: for members, and for questions


class Seen(NamedTuple):
    """What a node of the cluster says. versions: by name. workdir: whether it reads and writes the
    files of the workdir.
    """

    host: str
    versions: Fields
    workdir: bool


@contextlib.contextmanager
def connected(address: str, wanted: Resources) -> Iterator["Cluster"]:
    """The cluster at `address`, at RAY_ADDRESS, or a local one that ends with the context.

    Raises ConfigError where it cannot be reached, or no node has what a worker takes.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # a worker without a GPU must see none
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")
    address = address or os.environ.get(_ADDRESS, "")
    if address == "local":
        address = ""
    with contextlib.ExitStack() as ends:
        if address:
            options: Fields = dict(address=_reached(address))
        else:
            options = _local(ends)
        ray = _imported()
        ends.callback(ray.shutdown)
        # Ray writes there what it knows of lost workers, which the launch tells itself
        silence = ends.enter_context(open(os.devnull, "w", encoding="utf-8"))
        ends.enter_context(contextlib.redirect_stdout(silence))
        with _own_handlers(), _told(address), _answering(address):
            ray.init(
                log_to_driver=False,
                logging_level=logging.CRITICAL,
                configure_logging=True,
                **options,
            )
        cluster = Cluster(ray, wanted)
        cluster.check_room()
        yield cluster


def _imported() -> Any:
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            "--launcher", "ray", why=f"but {error}", allowed="with pip install '.[ray]'"
        ) from None
    return ray


def _reached(address: str) -> str:
    """`address`, if something listens there. Raises ConfigError if not."""
    host, colon, port = address.rpartition(":")
    if address == "auto":
        return address
    if not colon or not port.isdecimal() or "/" in host:
        raise ConfigError("--ray-address", address, allowed=_WHERE)
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_SECONDS).close()
    except (OSError, OverflowError) as error:
        why = f"which cannot be reached ({error})"
        raise ConfigError("--ray-address", address, why=why, allowed=_WHERE) from None
    return address


@contextlib.contextmanager
def _answering(address: str) -> Iterator[None]:
    """Ends the process with a sentence where the cluster at `address` does not answer: Ray would
    ask what listens there again and again, and cannot be stopped.
    """
    if not address:
        yield
        return
    why = f"which does not answer as a cluster of Ray within {_ANSWER_SECONDS:.0f} s"
    error = ConfigError("--ray-address", address, why=why, allowed=_WHERE)

    def give_up() -> None:
        os.write(2, f"error: {error}\n".encode())
        os._exit(1)

    watch = threading.Timer(_ANSWER_SECONDS, give_up)
    watch.daemon = True
    watch.start()
    try:
        yield
    finally:
        watch.cancel()


def _local(ends: contextlib.ExitStack) -> Fields:
    """Options of a local cluster, which listens on the loopback address and to this user alone."""
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # what Ray calls loopback only
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    folder = tempfile.mkdtemp(prefix="ray_")
    ends.callback(shutil.rmtree, folder, ignore_errors=True)
    return dict(
        address="local",
        include_dashboard=False,
        object_store_memory=_STORE_BYTES,
        _temp_dir=folder,
    )


@contextlib.contextmanager
def _own_handlers() -> Iterator[None]:
    """Signals stay with the handlers that they had before; Ray's own end the process at once."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _told(address: str) -> Iterator[None]:
    """What Ray cannot do inside, in whatever type, as a ConfigError."""
    try:
        yield
    except Exception as error:
        if not address:
            raise ConfigError("--launcher", "ray", why=f"but {reason_of(error)}") from None
        why = f"which cannot be joined: {reason_of(error)}"
        raise ConfigError("--ray-address", address, why=why, allowed=_WHERE) from None


class Cluster:
    """What a launch asks of Ray. wanted: what each worker takes."""

    def __init__(self, ray: Any, wanted: Resources):
        self._ray = ray
        self._wanted = wanted

    def _nodes(self) -> list[Fields]:
        return [node for node in self._ray.nodes() if node["Alive"]]

    def room(self) -> int:
        """How many workers the nodes have room for, also where others work on them now."""
        return sum(resources.workers_on(self._wanted, node["Resources"]) for node in self._nodes())

    def check_room(self) -> None:
        """Raises ConfigError where no node has room for a worker."""
        if self.room():
            return
        names = self._wanted.by_name()
        there = []
        for node in self._nodes():
            numbers = [f"{name}={node['Resources'].get(name, 0):g}" for name in names]
            there.append(f"{node['NodeManagerHostname']} with {', '.join(numbers)}")
        raise ConfigError(
            resources.FLAG,
            resources.told(self._wanted),
            why="which no node has",
            allowed=f"at most those of one node: {'; '.join(there)}",
        )

    def survey(self, workdir: Path) -> list[Seen]:
        """What every node says of its versions and of a file in `workdir`.

        One that is lost meanwhile is left out. Raises ConfigError where one does not answer, or
        lacks this library.
        """
        probe = workdir / f".probe_{uuid.uuid4().hex}"
        probe.write_text(probe.name, encoding="utf-8")
        try:
            asked = [(node, self._ask(node, probe)) for node in self._nodes()]
            answers = [self._answer(node, reference, probe) for node, reference in asked]
        finally:
            for path in workdir.glob(f"{probe.name}*"):
                path.unlink(missing_ok=True)
        return [answer for answer in answers if answer is not None]

    def _ask(self, node: Fields, probe: Path) -> Any:
        """Asks a node to look at the file `probe`."""
        strategy = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
        there = strategy(node["NodeID"], soft=False)
        task = self._ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(_look)
        return task.remote(str(probe.absolute()))

    def _answer(self, node: Fields, reference: Any, probe: Path) -> Seen | None:
        """What a node has answered; None of one that is lost, which Ray may notice late."""
        host = node["NodeManagerHostname"]
        patience = time.monotonic() + _GONE_SECONDS
        while True:
            try:
                versions, written = self._ray.get(reference, timeout=_SURVEY_SECONDS)
                break
            except Exception as error:  # Ray's own, and those of the node's imports
                if not self._is_alive(node):
                    return None
                cause = getattr(error, "cause", None)  # what the task raised
                is_final = cause is not None or isinstance(error, TimeoutError)
                if is_final or time.monotonic() > patience:
                    reason = reason_of(cause or error)
                    why = f"but its node {host} cannot run sparsity_jax: {reason}"
                    raise ConfigError("--launcher", "ray", why=why) from None
            time.sleep(_AGAIN_SECONDS)
            reference = self._ask(node, probe)
        sees = bool(written) and probe.with_name(written).is_file()
        return Seen(host, versions, sees)

    def _is_alive(self, node: Fields) -> bool:
        return any(other["NodeID"] == node["NodeID"] for other in self._nodes())

    def start(self, setup: worker.Setup) -> "Handle":
        """Asks for one more worker, which begins once a node has room for it."""
        wanted = self._wanted
        share = resources.memory_share(wanted)
        variables = dict(setup.environment)
        if share is not None:
            variables.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(share))
        actor = self._ray.remote(
            num_cpus=wanted.cpu,
            num_gpus=wanted.gpu,
            resources=dict(wanted.other),
            max_restarts=0,
            concurrency_groups=_PARTS,
        )(worker.Worker)
        return Handle(self._ray, actor.remote(setup._replace(environment=variables)))


class Handle:
    """One worker, wherever it is."""

    def __init__(self, ray: Any, actor: Any):
        self._ray = ray
        self._actor = actor

    def call(self, method: str, *arguments: Any) -> concurrent.futures.Future:
        """What the method of the `worker.Worker` gives, once it does; an exception where the worker
        is lost.
        """
        group = "compute" if method in ("prepare", "run") else "talk"
        bound = getattr(self._actor, method).options(concurrency_group=group)
        return bound.remote(*arguments).future()

    def end(self) -> None:
        """Ends the process of the worker."""
        self._ray.kill(self._actor)


def versions() -> Fields:
    """Those of this process that all nodes must share."""
    major, minor, _ = platform.python_version_tuple()
    own = f"{sparsity_jax.__version__} (source {_source()})"
    found: Fields = {"python": f"{major}.{minor}", "sparsity_jax": own}
    for name in _LIBRARIES:
        found[name] = importlib.metadata.version(name)
    return found


def _source() -> str:
    """A digest of the library's files: copies of one version may differ while it is worked on."""
    folder = Path(sparsity_jax.__file__).parent
    total = 0
    for path in sorted(folder.rglob("*.py")):
        total = zlib.crc32(path.read_bytes(), total)
    return f"{total:08x}"


def compare(here: Fields, seen: list[Seen]) -> None:
    """Raises ConfigError where a node has another version than this process.

    here: what `versions` gives.
    """
    for node in seen:
        for name, version in here.items():
            other = node.versions.get(name)
            if other != version:
                raise ConfigError(
                    "--launcher",
                    "ray",
                    why=f"but its node {node.host} has {name} {other}",
                    allowed=f"{version} on all nodes, as here",
                )


def _look(probe: str) -> tuple[Fields, str]:
    """(versions here, name of the answer written beside the file `probe` if that can be read)."""
    path = Path(probe)
    answer = path.with_name(f"{path.name}_{uuid.uuid4().hex}")
    try:
        if path.read_text(encoding="utf-8") != path.name:
            return versions(), ""
        answer.touch()
    except OSError:
        return versions(), ""
    return versions(), answer.name
