#!/usr/bin/env python3
"""Write the tables of hosts in docs/hosts.md from the test cases in tests/hosts/cases.py and towers.py.

The table of a library is between `<!-- begin: python tools/host_table.py LIBRARY -->` and `<!-- end -->`. With --check,
only fail if the page is stale.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "hosts.md"
BEGIN = r"(?P<begin><!-- begin: python tools/host_table.py (?P<library>\w+) -->\n)"
BLOCK = re.compile(BEGIN + r".*?(?P<end><!-- end -->)", re.DOTALL)


def tables() -> dict[str, str]:
    """Markdown table of each library, with one row per case, in the order of the registry."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "hosts")]
    from cases import CASES
    from towers import READERS

    from ltmp.hosts.fewer import LANGUAGE

    rows: dict[str, list[str]] = {}
    for case in CASES.values():
        status = f"refused: {case.reason or case.refused}" if case.refused else "tested"
        head = ["| class | models | status |", "| --- | --- | --- |"]
        rows.setdefault(case.library, head).append(f"| {case.host} | {case.what} | {status} |")
    for read in READERS:
        head = ["| class | kind | tokens | note |", "| --- | --- | --- | --- |"]
        form = "refused" if read.refused else f"`{read.tokens}`" + (", `fewer`" if read.model in LANGUAGE else "")
        rows.setdefault("readers", head).append(f"| {read.model} | {read.kind} | {form} | {read.note} |")
    return {library: "\n".join(lines) + "\n" for library, lines in rows.items()}


def page() -> str:
    """docs/hosts.md as it should be."""
    text, by_library = PAGE.read_text(), tables()
    missing = by_library.keys() - {match["library"] for match in BLOCK.finditer(text)}
    if missing:
        raise SystemExit(f"{PAGE} has no table for {', '.join(sorted(missing))}")
    return BLOCK.sub(lambda match: f"{match['begin']}\n{by_library[match['library']]}\n{match['end']}", text)


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(PAGE.read_text() != page())
    PAGE.write_text(page())
