"""The sections of a run file, field by field; their descriptions are the reference documentation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from cosim.spec.quantities import (
    Bandwidth,
    Count,
    Duration,
    GradientFormat,
    Length,
    Name,
    Plain,
    Section,
    Share,
    as_tuple,
)
from cosim.spec.reliability import Failures, Variation
from hwmodels.interconnect.algorithms import NAMES as ALGORITHMS


class ModelDimensions(Section):
    """A model by its dimensions, named as the columns of training_runs.csv; the rest follows from the family."""

    family: Annotated[Literal["gpt", "llama", "bert", "t5", "vit", "moe"], Field(description="What a layer looks like")]
    layers: Annotated[int, Field(ge=1, description="Transformer blocks; of t5 in the encoder")]
    hidden: Annotated[int, Field(ge=1, description="Width of the residual stream")]
    heads: Annotated[int, Field(ge=1, description="Query heads per layer")]
    vocab: Annotated[int | None, Field(ge=1, description="Rows of the embedding, padding included; vit: none")] = None
    kv_heads: Annotated[int | None, Field(ge=1, description="Key and value heads; default: heads")] = None
    head_dim: Annotated[int | None, Field(ge=1, description="Width of a head; default: hidden / heads")] = None
    ffn: Annotated[int | None, Field(ge=1, description="Width of the MLP; default: 4 hidden, or 8/3 if gated")] = None
    gated_mlp: Annotated[bool | None, Field(description="Whether the MLP multiplies two projections (SwiGLU)")] = None
    activation: Annotated[str | None, Field(description="gelu, silu, relu, squared-relu, swiglu or geglu")] = None
    pos_emb: Annotated[
        str | None, Field(description="learned, rope, alibi, relative or none; default: the family's")
    ] = None
    attn_type: Annotated[str | None, Field(description="mha, gqa, mqa or mla; default: what kv_heads says")] = None
    norm: Annotated[str | None, Field(description="layernorm or rmsnorm; default: the family's")] = None
    biases: Annotated[bool | None, Field(description="Whether linear layers have biases; default: gpt yes")] = None
    qkv_bias: Annotated[bool | None, Field(description="Whether the qkv projection has one; default: biases")] = None
    tied_embeddings: Annotated[bool | None, Field(description="Whether the head is the embedding; gpt: yes")] = None
    embedding_norm: Annotated[bool | None, Field(description="Whether a norm follows the embedding (BLOOM)")] = None
    max_positions: Annotated[int | None, Field(ge=1, description="Rows of the learned position table")] = None
    rope_theta: Annotated[float | None, Field(description="Base of rotary frequencies; default: 10000")] = None
    norm_eps: Annotated[float | None, Field(description="Epsilon of the norms; default: 1e-5")] = None
    qk_norm: Annotated[bool | None, Field(description="Whether queries and keys are normed per head (Qwen3)")] = None
    mla: Annotated[
        str | None,
        Field(description="Widths of latent attention: q_lora=1536;kv_lora=512;qk_nope=128;qk_rope=64;v=128"),
    ] = None
    dense_layers: Annotated[int | None, Field(ge=0, description="Layers without experts in a moe model")] = None
    num_experts: Annotated[int | None, Field(ge=1, description="Experts per layer")] = None
    experts_per_token: Annotated[int | None, Field(ge=1, description="Experts that each token visits")] = None
    moe_ffn: Annotated[int | None, Field(ge=1, description="Width of one expert's MLP")] = None
    shared_experts: Annotated[int | None, Field(ge=0, description="Experts that every token visits")] = None
    capacity_factor: Annotated[
        float | None, Field(ge=1, description="Size of an expert's buffer over a balanced load; default: no buffers")
    ] = None
    token_types: Annotated[int | None, Field(ge=0, description="Rows of bert's segment embedding; default: 2")] = None
    decoder_layers: Annotated[int | None, Field(ge=1, description="Blocks of t5's decoder; default: layers")] = None
    relative_buckets: Annotated[int | None, Field(ge=1, description="Relative positions of t5; default: 32")] = None
    image_size: Annotated[int | None, Field(ge=1, description="Pixels per side of vit's images; default: 224")] = None
    patch_size: Annotated[int | None, Field(ge=1, description="Pixels per side of a patch; default: 16")] = None
    channels: Annotated[int | None, Field(ge=1, description="Channels of an image; default: 3")] = None
    classes: Annotated[int | None, Field(ge=1, description="Outputs of vit's classifier; default: 1000")] = None


class HuggingFaceModel(Section):
    """A model of the transformers library, built from its configuration; no weights are fetched."""

    huggingface: Annotated[
        str,
        Field(
            max_length=100, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", description="A class of transformers: LlamaForCausalLM"
        ),
    ]
    config: Annotated[Plain, Field(default_factory=dict, description="Arguments of its configuration class")]


class PythonModel(Section):
    """Any nn.Module of the user's own, imported only when the run is simulated."""

    python: Annotated[
        str,
        Field(
            max_length=300,
            pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$",
            description="package.module:function, where the function returns the module",
        ),
    ]
    arguments: Annotated[Plain, Field(default_factory=dict, description="Keyword arguments of the function")]


def _kind_of_model(value: object) -> str:
    if (isinstance(value, dict) and "huggingface" in value) or isinstance(value, HuggingFaceModel):
        return "<huggingface>"
    if (isinstance(value, dict) and "python" in value) or isinstance(value, PythonModel):
        return "<python>"
    return "<dimensions>" if isinstance(value, dict | ModelDimensions) else "<name>"


def _kind(value: object) -> str:
    return "<mapping>" if isinstance(value, dict | Section) else "<name>"


Model = Annotated[
    Annotated[Name, Tag("<name>")]
    | Annotated[ModelDimensions, Tag("<dimensions>")]
    | Annotated[HuggingFaceModel, Tag("<huggingface>")]
    | Annotated[PythonModel, Tag("<python>")],
    Discriminator(_kind_of_model),
]


class WorkloadSpec(Section):
    """What is trained, on how many tokens at a time."""

    model: Annotated[Model, Field(description="A name (`cosim workload list`), dimensions, or a module")]
    seq_len: Annotated[
        int, Field(ge=1, le=100_000_000, description="Tokens per sequence; images have their own: leave it out")
    ] = 0
    global_batch: Annotated[Length, Field(description="Sequences (images) per optimizer step")]
    micro_batch: Annotated[Length, Field(description="Sequences per data-parallel replica and micro-step")] = 1
    task: Annotated[Literal["pretrain", "sft", "lora"], Field(description="What kind of training it is")] = "pretrain"
    masked_fraction: Annotated[
        float | None, Field(gt=0, le=1, description="Share of positions that the head of bert sees; default: 0.15")
    ] = None
    decoder_seq_len: Annotated[
        int | None,
        Field(ge=1, le=100_000_000, description="Tokens per sequence in the decoder of t5; default: seq_len"),
    ] = None
    tokens: Annotated[
        float | None, Field(gt=0, le=1e18, description="Tokens of the whole run, for its time, energy and cost")
    ] = None


class AcceleratorOverride(Section):
    """A known accelerator with some of its numbers changed."""

    base: Annotated[Name, Field(description="A name (`cosim hw list`) or a file")]
    set: Annotated[Plain, Field(default_factory=dict, description="Path in the accelerator's file to its new value")]


Accelerator = Annotated[
    Annotated[Name, Tag("<name>")] | Annotated[AcceleratorOverride, Tag("<mapping>")], Discriminator(_kind)
]


class Network(Section):
    """Overrides of the cluster's links; bandwidths are per device and direction."""

    inter_node: Annotated[Bandwidth | None, Field(description="Between nodes: '400 Gb/s'")] = None
    inter_node_latency: Annotated[Duration | None, Field(description="Between nodes: '5 us'")] = None
    intra_node: Annotated[Bandwidth | None, Field(description="On the fast fabric: '450 GB/s'")] = None
    intra_node_latency: Annotated[Duration | None, Field(description="On the fast fabric: '1 us'")] = None
    topology: Annotated[
        Literal["switch", "fat-tree", "rail-optimised", "dragonfly"] | None,
        Field(description="How nodes are joined; default: the accelerator's"),
    ] = None
    oversubscription: Annotated[
        float | None, Field(ge=1, description="Bandwidth below a leaf switch over that above it; default: 1")
    ] = None
    radix: Annotated[int | None, Field(ge=3, le=10_000, description="Ports of a switch between nodes")] = None
    routing: Annotated[Literal["minimal", "valiant"] | None, Field(description="On a dragonfly; default: minimal")] = (
        None
    )
    in_network_reduction: Annotated[
        bool | None, Field(description="Whether switches add up (NVLink SHARP, InfiniBand SHARP); default: false")
    ] = None
    algorithms: Annotated[
        Annotated[
            tuple[Literal[ALGORITHMS], ...],  # type: ignore[valid-type]
            BeforeValidator(as_tuple),
            Field(min_length=1),
        ]
        | None,
        Field(description="Collective algorithms to choose from; default: ring, tree and grouped, NCCL's"),
    ] = None

    def overrides(self) -> dict[str, Any]:
        """Those that are given; quantities in bytes/s and seconds."""
        return self.model_dump(exclude_none=True)


class SystemSpec(Section):
    """The hardware: which accelerator, how many, how connected."""

    accelerator: Annotated[Accelerator, Field(description="A name (`cosim hw list`), a file, or {base, set}")]
    devices: Annotated[Count, Field(description="Accelerators that train together")] = 1
    devices_per_node: Annotated[
        Count,
        Field(
            default_factory=lambda data: min(data.get("devices", 8), 8), description="Default: 8, or devices if fewer"
        ),
    ]
    nvlink_domain: Annotated[
        Count | None,
        Field(description="Devices on one fast fabric; default: the accelerator's, within a node or a rack"),
    ] = None
    network: Annotated[Network, Field(default_factory=Network, description="Overrides of the cluster's network")]
    variation: Annotated[
        Variation, Field(default_factory=Variation, description="How devices and links differ; default: not at all")
    ]
    failures: Annotated[
        Failures | None, Field(description="What breaks during the whole run, and what that costs; default: nothing")
    ] = None
    anchor: Annotated[str | None, Field(description="A measurement of one run that the answer is scaled to")] = None


class Overlap(Section):
    """Which communication runs beside compute; left out, the framework's own way."""

    gradients: Annotated[bool | None, Field(description="Reduction of gradients beside the backward pass")] = None
    parameters: Annotated[bool | None, Field(description="Gathering of sharded parameters beside compute")] = None
    tensor: Annotated[bool | None, Field(description="Tensor-parallel collectives beside compute")] = None


class ParallelSpec(Section):
    """How the step is divided over the devices; data parallelism is what remains."""

    tensor: Annotated[Count, Field(description="Devices that share each layer's matrices")] = 1
    pipeline: Annotated[Count, Field(description="Pipeline stages")] = 1
    context: Annotated[Count, Field(description="Devices that share each sequence")] = 1
    expert: Annotated[Count, Field(description="Devices that share the experts")] = 1
    expert_tensor: Annotated[Count, Field(description="Devices that share each expert's matrices")] = 1
    zero: Annotated[
        int | None,
        Field(
            ge=0,
            le=3,
            description="What data parallelism shards: 1 optimizer, 2 and gradients, 3 and parameters (FSDP)",
        ),
    ] = None
    hybrid_shard: Annotated[bool, Field(description="Shard within a node (nvlink_domain), replicate across")] = False
    sequence: Annotated[
        bool | None, Field(description="Sequence parallelism between tensor-parallel regions; default: framework's")
    ] = None
    context_by: Annotated[
        Literal["ring", "all_gather", "all_to_all"],
        Field(
            description="How attention sees what context parallelism divides: keys and values around a ring or "
            "gathered at once, or the sequence exchanged for heads"
        ),
    ] = "ring"
    expert_imbalance: Annotated[
        float, Field(ge=1, le=1000, description="Tokens of the busiest rank's experts over the mean of all ranks")
    ] = 1.0
    schedule: Annotated[
        Literal["gpipe", "1f1b", "interleaved-1f1b", "zb-h1", "zb-h2", "zb-v", "dualpipe-v"] | None,
        Field(description="Pipeline schedule; default: 1f1b, or interleaved-1f1b with virtual_stages"),
    ] = None
    virtual_stages: Annotated[Count, Field(description="Stages per pipeline rank (interleaving)")] = 1
    stage_layers: Annotated[
        Annotated[tuple[Count, ...], BeforeValidator(as_tuple)] | None, Field(description="Layers of each stage")
    ] = None
    overlap: Annotated[Overlap, Field(default_factory=Overlap, description="Which communication runs beside compute")]


class EveryBlocks(Section):
    """Recompute the activations of every n-th block."""

    every: Annotated[int, Field(ge=1, le=10_000, description="1 is every block")]


Recompute = Annotated[
    Annotated[Literal["none", "selective", "selective_op", "full"], Tag("<name>")]
    | Annotated[EveryBlocks, Tag("<mapping>")],
    Discriminator(_kind),
]
Technique = Annotated[
    Annotated[Name, Tag("<name>")] | Annotated[dict[Name, Plain], Field(min_length=1, max_length=1), Tag("<mapping>")],
    Discriminator(_kind),
]


class TrainingSpec(Section):
    """The recipe and the software that runs it."""

    framework: Annotated[
        Name, Field(description="The software stack, whose defaults hold where this file is silent")
    ] = "pytorch"
    precision: Annotated[
        Literal["fp32", "tf32", "fp16", "bf16", "fp8", "mxfp8", "mxfp4", "nvfp4", "int8"],
        Field(
            description="Format of compute; 16-bit ones mean mixed precision with fp32 master weights, narrower ones "
            "that linear layers are quantized and the rest is bf16"
        ),
    ] = "bf16"
    recipe: Annotated[
        Literal["delayed", "current", "block", "switchback"] | None,
        Field(
            description="How a narrow precision finds its scales: fp8 delayed (of earlier steps), current (of the "
            "tensor) or block (1 x 128); int8 switchback or block; mxfp8, mxfp4, nvfp4 block; default: the framework's"
        ),
    ] = None
    optimizer: Annotated[
        Name,
        Field(
            description="adamw, adam, sgd (momentum 0.9), lion, lamb, adafactor (no momentum), or muon (of hidden "
            "matrices, and adamw of everything else)"
        ),
    ] = "adamw"
    gradient_format: Annotated[
        GradientFormat | None, Field(description="Format in which gradients are kept; default: the framework's")
    ] = None
    reduce_format: Annotated[
        GradientFormat | None, Field(description="Format in which gradients are reduced; default: the framework's")
    ] = None
    recompute: Annotated[
        Recompute, Field(description="Activations that are computed again: none ... full, {every: n}")
    ] = "none"
    compile: Annotated[
        bool | Literal["captured"] | None,
        Field(
            description="Pointwise fusion as torch.compile does it; captured: of the graphs that torch.compile itself "
            "captures and partitions, at some seconds per layer; default: the framework's"
        ),
    ] = None
    attention: Annotated[
        Literal["unfused", "flash", "flash-triton", "flash-1", "flash-2", "flash-3", "cudnn"],
        Field(description="Attention kernel; flash is the framework's choice for the chip"),
    ] = "flash"
    dropout: Annotated[
        Share | None,
        Field(description="Probability of dropout, on attention and residual branches; default: the framework's"),
    ] = None
    techniques: Annotated[
        Annotated[tuple[Technique, ...], BeforeValidator(as_tuple)],
        Field(description="Techniques in the order in which they apply: a name, or {name: parameters}"),
    ] = ()
