"""`asrkf run`: a chat on a terminal, and answers to prompts that are given, in a file or piped in."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from terminal import Terminal, terminal

RUN = [sys.executable, "-m", "asrkf_gguf.cli", "run"]
OPTIONS = ["-c", "2048", "--kv-pool", "512", "-t", "1"]
ONE_THREAD = {"n_threads": 1, "n_threads_batch": 1}


def run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run([*RUN, *arguments], input=stdin, capture_output=True, text=True, check=False, timeout=120)


@contextlib.contextmanager
def chat(smollm2: str, *arguments: str, cwd=None) -> Iterator[Terminal]:
    with terminal(*RUN, smollm2, *OPTIONS, *arguments, cwd=cwd) as program:
        program.expect("/help for commands")
        program.expect("> ")
        yield program


def ask(program: Terminal, question: str) -> tuple[str, str]:
    """The answer, and the line of figures behind it."""
    program.type(question + "\n")
    program.expect(question)
    said = program.expect("\n[").removesuffix("\n[").rpartition("\r")[2]  # behind the bar, which is gone then
    return said.strip(), program.expect("]\n> ")


def tokens_read(line: str) -> int:
    return int(re.search(r"(\d+) tokens read", line)[1])


def command(program: Terminal, line: str) -> str:
    """What a command says."""
    program.type(line + "\n")
    program.expect(line)
    return program.expect("\n> ").removesuffix("\n> ").strip()


# a chat

def test_a_chat_remembers_and_reads_what_is_new_only(smollm2, load):
    with chat(smollm2, "-n", "24", "--system", "You are a helpful sailor.") as program:
        first, line = ask(program, "My name is Ada. Say hello.")
        assert first and re.search(r"\d+ tokens read at [\d.]+ tok/s, \d+ generated at [\d.]+ tok/s; pool 512 of 2048 cells", line)
        second, line = ask(program, "What is my name?")
        assert tokens_read(line) < 30 and "were in the cache" in line
        program.type("/quit\n")
        assert program.wait() == 0
    llm = load(smollm2, kv_policy="asrkf", kv_pool=512, **ONE_THREAD)
    messages = [{"role": "system", "content": "You are a helpful sailor."}]
    for question, said in (("My name is Ada. Say hello.", first), ("What is my name?", second)):
        messages.append({"role": "user", "content": question})
        answer = llm.create_chat_completion(messages=messages, max_tokens=24, temperature=0)["choices"][0]["message"]
        assert answer["content"].strip().replace("\n\n", "\n") == said.replace("\n\n", "\n")
        messages.append(answer)


def test_control_c_ends_an_answer_and_not_the_program(smollm2):
    with chat(smollm2) as program:
        program.type("Tell a very long story about the sea and count all its waves.\n")
        program.expect("waves.\n")
        program.expect(" " * 119 + "\r")  # the prompt is read, and its bar is gone
        program.expect(" ")  # it has begun
        program.control("c")
        line = program.expect("]\n> ")
        assert "[interrupted; " in line
        for attempt in range(5):  # readline shows its prompt before it listens, and a key that comes between is lost
            time.sleep(1)
            program.control("c")
            try:
                program.expect("/quit or Control-D leaves\n> ", seconds=10)
                break
            except AssertionError:
                assert attempt < 4
        assert "policy asrkf" in command(program, "/stats")
        program.control("d")
        assert program.wait() == 0
    assert "Traceback" not in program.shown


def test_control_c_while_a_prompt_is_read_takes_the_question_back(smollm2, text, tmp_path):
    saved = {"messages": [{"role": "user", "content": text[:4200]}, {"role": "assistant", "content": "Yes."}]}
    (tmp_path / "long.json").write_text(json.dumps(saved))
    with chat(smollm2, "-n", "8", cwd=tmp_path) as program:
        assert command(program, "/load long.json").startswith("2 messages of long.json")
        program.type("What is it about?\n")
        program.expect("reading the prompt")
        program.control("c")
        line = program.expect("]\n> ")
        assert "[interrupted; " in line and ", 0 generated" in line
        assert command(program, "/save after.json") == "2 messages in after.json"
        _, line = ask(program, "What is it about?")
        assert "interrupted" not in line and "0 tokens frozen" not in line


def test_commands_of_a_chat(smollm2, tmp_path):
    with chat(smollm2, "-n", "12", "--kv-policy", "asrkf,layers=shared", cwd=tmp_path) as program:
        assert "/pin [system|all]: never freeze" in command(program, "/help")
        assert command(program, "/pin") == "there is nothing to pin yet: ask something"
        assert command(program, "/system").startswith("there is no system prompt")
        assert command(program, "/system You speak like a pirate.") == ""
        assert command(program, "/system") == "You speak like a pirate."
        assert re.fullmatch(r"positions 0 to \d+ stay active", command(program, "/pin system"))
        ask(program, "What is rain?")
        begin, end = map(int, re.fullmatch(r"positions (\d+) to (\d+) stay active", command(program, "/pin")).groups())
        assert 8 < begin < end < 80
        assert "policy asrkf: " in command(program, "/stats")
        assert command(program, "/save talk.json") == "3 messages in talk.json"
        messages = json.loads((tmp_path / "talk.json").read_text())["messages"]
        assert [message["role"] for message in messages] == ["system", "user", "assistant"] and messages[1]["content"] == "What is rain?"
        command(program, "/clear")
        ask(program, "What is snow?")
        assert command(program, "/load talk.json").startswith("3 messages of talk.json")
        assert command(program, "/save again.json") == "3 messages in again.json"
        assert (tmp_path / "again.json").read_text() == (tmp_path / "talk.json").read_text()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/stat", "/stat is no command: /help, /stats, "),
        ("/load nothing.json", "nothing.json"),
        ("/load bad.json", "bad.json is no chat: /save writes one"),
        ("/save", "/save needs a file: /save chat.json"),
        ("/pin me", "/pin takes nothing"),
    ],
)
def test_a_command_that_cannot_be_done_is_one_line_and_the_chat_goes_on(smollm2, tmp_path, line, said):
    (tmp_path / "bad.json").write_text('{"messages": [{"role": 1}]}')
    with chat(smollm2, "-n", "4", cwd=tmp_path) as program:
        answer = command(program, line)
        assert said in answer and len(answer.splitlines()) == 1
        assert ask(program, "Hello")[0]


def test_a_pin_that_the_pool_cannot_hold_is_one_line_and_the_chat_goes_on(smollm2):
    with chat(smollm2, "-n", "4", "--system", "You answer briefly. " * 40) as program:
        assert "use layers=shared with a kv_pool of at least 512" in command(program, "/pin system")
        assert ask(program, "Hello")[0]


def test_a_system_prompt_of_some_length_can_be_pinned_in_a_pool_whose_smallest_layers_have_few_cells(smollm2):
    with chat(smollm2, "-n", "4", "--system", "You answer briefly. " * 12) as program:
        assert "stay active" in command(program, "/pin system")
        assert ask(program, "Hello")[0]


def test_a_question_that_the_context_cannot_hold_is_one_line_and_the_chat_goes_on(smollm2, text, tmp_path):
    (tmp_path / "long.json").write_text(json.dumps({"messages": [{"role": "user", "content": text[:12000]}]}))
    with chat(smollm2, "-n", "4", cwd=tmp_path) as program:
        command(program, "/load long.json")
        program.type("So?\n")
        assert re.search(r"\n\d+ tokens do not fit into a context of 2048: give -c \d+ or more\n", program.expect("or more\n"))
        program.expect("> ")
        command(program, "/clear")
        assert ask(program, "Hello")[0]


# one answer

def test_a_prompt_is_answered_on_stdout_and_the_figures_are_one_line_on_stderr(smollm2, text, load):
    result = run(smollm2, *OPTIONS, "-p", text[:3600], "-n", "16")
    expected = load(smollm2, kv_policy="asrkf", kv_pool=512, **ONE_THREAD)(text[:3600], max_tokens=16, temperature=0)["choices"][0]["text"]
    assert (result.returncode, result.stdout) == (0, expected + "\n")
    speeds, cache = result.stderr.splitlines()[-1].split("; ")
    assert re.fullmatch(r"\[\d+ tokens read at [\d.]+ tok/s, 16 generated at [\d.]+ tok/s", speeds)
    assert re.fullmatch(r"pool 512 of 2048 cells, [1-9]\d* tokens frozen, missed attention [\d.]+%\]", cache)


def test_what_is_piped_in_or_in_a_file_is_the_prompt_and_a_question_may_follow(smollm2, tmp_path):
    (tmp_path / "text").write_text("The cat sat on the")
    from_file = run(smollm2, *OPTIONS, "-n", "4", "-f", str(tmp_path / "text")).stdout
    assert from_file.strip()
    assert run(smollm2, *OPTIONS, "-n", "4", stdin="The cat sat on the").stdout == from_file
    assert run(smollm2, *OPTIONS, "-n", "4", "-f", "-", stdin="The cat sat on the").stdout == from_file
    (tmp_path / "latin").write_bytes("Le café est là".encode("latin-1"))  # no UTF-8: read all the same
    piped = subprocess.run([*RUN, smollm2, *OPTIONS, "-n", "4"], stdin=(tmp_path / "latin").open(), capture_output=True, text=True, check=True)
    assert piped.stdout == run(smollm2, *OPTIONS, "-n", "4", "-f", str(tmp_path / "latin")).stdout
    both = run(smollm2, *OPTIONS, "-n", "4", "-f", "-", "-p", "It says:", stdin="The cat sat on the").stdout
    assert both == run(smollm2, *OPTIONS, "-n", "4", "-p", "The cat sat on the\n\nIt says:").stdout


def test_json_has_the_answer_and_every_figure(smollm2, text):
    result = run(smollm2, *OPTIONS, "-n", "8", "--json", "--system", "You answer briefly.", stdin=f"What is this about? {text[:3000]}")
    said = json.loads(result.stdout)
    assert said["text"] and said["answer_tokens"] == 8 and said["finish_reason"] == "length"
    assert said["read_tokens"] == said["prompt_tokens"] > 512
    assert said["kv"]["frozen_cells"] > 0 and said["kv"]["tokens"] == said["prompt_tokens"] + 7 and said["n_ctx"] == 2048
    assert 0 <= said["kv"]["missed_attention_ratio"] < 1


@pytest.mark.parametrize(
    ("arguments", "stdin", "line"),
    [
        (["smollm2"], "", "the prompt is empty: give -p TEXT, -f FILE or text on stdin; on a terminal none of them starts a chat"),
        (["smollm2", "-p", ""], "", "the prompt is empty"),
        (["smollm2", "-f", "nothing.txt"], "", "nothing.txt"),
        (["nothing.gguf", "-p", "x"], "", "nothing.gguf does not exist: pass the path of a GGUF"),
        (["smollm2", "-c", "256", "--kv-policy", "full", "-p", "word " * 300], "", "tokens do not fit into a context of 256: give -c"),
        (["smollm2", "-p", "x", "--kv-policy", "arskf"], "", 'did you mean "asrkf"?'),
        (["smollm2", "-p", "x", "-c", "512", "--kv-pool", "4096"], "",
         'pool of 4096 cells is larger than n_ctx 512: lower kv_pool, or use kv_policy="full"'),
    ],
)
def test_what_cannot_be_run_is_one_line_that_names_what_would_work(smollm2, arguments, stdin, line):
    result = run(*arguments, stdin=stdin)
    assert result.returncode == 1 and result.stdout == ""
    last = result.stderr.splitlines()[-1]
    assert last.startswith("asrkf run: ") and line in last and "Traceback" not in result.stderr


def test_json_without_a_prompt_is_refused_on_a_terminal(smollm2):
    with terminal(*RUN, smollm2, "--json") as program:
        program.expect("asrkf run: --json prints one answer: give -p TEXT, -f FILE or text on stdin")
        assert program.wait() == 1
