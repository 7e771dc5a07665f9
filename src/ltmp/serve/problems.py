"""Everything the service refuses, as problem JSON (RFC 9457): a code for programs, one sentence for people."""

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
"""Codes and the status each is sent with."""

_SCHEMA = {
    "type": "object",
    "required": ["title", "status", "code", "detail"],
    "properties": {
        "title": {"type": "string", "description": "The status in words."},
        "status": {"type": "integer"},
        "code": {"type": "string", "enum": list(STATUS)},
        "detail": {"type": "string", "description": "What was wrong, what was expected and what to do."},
    },
}


class ProblemError(Exception):
    """A request that is not answered with what it asked for."""

    def __init__(self, code: str, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.headers = headers or {}

    @property
    def status(self) -> int:
        return STATUS[self.code]

    def body(self) -> dict[str, Any]:
        """The problem as JSON."""
        title = HTTPStatus(self.status).phrase
        return {"title": title, "status": self.status, "code": self.code, "detail": self.detail}


def documented(*codes: str) -> dict[int | str, dict[str, Any]]:
    """The answers with these codes, as OpenAPI describes them."""
    answers: dict[int | str, dict[str, Any]] = {}
    for code in sorted(codes, key=STATUS.__getitem__):
        known = [other for other, status in STATUS.items() if status == STATUS[code] and other in codes]
        answers[STATUS[code]] = {
            "description": " or ".join(known),
            "content": {MEDIA_TYPE: {"schema": _SCHEMA}},
        }
        if code == "queue-full":
            answers[STATUS[code]]["headers"] = {
                "Retry-After": {"description": "Seconds to wait.", "schema": {"type": "integer", "minimum": 1}}
            }
    return answers
