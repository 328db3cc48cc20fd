"""Writes the measured numbers of README.md, of two pages in docs and of the ledger, from rows kept
here.

    python experiments/claims.py            replaces every number that differs from its rows
    python experiments/claims.py --check    only says which differ, and then exits with 1
    python experiments/claims.py --take quickstart runs/quickstart    keeps rows of a new run first

A claim is a piece of text in which every number stands for a value of rows; its other words are
found literally.
"""

import argparse
import importlib.util
import json
import pathlib
import re
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from sparsity_jax import compare, report
from sparsity_jax.report import sections, series, summary

HERE = pathlib.Path(__file__).resolve().parent
README, LEDGER = HERE.parent / "README.md", HERE / "LEDGER.md"
PAGE = HERE.parent / "docs" / "studies.md"
SCALE = HERE.parent / "docs" / "scale.md"
SCALED = {  # programs that it tells the numbers of
    "training": "a step of training",
    "product": "a product with the Hessian",
    "curve": "a curve",
    "masks": "masks of all arrays as one",
    "sfw": "two updates of `sfw`",
    "adagrad_sfw": "two updates of `adagrad_sfw`",
    "Lanczos, full": "four steps of Lanczos, `full`",
}
NUMBER = r"\d[\d.,]*(?: ± \d[\d.,]*)?"
ROWS_LINK = r"\(\[rows\]\(([^)\s]+)\)\)"  # in the ledger, behind the numbers of a run
STOPS = (0.5, 0.7, 0.8, 0.9, 0.95)  # ratios of a curve that a filled row tells
KEPT = {  # what `--take` keeps, by name
    "quickstart": "quickstart/metrics.jsonl",
    "limit": "geometric_limit/digits.jsonl",
    "greg": "growing_regularisation/digits.jsonl",
}


class Claim(NamedTuple):
    """text: with a pair of braces in the place of every one of `numbers`. document: where it
    stands, once.
    """

    document: pathlib.Path
    text: str
    numbers: list[str]

    def pattern(self) -> re.Pattern:
        return re.compile(NUMBER.join(re.escape(piece) for piece in self.text.split("{}")))

    def truth(self) -> str:
        return self.text.format(*self.numbers)


# Rows to numbers ----------------------------------------------------------------------------------


def rows_of(name: str) -> list[dict]:
    return report.read_rows(HERE / name)


def percent(values: tuple[float, float, int] | float, decimals: int = 1) -> str:
    """A share, or (mean, deviation, count) of some, in percent."""
    if isinstance(values, float):
        values = (values, 0.0, 1)
    return compare.told(values, f".{decimals}%")


def extent(values: list[float]) -> list[str]:
    return [percent(min(values)), percent(max(values))]


def lines_of(name: str, *stops: float) -> dict[str, dict]:
    """Numbers of the table that `compare` makes, by label."""
    lines = compare.compared(rows_of(name), ratios=stops).lines
    return {line.label: line.cells for line in lines}


def last_accuracy(name: str) -> tuple[float, float, int]:
    """Last test accuracy of every seed: mean, deviation, count."""
    last = {}
    for row in rows_of(name):
        if row["kind"] == "train" and "test_accuracy" in row:
            last[row.get("seed", 0)] = row["test_accuracy"]
    return series.spread(last.values())


def of_kind(name: str, kind: str) -> list[dict]:
    return [row for row in rows_of(name) if row["kind"] == kind]


def predicted(names: list[str]) -> list[float]:
    return [
        row["predicted"]
        for name in names
        for row in of_kind(name, "width")
        if row["stage"] == "width"
    ]


def searched(names: list[str]) -> list[float]:
    return [
        row["limit"]
        for name in names
        for row in of_kind(name, "limit")
        if row.get("phase") == "result"
    ]


# Claims -------------------------------------------------------------------------------------------


def quickstart() -> list[Claim]:
    stops = (0.0, 0.9, 0.95, 0.98, 0.99)
    lines = lines_of(KEPT["quickstart"], *stops)
    sfw, sgd = (
        [percent(lines[arm][str(stop)]) for stop in stops]
        for arm in ("SFW, K-sparse polytope", "SGD")
    )
    ledger = "dense {} %, at 90 %: {}, 95 %: {}, 98 %: {}, 99 %: {}"
    return [
        Claim(README, "| SFW in a K-sparse polytope | {} | {} | {} | {} | {} |", sfw),
        Claim(README, "| plain SGD | {} | {} | {} | {} | {} |", sgd),
        Claim(LEDGER, f"seeds 0-2 | none (own experiment) | {ledger}", sfw),
        Claim(LEDGER, f"the same with SGD | none (own experiment) | {ledger}", sgd),
    ]


def small_cnn() -> list[Claim]:
    stops = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
    lines = lines_of("cifar10_small_cnn/metrics.jsonl", *stops)
    sgd, sfw = ([percent(cells[str(stop)]) for stop in stops] for cells in lines.values())
    study = HERE / "cifar10_small_cnn" / "README.md"
    return [
        Claim(PAGE, "90 % removed: SFW {} of {}, SGD {} of {}", [sfw[4], sfw[0], sgd[4], sgd[0]]),
        Claim(
            LEDGER,
            "SFW {} % dense, {} at 90 %, {} at 95 %, {} at 98 %; SGD {}, {}, {}, {}",
            [sfw[0], *sfw[4:], sgd[0], *sgd[4:]],
        ),
        Claim(study, "| SGD, rate 0.1, momentum 0.9 |" + " {} |" * 7, sgd),
        Claim(study, "| SFW, rate 1.0, k_frac 0.05, τ 15 |" + " {} |" * 7, sfw),
    ]


def resnet18() -> list[Claim]:
    stops = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
    (cells,) = lines_of("sfw_oneshot/sgd_resnet18_cifar10.jsonl", *stops).values()
    sgd = [percent(cells[str(stop)]) for stop in stops]
    text = "dense {} %, at 50 %: {}, 70 %: {}, 80 %: {}, 90 %: {}, 95 %: {}"
    return [
        Claim(LEDGER, f"JPEG copy of CIFAR-10: {text}", sgd[:-1]),
        Claim(PAGE, "ResNet-18, CIFAR-10, SGD: {} %, {} % with 90 % removed", [sgd[0], sgd[4]]),
        Claim(HERE / "sfw_oneshot" / "README.md", "| SGD |" + " {} |" * 7, sgd),
    ]


def digits_limit() -> list[Claim]:
    hessian, gauss_newton = of_kind(KEPT["limit"], "width")
    ends = [percent(hessian[end], 2) for end in ("predicted", "low", "high")]
    others = [percent(gauss_newton[end], 2) for end in ("predicted", "low", "high")]
    enclosed = percent(gauss_newton["enclosure_high"] - gauss_newton["enclosure_low"], 2)
    (actual,) = searched([KEPT["limit"]])
    text = "predicted {} % ({} to {})"
    ledger = (
        " from the Hessian, {} % ({} to {}, enclosed to {} points) from Gauss-Newton; actual: {} "
        "% by bisection, "
    )
    defined = extent([value for row in (hessian, gauss_newton) for value in row["actual"].values()])
    return [
        Claim(PAGE, f"{text}, actual {{}} %", [*ends, percent(actual)]),
        Claim(
            LEDGER,
            f"{text}{ledger}{{}} to {{}} % by definition",
            [*ends, *others, enclosed, percent(actual), *defined],
        ),
    ]


def found_limit(width: str, limit: str, *, products: bool = False) -> list[str]:
    """Number of products if asked for, prediction and its enclosure, and actual limit, of two files
    of one network.
    """
    (row,) = (
        row for row in of_kind(f"geometric_limit/{width}.jsonl", "width") if row["stage"] == "width"
    )
    (actual,) = searched([f"geometric_limit/{limit}.jsonl"])
    shares = (row["predicted"], row["enclosure_low"], row["enclosure_high"], actual)
    return [str(row["num_matvecs"])] * products + [percent(share, 2) for share in shares]


def dense(name: str) -> str:
    return percent(last_accuracy(f"geometric_limit/{name}.jsonl"))


def cifar_limit() -> list[Claim]:
    place = lambda *names: [f"geometric_limit/{name}.jsonl" for name in names]
    shared = ("fc5_seed1_whole", "fc5_seed1_third", "fc5_seed2")
    fc5, whole = place("fc5_seed0", *shared), place("fc5_seed0_whole", *shared)
    fc12 = place("fc12_seed0", "fc12_seed1", "fc12_seed2")
    again = "({} products): {} % ({} to {}), actual {} %"
    first = "seed 0: predicted {} % (enclosed by {} and {}), actual {} %, dense accuracy {} %"
    own = "{} % ({} to {}), actual {} %, dense {} %"
    names = ("fc5_seed1_whole", "fc5_seed1_third", "fc5_seed2")
    fc5_numbers = [*found_limit("fc5_seed0_whole", "fc5_seed0"), dense("fc5_seed0")]
    fc5_numbers += [number for name in names for number in found_limit(name, name, products=True)]
    fc12_numbers = [*found_limit("fc12_seed0", "fc12_seed0"), dense("fc12_seed0")]
    fc12_numbers += [*found_limit("fc12_seed1", "fc12_seed1"), dense("fc12_seed1")]
    fc12_numbers += [*found_limit("fc12_seed2", "fc12_seed2", products=True), dense("fc12_seed2")]
    return [
        Claim(
            LEDGER, f"{first}; seed 1 {again}, trained again {again}; seed 2 {again}", fc5_numbers
        ),
        Claim(LEDGER, f"{first}; seed 1: {own}; seed 2 {again}, dense {{}} %", fc12_numbers),
        Claim(
            PAGE,
            "FC5: predicted {} to {} %, actual {} to {} %",
            extent(predicted(whole)) + extent(searched(fc5)),
        ),
        Claim(
            PAGE,
            "FC12: {} to {} %, actual {} to {} %",
            extent(predicted(fc12)) + extent(searched(fc12)),
        ),
    ]


def gradient_flow() -> list[Claim]:
    measures = ("loss_based", "grasp", "mag_based")
    final = [percent(last_accuracy(f"gradient_flow/{measure}.jsonl")) for measure in measures]
    text = ", ".join(f"`{measure}` {{}} %" for measure in measures)
    return [Claim(PAGE, text, final), Claim(LEDGER, text, final)]


def growing() -> list[Claim]:
    (pruned,) = (cells for cells in lines_of(KEPT["greg"]).values() if "pruned" in cells)
    accuracy = [percent(pruned["pruned"]), percent(pruned["dense"])]
    (row,) = of_kind(KEPT["greg"], "compact")
    sizes = [sections.amount(row[field]) for field in ("parameters_compact", "parameters")]
    flops = percent(row["flops_compact"] / row["flops"], 0)
    names = ("base", "l1", "greg1", "greg2", "l1_longer")
    base, l1, greg1, greg2, longer = (
        last_accuracy(f"growing_regularisation/{name}.jsonl") for name in names
    )
    short = [percent(values[0]) for values in (greg1, greg2, l1, longer)]
    return [
        Claim(PAGE, "half of all channels removed: {} % of {} %", accuracy),
        Claim(
            LEDGER,
            "unpruned {} %, pruned {} %; {} of {} parameters and {} % of the FLOPs stay",
            [*reversed(accuracy), *sizes, flops],
        ),
        Claim(PAGE, "GReg-1 {} %, GReg-2 {} %, L1 {} %, but L1 trained as long {} %", short),
        Claim(
            LEDGER,
            "unpruned {} %, L1 {}, GReg-1 {}, GReg-2 {}, L1 of as many steps {}",
            [percent(values) for values in (base, l1, greg1, greg2, longer)],
        ),
    ]


def at_scale() -> list[Claim]:
    """Of the page on scale: what was measured on 8 devices, and what formulas predict."""
    formulas = _formulas()
    rows = json.loads((HERE / "scale" / "scale.json").read_text(encoding="utf-8"))["rows"]
    on_eight = {row["algorithm"]: row for row in rows if row["devices"] == 8}
    claims = []
    for name, told in SCALED.items():
        row = on_eight[name]
        expected = formulas.expected(name, formulas.MEASURED, 8)
        numbers = sum(row["exchanged"].values()), expected.exchanged, row["held"]
        shown = [f"{number / 1e3:,.1f}" for number in numbers]
        claims.append(Claim(SCALE, f"| {told} | {{}} | {{}} | {{}} |", shown))
    share = on_eight["adagrad_sfw"]["temporary"] / (4 * formulas.MEASURED.entries / 8)
    small, large = formulas.PREDICTED.values()
    return [
        *claims,
        Claim(SCALE, "up to {} times the parameters'", [f"{share:.0f}"]),
        Claim(
            SCALE,
            "per step: arithmetic {} ms, exchange\n{} ms, an update of `sfw` {} ms more. Each GPU "
            "holds {} MB of",
            [
                *(f"{1e3 * x:.1f}" for x in (small.compute, small.exchange, small.update)),
                f"{small.state / 1e6:.0f}",
            ],
        ),
        Claim(
            SCALE,
            "per step: arithmetic {} s, exchange {} s, an\nupdate of `sfw` {} ms more, whose "
            "counts are {} kB. Each GPU holds {} GB of",
            [
                *(f"{x:.1f}" for x in (large.compute, large.exchange, 1e3 * large.update)),
                f"{large.counts / 1e3:.0f}",
                f"{large.state / 1e9:.1f}",
            ],
        ),
        Claim(
            SCALE,
            "momentum, and\n{} GB for the largest array while it is used. The basis of 64 Lanczos "
            "vectors takes {} GB of each, and the exchange of a\nproduct with the Hessian {} s.",
            [f"{large.whole / 1e9:.1f}", f"{large.basis / 1e9:.0f}", f"{large.product:.1f}"],
        ),
    ]


def _formulas() -> Any:
    """The module beside the measured bytes."""
    path = HERE / "scale" / "formulas.py"
    spec: Any = importlib.util.spec_from_file_location("formulas", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def told_line(line: summary.Summary, several: bool) -> tuple[str, list[str]]:
    """Text and numbers of one line of a comparison, which is named if there are several."""
    texts = {
        "dense": "unpruned {} %" if "pruned" in line.cells else "dense {} %",
        "pruned": "pruned {} %",
        "channels": "{} % of the channels removed",
        "weights": "{} % of the weights removed",
    }
    for stop in STOPS:
        texts[str(stop)] = f"at {100 * stop:g} %: {{}}"
    shown = [column for column in texts if column in line.cells]
    numbers = [percent(line.cells[column]) for column in shown]
    text = ", ".join(texts[column] for column in shown)
    if several:
        named = filter(None, (line.label, line.variant))
        name = ", ".join(named).replace("|", "/")
        text = f"{name}: {text}"
    return text, numbers


def told_limit(row: dict) -> tuple[str, list[float | None]]:
    """Text and shares of a row that predicts a limit or has found one; "" and [] for others."""
    if row["kind"] == "width":
        text = f"{row['stage']}: predicted {{}} % ({{}} to {{}})"
        return text, [row["predicted"], row["low"], row["high"]]
    if row["kind"] == "limit" and row.get("phase") == "result":
        return "actual {} %", [row["limit"]]
    return "", []


def told(rows: list[dict]) -> tuple[str, list[str]]:
    """What a row of the ledger says of a whole run, by its rows: text and numbers, as a claim has
    them. Curves and trained networks come first, then predicted and actual limits.
    """
    lines = compare.compared(rows, ratios=STOPS).lines
    lines = [line for line in lines if told_line(line, several=False)[0]]  # with an accuracy
    several = len(lines) > 1
    texts = []
    numbers = []
    for line in lines:
        text, own = told_line(line, several)
        texts.append(text)
        numbers += own
    for row in rows:
        text, shares = told_limit(row)
        if text and None not in shares:
            texts.append(text)
            numbers += [percent(share, 2) for share in shares if share is not None]
    return "; ".join(texts), numbers


def filled(ledger: pathlib.Path = LEDGER) -> list[Claim]:
    """The rows that `gpu/ledger.py` filled: each links to the rows of its run."""
    claims = []
    names = re.findall(ROWS_LINK, ledger.read_text(encoding="utf-8"))
    for name in names:
        rows = report.read_rows(ledger.parent / name)
        text, numbers = told(rows)
        claim = Claim(ledger, f"{text} ([rows]({name}))", numbers)
        claims.append(claim)
    return claims


STUDIES: tuple[Callable[[], list[Claim]], ...] = (
    quickstart,
    small_cnn,
    resnet18,
    digits_limit,
    cifar_limit,
    gradient_flow,
    growing,
    at_scale,
    filled,
)


# Command line -------------------------------------------------------------------------------------


def slim(rows: list[dict]) -> list[dict]:
    """What claims need of a run: no histograms and spectra, of a training the last epoch of every
    visit.
    """
    last = {}
    for row in rows:
        if row["kind"] in ("train", "grow"):
            last[row["stage"], row["visit"], row["member"], "layers" in row] = id(row)
    few = sum(row["kind"] == "curve" for row in rows) <= 500
    kept = [
        row
        for row in rows
        if row["kind"] not in ("train", "grow", "curve", "histogram", "spectrum", "path")
    ]
    kept += [row for row in rows if id(row) in last.values() or (few and row["kind"] == "curve")]
    order = {id(row): place for place, row in enumerate(rows)}
    short = lambda value: (
        not isinstance(value, (list, dict)) or (isinstance(value, dict) and len(value) <= 8)
    )
    return [
        {
            key: value
            for key, value in row.items()
            if short(value) and key not in ("history", "growth", "layout")
        }
        for row in sorted(kept, key=lambda row: order[id(row)])
    ]


def take(name: str, workdir: str) -> None:
    """Keeps the rows of the finished run in `workdir`."""
    path = HERE / KEPT[name]
    _, rows, _ = report.gather(workdir)
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in slim(rows)), encoding="utf-8")


def stale(claim: Claim, text: str) -> str:
    """What stands in `text` instead of the claim's truth, "" if nothing does; ValueError if it is
    not there once.
    """
    places = claim.pattern().findall(text)
    if len(places) != 1:
        raise ValueError(
            f"{claim.document} has {len(places)} places for {claim.text!r}; one is needed."
        )
    return "" if places[0] == claim.truth() else places[0]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit with 1 if a number differs"
    )
    parser.add_argument(
        "--take", nargs=2, metavar=("NAME", "WORKDIR"), help=f"keep rows first: {', '.join(KEPT)}"
    )
    options = parser.parse_args()
    if options.take:
        if options.take[0] not in KEPT:
            parser.error(f"--take {options.take[0]}; allowed: {', '.join(KEPT)}.")
        take(*options.take)
    differing = 0
    for claim in (claim for study in STUDIES for claim in study()):
        text = claim.document.read_text(encoding="utf-8")
        old = stale(claim, text)
        if old:
            differing += 1
            print(f"{claim.document.name}: {old}\n  by its rows: {claim.truth()}")
        if old and not options.check:
            claim.document.write_text(text.replace(old, claim.truth()), encoding="utf-8")
    return int(options.check and differing > 0)


if __name__ == "__main__":
    sys.exit(main())
