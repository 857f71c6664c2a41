"""Every library file against published numbers: peaks by format, memory, power.

The literals below are datasheets' (see each file's `sources`), most of them also in ml-engineering's tables; peaks are
dense, in TFLOP/s.
"""

import pytest

from hwmodels.accelerator import load, names

A100: dict[str, float] = {"fp64": 9.7, "fp32": 19.5, "tf32": 156, "bf16": 312, "fp16": 312, "int8": 624}
H100: dict[str, float] = {
    "fp64": 33.5,
    "fp32": 66.9,
    "tf32": 494.7,
    "bf16": 989.4,
    "fp16": 989.4,
    "fp8": 1979,
    "int8": 1979,
}
H100_PCIE: dict[str, float] = {"fp64": 25.6, "fp32": 51.2, "tf32": 378, "bf16": 756, "fp8": 1513, "int8": 1513}
# fp32 of B200 as ml-engineering lists it.
B200: dict[str, float] = {
    "fp32": 80,
    "tf32": 1125,
    "bf16": 2250,
    "fp16": 2250,
    "fp8": 4500,
    "int8": 4500,
    "fp6": 4500,
    "fp4": 9000,
}
GB200: dict[str, float] = {"fp32": 80, "tf32": 1250, "bf16": 2500, "fp8": 5000, "int8": 5000, "fp6": 5000, "fp4": 10000}
B300: dict[str, float] = {"fp64": 1.25, "fp32": 80, "tf32": 1125, "bf16": 2250, "fp8": 4500, "fp6": 4500, "fp4": 13500}
GB300: dict[str, float] = {"fp32": 80, "tf32": 1250, "bf16": 2500, "fp8": 5000, "fp6": 5000, "fp4": 15000}
V100: dict[str, float] = {"fp64": 7.8, "fp32": 15.7, "fp16": 125}
V100_PCIE: dict[str, float] = {"fp64": 7.1, "fp32": 14.1, "fp16": 113}
MI300: dict[str, float] = {
    "fp64": 163.4,
    "fp32": 163.4,
    "tf32": 653.7,
    "fp16": 1307.4,
    "bf16": 1307.4,
    "fp8": 2614.9,
    "int8": 2614.9,
}
MI355X: dict[str, float] = {
    "fp64": 78.6,
    "fp32": 157.3,
    "fp16": 2516.6,
    "bf16": 2516.6,
    "fp8": 5033.2,
    "int8": 5033.2,
    "fp6": 10066.3,
    "fp4": 10066.3,
}
# Google Cloud's tables of key specifications, and int8 of v5p as ml-engineering and the scaling book list it.
TPU_V5P: dict[str, float] = {"bf16": 459, "fp8": 459, "int8": 918}
TPU_V4: dict[str, float] = {"bf16": 275, "int8": 275}
TEMPLATES = ("systolic-edge",)

# Peaks, memory bandwidth (GB/s), capacity (GB or GiB), power limit (W; None where it is not published).
DATASHEETS: dict[str, tuple[dict[str, float], float, int, int | None]] = {
    "v100-sxm2-16gb": (V100, 900, 16, 300),
    "v100-sxm2-32gb": (V100, 900, 32, 300),
    "v100-pcie-32gb": (V100_PCIE, 900, 32, 250),
    "a100-sxm-40gb": (A100, 1555, 40, 400),
    "a100-sxm-80gb": (A100, 2039, 80, 400),
    "a100-pcie-40gb": (A100, 1555, 40, 250),
    "a100-pcie-80gb": (A100, 1935, 80, 300),
    "a800-sxm-80gb": (A100, 2039, 80, 400),
    "h100-sxm-80gb": (H100, 3350, 80, 700),
    "h100-sxm-96gb-hbm2e-500w": (H100, 2400, 96, 500),
    "h100-pcie-80gb": (H100_PCIE, 2000, 80, 350),
    "h800-sxm-80gb": ({**H100, "fp64": 1}, 3350, 80, 700),
    "h200-sxm": (H100, 4800, 141, 700),
    "gh200-sxm": (H100, 4800, 141, 900),
    "b200-sxm": (B200, 8000, 180, 1000),
    "gb200": (GB200, 8000, 186, 1200),
    "b300": (B300, 8000, 288, 1100),
    "gb300": (GB300, 8000, 288, 1400),
    "mi300x": (MI300, 5300, 192, 750),
    "mi325x": (MI300, 6000, 256, 1000),
    "mi355x": (MI355X, 8000, 288, 1400),
    "gaudi2": ({"bf16": 432, "fp8": 865}, 2460, 96, 600),
    "gaudi3": ({"bf16": 1677, "fp8": 1677}, 3670, 128, 900),
    "tpu-v4": (TPU_V4, 1228, 32, 192),
    "tpu-v5p": (TPU_V5P, 2765, 95, None),
}


def test_every_library_file_is_checked_against_its_datasheet() -> None:
    assert sorted([*DATASHEETS, *TEMPLATES]) == names()


@pytest.mark.parametrize("name", sorted(DATASHEETS))
def test_peaks_memory_and_power_equal_the_datasheet(name: str) -> None:
    peaks, bandwidth, capacity, watts = DATASHEETS[name]
    chip = load(name)
    for format, tflops in peaks.items():
        rounding = 0.5 if tflops == int(tflops) else 0.05
        tolerance = max(rounding, 0.002 * tflops)  # 432 for 2 x 256 x 256 cells at 1.65 GHz: not every table rounds
        assert abs(chip.peak_flops(format) / 1e12 - tflops) <= tolerance, format
    assert chip.memory.hbm.bandwidth_bytes_per_s == pytest.approx(bandwidth * 1e9)
    assert capacity * 1e9 <= chip.memory.hbm.capacity_bytes <= capacity * 2**30
    assert watts in (None, chip.power_limit_w)
