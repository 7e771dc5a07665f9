"""The verbs."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import __version__
from .verbs.app import app_verb
from .verbs.bench import bench_verb
from .verbs.compare import compare_verb
from .verbs.demo import demo_verb
from .verbs.dial import dial_verb
from .verbs.eval import eval_verb
from .verbs.export import export_verb
from .verbs.info import info_verb
from .verbs.learn import learn_verb
from .verbs.predict import predict_verb
from .verbs.push import push_verb
from .verbs.report import report_verb
from .verbs.serve import serve_verb
from .verbs.show import show_verb

app = typer.Typer(
    help="Learned Thresholds token Merging and Pruning: make a vision transformer cheaper, image by image.",
    epilog="Start with: ltmp demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

for verb in (
    learn_verb, dial_verb, eval_verb, bench_verb, compare_verb, export_verb, serve_verb, push_verb, predict_verb,
    show_verb, report_verb, app_verb, demo_verb, info_verb,
):  # fmt: skip
    app.command(verb.__name__.removesuffix("_verb"))(verb)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    if version:
        typer.echo(f"ltmp {__version__}")
        raise typer.Exit
