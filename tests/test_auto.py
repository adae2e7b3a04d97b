"""kv_policy="asrkf" alone works: the pool is what fits, and what was chosen is said."""

from __future__ import annotations

import logging
import pickle

import llama_cpp
import pytest
from conftest import python
from kv import check_states, greedy, tokens_of


def test_without_a_pool_everything_fits_this_machine_and_the_answer_is_that_of_the_full_cache(load, smollm2, text, caplog):
    tokens = tokens_of(load(smollm2), text, 600)
    with caplog.at_level(logging.INFO, logger="asrkf_gguf"):
        llm = load(smollm2, kv_policy="asrkf")
    assert [record.levelname for record in caplog.records] == ["INFO"]
    chosen, _ = greedy(llm, tokens, 24)
    stats = llm.kv_stats()
    assert chosen == greedy(load(smollm2, kv_policy="full"), tokens, 24)[0]
    assert (stats.policy, stats.pool_cells, stats.type_k, stats.frozen_cells) == ("asrkf", 2048, "f16", 0)
    assert stats.device_index_bytes == stats.scoring_steps_total == 0
    assert stats.pool_choice == caplog.records[0].getMessage() and "all 2048 cells in f16" in stats.pool_choice


def test_without_handlers_the_pool_is_said_once_on_stderr(smollm2):
    code = f"from asrkf_gguf import Llama; Llama({smollm2!r}, n_ctx=1024, kv_policy='asrkf', kv_pool='33%', verbose=False, n_gpu_layers=0)"
    assert python(code).stderr.count("pool: ") == 1
    assert python(code.replace("False", "True")).stderr.count("pool: ") == 1


def test_a_device_with_less_room_gets_a_pool_in_q8_0_which_works_and_says_so_once(load, smollm2, text, caplog):
    llm = load(smollm2, n_ctx=8192, kv_policy="asrkf,device_limit=736MiB")
    stats = llm.kv_stats()
    assert stats.type_k == stats.type_v == "q8_0" and 256 <= stats.pool_cells < 8192
    assert [record.getMessage() for record in caplog.records] == [stats.pool_choice]  # a warning, at the default level
    for part in (f"{stats.pool_cells} of 8192 cells in q8_0", "CPU has 736.0 MiB", "(estimate)"):
        assert part in stats.pool_choice
    assert stats.device_kv_bytes + stats.device_index_bytes + stats.device_compute_bytes < (736 - 512) << 20
    pool = llm.kv_config().pool
    assert isinstance(pool, int) and pool >= stats.pool_cells  # in cells, from here on
    llm.eval(tokens_of(llm, text, stats.pool_cells + 200))
    assert llm.kv_stats().frozen_cells > 0
    check_states(llm)
    assert pickle.loads(pickle.dumps(llm)).kv_stats().type_k == "q8_0"


def test_types_that_the_user_names_stay_and_the_text_says_what_q8_0_would_hold(load, smollm2):
    stats = load(smollm2, n_ctx=8192, kv_policy="asrkf,device_limit=800MiB", type_k=llama_cpp.GGML_TYPE_F16).kv_stats()
    assert stats.type_k == stats.type_v == "f16" and "-ctk q8_0 -ctv q8_0" in stats.pool_choice


def test_bytes_buy_the_full_cache_in_f16_then_in_q8_0_then_a_pool(load, smollm2):
    for pool, kind, is_all in (("46MiB", "f16", True), ("30MiB", "q8_0", True), ("15MiB", "q8_0", False)):
        stats = load(smollm2, kv_policy="asrkf", kv_pool=pool).kv_stats()
        assert (stats.type_k, stats.pool_cells == 2048) == (kind, is_all), pool


def test_head_sizes_that_q8_0_does_not_divide_stay_f16_and_the_text_says_why(load, tmp_path):
    from make_models import write_tiny

    write_tiny(tmp_path / "odd.gguf", n_embd=160, n_head=2, n_head_kv=2)  # heads of 80
    stats = load(str(tmp_path / "odd.gguf"), kv_policy="asrkf", kv_pool="80%").kv_stats()
    assert stats.type_k == "f16" and "not q8_0: K cache type q8_0 has blocks of 32, which do not divide the head size 80" in stats.pool_choice


@pytest.mark.parametrize("policy", ["asrkf", "window", "default"])
def test_the_environment_needs_no_pool(smollm2, policy):
    code = f"from asrkf_gguf import Llama; s = Llama({smollm2!r}, n_ctx=1024, verbose=False).kv_stats(); print(s.policy, s.pool_cells, s.type_k)"
    answer = python(code, LLAMA_KV_POLICY=policy)
    assert answer.returncode == 0, answer.stderr
    name, cells, kind = answer.stdout.split()
    assert name == ("window" if policy == "window" else "asrkf") and kind == "f16"  # the types are the context's
    assert 256 <= int(cells) < 1024 // 3 if policy == "default" else int(cells) == 1024  # a third of the bytes, of which the index takes some


def test_a_context_past_the_training_warns_also_without_verbose(load, smollm2, caplog):
    load(smollm2, n_ctx=8192, kv_policy="full")
    assert not caplog.records
    load(smollm2, n_ctx=8448, kv_policy="full")
    assert "n_ctx=8448 is more than the 8192 tokens that the model was trained for" in caplog.text
