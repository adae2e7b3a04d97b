"""llama-server with the policy from the environment: slots, prompt caches, saved slots, a text past the pool, context shift.

Every test runs without a policy too: what it asserts is what upstream's server does.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from texts import with_early_word

import asrkf_gguf
from asrkf_gguf.models import fetch_smollm2, find_side_file

SERVER = asrkf_gguf._native.PROGRAM_FOLDER / "llama-server"
HOLDS, SMALL = "asrkf,pool=1.0", f"asrkf,pool=512,calibration={find_side_file(fetch_smollm2())}"
POLICIES = [None, HOLDS, SMALL]
ONE_SLOT = ("-c", "2048", "-np", "1", "--cache-ram", "512")


class Server:
    """A running llama-server."""

    def __init__(self, url: str, log: Path) -> None:
        self.url, self.log = url, log

    def ask(self, path: str, **data: object) -> dict | list:
        body = json.dumps(data).encode() if data else None
        request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            pytest.fail(f"{path}: {error.code} {error.read().decode()}\n{self.log.read_text()[-3000:]}")

    def complete(self, prompt: str, n_predict: int, **more: object) -> dict:
        """The answer to a prompt, always with the likeliest token; n_predict tokens, also past an end of text."""
        return self.ask("/completion", prompt=prompt, n_predict=n_predict, temperature=0, ignore_eos=True, **more)


@contextlib.contextmanager
def serving(model: str, folder: Path, policy: str | None, *arguments: str) -> Iterator[Server]:
    if not SERVER.exists():
        pytest.skip("the build has no llama-server: set ASRKF_PROGRAMS (scripts/setup does)")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {key: value for key, value in os.environ.items() if not key.startswith("LLAMA_")}
    if policy is not None:
        environment["LLAMA_KV_POLICY"] = policy
    options = ("-m", model, "--host", "127.0.0.1", "--port", port, "-t", "2", "-fa", "on", "--no-warmup", "--offline")
    log = folder / "server.log"
    with log.open("w") as out:
        process = subprocess.Popen([str(SERVER), *options, *arguments], env=environment, stdout=out, stderr=subprocess.STDOUT)
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                break
            if process.poll() is not None:
                pytest.fail(f"llama-server ended with exit code {process.returncode}:\n{log.read_text()[-3000:]}")
            time.sleep(0.1)
        else:
            pytest.fail("llama-server did not answer within a minute")
        yield Server(f"http://127.0.0.1:{port}", log)
        assert process.poll() is None, f"llama-server ended with exit code {process.returncode}:\n{log.read_text()[-3000:]}"
    finally:
        process.terminate()
        process.wait(20)


def with_late_word(text: str, begin: int, n_characters: int, word: str) -> str:
    """A piece of text, and at its end a word to repeat: what follows is the same whatever batches the prompt comes in."""
    return text[begin : begin + n_characters] + f'\n\nThe secret word is "{word}". Remember: the secret word is "{word}".\n\nThe secret word is "'


@pytest.fixture(scope="module", params=POLICIES, ids=["none", "holds", "small"])
def one_slot(request, smollm2, tmp_path_factory) -> Iterator[tuple[Server, str | None]]:
    folder = tmp_path_factory.mktemp("server")
    with serving(smollm2, folder, request.param, *ONE_SLOT, "--slot-save-path", f"{folder}{os.sep}") as server:
        yield server, request.param


def plain_answer(model: str, folder: Path, text: str) -> str:
    """What the server says to the first prompt below without a policy."""
    with serving(model, folder, None, *ONE_SLOT) as server:
        return server.complete(with_early_word(text, 0, 3600, "orchid"), 24)["content"]


def test_a_prompt_past_the_pool_is_answered(one_slot, text, smollm2, tmp_path_factory):
    server, policy = one_slot
    answer = server.complete(with_early_word(text, 0, 3600, "orchid"), 24)
    assert 512 < answer["timings"]["prompt_n"] < 2000 and answer["timings"]["predicted_n"] == 24
    assert answer["content"].startswith("orchid")
    if policy == HOLDS:
        assert answer["content"] == plain_answer(smollm2, tmp_path_factory.mktemp("plain"), text)


def test_a_prompt_past_the_pool_freezes_its_tokens_on_the_host(smollm2, text, tmp_path):
    """With host room for 91 of SmolLM2's tokens the cache refuses the very prompt that works without a limit."""
    with serving(smollm2, tmp_path, f"{SMALL},host_limit=2MiB", *ONE_SLOT) as server:
        with pytest.raises(pytest.fail.Exception, match="/completion: 500"):
            server.complete(with_early_word(text, 0, 3600, "orchid"), 24)
        assert "host_limit of 2097152 bytes cannot hold what must be frozen" in server.log.read_text()


def test_the_same_prompt_again_takes_its_tokens_from_the_slot(one_slot, text):
    server, policy = one_slot
    prompt = with_late_word(text, 4000, 3600, "walnut")
    first, again = (server.complete(prompt, 24) for _ in range(2))
    assert first["timings"]["prompt_n"] > 512
    assert again["timings"]["prompt_n"] < 64 and again["timings"]["cache_n"] > 512
    assert again["content"].startswith("walnut")
    if policy != SMALL:  # past the pool another walk over the end may recall other tokens
        assert again["content"] == first["content"]


def test_a_prompt_comes_back_from_the_cache_in_ram(one_slot, text):
    server, policy = one_slot
    prompt = with_late_word(text, 8000, 3600, "pepper")
    first = server.complete(prompt, 24)
    other = server.complete(with_late_word(text, 12000, 3600, "marble"), 24)  # takes the only slot
    assert other["timings"]["prompt_n"] > 512 and other["content"].startswith("marble")
    again = server.complete(prompt, 24)
    assert again["timings"]["prompt_n"] < 64 and again["timings"]["cache_n"] > 512
    assert again["content"].startswith("pepper")
    if policy != SMALL:
        assert again["content"] == first["content"]


def test_a_slot_is_saved_erased_and_restored(one_slot, text):
    server, policy = one_slot
    prompt = with_late_word(text, 16000, 3600, "violin")
    first = server.complete(prompt, 24)
    saved = server.ask("/slots/0?action=save", filename="slot.bin")
    assert saved["n_saved"] > 512
    assert server.ask("/slots/0?action=erase", filename="")["n_erased"] == saved["n_saved"]
    server.complete("Hello", 2)
    restored = server.ask("/slots/0?action=restore", filename="slot.bin")
    assert (restored["n_restored"], restored["n_read"]) == (saved["n_saved"], saved["n_written"])
    again = server.complete(prompt, 24)
    assert again["timings"]["prompt_n"] < 64 and again["timings"]["cache_n"] > 512
    assert again["content"].startswith("violin")
    if policy != SMALL:
        assert again["content"] == first["content"]


@pytest.mark.parametrize("policy", POLICIES, ids=["none", "holds", "small"])
def test_two_slots_busy_at_once_keep_their_texts_apart(smollm2, text, tmp_path, policy):
    words = ("orchid", "marble")
    with serving(smollm2, tmp_path, policy, "-c", "2048", "-np", "2") as server, ThreadPoolExecutor(3) as threads:
        answers = [threads.submit(server.complete, with_late_word(text, 4000 * i, 2000, word), 48, id_slot=i) for i, word in enumerate(words)]
        busy = 0  # slots at work at the same time, at most
        while not all(answer.done() for answer in answers):
            busy = max(busy, sum(slot["is_processing"] for slot in server.ask("/slots")))
            time.sleep(0.05)
        answers = [answer.result() for answer in answers]
    assert busy == 2
    assert sum(answer["timings"]["prompt_n"] for answer in answers) > 512
    for i, (answer, word) in enumerate(zip(answers, words, strict=True)):
        assert answer["id_slot"] == i and answer["timings"]["predicted_n"] == 48
        assert answer["content"].startswith(word)


def shifted(model: str, folder: Path, policy: str | None, text: str) -> dict:
    with serving(model, folder, policy, "-c", "512", "-np", "1", "--context-shift") as server:
        return server.complete(with_late_word(text, 0, 1000, "orchid"), 300, n_keep=16)


@pytest.mark.parametrize("policy", [None, HOLDS, "asrkf,pool=256"], ids=["none", "holds", "small"])
def test_with_context_shift_a_text_grows_past_the_context(smollm2, text, tmp_path, policy):
    answer = shifted(smollm2, tmp_path, policy, text)
    assert answer["truncated"] and answer["timings"]["predicted_n"] == 300
    assert answer["timings"]["prompt_n"] + 300 > 512
    if policy == HOLDS:
        assert answer["content"] == shifted(smollm2, tmp_path, None, text)["content"]
