"""The documentation keeps its word: its snippets run, and what it names exists."""

import ast
import contextlib
import functools
import json
import re
import shlex
import subprocess
from unittest import mock

import pytest
import tiny

from sparsity_jax import (
    data,
    extend,
    imports,
    members,
    pipeline,
    plans,
    report,
    run,
    stages,
    tables,
)
from sparsity_jax.channels import execute, rules

ROOT = tiny.ROOT
WRITTEN = [  # pages that are made of a notebook are as old as its last execution
    path for path in ROOT.glob("docs/**/*.md") if not path.with_suffix(".py").exists()
]
PAGES = sorted(str(path.relative_to(ROOT)) for path in WRITTEN)
DOCUMENTS = ("README.md", *PAGES, "experiments/LEDGER.md")
STUDIES = tuple(
    sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("experiments/*/README.md"))
)
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in (*DOCUMENTS, *STUDIES)}
FULL_VARIANTS = {  # variants that together have every field of a config
    "quickstart": (None,),
    "sfw_oneshot": ("", "sfw_init=1", "data=tiny"),
    "toy_cnn": ("cnn", "mlp", "story"),
    "geometric_limit": ("fc5", "alexnet"),
    "gradient_flow": ("resnet56", "vgg13,warmup=3"),
    "greg": ("vgg19", "resnet50", "resnet56,method=l1"),
}


def load(name: str):
    """The module of `configs/NAME.py`."""
    return tiny.module(f"configs/{name}.py")


CLAIMS = tiny.module("experiments/claims.py")


@pytest.mark.parametrize("study", CLAIMS.STUDIES, ids=lambda study: study.__name__)
def test_measured_numbers_are_those_of_the_rows_kept(study):
    """If not, `python experiments/claims.py` writes the right ones."""
    for claim in study():
        assert not CLAIMS.stale(claim, claim.document.read_text(encoding="utf-8")), claim.truth()


def test_the_table_has_the_rules_of_the_report(tmp_path, capsys, monkeypatch):
    """Two runs with different settings are two lines, two seeds of one are averaged."""
    for name, rate, seed, accuracy in (("a", 0.1, 0, 0.5), ("b", 0.1, 1, 0.7), ("c", 0.3, 0, 0.9)):
        row = dict(
            stage="curve",
            kind="curve",
            visit=1,
            arm="A",
            member=0,
            ratio=0.9,
            accuracy=accuracy,
            split="test",
        )
        with report.Writer(tmp_path / name) as writer:
            writer.append([row])
        config = dict(seed=seed, fit=dict(kind="train", rate=rate))
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    table = tiny.module("experiments/table.py")
    monkeypatch.setattr("sys.argv", ["table.py", str(tmp_path), "--ratios", "0.9"])
    table.main()
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| A | 0.1 | 2 | 60.0 ± 14.1 |",
        "| A | 0.3 | 1 | 90.0 |",
    ]


def test_a_wrong_number_is_found(tmp_path):
    document = tmp_path / "README.md"
    document.write_text("dense 98.7 ± 0.2 %, at 90 %: 97.9\n", encoding="utf-8")
    claim = CLAIMS.Claim(document, "dense {} %, at 90 %: {}", ["98.7 ± 0.2", "98.0"])
    assert (
        CLAIMS.stale(claim, document.read_text(encoding="utf-8"))
        == "dense 98.7 ± 0.2 %, at 90 %: 97.9"
    )
    with pytest.raises(ValueError, match="0 places"):
        CLAIMS.stale(claim, "at 90 %")


def config_of(name: str, variant: str | None):
    module = load(name)
    return module.get_config() if variant is None else module.get_config(variant)


def check_members(config) -> None:
    config, known = pipeline.plain(config), tables.parameters(pipeline.settings)
    common = {name: value for name, value in config.items() if name in known}
    tables.check_options(pipeline.settings, common)
    for member in members.expand(config):
        plans.check_member(member.config)


@functools.cache
def all_configs() -> list:
    return [
        config_of(name, variant) for name, variants in FULL_VARIANTS.items() for variant in variants
    ]


def has_field(config, path: str) -> bool:
    """Whether a config has the field, or its sweep may list values of it."""
    _, swept, field = path.partition("sweep.")
    if swept and (field in ("mode", "members") or has_field(config, field)):
        return True
    if path == "sweep.arm":
        path = "sweep.arms"  # of which it names some
    for name in path.split("."):
        if not hasattr(config, "keys") or name not in config:
            return False
        config = config[name]
    return True


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def cases(found) -> list:
    """Parameters of one test each: (document, item) without repetition, in order."""
    return list(dict.fromkeys((name, item) for name, text in TEXTS.items() for item in found(text)))


SNIPPETS = [(name, i) for name, text in TEXTS.items() for i in range(len(blocks(text, "python")))]


@pytest.fixture
def same_tables():
    """What a snippet registers is gone after it."""
    with contextlib.ExitStack() as stack:
        for table in (rules.RULES, execute.RESIZES, imports.REGISTERED, *extend.TABLES.values()):
            stack.enter_context(mock.patch.dict(table))
        yield


@pytest.mark.parametrize(("document", "index"), SNIPPETS)
def test_snippet_runs(document, index, same_tables, pages, sketches):
    source = blocks(TEXTS[document], "python")[index]
    exec(compile(source, f"{document}, snippet {index + 1}", "exec"), {"__name__": "snippet"})


@pytest.mark.parametrize(
    ("heading", "last"),
    [
        (
            "Run the quick start",
            "-m sparsity_jax.run --config configs/quickstart.py --workdir runs/quickstart",
        ),
        ("Run the tests", "-m pytest -n 2"),
    ],
)
def test_command_below_heading(heading, last):
    """The form that a script can rely on: a bash block of one line directly below the heading."""
    found = re.search(rf"^### {heading}\n\n```bash\n(.+)\n```$", TEXTS["README.md"], re.MULTILINE)
    assert found, f"no one-line bash block directly below {heading!r}"
    assert found[1].startswith("python3 -m venv .venv && .venv/bin/pip install ")
    assert found[1].endswith(f"&& .venv/bin/python {last}")


def test_readme_has_two_setup_commands():
    assert len(blocks(TEXTS["README.md"], "bash")) == 2


@pytest.mark.parametrize("document", DOCUMENTS)
def test_configs_exist(document):
    """Every `configs/NAME.py:variant` loads, and its model and stage settings are accepted."""
    found = re.findall(r"configs/(\w+)\.py(?::([\w=.,;:-]+))?", TEXTS[document])
    for name, variant in dict.fromkeys(found):
        if name != "NAME":
            check_members(config_of(name, variant or None))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_fields_exist(document):
    """Every `config.x.y` is a field of some config; those marked † are options that a config file
    may add.
    """
    configs = all_configs()
    for path, mark in re.findall(r"\bconfig\.([a-z_]\w*(?:\.\w+)*)`?(†?)", TEXTS[document]):
        if path not in ("json", "FIELD") and not mark:
            assert any(has_field(config, path) for config in configs), f"{document}: config.{path}"


def test_unflagged_fields_are_options():
    options = {**tables.parameters(data.Options), **tables.parameters(stages.Curve), "rules": None}
    found = re.findall(r"`(?:config\.)?([\w.]+)[^`]*`†", TEXTS["docs/sfw_options.md"])
    assert found
    assert {path.rpartition(".")[2] for path in found} <= set(options)


def takes(config, path: str) -> bool:
    """Whether the command line may give a config this field, of its sweep any that can be swept."""
    if path == "seed":
        return "seed" not in config["sweep"]
    _, sweep, field = path.rpartition("sweep.")
    if not sweep or has_field(config, path):
        return has_field(config, path)
    return has_field(config, field) or (field in ("arm", "mode") and "arms" in config["sweep"])


def overridden(config: dict, path: str, text: str) -> dict:
    """A plain config with one field from the command line."""
    if path.startswith("sweep."):
        return run.swept(config, {path.removeprefix("sweep."): literal(text)})
    return members.replaced(config, {path: literal(text)})


@pytest.mark.parametrize("document", DOCUMENTS)
def test_overrides_are_accepted(document):
    """Every `--config.x.y=value` passes the checks of a config that has the field."""
    configs = all_configs()
    for path, text in re.findall(
        r"--config\.([a-z][\w.]*)=(\([^)]*\)|[^\s`'\",;]+)", TEXTS[document]
    ):
        config = next(pipeline.plain(config) for config in configs if takes(config, path))
        check_members(overridden(config, path, text))


@pytest.mark.parametrize("document", TEXTS)
def test_commands_are_accepted(document):
    """Every whole `python -m sparsity_jax.run ...` of a code block survives a shell and passes the
    checks.
    """
    for block in re.findall(r"^```\w*\n(.*?)^```", TEXTS[document], re.MULTILINE | re.DOTALL):
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            if not line.startswith("python -m sparsity_jax.run ") or "NAME" in line:
                continue
            assert not subprocess.run(
                ["bash", "-n", "-c", line], capture_output=True, check=False, timeout=60
            ).stderr, line
            words = shlex.split(line)[3:]
            name, _, variant = (
                words[words.index("--config") + 1].removeprefix("configs/").partition(".py:")
            )
            config = pipeline.plain(config_of(name.removesuffix(".py"), variant or None))
            for path, text in (
                word[9:].split("=", 1) for word in words if word.startswith("--config.")
            ):
                config = overridden(config, path, text)
            check_members(config)


def literal(text: str):
    """The value that a flag's text stands for."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def test_variants_are_accepted():
    """Every `key=value` or `key=value, other` of the flag table is a variant of sfw_oneshot."""
    module, known = load("sfw_oneshot"), set()
    for row in TEXTS["docs/sfw_options.md"].split("## Flags")[1].split("\n## ")[0].splitlines():
        cells = row.split(" | ")
        if len(cells) == 3 and "=" in cells[1]:
            key, values = "", []
            for quoted in re.findall(r"`([^`]+)`", cells[1]):
                name, equal, value = quoted.rpartition("=")
                key = name if equal else key
                values.append(f"{key}={value}")
            known |= {value.partition("=")[0] for value in values}
            for value in values:
                check_members(module.get_config(value))
    assert known == set(module.VARIANTS)


@pytest.mark.parametrize("document", TEXTS)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[document]):
        file, _, anchor = target.partition("#")
        path = (ROOT / document).parent / file if file else ROOT / document
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [
                re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings
            ], target


@pytest.mark.parametrize("document", TEXTS)
def test_tables_are_whole(document):
    """Every row of a table has as many cells as its heading."""
    for table in re.findall(r"(?:^\|.*\n)+", TEXTS[document] + "\n", re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}
        assert len(widths) == 1, table.splitlines()[0]
