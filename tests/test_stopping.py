"""Signals ask; loops look. Nothing is raised inside a handler, and a second signal ends at once."""

import concurrent.futures
import os
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest

from sparsity_jax import linops, probes, spectrum, stopping

START = (
    "import signal, sys, threading, time\nfrom sparsity_jax import stopping\nstopping.listen()\n"
)


@pytest.fixture
def asked():
    stopping.request()
    yield
    stopping.clear()


def child(code: str, *before: str) -> subprocess.Popen:
    """A process that listens and runs `code`, whose first line is `ready`; before: a command that
    starts it.
    """
    command = [*before, sys.executable, "-c", START + code]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def test_every_host_loop_looks(asked):
    eye = lambda v: v
    data = (jnp.ones((4, 2)), jnp.zeros(4))
    product = spectrum.hessian_product(
        lambda params, batch: jnp.sum(params**2) * jnp.mean(batch[0])
    )
    loops = {
        "lanczos": lambda: linops.lanczos(3, on_host=True)(eye, jnp.ones(4)),
        "trace": lambda: linops.hutchinson(2, on_host=True)(
            eye, jnp.zeros(2, jnp.uint32), jnp.ones(4)
        ),
        "batches": lambda: spectrum.over_batches(product, data, 2, on_host=True)(
            jnp.ones(3), jnp.ones(3)
        ),
        "oracle": lambda: probes.oracle(lambda keep: np.zeros(1), {"a": (3, 1)}, batch=1),
        "waiting": lambda: stopping.result_of(concurrent.futures.Future()),
    }
    for loop in loops.values():
        with pytest.raises(KeyboardInterrupt):
            loop()


def stops(look) -> bool:
    try:
        look()
    except KeyboardInterrupt:
        return True
    return False


def test_processes_that_agree_stop_at_the_same_check(asked, monkeypatch):
    agreed = iter([False, True])
    monkeypatch.setattr(stopping, "_agreed", lambda: next(agreed))
    assert not stops(stopping.check)  # the others have not come so far
    assert not stops(stopping.check_here)
    assert stops(stopping.check)


def test_a_result_is_waited_for():
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert stopping.result_of(pool.submit(lambda: time.sleep(0.6) or 3)) == 3
        with pytest.raises(TimeoutError):
            stopping.result_of(pool.submit(lambda: (_ for _ in ()).throw(TimeoutError)))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_inside_a_held_lock_only_asks(number):
    """The main thread is inside a condition variable, where an exception would leave its lock held
    for ever.
    """
    process = child(
        "changed = threading.Condition()\n"
        "print('ready', flush=True)\n"
        "with changed:\n"
        "    while not stopping.requested():\n"
        "        changed.wait(0.01)\n"
        "with changed:\n"
        "    print('saved', flush=True)\n"
    )
    process.send_signal(number)
    printed, _ = process.communicate(timeout=60)
    assert (printed, process.returncode) == ("saved\n", 0)


def test_a_second_signal_ends_at_once_also_inside_a_library():
    process = child(
        "print('ready', flush=True)\nimport ctypes\nctypes.CDLL(None).sleep(60)\ntime.sleep(60)\n"
    )
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert process.poll() is None
    started = time.time()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert time.time() - started < 20


def test_an_ignored_signal_stays_ignored():
    code = "print('ready', flush=True)\ntime.sleep(0.7)\nprint(stopping.requested(), flush=True)\n"
    process = child(code, "nohup")
    os.kill(process.pid, signal.SIGHUP)
    printed, _ = process.communicate(timeout=60)
    assert printed == "False\n"
