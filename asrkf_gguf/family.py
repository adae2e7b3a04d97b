"""What a model file is: why one cannot be loaded, and what is wrong with one of LLaMA-3's family that can."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

import llama_cpp

from . import _compat
from .header import Header, parts_of, read_header

# Beginnings of files that lie where a GGUF was expected.
_OTHERS = {
    b"version https://git-lfs": "a Git LFS pointer: the model itself was not fetched (git lfs pull)",
    b"<": "a web page",
    b"PK\x03\x04": "a PyTorch file or another zip archive: it has to be converted",
    b"tjgg": "a GGML file of before August 2023: it has to be converted anew",
}
_SAFETENSORS = "a safetensors file: it has to be converted, or look for a repository whose name ends in -GGUF"

# LLaMA-3, 3.1, 3.2 and 3.3 share a vocabulary and a chat template.
_PRE_TOKENIZERS = ("llama-bpe", "llama3", "llama-v3")
_N_VOCAB = 128256
_ROPE_BASE = 500000.0
_N_TRAINED = 8192  # of LLaMA-3; what has more has rope factors, or a scaling of its own
_END_OF_TURN = "<|eot_id|>"
_ROPE_FACTORS = "rope_freqs.weight"


def whole_header(path: Path) -> Header:
    """The header of a file that is there in full; ValueError if it is not, or is no GGUF."""
    n_bytes = path.stat().st_size
    with path.open("rb") as file:
        begin = file.read(64)
    if begin[:4] != b"GGUF":
        is_safetensors = begin[8:9] == b"{"
        found = _SAFETENSORS if is_safetensors else next((what for magic, what in _OTHERS.items() if begin.startswith(magic)), "another format")
        raise ValueError(f"{path.name} is not a GGUF file but {found}" if n_bytes else f"{path.name} is empty: fetch it again")
    header = read_header(path)
    if header is None:
        raise ValueError(f"{path.name} ({n_bytes} bytes) has no whole header: truncated or damaged; fetch it again")
    if n_bytes < header.n_bytes:
        raise ValueError(f"{path.name} is truncated: it has {n_bytes} bytes, and needs {header.n_bytes}; fetch it again")
    return header


def refuse(path: Path) -> None:
    """ValueError with the reason if `path` is not a model that llama.cpp can load: not whole, a part, an adapter, another architecture.

    Weights are not read; what can only be found in them passes.
    """
    parts = parts_of(path)
    if path != parts[0]:
        raise ValueError(f"{path.name} is a later part of a model: give the first, {parts[0].name}")
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise ValueError(f"{path.name} is one of {len(parts)} parts, which belong in one folder; missing: {', '.join(missing)}")
    header, *_ = [whole_header(part) for part in parts]
    n_parts = max(1, header.numbers.get("split.count", 1))
    if n_parts != len(parts):
        raise ValueError(f"{path.name} is one of {n_parts} parts: keep their names, NAME-00001-of-{n_parts:05}.gguf")
    kind, architecture = header.strings.get("general.type", "model"), header.strings.get("general.architecture")
    if kind == "adapter":
        raise ValueError(f"{path.name} is a LoRA adapter, not a model: load the model it was made for, with lora_path={path.name!r}")
    if kind == "mmproj" or architecture == "clip":
        raise ValueError(f"{path.name} is a projector of images or sound, not a language model: give the model that it belongs to")
    if kind != "model" or architecture is None:
        raise ValueError(f"{path.name} is not a model: its header names {'no architecture' if architecture is None else f'the type {kind!r}'}")
    if not _loads_vocabulary(path):
        pre = header.strings.get("tokenizer.ggml.pre", "none")
        raise ValueError(f"{path.name}: llama.cpp (that of llama_cpp {llama_cpp.__version__}) does not know its architecture {architecture!r} "
                         f"or its pre-tokenizer {pre!r}")  # fmt: skip


def _load(path: Path, **given: Any) -> Any:
    """With these of llama_cpp's model parameters; null if llama.cpp refuses."""
    parameters = llama_cpp.llama_model_default_params()
    for name, value in given.items():
        setattr(parameters, name, value)
    with _compat.quiet():
        return llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)


def _loads_vocabulary(path: Path) -> bool:
    model = _load(path, vocab_only=True)
    if model:
        llama_cpp.llama_model_free(model)
    return bool(model)


@contextlib.contextmanager
def loaded_model(path: Path, **given: Any) -> Iterator[Any]:
    """A model without a context (a llama_model pointer of llama_cpp), by these of its model parameters; ValueError with the reason if it
    cannot be loaded."""
    model = _load(path, **given)
    if not model:
        refuse(path)
        raise ValueError(f"{path} cannot be loaded as a GGUF model: damaged, or larger than the memory here")
    try:
        yield model
    finally:
        llama_cpp.llama_model_free(model)


def metadata(model: Any, key: str) -> str:
    """Of a loaded model's GGUF; empty if there is none."""
    out = ctypes.create_string_buffer(256)
    n = llama_cpp.llama_model_meta_val_str(model, key.encode(), out, len(out))
    return out.value.decode(errors="replace") if n >= 0 else ""


def _is_llama3(model: Any) -> bool:
    n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    has_pre = metadata(model, "tokenizer.ggml.pre") in _PRE_TOKENIZERS
    return metadata(model, "general.architecture") == "llama" and (has_pre or n_vocab == _N_VOCAB)


def _ends_turns(model: Any) -> bool:
    """Is LLaMA-3's end of a turn a token, and one that ends an answer?"""
    vocab, tokens = llama_cpp.llama_model_get_vocab(model), (llama_cpp.llama_token * 8)()
    n = llama_cpp.llama_tokenize(vocab, _END_OF_TURN.encode(), len(_END_OF_TURN), tokens, len(tokens), False, True)
    return n == 1 and bool(llama_cpp.llama_vocab_is_eog(vocab, tokens[0]))


def chat_format(model: Any) -> Optional[str]:
    """llama_cpp's name for the chat format of a loaded model that brings no template; None if it is not known."""
    return "llama-3" if _is_llama3(model) and _ends_turns(model) else None


def faults(model: Any, path: Path) -> list[str]:
    """What is wrong with a loaded model if it is of LLaMA-3's family; the file is known to be whole."""
    if not _is_llama3(model):
        return []
    found = []
    vocab, n_trained = llama_cpp.llama_model_get_vocab(model), llama_cpp.llama_model_n_ctx_train(model)
    if (n_vocab := llama_cpp.llama_vocab_n_tokens(vocab)) < _N_VOCAB:
        found.append(f"its vocabulary has {n_vocab} tokens, LLaMA-3's has {_N_VOCAB}: it is not whole, or of another model")
    if metadata(model, "tokenizer.ggml.pre") in ("", "default"):
        found.append("it does not name LLaMA-3's pre-tokenizer, so text is cut into wrong tokens: take a newer GGUF")
    if not _ends_turns(model):
        found.append(f"{_END_OF_TURN} is not among the tokens that end an answer: a chat will not stop where it should")
    base = float(metadata(model, "llama.rope.freq_base") or 10000)
    if base < _ROPE_BASE:
        found.append(f"its rope base is {base:g}, LLaMA-3's is {_ROPE_BASE:g}: take a newer GGUF")
    elif base == _ROPE_BASE and n_trained > _N_TRAINED and not metadata(model, "llama.rope.scaling.type"):
        headers = (read_header(part) for part in parts_of(path))
        if not any(header and _ROPE_FACTORS in header.tensors for header in headers):
            found.append(f"it says that it was trained for {n_trained} tokens, but has no rope factors ({_ROPE_FACTORS}): "
                         f"past {_N_TRAINED} it goes wrong; take a newer GGUF")  # fmt: skip
    return found
