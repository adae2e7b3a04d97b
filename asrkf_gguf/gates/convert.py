"""Published gates of Fast KVzip, a PyTorch file of one state_dict a layer, become a file that the engine reads."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from .. import _native
from ..family import loaded_model
from .file import DIM, SINKS, Gate, Gates
from .graph import LayerShape, layer_shapes
from .pytorch import import_torch


def convert(published: Path, model_path: Path) -> Gates:
    """ValueError says what in the file is not as expected, or does not fit the model."""
    layers = read_published(published)  # first: it is quick, and needs no model
    with loaded_model(model_path) as model:
        shapes, fingerprint = layer_shapes(model), _native.fingerprint(model)
        n_layers = llama_cpp.llama_model_n_layer(model)
    if len(layers) == len(shapes):
        states = dict(zip(shapes, layers, strict=True))
    elif len(layers) == n_layers:
        states = {il: layers[il] for il in shapes}
    else:
        raise ValueError(f"{published.name} has gates of {len(layers)} layers, {model_path.name} has {len(shapes)} that can have one")
    gates = {il: gate_of(state, shapes[il], f"{published.name}, layer {il}") for il, state in states.items()}
    return Gates(fingerprint, gates, f"converted from {published.name}")


def read_published(path: Path) -> list[Any]:
    """By layer. Only numbers are read from the file: whatever code a pickle may hold is not run, and refuses it."""
    torch = import_torch()
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give a file of published gates (.pt)")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = " ".join(str(error).split()).split(" WeightsUnpickler error: ")[-1][:200]
        raise ValueError(f"{path.name} is refused: it is no PyTorch file, or reading it would run code from it ({reason})") from error
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path.name} is no whole PyTorch file ({' '.join(str(error).split())[:200]}): fetch it again") from error
    layers = content.get("module") if isinstance(content, dict) else None
    if not isinstance(layers, list) or not layers:
        raise ValueError(f'{path.name} is no file of gates: it holds no list "module" of layers')
    return layers


def gate_of(state: Any, shape: LayerShape, where: str) -> Gate:
    """From a state_dict; ValueError says what differs from what the model needs."""
    if not isinstance(state, dict):
        raise ValueError(f"{where}: there is no gate where the model needs one")
    n_heads, group, n_embd = shape.n_heads_kv, shape.group, shape.n_embd
    expected = {
        "q_proj.weight": ("q_weight", (n_heads * group * DIM, n_embd)), "q_proj.bias": ("q_bias", (n_heads * group * DIM,)),
        "k_proj.weight": ("k_weight", (n_heads * DIM, n_embd)), "q_norm.weight": ("q_norm", (DIM,)), "k_norm.weight": ("k_norm", (DIM,)),
        "k_base": ("sinks", (n_heads, 1, SINKS, DIM)), "b": ("bias", (n_heads, 1, group)),
    }  # fmt: skip
    if missing := [key for key in expected if not hasattr(state.get(key), "shape")]:
        raise ValueError(f"{where}: {', '.join(missing)} missing")
    differing = [f"{key} is {list(state[key].shape)}, not {list(size)}" for key, (_, size) in expected.items() if tuple(state[key].shape) != size]
    if differing:
        raise ValueError(
            f"{where} does not fit a model of {n_embd} numbers a token, {n_heads} KV heads and {group} query heads of each: {'; '.join(differing)}"
        )
    values = {name: np.ascontiguousarray(state[key].float().numpy()) for key, (name, _) in expected.items()}
    return Gate(**{**values, "sinks": values["sinks"][:, 0].copy(), "bias": values["bias"][:, 0].copy()})
