"""llama.cpp's own programs and the command asrkf, with the policy from the environment."""

from __future__ import annotations

import csv
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from texts import with_early_word

import asrkf_gguf
from asrkf_gguf.models import find_side_file

PROGRAMS = asrkf_gguf._native.PROGRAM_FOLDER


def program(name: str, *arguments: str, policy: str | None = None) -> subprocess.CompletedProcess[str]:
    if not (PROGRAMS / name).exists():
        pytest.skip(f"the build has no {name}: set ASRKF_PROGRAMS (scripts/setup does)")
    environment = {key: value for key, value in os.environ.items() if key != "LLAMA_KV_POLICY"}
    if policy is not None:
        environment["LLAMA_KV_POLICY"] = policy
    return subprocess.run([str(PROGRAMS / name), *arguments], env=environment, capture_output=True, text=True, check=False)


def needs_host_room(name: str, *arguments: str, policy: str) -> None:
    """The program freezes: with host room for 91 of SmolLM2's tokens the cache refuses the very run that works without a limit."""
    result = program(name, *arguments, policy=f"{policy},host_limit=2MiB")
    assert result.returncode != 0
    assert "host_limit of 2097152 bytes cannot hold what must be frozen" in result.stdout + result.stderr


def test_llama_bench_runs_past_the_pool(smollm2):
    arguments = ["-m", smollm2, "-d", "1000", "-p", "0", "-n", "8", "-r", "1", "-t", "2", "-fa", "1", "-o", "csv", "-v"]
    result = program("llama-bench", *arguments, policy="asrkf,layers=shared,pool=512")
    rows = list(csv.DictReader(line for line in io.StringIO(result.stdout) if line.startswith(("build_commit", '"'))))
    assert result.returncode == 0 and len(rows) == 1, result.stderr
    assert float(rows[0]["avg_ts"]) > 0
    assert "pool of 512 cells for n_ctx 1024" in result.stdout + result.stderr
    needs_host_room("llama-bench", *arguments, policy="asrkf,layers=shared,pool=512")


def test_llama_bench_says_why_a_policy_is_refused(smollm2):
    result = program("llama-bench", "-m", smollm2, "-p", "8", "-n", "0", "-fa", "1", policy="asrkf,pol=512")
    assert result.returncode != 0
    result = program("llama-bench", "-m", smollm2, "-p", "8", "-n", "0", "-fa", "1", "-v", policy="asrkf,pol=512")
    assert 'did you mean "pool"' in result.stdout + result.stderr


def test_llama_perplexity_with_a_pool_that_holds_all_is_that_of_no_policy(smollm2, text, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(text[:12000])
    arguments = ["-m", smollm2, "-f", str(path), "-c", "512", "-b", "512", "--chunks", "2", "-t", "2", "-fa", "on", "--no-warmup"]
    plain = program("llama-perplexity", *arguments)
    held = program("llama-perplexity", *arguments, policy="asrkf,pool=512")

    def estimate(result):
        lines = [line for line in (result.stdout + result.stderr).splitlines() if "Final estimate" in line]
        assert lines, result.stderr[-2000:]
        return lines[0].split("Final estimate", 1)[1]

    assert estimate(held) == estimate(plain)


def completion_arguments(model: str, path: Path) -> list[str]:
    return ["-m", model, "-f", str(path), "-c", "2048", "-n", "24", "-t", "2", "-fa", "on", "--temp", "0", "-no-cnv", "--no-display-prompt"]


def completed(model: str, path: Path, policy: str | None) -> str:
    """What llama-completion, which is llama-cli without a chat, writes after the prompt in a file."""
    result = program("llama-completion", *completion_arguments(model, path), policy=policy)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def test_llama_completion_answers_from_what_was_frozen(smollm2, text, tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text(with_early_word(text, 0, 3600, "orchid"))  # said 600 tokens before the question: the window is 256
    policy = f"asrkf,pool=512,calibration={find_side_file(Path(smollm2))}"
    assert completed(smollm2, path, policy).startswith("orchid")
    needs_host_room("llama-completion", *completion_arguments(smollm2, path), policy=policy)


def test_llama_completion_with_a_pool_that_holds_all_writes_what_it_writes_without(smollm2, text, tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text(text[:3600])
    plain = completed(smollm2, path, None)
    assert len(plain.strip()) > 20
    assert completed(smollm2, path, "asrkf,pool=1.0") == plain


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(Path(sys.executable).parent / "asrkf"), *arguments], capture_output=True, text=True, check=False)


def test_asrkf_info_lists_keys_and_the_bytes_of_a_model(smollm2):
    result = command("info", smollm2)
    assert result.returncode == 0, result.stderr
    assert "23040 bytes a token" in result.stdout
    assert all(word in result.stdout for word in ("timer_share", "flag-all", "libllama from", "devices: ", "CPU"))


def test_bytes_of_llama3_8b_are_128_kib_a_token(llama3_two_layers):
    from asrkf_gguf.models import kv_bytes_per_token

    assert kv_bytes_per_token(Path(llama3_two_layers)) == 128 * 1024 * 2 // 32  # two of its 32 layers
    assert kv_bytes_per_token(Path(llama3_two_layers), "Q8_0") == 128 * 1024 * 2 // 32 * 17 // 32


@pytest.mark.parametrize(("n_head_kv", "heads"), [(2, 4), ([2, 1], 3)])
def test_layers_may_have_different_numbers_of_heads(tmp_path, n_head_kv, heads):
    from make_models import write_tiny

    from asrkf_gguf.models import kv_bytes_per_token

    write_tiny(tmp_path / "model.gguf", n_head_kv=n_head_kv)
    assert kv_bytes_per_token(tmp_path / "model.gguf") == heads * 64 * 2 * 2  # heads of 64, K and V, F16
    assert kv_bytes_per_token(tmp_path / "model.gguf", "F16", "Q8_0") == heads * 64 * 2 + heads * 64 // 32 * 34
