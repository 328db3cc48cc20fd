"""Command line: `python -m sparsity_jax.run --config NAME[:variant] --workdir DIR
[--config.x.y=value]`, NAME: a config of the library, or a file. `--list` tells their names, and
what configs can name; `--describe` what a config can say.
"""

import ast
import atexit
import functools
import gc
import logging
import os
import pathlib
import re
import shlex
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from sparsity_jax import catalog, compilation, lock, stopping, tables, watch

__all__ = ["SWEPT", "collect_rarely", "main", "parse", "swept", "without_sweep"]

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "Config of the run, of the library or a file: quickstart, sfw_oneshot:arch=vgg16, mine.py.",
    lock_config=True,
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of this run: rows, checkpoints and report; the same continues it."
)
_DESCRIBE = flags.DEFINE_bool(
    "describe",
    False,
    "Print every field of the config: explanation, type, default, value. Nothing runs.",
)
_LIST = flags.DEFINE_string(
    "list",
    None,
    "Print what configs can name, a line each: configs, variants, stages, models, measures, "
    "optimizers or data; all of them without a kind. Nothing runs.",
)
_MEMBER = flags.DEFINE_integer(
    "member",
    None,
    "Number of one member of a sweep, from 0, which runs alone in its folder of --workdir.",
    lower_bound=0,
)
_LAUNCHER = flags.DEFINE_enum(
    "launcher",
    None,
    ["ray"],
    "Hands the members of a sweep, or groups that share a program, to workers on a Ray cluster.",
)
_RESOURCES = flags.DEFINE_string(
    "resources",
    None,
    "What each worker of --launcher takes: cpu=2, or gpu=1, or gpu=0.5,cpu=4; default: cpu=1.",
)
_RAY_ADDRESS = flags.DEFINE_string(
    "ray_address",
    None,
    "HOST:PORT of the cluster's head; default: RAY_ADDRESS of the environment, else a local "
    "cluster that the command starts and ends.",
)
flags.DEFINE_alias("ray-address", "ray_address")
_RETRIES = flags.DEFINE_integer(
    "retries",
    None,
    "How often a lost worker of --launcher is replaced, per member; default: 3.",
    lower_bound=0,
)
_CACHE = flags.DEFINE_bool(compilation.FLAG, True, compilation.HELP)
watch.define(flags.FLAGS)
_LOCK_SECONDS = flags.DEFINE_float(
    "lock_seconds",
    lock.STALE_SECONDS,
    (
        "A run of another host that has been silent for so long is taken for ended, and its "
        "workdir taken over."
    ),
    lower_bound=1.0,
)


_CONFIG_FLAGS = ("-config", "--config")
SWEPT: dict[str, Any] = {}  # values of --config.sweep.PATH, by path


def parse(argv: list[str]) -> list[str]:
    """absl's parser; mistakes in --config and --config.field end in one line instead of a
    traceback.
    """
    given = sys.argv  # where the flag --config looks for fields
    try:
        sys.argv = _with_file(_with_kind(without_sweep(argv)))
        return flags.FLAGS(sys.argv)
    except flags.Error as error:  # of the config file or its variant it holds the whole traceback
        last = str(error).strip().splitlines()[-1].strip()
        sys.exit(f"error: {re.sub(r'^[a-z_.]*ConfigError: ', '', last)}")
    except (AttributeError, KeyError) as error:  # a field that the config does not have
        reason = error.args[0]
        while isinstance(reason, Exception) and reason.args:
            reason = reason.args[0]
        sys.exit(f"error: a --config.field names what the config does not have: {reason}")
    except (OSError, TypeError, ValueError, SyntaxError) as error:  # the config file itself
        sys.exit(f"error: {error}")
    finally:
        sys.argv = given  # the command that the run's environment tells


def without_sweep(argv: list[str]) -> list[str]:
    """The command line without `--config.sweep.PATH=VALUE`, which become `SWEPT`: any field may be
    swept, also where the config file sweeps nothing, while absl knows the fields of the file only.
    """
    rest = []
    arguments = iter(argv)
    for argument in arguments:
        flag, equals, text = argument.partition("=")
        match = re.fullmatch(r"--?config\.sweep\.(.+)", flag)
        if match is None:
            rest.append(argument)
        else:
            SWEPT[match[1]] = _value_of(text if equals else next(arguments, ""))
    return rest


def _with_file(argv: list[str]) -> list[str]:
    """The command line with the file of the config that `--config` names."""
    found = []
    previous = ""
    for argument in argv:
        flag, equals, given = argument.partition("=")
        if equals and flag in _CONFIG_FLAGS:
            argument = f"{flag}={catalog.located(given)}"
        elif previous in _CONFIG_FLAGS:
            argument = catalog.located(argument)
        found.append(argument)
        previous = argument
    return found


def _with_kind(argv: list[str]) -> list[str]:
    """The command line with an empty kind behind a `--list` that has none."""
    found = []
    for argument, following in zip(argv, [*argv[1:], "--"]):
        alone = argument == "--list" and following.startswith("-")
        found.append("--list=" if alone else argument)
    return found


def _value_of(text: str) -> Any:
    """The Python value that `text` is, such as `(0, 1)`, or the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def swept(config: dict, values: dict[str, Any]) -> dict:
    """`config`, with `values` by path in its sweep."""
    for path, value in values.items():
        *outer, last = path.split(".")
        inner = config.setdefault("sweep", {})
        for name in outer:
            inner = inner.setdefault(name, {})
            if not isinstance(inner, dict):
                sys.exit(f"error: --config.sweep.{path}: the config lists values of {name!r}.")
        inner[last] = value
    return config


def _report_unraisable(unraisable: Any) -> None:
    """What nobody can catch, but for the echo of a save that failed, once per array: the failure
    itself is told.
    """
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def collect_rarely() -> None:
    """Lets the garbage collector look at objects a few times only, and not at the end.

    Tracing makes millions that live on; to look at them again and again takes a tenth of a start.
    """
    gc.set_threshold(300_000, 20, 50)
    atexit.register(gc.freeze)


def _be_quiet() -> None:
    """Leaves out what libraries report of every file; their failures arrive as exceptions."""
    if not flags.FLAGS["verbosity"].present:
        absl_logging.set_verbosity(absl_logging.FATAL)
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    sys.unraisablehook = _report_unraisable


def _check_given(rest: list[str]) -> None:
    """Ends the process where a flag is missing. rest: what is no flag."""
    if rest:
        sys.exit(f"error: {rest[0]!r} is no flag; flags begin with --, e.g. --config.seed=1.")
    if _CONFIG.value is None:
        sys.exit(f"error: --config is missing; allowed: a file, {', '.join(catalog.files())}.")
    if _LAUNCHER.value is not None and _MEMBER.value is not None:
        sys.exit(
            "error: --member runs one member here, --launcher all elsewhere; give one of them."
        )
    _check_launcher()
    if not (_WORKDIR.value or _DESCRIBE.value):
        state = "missing" if _WORKDIR.value is None else "empty"
        sys.exit(f"error: --workdir is {state}; name a folder.")


def _check_launcher() -> None:
    """Ends the process where what is for a launcher is given without one, or a launcher with what
    it cannot launch.
    """
    distributed = flags.FLAGS["distributed"].value
    if _LAUNCHER.value is not None and distributed != "off":
        sys.exit(
            "error: --distributed is one run on several processes, --launcher hands its members to "
            "workers; give one of them."
        )
    given = {
        "--resources": _RESOURCES.value,
        "--ray-address": _RAY_ADDRESS.value,
        "--retries": _RETRIES.value,
    }
    for flag, value in given.items():
        if value is not None and _LAUNCHER.value is None:
            sys.exit(f"error: {flag} is for workers; give --launcher=ray too.")


def _runner() -> Callable[..., Any]:
    """The function that runs what the flags ask for: all here, one member, or all on workers."""
    from sparsity_jax import pipeline

    if _MEMBER.value is not None:
        return functools.partial(pipeline.run_member, number=_MEMBER.value)
    if _LAUNCHER.value is None:
        return pipeline.run

    from sparsity_jax.launching import launch

    given: dict[str, Any] = {
        "needs": _RESOURCES.value,
        "address": _RAY_ADDRESS.value,
        "retries": _RETRIES.value,
    }
    known = {name: value for name, value in given.items() if value is not None}
    return functools.partial(launch.run, keep_programs=_CACHE.value, **known)


def _typed() -> str:
    """The command line as it was typed."""
    started = [pathlib.Path(word).name for word in sys.orig_argv[:2]]
    program = "sparsity-jax run" if "sparsity-jax" in started else "python -m sparsity_jax.run"
    return f"{program} {shlex.join(sys.argv[1:])}"


def _print_names(kind: str) -> None:
    """Prints what configs can name."""
    from sparsity_jax import listing

    try:
        sys.stdout.write(listing.listed(kind))
    except tables.ConfigError as error:
        sys.exit(f"error: {error}")


def _end(sentence: str) -> NoReturn:
    """Ends the process after a mistake; one of several leaves the others."""
    from sparsity_jax import hosts

    if hosts.several():
        sys.stderr.write(f"{sentence}\n")
        hosts.end(told=True)
        os._exit(1)
    sys.exit(sentence)


def _carry_out(workdir: str) -> None:
    """Describes the config, or runs it."""
    from sparsity_jax import describe, hosts

    config = swept(_CONFIG.value.to_dict(), SWEPT)
    if _DESCRIBE.value:
        sys.stdout.write(describe.describe(config))
        return
    if _CACHE.value:
        compilation.keep()
    place, limits = watch.read(flags.FLAGS)
    if place is not None:
        hosts.begin(place, limits)
    run = _runner()
    config_file, _, _ = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")
    run(
        config,
        workdir,
        command=_typed(),
        config_file=config_file,
        lock_seconds=_LOCK_SECONDS.value,
    )
    hosts.end()


def main(argv: list[str]) -> None:
    """The command line, flags read; argv: what is left of it."""
    if _LIST.value is not None:
        _print_names(_LIST.value)
        return
    # not at the top: an exception that a signal raises inside these imports can crash them, see
    # `stopping.listen`
    from sparsity_jax import hosts, members, train, workdirs

    workdir = _WORKDIR.value or ""
    _check_given(argv[1:])
    _be_quiet()
    try:
        stopping.check()
        _carry_out(workdir)
    except (tables.ConfigError, hosts.EndedError) as error:
        _end(f"error: {error}")
    except train.NonFiniteLossError as error:
        _end(f"error: {error}\nThe last good checkpoint is in {workdir}.")
    except members.FailedError as error:
        _end(f"error: {error}\nThe same command runs these again, in {workdir}.")
    except OSError as error:  # a full disk, for example
        place = "" if workdir in str(error) else f"{workdir}: "
        sys.stderr.write(f"error: {place}{error}\n")
        if workdirs.numbers_in(pathlib.Path(workdir) / workdirs.FOLDER):
            again = "The same command goes on from the last checkpoint in"
            sys.stderr.write(f"{again} {workdir}.\n")
        hosts.end(told=True)
        os._exit(1)  # threads that still want to write would only add their own complaints
    except KeyboardInterrupt:
        sys.stderr.write(f"interrupted: the same command continues {workdir}\n")
        hosts.end(told=True)
        os._exit(130)  # orbax and jax threads would otherwise delay the exit
    except Exception as error:
        hosts.give_up(error)
        raise


if __name__ == "__main__":
    watch.begin(sys.argv[1:])
    stopping.listen()
    collect_rarely()
    app.run(main, flags_parser=parse)
