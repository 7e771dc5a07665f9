"""Errors meant for the user: one sentence that says what is wrong, what was expected and what to do."""


class LTMPError(Exception):
    """A failure the user can act on. The command line prints its message and exits with `exit_code`."""

    exit_code = 1


class UsageError(LTMPError):
    """The call itself is wrong: an option, a name or a combination that cannot work."""

    exit_code = 2


class MissingExtraError(LTMPError):
    """An optional package is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        """Say that `purpose` needs `package`, and which extra of ltmp brings it."""
        super().__init__(
            f"{purpose} needs the package '{package}', which is not installed: pip install 'ltmp[{extra}]'"
        )


def first_line(error: Exception) -> str:
    """What another library's error says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def printable(text: str) -> str:
    """Text from files and their names as it may go to a terminal: what is no letter, mark or space is spelt out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def cell(text: str, most: int = 1000) -> str:
    """`printable` text as it may stand in a CSV file, where a spreadsheet must not take it for a formula."""
    text = printable(text if len(text) <= most else text[: most - 3] + "...")
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text
