"""How a communication library moves a message: what a hop of each protocol costs, and what it leaves of the link.

NCCL's constants (github.com/NVIDIA/nccl src/graph/tuning.cc, 2.20): `hwLat` of a ring's hop over NVLink 0.6, 1.9 and
3.4 us, over the network 2.7, 4.0 and 14 us for LL, LL128 and Simple; `baseLat` 6.6, 14 and 8.4 us; a ring by LL gets a
quarter of the bandwidth (eight bytes in sixteen are flags, and every one is polled), LL128 120 of 128 bytes. A file's
`latency` and `launch` are those of Simple. Up to that table's hops the others stand to it as there; of a longer hop,
which is longer for the wire's sake, they save no more than there.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Protocol:
    """`fabric_hop_s`, `network_hop_s`: of NCCL's table. `bandwidth`: share of the link's; `base_s`: its fixed time less
    Simple's.
    """

    name: str
    fabric_hop_s: float
    network_hop_s: float
    bandwidth: float
    base_s: float

    def hop_s(self, tier: str, latency_s: float) -> float:
        """Seconds of a hop that takes Simple `latency_s` on `tier` ("fabric", "network")."""
        own, simple = self.fabric_hop_s, SIMPLE.fabric_hop_s
        if tier == "network":
            own, simple = self.network_hop_s, SIMPLE.network_hop_s
        return max(latency_s * own / simple, latency_s - (simple - own))


SIMPLE = Protocol("simple", 3.4e-6, 14.0e-6, 1.0, 0.0)
LL128 = Protocol("ll128", 1.9e-6, 4.0e-6, 120.0 / 128.0, 14.0e-6 - 8.4e-6)
LL = Protocol("ll", 0.6e-6, 2.7e-6, 0.25, 6.6e-6 - 8.4e-6)
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
