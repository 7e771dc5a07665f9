"""What the OpenAPI document says holds for whatever Schemathesis thinks of."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from ltmp.serve import Limits

from .conftest import serving

pytest.importorskip("schemathesis", reason="schemathesis is not installed")


def test_schemathesis_finds_nothing_undocumented(deployment, tmp_path):
    with serving(deployment, Limits()) as (host, port, service):
        # any bytes are a valid body to OpenAPI, which cannot say "an image": only that check does not apply
        options = ["--max-examples", "10", "--exclude-checks", "positive_data_acceptance", "--seed", "1", "--no-color"]
        command = [sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()", "run", *options]
        # its own settings, and no proxy between the two
        done = subprocess.run(
            [*command, f"http://{host}:{port}/openapi.json"],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "NO_PROXY": "*"},
            timeout=60,
        )
        assert done.returncode == 0, done.stdout
        assert "No issues found" in done.stdout
        text = service.metrics.text().decode()
    statuses = {line.split('status="')[1][:3] for line in text.splitlines() if "ltmp_requests_total{" in line}
    assert "200" in statuses
    assert not any(status.startswith("5") for status in statuses)
