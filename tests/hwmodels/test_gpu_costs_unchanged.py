"""A golden list: costs of GPUs as they were before another kind of matrix unit stood beside tensor cores.

Not a claim about the world; it shows what a change of the seam between units moves. Regenerate a line on purpose only.
"""

import pytest

from hwmodels.accelerator import load
from hwmodels.cluster import Cluster
from hwmodels.work import Attention, Collective, Gemm, Pass

WORKS = (
    Gemm(4096, 4096, 4096, format="fp16", output_format="fp16"),
    Gemm(1000, 777, 333, 3, "fp16", "fp16", "NT"),
    Attention("flash-2", "forward", 1, 32, 8, 4096, 4096, 128, True, "fp16"),
    Pass(1e8, 1e8, 1e8, 2e7, kind="row"),
)
TIMES_S = {
    "a100-sxm-80gb": (
        0.0005735457106392995,
        2.3521662996297403e-05,
        0.0006929366291499489,
        0.00018733438402941948,
        0.0026820596906932804,
    ),
    "h100-sxm-80gb": (
        0.00019449587369666267,
        1.3427423940207614e-05,
        0.00043259827929634947,
        0.00010024051117232935,
        0.0015468425882352941,
    ),
    "v100-sxm2-16gb": (
        0.0013964958128663955,
        3.896631946250818e-05,
        0.002319973748508099,
        0.0003090320669934641,
        0.007095614275738262,
    ),
    "b200-sxm": (
        0.0001236641264534295,
        3.0330267641130206e-06,
        0.00037301651814642566,
        8.405847316510825e-05,
        0.000935062468353523,
    ),
}


@pytest.mark.parametrize("name", TIMES_S)
def test_costs_are_the_same_to_the_last_bit(name: str) -> None:
    chip = load(name)
    reduce = Cluster.build(chip, 16, 8).collective_cost(Collective("all_reduce", 2.0**28, 16, 8))
    assert (*(chip.cost(work).time_s for work in WORKS), reduce.time_s) == TIMES_S[name]
