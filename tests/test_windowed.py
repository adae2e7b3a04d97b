"""Models with sliding windows (Gemma 3's shape): the policy serves the layers that see everything, the others keep their window."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from make_models import write_tiny
from test_architectures import FROZEN, N_TOKENS, logits_after, taken_out
from test_architectures import tokens as oracle_tokens

from asrkf_gguf.bench.measure import last_logits
from asrkf_gguf.models import kv_bytes_per_token

N_WINDOW = 64


def write_gemma3(path: Path, n_layer: int = 6, *, sliding_window: int = N_WINDOW, pattern: int = 6) -> str:
    """Every pattern-th layer sees everything; sliding_window 0: all, and llama.cpp treats it as a model without windows."""
    norms = {"blk.%d.attn_q_norm.weight": (64,), "blk.%d.attn_k_norm.weight": (64,),
             "blk.%d.post_attention_norm.weight": (256,), "blk.%d.post_ffw_norm.weight": (256,)}
    metadata = {"attention.sliding_window": sliding_window, "attention.sliding_window_pattern": pattern}
    write_tiny(path, arch="gemma3", metadata=metadata, extra=norms, n_layer=n_layer)
    return str(path)


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_gemma3(tmp_path_factory.mktemp("models") / "gemma3.gguf")


@pytest.fixture(scope="module")
def twelve(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two layers see everything: 5 and 11."""
    return write_gemma3(tmp_path_factory.mktemp("models") / "twelve.gguf", 12)


def tokens(n: int, seed: int = 1) -> list[int]:
    return np.random.default_rng(seed).integers(0, 250, n).tolist()


def read(llm, prompt: list[int], after: int = 30) -> np.ndarray:
    """Logits of the tokens after a prompt, each decoded alone."""
    llm.reset()
    llm.eval(prompt)
    rows = []
    for token in tokens(after, 2):
        llm.eval([token])
        rows.append(np.array(last_logits(llm)))
    return np.array(rows)


def test_a_pool_that_holds_all_gives_upstreams_logits(load, gemma3):
    options = {"n_ctx": 1024, "logits_all": True, "n_batch": 64, "n_ubatch": 64}  # steps that the windowed group takes whole
    full = read(load(gemma3, swa_full=True, **options), tokens(400))
    ours = load(gemma3, kv_policy="asrkf", kv_pool=1024, **options)
    assert np.array_equal(read(ours, tokens(400)), full)
    assert ours.kv_stats().frozen_cells == 0


def test_the_policy_serves_the_global_layers_and_says_so(load, gemma3):
    llm = load(gemma3, kv_policy="asrkf", kv_pool=512, n_ctx=2048, n_batch=64, n_ubatch=64)
    llm.eval(tokens(1500))
    stats = llm.kv_stats()
    globals_, windowed = stats.groups
    assert (globals_.n_layers, globals_.sliding_window) == (1, 0)
    assert (windowed.n_layers, windowed.sliding_window) == (5, N_WINDOW)
    assert (globals_.layers, windowed.layers) == ("5", "0-4")
    assert globals_.pool_cells == 512 and windowed.pool_cells == 256  # the window, a step, two blocks; rounded up
    assert stats.pool_cells == 512 and stats.frozen_cells >= 1500 - 512
    assert windowed.active_cells <= windowed.pool_cells and windowed.active_cells + windowed.frozen_cells == 1500
    newest = [state for position, state in llm.kv_tokens(1) if position >= 1500 - N_WINDOW]
    assert all(state != "frozen" for state in newest)


@pytest.mark.parametrize("n_step", [64, 128])  # with 128, a window, a step and two blocks take each of the 256 cells
def test_windowed_layers_see_what_upstreams_do(load, gemma3, n_step):
    """With a pool for all on the global layer, and a window's on the others, the result is that of upstream's rolling window."""
    options = {"n_ctx": 1024, "logits_all": True, "n_batch": n_step, "n_ubatch": n_step}
    full = read(load(gemma3, swa_full=False, **options), tokens(700))
    ours = load(gemma3, kv_policy="asrkf,window=256,rewalk_tokens=0", kv_pool=768, **options)
    mine = read(ours, tokens(700))
    stats = ours.kv_stats()
    assert stats.groups[0].frozen_cells == 0 and stats.groups[1].frozen_cells > 400
    assert np.abs(mine - full).max() < 1e-2 * np.abs(full).max()  # the cells are in another order


def test_a_windowed_sequence_is_cut_back_and_saved_as_a_whole(load, gemma3):
    options = {"n_ctx": 2048, "n_batch": 64, "n_ubatch": 64}
    llm = load(gemma3, kv_policy="asrkf,rewalk_tokens=0", kv_pool=512, **options)
    llm.eval(tokens(1500))
    row = llm.kv_rows(300, 1)
    state = llm.save_state()
    llm.n_tokens = 400  # far behind the window: upstream's rolling cache has lost these rows
    llm.eval([7])
    assert llm.kv_stats().tokens == 401
    assert all(mode != "frozen" for position, mode in llm.kv_tokens(1) if position >= 401 - N_WINDOW)
    other = load(gemma3, kv_policy="asrkf", kv_pool=1024, **options)
    other.load_state(state)
    other.eval([7])
    assert other.kv_stats().tokens == 1501
    assert other.kv_rows(300, 1) == row


@pytest.mark.parametrize(("percent", "types"), [(60, "given"), (33, "auto")])
def test_a_part_of_the_f16_bytes_is_one_of_the_layers_that_see_everything(load, gemma3, percent, types):
    options = {"n_ctx": 4096, "n_batch": 64, "n_ubatch": 64}
    row_bytes = kv_bytes_per_token(Path(gemma3)) // 6  # of one layer
    given = 4096 * row_bytes * percent // 100
    stats = load(gemma3, kv_policy=f"asrkf,types={types}", kv_pool=f"{percent}%", **options).kv_stats()
    served, windows = stats.groups
    assert given - 256 * row_bytes < served.device_kv_bytes + stats.device_index_bytes <= given
    assert windows.sliding_window == N_WINDOW and stats.device_kv_bytes == served.device_kv_bytes + windows.device_kv_bytes > given
    assert f"and {windows.device_kv_bytes / (1 << 20):.1f} MiB of sliding windows" in stats.pool_choice and stats.pool_cells < 4096


def test_a_windowed_model_has_second_looks(load, gemma3):
    llm = load(gemma3, kv_policy="asrkf,rewalk_tokens=0,recovery=second_look,look_share=0.5", kv_pool=512, n_ctx=2048, n_batch=64, n_ubatch=64)
    llm.eval(tokens(1000))
    for token in tokens(100):
        llm.eval([token])
    assert 0 < llm.kv_stats().second_looks_total <= 50
    assert llm.kv_stats().tokens == 1100 and np.isfinite(llm.output_entropy().entropy)


def test_what_a_windowed_model_cannot_have_is_refused(load, gemma3, tmp_path):
    with pytest.raises(ValueError, match="two caches there"):
        load(gemma3, kv_policy="asrkf,state=upstream", kv_pool=512)
    with pytest.raises(ValueError, match="layer 4 has a sliding window, which it keeps"):
        load(gemma3, kv_policy="asrkf,layers=4-5@512", n_ctx=2048)
    with pytest.raises(ValueError, match="all layers of the model have a sliding window"):
        load(write_gemma3(tmp_path / "five.gguf", 5), kv_policy="asrkf", kv_pool=512)


def test_layer_groups_that_hold_all_give_upstreams_logits(load, twelve):
    options = {"n_ctx": 1024, "logits_all": True, "n_batch": 64, "n_ubatch": 64}
    full = read(load(twelve, swa_full=True, **options), tokens(400))
    assert np.array_equal(read(load(twelve, kv_policy="asrkf,layers=5@1024/11@1024", **options), tokens(400)), full)


def test_each_global_layer_may_have_a_pool_of_its_own(load, twelve):
    llm = load(twelve, kv_policy="asrkf,layers=5@512/11@768", n_ctx=2048, n_batch=64, n_ubatch=64)
    llm.eval(tokens(1500))
    first, second, windowed = llm.kv_stats().groups
    assert [group.n_layers for group in (first, second, windowed)] == [1, 1, 10]
    assert [group.pool_cells for group in (first, second, windowed)] == [512, 768, 256]
    assert first.frozen_cells >= 1500 - 512 and second.frozen_cells >= 1500 - 768 and first.frozen_cells > second.frozen_cells
    assert [group.sliding_window for group in (first, second, windowed)] == [0, 0, N_WINDOW]
    row = llm.kv_rows(300, 1)
    other = load(twelve, kv_policy="asrkf,layers=5@1024/11@512", n_ctx=2048, n_batch=64, n_ubatch=64)
    other.load_state(llm.save_state())
    assert other.kv_rows(300, 1) == row


def test_budgets_differ_by_layer_in_a_windowed_model(load, tmp_path):
    """By the prior; a calibration's sensitivities take the same way."""
    llm = load(write_gemma3(tmp_path / "eighteen.gguf", 18), kv_policy="asrkf,calibration=off", kv_pool=1024, n_ctx=4096)
    *globals_, windowed = llm.kv_stats().groups
    assert sum(group.n_layers for group in globals_) == 3 and windowed.n_layers == 15
    assert len({group.pool_cells for group in globals_}) == len(globals_) > 1
    assert sum(group.n_layers * group.pool_cells for group in globals_) == 3 * 1024


def test_what_is_frozen_in_layer_groups_is_what_a_mask_leaves_out(load, twelve):
    """Upstream's oracle, behind the windows of what is then decoded."""
    options = {"n_ctx": 512, "n_batch": 64, "n_ubatch": 64}
    full = load(twelve, swa_full=True, **options)
    full.eval(oracle_tokens(N_TOKENS, 1))
    never = logits_after(full)
    full.reset()
    masked = taken_out(full)
    llm = load(twelve, kv_policy="asrkf,layers=5@512/11@512,window=64", **options)
    llm.eval(oracle_tokens(N_TOKENS, 1))
    for begin, end in FROZEN:
        llm.freeze(begin, end)
    found, n_frozen = logits_after(llm), sum(end - begin for begin, end in FROZEN)
    assert [group.frozen_cells for group in llm.kv_stats().groups[:-1]] == [n_frozen, n_frozen]
    spread = np.abs(never).max()
    changed = np.abs(never - masked).max() / spread
    assert changed > 0.002  # else nothing here could tell a mask from none
    assert np.abs(found - masked).max() / spread < 0.02 * changed


def test_a_model_with_a_window_that_no_layer_has_is_scored_as_one_without(load, tmp_path):
    """Its graph is that of windowed models all the same."""
    states = []
    for name, sliding_window in (("window", N_WINDOW), ("none", 0)):
        model = write_gemma3(tmp_path / f"{name}.gguf", 2, sliding_window=sliding_window, pattern=1)
        llm = load(model, kv_policy="asrkf,layers=shared", kv_pool=512, n_ctx=2048, n_batch=64, n_ubatch=64)
        logits = read(llm, tokens(1500))
        (group,) = llm.kv_stats().groups
        assert group.frozen_cells >= 1500 - 512 and llm.kv_stats().missed_attention_ratio > 0
        states.append((logits, llm.kv_tokens(0)))
    assert np.array_equal(states[0][0], states[1][0]) and states[0][1] == states[1][1]
