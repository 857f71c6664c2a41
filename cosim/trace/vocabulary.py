"""The op classes that the simulator prices, and which operator belongs to which.

A table from the operator's name to its class and to the arithmetic that it does per element, so that a new operator
is a new row. What is not in the table is class `unknown`: it costs the bytes that it moves and is counted in
`OpGraph.unknown_ops`.

    matmul               mm, addmm, bmm, baddbmm: C[m, n] = A[m, k] B[k, n], see `matmul_dims`
    convolution          convolution and its backward
    attention            softmax(Q K^T) V as one operator; attention_backward its gradient
    norm, norm_backward  LayerNorm, RMSNorm, group and batch norm over rows
    softmax(_backward)   softmax and log-softmax over rows
    loss                 negative log likelihood over the rows' targets, forward and backward
    pointwise            elementwise arithmetic, casts included in `copy`
    reduction            sums, means, maxima, norms, cumulative sums
    copy                 bytes moved as they are: clone, cast, cat, contiguous
    gather, scatter      rows picked or accumulated by index: embedding, index_select, index_put, embedding backward
    random               draws; dropout counts as pointwise with a random draw per element
    fill                 writes without reads: zeros, ones, full, arange
    quantize             casts to narrow formats with their scales, and the passes that find those
    optimizer            fused multi-tensor updates
    view                 another shape of the same memory, allocation without writing, metadata: costs nothing
    unknown              everything else

Counts are per element of the largest operand that the op reads or writes. `vector_ops` are additions, multiplications,
comparisons and conversions of the vector unit; `special_ops` are exponentials, logarithms, square roots, divisions,
tanh, erf: what a GPU's special function unit or a sequence of vector instructions computes. They follow the formulas,
not a compiler's output.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cosim.graph import OpGraph, OpKind

OP_CLASSES = (
    "matmul",
    "convolution",
    "attention",
    "attention_backward",
    "norm",
    "norm_backward",
    "softmax",
    "softmax_backward",
    "loss",
    "pointwise",
    "reduction",
    "copy",
    "gather",
    "scatter",
    "random",
    "fill",
    "quantize",
    "optimizer",
    "view",
    "unknown",
)


@dataclass(frozen=True, slots=True)
class Entry:
    """Class of an operator, and its vector and special-function operations per element of its largest operand."""

    op_class: str
    vector_ops: float = 0.0
    special_ops: float = 0.0


def lookup(target: str) -> Entry:
    """The vocabulary's entry for an operator such as "aten.mm"; class unknown (no arithmetic) if there is none.

    The in-place form of an operator ("aten.add_") is the operator; a `_foreach_` form is the operator over many
    tensors.
    """
    entry = _TABLE.get(target)
    if entry is None and target.endswith("_"):
        entry = _TABLE.get(target.rstrip("_"))
    if entry is None and target.startswith("aten._foreach_"):
        entry = _TABLE.get("aten." + target.removeprefix("aten._foreach_").rstrip("_"))
    return entry or _UNKNOWN


_UNKNOWN = Entry("unknown")

Row = tuple[str, str] | tuple[str, str, float] | tuple[str, str, float, float]
"""Class, operators (of aten unless they say so), vector and special-function operations per element."""

_PRODUCTS: tuple[Row, ...] = (
    ("matmul", "mm addmm bmm baddbmm _scaled_mm _grouped_mm cosim.grouped_mm cosim.grouped_mm_weight"),
    ("convolution", "convolution convolution_backward"),
    ("attention", "cosim.attention _scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu"),
    ("attention", "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention"),
    ("attention_backward", "cosim.attention_backward _scaled_dot_product_flash_attention_backward"),
    ("attention_backward", "_scaled_dot_product_flash_attention_for_cpu_backward"),
    ("attention_backward", "_scaled_dot_product_efficient_attention_backward"),
    ("attention_backward", "_scaled_dot_product_cudnn_attention_backward"),
)

_ROWS: tuple[Row, ...] = (
    # LayerNorm: mean (1), variance (3), normalise (2), scale and shift (2); RMSNorm: no mean, no shift.
    # Backward: two row sums and the input's gradient (8), and the weights' and bias's column sums (4).
    ("norm", "native_layer_norm native_group_norm native_batch_norm", 8),
    ("norm", "cosim.rms_norm _fused_rms_norm", 5),
    ("norm_backward", "native_layer_norm_backward native_group_norm_backward native_batch_norm_backward", 12),
    ("norm_backward", "cosim.rms_norm_backward _fused_rms_norm_backward", 10),
    # maximum, subtract, sum, scale; one exponential
    ("softmax", "_softmax _safe_softmax", 4, 1),
    ("softmax", "_log_softmax", 4, 1),
    ("softmax_backward", "_softmax_backward_data", 4),
    ("softmax_backward", "_log_softmax_backward_data", 3, 1),
    ("loss", "nll_loss_forward nll_loss_backward nll_loss2d_forward nll_loss2d_backward", 0),
    ("loss", "cosim.cross_entropy", 4, 1),
    ("loss", "cosim.cross_entropy_backward", 3, 1),
)

_POINTWISE: tuple[Row, ...] = (
    ("pointwise", "add sub rsub mul neg abs maximum minimum clamp clamp_min clamp_max relu sign square", 1),
    ("pointwise", "where masked_fill eq ne lt le gt ge logical_not logical_and logical_or", 1),
    ("pointwise", "bitwise_and", 1),
    ("pointwise", "bitwise_or bitwise_not bitwise_xor tril triu isnan isinf floor ceil round remainder", 1),
    ("pointwise", "prims.fma", 2),
    ("pointwise", "threshold_backward lerp addcmul native_dropout_backward hardtanh", 2),
    ("pointwise", "div reciprocal sqrt rsqrt exp log log2 log1p expm1 sin cos tanh sigmoid erf floor_divide", 0, 1),
    ("pointwise", "addcdiv atan2", 2, 1),
    ("pointwise", "pow", 1, 1),
    ("pointwise", "tanh_backward sigmoid_backward", 3),
    ("pointwise", "silu", 1, 2),  # x / (1 + exp(-x))
    ("pointwise", "silu_backward", 6, 2),
    ("pointwise", "gelu", 6, 1),  # tanh form: x/2 (1 + tanh(c (x + a x^3)))
    ("pointwise", "gelu_backward", 14, 1),
    ("pointwise", "softplus elu leaky_relu mish", 2, 2),
    ("pointwise", "softplus_backward elu_backward leaky_relu_backward mish_backward", 4, 2),
    ("pointwise", "native_dropout", 12),  # a Philox draw (about 10 integer operations per 32 bits), compare, scale
    ("random", "bernoulli uniform normal rand randn randint random rand_like randn_like randperm", 10),
)

_REDUCTIONS: tuple[Row, ...] = (
    ("reduction", "sum mean prod max min amax amin argmax argmin any all cumsum cumprod", 1),
    ("reduction", "norm var var_mean logsumexp", 2),
    ("reduction", "histc bincount linalg_vector_norm _foreach_norm topk sort count_nonzero std", 2),
)

_MOVES: tuple[Row, ...] = (
    ("copy", "clone _to_copy copy copy_ cat stack contiguous constant_pad_nd slice_scatter select_scatter roll flip"),
    ("copy", "prims.convert_element_type"),
    ("copy", "repeat split_with_sizes_copy repeat_interleave slice_backward select_backward unfold_backward"),
    ("gather", "embedding index gather index_select take masked_select"),
    ("scatter", "embedding_dense_backward index_put _index_put_impl_ index_add scatter scatter_add index_copy", 1),
    ("fill", "zero zero_ fill fill_ zeros ones full zeros_like ones_like full_like new_zeros new_ones new_full"),
    ("fill", "arange prims.iota"),
    ("fill", "linspace eye scalar_tensor _foreach_zero_ tril_indices triu_indices"),
    # absolute value, maximum; a cast to a narrow format says itself what it computes (cosim.techniques.recipes)
    ("quantize", "cosim.amax cosim.quantize", 2),
)

_UPDATES: tuple[Row, ...] = (
    # Adam, per parameter: two moments (2 + 3), bias corrections and step (4), weight decay (2); square root and
    # division
    ("optimizer", "_fused_adamw_ _fused_adam_", 11, 2),
    ("optimizer", "_fused_sgd_", 4),
    ("optimizer", "_fused_adagrad_", 5, 2),
    # Lion, per parameter: two interpolations (2 x 2), sign, weight decay, step
    ("optimizer", "cosim.fused_lion_", 7),
    # loss scaling: a product and a test per gradient; the scale's own update
    ("pointwise", "_amp_foreach_non_finite_check_and_unscale_", 2),
    ("pointwise", "_amp_update_scale_", 1),
)

_VIEWS: tuple[Row, ...] = (
    ("view", "view _unsafe_view reshape t transpose permute expand slice select split split_with_sizes unbind chunk"),
    ("view", "squeeze unsqueeze as_strided detach alias diagonal unfold narrow flatten unflatten movedim"),
    ("view", "view_as_complex"),
    ("view", "view_as_real _reshape_alias lift_fresh lift expand_as squeeze_ unsqueeze_ transpose_ t_ detach_"),
    ("view", "real imag"),
    ("view", "empty empty_like empty_strided new_empty new_empty_strided empty_permuted resize_ set_ is_same_size"),
    ("view", "sym_size sym_numel sym_stride _local_scalar_dense _has_compatible_shallow_copy_type _version"),
    ("view", "prim.device record_stream _assert_async _assert_scalar"),
)


def _entries(rows: Iterable[Row]) -> Iterator[tuple[str, Entry]]:
    for op_class, names, *arithmetic in rows:
        for name in names.split():
            yield name if "." in name else f"aten.{name}", Entry(op_class, *arithmetic)


_TABLE: Mapping[str, Entry] = dict(
    _entries((*_PRODUCTS, *_ROWS, *_POINTWISE, *_REDUCTIONS, *_MOVES, *_UPDATES, *_VIEWS))
)

WRITE_ONLY = frozenset(
    f"aten.{name}_"
    for name in (
        *("copy", "zero", "fill", "normal", "uniform", "bernoulli", "random", "exponential"),
        *("_foreach_zero", "_foreach_copy"),
    )
)
"""Operators that overwrite their mutated inputs without reading them."""

KEPT_ARGUMENTS: Mapping[str, tuple[str, ...]] = {
    "attention": ("causal", "is_causal", "dropout", "dropout_p"),
    "attention_backward": ("causal", "is_causal", "dropout", "dropout_p"),
    "softmax": ("dim",),
    "reduction": ("dim", "keepdim"),
    "pointwise": ("approximate", "p"),
    "loss": ("reduction",),
    "convolution": ("stride", "padding", "dilation", "transposed", "groups"),
}
"""Scalar arguments, by class, that are kept as attributes because they decide what an op costs."""

ATTRIBUTE_NAMES: Mapping[str, str] = {"is_causal": "causal", "dropout_p": "dropout"}


def matmul_operands(kind: OpKind) -> tuple[int, int]:
    """Positions of A and B among a matmul's inputs: the products that add to a first input have them after it."""
    return (1, 2) if kind.target in ("aten.addmm", "aten.baddbmm") else (0, 1)


def matmul_dims(graph: OpGraph, kind: OpKind) -> tuple[int, int, int, int]:
    """(batch, m, n, k) of a matmul C (..., m, n) = A (..., m, k) B (..., k, n).

    In a grouped product (one of experts) rows of A, or what is contracted, are taken to be spread evenly over groups,
    rounded up.
    """
    left, right = (graph.shapes[kind.inputs[place]] for place in matmul_operands(kind))
    if kind.target not in _GROUPED:
        return math.prod(left[:-2]), left[-2], right[-1], left[-1]
    groups = max(len(left) > 2 and left[0], len(right) > 2 and right[0]) or graph.shapes[kind.outputs[0]][0]
    rows, columns, inner = left[-2], right[-1], left[-1]
    if len(left) == len(right) == 2:
        return groups, rows, columns, -(-inner // groups)
    if len(left) == 2:
        return groups, -(-rows // groups), columns, inner
    return groups, rows, -(-columns // groups) if len(right) == 2 else columns, inner


_GROUPED = ("aten._grouped_mm", "cosim.grouped_mm", "cosim.grouped_mm_weight")


def _grouped_flops(graph: OpGraph, kind: OpKind) -> float:
    """2 FLOP per row, column and contracted element, however the groups share them."""
    left, right = (graph.shapes[kind.inputs[place]] for place in matmul_operands(kind))
    if len(left) > len(right):
        return 2.0 * left[-2] * math.prod(right)
    return 2.0 * math.prod(left) * right[-1]


def attention_dims(graph: OpGraph, kind: OpKind) -> tuple[int, int, int, int, int, int, int]:
    """(batch, heads, kv_heads, seq_q, seq_k, head_dim, value_dim) of an attention or its backward."""
    first = 1 if kind.op_class == "attention_backward" else 0
    q, k, v = (graph.shapes[spec] for spec in kind.inputs[first : first + 3])
    return q[0], q[1], k[1], q[2], k[2], q[3], v[3]


def kind_flops(graph: OpGraph, kind: OpKind, halve_causal: bool = True) -> float:
    """FLOP of matrix products in an op: 2mnk for a product, two products for attention, five for its backward.

    A causal mask halves attention's where `halve_causal`. The fifth product of the backward recomputes the scores
    (FlashAttention, arXiv 2205.14135). Everything else counts 0 (as in arXiv 2204.02311,
    appendix B).
    """
    if kind.target in _GROUPED:
        return _grouped_flops(graph, kind)
    if kind.op_class == "matmul":
        batch, m, n, k = matmul_dims(graph, kind)
        return 2.0 * batch * m * n * k
    if kind.op_class in ("attention", "attention_backward"):
        batch, heads, _, seq_q, seq_k, head_dim, value_dim = attention_dims(graph, kind)
        scores, values = (1, 1) if kind.op_class == "attention" else (3, 2)
        half = 0.5 if halve_causal and kind.attribute("causal", False) else 1.0
        return 2.0 * half * batch * heads * seq_q * seq_k * (scores * head_dim + values * value_dim)
    if kind.op_class == "convolution":
        return math.fsum(2.0 * m * n * k for m, n, k in convolution_products(graph, kind))
    return 0.0


def convolution_products(graph: OpGraph, kind: OpKind) -> list[tuple[int, int, int]]:
    """(m, n, k) of the products that a convolution is: output positions x output channels x kernel elements per output
    channel; its backward has one for the input's gradient, where that is made, and one for the weight's. A transposed
    one is the same with input and output exchanged, and so are its forward and the input's gradient.
    """
    backward, transposed = kind.target.endswith("_backward"), bool(kind.attribute("transposed", False))
    of_output, of_input = (kind.inputs[0], kind.inputs[1]) if backward else (kind.outputs[0], kind.inputs[0])
    out = graph.shapes[of_input if transposed else of_output]
    weight = graph.shapes[kind.inputs[2 if backward else 1]]
    rows, channels, taps = out[0] * math.prod(out[2:]), out[1], math.prod(weight[1:])
    gathers, spreads = (rows, channels, taps), (rows, taps, channels)
    if not backward:
        return [spreads if transposed else gathers]
    made = sum(1 for spec in kind.outputs if len(graph.shapes[spec]) > 1)
    return [gathers if transposed else spreads, (channels, taps, rows)][2 - made :]


def flops(graph: OpGraph, halve_causal: bool = True) -> list[float]:
    """FLOP of every op of the graph at its bound sizes, see `kind_flops`."""
    per_kind = [kind_flops(graph, kind, halve_causal) for kind in graph.kinds]
    return [per_kind[kind] for kind in graph.op_kind.tolist()]


def kind_bytes(graph: OpGraph, kind: OpKind) -> tuple[float, float]:
    """(bytes read, bytes written) by an op, if every operand crosses memory once; views and allocations move nothing.

    A gather reads the rows that it returns, not the table. A scatter in place reads and writes the rows that it is
    given; the embedding's gradient zeroes the table and then accumulates.
    """
    if kind.op_class == "view":
        return 0.0, 0.0
    sizes = [int(graph.spec_bytes[spec]) for spec in kind.inputs]
    unread = _unread(kind)
    read = float(sum(size for place, size in enumerate(sizes) if place not in unread))
    write = float(sum(int(graph.spec_bytes[spec]) for spec in kind.outputs) + sum(sizes[i] for i in kind.mutated))
    if kind.op_class == "gather" and sizes:
        return read - sizes[0] + min(sizes[0], write), write
    if kind.target == "aten.embedding_dense_backward":
        return read + sizes[0], write + sizes[0]
    if kind.op_class == "scatter" and kind.mutated:
        given = [size for place, size in enumerate(sizes) if place not in kind.mutated]
        return float(sum(given) + max(given, default=0)), float(max(given, default=0))
    return read, write


def _unread(kind: OpKind) -> tuple[int, ...]:
    """Positions of inputs of which an op needs the shape only, or as good as nothing of the content."""
    if kind.target in WRITE_ONLY:
        return kind.mutated
    if kind.op_class == "fill" or kind.target.endswith("_like"):
        return tuple(range(len(kind.inputs)))
    return _SHAPE_ONLY.get(kind.target, ())


# The negative log likelihood reads one log-probability of each row, and its gradient none.
_SHAPE_ONLY: Mapping[str, tuple[int, ...]] = {
    "aten.nll_loss_forward": (0,),
    "aten.nll_loss_backward": (1,),
    "aten.nll_loss2d_forward": (0,),
    "aten.nll_loss2d_backward": (1,),
}
