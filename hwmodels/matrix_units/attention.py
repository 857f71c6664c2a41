"""Fused attention as the algorithm it is: blocks of queries against blocks of keys, masked blocks skipped.

A block pair costs its multiplies and its softmax (one exponential and a few vector operations per score); an
algorithm hides part of the shorter under the longer. Forward has two products per pair, backward five and recomputes
the softmax (FlashAttention, arXiv 2205.14135; FlashAttention-2, 2307.08691; FlashAttention-3, 2407.08608).
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hwmodels.memory.hbm import Hbm
from hwmodels.memory.sram import Sram
from hwmodels.number_formats import bytes_of
from hwmodels.parameters import Section
from hwmodels.units import InputError
from hwmodels.vector_unit import VectorUnit
from hwmodels.work import Attention, Cost

if TYPE_CHECKING:
    from hwmodels.matrix_units.unit import MatrixUnit

ALGORITHMS = ("flash-1", "flash-2", "flash-3", "flash-triton", "cudnn")
# Query rows by key columns of one block, for head_dim <= 64, <= 128, larger: the kernels' own tables
# (flash_fwd_launch_template.h, hopper/tile_size.h of github.com/Dao-AILab/flash-attention; triton's fused attention
# tutorial); cuDNN taken as FlashAttention-3.
_BLOCKS: dict[str, tuple[tuple[int, int], tuple[int, int], tuple[int, int]]] = {
    "flash-1": ((128, 128), (128, 128), (64, 64)),
    "flash-2": ((128, 128), (128, 64), (64, 64)),
    "flash-3": ((192, 128), (128, 128), (128, 80)),
    "flash-triton": ((128, 128), (128, 128), (64, 64)),
    "cudnn": ((128, 128), (128, 128), (128, 80)),
}
_BACKWARD_BLOCK = {"small": (128, 128), "large": (64, 128)}
_VECTOR_OPS = {
    "forward": 5.0,
    "backward": 7.0,
}  # per score: scale, maximum, subtract, sum, convert; and dP - delta, times P
_DROPOUT_OPS = 10.0  # per score: Philox-4x32-10 makes four 32-bit numbers in about 40 integer operations
_SHARED_BYTES_PER_CYCLE = (
    128.0  # of a core: 32 banks of 4 bytes (CUDA C++ Programming Guide, compute capability 7 to 10)
)
_HEAD_DIM_STEP = 32  # head dimensions are padded to a multiple of 32


@dataclass(frozen=True, slots=True)
class AttentionConstants:
    """One algorithm on one chip, what no datasheet says.

    forward, backward: multiply rate in the main loop, fraction of peak, for head_dim <= 64; head_128, head_256: the
    rate for larger heads over that (registers and shared memory run short). overlap: share of the shorter of
    (multiply, softmax) that hides under the longer. row_overhead: prologue and epilogue of one outer block, as a
    number of keys (backward: queries). causal: rate of a masked problem's remaining blocks over an unmasked one's.
    """

    forward: float
    backward: float
    overlap: float = 0.6
    row_overhead: float = 120.0
    backward_row_overhead: float = 300.0
    causal: float = 0.92
    head_128: float = 1.0
    head_256: float = 0.9

    @classmethod
    def read(cls, section: Section) -> "AttentionConstants":
        """From `calibration.attention.ALGORITHM` of an accelerator file."""
        part = cls(
            forward=section.number("forward", high=1.0),
            backward=section.number("backward", high=1.0),
            overlap=section.number("overlap", 0.6, high=1.0, zero=True),
            row_overhead=section.number("row_overhead", 120.0, zero=True),
            backward_row_overhead=section.number("backward_row_overhead", 300.0, zero=True),
            causal=section.number("causal", 0.92, high=1.0),
            head_128=section.number("head_128", 1.0, high=2.0),
            head_256=section.number("head_256", 0.9, high=2.0),
        )
        section.close()
        return part

    def head_share(self, work: Attention) -> float:
        """Multiply rate of the work's head dimension over that of 64 and less."""
        if work.head_dim <= 64:
            return 1.0
        return self.head_128 if work.head_dim <= 128 else self.head_256

    def share(self, work: Attention) -> float:
        """Multiply rate in the main loop of the work's phase and head dimension, fraction of the unit's own."""
        return (self.forward if work.phase == "forward" else self.backward) * self.head_share(work)


# Where a GPU has no measured rows: the middle of the calibrated chips.
DEFAULTS = {
    "flash-1": AttentionConstants(0.40, 0.35),
    "flash-2": AttentionConstants(0.60, 0.52),
    "flash-triton": AttentionConstants(0.40, 0.35),
}
# Kernels that only some generations have: FlashAttention-3 needs Hopper's asynchronous copies and warp-group products
# and is published at 0.75 of an H100's peak forward (arXiv 2407.08608, abstract); cuDNN's fused attention starts with
# Ampere, where it does as FlashAttention-2 (assumed), and follows FlashAttention-3 later.
_BY_ARCHITECTURE = {
    "ampere": {"cudnn": DEFAULTS["flash-2"]},
    "ada": {"cudnn": DEFAULTS["flash-2"]},
    "hopper": {"flash-3": AttentionConstants(0.75, 0.55), "cudnn": AttentionConstants(0.75, 0.55)},
    "blackwell": {"cudnn": AttentionConstants(0.75, 0.55)},
}


def defaults(architecture: str) -> dict[str, AttentionConstants]:
    """The attention kernels of a GPU generation, with the family's constants."""
    return {**DEFAULTS, **_BY_ARCHITECTURE.get(architecture, {})}


def attention_cost(
    work: Attention,
    constants: AttentionConstants,
    unit: "MatrixUnit",
    vector: VectorUnit,
    sram: Sram,
    hbm: Hbm,
) -> Cost:
    """The cost of `work` on a matrix unit and its share of the vector lanes; blocks are spread over the unit's cores.

    `flops` counts unmasked scores only: 2 x batch x heads x scores x the products' widths, which are head_dim +
    value_dim forward and 3 head_dim + 2 value_dim backward; halved if causal.
    """
    if work.format in ("fp64", "fp32", "tf32"):
        raise InputError(f"attention by {work.algorithm} has no {work.format} kernel; allowed are fp16, bf16, fp8")
    if unit.macs_per_cycle(work.format) == 0:
        raise InputError(f"attention by {work.algorithm}: this chip's matrix unit lacks {work.format}")
    forward = work.phase == "forward"
    cores, clock_hz = unit.cores, unit.clock_hz
    rows, keys = unit.attention_block(work, sram)
    lanes = (
        vector.lanes / cores * vector.clock_hz / clock_hz * vector.formats["fp32"]
    )  # lane operations per core and matrix cycle
    special = vector.special.per_s / cores / clock_hz  # the same of special functions
    multiply = unit.attention_pair_cycles(work, rows, keys, constants)
    vector_ops = _VECTOR_OPS[work.phase] + (_DROPOUT_OPS if work.dropout else 0.0) + (2.0 if work.bias else 0.0)
    softmax = rows * keys * (vector_ops / lanes + 1.0 / special)
    longer, shorter = max(multiply, softmax), min(multiply, softmax)
    pair = (longer + (1.0 - constants.overlap) * shorter) / (constants.causal if work.causal else 1.0)
    overhead = pair / keys * (constants.row_overhead if forward else constants.backward_row_overhead)

    outer, longest, pairs = _pairs(work, rows, keys, forward)
    blocks = work.batch * work.heads * outer
    total = work.batch * work.heads * (pairs * pair + outer * overhead)
    waves = blocks / cores
    idle = 1.0 if work.causal else (waves + 0.5 * (math.ceil(waves) - waves)) / waves
    compute = max(total / cores * idle, longest * pair + overhead) / clock_hz
    hbm_bytes = unit.attention_hbm_bytes(work, pairs, keys, sram)
    memory = hbm_bytes / hbm.rate("stream")
    near_bytes = unit.attention_near_bytes(work, pairs, min(rows, work.seq_q), min(keys, work.seq_k))
    near = near_bytes / unit.near_bytes_per_s(sram)
    time = max(compute, memory, near) + unit.fixed_time_s
    limit = "compute" if multiply >= softmax else "special"
    if max(memory, near) > compute:
        limit = unit.shared_level if near > memory else "memory"
    scores = work.seq_q * work.seq_k * (0.5 if work.causal and work.seq_q == work.seq_k else 1.0)
    if work.causal and work.seq_q != work.seq_k:
        scores = max(0.0, work.seq_q * (work.seq_k - work.seq_q / 2.0))
    return Cost(
        time_s=time,
        flops=2.0 * work.batch * work.heads * scores * work.product_widths,
        bytes_per_level={"hbm": hbm_bytes, unit.shared_level: max(near_bytes, hbm_bytes)},
        limited_by=limit,
        core_share=min(1.0, compute / time * min(1.0, waves)),
        memory_share=min(1.0, memory / time),
    )


def gpu_block(work: Attention, shared_memory_bytes: float) -> tuple[int, int]:
    """Query rows by key columns of one block of the GPU kernels, halved until shared memory holds its operands: queries
    and twice keys or values (the next ones arrive); backward queries, dO, keys and values.
    """
    if work.phase == "backward":
        rows, keys = _BACKWARD_BLOCK["small" if work.head_dim <= 64 else "large"]
    else:
        small, middle, large = _BLOCKS[work.algorithm]
        rows, keys = small if work.head_dim <= 64 else middle if work.head_dim <= 128 else large
    element = bytes_of(work.format)
    query, value = element * _padded(work.head_dim), element * _padded(work.value_dim)
    while keys > 16 and _block_bytes(work.phase, rows, keys, query, value) > shared_memory_bytes:
        rows, keys = (rows // 2, keys) if rows > keys else (rows, keys // 2)
    return rows, keys


def _block_bytes(phase: str, rows: int, keys: int, query: float, value: float) -> float:
    if phase == "forward":
        return rows * query + keys * (query + value)
    return (rows + keys) * (query + value)


def gpu_pair_cycles(
    work: Attention, rows: int, keys: int, constants: AttentionConstants, macs_per_cycle: float
) -> float:
    """Cycles of a core of `macs_per_cycle` for the products of one pair of blocks; at least those in which shared
    memory reads both operands of each product once.
    """
    padded = dataclasses.replace(work, head_dim=_padded(work.head_dim), value_dim=_padded(work.value_dim))
    multiply = float(rows) * keys * padded.product_widths / (macs_per_cycle * constants.share(work))
    operands = (rows + keys) * padded.product_widths * bytes_of(work.format)
    return max(multiply, operands / _SHARED_BYTES_PER_CYCLE)


def _padded(width: int) -> int:
    return -(-width // _HEAD_DIM_STEP) * _HEAD_DIM_STEP


def _pairs(work: Attention, rows: int, keys: int, forward: bool) -> tuple[int, int, int]:
    """Outer blocks of one head, the block pairs of the longest of them, and all its block pairs; masked pairs are
    left out.

    Forward walks keys for each block of queries. Backward walks queries for each block of keys: the same pairs,
    counted the other way.
    """
    query_blocks, key_blocks = -(-work.seq_q // rows), -(-work.seq_k // keys)
    outer, inner = (query_blocks, key_blocks) if forward else (key_blocks, query_blocks)
    if not work.causal:
        return outer, inner, query_blocks * key_blocks
    offset = work.seq_k - work.seq_q  # the last query sees the last key
    if query_blocks <= 64 or offset:
        blocks = range(query_blocks)
        pairs = sum(min(key_blocks, max(0, -(-((i + 1) * rows + offset) // keys))) for i in blocks)
    else:  # the same triangle in closed form; rounding up to whole blocks of keys adds (1 - gcd / keys) / 2 on average
        rounding = query_blocks * (1.0 - math.gcd(rows, keys) / keys) / 2.0
        pairs = round(query_blocks * (query_blocks + 1) / 2.0 * rows / keys + rounding)
        pairs = min(pairs, query_blocks * key_blocks)
    return outer, inner, pairs


def compulsory_bytes(work: Attention) -> float:
    """Bytes from and to HBM when Q, K, V and O pass once (keys and values stay on chip while a head's queries pass);
    backward reads them with dO and writes dQ dK dV.
    """
    element = bytes_of(work.format)
    rows = work.batch * work.heads * work.seq_q
    query, out = rows * work.head_dim, rows * work.value_dim
    keys_and_values = work.batch * work.kv_heads * work.seq_k * (work.head_dim + work.value_dim)
    statistics = 4.0 * rows
    if work.phase == "forward":
        return element * (query + out + keys_and_values) + statistics
    read, written = query + 2 * out + keys_and_values, query + keys_and_values
    return element * (read + written) + 8.0 * query + 2 * statistics  # dQ is summed in fp32
