"""llama_cpp still has what asrkf_gguf/_compat.py uses beyond its interface, and no other module uses more."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path

import llama_cpp
import pytest
from conftest import ROOT, python

from asrkf_gguf import KVError, KVStatus, _compat, _native

BINDINGS = Path(llama_cpp.__file__).parent
USERS = [path for path in sorted((ROOT / "asrkf_gguf").rglob("*.py")) if path.name != "_compat.py"]
USERS += [ROOT / "scripts" / name for name in ("bench", "demo.py")]


def missing(private: _compat.Private) -> str:
    """What to say if the installed llama_cpp has no such name; "" if it has."""
    module, _, path = private.where.partition(":")
    owner, _, attribute = path.rpartition(".")
    said = f"llama_cpp {llama_cpp.__version__} has no {private.where}; asrkf_gguf/_compat.py needs it: {private.why}; "
    said += f"better would be {private.instead}"
    try:
        found = importlib.import_module(module)
        for name in filter(None, owner.split(".")):
            found = getattr(found, name)
    except (ImportError, AttributeError):
        return said
    if hasattr(found, attribute):
        return ""
    # attributes that objects get when they are made
    set_in_methods = inspect.isclass(found) and re.search(rf"\bself\.{attribute}(: [^=\n]+)? = ", inspect.getsource(found))
    return "" if set_in_methods else said


@pytest.mark.parametrize("private", _compat.PRIVATE, ids=lambda private: private.where)
def test_llama_cpp_has_the_private_name(private):
    if private.where.startswith("llama_cpp.server"):
        pytest.importorskip("fastapi", reason="the server's packages are missing: pip install '.[test]'")
    assert not missing(private), missing(private)


@pytest.mark.parametrize("where", ["llama_cpp.nothing:x", "llama_cpp:Lama._seed", "llama_cpp:Llama._sed", "llama_cpp.llama_cpp:_library"])
def test_a_name_that_is_gone_is_missed_in_words(where):
    assert missing(_compat.Private(where, "to sample", "a public one")).endswith("needs it: to sample; better would be a public one")


def test_the_version_is_the_pinned_one():
    (pinned,) = re.findall(r"^version *= *(\S+)", (ROOT / "patches/UPSTREAM").read_text(), re.M)
    assert pinned == _compat.PINNED == llama_cpp.__version__


def test_what_stands_behind_the_names_behaves_as_we_use_it(load, tiny):
    llm = load(tiny, n_ctx=512, kv_policy="full")
    assert llm.must_eval and not llm.keeps_all_logits
    llm.eval([1, 2, 3])
    assert not llm.must_eval  # set by an evaluation
    llm.must_eval = True
    assert llm._requires_eval
    llm.set_seed(7)
    assert llm.current_seed == 7
    assert load(tiny, n_ctx=512, kv_policy="full", logits_all=True).keeps_all_logits


def test_every_sampler_is_made_where_tokens_can_be_put_before_it(load, tiny):
    llm = load(tiny, n_ctx=512, kv_policy="full")
    asked = []
    llm.tokens_before_sampling = lambda: asked.append(1) or [5, 6]
    llm.eval([1, 2, 3])
    llm.sample(temp=0)
    next(llm.generate([1, 2, 3], temp=0))
    assert len(asked) == 2
    said = "create_completion() no longer makes completions of _create_completion() alone: llama.py's flags miss what comes otherwise"
    assert inspect.getsource(llama_cpp.Llama).count("self._create_completion(") == 1, said


def test_c_code_is_quiet_in_its_block():
    result = python("import os\nfrom asrkf_gguf._compat import quiet\nwith quiet(): os.write(2, b'noise')\nos.write(2, b'heard')")
    assert result.stderr == "heard"


def test_the_servers_error_handler_asks_us_first():
    pytest.importorskip("fastapi", reason="the server's packages are missing: pip install '.[test]'")
    from asrkf_gguf import serve

    for status in KVStatus:
        answer = serve.refusal(KVError("text", status))
        expected = status in (KVStatus.INVALID_ARGUMENT, KVStatus.PROTECTED, KVStatus.POOL_FULL, KVStatus.HOST_LIMIT, KVStatus.UNSUPPORTED)
        assert (answer is not None) == expected, status
        if answer:
            assert answer == (400, {"message": "text", "type": "invalid_request_error", "param": None, "code": status.name.lower()})
            assert _compat.answer_to(KVError("text", status), None) == answer
    assert _compat.answer_to(RuntimeError("text"), None)[0] == 500


# who uses what

def private_names_of_llama_cpp() -> set[str]:
    """Every name with one underscore in front that its files define or set, and its modules of that kind."""
    found = {path.stem for path in BINDINGS.rglob("_*.py")}
    for path in BINDINGS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                found.add(node.name)
            elif isinstance(node, (ast.Attribute, ast.Name)) and isinstance(node.ctx, ast.Store):
                found.add(node.attr if isinstance(node, ast.Attribute) else node.id)
    return {name for name in found if re.match(r"_[^_]", name)}


def used(code: str) -> set[str]:
    """Names with one underscore in front that code takes from an object or a module, sets in one or defines in a class."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("llama_cpp"):
            found |= {*(node.module or "").split("."), *(alias.name for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {part for alias in node.names if alias.name.startswith("llama_cpp") for part in alias.name.split(".")}
        elif isinstance(node, ast.ClassDef):
            found |= {inner.name for inner in node.body if isinstance(inner, ast.FunctionDef)}
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "setattr", "hasattr"):
            found |= {argument.value for argument in node.args if isinstance(argument, ast.Constant) and isinstance(argument.value, str)}
    return {name for name in found if re.match(r"_[^_]", name)}


@pytest.mark.parametrize("path", USERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_other_module_uses_a_private_name_of_llama_cpp_nor_one_like_it(path):
    """Nor one like it: in a subclass a name of ours that is also one of theirs would replace it."""
    shared = used(path.read_text()) & private_names_of_llama_cpp()
    assert not shared, f"{path.relative_to(ROOT)} uses {sorted(shared)}: that belongs in asrkf_gguf/_compat.py, or is a name to change"


@pytest.mark.parametrize("code", [
    "llm._ctx.decode()", "llama_cpp._internals.LlamaBatch", "from llama_cpp import _utils", "import llama_cpp._utils as u",
    "from llama_cpp._logger import logger", "class L(llama_cpp.Llama):\n    def _init_sampler(self): pass", "self._seed = 1", "getattr(llm, '_ctx')",
])  # fmt: skip
def test_a_use_of_a_private_name_is_found(code):
    assert used(code) & private_names_of_llama_cpp()


def test_the_statuses_are_those_of_the_header():
    header = {name.removeprefix("ASRKF_"): value for value, name in _native.ffi.typeof("enum asrkf_status").elements.items()}
    assert {status.name: status.value for status in KVStatus} == header
