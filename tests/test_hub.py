"""Models from a hub: a small server on this machine speaks the hub's protocol, and a child process is told to ask it."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import python
from make_models import write_tiny

REPOSITORY, FILE = "someone/tiny-GGUF", "tiny.Q4_0.gguf"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """One repository with one file."""

    protocol_version = "HTTP/1.1"
    content = b""
    asked: list[str]

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        self.asked.append(f"{self.command} {self.path}")
        name = re.fullmatch(rf"/{REPOSITORY}/resolve/(?:main|{COMMIT})/([^?]*)", self.path)
        if name and name[1] == FILE:
            known = {"ETag": f'"{hashlib.sha256(self.content).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            begin = int(re.match(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
            status = 206 if begin else 200
            if begin:
                known["Content-Range"] = f"bytes {begin}-{len(self.content) - 1}/{len(self.content)}"
            self.answer(status, self.content[begin:], **known)
        elif self.path.startswith(f"/api/models/{REPOSITORY}/tree/"):
            entry = {"type": "file", "oid": "0" * 40, "size": len(self.content), "path": FILE}
            self.answer(200, json.dumps([entry]).encode(), Content_Type="application/json")
        elif re.match(rf"/api/models/{REPOSITORY}(/revision/main)?(\?|$)", self.path):
            about = {"_id": "1", "id": REPOSITORY, "sha": COMMIT, "siblings": [{"rfilename": FILE}]}
            self.answer(200, json.dumps(about).encode(), Content_Type="application/json")
        elif self.path.startswith(f"/{REPOSITORY}/"):
            self.answer(404, b"", X_Error_Code="EntryNotFound", X_Error_Message="Entry not found")
        else:
            self.answer(404, b"", X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """Its address, and what it was asked."""
    write_tiny(tmp_path / FILE)
    asked: list[str] = []
    handler = type("TinyHub", (Hub,), {"content": (tmp_path / FILE).read_bytes(), "asked": asked})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def ask(hub: str, home: Path, code: str):
    setting = {"HF_ENDPOINT": hub, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    return python(code, **setting)


def test_hf_names_a_file_of_a_repository_which_is_fetched_once(hub, tmp_path):
    address, asked = hub
    code = f"from asrkf_gguf import resolve_model; print(resolve_model('hf:{REPOSITORY}/{FILE}'))"
    first = ask(address, tmp_path / "home", code)
    assert first.returncode == 0, first.stderr
    assert Path(first.stdout.strip()).read_bytes() == (tmp_path / FILE).read_bytes()
    n_fetched = sum(line.startswith("GET") for line in asked)
    assert n_fetched >= 1
    again = ask(address, tmp_path / "home", code)
    assert again.stdout == first.stdout and sum(line.startswith("GET") for line in asked) == n_fetched


def test_a_file_that_the_repository_does_not_have_is_an_error_that_names_it(hub, tmp_path):
    result = ask(hub[0], tmp_path / "home", f"from asrkf_gguf.cli import main; raise SystemExit(main(['info', 'hf:{REPOSITORY}/other.gguf']))")
    assert result.returncode == 1
    assert "other.gguf" in result.stderr and result.stderr.count("\n") == 1


def test_from_pretrained_makes_our_llama_with_its_policy(hub, tmp_path):
    options = "n_ctx=512, verbose=False, kv_policy='asrkf', kv_pool=512"
    code = (
        f"from asrkf_gguf import Llama\nllm = Llama.from_pretrained({REPOSITORY!r}, '*Q4_0.gguf', {options})\n"
        "llm.eval(list(range(100)))\nprint(type(llm).__module__, llm.kv_stats().policy, llm.kv_stats().tokens)"
    )
    result = ask(hub[0], tmp_path / "home", code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["asrkf_gguf.llama", "asrkf", "100"]
