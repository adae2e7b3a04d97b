"""The bench measures what it says, and the order that the policy stands for: ours before the controls."""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import re
import subprocess
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import llama_cpp
import numpy as np
import pytest
from conftest import python

from asrkf_gguf import bench, divergence, tasks, texts
from asrkf_gguf.bench import looks, measure, needles, quality, records, sides, speed
from asrkf_gguf.bench.sides import Side

GPL = Path("/usr/share/common-licenses/GPL-3")


# arithmetic

def test_log_softmax_sums_to_one_also_for_large_logits():
    assert np.exp(divergence.log_softmax(np.array([1000.0, 1001.0, -1000.0], dtype=np.float32))).sum() == pytest.approx(1)


def test_kl_divergence_is_that_of_the_distributions_by_hand():
    reference, other = np.log([0.5, 0.25, 0.25]), np.log([0.25, 0.5, 0.25])
    assert divergence.kl_divergence(reference, other) == pytest.approx(0.5 * np.log(2) - 0.25 * np.log(2))
    assert divergence.kl_divergence(reference, reference) == 0
    with np.errstate(divide="ignore"):
        certain = np.log([1.0, 0.0, 0.0])
    assert divergence.kl_divergence(certain, other) == pytest.approx(np.log(4))


def test_half_precision_of_the_stored_reference_hardly_moves_the_divergence():
    dice = np.random.default_rng(7)
    logits = 3 * dice.standard_normal(5000)
    exact = divergence.log_softmax(logits)
    stored = divergence.log_softmax(exact.astype(np.float16).astype(np.float64))
    assert 0 <= divergence.kl_divergence(stored, exact) < 1e-5
    near = divergence.log_softmax(logits + 0.1 * dice.standard_normal(5000))
    assert divergence.kl_divergence(stored, near) == pytest.approx(divergence.kl_divergence(exact, near), rel=0.02)


def test_the_paired_error_is_of_the_difference_and_not_of_the_two_losses():
    reference = np.array([1.0, 5.0, 2.0, 8.0])
    figures = measure.summarise(reference, reference + np.array([0.1, 0.3, 0.1, 0.3]), np.array([0.0, 0.1, 0.2, 0.3]), np.array([1, 1, 1, 0]))
    ratio = np.exp(0.2)
    assert figures["ppl"] == pytest.approx(np.exp(4.2))
    assert figures["ppl_ratio"] == pytest.approx(ratio)
    assert figures["ppl_ratio_se"] == pytest.approx(ratio * np.std([0.1, 0.3, 0.1, 0.3], ddof=1) / 2)
    assert figures["kl_mean"] == pytest.approx(0.15)
    assert figures["top1_ratio"] == 0.75
    assert measure.summarise(reference, reference + 0.2, reference, reference > 0)["ppl_ratio_se"] == pytest.approx(0)


def test_lines_pool_the_newest_row_of_each_text_in_order_of_device_bytes():
    def row(side, text, kl, device_bytes):
        return {"length": "4096", "side": side, "text": text, "kl_mean": kl, "device_bytes": device_bytes, "ppl_ratio": "1.1", "top1_ratio": "0.9"}

    big = [row("big", "novel", "9", "200"), row("big", "novel", "1", "200"), row("big", "essay", "3", "200")]
    lines = quality.pooled([*big, row("small", "novel", "4", "100")])
    assert [line["side"] for line in lines] == ["small", "big"]
    assert lines[1]["kl"] == 2 and lines[1]["worst"] == "essay" and lines[1]["ppl_ratio"] == pytest.approx(1.1)


# sides

def test_a_side_is_its_policy_pool_and_type():
    side = sides.parse_side("mine=asrkf,ema=0.7,pool=0.33;type=q8_0", "0.5")
    assert side == Side("mine", "asrkf,ema=0.7", "0.33", "q8_0")
    assert side.is_pooled and side.cells(4096) == 1280 and side.n_ctx(4000) == 4096
    assert sides.parse_side("asrkf", "0.5") == Side("asrkf", "asrkf", "0.5")
    two = sides.parse_side("two=full;type=q8_0/q4_0", "0.5")
    assert sides.cache_types(two) == {"type_k": llama_cpp.GGML_TYPE_Q8_0, "type_v": llama_cpp.GGML_TYPE_Q4_0}
    assert sides.cache_types(sides.parse_side("best=asrkf,pool=33%;type=auto", "0.5")) == {}
    short = sides.parse_side("short=full,pool=1024;ctx=pool", "0.5")
    assert not short.is_pooled and short.n_ctx(4096) == 1024
    assert sides.parse_side("n_ctx=pool", "0.5").n_ctx(4096) == 2048
    assert Side("bytes", "asrkf", "45MiB").cells(4096) == "45MiB"


@pytest.mark.parametrize(("text", "reason"), [
    ("asrkff", "one of full-f16"), ("mine=", "NAME=POLICY"), ("mine=asrkf", "needs a pool"),
    ("mine=asrkf,pool=512;kind=q8_0", "type=... and ctx=pool"),
    ("mine=asrkf,pool=512;type=q9_9", "type=q9_9"), ("mine=full;type=q8_0/q4_0/q4_0", "two of them for K and V"),
    ("mine=asrkf,colour=red,pool=512", "colour"), ("mine=asrkf,pool=512;ctx=pool", "ctx=pool is"),
    ("mine=full;ctx=pool", "ctx=pool is"), ("mine=full;ctx=half", "type=... and ctx=pool"),
])  # fmt: skip
def test_a_malformed_side_is_refused_with_the_remedy(text, reason):
    with pytest.raises(ValueError, match=reason):
        sides.parse_side(text, "0.33")


def test_a_pool_larger_than_the_length_is_no_part_of_it():
    with pytest.raises(ValueError, match=r"pool=1\.5"):
        Side("mine", "asrkf", "1.5").cells(4096)


def test_the_reference_is_always_there_and_names_are_unique():
    assert sides.chosen_sides(argparse.Namespace(side=["paper"], pool="0.33"))[0] == sides.REFERENCE
    with pytest.raises(ValueError, match="given twice"):
        sides.chosen_sides(argparse.Namespace(side=["full-f16=asrkf,pool=512"], pool="0.33"))


def test_a_pooled_side_that_froze_nothing_ends_the_run():
    with pytest.raises(SystemExit, match="froze nothing"):
        sides.require_frozen(Side("mine", "asrkf", "0.5"), 512, {"frozen_cells": 0, "pool_cells": 512})
    sides.require_frozen(sides.REFERENCE, 512, {"frozen_cells": 0})


def test_every_option_of_the_command_line_can_be_read():
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    arguments = parser.parse_args(["quality", "--length", "2048", "--length", "8192", "--side", "asrkf", "--passages", "2"])
    assert arguments.length == [2048, 8192] and arguments.side == ["asrkf"] and arguments.passages == 2
    assert parser.parse_args(["needles", "--task", "five-facts"]).task == ["five-facts"]
    assert parser.parse_args(["plot", "--run"]).run


# records and rows

def test_a_row_is_appended_once_and_found_again_by_a_later_run(tmp_path):
    path = tmp_path / "results" / "rows.csv"
    table = records.Table(path, ["side", "run"])
    table.add({"side": "one", "run": "a"})
    later = records.Table(path, ["side", "run"])
    later.add({"side": "one", "run": "a"})
    later.add({"side": "two", "run": "b"})
    assert later.find("a")["side"] == "one" and later.find("c") is None
    with path.open() as file:
        assert [row["run"] for row in csv.DictReader(file)] == ["a", "b"]
    records.Table(path, ["side", "run"], again=True).add({"side": "new", "run": "a"})
    assert records.Table(path, ["side", "run"]).find("a")["side"] == "new"


def test_a_row_can_be_described_where_git_cannot_say_the_commit(monkeypatch):
    def fails(*_arguments, **_options):
        raise subprocess.CalledProcessError(128, "git")

    monkeypatch.setattr(records.subprocess, "run", fails)
    found = records.describe(argparse.Namespace(threads=1, model=Path("m.gguf")))
    assert found["commit"] == importlib.metadata.version("asrkf-gguf")


def test_rows_of_another_version_are_not_mixed(tmp_path):
    records.Table(tmp_path / "rows.csv", ["side", "run"])
    with pytest.raises(ValueError, match="--out"):
        records.Table(tmp_path / "rows.csv", ["side", "more", "run"])


def test_a_record_keeps_every_position(tmp_path):
    measured = measure.Measured(np.array([1.0, 2.0]), np.array([0.1, 0.2]), np.array([True, False]), 0.01, 5, 2, 0, {})
    path = tmp_path / "run.npz"
    assert records.load_record(path) is None
    records.save_record(path, measured, {"side": "mine"})
    record = records.load_record(path)
    assert record["row"] == {"side": "mine"}
    for name in ("nll", "kl", "agree"):
        assert (record[name] == getattr(measured, name)).all()
    assert list(tmp_path.iterdir()) == [path]


def test_a_run_is_named_by_what_decides_it_and_not_by_its_side_s_name(tmp_path):
    model = tmp_path / "model.gguf"
    model.write_bytes(b"GGUF")
    arguments = argparse.Namespace(model=model)
    side = Side("mine", "asrkf", "0.33")
    assert records.run_key(side, 4096, arguments, text="x") == records.run_key(Side("other", "asrkf", "0.33"), 4096, arguments, text="x")
    keys = {records.run_key(side, length, arguments, text=text) for length in (2048, 4096) for text in ("x", "y")}
    assert len(keys | {records.run_key(Side("mine", "asrkf", "0.33", "q8_0"), 4096, arguments, text="x")}) == 5


class FakeLlama:
    """Predicts from its last tokens; a pool of cells changes the prediction a little. Counts what was read."""

    read = 0

    def __init__(self, side, length, arguments):
        self.side, self.cells, self.n_tokens, self.input_ids, self.metadata, self.ctx = side, side.n_ctx(length), 0, [0] * 4096, {}, self

    def n_ctx(self):
        return self.cells

    def tokenize(self, text, add_bos=True, special=False):
        return [1] * add_bos + [2 + byte for byte in text]

    def detokenize(self, tokens):
        return bytes(token - 2 for token in tokens if token >= 2)

    def eval(self, tokens):
        assert self.n_tokens + len(tokens) <= self.cells
        self.input_ids[self.n_tokens : self.n_tokens + len(tokens)] = tokens
        self.n_tokens += len(tokens)
        FakeLlama.read += len(tokens)

    def logits(self):
        logits = np.random.default_rng(self.input_ids[self.n_tokens - 1]).standard_normal(258) + self.side.is_pooled * np.linspace(0, 0.1, 258)
        return np.ctypeslib.as_ctypes(logits.astype(np.float32))

    def kv_config(self):
        return None

    def token_bos(self):
        return 1

    def token_eos(self):
        return 0

    def n_vocab(self):
        return 258

    def reset(self):
        self.n_tokens = 0

    def save_state(self):
        return SimpleNamespace(n_tokens=self.n_tokens, input_ids=list(self.input_ids))

    def load_state(self, state):
        self.n_tokens, self.input_ids = state.n_tokens, list(state.input_ids)

    def kv_stats(self):
        missed = self.input_ids[self.n_tokens - 1] / 1000
        return SimpleNamespace(missed_attention_ratio=missed, missed_attention_worst_ratio=2 * missed)

    def close(self):
        pass


@pytest.fixture
def bench_command(tmp_path, monkeypatch):
    """Runs the bench on a fake model; gives the rows of its CSV file."""
    model, text = tmp_path / "model.gguf", tmp_path / "text.txt"
    model.write_bytes(b"GGUF")
    text.write_text("".join(f"This is the sentence {i} of a text. " for i in range(2000)))
    stats = dict.fromkeys((*quality.FIGURES, "moved_to_host_bytes", "moved_to_device_bytes", "pool_cells"), 0)
    stats |= {"frozen_cells": 1, "kept_ratio": 0.5, "enough_cells": 512}
    for name, function in (("get_logits_ith", lambda ctx, _: ctx.logits()), ("get_memory", lambda ctx: ctx), ("memory_clear", lambda *_: None)):
        monkeypatch.setattr(llama_cpp, f"llama_{name}", function)
    for module in (quality, looks):
        monkeypatch.setattr(module, "cache_folder", lambda: tmp_path)
    for module in (quality, needles, looks):
        monkeypatch.setattr(module, "open_side", FakeLlama)
    counters = {**stats, "device_bytes": 7, "rewalks_total": 0, "second_looks_total": 0}
    for module in (measure, needles, looks):
        monkeypatch.setattr(module, "read_counters", lambda llm: counters)

    def run(*words):
        parser = argparse.ArgumentParser()
        bench.add_arguments(parser, in_checkout=True)
        out = tmp_path / f"{words[0]}.csv"
        FakeLlama.read = 0
        assert bench.main(parser.parse_args([*words, "--model", str(model), "--text", f"novel={text}", "--out", str(out)])) == 0
        with out.open() as file:
            return list(csv.DictReader(file))

    return run


def test_an_interrupted_quality_run_goes_on_where_it_stopped(bench_command):
    words = ("quality", "--length", "1024", "--positions", "64", "--passages", "2")
    first = bench_command(*words, "--side", "asrkf")
    assert [row["side"] for row in first] == ["full-f16", "asrkf"] and FakeLlama.read == 2 * 2 * 1024
    assert float(first[0]["kl_mean"]) == 0 and float(first[0]["ppl_ratio"]) == 1 and float(first[1]["kl_mean"]) > 0
    assert bench_command(*words, "--side", "asrkf") == first and FakeLlama.read == 0
    more = bench_command(*words, "--side", "asrkf", "--side", "n_ctx=pool", "--pool", "0.5")
    assert [row["side"] for row in more] == ["full-f16", "asrkf", "asrkf", "n_ctx=pool"] and FakeLlama.read == 2 * (1024 + 512)
    assert float(more[3]["kl_mean"]) == pytest.approx(0, abs=1e-5)  # this model sees its last token only
    assert len(bench_command(*words, "--side", "asrkf", "--again")) == 6 and FakeLlama.read == 2 * 2 * 1024


def test_sides_begin_from_one_prompt_and_are_compared_with_the_first(bench_command):
    words = ("looks", "--length", "1024", "--positions", "64", "--side", "none=asrkf,pool=0.33")
    words += ("--side", "look=asrkf,pool=0.33,recovery=second_look")
    rows = bench_command(*words)
    assert FakeLlama.read == 1024 + 2 * (64 + 64)  # the reference, and of each side the prompt's end and the positions
    assert [row["side"] for row in rows] == ["none", "look"] and len({row["run"] for row in rows}) == 2
    assert all(float(row["kl_mean"]) > 0 and float(row["kl_change"]) == 0 for row in rows)  # this model knows no second look
    assert float(rows[0]["rank_missed_kl"]) == pytest.approx(float(rows[0]["rank_worst_kl"]))
    assert bench_command(*words) == rows and FakeLlama.read == 0
    more = bench_command(*words, "--side", "other=asrkf,pool=0.5")
    assert [row["side"] for row in more] == ["none", "look", "other"] and FakeLlama.read == 64 + 64


def test_the_figures_of_a_look_have_their_signs_and_ranks():
    kl = np.array([0.1, 0.4, 0.2, 0.3])
    columns = {"kl": kl, "missed": 2 * kl, "worst": -kl, "entropy": np.array([1.0, 2, 2, 1]), "seconds": np.full(4, 0.5)}
    found = looks.summary(columns, kl - np.array([0.0, 0.2, 0.1, 0.1]))
    assert (found["kl_mean"], found["kl_change"], found["missed_mean"]) == pytest.approx((0.25, 0.15, 0.5))
    assert (found["rank_missed_kl"], found["rank_worst_kl"]) == pytest.approx((1, -1)) and 0 < found["rank_entropy_kl"] < 1


def test_rows_of_cuts_say_what_was_kept_and_share_the_reference_with_quality(bench_command):
    words = ("--length", "1024", "--positions", "64", "--side", "one=refreekv,pool=1.0")
    rows = bench_command("cuts", *words)
    assert [(row["side"], row["kept_ratio"], row["enough_cells"]) for row in rows] == [("full-f16", "", ""), ("one", "0.5", "512")]
    assert "kept_ratio" not in bench_command("quality", *words)[1] and FakeLlama.read == 1024


def test_of_a_policy_that_does_not_cut_the_active_cells_are_what_was_kept():
    stats = {"kept_ratio": -1.0, "active_cells": 30, "tokens": 120, "enough_cells": 0}
    assert quality.Cuts.figures_of(object.__new__(quality.Cuts), stats)["kept_ratio"] == 0.25


def test_worked_problems_are_right():
    problems = texts.arithmetic().split("\n\n")
    assert len(problems) == 200 and texts.load_texts(["a=arithmetic"]) == {"a": texts.arithmetic()}
    for problem in problems:
        has, gets, total, total_again, gives, left, answer = map(int, re.findall(r"\d+", problem.split("Answer: ")[1]))
        assert has + gets == total == total_again and total - gives == left == answer
        assert [str(n) for n in (has, gets, gives)] == re.findall(r"\d+", problem.split("Answer: ")[0])


def test_needles_are_asked_once_and_fit_the_context(bench_command):
    words = ("needles", "--length", "4096", "--positions", "64", "--needles", "5", "--side", "asrkf", "--side", "n_ctx=pool")
    rows = bench_command(*words)
    assert len(rows) == 3 * 4 and all(row["asked"] == "5" for row in rows) and FakeLlama.read > 0
    assert bench_command(*words) == rows and FakeLlama.read == 0


# speed, and pictures: what they do at toy size

def bench_main(*words: object) -> int:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser, in_checkout=True)
    return bench.main(parser.parse_args([str(word) for word in words]))


@pytest.fixture(scope="module")
def speed_rows(smollm2, upstream_libraries, tmp_path_factory) -> dict[tuple[str, str, str], dict[str, str]]:
    """Rows by metric, side and what it is compared with: 700 tokens on a pool of 512."""
    out = tmp_path_factory.mktemp("speed") / "speed.csv"
    options = ("--model", smollm2, "--depth", 700, "--pool", 512, "--rounds", 1, "--out", out)
    assert bench_main("speed", "--tokens", 16, *options) == 0
    assert bench_main("prefill", *options) == 0
    with out.open() as file:
        return {(row["metric"], row["side"], row["against"]): row for row in csv.DictReader(file)}


@pytest.mark.upstream
def test_speed_compares_ours_with_both_of_upstreams_sides(speed_rows):
    full, limit = "upstream full", "upstream n_ctx=pool"
    rate = {side: float(speed_rows["decode", side, ""]["value"]) for side in (full, limit)}
    for side in (full, limit):
        ours = speed_rows["decode", "ours", side]
        assert float(ours["ratio"]) == pytest.approx(float(ours["value"]) / rate[side], rel=1e-3)  # of one round
    assert "pool=512" in ours["config"] and "n_ctx=8192" in ours["config"] and float(speed_rows["moved a token", "ours", ""]["value"]) > 0
    assert "n_ctx=512 " in speed_rows["decode", limit, ""]["config"] and "asrkf" not in speed_rows["decode", limit, ""]["config"]
    assert 0 < float(speed_rows["policy, moves, read-back", "ours", ""]["value"]) < 100


@pytest.mark.upstream
def test_prefill_reports_bytes_of_both_processes(speed_rows):
    def mebibytes(metric: str, side: str, against: str = "") -> float:
        return float(speed_rows[metric, side, against]["value"])

    full = "upstream full"
    assert mebibytes("device KV", full) == pytest.approx(8192 * 23040 / (1 << 20), rel=1e-3)  # from upstream's log
    assert mebibytes("device KV", "ours", full) == pytest.approx(512 * 23040 / (1 << 20), rel=1e-3)
    assert mebibytes("host KV", "ours") >= (700 - 512) * 23040 / (1 << 20) and mebibytes("host KV", full) == 0
    for side, against in ((full, ""), ("ours", full)):
        assert float(speed_rows["prefill", side, against]["value"]) > 0
        assert mebibytes("peak resident", side, against) > 90  # the model's file alone is in it


@pytest.mark.upstream
def test_a_side_that_dies_is_an_error_with_its_name(upstream_libraries, tmp_path):
    arguments = argparse.Namespace(model=tmp_path / "nothing.gguf", threads=1)
    with pytest.raises(RuntimeError, match="the side mine died"):
        speed.SideProcess(Side("mine"), 100, "text", arguments)


def test_pictures_are_drawn_of_a_run_and_of_the_committed_rows(smollm2, text, tmp_path):
    (tmp_path / "text.txt").write_text(text[:40000])
    given = ("--model", smollm2, "--text", f"topics={tmp_path / 'text.txt'}")
    assert bench_main("plot", "--run", *given, "--length", 1024, "--positions", 16, "--pool", 512, "--out", tmp_path / "run.png") == 0
    assert bench_main("plot", "--out", tmp_path / "quality.png") == 0
    for name in ("run.png", "quality.png"):
        assert (tmp_path / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and (tmp_path / name).stat().st_size > 10000


def test_without_the_benchs_packages_the_error_names_them():
    code = "import sys; sys.modules['matplotlib'] = None; from asrkf_gguf.cli import main; sys.exit(main(%r))"
    result = python(code % ["bench", "plot"])
    assert result.returncode == 1
    assert result.stderr == "asrkf bench: plots need matplotlib: pip install 'asrkf-gguf[bench]' or pip install matplotlib\n"
    assert "calibrate" in python(code % ["--help"]).stdout  # all other commands do without


# texts and needles

def test_texts_are_named_and_unique(tmp_path):
    file = tmp_path / "emma.txt"
    file.write_text("Emma Woodhouse")
    assert texts.load_texts([f"novel={file}"]) == {"novel": "Emma Woodhouse"}
    assert "statement" in texts.load_texts(["technical=topics"])["technical"]
    for wrong, reason in ((["novel"], "NAME=FILE"), ([f"novel={file}", f"novel={file}"], "twice")):
        with pytest.raises(ValueError, match=reason):
            texts.load_texts(wrong)


def test_without_apt_the_error_names_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(texts.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="--text technical=topics"):
        texts.load_texts([])


def test_the_novel_is_its_chapters(tmp_path):
    folder = tmp_path / "usr/share/gocode/src/github.com/klauspost/compress/testdata"
    folder.mkdir(parents=True)
    head, tail = "Produced by\n\n THE ADVENTURES OF TOM SAWYER\n\nP R E F A C E\n\n", "\n\nCONCLUSION\n\nSO endeth\n\nEnd of the Project"
    (folder / "Mark.Twain-Tom.Sawyer.txt").write_text(f'{head}CHAPTER I\n\n"TOM!"\n\nNo\nanswer.\n\nCHAPTER II\n\nSaturday{tail}')
    assert texts._read_novel(tmp_path) == 'CHAPTER I\n\n"TOM!"\n\nNo answer.\n\nCHAPTER II\n\nSaturday'
    (folder / "Mark.Twain-Tom.Sawyer.txt").write_text("another")
    with pytest.raises(RuntimeError, match="--text novel=FILE"):
        texts._read_novel(tmp_path)


def test_paragraphs_of_a_page_come_without_navigation():
    page = '<head><title>T</title></head><body><h2>Head</h2><p>One <b>two</b></p><div class="links"><a href="x">next</a></div></body>'
    assert texts._Paragraphs(page).found == ["Head", "One two"]


WORDS = " ".join(f"{a}{b}{c}st" for a in "bcdfghlmprst" for b in "aeiou" for c in "lmnr") * 3


@pytest.mark.parametrize("name", [name for name in tasks.TASKS if name != "common-words"])
def test_every_answer_is_hidden_once_it_is_asked_for_and_not_in_its_question(name):
    made = tasks.make_needles(name, 20)
    assert made == tasks.make_needles(name, 20) != tasks.make_needles(name, 20, seed=1)
    assert sum(len(needle.questions) for needle in made) == 20
    for needle in made:
        text = needle.hide("The grass is green. " * 200)
        for _, sentence in needle.sentences:
            assert sentence in text
        for question, stem, answers in needle.questions:
            assert tasks.found_ratio(answers, text) == 1 and tasks.found_ratio(answers, f"{question} {stem}") == 0
            assert len(answers) > 1 or f"{stem} {answers[0]}" in text
    depths = [needle.sentences[0][0] for needle in made]
    assert max(depths) <= (0.1 if name == "early-fact" else 0.9)


@pytest.mark.parametrize("name", ["five-facts", "many-turns"])
def test_five_facts_have_ten_decoys_with_values_of_their_own(name):
    for needle in tasks.make_needles(name, 10):
        assert len({sentence for _, sentence in needle.sentences}) == 15
        assert len({stem for _, stem, _ in needle.questions}) == 5


def test_a_chain_of_variables_ends_at_one_number():
    for needle in tasks.make_needles("variable-tracking", 5):
        lines = [sentence.rstrip(".").split(" = ") for _, sentence in needle.sentences]
        (question,) = needle.questions
        assert [name for name, _ in lines] == [f"VAR {name}" for name in question.answers]
        assert lines[0][1] in question.stem and [value for _, value in lines[1:]] == [name for name, _ in lines[:-1]]
        assert [depth for depth, _ in needle.sentences] == sorted(depth for depth, _ in needle.sentences)


def test_common_words_come_ten_times_as_often_as_the_others():
    (needle,) = tasks.make_needles("common-words", 1, WORDS)
    listed = Counter(re.findall(r"\d+\. (\w+)", needle.hide("x" * 9000)))
    (question,) = needle.questions
    most = {word for word, _ in listed.most_common(10)}
    assert most == set(question.answers) and min(listed[word] for word in most) >= 10 * max(n for word, n in listed.items() if word not in most)
    assert needle.hide("x" * 9000) == needle.hide("y" * 9000) and len(needle.hide("x" * 9000)) == pytest.approx(9000, rel=0.1)
    with pytest.raises(ValueError, match="a longer one"):
        tasks.make_needles("common-words", 1, "few words")


def test_a_needle_is_hidden_at_its_depth_behind_a_sentence():
    needle = tasks.Needle(((0.5, "The key is 1."),), ())
    text = needle.hide("Aa bb cc. " * 100)
    assert text.index("The key") == pytest.approx(500, abs=15) and "cc. The key is 1. Aa" in text


@pytest.mark.parametrize(("answer", "output", "found"), [
    ("12345", " 12345. Remember", True), ("12345", "12,345", True), ("12345", "123456", False), ("12345", "1 2 3 4", False),
    ("12345", "12345 12345", True),
    ("amber", " Amber, of course", True), ("amber", "chamber", False), ("amber", "", False),
])  # fmt: skip
def test_an_answer_counts_as_a_whole_word_only(answer, output, found):
    assert tasks.is_found(answer, output) is found


def test_of_several_answers_the_part_counts_that_was_found():
    assert tasks.found_ratio(("11", "22", "33", "44"), "They are 22, 44 and 111.") == 0.5


@pytest.mark.parametrize("name", list(tasks.TASKS))
def test_prompts_of_every_task_fill_the_length_and_no_more(smollm2, load, text, name):
    llm = load(smollm2, n_ctx=2048)
    source = tasks.FILLER * 300 if tasks.TASKS[name].in_filler else text
    needle = tasks.make_needles(name, 1, text)[0]
    asked = needles.needle_prompts(llm, name, needle, source, 1536, 128)
    assert len(asked) == len(needle.questions)
    assert 1536 - 32 <= max(one.n_tokens() for one in asked) <= 1536
    for one, question in zip(asked, needle.questions, strict=True):
        written = llm.detokenize(one.prompt + one.generated + one.question, special=True).decode()
        assert all(sentence in written for _, sentence in needle.sentences)
        assert written.endswith(question.stem) or (tasks.TASKS[name].form == "chat" and question.text in written)
        assert len(one.generated) == (128 if name == "early-fact" else 0)


def test_many_turns_are_a_conversation_in_the_models_template(smollm2, load, text):
    llm = load(smollm2, n_ctx=2048)
    (needle,) = tasks.make_needles("many-turns", 5)
    first = needles.needle_prompts(llm, "many-turns", needle, text, 1536, 0)[0]
    written = llm.detokenize(first.prompt, special=True).decode()
    assert written.count("<|im_start|>user") == 17 and written.count("<|im_start|>assistant") == 17
    assert written.endswith(f"<|im_start|>assistant\n {needle.questions[0].stem}")


# the order: what this project stands for, on every machine, in a few minutes

POSITIONS = 128


@pytest.fixture(scope="module")
def measured_sides(smollm2, text):
    """Per-position KL of each side, over four passages: 1536 tokens, the last 128 decoded, a pool of 512 cells."""
    from asrkf_gguf import Llama

    kinds = [text[len(text) * part // 10 :] for part in (1, 4, 7)] + ([GPL.read_text()] if GPL.exists() else [])
    length, positions = 1536, POSITIONS

    def run(policy, reference=None, keep=None):
        pool = None if policy == "full" else 512
        llm = Llama(smollm2, n_ctx=length, n_threads=2, n_threads_batch=2, verbose=False, seed=1, kv_policy=policy, kv_pool=pool)
        passages = [measure.cut_passages(llm, f"passage {i}", kind, length, 1)[0] for i, kind in enumerate(kinds)]
        if keep is not None:
            keep.append(np.empty((len(kinds) * positions, llm.n_vocab()), dtype=np.float16))
        result = measure.measure(llm, passages, positions, reference=reference, keep=keep[0] if keep else None)
        assert policy == "full" or result.stats["frozen_cells"] > 0
        llm.close()
        return result

    keep: list[np.ndarray] = []
    run("full", keep=keep)
    return {policy: run(policy, keep[0]) for policy in ("asrkf", "window", "random", "paper")}


@pytest.mark.parametrize("control", ["window", "random", "paper"])
def test_asrkf_is_nearer_to_the_full_cache_than_the_controls(measured_sides, control):
    # positions of one passage hang together: the passages, far apart or of another text, are what is counted
    passages = (measured_sides[control].kl - measured_sides["asrkf"].kl).reshape(-1, POSITIONS).mean(axis=1)
    means = {side: measured_sides[side].kl.mean() for side in (control, "asrkf")}
    print(f"mean KL {means}; by passage farther by {passages.round(4)}")
    assert len(passages) >= 3 and (passages > 0).all()
    assert passages.mean() > 2 * measure.standard_error(passages)
