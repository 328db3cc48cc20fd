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
    loaded = griffe.load("sparsity_jax", search_paths=[str(ROOT)])
    assert isinstance(loaded, griffe.Module)
    return loaded


def modules_of(module: griffe.Module) -> list[griffe.Module]:
    """The module and those inside it, by name."""
    inside = [module]
    for _, child in sorted(module.modules.items()):
        if not child.is_alias:
            inside += modules_of(child)
    return inside


def exported(module: griffe.Module) -> list[str]:
    """Its `__all__`; none without one."""
    return [str(name) for name in module.exports or []]


def defined_at(member: griffe.Object | griffe.Alias) -> str:
    """The dotted name where a member is defined, which an import in its module may have."""
    if isinstance(member, griffe.Alias):
        return member.target_path
    return member.path


def listed(module: griffe.Module) -> list[str]:
    """Dotted names of `__all__`, and of those of the modules inside that it does not list too."""
    shown = {defined_at(module.members[name]) for name in exported(module)}
    names = []
    for part in modules_of(module):
        for name in exported(part):
            own = part is module
            if own or defined_at(part.members[name]) not in shown:
                names.append(f"{part.path}.{name}")
    return names


@functools.cache
def documented() -> dict[str, list[str]]:
    """The names that the page of every module shows."""
    pages = {}
    for name, module in sorted(package().modules.items()):
        names = listed(module)
        if names:
            pages[name] = names
    return pages


def imported_in(tree: ast.Module) -> dict[str, str]:
    """What the names that code imports stand for."""
    imported = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                imported[alias.asname or alias.name] = alias.name
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                imported[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return imported


def used_in(source: str) -> set[str]:
    """Dotted names that Python code imports or reads."""
    tree = ast.parse(source)
    imported = imported_in(tree)
    used = set(imported.values())
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            first, _, rest = ast.unparse(node).partition(".")
            module = imported.get(first, first)
            used.add(f"{module}.{rest}")
    return used


@functools.cache
def examples() -> dict[str, str]:
    """The page with code that uses a name, by the name: of several the one with fewest names."""
    docs = ROOT / "docs"
    files = sorted(docs.glob("**/*.md"))
    names = ["index.md", *(str(file.relative_to(docs)) for file in files)]
    pages: dict[str, set[str]] = {}
    for page in names:
        text = (ROOT / document_of(page)).read_text(encoding="utf-8")
        pages[page] = set()
        for block in BLOCK.findall(text):
            pages[page] |= used_in(block)
    found: dict[str, str] = {}
    for page in sorted(pages, key=lambda page: len(pages[page])):
        for name in pages[page]:
            found.setdefault(name, page)
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


def entry(name: str) -> str:
    """What the reference has of a dotted name."""
    member = package()[name.removeprefix("sparsity_jax.")]
    defined = defined_at(member)
    if not defined.startswith("sparsity_jax."):
        return f"## {member.name} {{#{name}}}\n\n`{defined}`"
    shown = f"::: {name}"
    example = examples().get(name) or examples().get(defined)
    if example:
        target = posixpath.relpath(example, "reference")
        shown += f'\n\n[Example]({target}){{.example title="{name}"}}'
    return shown


def reference(module: str) -> str:
    """The page of a module in Markdown."""
    options = "{show_root_heading: false, members: false}"
    pieces = [f"# {module}", f"::: sparsity_jax.{module}\n    options: {options}"]
    pieces += map(entry, documented()[module])
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
    assert config.nav is not None
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
            address = posixpath.relpath(found, posixpath.dirname(here)) + (anchor or "")
            return f"[{text}]({address})"
        if (ROOT / document).exists():
            return f"{text} (`{document}`)"
        return match[0]

    return markdown if here.startswith("reference/") else LINK.sub(linked, markdown)
