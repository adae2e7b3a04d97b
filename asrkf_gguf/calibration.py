"""A model's calibration: how much each layer's history matters, and which layers score; measured in one pass of the model over a text.

The engine measures and chooses (native/llama/one_pass.h); here are the text, and the side file in the cache folder, which the engine
finds by the model's fingerprint. The side file is JSON.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

import llama_cpp
from tqdm import tqdm

from . import _native
from .family import metadata
from .files import written_whole
from .texts import topics

TEXT_TOKENS = 1024  # twice as many changed the figures by less than another text did


def standard_text() -> str:
    return topics()


def read_tokens(model: Any, text: str, n_tokens: int) -> list[int]:
    """The first tokens of a text by a model's tokenizer; ValueError if there are fewer."""
    vocab = llama_cpp.llama_model_get_vocab(model)
    if llama_cpp.llama_vocab_type(vocab) == llama_cpp.LLAMA_VOCAB_TYPE_NONE:
        raise ValueError("the model has no tokenizer")
    data = text[: 16 * n_tokens].encode()
    out = (llama_cpp.llama_token * (len(data) + 8))()
    n = llama_cpp.llama_tokenize(vocab, data, len(data), out, len(out), True, False)
    if n < n_tokens:
        raise ValueError(f"the calibration text has {max(n, 0)} tokens, {n_tokens} are needed: give a longer --text")
    return list(out[:n_tokens])


def measure(model: Any, tokens: list[int], n_threads: Optional[int] = None) -> dict[str, Any]:
    """The side file's content for a loaded model (a llama_model pointer of llama_cpp), with a progress bar on a terminal.

    ValueError or KVError says why a model cannot be calibrated.
    """
    began = time.perf_counter()
    with tqdm(desc="calibrating", unit="layer", file=sys.stderr, disable=not sys.stderr.isatty(), leave=False) as bar:

        def progress(done: int, in_all: int) -> None:
            bar.total = in_all
            bar.update(done - bar.n)

        sensitivities, score_layers = _native.calibrate(model, tokens, n_threads or os.cpu_count() or 1, progress)
    return {
        "format": "asrkf-calibration",
        "version": 2,
        "model": _native.fingerprint(model),
        "model_name": model_name(model),
        "sensitivities": sensitivities,
        "unit": f"change of a layer's output with a fifth of its history, relative to the residual stream, squared; {len(tokens)} tokens",
        "score_layers": score_layers,
        "seconds": round(time.perf_counter() - began, 1),
    }


def model_name(model: Any) -> str:
    """What a person calls a loaded model: its name in the GGUF, architecture, size and type."""
    out = ctypes.create_string_buffer(256)
    llama_cpp.llama_model_desc(model, out, len(out))
    return ", ".join(filter(None, [metadata(model, "general.name"), out.value.decode(errors="replace")]))


def write_side_file(path: Path, content: dict[str, Any]) -> None:
    """All of it or nothing, whatever interrupts. OSError if it cannot be written."""
    with written_whole(path) as part:
        part.write_text(json.dumps(content, indent=1) + "\n")


@contextlib.contextmanager
def calibrating(n_threads: Optional[int]) -> Iterator[None]:
    """In its with block, contexts of this thread whose model has no calibration get one: made now, and kept in the cache folder.

    Without one, by whatever reason, budgets are a guess by depth, and a warning says why. Control-C is raised behind the block.
    """
    stopped: list[BaseException] = []
    scratch = contextlib.ExitStack()

    def calibrate(_user: Any, model: Any, out: Any, size: int) -> int:
        try:
            file = _make(int(_native.ffi.cast("uintptr_t", model)), n_threads, scratch)
            _native.ffi.memmove(out, os.fsencode(file) + b"\0", len(os.fsencode(file)) + 1)
            return 0
        except Exception as error:
            warnings.warn(f"no calibration of this model ({error}): budgets and scoring layers are a guess by depth", stacklevel=2)
            return 1
        except BaseException as error:  # Control-C
            stopped.append(error)
            return 2

    callback = _native.ffi.callback("asrkf_calibrator", calibrate)
    _native.check(_native.lib.asrkf_next_calibrator(callback, _native.ffi.NULL))
    try:
        with scratch:
            yield
    finally:
        _native.lib.asrkf_next_calibrator(_native.ffi.NULL, _native.ffi.NULL)
        if stopped:
            raise stopped[0]


def _make(model: Any, n_threads: Optional[int], scratch: contextlib.ExitStack) -> Path:
    """The side file of a model, in a folder that ends with scratch if it cannot be kept."""
    tokens = read_tokens(model, standard_text(), TEXT_TOKENS)
    path = _native.calibration_file(model)
    print(f"asrkf: calibrating this model, once: {path}", file=sys.stderr)
    content = measure(model, tokens, n_threads)
    try:
        write_side_file(path, content)
    except OSError as error:
        warnings.warn(f"the calibration cannot be kept ({error}): it is made anew the next time", stacklevel=2)
        path = Path(scratch.enter_context(tempfile.TemporaryDirectory())) / path.name
        write_side_file(path, content)
    return path
