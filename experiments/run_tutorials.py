"""Executes the tutorials and writes them as pages: `python experiments/run_tutorials.py [NAME]`,
with `--jobs 2` two at a time.

docs/tutorials/NAME.py is a notebook in percent format. It runs in an empty folder of its own; one
with a cell that raises or warns is no page. Beside it come NAME.md, which the documentation site
shows, its figures in NAME_files/, and NAME.ipynb, executed. Needs the extra `docs`.

A tutorial about a GPU runs everywhere, but its page shows what a GPU answered: where there is one,
its outputs are stored in docs/tutorials/stored/ to be committed; elsewhere those are shown.
"""

import argparse
import concurrent.futures
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import jupytext
import nbclient
import nbformat
from nbconvert import MarkdownExporter
from nbconvert.writers import FilesWriter

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "docs" / "tutorials"
STORED = FOLDER / "stored"
TIMEOUT = 300  # seconds per cell
ON_GPU = ("gpu",)  # tutorials about one
NONE_STORED = "*Outputs are missing: no GPU has run this page since its text was written.*"


def execute(path: pathlib.Path) -> nbformat.NotebookNode:
    """The notebook of a percent file with its outputs.

    Raises nbclient.exceptions.CellExecutionError where a cell raises.
    """
    notebook = jupytext.read(path, fmt="py:percent")
    with tempfile.TemporaryDirectory() as folder:
        client = nbclient.NotebookClient(
            notebook,
            timeout=TIMEOUT,
            kernel_name="python3",
            coalesce_streams=True,
            extra_arguments=["--log-level=ERROR"],
            resources={"metadata": {"path": folder}},
        )
        client.execute()
    return notebook


def warned(notebook: nbformat.NotebookNode) -> Iterator[str]:
    """Lines of outputs, of Python and of commands, that are warnings."""
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            lines = output.get("text", "").splitlines()
            yield from (line for line in lines if "Warning:" in line)


def write(notebook: nbformat.NotebookNode, name: str) -> None:
    """NAME.ipynb and NAME.md with its figures."""
    nbformat.write(notebook, FOLDER / f"{name}.ipynb")
    names = {"unique_key": name, "output_files_dir": f"{name}_files"}
    page, resources = MarkdownExporter().from_notebook_node(notebook, resources=names)
    page = page.replace("```bash\n%%bash\n", "```bash\n")
    FilesWriter(build_directory=str(FOLDER)).write(page, resources, notebook_name=name)


def of_a_gpu(notebook: nbformat.NotebookNode, name: str) -> nbformat.NotebookNode:
    """The executed notebook if a GPU did it, else the stored one, without outputs if there is none
    of the same text.
    """
    path = STORED / f"{name}.ipynb"
    if backend() == "gpu":
        STORED.mkdir(exist_ok=True)
        nbformat.write(notebook, path)
        return notebook
    if path.exists():
        stored = nbformat.read(path, as_version=4)
        if sources(stored) == sources(notebook):
            return stored
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    notebook.cells[0].source += f"\n\n{NONE_STORED}"
    return notebook


def backend() -> str:
    """Where JAX computes, asked of another process: this one would hold the GPU's memory."""
    ask = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    answer = subprocess.run(ask, capture_output=True, text=True, check=True)
    return answer.stdout.strip()


def sources(notebook: nbformat.NotebookNode) -> list[str]:
    """The texts of its cells."""
    return [cell.source for cell in notebook.cells]


def make(name: str) -> None:
    """Executes a tutorial and writes its page; SystemExit where it warns."""
    start = time.monotonic()
    notebook = execute(FOLDER / f"{name}.py")
    if lines := list(warned(notebook)):
        raise SystemExit(f"{name} warns: {lines}")
    if name in ON_GPU:
        notebook = of_a_gpu(notebook, name)
    write(notebook, name)
    print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Executes tutorials and writes them as pages.")
    known = sorted(path.stem for path in FOLDER.glob("*.py"))
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time")
    options = parser.parse_args()
    names = options.names or known
    here = str(pathlib.Path(sys.executable).parent)
    os.environ["PATH"] = os.pathsep.join([here, os.environ["PATH"]])  # for `sparsity-jax`
    begin = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as threads:
        for _ in threads.map(make, names):
            continue
    print(f"{len(names)} tutorials: {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
