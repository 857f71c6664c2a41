"""`cosim cost`: asks the hardware model about one kernel or collective, or about the lines of a file."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from cosim import process
from cosim.batch import answer_lines
from cosim.output import check_distinct, is_standard_output, whole_file, writing
from hwmodels.units import InputError

cost = typer.Typer(help="What one kernel or collective costs on an accelerator.", no_args_is_help=True)

Dtype = Annotated[str, typer.Option("--dtype", help="Number format of the operands.")]
Batch = Annotated[int, typer.Option("--b", help="Batch.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@cost.callback(invoke_without_command=True)
def _cost(
    context: typer.Context,
    hw: Annotated[
        str | None, typer.Option("--hw", metavar="NAME", help="A name of `cosim hw list`, or a file.")
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option("--batch", metavar="OPS.jsonl", help="Many ops: columns of kernels.csv or collectives.csv."),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="OUT.jsonl", help="Write the answers to a batch here.")
    ] = None,
) -> None:
    if context.invoked_subcommand is not None:
        if batch is not None or json_file is not None:
            raise InputError(
                "cost: give one op, or --batch OPS.jsonl [--json OUT.jsonl]; --json of one op comes after it"
            )
        if hw is None:
            raise InputError("cost: --hw is missing; `cosim hw list` has the names")
        context.obj = hw
        return
    if batch is None:
        raise InputError("cost: give an op (cosim cost --hw NAME gemm --m 4096 ...), or --batch OPS.jsonl")
    check_distinct({"--batch": batch}, {"--json": json_file})
    _answer_batch(batch, hw, json_file)


def _gemm_command(op: str) -> Callable[..., None]:
    def command(
        context: typer.Context,
        m: Annotated[int, typer.Option("--m", help="Rows of the result (grouped: of each group).")],
        n: Annotated[int, typer.Option("--n", help="Columns of the result.")],
        k: Annotated[int, typer.Option("--k", help="Length of the sums.")],
        b: Batch = 1,
        dtype: Dtype = "bf16",
        layout: Annotated[str, typer.Option("--layout", help="TN (forward), NN (dgrad) or NT (wgrad).")] = "TN",
        as_json: AsJson = False,
    ) -> None:
        _print(context, as_json, op=op, b=b, m=m, n=n, k=k, dtype=dtype, layout=layout)

    return command


for _op, _help in (
    ("gemm", "A matrix product."),
    ("bmm", "A batch of matrix products."),
    ("grouped_gemm", "Products of groups of rows, each with a matrix of its own."),
):
    cost.command(_op, help=_help)(_gemm_command(_op))


@cost.command()
def attention(
    context: typer.Context,
    heads: Annotated[int, typer.Option("--heads", help="Query heads.")],
    head_dim: Annotated[int, typer.Option("--head-dim", help="Width of a head.")],
    seq: Annotated[int, typer.Option("--seq", help="Queries, and keys.")],
    kv_heads: Annotated[int | None, typer.Option("--kv-heads", help="Key and value heads; default: as many.")] = None,
    value_dim: Annotated[
        int | None, typer.Option("--value-dim", help="Width of a head's values; default: same.")
    ] = None,
    b: Batch = 1,
    causal: Annotated[bool, typer.Option("--causal", help="Mask what comes later.")] = False,
    algorithm: Annotated[str | None, typer.Option("--algorithm", help="Default: the chip's fastest.")] = None,
    phase: Annotated[str, typer.Option("--phase", help="fwd, bwd or fwd_bwd.")] = "fwd",
    dtype: Dtype = "bf16",
    as_json: AsJson = False,
) -> None:
    """Fused attention."""
    row = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "seq": seq, "b": b, "causal": causal}
    row["value_dim"] = value_dim
    _print(context, as_json, op=f"attention_{phase}", algorithm=algorithm, dtype=dtype, **row)


def _pass_command(op: str) -> Callable[..., None]:
    def command(
        context: typer.Context,
        m: Annotated[int, typer.Option("--m", help="Rows.")],
        n: Annotated[int, typer.Option("--n", help="Elements of a row.")] = 1,
        dtype: Dtype = "bf16",
        as_json: AsJson = False,
    ) -> None:
        _print(context, as_json, op=op, m=m, n=n, dtype=dtype)

    return command


def _collective_command(op: str) -> Callable[..., None]:
    def command(
        context: typer.Context,
        bytes: Annotated[int, typer.Option("--bytes", help="Size of the buffer, as nccl-tests counts it.")],
        devices: Annotated[int, typer.Option("--devices", help="Members.")],
        devices_per_node: Annotated[int, typer.Option("--devices-per-node", help="Of them on one node.")] = 8,
        as_json: AsJson = False,
    ) -> None:
        _print(context, as_json, op=op, bytes=bytes, devices=devices, devices_per_node=devices_per_node)

    return command


_UNARY = ("addu", "mulu", "divu", "powu")  # the other operand is one number
for _op in ("add", "mul", "div", "pow", *_UNARY, "relu", "gelu", "tanh", "silu_mul", "rope"):
    cost.command(f"elementwise_{_op}", help=f"One pass over memory: {_op}.")(_pass_command(f"elementwise_{_op}"))
for _op in ("softmax", "layernorm", "rmsnorm", "embedding"):
    cost.command(_op, help=f"One pass over memory: {_op}.")(_pass_command(_op))


def _copy_command(op: str) -> Callable[..., None]:
    def command(
        context: typer.Context,
        bytes: Annotated[int, typer.Option("--bytes", help="Size of what is copied.")],
        as_json: AsJson = False,
    ) -> None:
        _print(context, as_json, op=op, bytes=bytes)

    return command


for _op in ("host_to_device", "device_to_host"):
    cost.command(_op, help="A copy over the host interface, from or to page-locked memory.")(_copy_command(_op))
for _op in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send_recv"):
    cost.command(_op, help=f"A collective: {_op}.")(_collective_command(_op))


def _print(context: typer.Context, as_json: bool, **row: Any) -> None:
    from cosim.cost import answer

    found = answer({"accelerator": context.obj, **row}, {})
    if as_json:
        print(json.dumps(found, allow_nan=False))
        return
    for key, value in found.items():
        inner = ", ".join(f"{level} {amount:,.0f}" for level, amount in value.items()) if key == "bytes" else None
        print(f"{key:12} {inner or (f'{value:,.6g}' if isinstance(value, float) else value)}")


def _answer_batch(batch: str, hw: str | None, json_file: Path | None) -> None:
    """One line out per line in, in order; a bad one becomes {"error": sentence}."""
    from cosim.cost import answer_line

    chips: dict[str, Any] = {}
    straight = json_file is None or is_standard_output(json_file)
    with ExitStack() as stack:
        path = stack.enter_context(nullcontext() if straight else whole_file(Path(str(json_file)), "--json"))
        stack.enter_context(writing(json_file, "--json"))
        out = stack.enter_context(path.open("w", encoding="utf-8")) if path else sys.stdout
        failed, done = answer_lines(batch, out, lambda line, where: answer_line(line, where, chips, hw))
    if failed:
        process.say(f"{failed} of {done} ops have no cost; their lines say why", 0)
