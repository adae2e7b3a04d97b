#!/usr/bin/env python3
"""Write a GGUF of Llama 3.1 8B's shape with random weights in Q4_0: 4.5 GB, in seconds, with little memory.

    scripts/make_llama3.py OUT.gguf [--layers 32]

It has the true sizes, rope factors, special tokens and chat template. The vocabulary has 128,256 entries, and is made up: bytes, words
that mean nothing, and LLaMA-3's special tokens at their places. Random weights say nothing about quality; they show what fits.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

Q4_0, F32 = gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.F32
BLOCK_VALUES, BLOCK_BYTES = gguf.GGML_QUANT_SIZES[Q4_0]
SUPPLY_BLOCKS = 1 << 20  # random ones, 18 MiB for each spread of values; all matrices take theirs from there

N_VOCAB, FIRST_SPECIAL = 128256, 128000
SPECIAL = {
    "<|begin_of_text|>": 128000, "<|end_of_text|>": 128001, "<|start_header_id|>": 128006, "<|end_header_id|>": 128007, "<|eot_id|>": 128009,
}  # fmt: skip
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n{{ message.content | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """Of the model; as it is, that of Llama 3.1 8B."""

    n_layer: int = 32
    n_embd: int = 4096
    n_head: int = 32
    n_head_kv: int = 8
    n_ff: int = 14336
    n_ctx: int = 131072
    rope_base: float = 500000.0
    has_factors: bool = True


def byte_letters() -> list[str]:
    """The letter that stands for each byte in a vocabulary of GPT-2's kind: itself where it prints, else one after U+00FF."""
    prints = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in prints]
    return [chr(byte) if byte in prints else chr(256 + others.index(byte)) for byte in range(256)]


def vocabulary() -> list[str]:
    """All tokens by id."""
    special = {token: text for text, token in SPECIAL.items()}
    words = (f"w{i}" for i in range(FIRST_SPECIAL - 256))
    return [*byte_letters(), *words, *(special.get(token, f"<|reserved_{token}|>") for token in range(FIRST_SPECIAL, N_VOCAB))]


def rope_factors(n_rotated: int, base: float) -> np.ndarray:
    """What Llama 3.1 divides its frequencies by: 8 where a wave is longer than its first training's 8,192 tokens, 1 where it is
    shorter than a quarter of them, and between these what joins them."""
    wave = 2 * np.pi * base ** (np.arange(0, n_rotated, 2) / n_rotated)
    smooth = np.clip((8192 / wave - 1) / (4 - 1), 0, 1)
    return (1 / ((1 - smooth) / 8 + smooth)).astype(np.float32)


def tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...], float | np.ndarray]]:
    """Name, rows and columns, and the spread of random values; or the values."""
    ones, embd, ff = np.ones(shape.n_embd, dtype=np.float32), shape.n_embd**-0.5, shape.n_ff**-0.5
    n_kv = shape.n_embd // shape.n_head * shape.n_head_kv
    yield "token_embd.weight", (N_VOCAB, shape.n_embd), 1.0
    if shape.has_factors:
        factors = rope_factors(shape.n_embd // shape.n_head, shape.rope_base)
        yield "rope_freqs.weight", factors.shape, factors
    for i in range(shape.n_layer):
        layer = f"blk.{i}."
        yield layer + "attn_norm.weight", ones.shape, ones
        yield layer + "attn_q.weight", (shape.n_embd, shape.n_embd), 1.5 * embd
        yield layer + "attn_k.weight", (n_kv, shape.n_embd), 1.5 * embd
        yield layer + "attn_v.weight", (n_kv, shape.n_embd), embd
        yield layer + "attn_output.weight", (shape.n_embd, shape.n_embd), embd
        yield layer + "ffn_norm.weight", ones.shape, ones
        yield layer + "ffn_gate.weight", (shape.n_ff, shape.n_embd), embd
        yield layer + "ffn_up.weight", (shape.n_ff, shape.n_embd), embd
        yield layer + "ffn_down.weight", (shape.n_embd, shape.n_ff), ff
    yield "output_norm.weight", ones.shape, ones
    yield "output.weight", (N_VOCAB, shape.n_embd), embd


class Weights:
    """Random blocks, made once for each spread, and handed out from a random place each time."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(1)
        self.supplies: dict[float, bytes] = {}

    def pieces(self, n_blocks: int, spread: float) -> Iterator[memoryview]:
        if spread not in self.supplies:
            # a block is a scale in F16 and 16 bytes of nibbles; a value is (nibble - 8) * scale, and nibbles spread by 4.6
            blocks = self.rng.integers(0, 256, (SUPPLY_BLOCKS, BLOCK_BYTES), dtype=np.uint8)
            blocks[:, :2] = np.frombuffer(np.float16(spread / 4.6).tobytes(), dtype=np.uint8)
            self.supplies[spread] = blocks.tobytes()
        supply = memoryview(self.supplies[spread])
        while n_blocks:
            begin = int(self.rng.integers(SUPPLY_BLOCKS))
            n = min(n_blocks, SUPPLY_BLOCKS - begin)
            yield supply[begin * BLOCK_BYTES : (begin + n) * BLOCK_BYTES]
            n_blocks -= n


def add_metadata(writer: gguf.GGUFWriter, shape: Shape, without: tuple[str, ...] = ()) -> None:
    """The model's and the tokenizer's keys; of the tokenizer's not those in `without`."""
    writer.add_context_length(shape.n_ctx)
    writer.add_embedding_length(shape.n_embd)
    writer.add_block_count(shape.n_layer)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_rope_dimension_count(shape.n_embd // shape.n_head)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(N_VOCAB)
    tokens, letters = vocabulary(), byte_letters()
    if "<|eot_id|>" in without:
        tokens[SPECIAL["<|eot_id|>"]] = "<|reserved|>"
    writer.add_tokenizer_model("gpt2")
    if "pre" not in without:
        writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(tokens)
    writer.add_token_types([int(gguf.TokenType.CONTROL if i >= FIRST_SPECIAL else gguf.TokenType.NORMAL) for i in range(N_VOCAB)])
    writer.add_token_merges([f"w {letters[ord('0') + i]}" for i in range(10)])  # so that w0 to w9 can come about
    writer.add_bos_token_id(SPECIAL["<|begin_of_text|>"])
    writer.add_eos_token_id(SPECIAL["<|end_of_text|>"] if "<|eot_id|>" in without else SPECIAL["<|eot_id|>"])
    if "chat_template" not in without:
        writer.add_chat_template(CHAT_TEMPLATE)


def write_llama3(path: Path, shape: Shape = Shape(), without: tuple[str, ...] = ()) -> None:
    """Write the model, piece by piece. without: "pre", "chat_template" or "<|eot_id|>", to make one that lacks it."""
    writer = gguf.GGUFWriter(path, "llama")
    add_metadata(writer, shape, without)
    n_bytes = {}
    for name, size, what in tensors(shape):
        kind = F32 if isinstance(what, np.ndarray) else Q4_0
        stored = gguf.quant_shape_to_byte_shape(size, kind) if kind == Q4_0 else size
        n_bytes[name] = int(np.prod(stored)) * (4 if kind == F32 else 1)
        writer.add_tensor_info(name, stored, np.dtype(np.float32 if kind == F32 else np.uint8), n_bytes[name], raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    weights = Weights()
    with path.open("ab") as out:
        pad(out, writer.data_alignment)
        for _, size, what in tensors(shape):
            for piece in [what.tobytes()] if isinstance(what, np.ndarray) else weights.pieces(int(np.prod(size)) // BLOCK_VALUES, what):
                out.write(piece)
            pad(out, writer.data_alignment)


def pad(out, alignment: int) -> None:
    out.write(bytes(-out.tell() % alignment))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    arguments = parser.parse_args()
    write_llama3(arguments.out, Shape(n_layer=arguments.layers))


if __name__ == "__main__":
    main()
