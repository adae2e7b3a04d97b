"""`asrkf plan`: what it predicts is what the backends then allocate, and what auto takes on a device of that size."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import llama_cpp
import pytest
from conftest import python
from make_models import split, write_llama, write_llama3_shape, write_tiny
from test_windowed import write_gemma3

from asrkf_gguf import Plan, __version__, plan
from asrkf_gguf.cli import main

F16 = gguf.GGMLQuantizationType.F16
SHAPES = ("smollm2", "8B", "70B", "windowed", "heads by layer")


@pytest.fixture
def shape(request, tmp_path: Path, smollm2) -> str:
    """A model file; of the large shapes two layers with a hole for the weights."""
    path, big = tmp_path / "model.gguf", {"n_ctx": 32768, "n_vocab": 4096, "rope_base": 500000.0, "kind": F16, "kind_of": lambda _: F16, "n_layer": 2}
    if request.param == "smollm2":
        return smollm2
    if request.param == "8B":
        write_llama(path, n_embd=4096, n_head=32, n_head_kv=8, n_ff=14336, untied=True, **big)
    elif request.param == "70B":
        write_llama(path, n_embd=8192, n_head=64, n_head_kv=8, n_ff=28672, untied=True, **big)
    elif request.param == "windowed":
        write_gemma3(path)
    else:
        write_tiny(path, arch="deci", n_layer=4, n_head_kv=[4, 2, 1, 2])
    return str(path)


def test_a_pool_that_holds_everything_takes_what_upstream_takes(smollm2):
    """No index, no scores, and compute buffers of the same size: the graph is upstream's."""
    upstream, *_, ours = plan(smollm2, 8192).sides
    assert (ours.kv_bytes, ours.index_bytes, ours.compute_bytes) == (upstream.kv_bytes, 0, upstream.compute_bytes)


@pytest.mark.parametrize("shape", SHAPES, indirect=True)
@pytest.mark.parametrize("policy", ["asrkf", "asrkf,pool=1024"])
def test_what_is_predicted_is_what_is_allocated(load, shape, policy):
    """K, V and index to the byte, the sum with the compute buffers within 2 %."""
    made = plan(shape, 4096, kv_policy=policy)
    for side, options in zip((made.sides[0], made.sides[1], made.sides[-1]), (
        {"kv_policy": "full"}, {"kv_policy": "full", "type_k": llama_cpp.GGML_TYPE_Q8_0, "type_v": llama_cpp.GGML_TYPE_Q8_0}, {"kv_policy": policy},
    ), strict=True):  # fmt: skip
        stats = load(shape, n_ctx=4096, **options).kv_stats()
        assert (side.kv_bytes, side.index_bytes) == (stats.device_kv_bytes, stats.device_index_bytes), side
        assert side.cache_bytes == pytest.approx(stats.device_kv_bytes + stats.device_index_bytes + stats.device_compute_bytes, rel=0.02), side
        assert side.cells == stats.pool_cells
        assert not stats.type_k or side.kind == stats.type_k


@pytest.mark.parametrize("shape", SHAPES, indirect=True)
def test_staging_is_planned_where_rows_are_staged(load, shape):
    """The buffer's parts are padded to 256 bytes each, which the plan leaves out."""
    policy = "asrkf,pool=1024,moves=staged"
    side, stats = plan(shape, 4096, kv_policy=policy).sides[-1], load(shape, n_ctx=4096, kv_policy=policy).kv_stats()
    n_tensors = 2 * sum(group.n_layers for group in stats.groups)
    assert 0 <= stats.device_staging_bytes - side.staging_bytes <= 2 * 256 * (n_tensors + len(stats.groups)) + 256
    assert side.staging_bytes == 64 * sum(group.token_bytes for group in stats.groups)
    assert plan(shape, 4096, kv_policy="asrkf,pool=1024").sides[-1].staging_bytes == 0


def test_on_a_card_that_is_not_here_staging_counts(smollm2):
    card = plan(smollm2, 8192, vram="770MiB")
    assert [side.staging_bytes for side in card.sides[:3]] == [0, 0, 0]
    side = card.sides[-1]
    assert side.cells < 8192 and side.staging_bytes == 64 * 30 * 192 * (34 + 22) // 32  # rows of 192 values, K's in Q8_0 and V's in Q5_0
    assert card.weights_bytes + card.margin_bytes + side.cache_bytes <= card.device_bytes and side.missing_bytes == 0


def test_a_split_model_is_planned_as_the_whole_is(tiny, tmp_path):
    whole = tmp_path / "model.gguf"
    whole.write_bytes(Path(tiny).read_bytes())
    one = plan(str(whole), 4096, vram="600MiB")
    parts = split(whole, 3)
    assert len(parts) == 3
    several = plan(str(parts[0]), 4096, vram="600MiB")
    assert (several.weights_bytes, several.host_weights_bytes, several.sides) == (one.weights_bytes, one.host_weights_bytes, one.sides)
    assert one.weights_bytes > 0


def test_on_a_device_of_that_size_auto_takes_what_the_plan_says(load, smollm2):
    for mib in (760, 800, 850):
        limit = f"asrkf,device_limit={mib}MiB"
        side, stats = plan(smollm2, 8192, kv_policy=limit).sides[-1], load(smollm2, n_ctx=8192, kv_policy=limit).kv_stats()
        assert stats.type_k == stats.type_v  # on a CPU
        assert (side.kind, side.cells, side.kv_bytes) == (stats.type_k, stats.pool_cells, stats.device_kv_bytes)


def check_partials(made: Plan) -> None:
    """Of every full cache that does not fit: with so many layers it does, with one more it would not. All layers are alike."""
    assert {other.kind for other in made.partials} == {side.kind for side in made.sides[:3] if side.missing_bytes}
    in_ram = [other.host_weights_bytes + other.host_kv_bytes for other in made.partials]
    assert in_ram == sorted(in_ram)
    for other, beside in zip(made.partials, in_ram, strict=True):
        side = next(side for side in made.sides if side.kind == other.kind)
        n_beside = other.n_layers - other.n_gpu_layers
        layer_bytes = beside / n_beside
        needed = made.weights_bytes + side.cache_bytes + made.margin_bytes - beside
        assert n_beside > 0 and needed <= made.device_bytes < needed + layer_bytes * 1.0001
        assert other.host_kv_bytes == pytest.approx(side.kv_bytes * n_beside / (other.n_layers - 1), rel=1e-6)


def test_cards_of_consumers_with_the_shape_of_llama_3_1_8b(tmp_path):
    """The types change as the card grows; what fits, fits with the margin; missing bytes are of the card, weights included."""
    write_llama3_shape(tmp_path / "model.gguf", 131072)
    taken = []
    for gib in (6, 8, 12):
        made = plan(str(tmp_path / "model.gguf"), 32768, vram=f"{gib}GiB")
        assert made.is_estimate and made.weights_bytes + made.host_weights_bytes == pytest.approx((tmp_path / "model.gguf").stat().st_size, rel=1e-4)
        f16, q8_0, _, ours = made.sides
        assert f16.kv_bytes == 32768 * 131072 and q8_0.kv_bytes == f16.kv_bytes * 34 // 64
        for side in made.sides:
            assert (side.missing_bytes == 0) == (made.weights_bytes + side.cache_bytes + made.margin_bytes <= gib << 30)
        assert ours.missing_bytes == 0
        taken.append((ours.kind, ours.cells == 32768))
        check_partials(made)
    assert taken == [("q8_0/q5_0", False), ("q8_0", True), ("f16", True)]


def test_a_model_that_has_no_pool_still_has_upstreams_sides(tmp_path):
    write_tiny(tmp_path / "all-windowed.gguf", n_layer=2, n_embd=96, n_head=2, n_head_kv=2)  # heads of 48
    made = plan(str(tmp_path / "all-windowed.gguf"), 2048, kv_policy="asrkf,pool=512,index=q4_0")
    assert not made.sides[0].refused and "do not divide the head size 48" in made.sides[-1].refused and not made.command


def test_the_command_prints_a_table_or_json_and_warns_past_the_training(tiny, capsys):
    assert main(["plan", tiny, "-c", "65536"]) == 0
    text = capsys.readouterr().out
    assert "trained for 32768 tokens" in text and "command: asrkf run" in text and "q4_0" in text
    assert main(["plan", tiny, "-c", "2048", "--vram", "1GiB", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["n_ctx"] == 2048 and made["device_bytes"] == 1 << 30 and len(made["sides"]) == 4


def test_the_command_is_of_what_was_planned_and_of_what_fits(tiny):
    made = plan(tiny, 2048, n_gpu_layers=1, n_ubatch=128)
    assert made.command == f"asrkf run {tiny} -c 2048 --n-gpu-layers 1 --ubatch 128"
    too_large = plan(tiny, 2048, vram="513MiB", kv_policy="asrkf,pool=1024")
    assert too_large.sides[-1].missing_bytes and not too_large.command
    with pytest.raises(ValueError, match="n_gpu_layers needs the card here"):
        plan(tiny, 2048, vram="1GiB", n_gpu_layers=1)


@pytest.mark.parametrize(("arguments", "part"), [
    (["/nonexistent.gguf"], "does not exist"), ([__file__], "is not a GGUF file but another format"), (["{}", "--vram", "8 apples"], "unknown unit"),
    (["{}", "-c", "-5"], "n_ctx=-5"), (["{}", "--kv-policy", "arskf"], 'did you mean "asrkf"'), (["hf:nobody"], "is not hf:OWNER/REPO"),
])  # fmt: skip
def test_bad_input_is_refused_in_one_line(tiny, capsys, arguments, part):
    assert main(["plan", *(argument.format(tiny) for argument in arguments)]) == 1
    error = capsys.readouterr().err
    assert part in error and error.count("\n") == 1


def test_the_version_is_the_librarys(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out.split() == ["asrkf", __version__]


def test_planning_leaves_nothing_for_the_next_context(tiny):
    code = f"from asrkf_gguf import Llama, plan; plan({tiny!r}, vram='1GiB'); print(Llama({tiny!r}, n_ctx=512, verbose=False).kv_stats().policy)"
    assert python(code).stdout.strip() == "full"


def test_the_guides_table_of_cards_is_what_the_command_computes(tmp_path):
    text = (Path(__file__).parent.parent / "docs/guide.md").read_text().split("<!-- cards:")[1].split("<!-- end of cards -->")[0]
    header, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|"))
    write_llama3_shape(tmp_path / "3 8B", 8192)
    write_llama3_shape(tmp_path / "3.1 8B", 131072)
    assert len(rows) == 6
    for what, side, *cells in rows:
        model, n_ctx = what.split(", ")
        made = [plan(str(tmp_path / model), int(n_ctx), vram=size.replace(" ", "")) for size in header[2:]]
        if side == "upstream":
            computed = [next((s.kind for s in one.sides[:3] if not s.missing_bytes), "none") for one in made]
        else:
            ours = [one.sides[-1] for one in made]
            computed = [f"{'all' if s.cells == int(n_ctx) else f'{round(s.cells / 1000)}k'}, {s.kind}" for s in ours]
        assert cells == computed, what
