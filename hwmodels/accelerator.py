"""An accelerator: its parts put together, and the one door through which work is priced."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from hwmodels import catalog
from hwmodels.area import Area, Silicon, area_of
from hwmodels.catalog import load_raw, names
from hwmodels.energies import per_byte_j, per_flop_j, per_lane_flop_j
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
from hwmodels.units import InputError
from hwmodels.vector_unit import SIMT_PASSES, WIDE_VECTOR_PASSES, PassConstants, VectorUnit
from hwmodels.work import Attention, Cost, Gemm, Pass

__all__ = ["Accelerator", "Links", "Memory", "load", "load_raw", "names"]
_UNITS = (TensorCore.unit, SystolicArray.unit)


@dataclass(frozen=True, slots=True)
class Memory:
    """The memory levels: `sram` shared by all cores (a GPU's L2, a scratchpad), those `behind` it on the way to `hbm`
    beside the chip.
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
    """One device. Question: what does this GEMM, attention or pass cost when it runs alone at the nominal clock?"""

    name: str
    title: str
    architecture: str  # the chip's generation, as software chooses kernels by: volta, ampere, hopper, ...
    clock_hz: float
    matrix: MatrixUnit
    vector: VectorUnit
    memory: Memory
    links: Links
    power: Power
    attention: dict[str, AttentionConstants]
    passes: PassConstants
    price_usd_per_s: float
    sources: dict[str, str]
    provenance: tuple[Provenance, ...]
    calibration_status: str
    calibrated_on: tuple[str, tuple[str, ...]] | None = None  # a base, and what was changed of what it was fitted on
    peaks: Mapping[str, float] = field(default_factory=dict)  # as published; for `cosim hw check`
    silicon: Silicon | None = None  # None: the file names no process
    _costs: dict[Gemm | Attention | Pass, Cost] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def cores(self) -> int:
        """Cores of the matrix unit (a GPU's streaming multiprocessors, a systolic chip's arrays)."""
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
        return tuple(dict.fromkeys([*self.matrix.formats, *self.vector.formats]))

    def peak_flops(self, format: str) -> float:
        """Dense peak FLOP/s of GEMMs in `format` (matrix unit, or vector lanes where it lacks the format).

        Raises InputError: the chip has neither.
        """
        matrix = 2.0 * self.matrix.cores * self.matrix.macs_per_cycle(format) * self.matrix.clock_hz
        peak = matrix or self.vector.peak_flops(format)
        if peak == 0.0:
            number_format(format)
            raise InputError(f"{self.name} does not compute in {format}; it has {', '.join(self.formats)}")
        return peak

    def cost(self, work: Gemm | Attention | Pass) -> Cost:
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
            matrix=self.matrix.at_clock(ratio),
            vector=replace(self.vector, clock_hz=self.vector.clock_hz * ratio),
            memory=replace(self.memory, sram=sram, behind=tuple(behind)),
        )

    def _price(self, work: Gemm | Attention | Pass) -> Cost:
        if isinstance(work, Gemm):
            if min(work.m, work.n, work.k, work.batch) < 1:
                raise InputError(
                    f"gemm m={work.m} n={work.n} k={work.k} batch={work.batch}: every size must be at least 1"
                )
            self.peak_flops(work.format)
            lanes = self.vector.peak_flops(work.format)
            cost = self._tiled(lambda near, memory: self.matrix.gemm(work, near, memory, lanes))
        elif isinstance(work, Attention):
            cost = self._attention(work)
        else:
            cost = self._pass(work)
        energy = self.power.energy_j(cost.flops, work.format, cost.bytes_per_level, cost.time_s)
        return replace(cost, energy_j=energy)

    def _attention(self, work: Attention) -> Cost:
        if min(work.batch, work.heads, work.kv_heads, work.seq_q, work.seq_k, work.head_dim, work.value_dim) < 1:
            raise InputError(f"attention {work}: every size must be at least 1")
        constants = self.attention.get(work.algorithm)
        if constants is None:
            raise InputError(
                f"{self.name} has no attention kernel {work.algorithm!r}; it has {', '.join(self.attention)}"
            )
        return self._tiled(lambda near, memory: attention_cost(work, constants, self.matrix, self.vector, near, memory))

    def _tiled(self, price: Callable[[Sram, Hbm], Cost]) -> Cost:
        memory = self.memory
        return through_levels(price, memory.sram, memory.behind, memory.hbm, self.matrix.shared_level)

    def _pass(self, work: Pass) -> Cost:
        again = self.passes.again_bytes(work, self.cores, self.memory.sram.capacity_bytes)
        moved = work.read_bytes + again + work.write_bytes
        memory = self.memory.hbm.time_s(work.kind, work.read_bytes + again, work.write_bytes)
        compute = self.passes.time_s(work, self.vector)
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
    matrix_section = root.section("matrix", required=True)
    systolic = matrix_section.text("unit", TensorCore.unit, _UNITS) == SystolicArray.unit
    unit = SystolicArray if systolic else TensorCore
    matrix: MatrixUnit = root.part(
        lambda: unit.read(matrix_section, clock, calibration.section("gemm")), matrix_section.present
    )
    memory = root.section("memory", required=True)
    lanes, links = root.section("vector", required=True), root.section("links", required=True)
    vector = root.part(lambda: VectorUnit.read(lanes, clock), lanes.present)
    kept, sent = calibration.section("memory"), calibration.section("links")
    levels = root.part(lambda: _memory(memory, kept, not systolic, clock), memory.present)
    price, area = root.section("price"), root.section("area")
    process = root.part(lambda: process_of(root.text("process", ""), root.at("process")))
    accelerator = Accelerator(
        name=root.text("name"),
        title=root.text("title", root.text("name")),
        architecture=root.text("architecture", ""),
        clock_hz=clock,
        matrix=matrix,
        vector=vector,
        memory=levels,
        links=root.part(lambda: _links(links, sent), links.present),
        power=root.part(lambda: _power(root, process, matrix, vector, levels)),
        attention=_attention_constants(
            calibration.section("attention"),
            systolic_array.KERNELS if systolic else defaults(root.text("architecture", "")),
        ),
        passes=PassConstants.read(calibration.section("pass"), WIDE_VECTOR_PASSES if systolic else SIMT_PASSES),
        price_usd_per_s=price.quantity("device_hour", "money_rate", 0.0, zero=True),
        sources=root.part(lambda: _sources(root, written.data)),
        provenance=tuple(root.log),
        calibrated_on=written.calibrated_on(),
        peaks=_peaks(root.section("peaks")),
        calibration_status="calibrated" if calibration.section("gemm").keys() else "defaults",
        silicon=root.part(lambda: Silicon.read(area, process, matrix.cores if matrix else 1)),
    )
    for section in (memory, price, area, calibration, root):
        section.close()
    return accelerator


def _memory(section: Section, calibration: Section, cache: bool, clock_hz: float) -> Memory:
    near, *behind = section.sections("sram")
    return Memory(
        Sram.read(near, cache, clock_hz),
        Hbm.read(section.section("hbm", required=True), calibration),
        tuple(Sram.read(level, cache, clock_hz, behind=True) for level in behind),
    )


def _power(root: Section, process: Process | None, matrix: MatrixUnit, vector: VectorUnit, memory: Memory) -> Power:
    """Energies that the file leaves out follow from its process, where it names one, and its memory's technology."""
    section = root.section("power", required=True)
    if process is None or matrix is None or vector is None or memory is None:  # the last three: have a problem
        return Power.read(section, {}, {})
    threads = matrix.shared_level == TensorCore.shared_level  # operands in registers, an instruction per thread
    lanes = per_lane_flop_j(vector.formats, process.length_nm, threads)
    units = per_flop_j(matrix.formats, process.length_nm, threads)
    return Power.read(section, {**lanes, **units}, per_byte_j(memory.hbm.technology, process.length_nm))


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
