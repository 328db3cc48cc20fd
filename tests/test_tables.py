"""Options and their schema: every type a signature may ask for, and the messages for what does not
fit.
"""

from typing import Annotated, Any, Literal

import pytest
import tiny

from sparsity_jax import tables

Range = tables.Range


def options_of(
    positional=None,
    *,
    rate: tables.Positive,
    share: tables.Fraction = 0.5,
    count: tables.Count = 1,
    widths: tuple[tables.Count, ...] = (8,),
    pair: tuple[int, str] = (1, "a"),
    mode: Literal["global", "random"] = "global",
    limit: int | None = None,
    table: dict = {},  # noqa: B006 - never changed
    flag: bool = False,
    anything: Any = None,
):
    del positional, rate, share, count, widths, pair, mode, limit, table, flag, anything


TABLE = {"sgd": options_of, "adam": lambda *, beta=0.9: None}


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (1, float, 1.0),
        (0.5, float, 0.5),
        (3, int, 3),
        (True, bool, True),
        ("a", str, "a"),
        ([1, 2], tuple[int, ...], (1, 2)),
        ((), tuple[int, ...], ()),
        ([1, "a"], tuple[int, str], (1, "a")),
        ([1, 2], tuple, (1, 2)),
        ({"a": 1}, dict, tables.Options(a=1)),
        ([["a", [1]], 2], tuple, (("a", (1,)), 2)),
        (None, int | None, None),
        (4, int | None, 4),
        ("global", Literal["global", "random"], "global"),
        (3, Literal[1, 3], 3),
        (0, tables.Fraction, 0.0),
        (1, tables.Fraction, 1.0),
        ([1, 0], tuple[tables.Fraction, ...], (1.0, 0.0)),
        (1e-9, tables.Positive, 1e-9),
        (0, tables.Index, 0),
        (object, Any, object),
    ],
)
def test_values_that_fit_are_converted(value, hint, expected):
    converted = tables.convert(value, hint)
    assert converted == expected
    assert type(converted) is type(expected)


@pytest.mark.parametrize(
    ("value", "hint", "allowed"),
    [
        ("1", float, "float"),
        (True, float, "float"),
        (float("nan"), float, "a finite number"),
        (1.0, int, "int"),
        (True, int, "int"),
        (1, bool, "bool"),
        (1, str, "str"),
        (3, tuple[int, ...], "tuple of int"),
        ([1], tuple[int, str], "tuple (int, str)"),
        ("ab", tuple, "tuple"),
        ([], dict, "dict"),
        ("a", int | None, "int | None"),
        (True, Literal[1, 3], "1 | 3"),
        ([], Literal["a"], "'a'"),
        (1.5, tables.Fraction, "float >= 0.0 and <= 1.0"),
        ("a", tables.Fraction, "float >= 0.0 and <= 1.0"),
        (float("nan"), tables.Fraction, "a finite number"),
        (10**400, float, "a finite number"),
        (1e300, tables.NonNegative, "a finite number"),
        (1e-300, tables.Positive, "a finite number"),
        (2**31, tables.Count, "int >= 1 and <= 2147483647"),
        (2**32, tables.Seed, "int >= 0 and <= 4294967295"),
        ("a\0b", str, "text of one line"),
        ("\ud800", str, "text of one line"),
        (0, tables.Positive, "float > 0.0"),
        (-1, tables.NonNegative, "float >= 0.0"),
        (0, tables.Count, "int >= 1"),
        (-1, tables.Index, "int >= 0"),
    ],
)
def test_values_that_do_not_fit_say_what_is_allowed(value, hint, allowed):
    with tiny.refused("config.x", value, allowed=allowed), tables.within("config"):
        tables.convert(value, hint, "x")


@pytest.mark.parametrize(
    ("value", "hint", "where", "wrong", "closest"),
    [
        ([1, "b"], tuple[int, ...], "x[1]", "b", ""),
        ([0.5, 2], tuple[tables.Fraction, ...], "x[1]", 2.0, ""),
        ([["a", 0]], tuple[tuple[str, tables.Positive], ...], "x[0][1]", 0.0, ""),
        ("randm", Literal["global", "random"], "x", "randm", "random"),
    ],
)
def test_the_part_that_does_not_fit_is_named(value, hint, where, wrong, closest):
    with tiny.refused(where, wrong, closest=closest):
        tables.convert(value, hint, "x")


@pytest.mark.parametrize(
    ("hint", "text"),
    [
        (float, "float"),
        (type(None), "None"),
        (int | None, "int | None"),
        (Literal["a", 1], "'a' | 1"),
        (tuple[int, ...], "tuple of int"),
        (tuple[int, str], "tuple (int, str)"),
        (Annotated[int, Range(1, 5)], "int >= 1 and <= 5"),
        (Annotated[int, Range(high=5)], "int <= 5"),
        (Annotated[float, Range()], "float any number"),
        (Annotated[float, Range(0.0, above=True)], "float > 0.0"),
    ],
)
def test_hints_are_described(hint, text):
    assert tables.describe(hint) == text


def test_ranges_contain_their_ends_unless_above():
    assert [Range(0.0, 1.0).contains(x) for x in (-0.1, 0.0, 1.0, 1.1)] == [
        False,
        True,
        True,
        False,
    ]
    assert [Range(0.0, above=True).contains(x) for x in (0.0, 1e-9)] == [False, True]
    assert Range().contains(1e9)


def test_checked_options_are_keyword_arguments():
    given = dict(rate=1, widths=[2, 3], limit=None, mode="random")
    assert tables.check_options(options_of, given) == dict(
        rate=1.0, widths=(2, 3), limit=None, mode="random"
    )


@pytest.mark.parametrize(
    ("given", "where", "value", "allowed", "closest"),
    [
        (dict(rat=1.0), "", "rat", "anything, count, extra, flag, limit, mode, pair, rate", "rate"),
        (dict(positional=1), "", "positional", "rate", ""),
        (dict(mode="global"), "rate", tables.NOT_GIVEN, "float > 0.0", ""),
        (dict(rate=0.0), "rate", 0.0, "float > 0.0", ""),
        (dict(rate=1.0, widths=[0]), "widths[0]", 0, "int >= 1", ""),
        (dict(rate=1.0, table=3), "table", 3, "dict", ""),
    ],
)
def test_options_that_do_not_fit_name_the_field(given, where, value, allowed, closest):
    with tiny.refused(where, value, closest, allowed=allowed):
        tables.check_options(options_of, given, also=("extra",))


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (tables.ConfigError("a", 1, allowed="2"), "fit.a is 1; allowed: 2."),
        (
            tables.ConfigError("a", "x", known=("y", "xs")),
            "fit.a is 'x'; allowed: xs, y. Did you mean 'xs'?",
        ),
        (tables.ConfigError("a", 1, why="too much."), "fit.a is 1, too much."),
        (tables.ConfigError("", "x", verb="names", why="twice"), "fit names 'x', twice."),
        (
            tables.ConfigError("a", why="is missing", allowed="int"),
            "fit.a is missing; allowed: int.",
        ),
        (tables.ConfigError("A sentence."), "A sentence."),
    ],
)
def test_a_mistake_is_told_in_one_sentence(error, sentence):
    with pytest.raises(tables.ConfigError) as raised, tables.within("fit"):
        raise error
    assert str(raised.value) == sentence


def test_what_a_block_cannot_do_is_a_mistake_of_the_setting_it_is_for():
    for error in (ValueError("no."), tables.ConfigError("no.")):
        with tiny.refused("fit.ratio", 2), tables.within("fit"), tables.blaming("ratio", 2):
            raise error
    with tiny.refused("fit.ratio", 2), tables.blaming("fit.ratio", 2):
        raise tables.ConfigError("", why="is too much")
    with tiny.refused("fit.ratio[1]", 3), tables.blaming("fit.ratio", 2):
        raise tables.ConfigError("[1]", 3)


def test_options_list_every_default():
    assert tables.options(TABLE, "adam", beta=0.5) == dict(name="adam", beta=0.5)
    assert tables.options(TABLE, "sgd")["widths"] == (8,)
    assert "rate" not in tables.options(TABLE, "sgd")  # it has none
    assert list(tables.parameters(options_of))[:2] == ["rate", "share"]


@pytest.mark.parametrize("name", ["sdg", 3, ["sgd"], None])
def test_unknown_names_list_the_known(name):
    closest = "sgd" if name in ("sdg", ["sgd"]) else ""
    with tiny.refused("config.name", name, closest, allowed="adam, sgd"), tables.within("config"):
        tables.lookup(TABLE, name, "name")
    assert tables.lookup(TABLE, "sgd") is options_of


def test_nothing_is_suggested_when_nothing_is_near():
    assert tables.nearest("momentun", ["momentum", "tau"]) == "momentum"
    assert tables.nearest("xyz", ["momentum", "tau"]) == ""
