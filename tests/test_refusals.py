"""Bad input gets an exception that names the value and the remedy; the process goes on."""

from __future__ import annotations

from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest
from conftest import python
from make_models import write_tiny

from asrkf_gguf import FreezeConfig, Llama


@pytest.mark.parametrize(
    ("kwargs", "part"),
    [
        ({"kv_pool": 0}, "pool=0 must be positive"),
        ({"kv_pool": -1}, "pool=-1 must be positive"),
        ({"kv_pool": 4096}, "pool of 4096 cells is larger than n_ctx 2048"),
        ({"kv_pool": "1MiB"}, "raise kv_pool to at least"),
        ({"kv_policy": "asrkf,device_limit=500MiB"}, "the smallest pool, 256 of 2048 cells in q8_0, does not fit"),
        ({"kv_policy": "asrkf,types=auto", "kv_pool": 512}, "types=auto chooses by bytes"),
        ({"kv_pool": "120%"}, "at most 100%"),
        ({"kv_pool": 1.5}, "at most 1.0"),
        ({"kv_policy": "asrkf,window=500", "kv_pool": 512}, "raise kv_pool to at least 768 or lower window"),
        ({"kv_policy": "asrkf,pinned=0-400", "kv_pool": 512}, "raise kv_pool to at least 768"),
        ({"kv_policy": "arskf", "kv_pool": 512}, 'did you mean "asrkf"'),
        ({"kv_policy": "asrkf,sinkz=4", "kv_pool": 512}, 'did you mean "sinks"'),
        ({"kv_pool": 512, "flash_attn": False}, "pass flash_attn=True"),
        ({"kv_pool": 512, "embedding": True}, "drop embedding=True"),
        ({"kv_policy": None, "kv_pool": 512}, "needs a kv_policy"),
        ({"kv_policy": "asrkf,score_layers=40", "kv_pool": 512}, "the model has 30 layers with a KV cache, and 40"),
        ({"kv_policy": "asrkf,layers=0-9@512"}, "layer 10 is in no group"),
        ({"kv_policy": FreezeConfig(pool=512), "kv_pool": 1024}, "contradicts"),
    ],
)
def test_settings_that_cannot_work_are_refused_with_the_remedy(load, smollm2, kwargs, part):
    with pytest.raises(ValueError) as error:
        load(smollm2, **{"kv_policy": "asrkf", **kwargs})
    assert part in str(error.value)
    llm = load(smollm2, n_ctx=512)  # nothing of the refused settings is left for the next context
    assert llm.kv_stats().policy == "full"


def test_the_smallest_pool_that_the_error_names_works(load, smollm2):
    llm = load(smollm2, kv_policy="asrkf,window=500", kv_pool=768)
    assert llm.kv_stats().pool_cells == 768


def test_pools_are_cells_fractions_and_bytes(load, smollm2):
    # means of 30 layers, which have whole units of 256 cells each: 117 units, 68 and so on
    for pool, cells in ((1000, 999), (0.25, 512), ("14MiB", 581), ("0.5", 1024), (2048, 2048)):
        assert load(smollm2, kv_policy="asrkf", kv_pool=pool, type_k=llama_cpp.GGML_TYPE_F16).kv_stats().pool_cells == cells, pool
    assert load(smollm2, kv_policy="asrkf,layers=shared", kv_pool=1000).kv_stats().pool_cells == 1024


def test_a_missing_model_says_so():
    with pytest.raises(ValueError, match="Model path does not exist"):
        Llama("/nonexistent/model.gguf", kv_policy="asrkf", kv_pool=512, verbose=False)


def test_a_truncated_model_says_so(tmp_path: Path, smollm2):
    path = tmp_path / "truncated.gguf"
    path.write_bytes(Path(smollm2).read_bytes()[: 20 << 20])
    with pytest.raises(ValueError, match=r"truncated\.gguf is truncated: it has 20971520 bytes, and needs 98362432; fetch it again"):
        Llama(str(path), kv_policy="asrkf", kv_pool=512, verbose=False)


def test_a_recurrent_model_is_refused_with_the_reason(load, tmp_path: Path):
    path = tmp_path / "mamba.gguf"
    writer = gguf.GGUFWriter(path, "mamba")
    writer.add_context_length(2048)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(1)
    writer.add_ssm_conv_kernel(4)
    writer.add_ssm_inner_size(128)
    writer.add_ssm_state_size(16)
    writer.add_ssm_time_step_rank(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(256)
    writer.add_tokenizer_model("no_vocab")
    shapes = {
        "token_embd.weight": (256, 64), "output_norm.weight": (64,), "blk.0.attn_norm.weight": (64,), "blk.0.ssm_in.weight": (256, 64),
        "blk.0.ssm_conv1d.weight": (128, 4), "blk.0.ssm_conv1d.bias": (128,), "blk.0.ssm_x.weight": (4 + 32, 128),
        "blk.0.ssm_dt.weight": (128, 4), "blk.0.ssm_dt.bias": (128,), "blk.0.ssm_a": (128, 16), "blk.0.ssm_d": (128,),
        "blk.0.ssm_out.weight": (64, 128),
    }
    for name, shape in shapes.items():
        writer.add_tensor(name, np.zeros(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="mamba is a recurrent model"):
        load(str(path), kv_policy="asrkf", kv_pool=512)


def test_an_encoder_is_refused_with_the_reason(load, tmp_path: Path):
    extra = {"position_embd.weight": (32768, 256)}
    for name in ("token_embd_norm", "blk.%d.attn_output_norm", "blk.%d.layer_output_norm"):
        extra |= {f"{name}.weight": (256,), f"{name}.bias": (256,)}
    metadata = {"tokenizer.ggml.token_type_count": 2, "attention.causal": False, "attention.layer_norm_epsilon": 1e-5, "pooling_type": 0}
    write_tiny(tmp_path / "bert.gguf", arch="bert", metadata=metadata, extra=extra,
               without=("attn_norm.weight", "ffn_norm.weight", "output_norm.weight", "ffn_gate.weight"))
    with pytest.raises(ValueError, match="bert attends to later tokens too"):
        load(str(tmp_path / "bert.gguf"), kv_policy="asrkf", kv_pool=512)


def test_torch_is_not_pulled_in():
    result = python("import sys, asrkf_gguf; print('torch' in sys.modules)")
    assert result.stdout.strip() == "False", result.stderr


def test_the_environment_serves_python_too(smollm2):
    code = f"from asrkf_gguf import Llama; print(Llama({smollm2!r}, n_ctx=1024, verbose=False%s).kv_stats().policy)"
    assert python(code % "", LLAMA_KV_POLICY="window,pool=512").stdout.strip() == "window"
    assert python(code % ", kv_policy='full'", LLAMA_KV_POLICY="window,pool=512").stdout.strip() == "full"
    result = python(code % "", LLAMA_KV_POLICY="windo,pool=512")
    assert result.returncode == 1 and 'did you mean "window"' in result.stderr
