"""A model with some or all of it on another device, against the same model on the CPU."""

from __future__ import annotations

from kv import check_states
from test_architectures import compare_with_mask, logits_after, tokens

import asrkf_gguf


def check_that_it_freezes_as_on_the_cpu(path: str, is_staged: bool, nearly_path: str = "", **options: object) -> None:
    """What is frozen is out of attention, the same tokens are frozen as on the CPU, and rows keep their bytes through every move.

    path: of a tiny model of four layers. is_staged: whether rows must cross to another memory. options: of `Llama`, n_gpu_layers
    among them.
    nearly_path: for a device that rounds in another way. A choice that falls otherwise changes what the next tokens see, and with it
    the next choices: in a tiny model, whose tokens are all alike, many fall otherwise in the end. So the device and the CPU are to
    agree as well as the CPU does with itself on this model, whose weights differ a little.
    The index is F16: a 4-bit one makes more of the last bits in which two devices differ.
    """

    def load(path: str, **more: object) -> asrkf_gguf.Llama:
        return asrkf_gguf.Llama(path, **{"n_threads": 1, "n_threads_batch": 1, "verbose": False, "seed": 1, **options, **more})

    compare_with_mask(load, path)
    for pools in ("layers=0-1@512/2-3@768", "layers=shared,pool=512"):
        found = []
        for model, more in [(path, {}), (path, {"n_gpu_layers": 0}), *([(nearly_path, {"n_gpu_layers": 0})] if nearly_path else [])]:
            llm = load(model, kv_policy=f"asrkf,{pools},window=64,index=f16", n_ctx=2048, **more)
            device_bytes = llm.kv_stats().device_kv_bytes
            llm.eval(tokens(1200, 1))
            logits_after(llm, 60)
            stats = llm.kv_stats()
            check_states(llm)
            assert stats.restores_total["recall"] > 0 and stats.frozen_cells >= 1260 - 640
            assert stats.device_kv_bytes == device_bytes == sum(group.pool_cells * group.token_bytes for group in stats.groups)
            frozen = [{p for p, state in llm.kv_tokens(i) if state == "frozen"} for i in range(len(stats.groups))]
            before = rows(llm)
            assert llm.freeze(4, 1100) > 0 and rows(llm) == before
            assert llm.restore(200, 300) > 0 and rows(llm) == before
            check_states(llm)
            found.append((frozen, stats))
            llm.close()
        (here, stats), (there, _) = found[:2]
        agree = agreement(here, there)
        print(f"{pools}: of what is frozen here or on the CPU, {agree:.3f} is in both; {stats.device_staging_bytes} bytes of staging")
        if nearly_path:
            control = agreement(found[2][0], there)
            print(f"and {control:.3f} with weights that differ a little")
            assert agree > control - 0.05 and control > 0.55  # by chance a quarter to a half would be in both
        else:
            assert agree > 0.97
        assert (stats.device_staging_bytes > 0) == is_staged


def agreement(here: list[set[int]], there: list[set[int]]) -> float:
    """Of the tokens that are in one of two sets, the part that is in both; of the group with the least."""
    return min(len(a & b) / len(a | b) for a, b in zip(here, there, strict=True))


def rows(llm: asrkf_gguf.Llama, n_tokens: int = 1200) -> list[bytes]:
    """The bytes of every seventh of the first tokens, group by group."""
    return [llm.kv_rows(position, group) for group in range(len(llm.kv_stats().groups)) for position in range(0, n_tokens, 7)]
