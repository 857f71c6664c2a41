"""An accelerator: its parts put together, and the one door through which work is priced."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from hwmodels import catalog
from hwmodels.area import Area, Silicon, area_of
from hwmodels.catalog import load_raw, names
from hwmodels.energies import per_byte_j, per_flop_j, per_lane_flop_j
from hwmodels.interconnect.host import copy_cost
from hwmodels.interconnect.links import Link
from hwmodels.matrix_units import systolic_array
from hwmodels.matrix_units.attention import ALGORITHMS, AttentionConstants, attention_cost, defaults
from hwmodels.matrix_units.systolic_array import SystolicArray
from hwmodels.matrix_units.tensor_core import TensorCore
from hwmodels.matrix_units.unit import MatrixUnit
from hwmodels.memory.hbm import Hbm
from hwmodels.memory.sram import Sram, through_levels
from hwmodels.number_formats import FORMATS, number_format
from hwmodels.parameters import Provenance, Section
from hwmodels.power import Power
from hwmodels.process import Process, process_of
from hwmodels.special_function import SpecialFunctionUnit
from hwmodels.units import InputError
from hwmodels.vector_unit import SIMT_PASSES, WIDE_VECTOR_PASSES, PassConstants, VectorUnit
from hwmodels.work import Attention, Cost, Gemm, HostCopy, Pass

__all__ = ["Accelerator", "Links", "Memory", "Work", "load", "load_raw", "names"]
Work = Gemm | Attention | Pass | HostCopy
_UNITS = {unit.unit: unit for unit in (TensorCore, SystolicArray)}
_NAMES_OF_MAIN_MEMORY = ("dram", "ddr", "lpddr", "gddr", "main", "off_chip")


@dataclass(frozen=True, slots=True)
class Memory:
    """The memory levels: `sram` shared by all cores (a GPU's L2, a scratchpad), those `behind` it on the way to `hbm`,
    the main memory: beside the chip and of any technology, or where there is none the last on-chip level.
    """

    sram: Sram
    hbm: Hbm
    behind: tuple[Sram, ...] = ()

    @property
    def l2(self) -> Sram:
        """The shared on-chip level, as a GPU calls it."""
        return self.sram


@dataclass(frozen=True, slots=True)
class Links:
    """The device's links: `fabric` (None where it has only `host`), `host`, `network` (None where the file has none);
    bandwidths per direction.
    """

    fabric: Link | None
    host: Link
    network: Link | None


@dataclass(frozen=True, slots=True)
class Accelerator:
    """One device. Question: what does this GEMM, attention, pass or copy cost when it runs alone at the nominal clock?

    Of several matrix or vector units, each piece of work takes those on which it is fastest; the first listed is the
    main one, by which cores are counted and the shared memory is named. Units may have clocks of their own, which go
    down together under the one power limit.
    """

    name: str
    title: str
    architecture: str  # the chip's generation, as software chooses kernels by: volta, ampere, hopper, ...
    clock_hz: float
    matrices: tuple[MatrixUnit, ...]
    vectors: tuple[VectorUnit, ...]
    memory: Memory
    links: Links
    power: Power
    attention: dict[str, AttentionConstants]  # of the first matrix unit; others have their family's defaults
    passes: PassConstants
    price_usd_per_s: float
    sources: dict[str, str]
    provenance: tuple[Provenance, ...]
    calibration_status: str
    calibrated_on: tuple[str, tuple[str, ...]] | None = None  # a base, and what was changed of what it was fitted on
    peaks: Mapping[str, float] = field(default_factory=dict)  # as published; for `cosim hw check`
    silicon: Silicon | None = None  # None: the file names no process
    _costs: dict[Work, Cost] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def matrix(self) -> MatrixUnit:
        """The first matrix unit, the only one of most chips."""
        return self.matrices[0]

    @property
    def vector(self) -> VectorUnit:
        """The first vector unit, the only one of most chips."""
        return self.vectors[0]

    @property
    def cores(self) -> int:
        """Cores of the first matrix unit (a GPU's streaming multiprocessors, a systolic chip's arrays)."""
        return self.matrix.cores

    @property
    def area(self) -> Area | None:
        """What its parts occupy and its dies yield and cost; None where the file names no process."""
        return area_of(self, self.silicon) if self.silicon else None

    @property
    def idle_power_w(self) -> float:
        """Watts drawn whatever runs."""
        return self.power.idle_w

    @property
    def power_limit_w(self) -> float:
        """Watts that the device may draw, sustained."""
        return self.power.limit_w

    @property
    def formats(self) -> tuple[str, ...]:
        """Formats that the device multiplies, on the matrix unit or on the vector lanes."""
        tables = [*(unit.formats for unit in self.matrices), *(unit.formats for unit in self.vectors)]
        return tuple(dict.fromkeys(name for table in tables for name in table))

    def peak_flops(self, format: str) -> float:
        """Dense peak FLOP/s of GEMMs in `format` (of a matrix unit, or of vector lanes where they lack the format).

        Raises InputError: the chip has neither.
        """
        matrix = max(2.0 * unit.cores * unit.macs_per_cycle(format) * unit.clock_hz for unit in self.matrices)
        peak = matrix or self._lanes_flops(format)
        if peak == 0.0:
            number_format(format)
            raise InputError(f"{self.name} does not compute in {format}; it has {', '.join(self.formats)}")
        return peak

    def _lanes_flops(self, format: str) -> float:
        return max(unit.peak_flops(format) for unit in self.vectors)

    def cost(self, work: Work) -> Cost:
        """What `work` costs alone at the nominal clock; the answer is kept.

        Raises InputError: a size that is not positive, a format or an attention algorithm that the chip lacks.
        """
        found = self._costs.get(work)
        if found is None:
            found = self._price(work)
            self._costs[work] = found
        return found

    def at_clock(self, clock_hz: float) -> "Accelerator":
        """The same device with its cores and caches at another clock; memory and links keep theirs."""
        ratio = clock_hz / self.clock_hz
        sram, *behind = (
            replace(level, bandwidth_bytes_per_s=level.bandwidth_bytes_per_s * ratio)
            for level in (self.memory.sram, *self.memory.behind)
        )
        return replace(
            self,
            clock_hz=clock_hz,
            matrices=tuple(unit.at_clock(ratio) for unit in self.matrices),
            vectors=tuple(unit.at_clock(ratio) for unit in self.vectors),
            memory=replace(self.memory, sram=sram, behind=tuple(behind)),
        )

    def _price(self, work: Work) -> Cost:
        if isinstance(work, HostCopy):
            return copy_cost(work, self.links.host, self.memory.hbm, self.power)
        if isinstance(work, Gemm):
            if min(work.m, work.n, work.k, work.batch) < 1:
                raise InputError(
                    f"gemm m={work.m} n={work.n} k={work.k} batch={work.batch}: every size must be at least 1"
                )
            cost = self._gemm(work)
        elif isinstance(work, Attention):
            cost = self._attention(work)
        else:
            cost = _fastest([partial(self._pass, work, unit) for unit in self.vectors])
        energy = self.power.energy_j(cost.flops, work.format, cost.bytes_per_level, cost.time_s)
        return replace(cost, energy_j=energy)

    def _gemm(self, work: Gemm) -> Cost:
        able = [unit for unit in self.matrices if unit.macs_per_cycle(work.format)]
        lanes = 0.0
        if not able:
            lanes, able = self.peak_flops(work.format), [self.matrix]
        return _fastest([partial(self._tiled, unit, partial(unit.gemm, work, simd_flops=lanes)) for unit in able])

    def _attention(self, work: Attention) -> Cost:
        if min(work.batch, work.heads, work.kv_heads, work.seq_q, work.seq_k, work.head_dim, work.value_dim) < 1:
            raise InputError(f"attention {work}: every size must be at least 1")
        if work.algorithm not in self.attention:
            raise InputError(
                f"{self.name} has no attention kernel {work.algorithm!r}; it has {', '.join(self.attention)}"
            )
        ways = []
        for unit in self.matrices:
            family = self.attention if unit is self.matrix else attention_kernels(unit, self.architecture)
            constants = family.get(work.algorithm)
            if constants is not None:
                for lanes in self.vectors:
                    price = partial(attention_cost, work, constants, unit, lanes)
                    ways.append(partial(self._tiled, unit, price))
        return _fastest(ways)

    def _tiled(self, unit: MatrixUnit, price: Callable[[Sram, Hbm], Cost]) -> Cost:
        """What `price` says of the memory levels, of which the shared one is called as the first unit's."""
        memory, called = self.memory, self.matrix.shared_level
        cost = through_levels(price, memory.sram, memory.behind, memory.hbm, unit.shared_level)
        if unit.shared_level == called:
            return cost
        moved = {called if name == unit.shared_level else name: size for name, size in cost.bytes_per_level.items()}
        limit = called if cost.limited_by == unit.shared_level else cost.limited_by
        return replace(cost, bytes_per_level=moved, limited_by=limit)

    def _pass(self, work: Pass, lanes: VectorUnit) -> Cost:
        again = self.passes.again_bytes(work, self.cores, self.memory.sram.capacity_bytes)
        moved = work.read_bytes + again + work.write_bytes
        memory = self.memory.hbm.time_s(work.kind, work.read_bytes + again, work.write_bytes)
        compute = self.passes.time_s(work, lanes)
        levels = {self.matrix.shared_level: self.memory.sram, **{level.level: level for level in self.memory.behind}}
        slowest = min(levels, key=lambda name: levels[name].rate(work.kind))
        near = moved / levels[slowest].rate(work.kind)
        longest = max(memory, compute, near)
        time = longest + self.passes.fixed_time_s
        limit = "memory" if longest == memory else "vector" if longest == compute else slowest
        if longest < self.passes.fixed_time_s:
            limit = "latency"
        flops = work.vector_ops + work.special_ops
        shares = min(1.0, compute / time), min(1.0, memory / time)
        return Cost(time, flops, {"hbm": moved, **dict.fromkeys(levels, moved)}, limit, 0.0, *shares)


def _fastest(ways: Sequence[Callable[[], Cost]]) -> Cost:
    """The shortest of what units answer; a unit may refuse work that another one takes."""
    if len(ways) == 1:
        return ways[0]()
    refused, found = [], []
    for way in ways:
        try:
            found.append(way())
        except InputError as error:
            refused.append(error)
    if not found:
        raise refused[0]
    return min(found, key=lambda cost: cost.time_s)


def load(reference: str | Mapping[str, Any], where: str = "accelerator") -> Accelerator:
    """The accelerator that `reference` names: a library name, the path of a .yaml file, or {base: NAME, set: {path:
    value}}.

    Raises InputError with one sentence that names file, key, value and what is allowed.
    """
    written = catalog.resolve(reference, where)
    return build(Section(written.data, written.label), written)


def build(root: Section, written: catalog.Written) -> "Accelerator":
    """The accelerator that the file `root` describes; a `root` that gathers problems has them all afterwards."""
    calibration = root.section("calibration")
    clock = root.quantity("clock", "frequency")
    units, lanes, links = root.sections("matrix"), root.sections("vector"), root.section("links", required=True)
    fitted = calibration.sections("gemm", len(units))
    matrices = [_matrix(root, unit, clock, gemm) for unit, gemm in zip(units, fitted, strict=True)]
    special = None
    if root.has("special_function"):
        section = root.section("special_function")
        special = root.part(lambda: SpecialFunctionUnit.read(section, clock))
    vectors = [_vector(root, unit, clock, special) for unit in lanes]
    matrix, systolic = matrices[0], isinstance(matrices[0], SystolicArray)
    memory = root.section("memory", required=True)
    kept, sent = calibration.section("memory"), calibration.section("links")
    cache = not all(isinstance(unit, SystolicArray) for unit in matrices)
    levels = root.part(lambda: _memory(memory, kept, cache, clock), memory.present)
    price, area = root.section("price"), root.section("area")
    process = root.part(lambda: process_of(root.text("process", ""), root.at("process")))
    accelerator = Accelerator(
        name=root.text("name"),
        title=root.text("title", root.text("name")),
        architecture=root.text("architecture", ""),
        clock_hz=clock,
        matrices=tuple(matrices),
        vectors=tuple(vectors),
        memory=levels,
        links=root.part(lambda: _links(links, sent), links.present),
        power=root.part(lambda: _power(root, process, matrices, vectors, levels)),
        attention=_attention_constants(
            calibration.section("attention"), attention_kernels(matrix, root.text("architecture", ""))
        ),
        passes=PassConstants.read(calibration.section("pass"), WIDE_VECTOR_PASSES if systolic else SIMT_PASSES),
        price_usd_per_s=price.quantity("device_hour", "money_rate", 0.0, zero=True),
        sources=root.part(lambda: _sources(root, written.data)),
        provenance=tuple(root.log),
        calibrated_on=written.calibrated_on(),
        peaks=_peaks(root.section("peaks")),
        calibration_status="calibrated" if any(section.keys() for section in fitted) else "defaults",
        silicon=root.part(
            lambda: Silicon.read(area, process, matrix.cores if matrix else 1, partial(_base_mm2, written))
        ),
    )
    for section in (memory, price, area, calibration, root):
        section.close()
    return accelerator


def _base_mm2(written: catalog.Written) -> float:
    """What the parts of the chip are estimated to occupy that `written` varies; 0 where there is no estimate."""
    origin = written.origin
    found = build(Section(origin.data, origin.label), origin).area if origin else None
    return found.total_mm2 if found else 0.0


def _matrix(root: Section, section: Section, clock_hz: float, fitted: Section) -> MatrixUnit:
    unit = _UNITS[section.text("unit", TensorCore.unit, tuple(_UNITS))]
    own = section.quantity("clock", "frequency", clock_hz)
    return root.part(lambda: unit.read(section, own, fitted), section.present)


def _vector(root: Section, section: Section, clock_hz: float, special: SpecialFunctionUnit | None) -> VectorUnit:
    return root.part(lambda: VectorUnit.read(section, clock_hz, special), section.present)


def attention_kernels(unit: MatrixUnit | None, architecture: str) -> dict[str, AttentionConstants]:
    """The attention kernels that a matrix unit's family has, with the family's constants."""
    return dict(systolic_array.KERNELS if isinstance(unit, SystolicArray) else defaults(architecture))


def _memory(section: Section, calibration: Section, cache: bool, clock_hz: float) -> Memory:
    """The levels; without `hbm` the last on-chip level is the main memory."""
    for name in _NAMES_OF_MAIN_MEMORY:
        if section.has(name):
            raise InputError(f"{section.at(name)}: main memory is called memory.hbm, whatever its technology")
    levels = section.sections("sram")
    near, *behind = (Sram.read(level, cache, clock_hz, behind=place > 0) for place, level in enumerate(levels))
    if section.has("hbm"):
        return Memory(near, Hbm.read(section.section("hbm"), calibration), tuple(behind))
    calibration.close()
    last = behind[-1] if behind else near
    return Memory(near, Hbm.on_chip(last.capacity_bytes, last.bandwidth_bytes_per_s), tuple(behind[:-1]))


def _power(
    root: Section,
    process: Process | None,
    matrices: Sequence[MatrixUnit],
    vectors: Sequence[VectorUnit],
    memory: Memory,
) -> Power:
    """Energies that the file leaves out follow from its process, where it names one, and its memory's technology."""
    section = root.section("power", required=True)
    if process is None or None in matrices or None in vectors or memory is None:  # the last three: have a problem
        return Power.read(section, {}, {})
    nm, flop = process.length_nm, dict[str, float]()
    threads = matrices[0].shared_level == TensorCore.shared_level  # operands in registers, an instruction per thread
    for lanes in reversed(vectors):  # of a format that several units have, the first's
        flop |= per_lane_flop_j(lanes.formats, nm, threads)
    for unit in reversed(matrices):
        flop |= per_flop_j(unit.formats, nm, unit.shared_level == TensorCore.shared_level)
    moved = per_byte_j(memory.hbm.technology, nm)
    if not memory.hbm.stacks and memory.hbm.capacity_bytes == memory.sram.capacity_bytes:
        moved["hbm"] = 0.0  # the shared level itself, whose bytes are counted there
    return Power.read(section, flop, moved)


def _links(section: Section, calibration: Section) -> Links:
    fabric = (
        Link.read(section.section("fabric"), calibration.section("fabric"), 3e-6) if section.has("fabric") else None
    )
    host = Link.read(section.section("host", required=True), calibration.section("host"), 5e-6)
    network = None
    if section.has("network"):
        network = Link.read(section.section("network"), calibration.section("network"), 10e-6)
    section.close()
    calibration.close()
    return Links(fabric, host, network)


def _peaks(section: Section) -> dict[str, float]:
    """What was published of the chip's dense peaks by format (FLOP/s) and of its memory's `bandwidth` (bytes/s)."""
    found = {name: section.quantity(name, "compute") for name in FORMATS if section.has(name)}
    if section.has("bandwidth"):
        found["bandwidth"] = section.quantity("bandwidth", "bandwidth")
    section.close()
    return found


def _attention_constants(section: Section, family: Mapping[str, AttentionConstants]) -> dict[str, AttentionConstants]:
    """The file's algorithms, or the family's defaults where it lists none."""
    if not section.keys():
        return dict(family)
    found = {name: AttentionConstants.read(section.section(name)) for name in ALGORITHMS if section.has(name)}
    section.close()
    return found


def _sources(root: Section, data: Mapping[str, Any]) -> dict[str, str]:
    raw = data.get("sources") or {}
    if isinstance(raw, list):
        raw = dict(enumerate(raw, 1))
    if not isinstance(raw, Mapping):
        raise InputError(
            f"{root.at('sources')} must be a list, or a mapping of short names to where they can be opened"
        )
    return {str(key): str(value) for key, value in raw.items()}
