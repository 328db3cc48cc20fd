"""Rows to Weights & Biases and to MLflow, for a run whose `config.log` asks for it."""

import importlib.util
import json
import pathlib
import sys
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from sparsity_jax.report import files
from sparsity_jax.tables import ConfigError
from sparsity_jax.types import AnyPath, Config

__all__ = ["TRACKERS", "Mlflow", "Tracker", "Wandb", "begin", "check"]

_MOST_PARAMETERS = 100  # that MLflow takes at once


class Tracker(Protocol):
    """A service that shows numbers of runs: made at the start of one, closed at its end."""

    def __init__(self, group: str, name: str, config: Config) -> None: ...

    def add(self, stage: str, numbers: Mapping[str, float], step: int) -> None:
        """Sends numbers by tag, as TensorBoard has them, at a step of a stage."""

    def close(self) -> None:
        """Sends the rest."""


class Wandb:
    """A run of Weights & Biases. Steps of a stage are its number `STAGE/step`."""

    def __init__(self, group: str, name: str, config: Config) -> None:
        import wandb

        self._run = wandb.init(project="sparsity_jax", group=group, name=name, config=config)

    def add(self, stage: str, numbers: Mapping[str, float], step: int) -> None:
        """Sends numbers; every stage counts its steps anew, which the run's own step could not."""
        self._run.log({**numbers, f"{stage}/step": step})

    def close(self) -> None:
        """Ends the run."""
        self._run.finish()


class Mlflow:
    """A run of MLflow, whose parameters are the settings."""

    def __init__(self, group: str, name: str, config: Config) -> None:
        import mlflow

        self._mlflow: Any = mlflow
        mlflow.start_run(run_name=f"{group}: {name}", nested=True)
        settings = [(path, json.dumps(value)) for path, value in files.flatten(config)]
        for first in range(0, len(settings), _MOST_PARAMETERS):
            mlflow.log_params(dict(settings[first : first + _MOST_PARAMETERS]))

    def add(self, stage: str, numbers: Mapping[str, float], step: int) -> None:
        """Sends numbers; their tags name the stage."""
        del stage
        self._mlflow.log_metrics(dict(numbers), step=step)

    def close(self) -> None:
        """Ends the run."""
        self._mlflow.end_run()


TRACKERS: dict[str, type[Tracker]] = {"wandb": Wandb, "mlflow": Mlflow}


def check(names: Iterable[str]) -> None:
    """Raises ConfigError for the first tracker whose library is not installed."""
    for name in names:
        if name not in sys.modules and not _installed(name):
            raise ConfigError(
                "log",
                name,
                why="but that library is not installed",
                allowed=f"after pip install 'sparsity_jax[{name}]'",
            )


def _installed(name: str) -> bool:
    """Whether a library can be imported; a folder of that name, as wandb makes them, is none."""
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None


def begin(names: Iterable[str], workdir: AnyPath, config: Config) -> list[Tracker]:
    """The trackers of these names, for the run in `workdir`."""
    place = pathlib.Path(workdir).resolve()
    group = files.title_of(dict(config), place)
    return [TRACKERS[name](group, place.name, config) for name in names]
