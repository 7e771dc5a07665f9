"""The page of the app, in Gradio."""

from __future__ import annotations

import logging
import math
import os
from html import escape
from typing import Any

from ..errors import LTMPError, MissingExtraError, first_line
from ..hosts.attach import thresholds_of
from ..sanitize import printable
from .explorer import WIDTH, Comparison, Explorer

log = logging.getLogger(__name__)

MAX_UPLOAD = "20mb"

STYLE = """
.ltmp-blocks table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }
.ltmp-blocks th, .ltmp-blocks td { padding: .15rem .6rem; text-align: left; }
.ltmp-blocks tr.selected { background: var(--background-fill-secondary); font-weight: 600; }
.ltmp-blocks { overflow-x: auto; }
#samples .grid-wrap { min-height: 0; height: auto; max-height: 16rem; }
#samples .grid-container { grid-template-columns: repeat(5, 1fr); height: auto; }
#samples .grid-container > * { min-width: 0; width: 100%; }
#samples .thumbnail-item { width: 100% !important; height: auto !important; aspect-ratio: 1; }
#strip img { width: 100%; height: auto; }
#strip, #strip .image-container, #strip .image-frame { width: 100%; height: auto; min-height: 4rem; }
#picture img { min-height: 10rem; object-fit: contain; }
.ltmp-figures { font-size: 1.1em; }
@media (max-width: 600px) {
  .ltmp-blocks table { font-size: .85em; }
  .ltmp-blocks th, .ltmp-blocks td { padding: .15rem .25rem !important; }
  #strip { overflow-x: auto !important; }
  #strip img { width: 46rem; max-width: none; }
}
footer { display: none !important; }
"""


def build_page(explorer: Explorer) -> Any:
    """Return the page as a `gradio.Blocks`; start it with `launch(**serving_options())`.

    Raises:
        MissingExtraError: Gradio is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio as gr
    except ImportError as error:
        raise MissingExtraError("gradio", "app", "The app") from error

    budgets = explorer.budgets

    def open_image(path: str | None, share: float, block: int) -> list[Any]:
        if path is None:
            return [None, None, *empty]
        try:
            opened = explorer.open(path)
        except LTMPError as error:
            # only the reason, at the end of the message: the path is the server's own
            message = f"This file is not a picture that can be read: {str(error).rpartition(': ')[2]}."
            gr.Warning(message)
            return [None, None, None, message, *empty[2:]]
        return [opened, *set_budget(opened, share, block)]

    def set_budget(opened: Any, share: float, block: int) -> Any:
        if opened is None:
            # leave the page as it is: it may show why the picture could not be read
            return gr.skip()
        comparison = explorer.compare(opened, share)
        return [comparison, *_panels(comparison, block), comparison.strip()]

    def set_block(comparison: Comparison | None, block: int) -> Any:
        return gr.skip() if comparison is None else _panels(comparison, block)

    def choose(event: Any) -> str:
        return str(event.value["image"]["path"])

    # Gradio passes the event by its annotated type, which is only available after the import
    choose.__annotations__["event"] = gr.SelectData

    depth = thresholds_of(explorer.model).depth
    output: Any = {"show_label": False, "interactive": False, "buttons": [], "format": "png"}
    empty = [None, "", None, None, "", None]
    with gr.Blocks(title="ltmp", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(
            "# Which patches survive\n"
            "Block by block, similar patches are merged into one token and unimportant ones are pruned: more of them "
            f"in easy images, fewer in hard ones. Choose a picture and move the budget slider. {budgets.explain()} The "
            "cost of the chosen picture is shown below."
        )
        opened, comparison = gr.State(), gr.State()
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                image = gr.Image(
                    explorer.samples[0] if explorer.samples else None, label="Picture", height=260, image_mode=None,
                    sources=["upload", "clipboard"], elem_id="picture",
                )  # fmt: skip
                # pass the path on: the explorer reads the file, and reports why that fails
                image.preprocess = _path_of  # type: ignore[method-assign]
                samples = gr.Gallery(
                    list(explorer.samples), label="Pictures to choose from", show_label=False, columns=5, height="auto",
                    allow_preview=False, interactive=False, buttons=[], visible=bool(explorer.samples),
                    elem_id="samples",
                )  # fmt: skip
                # rounded down to hundredths, so that the steps end at 1
                share = gr.Slider(
                    math.floor(100 * budgets.lowest) / 100, 1.0, round(budgets.start, 2), step=0.01, elem_id="budget",
                    label="Budget", info="Share of the dense model's multiply-adds, averaged over pictures.",
                    buttons=[],
                )  # fmt: skip
                block = gr.Slider(
                    0, depth, max(1, depth - 1), step=1, elem_id="block", label="After block", buttons=[],
                    info="0 is the picture itself.",
                )  # fmt: skip
            with gr.Column(scale=3, min_width=300):
                figures = gr.Markdown(elem_classes="ltmp-figures", elem_id="figures")
                picture = gr.Image(label="Tokens left", height=WIDTH, elem_id="left", **output)
        with gr.Row():
            dense_top = gr.Label(label="Dense model", num_top_classes=5, elem_id="dense", min_width=280)
            reduced_top = gr.Label(label="Reduced model", num_top_classes=5, elem_id="reduced", min_width=280)
        across = gr.Image(label="Block by block", elem_id="strip", **output)
        table = gr.HTML(elem_classes="ltmp-blocks", elem_id="blocks")
        panels = [picture, figures, dense_top, reduced_top, table]
        quiet: Any = {"show_progress": "hidden", "trigger_mode": "always_last"}
        one_at_a_time: Any = {"concurrency_limit": 1, "concurrency_id": "model", **quiet}
        opening: Any = {"inputs": [image, share, block], "outputs": [opened, comparison, *panels, across]}
        opening |= one_at_a_time
        # the first sample is opened when the page loads
        gr.on([page.load, image.upload, image.clear], open_image, **opening)
        samples.select(choose, None, image).then(open_image, **opening)
        share.change(set_budget, [opened, share, block], [comparison, *panels, across], **one_at_a_time)
        block.change(set_block, [comparison, block], panels, **quiet)
    _log_bad_requests(page)
    return page


def _log_bad_requests(page: Any) -> None:
    """Log malformed requests and uploads, which the page itself never sends, in one line without a traceback."""
    import gradio as gr

    original = page.preprocess_data

    async def preprocess_data(*args: Any, **kwargs: Any) -> Any:
        try:
            return await original(*args, **kwargs)
        except gr.Error:
            raise
        except Exception as error:
            log.warning("a request was refused: %s", printable(first_line(error)))
            raise gr.Error(f"This request cannot be read: {first_line(error)}", print_exception=False) from None

    page.preprocess_data = preprocess_data
    logging.getLogger("uvicorn.error").addFilter(_in_one_line)


def _in_one_line(record: logging.LogRecord) -> bool:
    """A logging filter that replaces the traceback of a failed request by its reason."""
    if record.exc_info and isinstance(record.exc_info[1], Exception):
        reason = printable(first_line(record.exc_info[1]))
        record.msg, record.args, record.exc_info = f"{record.getMessage().strip()}: {reason}", (), None
    return True


def serving_options() -> dict[str, Any]:
    """Return options for `launch`: limited uploads, no sharing, and nothing fetched from other hosts."""
    import gradio as gr

    # Gradio checks that it is up by a request to itself, which must not go through a proxy
    for name in ("no_proxy", "NO_PROXY"):
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), "127.0.0.1,localhost")))
    fonts = ["system-ui", "sans-serif"]
    theme = gr.themes.Default(font=fonts, font_mono=["ui-monospace", "monospace"])
    return {
        "share": False, "max_file_size": MAX_UPLOAD, "theme": theme, "css": STYLE, "ssr_mode": False,
        "footer_links": [], "show_error": True, "enable_monitoring": False, "strict_cors": True, "_frontend": False,
    }  # fmt: skip


def _path_of(payload: Any) -> str | None:
    return None if payload is None else str(payload.path)


def _panels(comparison: Comparison, block: int) -> list[Any]:
    """The values of the panels: picture after `block`, figures, both models' predictions, and the table of blocks."""
    block = min(int(block), comparison.depth)
    return [
        comparison.picture(block),
        _figures(comparison),
        dict(comparison.opened.dense.blocks[-1]),
        dict(comparison.reduced.blocks[-1]),
        _table(comparison, block),
    ]


def _figures(comparison: Comparison) -> str:
    """Cost, tokens and times, in Markdown."""
    reduction = comparison.reduction
    cost = (
        f"This picture costs **{reduction.share:.2f}** of the dense model's multiply-adds; "
        f"{reduction.left} of {reduction.tokens} tokens are left.  \n"
    )
    if not comparison.timed:
        hint = "`ltmp app --model ... --images ...`"
        return f"{cost}This model is too small to gain time. A ViT-S or a larger model does: {hint}."
    dense_ms, reduced_ms = (1000 * result.seconds for result in (comparison.opened.dense, comparison.reduced))
    slower = " Reduction pays off with larger models and batches: `ltmp bench`." if reduced_ms > dense_ms else ""
    times = f"Dense {dense_ms:.1f} ms, reduced **{reduced_ms:.1f} ms**: one picture at a time, on this machine."
    return f"{cost}{times}{slower}"


def _table(comparison: Comparison, block: int) -> str:
    """An HTML table of tokens and top predictions after each block."""
    reduction = comparison.reduction
    rows = []
    for number, kept in enumerate(reduction.kept, 1):
        top = (comparison.opened.dense.blocks[number - 1][0], comparison.reduced.blocks[number - 1][0])
        cells = "".join(f"<td>{escape(name)} ({probability:.0%})</td>" for name, probability in top)
        selected = ' class="selected"' if number == block else ""
        rows.append(f"<tr{selected}><td>{number}</td><td>{kept} of {reduction.tokens}</td>{cells}</tr>")
    head = "<tr><th>after block</th><th>tokens</th><th>dense model</th><th>reduced model</th></tr>"
    note = "Predictions of the model's own final norm and head, with the later blocks left out."
    return f"<table>{head}{''.join(rows)}</table><p>{note}</p>"
