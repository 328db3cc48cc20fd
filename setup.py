"""Installation: `pip install .` for users, `pip install -e .[test]` for developers."""

import pathlib
import re

import setuptools
from setuptools.command.build_py import build_py

ROOT = pathlib.Path(__file__).parent


class BuildPackage(build_py):
    """Also copies `configs/` into the package, which finds them beside itself where it is not
    installed.
    """

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        folder = pathlib.Path(self.build_lib, "sparsity_jax", "configs")
        self.mkpath(str(folder))
        for file in sorted(ROOT.joinpath("configs").glob("*.py")):
            self.copy_file(str(file), str(folder / file.name))


def version() -> str:
    """What the package says its version is, without importing it."""
    text = ROOT.joinpath("sparsity_jax", "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)[1]


setuptools.setup(
    name="sparsity_jax",
    version=version(),
    description=(
        "Neural-network sparsity research in JAX: five published pruning systems as pure functions"
    ),
    long_description=ROOT.joinpath("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The maintainers of sparsity_jax",
    license="Apache-2.0",
    keywords="jax sparsity pruning neural-networks frank-wolfe optax flax",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    packages=setuptools.find_packages(include=["sparsity_jax", "sparsity_jax.*"]),
    package_data={
        "sparsity_jax": ["py.typed"],
        "sparsity_jax.report": ["*.j2"],
        "sparsity_jax.compare": ["*.j2"],
    },
    cmdclass={"build_py": BuildPackage},
    entry_points={"console_scripts": ["sparsity-jax = sparsity_jax.commands:main"]},
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
        "docs": [
            "equinox>=0.13",
            "ipykernel>=6.29",
            "jupytext>=1.16",
            "mkdocs>=1.6,<2",
            "mkdocs-material>=9.6",
            "mkdocstrings[python]>=0.30",
            "nbclient>=0.10",
            "nbconvert>=7.16",
        ],
        "prepare": ["tensorflow-cpu>=2.18", "importlib_resources"],
        "ray": ["ray>=2.60"],
        "wandb": ["wandb>=0.18"],
        "mlflow": ["mlflow-skinny>=2.16"],
        "browser": ["playwright>=1.48"],  # for tests/test_browser.py, with a Chromium
        "test": [
            "build>=1.2",
            "equinox>=0.13",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "mypy>=1.13",
            "ruff>=0.8",
            "setuptools>=65",
        ],
    },
)
