"""Arrows between the rooms point down only: a test reads imports and includes."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# who may include whom, besides the standard library; "llama-" stands for llama.cpp's own headers (its src/)
NATIVE = {
    "config": {"asrkf.h"},
    "policy": {"config.h"},
    "host_store": {"config.h", "ggml-backend.h"},
    "row_mover": {"config.h", "ggml.h", "ggml-backend.h", "ggml-alloc.h", "ggml-cpp.h"},
    "budgets": {"config.h"},
    "calibration": {"config.h"},
    "entropy": {"config.h"},
    "relevance": {"config.h", "ggml.h", "ggml-backend.h", "ggml-alloc.h", "ggml-cpp.h"},
    "cache": {"budgets.h", "calibration.h", "config.h", "entropy.h", "host_store.h", "policy.h", "relevance.h", "row_mover.h", "llama-"},
    "asrkf": {"asrkf.h", "cache.h", "entropy.h"},
}
PYTHON = {
    "_native": set(),
    "config": {"_native"},
    "stats": {"_native", "config"},
    "models": {"_native"},
    "texts": {"models"},
    "divergence": set(),
    "llama": {"_native", "config", "models", "stats"},
    "calibrate": {"_native", "divergence", "models", "texts"},
    "bench": {"_native", "config", "divergence", "llama", "models", "texts"},
    "serve": {"_native", "config", "llama", "models", "stats"},
    "cli": {"_native", "bench", "calibrate", "config", "llama", "models", "serve", "stats"},
    "__init__": {"_native", "config", "llama", "models", "stats"},
}


def test_native_files_include_only_what_lies_below_them():
    seen = set()
    for path in sorted((ROOT / "native").glob("*.[ch]*")):
        room = path.stem
        seen.add(room)
        for name in re.findall(r'^#\s*include "([^"]+)"', path.read_text(), re.M):
            allowed = NATIVE[room] | {f"{room}.h"}
            assert name in allowed or ("llama-" in allowed and name.startswith("llama-")), f"{path.name} includes {name}"
    assert seen - {"CMakeLists"} == set(NATIVE)


def test_llama_cpp_internals_are_included_in_one_file():
    users = {path.name for path in (ROOT / "native").glob("*.*") if re.search(r'#include "llama-', path.read_text())}
    assert users == {"cache.cpp"}


def test_policy_names_no_tensor():
    for name in (f"{room}.{kind}" for room in ("policy", "budgets", "entropy") for kind in ("h", "cpp")):
        code = re.sub(r"//[^\n]*", "", (ROOT / "native" / name).read_text())
        assert not re.search(r"ggml|llama", code), name


def test_patches_name_no_policy():
    for path in (ROOT / "patches").glob("*.patch"):
        added = [line for line in path.read_text().splitlines() if line.startswith("+")]
        assert added and not re.search(r"asrkf|freeze|frozen|policy", "\n".join(added)), path.name


def test_python_modules_import_only_what_lies_below_them():
    for path in sorted((ROOT / "asrkf_gguf").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                names = {node.module} if node.module else {alias.name for alias in node.names}
                if path.stem == "cli":
                    names.discard("__version__")
                assert names <= PYTHON[path.stem], f"{path.name} imports {names}"
