"""One side of the speed bench: a context in a process of its own, driven by JSON lines on standard input (speed.py).

Run as a file, not as a module: upstream's side must not import this package, which loads our libllama.
"""

from __future__ import annotations

import atexit
import dataclasses
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

sys.path = [entry for entry in sys.path if entry and Path(entry).resolve() != Path(__file__).resolve().parent]


class Ours:
    """A context with a policy."""

    def __init__(self, options: dict[str, Any], kwargs: dict[str, Any]) -> None:
        from asrkf_gguf import Llama
        from asrkf_gguf.bench.sides import config_text

        self.llm = Llama(options["model"], kv_policy=options["policy"], kv_pool=options["pool"], **kwargs)
        self.config = config_text(self.llm)

    def stats(self) -> dict[str, Any]:
        return dataclasses.asdict(self.llm.kv_stats())


class Upstream:
    """The unpatched library. It has no call for its buffers' bytes: they are those that its log reports."""

    config = ""

    def __init__(self, options: dict[str, Any], kwargs: dict[str, Any]) -> None:
        import llama_cpp

        log: list[str] = []
        callback = llama_cpp.llama_log_callback(lambda level, text, _: log.append(text.decode()))
        atexit.register(lambda: callback)  # llama.cpp logs while it is freed, too: keep it alive until then
        llama_cpp.llama_log_set(callback, None)
        self.llm, self.log = llama_cpp.Llama(options["model"], **kwargs), log

    def _logged(self, what: str) -> float:
        return sum(float(size) for size in re.findall(rf"{what} = +([0-9.]+) MiB", "".join(self.log))) * (1 << 20)

    def stats(self) -> dict[str, Any]:
        sizes = {"device_kv_bytes": self._logged("KV buffer size"), "device_compute_bytes": self._logged("compute buffer size")}
        return {**sizes, "device_index_bytes": 0, "host_kv_bytes": 0}


class Process:
    """The context, its text, and one method for each request."""

    def __init__(self, options: dict[str, Any]) -> None:
        kwargs = {
            "n_ctx": options["n_ctx"], "n_batch": options["n_batch"], "n_ubatch": options["n_batch"], "n_threads": options["threads"],
            "n_threads_batch": options["threads"], "n_gpu_layers": -1, "flash_attn": True, "verbose": False, "seed": 1,
        }  # fmt: skip
        self.options, self.is_ours = options, options["policy"] != "full"
        self.side: Ours | Upstream = (Ours if self.is_ours else Upstream)(options, kwargs)
        self.llm: Any = self.side.llm
        import llama_cpp  # the side's choice of library is made

        self.llama_cpp = llama_cpp
        self.tokens = self.llm.tokenize(options["text"].encode())
        if len(self.tokens) < options["n_ctx"]:
            raise SystemExit(f"bench: the text has {len(self.tokens)} tokens, the context {options['n_ctx']}: give a longer one")
        keys = {key: kwargs[key] for key in ("n_ctx", "n_batch", "n_ubatch", "flash_attn")}
        settings = " ".join(f"{key}={value}" for key, value in keys.items()) + " type_k=f16 type_v=f16"
        self._config = f"{settings} {self.side.config}".strip()
        self.n_decoded = 0

    def wait(self) -> None:
        """Until the step is computed."""
        self.llama_cpp.llama_get_logits_ith(self.llm.ctx, -1)

    def config(self) -> dict[str, Any]:
        return {"config": self._config}

    def stats(self) -> dict[str, Any]:
        return {"stats": {**self.side.stats(), "decoded": self.n_decoded}, "peak_resident_bytes": peak_resident_bytes()}

    def prefill(self) -> dict[str, Any]:
        self.llm.reset()
        self.llama_cpp.llama_memory_clear(self.llama_cpp.llama_get_memory(self.llm.ctx), True)
        began = time.perf_counter()
        self.llm.eval(self.tokens[: self.options["depth"]])
        self.wait()
        return {"seconds": time.perf_counter() - began}

    def decode(self, tokens: int, rewind: bool) -> dict[str, Any]:
        """So many steps of one token; with rewind from the depth that prefill() reached, else from where it is."""
        seconds, scored, host = [], [], 0.0
        before = self.side.stats()
        if rewind:
            self.llm.n_tokens = self.options["depth"]
        for _ in range(tokens):
            token = self.tokens[self.llm.n_tokens % len(self.tokens)]
            n_scored = self.llm.kv_stats().scoring_steps_total if self.is_ours else 0
            began = time.perf_counter()
            self.llm.eval([token])
            self.wait()
            seconds.append(time.perf_counter() - began)
            if self.is_ours:
                scored.append(self.llm.kv_stats().scoring_steps_total > n_scored)
            self.n_decoded += 1
        after = self.side.stats()
        if self.is_ours:
            host = sum(after[key] - before[key] for key in ("policy_seconds", "scoring_seconds", "moves_seconds"))
        return {"seconds": seconds, "scored": scored, "host_seconds": host, "stats": after}


def peak_resident_bytes() -> int:
    """The most of this process that was in RAM."""
    memory = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):  # Windows
        return memory.peak_wset
    # psutil has no peak on Linux, and getrusage() counts the process that started this one
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(peak.split()[1]) * 1024


def main() -> None:
    """The first line holds the options, each further one a request: {"do": name, ...}."""
    process = Process(json.loads(sys.stdin.readline()))
    requests: dict[str, Callable[..., dict[str, Any]]] = {
        "config": process.config, "stats": process.stats, "prefill": process.prefill, "decode": process.decode,
    }  # fmt: skip
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(requests[request.pop("do")](**request)), flush=True)


if __name__ == "__main__":
    main()
