"""README and docs are true: figures are rows of the committed CSV files, and commands, tests, keys and links exist."""

from __future__ import annotations

import argparse
import ast
import csv
import dataclasses
import hashlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import asrkf_gguf
from asrkf_gguf import FreezeConfig, _native, bench, cli
from asrkf_gguf.config import POLICIES

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, ROOT / "patches/README.md", *DOCS]

in_every_page = pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])

def made(what: str) -> str:
    return subprocess.run([sys.executable, str(ROOT / "scripts/bench"), what], capture_output=True, text=True, check=True).stdout.strip()


def between(page: Path, begin: str, end: str) -> str:
    return page.read_text().split(f"<!-- {begin} -->")[1].split(f"<!-- {end} -->")[0].strip()


def without_code(text: str) -> str:
    """Prose: no fenced or indented blocks, no tables, no comments, no heads."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    lines = [line for line in text.splitlines() if not re.match(r" {4}|\||<!--|#|!\[", line)]
    return "\n".join(lines)


def rows_of(name: str) -> list[dict[str, str]]:
    with (ROOT / "results" / name).open(newline="") as file:
        return list(csv.DictReader(file))


# figures

def test_the_table_of_speed_is_made_from_the_committed_rows():
    assert between(ROOT / "docs/results.md", "results: scripts/bench table", "end of results") == made("table")


def test_the_tables_of_quality_are_made_from_the_committed_rows():
    assert between(ROOT / "docs/results.md", "quality: scripts/bench quality-table", "end of quality") == made("quality-table")


def test_the_table_of_second_looks_is_made_from_the_committed_rows():
    assert between(ROOT / "docs/results.md", "looks: scripts/bench looks-table", "end of looks") == made("looks-table")


def test_the_judges_tables_are_made_from_the_committed_rows():
    assert between(ROOT / "docs/results.md", "judge: scripts/bench judge-table", "end of judge") == made("judge-table")


@pytest.mark.parametrize("name", ["calibration", "sensitivities", "cuts", "pairs"])
def test_the_tables_of_calibrations_cuts_and_pairs_are_made_from_the_committed_rows(name):
    assert between(ROOT / "docs/results.md", f"{name}: scripts/bench {name}-table", f"end of {name}") == made(f"{name}-table")


def test_readmes_tables_are_made_from_the_committed_rows():
    gains, costs = made("readme-tables").split("\n\n")
    assert between(README, "gains: scripts/bench readme-tables", "end of gains") == gains
    assert between(README, "costs: scripts/bench readme-tables", "end of costs") == costs
    equal = made("equal-bytes-table")
    assert between(README, "equal bytes: scripts/bench equal-bytes-table", "end of equal bytes") == equal.split("\n\n")[0]
    assert between(ROOT / "docs/results.md", "equal bytes: scripts/bench equal-bytes-table", "end of equal bytes") == equal


def test_every_number_with_a_unit_in_readme_is_recomputed():
    """Those of its tables by the test above: none stands in a table that no script makes. Those of its prose here."""
    quantity = r"\d[\d.,]*\d? ?(?:[KMGT]i?B\b|tok/s|nats|%|of \d)"
    text = README.read_text()
    for table in ("gains", "costs"):
        text = text.replace(between(README, f"{table}: scripts/bench readme-tables", f"end of {table}"), "")
    text = text.replace(between(README, "equal bytes: scripts/bench equal-bytes-table", "end of equal bytes"), "")
    assert not [line for line in text.splitlines() if line.startswith("|")]
    layers, heads, head, f16_bytes, context = 32, 8, 128, 2, 32768  # of Llama 3.1 8B; the shape: test_bytes_of_llama3_8b_are_128_kib_a_token
    token_bytes = layers * 2 * heads * head * f16_bytes
    assert re.findall(quantity, text) == [f"{token_bytes >> 10} KiB", f"{token_bytes * context >> 30} GiB"]
    assert f"{context:,} tokens" in text


def test_readmes_pool_and_context_are_those_of_its_rows():
    """The sentences around the tables name what the rows were measured with."""
    text = README.read_text()
    speed = [row for row in rows_of("speed.csv") if row["side"] == "ours"][-1]["config"]
    n_ctx, cells = (int(re.search(rf"\b{key}=(\d+)", speed).group(1)) for key in ("n_ctx", "pool"))
    assert f"in a context of {n_ctx:,}" in text and f"the pool has {cells:,} cells" in text
    newest = [row for row in rows_of("quality.csv") if row["side"] == "asrkf" and row["length"] == "4096"][-1]
    needles = [row for row in rows_of("needles.csv") if row["side"] == "asrkf"][-1]
    for row in (newest, needles):
        part = int(re.search(r"\bpool=(\d+)", row["config"]).group(1)) / int(row["length"])
        assert abs(part - 1 / 3) < 0.03
    assert "a pool of a third of the tokens" in text


def test_what_is_said_of_the_soak_is_its_newest_row():
    row = rows_of("soak.csv")[-1]
    failures = row["failures"] if int(row["failures"]) else "no"
    said = f"The newest row has {int(row['tokens']):,} tokens in {int(row['steps']):,} steps, and {failures} failures."
    text = " ".join((ROOT / "docs/results.md").read_text().split())
    assert said in text, f"docs/results.md must say: {said}"
    assert failures == "no"


def test_the_picture_is_of_the_committed_rows():
    digest = hashlib.sha256((ROOT / "results/quality.csv").read_bytes()).hexdigest()
    assert f"sha256 {digest}".encode() in (ROOT / "results/quality.png").read_bytes(), "draw it anew: scripts/bench plot"


def test_the_picture_has_each_side_once_in_a_colour_of_its_own_with_its_error():
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="matplotlib is not installed: pip install matplotlib")
    from asrkf_gguf.bench.plots import plot_quality
    from asrkf_gguf.bench.tables import losses

    expected = {(loss.length, loss.side): loss for loss in losses(ROOT / "results/quality.csv") if loss.mean("kl_mean") > 0}
    figure = plot_quality(pyplot, ROOT / "results/quality.csv")
    colours: dict[str, set] = {}
    drawn = []
    for axis in figure.axes:
        length = int(axis.get_title().split()[0])
        for bar in axis.containers:
            side = bar.get_label()
            ((x, y),) = bar.lines[0].get_xydata()
            ((_, low), (_, high)) = bar.lines[2][0].get_segments()[0]
            loss = expected[length, side]
            assert (x * (1 << 20), y) == pytest.approx((loss.device_bytes, loss.mean("kl_mean")))
            assert (high - low) / 2 == pytest.approx(loss.kl_error) and loss.kl_error > 0
            colours.setdefault(side, set()).add(bar.lines[0].get_color())
            drawn.append((length, side))
    pyplot.close(figure)
    assert sorted(drawn) == sorted(expected)
    assert all(len(found) == 1 for found in colours.values())
    assert len(set.union(*colours.values())) == len(colours) > 10


@pytest.mark.parametrize("name", [
    "quality.csv", "needles.csv", "calibration.csv", "second_look.csv", "refreekv.csv", "judge.csv", "judge_texts.csv", "judge_tasks.csv",
    "variations.csv",
])  # fmt: skip
def test_every_row_of_quality_names_commit_machine_model_command_and_config(name):
    rows = rows_of(name)
    assert rows
    for row in rows:
        assert all(row[key] for key in ("commit", "machine", "model", "command", "config", "side", "device_bytes")), row
        assert "+changes" not in row["commit"] and "/" not in row["config"]


@pytest.mark.parametrize("name", ["sensitivities.csv", "pairs.csv"])
def test_every_row_of_layers_and_masks_names_commit_machine_model_and_command(name):
    for row in rows_of(name):
        assert all(row.values()) and "+changes" not in row["commit"], row


def test_every_row_names_commit_machine_model_command_and_config():
    rows = rows_of("speed.csv")
    assert rows
    for row in rows:
        assert all(row[key] for key in ("commit", "machine", "model", "command", "config", "metric", "side", "value", "unit")), row
        assert "+changes" not in row["commit"] and "=/" not in row["config"]


def test_none_of_llama_cpps_own_tests_failed_when_they_ran_last():
    rows = rows_of("upstream_tests.csv")
    assert {row["result"] for row in rows} == {"passed", "skipped"}
    assert all(row["reason"] for row in rows if row["result"] == "skipped")
    assert {row["policy"] for row in rows} == {"none", "asrkf,pool=1.0", "asrkf,pool=256"}


# names

@in_every_page
def test_scripts_and_files_that_a_page_names_exist(page):
    for name in set(re.findall(r"(?<![\w/.])(?:scripts|tests|results|patches|native|asrkf_gguf)/[\w./]*\w", page.read_text())):
        assert (ROOT / name).exists(), name


def test_errors_that_troubleshooting_explains_are_those_of_the_code():
    def plain(text: str) -> str:
        """Without what is filled in: numbers, printf's and Python's fields."""
        return " ".join(re.sub(r"%\.?\w+|\{\w[^{}\n]*\}|\d+", " ", text).split())

    paths = [*(ROOT / "native").rglob("*.cpp"), *(ROOT / "asrkf_gguf").rglob("*.py")]
    code = plain(re.sub(r'"\s*\n\s*f?"', "", "".join(path.read_text() for path in paths)))
    page = (ROOT / "docs/troubleshooting.md").read_text()
    errors = [error for head in re.findall(r"^## (`.*)$", page, re.M) for error in re.findall(r"`([^`]+)`", head)]
    errors += re.findall(r"^- `([^`]+)`:", page, re.M)
    errors.remove("import asrkf_gguf")
    assert len(errors) > 10
    for error in errors:
        for piece in error.split("..."):
            assert plain(piece) in code, error


def test_internals_of_llama_cpp_that_are_listed_are_used():
    """Of patches/README.md's tables: a row whose internal is no longer used must go."""
    table = (ROOT / "patches/README.md").read_text().split("\n## Internals", 1)[1]
    code = "".join(path.read_text() for kind in ("h", "cpp") for path in (ROOT / "native").rglob(f"*.{kind}"))
    names = [name for line in table.splitlines() if line.startswith("| `") for name in re.findall(r"[\w:]+(?=`)", line.split("|")[1])]
    assert len(names) > 20
    for name in names:
        assert re.search(rf"\b{name.split('::')[-1]}\b", code), name


def table_under(page: Path, head: str) -> list[list[str]]:
    lines = page.read_text().split(f"\n## {head}")[1].split("\n## ")[0].splitlines()
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")][2:]


def test_the_files_to_open_hold_what_is_said_of_them():
    """Of architecture.md's tables: a name in brackets after a file is in that file, and each file of native/llama/ has its row."""
    page = ROOT / "docs/architecture.md"
    rows = table_under(page, "Which file do I open")
    assert len(rows) > 8
    for what, where, test in rows:
        for cell in (where, test):
            for path, names in re.findall(r"`([\w/.]+)` \(([^)]*)\)", cell):
                for name in re.findall(r"\w+", names.replace("`", " ")):
                    assert re.search(rf"\b{name}\b", (ROOT / path).read_text()), f"{what}: {path} has no {name}"
    told = [name for cells in table_under(page, "What lies in native/llama/") for name in re.findall(r"`([\w.]+)`", cells[0])]
    assert sorted(told) == sorted({path.stem for path in (ROOT / "native/llama").iterdir()})


def parsers(parser: argparse.ArgumentParser, name: str) -> dict[str, argparse.ArgumentParser]:
    """A parser and those of its commands, by what one types."""
    found = {name: parser}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command, child in action.choices.items():
                found |= parsers(child, f"{name} {command}")
    return found


@in_every_page
def test_commands_have_the_options_that_a_page_gives_them(page):
    bench_parser = argparse.ArgumentParser()
    bench.add_arguments(bench_parser, in_checkout=True)
    known = parsers(bench_parser, "scripts/bench")
    for command in cli.COMMANDS:  # each parser has the options of its own command only
        own = f"asrkf {command.name}"
        known |= {name: parser for name, parser in parsers(cli.make_parser(command.name), "asrkf").items() if name.startswith(own)}
    text = re.sub(r"\\\n *", "", page.read_text())
    for line in re.findall(r"^(?: {4}|\w+=\S+ )*((?:asrkf|scripts/bench) [^\n]*)|`((?:asrkf|scripts/bench) [^`]*)`", text, re.M):
        for command in "".join(line).split("#")[0].split(" ; "):
            words = command.split()
            while words and " ".join(words) not in known:
                words.pop()
            parser = known[" ".join(words)]
            assert len(words) > 1, command
            for option in re.findall(r"(?<!\S)--?[a-z][\w-]*", command):
                assert {option, option.replace("-", "_").replace("__", "--", 1)} & set(parser._option_string_actions), f"{command}: {option}"


@in_every_page
def test_python_examples_are_python(page):
    for code in re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.M | re.S):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module == "asrkf_gguf":
                assert {name.name for name in node.names} <= set(asrkf_gguf.__all__)


def slug(head: str) -> str:
    return re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-")


@in_every_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"https?://", target):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists() and path.is_relative_to(ROOT), target
        if anchor:
            heads = re.findall(r"^#+ (.+)$", path.read_text(), re.M)
            assert anchor in [slug(head) for head in heads], target


def test_every_document_is_linked_from_readme():
    assert DOCS
    for page in DOCS:
        assert f"(docs/{page.name}" in README.read_text(), page.name


def supported() -> list[list[str]]:
    """The rows of every table of docs/support.md whose last column is `test`."""
    rows, is_table = [], False
    for line in (ROOT / "docs/support.md").read_text().splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if cells and cells[-1] == "test":
            is_table = True
        elif not cells:
            is_table = False
        elif is_table and set(cells[0]) != {"-"}:
            rows.append(cells)
    return rows


def test_every_row_of_what_is_supported_names_tests_that_exist():
    rows = supported()
    assert len(rows) > 40
    results = rows_of("upstream_tests.csv")
    for what, state, test in rows:
        cited = re.findall(r"`([^`]+)`", test)
        assert cited, what
        for name in cited:
            file, _, tests = name.partition(": ")
            if file == "upstream_tests.csv":  # an architecture that llama.cpp's own test ran, or that was refused there
                for case in tests.split(", "):
                    found = [row for row in results if row["test"] == "test-llama-archs" and case in row["case"].split(", ")]
                    assert found, case
                    for row in found:
                        assert row["reason"].startswith("refused: ") if state.startswith("refused") else row["result"] == "passed", case
                continue
            path = ROOT / file if "/" in file else ROOT / "tests" / ("native" if file.endswith(".cpp") else "") / file
            text = path.read_text()
            for one in filter(None, tests.split(", ")):
                assert re.search(rf"TEST\({one},|def {one}\(", text), name


def test_every_architecture_that_was_refused_is_a_row_of_what_is_refused():
    """Each of the reasons, and each with one of its architectures at least."""
    cited = {case for _, state, test in supported() if state.startswith("refused") for case in re.findall(r"[\w-]+", test)}
    for row in rows_of("upstream_tests.csv"):
        if row["reason"].startswith("refused: "):
            assert cited & set(row["case"].split(", ")), row["reason"]


def keys() -> dict[str, str]:
    """The table of keys in docs/policy.md: each key and its default."""
    table = (ROOT / "docs/policy.md").read_text().split("\n## Keys\n")[1].split("\n\n")[1].splitlines()[2:]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table]
    return {key.strip("`"): default for key, default, _ in cells}


def test_every_key_is_documented_with_its_default():
    documented, defaults = keys(), FreezeConfig().resolved()
    assert sorted(documented) == sorted(row["name"] for row in _native.config_table())
    for key, default in documented.items():
        if key in ("calibration", "gates", "pinned"):  # what these are without a value is said in words
            assert not defaults.get(key)
        else:
            assert default == defaults[key], key


def test_every_policy_is_documented():
    text = (ROOT / "docs/policy.md").read_text()
    for policy in (*POLICIES, "aggressive", "default", "quality"):
        assert re.search(rf"^\|[^|]*`{policy}`", text, re.M), policy


def test_figures_that_the_guide_explains_exist():
    names = re.findall(r"`(\w+)`", "".join(cells[0] for cells in table_under(ROOT / "docs/guide.md", "What the figures mean")))
    assert len(names) > 15 and set(names) <= {field.name for field in dataclasses.fields(asrkf_gguf.KVStats)}


# language

def test_readme_is_short():
    assert len(README.read_text().splitlines()) <= 150


@in_every_page
def test_no_sentence_is_longer_than_forty_words(page):
    prose = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", without_code(page.read_text()))
    for paragraph in re.split(r"\n\s*\n|\n(?:- |\d+\. )", prose):
        for sentence in re.split(r"(?<=[.!?:])\s+", " ".join(paragraph.split())):
            assert len(sentence.split()) <= 40, sentence


@in_every_page
def test_no_table_holds_a_command_line(page):
    for line in page.read_text().splitlines():
        if line.startswith("|"):
            assert not re.search(r"`[^`]* --?\w[^`]*`", line), line
