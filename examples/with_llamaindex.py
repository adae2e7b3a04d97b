"""LlamaIndex's LlamaCPP with a KV pool. Needs pip install llama-index-core, then pip install --no-deps llama-index-llms-llama-cpp
(which alone would install llama-cpp-python over our llama_cpp).

    python examples/with_llamaindex.py [MODEL]
"""

import sys

import llama_cpp

import asrkf_gguf

llama_cpp.Llama = asrkf_gguf.Llama  # LlamaIndex takes this one when it is imported

from llama_index.llms.llama_cpp import LlamaCPP  # noqa: E402


def main() -> None:
    path = asrkf_gguf.resolve_model(sys.argv[1] if len(sys.argv) > 1 else "smollm2")
    llm = LlamaCPP(
        model_path=str(path), context_window=4096, max_new_tokens=32, temperature=0.0, verbose=False,
        model_kwargs={"n_gpu_layers": -1, "kv_policy": "asrkf", "kv_pool": 512},
    )  # fmt: skip
    print(llm.complete("The lighthouse stands on the rock because").text.strip())
    stats = llm._model.kv_stats()
    print(f"policy {stats.policy}, {stats.tokens} tokens, pool {stats.pool_cells} cells")


if __name__ == "__main__":
    main()
