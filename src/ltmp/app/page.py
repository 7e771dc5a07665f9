"""The page, in Gradio."""

from __future__ import annotations

import logging
import math
import os
from html import escape
from typing import Any

from ..errors import LTMPError, MissingExtraError, first_line
from ..hosts.attach import thresholds_of
from ..sanitize import printable
from .explorer import WIDTH, Explorer, Look

log = logging.getLogger(__name__)

LARGEST = "20mb"
"""Larger uploads are refused."""

STYLE = """
.ltmp-blocks table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }
.ltmp-blocks th, .ltmp-blocks td { padding: .15rem .6rem; text-align: left; }
.ltmp-blocks tr.here { background: var(--background-fill-secondary); font-weight: 600; }
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
    """A `gradio.Blocks`; start it with `launch(**serving_options())`.

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
            return [None, None, *nothing]
        try:
            opened = explorer.open(path)
        except LTMPError as error:
            # its last words: the path is the server's
            message = f"This is not a picture that can be read: {str(error).rpartition(': ')[2]}."
            gr.Warning(message)
            return [None, None, None, message, *nothing[2:]]
        return [opened, *set_budget(opened, share, block)]

    def set_budget(opened: Any, share: float, block: int) -> Any:
        if opened is None:
            # why there is nothing may be on the page
            return gr.skip()
        look = explorer.look(opened, share)
        return [look, *_show(look, block), look.strip()]

    def set_block(look: Look | None, block: int) -> Any:
        return gr.skip() if look is None else _show(look, block)

    def choose(event: Any) -> str:
        return str(event.value["image"]["path"])

    # Gradio finds the event by its type, which is known here alone
    choose.__annotations__["event"] = gr.SelectData

    depth = thresholds_of(explorer.model).depth
    drawn: Any = {"show_label": False, "interactive": False, "buttons": [], "format": "png"}
    nothing = [None, "", None, None, "", None]
    with gr.Blocks(title="ltmp", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(
            "# Which patches survive\n"
            "Similar patches merge into one token, unimportant ones are dropped, block by block and image by image. "
            f"Choose a picture and slide the budget. {budgets.explain()} What this picture really costs is said below."
        )
        opened, look = gr.State(), gr.State()
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                image = gr.Image(
                    explorer.samples[0] if explorer.samples else None, label="Picture", height=260, image_mode=None,
                    sources=["upload", "clipboard"], elem_id="picture",
                )  # fmt: skip
                # reading the file, and saying why that fails, is ours
                image.preprocess = _path_of  # type: ignore[method-assign]
                samples = gr.Gallery(
                    list(explorer.samples), label="Pictures to choose from", show_label=False, columns=5, height="auto",
                    allow_preview=False, interactive=False, buttons=[], visible=bool(explorer.samples),
                    elem_id="samples",
                )  # fmt: skip
                # whole hundredths, so that its steps end at 1
                share = gr.Slider(
                    math.floor(100 * budgets.lowest) / 100, 1.0, round(budgets.start, 2), step=0.01, elem_id="budget",
                    label="Budget", info="Share of the dense model's multiply-adds, on average over pictures.",
                    buttons=[],
                )  # fmt: skip
                block = gr.Slider(
                    0, depth, max(1, depth - 1), step=1, elem_id="block", label="After block", buttons=[],
                    info="0 is the picture itself.",
                )  # fmt: skip
            with gr.Column(scale=3, min_width=300):
                figures = gr.Markdown(elem_classes="ltmp-figures", elem_id="figures")
                picture = gr.Image(label="What is left", height=WIDTH, elem_id="left", **drawn)
        with gr.Row():
            dense_top = gr.Label(label="Dense answers", num_top_classes=5, elem_id="dense", min_width=280)
            reduced_top = gr.Label(label="Reduced answers", num_top_classes=5, elem_id="reduced", min_width=280)
        across = gr.Image(label="Block by block", elem_id="strip", **drawn)
        table = gr.HTML(elem_classes="ltmp-blocks", elem_id="blocks")
        shown = [picture, figures, dense_top, reduced_top, table]
        one: Any = {"concurrency_limit": 1, "concurrency_id": "model", "trigger_mode": "always_last"}
        one["show_progress"] = "hidden"
        opening: Any = {"inputs": [image, share, block], "outputs": [opened, look, *shown, across], **one}
        # the first picture is there before anybody chose one
        gr.on([page.load, image.upload, image.clear], open_image, **opening)
        samples.select(choose, None, image).then(open_image, **opening)
        share.change(set_budget, [opened, share, block], [look, *shown, across], **one)
        block.change(set_block, [look, block], shown, show_progress="hidden", trigger_mode="always_last")
    _refuse_in_words(page)
    return page


def _refuse_in_words(page: Any) -> None:
    """Requests that the page itself never makes, and uploads that are none, get a line in the log, no traceback."""
    import gradio as gr

    understand = page.preprocess_data

    async def preprocess_data(*arguments: Any, **named: Any) -> Any:
        try:
            return await understand(*arguments, **named)
        except gr.Error:
            raise
        except Exception as error:
            log.warning("a request was refused: %s", printable(first_line(error)))
            raise gr.Error(f"This request cannot be read: {first_line(error)}", print_exception=False) from None

    page.preprocess_data = preprocess_data
    logging.getLogger("uvicorn.error").addFilter(_in_one_line)


def _in_one_line(record: logging.LogRecord) -> bool:
    """The server's answer to a request that failed: its reason in place of a traceback."""
    if record.exc_info and isinstance(record.exc_info[1], Exception):
        reason = printable(first_line(record.exc_info[1]))
        record.msg, record.args, record.exc_info = f"{record.getMessage().strip()}: {reason}", (), None
    return True


def serving_options() -> dict[str, Any]:
    """How the page is served: with a limit on uploads, nothing shared, nothing fetched from elsewhere."""
    import gradio as gr

    # Gradio asks itself whether it is there, which must not go through a proxy
    for name in ("no_proxy", "NO_PROXY"):
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), "127.0.0.1,localhost")))
    fonts = ["system-ui", "sans-serif"]
    theme = gr.themes.Default(font=fonts, font_mono=["ui-monospace", "monospace"])
    return {
        "share": False, "max_file_size": LARGEST, "theme": theme, "css": STYLE, "ssr_mode": False, "footer_links": [],
        "show_error": True, "enable_monitoring": False, "strict_cors": True, "_frontend": False,
    }  # fmt: skip


def _path_of(payload: Any) -> str | None:
    return None if payload is None else str(payload.path)


def _show(look: Look, block: int) -> list[Any]:
    """Picture and table after `block`; figures, and the models' own answers."""
    block = min(int(block), look.depth)
    return [
        look.picture(block),
        _figures(look),
        dict(look.opened.dense.blocks[-1]),
        dict(look.reduced.blocks[-1]),
        _table(look, block),
    ]


def _figures(look: Look) -> str:
    cost = (
        f"This picture costs **{look.seen.share:.2f}** of the dense model's multiply-adds; "
        f"{look.seen.left} of {look.seen.tokens} tokens are left.  \n"
    )
    if not look.timed:
        return f"{cost}This small model gains no time; from a ViT-S on it does: `ltmp app --model ... --images ...`."
    dense_ms, reduced_ms = (1000 * answers.seconds for answers in (look.opened.dense, look.reduced))
    slower = " Reduction pays with larger models and batches: `ltmp bench`." if reduced_ms > dense_ms else ""
    times = f"Dense {dense_ms:.1f} ms, reduced **{reduced_ms:.1f} ms**: one picture at a time, on this machine."
    return f"{cost}{times}{slower}"


def _table(look: Look, block: int) -> str:
    """Tokens and first answers after each block."""
    rows = []
    for number, kept in enumerate(look.seen.kept, 1):
        answers = (look.opened.dense.blocks[number - 1][0], look.reduced.blocks[number - 1][0])
        cells = "".join(f"<td>{escape(name)} ({chance:.0%})</td>" for name, chance in answers)
        here = ' class="here"' if number == block else ""
        rows.append(f"<tr{here}><td>{number}</td><td>{kept} of {look.seen.tokens}</td>{cells}</tr>")
    head = "<tr><th>after block</th><th>tokens</th><th>dense would say</th><th>reduced would say</th></tr>"
    note = "What the model's own last norm and head read from the tokens at that point."
    return f"<table>{head}{''.join(rows)}</table><p>{note}</p>"
