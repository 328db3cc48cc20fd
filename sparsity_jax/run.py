"""Command line: `python -m sparsity_jax.run --config configs/NAME.py[:variant] --workdir DIR [--config.field=value]`."""

import os
import signal
import sys

from absl import app, flags
from ml_collections import config_flags

from sparsity_jax import pipeline, tables, train

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "File of the run's config, e.g. configs/quickstart.py or configs/sfw_oneshot.py:arch=vgg16.", lock_config=True
)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of this run: rows, checkpoints and report; the same continues it.")


def interrupt(*_) -> None:
    """A scheduler's SIGTERM is treated as Ctrl-C: save, then stop."""
    raise KeyboardInterrupt


def main(_) -> None:
    signal.signal(signal.SIGTERM, interrupt)
    try:
        pipeline.run(CONFIG.value, WORKDIR.value)
    except tables.ConfigError as error:
        sys.exit(f"error: {error}")
    except train.NonFiniteLossError as error:
        sys.exit(f"error: {error}\nThe last good checkpoint is in {WORKDIR.value}.")
    except KeyboardInterrupt:
        sys.stderr.write(f"interrupted: the same command continues {WORKDIR.value}\n")
        os._exit(130)  # orbax and jax threads would otherwise delay the exit


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main)
