"""Energies of operations and bytes by process and memory technology, for what an accelerator file does not list.

At 7 nm, in pJ, from Ten Lessons From Three Generations (Jouppi et al., ISCA 2021), table 2: Horowitz' table (ISSCC
2014, 45 nm) carried to 7 nm. Multiplications: int8 0.07, bf16 0.21, fp16 0.34, fp32 1.31; additions: int32 0.03, fp32
0.38; a read of 64 bits of SRAM of 8 KiB 7.5, 32 KiB 8.5, 1 MiB 14. Not checked against the document itself.
"""

from collections.abc import Iterable

from hwmodels.memory.technologies import TECHNOLOGIES
from hwmodels.number_formats import COMPUTES_AS, FORMATS
from hwmodels.process import energy_scale

_PJ = 1e-12
_MULTIPLY = {
    "int8": 0.07,
    "bf16": 0.21,
    "fp16": 0.34,
    "tf32": 0.34,  # derived: as many significant bits as fp16
    "fp32": 1.31,
    "fp64": 6.7,  # derived: fp32's by the square of the significant bits, 53 against 24
    "fp8": 0.07,  # derived: fp8's and the smaller ones' as int8's, by the square of the bits
    "fp6": 0.04,
    "int4": 0.018,
    "fp4": 0.018,
}
_ADD_FP32, _ADD_INT32, _ADD_FP64 = 0.38, 0.03, 0.8
_SMALL_SRAM = 7.5 / 8.0  # a byte of registers or 8 KiB
_LARGE_SRAM = 14.0 / 8.0  # a byte of a bank of 1 MiB
# A tensor core's instruction (m16n8k16, 2048 multiply-accumulates) reads 768 bytes of operands and 512 of sums from
# registers and writes 512 (derived from NVIDIA's PTX ISA); of operands of half the bits it multiplies twice as many.
_REGISTER_BYTES = 1792.0 / 2048.0
# An instruction of one lane: fetch, decode and operands take 30 pJ at 45 nm (Dally, Hardware for Deep Learning, Hot
# Chips 2023; not checked against the slides).
_INSTRUCTION_45 = 30.0
# From a cache bank across half of a large die, 10 mm at 0.08 pJ per bit and mm (Dally, as above).
_ACROSS = 10.0 * 0.08 * 8.0
# Between devices: about 10 pJ per bit through link, switch and link. Assumed.
_LINK = 80.0


def per_flop_j(formats: Iterable[str], length_nm: float, registers: bool) -> dict[str, float]:
    """Joules of one FLOP (half a multiply-accumulate) by format on a matrix unit, whose operands come from
    `registers` (tensor cores) or from the cell next door (systolic arrays).
    """
    feed = _REGISTER_BYTES * _SMALL_SRAM / 16.0 if registers else 0.0  # per bit of an operand
    return {name: (_mac(name) + feed * FORMATS[name].bits) / 2.0 * energy_scale(length_nm) * _PJ for name in formats}


def per_lane_flop_j(formats: Iterable[str], length_nm: float, registers: bool) -> dict[str, float]:
    """Joules of one FLOP by format on vector lanes: a fused multiply-add of every lane is an instruction of its own, or
    where there are no `registers` of threads, shares one with all lanes.
    """
    overhead = _INSTRUCTION_45 / energy_scale(45.0) if registers else 0.0
    return {name: (_mac(name) + overhead) / 2.0 * energy_scale(length_nm) * _PJ for name in formats}


def per_byte_j(technology: str, length_nm: float) -> dict[str, float]:
    """Joules of one byte by level: the memory's technology (a cache's where it is on the chip), a cache across the die,
    an SRAM beside the units.
    """
    scale = energy_scale(length_nm)
    memory, cache = TECHNOLOGIES.get(technology), (_LARGE_SRAM * scale + _ACROSS) * _PJ
    return {
        "hbm": 8.0 * memory.energy_per_bit_j if memory else cache,
        "l2": cache,  # wires hardly scale
        "llc": cache,
        "sram": _LARGE_SRAM * scale * _PJ,
        "link": _LINK * _PJ,
    }


def _mac(name: str) -> float:
    """pJ at 7 nm of a multiplication and the addition to a wide sum."""
    base = name if name in _MULTIPLY else COMPUTES_AS.get(name, "")
    if base not in _MULTIPLY:
        base = min(_MULTIPLY, key=lambda known: abs(FORMATS[known].bits - FORMATS[name].bits))
    if base.startswith("int"):
        return _MULTIPLY[base] + _ADD_INT32
    return _MULTIPLY[base] + (_ADD_FP64 if base == "fp64" else _ADD_FP32)
