"""Errors of the service as problem JSON (RFC 9457): a code for programs and one sentence for people."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

MEDIA_TYPE = "application/problem+json"

STATUS = {
    "bad-request": 400,
    "empty-body": 400,
    "not-found": 404,
    "method-not-allowed": 405,
    "slow-client": 408,
    "body-too-large": 413,
    "too-many-pixels": 413,
    "unsupported-media-type": 415,
    "invalid-parameter": 422,
    "unreadable-image": 422,
    "queue-full": 429,
    "too-many-headers": 431,
    "model-failed": 500,
    "internal-error": 500,
    "not-ready": 503,
    "timeout": 504,
}
"""Problem codes and their HTTP status."""

_SCHEMA = {
    "type": "object",
    "required": ["title", "status", "code", "detail"],
    "properties": {
        "title": {"type": "string", "description": "Reason phrase of the HTTP status."},
        "status": {"type": "integer", "description": "HTTP status."},
        "code": {"type": "string", "enum": list(STATUS), "description": "Kind of problem, for programs."},
        "detail": {"type": "string", "description": "What was wrong, what was expected, and what to do."},
    },
}


class ProblemError(Exception):
    """A request is refused or failed; sent to the client as problem JSON.

    Args:
        code: a key of `STATUS`.
        detail: what was wrong, what was expected, and what to do.
        headers: additional headers of the response.
    """

    def __init__(self, code: str, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.headers = headers or {}

    @property
    def status(self) -> int:
        return STATUS[self.code]

    def body(self) -> dict[str, Any]:
        """Return the problem as a JSON object."""
        title = HTTPStatus(self.status).phrase
        return {"title": title, "status": self.status, "code": self.code, "detail": self.detail}


def documented(*codes: str) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI responses of an endpoint that may answer with these problem codes."""
    by_status: dict[int | str, list[str]] = {}
    for code, status in STATUS.items():
        if code in codes:
            by_status.setdefault(status, []).append(code)
    responses: dict[int | str, dict[str, Any]] = {
        status: {
            "description": f"Problem with code {' or '.join(f'`{code}`' for code in same_status)}.",
            "content": {MEDIA_TYPE: {"schema": _SCHEMA}},
        }
        for status, same_status in by_status.items()
    }
    if "queue-full" in codes:
        responses[STATUS["queue-full"]]["headers"] = {
            "Retry-After": {
                "description": "Seconds to wait before the next attempt.",
                "schema": {"type": "integer", "minimum": 1},
            }
        }
    return responses
