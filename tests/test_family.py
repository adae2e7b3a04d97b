"""What a model file is: each reason against one in one line, and what is wrong with one of LLaMA-3's family that loads."""

from __future__ import annotations

import dataclasses
import logging
import random
import sys
from pathlib import Path

import llama_cpp
import pytest
from conftest import ROOT
from make_models import split, write_lora, write_tiny

from asrkf_gguf import Llama, family
from asrkf_gguf.cli import main
from asrkf_gguf.header import read_header

sys.path.insert(0, str(ROOT / "scripts"))
from make_llama3 import Shape, vocabulary, write_llama3

SMALL = Shape(n_layer=1, n_embd=64, n_head=1, n_head_kv=1, n_ff=64)


@pytest.fixture(scope="session")
def llama3(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("llama3") / "llama3.gguf"
    write_llama3(path, SMALL)
    return path


def refusal(path: Path) -> str:
    """Why it is not loaded: by Llama, and by the command, in the same words and in one line."""
    with pytest.raises(ValueError) as refused:
        Llama(str(path), n_ctx=512, verbose=False)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_header_is_read_by_ggml(tiny):
    header = read_header(Path(tiny))
    assert header.strings["general.architecture"] == "llama" and header.numbers["llama.block_count"] == 2
    assert "blk.1.ffn_up.weight" in header.tensors and header.n_bytes == Path(tiny).stat().st_size
    assert 0 < header.data_offset < header.n_bytes


def test_a_model_is_not_refused(tiny, llama3):
    family.refuse(Path(tiny))
    family.refuse(llama3)


def test_a_file_that_ends_too_early_is_called_truncated_wherever_it_ends(tmp_path, tiny):
    seed = random.randrange(1 << 30)
    print("seed", seed)
    content, path = Path(tiny).read_bytes(), tmp_path / "short.gguf"
    header = read_header(Path(tiny))
    for n in [4, 5, 24, header.data_offset - 1, header.data_offset, len(content) - 1, *random.Random(seed).choices(range(5, len(content)), k=20)]:
        path.write_bytes(content[:n])
        with pytest.raises(ValueError, match=r"short.gguf .*truncated"):
            family.refuse(path)
    assert "short.gguf is truncated" in refusal(path) or "no whole header" in refusal(path)


@pytest.mark.parametrize(("content", "says"), [
    (b"", "is empty"), (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a Git LFS pointer"), (b"<!DOCTYPE html><html>", "a web page"),
    (b"PK\x03\x04archive/data.pkl", "a PyTorch file"), (b"\x08\0\0\0\0\0\0\0{\"a\": 1}", "a safetensors file"), (b"tjgg\x03\0\0\0", "a GGML file"),
    (b"nothing of the kind", "another format"),
])  # fmt: skip
def test_what_is_no_gguf_is_called_what_it_is(tmp_path, content, says):
    (tmp_path / "model.gguf").write_bytes(content)
    assert says in refusal(tmp_path / "model.gguf")


def test_adapters_projectors_and_unknown_architectures_are_called_what_they_are(tmp_path):
    write_lora(tmp_path / "lora.gguf")
    assert "lora.gguf is a LoRA adapter" in refusal(tmp_path / "lora.gguf")
    write_tiny(tmp_path / "mmproj.gguf", arch="clip")
    assert "is a projector of images or sound" in refusal(tmp_path / "mmproj.gguf")
    write_tiny(tmp_path / "other.gguf", arch="sd3")
    assert "does not know its architecture 'sd3'" in refusal(tmp_path / "other.gguf")


def test_a_split_model_that_is_not_whole_says_which_part_is_missing(tmp_path):
    write_tiny(tmp_path / "m.gguf")
    first, second, third = split(tmp_path / "m.gguf", 3)
    family.refuse(first)
    assert f"give the first, {first.name}" in refusal(second)
    content = third.read_bytes()
    third.write_bytes(content[:-100])
    assert f"{third.name} is truncated" in refusal(first)
    third.unlink()
    assert f"missing: {third.name}" in refusal(first)
    third.write_bytes(content)
    first.rename(tmp_path / "renamed.gguf")
    assert "is one of 3 parts: keep their names" in refusal(tmp_path / "renamed.gguf")


def test_the_command_says_it_in_one_line(tmp_path, capsys):
    write_lora(tmp_path / "lora.gguf")
    assert main(["run", str(tmp_path / "lora.gguf"), "-p", "x"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


# LLaMA-3

def said(caplog, path: Path, **options) -> list[str]:
    """Warnings of a model that is loaded without llama.cpp's log."""
    caplog.clear()
    with caplog.at_level(logging.WARNING, "asrkf_gguf"):
        llm = Llama(str(path), **{"n_ctx": 512, "verbose": False, **options})
    llm.close()
    return [record.getMessage() for record in caplog.records]


def test_a_true_one_has_nothing_wrong(caplog, llama3):
    assert said(caplog, llama3) == []


@pytest.mark.parametrize(("change", "without", "says"), [
    ({}, ("pre",), "does not name LLaMA-3's pre-tokenizer"),
    ({}, ("<|eot_id|>",), "a chat will not stop"),
    ({"rope_base": 10000.0}, (), "its rope base is 10000, LLaMA-3's is 500000"),
    ({"has_factors": False}, (), "trained for 131072 tokens, but has no rope factors"),
    ({"n_ctx": 8192, "has_factors": False}, (), None),
])  # fmt: skip
def test_each_fault_is_named_without_the_log_too(caplog, tmp_path, change, without, says):
    write_llama3(tmp_path / "m.gguf", dataclasses.replace(SMALL, **change), without)
    found = said(caplog, tmp_path / "m.gguf")
    assert [text.startswith("m.gguf: ") and says in text for text in found] == [True] * (says is not None)


@pytest.mark.parametrize(("n_trained", "n_ctx", "warns"), [(8192, 8192, False), (8192, 8448, True), (131072, 8448, False)])
def test_a_context_past_the_training_is_a_warning(caplog, tmp_path, n_trained, n_ctx, warns):
    write_llama3(tmp_path / "m.gguf", dataclasses.replace(SMALL, n_ctx=n_trained, has_factors=n_trained > 8192))
    found = said(caplog, tmp_path / "m.gguf", n_ctx=n_ctx)
    assert [f"more than the {n_trained} tokens" in text for text in found] == [True] * warns


def test_a_vocabulary_that_is_cut_short_is_named(caplog, tmp_path, monkeypatch):
    monkeypatch.setattr("make_llama3.N_VOCAB", 128100)
    write_llama3(tmp_path / "m.gguf", SMALL)
    assert ["its vocabulary has 128100 tokens" in text for text in said(caplog, tmp_path / "m.gguf")] == [True]


@pytest.mark.parametrize("without", [(), ("chat_template",)])
def test_a_chat_is_llama_3s_also_without_a_template(tmp_path, llama3, without, load):
    path = llama3
    if without:
        path = tmp_path / "m.gguf"
        write_llama3(path, SMALL, without)
    llm = load(str(path), n_ctx=512)
    llm.create_chat_completion([{"role": "user", "content": "w1"}], max_tokens=1)
    tokens = vocabulary()
    words = [tokens[token].replace("Ċ", "\n") for token in llm.input_ids[: llm.n_tokens]]
    turns = "<|start_header_id|>user<|end_header_id|>\n\nw1<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    assert "".join(words) == f"<|begin_of_text|>{turns}"
    assert llama_cpp.llama_vocab_is_eog(llama_cpp.llama_model_get_vocab(llm.model), tokens.index("<|eot_id|>"))
