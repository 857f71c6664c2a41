"""Every library file against published numbers: peaks by format, memory, power.

The literals below are datasheets' (see each file's `sources`), most of them also in ml-engineering's tables; peaks are
dense, in TFLOP/s.
"""

import pytest

from hwmodels.accelerator import load, load_raw, names

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
V100_PCIE: dict[str, float] = {"fp64": 7, "fp32": 14, "fp16": 112}
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
MI200: dict[str, float] = {"fp64": 90.5, "fp32": 90.5, "bf16": 362.1, "fp16": 362.1, "int8": 362.1}
AD102: dict[str, float] = {"fp32": 91.6, "tf32": 183, "bf16": 366.5, "fp16": 366.5, "fp8": 733, "int8": 733}
# Products with fp32 sums, as the whitepaper's table has them beside twice that with fp16 sums.
RTX_4090: dict[str, float] = {"fp32": 82.6, "tf32": 82.6, "bf16": 165.2, "fp16": 165.2, "fp8": 330.3, "int8": 660.6}
TRN2: dict[str, float] = {"fp32": 181, "tf32": 667, "bf16": 667, "fp16": 667, "fp8": 1299}
# Google Cloud's tables of key specifications, and int8 of v5p as ml-engineering and the scaling book list it.
TPU_V5P: dict[str, float] = {"bf16": 459, "fp8": 459, "int8": 918}
TPU_V4: dict[str, float] = {"bf16": 275, "int8": 275}
NOT_PUBLISHED = {"xeon-amx"}  # operations per cycle and core are, the clock that AMX sustains is not
TEMPLATES = ("systolic-edge", "systolic-pod", "gpu-like")

# Peaks, memory bandwidth (GB/s), capacity (GB or GiB), power limit (W; None where it is not published).
DATASHEETS: dict[str, tuple[dict[str, float], float, int, int | None]] = {
    "p4": ({"fp32": 5.5, "int8": 22}, 192, 8, 75),
    "p100-pcie-16gb": ({"fp64": 4.7, "fp32": 9.3, "fp16": 18.7}, 732, 16, 250),
    "t4": ({"fp32": 8.1, "fp16": 65, "int8": 130}, 320, 16, 70),
    "v100-sxm2-16gb": (V100, 900, 16, 300),
    "v100-sxm2-32gb": (V100, 900, 32, 300),
    "v100-pcie-32gb": (V100_PCIE, 900, 32, 250),
    "v100-sxm3-32gb": (V100, 900, 32, 350),
    "v100-sxm3-32gb-dgx2h": ({"fp16": 131}, 900, 32, 450),
    "a40": ({"fp32": 37.4, "tf32": 74.8, "bf16": 149.7, "fp16": 149.7, "int8": 299.3}, 696, 48, 300),
    "a10g": ({"fp32": 35, "tf32": 35, "bf16": 70, "fp16": 70, "int8": 140}, 600, 24, 300),
    "l4": ({"fp32": 30.3, "bf16": 121, "fp16": 121, "fp8": 242.5, "int8": 242.5}, 300, 24, 72),
    "l40s": (AD102, 864, 48, 350),
    "rtx-4090": (RTX_4090, 1008, 24, 450),
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
    "mi100": ({"fp64": 11.5, "fp32": 46.1, "bf16": 92.3, "fp16": 184.6, "int8": 184.6}, 1228.8, 32, 300),
    "mi210": ({format: peak / 2 for format, peak in MI200.items()}, 1638.4, 64, 300),
    "mi250": (MI200, 3276.8, 128, 500),
    "mi300x": (MI300, 5300, 192, 750),
    "mi325x": (MI300, 6000, 256, 1000),
    "mi355x": (MI355X, 8000, 288, 1400),
    "gaudi2": ({"bf16": 432, "fp8": 865}, 2460, 96, 600),
    "gaudi3": ({"bf16": 1677, "fp8": 1677}, 3670, 128, 900),
    "trn1": ({"fp32": 47.5, "tf32": 190, "bf16": 190, "fp16": 190, "fp8": 190, "int8": 380}, 820, 32, None),
    "trn2": (TRN2, 2900, 96, None),
    "xeon-amx": ({"bf16": 114.7, "int8": 229.4}, 307.2, 512, 350),
    "tpu-v3": ({"bf16": 123}, 900, 32, 262),
    "tpu-v5e": ({"bf16": 197, "int8": 394}, 819, 16, None),
    "tpu-v6e": ({"bf16": 918, "fp8": 918, "int8": 1836}, 1638, 32, None),
    "tpu-v7x": ({"bf16": 2307, "fp8": 4614}, 7380, 192, None),
    "tpu-v4": (TPU_V4, 1228, 32, 192),
    "tpu-v5p": (TPU_V5P, 2765, 95, None),
}


def test_every_library_file_is_checked_against_its_datasheet() -> None:
    assert sorted([*DATASHEETS, *TEMPLATES]) == names()


@pytest.mark.parametrize("name", sorted(set(DATASHEETS) - NOT_PUBLISHED))
def test_peaks_that_follow_from_the_parts_round_to_those_that_the_file_has_as_published(name: str) -> None:
    chip, written = load(name), load_raw(name)["peaks"]
    assert written["source"] in chip.sources
    assert set(chip.peaks) == set(written) - {"source", "note"}
    for format, published in chip.peaks.items():
        number = written[format].split()[0]
        half_a_digit = 0.5 * 10.0 ** -len(number.partition(".")[2]) / float(number)
        assert chip.peak_flops(format) == pytest.approx(published, rel=max(half_a_digit, 0.002)), format


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
