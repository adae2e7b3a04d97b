"""The CUDA kernels are compiled for every card that they are meant for. What they compute is shown on a CPU: native/test_cuda.cpp."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = (75, 80, 86, 89, 90, 120)
KERNELS = sorted((ROOT / "native/cuda").glob("*.cu"))


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda path: path.name)
def test_a_kernel_compiles_for_every_card_without_a_warning(tmp_path, kernel):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc: the CUDA kernels are not compiled here")
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    missing = [number for number in ARCHITECTURES if f"sm_{number}" not in known]
    if missing:
        pytest.skip(f"this nvcc does not know {missing}: CUDA 12.8 to 13 knows all of {ARCHITECTURES}")
    made = tmp_path / "kernel.cubins"
    command = [nvcc, "-std=c++17", "-O3", f"-I{ROOT / 'native'}", "-fatbin", "-o", str(made), str(kernel), "--threads=2"]
    command += [f"-gencode=arch=compute_{number},code=sm_{number}" for number in ARCHITECTURES]
    command += ["--Werror=all-warnings", "-Xcompiler=-Wall,-Wextra", "-Xptxas=-v"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    compiled = set(re.findall(r"Compiling entry function '\w+' for 'sm_(\d+)'", done.stderr))
    assert compiled == {str(number) for number in ARCHITECTURES}
    frames = [int(size) for size in re.findall(r"(\d+) bytes stack frame", done.stderr)]
    assert len(frames) >= len(ARCHITECTURES) and max(frames) <= 128  # a few spilled registers, no array in a card's slow memory
    assert made.stat().st_size > 0


def test_there_are_kernels():
    assert [path.name for path in KERNELS] == ["entropy.cu", "relevance.cu", "rows.cu"]
