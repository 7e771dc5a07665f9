"""The part of the Hugging Face Hub's HTTP API that pushing and loading use, on 127.0.0.1 and in memory."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

TOKEN = "hf_good"


class Hub:
    """Repositories: name to files. Commits are counted; visibility is remembered."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.commits: list[dict[str, Any]] = []
        self.private: dict[str, bool] = {}
        self.requests: list[str] = []
        self.url = ""

    @property
    def sha(self) -> str:
        return hashlib.sha1(str(len(self.commits)).encode()).hexdigest()


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_args: Any) -> None:
            pass

        def answer(self, status: int, body: Any = b"", **headers: str) -> None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def missing(self, what: str) -> None:
            self.answer(404, {"error": what}, X_Error_Code=what, X_Error_Message=what)

        def do_GET(self) -> None:
            hub.requests.append(f"{self.command} {self.path}")
            parts = self.path.partition("?")[0].strip("/").split("/")
            api = parts[:2] == ["api", "models"]
            repo = "/".join(parts[2:4] if api else parts[:2])
            revision = parts[5 if api else 3] if len(parts) > (5 if api else 3) else "main"
            if repo not in hub.files:
                self.missing("RepoNotFound")
            elif revision not in ("main", hub.sha):
                self.missing("RevisionNotFound")
            elif api:
                files = hub.files[repo]
                names = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
                tree = [{"type": "file", "path": n, "size": len(d), "oid": oid(d)} for n, d in files.items()]
                info = {"id": repo, "sha": hub.sha, "siblings": names, "private": False, "tags": [], "downloads": 0}
                self.answer(200, tree if "tree" in parts else info)
            else:
                self.file(hub.files[repo].get("/".join(parts[4:])))

        do_HEAD = do_GET  # noqa: N815 (http.server's name)

        def file(self, data: bytes | None) -> None:
            if data is None:
                self.missing("EntryNotFound")
            else:
                self.answer(200, data, ETag=f'"{oid(data)}"', X_Repo_Commit=hub.sha)

        def do_POST(self) -> None:
            hub.requests.append(f"POST {self.path}")
            body = self.rfile.read(int(self.headers["Content-Length"]))
            parts = self.path.partition("?")[0].strip("/").split("/")
            repo = "/".join(parts[2:4])
            if self.path == "/api/validate-yaml":
                self.answer(200, {"errors": [], "warnings": []})
            elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self.answer(401, {"error": "Invalid username or password."})
            elif self.path == "/api/repos/create":
                self.create(json.loads(body))
            elif repo not in hub.files:
                self.missing("RepoNotFound")
            elif "preupload" in parts:
                named = [file["path"] for file in json.loads(body)["files"]]
                modes = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in named]
                self.answer(200, {"files": modes})
            else:
                self.commit(repo, [json.loads(line) for line in body.splitlines()])

        def create(self, wanted: dict[str, Any]) -> None:
            repo = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
            status = 409 if repo in hub.files else 200
            hub.private.setdefault(repo, "private" in (wanted.get("visibility"), wanted.get("private") and "private"))
            hub.files.setdefault(repo, {})
            self.answer(status, {"url": f"{hub.url}/{repo}", "error": "exists"})

        def commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
            for line in lines:
                if line["key"] == "file":
                    hub.files[repo][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            hub.commits.append(next(line["value"] for line in lines if line["key"] == "header"))
            self.answer(200, {"commitUrl": f"{hub.url}/{repo}/commit/{hub.sha}", "commitOid": hub.sha})

    return Handler


def oid(data: bytes) -> str:
    """What git calls this content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def local_hub() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
