"""Options in groups: a parameter of a verb that is a dataclass is one option a field."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from functools import wraps
from typing import Annotated, Any, get_type_hints

import typer

from ...ranges import ANY, Range

MODEL, METHOD, DATA, RUN, OUTPUT = "Model", "Method", "Data", "Running", "Output"
"""Panels of the help."""


def option(
    help: str,
    panel: str | None = None,
    *names: str,
    within: Range = ANY,
    writes: Callable[[Any], None] | None = None,
    **settings: Any,
) -> Any:
    """An option, in a panel of the help, called as its field unless `names` say otherwise.

    It is checked before anything else is done.

    Args:
        within: its numbers, which are finite in any case.
        writes: raises where what the option names cannot be written.
    """
    # Typer shows these two in the help
    settings |= {name: getattr(within, name) for name in ("min", "max") if getattr(within, name) is not None}
    return typer.Option(*names, help=help, rich_help_panel=panel, callback=_checking(within, writes), **settings)


def _checking(within: Range, writes: Callable[[Any], None] | None) -> Callable[..., Any]:
    """A callback of Typer that checks an option's values, of which there may be several."""

    def check(param: typer.CallbackParam, value: Any) -> Any:
        for one in value if isinstance(value, list | tuple) else (value,):
            if isinstance(one, int | float) and not isinstance(one, bool):
                within.check(param.opts[0], one)
            elif one is not None and writes is not None and _is_first():
                writes(one)
        return value

    return check


def _is_first() -> bool:
    """Whether this process writes; asks torch only where several may have been started."""
    if "RANK" not in os.environ:
        return True
    from ...distributed import is_first

    return is_first()


_DEBUG = inspect.Parameter(
    "debug",
    inspect.Parameter.KEYWORD_ONLY,
    default=False,
    annotation=Annotated[bool, option("Show the traceback of an error.", OUTPUT, "--debug")],
)
"""Every verb has it; `ltmp.cli.main` looks for it among the arguments."""


def verb(function: Callable[..., None]) -> Callable[..., None]:
    """A function as Typer takes it: the fields of its dataclass parameters are parameters of their own.

    >>> @verb
    ... def show_verb(model: ModelOptions, run: RunOptions, width: int = 224) -> None: ...
    """
    hints = get_type_hints(function, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(function).parameters.items():
        parameters += _options(groups[name]) if name in groups else [parameter.replace(annotation=hints[name])]
    # what must be given comes first in the help
    parameters.sort(key=lambda one: one.default is not one.empty)
    parameters = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in [*parameters, _DEBUG]]

    @wraps(function)
    def run(*, debug: bool, **values: Any) -> None:
        made = {
            name: group(**{field.name: values.pop(field.name) for field in fields(group)})
            for name, group in groups.items()
        }
        function(**made, **values)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    # Typer wraps to the screen, and would break where the source does, too
    run.__doc__ = "\n\n".join(" ".join(paragraph.split()) for paragraph in (inspect.getdoc(run) or "").split("\n\n"))
    return run


def words(group: Any) -> list[str]:
    """The options of a dataclass that differ from their defaults, as they are given on the command line.

    >>> words(RunOptions(device="cpu", amp=True))
    ['--device', 'cpu', '--amp']
    """
    found: list[str] = []
    for field in fields(group):
        value, name = getattr(group, field.name), field.name.replace("_", "-")
        if value is None or value == field.default:
            continue
        if isinstance(value, bool):
            found.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list):
            found += [word for one in value for word in (f"--{name}", str(one))]
        else:
            found += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return found


def _options(group: type) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields(group)
    ]
