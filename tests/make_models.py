"""Write GGUF models with random weights for tests: a tiny one, and one with the shape of LLaMA-3 8B.

    make_models.py tiny OUT.gguf        and with --gates OUT: random gates of it
    make_models.py llama3 OUT.gguf --vocab ggml-vocab-llama-bpe.gguf [--layers 2]

Random weights say nothing about quality; they exercise shapes, cache types and memory.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import numpy as np

if TYPE_CHECKING:
    from asrkf_gguf.gates.file import Gate, Gates


def random_tensor(rng: np.random.Generator, shape: tuple[int, ...], kind: gguf.GGMLQuantizationType, scale: float) -> np.ndarray:
    """Rows of random values with standard deviation about `scale`, stored as `kind` (F32, F16 or Q4_0)."""
    if kind == gguf.GGMLQuantizationType.Q4_0:
        # a block is a F16 scale and 16 bytes of nibbles, value (nibble - 8) * scale: random bytes are random weights
        n_blocks = int(np.prod(shape)) // 32
        blocks = np.empty((n_blocks, 18), dtype=np.uint8)
        blocks[:, :2] = np.frombuffer(np.float16(scale / 4.6).tobytes(), dtype=np.uint8)
        blocks[:, 2:] = rng.integers(0, 256, (n_blocks, 16), dtype=np.uint8)
        return blocks.reshape(*shape[:-1], shape[-1] // 32 * 18)
    dtype = np.float16 if kind == gguf.GGMLQuantizationType.F16 else np.float32
    return (rng.standard_normal(shape, dtype=np.float32) * scale).astype(dtype)


def write_llama(
    path: Path, *, n_layer: int, n_embd: int, n_head: int, n_head_kv: int | list[int], n_ff: int, n_vocab: int, n_ctx: int,
    rope_base: float, kind: gguf.GGMLQuantizationType, vocab: Path | None = None,
    arch: str = "llama", metadata: dict[str, int | float | bool | str] | None = None,
    extra: dict[str, tuple[int, ...]] | None = None, without: tuple[str, ...] = (),
    matrices: dict[str, tuple[int, ...]] | None = None, values: dict[str, np.ndarray] | None = None,
    kind_of: Callable[[str], gguf.GGMLQuantizationType] | None = None, untied: bool = False,
) -> None:
    """Write a `llama` model (RMSNorm, SwiGLU, RoPE, GQA, tied embeddings), or one of another architecture that differs by
    some metadata, extra F32 tensors of ones ("%d" in a name: one a layer), random matrices and F32 tensors of given values,
    and tensors that it is without (of layers: in all). n_head_kv may be a list: one a layer; a layer with none has no q, k and v.
    With kind_of, each matrix has the type that it says, and the file is a header and a hole: all weights are zeros, and take no space.
    """
    heads_kv = n_head_kv if isinstance(n_head_kv, list) else [n_head_kv] * n_layer
    rng = np.random.default_rng(1)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(n_ctx)
    writer.add_embedding_length(n_embd)
    writer.add_block_count(n_layer)
    writer.add_feed_forward_length(n_ff)
    writer.add_head_count(n_head)
    writer.add_head_count_kv(n_head_kv)
    if "rope.dimension_count" not in (metadata or {}):
        writer.add_rope_dimension_count(n_embd // n_head)
    writer.add_rope_freq_base(rope_base)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(n_vocab)
    for key, value in (metadata or {}).items():
        put = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        put(key if key.startswith("tokenizer.") else f"{arch}.{key}", value)
    if vocab is None:
        writer.add_tokenizer_model("no_vocab")
    else:
        for key, field in gguf.GGUFReader(vocab).fields.items():
            if key.startswith("tokenizer."):
                value, types = field.contents(), field.types
                if types[0] == gguf.GGUFValueType.ARRAY:
                    writer.add_array(key, value)
                else:
                    writer.add_key_value(key, value, types[0])

    hole_bytes = 0

    def add(name: str, shape: tuple[int, ...], scale: float) -> None:
        if kind_of is not None:
            add_hole(name, shape, kind_of(name))
            return
        writer.add_tensor(name, random_tensor(rng, shape, kind, scale), raw_dtype=kind)

    def add_hole(name: str, shape: tuple[int, ...], own: gguf.GGMLQuantizationType) -> None:
        nonlocal hole_bytes
        stored = gguf.quant_shape_to_byte_shape(shape, own)
        n_bytes = int(np.prod(stored))
        writer.add_tensor_info(name, stored, np.dtype(np.uint8), n_bytes, raw_dtype=own)
        hole_bytes += -(-n_bytes // writer.data_alignment) * writer.data_alignment

    def add_ones(name: str, shape: tuple[int, ...]) -> None:
        if name.split(".", 2)[-1] in without or name in without:
            return
        if kind_of is not None:
            add_hole(name, shape, gguf.GGMLQuantizationType.F32)
        else:
            writer.add_tensor(name, np.ones(shape, dtype=np.float32))

    head = n_embd // n_head
    add("token_embd.weight", (n_vocab, n_embd), 1.0)
    if untied:
        add("output.weight", (n_vocab, n_embd), n_embd**-0.5)
    add_ones("output_norm.weight", (n_embd,))
    for name, shape in (extra or {}).items():
        for il in range(n_layer if "%d" in name else 1):
            add_ones(name % il if "%d" in name else name, shape)
    for name, shape in (matrices or {}).items():
        add(name, shape, shape[-1] ** -0.5)
    for name, value in (values or {}).items():
        writer.add_tensor(name, value.astype(np.float32))
    for il in range(n_layer):
        add_ones(f"blk.{il}.attn_norm.weight", (n_embd,))
        add_ones(f"blk.{il}.ffn_norm.weight", (n_embd,))
        spread = n_embd**-0.5
        if heads_kv[il] > 0:
            add(f"blk.{il}.attn_q.weight", (n_head * head, n_embd), 1.5 * spread)
            add(f"blk.{il}.attn_k.weight", (heads_kv[il] * head, n_embd), 1.5 * spread)
            add(f"blk.{il}.attn_v.weight", (heads_kv[il] * head, n_embd), spread)
        add(f"blk.{il}.attn_output.weight", (n_embd, n_head * head), spread)
        if "ffn_gate.weight" not in without:
            add(f"blk.{il}.ffn_gate.weight", (n_ff, n_embd), spread)
        add(f"blk.{il}.ffn_up.weight", (n_ff, n_embd), spread)
        add(f"blk.{il}.ffn_down.weight", (n_embd, n_ff), n_ff**-0.5)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    if kind_of is not None:
        writer.write_ti_data_to_file()
        writer.close()
        size = -(-path.stat().st_size // writer.data_alignment) * writer.data_alignment
        with path.open("r+b") as file:
            file.truncate(size + hole_bytes)
        return
    writer.write_tensors_to_file()
    writer.close()


def kind_in_q4_k_m(name: str, n_layer: int) -> gguf.GGMLQuantizationType:
    """Of a matrix in llama.cpp's mixture Q4_K_M."""
    kinds = gguf.GGMLQuantizationType
    layer = int(name.split(".")[1]) if name.startswith("blk.") else -1
    more = layer < n_layer // 8 or layer >= 7 * n_layer // 8 or (layer - n_layer // 8) % 3 == 2
    return kinds.Q6_K if name == "output.weight" or (name.endswith(("attn_v.weight", "ffn_down.weight")) and more) else kinds.Q4_K


def write_llama3_shape(path: Path, n_ctx: int = 8192, n_layer: int = 32, **other: object) -> None:
    """LLaMA-3 8B as Q4_K_M, or 3.1 8B (n_ctx=131072, with its rope factors): a header of the true sizes, no weights."""
    factors = {"rope_freqs.weight": (64,)} if n_ctx > 8192 else {}
    write_llama(path, n_layer=n_layer, n_embd=4096, n_head=32, n_head_kv=8, n_ff=14336, n_vocab=128256, n_ctx=n_ctx, rope_base=500000.0,
                kind=gguf.GGMLQuantizationType.F32, kind_of=lambda name: kind_in_q4_k_m(name, n_layer), untied=True, extra=factors, **other)


def write_tiny(path: Path, n_layer: int = 2, **other: object) -> None:
    """Two layers (or n_layer), four heads of 64 (two KV heads), 256 tokens, no tokenizer: about 2 MB. `other`: see write_llama()."""
    shape = {"n_embd": 256, "n_head": 4, "n_head_kv": 2, "n_ff": 256, "n_vocab": 256, "n_ctx": 32768, "rope_base": 10000.0}
    write_llama(path, n_layer=n_layer, kind=gguf.GGMLQuantizationType.F16, **{**shape, **other})


def write_nearly(path: Path, like: Path, share: float = 3e-4) -> None:
    """A copy whose F16 matrices differ by about this share of each weight: as much as another way of rounding would."""
    shutil.copyfile(like, path)
    reader, rng = gguf.GGUFReader(path, "r+"), np.random.default_rng(3)
    for tensor in reader.tensors:
        if tensor.tensor_type == gguf.GGMLQuantizationType.F16:
            changed = tensor.data.astype(np.float32) * (1 + share * rng.standard_normal(tensor.data.shape, dtype=np.float32))
            tensor.data[:] = changed.astype(np.float16)
    reader.data.flush()


def write_small(path: Path, vocab: Path) -> None:
    """Eight small layers with the vocabulary of SmolLM2's GGUF: for what reads texts."""
    write_llama(path, n_layer=8, n_embd=128, n_head=4, n_head_kv=2, n_ff=128, n_vocab=49152, n_ctx=8192, rope_base=10000.0,
                kind=gguf.GGMLQuantizationType.F16, vocab=vocab, untied=True)  # fmt: skip


def write_llama3(path: Path, vocab: Path, n_layer: int) -> None:
    """LLaMA-3 8B's shape and true vocabulary, n_layer of its 32 layers, Q4_0 (32 layers: about 4.3 GB)."""
    write_llama(path, n_layer=n_layer, n_embd=4096, n_head=32, n_head_kv=8, n_ff=14336, n_vocab=128256, n_ctx=8192,
                rope_base=500000.0, kind=gguf.GGMLQuantizationType.Q4_0, vocab=vocab)


def split(path: Path, n_parts: int) -> list[Path]:
    """The same model in so many parts; the file itself is gone."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(path, reader.fields["general.architecture"].contents(), split_max_tensors=-(-len(reader.tensors) // n_parts))
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(key, field.contents(), field.types[0], field.types[1] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    path.unlink()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(path.parent.glob(f"{path.stem}-*-of-{n_parts:05}.gguf"))


def random_gate(rng: np.random.Generator, n_embd: int, n_heads_kv: int, group: int) -> Gate:
    """Which tells tokens apart: its scores spread over most of 0 to 1. Weights that Q8_0 keeps as they are."""
    dim, n_sinks = 16, 8

    def draw(*shape: int, scale: float = 1.0) -> np.ndarray:
        return (scale * rng.standard_normal(shape)).astype(np.float32)

    def matrix(rows: int) -> np.ndarray:
        kind = gguf.GGMLQuantizationType.Q8_0
        return gguf.quants.dequantize(gguf.quants.quantize(draw(rows, n_embd), kind), kind)

    from asrkf_gguf.gates.file import Gate  # the package is heavier than all else here

    return Gate(
        matrix(n_heads_kv * group * dim), draw(n_heads_kv * group * dim), matrix(n_heads_kv * dim), 1 + draw(dim, scale=0.3),
        1 + draw(dim, scale=0.3), draw(n_heads_kv, n_sinks, dim, scale=0.3), draw(n_heads_kv, group),
    )  # fmt: skip


def write_random_gates(path: Path, model: str, layers=(0, 1), n_embd: int = 256, n_heads_kv: int = 2, group: int = 2) -> Gates:
    """Of a model such as write_tiny()'s."""
    from asrkf_gguf import _native
    from asrkf_gguf.family import loaded_model
    from asrkf_gguf.gates.file import Gates, write_gates

    rng = np.random.default_rng(7)
    with loaded_model(model) as opened:
        made = Gates(_native.fingerprint(opened), {il: random_gate(rng, n_embd, n_heads_kv, group) for il in layers})
    write_gates(path, made)
    return made


def write_lora(path: Path, *, n_layer: int = 2, n_embd: int = 256, rank: int = 4) -> None:
    """A LoRA adapter of random values for the queries and values' projections of write_tiny()'s model."""
    rng = np.random.default_rng(2)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 2.0 * rank)
    for il in range(n_layer):
        for name, n_out in (("attn_q", n_embd), ("attn_v", n_embd // 2)):
            writer.add_tensor(f"blk.{il}.{name}.weight.lora_a", rng.standard_normal((rank, n_embd), dtype=np.float32) * n_embd**-0.5)
            writer.add_tensor(f"blk.{il}.{name}.weight.lora_b", rng.standard_normal((n_out, rank), dtype=np.float32) * 0.3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("kind", choices=["tiny", "llama3", "llama3-header", "llama3.1-header"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--vocab", type=Path, help="GGUF with LLaMA-3's tokenizer")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--gates", type=Path, help="of the tiny one, to be written")
    arguments = parser.parse_args()
    if arguments.kind == "tiny":
        write_tiny(arguments.out)
        if arguments.gates:
            write_random_gates(arguments.gates, str(arguments.out))
    elif arguments.kind.endswith("-header"):
        write_llama3_shape(arguments.out, 8192 if arguments.kind == "llama3-header" else 131072)
    else:
        write_llama3(arguments.out, arguments.vocab, arguments.layers)


if __name__ == "__main__":
    main()
