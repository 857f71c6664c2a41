"""Links of one device: what it can send per direction, and how long a message takes to start."""

from dataclasses import dataclass

from hwmodels.parameters import Section

TOPOLOGIES = ("switch", "all-to-all", "ring", "pairs", "torus-2d", "torus-3d", "fat-tree", "rail-optimised")

TORUS_DIMENSIONS = {"torus-2d": 2, "torus-3d": 3}


@dataclass(frozen=True, slots=True)
class Link:
    """One tier of a device's links. `bandwidth_bytes_per_s` per device and direction (datasheet); `efficiency` the
    fraction that collectives sustain; `latency_s` of one hop inside a running collective; `launch_s` the fixed time
    of a collective's kernel; `copy_bytes_per_s` the rate at which a device moves a collective's buffer through its
    own memory, not hidden under the link; `domain` how many devices the tier connects (0: any number); `links` how
    many share the bandwidth (a torus has two per dimension, other topologies are taken as one); `collective_cores`
    how many cores a collective's kernel holds; `p2p_efficiency` and `p2p_launch_s` are those of a single message.
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
            links=section.integer("links", 2 * dimensions) if dimensions else 1,
            p2p_efficiency=calibration.number("p2p_efficiency", 0.85, high=1.0),
            p2p_launch_s=calibration.quantity("p2p_launch", "time", 10e-6, zero=True),
        )
        section.close()
        calibration.close()
        return part

    @property
    def sustained_bytes_per_s(self) -> float:
        """Bytes per second, device and direction that a large collective reaches on this link."""
        return self.bandwidth_bytes_per_s * self.efficiency
