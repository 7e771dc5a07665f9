"""Text of others: names, metadata and messages from files, which a terminal or a spreadsheet could take for orders."""

from __future__ import annotations


def printable(text: object) -> str:
    r"""`text` on one line, with characters that a terminal obeys or cannot show spelt out: escapes, text direction.

    >>> printable("\x1b[31mred\x1b[0m")
    '\\x1b[31mred\\x1b[0m'
    """
    return "".join(c if c.isprintable() else " " if c.isspace() else _spelt(c) for c in str(text))


def _spelt(character: str) -> str:
    return character.encode("unicode_escape").decode()


def spreadsheet_cell(value: object) -> object:
    """A CSV cell that no spreadsheet takes for a formula: text that begins like one gets a quote in front."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value
