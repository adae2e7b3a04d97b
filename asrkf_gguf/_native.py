"""The C API (asrkf.h) through cffi, of the libllama that llama_cpp has loaded."""

from __future__ import annotations

import ctypes
import enum
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Optional

import cffi

from ._compat import loaded_library

PACKAGE = Path(__file__).resolve().parent
LIBRARY = loaded_library()
LIBRARY_FOLDER = LIBRARY.parent
PROGRAM_FOLDER = LIBRARY_FOLDER.parent / "bin"  # llama.cpp's programs, if the build has some (ASRKF_PROGRAMS)


def _declarations() -> str:
    """asrkf.h without its preprocessor lines: cffi reads C declarations only."""
    lines, skipping = [], False
    for line in (LIBRARY_FOLDER / "asrkf.h").read_text().splitlines():
        stripped = line.strip()
        if stripped == "#ifdef __cplusplus":
            skipping = True
        elif skipping:
            skipping = stripped != "#endif"
        elif not stripped.startswith("#"):
            lines.append(line.replace("ASRKF_API ", ""))
    return "\n".join(lines)


ffi = cffi.FFI()
ffi.cdef(_declarations())
lib: Any = ffi.dlopen(str(LIBRARY))


class KVStatus(enum.IntEnum):
    """Why the cache refused or failed: enum asrkf_status of asrkf.h, where each is explained."""

    OK = 0
    INVALID_ARGUMENT = 1
    NO_POLICY = 2
    PROTECTED = 3
    POOL_FULL = 4
    HOST_LIMIT = 5
    UNSUPPORTED = 6
    MOVE_FAILED = 7
    INTERNAL = 8


class KVError(RuntimeError):
    """The KV cache refused or failed; nothing was lost."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = KVStatus(status)

    def __reduce__(self) -> tuple[type, tuple[str, int]]:
        return type(self), (str(self), self.status)  # a pickle makes it from both again


def last_error() -> str:
    """Text of the last failure on this thread, "" if there was none."""
    return ffi.string(lib.asrkf_last_error()).decode()


def last_status() -> KVStatus:
    """Of the last failure on this thread; INTERNAL where llama.cpp failed and the cache had no reason for it."""
    return KVStatus(lib.asrkf_last_status() or KVStatus.INTERNAL)


def check(status: int) -> None:
    """Raise ValueError for an invalid argument, KVError for any other failure."""
    if status == KVStatus.OK:
        return
    if status == KVStatus.INVALID_ARGUMENT:
        raise ValueError(last_error())
    raise KVError(last_error(), status)


def struct(name: str) -> Any:
    """A zeroed struct of the C API with its struct_size set."""
    value = ffi.new(f"struct {name} *")
    value.struct_size = ffi.sizeof(f"struct {name}")
    return value


def context_pointer(context: Any) -> Any:
    """llama_cpp's context (a ctypes pointer) as cffi's."""
    address = context if isinstance(context, int) else ctypes.cast(context, ctypes.c_void_p).value
    return ffi.cast("struct llama_context *", address or 0)


def parse_config(text: str) -> Any:
    """A struct asrkf_config from "name,key=value,..."; ValueError names key, value and range."""
    config = struct("asrkf_config")
    check(lib.asrkf_config_parse(text.encode(), config))
    return config


def format_config(config: Any) -> str:
    """The whole configuration as a string that parse_config() reads."""
    out = ffi.new("char[]", 8192)
    check(lib.asrkf_config_format(config, out, 8192))
    return ffi.string(out).decode()


def default_score_layers(n_layers: int) -> list[int]:
    """Which of so many layers score where that was not measured; ValueError without any."""
    out, n = ffi.new("uint32_t[]", n_layers or 1), ffi.new("size_t *")
    check(lib.asrkf_default_score_layers(n_layers, out, n_layers, n))
    return list(out[0 : n[0]])


def model_pointer(model: Any) -> Any:
    """llama_cpp's model (a ctypes pointer) as cffi's."""
    address = model if isinstance(model, int) else ctypes.cast(model, ctypes.c_void_p).value
    return ffi.cast("struct llama_model *", address or 0)


def fingerprint(model: Any) -> str:
    """The engine's name for a loaded model (a llama_model pointer of llama_cpp): shape and norm weights."""
    out = ffi.new("char[]", 128)
    check(lib.asrkf_model_fingerprint(model_pointer(model), out, 128))
    return ffi.string(out).decode()


def calibration_file(model: Any) -> Path:
    """Where the engine looks for a loaded model's side file, which need not exist."""
    out = ffi.new("char[]", 4096)
    check(lib.asrkf_calibration_file(model_pointer(model), out, 4096))
    return Path(ffi.string(out).decode())


def gates_file(model: Any) -> Path:
    """The same of its gates."""
    out = ffi.new("char[]", 4096)
    check(lib.asrkf_gates_file(model_pointer(model), out, 4096))
    return Path(ffi.string(out).decode())


def calibrate(
    model: Any, tokens: Sequence[int], n_threads: int = 0, progress: Optional[Callable[[int, int], None]] = None
) -> tuple[list[float], list[int]]:
    """Sensitivities of a loaded model's layers, and which of them score (asrkf_calibrate of asrkf.h). What progress raises stops
    the pass, and is raised; ValueError and KVError say what else there is against it."""
    stopped: list[BaseException] = []

    def step(_user: Any, done: int, in_all: int) -> int:
        try:
            if progress:
                progress(done, in_all)
        except BaseException as error:  # Control-C, too, arrives here
            stopped.append(error)
        return len(stopped)

    most = 4096
    sensitivities, layers, n = ffi.new("double[]", most), ffi.new("uint32_t[]", most), ffi.new("size_t[2]")
    callback = ffi.callback("asrkf_progress", step)
    status = lib.asrkf_calibrate(
        model_pointer(model), list(tokens), len(tokens), n_threads, callback, ffi.NULL, sensitivities, layers, most, n, n + 1
    )
    if stopped:
        raise stopped[0]
    check(status)
    return list(sensitivities[0 : n[0]]), list(layers[0 : n[1]])


@functools.cache
def config_table() -> list[dict[str, Any]]:
    """The rows of the configuration table: name, kind, choices, minimum, maximum, doc."""
    rows: list[dict[str, Any]] = []
    row = struct("asrkf_field")
    while lib.asrkf_config_field(len(rows), row) == KVStatus.OK:
        text = {key: ffi.string(getattr(row, key)).decode() for key in ("name", "kind", "choices", "doc")}
        rows.append({**text, "minimum": row.minimum, "maximum": row.maximum})
    lib.asrkf_clear_error()
    return rows
