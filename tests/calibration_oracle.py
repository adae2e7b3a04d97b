"""What the calibration's pass computes, from a GGUF's weights with NumPy: LLaMA's graph, or Gemma 3's (a norm behind the attention, windows)."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

CHUNK, SINKS, KEPT_RATIO, FIRST = 8, 4, 0.2, 256


def rms(x: np.ndarray, epsilon: float = 1e-5) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + epsilon)


def rope(x: np.ndarray, base: float, halves: bool) -> np.ndarray:
    """Of [tokens, heads, head]; pairs are neighbours, or one of each half."""
    n, _, head = x.shape
    angle = np.arange(n)[:, None] * base ** (-np.arange(0, head, 2) / head)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    even, odd = (x[..., : head // 2], x[..., head // 2 :]) if halves else (x[..., ::2], x[..., 1::2])
    first, second = even * cos - odd * sin, even * sin + odd * cos
    return np.concatenate([first, second], -1) if halves else np.stack([first, second], -1).reshape(x.shape)


def kept_tokens(probability: np.ndarray, chunk: int) -> np.ndarray:
    """Sinks, a window of half of them, the best by the two chunks of queries before: of [heads, queries, tokens]."""
    n_history = chunk * CHUNK
    n_kept = int(np.float32(KEPT_RATIO) * np.float32(n_history))
    kept = np.zeros(probability.shape[-1], bool)
    kept[:SINKS] = True
    kept[n_history - n_kept // 2 :] = True
    score = probability[:, n_history - 2 * CHUNK : n_history].mean((0, 1))
    rest = np.flatnonzero(~kept)
    kept[rest[np.argsort(-score[rest], kind="stable")[: n_kept - n_kept // 2 - SINKS]]] = True
    return kept


class Model:
    def __init__(self, path: str | Path) -> None:
        reader = gguf.GGUFReader(path)
        self.w = {t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float64) for t in reader.tensors}
        self.arch = reader.fields["general.architecture"].contents()
        value = lambda key: reader.fields[f"{self.arch}.{key}"].contents()  # noqa: E731
        self.n_layers, self.n_heads, self.n_kv = value("block_count"), value("attention.head_count"), value("attention.head_count_kv")
        self.is_gemma = self.arch == "gemma3"
        self.window = value("attention.sliding_window") if self.is_gemma else 0

    def is_windowed(self, il: int) -> bool:
        return self.is_gemma and il % 6 != 5

    def losses(self, tokens: list[int]) -> dict[int, float]:
        """By layer without a window."""
        embedded = self.w["token_embd.weight"][tokens]
        x = embedded * np.sqrt(embedded.shape[1]) if self.is_gemma else embedded
        changes, streams, inputs = {}, {}, []
        for il in range(self.n_layers):
            inputs.append((x * x).sum(1))
            added, changed = self.attention(il, x)
            x = x + added
            if changed is not None:
                changes[il], streams[il] = ((changed - added) ** 2).sum(1), (x * x).sum(1)
            x = x + self.feed_forward(il, x)
        found = {}
        for il, change in changes.items():
            next_input = inputs[il + 1] if il + 1 < self.n_layers else streams[il]
            found[il] = float((change / np.sqrt(streams[il] * next_input))[FIRST:].mean())
        return found

    def attention(self, il: int, x: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """What the layer adds to the residual stream, with all of the history and with a part of it."""
        n, own = len(x), lambda name: self.w[f"blk.{il}.{name}.weight"]
        normed = rms(x) * own("attn_norm")
        q, k, v = (normed @ own(f"attn_{name}").T for name in "qkv")
        q, k, v = q.reshape(n, self.n_heads, -1), k.reshape(n, self.n_kv, -1), v.reshape(n, self.n_kv, -1)
        if self.is_gemma:
            q, k = rms(q) * own("attn_q_norm"), rms(k) * own("attn_k_norm")
        q, k = (rope(part, 10000.0, self.is_gemma) for part in (q, k))
        group = self.n_heads // self.n_kv
        k, v = np.repeat(k, group, 1), np.repeat(v, group, 1)
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(q.shape[-1])
        distance = np.arange(n)[:, None] - np.arange(n)
        scores[:, (distance < 0) | (self.is_windowed(il) & (distance >= self.window))] = -np.inf
        probability = np.exp(scores - scores.max(-1, keepdims=True))
        probability /= probability.sum(-1, keepdims=True)

        def output(p: np.ndarray) -> np.ndarray:
            y = np.einsum("hqk,khd->qhd", p, v).reshape(n, -1) @ own("attn_output").T
            return rms(y) * own("post_attention_norm") if self.is_gemma else y

        if self.is_windowed(il):
            return output(probability), None
        part = probability.copy()
        for chunk in range(FIRST // CHUNK, n // CHUNK):
            part[:, chunk * CHUNK : (chunk + 1) * CHUNK, ~kept_tokens(probability, chunk)] = 0
        return output(probability), output(part / part.sum(-1, keepdims=True))

    def feed_forward(self, il: int, x: np.ndarray) -> np.ndarray:
        own = lambda name: self.w[f"blk.{il}.{name}.weight"]  # noqa: E731
        normed = rms(x) * own("ffn_norm")
        gate, up = normed @ own("ffn_gate").T, normed @ own("ffn_up").T
        if self.is_gemma:
            gate = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
            return rms((gate * up) @ own("ffn_down").T) * own("post_ffw_norm")
        return (gate / (1 + np.exp(-gate)) * up) @ own("ffn_down").T
