"""Semiconductor processes by name: how dense, how dear, how clean, and what an operation costs in them.

Densities, SRAM cells and wafer prices of TSMC's processes (Samsung's and Intel's as those of the same name in density).
Wafer prices and the densities of 28 to 5 nm: Khan and Mann, AI Chips (CSET, 2020), as LLMCompass' cost model has them
(PrincetonUniversity/LLMCompass cost_model/supply_chain/supply_chain_model.py); 3 nm about 20,000 USD (DigiTimes by
Tom's Hardware, 2022). SRAM cells: TSMC at ISSCC and IEDM (28: 0.127, 16: 0.074, 10: 0.042, 7: 0.027, 5 and N3E: 0.021,
2: 0.0175 um2); not checked against the papers. Defects per cm2: TSMC's symposia by AnandTech (7: 0.09, 5: 0.10 to
0.11); others assumed to have become as good.
"""

import re
from dataclasses import dataclass

from hwmodels.units import InputError

# Geometric mean of Ten Lessons' table 2 (ISCA 2021): an operation takes 2.6 times less at 7 nm than at 45 nm, which is
# length ** 0.51; other processes derived by that power. TSMC's own claims fall faster (7 to 5 nm: -30 %, this: -16 %).
_ENERGY_POWER = 0.513
_REFERENCE_NM = 7.0


@dataclass(frozen=True, slots=True)
class Process:
    """One process. `transistors_per_mm2` of dense logic; `sram_cell_mm2` of one bit; a 300 mm wafer's price; defects
    per mm2.
    """

    length_nm: float
    transistors_per_mm2: float
    sram_cell_mm2: float
    wafer_usd: float
    defects_per_mm2: float

    @property
    def energy_scale(self) -> float:
        """Energy of an operation or of an SRAM access, over that at 7 nm."""
        return energy_scale(self.length_nm)


def energy_scale(length_nm: float) -> float:
    """Energy of an operation in a process of this name, over that at 7 nm."""
    return float((length_nm / _REFERENCE_NM) ** _ENERGY_POWER)


def _process(nm: float, millions: float, cell_um2: float, wafer_usd: float, defects_per_cm2: float = 0.1) -> Process:
    return Process(nm, millions * 1e6, cell_um2 * 1e-6, wafer_usd, defects_per_cm2 / 100.0)


_MADE = (
    _process(45, 7.7, 0.30, 2274),  # 40 nm's price and density
    _process(28, 15.3, 0.127, 2891),
    _process(20, 22.1, 0.081, 3677),
    _process(16, 28.9, 0.074, 3984),
    _process(14, 28.9, 0.074, 3984),
    _process(12, 33.8, 0.074, 3984),  # TSMC's 12FFC; price as 16 nm
    _process(10, 52.5, 0.042, 5992),
    _process(8, 61.2, 0.042, 5992),  # Samsung's 8LPP; price as 10 nm
    _process(7, 96.3, 0.027, 9346, 0.09),
    _process(6, 114.2, 0.027, 9346, 0.09),  # density as LLMCompass; price as 7 nm
    _process(5, 138.2, 0.021, 16988),
    _process(4, 143.7, 0.021, 16988),  # 4 % above 5 nm; price as 5 nm
    _process(3, 215.0, 0.021, 20000),
    _process(2, 240.0, 0.0175, 30000),  # price: press, 2025
)
PROCESSES = {f"{process.length_nm:g} nm": process for process in _MADE}


def process_of(text: str, where: str) -> Process | None:
    """The process that an accelerator file names ("7 nm"; None where it names none).

    Raises InputError: a name that is not known.
    """
    if not text:
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*nm\s*", text)
    process = PROCESSES.get(f"{float(found[1]):g} nm") if found else None
    if process is None:
        raise InputError(f"{where}: {text!r} is not one of {', '.join(PROCESSES)}")
    return process
