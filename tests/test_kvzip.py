"""Gates in the engine (Fast KVzip's rule): against NumPy on the inputs of the model's own layers, and what is refused."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest
from kv import check_states
from make_models import write_random_gates, write_tiny
from test_windowed import write_gemma3

from asrkf_gguf import KVError, _native
from asrkf_gguf._compat import quiet
from asrkf_gguf.gates.file import Gates, write_gates

SINKS, WINDOW = 4, 128
_EVAL_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)


def some_tokens(n: int, seed: int = 1) -> list[int]:
    return np.random.default_rng(seed).integers(0, 250, n).tolist()


def gates_of(model: str, folder: Path, layers=(0, 1), **shape) -> tuple[Gates, str]:
    """Random ones, and their file."""
    return write_random_gates(folder / "some.gguf", model, layers, **shape), str(folder / "some.gguf")


class Watched:
    """A context with a policy, whose layers' normalised inputs are kept: [tokens, n_embd] a layer."""

    def __init__(self, path: str, policy: str, n_ctx: int, type_kv: int = llama_cpp.GGML_TYPE_F16, n_batch: int = 64) -> None:
        self.inputs: dict[int, list[np.ndarray]] = {}
        self._ggml = ctypes.CDLL(str(_native.LIBRARY_FOLDER / "libggml-base.so"))
        self._ggml.ggml_get_name.restype, self._ggml.ggml_get_name.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
        self._ggml.ggml_nelements.restype, self._ggml.ggml_nelements.argtypes = ctypes.c_int64, [ctypes.c_void_p]
        self._ggml.ggml_get_data_f32.restype, self._ggml.ggml_get_data_f32.argtypes = ctypes.POINTER(ctypes.c_float), [ctypes.c_void_p]
        self._callback = _EVAL_CALLBACK(self._on_node)
        options = llama_cpp.llama_model_default_params()
        options.n_gpu_layers = 0
        with quiet():
            self.model = llama_cpp.llama_model_load_from_file(path.encode(), options)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_threads, params.n_threads_batch = n_ctx, n_batch, n_batch, 1, 1
        params.type_k = params.type_v = type_kv
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.cb_eval = ctypes.cast(self._callback, type(params.cb_eval))
        _native.check(_native.lib.asrkf_next_context(_native.parse_config(policy)))
        with quiet():
            self.context = llama_cpp.llama_init_from_model(self.model, params)
        assert self.context, _native.last_error()

    def _on_node(self, node: int, ask: bool, _user: int) -> bool:
        found = re.fullmatch(r"attn_norm-(\d+)", self._ggml.ggml_get_name(node).decode())
        if found and not ask:
            n = self._ggml.ggml_nelements(node)
            values = np.ctypeslib.as_array(self._ggml.ggml_get_data_f32(node), shape=(n,)).copy()
            self.inputs.setdefault(int(found[1]), []).append(values.reshape(-1, llama_cpp.llama_model_n_embd(self.model)))
        return bool(found) or not ask

    def decode(self, tokens: list[int]) -> None:
        kept = (llama_cpp.llama_token * len(tokens))(*tokens)
        assert llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(kept, len(tokens))) == 0, _native.last_error()

    def frozen(self, group: int, n_tokens: int) -> np.ndarray:
        """bool [tokens]"""
        states, n = _native.ffi.new("uint8_t[]", n_tokens), _native.ffi.new("size_t *")
        pointer = _native.ffi.cast("struct llama_context *", ctypes.cast(self.context, ctypes.c_void_p).value)
        _native.check(_native.lib.asrkf_get_tokens(pointer, 0, group, _native.ffi.NULL, states, n_tokens, n))
        return np.frombuffer(_native.ffi.buffer(states), np.uint8) == _native.lib.ASRKF_TOKEN_FROZEN

    def close(self) -> None:
        llama_cpp.llama_free(self.context)
        llama_cpp.llama_model_free(self.model)


def check_frozen(frozen: np.ndarray, scores: np.ndarray) -> None:
    """Of the history, those with the lowest scores. llama.cpp's product with a Q8_0 matrix rounds the input to 8 bits, too."""
    n = len(scores)
    history = np.arange(n)[SINKS : n - WINDOW]
    assert not frozen[:SINKS].any() and not frozen[n - WINDOW :].any()
    gone, kept = scores[history][frozen[history]], scores[history][~frozen[history]]
    assert len(gone) > 100 and len(kept) > 20 and gone.max() < kept.min() + 0.005
    assert np.std(scores) > 0.05  # else nothing would tell


@pytest.mark.parametrize("type_kv", ["F16", "Q8_0"])
@pytest.mark.parametrize("layers", ["layers=0@512/1@512", "layers=shared,pool=512"], ids=["each", "shared"])
def test_in_every_layer_the_tokens_with_the_lowest_scores_are_frozen(tiny, tmp_path, type_kv, layers):
    gates, file = gates_of(tiny, tmp_path)
    n = 700
    watched = Watched(tiny, f"kvzip,{layers},window={WINDOW},gates={file}", 1024, getattr(llama_cpp, f"GGML_TYPE_{type_kv}"))
    tokens = some_tokens(n)
    for begin in range(0, n - 60, 64):
        watched.decode(tokens[begin : min(begin + 64, n - 60)])
    for token in tokens[n - 60 :]:
        watched.decode([token])
    watched.decode(some_tokens(16, 2))  # a step that decides; its own scores come too late for that
    scores = [gates.layers[il].scores(np.concatenate(watched.inputs[il])[:n]).max(1) for il in (0, 1)]
    found = [watched.frozen(group, n + 16)[:n] for group in range(2 if "/" in layers else 1)]
    if len(found) == 2:
        for frozen, of_layer in zip(found, scores, strict=True):
            check_frozen(np.concatenate([frozen, np.zeros(16, bool)]), np.concatenate([of_layer, np.ones(16)]))
        assert (found[0] != found[1]).any()
    else:
        check_frozen(np.concatenate([found[0], np.zeros(16, bool)]), np.concatenate([(scores[0] + scores[1]) / 2, np.ones(16)]))
    watched.close()


def test_with_a_threshold_a_pool_that_holds_everything_freezes_what_scores_less(load, tiny, tmp_path):
    gates, file = gates_of(tiny, tmp_path)
    n, kept = 600, []
    for threshold in (0.1, 0.2):
        watched = Watched(tiny, f"kvzip,pool=1.0,window={WINDOW},gate_threshold={threshold},gates={file}", 1024, llama_cpp.GGML_TYPE_F16)
        for begin in range(0, n, 50):
            watched.decode(some_tokens(n)[begin : begin + 50])
        watched.decode(some_tokens(16, 2))  # a step that decides
        for il in (0, 1):
            scores, frozen = gates.layers[il].scores(np.concatenate(watched.inputs[il])[:n]).max(1), watched.frozen(il, n + 16)[:n]
            expected = scores < threshold
            expected[:SINKS] = expected[n + 16 - WINDOW :] = False
            assert not (frozen != expected)[abs(scores - threshold) > 0.005].any() and 20 < frozen.sum() < n - WINDOW - 20
            kept.append(n - frozen.sum())
        watched.close()
    assert kept[0] > kept[2] and kept[1] > kept[3]
    stats = load(tiny, n_ctx=1024, kv_policy=f"kvzip,window={WINDOW},gate_threshold=0.3,gates={file}", kv_pool=1.0).kv_stats()
    assert stats.scoring_backend == "gates"


@pytest.mark.parametrize("threshold", [0, 0.4])
def test_a_model_with_windows_has_gates_in_its_other_layers(load, tmp_path, threshold):
    model = write_gemma3(tmp_path / "gemma3.gguf", 6)
    _, file = gates_of(model, tmp_path, layers=(5,))
    llm = load(model, kv_policy=f"kvzip,gates={file},gate_threshold={threshold}", kv_pool=512, n_ctx=2048, n_batch=64, n_ubatch=64)
    llm.eval(some_tokens(1500))
    globals_, windowed = llm.kv_stats().groups
    assert globals_.frozen_cells >= 1500 - 512 and windowed.sliding_window == 64
    frozen = [position for position, state in llm.kv_tokens(0) if state == "frozen"]
    assert frozen != list(range(SINKS, SINKS + len(frozen)))  # not just the oldest


def test_a_pool_that_holds_everything_needs_no_gates_and_changes_nothing(load, tiny):
    tokens = some_tokens(300)
    full = load(tiny, n_ctx=512, n_batch=64, logits_all=True)
    full.eval(tokens)
    llm = load(tiny, n_ctx=512, n_batch=64, logits_all=True, kv_policy="kvzip", kv_pool=512)
    llm.eval(tokens)
    assert np.array_equal(full._scores, llm._scores) and llm.kv_stats().frozen_cells == 0


def test_gates_count_as_device_bytes_and_the_pool_of_bytes_holds_them(load, tiny, tmp_path):
    _, file = gates_of(tiny, tmp_path)
    limit = 1_200_000
    llm = load(tiny, n_ctx=4096, kv_policy=f"kvzip,types=given,gates={file}", kv_pool=f"{limit}B", n_batch=64, n_ubatch=64)
    stats = llm.kv_stats()
    assert stats.device_index_bytes > 2 * (64 + 32) * 256  # more than a byte a weight
    assert stats.device_kv_bytes + stats.device_index_bytes <= limit
    llm.eval(some_tokens(3000))
    check_states(llm)
    assert llm.kv_stats().device_index_bytes == stats.device_index_bytes and llm.kv_stats().scoring_steps_total == 0
    assert stats.scoring_backend == "gates"


def test_a_state_keeps_the_scores(load, tiny, tmp_path):
    _, file = gates_of(tiny, tmp_path)
    options = {"n_ctx": 2048, "n_batch": 64, "kv_policy": f"kvzip,layers=0@512/1@768,gates={file}"}
    llm = load(tiny, **options)
    llm.eval(some_tokens(1000))
    state = llm.save_state()
    other = load(tiny, **options)
    other.load_state(state)
    for each in (llm, other):
        each.eval(some_tokens(100, 2))
    for group in (0, 1):
        frozen = [{position for position, state in each.kv_tokens(group) if state == "frozen"} for each in (llm, other)]
        assert frozen[0] == frozen[1] and len(frozen[0]) > 300


def test_tokens_that_are_taken_back_and_come_again_are_scored_again(load, tiny, tmp_path):
    _, file = gates_of(tiny, tmp_path)
    found = []
    for again in (False, True):
        llm = load(tiny, n_ctx=2048, n_batch=64, kv_policy=f"kvzip,window={WINDOW},calibration=off,gates={file}", kv_pool=512)
        llm.eval(some_tokens(640))
        if again:
            llm.eval(some_tokens(100, 3))
            llm.n_tokens = 640
        llm.eval(some_tokens(300, 4))
        found.append({position for position, state in llm.kv_tokens(0) if state == "frozen" and position >= 640})
    assert len(found[0]) > 30 and len(found[0] ^ found[1]) < 0.5 * len(found[0])  # what is seen of the history differs by a few tokens


def test_a_model_of_thirty_layers_has_a_group_for_each(load, tmp_path):
    """Gates, groups and a small model's few tensors: its graph has more nodes than llama.cpp reckons with."""
    path = tmp_path / "thirty.gguf"
    write_tiny(path, n_layer=30)
    _, file = gates_of(str(path), tmp_path, layers=tuple(range(30)))
    layers = "/".join(f"{il}@{512 if il % 2 else 768}" for il in range(30))
    llm = load(str(path), kv_policy=f"kvzip,layers={layers},gates={file}", n_ctx=2048, type_k=8, type_v=8)  # quantised: K is rotated
    llm.eval(some_tokens(1200))
    assert len(llm.kv_stats().groups) == 30 and llm.kv_stats().frozen_cells > 400


def test_two_sequences_are_scored_each(tiny, tmp_path):
    gates, file = gates_of(tiny, tmp_path)
    options = llama_cpp.llama_model_default_params()
    options.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(tiny.encode(), options)
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max, params.n_threads, params.n_threads_batch = 2048, 64, 64, 2, 1, 1
    params.kv_unified, params.flash_attn_type = True, llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
    _native.check(_native.lib.asrkf_next_context(_native.parse_config(f"kvzip,pool=1024,layers=shared,gates={file}")))
    context = llama_cpp.llama_init_from_model(model, params)
    batch = llama_cpp.llama_batch_init(64, 0, 1)
    texts = some_tokens(900, 5), some_tokens(900, 6)
    for at in range(0, 900, 30):
        batch.n_tokens = 60
        for i in range(60):
            seq, pos = i % 2, at + i // 2
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = texts[seq][pos], pos, 1, False
            batch.seq_id[i][0] = seq
        assert llama_cpp.llama_decode(context, batch) == 0, _native.last_error()
    pointer = _native.ffi.cast("struct llama_context *", ctypes.cast(context, ctypes.c_void_p).value)
    sets = []
    for seq in (0, 1):
        states, n = _native.ffi.new("uint8_t[]", 900), _native.ffi.new("size_t *")
        _native.check(_native.lib.asrkf_get_tokens(pointer, seq, 0, _native.ffi.NULL, states, 900, n))
        sets.append(np.frombuffer(_native.ffi.buffer(states), np.uint8) == _native.lib.ASRKF_TOKEN_FROZEN)
    assert all(frozen.sum() > 300 and not frozen[-WINDOW:].any() for frozen in sets)
    assert (sets[0] != sets[1]).sum() > 100 and len(gates.layers) == 2
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)


#
# what is refused
#


def test_a_model_without_gates_is_refused_with_the_command_that_makes_them(load, tiny, monkeypatch, tmp_path):
    monkeypatch.setenv("ASRKF_GATES", str(tmp_path))
    with pytest.raises((ValueError, KVError), match=r"needs gates of this model.*asrkf gates train"):
        load(tiny, kv_policy="kvzip", kv_pool=512)
    gates, _ = gates_of(tiny, tmp_path)
    write_gates(tmp_path / f"{gates.model}.asrkf-gates.gguf", gates)  # there it is looked for
    assert load(tiny, kv_policy="kvzip", kv_pool=512).kv_stats().device_index_bytes > 0


def changed(path: str, target: Path, change) -> str:
    """The file again, with its keys and tensors changed: change(keys, tensors) of {key: (value, types)} and {name: array}."""
    reader = gguf.GGUFReader(path)
    keys = {key: (field.contents(), field.types) for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    tensors = {tensor.name: (np.array(tensor.data), tensor.tensor_type) for tensor in reader.tensors}
    change(keys, tensors)
    writer = gguf.GGUFWriter(target, keys.pop("general.architecture")[0])
    for key, (value, types) in keys.items():
        writer.add_key_value(key, value, types[0], types[1] if len(types) > 1 else None)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(target)


def without(name):
    return lambda keys, tensors: (keys if name in keys else tensors).pop(name)


def put(key, value):
    return lambda keys, tensors: keys.update({key: (value, keys[key][1])})


def shorten(name):
    return lambda keys, tensors: tensors.update({name: (tensors[name][0][:-1], tensors[name][1])})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (without("asrkf.gates.dim"), "no asrkf.gates.dim"),
        (without("blk.1.gate_sinks"), "no tensor blk.1.gate_sinks"),
        (shorten("blk.0.gate_q.bias"), "blk.0.gate_q.bias has another type or shape"),
        (put("asrkf.gates.version", 9), "no gates of this version"),
        (put("general.architecture", "llama"), "no gates of this version"),
        (put("asrkf.gates.layers", [1, 0]), "makes no sense"),
        (put("asrkf.gates.layers", [0]), "no gates of layer 1"),
        (put("asrkf.gates.norm_eps", float("nan")), "makes no sense"),
        (put("asrkf.gates.model", "llama-0123456789abcdef"), "made for another model"),
    ],
)
def test_a_file_that_is_not_whole_or_of_another_model_is_refused_with_what_is_wrong(load, tiny, tmp_path, change, says):
    _, file = gates_of(tiny, tmp_path)
    bad = changed(file, tmp_path / "bad.gguf", change)
    with pytest.raises((ValueError, KVError), match=says):
        load(tiny, kv_policy=f"kvzip,gates={bad}", kv_pool=512)


def test_gates_of_another_shape_and_no_gguf_at_all_are_refused(load, tiny, tmp_path):
    _, file = gates_of(tiny, tmp_path, n_heads_kv=1)
    with pytest.raises((ValueError, KVError), match="2 heads and 1 KV heads, the model has 256, 4 and 2"):
        load(tiny, kv_policy=f"kvzip,gates={file}", kv_pool=512)
    (tmp_path / "text.gguf").write_text("not a GGUF")
    with pytest.raises((ValueError, KVError), match="cannot be read as GGUF"):
        load(tiny, kv_policy=f"kvzip,gates={tmp_path / 'text.gguf'}", kv_pool=512)
    whole = Path(file).read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises((ValueError, KVError), match="cannot be read as GGUF"):
        load(tiny, kv_policy=f"kvzip,gates={tmp_path / 'cut.gguf'}", kv_pool=512)


def test_gates_work_in_a_model_of_four_layers_with_a_calibrations_budgets(load, tmp_path):
    path = tmp_path / "four.gguf"
    write_tiny(path, n_layer=4)
    _, file = gates_of(str(path), tmp_path, layers=(0, 1, 2, 3))
    llm = load(str(path), n_ctx=4096, kv_policy=f"kvzip,calibration=off,gates={file}", kv_pool=1024)
    llm.eval(some_tokens(3000))
    groups = llm.kv_stats().groups
    assert 1 < len({group.pool_cells for group in groups}) < 4
    assert [group.layers for group in groups] == ["0", "1", "2", "3"]  # those with equal pools, too: each goes by gates of its own
    check_states(llm)
