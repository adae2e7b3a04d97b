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
from make_models import write_llama3_shape, write_tiny

from asrkf_gguf.models import cache_folder

REPOSITORY, FILE = "someone/tiny-GGUF", "tiny.Q4_0.gguf"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """One repository with a few files."""

    protocol_version = "HTTP/1.1"
    folder: Path
    asked: list[str]

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        self.asked.append(f"{self.command} {self.path}")
        name = re.fullmatch(rf"/{REPOSITORY}/resolve/(?:main|{COMMIT})/([^?]*)", self.path)
        if name and (self.folder / name[1]).is_file():
            file, asked = self.folder / name[1], re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            begin, end = (int(asked[1]), int(asked[2] or file.stat().st_size - 1) + 1) if asked else (0, file.stat().st_size)
            known = {"ETag": f'"{hashlib.sha256(name[1].encode()).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            if asked:
                known["Content-Range"] = f"bytes {begin}-{end - 1}/{file.stat().st_size}"
            with file.open("rb") as source:
                source.seek(begin)
                self.answer(206 if asked else 200, source.read(end - begin) if self.command == "GET" else b"", **known,
                            Content_Length=str(end - begin))  # fmt: skip
            self.asked.append(f"sent {end - begin if self.command == 'GET' else 0}")
        elif self.path.startswith(f"/api/models/{REPOSITORY}/tree/"):
            self.answer(200, json.dumps(self.entries()).encode(), Content_Type="application/json")
        elif re.match(rf"/api/models/{REPOSITORY}(/revision/main)?(\?|$)", self.path):
            about = {"_id": "1", "id": REPOSITORY, "sha": COMMIT, "siblings": [{"rfilename": entry["path"]} for entry in self.entries()]}
            self.answer(200, json.dumps(about).encode(), Content_Type="application/json")
        elif self.path.startswith(f"/{REPOSITORY}/"):
            self.answer(404, b"", X_Error_Code="EntryNotFound", X_Error_Message="Entry not found")
        else:
            self.answer(404, b"", X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        """paths-info: which of these paths are there."""
        paths = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["paths"]
        self.answer(200, json.dumps([entry for entry in self.entries() if entry["path"] in paths]).encode(), Content_Type="application/json")

    def entries(self) -> list[dict[str, object]]:
        return [{"type": "file", "oid": "0" * 40, "size": path.stat().st_size, "path": path.name} for path in sorted(self.folder.glob("*.gguf"))]

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """Its address, and what it was asked."""
    write_tiny(tmp_path / FILE)
    asked: list[str] = []
    handler = type("TinyHub", (Hub,), {"folder": tmp_path, "asked": asked})
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


def test_a_plan_reads_the_header_of_one_quantisation_and_no_weights(hub, tmp_path):
    address, asked = hub
    vocab = next(cache_folder().glob("llama.cpp-*")) / "models/ggml-vocab-llama-bpe.gguf"
    write_llama3_shape(tmp_path / "big.Q4_K_M.gguf", vocab=vocab)  # 4.6 GiB with a vocabulary of megabytes, most of it a hole
    code = "from asrkf_gguf import plan; import dataclasses, json; print(json.dumps(dataclasses.asdict(plan(%r, 8192, vram='8GiB'))['sides']))"
    there = ask(address, tmp_path / "home", code % f"hf:{REPOSITORY}:q4_k_m")
    assert there.returncode == 0, there.stderr
    assert there.stdout == ask(address, tmp_path / "home", code % str(tmp_path / "big.Q4_K_M.gguf")).stdout
    sent = sum(int(line.split()[1]) for line in asked if line.startswith("sent"))
    assert (4 << 20) < sent < (70 << 20)


def test_a_plan_lists_what_there_is_if_the_choice_is_not_clear(hub, tmp_path):
    write_tiny(tmp_path / "tiny.Q8_0.gguf")
    for name in (f"hf:{REPOSITORY}", f"hf:{REPOSITORY}:Q5_K_M", f"hf:{REPOSITORY}/none.gguf"):
        result = ask(hub[0], tmp_path / "home", f"from asrkf_gguf.cli import main; raise SystemExit(main(['plan', {name!r}]))")
        assert result.returncode == 1 and result.stderr.count("\n") == 1
        assert "tiny.Q4_0.gguf, tiny.Q8_0.gguf" in result.stderr
