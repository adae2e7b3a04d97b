"""A server on this machine that speaks the Hugging Face hub's protocol, and fails as told."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_tests"


@dataclass
class Hub:
    """One repository, what is wrong with it, and what it was asked."""

    folder: Path
    repository: str = "someone/tiny-GGUF"
    is_gated: bool = False
    """Its files need TOKEN, and an account that has been let in."""
    is_private: bool = False
    lets_in: bool = True
    """Has the account of TOKEN been let in?"""
    cuts: list[tuple[int, str]] = field(default_factory=list)
    """For each of the next answers with content up to its end: after how many bytes what happens: "close", "reset", or "hang", no more."""
    corrupt: bool = False
    """Content has a wrong byte in the end."""
    digests: dict[str, str] = field(default_factory=dict)
    """What is said of files that are too large to be hashed."""
    asked: list[str] = field(default_factory=list)
    """Method, path, range and token of each request."""
    sent: dict[str, int] = field(default_factory=dict)
    """Bytes of content, by file."""
    address: str = ""
    hangs: threading.Event = field(default_factory=threading.Event)

    def digest(self, path: str) -> str:
        if path not in self.digests:
            self.digests[path] = hashlib.sha256((self.folder / path).read_bytes()).hexdigest()
        return self.digests[path]

    def paths(self) -> list[str]:
        return [path.relative_to(self.folder).as_posix() for path in sorted(self.folder.rglob("*")) if path.is_file()]

    def contents(self) -> int:
        """Requests for content."""
        return sum(line.startswith("GET /cdn/") for line in self.asked)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_json(self, value: object) -> None:
        self.answer(200, json.dumps(value).encode(), Content_Type="application/json")

    def refused(self, of_files: bool) -> bool:
        """Answer as the hub does to somebody who may not see it."""
        hub, token = self.hub, self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token != TOKEN:
            self.answer(401, X_Error_Message="Invalid credentials in Authorization header")
        elif hub.is_private and token != TOKEN:
            self.answer(401, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        elif hub.is_gated and of_files and not (token == TOKEN and hub.lets_in):
            self.answer(403 if token else 401, X_Error_Code="GatedRepo", X_Error_Message="Access to this model is restricted")
        else:
            return False
        return True

    def do_GET(self) -> None:
        hub, path = self.hub, unquote(self.path.partition("?")[0])
        hub.asked.append(f"{self.command} {path} {self.headers.get('Range', 'all')} {'token' if 'Authorization' in self.headers else 'anyone'}")
        if path.startswith("/cdn/"):
            self.answer_content(path.removeprefix("/cdn/"))
        elif match := re.fullmatch(rf"/(?:api/models/)?{hub.repository}(?:/(resolve|revision|tree)/([^/]+)(?:/(.*))?)?", path):
            self.answer_repository(match[1] or "revision", match[2] or "main", match[3] or "")
        else:
            self.answer(404 if "Authorization" in self.headers else 401, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")

    do_HEAD = do_GET

    def answer_repository(self, what: str, revision: str, file: str) -> None:
        hub = self.hub
        if self.refused(of_files=what == "resolve"):
            return
        if revision not in ("main", "v1", COMMIT):
            self.answer(404, X_Error_Code="RevisionNotFound", X_Error_Message=f"Invalid rev id: {revision}")
        elif what == "revision":
            files = [{"rfilename": path, "size": self.size(path), "blobId": "0" * 40, "lfs": self.lfs(path)} for path in hub.paths()]
            self.answer_json({"_id": "1", "id": hub.repository, "sha": COMMIT, "siblings": files})
        elif what == "tree":
            self.answer_json(self.entries(hub.paths()))
        elif file not in hub.paths():
            self.answer(404, X_Error_Code="EntryNotFound", X_Error_Message="Entry not found")
        else:  # content is elsewhere: at another host, which must not be shown the token
            self.answer(302, Location=f"{hub.address.replace('127.0.0.1', 'localhost')}/cdn/{file}?signature=1", X_Repo_Commit=COMMIT,
                        ETag='"of-the-redirect"', X_Linked_ETag=f'"{hub.digest(file)}"', X_Linked_Size=str(self.size(file)))  # fmt: skip

    def answer_content(self, file: str) -> None:
        hub, size = self.hub, self.size(file)
        asked = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        begin, end = (int(asked[1]), min(size, int(asked[2] or size - 1) + 1)) if asked else (0, size)
        with (hub.folder / file).open("rb") as source:
            source.seek(begin)
            body = bytearray(source.read(end - begin) if self.command == "GET" else b"")
        if hub.corrupt and end == size and body:
            body[-1] ^= 1
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(end - begin))
        self.send_header("ETag", f'"{hub.digest(file)}"')
        self.send_header("Accept-Ranges", "bytes")
        if asked:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{size}")
        self.end_headers()
        if self.command == "HEAD":
            return
        is_to_the_end = not asked or not asked[2]  # a header is asked for with an end
        n_bytes, how = hub.cuts.pop(0) if hub.cuts and is_to_the_end else (len(body), "")
        hub.sent[file] = hub.sent.get(file, 0) + len(body[:n_bytes])
        with contextlib.suppress(ConnectionError):
            self.wfile.write(body[:n_bytes])
            self.wfile.flush()
            if how == "hang":
                hub.hangs.set()
                threading.Event().wait(60)
        if how:
            if how == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True

    def do_POST(self) -> None:
        """paths-info: which of these paths are there."""
        paths = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["paths"]
        self.answer_json(self.entries([path for path in self.hub.paths() if path in paths]))

    def entries(self, paths: list[str]) -> list[dict[str, object]]:
        return [{"type": "file", "oid": "0" * 40, "size": self.size(path), "path": path, "lfs": {**self.lfs(path), "oid": self.hub.digest(path)}}
                for path in paths]  # fmt: skip

    def lfs(self, path: str) -> dict[str, object]:
        return {"sha256": self.hub.digest(path), "size": self.size(path), "pointerSize": 134}

    def size(self, path: str) -> int:
        return (self.hub.folder / path).stat().st_size

    def log_message(self, *_: object) -> None:
        """Quiet."""


@contextlib.contextmanager
def running(folder: Path) -> Iterator[Hub]:
    """A hub with the files of a folder."""
    hub = Hub(folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OfThisHub", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
