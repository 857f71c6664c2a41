"""The CUDA kernels: what the build says about them, their source run on a CPU, and on a GPU where there is one."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from cosim_native import cuda_info, gemm

NATIVE = Path(__file__).parents[2] / "native"


def test_build_says_what_it_has_and_why_it_lacks_the_rest() -> None:
    info = cuda_info()
    assert info.built == info.message.startswith("built with CUDA")
    assert info.built or info.devices == 0
    assert info.devices > 0 or re.search("no CUDA|no device", info.message)


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernel's source, built by the C++ compiler, a thread of the CPU for each of the GPU's."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    program = tmp_path_factory.mktemp("emulated") / "gemm"
    source = Path(__file__).with_name("cuda_on_cpu.cpp")
    subprocess.run([compiler, "-std=c++20", "-O1", "-pthread", f"-I{NATIVE}", source, "-o", program], check=True)
    return program


@pytest.mark.parametrize(("m", "n", "k"), [(64, 64, 16), (1, 1, 1), (65, 63, 17), (70, 130, 33), (5, 9, 0)])
def test_cuda_source_computes_the_product(emulated: Path, m: int, n: int, k: int) -> None:
    arguments = [str(emulated), str(m), str(n), str(k)]
    error = float(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout)
    assert error <= (k + 1) * 2.0**-24


@pytest.mark.skipif(not (cuda_info().devices and torch.cuda.is_available()), reason="needs a GPU and PyTorch for CUDA")
@pytest.mark.parametrize(
    ("m", "n", "k"), [(64, 64, 16), (1, 1, 1), (65, 63, 17), (1000, 1030, 333), (0, 3, 4), (3, 4, 0)]
)
def test_gemm_on_a_gpu_agrees_with_double_precision(m: int, n: int, k: int) -> None:
    a, b, out = torch.randn(m, k), torch.randn(k, n), torch.full((m, n), torch.nan, device="cuda")
    gemm(a.cuda(), b.cuda(), out, stream=torch.cuda.current_stream().cuda_stream)
    bound = (k + 1) * 2.0**-24 * (a.double().abs() @ b.double().abs())
    assert np.all((out.cpu().double() - a.double() @ b.double()).abs().numpy() <= bound.numpy())
