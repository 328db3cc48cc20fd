"""What `mkdocs build` does beside rendering docs/: pages of documents that stand elsewhere in the
repository, links to them, and a page of reference for every module of the package.
"""

import ast
import functools
import pathlib
import posixpath
import re

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = pathlib.Path(__file__).resolve().parents[1]
STUDIES = [path.parent.name for path in sorted(ROOT.glob("experiments/*/README.md"))]
PICTURES = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("experiments/*/*.png"))]
PAGES = {  # files elsewhere in the repository, and where the site has them
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "experiments/LEDGER.md": "experiments/ledger.md",
    **{f"experiments/{study}/README.md": f"experiments/{study}.md" for study in STUDIES},
    **{picture: picture for picture in PICTURES},
}
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


# Names of the package -----------------------------------------------------------------------------


@functools.cache
def package() -> griffe.Module:
    """What the files of the package say, without importing them."""
    return griffe.load("sparsity_jax", search_paths=[str(ROOT)])


def modules_of(module: griffe.Module) -> list[griffe.Module]:
    """The module and those inside it, by name."""
    inside = [module]
    for _, child in sorted(module.modules.items()):
        if not child.is_alias:
            inside += modules_of(child)
    return inside


def listed(module: griffe.Module) -> list[str]:
    """Dotted names of `__all__`, and of those of the modules inside that it does not list too."""
    names = []
    shown = set()
    for part in modules_of(module):
        for name in part.exports or []:
            member = part.members[str(name)]
            defined = member.target_path if member.is_alias else member.path
            if part is module:
                shown.add(defined)
            elif defined in shown:
                continue
            names.append(f"{part.path}.{name}")
    return names


@functools.cache
def documented() -> dict[str, list[str]]:
    """The names that the page of every module shows."""
    modules = sorted(package().modules.items())
    return {name: listed(module) for name, module in modules if listed(module)}


def used_in(source: str) -> set[str]:
    """Dotted names of the package that Python code reads."""
    tree = ast.parse(source)
    imported = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                imported[alias.asname or alias.name] = alias.name
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                imported[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    used = set(imported.values())
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            first, dot, rest = ast.unparse(node).partition(".")
            used.add(f"{imported.get(first, first)}{dot}{rest}")
    return used


@functools.cache
def examples() -> dict[str, list[str]]:
    """Pages with code that uses a name, by the name; those with the fewest names come first."""
    pages = {}
    for file in [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]:
        blocks = BLOCK.findall(file.read_text(encoding="utf-8"))
        used = set().union(*map(used_in, blocks))
        pages[page_of(str(file.relative_to(ROOT)))] = used
    found = {}
    for page in sorted(pages, key=lambda page: len(pages[page])):
        for name in pages[page]:
            found.setdefault(name, []).append(page)
    return found


# Pages --------------------------------------------------------------------------------------------


def page_of(document: str) -> str | None:
    """The page that a file of the repository is; None for one that the site does not have."""
    if document in PAGES:
        return PAGES[document]
    folder, _, inside = document.partition("/")
    return inside if folder == "docs" else None


def document_of(page: str) -> str:
    documents = {found: document for document, found in PAGES.items()}
    return documents.get(page, f"docs/{page}")


def reference(module: str) -> str:
    """The page of a module in Markdown."""
    options = "{show_root_heading: false, members: false}"
    pieces = [f"# {module}", f"::: sparsity_jax.{module}\n    options: {options}"]
    for name in documented()[module]:
        defined = package()[name.removeprefix("sparsity_jax.")]
        if defined.is_alias and not defined.target_path.startswith("sparsity_jax."):
            pieces.append(f"## {defined.name} {{#{name}}}\n\n`{defined.target_path}`")
            continue
        pieces.append(f"::: {name}")
        if pages := examples().get(name):
            target = posixpath.relpath(pages[0], "reference")
            pieces.append(f'[Example]({target}){{.example title="{name}"}}')
    return "\n\n".join(pieces) + "\n"


def contents() -> str:
    """The page that lists all modules, with the first sentence of each."""
    lines = ["# All public names", ""]
    for module in documented():
        docstring = package()[module].docstring
        sentence = re.split(r"(?<=\.)\s|\n\n", docstring.value)[0] if docstring else ""
        lines.append(f"- [{module}]({module}.md): {' '.join(sentence.split())}")
    return "\n".join(lines) + "\n"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    pages = [{module: f"reference/{module}.md"} for module in documented()]
    config.nav.append({"Reference": ["reference/index.md", *pages]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for document, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / document)))
    files.append(File.generated(config, "reference/index.md", content=contents()))
    for module in documented():
        page = f"reference/{module}.md"
        files.append(File.generated(config, page, content=reference(module)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links between documents become links between pages; those to other files become text."""
    here = page.file.src_uri
    folder = posixpath.dirname(document_of(here))

    def linked(match: re.Match) -> str:
        text, target, anchor = match.groups()
        document = posixpath.normpath(posixpath.join(folder, target))
        found = page_of(document)
        if found and files.get_file_from_path(found):
            return f"[{text}]({posixpath.relpath(found, posixpath.dirname(here))}{anchor or ''})"
        if (ROOT / document).exists():
            return f"{text} (`{document}`)"
        return match[0]

    return markdown if here.startswith("reference/") else LINK.sub(linked, markdown)
