"""`Llama` with a pool, on SmolLM2: same output where everything fits, true positions where it does not."""

from __future__ import annotations

import sys

import numpy as np
import psutil
import pytest
from conftest import RPC_ENDPOINT
from kv import check_states, greedy, last_logits, placement_noise, tokens_of
from terminal import terminal

from asrkf_gguf import FreezeConfig, KVError

F16, Q8_0, Q4_0 = 1, 8, 2
CACHE_TYPES = {"f32": 0, "f16": 1, "bf16": 30, "q8_0": 8, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "iq4_nl": 20}
ROW_BYTES = {F16: 192 * 2, Q8_0: 192 // 32 * 34, Q4_0: 192 // 32 * 18}  # 3 KV heads of 64
TWO_GROUPS = "asrkf,layers=0-9@512/10-29@768"


@pytest.mark.parametrize("type_kv", [F16, Q8_0, Q4_0])
def test_a_pool_that_holds_everything_gives_the_tokens_of_full(load, smollm2, text, type_kv):
    kwargs = {"n_ctx": 1024, "type_k": type_kv, "type_v": type_kv}
    full = load(smollm2, kv_policy="full", **kwargs)
    tokens = tokens_of(full, text, 600)
    expected, _ = greedy(full, tokens, 60)
    for policy in (FreezeConfig(pool=1024), FreezeConfig(layers="0-9@1024/10-29@1024")):
        llm = load(smollm2, kv_policy=policy, **kwargs)
        chosen, _ = greedy(llm, tokens, 60)
        stats = llm.kv_stats()
        assert chosen == expected
        assert stats.freezes_total == 0 and stats.frozen_cells == 0 and stats.host_kv_bytes == 0
        check_states(llm)


@pytest.mark.parametrize(
    ("policy", "type_kv"),
    [*((policy, kind) for policy in ("asrkf,pool=512", TWO_GROUPS) for kind in (F16, Q8_0, Q4_0)), ("asrkf,pool=512,moves=staged", Q8_0)],
)
def test_device_bytes_are_the_pools_and_stay_so(load, smollm2, text, policy, type_kv):
    llm = load(smollm2, kv_policy=policy, type_k=type_kv, type_v=type_kv)
    before = llm.kv_stats()
    cells = 512 * 10 + 768 * 20 if "layers" in policy else 512 * 30
    assert before.device_kv_bytes == cells * 2 * ROW_BYTES[type_kv]
    tokens = tokens_of(llm, text, 1800)
    for begin in range(0, 1500, 300):
        llm.eval(tokens[begin : begin + 300])
        assert llm.kv_stats().device_kv_bytes == before.device_kv_bytes
        check_states(llm)
    greedy(llm, tokens[1500:1510], 40)
    after = llm.kv_stats()
    assert after.device_kv_bytes == before.device_kv_bytes
    assert after.device_compute_bytes == before.device_compute_bytes > 0
    assert after.frozen_cells > 800
    assert after.scoring_steps_total > 0
    assert after.host_kv_bytes >= sum(group.frozen_cells * group.token_bytes for group in after.groups)
    assert (after.device_staging_bytes > 0) == ("staged" in policy or bool(RPC_ENDPOINT))
    check_states(llm)


@pytest.mark.parametrize("policy", ["asrkf,layers=shared", "asrkf,layers=shared,recall=mean_key", "asrkf", "asrkf,ranking=own"])
def test_compute_buffers_are_reserved_for_every_step_of_a_full_context(load, tiny, policy):
    """The scores that outlive a layer's branch once lay in other gaps in short steps than in the reserve: near a full context
    the buffers grew."""
    n_ctx = 16384
    llm = load(tiny, n_ctx=n_ctx, kv_policy=policy, kv_pool=1024)
    reserved = llm.kv_stats().device_compute_bytes
    random = np.random.default_rng(20251211)

    def read(n: int) -> None:
        llm.eval(random.integers(0, 256, n).tolist())
        assert llm.kv_stats().device_compute_bytes == reserved, f"a step of {n} at {llm.n_tokens} tokens"

    while llm.n_tokens < n_ctx - 1:
        read(min(512, n_ctx - 1 - llm.n_tokens))
    for n in (*range(1, 9), *range(15, 300, 15)):
        llm.n_tokens = min(llm.n_tokens, n_ctx - n)  # the next step takes the tail back
        read(n)
    assert reserved > 0 and llm.kv_stats().frozen_cells > n_ctx - 1024 - 300


@pytest.mark.parametrize("moves", ["direct", "staged"])
@pytest.mark.parametrize("name", CACHE_TYPES)
def test_freeze_then_restore_gives_the_same_bytes(load, smollm2, text, name, moves):
    kind = CACHE_TYPES[name]
    llm = load(smollm2, n_ctx=1024, kv_policy=f"asrkf,pool=1024,window=64,moves={moves}", type_k=kind, type_v=kind)
    llm.eval(tokens_of(llm, text, 300))
    rows = {position: llm.kv_rows(position) for position in range(100, 200)}
    assert len(set(rows.values())) == len(rows)  # a distinct value in every row
    assert llm.freeze(100, 200) == 100
    assert all(llm.kv_tokens()[position][1] == "frozen" for position in rows)
    assert {position: llm.kv_rows(position) for position in rows} == rows
    llm.eval(tokens_of(llm, text, 50))  # other tokens take the cells
    assert llm.restore(100, 200) == 100
    assert {position: llm.kv_rows(position) for position in rows} == rows
    stats = llm.kv_stats()
    assert stats.freezes_total == 100 and stats.restores_total["request"] == 100
    assert stats.moved_to_device_bytes == 100 * stats.groups[0].token_bytes
    check_states(llm)


@pytest.mark.parametrize(("policy", "moves"), [("asrkf,pool=2048,window=64", "direct"), ("asrkf,pool=2048,window=64", "staged"),
                                               ("asrkf,layers=0-9@1536/10-29@2048,window=64", "staged")])
def test_random_freezes_and_restores_leave_the_logits_of_the_never_frozen_run(load, smollm2, text, policy, moves):
    seed = 20251211
    print("seed", seed)
    rng = np.random.default_rng(seed)
    never = load(smollm2, kv_policy="full")
    tokens = tokens_of(never, text, 500)
    expected, expected_logits = greedy(never, tokens, 24)
    llm = load(smollm2, kv_policy=f"{policy},moves={moves}")
    llm.eval(tokens)
    worst = 0.0
    for step, token in enumerate(expected):
        worst = max(worst, float(np.abs(last_logits(llm) - expected_logits[step]).max()))
        for _ in range(4):
            begin = int(rng.integers(4, 380))
            llm.freeze(begin, begin + int(rng.integers(1, 50)))
            if rng.random() < 0.5:
                begin = int(rng.integers(4, 380))
                llm.restore(begin, begin + int(rng.integers(1, 100)))
        assert llm.kv_stats().frozen_cells > 0
        llm.restore(0, -1)
        assert llm.kv_stats().frozen_cells == 0
        llm.eval([token])
    noise = placement_noise(smollm2, tokens, expected)
    print(f"largest difference {worst:.4f}, noise floor {noise:.4f}")
    assert 0 < worst <= 1.5 * noise


def test_random_freezes_on_llama3_shapes_leave_the_logits_as_they_were(load, llama3_two_layers):
    llm = load(llama3_two_layers, n_ctx=512, kv_policy="asrkf,layers=shared,pool=512,window=32,moves=staged")
    tokens = llm.tokenize(b"The quick brown fox jumps over the lazy dog. " * 20)[:150]
    token_bytes = llm.kv_stats().groups[0].token_bytes
    assert token_bytes == 2 * 2 * 8 * 128 * 2  # 2 layers, K and V, 8 heads of 128, F16
    llm.eval(tokens)
    expected = last_logits(llm)
    llm.eval(tokens[:1])
    following = last_logits(llm)
    rng = np.random.default_rng(7)
    llm._ctx.kv_cache_seq_rm(-1, 149, -1)
    llm.n_tokens = 149
    frozen: set[int] = set()
    for _ in range(10):
        begin = int(rng.integers(4, 90))
        part = set(range(begin, begin + int(rng.integers(1, 25))))
        assert llm.freeze(begin, max(part) + 1) == len(part - frozen)
        frozen |= part
    assert len(frozen) > 60 and {position for position, state in llm.kv_tokens() if state == "frozen"} == frozen
    rows = {position: llm.kv_rows(position) for position in range(149)}
    assert len(set(rows.values())) == 149
    assert llm.restore(0, -1) == len(frozen)
    assert {position: llm.kv_rows(position) for position in range(149)} == rows
    stats = llm.kv_stats()
    assert stats.moved_to_host_bytes >= stats.moved_to_device_bytes == len(frozen) * token_bytes
    # that attention does without what is frozen shows on other models (test_architectures.py): here activations in 8 bits
    # jump by as much as that changes the logits
    llm.eval(tokens[149:150])
    np.testing.assert_allclose(last_logits(llm), expected, atol=0.02)
    llm.eval(tokens[:1])
    np.testing.assert_allclose(last_logits(llm), following, atol=0.02)


@pytest.mark.parametrize("policy", ["asrkf,pool=1024", "asrkf,layers=0-14@768/15-29@1280"])
def test_a_prompt_of_6000_tokens_is_read_in_a_pool_of_1024(load, smollm2, text, policy):
    llm = load(smollm2, n_ctx=8192, n_batch=2048, n_ubatch=512, kv_policy=policy)
    tokens = tokens_of(llm, text, 6000)
    with llm.kv_trace() as trace:
        chosen, _ = greedy(llm, tokens, 40)
    stats = llm.kv_stats()
    assert stats.tokens == 6040
    assert sum(group.active_cells * group.n_layers for group in stats.groups) <= 1024 * 30
    assert all(group.frozen_cells >= 6040 - group.pool_cells for group in stats.groups)
    assert stats.device_kv_bytes == 1024 * 23040
    assert stats.restores_total["recall"] > 0 and stats.rewalks_total == 1
    assert [position for position, _ in llm.kv_tokens()] == list(range(6040))
    assert len(set(chosen)) > 5  # a text, not one token over and over
    assert sum(step["n_tokens"] for step in trace.steps if step["occasion"] != 1) == 6040
    assert [step["n_tokens"] for step in trace.steps if step["occasion"] == 1] == [48]  # the prompt's end, computed again
    assert sum(step["entropy"] > 0 for step in trace.steps) >= 39  # of each output that came before a step
    assert max(step["active_cells"] for step in trace.steps) <= stats.pool_cells
    assert sum(step["freezes"] for step in trace.steps) == stats.freezes_total
    assert stats.policy_seconds > 0 and stats.moves_seconds > 0
    check_states(llm)


@pytest.mark.parametrize("policy", ["paper", "window", "random", "flag-all", "asrkf"])
def test_every_preset_runs_freezes_and_keeps_the_bound(load, smollm2, text, policy):
    llm = load(smollm2, kv_policy=policy, kv_pool=512)
    greedy(llm, tokens_of(llm, text, 1200), 80)
    stats = llm.kv_stats()
    assert stats.policy == policy.split(",")[0]
    assert stats.frozen_cells > 0 and stats.active_cells <= 512
    assert (stats.scoring_steps_total > 0) == (stats.policy in ("asrkf", "paper"))
    assert (stats.restores_total["timer"] > 0) == (stats.policy not in ("window", "asrkf"))
    assert (stats.restores_total["recall"] > 0) == (stats.policy == "asrkf")
    check_states(llm)


def test_a_run_repeats(load, smollm2, text):
    runs = []
    for _ in range(2):
        llm = load(smollm2, kv_policy="asrkf", kv_pool=512)
        chosen, logits = greedy(llm, tokens_of(llm, text, 900), 60)
        runs.append((chosen, logits[-1].tobytes(), llm.kv_tokens()))
    assert runs[0] == runs[1]


def test_regeneration_and_prefix_reuse_are_exact_where_the_pool_holds_all(load, smollm2, text):
    prompt = text[:1500]
    full = load(smollm2, kv_policy="full")
    llm = load(smollm2, kv_policy="asrkf", kv_pool=2048)
    for tail in (" In summary,", " In summary,", " The rule is", ""):
        expected = full(prompt + tail, max_tokens=30, temperature=0)["choices"][0]["text"]
        assert llm(prompt + tail, max_tokens=30, temperature=0)["choices"][0]["text"] == expected
        check_states(llm)


@pytest.mark.parametrize("policy", ["asrkf,pool=512", TWO_GROUPS])
def test_regeneration_and_prefix_reuse_keep_true_positions_where_tokens_are_frozen(load, smollm2, text, policy):
    llm = load(smollm2, kv_policy=policy)
    prompt = text[:6000]
    n = len(llm.tokenize(prompt.encode()))
    assert n > 1000
    for cut, tail in ((6000, " In summary,"), (6000, " The rule is"), (3000, " and so"), (6000, "")):
        out = llm(prompt[:cut] + tail, max_tokens=20, temperature=0)
        assert out["usage"]["completion_tokens"] > 0
        stats = llm.kv_stats()
        assert stats.tokens == llm.n_tokens
        check_states(llm)
    assert stats.restores_total["window"] > 0  # the window moved back over frozen tokens
    assert stats.frozen_cells > 0
    llm.reset()
    llm("Hello", max_tokens=4)
    assert llm.kv_stats().tokens < 20 and llm.kv_stats().host_kv_bytes == 0


def test_a_chat_of_many_turns_goes_on_past_the_pool(load, smollm2, text):
    llm = load(smollm2, kv_policy="asrkf", kv_pool=512, n_ctx=4096)
    messages = []
    for turn in range(4):
        messages.append({"role": "user", "content": f"Summarise part {turn}: {text[turn * 1500 : turn * 1500 + 1500]}"})
        pieces = llm.create_chat_completion(messages=messages, max_tokens=24, temperature=0, stream=True)
        answer = "".join(piece["choices"][0]["delta"].get("content", "") for piece in pieces)
        assert answer.strip()
        messages.append({"role": "assistant", "content": answer})
        check_states(llm)
    stats = llm.kv_stats()
    assert stats.tokens > 1000 and stats.frozen_cells > 400


def test_chat_with_a_pool_that_holds_all_gives_the_answers_of_full(load, smollm2, text):
    answers = []
    for policy, pool in (("full", None), ("asrkf", 2048)):
        llm = load(smollm2, kv_policy=policy, kv_pool=pool)
        messages, said = [], []
        for turn in range(3):
            messages.append({"role": "user", "content": f"Part {turn}: {text[turn * 800 : turn * 800 + 800]}"})
            message = llm.create_chat_completion(messages=messages, max_tokens=20, temperature=0)["choices"][0]["message"]
            said.append(message["content"])
            messages.append({"role": "assistant", "content": message["content"]})
        answers.append(said)
    assert answers[0] == answers[1]


def test_grammar_and_streaming_work_on_frozen_tokens(load, smollm2, text):
    from llama_cpp import LlamaGrammar

    llm = load(smollm2, kv_policy="asrkf", kv_pool=512)
    grammar = LlamaGrammar.from_string('root ::= "yes" | "no"', verbose=False)
    pieces = list(llm(text[:5000] + "\nIs this a text about Python? Answer:", max_tokens=4, grammar=grammar, stream=True, temperature=0))
    assert "".join(piece["choices"][0]["text"] for piece in pieces) in ("yes", "no")
    assert llm.kv_stats().frozen_cells > 0


def test_pinned_positions_are_never_frozen(load, smollm2, text):
    llm = load(smollm2, kv_policy="asrkf,pool=512,pinned=100-140")
    llm.pin(200, 220)
    greedy(llm, tokens_of(llm, text, 1200), 20)
    states = llm.kv_tokens()
    assert all(states[position][1] != "frozen" for position in [*range(100, 140), *range(200, 220)])
    with pytest.raises(KVError, match="protected"):
        llm.freeze(130, 150)
    with pytest.raises(KVError, match="use layers=shared with a kv_pool of at least 768"):
        llm.pin(0, 400)
    frozen = next(position for position in range(300, 800) if states[position][1] == "frozen")
    llm.pin(frozen, frozen + 1)
    llm.eval([5])
    assert llm.kv_tokens()[frozen][1] != "frozen"
    llm.unpin(0, -1)
    llm.eval([5])  # the window, which pinned tokens had made shorter, comes back with the next step, as a pinned token does
    check_states(llm)


@pytest.mark.parametrize("policy", ["asrkf,pool=512", TWO_GROUPS, f"{TWO_GROUPS},ranking=own"])
def test_states_hold_frozen_tokens_and_load_anywhere(load, smollm2, text, policy):
    llm = load(smollm2, kv_policy=policy)
    tokens = tokens_of(llm, text, 1200)
    llm.eval(tokens)
    assert llm.kv_stats().frozen_cells > 400
    assert llm.kv_config().state == "own"
    state = llm.save_state()
    rows = {(group, position): llm.kv_rows(position, group) for group in range(len(llm.kv_stats().groups)) for position in range(0, 1200, 37)}
    greedy(llm, tokens[:5], 10)
    llm.load_state(state)
    assert llm.n_tokens == llm.kv_stats().tokens == 1200
    assert {key: llm.kv_rows(key[1], key[0]) for key in rows} == rows
    greedy(llm, tokens[:5], 10)
    check_states(llm)
    full = load(smollm2, kv_policy="full")
    with pytest.raises(KVError):  # it holds scores and timers, too: never taken for upstream's
        full.load_state(state)
    handing_over = load(smollm2, kv_policy=f"{policy},state=upstream")
    handing_over.load_state(state)
    full.load_state(handing_over.save_state())
    again, _ = greedy(full, tokens[:5], 10)
    assert len(again) == 10 and full.kv_stats().tokens == 1215
    whole = load(smollm2, kv_policy="asrkf", kv_pool=2048)
    whole.load_state(state)
    assert greedy(whole, tokens[:5], 10)[0] == again  # nothing is frozen there: the same tokens as the full cache
    small = load(smollm2, kv_policy="asrkf", kv_pool=512, n_ctx=1024)
    small.eval(tokens[:100])
    with pytest.raises(KVError, match="the state has 1200 tokens, n_ctx is 1024"):
        small.load_state(state)
    assert small.n_tokens == small.kv_stats().tokens == 100
    small.eval(tokens[100:110])


def test_a_host_limit_refuses_the_step_and_nothing_is_lost(load, smollm2, text):
    llm = load(smollm2, kv_policy="asrkf,pool=512,host_limit=12MiB")
    tokens = tokens_of(llm, text, 1900)
    llm.eval(tokens[:700])
    before = llm.kv_stats()
    assert before.frozen_cells > 0
    rows = {position: llm.kv_rows(position) for position in range(0, 700, 50)}
    with pytest.raises(KVError, match="host_limit of 12582912 bytes"):
        llm.eval(tokens[700:1900])
    stats = llm.kv_stats()
    assert 700 <= stats.tokens < 1900 and stats.host_kv_peak_bytes <= 12582912
    assert {position: llm.kv_rows(position) for position in rows} == rows
    llm.reset()
    llm.eval(tokens[:600])
    assert llm.kv_stats().tokens == 600


def test_prompts_in_place_of_each_other_take_no_more_ram(load, tiny):
    llm = load(tiny, n_ctx=16384, kv_policy="window", kv_pool=1024)
    random = np.random.default_rng(20261128)
    resident = []
    for _ in range(5):
        llm.reset()
        llm.eval(random.integers(0, 256, 16000).tolist())
        assert llm.kv_stats().host_kv_bytes > 0
        resident.append(psutil.Process().memory_info().rss)
    assert max(resident[1:]) < resident[0] + llm.kv_stats().host_kv_bytes // 4, resident


def test_a_full_context_is_refused_with_the_numbers(load, smollm2, text):
    llm = load(smollm2, n_ctx=1024, kv_policy="asrkf", kv_pool=512)
    llm.eval(tokens_of(llm, text, 1000))
    with pytest.raises(KVError, match="1000 tokens and 50 new ones do not fit into n_ctx 1024"):
        llm.eval(tokens_of(llm, text, 50))
    llm.eval([5])
    assert llm.kv_stats().tokens == 1001


def test_progress_is_told_while_a_long_prompt_is_read(load, smollm2, text):
    seen = []
    llm = load(smollm2, kv_policy="asrkf", kv_pool=512, n_batch=256, progress=lambda *told: seen.append(told))
    llm.eval(tokens_of(llm, text, 700))
    assert seen == [(0, 700), (256, 700), (512, 700), (700, 700)]
    seen.clear()
    llm.reset()
    llm.eval(tokens_of(llm, text, 100))  # one batch
    llm.eval([5])  # as an answer's tokens are evaluated
    assert seen == [(0, 100), (100, 100)]


def test_progress_may_end_the_reading_and_what_was_read_stays(load, smollm2, text):
    class Enough(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done > 400:
            raise Enough

    llm = load(smollm2, kv_policy="asrkf", kv_pool=512, n_batch=256)
    tokens = tokens_of(llm, text, 1000)
    expected, _ = greedy(llm, tokens, 8)
    llm.reset()
    llm.progress = stop
    with pytest.raises(Enough):
        llm.eval(tokens)
    assert llm.n_tokens == llm.kv_stats().tokens == 512
    llm.progress = None
    check_states(llm)
    llm.eval(tokens[512:])
    assert greedy(llm, [], 8)[0] == expected


def test_progress_true_is_a_bar_on_a_terminal(smollm2, text, tmp_path):
    (tmp_path / "text").write_text(text[:6000])
    code = (
        "import sys; from asrkf_gguf import Llama;"
        f"llm = Llama({smollm2!r}, n_ctx=2048, n_threads=2, n_threads_batch=2, verbose=False, progress=True, kv_policy='asrkf', kv_pool=512);"
        f"llm.eval(llm.tokenize(open({str(tmp_path / 'text')!r}, 'rb').read()))"
    )
    with terminal(sys.executable, "-c", code) as program:
        program.expect("reading the prompt")
        program.expect("tok/s")
        assert program.wait() == 0


def test_progress_can_be_a_bar_later_too(load, tiny):
    llm = load(tiny, kv_policy="asrkf", kv_pool=512)
    llm.progress = True
    llm.eval([1, 2, 3])
    assert callable(llm.progress)
    llm.progress = False
    assert llm.progress is None


def test_a_trace_that_could_not_begin_is_not_in_the_way_of_the_next(load, tiny):
    llm = load(tiny, kv_policy="asrkf", kv_pool=512)
    with pytest.raises((KVError, ValueError)), llm.kv_trace(0):
        pass
    with llm.kv_trace() as trace:
        llm.eval([1, 2, 3])
    assert len(trace.steps) == 1


def test_a_size_is_a_number_or_text(load, tiny):
    llm = load(tiny, kv_policy="asrkf", kv_pool=512)
    llm.set_host_limit("1GiB")
    llm.set_host_limit(0)
    with pytest.raises(ValueError, match="unknown unit"):
        llm.set_host_limit("8 apples")


def test_stats_of_full_are_upstreams(load, smollm2, text):
    llm = load(smollm2, n_ctx=1024, kv_policy="full")
    llm.eval(tokens_of(llm, text, 100))
    stats = llm.kv_stats()
    assert stats.policy == "full" and stats.device_kv_bytes == 1024 * 23040
    assert stats.tokens == stats.active_cells == 100 and stats.groups == ()
    assert llm.kv_config() is None
    for ask in (lambda: llm.freeze(0, 10), lambda: llm.kv_rows(0)):
        with pytest.raises(KVError, match="upstream's KV cache"):
            ask()
