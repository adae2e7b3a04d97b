"""`asrkf compare`: its figures are those of the cache, its files have a shape, and what ends it early leaves a report that says so."""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import html.parser
import io
import json
import os
import re
import signal

import numpy as np
import pytest
from conftest import python

from asrkf_gguf.bench.measure import Predictions, clear, cut_passages, last_logits
from asrkf_gguf.cli import main
from asrkf_gguf.compare import command, passages, progress, reading, report, run, sides, tables
from asrkf_gguf.compare.progress import Pace
from asrkf_gguf.compare.report import Figures, Memory, Report, SideReport, Spread
from asrkf_gguf.texts import topics

N_CTX, POSITIONS, ROUNDS = 1024, 8, 2
OPTIONS = ("-c", N_CTX, "--positions", POSITIONS, "--rounds", ROUNDS, "--pools", "0.3,0.6", "-t", 1)
NAMES = ["upstream f16", "upstream q8_0", "upstream q4_0", "pool 30%", "pool 60%"]


def compare(*words: object) -> int:
    return main(["compare", *map(str, words)])


@dataclasses.dataclass
class Outcome:
    text: str
    content: dict
    rows: list[dict[str, str]]
    page: str

    def side(self, name: str) -> dict:
        return next(side for side in self.content["sides"] if side["name"] == name)


@pytest.fixture(scope="module")
def outcome(small, tmp_path_factory) -> Outcome:
    """Of one whole run."""
    folder = tmp_path_factory.mktemp("compare")
    files = [word for kind in ("json", "csv", "html") for word in (f"--{kind}", folder / f"out.{kind}")]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert compare(small, *OPTIONS, *files) == 0
    with (folder / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return Outcome(printed.getvalue(), json.loads((folder / "out.json").read_text()), rows, (folder / "out.html").read_text())


# figures

def test_bytes_are_those_of_kv_stats(outcome, small, load):
    for name, policy, pool in (("upstream f16", "full", None), ("pool 30%", "asrkf", "30%")):
        llm = load(small, n_ctx=N_CTX, n_batch=512, n_ubatch=512, kv_policy=policy, kv_pool=pool, calibrate=True, n_threads=1, n_threads_batch=1)
        stats, side = llm.kv_stats(), outcome.side(name)
        for key in ("device_kv_bytes", "device_index_bytes", "device_staging_bytes", "device_compute_bytes"):
            assert side["memory"][key] == getattr(stats, key), (name, key)
        assert (side["pool_cells"], side["type_k"], side["type_v"]) == (stats.pool_cells, stats.type_k, stats.type_v)
        assert side["config"] and (name == "upstream f16") == (side["memory"]["host_kv_bytes"] == 0)
    full, small_pool = (outcome.side(name)["memory"] for name in ("upstream f16", "pool 30%"))
    assert small_pool["device_kv_bytes"] + small_pool["device_index_bytes"] <= 0.3 * full["device_kv_bytes"]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def test_predictions_are_those_of_a_plain_loop_over_the_same_tokens(outcome, small, load):
    deepest: dict[str, list[np.ndarray]] = {}
    nexts: list[int] = []
    for name, policy, pool in (("upstream f16", "full", None), ("pool 30%", "asrkf", "30%")):
        llm = load(small, n_ctx=N_CTX, n_batch=512, n_ubatch=512, kv_policy=policy, kv_pool=pool, calibrate=True, n_threads=1, n_threads_batch=1)
        cut = passages.cut(llm, command.OWN_TEXT, topics(), N_CTX, POSITIONS, ROUNDS)
        deepest[name], nexts = [], []
        for passage in cut:
            clear(llm)
            at = 0
            for depth in passage.depths:
                llm.eval(passage.tokens[at:depth])
                at = depth + POSITIONS
                for position in range(depth, at):
                    llm.eval([passage.tokens[position]])
                    if depth == passage.depths[-1]:
                        deepest[name].append(log_softmax(last_logits(llm)))
                        nexts.append(passage.tokens[position + 1])
    full, mine = (np.array(deepest[name]) for name in ("upstream f16", "pool 30%"))
    figures = outcome.side("pool 30%")["depths"][-1]
    assert figures["positions"] == len(mine) == POSITIONS * ROUNDS and figures["frozen_cells"] > 0
    kl = (np.exp(full) * (full - mine)).sum(axis=1).mean()
    assert figures["kl_mean"] == pytest.approx(kl, rel=0.01, abs=1e-6)  # the reference is kept in half precision
    assert figures["ppl"] == pytest.approx(np.exp(-mine[np.arange(len(mine)), nexts].mean()), rel=1e-6)
    assert outcome.side("upstream f16")["depths"][-1]["ppl"] == pytest.approx(np.exp(-full[np.arange(len(full)), nexts].mean()), rel=1e-6)


def test_a_full_cache_has_no_loss_to_itself_and_the_quantised_ones_have_one(outcome):
    full = outcome.side("upstream f16")
    assert [(at["kl_mean"], at["ppl_ratio"], at["top1_ratio"]) for at in full["depths"]] == [(0, 1, 1)] * len(passages.PARTS)
    for name in NAMES[1:]:
        assert outcome.side(name)["depths"][-1]["kl_mean"] > 0, name


def test_missed_attention_is_a_share_where_tokens_are_frozen_and_absent_elsewhere(outcome):
    for name in NAMES:
        missed = [at["missed_attention_ratio"] for at in outcome.side(name)["depths"]]
        if name == "pool 30%":
            assert 0 < missed[-1] < 1
        else:
            assert missed == [None] * len(missed), name


def test_speeds_are_positive_and_their_spread_is_that_of_the_rounds(outcome):
    for name in NAMES:
        side = outcome.side(name)
        for at in side["depths"]:
            for key in ("read_tokens_per_second", "decode_tokens_per_second", "decode_ratio"):
                figure = at[key]
                assert 0 < figure["least"] <= figure["median"] <= figure["most"] and figure["rounds"] == ROUNDS
        assert side["load_seconds"]["rounds"] == ROUNDS and side["facts_asked"] == ROUNDS * passages.QUESTIONS
    assert all(at["decode_ratio"]["median"] == 1 for at in outcome.side("upstream f16")["depths"])


def test_a_pool_that_holds_all_tokens_is_called_a_full_cache(outcome):
    whole = outcome.side("pool 60%")
    assert whole["pool_cells"] == N_CTX and whole["type_k"] == "q8_0" and whole["depths"][-1]["frozen_cells"] == 0
    assert any("pool 60%" in sentence and "full cache" in sentence for sentence in outcome.content["readings"])


# passages

def test_facts_are_hidden_in_a_passage_of_the_asked_length_and_the_questions_fit_behind_it(small, load, text):
    llm = load(small, n_ctx=N_CTX)
    cut = passages.cut(llm, "text", text, N_CTX, POSITIONS, ROUNDS)
    assert len(cut) == ROUNDS and cut[0].tokens != cut[1].tokens
    for i, passage in enumerate(cut):
        whole = llm.detokenize(passage.tokens).decode()
        needle = passages.make_needles(passages.TASK, passages.QUESTIONS, seed=i)[0]
        assert all(sentence in whole for _, sentence in needle.sentences) and len(passage.questions) == passages.QUESTIONS
        assert len(passage.tokens) == passage.depths[-1] + POSITIONS + 1
        assert len(passage.tokens) + max(len(tokens) for tokens, _ in passage.questions) + passages.ANSWER_TOKENS <= N_CTX


def test_passages_overlap_where_the_text_is_too_short_for_all_of_them(small, load):
    llm = load(small, n_ctx=N_CTX)
    text = topics()[:9000]
    with pytest.raises(ValueError, match="a longer text"):
        cut_passages(llm, "text", text, 960, 3)
    cut = cut_passages(llm, "text", text, 960, 3, may_overlap=True)
    assert all(len(tokens) == 961 for tokens in cut) and cut[0][500:] != cut[1][500:] != cut[2][500:]
    assert len(passages.cut(llm, "text", text, N_CTX, POSITIONS, 3)) == 3


# files

def test_json_has_every_side_and_what_made_it(outcome):
    content = outcome.content
    assert (content["format"], content["version"], content["is_complete"], content["stopped"]) == ("asrkf-compare", report.VERSION, True, "")
    assert [side["name"] for side in content["sides"]] == NAMES and content["reference"] == "upstream f16"
    assert {"date", "commit", "machine", "threads", "model", "command"} == set(content["about"])
    assert content["notes"] == [report.SAME_PLACE]  # no GPU here
    assert set(content) == {field.name for field in dataclasses.fields(Report)} | {"readings"}
    for side in content["sides"]:
        assert set(side) == {field.name for field in dataclasses.fields(SideReport)} and set(side["memory"]) == set(Memory.__dataclass_fields__)
        assert [set(at) for at in side["depths"]] == [set(Figures.__dataclass_fields__)] * len(passages.PARTS)


def test_csv_has_a_row_for_each_side_and_depth_with_the_figures_of_the_json(outcome):
    expected = [(name, at["depth"]) for name in NAMES for at in outcome.side(name)["depths"]]
    assert [(row["side"], int(row["depth"])) for row in outcome.rows] == expected
    for row in outcome.rows:
        side = outcome.side(row["side"])
        at = next(at for at in side["depths"] if at["depth"] == int(row["depth"]))
        assert float(row["kl_mean"]) == at["kl_mean"] and int(row["device_kv_bytes"]) == side["memory"]["device_kv_bytes"]
        assert [float(row[f"decode_tokens_per_second{end}"]) for end in ("", "_least", "_most")] == [
            at["decode_tokens_per_second"][key] for key in ("median", "least", "most")
        ]
        assert row["is_complete"] == "True" and row["model"] == "small.gguf"


class Page(html.parser.HTMLParser):
    """Counts tags, and keeps what a browser would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        places = [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data")]
        self.fetched += [place for place in places if not place.startswith("#")]


def test_the_page_has_tables_and_plots_and_loads_nothing_from_elsewhere(outcome):
    page = Page(outcome.page)
    assert page.fetched == [] and not re.search(r"@import|url\((?!#)", outcome.page) and not {"script", "link", "iframe"} & set(page.tags)
    assert page.tags.count("svg") == 5 and page.tags.count("table") == 3
    assert "currentColor" in outcome.page and "prefers-color-scheme: dark" in outcome.page
    for name in NAMES:
        assert name in outcome.page


def test_the_terminal_shows_every_side_three_times_and_ends_with_what_it_comes_to(outcome):
    for name in NAMES:
        assert len(re.findall(rf"^{re.escape(name)} ", outcome.text, re.M)) >= 3
    assert outcome.text.splitlines()[-len(outcome.content["readings"]) :] == outcome.content["readings"]
    assert "PARTIAL" not in outcome.text


# what ends it early

@pytest.fixture
def interrupt_after(monkeypatch):
    """Control-C, as the terminal sends it, when so many visits have begun."""

    def arrange(n_visits: int, times: int = 1) -> None:
        visit, begun = progress.Progress.visit, []

        def counted(self: progress.Progress, label: str) -> None:
            begun.append(label)
            if len(begun) > n_visits:
                for _ in range(times):
                    os.kill(os.getpid(), signal.SIGINT)
            visit(self, label)

        monkeypatch.setattr(progress.Progress, "visit", counted)

    return arrange


def test_control_c_leaves_a_report_of_what_there_is_which_says_so(small, tmp_path, capsys, interrupt_after):
    interrupt_after(7)  # the third side of the second round has not begun
    handler = signal.getsignal(signal.SIGINT)
    assert compare(small, *OPTIONS, "--json", tmp_path / "out.json", "--csv", tmp_path / "out.csv", "--html", tmp_path / "out.html") == 130
    assert signal.getsignal(signal.SIGINT) is handler
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["is_complete"] is False and content["stopped"] == "Ctrl-C"
    rounds = {side["name"]: side["depths"][-1]["decode_ratio"]["rounds"] for side in content["sides"]}
    assert rounds == {"upstream f16": 2, "upstream q8_0": 2, "upstream q4_0": 1, "pool 30%": 1, "pool 60%": 1}
    assert "PARTIAL: Ctrl-C" in capsys.readouterr().out and "Partial: Ctrl-C" in (tmp_path / "out.html").read_text()
    assert {row["is_complete"] for row in csv.DictReader((tmp_path / "out.csv").open(newline=""))} == {"False"}


def test_control_c_before_any_figure_leaves_a_report_without_figures(small, tmp_path, capsys, interrupt_after):
    interrupt_after(0)
    assert compare(small, *OPTIONS, "--json", tmp_path / "out.json", "--html", tmp_path / "out.html") == 130
    content = json.loads((tmp_path / "out.json").read_text())
    assert [side["depths"] for side in content["sides"]] == [[]] * len(NAMES) and content["sides"][0]["memory"]["device_kv_bytes"] > 0
    assert "Stopped before" in capsys.readouterr().out


def test_control_c_pressed_twice_ends_it_at_once(small, tmp_path, interrupt_after):
    interrupt_after(1, times=2)
    assert compare(small, *OPTIONS, "--json", tmp_path / "out.json") == 130
    assert not (tmp_path / "out.json").exists()


# bad input

@pytest.mark.parametrize(("words", "reason"), [
    (["-c", 300], r"-c 300 is too short .* -c 512 or more"), (["--pools", "2048"], "a part of the full F16 cache's bytes"),
    (["--pools", "0.5,lots"], r"--pools lots: .*0\.25 or 25%"), (["--pools", ","], "names no pool"), (["--rounds", 0], "--rounds 0: at least 1"),
    (["--positions", 1], "--positions 1: at least 8"),
    (["--text", "nowhere.txt"], "nowhere.txt: there is no such file"), (["--json", "nowhere/out.json"], "no folder"),
    (["--policy", "full"], r"--policy full: .*such as asrkf,ranking=own"), (["--policy", "asrkf,pool=512"], "--pools says how large they are"),
    (["--policy", "asrkf,rankin=own"], "rankin"), (["--pools", "0.001"], "no pool to compare: .*0.001|no pool to compare: .*pool"),
])  # fmt: skip
def test_bad_input_is_refused_in_one_line_that_says_what_would_work(small, capsys, words, reason):
    assert compare(small, *OPTIONS, *words) == 1
    printed = capsys.readouterr()
    last = printed.err.splitlines()[-1]
    assert last.startswith("asrkf compare: ") and re.search(reason, last) and "Traceback" not in printed.err and not printed.out


def test_a_text_that_is_too_short_a_model_that_is_not_there_and_one_without_a_tokenizer_are_refused(small, tiny, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("A short text. " * 50)
    for words, reason in (
        ([small, "--text", tmp_path / "short.txt"], "short.txt: .* need .* a longer text"), (["nowhere.gguf"], "nowhere.gguf does not exist"),
        ([tiny], "has no tokenizer"), ([tmp_path / "short.txt"], "compare: short.txt is not a GGUF file"),
    ):  # fmt: skip
        assert compare(*words, *OPTIONS) == 1
        assert re.search(reason, capsys.readouterr().err.splitlines()[-1]), words


def test_one_pool_that_cannot_be_is_left_out_with_its_reason(small, tmp_path, capsys):
    assert compare(small, *OPTIONS, "--rounds", 1, "--pools", "0.001,0.3", "--json", tmp_path / "out.json") == 0
    content = json.loads((tmp_path / "out.json").read_text())
    refused = {side["name"]: side["refused"] for side in content["sides"] if side["refused"]}
    printed = capsys.readouterr()
    assert list(refused) == ["pool 0.1%"] and f"pool 0.1% is left out: {refused['pool 0.1%']}" in printed.err
    assert f"pool 0.1%: {refused['pool 0.1%']}" in printed.out


def test_where_the_full_cache_does_not_fit_the_device_the_one_in_ram_takes_its_place(small, tmp_path, monkeypatch, capsys):
    open_side = run.open_side

    def refuse(side, *others):
        if side == sides.REFERENCE:
            raise ValueError("Failed to create llama_context")
        return open_side(side, *others)

    monkeypatch.setattr(run, "open_side", refuse)
    assert compare(small, *OPTIONS, "--rounds", 1, "--json", tmp_path / "out.json") == 0
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["reference"] == "upstream f16 in RAM" and content["sides"][0]["refused"].startswith("no memory for it")
    in_ram = content["sides"][1]
    assert in_ram["name"] == content["reference"] and in_ram["memory"]["device_kv_bytes"] == 0 < in_ram["memory"]["host_kv_bytes"]
    assert content["readings"][0].startswith("The full F16 cache does not fit the device.")
    assert "upstream f16 is left out" in capsys.readouterr().err


def test_without_matplotlib_a_page_is_refused_before_anything_is_measured(small, tmp_path):
    words = ["compare", small, *map(str, OPTIONS), "--html", str(tmp_path / "out.html")]
    result = python(f"import sys; sys.modules['matplotlib'] = None; from asrkf_gguf.cli import main; sys.exit(main({words!r}))")
    assert result.returncode == 1 and result.stderr.splitlines()[-1].startswith("asrkf compare: --html draws its plots with matplotlib: pip install")


# arithmetic

def test_pools_are_parts_of_bytes_or_bytes():
    assert [sides.pool_of(text) for text in ("0.25", ".5", "1", "25%", "512MiB", "auto")] == ["25%", "50%", "100%", "25%", "512MiB", "auto"]
    assert [side.name for side in sides.pooled_sides("0.25, 25%,64MiB")] == ["pool 25%", "pool 64MiB"]


def test_each_pool_is_there_with_each_policy_and_has_its_name():
    found = sides.pooled_sides("0.25,0.5", ["asrkf", "asrkf,ranking=own", "kvzip,window=64"])
    assert [side.name for side in found[:3]] == ["pool 25%", "pool 25%, ranking=own", "pool 25%, kvzip,window=64"]
    assert [(side.policy, side.pool) for side in found[2:5]] == [("kvzip,window=64", "25%"), ("asrkf", "50%"), ("asrkf,ranking=own", "50%")]


def test_the_estimate_grows_with_the_depth_and_the_bar_ends_where_it_says():
    pace = Pace(load_seconds=2, token_seconds=0.01, growth_seconds=0.0001, decode_ratio=3)
    assert pace.seconds(0, 100) == pytest.approx(100 * (0.01 + 0.0001 * 50))
    assert pace.seconds(1000, 10, decoded=True) == pytest.approx(3 * 10 * (0.01 + 0.0001 * 1005))
    passage = passages.Passage([0] * 609, (200, 600), [([1] * 10, "x")])
    questions = pace.seconds(609, 10) + pace.seconds(609, passages.ANSWER_TOKENS, decoded=True)
    expected = 2 + pace.seconds(0, 200) + pace.seconds(200, 8, decoded=True) + pace.seconds(208, 392) + pace.seconds(600, 8, decoded=True) + questions
    assert pace.of_visit(passage, 8) == pytest.approx(expected)
    assert command.duration(42) == "42 seconds" and command.duration(400) == "7 minutes"


def test_the_bar_is_full_at_the_end_of_a_run(small, monkeypatch):
    expected, spent = [], []
    seconds, spend = run.Run.seconds, progress.Progress.spent
    monkeypatch.setattr(run.Run, "seconds", lambda self, pace: expected.append(seconds(self, pace)) or expected[0])
    monkeypatch.setattr(progress.Progress, "spent", lambda self, n: spent.append(n) or spend(self, n))
    assert compare(small, *OPTIONS, "--rounds", 1) == 0
    assert sum(spent) == pytest.approx(expected[0])


# what it comes to

def figures(kl: float, speed: float, frozen: int = 0) -> Figures:
    def same(value: float) -> Spread:
        return Spread(value, value, value, 3)

    return Figures(4000, same(100), same(speed), same(1), same(1), 192, 20, 1, 0.01, kl, 0.001, 0.1, 0.95, None, frozen)


def side(name: str, mib: int, kl: float, speed: float, frozen: int = 0) -> SideReport:
    return SideReport(name, "", "q8_0", "q8_0", 4096, "", "", Memory(mib << 20, 0, 0, 0, 0), None, (figures(kl, speed, frozen),), 3, 5)


def reading_of(*pools: SideReport, q8_0: float = 0.005, without: str = "") -> list[str]:
    upstream = [side("upstream f16", 90, 0, 30), side("upstream q8_0", 48, q8_0, 35), side("upstream q4_0", 25, 0.05, 36)]
    kept = tuple(side for side in (*upstream, *pools) if side.name != without)
    return reading.readings(Report("", 1, True, "", {}, 4096, 3, 64, "text", "", {}, "upstream f16", kept, ()))


def test_the_reading_says_what_upstream_gives_and_what_a_pool_gains_beside_it():
    lines = reading_of(side("pool 25%", 24, 0.011, 52, frozen=2000), side("pool 60%", 54, 0.005, 35, frozen=1), side("pool 80%", 48, 0.005, 35))
    assert lines[0] == ("The whole Q8_0 cache fits: 48.0 MiB, KL 0.0050, reads at 1.00 x and decodes at 1.00 x the speed of upstream f16. "
                        "Take it where that is small and fast enough.")  # fmt: skip
    assert lines[1] == ("pool 25% beside upstream q8_0: 0.50 x the bytes, reads at 1.00 x and decodes at 1.49 x the speed, KL 0.0110, "
                        "nearer to the full cache than upstream q4_0 (0.0500) in no more bytes.")  # fmt: skip
    assert lines[2].startswith("pool 60% gains nothing over upstream q8_0 here") and lines[3].startswith("pool 80%: all tokens fit it in q8_0")
    assert "no nearer to the full cache than upstream q4_0" in reading_of(side("pool 10%", 9, 0.06, 60, frozen=1))[1]


def test_the_reading_of_a_partial_report_claims_nothing_that_was_not_measured():
    assert reading_of() == ["Stopped before a pool could be compared with anything."]
    lines = reading_of(dataclasses.replace(side("pool 25%", 24, 0, 52), depths=(dataclasses.replace(figures(0, 52), depth=1000),)))
    assert lines == ["Stopped before a pool could be compared with anything."]  # it was not read as far as the others
    lines = reading_of(side("pool 25%", 24, 0.011, 52, frozen=2000), without="upstream q8_0")
    assert lines[0] == "There is no figure of the whole Q8_0 cache here." and lines[1].startswith("pool 25% beside upstream f16")


def test_a_cache_in_host_ram_beside_a_gpu_has_no_bytes_on_it(outcome, monkeypatch):
    stats = argparse.Namespace(**{name: 1 for name in Memory.__dataclass_fields__}, type_k="f16", type_v="f16", pool_cells=1, pool_choice="")
    fake = argparse.Namespace(refused={}, opened={sides.IN_HOST_RAM.name: argparse.Namespace(stats=stats, config="")}, visits=[])
    memory = report._side(fake, sides.IN_HOST_RAM).memory
    assert (memory.device_kv_bytes, memory.host_kv_bytes, memory.device_compute_bytes) == (0, 1, 1)


def test_figures_of_several_rounds_are_medians_and_ratios_are_of_the_same_round():
    def at(seconds: float, nll: float) -> run.AtDepth:
        found = Predictions(np.array([nll, nll]), np.array([0.1, 0.3]), np.array([True, False]), np.array([seconds, seconds]))
        return run.AtDepth(256, 256, 256 * seconds, found, [0.1, 0.3], argparse.Namespace(frozen_cells=7))

    def visits(side, *rounds: float) -> list[run.Visit]:
        return [run.Visit(side, i, 1.0, [at(seconds, 2.0 + seconds)]) for i, seconds in enumerate(rounds)]

    pool = sides.pooled_sides("0.5")[0]
    mine = visits(pool, 0.1, 0.2)
    fake = argparse.Namespace(reference=sides.REFERENCE, visits=[*visits(sides.REFERENCE, 0.2, 0.8, 9.0), *mine])
    found = report._figures(fake, mine, 256)
    assert found.decode_tokens_per_second == Spread(7.5, 5.0, 10.0, 2) and found.decode_ratio == Spread(3.0, 2.0, 4.0, 2)
    assert (found.positions, found.missed_attention_ratio, found.frozen_cells, found.kl_mean, found.top1_ratio) == (4, 0.2, 7, 0.2, 0.5)
    assert found.ppl_ratio == pytest.approx(np.exp((0.1 + 0.2) / 2 - (0.2 + 0.8) / 2))


def test_a_csv_of_a_side_that_could_not_be_had_has_its_reason(tmp_path):
    refused = SideReport("pool 1%", "", "", "", 0, "", "too small", None, None, (), 0, 0)
    made = Report("", 1, True, "", {"model": "m"}, 4096, 3, 64, "text", "", {}, "upstream f16", (side("upstream f16", 90, 0, 30), refused), ())
    tables.write_csv(made, tmp_path / "out.csv")
    rows = list(csv.DictReader((tmp_path / "out.csv").open(newline="")))
    assert [(row["side"], row["refused"], row["depth"]) for row in rows] == [("upstream f16", "", "4000"), ("pool 1%", "too small", "")]
