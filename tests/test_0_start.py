"""First of all: does the library decode on this machine? In a process of its own, so that a crash is a failed test that
says what happened, and not the end of the run."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

DECODE = """
import sys
from pathlib import Path
from asrkf_gguf import Llama
llm = Llama(sys.argv[1], n_ctx=512, n_batch=64, n_threads=2, n_threads_batch=2, verbose=False, kv_policy="asrkf,window=32", kv_pool=256)
tokens = llm.tokenize(b"One batch of several tokens, which a matrix product reads, and then one token alone, which a vector product reads.")
llm.eval(tokens)
llm.eval([llm.sample(temp=0.0)])
print("decoded", llm.n_tokens - len(tokens))
"""
FEATURES = "import asrkf_gguf, llama_cpp; print(llama_cpp.llama_print_system_info().decode())"


def how_it_ended(returncode: int) -> str:
    """A signal by its name, else the exit status."""
    return f"died of {signal.Signals(-returncode).name}" if returncode < 0 else f"ended with status {returncode}"


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)


def test_one_token_is_decoded_in_a_process_of_its_own(smollm2: str, request: pytest.FixtureRequest):
    child = run(DECODE, smollm2)
    if child.returncode or child.stdout.strip() != "decoded 1":
        request.session.shouldfail = "the library does not decode on this machine: no other test can say more"
        pytest.fail(
            f"decoding one token {how_it_ended(child.returncode)}; compiled in: {run(FEATURES).stdout.strip() or 'not known: it cannot be loaded'}\n"
            "If a CPU feature is at fault, build without it: CMAKE_ARGS='-DASRKF_AMX=OFF' for AMX, '-DGGML_NATIVE=OFF' for all that this\n"
            f"CPU has beyond AVX2, then scripts/setup. What it said last:\n{child.stdout[-500:]}{child.stderr[-2000:]}"
        )


def test_a_crash_is_told_by_its_signals_name():
    assert how_it_ended(run("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)").returncode) == "died of SIGSEGV"
    assert how_it_ended(run("raise SystemExit(3)").returncode) == "ended with status 3"
