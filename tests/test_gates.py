"""Gates: what they compute, their file, the conversion of published ones, and their training on a model's own attention."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from gates_oracle import queries_and_keys, targets
from make_models import write_tiny
from test_architectures import ARCHITECTURES
from test_windowed import write_gemma3
from texts import topics_text

from asrkf_gguf import _native
from asrkf_gguf.cli import main
from asrkf_gguf.family import loaded_model
from asrkf_gguf.gates import features as features_module
from asrkf_gguf.gates import train as train_module
from asrkf_gguf.gates.file import Gate, Gates, read_gates, write_gates
from asrkf_gguf.gates.fit import cross_entropy, held_out, learning_rate
from asrkf_gguf.gates.graph import LayerShape, layer_shapes, session
from asrkf_gguf.gates.teacher import Instructions, Plan, answer_header, chunks_of, received, score_document
from asrkf_gguf.gates.train import train

N_TOKENS = 3000  # the small model's gates are trained on


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="gates are made with PyTorch: pip install torch")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch, tmp_path):
    """And a folder of the test's own for gates."""
    monkeypatch.setenv("ASRKF_GATES", str(tmp_path / "gates"))
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def a_gate(n_embd: int = 64, n_heads: int = 3, group: int = 2, seed: int = 1) -> Gate:
    rng = np.random.default_rng(seed)

    def values(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    return Gate(values(n_heads * group * 16, n_embd), values(n_heads * group * 16), values(n_heads * 16, n_embd), values(16) + 1, values(16) + 1,
                values(n_heads, 16, 16), values(n_heads, group))  # fmt: skip


# what a gate computes

def test_a_score_is_the_softmax_weight_of_a_tokens_own_key_among_the_sinks(torch):
    gate, x = a_gate(), np.random.default_rng(2).standard_normal((50, 64), dtype=np.float32)
    t = {name: torch.from_numpy(getattr(gate, name)) for name in ("q_weight", "q_bias", "k_weight", "q_norm", "k_norm", "sinks", "bias")}
    norm, tx = torch.nn.functional.rms_norm, torch.from_numpy(x)
    q = torch.einsum("nD,hgjD->nhgj", tx, t["q_weight"].view(3, 2, 16, 64)) + t["q_bias"].view(3, 2, 16)
    q = norm(q, (16,), t["q_norm"], 1e-6)
    k = norm(torch.einsum("nD,hjD->nhj", tx, t["k_weight"].view(3, 16, 64)), (16,), t["k_norm"], 1e-6)
    own = torch.einsum("nhgj,nhj->nhg", q, k) / 4 + t["bias"]
    sinks = torch.einsum("nhgj,hsj->nhgs", q, t["sinks"]) / 4
    expected = torch.softmax(torch.cat([own[..., None], sinks], -1), -1)[..., 0].mean(2)
    np.testing.assert_allclose(gate.scores(x), expected.numpy(), atol=2e-6)


def test_extreme_inputs_give_scores_between_0_and_1():
    gate = a_gate()
    big = Gate(gate.q_weight, gate.q_bias, gate.k_weight, gate.q_norm * 1e3, gate.k_norm * 1e3, gate.sinks, gate.bias)
    with np.errstate(over="raise", invalid="raise"):
        scores = big.scores(np.concatenate([np.zeros((1, 64)), np.full((1, 64), 6e4)]).astype(np.float16))
    assert scores.shape == (2, 3) and (scores >= 0).all() and (scores <= 1).all()


def test_training_computes_the_same_as_the_file_does(torch):
    from asrkf_gguf.gates.fit import forward

    gate, x = a_gate(), np.random.default_rng(2).standard_normal((50, 64), dtype=np.float32)
    parameters = {name: torch.from_numpy(value) for name, value in vars(gate).items()}
    np.testing.assert_allclose(gate.scores(x), forward(torch, parameters, torch.from_numpy(x)).numpy(), atol=2e-6)


def test_a_gate_of_shapes_that_do_not_fit_together_is_refused():
    values = vars(a_gate())
    with pytest.raises(ValueError, match=r"k_weight has the shape \[48, 65\], \[48, 64\] is expected"):
        Gate(**{**values, "k_weight": np.zeros((48, 65), np.float32)})
    with pytest.raises(ValueError, match="bias is not float32, or not finite"):
        Gate(**{**values, "bias": np.full((3, 2), np.nan, np.float32)})


# the file

@pytest.mark.parametrize(("n_embd", "kind"), [(64, "Q8_0"), (48, "F16")])
def test_what_is_written_is_read_and_computes_nearly_the_same(tmp_path, n_embd, kind):
    gates = Gates("llama-1", {2: a_gate(n_embd), 5: a_gate(n_embd, seed=3)}, "a test", 7, 0.75)
    write_gates(tmp_path / "new" / "a.gguf", gates)
    found = read_gates(tmp_path / "new" / "a.gguf")
    assert (found.model, list(found.layers), found.source, found.tokens) == ("llama-1", [2, 5], "a test", 7)
    assert found.agreement == pytest.approx(0.75)
    x = np.random.default_rng(2).standard_normal((50, n_embd), dtype=np.float32)
    for il, gate in gates.layers.items():
        for name in ("q_bias", "q_norm", "k_norm", "sinks", "bias"):
            assert np.array_equal(getattr(found.layers[il], name), getattr(gate, name))
        assert abs(found.layers[il].scores(x) - gate.scores(x)).max() < 0.02
    reader = gguf.GGUFReader(tmp_path / "new" / "a.gguf")
    assert {t.name: t.tensor_type.name for t in reader.tensors}["blk.2.gate_k.weight"] == kind
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.gguf"]


def test_the_file_is_what_the_engine_expects(tmp_path):
    write_gates(tmp_path / "a.gguf", Gates("llama-1", {0: a_gate(), 4: a_gate()}))
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    values = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert values == {
        "general.architecture": "asrkf-gates", "asrkf.gates.version": 1, "asrkf.gates.model": "llama-1", "asrkf.gates.dim": 16,
        "asrkf.gates.sinks": 16, "asrkf.gates.norm_eps": pytest.approx(1e-6), "asrkf.gates.layers": [0, 4],
    }  # fmt: skip
    kinds = gguf.GGUFValueType
    assert reader.fields["asrkf.gates.layers"].types == [kinds.ARRAY, kinds.UINT32]
    assert {reader.fields[f"asrkf.gates.{key}"].types[0] for key in ("version", "dim", "sinks")} == {kinds.UINT32}
    assert {t.name: (t.shape.tolist(), t.tensor_type.name) for t in reader.tensors if t.name.startswith("blk.4.")} == {
        "blk.4.gate_q.weight": ([64, 96], "Q8_0"), "blk.4.gate_q.bias": ([96], "F32"), "blk.4.gate_k.weight": ([64, 48], "Q8_0"),
        "blk.4.gate_q_norm.weight": ([16], "F32"), "blk.4.gate_k_norm.weight": ([16], "F32"), "blk.4.gate_sinks": ([16, 16, 3], "F32"),
        "blk.4.gate_bias": ([2, 3], "F32"),
    }  # fmt: skip


def test_gates_lie_in_the_cache_folder_or_where_the_environment_says(tiny, tmp_path, monkeypatch):
    with loaded_model(Path(tiny)) as model:
        name = f"{_native.fingerprint(model)}.asrkf-gates.gguf"
        assert _native.gates_file(model) == tmp_path / "gates" / name
        monkeypatch.delenv("ASRKF_GATES")
        monkeypatch.setenv("ASRKF_CACHE", str(tmp_path / "cache"))
        assert _native.gates_file(model) == tmp_path / "cache" / "gates" / name


def test_an_interrupted_write_leaves_the_file_of_before_and_nothing_else(tmp_path, monkeypatch):
    write_gates(tmp_path / "a.gguf", Gates("llama-1", {0: a_gate()}))
    before = (tmp_path / "a.gguf").read_bytes()

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for name in ("write_tensors_to_file", "add_tensor"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(gguf.GGUFWriter, name, stop)
            write_gates(tmp_path / "a.gguf", Gates("llama-2", {0: a_gate()}))
        assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"] and (tmp_path / "a.gguf").read_bytes() == before


def test_a_file_that_is_damaged_foreign_or_not_there_is_refused_with_the_remedy(tmp_path, tiny):
    write_gates(tmp_path / "a.gguf", Gates("llama-1", {0: a_gate()}))
    good, bad = (tmp_path / "a.gguf").read_bytes(), tmp_path / "bad.gguf"
    for content in (b"", b"GGUF", good[:400], good[:-2000], good.replace(b"blk.0.gate_bias", b"blk.0.gate_biaz")):
        bad.write_bytes(content)
        with pytest.raises(ValueError, match="asrkf gates train"):
            read_gates(bad)
    with pytest.raises(ValueError, match="architecture is 'llama'"):
        read_gates(Path(tiny))
    with pytest.raises(FileNotFoundError, match="asrkf gates train"):
        read_gates(tmp_path / "none.gguf")


def test_the_command_says_what_a_file_holds(tmp_path, capsys):
    write_gates(tmp_path / "a.gguf", Gates("llama-1", {0: a_gate()}, "a test", 7, 0.75))
    assert main(["gates", "info", str(tmp_path / "a.gguf")]) == 0
    shown = "gates of 1 layers (0 to 0) of the model llama-1, 3 KV heads with 2 query heads each, a test, 7 tokens, agreement 0.750\n"
    assert capsys.readouterr().out == shown


# published gates

def published(torch, n_layers: int = 2, n_embd: int = 256, n_heads: int = 2, group: int = 2) -> dict:
    """As they are published, with random values."""
    torch.manual_seed(3)
    layer = lambda: {  # noqa: E731
        "q_proj.weight": torch.randn(n_heads * group * 16, n_embd, dtype=torch.bfloat16), "q_proj.bias": torch.randn(n_heads * group * 16),
        "k_proj.weight": torch.randn(n_heads * 16, n_embd), "q_norm.weight": torch.randn(16), "k_norm.weight": torch.randn(16),
        "k_base": torch.randn(n_heads, 1, 16, 16), "b": torch.randn(n_heads, 1, group),
    }  # fmt: skip
    return {"module": [layer() for _ in range(n_layers)], "loss": 0.5, "acc": [0.9]}


@pytest.mark.parametrize(("n_heads", "group"), [(2, 2), (4, 1), (1, 4)])
def test_published_gates_become_the_models(torch, tmp_path, capsys, n_heads, group):
    write_tiny(tmp_path / "model.gguf", n_head_kv=n_heads)
    content = published(torch, n_heads=n_heads, group=group)
    torch.save(content, tmp_path / "q.pt")
    assert main(["gates", "convert", str(tmp_path / "q.pt"), str(tmp_path / "model.gguf")]) == 0
    with loaded_model(tmp_path / "model.gguf") as model:
        path = _native.gates_file(model)
    assert f"{path} written" in capsys.readouterr().out
    found = read_gates(path)
    assert list(found.layers) == [0, 1] and found.source == "converted from q.pt"
    for il, state in enumerate(content["module"]):
        gate = found.layers[il]
        assert np.array_equal(gate.sinks, state["k_base"][:, 0].numpy()) and np.array_equal(gate.bias, state["b"][:, 0].numpy())
        np.testing.assert_allclose(gate.q_weight, state["q_proj.weight"].float().numpy(), atol=0.02)


def test_a_windowed_models_gates_are_those_of_the_layers_that_see_everything(torch, tmp_path):
    model = write_gemma3(tmp_path / "gemma3.gguf", 12)
    content = published(torch)
    for layers in (content["module"], [content["module"][il // 6] if il % 6 == 5 else None for il in range(12)]):
        torch.save({"module": layers}, tmp_path / "q.pt")
        assert main(["gates", "convert", str(tmp_path / "q.pt"), model, "--out", str(tmp_path / "out.gguf")]) == 0
        found = read_gates(tmp_path / "out.gguf")
        assert list(found.layers) == [5, 11]
        assert np.array_equal(found.layers[11].bias, content["module"][1]["b"][:, 0].numpy())


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"n_layers": 3}, "has gates of 3 layers, tiny.gguf has 2 that can have one"),
        ({"n_embd": 128}, r"q_proj.weight is \[64, 128\], not \[64, 256\]"),
        ({"n_heads": 1}, r"KV heads.*k_base is \[1, 1, 16, 16\], not \[2, 1, 16, 16\]"),
        ({"group": 1}, r"b is \[2, 1, 1\], not \[2, 1, 2\]"),
    ],
)
def test_published_gates_of_another_model_are_refused_with_what_differs(torch, tiny, tmp_path, capsys, other, said):
    torch.save(published(torch, **other), tmp_path / "q.pt")
    assert main(["gates", "convert", str(tmp_path / "q.pt"), tiny]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(said, line), line
    assert not (tmp_path / "gates").exists()


def test_what_is_no_file_of_published_gates_is_refused(torch, tiny, tmp_path, capsys):
    short = published(torch)
    del short["module"][1]["b"]
    for content, said in ((short, "layer 1: b missing"), ([1], 'no list "module"'), ({"module": []}, 'no list "module"')):
        torch.save(content, tmp_path / "q.pt")
        assert main(["gates", "convert", str(tmp_path / "q.pt"), tiny]) == 1
        assert said in capsys.readouterr().err
    (tmp_path / "q.pt").write_bytes((tmp_path / "q.pt").read_bytes()[:50])
    assert main(["gates", "convert", str(tmp_path / "q.pt"), tiny]) == 1
    assert main(["gates", "convert", str(tmp_path / "none.pt"), tiny]) == 1
    assert "none.pt does not exist" in capsys.readouterr().err


class Code:
    """Its pickle makes a file when it is read."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return Path.touch, (self.trace,)


def test_a_file_with_code_in_it_is_refused_and_the_code_is_not_run(torch, tiny, tmp_path, capsys):
    torch.save({**published(torch), "loss": Code(tmp_path / "trace")}, tmp_path / "q.pt")
    assert main(["gates", "convert", str(tmp_path / "q.pt"), tiny]) == 1
    assert "would run code from it" in capsys.readouterr().err
    assert not (tmp_path / "trace").exists()
    torch.load(tmp_path / "q.pt", weights_only=False)
    assert (tmp_path / "trace").exists()  # it would have been


# the teacher

INSTRUCTIONS = Instructions([1, 2, 3], [4, 5], [6])
MODELS = {
    "grouped queries": ({}, 0.125),
    "one KV head": ({"n_head_kv": 1}, 0.125),
    "norms of queries and keys": ({"arch": "qwen3", **ARCHITECTURES["qwen3"]}, 0.125),
    "a scale of its own": ({"arch": "granite", **ARCHITECTURES["granite"]}, 0.1),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_teachers_scores_are_what_numpy_finds_in_the_plain_attention(tmp_path, name):
    options, scale = MODELS[name]
    path = tmp_path / "model.gguf"
    write_tiny(path, **options)
    document = np.random.default_rng(4).integers(0, 256, 600).tolist()
    inputs: dict[int, list[np.ndarray]] = {}
    with loaded_model(path) as model, session(model, 1024, 1) as reading:
        shapes = layer_shapes(model, 1)
        reading.on_input = lambda il, x: inputs.setdefault(il, []).append(x)
        reading.decode(document)
        reading.on_input = None
        found = score_document(reading, document, list(shapes), INSTRUCTIONS, 350)
        assert reading.n_tokens == len(document)
    assert list(found) == [0, 1] and found[0].shape == (600, shapes[0].n_heads_kv)
    for begin, end in ((0, 300), (300, 600)):
        seen = queries_and_keys(str(path), [*document, *INSTRUCTIONS.before(document, begin), *document[begin:end]])
        for il, shape in shapes.items():
            expected = targets(seen[f"Qcur-{il}"], seen[f"Kcur-{il}"], 600, begin, end, shape.n_heads_kv, scale)
            assert expected.max() > 0.02
            np.testing.assert_allclose(found[il][begin:end], expected, atol=4e-3)
            np.testing.assert_allclose(np.concatenate(inputs[il]), seen[f"attn_norm-{il}"][:600], atol=0.02)


@pytest.mark.parametrize("is_windowed", [False, True])
def test_a_repetition_is_taken_back_and_leaves_no_trace(tiny, tmp_path, is_windowed):
    path = write_gemma3(tmp_path / "gemma3.gguf") if is_windowed else tiny
    document = np.random.default_rng(4).integers(0, 250, 600).tolist()
    with loaded_model(Path(path)) as model, session(model, 1024, 1) as reading:
        (*_, il) = layer_shapes(model, 1)
        scores = []
        for _ in range(2):
            reading.keep(0)
            reading.decode(document)
            scores.append(score_document(reading, document, [il], INSTRUCTIONS, 350)[il])
            scores.append(score_document(reading, document, [il], INSTRUCTIONS, 350)[il])
    assert all(np.array_equal(other, scores[0]) for other in scores[1:])


def test_softcapping_and_the_queries_own_order_are_heeded():
    rng = np.random.default_rng(5)
    q, k = rng.standard_normal((5, 2, 3, 8), dtype=np.float32), rng.standard_normal((12, 2, 8), dtype=np.float32)
    expected = np.zeros((4, 2))
    for i in range(5):
        for h in range(2):
            for g in range(3):
                weight = np.exp(2 * np.tanh(k[: 7 + i + 1, h] @ q[i, h, g] * 0.7 / 2))
                expected[:, h] = np.maximum(expected[:, h], weight[:4] / weight.sum())
    np.testing.assert_allclose(received(q, k, 4, 0.7, 2.0), expected, rtol=1e-5)


def test_documents_leave_room_for_the_repetition_of_a_chunk():
    assert Plan.of(8192, 28) == Plan(2000, 6000, 8028)
    assert Plan.of(131072, 28) == Plan(2000, 14000, 16028)
    assert Plan.of(2048, 28) == Plan(1010, 1010, 2048)
    with pytest.raises(ValueError, match="trained on 100 tokens: too few"):
        Plan.of(100, 28)
    assert chunks_of(5000, 2000) == [(0, 1667), (1667, 3333), (3333, 5000)]


def test_the_instruction_ends_with_the_header_of_an_answer(smollm2):
    with loaded_model(Path(smollm2), vocab_only=True) as model:
        assert answer_header(model) == "<|im_end|>\n<|im_start|>assistant\n"
        instructions = Instructions.of(model)
    assert instructions.before(list(range(100)), 20)[-8 - len(instructions.header) :] == [*range(12, 20), *instructions.header]
    assert instructions.before(list(range(100)), 0) == [*instructions.first, *instructions.header]


def test_layers_with_a_window_have_no_gate(tmp_path):
    with loaded_model(Path(write_gemma3(tmp_path / "gemma3.gguf", 12))) as model:
        assert layer_shapes(model, 1) == {il: LayerShape(256, 2, 2) for il in (5, 11)}


def test_a_graph_without_the_layers_normalised_input_is_refused(tmp_path):
    write_tiny(tmp_path / "model.gguf", arch="olmo2", **ARCHITECTURES["olmo2"])
    with loaded_model(tmp_path / "model.gguf") as model, pytest.raises(RuntimeError, match="names no attn_norm-0, attn_norm-1: "):
        layer_shapes(model, 1)


def test_what_a_callback_raises_the_step_raises_and_the_next_one_computes(tiny):
    with loaded_model(Path(tiny)) as model, session(model, 256, 1) as reading:

        def stop(*_: object) -> None:
            raise KeyboardInterrupt

        reading.on_input = stop
        with pytest.raises(KeyboardInterrupt):
            reading.decode([1, 2, 3])
        reading.keep(0)
        seen: list[int] = []
        reading.on_input = lambda il, x: seen.append(il)
        reading.decode([1, 2, 3])
        assert seen == [0, 1]


# training

def texts() -> list[str]:
    text = topics_text()
    return [text[:40_000], text[100_000:140_000]]


@pytest.fixture(scope="module")
def trained(small, tmp_path_factory):
    pytest.importorskip("torch", reason="gates are made with PyTorch: pip install torch").set_num_threads(1)
    said: list[str] = []
    gates, figures, features = train(Path(small), texts(), N_TOKENS, tmp_path_factory.mktemp("work"), 1, 0, say=said.append)
    return gates, figures, features, said


def same(a: Gates, b: Gates) -> bool:
    return all(np.array_equal(value, getattr(b.layers[il], name)) for il, gate in a.layers.items() for name, value in vars(gate).items())


def test_trained_gates_know_more_than_each_heads_mean(trained):
    gates, figures, features, said = trained
    assert list(gates.layers) == list(range(8)) and gates.tokens == N_TOKENS
    for il, f in figures.items():
        inputs, wanted = features.read(il)
        assert inputs.shape == (N_TOKENS, 128) and wanted.shape == (N_TOKENS, 2) and 0 < wanted.max() <= 1
        out = held_out(N_TOKENS)
        assert out.sum() == 30 and f.loss == pytest.approx(cross_entropy(gates.layers[il].scores(inputs[out]), wanted[out]))
        assert f.rank_correlation > 0.2, (il, f)
    assert np.mean([f.loss for f in figures.values()]) < 0.98 * np.mean([f.mean_loss for f in figures.values()])
    assert sum(f.loss < f.mean_loss for f in figures.values()) >= 6  # thirty tokens say little of one layer
    assert "3000 tokens in 2 documents, none done before; 8 layers" in said[0] and "GB in" in said[0]
    expected_bytes = sum(path.stat().st_size for path in features.folder.iterdir() if path.suffix in (".f16", ".f32"))
    assert features.token_bytes * N_TOKENS == expected_bytes


def test_the_same_seed_gives_the_same_gates_and_another_one_others(trained):
    gates, _, features, _ = trained
    for seed, is_same in ((0, True), (1, False)):
        for path in features.folder.glob("gate-*.npz"):
            path.unlink()
        layers = {il: train_module.trained_layer(features, il, seed)[0] for il in (0, 5)}
        assert same(Gates("", layers), gates) == is_same


def test_a_stopped_run_goes_on_behind_the_last_document_and_ends_the_same(trained, small, tmp_path, monkeypatch):
    collect, decoded = features_module.Features.collect, []

    def stop_in_the_second(self, model, n_threads, progress):
        def step(n: int) -> None:
            decoded.append(n)
            if sum(decoded) > 3500 and sum(decoded) < 10_000:
                raise KeyboardInterrupt
            progress(n)

        collect(self, model, n_threads, step)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(features_module.Features, "collect", stop_in_the_second)
        train(Path(small), texts(), N_TOKENS, tmp_path, 1, 0)
    (folder,) = tmp_path.iterdir()
    assert json.loads((folder / "manifest.json").read_text())["finished_documents"] == 1
    assert (folder / "inputs-0.f16").stat().st_size > 1500 * 2 * 128  # part of the second

    fit, fitted = train_module.fit_gate, []

    def stop_in_the_third(*arguments):
        fitted.append(arguments[-1])
        if len(fitted) == 3:
            raise KeyboardInterrupt
        return fit(*arguments)

    monkeypatch.setattr(train_module, "fit_gate", stop_in_the_third)
    said: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        train(Path(small), texts(), N_TOKENS, tmp_path, 1, 0, say=said.append)
    assert "1 of them done before" in said[0]
    gates, figures, _ = train(Path(small), texts(), N_TOKENS, tmp_path, 1, 0, say=said.append)
    assert fitted == [0, 1, 2, 2, 3, 4, 5, 6, 7] and "2 of them done before" in said[1]
    assert same(gates, trained[0]) and figures == trained[1]


def test_features_of_another_text_are_not_used(trained, small, tmp_path):
    features = trained[2]
    folder = tmp_path / features.folder.name
    shutil.copytree(features.folder, folder)
    with loaded_model(Path(small)) as model:
        for text, n in ((texts(), 2), ([*texts()[1:], topics_text()[300_000:]], 0)):
            prepared = train_module.prepare(model, Path(small), text, N_TOKENS, tmp_path, 1, 2000)
            assert prepared.n_finished() == n
    (folder / "targets-3.f32").write_bytes(b"")
    assert prepared.n_finished() == 0


def test_the_command_trains_writes_one_file_and_leaves_nothing_else(torch, small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("asrkf_gguf.gates.command.standard_text", lambda: texts()[0])
    (tmp_path / "more.txt").write_text(texts()[1])
    command = ["gates", "train", small, "--text", str(tmp_path / "more.txt"), "--tokens", "2000", "--threads", "1", "--n-gpu-layers", "0"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "on the tokens that were held out" in shown and "gates of 8 layers (0 to 7)" in shown and "seed 0, 2000 tokens" in shown
    (file,) = (tmp_path / "gates").iterdir()
    with loaded_model(Path(small)) as model:
        assert file == _native.gates_file(model)
    assert len(read_gates(file).layers) == 8


def test_control_c_ends_the_command_with_how_to_go_on(torch, small, tmp_path, capsys, monkeypatch):
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("asrkf_gguf.gates.command.train", stop)
    assert main(["gates", "train", small]) == 130
    assert "the same command goes on from there" in capsys.readouterr().err


def test_the_learning_rate_rises_and_is_halved_twice():
    rates = [learning_rate(step, 5000) for step in (0, 24, 49, 50, 2499, 2500, 3749, 3750, 4999)]
    assert rates == pytest.approx([0.002, 0.05, 0.1, 0.2, 0.2, 0.1, 0.1, 0.05, 0.05])


def refused(capsys, *arguments: str) -> str:
    assert main(["gates", *arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_bad_input_is_refused_in_one_line_before_anything_is_computed(torch, small, tiny, tmp_path, capsys, monkeypatch):
    assert "none.gguf does not exist" in refused(capsys, "train", "none.gguf")
    assert "none.txt" in refused(capsys, "train", small, "--text", "none.txt")
    assert "the model has no tokenizer" in refused(capsys, "train", tiny)
    assert "at least 1000 are needed" in refused(capsys, "train", small, "--tokens", "500")
    monkeypatch.setattr(train_module.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
    assert "give fewer --tokens (now 2000), or another --work-folder" in refused(capsys, "train", small, "--tokens", "2000")
    assert not list(tmp_path.rglob("*.work"))


def test_without_pytorch_the_commands_say_what_to_install(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "q.pt").write_bytes(b"")
    for arguments in (("train", small), ("convert", str(tmp_path / "q.pt"), small)):
        assert "pip install torch" in refused(capsys, *arguments)


def test_a_disk_that_fills_up_stops_the_run_with_the_reason(torch, small, tmp_path, monkeypatch):
    monkeypatch.setattr(features_module.np, "ascontiguousarray", lambda values: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        train(Path(small), texts(), 2000, tmp_path, 1, 0)
