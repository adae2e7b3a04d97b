"""One pass of the model says how much each layer's history matters: against NumPy, and what is done about bad input."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from calibration_oracle import Model
from conftest import python
from make_models import write_tiny
from test_architectures import ARCHITECTURES
from test_windowed import tokens, write_gemma3

from asrkf_gguf import _native, calibrate, calibration
from asrkf_gguf.bench import sensitivities
from asrkf_gguf.cli import calibrations, main
from asrkf_gguf.models import find_side_file
from asrkf_gguf.opening import opening_line


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
    found, scoring = _native.calibrate(load(str(path), kv_policy="full", n_ctx=256).model, text, 1)
    np.testing.assert_allclose(found, list(expected.values()), rtol=tolerance)
    assert scoring and set(scoring) <= set(expected) and scoring == sorted(scoring)


def test_on_a_real_model_the_pass_ranks_the_layers_as_the_measured_divergences_do(load, smollm2):
    """The package's calibration of SmolLM2 is the reference: it ran the model once for each layer."""
    reference = json.loads(find_side_file(Path(smollm2)).read_text())["measured"]
    llm = load(smollm2, kv_policy="full", n_ctx=256)
    found, scoring = _native.calibrate(llm.model, calibration.read_tokens(llm.model, calibration.standard_text(), 1024), 1)
    ranks = [np.argsort(np.argsort(values)) for values in (found, reference)]
    assert np.corrcoef(ranks)[0, 1] > 0.85
    assert len(set(np.argsort(found)[-9:]) & set(np.argsort(reference)[-9:])) >= 7
    assert scoring == _native.default_score_layers(30) and len(scoring) == 4


@pytest.mark.parametrize("arch", [name for name in ARCHITECTURES if name != "command-r"])
def test_the_pass_finds_its_way_through_the_graph_of(load, tmp_path, arch):
    write_tiny(tmp_path / "model.gguf", arch=arch, **ARCHITECTURES[arch])
    sensitivities, scoring = _native.calibrate(load(str(tmp_path / "model.gguf"), kv_policy="full", n_ctx=256).model, tokens(512), 1)
    assert len(sensitivities) == 2 and all(1e-8 < value < 10 for value in sensitivities), sensitivities
    assert scoring == [1]


def test_a_graph_that_uses_a_layers_input_before_its_attention_is_refused(load, tmp_path):
    write_tiny(tmp_path / "model.gguf", arch="command-r", **ARCHITECTURES["command-r"])
    with pytest.raises(_native.KVError, match="no attention that is added to the layer's input"):
        _native.calibrate(load(str(tmp_path / "model.gguf"), kv_policy="full", n_ctx=256).model, tokens(512), 1)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where calibrations are kept in this test. The tiny model has no tokenizer, but a vocabulary of 256."""
    monkeypatch.setenv("ASRKF_CALIBRATIONS", str(tmp_path / "calibrations"))
    monkeypatch.setattr(calibration, "read_tokens", lambda model, text, n_tokens: list(text[:n_tokens].encode()))
    return tmp_path / "calibrations"


OPTIONS = {"kv_policy": "asrkf", "kv_pool": 512, "calibrate": True, "n_threads_batch": 1}


def test_the_first_time_a_model_is_opened_it_is_calibrated_and_then_its_file_is_found(load, tiny, folder, capfd):
    llm = load(tiny, **OPTIONS)
    (file,) = folder.iterdir()
    assert f"calibrating this model, once: {file}" in capfd.readouterr().err
    assert llm.kv_config().calibration == str(file) == str(_native.calibration_file(llm.model))
    made = json.loads(file.read_text())
    assert made["model"] == _native.fingerprint(llm.model) and len(made["sensitivities"]) == 2 and made["score_layers"] == [1]
    assert load(tiny, **OPTIONS).kv_config().calibration == str(file)
    assert load(tiny, **{**OPTIONS, "calibrate": False}).kv_config().calibration == str(file)  # it only makes none
    assert "calibrating" not in capfd.readouterr().err
    one_thread = calibration.measure(llm.model, list(calibration.standard_text()[:1024].encode()), 1)
    assert one_thread["sensitivities"] == pytest.approx(made["sensitivities"], rel=1e-3)
    again = [_native.calibrate(llm.model, tokens(768), 1) for _ in range(2)]
    assert again[0] == again[1]


def test_programs_use_the_file_in_the_cache_folder(load, tiny, folder, monkeypatch):
    load(tiny, **OPTIONS)
    monkeypatch.setenv("LLAMA_KV_POLICY", "asrkf,pool=512")
    program = llama_cpp.Llama(tiny, n_ctx=2048, flash_attn=True, verbose=False)
    config = _native.struct("asrkf_config")
    _native.check(_native.lib.asrkf_get_config(_native.context_pointer(program.ctx), config))
    assert Path(_native.ffi.string(config.calibration).decode()).parent == folder
    program.close()


@pytest.mark.parametrize("other", [{"calibrate": False}, {"kv_policy": "asrkf,calibration=off"}, {"kv_policy": "random"}, {"kv_pool": 1.0}])
def test_nothing_is_calibrated_where_that_is_off_or_of_no_use(load, tiny, folder, other):
    load(tiny, **{**OPTIONS, **other})
    assert not folder.exists()


def by_depth(load, tiny, **options):
    """A model that opens without a calibration, and the warning about it."""
    with pytest.warns(UserWarning) as said:
        llm = load(tiny, **{**OPTIONS, **options})
    assert llm.kv_config().calibration == "off"
    llm.eval(tokens(1200))
    assert llm.kv_stats().frozen_cells > 0
    assert len(said) == 1 and "a guess by depth" in str(said[0].message)
    return str(said[0].message)


def test_a_model_whose_context_is_too_short_is_served_by_depth(load, tmp_path, folder):
    write_tiny(tmp_path / "short.gguf", n_ctx=512)
    assert "trained on 512 tokens" in by_depth(load, str(tmp_path / "short.gguf"))


def test_without_a_tokenizer_a_model_is_served_by_depth(load, tiny):
    assert "no tokenizer" in by_depth(load, tiny)


def test_a_text_that_is_too_short_is_refused_and_the_model_served_by_depth(load, tiny, folder, monkeypatch):
    monkeypatch.setattr(calibration, "standard_text", lambda: "short" * 20)
    assert "a text of 100 tokens is too short" in by_depth(load, tiny)


def test_without_memory_for_the_pass_a_model_is_served_by_depth(load, tiny, folder, monkeypatch):
    def calibrate(*_):
        raise _native.KVError("no memory for the attention of the calibration", 8)

    monkeypatch.setattr(_native, "calibrate", calibrate)
    assert "no memory" in by_depth(load, tiny)


def test_a_damaged_or_foreign_file_in_the_cache_folder_refuses_no_context_and_is_made_anew(load, tiny, folder):
    file = Path(load(tiny, **OPTIONS).kv_config().calibration)
    good = json.loads(file.read_text())
    for bad in ("{", json.dumps({**good, "model": "llama-0"}), json.dumps({**good, "sensitivities": [1, -1]})):
        file.write_text(bad)
        assert load(tiny, **{**OPTIONS, "calibrate": False}).kv_config().calibration == "off"
        assert file.read_text() == bad
        assert load(tiny, **OPTIONS).kv_config().calibration == str(file)
        assert json.loads(file.read_text())["sensitivities"] == good["sensitivities"]


def test_a_damaged_or_foreign_file_that_is_named_is_refused_with_the_reason(load, tiny, folder, tmp_path):
    good = json.loads(Path(load(tiny, **OPTIONS).kv_config().calibration).read_text())
    for bad, reason in (({**good, "model": "llama-0"}, "made for another model"), ({**good, "sensitivities": [1, -1]}, "is not positive")):
        (tmp_path / "bad.json").write_text(json.dumps(bad))
        with pytest.raises(ValueError, match=reason):
            load(tiny, kv_policy=f"asrkf,calibration={tmp_path / 'bad.json'}", kv_pool=512)


def test_a_cache_folder_that_cannot_be_written_costs_the_file_but_not_the_calibration(load, tiny, folder, monkeypatch):
    folder.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="cannot be kept"):
        llm = load(tiny, **OPTIONS)
    assert llm.kv_config().calibration not in (None, "off")
    assert not Path(llm.kv_config().calibration).exists()


def test_an_interrupted_calibration_leaves_nothing_half_written(load, tiny, folder, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(calibration.tqdm, "update", stop)
        with pytest.raises(KeyboardInterrupt):
            load(tiny, **OPTIONS)
        assert not folder.exists()
    with monkeypatch.context() as patch:
        patch.setattr(calibration.os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            load(tiny, **OPTIONS)
        assert not list(folder.iterdir())
    assert load(tiny, **OPTIONS).kv_config().calibration


# which there are

def test_the_command_shows_which_calibrations_there_are_and_of_which_models(load, tiny, folder, capsys):
    assert main(["calibrations"]) == 0
    (packaged,) = capsys.readouterr().out.splitlines()[2:]
    assert packaged.split()[:2] == ["SmolLM2-135M-Instruct.Q4_1.gguf", "30"] and "5, 14, 21, 28" in packaged
    llm = load(tiny, **OPTIONS)
    (folder / "damaged.asrkf.json").write_text("{")
    assert main(["calibrations", "--json"]) == 0
    known = {Path(content["file"]).name: content for content in json.loads(capsys.readouterr().out)}
    assert known["damaged.asrkf.json"]["damaged"].startswith("Expecting property name")
    own = known[Path(llm.kv_config().calibration).name]
    assert own["model"] == _native.fingerprint(llm.model) and own["model_name"].startswith("llama ")
    assert main(["calibrations"]) == 0
    shown = capsys.readouterr().out
    assert own["model_name"] in shown and "damaged: Expecting" in shown


def test_the_command_says_which_calibration_a_model_has(load, tiny, folder, tmp_path, capsys):
    assert main(["calibrations", tiny]) == 0
    assert capsys.readouterr().out == f"tiny.gguf has no calibration: asrkf calibrate {tiny}\n"
    load(tiny, **OPTIONS)
    assert main(["calibrations", tiny]) == 0
    assert str(next(folder.iterdir())) in capsys.readouterr().out
    model = tmp_path / "model.gguf"
    model.write_bytes(Path(tiny).read_bytes())
    beside = tmp_path / "model.asrkf.json"
    beside.write_bytes(next(folder.iterdir()).read_bytes())
    assert main(["calibrations", str(model)]) == 0
    assert str(beside) in capsys.readouterr().out


def test_the_folder_is_the_engines(load, tiny, monkeypatch):
    model = load(tiny, kv_policy="full").model
    assert calibrations.folder() == _native.calibration_file(model).parent
    monkeypatch.delenv("ASRKF_CALIBRATIONS")
    assert calibrations.folder() == _native.calibration_file(model).parent


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, r"tiny.gguf: policy asrkf, pool 512 of 2048 cells, calibrated \(.*\.asrkf\.json\)"),
        ({"kv_policy": "asrkf,calibration=off"}, "tiny.gguf: policy asrkf, pool 512 of 2048 cells, not calibrated: .* asrkf calibrate .*"),
        ({"kv_pool": 1.0}, "tiny.gguf: policy asrkf, pool 2048 of 2048 cells, nothing will be frozen, so it needs no calibration"),
        ({"kv_policy": "window"}, "tiny.gguf: policy window, pool 512 of 2048 cells, which needs no calibration"),
        ({"kv_policy": "full", "kv_pool": None}, "tiny.gguf: upstream's cache, which needs no calibration"),
    ],
)
def test_the_first_line_says_whether_a_model_is_calibrated(load, tiny, folder, options, said):
    assert re.fullmatch(said, opening_line(load(tiny, **{**OPTIONS, **options})))


@pytest.fixture
def bytes_as_tokens(monkeypatch):
    """The models made here have no tokenizer, but a vocabulary of 256."""
    def read(model, text, n_tokens):
        return list(text.encode()[:n_tokens])

    monkeypatch.setattr(llama_cpp.Llama, "tokenize", lambda self, text, **_: list(text))
    for module in (calibrate, sensitivities):
        monkeypatch.setattr(module, "read_tokens", read)


@pytest.fixture
def plain_differences(monkeypatch):
    """Models with random weights are so sure of the next token that KL divergences round to 0; log-probabilities do differ."""
    for module in (calibrate, sensitivities):
        monkeypatch.setattr(module, "mean_divergence", lambda reference, other: float(np.abs(reference - other).mean()))


def test_the_reference_measures_the_layers_of_a_windowed_model_that_see_everything(tmp_path, text, bytes_as_tokens, plain_differences):
    model = Path(write_gemma3(tmp_path / "twelve.gguf", 12))
    content = calibrate.calibrate_thoroughly(model, text, threads=2, n_gpu_layers=0)
    assert len(content["sensitivities"]) == 2 and min(content["measured"]) > 1e-4
    assert content["score_layers"] in ([5], [11])
    assert {layer for entry in content["score_layers_tried"] for layer in entry["layers"]} == {5, 11}


def bench_arguments(tmp_path, model, source, **other):
    arguments = {
        "model": Path(model), "threads": 2, "n_gpu_layers": 0, "text": [f"own={source}"], "length": 1024, "positions": 256, "cells": None,
        "out": tmp_path / "rows.csv", "again": False,
    }  # fmt: skip
    return argparse.Namespace(**{**arguments, **other})


def test_the_bench_measures_each_layer_with_few_cells_and_measures_nothing_twice(tmp_path, text, bytes_as_tokens, plain_differences, monkeypatch):
    source = tmp_path / "own.txt"
    source.write_text(text[:5000])
    model = write_gemma3(tmp_path / "twelve.gguf", 12)
    arguments = bench_arguments(tmp_path, model, source, cells=[256, 512])
    rows = sensitivities.Sensitivities(arguments).run()
    assert [(row["layer"], row["cells"]) for row in rows] == [(5, 256), (11, 256), (5, 512), (11, 512)]
    losses = {(row["layer"], row["cells"]): float(row["kl_mean"]) for row in rows}
    assert min(losses.values()) > 1e-4 and losses[5, 256] + losses[11, 256] > losses[5, 512] + losses[11, 512], losses
    assert float(rows[0]["active_ratio"]) == pytest.approx(256 / (768.5 + 128), rel=0.001)  # of the tokens at the mean position
    assert float(rows[0]["one_pass"]) > 0 and rows[0]["one_pass"] == rows[2]["one_pass"]
    with monkeypatch.context() as patch:
        patch.setattr(sensitivities.Runner, "log_probabilities", lambda *_: pytest.fail("measured twice"))
        assert [row["run"] for row in sensitivities.Sensitivities(arguments).run()] == [row["run"] for row in rows]
    for refused, message in (({"cells": [100]}, "multiple of 256"), ({"cells": [1024]}, "fewer than"), ({"positions": 100}, "multiple of 32")):
        with pytest.raises(ValueError, match=message):
            sensitivities.Sensitivities(bench_arguments(tmp_path, model, source, **refused))


def test_the_summary_of_sensitivities_compares_ranks_and_the_loss_model():
    """Losses made by the loss model itself, but for the second layer's, which grows twice as fast."""
    rows = []
    for cells, ratio in ((128, 0.1), (256, 0.2), (512, 0.5)):
        growth = (1 / ratio - 1) / 4
        losses = (1 * growth, 2 * growth**2, 3 * growth)
        same = {"model": "m", "text": "t", "length": 1, "positions": 1, "cells": cells, "active_ratio": ratio}
        rows += [{**same, "layer": i, "kl_mean": kl, "one_pass": 9 - i} for i, kl in enumerate(losses)]
    tenth, fifth, half = sensitivities.summaries(rows)
    assert fifth["predicted_ratio"] == pytest.approx(1) and fifth["kl_sum"] == pytest.approx(6) and fifth["rank_one_pass"] == pytest.approx(-1)
    assert tenth["predicted_ratio"] == pytest.approx(6 * 2.25 / (2.25 + 2 * 2.25**2 + 3 * 2.25))
    assert half["rank_to_fifth"] == pytest.approx(0.5)  # 0.25, 0.125 and 0.75: the first two change places


def test_the_command_says_two_lines_and_none_of_llama_cpps(small, tmp_path):
    code = f"import sys; from asrkf_gguf.cli import main; sys.exit(main(['calibrate', {small!r}, '--out', {str(tmp_path / 'side.json')!r}]))"
    result = python(code)
    assert result.returncode == 0 and len(result.stdout.splitlines()) == 2 and result.stderr == ""
