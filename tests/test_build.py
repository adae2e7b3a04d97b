"""What every build decides by itself, and that the user's options reach it. Needs cmake and a compiler, no model."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

PROJECT = f"""
cmake_minimum_required(VERSION 3.21)
project(stand_in LANGUAGES C CXX)
file(WRITE ${{CMAKE_BINARY_DIR}}/ggml.cpp "#ifdef __AMX_INT8__\\n#pragma message(\\"compiled with AMX\\")\\n#endif\\nint ggml;\\n")
add_library(ggml-cpu STATIC ${{CMAKE_BINARY_DIR}}/ggml.cpp)
target_compile_options(ggml-cpu PRIVATE -march=native -mamx-tile -mamx-int8)
include({ROOT}/native/cmake/amx.cmake)
asrkf_decide_amx(ggml-cpu)
"""
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # scripts/setup brings a cmake
x86_only = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="AMX is part of x86-64")


def decide(folder: Path, *options: str) -> tuple[str, bool]:
    """What configuring says of AMX, and whether ggml's stand-in is then compiled with it."""
    (folder / "CMakeLists.txt").write_text(PROJECT)
    command = ["cmake", "-S", folder, "-B", folder / "build", "-DCMAKE_CXX_FLAGS=-mamx-tile -mamx-int8", "-DCMAKE_BUILD_TYPE=Release", *options]
    environment = {**os.environ, "PATH": PATH}
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    built = subprocess.run(["cmake", "--build", folder / "build"], env=environment, capture_output=True, text=True, check=True)
    line = re.search(r"asrkf: AMX: (.*)", said)
    assert line, said
    return line[1], "compiled with AMX" in built.stdout + built.stderr


@x86_only
def test_amx_is_left_out_where_the_compiler_drops_the_tile_configuration(tmp_path):
    said, with_amx = decide(tmp_path, "-DGGML_NATIVE=ON")
    compiler = subprocess.run(["c++", "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
    if re.search(r"\b12\.2\.", compiler) and "clang" not in compiler:  # seen there
        assert said.startswith("off, this compiler drops the tile configuration")
    assert with_amx == said.startswith("on,")


@x86_only
def test_amx_is_left_out_where_a_worker_thread_cannot_multiply_tiles(tmp_path):
    if "amx_int8" in Path("/proc/cpuinfo").read_text():
        pytest.skip("this CPU has AMX: it could pass")
    said, with_amx = decide(tmp_path, "-DGGML_NATIVE=ON", "-DCMAKE_BUILD_TYPE=Debug")  # nothing is dropped without optimisation
    assert said.startswith("off, a worker thread that multiplies tiles fails (")
    assert not with_amx


@x86_only
def test_amx_that_cannot_be_tried_is_left_out(tmp_path):
    said, with_amx = decide(tmp_path, "-DGGML_NATIVE=OFF", "-DGGML_AMX_INT8=ON", "-DCMAKE_BUILD_TYPE=Debug")
    assert said.startswith("off, it cannot be tried on this machine") and not with_amx


@x86_only
def test_an_option_turns_amx_on_and_off(tmp_path):
    assert decide(tmp_path, "-DGGML_NATIVE=ON", "-DASRKF_AMX=ON") == ("on, as ASRKF_AMX=ON says", True)
    said, with_amx = decide(tmp_path, "-DASRKF_AMX=OFF")
    assert said.startswith("off, ASRKF_AMX=OFF says so") and not with_amx


def arguments(**environment: str) -> list[str]:
    """What scripts/cmake_args hands to cmake."""
    command = 'source scripts/cmake_args; source scripts/cmake_args; printf "%s\\0" "${cmake_args[@]}"'  # twice: scripts call scripts
    clean = {key: value for key, value in os.environ.items() if key not in ("CMAKE_ARGS", "CFLAGS", "CXXFLAGS")}
    out = subprocess.run(["bash", "-c", command], cwd=ROOT, env={**clean, **environment}, capture_output=True, text=True, check=True).stdout
    return out.split("\0")[:-1]


def test_cmake_args_keep_quoted_values_with_spaces_and_carry_the_compilers_flags():
    made = arguments(CMAKE_ARGS='-DA="x y" -DB=1', CFLAGS="-g", CXXFLAGS='-O2 -DQ="a b"')
    assert made == ["-DA=x y", "-DB=1", "-DCMAKE_C_FLAGS=-g", '-DCMAKE_CXX_FLAGS=-O2 -DQ="a b"']
    assert arguments(CMAKE_ARGS="-DCMAKE_CXX_FLAGS=-O1", CXXFLAGS="-O2") == ["-DCMAKE_CXX_FLAGS=-O1", "-DCMAKE_C_FLAGS="]
    assert arguments() == ["-DCMAKE_C_FLAGS=", "-DCMAKE_CXX_FLAGS="]


def test_every_script_that_calls_cmake_hands_them_on():
    found = set()
    for path in (ROOT / "scripts").iterdir():
        text = path.read_text() if path.is_file() else ""
        if re.search(r"^[^#\n]*\bcmake\"?,? \"?-S", text, re.M):
            found.add(path.name)
            assert "source scripts/cmake_args" in text and '"${cmake_args[@]}"' in text, path.name
    assert found == {"build_upstream", "test_gpu", "test_native", "upstream_tests"}
