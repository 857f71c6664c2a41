"""Attention by algorithm: FLOPs, masked blocks, phases, and what the algorithms cannot do."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.accelerator import Accelerator, load
from hwmodels.matrix_units.attention import _pairs
from hwmodels.units import InputError
from hwmodels.work import Attention, Phase

A100, H100 = load("a100-sxm-80gb"), load("h100-sxm-80gb")


def attention(algorithm: str = "flash-2", phase: Phase = "forward", seq: int = 8192, causal: bool = False) -> Attention:
    return Attention(algorithm, phase, 2, 16, 16, seq, seq, 128, causal)


@given(
    st.sampled_from([(A100, "flash-2"), (A100, "flash-triton"), (H100, "flash-2"), (H100, "flash-3"), (H100, "cudnn")]),
    st.sampled_from(["forward", "backward"]),
    st.integers(1, 8192),
    st.integers(1, 64),
    st.sampled_from([32, 64, 80, 128, 256]),
    st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_never_faster_than_peak_or_compulsory_traffic(
    choice: tuple[Accelerator, str], phase: Phase, seq: int, heads: int, head_dim: int, causal: bool
) -> None:
    chip, algorithm = choice
    work = Attention(algorithm, phase, 1, heads, heads, seq, seq, head_dim, causal)
    cost = chip.cost(work)
    tensors = 4 if phase == "forward" else 8
    compulsory = tensors * 2 * heads * seq * head_dim
    assert cost.flops <= (4 if phase == "forward" else 10) * heads * seq * seq * head_dim
    assert cost.time_s >= cost.flops / chip.peak_flops("bf16")
    assert cost.bytes_per_level["hbm"] >= compulsory
    assert cost.time_s >= compulsory / chip.memory.hbm.bandwidth_bytes_per_s


def test_flops_are_those_of_the_paper_and_backward_has_two_and_a_half_times_as_many() -> None:
    """FlashAttention-2, section 4.1: forward 4 s^2 d heads, halved if causal; backward 2.5 times forward."""
    forward, backward = A100.cost(attention()), A100.cost(attention(phase="backward"))
    assert forward.flops == 4 * 8192**2 * 128 * 16 * 2
    assert backward.flops == 2.5 * forward.flops
    assert A100.cost(attention(causal=True)).flops == forward.flops / 2
    assert 2.0 < backward.time_s / forward.time_s < 4.0


def test_masked_blocks_are_skipped_so_long_causal_attention_takes_about_half() -> None:
    ratio = {
        seq: A100.cost(attention(seq=seq, causal=True)).time_s / A100.cost(attention(seq=seq)).time_s
        for seq in (512, 32768)
    }
    assert 0.5 < ratio[32768] < 0.55
    assert ratio[512] > ratio[32768] + 0.05


@given(st.integers(65, 400), st.sampled_from([(128, 128), (128, 64), (64, 128), (192, 128), (128, 80)]))
def test_block_pairs_of_a_long_triangle_equal_counting_them(blocks: int, block: tuple[int, int]) -> None:
    rows, keys = block
    seq = blocks * rows
    counted = sum(1 for i in range(blocks) for j in range(-(-seq // keys)) if j * keys < (i + 1) * rows)
    work = Attention("flash-2", "forward", 1, 1, 1, seq, seq, 64, True)
    assert _pairs(work, rows, keys, forward=True)[2] == pytest.approx(counted, rel=2e-3)


def test_the_newer_algorithm_is_the_faster_one() -> None:
    for phase in ("forward", "backward"):
        times = [
            H100.cost(attention(algorithm, phase, causal=True)).time_s
            for algorithm in ("flash-3", "flash-2", "flash-1")
        ]
        assert times == sorted(times)
    assert A100.cost(attention("flash-2")).time_s < A100.cost(attention("flash-triton")).time_s


def test_fewer_key_heads_move_fewer_bytes_and_do_the_same_arithmetic() -> None:
    many = attention()
    few = replace(many, kv_heads=2)
    assert A100.cost(few).flops == A100.cost(many).flops
    assert A100.cost(few).bytes_per_level["hbm"] < A100.cost(many).bytes_per_level["hbm"]
    assert A100.cost(few).time_s <= A100.cost(many).time_s


def test_few_blocks_leave_cores_idle() -> None:
    """One head of 1024 queries has 8 blocks for 108 cores: its rate is a small part of many heads' rate."""
    one, many = replace(attention(seq=1024), batch=1, heads=1, kv_heads=1), replace(attention(seq=1024), batch=16)
    rate = [A100.cost(work).flops / A100.cost(work).time_s for work in (one, many)]
    assert rate[0] < 0.15 * rate[1]
    assert A100.cost(one).core_share < 0.1


def test_blocks_are_cut_until_shared_memory_holds_them_and_smaller_blocks_are_not_faster() -> None:
    times = []
    for size in (16, 32, 64, 164):
        matrix = replace(A100.matrix, shared_memory_bytes=size * 1024.0)  # type: ignore[type-var]
        chip = replace(A100, matrices=(matrix,))
        rows, keys = matrix.attention_block(attention(), chip.memory.sram)
        assert 2 * 128 * (rows + 2 * keys) <= size * 1024
        times.append(chip.cost(attention()).time_s)
    assert times[0] > times[1] >= times[2] >= times[3]


def test_dropout_and_bias_cost_extra() -> None:
    plain = A100.cost(attention()).time_s
    assert A100.cost(replace(attention(), bias=True)).time_s > plain
    assert A100.cost(replace(attention(), dropout=True)).time_s > A100.cost(replace(attention(), bias=True)).time_s


def test_what_a_kernel_cannot_do_is_one_sentence() -> None:
    with pytest.raises(InputError, match="a100-sxm-80gb has no attention kernel 'flash-3'; it has flash-1, flash-2"):
        A100.cost(attention("flash-3"))
    with pytest.raises(InputError, match="attention by flash-2 has no fp32 kernel"):
        A100.cost(replace(attention(), format="fp32"))
    with pytest.raises(InputError, match="every size must be at least 1"):
        A100.cost(replace(attention(), heads=0))


@pytest.mark.parametrize("chip", [H100, load("tpu-v5p")], ids=["tensor cores", "systolic arrays"])
@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_values_narrower_than_keys_cost_their_own_products_and_bytes(chip: Accelerator, phase: Phase) -> None:
    """DeepSeek-V2's heads: 192 wide in queries and keys, 128 in values and results (arXiv 2405.04434, section 2.1)."""
    latent = replace(attention(phase=phase), head_dim=192, value_dim=128)
    narrow, wide = replace(latent, head_dim=128), replace(latent, value_dim=192)
    cost = chip.cost(latent)
    per_head = 2 * (192 + 128) if phase == "forward" else 2 * (3 * 192 + 2 * 128)
    assert cost.flops == per_head * 8192**2 * 16 * 2
    assert chip.cost(narrow).time_s < cost.time_s < chip.cost(wide).time_s
    rows = 2 * 16 * 8192
    moved = (2 * 192 + 2 * 128) * 2 + 4 if phase == "forward" else (4 * 192 + 4 * 128) * 2 + 8 * 192 + 8
    assert cost.bytes_per_level["hbm"] == rows * moved
    assert wide == replace(wide, value_dim=0, head_dim=192)


@pytest.mark.parametrize("name", ["gpu-like", "systolic-pod"])
@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_the_shared_level_feeds_attention_at_its_own_rate(name: str, phase: Phase) -> None:
    """The time is no less than that of the bytes that the answer itself gives, and a slow level is what limits."""
    work = attention(phase=phase)
    usual = load(name).cost(work)
    slow = load({"base": name, "set": {"memory.sram.bandwidth": "0.05 TB/s"}})
    cost, level = slow.cost(work), slow.matrix.shared_level
    most = 0.05e12 * slow.memory.sram.multicast
    assert cost.bytes_per_level == usual.bytes_per_level
    assert cost.time_s == pytest.approx(cost.bytes_per_level[level] / most + slow.matrix.fixed_time_s)
    assert cost.limited_by == level != usual.limited_by
    assert cost.time_s > usual.time_s


def test_every_block_of_queries_reads_all_keys_and_values_through_l2() -> None:
    """64 blocks of 128 queries in each of 32 heads, keys and values of 128 bf16 each; q, o and row sums pass once."""
    once = 2 * 16 * 8192 * 128 * 2
    for kv_heads in (16, 4):
        cost = A100.cost(replace(attention(), kv_heads=kv_heads))
        assert cost.bytes_per_level["l2"] == 64 * 2 * once + 2 * once + 4 * 2 * 16 * 8192
        assert cost.bytes_per_level["hbm"] == 2 * once + 2 * once * kv_heads / 16 + 4 * 2 * 16 * 8192
    short = A100.cost(attention(seq=64))  # one block: nothing is read again
    assert short.bytes_per_level["l2"] == short.bytes_per_level["hbm"]
