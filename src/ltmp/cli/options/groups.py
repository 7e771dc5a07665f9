"""Groups of options: a verb takes a dataclass as parameter, and each of its fields becomes an option."""

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
"""Panels of the help. Options without a panel are listed under "Options"."""


def option(
    help: str,
    panel: str | None = None,
    *names: str,
    within: Range = ANY,
    check_path: Callable[[Any], None] | None = None,
    **settings: Any,
) -> Any:
    """Declare an option, named after its field unless `names` are given. Its value is checked before the verb runs.

    Args:
        panel: the panel of the help that lists it.
        within: range of its numbers, which must be finite in any case.
        check_path: raises if the path that the option names cannot be written.
    """
    # Typer shows these two in the help
    settings |= {name: getattr(within, name) for name in ("min", "max") if getattr(within, name) is not None}
    return typer.Option(*names, help=help, rich_help_panel=panel, callback=_validator(within, check_path), **settings)


def _validator(within: Range, check_path: Callable[[Any], None] | None) -> Callable[..., Any]:
    """A Typer callback that checks the value of an option, or each of its values."""

    def validate(param: typer.CallbackParam, value: Any) -> Any:
        for item in value if isinstance(value, list | tuple) else (value,):
            if isinstance(item, int | float) and not isinstance(item, bool):
                within.check(param.opts[0], item)
            elif item is not None and check_path is not None and _writes_files():
                check_path(item)
        return value

    return validate


def _writes_files() -> bool:
    """Whether this process is the one that writes files. Imports torch only if RANK is set."""
    if "RANK" not in os.environ:
        return True
    from ...distributed import is_first

    return is_first()


_DEBUG = inspect.Parameter(
    "debug",
    inspect.Parameter.KEYWORD_ONLY,
    default=False,
    annotation=Annotated[bool, option("Print the traceback if an error occurs.", OUTPUT, "--debug")],
)
"""Added to every verb; `ltmp.cli.main` looks for it among the arguments."""


def verb(function: Callable[..., None]) -> Callable[..., None]:
    """Turn a function into one for Typer, with the fields of its dataclass parameters as parameters.

    >>> @verb
    ... def show_verb(model: ModelOptions, run: RunOptions, width: int = 224) -> None: ...
    """
    hints = get_type_hints(function, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(function).parameters.items():
        parameters += _parameters(groups[name]) if name in groups else [parameter.replace(annotation=hints[name])]
    # required options come first in the help
    parameters.sort(key=lambda parameter: parameter.default is not parameter.empty)
    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in [*parameters, _DEBUG]]

    @wraps(function)
    def run(*, debug: bool, **values: Any) -> None:
        instances = {
            name: group(**{field.name: values.pop(field.name) for field in fields(group)})
            for name, group in groups.items()
        }
        function(**instances, **values)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    # Typer wraps paragraphs to the terminal, but would keep the line breaks of the source
    run.__doc__ = "\n\n".join(" ".join(paragraph.split()) for paragraph in (inspect.getdoc(run) or "").split("\n\n"))
    return run


def as_arguments(group: Any) -> list[str]:
    """The options of a dataclass that differ from their defaults, as command-line arguments.

    >>> as_arguments(RunOptions(device="cpu", amp=True))
    ['--device', 'cpu', '--amp']
    """
    arguments: list[str] = []
    for field in fields(group):
        value, name = getattr(group, field.name), field.name.replace("_", "-")
        if value is None or value == field.default:
            continue
        if isinstance(value, bool):
            arguments.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list):
            for item in value:
                arguments += [f"--{name}", str(item)]
        else:
            arguments += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return arguments


def _parameters(group: type) -> list[inspect.Parameter]:
    """A parameter for each field of a dataclass."""
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
