"""The file of a model's gates: what it holds, where it lies, and what a gate computes, in NumPy.

A GGUF of the architecture "asrkf-gates". Its keys are asrkf.gates.*; each layer with a gate has the seven tensors of Gate.tensors().
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

from .. import _native
from ..family import loaded_model
from ..files import written_whole

ARCHITECTURE, VERSION = "asrkf-gates", 1
DIM, SINKS, NORM_EPS = 16, 16, 1e-6  # of the published gates
_REMEDY = "make them anew with asrkf gates train"


@dataclass(frozen=True)
class Gate:
    """One layer's, all float32. H KV heads, G query heads of each, d numbers a head, S sinks, D of the layer's input."""

    q_weight: np.ndarray
    """[H * G * d, D]; row (h * G + g) * d + j."""
    q_bias: np.ndarray
    """[H * G * d]."""
    k_weight: np.ndarray
    """[H * d, D]."""
    q_norm: np.ndarray
    """[d]."""
    k_norm: np.ndarray
    """[d]."""
    sinks: np.ndarray
    """[H, S, d]: learned keys, which a token's own has to outweigh."""
    bias: np.ndarray
    """[H, G]: added to a token's logit with itself."""

    def __post_init__(self) -> None:
        n_heads, n_sinks, dim = _shape(self.sinks, 3, "sinks")
        group, n_embd = _shape(self.bias, 2, "bias")[1], _shape(self.q_weight, 2, "q_weight")[1]
        expected = {
            "q_weight": (n_heads * group * dim, n_embd), "q_bias": (n_heads * group * dim,), "k_weight": (n_heads * dim, n_embd),
            "q_norm": (dim,), "k_norm": (dim,), "sinks": (n_heads, n_sinks, dim), "bias": (n_heads, group),
        }  # fmt: skip
        for name, shape in expected.items():
            value = getattr(self, name)
            if value.shape != shape:
                raise ValueError(f"a gate's {name} has the shape {list(value.shape)}, {list(shape)} is expected")
            if value.dtype != np.float32 or not np.isfinite(value).all():
                raise ValueError(f"a gate's {name} is not float32, or not finite everywhere")

    @property
    def n_embd(self) -> int:
        return int(self.q_weight.shape[1])

    @property
    def n_heads_kv(self) -> int:
        return int(self.bias.shape[0])

    @property
    def group(self) -> int:
        return int(self.bias.shape[1])

    def scores(self, x: np.ndarray) -> np.ndarray:
        """Of [tokens, D], a layer's normalised input: [tokens, H], between 0 and 1."""
        n_heads, _, dim = self.sinks.shape
        x = x.astype(np.float32)
        q = _rms_norm((x @ self.q_weight.T + self.q_bias).reshape(len(x), n_heads, self.group, dim)) * self.q_norm
        k = _rms_norm((x @ self.k_weight.T).reshape(len(x), n_heads, 1, dim)) * self.k_norm
        own = (q * k).sum(-1) / np.sqrt(dim) + self.bias
        others = q.transpose(1, 0, 2, 3).reshape(n_heads, -1, dim) @ self.sinks.transpose(0, 2, 1) / np.sqrt(dim)
        highest = others.max(-1, keepdims=True)
        among = (np.log(np.exp(others - highest).sum(-1)) + highest[..., 0]).reshape(n_heads, len(x), self.group)
        return (0.5 + 0.5 * np.tanh((own - among.transpose(1, 0, 2)) / 2)).mean(-1)  # a sigmoid that cannot overflow

    def tensors(self, il: int) -> dict[str, np.ndarray]:
        """By their names in the file."""
        return {name: getattr(self, attribute) for name, attribute in _names(il).items()}


@dataclass(frozen=True)
class Gates:
    """A model's."""

    model: str
    """Its fingerprint, as the engine gives it."""
    layers: dict[int, Gate]
    source: str = ""
    """How they were made, in words."""
    tokens: int = 0
    """They were trained on; 0 where that is not known."""
    agreement: float = float("nan")
    """Share of held-out tokens where gate and teacher agree on what is worth keeping; nan where that is not known."""

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("no layer has a gate")
        if list(self.layers) != sorted(self.layers):
            raise ValueError(f"layers {list(self.layers)} are not in ascending order")
        if len({gate.sinks.shape[1:] for gate in self.layers.values()}) > 1:
            raise ValueError("the layers' gates differ in sinks or in numbers a head")


def _shape(value: np.ndarray, n: int, name: str) -> tuple[int, ...]:
    if value.ndim != n:
        raise ValueError(f"a gate's {name} has {value.ndim} dimensions, {n} are expected")
    return value.shape


def _rms_norm(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + NORM_EPS)


def _names(il: int) -> dict[str, str]:
    """Tensors of the file, and which attributes of Gate they are."""
    names = {
        "gate_q.weight": "q_weight", "gate_q.bias": "q_bias", "gate_k.weight": "k_weight", "gate_q_norm.weight": "q_norm",
        "gate_k_norm.weight": "k_norm", "gate_sinks": "sinks", "gate_bias": "bias",
    }  # fmt: skip
    return {f"blk.{il}.{name}": attribute for name, attribute in names.items()}


def write_gates(path: Path, gates: Gates) -> None:
    """All of it or nothing, whatever interrupts. OSError if it cannot be written."""
    n_sinks, dim = next(iter(gates.layers.values())).sinks.shape[1:]
    with written_whole(path) as part:
        writer = gguf.GGUFWriter(part, ARCHITECTURE)
        try:
            writer.add_uint32("asrkf.gates.version", VERSION)
            writer.add_string("asrkf.gates.model", gates.model)
            writer.add_uint32("asrkf.gates.dim", dim)
            writer.add_uint32("asrkf.gates.sinks", n_sinks)
            writer.add_float32("asrkf.gates.norm_eps", NORM_EPS)
            writer.add_key_value("asrkf.gates.layers", list(gates.layers), gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32)
            if gates.source:
                writer.add_string("asrkf.gates.source", gates.source)
            if gates.tokens:
                writer.add_uint32("asrkf.gates.tokens", gates.tokens)
            if np.isfinite(gates.agreement):
                writer.add_float32("asrkf.gates.agreement", gates.agreement)
            for il, gate in gates.layers.items():
                for name, value in gate.tensors(il).items():
                    _add_tensor(writer, name, value)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()


def _add_tensor(writer: gguf.GGUFWriter, name: str, value: np.ndarray) -> None:
    """Matrices in Q8_0; in F16 where their rows are no whole blocks."""
    if not name.endswith(("gate_q.weight", "gate_k.weight")):
        writer.add_tensor(name, np.ascontiguousarray(value))
    elif value.shape[1] % 32:
        writer.add_tensor(name, value.astype(np.float16))
    else:
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)


def read_gates(path: Path) -> Gates:
    """FileNotFoundError without a file; ValueError, with the remedy, for one that is no file of gates, or not whole."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: {_REMEDY}")
    try:
        reader = gguf.GGUFReader(path)
        return _read(reader)
    except KeyError as error:
        raise ValueError(f"{path} has no {error.args[0]}: {_REMEDY}") from error
    except Exception as error:  # a damaged file fails anywhere in the reader
        raise ValueError(f"{path} is no whole file of gates ({error}): {_REMEDY}") from error


def _read(reader: gguf.GGUFReader) -> Gates:
    values = {key: field.contents() for key, field in reader.fields.items()}
    if values["general.architecture"] != ARCHITECTURE:
        raise ValueError(f"its architecture is {values['general.architecture']!r}, not {ARCHITECTURE!r}")
    if values["asrkf.gates.version"] != VERSION:
        raise ValueError(f"its version is {values['asrkf.gates.version']}, this program reads {VERSION}")
    tensors = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32) for tensor in reader.tensors}
    layers = {il: Gate(**{attribute: tensors[name] for name, attribute in _names(il).items()}) for il in values["asrkf.gates.layers"]}
    gates = Gates(
        values["asrkf.gates.model"], layers, values.get("asrkf.gates.source", ""), values.get("asrkf.gates.tokens", 0),
        values.get("asrkf.gates.agreement", float("nan")),
    )  # fmt: skip
    if not np.isclose(values["asrkf.gates.norm_eps"], NORM_EPS):
        raise ValueError(f"its norm_eps is {values['asrkf.gates.norm_eps']}, this program computes with {NORM_EPS}")
    stated = (values["asrkf.gates.sinks"], values["asrkf.gates.dim"])
    if any(gate.sinks.shape[1:] != stated for gate in layers.values()):
        raise ValueError(f"its tensors are not of the {stated[0]} sinks and {stated[1]} numbers a head that it states")
    return gates


def default_file(model_path: Path) -> Path:
    """Where the engine looks for the gates of a model; it need not exist."""
    with loaded_model(model_path, n_gpu_layers=0) as model:
        return _native.gates_file(model)
