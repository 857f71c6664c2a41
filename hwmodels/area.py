"""Silicon: what the parts of a chip occupy in its process, what the dies yield, and what the device costs to make.

An estimate of the order of a floor plan: transistors over the density of the process, SRAM by its cell, interfaces that
hardly shrink. Sources by short name:

    llmcompass    PrincetonUniversity/LLMCompass cost_model/cost_model.py: transistors of lanes, control, controllers
                  and ports counted on die photographs of A100 and MI210; PHYs in mm2
    ten-lessons   Jouppi et al., ISCA 2021: on TPUv4i (7 nm, under 400 mm2) 128 MiB of CMEM are 28 % and the four MXUs
                  11 %; not checked against the document itself
    cost-bridge   siliconanalysts.com/tools/cost-bridge (from Epoch AI, Raymond James, TrendForce; 2026): H100 die 300,
                  memory 1400, package 750, test and assembly 920 USD; MI300X 600, 2900, 1200, 600
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hwmodels.matrix_units.systolic_array import SystolicArray
from hwmodels.matrix_units.unit import MatrixUnit
from hwmodels.memory.hbm import Hbm
from hwmodels.memory.technologies import TECHNOLOGIES
from hwmodels.number_formats import COMPUTES_AS
from hwmodels.parameters import Section
from hwmodels.process import PROCESSES, Process

if TYPE_CHECKING:
    from hwmodels.accelerator import Accelerator

RETICLE_MM2 = 858.0  # 26 x 33 mm, the field of a lithography scanner
_SEVEN = PROCESSES["7 nm"]
# Transistors (llmcompass): a 64-bit multiply-add, others by the square of the significant bits; an integer unit; fetch,
# scheduling and issue of a lane; a core's port to the crossbar.
_FPU64, _INT32, _CONTROL, _PORT = 685_300.0, 177_690.0, 996_200.0, 44_300_000.0
_SIGNIFICAND = {"fp64": 52, "fp32": 23, "tf32": 10, "fp16": 10, "bf16": 7, "int8": 7, "fp8": 3, "fp6": 3, "fp4": 1}
_SMALLEST_MAC = 10_000.0  # the fp32 sum that every format feeds; assumed
_CELL_BF16 = 0.11 * 400.0 / 65536 * _SEVEN.transistors_per_mm2  # a systolic cell with its registers (ten-lessons)
_REGISTERS = 256.0 * 1024  # bytes of a core's registers, as on every NVIDIA core since 2012
_CACHE_MM2_PER_BYTE = 8.0 * 0.17e-6 / 0.526  # at 7 nm, tags and routing included (llmcompass)
_SCRATCHPAD_MM2_PER_BYTE = 0.28 * 400.0 / (128 * 2.0**20)  # at 7 nm (ten-lessons)
# Interfaces (llmcompass): mm2 that do not shrink, and transistors of the controller, of an HBM stack, of 32 pins of
# other memory, of a byte per second and direction of links (NVLink 4) and of the host (PCIe 5).
_HBM_PHY, _HBM_CONTROLLER = 10.45, 552.7e6
_PINS_PHY, _PINS_CONTROLLER = 1.45, 90.4e6
_LINK_PHY, _LINK_CONTROLLER = 0.965 / 25e9, 86.6e6 / 25e9
_HOST_PHY, _HOST_CONTROLLER = 0.64 / 4e9, 5.37e6 / 4e9
# What no part above is: front end, crossbar, clocks, pads, white space. Derived: what is left of A100's 826 mm2.
_OTHER = 0.27
_SPARE_CORES = 1.10  # made over sold; V100 84 of 80, A100 128 of 108, H100 144 of 132
# USD per GB: llmcompass (DRAM exchange, 2023: DDR5 2.4, HBM2e 7); cost-bridge (HBM3 17.5, MI300X 15); HBM3e 15 to 18
# by press (2026); the others assumed between.
_USD_PER_GB = {"hbm2": 7.0, "hbm2e": 7.0, "hbm3": 16.0, "hbm3e": 16.5, "hbm4": 22.0, "ddr4": 2.0, "ddr5": 2.4}
_USD_PER_GB_OTHER = 3.5
_ON_THE_DIE = (
    "area.cores_made",
    "matrix",
    "vector",
    "special_function",
    "memory.sram",
    "memory.hbm.stacks",
    "memory.hbm.technology",
    "links.",
    "process",
)
_STACK_MM2 = 110.0  # of the interposer, per HBM stack
_INTERPOSER_USD_PER_MM2 = 750.0 / (814.0 + 6 * _STACK_MM2)  # H100's package (cost-bridge)
_SUBSTRATE_USD_PER_MM2 = 0.005 * 4.0  # organic, four times the die's area (Chiplet Actuary, arXiv 2203.12268)
_TEST_AND_ASSEMBLY = 0.25  # of the rest; cost-bridge: H100 0.38, MI300X 0.13


@dataclass(frozen=True, slots=True)
class Silicon:
    """What a chip is made as: its process, cores that are made (more than are sold), and where they are published the
    area of one die and the number of dies (0: not given). A die that was published of another chip, which this one
    varies, is scaled by the estimates of both; `base_mm2` is the other's (0: the die is this chip's own).
    """

    process: Process
    cores_made: int
    die_mm2: float = 0.0
    dies: int = 0
    base_mm2: float = 0.0

    @classmethod
    def read(
        cls, section: Section, process: Process | None, cores: int, base_mm2: Callable[[], float]
    ) -> "Silicon | None":
        """From `area` of an accelerator file, of `cores` cores that are sold; None where it names no process.

        A variation that changes the silicon of its base has another die than the published one; `base_mm2` answers what
        the base's parts are estimated to occupy (0: it has no estimate, and the published die is left aside).
        """
        usual = math.ceil(cores * _SPARE_CORES) if cores > 8 else cores
        made, die, dies = (
            section.integer("cores_made", usual),
            section.quantity("die", "area", 0.0, zero=True),
            section.integer("dies", 0, low=0),
        )
        users = {entry.path for entry in section.log if entry.kind == "user"}
        other = 0.0
        if die and process and any(path.startswith(_ON_THE_DIE) for path in users) and "area.die" not in users:
            other = base_mm2()
            die = die if other else 0.0
        section.close()
        return cls(process, max(made, cores), die, dies, other) if process else None


@dataclass(frozen=True, slots=True)
class Area:
    """`parts_mm2` by name; `dies` of `die_mm2` each; `die_yield` the share of dies that can be sold; prices in USD of
    all good dies, memory, package with test and assembly.
    """

    parts_mm2: dict[str, float]
    dies: int
    die_mm2: float
    die_yield: float
    dies_usd: float
    memory_usd: float
    package_usd: float

    @property
    def total_mm2(self) -> float:
        """What the parts occupy together."""
        return sum(self.parts_mm2.values())

    @property
    def device_usd(self) -> float:
        """What the device costs to make, without design, masks, board and margin."""
        return self.dies_usd + self.memory_usd + self.package_usd


def area_of(chip: "Accelerator", silicon: Silicon) -> Area:
    """The area and the cost of `chip`. Parts are estimated; a published die, scaled where the chip varies the one that
    it is published of, replaces their sum in the cost.
    """
    process = silicon.process
    cores = _cores_mm2(chip, process) * silicon.cores_made / chip.cores
    parts = {
        "cores": cores,
        chip.matrix.shared_level: _sram_mm2(chip, process),
        "memory interface": _memory_interface_mm2(chip, process),
        "links": _links_mm2(chip, process),
    }
    parts["other"] = _OTHER / (1.0 - _OTHER) * sum(parts.values())
    total = sum(parts.values())
    changed = total / silicon.base_mm2 if silicon.base_mm2 else 1.0
    made_mm2 = silicon.die_mm2 * changed * (silicon.dies or 1) or total
    dies = max(silicon.dies, math.ceil(made_mm2 / RETICLE_MM2) if changed != 1.0 or not silicon.dies else 1, 1)
    die = made_mm2 / dies
    share = cores / total
    good = die_yield(die, process.defects_per_mm2, share, silicon.cores_made // dies, chip.cores // dies)
    dies_usd = dies * process.wafer_usd / (dies_per_wafer(die) * good)
    memory_usd = _memory_usd(chip.memory.hbm)
    stacked = chip.memory.hbm.technology.startswith("hbm")
    carrier = (
        (dies * die + chip.memory.hbm.stacks * _STACK_MM2) * _INTERPOSER_USD_PER_MM2
        if stacked
        else dies * die * _SUBSTRATE_USD_PER_MM2
    )
    package = carrier + _TEST_AND_ASSEMBLY * (dies_usd + memory_usd + carrier)
    return Area(parts, dies, die, good, dies_usd, memory_usd, package)


def dies_per_wafer(die_mm2: float) -> float:
    """Whole dies on a 300 mm wafer: its area over theirs, less those that the edge cuts."""
    return max(1.0, math.pi * 150.0**2 / die_mm2 - math.pi * 300.0 / math.sqrt(2.0 * die_mm2))


def murphy(area_mm2: float, defects_per_mm2: float) -> float:
    """Murphy's yield of an area in which one defect is one too many: ((1 - e^-AD) / AD)^2."""
    expected = area_mm2 * defects_per_mm2
    return (-math.expm1(-expected) / expected) ** 2 if expected > 1e-9 else 1.0


def die_yield(die_mm2: float, defects_per_mm2: float, core_share: float, cores_made: int, cores_sold: int) -> float:
    """Share of dies that can be sold: none of the defects outside the cores, and no more in cores than are spare
    (a Poisson number, each in a core of its own).
    """
    expected = die_mm2 * core_share * defects_per_mm2
    enough = sum(
        math.exp(-expected) * expected**hit / math.factorial(hit) for hit in range(min(cores_made - cores_sold, 60) + 1)
    )
    return murphy(die_mm2 * (1.0 - core_share), defects_per_mm2) * min(1.0, enough)


def _logic_mm2(transistors: float, process: Process) -> float:
    return transistors / process.transistors_per_mm2


def _multiplier(format: str) -> float:
    """Transistors of a multiply-add in `format`, by the square of its significant bits (llmcompass)."""
    bits = _SIGNIFICAND.get(format) or _SIGNIFICAND.get(COMPUTES_AS.get(format, ""), 7)
    return float(max(_SMALLEST_MAC, _FPU64 * (bits / 52.0) ** 2))


def _cores_mm2(chip: "Accelerator", process: Process) -> float:
    """All cores that are sold: lanes with their control, multipliers (the widest use of shared ones), registers,
    shared memory, ports.
    """
    fp32 = _FPU64 * (23.0 / 52.0) ** 2 + _INT32 + _CONTROL
    lanes = sum(unit.lanes * (fp32 + _FPU64 * min(1.0, unit.formats.get("fp64", 0.0))) for unit in chip.vectors)
    return _logic_mm2(lanes, process) + sum(_unit_mm2(unit, process) for unit in chip.matrices)


def _unit_mm2(unit: MatrixUnit, process: Process) -> float:
    if isinstance(unit, SystolicArray):
        cell = max(
            rate * _multiplier(name)
            for name, rate in unit.formats.items()
            if rate >= min(1.0, max(unit.formats.values()))
        )
        cell *= _CELL_BF16 / _multiplier("bf16")
        return _logic_mm2(unit.rows * unit.columns * unit.count * cell, process)
    macs = max(rate * _multiplier(name) for name, rate in unit.formats.items()) if unit.formats else 0.0
    near = _REGISTERS + float(getattr(unit, "shared_memory_bytes", 0.0))
    logic = _logic_mm2(unit.cores * (macs + _PORT), process)
    return logic + unit.cores * near * _CACHE_MM2_PER_BYTE * process.sram_cell_mm2 / _SEVEN.sram_cell_mm2


def _memory_usd(memory: Hbm) -> float:
    if not memory.stacks:  # on the chip
        return 0.0
    return memory.capacity_bytes / 1e9 * _USD_PER_GB.get(memory.technology, _USD_PER_GB_OTHER)


def _sram_mm2(chip: "Accelerator", process: Process) -> float:
    per_byte = _SCRATCHPAD_MM2_PER_BYTE if isinstance(chip.matrix, SystolicArray) else _CACHE_MM2_PER_BYTE
    size = chip.memory.sram.capacity_bytes + sum(level.capacity_bytes for level in chip.memory.behind)
    return size * per_byte * process.sram_cell_mm2 / _SEVEN.sram_cell_mm2


def _memory_interface_mm2(chip: "Accelerator", process: Process) -> float:
    memory = chip.memory.hbm
    if not memory.stacks:  # on the chip
        return 0.0
    if memory.technology.startswith("hbm"):
        return memory.stacks * (_HBM_PHY + _logic_mm2(_HBM_CONTROLLER, process))
    units = memory.stacks * TECHNOLOGIES[memory.technology].pins / 32.0
    return units * (_PINS_PHY + _logic_mm2(_PINS_CONTROLLER, process))


def _links_mm2(chip: "Accelerator", process: Process) -> float:
    fabric = chip.links.fabric.bandwidth_bytes_per_s if chip.links.fabric else 0.0
    host = chip.links.host.bandwidth_bytes_per_s
    shrinks = _logic_mm2(fabric * _LINK_CONTROLLER + host * _HOST_CONTROLLER, process)
    return fabric * _LINK_PHY + host * _HOST_PHY + shrinks
