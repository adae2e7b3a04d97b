"""Masks of pairs: the model in NumPy beside llama.cpp's, who is kept, and the command."""

from __future__ import annotations

import argparse
import contextlib
import csv
from pathlib import Path

import numpy as np
import pytest
from make_models import write_random_gates

from asrkf_gguf import Llama
from asrkf_gguf.bench.pairs import CHOICES, Model, by_pair, by_token, by_token_of_layer, pairs, table_of_pairs
from asrkf_gguf.divergence import kl_divergence, log_softmax
from asrkf_gguf.gates.file import default_file

TEXT = "The cat sat on the mat. Then the dog came, and the cat ran up the tree to see what the dog would do next. "


def test_numpy_model_predicts_what_llama_cpp_does(smollm2: str) -> None:
    with contextlib.closing(Llama(smollm2, n_ctx=256, kv_policy="full", logits_all=True, verbose=False)) as llm:
        tokens = llm.tokenize((TEXT * 4).encode())[:96]
        llm.eval(tokens)
        expected = llm.scores[:96].copy()
    model = Model(Path(smollm2))
    found = np.concatenate((model.read(tokens[:60]), model.read(tokens[60:])))
    kl = [kl_divergence(log_softmax(one), log_softmax(other)) for one, other in zip(expected, found, strict=True)]
    assert np.mean(kl) < 0.01  # llama.cpp's CPU rounds activations to eight bits
    masked = np.zeros((len(model.layers), model.n_heads_kv, 96), bool)
    assert np.array_equal(model.read(tokens[:8], masked=masked), model.read(tokens[:8], masked=masked)), "what is read under a mask is not kept"
    unmasked = model.read(tokens[:8], peaks=(peaks := np.zeros(masked.shape, np.float32)))
    assert np.abs(unmasked - model.read(tokens[:8], masked=masked)).max() < 1e-3
    assert peaks.min() > 0 and peaks.max() <= 1
    masked[:, 0, 4:90] = True
    assert np.abs(unmasked - model.read(tokens[:8], masked=masked)).max() > 0.1


@pytest.mark.parametrize("ratio", (0.25, 0.5))
def test_all_choices_keep_as_many_pairs(ratio: float) -> None:
    scores = np.random.default_rng(0).random((4, 2, 64))
    for name, choose in CHOICES.items():
        kept = choose(scores, ratio)
        assert kept.shape == scores.shape and kept.sum() == ratio * scores.size, name


def test_choices_by_hand() -> None:
    scores = np.array([[[9, 1, 1, 2], [1, 8, 1, 2]], [[5, 1, 4, 1], [1, 1, 7, 1]]], float)
    assert by_pair(scores, 0.25).nonzero()[2].tolist() == [0, 1, 0, 2] and by_pair(scores, 0.25).sum() == 4
    assert by_token_of_layer(scores, 0.5)[0].tolist() == [[True, True, False, False]] * 2
    assert by_token_of_layer(scores, 0.5)[1].tolist() == [[True, False, True, False]] * 2
    assert by_token(scores, 0.25).sum() == 4 and by_token(scores, 0.25)[0, :, :2].all()


def test_command_writes_a_row_for_each_mask(small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASRKF_GATES", str(tmp_path))
    with pytest.raises(ValueError, match="asrkf gates train"):
        pairs(argparse.Namespace(model=Path(small), text=[], length=160, positions=32, out=None, again=False, threads=1))
    write_random_gates(default_file(Path(small)), small, range(8), n_embd=128)
    (tmp_path / "one.txt").write_text(TEXT * 40)
    monkeypatch.setattr("asrkf_gguf.bench.pairs.RATIOS", (0.25,))
    arguments = argparse.Namespace(
        model=Path(small), text=[f"one={tmp_path / 'one.txt'}"], length=160, positions=32, out=tmp_path / "pairs.csv", again=False, threads=1
    )
    assert pairs(arguments) == 0
    with arguments.out.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * len(CHOICES) and all(float(row["kl_mean"]) > 0 for row in rows)
    before = arguments.out.read_text()
    assert pairs(arguments) == 0 and arguments.out.read_text() == before, "what was measured is not measured again"
    monkeypatch.setattr("asrkf_gguf.bench.pairs.results_file", lambda _: arguments.out)
    capsys.readouterr()
    assert table_of_pairs(arguments) == 0 and "tokens, by layer" in capsys.readouterr().out
    with pytest.raises(ValueError, match="fewer than --length"):
        pairs(argparse.Namespace(**{**vars(arguments), "positions": 160}))
