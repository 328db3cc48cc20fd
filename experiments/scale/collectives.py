"""What devices exchange in a compiled program, read from its text."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

__all__ = ["Collective", "of_program", "received"]

_KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
_CALL = re.compile(rf"= (?P<result>\(.*?\)|\S+) (?P<kind>{_KINDS})(?:-start)?\(")
_ARRAY = re.compile(r"(?P<type>[a-z]+)(?P<bits>\d*)\w*\[(?P<shape>[\d,]*)\]")
_HEAD = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) .*\{$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|\w+_computations?)=(\{[^}]*\}|%?[\w.-]+)")
_TURNS = re.compile(r'known_trip_count":\{"n":"(\d+)"')


class Collective(NamedTuple):
    """An exchange. sizes: bytes of each of its results on a device. times: how often it happens; in
    a loop whose end depends on data it counts once.
    """

    kind: str
    sizes: tuple[int, ...]
    times: int

    @property
    def size(self) -> int:
        """Bytes of all its results."""
        return sum(self.sizes)


def of_program(text: str) -> list[Collective]:
    """Every exchange in the text of a compiled program (`compiled.as_text()`), of a branch each
    side.
    """
    lines: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head:
            name = head["name"]
            entry = name if head["entry"] else entry
        lines.setdefault(name, []).append(line)
    return list(_within(lines, entry, 1))


def _within(lines: dict[str, list[str]], name: str, times: int) -> Iterator[Collective]:
    """The exchanges of one computation, which happens so often."""
    for line in lines[name][1:]:
        call = _CALL.search(line)
        if call:
            arrays = _ARRAY.finditer(call["result"])
            yield Collective(call["kind"], tuple(map(_bytes, arrays)), times)
            continue
        turns = _TURNS.search(line)
        often = times * int(turns[1]) if turns else times
        for called in _CALLED.findall(line):
            for inner in re.findall(r"[\w.-]+", called):
                yield from _within(lines, inner, often)


def _bytes(array: re.Match) -> int:
    entries = math.prod(int(number) for number in array["shape"].split(",") if number)
    bits = int(array["bits"] or 8)  # a bool has a byte
    return entries * max(bits, 8) // 8


def received(collective: Collective, devices: int) -> float:
    """Bytes that each device receives, exchanged in a ring."""
    whole = collective.size * (devices if collective.kind == "reduce-scatter" else 1)
    rounds = 2 if collective.kind == "all-reduce" else 1
    return collective.times * rounds * whole * (devices - 1) / devices
