"""llama-cpp-python's other surfaces on a cache that freezes: prompt caches, many turns, all logits, drafts."""

from __future__ import annotations

import tempfile

import numpy as np
import pytest
from kv import check_states, tokens_of
from llama_cpp import LlamaDiskCache, LlamaRAMCache
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding
from make_models import write_lora

from asrkf_gguf import KVError

GREEDY = {"max_tokens": 12, "temperature": 0, "seed": 1}


def evaluated(llm) -> list[int]:
    """A list that grows by the number of tokens of each eval() from now on."""
    counts, eval_tokens = [], llm.eval

    def count(tokens):
        counts.append(len(tokens))
        eval_tokens(tokens)

    llm.eval = count
    return counts


def answer(llm, prompt: str, **options) -> str:
    return llm.create_completion(prompt, **{**GREEDY, **options})["choices"][0]["text"]


@pytest.fixture(params=["ram", "disk"])
def new_cache(request, tmp_path):
    """Makes one, each time another."""
    return LlamaRAMCache if request.param == "ram" else lambda: LlamaDiskCache(tempfile.mkdtemp(dir=tmp_path))


@pytest.fixture
def prompt_cache(new_cache):
    return new_cache()


def test_a_prompt_cache_saves_the_reading_and_changes_no_answer(load, smollm2, text, new_cache):
    plain = load(smollm2, n_ctx=1024, kv_policy="full")
    llm = load(smollm2, n_ctx=1024, kv_policy="asrkf", kv_pool=1024)
    for each in (plain, llm):  # steps of other lengths round otherwise
        each.set_cache(new_cache())
    one, other = text[:1500], text[20000:21500]
    read = evaluated(llm)
    for prompt, most in ((one, 500), (other, 500), (one, 1), (other + " In summary,", 8)):
        read.clear()
        assert answer(llm, prompt) == answer(plain, prompt)
        assert 0 < read[0] <= most
        check_states(llm)


def test_a_prompt_cache_brings_back_frozen_tokens(load, smollm2, text, prompt_cache):
    llm = load(smollm2, kv_policy="asrkf", kv_pool=512)
    llm.set_cache(prompt_cache)
    one, other = text[:5000], text[20000:25000]
    n_prompt = len(llm.tokenize(one.encode()))
    read, answers = evaluated(llm), []
    for prompt in (one, other, one, other, one):
        read.clear()
        answers.append(answer(llm, prompt))
        stats = llm.kv_stats()
        assert stats.tokens == llm.n_tokens >= 800 and stats.frozen_cells > 300
        assert read[0] == (1 if len(answers) > 2 else n_prompt if prompt == one else read[0])
        check_states(llm)
    assert answers[2] == answers[4]  # the same rows, and the same tokens are active: scores begin anew with a state


def test_a_cached_prompt_that_host_limit_refuses_is_read_instead(load, smollm2, text):
    llm = load(smollm2, kv_policy="asrkf,pool=512,host_limit=24MiB")
    llm.set_cache(LlamaRAMCache())
    one, other = text[:4800], text[20000:24800]
    first = answer(llm, one)
    state = llm.save_state()
    answer(llm, other)
    with pytest.raises(KVError, match="host_limit"):  # two sequences would have to be held for a moment
        llm.load_state(state)
    read = evaluated(llm)
    assert answer(llm, one) == first
    assert read[0] > 700
    check_states(llm)


def test_a_state_fits_models_with_another_context_and_batch(load, smollm2, text):
    small = load(smollm2, n_ctx=1024, n_batch=128, kv_policy="asrkf", kv_pool=512)
    tokens = tokens_of(small, text, 1100)
    small.eval(tokens[:900])
    state = small.save_state()
    assert state.scores.nbytes == small.n_vocab() * 4  # no rows of logits that nobody kept
    large = load(smollm2, n_ctx=2048, n_batch=512, kv_policy="asrkf", kv_pool=512)
    large.load_state(state)
    large.eval(tokens[900:])  # past the n_ctx that the state came from
    assert large.n_tokens == large.kv_stats().tokens == 1100 and large.input_ids[:1100].tolist() == tokens
    check_states(large)


def test_a_state_that_upstreams_cache_cannot_hold_leaves_it_empty_and_usable(load, smollm2, text):
    llm = load(smollm2, kv_policy="asrkf", kv_pool=512)
    llm.eval(tokens_of(llm, text, 1200))
    full = load(smollm2, n_ctx=1024, kv_policy="full")
    expected = answer(full, text[:600])
    with pytest.raises(KVError):
        full.load_state(llm.save_state())
    assert full.n_tokens == full.kv_stats().tokens
    assert answer(full, text[:600]) == expected


def test_a_chat_of_seven_turns_reads_each_turn_once(load, smollm2, text):
    llm = load(smollm2, kv_policy="asrkf", kv_pool=512, n_ctx=4096)
    read, messages, all_read = evaluated(llm), [], 0
    for turn in range(7):
        messages.append({"role": "user", "content": f"Part {turn}: {text[turn * 900 : turn * 900 + 900]}"})
        read.clear()
        message = llm.create_chat_completion(messages=messages, max_tokens=16, temperature=0, seed=1)["choices"][0]["message"]
        assert message["content"].strip()
        messages.append(message)
        assert read[0] < 400
        all_read += read[0]
        check_states(llm)
    stats = llm.kv_stats()
    assert stats.tokens == llm.n_tokens > 1400 and all_read < stats.tokens
    assert stats.frozen_cells > 900 and stats.restores_total["recall"] > 0


def test_all_logits_come_back_and_are_those_of_full_where_the_pool_holds_all(load, smollm2, text):
    full = load(smollm2, n_ctx=1024, kv_policy="full", logits_all=True)
    tokens = tokens_of(full, text, 900)
    full.eval(tokens)
    whole = load(smollm2, n_ctx=1024, kv_policy="asrkf", kv_pool=1024, logits_all=True)
    whole.eval(tokens)
    np.testing.assert_array_equal(whole.scores[:900], full.scores[:900])
    small = load(smollm2, n_ctx=1024, kv_policy="asrkf", kv_pool=512, logits_all=True)
    small.eval(tokens)
    assert small.kv_stats().frozen_cells > 300
    best = small.scores[:900].argmax(axis=1)
    assert np.isfinite(small.scores[:900]).all() and len(set(best.tolist())) > 100  # a row of its own for each token
    agree = best == full.scores[:900].argmax(axis=1)
    assert agree[:256].all() and agree.mean() > 0.8


def test_logprobs_come_with_an_answer_past_the_pool(load, smollm2, text):
    llm = load(smollm2, n_ctx=1024, kv_policy="asrkf", kv_pool=512, logits_all=True)
    choice = llm.create_completion(text[:4000], **GREEDY, logprobs=3)["choices"][0]
    assert llm.kv_stats().frozen_cells > 100
    assert len(choice["logprobs"]["tokens"]) == 12
    assert all(-20 < value <= 0 for value in choice["logprobs"]["token_logprobs"])
    assert all(len(best) >= 3 for best in choice["logprobs"]["top_logprobs"])


def test_an_adapter_gives_the_logits_of_full_where_the_pool_holds_all_and_runs_past_it(load, tiny, tmp_path):
    write_lora(tmp_path / "lora.gguf")
    tokens = np.random.default_rng(1).integers(0, 250, 900).tolist()
    options = {"n_ctx": 1024, "logits_all": True}

    def logits(llm) -> np.ndarray:
        llm.eval(tokens)
        return np.array(llm.scores[:900])

    full, plain = load(tiny, lora_path=str(tmp_path / "lora.gguf"), **options), load(tiny, **options)
    ours = load(tiny, lora_path=str(tmp_path / "lora.gguf"), kv_policy="asrkf", kv_pool=1024, **options)
    expected = logits(full)
    assert np.array_equal(logits(ours), expected) and not np.array_equal(logits(plain), expected)
    small = load(tiny, lora_path=str(tmp_path / "lora.gguf"), kv_policy="asrkf", kv_pool=512, **options)
    assert np.isfinite(logits(small)).all() and small.kv_stats().frozen_cells > 300


def test_embeddings_are_refused_with_what_to_use(load, smollm2):
    llm = load(smollm2, kv_policy="asrkf", kv_pool=512)
    with pytest.raises(KVError, match=r"use a second Llama\(.*embedding=True"):
        llm.embed("Hello")
    with pytest.raises(KVError, match="no embeddings"):
        llm.create_embedding("Hello")
    assert answer(llm, "Hello")
    full = load(smollm2, n_ctx=512, kv_policy="full", embedding=True)
    assert len(full.embed("Hello")[0]) == full.n_embd()


class CountingDraft(LlamaPromptLookupDecoding):
    """The draft, with the number of tokens that it proposed."""

    proposed = 0

    def __call__(self, input_ids, /, **kwargs):
        found = super().__call__(input_ids, **kwargs)
        self.proposed += len(found)
        return found


def drafted(load, smollm2, prompt: str, policy: str, draft: CountingDraft | None, **options) -> tuple[list[int], int, object]:
    """48 greedy tokens after the prompt, how many decodes they took, and the model."""
    llm = load(smollm2, kv_policy=policy, draft_model=draft, **options)
    read, chosen = evaluated(llm), []
    for token in llm.generate(llm.tokenize(prompt.encode()), temp=0):
        chosen.append(token)
        if len(chosen) == 48:
            return chosen, len(read), llm
    raise AssertionError("generate() ended")


def test_drafts_with_a_pool_that_holds_all_give_the_tokens_of_full_with_drafts(load, smollm2, text):
    """(Not of full without: several tokens in one step are rounded otherwise than one by one, and one token here is nearly a tie.)"""
    expected, n_full, _ = drafted(load, smollm2, text[:2500], "full", CountingDraft(num_pred_tokens=8), n_ctx=1024)
    draft = CountingDraft(num_pred_tokens=8)
    chosen, n_decodes, llm = drafted(load, smollm2, text[:2500], "asrkf,pool=1024", draft, n_ctx=1024)
    assert chosen == expected
    assert n_decodes == n_full < 48  # drafts were taken,
    assert draft.proposed > 48 - n_decodes  # and others were not
    check_states(llm)


@pytest.mark.parametrize("policy", ["asrkf,pool=512", "asrkf,layers=0-9@512/10-29@768", "window,pool=256,window=64", "paper,pool=512"])
def test_drafts_that_are_taken_back_leave_true_positions_on_a_frozen_cache(load, smollm2, text, policy):
    draft = CountingDraft(num_pred_tokens=10)
    chosen, n_decodes, llm = drafted(load, smollm2, text[:5000], policy, draft, n_ctx=1280)
    stats = llm.kv_stats()
    assert stats.frozen_cells > 200 and draft.proposed > 48 - n_decodes > 0
    n_prompt = len(llm.tokenize(text[:5000].encode()))
    assert llm.input_ids[n_prompt : n_prompt + 47].tolist() == chosen[:47]  # the last one is sampled, not read yet
    llm.eval([])  # takes back what was drafted behind it
    assert llm.kv_stats().tokens == llm.n_tokens
    check_states(llm)


@pytest.mark.parametrize("policy", ["full", "asrkf,pool=512"])
def test_reading_no_tokens_cuts_the_cache_to_n_tokens_as_upstreams_does(load, smollm2, text, policy):
    llm = load(smollm2, kv_policy=policy)
    llm.eval(llm.tokenize(text[:4000].encode())[:800])
    llm.n_tokens = 300
    llm.eval([])
    assert llm.kv_stats().tokens == 300
    llm.eval([5])
    assert llm.kv_stats().tokens == 301
    if policy != "full":
        check_states(llm)
