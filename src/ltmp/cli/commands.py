"""The verbs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .. import __version__
from ..checkpoint import ThresholdFile, read
from ..evaluate import describe_machine, tables
from . import options as o
from .progress import progress_bar
from .verbs.app import app_verb
from .verbs.bench import bench_verb
from .verbs.compare import compare_verb
from .verbs.dial import dial_verb
from .verbs.eval import evaluate_verb
from .verbs.export import export_verb
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


app.command("learn")(learn_verb)
app.command("dial")(dial_verb)
app.command("eval")(evaluate_verb)
app.command("bench")(bench_verb)
app.command("compare")(compare_verb)
app.command("export")(export_verb)
app.command("serve")(serve_verb)
app.command("push")(push_verb)
app.command("predict")(predict_verb)
app.command("show")(show_verb)
app.command("report")(report_verb)
app.command("app")(app_verb)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    if version:
        typer.echo(f"ltmp {__version__}")
        raise typer.Exit


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Output folder; the trained model is kept there.")] = Path("ltmp-demo"),
    seed: Annotated[int, typer.Option(help="Of the training.")] = 0,
    debug: o.Debug = False,
) -> None:
    """Train a small ViT on digits, learn three budgets, and draw what came out: about five minutes on two cores."""
    from ..demo import run_demo

    run_demo(out, seed=seed, progress=progress_bar)


@app.command()
def info(
    thresholds: Annotated[
        Path | None, typer.Argument(help="A thresholds file, a folder with one, or USER/REPO.")
    ] = None,
    json: o.Json = None,
    debug: o.Debug = False,
) -> None:
    """Show what a thresholds file holds; without one, the versions and devices here."""
    values = _describe_file(read(thresholds)) if thresholds else describe_machine()
    if json != "-":
        for name, value in values.items():
            typer.echo(f"{name}: {value}")
    if json:
        tables.write_json(values, json)


def _describe_file(file: ThresholdFile) -> dict[str, Any]:
    dial = file.dial
    reach = {} if dial is None else {"dial": f"{dial.lowest:g} to {dial.highest:g}, by {len(dial.share)} budgets"}
    return {
        **file.metadata,
        **reach,
        "variant": file.config.variant,
        "merge": [round(value, 6) for value in file.merge.tolist()],
        "prune": [round(value, 8) for value in file.prune.tolist()],
    }
