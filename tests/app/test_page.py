"""The page, in a browser where there is one."""

from __future__ import annotations

import shutil
import urllib.parse

import pytest

pytest.importorskip("gradio")
from ltmp.app import build_page, serving_options
from ltmp.app.page import _table

CHROMIUM = shutil.which("chromium")


def test_class_names_are_escaped(explorer, pictures):
    look = explorer.look(explorer.open(pictures[0]), 0.6)
    explorer.deployment.names = ("<b>",) * 5
    look = explorer.look(explorer.open(pictures[0]), 0.6)
    assert "<b>" not in _table(look, 1)
    assert "&lt;b&gt;" in _table(look, 1)


def test_nothing_is_shared_and_uploads_have_a_limit():
    options = serving_options()
    assert options["share"] is False
    assert options["max_file_size"]


@pytest.fixture
def served(explorer):
    page = build_page(explorer)
    page.launch(**serving_options(), server_name="127.0.0.1", quiet=True, prevent_thread_lock=True)
    yield page.local_url
    page.close()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_upload_slide_and_a_bad_file(served, pictures, tmp_path):
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
        tab.wait_for_function("document.querySelector('#figures')?.innerText.includes('costs')")
        said, seen, left = set(), set(), None
        for share in (0.7, 0.8, 0.9, 1.0, 0.65):
            before = tab.inner_text("#figures")
            number = tab.locator("#budget input[type=number]")
            number.fill(str(share))
            number.press("Enter")
            tab.wait_for_function("old => document.querySelector('#figures').innerText != old", arg=before)
            if share == 0.65:
                # the numbers may come before their picture, which is another one than that of the dense model
                another = "old => document.querySelector('#left img').getAttribute('src') != old"
                tab.wait_for_function(another, arg=left)
            tab.wait_for_function("document.querySelector('#left img')?.complete")
            left = tab.get_attribute("#left img", "src")
            seen.add(left)
            said.add(tab.inner_text("#figures").split(";")[0])
        assert len(said) >= 4
        assert len(seen) >= 2
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390
        assert tab.locator("#blocks tr").count() == 4
        tab.set_input_files("#picture input[type=file]", tmp_path / "bad.png")
        tab.wait_for_function("document.querySelector('#figures').innerText.includes('not a picture')")
        browser.close()
    assert (outside, wrong) == ([], [])
