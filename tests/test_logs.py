"""llama.cpp's lines are records of Python's logging where a handler takes them, and on stderr as llama-cpp-python users expect."""

from __future__ import annotations

import ctypes
import logging

import llama_cpp
import pytest
from conftest import python

LLAMA_CPP = "asrkf_gguf.llama_cpp"
LOAD = "from asrkf_gguf import Llama; llm = Llama({model!r}, n_ctx=512, verbose={verbose}, kv_policy='full'); llm.close()"


def stderr_of(model: str, verbose: bool, before: str = "") -> str:
    result = python(f"{before}\n{LOAD.format(model=model, verbose=verbose)}")
    assert result.returncode == 0, result.stderr
    return result.stderr


def test_without_logging_verbose_means_what_it_means_in_llama_cpp_python(tiny):
    assert "llama_model_loader: loaded meta data" in stderr_of(tiny, verbose=True)
    assert stderr_of(tiny, verbose=False) == ""


def test_with_logging_each_line_is_a_record_with_its_level_and_none_is_said_twice(tiny):
    before = "import logging; logging.basicConfig(level=logging.DEBUG, format='%(name)s/%(levelname)s: %(message)s')"
    lines = stderr_of(tiny, verbose=True, before=before).splitlines()
    (loaded,) = [line for line in lines if "loaded meta data" in line]
    assert loaded.startswith(f"{LLAMA_CPP}/INFO: llama_model_loader: loaded meta data")
    assert not any("loaded meta data" in line for line in stderr_of(tiny, verbose=False, before=before).splitlines())


def test_a_level_of_its_own_goes_before_verbose(tiny, load, caplog):
    with caplog.at_level(logging.INFO, logger=LLAMA_CPP):
        load(tiny, n_ctx=512, kv_policy="full")  # verbose=False
    assert any(record.name == LLAMA_CPP and "loaded meta data" in record.getMessage() for record in caplog.records)
    caplog.clear()
    with caplog.at_level(logging.CRITICAL, logger=LLAMA_CPP):
        load(tiny, n_ctx=512, kv_policy="full", verbose=True)
    assert not caplog.records


@pytest.fixture(autouse=True)
def records_reach_the_root(monkeypatch):
    """As in a fresh process: the command line's main, which other tests call in this one, prints llama.cpp's lines itself."""
    monkeypatch.setattr(logging.getLogger(LLAMA_CPP), "propagate", True)


@pytest.fixture
def say():
    """A line as llama.cpp says it: level of ggml, text."""
    callback, user_data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(callback), ctypes.byref(user_data))
    return lambda level, text: callback(level, text, user_data)


def test_levels_are_those_of_logging_and_pieces_make_one_record(say, caplog):
    with caplog.at_level(logging.DEBUG, logger=LLAMA_CPP):
        for level in (1, 2, 3, 4):
            say(level, b"a line\n")
        say(3, b"one ")
        say(5, b"line")
        say(5, b"\nand another\n\n")
    said = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert said[:4] == [(level, "a line") for level in ("DEBUG", "INFO", "WARNING", "ERROR")]
    assert said[4:] == [("WARNING", "one line"), ("WARNING", "and another")]
