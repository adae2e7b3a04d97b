"""Python logging: "asrkf_gguf" has what this package says, "asrkf_gguf.llama_cpp" llama.cpp's lines, each with its level.

Which of llama.cpp's lines there are, `verbose` says, as in llama-cpp-python: all, or errors alone; for all models alike, as the
last one was made. A level that is set on "asrkf_gguf.llama_cpp" goes before it. Where a handler takes a line it is a record;
else llama_cpp prints it on stderr.
"""

from __future__ import annotations

import ctypes
import logging
import threading

import llama_cpp

log = logging.getLogger("asrkf_gguf")
llama_log = logging.getLogger("asrkf_gguf.llama_cpp")
_bindings_log = logging.getLogger("llama-cpp-python")  # llama_cpp keeps verbose as its level

# enum ggml_log_level. (llama_cpp's own table is one off, so that without verbose it prints warnings and no errors: its affair.)
_LEVELS = {1: logging.DEBUG, 2: logging.INFO, 3: logging.WARNING, 4: logging.ERROR}
_CONTINUES = 5


class _Piece(threading.local):
    """What a thread has said of a line so far: llama.cpp says some in pieces."""

    text = ""
    level = logging.INFO


_begun = _Piece()


def _becomes_record(level: int) -> bool:
    least = llama_log.level or _bindings_log.level
    return level >= least and llama_log.isEnabledFor(level) and llama_log.hasHandlers()


def _route(ggml_level: int, text: bytes, user_data: int) -> None:
    level = _begun.level if ggml_level == _CONTINUES else _LEVELS.get(ggml_level, logging.INFO)
    _begun.level = level
    if level < llama_log.level:
        return
    if text.startswith(b"asrkf: pool: ") and _bindings_log.level > logging.DEBUG:
        return  # Llama says it itself; llama_cpp would print it once more, though not verbose
    if not _becomes_record(level):
        _printer(ggml_level, text, user_data)
        return
    *lines, _begun.text = (_begun.text + text.decode(errors="replace")).split("\n")
    for line in lines:
        if line.strip():
            llama_log.log(level, "%s", line)


_printer = llama_cpp.llama_log_callback()
_user_data = ctypes.c_void_p()
llama_cpp.llama_log_get(ctypes.byref(_printer), ctypes.byref(_user_data))
_callback = llama_cpp.llama_log_callback(_route)  # kept: C code has nothing but its address
llama_cpp.llama_log_set(_callback, _user_data)
