"""Plain decoders of other shapes: something is really frozen, and attention is then what a mask over those positions gives.

The oracle is upstream's own cache, from which llama_memory_seq_rm took the same positions: with one layer group for all
layers, freezing is nothing else for the token that comes next.
"""

from __future__ import annotations

from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from kv import check_states, last_logits
from make_models import write_tiny

N_TOKENS, FROZEN = 300, ((20, 90), (120, 200))
LAYER_NORM = {"attention.layer_norm_epsilon": 1e-5}
NORM_BIASES = {"output_norm.bias": (256,), "blk.%d.attn_norm.bias": (256,), "blk.%d.ffn_norm.bias": (256,)}
QK_NORMS = {"blk.%d.attn_q_norm.weight": (64,), "blk.%d.attn_k_norm.weight": (64,)}
OUTPUT = {"output.weight": (256, 256)}
# what each differs by from the tensors of llama
ARCHITECTURES: dict[str, dict] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"extra": QK_NORMS},
    "internlm2": {"matrices": OUTPUT},
    "xverse": {"matrices": OUTPUT},
    "smollm3": {},
    "exaone": {},
    "gemma": {},
    "granite": {"metadata": {"logit_scale": 2.0, "residual_scale": 0.5, "attention.scale": 0.1}},
    "minicpm": {"metadata": {"embedding_scale": 1.0, "residual_scale": 0.9, "logit_scale": 1.0}},
    "arcee": {"without": ("ffn_gate.weight",)},
    "seed_oss": {"extra": {"blk.%d.post_attention_norm.weight": (256,)}, "without": ("ffn_norm.weight",)},
    "olmo": {"metadata": LAYER_NORM, "without": ("attn_norm.weight", "ffn_norm.weight", "output_norm.weight")},
    "olmo2": {
        "extra": {"blk.%d.post_attention_norm.weight": (256,), "blk.%d.post_ffw_norm.weight": (256,),
                  "blk.%d.attn_q_norm.weight": (256,), "blk.%d.attn_k_norm.weight": (128,)},
        "without": ("attn_norm.weight", "ffn_norm.weight"), "matrices": OUTPUT,
    },
    "starcoder2": {
        "metadata": LAYER_NORM, "without": ("ffn_gate.weight",),
        "extra": {**NORM_BIASES, "blk.%d.attn_output.bias": (256,), "blk.%d.ffn_up.bias": (256,), "blk.%d.ffn_down.bias": (256,)},
    },
    "orion": {"metadata": LAYER_NORM, "extra": NORM_BIASES, "matrices": OUTPUT},
    "nemotron": {"metadata": LAYER_NORM, "extra": NORM_BIASES, "matrices": OUTPUT, "without": ("ffn_gate.weight",)},
    "stablelm": {"metadata": LAYER_NORM, "extra": NORM_BIASES, "matrices": OUTPUT},
    "command-r": {"metadata": {**LAYER_NORM, "logit_scale": 0.5}, "without": ("ffn_norm.weight",)},
}  # fmt: skip


def tokens(n: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 256, n).tolist()


def logits_after(llm, n: int = 6) -> np.ndarray:
    """Logits of n more tokens, each decoded alone."""
    rows = []
    for token in tokens(n, 2):
        llm.eval([token])
        rows.append(last_logits(llm))
    return np.array(rows)


def taken_out(llm) -> np.ndarray:
    """Upstream's logits where the positions FROZEN are no longer in its cache."""
    llm.eval(tokens(N_TOKENS, 1))
    for begin, end in FROZEN:
        assert llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(llm._ctx.ctx), 0, begin, end)
    return logits_after(llm)


def compare_with_mask(load, path: str, **options: object) -> None:
    full = load(path, kv_policy="full", n_ctx=512, **options)
    full.eval(tokens(N_TOKENS, 1))
    never = logits_after(full)
    full.reset()
    masked = taken_out(full)
    llm = load(path, kv_policy="asrkf,layers=shared,window=64", kv_pool=512, n_ctx=512, **options)
    llm.eval(tokens(N_TOKENS, 1))
    n_frozen = sum(end - begin for begin, end in FROZEN)
    assert sum(llm.freeze(begin, end) for begin, end in FROZEN) == n_frozen
    found = logits_after(llm)
    stats = llm.kv_stats()
    assert len(stats.groups) == 1 and stats.frozen_cells == n_frozen and stats.host_kv_bytes >= n_frozen * stats.groups[0].token_bytes
    check_states(llm)
    spread = np.abs(never).max()
    wrong, changed = np.abs(found - masked).max() / spread, np.abs(never - masked).max() / spread
    print(f"off the mask by {wrong:.5f} of the largest logit; what was frozen counts {changed:.5f}")
    assert changed > 0.002  # else nothing here could tell a mask from none
    assert wrong < 0.02 * changed
    llm.restore(0, -1)
    llm.n_tokens = N_TOKENS
    again = logits_after(llm)
    assert llm.kv_stats().frozen_cells == 0
    assert np.abs(again - never).max() / spread < 0.02 * changed  # and all of it comes back


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_frozen_token_is_one_that_attention_does_not_see(load, tmp_path: Path, arch: str):
    write_tiny(tmp_path / "model.gguf", arch=arch, **ARCHITECTURES[arch])
    compare_with_mask(load, str(tmp_path / "model.gguf"))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_plain_decoder_reads_past_its_pool(load, tmp_path: Path, arch: str):
    write_tiny(tmp_path / "model.gguf", arch=arch, **ARCHITECTURES[arch])
    llm = load(str(tmp_path / "model.gguf"), kv_policy="asrkf", kv_pool=512)
    llm.eval(tokens(1000, 1))
    assert np.isfinite(logits_after(llm, 20)).all()
    stats = llm.kv_stats()
    assert stats.frozen_cells >= 1020 - 512 and stats.restores_total["recall"] > 0
    check_states(llm)
