"""The host interface at work: a copy between host memory and the device's own."""

from hwmodels.interconnect.links import Link
from hwmodels.memory.hbm import Hbm
from hwmodels.power import Power
from hwmodels.work import Cost, HostCopy


def copy_cost(work: HostCopy, link: Link, memory: Hbm, power: Power) -> Cost:
    """The cost of `work`: one message over the link from page-locked host memory, at the rate of the link or of the
    device's memory, whichever is slower. Copy engines do it: no core is held. Host memory is taken to keep up.
    """
    arrives = work.direction == "host_to_device"
    in_memory = memory.time_s("stream", 0.0 if arrives else work.bytes, work.bytes if arrives else 0.0)
    on_link = work.bytes / (link.bandwidth_bytes_per_s * link.p2p_efficiency)
    fixed = link.p2p_launch_s + link.latency_s
    longest = max(on_link, in_memory)
    time = longest + fixed
    moved = {"hbm": work.bytes, "link": work.bytes}
    if link.energy_per_byte_j:
        energy = power.energy_j(0.0, "fp32", {"hbm": work.bytes}) + work.bytes * link.energy_per_byte_j
    else:
        energy = power.energy_j(0.0, "fp32", moved)
    return Cost(
        time_s=time,
        flops=0.0,
        bytes_per_level=moved,
        limited_by="latency" if longest < fixed else "link" if longest == on_link else "memory",
        energy_j=energy,
        core_share=0.0,
        memory_share=min(1.0, in_memory / time) if time else 0.0,
    )
