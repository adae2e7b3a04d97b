"""What comes back, and why: recall, the end of a prompt, recovery, budgets by layer."""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from kv import check_states, greedy, last_logits, tokens_of

from asrkf_gguf import FreezeConfig, KVError, calibrate
from asrkf_gguf.models import find_side_file


def test_the_index_is_small_constant_and_part_of_a_bound_in_bytes(load, smollm2, text):
    llm = load(smollm2, kv_policy="asrkf", kv_pool="20MiB", n_ctx=4096)
    before = llm.kv_stats()
    assert 0 < before.device_index_bytes < 0.045 * 4096 * 23040
    assert before.device_kv_bytes + before.device_index_bytes <= 20 << 20
    llm.eval(tokens_of(llm, text, 2000))
    after = llm.kv_stats()
    assert (after.device_kv_bytes, after.device_index_bytes) == (before.device_kv_bytes, before.device_index_bytes)
    means = load(smollm2, kv_policy="asrkf,recall=mean_key", kv_pool=512, n_ctx=4096).kv_stats()
    assert 0 < means.device_index_bytes < 0.4 * before.device_index_bytes
    for policy in ("window,pool=512", "random,pool=512", "full"):
        assert load(smollm2, kv_policy=policy).kv_stats().device_index_bytes == 0


@pytest.mark.parametrize("recall", ["exact", "mean_key"])
def test_recall_brings_back_what_a_query_asks_for(load, smollm2, text, recall):
    """A sentence read long ago is frozen; asking for it in its own words brings its tokens back into every layer group."""
    llm = load(smollm2, kv_policy=f"asrkf,pool=512,rewalk_tokens=0,recall={recall}", n_ctx=4096)
    sentence = " The pass key of the northern harbour is 48213."
    tokens = tokens_of(llm, text, 400)
    begin = len(tokens)
    tokens += llm.tokenize(sentence.encode(), add_bos=False)
    end = len(tokens)
    tokens += tokens_of(llm, text[4000:], 1500)
    llm.eval(tokens)

    def active() -> float:
        parts = []
        for group in range(len(llm.kv_stats().groups)):
            states = llm.kv_tokens(group)
            parts.append(np.mean([states[position][1] != "frozen" for position in range(begin, end)]))
        return float(np.mean(parts))

    def gain(words: bytes) -> float:
        """How much more of the sentence is active after these words were read twice."""
        llm.load_state(state)
        before = active()
        for token in llm.tokenize(words, add_bos=False) * 2:
            llm.eval([token])
        return active() - before

    state = llm.save_state()
    assert active() < 0.5
    other = gain(b" An expression list containing at least one comma")
    asked = gain(b" The pass key of the northern harbour is 482")
    print(f"{recall}: asked for {asked:+.3f}, not asked for {other:+.3f} of the sentence")
    assert asked > 2 * other and asked - other > 0.12  # it comes because it is asked for, not because steps go by
    assert llm.kv_stats().restores_total["recall"] > 0
    check_states(llm)


def test_recall_off_leaves_frozen_tokens_to_their_timers(load, smollm2, text):
    llm = load(smollm2, kv_policy="asrkf,pool=512,recall=off,timer_share=0.1")
    greedy(llm, tokens_of(llm, text, 1200), 40)
    stats = llm.kv_stats()
    assert stats.restores_total["recall"] == 0 and stats.restores_total["timer"] > 0 and stats.rewalks_total == 0
    check_states(llm)


def test_a_prompt_in_many_batches_has_one_end(load, smollm2, text):
    llm = load(smollm2, kv_policy="asrkf,pool=512", n_batch=128)
    llm.eval(tokens_of(llm, text, 1000))
    assert llm.kv_stats().rewalks_total == 1 and llm.kv_stats().rewalked_tokens_total == 48
    llm.eval(tokens_of(llm, text, 1)[:1])
    assert llm.kv_stats().rewalks_total == 1
    short = load(smollm2, kv_policy="asrkf,pool=512", n_batch=128)
    short.eval(tokens_of(short, text, 200))
    assert short.kv_stats().rewalks_total == 0  # nothing was frozen


def test_entropy_is_that_of_the_outputs(load, smollm2, text):
    llm = load(smollm2, kv_policy="asrkf,pool=512")
    expected = []
    with llm.kv_trace() as trace:
        llm.eval(tokens_of(llm, text, 600))
        for token in tokens_of(llm, text[5000:], 20):
            logits = last_logits(llm).astype(np.float64)
            p = np.exp(logits - logits.max())
            p /= p.sum()
            expected.append(float(-(p * np.log(np.maximum(p, 1e-300))).sum()))
            asked = llm.output_entropy().entropy
            llm.eval([token])
            assert llm.kv_stats().entropy == np.float32(asked)  # recovery's number is the caller's
    found = [step["entropy"] for step in trace.steps if step["n_tokens"] == 1]
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    stats = llm.kv_stats()
    assert stats.outputs_total == 20
    assert stats.entropy == pytest.approx(expected[-1], rel=1e-4)
    assert stats.entropy_mean == pytest.approx(np.mean(expected), rel=1e-4)
    assert stats.entropy_deviation == pytest.approx(np.std(expected, ddof=1), rel=1e-3)


@pytest.mark.parametrize("policy", ["asrkf,pool=512", None])
def test_an_output_row_has_the_figures_that_float64_gives(load, smollm2, text, policy):
    llm = load(smollm2, kv_policy=policy, logits_all=True)
    with pytest.raises(ValueError, match="no output row"):
        llm.output_entropy()
    llm.eval(tokens_of(llm, text, 12))
    address = llama_cpp.llama_get_logits(llm.ctx)
    logits = np.ctypeslib.as_array(address, (12, llm.n_vocab()))  # llama.cpp's own memory: what is written there is read
    logits[3, ::2] = -np.inf
    logits[4] = 0
    for row in (0, 3, 4, 11, -1, -9):
        x = logits[row].astype(np.float64)
        p = np.exp(x - x.max())
        total = p.sum()
        p /= total
        found = llm.output_entropy(row)
        assert found.log_sum_exp == pytest.approx(x.max() + np.log(total), rel=1e-6)
        assert found.entropy == pytest.approx(-(p[p > 0] * np.log(p[p > 0])).sum(), rel=1e-5)
        assert found.top_probability == pytest.approx(p.max(), rel=1e-6)
    assert llm.output_entropy(4).entropy == pytest.approx(np.log(llm.n_vocab()), rel=1e-7)
    logits[5, 77] = np.nan
    with pytest.raises(KVError, match="row 5 has a NaN, at token 77"):
        llm.output_entropy(5)
    for row in (12, -13, 1 << 30):
        with pytest.raises(ValueError, match=f"no output row {row}"):
            llm.output_entropy(row)


@pytest.mark.parametrize("trigger", ["entropy", "random"])
def test_recovery_escalates_within_the_bound(load, smollm2, text, trigger):
    llm = load(smollm2, kv_policy=f"asrkf,pool=512,recovery=full,trigger={trigger},trigger_share=0.5,seed=3")
    tokens = tokens_of(llm, text, 1400)
    llm.eval(tokens[:1000])
    for token in tokens[1000:1400]:
        llm.eval([token])
    stats = llm.kv_stats()
    assert all(stats.recoveries_total[level] > 0 for level in ("soft", "window", "full")), stats.recoveries_total
    assert stats.restores_total["recovery"] > 0
    assert sum(stats.recoveries_total.values()) <= 400 / 16  # the pause
    check_states(llm)


@pytest.mark.parametrize("trigger", ["missed", "entropy", "random"])
def test_a_second_look_stays_within_its_share_and_is_seen(load, smollm2, text, trigger):
    llm = load(smollm2, kv_policy=f"asrkf,pool=512,recovery=second_look,look_share=0.25,look_trigger={trigger}")
    tokens = tokens_of(llm, text, 850)
    llm.eval(tokens[:700])
    assert llm.kv_stats().second_looks_total == 0  # a prompt has none
    with llm.kv_trace() as trace:
        for token in tokens[700:]:
            llm.eval([token])
    stats = llm.kv_stats()
    again = [step for step in trace.steps if step["occasion"] == 5]
    assert 12 <= len(again) == stats.second_looks_total <= 150 // 4
    assert stats.restores_total["recovery"] == sum(step["restores"] for step in again) > 0
    assert len({step["pos"] for step in again}) == len(again)  # one look a token
    assert stats.steps_total - stats.rewalks_total >= 150 + len(again)
    if trigger == "missed":
        own = {before["pos"]: after["missed_attention_ratio"] for before, after in zip(trace.steps, trace.steps[1:], strict=False)}
        assert np.mean([own[step["pos"]] for step in again]) > 1.3 * np.mean(list(own.values()))
    check_states(llm)


@pytest.mark.parametrize("layers", ["shared", "two", "each"])
def test_budgets_by_layer_keep_the_pools_bytes(load, smollm2, layers):
    stats = load(smollm2, kv_policy=FreezeConfig(layers=layers, pool=1024), n_ctx=4096).kv_stats()
    assert stats.device_kv_bytes <= 1024 * 23040
    assert stats.device_kv_bytes > (1024 - 64) * 23040  # what does not divide is less than a sixteenth
    assert sum(group.n_layers for group in stats.groups) == 30
    assert {"shared": len(stats.groups) == 1, "two": len(stats.groups) == 2, "each": 2 < len(stats.groups) <= 12}[layers]


def test_the_packages_own_calibration_is_found(load, smollm2):
    config = load(smollm2, kv_policy="asrkf", kv_pool=512).kv_config()
    assert Path(config.calibration).name == "SmolLM2-135M-Instruct.Q4_1.asrkf.json"
    shared = load(smollm2, kv_policy="asrkf,layers=shared", kv_pool=512).kv_config()
    assert shared.calibration == config.calibration  # it says who scores, too
    assert load(smollm2, kv_policy="window", kv_pool=512).kv_config().calibration is None


@pytest.fixture
def bytes_as_tokens(monkeypatch):
    """The tiny model has no tokenizer, but a vocabulary of 256."""
    monkeypatch.setattr(llama_cpp.Llama, "tokenize", lambda self, text, **_: list(text))
    monkeypatch.setattr(calibrate, "read_tokens", lambda model, text, n_tokens: list(text[:n_tokens].encode()))


def calibrate_arguments(tmp_path, text, **other):
    source = tmp_path / "text.txt"
    source.write_text(text[:30000])
    arguments = {"text": str(source), "tokens": None, "threads": 2, "n_gpu_layers": 0, "out": None, "thorough": False}
    return argparse.Namespace(**{**arguments, **other})


@pytest.mark.parametrize("thorough", [False, True])
def test_calibrate_measures_a_model_and_its_file_serves_that_model_only(load, smollm2, tiny, text, tmp_path, monkeypatch, bytes_as_tokens, thorough):
    model = tmp_path / "model.gguf"
    model.write_bytes(Path(tiny).read_bytes())
    assert find_side_file(model) is None
    monkeypatch.setattr(calibrate, "resolve_model", Path)
    monkeypatch.setenv("ASRKF_CALIBRATIONS", str(tmp_path / "calibrations"))
    assert calibrate.main(calibrate_arguments(tmp_path, text, model=str(model), thorough=thorough)) == 0
    (path,) = (tmp_path / "calibrations").iterdir()
    content = json.loads(path.read_text())
    assert len(content["sensitivities"]) == 2 and all(value > 0 for value in content["sensitivities"])
    assert content["score_layers"] in (([0], [1]) if thorough else ([1],)) and ("score_layers_tried" in content) == thorough
    assert load(str(model), kv_policy="asrkf", kv_pool=1024).kv_config().calibration == str(path)
    with pytest.raises(ValueError, match="made for another model"):
        load(smollm2, kv_policy=f"asrkf,calibration={path}", kv_pool=512)
    beside = model.with_name("model.asrkf.json")
    path.rename(beside)
    assert find_side_file(model) == beside
    assert load(str(model), kv_policy="asrkf", kv_pool=1024).kv_config().calibration == str(beside)
    beside.write_text("{}")
    with pytest.raises(ValueError, match="not a file of asrkf calibrate"):
        load(str(model), kv_policy="asrkf", kv_pool=1024)


def test_the_search_for_scoring_layers_takes_the_best_of_each_quarter(monkeypatch):
    best = {1, 6, 11, 15}  # of nineteen layers; it begins with 4, 8, 13, 17, of which the first lies beside its quarter

    class Runner:
        def log_probabilities(self, policy, tokens, skip):
            return policy

    def loss(_, policy):
        layers = {int(layer) for layer in policy.split("score_layers=")[1].split(",")[0].split("+")}
        return 1.0 + len(layers ^ best)

    monkeypatch.setattr(calibrate, "mean_divergence", loss)
    chosen, tried = calibrate.choose_scoring_layers(Runner(), [0] * calibrate.SCORER_TOKENS, {}, list(range(19)))
    assert chosen == sorted(best)
    assert [4, 8, 13, 17] in [entry["layers"] for entry in tried] and min(entry["kl"] for entry in tried) == 1.0


def test_a_short_calibration_text_is_refused(tiny, bytes_as_tokens):
    with pytest.raises(ValueError, match="give a longer --text"):
        calibrate.calibrate_thoroughly(Path(tiny), "too short", threads=2, n_gpu_layers=0)
    with pytest.raises(ValueError, match="multiple of 256"):
        calibrate.calibrate_thoroughly(Path(tiny), "too short", n_tokens=100)


RESETS = "asrkf,recovery=full,trigger=random,trigger_share=0.5,interval=1"


def test_a_full_reset_takes_sampled_tokens_back_and_samples_them_anew(load, smollm2, text):
    prompt = text[:6000]
    llm = load(smollm2, kv_policy=RESETS, kv_pool=512, n_ctx=4096)
    answer = llm.create_completion(prompt, max_tokens=120, temperature=0.8, seed=5)
    assert answer["usage"]["completion_tokens"] <= 120 and answer["choices"][0]["text"]
    assert llm.kv_regenerations > 0 and llm.kv_stats().recoveries_total["full"] >= llm.kv_regenerations
    n_tokens = len(llm.tokenize(prompt.encode())) + answer["usage"]["completion_tokens"]
    assert llm.n_tokens <= n_tokens  # nothing that the caller never saw
    check_states(llm)
    before = llm.kv_regenerations
    streamed = list(llm.create_completion(prompt, max_tokens=100, temperature=0.8, seed=5, stream=True))
    assert streamed and llm.kv_regenerations == before  # a stream is not held back unless asked for


def test_an_answer_that_fills_the_context_ends_there(load, smollm2, text):
    llm = load(smollm2, kv_policy=RESETS, kv_pool=512, n_ctx=1024)
    prompt = tokens_of(llm, text, 960)
    answer = llm.create_completion(prompt, max_tokens=None, temperature=0.8, seed=3)
    assert answer["usage"]["completion_tokens"] == 64 or answer["choices"][0]["finish_reason"] == "stop"


def test_an_answer_that_is_left_unread_leaves_later_ones_alone(load, smollm2, text):
    """Its sampled tokens, its seed and its length are its own, also when it is closed while another answer is read."""
    llm = load(smollm2, kv_policy=RESETS, kv_pool=512, n_ctx=2048, kv_regenerate=4)
    tokens = tokens_of(llm, text, 900)
    expected = load(smollm2, kv_policy=RESETS, kv_pool=512, n_ctx=2048, kv_regenerate=4)
    wanted = list(itertools.islice(expected.generate(tokens[:300], temp=0.0), 12))
    left = llm.generate(tokens, temp=0.9)
    assert len(list(itertools.islice(left, 150))) == 150 and llm.kv_regenerations > 0
    llm.reset()
    llm._ctx.kv_cache_clear()
    found = []
    for token in llm.generate(tokens[:300], temp=0.0):
        found.append(token)
        if len(found) == 3:
            left.close()
        if len(found) == 12:
            break
    assert found == wanted
    with pytest.raises(ValueError, match="cannot be sent"):
        answer = llm.generate(tokens, temp=0.0)
        next(answer)
        answer.send([1])


def test_what_is_sampled_anew_follows_the_grammar_and_the_context(load, smollm2, text):
    """Where nothing is frozen a full reset changes nothing, so a greedy answer is the same; a grammar goes on where it was."""
    tokens = tokens_of(load(smollm2), text, 200)
    grammar = llama_cpp.LlamaGrammar.from_string('root ::= "[" ([0-9] ", "){20} [0-9] "]"', verbose=False)
    for options in ({"temp": 0.0}, {"temp": 1.0, "grammar": grammar}):
        answers = []
        for policy in ("full", RESETS):
            llm = load(smollm2, kv_policy=policy, kv_pool=None if policy == "full" else 1024, n_ctx=1024, kv_regenerate=6)
            answer = []
            for token in llm.generate(tokens, **options):
                answer.append(token)
                if len(answer) == 90 or llama_cpp.llama_vocab_is_eog(llm._model.vocab, token):
                    break
            answers.append(llm.detokenize(answer).decode())
        assert llm.kv_regenerations > 0
        if "grammar" in options:
            assert len(json.loads(answers[1])) == 21
        else:
            assert answers[0] == answers[1]
    with pytest.raises(ValueError, match="kv_regenerate"):
        load(smollm2, kv_policy=RESETS, kv_pool=1024, kv_regenerate=-1)


def test_presets_are_asrkf_with_a_part_of_the_bytes_of_a_full_f16_cache(load, smollm2):
    full_bytes = load(smollm2, n_ctx=8192).kv_stats().device_kv_bytes
    for name, part in (("aggressive", 1 / 8), ("default", 1 / 3), ("quality", 1 / 2)):
        stats = load(smollm2, n_ctx=8192, kv_policy=name).kv_stats()
        assert (stats.policy, stats.type_k, stats.type_v) == ("asrkf", "q8_0", "q8_0")
        assert 0.8 * part < (stats.device_kv_bytes + stats.device_index_bytes) / full_bytes <= part


def test_every_layer_may_score(load, smollm2, text):
    llm = load(smollm2, kv_policy="asrkf,score_layers=0-29,pool=512")
    greedy(llm, tokens_of(llm, text, 700), 20)
    assert llm.kv_stats().scoring_steps_total > 0
    check_states(llm)


def test_missed_attention_is_seen_in_stats_and_trace(load, smollm2, text):
    """A small pool misses more of the same text than a large one; nothing is claimed where nothing scores."""
    missed = {}
    for pool in (512, 1024):
        llm = load(smollm2, kv_policy="asrkf", kv_pool=pool)
        assert llm.kv_stats().missed_attention_ratio == -1
        tokens = tokens_of(llm, text, 1600)
        llm.eval(tokens[:1500])
        with llm.kv_trace() as trace:
            for token in tokens[1500:]:
                llm.eval([token])
        stats = llm.kv_stats()
        assert stats.scoring_backend == "graph"
        assert trace.steps[-1]["missed_attention_ratio"] == stats.missed_attention_ratio
        assert trace.steps[-1]["missed_attention_worst_ratio"] == stats.missed_attention_worst_ratio
        assert all(0 < step["missed_attention_ratio"] < step["missed_attention_worst_ratio"] <= 1.0001 for step in trace.steps)
        missed[pool] = np.mean([step["missed_attention_ratio"] for step in trace.steps])
    print(f"missed attention: {missed}")
    assert 0.002 < missed[1024] < missed[512] < 0.5
    window = load(smollm2, kv_policy="window", kv_pool=512)
    window.eval(tokens)
    assert window.kv_stats().missed_attention_ratio == -1
    assert load(smollm2, kv_policy="full").kv_stats().missed_attention_ratio == 0
