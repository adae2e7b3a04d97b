"""`asrkf serve`, asked by the official client: the answers of `Llama`, errors with their text, the cache's figures."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from conftest import python

pytest.importorskip("fastapi", reason="the server's packages are missing: pip install '.[test]'")
openai = pytest.importorskip("openai", reason="the client is missing: pip install '.[test]'")

POLICY = "asrkf,host_limit=24MiB"  # of about 1,090 tokens of SmolLM2
OPTIONS = ["-c", "2048", "--kv-pool", "512", "-t", "2", "--seed", "1"]
START_SECONDS = 120  # a machine that compiles beside the tests is slow


class Server:
    """A running `asrkf serve` and its client."""

    def __init__(self, port: int, process: subprocess.Popen[str], log: Path) -> None:
        self.address = f"http://127.0.0.1:{port}"
        self.process, self.log = process, log
        self.client = openai.OpenAI(base_url=f"{self.address}/v1", api_key="none", max_retries=0, timeout=120)

    def complete(self, prompt: str, max_tokens: int = 8, model: str = "smollm2", **options):
        return self.client.completions.create(model=model, prompt=prompt, max_tokens=max_tokens, temperature=0, seed=1, **options)

    def kv_stats(self) -> dict:
        with urllib.request.urlopen(f"{self.address}/v1/kv_stats", timeout=60) as answer:
            return json.load(answer)


@contextlib.contextmanager
def serving(log: Path, *arguments: str, ready: str = "/v1/models"):
    """Start `asrkf serve` on a free port of the loopback device (a config file gets it from the environment); it listens, and answers
    at `ready`, when the block begins, and must end without a fault."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with log.open("w") as out:
        where = {"host": "127.0.0.1", "port": str(port)}
        command, environment = [sys.executable, "-m", "asrkf_gguf.cli", "serve", *arguments], dict(os.environ)
        if "--config-file" in arguments:
            environment |= {name.upper(): value for name, value in where.items()}
        else:
            command += [part for name, value in where.items() for part in (f"--{name}", value)]
        process = subprocess.Popen(command, stdout=out, stderr=out, text=True, cwd=log.parent, env=environment)
    try:
        server, began = Server(port, process, log), time.monotonic()
        while True:
            try:
                urllib.request.urlopen(f"{server.address}{ready}", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() - began < START_SECONDS, log.read_text()
                time.sleep(0.1)
        yield server
        process.send_signal(signal.SIGINT)
        assert process.wait(30) in (0, 130), log.read_text()
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def server(smollm2, tmp_path_factory):
    log = tmp_path_factory.mktemp("serve") / "log"
    with serving(log, "smollm2", *OPTIONS, "--kv-policy", POLICY, "--cache", "true") as running:
        yield running


def test_the_served_model_is_listed_and_its_policy_runs(server):
    assert [model.id for model in server.client.models.list()] == ["smollm2"]
    kv = server.kv_stats()["kv"]
    assert kv["policy"] == "asrkf" and kv["pool_cells"] == 512 and kv["device_kv_bytes"] == 512 * 23040


def test_a_served_answer_is_that_of_llama(server, load, smollm2, text):
    direct = load(smollm2, kv_policy=POLICY, kv_pool=512)
    expected = direct(text[:3600], max_tokens=16, temperature=0, seed=1, repeat_penalty=1.1)  # llama_cpp.server's default
    answer = server.complete(text[:3600], 16)
    assert answer.choices[0].text == expected["choices"][0]["text"]
    assert answer.usage.prompt_tokens == expected["usage"]["prompt_tokens"] > 600
    warm = {"max_tokens": 16, "temperature": 0.9, "seed": 77}
    expected = direct("The sea is", **warm, repeat_penalty=1.1)["choices"][0]["text"]
    assert server.client.completions.create(model="smollm2", prompt="The sea is", **warm).choices[0].text == expected


def test_a_prompt_longer_than_the_pool_shows_in_the_figures(server, text):
    before = server.kv_stats()["kv"]
    answer = server.complete(text[5000:9500])
    assert answer.usage.prompt_tokens > 800
    stats = server.kv_stats()
    kv, last = stats["kv"], stats["last_completion"]
    assert stats["model"] == "smollm2"
    assert kv["frozen_cells"] > 250 and kv["tokens"] == kv["active_cells"] + kv["frozen_cells"] > 800
    assert kv["device_kv_bytes"] == 512 * 23040 and kv["host_kv_bytes"] >= kv["frozen_cells"] * 23040
    assert last["id"] == answer.id
    assert last["freezes_total"] == kv["freezes_total"] - before["freezes_total"] > 0
    assert last["rewalks_total"] == 1 and last["restores_total"]["recall"] > 0 and last["moved_to_host_bytes"] > 0


def test_chat_streams_what_it_says_at_once_and_reading_figures_does_not_cut_it(server, text):
    messages = [{"role": "system", "content": "You answer briefly."}, {"role": "user", "content": f"What is this about? {text[:900]}"}]
    options = {"model": "smollm2", "messages": messages, "max_tokens": 24, "temperature": 0, "seed": 1}
    whole = server.client.chat.completions.create(**options)
    assert whole.choices[0].message.content.strip() and whole.usage.completion_tokens > 4
    pieces, reader = [], threading.Thread(target=server.kv_stats)
    for piece in server.client.chat.completions.create(**options, stream=True):
        pieces.append(piece.choices[0].delta.content or "")
        if len(pieces) == 2:
            reader.start()
    reader.join(60)
    assert len(pieces) > 5 and "".join(pieces) == whole.choices[0].message.content


def test_a_completion_streams_what_it_says_at_once(server, text):
    whole = server.complete(text[:900], 12).choices[0].text
    assert whole and "".join(piece.choices[0].text for piece in server.complete(text[:900], 12, stream=True)) == whole


def test_the_prompt_cache_brings_an_earlier_prompt_back(server, text):
    first, others, steps = text[20000:20800], text[30000:34000], []  # the first fits every group of layers
    answers = []
    for prompt in (first, others, first):
        answers.append(server.complete(prompt, 8).choices[0].text)
        steps.append(server.kv_stats()["last_completion"]["steps_total"])
    assert server.kv_stats()["kv"]["tokens"] < 400
    assert answers[2] == answers[0]
    assert steps[2] <= 9 < steps[0]  # one for the prompt's last token, one for each of the answer's; nothing was read again


def test_a_stream_that_is_left_does_not_hold_up_the_next_request(server, text):
    expected = server.complete("Once upon a time", 8).choices[0].text
    stream = server.complete(text[:1500], 500, stream=True)
    next(iter(stream))
    stream.close()
    assert server.complete("Once upon a time", 8).choices[0].text == expected


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("length", "reason", "code"),
    [(20000, "maximum context length is 2048 tokens", "context_length_exceeded"), (6500, "host_limit of 25165824 bytes", "host_limit")],
)
def test_a_request_that_cannot_be_held_is_an_error_with_its_text_and_the_next_one_works(server, text, stream, length, reason, code):
    prompt = text[40000 : 40000 + length]
    with pytest.raises(openai.BadRequestError, match=reason) as refused:
        if stream:
            list(server.client.chat.completions.create(model="smollm2", messages=[{"role": "user", "content": prompt}], stream=True))
        else:
            server.complete(prompt)
    assert refused.value.code == code
    assert server.complete("The sun is", 4).choices[0].text


def test_an_error_in_the_middle_of_a_stream_is_its_last_event(server, text):
    """The prompt fits the host store, the answer outgrows it."""
    stream = server.complete(text[60000:65000], 1000, stream=True, logit_bias={"2": -100, "0": -100})
    pieces = []
    with pytest.raises(openai.APIError, match="host_limit of 25165824 bytes"):
        for piece in stream:
            pieces.append(piece.choices[0].text)
    assert len(pieces) > 5
    assert server.complete("The sun is", 4).choices[0].text


def test_what_this_server_does_not_do_is_refused_with_the_reason(server):
    with pytest.raises(openai.BadRequestError, match="logits_all"):
        server.complete("The sun is", 4, logprobs=2)
    with pytest.raises(openai.BadRequestError, match="a KV pool serves no embeddings"):
        server.client.embeddings.create(model="smollm2", input="The sun", encoding_format="float")


def test_a_config_file_serves_models_and_one_that_cannot_be_loaded_leaves_the_others(smollm2, tmp_path):
    options = {"n_ctx": 1024, "n_threads": 2, "n_threads_batch": 2}
    models = [
        {"model": smollm2, "model_alias": "window", "kv_policy": "window", "kv_pool": 256, **options},
        {"model": "smollm2", "model_alias": "large pool", "kv_pool": 4096, **options},
        {"model": "smollm2", "model_alias": "what fits", **options},
    ]
    file = tmp_path / "models.json"
    file.write_text(json.dumps({"models": models}))
    with serving(tmp_path / "log", "--config-file", str(file)) as running:
        assert [model.id for model in running.client.models.list()] == ["window", "large pool", "what fits"]
        assert running.kv_stats()["kv"]["policy"] == "window"
        with pytest.raises(openai.APIStatusError, match="pool of 4096 cells is larger than n_ctx 1024"):
            running.complete("Hello", model="large pool")
        with pytest.raises(urllib.error.HTTPError) as refused:
            running.kv_stats()
        assert refused.value.code == 503 and "no model is loaded" in refused.value.read().decode()
        assert running.complete("Hello", model="what fits").choices[0].text
        stats = running.kv_stats()
        assert stats["model"] == "what fits" and stats["kv"]["policy"] == "asrkf" and stats["kv"]["pool_cells"] == 1024
        assert "all 1024 cells in f16, nothing will be frozen" in stats["kv"]["pool_choice"]


def refused_line(*arguments: str) -> str:
    result = subprocess.run([sys.executable, "-m", "asrkf_gguf.cli", "serve", *arguments], capture_output=True, text=True, check=False,
                            timeout=120, cwd=Path(__file__).parent)  # fmt: skip
    assert result.returncode == 1 and result.stdout == ""
    return result.stderr.removesuffix("\n")


def test_what_cannot_be_served_is_one_line_before_it_listens(smollm2, tmp_path):
    assert refused_line(smollm2, "--kv-policy", "arskf") == (
        'asrkf serve: policy "arskf" is unknown; did you mean "asrkf"? '
        "(known: full, asrkf, paper, window, random, flag-all, refreekv, kvzip, quality, default, aggressive)"
    )
    assert "llama-cpp-python's Llama ignores it" in refused_line(smollm2, "--rpc-servers", "127.0.0.1:50052")
    assert refused_line(smollm2, "-c", "512", "--kv-pool", "4096") == (
        'asrkf serve: pool of 4096 cells is larger than n_ctx 512: lower kv_pool, or use kv_policy="full"'
    )
    assert refused_line("nothing.gguf").startswith("asrkf serve: nothing.gguf does not exist: pass the path of a GGUF")
    assert refused_line().startswith("asrkf serve: give MODEL")
    assert refused_line(smollm2, "--n-ctx", "-4") == "asrkf serve: n_ctx: Input should be greater than or equal to 0"
    (tmp_path / "models.yaml").write_text("models:\n- model: x\n  kv_pol: 1\n")
    assert "n_ctx would be ignored: put them there" in refused_line("--config-file", str(tmp_path / "models.yaml"), "-c", "512")
    assert "models.0.kv_pol: Extra inputs are not permitted" in refused_line("--config-file", str(tmp_path / "models.yaml"))


def test_without_the_servers_packages_the_error_names_them():
    code = "import sys; sys.modules['uvicorn'] = None; from asrkf_gguf.cli import main; sys.exit(main(%r))"
    result = python(code % ["serve", "smollm2"])
    assert (result.returncode, result.stderr) == (1, 'asrkf serve: the package uvicorn is missing: pip install "asrkf-gguf[serve]"\n')
    assert "serve" in python(code % ["--help"]).stdout  # all other commands do without
