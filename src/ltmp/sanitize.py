"""Make text from files (names, metadata, messages) safe to show in a terminal or a spreadsheet."""

from __future__ import annotations


def printable(text: object) -> str:
    r"""Return `text` on one line, with control and other unprintable characters escaped.

    >>> printable("\x1b[31mred\x1b[0m")
    '\\x1b[31mred\\x1b[0m'
    """
    return "".join(c if c.isprintable() else " " if c.isspace() else _escape(c) for c in str(text))


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()


def spreadsheet_cell(value: object) -> object:
    """Return a CSV cell that no spreadsheet evaluates: text that begins like a formula is prefixed with a quote."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value
