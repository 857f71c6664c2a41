"""Links of one device: what it can send per direction, and how long a message takes to start."""

from dataclasses import dataclass

from hwmodels.parameters import Section

TOPOLOGIES = (
    *("switch", "all-to-all", "ring", "pairs", "hybrid-cube-mesh", "torus-2d", "torus-3d"),
    *("fat-tree", "rail-optimised", "dragonfly"),
)

TORUS_DIMENSIONS = {"torus-2d": 2, "torus-3d": 3}

ROUTINGS = ("minimal", "valiant")


@dataclass(frozen=True, slots=True)
class Link:
    """One tier of a device's links. `bandwidth_bytes_per_s` per device and direction (datasheet); `efficiency` the
    fraction that collectives sustain; `latency_s` of one hop inside a running collective; `launch_s` the fixed time
    of a collective's kernel; `copy_bytes_per_s` the rate at which a device moves a collective's buffer through its
    own memory, not hidden under the link; `domain` how many devices the tier connects (0: any number), of several
    nodes if it `joins_nodes`; `links` how many share the bandwidth (a torus has two per dimension, other topologies
    are taken as one); `collective_cores` how many cores a collective's kernel holds; `p2p_efficiency` and
    `p2p_launch_s` are those of a single message.

    `wrap`: a torus dimension of at least so many devices is joined at its ends (0: none is). Of a switched network:
    `radix` ports of a switch, `oversubscription` of a switch's downward over its upward bandwidth (of a dragonfly:
    of a group's devices over its global links), `switch_latency_s` of one switch more, `routing` on a dragonfly,
    `devices_per_port` devices that share one port. `in_network_reduction`: switches add up what passes through them,
    at `reduction_efficiency` of the bandwidth. `energy_per_byte_j` of a byte sent (0: as `power.energy_per_byte.link`).
    """

    bandwidth_bytes_per_s: float
    latency_s: float
    topology: str = "switch"
    efficiency: float = 0.85
    launch_s: float = 10e-6
    copy_bytes_per_s: float = 0.0
    domain: int = 0
    collective_cores: int = 0
    links: int = 1
    p2p_efficiency: float = 0.85
    p2p_launch_s: float = 10e-6
    wrap: int = 3
    radix: int = 64  # a 400 Gb/s InfiniBand switch (NVIDIA QM9700)
    oversubscription: float = 1.0
    switch_latency_s: float = 0.2e-6  # assumed: InfiniBand switches 0.1 to 0.2 us, Ethernet ones up to 0.8 us
    routing: str = "minimal"
    devices_per_port: int = 1
    in_network_reduction: bool = False
    reduction_efficiency: float = 0.69
    energy_per_byte_j: float = 0.0
    joins_nodes: bool = False

    @classmethod
    def read(cls, section: Section, calibration: Section, latency_s: float) -> "Link":
        """From `links.TIER` of an accelerator file and its fitted `calibration.links.TIER`."""
        topology = section.text("topology", "switch", TOPOLOGIES)
        dimensions = TORUS_DIMENSIONS.get(topology, 0)
        part = cls(
            bandwidth_bytes_per_s=section.quantity("bandwidth", "bandwidth"),
            latency_s=calibration.quantity(
                "latency", "time", section.quantity("latency", "time", latency_s, zero=True), zero=True
            ),
            topology=topology,
            efficiency=calibration.number("efficiency", 0.85, high=1.0),
            launch_s=calibration.quantity("launch", "time", 10e-6, zero=True),
            copy_bytes_per_s=calibration.quantity("copy", "bandwidth", 0.0, zero=True),
            domain=section.integer("domain", 0, low=0),
            collective_cores=section.integer("collective_cores", 0, low=0),
            links=section.integer("links", 2 * dimensions) if dimensions else 2 if topology == "ring" else 1,
            p2p_efficiency=calibration.number("p2p_efficiency", 0.85, high=1.0),
            p2p_launch_s=calibration.quantity("p2p_launch", "time", 10e-6, zero=True),
            wrap=section.integer("wrap", 3, low=0) if dimensions else 3,
            radix=section.integer("radix", 64, low=3),
            oversubscription=section.number("oversubscription", 1.0, low=1.0),
            switch_latency_s=section.quantity("switch_latency", "time", 0.2e-6, zero=True),
            routing=section.text("routing", "minimal", ROUTINGS),
            devices_per_port=section.integer("devices_per_port", 1),
            in_network_reduction=section.flag("in_network_reduction", False),
            # 480 GB/s of bus bandwidth on 8 H100 (NCCL's maintainers, NVIDIA/nccl-tests issue 212): 274 GB/s of
            # buffer, of which each device sends 9/8, over 450 GB/s of link.
            reduction_efficiency=calibration.number("reduction_efficiency", 0.69, high=1.0),
            joins_nodes=section.flag("joins_nodes", False),
            energy_per_byte_j=section.quantity("energy_per_byte", "energy", 0.0, zero=True),
        )
        section.close()
        calibration.close()
        return part

    @property
    def sustained_bytes_per_s(self) -> float:
        """Bytes per second, device and direction that a large collective reaches on this link."""
        return self.bandwidth_bytes_per_s * self.efficiency
