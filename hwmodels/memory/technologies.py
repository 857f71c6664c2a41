"""Memory technologies by name: interface, organisation, timing and energy of one stack, chip or channel.

Sources by short name. JEDEC's announcements of JESD235C (HBM2e), JESD238 (HBM3), JESD270-4 (HBM4), JESD239 (GDDR7),
JESD209-5B (LPDDR5X) and JESD79-5C (DDR5) give pin rates, widths and channels. JEDEC leaves most core timings to
vendors, whose datasheets are closed; those here are what the open simulators have:

    ramulator   CMU-SAFARI/ramulator2 python/ramulator/dram/{hbm2,hbm3,hbm4}.py, src/dram/impl/{LPDDR5,GDDR6}.cpp
    dramsim3    umd-memsys/DRAMsim3 configs/{HBM2_8Gb_x128,GDDR5_8Gb_x32,GDDR5X_8Gb_x32,DDR4_8Gb_x8_3200}.ini
    dramsys     tukl-msd/DRAMSys configs/memspec/JEDEC_512Mbx16_LPDDR4-4266.json
    gem5        gem5/gem5 src/mem/dram_interfaces/{hbm,lpddr5,ddr5}.py (DDR5 from Micron's 16 Gb datasheet)

Energies per bit of the whole device: O'Connor et al., Fine-Grained DRAM, MICRO 2017 (HBM2 3.9, GDDR5 14 pJ); Micron's
table of ultra-bandwidth solutions (GDDR6 7.5, GDDR6X 7.25, HBM2E 6.0 pJ); Samsung by CFM (HBM3E 3.9, HBM4E less than
half of it); Jouppi et al., Ten Lessons, ISCA 2021, table 2 (per 64 bits: DDR3/4 1300 pJ, HBM2 250 to 450, GDDR6 350 to
480). None of the documents was opened itself, but for the simulators' files and Micron's table.
"""

from dataclasses import dataclass

_GB = 1e9
_NS = 1e-9
_PJ = 1e-12


@dataclass(frozen=True, slots=True)
class Technology:
    """One unit of a memory: a stack (HBM), a chip (GDDR), a channel of a package (LPDDR), a DIMM's interface (DDR).

    `pin_bits_per_s` where a file gives none, `fastest_pin_bits_per_s` of any part that is sold; `pins` data pins;
    `channels` that take commands on their own (pseudo channels where there are). Of a channel: `burst_bytes` of the
    smallest access, `page_bytes` of an open row, `banks`. `row_cycle_s` (tRC) between two rows of a bank,
    `four_activates_s` (tFAW), `turnaround_s` idle bus time of a write after a read and a read after it (tWTR, the
    read latency, and two clocks), `refresh_s` (tRFC) of what one refresh blocks every `refresh_interval_s`;
    `refresh_per_bank`: it blocks one bank, not the channel. `latency_s`: closed row to first data (tRCD + CL).
    """

    pin_bits_per_s: float
    fastest_pin_bits_per_s: float
    pins: int
    channels: int
    burst_bytes: int
    page_bytes: int
    banks: int
    row_cycle_s: float
    four_activates_s: float
    turnaround_s: float
    refresh_s: float
    refresh_interval_s: float
    refresh_per_bank: bool
    latency_s: float
    energy_per_bit_j: float


_HBM2 = (
    Technology(  # JESD235B: 2.4 Gb/s, 8 channels of two pseudo channels, 307 GB/s; timings: ramulator 2000, dramsim3
        pin_bits_per_s=2.4 * _GB,
        fastest_pin_bits_per_s=2.43 * _GB,  # A100 40 GB, 1215 MHz
        pins=1024,
        channels=16,
        burst_bytes=32,  # 64 pins, burst of 4
        page_bytes=1024,
        banks=16,
        row_cycle_s=48 * _NS,
        four_activates_s=15 * _NS,  # ramulator; FGDRAM has 14, gem5 16
        turnaround_s=(6 + 14 + 2) * _NS,  # tWTR_S + CL + two clocks
        refresh_s=160 * _NS,  # tRFCSB; all banks at once: 350 (8 Gb)
        refresh_interval_s=3900 * _NS,
        refresh_per_bank=True,
        latency_s=28 * _NS,
        energy_per_bit_j=3.9 * _PJ,  # FGDRAM; Ten Lessons 3.9 to 7
    )
)


def _like(base: Technology, **changes: float | bool) -> Technology:
    values = {name: getattr(base, name) for name in Technology.__slots__}
    return Technology(**{**values, **changes})


_HBM3 = _like(  # JESD238: 6.4 Gb/s, 16 channels of two pseudo channels of 32 pins, 819 GB/s; timings: ramulator 6400
    _HBM2,
    pin_bits_per_s=6.4 * _GB,
    fastest_pin_bits_per_s=6.4 * _GB,
    channels=32,
    banks=16,
    row_cycle_s=46.25 * _NS,
    turnaround_s=22.5 * _NS,  # 8 + 26 + 2 clocks of 0.625
    refresh_s=200 * _NS,  # tRFCpb
    latency_s=32.5 * _NS,
    energy_per_bit_j=3.9 * _PJ,  # derived: HBM2's and HBM3e's are the same
)
_GDDR5 = Technology(  # JESD212: to 8 Gb/s, 32 pins; timings: dramsim3, "not based on any specific product"
    pin_bits_per_s=8 * _GB,
    fastest_pin_bits_per_s=9 * _GB,
    pins=32,
    channels=1,
    burst_bytes=32,
    page_bytes=2048,  # derived: 128 columns of 16 bytes, as JESD212 has for 8 Gb
    banks=16,
    row_cycle_s=40 * _NS,
    four_activates_s=20 * _NS,
    turnaround_s=18 * _NS,  # 10 + 24 + 2 clocks of 0.5
    refresh_s=37 * _NS,  # 74 clocks
    refresh_interval_s=1900 * _NS,
    refresh_per_bank=False,
    latency_s=24 * _NS,
    energy_per_bit_j=14 * _PJ,  # FGDRAM
)
_GDDR6 = _like(  # JESD250C: 16 Gb/s, two channels of 16 pins; sold to 24 (Samsung, 2022); timings: ramulator (tCK 0.57)
    _GDDR5,
    pin_bits_per_s=16 * _GB,
    fastest_pin_bits_per_s=24 * _GB,
    channels=2,
    row_cycle_s=45 * _NS,
    four_activates_s=16 * _NS,
    turnaround_s=20 * _NS,  # 9 + 24 + 2 clocks of 0.57
    refresh_s=60 * _NS,  # nRFCpb of 105 clocks
    refresh_per_bank=True,
    latency_s=28.5 * _NS,
    energy_per_bit_j=7.5 * _PJ,  # Micron
)
_DDR4 = Technology(  # JESD79-4: 3.2 Gb/s, 64 pins; timings: dramsim3 (8 Gb, x8, 3200)
    pin_bits_per_s=3.2 * _GB,
    fastest_pin_bits_per_s=3.2 * _GB,
    pins=64,
    channels=1,
    burst_bytes=64,
    page_bytes=8192,  # eight chips of 1 KiB
    banks=16,
    row_cycle_s=46 * _NS,
    four_activates_s=21 * _NS,
    turnaround_s=17.5 * _NS,  # 4 + 22 + 2 clocks of 0.625
    refresh_s=350 * _NS,
    refresh_interval_s=7800 * _NS,
    refresh_per_bank=False,
    latency_s=27.5 * _NS,
    energy_per_bit_j=1300.0 / 64.0 * _PJ,  # Ten Lessons
)
_LPDDR5 = Technology(  # JESD209-5: 6.4 Gb/s, channel of 16 pins; timings: gem5 and ramulator, 6400
    pin_bits_per_s=6.4 * _GB,
    fastest_pin_bits_per_s=6.4 * _GB,
    pins=16,
    channels=1,
    burst_bytes=32,
    page_bytes=2048,
    banks=16,
    row_cycle_s=60 * _NS,
    four_activates_s=20 * _NS,
    turnaround_s=30 * _NS,  # 6.25 + 21.25 + two clocks of 1.25
    refresh_s=140 * _NS,  # tRFCpb, 16 Gb
    refresh_interval_s=3906 * _NS,
    refresh_per_bank=True,
    latency_s=39.25 * _NS,
    energy_per_bit_j=5 * _PJ,  # assumed: between HBM2's and GDDR6's, a short bus at low voltage
)

TECHNOLOGIES: dict[str, Technology] = {
    "hbm2": _HBM2,
    # JESD235C 3.2 Gb/s; sold at 3.6 (SK hynix, Micron). Core as HBM2's; Micron writes 6.0 pJ, FGDRAM's is kept.
    "hbm2e": _like(_HBM2, pin_bits_per_s=3.2 * _GB, fastest_pin_bits_per_s=3.6 * _GB),
    "hbm3": _HBM3,
    # Sold at 9.2 to 9.8 on HBM3's interface; hosts run it at about 8 (B200: 8 TB/s from eight stacks).
    "hbm3e": _like(_HBM3, pin_bits_per_s=8.0 * _GB, fastest_pin_bits_per_s=9.8 * _GB),
    # JESD270-4: 8 Gb/s, 2048 pins, 32 channels of two pseudo channels, 2 TB/s; sold to 11 (Micron). ramulator 8000.
    "hbm4": _like(
        _HBM3,
        pin_bits_per_s=8.0 * _GB,
        fastest_pin_bits_per_s=11.7 * _GB,
        pins=2048,
        channels=64,
        row_cycle_s=45 * _NS,
        turnaround_s=15.5 * _NS,  # 9 + 20 + 2 clocks of 0.5
        refresh_s=280 * _NS,
        latency_s=29.5 * _NS,
        energy_per_bit_j=2.7 * _PJ,  # derived: between HBM3E's 3.9 and HBM4E's "less than half" of it, geometric mean
    ),
    "gddr5": _GDDR5,
    # JESD232: 10 to 14 Gb/s, burst of 16; dramsim3 at 12.
    "gddr5x": _like(
        _GDDR5,
        pin_bits_per_s=12 * _GB,
        fastest_pin_bits_per_s=14 * _GB,
        burst_bytes=64,
        row_cycle_s=53 * _NS,
        four_activates_s=27 * _NS,
        turnaround_s=24 * _NS,
        refresh_s=49 * _NS,
        latency_s=32 * _NS,
        energy_per_bit_j=10.5 * _PJ,  # derived: geometric mean of GDDR5's and GDDR6's
    ),
    "gddr6": _GDDR6,
    # Micron: 19 to 24 Gb/s on GDDR6's core, four levels per symbol.
    "gddr6x": _like(_GDDR6, pin_bits_per_s=21 * _GB, fastest_pin_bits_per_s=24 * _GB, energy_per_bit_j=7.25 * _PJ),
    # JESD239: 32 Gb/s at first, to 48; four channels of 8 pins. Core timings derived: GDDR6's.
    "gddr7": _like(
        _GDDR6,
        pin_bits_per_s=32 * _GB,
        fastest_pin_bits_per_s=48 * _GB,
        channels=4,
        energy_per_bit_j=5.0 * _PJ,  # derived: Micron's "more than 50 % better power efficiency" than GDDR6
    ),
    # JESD209-4: 4.266 Gb/s; dramsys (tCK 0.469). Energy assumed as LPDDR5's over its voltages.
    "lpddr4x": _like(
        _LPDDR5,
        pin_bits_per_s=4.266 * _GB,
        fastest_pin_bits_per_s=4.266 * _GB,
        banks=8,
        row_cycle_s=60.5 * _NS,
        four_activates_s=40 * _NS,
        turnaround_s=28 * _NS,  # 22 + 36 + 2 clocks
        latency_s=35 * _NS,
        energy_per_bit_j=6 * _PJ,
    ),
    "lpddr5": _LPDDR5,
    # JESD209-5B: 8.533 Gb/s; sold to 10.7. Core as LPDDR5's.
    "lpddr5x": _like(_LPDDR5, pin_bits_per_s=8.533 * _GB, fastest_pin_bits_per_s=10.7 * _GB),
    "ddr4": _DDR4,
    # JESD79-5: 4.8 Gb/s at first, to 8.8; two channels of 32 pins. gem5, from Micron's datasheet (16 Gb).
    "ddr5": _like(
        _DDR4,
        pin_bits_per_s=4.8 * _GB,
        fastest_pin_bits_per_s=8.8 * _GB,
        channels=2,
        page_bytes=4096,  # four chips of 1 KiB
        banks=32,
        row_cycle_s=46.5 * _NS,
        four_activates_s=13.3 * _NS,
        turnaround_s=17.5 * _NS,  # 2.5 + 14.5 + half a clock
        refresh_s=295 * _NS,
        refresh_interval_s=3900 * _NS,
        latency_s=29 * _NS,
        energy_per_bit_j=1300.0 / 64.0 * (1.1 / 1.2) ** 2 * _PJ,  # derived: DDR4's, by the square of the voltage
    ),
}
