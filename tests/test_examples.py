"""The programs in examples/ run as they stand, and what they show is true."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys

import pytest
from conftest import ROOT

EXAMPLES = ROOT / "examples"


def example(name: str, *arguments: str) -> list[str]:
    """The lines that it prints."""
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, stdin=subprocess.DEVNULL)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_every_example_has_a_test():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(re.findall(r'example\("(\w+\.py)"', (ROOT / "tests/test_examples.py").read_text()))


def test_a_long_document_is_read_once_and_asked_twice(smollm2):
    lines = example("long_document.py", smollm2, "--max-tokens", "8")
    assert sum(line.startswith("Q: ") for line in lines) == sum(line.startswith("A: ") for line in lines) == 2
    figures = [list(map(int, re.findall(r"\d+", line))) for line in lines if "tokens in the prompt" in line]
    assert all(n_prompt > 1000 and n_frozen > 500 and n_recalled > 0 for n_prompt, n_frozen, n_recalled in figures)


def test_a_chat_of_many_turns_keeps_its_device_bytes(smollm2):
    lines = example("many_turns.py", smollm2, "--turns", "9")
    assert len(lines) == 9 and len({re.search(r"(\d+) MiB of K and V on the device", line)[1] for line in lines}) == 1
    n_tokens, n_active, n_frozen = map(int, re.search(r"(\d+) tokens so far, (\d+) active, (\d+) frozen", lines[-1]).groups())
    assert n_tokens == n_active + n_frozen and n_frozen > 0 and n_active <= 512


def test_an_agents_pinned_instructions_stay_active(smollm2):
    lines = example("agent.py", smollm2, "--task", "Read many_turns.py, then agent.py, then long_document.py.")
    assert all(re.match(r"step \d+: (list|read|done)\(", line) for line in lines[:-2])
    assert int(re.fullmatch(r"\d+ tokens, (\d+) frozen", lines[-2])[1]) > 0
    assert re.search(r"positions 0 to \d+, the instructions: all active", lines[-1])


def test_openais_client_asks_the_server(smollm2, tmp_path):
    pytest.importorskip("openai", reason="the client is missing: pip install '.[test]'")
    pytest.importorskip("fastapi", reason="the server's packages are missing: pip install '.[test]'")
    from test_serve import serving

    with serving(tmp_path / "log", "smollm2", "-c", "1024", "--kv-pool", "512", "-t", "1") as server:
        said, figures = example("openai_client.py", "--address", server.address, "--max-tokens", "16")[-2:]
    assert said and re.fullmatch(r"smollm2: policy asrkf, \d+ tokens, pool 512 cells, 0 frozen", figures)


def needs(package: str, how: str) -> pytest.MarkDecorator:
    is_there = importlib.util.find_spec(package.split(".")[0]) and importlib.util.find_spec(package)
    return pytest.mark.skipif(not is_there, reason=f"{package} is not installed: {how}")


@needs("langchain_community", "pip install langchain-community")
def test_langchain_makes_our_llama(smollm2):
    said, figures = example("with_langchain.py", smollm2)[-2:]
    assert said and re.fullmatch(r"policy asrkf, \d+ tokens, pool 512 cells", figures)


@needs("llama_index.llms.llama_cpp", "pip install llama-index-core, then --no-deps llama-index-llms-llama-cpp")
def test_llamaindex_makes_our_llama(smollm2):
    said, figures = example("with_llamaindex.py", smollm2)[-2:]
    assert said and re.fullmatch(r"policy asrkf, \d+ tokens, pool 512 cells", figures)
