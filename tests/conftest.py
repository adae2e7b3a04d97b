"""Shared models, texts and builds. A missing requirement is a skip with its reason, never a pass."""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # tests run beside each other, and threads that wait for each other's cores are many times slower
    os.environ["OMP_THREAD_LIMIT"] = "1"

import pytest
from texts import topics_text

import asrkf_gguf
from asrkf_gguf.models import cache_folder, fetch_smollm2

ROOT = Path(__file__).resolve().parent.parent
RPC_ENDPOINT = os.environ.get("ASRKF_TEST_RPC")  # set by tests/test_rpc.py for the runs it starts
os.environ["ASRKF_CALIBRATIONS"] = tempfile.mkdtemp(prefix="asrkf-calibrations-")  # not the user's, here and in child processes
UPSTREAM_LIBRARIES = ROOT / "build-upstream" / "bin"


@functools.cache
def register_rpc_device() -> None:
    """Add the server's devices to our libggml (llama_cpp has no parameter for it)."""
    folder = asrkf_gguf._native.LIBRARY_FOLDER
    rpc, ggml = ctypes.CDLL(str(folder / "libggml-rpc.so")), ctypes.CDLL(str(folder / "libggml.so"))
    rpc.ggml_backend_rpc_add_server.restype = ctypes.c_void_p
    ggml.ggml_backend_register.argtypes = [ctypes.c_void_p]
    registry = rpc.ggml_backend_rpc_add_server(RPC_ENDPOINT.encode())
    assert registry, f"no RPC server at {RPC_ENDPOINT}"
    ggml.ggml_backend_register(registry)


@pytest.fixture(scope="session")
def text() -> str:
    return topics_text()


@pytest.fixture(scope="session")
def smollm2() -> str:
    return str(fetch_smollm2())


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    from make_models import write_tiny

    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    write_tiny(path)
    return str(path)


@pytest.fixture(scope="session")
def small(smollm2: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Eight small layers with random weights, and SmolLM2's vocabulary."""
    from make_models import write_small

    path = tmp_path_factory.mktemp("models") / "small.gguf"
    write_small(path, Path(smollm2))
    return str(path)


@pytest.fixture(scope="session")
def llama3_two_layers() -> str:
    """Two layers of LLaMA-3 8B's shape with its true vocabulary, in the cache folder (0.5 GB)."""
    from make_models import write_llama3

    path = cache_folder() / "llama3-8b-shape-2-layers-v1.gguf"
    if not path.exists():
        tree = subprocess.run(
            [sys.executable, str(ROOT / "scripts/llama_tree.py"), "prepare"], capture_output=True, text=True, check=True
        ).stdout.strip()
        part = path.with_suffix(f".{os.getpid()}.part")  # two workers may be here
        write_llama3(part, Path(tree) / "models/ggml-vocab-llama-bpe.gguf", 2)
        part.rename(path)
    return str(path)


@pytest.fixture(scope="session")
def upstream_libraries() -> Path:
    """The folder of the unpatched build; scripts/test makes it."""
    if not (UPSTREAM_LIBRARIES / "libllama.so").exists():
        pytest.skip("no unpatched build: run scripts/build_upstream")
    return UPSTREAM_LIBRARIES


@pytest.fixture
def load():
    """Open models that are closed at the end of the test; two threads, quiet; on the RPC device if one is named."""
    opened = []
    if RPC_ENDPOINT:
        register_rpc_device()

    def make(path: str, **kwargs):
        options = {"n_ctx": 2048, "n_threads": 2, "n_threads_batch": 2, "verbose": False, "seed": 1, "calibrate": False}
        if RPC_ENDPOINT:
            options["n_gpu_layers"] = -1
        llm = asrkf_gguf.Llama(path, **{**options, **kwargs})
        opened.append(llm)
        return llm

    yield make
    for llm in opened:
        llm.close()


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter with this environment added."""
    merged = {**os.environ, **environment, "PYTHONPATH": str(ROOT / "tests")}
    return subprocess.run([sys.executable, "-c", code], env=merged, cwd=ROOT / "tests", capture_output=True, text=True, check=False)
