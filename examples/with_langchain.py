"""LangChain's LlamaCpp with a KV pool. Needs pip install langchain-community.

    python examples/with_langchain.py [MODEL]
"""

import sys

import llama_cpp
from langchain_community.llms import LlamaCpp

import asrkf_gguf


def main() -> None:
    path = asrkf_gguf.resolve_model(sys.argv[1] if len(sys.argv) > 1 else "smollm2")
    llama_cpp.Llama = asrkf_gguf.Llama  # LangChain makes one of these: from now on ours
    llm = LlamaCpp(
        model_path=str(path), n_ctx=4096, n_gpu_layers=-1, max_tokens=32, temperature=0.0, verbose=False,
        model_kwargs={"kv_policy": "asrkf", "kv_pool": 512, "flash_attn": True},
    )  # fmt: skip
    print(llm.invoke("The lighthouse stands on the rock because").strip())
    stats = llm.client.kv_stats()
    print(f"policy {stats.policy}, {stats.tokens} tokens, pool {stats.pool_cells} cells")
    llm.client.close()


if __name__ == "__main__":
    main()
