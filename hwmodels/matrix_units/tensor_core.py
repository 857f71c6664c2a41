"""A GPU's tensor cores: a GEMM is cut into tiles, tiles fill the cores in waves, operands come through the L2 cache.

Time is the longest of three pipelines (multiply, L2 to cores, HBM to L2) for the best tile and split of k, plus the
kernel's fixed time.
"""

import math
from dataclasses import dataclass, field, replace
from functools import cache

from hwmodels.matrix_units.attention import AttentionConstants, compulsory_bytes, gpu_block, gpu_pair_cycles
from hwmodels.memory.hbm import Hbm
from hwmodels.memory.sram import Sram
from hwmodels.number_formats import COMPUTES_AS, FORMATS, bytes_of, number_format
from hwmodels.parameters import Section
from hwmodels.units import InputError
from hwmodels.work import Attention, Cost, Gemm

# CUTLASS's and cuBLAS's usual thread-block tiles, m x n.
TILES = ((256, 128), (128, 256), (128, 128), (256, 64), (64, 256), (128, 64), (64, 128), (64, 64), (32, 64), (64, 32))
_LARGEST = 256 * 128
_HALVINGS = {tile: math.log2(_LARGEST / (tile[0] * tile[1])) for tile in TILES}
_SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)
# A tile's panels arrive in stages of 64 bytes of k, three of them in shared memory: one is multiplied, two are on the
# way (CUTLASS's multistage main loop, include/cutlass/gemm/threadblock/mma_multistage.h).
_STAGE_BYTES = 3 * 64.0
_BLOCK_SCALED = tuple(name for name, f in FORMATS.items() if f.scaled_by_unit)


@dataclass(frozen=True, slots=True)
class GemmConstants:
    """What a datasheet does not say about the GEMM library on one chip; defaults are the family's.

    efficiency: multiply rate of the main loop with the largest tile, fraction of peak. tile_loss: rate lost per
    halving of the tile. prologue_k: filling the pipeline and writing the tile, as elements of k at the 16-bit rate (it
    is a latency, so a slower format fills in fewer of its own). last_wave: share of the last wave that is billed by its
    fill, the rest as if it were full. fixed_time_s: the kernel's fixed time on the device. dgrad, wgrad: rate of the
    layouts NN and NT over TN's. unaligned: rate of 16-bit operands with a dimension that is no multiple of 8.
    simd_efficiency: of the fp32 lanes. formats: share of `efficiency` that another format than 16 bits reaches.
    """

    efficiency: float = 0.78
    tile_loss: float = 0.06
    prologue_k: float = 60.0
    last_wave: float = 0.5
    fixed_time_s: float = 4e-6
    dgrad: float = 1.0
    wgrad: float = 0.955
    unaligned: float = 0.5
    simd_efficiency: float = 0.85
    formats: dict[str, float] = field(default_factory=dict)

    @classmethod
    def read(cls, section: Section) -> "GemmConstants":
        """From `calibration.gemm` of an accelerator file; what it leaves out takes the family's default."""
        default = cls()
        part = cls(
            efficiency=section.number("efficiency", default.efficiency, high=1.0),
            tile_loss=section.number("tile_loss", default.tile_loss, high=0.9, zero=True),
            prologue_k=section.number("prologue_k", default.prologue_k, zero=True),
            last_wave=section.number("last_wave", default.last_wave, high=1.0, zero=True),
            fixed_time_s=section.quantity("fixed_time", "time", default.fixed_time_s, zero=True),
            dgrad=section.number("dgrad", default.dgrad, high=2.0),
            wgrad=section.number("wgrad", default.wgrad, high=2.0),
            unaligned=section.number("unaligned", default.unaligned, high=1.0),
            simd_efficiency=section.number("simd_efficiency", default.simd_efficiency, high=1.0),
            formats=section.table("formats", tuple(FORMATS)),
        )
        section.close()
        return part


@dataclass(frozen=True, slots=True)
class TensorCore:
    """Tensor cores of a GPU. Question: how long does this GEMM take, and how much does it move through each memory
    level?

    `formats`: dense multiply-accumulates per core (streaming multiprocessor) and cycle; `shared_memory_bytes` per
    core. `block_scaled`: formats whose blocks' scales the unit applies, with their rate over their elements' rate.
    `structured_sparsity`: rate of products with 2:4 sparse weights over dense ones; 0 where the unit has none.
    """

    cores: int
    clock_hz: float
    formats: dict[str, float]
    shared_memory_bytes: float
    constants: GemmConstants
    block_scaled: dict[str, float] = field(default_factory=dict)
    structured_sparsity: float = 0.0

    unit = "tensor-core"
    shared_level = "l2"

    @classmethod
    def read(cls, section: Section, clock_hz: float, calibration: Section) -> "TensorCore":
        """From `matrix` of an accelerator file and its fitted `calibration.gemm`."""
        part = cls(
            cores=section.integer("cores"),
            clock_hz=clock_hz,
            formats=section.table("formats", tuple(FORMATS), required=True),
            shared_memory_bytes=section.quantity("shared_memory", "data"),
            constants=GemmConstants.read(calibration),
            block_scaled=section.table("block_scaled", _BLOCK_SCALED),
            structured_sparsity=section.number("structured_sparsity", 0.0, high=2.0, zero=True),
        )
        section.close()
        return part

    def macs_per_cycle(self, format: str) -> float:
        """Multiply-accumulates per core and cycle in `format`; 0 where the unit lacks it."""
        if format in self.formats:
            return self.formats[format]
        rate = self.formats.get(COMPUTES_AS.get(format, ""), 0.0)
        return rate * self.block_scaled.get(format, 0.0) if format in _BLOCK_SCALED else rate

    @property
    def fixed_time_s(self) -> float:
        """Fixed time of a kernel on the device."""
        return self.constants.fixed_time_s

    def at_clock(self, ratio: float) -> "TensorCore":
        """The same unit with its clock times `ratio`."""
        return replace(self, clock_hz=self.clock_hz * ratio)

    def attention_block(self, work: Attention, sram: Sram) -> tuple[int, int]:
        """Query rows by key columns of one block, as the kernels' own tables have them, if shared memory holds them."""
        return gpu_block(work, self.shared_memory_bytes)

    def attention_pair_cycles(self, work: Attention, rows: int, keys: int, constants: AttentionConstants) -> float:
        """Cycles of one core for the products of one pair of blocks."""
        return gpu_pair_cycles(work, rows, keys, constants, self.macs_per_cycle(work.format))

    def attention_hbm_bytes(self, work: Attention, pairs: int, keys: int, sram: Sram) -> float:
        """Every tensor once: keys and values stay in L2 while a head's queries pass."""
        return compulsory_bytes(work)

    def attention_near_bytes(self, work: Attention, pairs: int, rows: int, keys: int) -> float:
        """Every tensor once, and what the blocks of the inner loop read again: forward keys and values; backward
        queries and dO, and dQ is added to in fp32.
        """
        element, width = bytes_of(work.format), work.head_dim + work.value_dim
        if work.phase == "forward":
            once, length, row = work.batch * work.kv_heads * work.seq_k, min(keys, work.seq_k), element * width
        else:
            once, length = work.batch * work.heads * work.seq_q, min(rows, work.seq_q)
            row = element * width + 4.0 * work.head_dim
        again = row * (float(work.batch) * work.heads * pairs * length - once)
        return compulsory_bytes(work) + max(0.0, again)

    def near_bytes_per_s(self, sram: Sram) -> float:
        """Bytes per second from L2 to all cores: its own, one read serving several cores, or those of their ports."""
        ports = self.cores * sram.core_bytes_per_cycle * self.clock_hz
        return min(sram.bandwidth_bytes_per_s * sram.multicast, ports)

    def gemm(self, work: Gemm, sram: Sram, hbm: Hbm, simd_flops: float) -> Cost:
        """The cost of `work`; `simd_flops` is the lanes' rate in its format, used where the matrix unit lacks the
        format (fp32).
        """
        c = self.constants
        a, out = bytes_of(work.format), bytes_of(work.output_format)
        element = a, work.compressed_bytes(a)
        macs = self.macs_per_cycle(work.format)
        core_flops = 2.0 * macs * self.clock_hz * c.efficiency if macs else simd_flops / self.cores * c.simd_efficiency
        if core_flops == 0:
            raise InputError(f"this matrix unit has no {work.format}; it has {', '.join(self.formats)}")
        core_flops *= {"TN": 1.0, "NN": c.dgrad, "NT": c.wgrad}[work.layout]
        core_flops *= c.formats.get(work.format) or c.formats.get(COMPUTES_AS.get(work.format, ""), 1.0)
        if macs and _unaligned(work):
            core_flops *= c.unaligned
        if work.sparsity != "dense":
            if not self.structured_sparsity:
                raise InputError("this matrix unit has no 2:4 structured sparsity (matrix.structured_sparsity)")
            core_flops *= self.structured_sparsity
        operands = work.batch * work.k * (element[0] * work.m + element[1] * work.n)
        compulsory = operands + work.batch * out * work.m * work.n + work.epilogue_bytes
        rates = _Rates(
            hbm.rate("gemm"),
            sram.bandwidth_bytes_per_s * sram.multicast,
            sram.core_bytes_per_cycle * self.clock_hz,
        )
        prologue = c.prologue_k * self._prologue_share(work.format, simd_flops)
        best = (math.inf, 0.0, 0.0, 0.0, 0.0, "")
        for compute, tile, split in self._multiply_s(work, core_flops, prologue):
            if compute >= best[0]:  # they come sorted: traffic can only add
                break
            found = self._tiled(work, tile, split, compute, element, out, sram, rates, compulsory)
            if found[0] < best[0]:
                best = found
        total, compute, memory, hbm_bytes, l2_bytes, limit = best
        time = total + c.fixed_time_s
        return Cost(
            time_s=time,
            flops=2.0 * work.batch * work.m * work.n * work.k * work.multiplied,
            bytes_per_level={"hbm": hbm_bytes, "l2": l2_bytes},
            limited_by=limit if total > c.fixed_time_s else "latency",
            core_share=min(1.0, compute / time),
            memory_share=min(1.0, memory / time),
        )

    def _prologue_share(self, format: str, simd_flops: float) -> float:
        """Rate of `format` over that of 16 bits: how many of its elements pass in the time of one of 16 bits."""
        reference = self.macs_per_cycle("bf16") or self.macs_per_cycle("fp16")
        rate = self.macs_per_cycle(format) or simd_flops / (2.0 * self.cores * self.clock_hz)
        return rate / reference if reference else 1.0

    def _multiply_s(self, work: Gemm, core_flops: float, prologue_k: float) -> list[tuple[float, tuple[int, int], int]]:
        """Seconds of the multiply pipeline, shortest first, for each tile that shared memory holds and each split of k:
        whole waves of tiles, and the last one partly by its fill.
        """
        m, n, k, cores, last_wave = work.m, work.n, work.k, self.cores, self.constants.last_wave
        lengths = [
            (split, (-(-k // split) + prologue_k) / core_flops) for split in _SPLITS if split <= max(1, k // 256)
        ]

        def waves(tiles: int) -> float:
            full, rest = divmod(tiles, cores)
            return full + 1.0 - last_wave * (1.0 - rest / cores) if rest else float(full)

        found = []
        for tile, flops in _tiles(self.constants.tile_loss, self.shared_memory_bytes):
            down, across = tile
            if (down >= 2 * m + 32 or across >= 2 * n + 32) and tile != TILES[-1]:
                continue
            tiles = -(-m // down) * -(-n // across) * work.batch
            if tiles >= cores or k < 512:
                found.append((max(1.0, waves(tiles)) * flops * lengths[0][1], tile, 1))
                continue
            most = -(-cores // tiles) + 1
            for split, length in lengths:
                if split > most:
                    break
                parts = tiles * split
                found.append((flops * length if parts <= cores else waves(parts) * flops * length, tile, split))
        found.sort()
        return found

    def _tiled(
        self,
        work: Gemm,
        tile: tuple[int, int],
        split: int,
        compute: float,
        element: tuple[float, float],
        out: float,
        l2: Sram,
        rates: "_Rates",
        compulsory: float,
    ) -> tuple[float, float, float, float, float, str]:
        """Seconds (all, multiply, HBM), bytes (HBM, L2) and what limits, for one tile shape and one split of k."""
        rows, columns = -(-work.m // tile[0]), -(-work.n // tile[1])
        tiles = rows * columns * work.batch * split
        k = -(-work.k // split)
        panel = (tile[0] * element[0] + tile[1] * element[1]) * k
        partial = 8.0 * work.batch * split * work.m * work.n if split > 1 else 0.0  # fp32 sums written and read back
        operands = work.batch * work.k * (element[0] * work.m + element[1] * work.n)
        l2_bytes = tiles * panel + compulsory - operands + partial
        l2_time = max(l2_bytes / rates.l2, -(-tiles // self.cores) * panel / rates.core_port)
        hbm_bytes = _hbm_bytes(work, tile, rows, columns, self.cores, element, out, l2.capacity_bytes)
        if partial > l2.capacity_bytes / 2:
            hbm_bytes += partial
        memory = hbm_bytes / rates.hbm
        total = max(compute, memory, l2_time)
        limit = "compute" if total == compute else "memory" if total == memory else "l2"
        if split > 1:
            total += partial / rates.l2
        return total, compute, memory, hbm_bytes, l2_bytes, limit


@cache
def _tiles(tile_loss: float, shared_memory_bytes: float) -> tuple[tuple[tuple[int, int], float], ...]:
    """Tiles whose stages fit in shared memory (the last one always), each with the FLOPs of one element of k over the
    share of the rate that it keeps.
    """
    held = [tile for tile in TILES if _STAGE_BYTES * sum(tile) <= shared_memory_bytes or tile == TILES[-1]]
    return tuple((tile, 2.0 * tile[0] * tile[1] / (1.0 - tile_loss) ** _HALVINGS[tile]) for tile in held)


@dataclass(frozen=True, slots=True)
class _Rates:
    hbm: float
    l2: float
    core_port: float


def _unaligned(work: Gemm) -> bool:
    """Whether a dimension that is contiguous in memory is no multiple of 16 bytes, as tensor cores' loads need."""
    step = 128 // math.gcd(128, number_format(work.format).bits)  # of six bits, 64 elements are the first to fit
    first = work.m if work.layout == "NT" else work.k
    return first % step != 0 or (work.n % step != 0 and work.n > 1)


def _hbm_bytes(
    work: Gemm,
    tile: tuple[int, int],
    rows: int,
    columns: int,
    cores: int,
    element: tuple[float, float],
    out: float,
    l2_bytes: float,
) -> float:
    """Bytes from and to HBM: tiles are walked in groups of rows, so A is read once and B once per group, unless L2
    keeps it.
    """
    a, b = element[0] * work.m * work.k, element[1] * work.n * work.k
    keep = l2_bytes / 2
    a_reads = b_reads = 1
    if work.batch == 1 or rows * columns > cores:
        if a > keep and b > keep:
            group = min(rows, max(1, round(math.sqrt(cores * tile[1] / tile[0]))))
            b_reads = -(-rows // group)
            if group * tile[0] * work.k * element[0] > keep:
                a_reads = -(-columns // max(1, cores // group))
            other_group = min(columns, max(1, cores // group))
            other = a * -(-columns // other_group) + b * (
                1 if other_group * tile[1] * work.k * element[1] <= keep else b_reads
            )
            if other < a * a_reads + b * b_reads:
                return work.batch * (other + out * work.m * work.n) + work.epilogue_bytes
    return work.batch * (a * a_reads + b * b_reads + out * work.m * work.n) + work.epilogue_bytes
