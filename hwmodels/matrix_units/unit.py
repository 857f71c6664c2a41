"""What every matrix unit answers, whatever it is made of: the seam between which unit runs work and how it tiles it."""

from typing import Protocol, Self

from hwmodels.matrix_units.attention import AttentionConstants
from hwmodels.memory.hbm import Hbm
from hwmodels.memory.sram import Sram
from hwmodels.work import Attention, Cost, Gemm


class MatrixUnit(Protocol):
    """A chip's matrix unit, of `cores` equal parts (a GPU's multiprocessors, a systolic chip's arrays) at `clock_hz`.

    `formats`: multiply-accumulates per core or cell and cycle, as the accelerator's file lists them; `shared_level`:
    what answers call the memory that all cores share ("l2", "sram"); `fixed_time_s`: fixed time of one kernel.
    """

    @property
    def cores(self) -> int: ...

    @property
    def clock_hz(self) -> float: ...

    @property
    def formats(self) -> dict[str, float]: ...

    @property
    def shared_level(self) -> str: ...

    @property
    def fixed_time_s(self) -> float: ...

    def macs_per_cycle(self, format: str) -> float:
        """Multiply-accumulates per core and cycle in `format`; 0 where the unit lacks it."""

    def gemm(self, work: Gemm, sram: Sram, hbm: Hbm, simd_flops: float) -> Cost:
        """The cost of `work`; `simd_flops` is the vector lanes' rate, used where the unit lacks the format."""

    def attention_block(self, work: Attention, sram: Sram) -> tuple[int, int]:
        """Query rows by key columns of one block of the algorithm that `work` names."""

    def attention_pair_cycles(self, work: Attention, rows: int, keys: int, constants: AttentionConstants) -> float:
        """Cycles of one core for the products of one pair of blocks: two in forward, five in backward."""

    def attention_hbm_bytes(self, work: Attention, pairs: int, keys: int, sram: Sram) -> float:
        """Bytes from and to HBM when every head walks `pairs` pairs of blocks of `keys` keys."""

    def attention_near_bytes(self, work: Attention, pairs: int, rows: int, keys: int) -> float:
        """Bytes between the shared level and the cores when every head walks `pairs` pairs of blocks of `rows` by
        `keys`.
        """

    def near_bytes_per_s(self, sram: Sram) -> float:
        """Bytes per second that all cores together take from the shared level."""

    def at_clock(self, ratio: float) -> Self:
        """The same unit with its clock times `ratio`."""
