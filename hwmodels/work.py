"""The work that is asked of an accelerator, and what it costs: the types that cross hwmodels' door."""

from dataclasses import dataclass, field
from typing import Literal

Phase = Literal["forward", "backward"]
_METADATA_BITS = 2.0  # per element that 2:4 sparsity keeps


@dataclass(frozen=True, slots=True)
class Gemm:
    """`batch` products C[m, n] += A[m, k] B[k, n]; `layout` as BLAS writes it (TN forward, NN dgrad, NT wgrad of a
    linear layer).

    `epilogue_bytes` are read or written by a fused epilogue. `sparsity` "2:4": of every four elements of B along k two
    are zero and left out, and two bits say where each that is kept belongs (Mishra et al., arXiv 2104.08378).
    """

    m: int
    n: int
    k: int
    batch: int = 1
    format: str = "bf16"
    output_format: str = "bf16"
    layout: Literal["TN", "NN", "NT"] = "TN"
    epilogue_bytes: float = 0.0
    sparsity: Literal["dense", "2:4"] = "dense"

    @property
    def multiplied(self) -> float:
        """Share of B's elements that are multiplied."""
        return 1.0 if self.sparsity == "dense" else 0.5

    def compressed_bytes(self, element_bytes: float) -> float:
        """Bytes that an element of B takes on average where a dense one takes `element_bytes`, metadata included."""
        return element_bytes if self.sparsity == "dense" else 0.5 * (element_bytes + _METADATA_BITS / 8.0)


@dataclass(frozen=True, slots=True)
class Attention:
    """Attention by a named algorithm (flash-1 flash-2 flash-3 flash-triton cudnn), which may skip masked blocks.

    `head_dim` is the width of queries and keys; `value_dim`, of values and results, is the same where it is left out
    (multi-head latent attention has narrower values: arXiv 2405.04434, section 2.1).
    """

    algorithm: str
    phase: Phase
    batch: int
    heads: int
    kv_heads: int
    seq_q: int
    seq_k: int
    head_dim: int
    causal: bool
    format: str = "bf16"
    dropout: bool = False
    bias: bool = False  # an additive bias per score (ALiBi, relative positions)
    value_dim: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "value_dim", self.value_dim or self.head_dim)

    @property
    def product_widths(self) -> int:
        """The widths of all products of queries or keys by scores, summed: two forward, five backward."""
        if self.phase == "forward":  # scores; their product with the values
            return self.head_dim + self.value_dim
        return 3 * self.head_dim + 2 * self.value_dim  # scores, dQ, dK; dP, dV


@dataclass(frozen=True, slots=True)
class Pass:
    """One kernel that streams over memory: pointwise, reduction, norm, softmax, copy, cast, gather, optimizer update.

    `vector_ops` and `special_ops` (exp, rsqrt, tanh, erf, ...) are totals over all elements; `kind` selects the access
    pattern for the sustained bandwidth: stream (pointwise, copy), row (norms, softmax, row reductions), gather
    (embedding, index), transpose. A row kernel that reads each of its rows, of `row_bytes`, `sweeps` times finds it in
    the cache after the first, as long as the rows in flight fit there; 0 bytes: the length is not known.
    """

    read_bytes: float
    write_bytes: float
    vector_ops: float = 0.0
    special_ops: float = 0.0
    format: str = "fp32"
    kind: Literal["stream", "row", "gather", "transpose"] = "stream"
    row_bytes: float = 0.0
    sweeps: float = 1.0


@dataclass(frozen=True, slots=True)
class Collective:
    """A collective over `devices` members, `per_node` of them on each node; `bytes` is the full buffer (as nccl-tests'
    size).

    all_gather: bytes is the gathered output; reduce_scatter: the unreduced input; all_reduce: the buffer; all_to_all:
    the buffer that each rank holds; broadcast, send_recv: the message.

    Where members sit: `stride` devices from one to the next; devices between them are in groups alike, at work at the
    same time. `concurrent` groups alike have members on the same nodes and share those nodes' ports. Of 64 devices in
    nodes of eight, tensor-parallel groups of eight are (8, per_node 8), and the data-parallel groups across them
    (8, per_node 1, stride 8, concurrent 8).
    """

    kind: Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send_recv"]
    bytes: float
    devices: int
    per_node: int
    stride: int = 1
    concurrent: int = 1


@dataclass(frozen=True, slots=True)
class HostCopy:
    """`bytes` from page-locked host memory into the device's own, or back."""

    bytes: float
    direction: Literal["host_to_device", "device_to_host"] = "host_to_device"


@dataclass(frozen=True, slots=True)
class Cost:
    """What a piece of work costs when it runs alone at the nominal clock.

    `time_s` includes the kernel's fixed time on the device. `bytes_per_level` counts traffic ("hbm", "l2", "link",
    ...). `core_share` and `memory_share` (0..1) are the fractions of the cores and of the sustained memory bandwidth
    that it keeps busy while it runs: what it loses when something else takes them. `limited_by` is the longest of its
    parts. `energy_j` is dynamic energy; idle power is the device's, over time. `cycles` of the matrix unit, where it is
    one that is counted in cycles (a systolic array); None elsewhere.
    """

    time_s: float
    flops: float
    bytes_per_level: dict[str, float] = field(default_factory=dict)
    limited_by: str = "memory"
    energy_j: float = 0.0
    core_share: float = 1.0
    memory_share: float = 0.0
    cycles: int | None = None
