"""The networks and data that are measured: ResNet-18 for 32 x 32 images, of random numbers."""

import functools
import importlib.util
from typing import Any

import jax
import numpy as np

from sparsity_jax import models, polytopes, train
from sparsity_jax.data import Dataset, Split
from sparsity_jax.types import PyTree

__all__ = [
    "has_torch",
    "network",
    "params_of",
    "problem",
    "sets_of",
    "torch_device",
    "torch_network",
]


def network(*, small: bool, dtype: str = "float32") -> models.Model:
    """ResNet-18, or a network of two small convolutions to try the scripts with."""
    if small:
        return models.build(
            name="small_cnn", num_classes=10, widths=(8, 8), dense_widths=(16,), dtype=dtype
        )
    return models.build(name="resnet18", num_classes=10, dtype=dtype)


@functools.cache
def problem(*, small: bool, dtype: str = "float32", images: int = 10_000) -> train.Problem:
    """A network on random images, as many for training as for testing."""
    if small:
        images = 256
    rng = np.random.default_rng(0)

    def split() -> Split:
        pixels = rng.integers(0, 256, (images, 32, 32, 3), dtype=np.uint8)
        return Split(pixels, rng.integers(0, 10, images, dtype=np.int32))

    dataset = Dataset("random", split(), split(), 10, (0.5,) * 3, (0.25,) * 3)
    model = network(small=small, dtype=dtype)
    return train.build_problem(dataset, model, eval_batch_size=min(1000, images))


def params_of(*, small: bool) -> PyTree:
    """Weights as training begins with."""
    return train.create_state(problem(small=small), train.key_of(0)).params


def sets_of(params: PyTree) -> PyTree:
    """The K-sparse polytopes of the one-shot experiments."""
    norms = jax.tree.map(lambda _: 1.0, params)
    return polytopes.build(params, norms, polytopes.check({"name": "k_sparse"}))


def has_torch() -> bool:
    """Whether there is a PyTorch to compare with."""
    return importlib.util.find_spec("torch") is not None


def torch_device() -> str:
    """Where PyTorch computes: beside JAX, on a GPU if there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def torch_network() -> Any:
    """The same ResNet-18 in PyTorch, on its device, in the layout that is fastest there."""
    import torch
    import torchvision

    model = torchvision.models.resnet18(num_classes=10)
    model.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = torch.nn.Identity()
    return model.to(torch_device()).to(memory_format=torch.channels_last)
