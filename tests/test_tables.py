"""Options and their schema: every type a signature may ask for, and the messages for what does not
fit.
"""

from typing import Annotated, Any, Literal

import pytest

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
    converted = tables.convert(value, hint, "config.x")
    assert converted == expected
    assert type(converted) is type(expected)


@pytest.mark.parametrize(
    ("value", "hint", "message"),
    [
        ("1", float, "config.x is '1' (str); allowed: float."),
        (True, float, "config.x is True (bool); allowed: float."),
        (float("nan"), float, "config.x is nan; allowed: a finite number"),
        (1.0, int, "config.x is 1.0 (float); allowed: int."),
        (True, int, "config.x is True (bool); allowed: int."),
        (1, bool, "config.x is 1 (int); allowed: bool."),
        (1, str, "config.x is 1 (int); allowed: str."),
        (3, tuple[int, ...], "config.x is 3 (int); allowed: tuple of int."),
        ([1, "b"], tuple[int, ...], "config.x[1] is 'b' (str); allowed: int."),
        ([1], tuple[int, str], "config.x is [1] (list); allowed: tuple (int, str)."),
        ("ab", tuple, "config.x is 'ab' (str); allowed: tuple."),
        ([], dict, "config.x is [] (list); allowed: dict."),
        ("a", int | None, "config.x is 'a' (str); allowed: int | None."),
        (
            "randm",
            Literal["global", "random"],
            "allowed: 'global' | 'random'. Did you mean 'random'?",
        ),
        (True, Literal[1, 3], "config.x is True; allowed: 1 | 3."),
        ([], Literal["a"], "config.x is []; allowed: 'a'."),
        (1.5, tables.Fraction, "config.x is 1.5; allowed: float >= 0.0 and <= 1.0."),
        ("a", tables.Fraction, "config.x is 'a' (str); allowed: float >= 0.0 and <= 1.0."),
        (float("nan"), tables.Fraction, "config.x is nan; allowed: a finite number"),
        (10**400, float, "allowed: a finite number"),
        (1e300, tables.NonNegative, "allowed: a finite number"),
        (1e-300, tables.Positive, "allowed: a finite number"),
        (2**31, tables.Count, "allowed: int >= 1 and <= 2147483647"),
        (2**32, tables.Seed, "allowed: int >= 0 and <= 4294967295"),
        ("a\0b", str, "allowed: text of one line"),
        ("\ud800", str, "allowed: text of one line"),
        (0, tables.Positive, "config.x is 0.0; allowed: float > 0.0."),
        (-1, tables.NonNegative, "allowed: float >= 0.0."),
        (0, tables.Count, "config.x is 0; allowed: int >= 1"),
        (-1, tables.Index, "allowed: int >= 0"),
        (
            [0.5, 2],
            tuple[tables.Fraction, ...],
            "config.x[1] is 2.0; allowed: float >= 0.0 and <= 1.0.",
        ),
    ],
)
def test_values_that_do_not_fit_say_what_is_allowed(value, hint, message):
    with pytest.raises(tables.ConfigError) as error:
        tables.convert(value, hint, "config.x")
    assert message in str(error.value)


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
    assert tables.check_options(options_of, given, "config.fit") == dict(
        rate=1.0, widths=(2, 3), limit=None, mode="random"
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            dict(rat=1.0),
            (
                "config.fit has no field 'rat'; fields: anything, count, extra, flag, limit, mode, "
                "pair, rate"
            ),
        ),
        (dict(rat=1.0), "Did you mean 'rate'?"),
        (dict(positional=1), "config.fit has no field 'positional'"),
        (dict(mode="global"), "config.fit needs the field 'rate' (float > 0.0)."),
        (dict(rate=0.0), "config.fit.rate is 0.0; allowed: float > 0.0."),
        (dict(rate=1.0, widths=[0]), "config.fit.widths[0] is 0; allowed: int >= 1"),
        (dict(rate=1.0, table=3), "config.fit.table is 3 (int); allowed: dict."),
    ],
)
def test_options_that_do_not_fit_name_the_field(given, message):
    with pytest.raises(tables.ConfigError) as error:
        tables.check_options(options_of, given, "config.fit", also=("extra",))
    assert message in str(error.value)


def test_options_list_every_default():
    assert tables.options(TABLE, "adam", beta=0.5) == dict(name="adam", beta=0.5)
    assert tables.options(TABLE, "sgd")["widths"] == (8,)
    assert "rate" not in tables.options(TABLE, "sgd")  # it has none
    assert list(tables.parameters(options_of))[:2] == ["rate", "share"]


@pytest.mark.parametrize("name", ["sdg", 3, ["sgd"], None])
def test_unknown_names_list_the_known(name):
    with pytest.raises(
        tables.ConfigError, match=r"config\.name is .*; known: adam, sgd\."
    ) as error:
        tables.lookup(TABLE, name, "config.name")
    assert ("Did you mean 'sgd'?" in str(error.value)) == (name in ("sdg", ["sgd"]))
    assert tables.lookup(TABLE, "sgd", "config.name") is options_of


def test_closest_is_silent_when_nothing_is_near():
    assert tables.closest("momentun", ["momentum", "tau"]) == " Did you mean 'momentum'?"
    assert tables.closest("xyz", ["momentum", "tau"]) == ""
