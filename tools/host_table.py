#!/usr/bin/env python3
"""Write the table of hosts in docs/hosts.md from the cases of the tests (tests/hosts/cases.py); --check only looks."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "hosts.md"
BEGIN, END = "<!-- begin: python tools/host_table.py -->\n", "<!-- end -->\n"


def table() -> str:
    """One row a case, in the registry's order."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "hosts")]
    from cases import CASES

    rows = ["| library | class | what | status |", "| --- | --- | --- | --- |"]
    for case in CASES.values():
        status = f"refused: {case.reason or case.refused}" if case.refused else "tested"
        rows.append(f"| {case.library} | {case.host} | {case.what} | {status} |")
    return "\n".join(rows) + "\n"


def page() -> str:
    """docs/hosts.md as it should be."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(PAGE.read_text() != page())
    PAGE.write_text(page())
