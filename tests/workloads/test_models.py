"""The plain models: both attention forms compute the same, and the closed forms count what PyTorch counts."""

import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from hwmodels.units import InputError
from workloads import named
from workloads.build import build, build_module
from workloads.checks import ACTIVATIONS
from workloads.model import ModelConfig, from_dimensions
from workloads.training import loss, loss_of_output

TINY = {"layers": 2, "hidden": 48, "heads": 4, "vocab": 97, "max_positions": 16}
OPTIONS = [
    {"family": family, "pos_emb": pos_emb, "kv_heads": kv_heads}
    for family, positions in {"gpt": ("learned", "rope", "alibi", "none"), "llama": ("rope", "alibi", "none")}.items()
    for pos_emb in positions
    for kv_heads in (4, 2, 1)
]


def tiny(**options) -> ModelConfig:
    return from_dimensions(TINY | {"family": "gpt"} | options)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_flash_and_unfused_attention_give_the_same_logits_and_gradients(options):
    config = tiny(**options)
    flash, unfused = build(config, "flash").double(), build(config, "unfused").double()
    unfused.load_state_dict(flash.state_dict())
    tokens = torch.randint(config.vocab, (2, 16), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(flash(tokens), unfused(tokens))
    for model in (flash, unfused):
        model(tokens).square().mean().backward()
    for one, other in zip(flash.parameters(), unfused.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("options", OPTIONS[::3], ids=lambda o: o["family"] + "-" + o["pos_emb"])
@pytest.mark.parametrize("attention", ["flash", "unfused"])
def test_no_logit_depends_on_later_tokens(options, attention):
    model = build(tiny(**options), attention)
    tokens = torch.arange(32).view(2, 16)
    changed = tokens.clone()
    changed[:, 10:] += 1
    torch.testing.assert_close(model(tokens)[:, :10], model(changed)[:, :10])
    assert not torch.allclose(model(tokens)[:, 10:], model(changed)[:, 10:])


def test_rotary_scores_depend_on_distance_only():
    from workloads.layers import Positions, rotate

    cos, sin = Positions(tiny(pos_emb="rope", max_positions=64))(64)
    q, k = torch.randn(12), torch.randn(12)
    rotated_q = rotate(q.expand(1, 1, 64, 12), cos, sin)[0, 0]
    rotated_k = rotate(k.expand(1, 1, 64, 12), cos, sin)[0, 0]
    scores = rotated_q @ rotated_k.T
    for offset in (-20, 0, 7):
        diagonal = torch.diagonal(scores, offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("family", ["gpt", "llama"])
@pytest.mark.parametrize("biases", [True, False])
def test_the_closed_form_counts_the_modules_parameters(activation, family, biases):
    config = tiny(family=family, activation=activation, biases=biases, kv_heads=2, tied_embeddings=biases, head_dim=8)
    assert sum(p.numel() for p in build(config).parameters()) == config.parameters()


@pytest.mark.parametrize("name", named.names())
def test_a_named_model_has_its_published_size(name):
    """Whole numbers are the counts of released weights; the others were printed rounded: to 0.5 % or the last digit."""
    entry = named.find(name)
    size = entry.config.parameters()
    assert entry.source
    if isinstance(entry.published_parameters, int):
        assert size == entry.published_parameters
    elif entry.published_parameters is not None:
        printed = f"{entry.published_parameters / 1e9:.9g}"
        last_digit = 1e9 * 10.0 ** -len(printed.partition(".")[2])
        assert abs(size - entry.published_parameters) <= max(0.5 * last_digit, 0.005 * entry.published_parameters)


@pytest.mark.parametrize("name", ["gpt2", "gpt3-175b", "bloom-176b", "nemotron4-340b", "llama3-70b", "llama3.2-1b"])
def test_a_model_of_any_size_is_built_without_memory_and_has_the_closed_forms_size(name):
    config = named.load(name)
    with FakeTensorMode():
        module = build(config)
        assert sum(p.numel() for p in module.parameters()) == config.parameters()


def test_sizes_agree_with_the_dimensions_of_the_published_runs():
    """(layers, hidden, heads, kv_heads, ffn, vocab) in training_runs.csv."""
    rows = {
        "mpt-30b": (48, 7168, 56, 56, 28672, 50368),
        "mpt-760m": (24, 1536, 12, 12, 6144, 50368),
        "gpt-18b": (40, 6144, 48, 48, 24576, 51200),
        "megatron-22b": (48, 6144, 64, 64, 24576, 51200),
        "turing-530b": (105, 20480, 128, 128, 81920, 51200),
        "gpt3-175b": (96, 12288, 96, 96, 49152, 51200),
        "nemotron4-15b": (32, 6144, 48, 8, 24576, 256000),
        "llama3.1-8b": (32, 4096, 32, 8, 14336, 128256),
    }
    for name, row in rows.items():
        c = named.load(name)
        assert (c.layers, c.hidden, c.heads, c.kv_heads, c.ffn, c.vocab) == row


@pytest.mark.parametrize("options", [{"family": "llama", "kv_heads": 2}, {"family": "gpt", "activation": "geglu"}])
def test_model_flops_are_those_of_pytorchs_counter(options):
    """The counter sees full attention where the closed form counts the causal half."""
    config, seq = tiny(**options, head_dim=16), 16
    model = build(config, "unfused")
    tokens = torch.zeros(3, seq, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        loss(model(tokens), tokens).backward()
    masked_half = 6 * config.layers * seq * config.heads * config.head_dim
    assert counter.get_total_flops() == 3 * seq * (config.model_flops_per_token(seq) + masked_half)


def test_model_flops_are_megatrons_closed_form():
    """72 B s l h^2 (1 + s / 6h + V / 12lh) of arXiv 2104.04473, equation 3 without recompute, with full attention."""
    config, s = named.load("gpt3-175b"), 2048
    layers, h, vocab = config.layers, config.hidden, config.vocab
    published = 72 * layers * h**2 * (1 + s / (6 * h) + vocab / (12 * layers * h))
    assert config.model_flops_per_token(s) + 6 * layers * s * h == pytest.approx(published)


@pytest.mark.parametrize("family", ["gpt", "llama"])
@pytest.mark.parametrize("attention", ["flash", "unfused"])
def test_a_tiny_model_learns(family, attention):
    torch.manual_seed(0)
    model = build(tiny(family=family), attention, dropout=0.05)
    tokens = torch.arange(34).view(2, 17) % 7
    first = loss(model(tokens[:, :-1]), tokens[:, 1:]).item()
    for _ in range(60):
        step = loss(model(tokens[:, :-1]), tokens[:, 1:])
        parameters = list(model.parameters())
        with torch.no_grad():
            for parameter, gradient in zip(parameters, torch.autograd.grad(step, parameters), strict=True):
                parameter -= 0.3 * gradient
    assert step.item() < 0.5 * first


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_default_dtype_is_the_compute_format_throughout(dtype):
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = build(tiny(family="llama", kv_heads=2), "flash")
    finally:
        torch.set_default_dtype(default)
    assert {p.dtype for p in model.parameters()} == {dtype}
    logits = model(torch.zeros(1, 8, dtype=torch.int64))
    assert logits.dtype == dtype
    assert loss(logits, torch.zeros(1, 8, dtype=torch.int64)).dtype == torch.float32


def test_position_tables_follow_the_run():
    learned = named.load("gpt2")
    with FakeTensorMode():
        assert build_module(learned, seq_len=2048).position_embedding.weight.shape == (2048, 768)
    assert learned.for_sequence(512).max_positions == 1024
    assert named.load("llama3.1-8b").for_sequence(512).max_positions == 512


def test_dropout_acts_in_training_only():
    model = build(tiny(), dropout=0.5)
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


def test_the_loss_of_any_documented_output_is_the_cross_entropy():
    logits, labels = torch.randn(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)
    expected = -torch.log_softmax(logits, -1)[..., 0].mean()
    for output in (logits, loss(logits, labels), {"logits": logits}, {"loss": expected}):
        torch.testing.assert_close(loss_of_output(output, labels), expected)
    with pytest.raises(InputError, match="forward returned list; allowed: logits"):
        loss_of_output([logits], labels)


BAD = [
    ({"heads": 7}, "model.heads: 7 does not divide hidden 48"),
    ({"kv_heads": 3}, "model.kv_heads: 3 does not divide heads 4"),
    ({"layers": 0}, "model.layers: 0 is not allowed; it must be an integer from 1"),
    ({"layers": -1}, "model.layers: -1"),
    ({"hidden": 10**15}, "model.hidden: 1000000000000000 is not allowed"),
    ({"vocab": float("nan")}, "model.vocab: nan"),
    ({"layers": True}, "model.layers: True"),
    ({"ffn": "4k"}, "model.ffn: '4k'"),
    ({"hiden": 4}, "model.hiden: no such dimension; allowed: "),
    ({"family": "rnn"}, "model.family: 'rnn' is not known; allowed: gpt, llama, bert, t5, vit, moe"),
    ({"family": ["gpt"]}, "model.family: ['gpt'] is not known"),
    ({"num_experts": 8}, "model.num_experts: family 'gpt' has no such dimension; it belongs to moe"),
    ({"attn_type": "mla"}, "model.attn_type: family 'gpt' has no 'mla'; it belongs to moe"),
    ({"family": "moe"}, "model.num_experts: missing"),
    (
        {"family": "moe", "num_experts": 4, "experts_per_token": 5},
        "model.experts_per_token: 5 is more than num_experts",
    ),
    ({"family": "moe", "num_experts": 4, "experts_per_token": 1, "dense_layers": 3}, "model.dense_layers: 3 is more"),
    (
        {"family": "moe", "num_experts": 4, "experts_per_token": 1, "capacity_factor": 1.25},
        "experts_per_token 1 is 1.25",
    ),
    ({"family": "moe", "num_experts": 4, "experts_per_token": 1, "attn_type": "mla"}, "model.mla: missing"),
    ({"family": "moe", "num_experts": 4, "experts_per_token": 1, "mla": "kv_lora=big"}, "model.mla: 'kv_lora=big' is"),
    ({"family": "moe", "num_experts": 4, "experts_per_token": 1, "mla": "kv_lora=8"}, "model.mla: qk_nope is missing"),
    ({"family": "bert", "pos_emb": "alibi"}, "model.pos_emb: 'alibi' is not known; allowed: learned, rope, none"),
    ({"family": "vit", "patch_size": 15}, "model.patch_size: 15 does not divide image_size 224"),
    ({"masked_positions": 3}, "model.masked_positions: no such dimension"),
    ({"attn_type": "gqa"}, "model.kv_heads: missing"),
    ({"attn_type": "mha", "kv_heads": 2}, "model.kv_heads: 2 contradicts attn_type 'mha'"),
    ({"gated_mlp": True, "activation": "gelu"}, "contradicts gated_mlp: true; allowed with it: swiglu, geglu"),
    ({"family": "llama", "pos_emb": "learned"}, "model.pos_emb: 'learned' is not known; allowed: rope, alibi, none"),
    ({"pos_emb": "rope", "head_dim": 7}, "model.head_dim: 7 is odd"),
    ({"rope_theta": 0}, "model.rope_theta: 0"),
    ({"biases": "yes"}, "model.biases: 'yes' is not allowed; it must be true or false"),
    ({"dropout": 0.1}, "write it as training.dropout"),
    ({"heads": None}, "model.heads: missing"),
]


@pytest.mark.parametrize(("change", "sentence"), BAD, ids=lambda x: str(x)[:40])
def test_bad_dimensions_are_one_sentence(change, sentence):
    with pytest.raises(InputError, match=re.escape(sentence)) as error:
        tiny(**change)
    assert "\n" not in str(error.value)


def test_families_have_their_defaults():
    llama = from_dimensions({"family": "llama", "layers": 32, "hidden": 4096, "heads": 32, "vocab": 32000})
    assert (llama.ffn, llama.activation, llama.norm, llama.pos_emb) == (11008, "swiglu", "rmsnorm", "rope")
    gpt = from_dimensions({"family": "gpt", "layers": 2, "hidden": 64, "heads": 4, "vocab": 10, "attn_type": "mqa"})
    assert (gpt.ffn, gpt.kv_heads, gpt.attn_type, gpt.qkv_bias, gpt.gated_mlp) == (256, 1, "mqa", True, False)


def test_an_unknown_name_suggests_the_closest():
    with pytest.raises(InputError, match=r"there is no model 'llama3-7b'; did you mean .*llama3-8b"):
        named.load("llama3-7b")
    assert named.load("gpt2-small") == named.load("gpt2")
    assert "openai-community" in named.source("gpt2")
