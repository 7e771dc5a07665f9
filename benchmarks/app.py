"""Time the app in headless Chromium: start, first paint, and from a step of the budget slider to the updated page.

python benchmarks/app.py --demo-out ltmp-demo [--screenshots FOLDER]
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from playwright.sync_api import Page, sync_playwright

from ltmp.app import build_page, serving_options
from ltmp.app.default import demo_explorer

PAINT = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
CHANGED = "old => document.querySelector('#figures').innerText != old"


@contextmanager
def say(text: str, total: int | None) -> Iterator[Any]:
    """Print the name of a step instead of a progress bar."""
    print(text, flush=True)
    yield lambda *_: None


def slide(tab: Page, share: float) -> float:
    """Seconds from a new budget to new figures on the page."""
    before = tab.inner_text("#figures")
    number = tab.locator("#budget input[type=number]")
    start = perf_counter()
    number.fill(str(share))
    number.press("Enter")
    tab.wait_for_function(CHANGED, arg=before, polling=10)
    took = perf_counter() - start
    # otherwise a late image of this step would count as the next one's update
    tab.wait_for_timeout(1000)
    return took


def drive(tab: Page, url: str, shares: list[float]) -> dict[str, float]:
    """Open the page, choose a sample and set each budget; the times in seconds."""
    tab.goto(url)
    tab.wait_for_selector("#samples img")
    paint = tab.evaluate(PAINT) / 1000
    tab.locator("#samples button img").nth(3).click()
    tab.wait_for_function("document.querySelector('#figures').innerText.includes('costs')")
    slid = [slide(tab, share) for share in shares]
    return {"first paint s": paint, "slide s": median(slid), "slowest slide s": max(slid)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo-out", type=Path, default=Path("ltmp-demo"))
    parser.add_argument("--screenshots", type=Path)
    arguments = parser.parse_args()
    start = perf_counter()
    page = build_page(demo_explorer(arguments.demo_out, say))
    page.launch(**serving_options(), server_name="127.0.0.1", quiet=True, prevent_thread_lock=True)
    figures = {"start s": perf_counter() - start}
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for scheme, width in (("light", 1280), ("light", 390), ("dark", 1280), ("dark", 390)):
            tab = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 900})
            times = drive(tab, page.local_url, [0.55, 0.65, 0.7, 0.85, 1.0])
            figures |= {f"{name}, {scheme} {width}": value for name, value in times.items()}
            slide(tab, 0.62)
            tab.wait_for_timeout(1500)
            if arguments.screenshots:
                # the browser loads images lazily, when they are about to become visible
                tab.locator("#strip").scroll_into_view_if_needed()
                tab.wait_for_timeout(1000)
                arguments.screenshots.mkdir(parents=True, exist_ok=True)
                tab.screenshot(path=arguments.screenshots / f"{scheme}-{width}.png", full_page=True)
            tab.close()
        browser.close()
    page.close()
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}, indent=2))


if __name__ == "__main__":
    main()
