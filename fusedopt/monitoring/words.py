"""Makes text from a log or a path safe to print. Names in a log may hold any character."""

from __future__ import annotations

import reprlib

LONGEST_NAME = 60


def printable(text: str) -> str:
    """Replaces control characters, line ends, lone surrogates and similar ones by escapes.

    Terminals obey control characters, and no encoding takes a lone surrogate.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def short_name(name: str, most: int = LONGEST_NAME) -> str:
    """A printable name of at most `most` characters: its start and its end."""
    start = most // 3
    end = most - start - len("...")
    if len(name) > 2 * most:  # don't escape the middle, which is left out
        name = name[:most] + name[-most:]
    name = printable(name)
    return name if len(name) <= most else f"{name[:start]}...{name[-end:]}"


def short_value(value: object) -> str:
    """The repr of a value of any type, size and depth, on one line."""
    return printable(reprlib.repr(value))
