"""One pass of the model says how much each layer's history matters: against NumPy, and what is done about bad input."""

from __future__ import annotations

from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from calibration_oracle import Model
from make_models import write_tiny
from test_windowed import tokens, write_gemma3

from asrkf_gguf import _native


def write_quantised(path: Path) -> None:
    write_tiny(path.with_suffix(".f16"), n_layer=3, n_head_kv=1)
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    assert llama_cpp.llama_model_quantize(str(path.with_suffix(".f16")).encode(), str(path).encode(), parameters) == 0


# and how far the figures may be off: activations are rounded, to 8 bits where weights are quantised
MODELS = {
    "grouped queries": (lambda path: write_tiny(path, n_layer=4), 0.01),
    "one head each": (lambda path: write_tiny(path, n_head_kv=4), 0.01),
    "quantised weights": (write_quantised, 0.05),
    "windows, a norm behind the attention": (lambda path: write_gemma3(path, n_layer=8), 0.02),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_layers_loss_is_what_numpy_computes_from_the_weights(load, tmp_path, name):
    write, tolerance = MODELS[name]
    path = tmp_path / "model.gguf"
    write(path)
    text = tokens(768)
    expected = Model(path).losses(text)
    found, scoring = _native.calibrate(load(str(path), kv_policy="full", n_ctx=256).model, text, 2)
    np.testing.assert_allclose(found, list(expected.values()), rtol=tolerance)
    assert scoring and set(scoring) <= set(expected) and scoring == sorted(scoring)
