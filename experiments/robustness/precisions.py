"""Runs every config in small, in every `dtype` and `param_dtype`, and tells which runs end with
their report.

    python experiments/robustness/precisions.py --workdir /tmp/precisions

Each run is a process of its own, started by the command line of a user. float64 runs with
JAX_ENABLE_X64=1. Prints a table; exits 1 if a run ends without its report, after the last line that
this run wrote.
"""

import argparse
import itertools
import os
import pathlib
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[2]
TYPES = ("float32", "bfloat16", "float16", "float64")
FEW = ("data.train_limit=256", "data.test_limit=100")
SMALL = {  # the digits variant of each config and what makes it small
    "quickstart": (
        "configs/quickstart.py",
        ("sweep.seed=(0,1)", "fit_sfw.epochs=2", "fit_sgd.epochs=2"),
    ),
    "sfw_oneshot": (
        "configs/sfw_oneshot.py:data=digits,arch=small_cnn,sfw_init=1,epochs=2",
        (
            "model.widths=(8,8)",
            "model.dense_widths=(16,)",
            "model.batch_norm=True",
            "sfw_init.iterations=4",
        ),
    ),
    "toy_cnn": (
        "configs/toy_cnn.py:mlp",
        ("sweep.seed=(0,)", "fit.epochs=2", "retrain.epochs=1", "model.widths=(16,)"),
    ),
    "geometric_limit": (
        "configs/geometric_limit.py:digits",
        (
            "fit.epochs=4",
            "model.widths=(32,)",
            "curve.ratios=(0.0,0.5,0.9)",
            "hessian.num_matvecs=8",
        )
        + ("gauss_newton.num_matvecs=8",),
    ),
    "gradient_flow": ("configs/gradient_flow.py:digits,rounds=2,epochs=5", ()),
    "greg": (
        "configs/greg.py:digits",
        (
            "base.epochs=2",
            "finetune.epochs=2",
            "grow.stabilize_steps=10",
            "grow.granularity_prune=0.05",
        ),
    ),
}


def run(name: str, dtype: str, param_dtype: str, workdir: pathlib.Path) -> tuple[str, float]:
    """("" if the run ends with its report, else the last line it wrote; seconds)."""
    config, fields = SMALL[name]
    fields = (*FEW, *fields, f"model.dtype={dtype}", f"model.param_dtype={param_dtype}")
    command = [
        sys.executable,
        "-m",
        "sparsity_jax.run",
        "--config",
        config,
        "--workdir",
        str(workdir),
    ]
    command += [f"--config.{field}" for field in fields]
    variables = {
        "JAX_ENABLE_X64": str(int("float64" in (dtype, param_dtype))),
        "XLA_FLAGS": "--xla_backend_optimization_level=0",  # most of the time is compilation
    }
    start = time.perf_counter()
    ended = subprocess.run(
        command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - start
    if ended.returncode == 0 and (workdir / "report.html").is_file():
        return "", seconds
    lines = ended.stderr.strip().splitlines() or [f"exit status {ended.returncode}"]
    return lines[-1], seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=pathlib.Path, required=True, help="a new folder")
    parser.add_argument("--configs", nargs="*", choices=SMALL, default=list(SMALL))
    parser.add_argument("--dtypes", nargs="*", choices=TYPES, default=list(TYPES))
    parser.add_argument("--param_dtypes", nargs="*", choices=TYPES, default=list(TYPES))
    arguments = parser.parse_args()
    failures = 0
    runs = itertools.product(arguments.configs, arguments.dtypes, arguments.param_dtypes)
    print(
        "| config | `dtype` | `param_dtype` | report | seconds |\n|---|---|---|---|---|", flush=True
    )
    for name, dtype, param_dtype in runs:
        failure, seconds = run(
            name, dtype, param_dtype, arguments.workdir / f"{name}_{dtype}_{param_dtype}"
        )
        failures += bool(failure)
        print(
            f"| {name} | {dtype} | {param_dtype} | {failure or 'yes'} | {seconds:.0f} |", flush=True
        )
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
