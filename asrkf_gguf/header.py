"""The header of a GGUF file, read by ggml's own reader: gguf's, in Python, takes seconds for a vocabulary of 128,256 tokens."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Optional, TypeVar

import cffi

from . import _compat, _native

_ffi = cffi.FFI()
_ffi.cdef("""
struct gguf_init_params { bool no_alloc; void ** ctx; };
struct gguf_context * gguf_init_from_file(const char *, struct gguf_init_params);
void gguf_free(struct gguf_context *);
size_t gguf_get_data_offset(const struct gguf_context *);
int64_t gguf_get_n_kv(const struct gguf_context *);
const char * gguf_get_key(const struct gguf_context *, int64_t);
int gguf_get_kv_type(const struct gguf_context *, int64_t);
const void * gguf_get_val_data(const struct gguf_context *, int64_t);
const char * gguf_get_val_str(const struct gguf_context *, int64_t);
int64_t gguf_get_n_tensors(const struct gguf_context *);
const char * gguf_get_tensor_name(const struct gguf_context *, int64_t);
size_t gguf_get_tensor_offset(const struct gguf_context *, int64_t);
size_t gguf_get_tensor_size(const struct gguf_context *, int64_t);
""")
_lib: Any = _ffi.dlopen(str(_native.LIBRARY))  # a handle finds the symbols of its dependencies, too

_Path = TypeVar("_Path", bound=PurePath)
_STRING = 8
_INTEGERS = {0: "uint8_t", 1: "int8_t", 2: "uint16_t", 3: "int16_t", 4: "uint32_t", 5: "int32_t", 10: "uint64_t", 11: "int64_t"}


@dataclass(frozen=True)
class Header:
    """Strings and integers by their keys, and what the tensors need."""

    strings: dict[str, str]
    numbers: dict[str, int]
    tensors: dict[str, int]
    """Bytes of each."""
    data_offset: int
    """Bytes of the header, from the beginning of the file."""
    n_bytes: int
    """Bytes that the file has at least, with all its tensors."""


def _text(pointer: Any) -> str:
    return _ffi.string(pointer).decode(errors="replace")


def read_header(path: Path) -> Optional[Header]:
    """None if the file holds no whole header."""
    with _compat.quiet():  # ggml says on stderr what it does not like
        context = _lib.gguf_init_from_file(str(path).encode(), {"no_alloc": True, "ctx": _ffi.NULL})
    if context == _ffi.NULL:
        return None
    try:
        strings, numbers = {}, {}
        for i in range(_lib.gguf_get_n_kv(context)):
            key, kind = _text(_lib.gguf_get_key(context, i)), _lib.gguf_get_kv_type(context, i)
            if kind == _STRING:
                strings[key] = _text(_lib.gguf_get_val_str(context, i))
            elif kind in _INTEGERS:
                numbers[key] = int(_ffi.cast(f"{_INTEGERS[kind]} *", _lib.gguf_get_val_data(context, i))[0])
        offset, tensors = _lib.gguf_get_data_offset(context), range(_lib.gguf_get_n_tensors(context))
        sizes = {_text(_lib.gguf_get_tensor_name(context, i)): _lib.gguf_get_tensor_size(context, i) for i in tensors}
        ends = (_lib.gguf_get_tensor_offset(context, i) + size for i, size in enumerate(sizes.values()))
        return Header(strings, numbers, sizes, offset, offset + max(ends, default=0))
    finally:
        _lib.gguf_free(context)


def parts_of(path: _Path) -> list[_Path]:
    """All files of a split GGUF, or the one."""
    match = re.fullmatch(r"(.*)-\d{5}-of-(\d{5})\.gguf", path.name)
    return [path.with_name(f"{match[1]}-{i:05}-of-{match[2]}.gguf") for i in range(1, int(match[2]) + 1)] if match else [path]
