"""One side of the bench: a context in a process of its own, driven by JSON lines on standard input (scripts/bench)."""

from __future__ import annotations

import atexit
import dataclasses
import json
import pydoc_data.topics
import re
import sys
import time
from pathlib import Path


def real_text(path: str) -> str:
    return Path(path).read_text() if path else "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))


def main() -> None:
    options = json.loads(sys.argv[1])
    kwargs = {
        "n_ctx": options["n_ctx"], "n_batch": options["n_batch"], "n_ubatch": 512, "n_threads": options["threads"],
        "n_threads_batch": options["threads"], "n_gpu_layers": -1, "flash_attn": True, "verbose": False, "seed": 1,
    }
    log: list[str] = []
    if options["upstream"]:
        import llama_cpp

        log_callback = llama_cpp.llama_log_callback(lambda level, text, _: log.append(text.decode()))
        atexit.register(lambda: log_callback)  # llama.cpp logs while it is freed, too: keep it alive until then
        llama_cpp.llama_log_set(log_callback, None)
        llm = llama_cpp.Llama(options["model"], **kwargs)
    else:
        from asrkf_gguf import Llama

        llm = Llama(options["model"], kv_policy=options["policy"], kv_pool=options["pool"], **kwargs)
    tokens = llm.tokenize(real_text(options["text"])[: options["n_ctx"] * 8].encode())
    assert len(tokens) >= options["n_ctx"], "the text is shorter than the context"

    decoded = 0

    def stats() -> dict:
        if not options["upstream"]:
            return {**dataclasses.asdict(llm.kv_stats()), "decoded": decoded}
        sizes = {"device_kv_bytes": logged("KV buffer size"), "device_compute_bytes": logged("compute buffer size")}
        return {**sizes, "device_index_bytes": 0, "host_kv_bytes": 0}

    def logged(what: str) -> float:
        """Bytes that the unpatched library itself reports in its log; it has no call for them."""
        return sum(float(size) for size in re.findall(rf"{what} = +([0-9.]+) MiB", "".join(log))) * (1 << 20)

    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "config":
            keys = {key: kwargs[key] for key in ("n_ctx", "n_batch", "n_ubatch", "flash_attn")}
            text = " ".join(f"{key}={value}" for key, value in keys.items()) + " type_k=f16 type_v=f16"
            if not options["upstream"]:
                from asrkf_gguf.bench import config_text
            answer = {"config": text if options["upstream"] else f"{text} {config_text(llm)}"}
        elif request["do"] == "prefill":
            llm.reset()
            llm._ctx.kv_cache_clear()
            began = time.perf_counter()
            llm.eval(tokens[: options["depth"]])
            llm._ctx.get_logits_ith(-1)
            answer = {"seconds": time.perf_counter() - began}
        elif request["do"] == "decode":
            seconds, scored, host = [], [], 0.0
            before = stats()
            if request["rewind"]:
                llm.n_tokens = options["depth"]
            for _ in range(request["tokens"]):
                token = tokens[llm.n_tokens % len(tokens)]
                n_scored = llm.kv_stats().scoring_steps_total if not options["upstream"] else 0
                began = time.perf_counter()
                llm.eval([token])
                llm._ctx.get_logits_ith(-1)
                seconds.append(time.perf_counter() - began)
                if not options["upstream"]:
                    scored.append(llm.kv_stats().scoring_steps_total > n_scored)
                decoded += 1
            after = stats()
            if not options["upstream"]:
                host = sum(after[key] - before[key] for key in ("policy_seconds", "scoring_seconds", "moves_seconds"))
            answer = {"seconds": seconds, "scored": scored, "host_seconds": host, "stats": after}
        else:
            peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
            answer = {"stats": stats(), "peak_resident_bytes": int(peak.split()[1]) * 1024}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
