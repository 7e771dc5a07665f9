"""Errors for the user: one sentence with what is wrong, what was expected and what to do."""

INTERRUPTED = 130
"""Exit code after Ctrl-C."""


class LTMPError(Exception):
    """A failure the user can act on. The command line prints its message and exits with `exit_code`."""

    exit_code = 1


class UsageError(LTMPError):
    """The call itself is wrong: an option, a name or a combination that cannot work."""

    exit_code = 2


class MissingExtraError(LTMPError):
    """An optional package is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        """State that `purpose` needs `package`, and which extra of ltmp installs it."""
        super().__init__(
            f"{purpose} needs the package '{package}', which is not installed: pip install 'ltmp[{extra}]'"
        )


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or the name of its class if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
