"""The page, in a browser where there is one."""

from __future__ import annotations

import http.client
import json
import logging
import shutil
import time
import urllib.parse

import pytest

pytest.importorskip("gradio")
from ltmp.app import build_page, serving_options
from ltmp.app.page import _figures, _panels, _table

CHROMIUM = shutil.which("chromium")


def test_class_names_are_escaped(explorer, pictures):
    comparison = explorer.compare(explorer.open(pictures[0]), 0.6)
    explorer.deployment.names = ("<b>",) * 5
    comparison = explorer.compare(explorer.open(pictures[0]), 0.6)
    assert "<b>" not in _table(comparison, 1)
    assert "&lt;b&gt;" in _table(comparison, 1)


def test_nothing_is_shared_and_uploads_have_a_limit():
    options = serving_options()
    assert options["share"] is False
    assert options["max_file_size"]


def test_the_panels_hold_the_models_own_answers(explorer, pictures):
    opened = explorer.open(pictures[0])
    comparison = explorer.compare(opened, 0.6)
    for block in (0, 1, 3):
        _, _, dense, reduced, _ = _panels(comparison, block)
        assert dense == dict(opened.dense.blocks[-1])
        assert reduced == dict(comparison.reduced.blocks[-1])


def test_times_that_mean_nothing_are_not_panelsn(explorer, pictures):
    opened = explorer.open(pictures[0])
    assert " ms, reduced **" in _figures(explorer.compare(opened, 0.6))
    explorer.timed = False
    assert " ms" not in _figures(explorer.compare(opened, 0.6))


@pytest.mark.parametrize("lowest", [0.6, 0.349755])
def test_the_slider_reaches_one_and_a_picture_is_there(explorer, lowest, monkeypatch):
    monkeypatch.setattr(type(explorer.budgets), "lowest", lowest)
    blocks = build_page(explorer).blocks.values()
    budget = next(block for block in blocks if getattr(block, "elem_id", "") == "budget")
    steps = (budget.maximum - budget.minimum) / budget.step
    assert budget.maximum == 1
    assert steps == pytest.approx(round(steps))
    assert budget.minimum <= lowest < budget.minimum + 0.01
    picture = next(block for block in blocks if getattr(block, "elem_id", "") == "picture")
    assert picture.value


def test_requests_that_nobody_meant_get_a_line_and_no_traceback(explorer, monkeypatch, caplog, capsys):
    monkeypatch.setattr(logging.getLogger("ltmp.app.page"), "handlers", [caplog.handler])
    page = build_page(explorer)
    page.launch(**serving_options(), server_name="127.0.0.1", quiet=True, prevent_thread_lock=True)
    try:
        address = urllib.parse.urlsplit(page.local_url)

        def post(path: str, body: bytes, kind: str) -> int:
            connection = http.client.HTTPConnection(address.hostname, address.port, timeout=20)
            connection.request("POST", f"/gradio_api/{path}", body, {"content-type": kind})
            status = connection.getresponse().status
            connection.close()
            return status

        field = b'--x\r\nContent-Disposition: form-data; name="files"\r\n\r\nno file\r\n--x--\r\n'
        assert post("upload", field, "multipart/form-data; boundary=x") == 500
        call = json.dumps({"data": ["/etc/passwd", 0.7, 2], "fn_index": 0, "session_hash": "x"}).encode()
        assert post("queue/join", call, "application/json") == 200
        deadline = time.monotonic() + 20
        while "a request was refused" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        page.close()
    # uvicorn's own handler writes to the screen
    said = caplog.text + "".join(capsys.readouterr())
    assert "Exception in ASGI application: File is not" in said
    assert "a request was refused: " in said
    assert "Traceback" not in said


def test_sliders_leave_what_is_said_of_a_bad_file(explorer):
    calls = {function.fn.__name__: function.fn for function in build_page(explorer).fns.values()}
    unchanged = {"__type__": "update"}
    assert calls["set_budget"](None, 0.6, 2) == unchanged
    assert calls["set_block"](None, 2) == unchanged


@pytest.fixture
def served(explorer):
    page = build_page(explorer)
    page.launch(**serving_options(), server_name="127.0.0.1", quiet=True, prevent_thread_lock=True)
    yield page.local_url
    page.close()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_upload_slide_and_a_bad_file(served, explorer, pictures, tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api")
    pictures[0].save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    outside, wrong = [], []

    def only_here(route):
        if urllib.parse.urlsplit(route.request.url).hostname in ("127.0.0.1", None):
            route.continue_()
        else:
            outside.append(route.request.url)
            route.abort()

    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 390, "height": 800})
        tab.set_default_timeout(60_000)
        tab.route("**/*", only_here)
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.goto(served)
        tab.set_input_files("#picture input[type=file]", tmp_path / "good.png")
        opened, costs, left = explorer.open(tmp_path / "good.png"), set(), None
        for share in (0.6, 0.7, 1.0, 0.65):
            number = tab.locator("#budget input[type=number]")
            number.fill(str(share))
            number.press("Enter")
            cost = _figures(explorer.compare(opened, share)).splitlines()[0].replace("**", "").strip()
            tab.wait_for_function("cost => document.querySelector('#figures')?.innerText.includes(cost)", arg=cost)
            costs.add(cost)
            if share == 0.65:
                # the numbers may come before their picture, which is another one than that of the dense model
                another = "old => document.querySelector('#left img').getAttribute('src') != old"
                tab.wait_for_function(another, arg=left)
            tab.wait_for_function("document.querySelector('#left img')?.complete")
            left = tab.get_attribute("#left img", "src")
        assert len(costs) >= 3
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390
        assert tab.locator("#blocks tr").count() == 4
        tab.set_input_files("#picture input[type=file]", tmp_path / "bad.png")
        tab.wait_for_function("document.querySelector('#figures').innerText.includes('not a picture')")
        browser.close()
    assert (outside, wrong) == ([], [])
