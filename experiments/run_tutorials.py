"""Executes the tutorials and writes them as pages: `python experiments/run_tutorials.py [NAME]`.

docs/tutorials/NAME.py is a notebook in percent format. It runs in an empty folder of its own; one
with a cell that raises or warns is no page. Beside it come NAME.md, which the documentation site
shows, its figures in NAME_files/, and NAME.ipynb, executed. Needs the extra `docs`.
"""

import argparse
import os
import pathlib
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
TIMEOUT = 300  # seconds per cell


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


def main() -> None:
    parser = argparse.ArgumentParser(description="Executes tutorials and writes them as pages.")
    known = sorted(path.stem for path in FOLDER.glob("*.py"))
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}")
    names = parser.parse_args().names or known
    here = str(pathlib.Path(sys.executable).parent)
    os.environ["PATH"] = os.pathsep.join([here, os.environ["PATH"]])  # for `sparsity-jax`
    begin = time.monotonic()
    for name in names:
        start = time.monotonic()
        notebook = execute(FOLDER / f"{name}.py")
        if lines := list(warned(notebook)):
            sys.exit(f"{name} warns: {lines}")
        write(notebook, name)
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
    print(f"{len(names)} tutorials: {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
