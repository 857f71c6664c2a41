"""How a communication library moves a message: what a hop of each protocol costs, and what it leaves of the link.

NCCL's constants (github.com/NVIDIA/nccl src/graph/tuning.cc, 2.20): `hwLat` of a ring's hop over NVLink 0.6, 1.9 and
3.4 us, over the network 2.7, 4.0 and 14 us for LL, LL128 and Simple; `baseLat` 6.6, 14 and 8.4 us; a ring by LL gets a
quarter of the bandwidth (eight bytes in sixteen are flags, and every one is polled), LL128 120 of 128 bytes. A file's
`latency` and `launch` are those of Simple; the others stand to it as in that table.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Protocol:
    """`fabric_hop` and `network_hop`: latency of a hop over Simple's; `bandwidth`: share of the link's; `base_s`: its
    fixed time less Simple's.
    """

    name: str
    fabric_hop: float
    network_hop: float
    bandwidth: float
    base_s: float

    def hop(self, tier: str) -> float:
        """Latency of a hop on `tier` ("fabric", "network") over Simple's."""
        return self.fabric_hop if tier == "fabric" else self.network_hop


SIMPLE = Protocol("simple", 1.0, 1.0, 1.0, 0.0)
LL128 = Protocol("ll128", 1.9 / 3.4, 4.0 / 14.0, 120.0 / 128.0, 14.0e-6 - 8.4e-6)
LL = Protocol("ll", 0.6 / 3.4, 2.7 / 14.0, 0.25, 6.6e-6 - 8.4e-6)
PROTOCOLS = (LL, LL128, SIMPLE)

MESSAGES_PER_CORE = 8
"""Messages to different peers that one thread block has under way (NCCL's maintainers: NVIDIA/nccl issue 1028)."""

MESSAGE_S = {"fabric": 0.4e-6, "network": 1.0e-6}
"""What posting one more message costs a device that sends to many: tuning.cc's "arity serialization latency" and
`getNetOverhead` on x86.
"""

CHUNK_BYTES = 256 * 1024
"""A pipeline's chunk: tuning.cc, "the latency of a 256 kB chunk". A tree or chain passes it on once it has it whole."""

TREE_SHARE = 0.92
"""Of the bandwidth, what a tree sustains beside a ring (tuning.cc: `busBw*.92`)."""
