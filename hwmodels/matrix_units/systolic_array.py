"""Systolic arrays: a GEMM is folded onto rows x columns of cells, operands stream through them, sums stay or move.

Cycles of one fold of r x c used cells on an R x C array, while a stream of s steps passes:

    output-stationary   sums stay, A and B stream over k           r + c + s - 2         s = k
    weight-stationary   B (k x n) stays, loaded from the top       r + s + R + c - 2     s = m, r rows of k
    input-stationary    A (k x m) stays, loaded from the top       r + s + R + c - 2     s = n, r rows of k

The last operand enters the last row or column r - 1 or c - 1 cycles after the first (skew). A stationary fold is
shifted in from the top, one row per cycle; its sums leave at the bottom of the array, through all R rows. For full
folds this is SCALE-Sim v3's compute time (arXiv 2504.15377; OS R+C+K-2, WS 2R+C+M-2, IS 2R+C+N-2 per fold), which also
bills ragged folds as full ones; here a ragged fold ends when its last sum has left.

Without double buffering a fold starts when the one before it has left the array. With it each cell has a second
register for the operand (or sum) that stays, and the next fold's stream follows the last one's without a gap. Hidden
are: the loading of the next stationary fold, as far as this one's stream is long enough (a fold takes max(s, r)
cycles); the skew and the draining of all folds but one; of output-stationary sums, which leave a column one per cycle,
as far as s >= r. Not hidden are: the first fold's loading, and the last fold's skew and drain. Folds run from the
smallest to the largest. A stream is not cut, however little of it fits in SRAM.
"""

import math
from dataclasses import dataclass, replace

from hwmodels.matrix_units.attention import AttentionConstants, compulsory_bytes
from hwmodels.memory.hbm import Hbm
from hwmodels.memory.sram import Sram
from hwmodels.number_formats import COMPUTES_AS, FORMATS, bytes_of, number_format
from hwmodels.parameters import Section
from hwmodels.units import InputError
from hwmodels.work import Attention, Cost, Gemm

DATAFLOWS = ("output-stationary", "weight-stationary", "input-stationary")
_SUM_BYTES = 4.0  # partial sums are kept in fp32 (int32)
_ATTENTION_BLOCK = 512  # queries and keys: sa_block_q, sa_block_kv of MaxText's configs/base.yml for splash attention

# Attention kernels of a chip with systolic arrays: FlashAttention-2's algorithm as Pallas' splash attention runs it.
# The arrays work at their own cycles (shares of 1); not calibrated: half of the shorter of (multiply, softmax) hides.
KERNELS = {
    "flash-2": AttentionConstants(
        forward=1.0,
        backward=1.0,
        overlap=0.5,
        row_overhead=128.0,
        backward_row_overhead=256.0,
        causal=1.0,
        head_256=1.0,
    )
}


@dataclass(frozen=True, slots=True)
class SystolicArray:
    """`count` arrays of `rows` x `columns` cells. Question: how many cycles does this GEMM take, and what does it move
    through each memory level?

    `formats`: multiply-accumulates per cell and cycle; more than 1 multiplies that many elements of k at once, less
    than 1 takes 1/rate cycles per step. `fixed_time_s`: fixed time of one kernel on the device; `efficiency`: share of
    the cycles in which the arrays are fed (1: nothing is known to be lost).
    """

    rows: int
    columns: int
    count: int
    dataflow: str
    clock_hz: float
    formats: dict[str, float]
    double_buffering: bool = True
    fixed_time_s: float = 1e-6
    efficiency: float = 1.0

    unit = "systolic-array"
    shared_level = "sram"

    @classmethod
    def read(cls, section: Section, clock_hz: float, calibration: Section) -> "SystolicArray":
        """From `matrix` of an accelerator file and its `calibration.gemm` (efficiency, fixed_time)."""
        part = cls(
            rows=section.integer("rows", high=65536),
            columns=section.integer("columns", high=65536),
            count=section.integer("count", 1, high=65536),
            dataflow=section.text("dataflow", "weight-stationary", DATAFLOWS),
            clock_hz=clock_hz,
            formats=section.table("formats", tuple(FORMATS), required=True),
            double_buffering=section.flag("double_buffering", True),
            fixed_time_s=calibration.quantity("fixed_time", "time", 1e-6, zero=True),
            efficiency=calibration.number("efficiency", 1.0, high=1.0),
        )
        section.close()
        calibration.close()
        return part

    @property
    def cores(self) -> int:
        """The arrays, each of which can work on its own."""
        return self.count

    def at_clock(self, ratio: float) -> "SystolicArray":
        """The same arrays with their clock times `ratio`."""
        return replace(self, clock_hz=self.clock_hz * ratio)

    def macs_per_cycle(self, format: str) -> float:
        """Multiply-accumulates per array and cycle in `format`; 0 where the cells lack it."""
        return self.rows * self.columns * self._rate(format)

    def _rate(self, format: str) -> float:
        if number_format(format).scaled_by_unit:
            return self.formats.get(format, 0.0)
        return self.formats.get(format) or self.formats.get(COMPUTES_AS.get(format, ""), 0.0)

    def cycles(self, m: int, n: int, k: int, batch: int = 1, rate: float = 1.0) -> int:
        """Cycles of `batch` products C[m, n] = A[m, k] B[k, n] on all arrays, at `rate` multiply-accumulates per cell.

        Folds are dealt out to the arrays from the largest to the smallest; the array that gets the first is done last.
        """
        folds, stream = self._folds(m, n, k, batch, rate)
        mine = _dealt(folds, self.count)
        return self._back_to_back(mine, stream) if self.double_buffering else self._one_by_one(mine, stream)

    def _folds(self, m: int, n: int, k: int, batch: int, rate: float) -> tuple[list[tuple[int, int, int]], int]:
        """(how many, rows used, columns used), largest first, and the steps of the stream through each."""
        packed = max(rate, 1.0)
        slow = max(1.0 / rate, 1.0)
        steps = math.ceil(k / packed)
        if self.dataflow == "output-stationary":
            down, across, stream = m, n, math.ceil(steps * slow)
        elif self.dataflow == "weight-stationary":
            down, across, stream = steps, n, math.ceil(m * slow)
        else:
            down, across, stream = steps, m, math.ceil(n * slow)
        rows, columns = _parts(down, self.rows), _parts(across, self.columns)
        folds = [(batch * i * j, r, c) for i, r in rows for j, c in columns]
        if not self.double_buffering:
            folds.sort(key=lambda fold: -(fold[1] + fold[2]))
        return folds, stream

    def _one_by_one(self, folds: list[tuple[int, int, int]], stream: int) -> int:
        exit_rows = -2 if self.dataflow == "output-stationary" else self.rows - 2
        return sum(number * (r + c + stream + exit_rows) for number, r, c in folds)

    def _back_to_back(self, folds: list[tuple[int, int, int]], stream: int) -> int:
        """`folds` largest first, run from the last to the first."""
        steady = sum(number * max(stream, r) for number, r, _ in folds)
        _, rows, columns = folds[0]
        if self.dataflow == "output-stationary":  # the largest fold, the last, ends with its own skew
            return steady - max(stream, rows) + stream + rows + columns - 2
        first = folds[-1][1]
        return first + steady - max(stream, first) + stream + self.rows + columns - 2

    def steady_cycles(self, m: int, n: int, k: int, rate: float = 1.0) -> int:
        """Cycles that one array is busy with a product among many that follow each other without a gap."""
        folds, stream = self._folds(m, n, k, 1, rate)
        if self.double_buffering:
            return sum(number * max(stream, r) for number, r, _ in folds)
        return self._one_by_one(folds, stream)

    def gemm(self, work: Gemm, sram: Sram, hbm: Hbm, simd_flops: float) -> Cost:
        """The cost of `work`: the longest of cycles, SRAM and HBM traffic; the multiply pipeline also waits for its
        first operands and the last result's way out.

        `simd_flops` is the lanes' rate in its format, used where the cells lack it. Partial sums of an output tile stay
        in SRAM over all of k. Raises InputError: neither the cells nor the lanes have the format.
        """
        rate = self._rate(work.format)
        flops = 2.0 * work.batch * work.m * work.n * work.k
        if rate == 0.0 and simd_flops == 0.0:
            raise InputError(f"this matrix unit has no {work.format}; it has {', '.join(self.formats)}")
        if work.sparsity != "dense":
            raise InputError("a systolic array has no 2:4 structured sparsity; tensor cores may have it")
        cycles = self.cycles(work.m, work.n, work.k, work.batch, rate) if rate else None
        compute = flops / simd_flops if cycles is None else cycles / (self.clock_hz * self.efficiency)
        hbm_bytes = self.hbm_bytes(work, sram.capacity_bytes)
        sram_bytes = self.sram_bytes(work)
        memory = hbm_bytes / hbm.rate("gemm")
        near = sram_bytes / sram.bandwidth_bytes_per_s
        filled = compute + min(self._edge_bytes(work), hbm_bytes) / hbm.rate("gemm")
        total = max(filled, memory, near)
        time = total + self.fixed_time_s
        limit = "compute" if total == filled else "memory" if total == memory else "sram"
        return Cost(
            time_s=time,
            flops=flops,
            bytes_per_level={"hbm": hbm_bytes, self.shared_level: sram_bytes},
            limited_by=limit if total > self.fixed_time_s else "latency",
            core_share=min(1.0, compute / time),
            memory_share=min(1.0, memory / time),
            cycles=cycles,
        )

    def sram_bytes(self, work: Gemm) -> float:
        """Bytes that the arrays read from and write to SRAM: what stays once, what streams once per fold across the
        other dimension, partial sums of folds along k written and read back in fp32.
        """
        element, out = bytes_of(work.format), bytes_of(work.output_format)
        m, n, k = work.m, work.n, work.k
        a, b, c = element * m * k, element * k * n, float(m * n)
        if self.dataflow == "output-stationary":
            moved = a * -(-n // self.columns) + b * -(-m // self.rows) + out * c
        else:
            steps = math.ceil(k / max(self._rate(work.format), 1.0))
            sums = (-(-steps // self.rows) - 1) * 2.0 * _SUM_BYTES * c + out * c
            if self.dataflow == "weight-stationary":
                moved = a * -(-n // self.columns) + b + sums
            else:
                moved = a + b * -(-m // self.columns) + sums
        return work.batch * moved + work.epilogue_bytes

    def hbm_bytes(self, work: Gemm, capacity_bytes: float) -> float:
        """Bytes from and to HBM of the best of these tilings; half of SRAM holds the tile that stays, half the streams.

        A panel of A stays (all of k) and B passes once per panel; the same with a panel of B; or a tile of sums stays
        and panels of A and B pass.
        """
        element, out = bytes_of(work.format), bytes_of(work.output_format)
        m, n = work.m, work.n
        a, b = element * m * work.k, element * n * work.k
        half = capacity_bytes / 2.0
        tall = max(1, int(half / (element * work.k)))
        best = min(a + b * -(-m // tall), b + a * -(-n // tall))
        if best > a + b:
            sums = half / _SUM_BYTES
            side = 1
            while side <= max(1.0, sums):
                best = min(best, a * -(-n // max(1, int(sums / side))) + b * -(-m // side))
                side *= 2
        return work.batch * (best + out * m * n) + work.epilogue_bytes

    def _edge_bytes(self, work: Gemm) -> float:
        """One tile of operands for every array that has work, and one of results: what no other work hides."""
        element, out = bytes_of(work.format), bytes_of(work.output_format)
        m, n, k = work.m, work.n, work.k
        rate = self._rate(work.format)
        folds = sum(number for number, *_ in self._folds(m, n, k, work.batch, rate)[0]) if rate else 1
        k = min(k, self.rows)
        swapped = self.dataflow == "input-stationary"
        m = min(m, self.columns if swapped else self.rows)
        n = min(n, self.rows if swapped else self.columns)
        return min(self.count, folds) * (element * k * (m + n) + out * m * n)

    def attention_block(self, work: Attention, sram: Sram) -> tuple[int, int]:
        """512 queries by 512 keys, halved until q, k, v (k and v twice, the next ones arrive), scores and sums of all
        arrays fit in SRAM.
        """
        element, block = bytes_of(work.format), _ATTENTION_BLOCK
        room = sram.capacity_bytes / self.count
        tensors = 3.0 * work.head_dim + 2.0 * work.value_dim
        while block > 8 and block * (element * tensors + _SUM_BYTES * (block + work.value_dim)) > room:
            block //= 2
        return block, block

    def attention_pair_cycles(self, work: Attention, rows: int, keys: int, constants: AttentionConstants) -> float:
        """Cycles of one array for a pair of blocks: scores and values; backward scores, dP, dV, dQ and dK."""
        rate, dim, value = self._rate(work.format), work.head_dim, work.value_dim
        scores = self.steady_cycles(rows, keys, dim, rate)
        if work.phase == "forward":
            return (scores + self.steady_cycles(rows, value, keys, rate)) / constants.share(work)
        gradients = self.steady_cycles(rows, keys, value, rate) + self.steady_cycles(keys, value, rows, rate)
        gradients += self.steady_cycles(rows, dim, keys, rate) + self.steady_cycles(keys, dim, rows, rate)
        return (scores + gradients) / constants.share(work)

    def attention_hbm_bytes(self, work: Attention, pairs: int, keys: int, sram: Sram) -> float:
        """Every tensor once, if keys and values of the heads in work fit in half of SRAM; else they are read again for
        every pair of blocks.
        """
        element = bytes_of(work.format)
        once = compulsory_bytes(work)
        width = element * (work.head_dim + work.value_dim)
        kept = width * work.seq_k
        if self.count * kept <= sram.capacity_bytes / 2.0:
            return once
        again = width * pairs * min(keys, work.seq_k) - kept
        return once + work.batch * work.heads * max(0.0, again)

    def attention_near_bytes(self, work: Attention, pairs: int, rows: int, keys: int) -> float:
        """What the arrays read and write for the products of all pairs of blocks, and never less than every tensor
        once.
        """
        dim, value, kind = work.head_dim, work.value_dim, work.format
        products = [Gemm(rows, keys, dim, 1, kind, kind)]
        if work.phase == "forward":
            products += [Gemm(rows, value, keys, 1, kind, kind)]
        else:
            products += [Gemm(rows, keys, value, 1, kind, kind), Gemm(keys, value, rows, 1, kind, kind)]
            products += [Gemm(rows, dim, keys, 1, kind, kind), Gemm(keys, dim, rows, 1, kind, kind)]
        moved = sum(self.sram_bytes(product) for product in products)
        return max(compulsory_bytes(work), float(work.batch) * work.heads * pairs * moved)

    def near_bytes_per_s(self, sram: Sram) -> float:
        """Bytes per second from SRAM to all arrays."""
        return sram.bandwidth_bytes_per_s


def _parts(size: int, part: int) -> list[tuple[int, int]]:
    """`size` cut into parts: (how many, size) of the full ones and of the ragged one."""
    full, rest = divmod(size, part)
    return [(number, each) for number, each in ((full, part), (1, rest)) if number and each]


def _dealt(folds: list[tuple[int, int, int]], arrays: int) -> list[tuple[int, int, int]]:
    """The folds of the array that gets the first when all are dealt out in turn."""
    mine, start = [], 0
    for number, r, c in folds:
        end = start + number
        here = -(-end // arrays) - -(-start // arrays)
        if here:
            mine.append((here, r, c))
        start = end
    return mine
