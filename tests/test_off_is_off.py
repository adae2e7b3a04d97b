"""Contract 1: "full" and no setting at all are upstream, bit for bit, against the unpatched build of the same pin."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Runs in a process of its own: one process holds one libllama. Prints a digest of all logits.
SCRIPT = """
import hashlib, sys
import numpy as np
kind, model, n = sys.argv[1], sys.argv[2], int(sys.argv[3])
type_kv = int(sys.argv[4])
if kind == "upstream":
    import llama_cpp
    make = lambda **k: llama_cpp.Llama(model, flash_attn=True, **k)
else:
    from asrkf_gguf import Llama
    make = lambda **k: Llama(model, **({} if kind == "unset" else {"kv_policy": "full"}), **k)
llm = make(n_ctx=1024, n_batch=256, n_threads=2, n_threads_batch=2, verbose=False, logits_all=True, type_k=type_kv, type_v=type_kv)
from texts import topics_text
tokens = llm.tokenize(topics_text()[: n * 8].encode())[:n]
digest = hashlib.sha256()
llm.eval(tokens)
digest.update(np.ascontiguousarray(llm.scores[:n]).tobytes())
for _ in range(24):
    token = int(llm.scores[llm.n_tokens - 1].argmax())
    llm.eval([token])
    digest.update(np.ascontiguousarray(llm.scores[llm.n_tokens - 1]).tobytes())
llm.n_tokens -= 30
llm.eval(tokens[:40])
digest.update(np.ascontiguousarray(llm.scores[llm.n_tokens - 40 : llm.n_tokens]).tobytes())
import llama_cpp
print(digest.hexdigest(), llama_cpp.llama_cpp._base_path)
"""


def digest(kind: str, model: str, libraries: Path | None, type_kv: int) -> tuple[str, str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("LLAMA_CPP_LIB_PATH", "LLAMA_KV_POLICY")}
    environment["PYTHONPATH"] = str(Path(__file__).parent)
    if libraries is not None:
        environment["LLAMA_CPP_LIB_PATH"] = str(libraries)
    command = [sys.executable, "-c", SCRIPT, kind, model, "700", str(type_kv)]
    result = subprocess.run(command, env=environment, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    value, folder = result.stdout.split()
    return value, folder


@pytest.mark.upstream
@pytest.mark.parametrize("type_kv", [1, 8], ids=["f16", "q8_0"])
def test_full_and_unset_give_the_logits_of_the_unpatched_build_bit_for_bit(smollm2: str, upstream_libraries: Path, type_kv: int):
    upstream, folder = digest("upstream", smollm2, upstream_libraries, type_kv)
    assert folder == str(upstream_libraries)
    for kind in ("full", "unset"):
        ours, folder = digest(kind, smollm2, None, type_kv)
        assert folder != str(upstream_libraries)
        assert ours == upstream, kind
