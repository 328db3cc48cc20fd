"""Installation: `pip install .` for users, `pip install -e .[test]` for developers."""

import pathlib

import setuptools

setuptools.setup(
    name="sparsity_jax",
    version="0.2.0",
    description=(
        "Neural-network sparsity research in JAX: five published pruning systems as pure functions"
    ),
    long_description=pathlib.Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=setuptools.find_packages(include=["sparsity_jax", "sparsity_jax.*"]),
    package_data={
        "sparsity_jax": ["py.typed"],
        "sparsity_jax.report": ["*.j2"],
        "sparsity_jax.compare": ["*.j2"],
    },
    python_requires=">=3.11",
    install_requires=[
        "jax>=0.10",
        "jaxlib>=0.10",
        "flax>=0.12",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12",
        "ml-collections>=1.1",
        "numpy>=2.0",
        "scipy>=1.13",
        "tensorflow-datasets>=4.9.10",
        "opencv-python-headless>=4.10",
        "pillow>=10",
        "grain>=0.2.18",
        "scikit-learn>=1.5",
        "matplotlib>=3.9",
        "jinja2>=3.1",
        "pandas>=2.2",
        "tensorboardX>=2.6.2",
        "tqdm>=4.66",
        "flatbuffers>=24.3",  # jax.export writes with it
        "safetensors>=0.5",
    ],
    extras_require={
        "cuda": ["jax[cuda12]>=0.10"],
        "prepare": ["tensorflow-cpu>=2.18", "importlib_resources"],
        "wandb": ["wandb>=0.18"],
        "mlflow": ["mlflow-skinny>=2.16"],
        "browser": ["playwright>=1.48"],  # for tests/test_browser.py, with a Chromium
        "test": [
            "equinox>=0.13",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "mypy>=1.13",
            "ruff>=0.8",
        ],
    },
)
