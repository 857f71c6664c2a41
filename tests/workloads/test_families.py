"""The other families: closed forms against the modules, and the modules against Hugging Face's on the same weights."""

import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from hwmodels.units import InputError
from workloads import huggingface, named, operators
from workloads.build import build
from workloads.model import ModelConfig, from_dimensions
from workloads.moe import SparseMLP
from workloads.training import loss

TINY = {"layers": 2, "hidden": 48, "heads": 4}
EXPERTS = {"family": "moe", "vocab": 97, "num_experts": 8, "experts_per_token": 2, "moe_ffn": 40, "max_positions": 16}
LATENT = "q_lora=24;kv_lora=16;qk_nope=8;qk_rope=4;v=6"
CASES = {
    "bert": {"family": "bert", "vocab": 97, "max_positions": 16},
    "bert, rope": {"family": "bert", "vocab": 97, "pos_emb": "rope", "token_types": 0, "tied_embeddings": False},
    "t5": {"family": "t5", "vocab": 97, "decoder_layers": 3},
    "t5, untied": {"family": "t5", "vocab": 97, "gated_mlp": True, "tied_embeddings": False, "head_dim": 16},
    "t5, megatron": {"family": "t5", "vocab": 97, "pos_emb": "learned", "norm": "layernorm", "biases": True},
    "vit": {"family": "vit", "image_size": 32, "patch_size": 8, "classes": 10},
    "moe": EXPERTS,
    "moe, all": EXPERTS | {"kv_heads": 2, "shared_experts": 1, "dense_layers": 1, "biases": True, "qk_norm": True},
    "moe, megatron": EXPERTS | {"pos_emb": "learned", "gated_mlp": False, "norm": "layernorm", "tied_embeddings": True},
    "mla": EXPERTS | {"mla": LATENT, "shared_experts": 2, "dense_layers": 1},
    "mla, direct": EXPERTS | {"mla": LATENT.partition(";")[2]},
    "llama, qk norm": {"family": "llama", "vocab": 97, "qk_norm": True, "kv_heads": 2, "max_positions": 16},
}


def tiny(name: str) -> ModelConfig:
    return from_dimensions(TINY | CASES[name])


def step(model: torch.nn.Module, batch: int = 2, seq: int = 16) -> torch.Tensor:
    tokens = torch.zeros((batch, seq), dtype=torch.int64)
    inputs = model.example_inputs(batch, seq) if hasattr(model, "example_inputs") else (tokens,)
    labels = model.example_labels(batch, seq) if hasattr(model, "example_labels") else tokens
    inputs = [x.to(next(model.parameters()).dtype) if x.is_floating_point() else x for x in inputs]
    return loss(model(*inputs), labels)


def numbers(*shape: int, high: int = 97) -> torch.Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", CASES)
def test_the_closed_form_counts_the_modules_parameters_and_all_learn(name):
    model = build(tiny(name).for_workload(16))
    assert sum(p.numel() for p in model.parameters()) == tiny(name).parameters()
    step(model).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", ["bert-large", "t5-11b", "vit-h14", "mixtral-8x22b", "deepseek-v3", "gpt-oss-120b"])
def test_a_model_of_any_size_is_built_without_memory_and_has_the_closed_forms_size(name):
    config = named.load(name)
    with FakeTensorMode():
        assert sum(p.numel() for p in build(config).parameters()) == config.parameters()


def grouped_flops(x, other, *_rest, **_more):
    return 2 * x[0] * x[1] * other[-1]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("masked", [None, 1.0])
def test_model_flops_are_those_of_pytorchs_counter(name, masked):
    """The counter sees full attention where the closed form counts the causal half of self-attention."""
    batch, seq = 3, 16
    config = tiny(name).for_workload(seq, masked, 12)
    if config.image_tokens:
        seq = config.image_tokens
    known = {torch.ops.cosim.grouped_mm: grouped_flops, torch.ops.cosim.grouped_mm_weight: grouped_flops}
    with FakeTensorMode(), FlopCounterMode(display=False, custom_mapping=known) as counter:
        step(build(config, "unfused"), batch, seq).backward()
    pairs = {"bert": 0, "vit": 0, "t5": config.decoder_layers * config.decoder_seq_len**2}
    masked_half = pairs.get(config.family, config.layers * seq**2) * 3 * config.heads
    masked_half *= config.head_dim + config.value_dim
    expected = batch * (seq * config.model_flops_per_token(seq) + masked_half)
    # the input's gradient of the patches is not computed; nothing else is left out
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", [name for name in CASES if "megatron" in name or not name.startswith("t5")])
def test_flash_and_unfused_attention_give_the_same(name):
    config = tiny(name).for_workload(16)
    flash, unfused = build(config, "flash").double(), build(config, "unfused").double()
    unfused.load_state_dict(flash.state_dict())
    torch.testing.assert_close(step(flash), step(unfused))


def with_weights_of(theirs, ours, rules, changed=lambda state: state):
    """`ours` with random weights of `theirs`; a rule (pattern, replacement) turns a whole name of ours into theirs."""
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter))
    state, found = changed(theirs.state_dict()), {}
    for name, value in ours.state_dict().items():
        other = next(re.sub(pattern, to, name) for pattern, to in rules if re.fullmatch(pattern, name))
        found[name] = state[other].reshape(value.shape)
    ours.load_state_dict(found)
    return ours


def test_our_bert_is_hugging_faces():
    config = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 192}
    config |= {"vocab_size": 97, "max_position_embeddings": 16, "hidden_act": "gelu_new"}
    theirs = huggingface.build("BertForMaskedLM", config)
    layer, there = r"layers\.(\d+)\.", r"bert.encoder.layer.\1."
    rules = [
        (layer + r"attention\.(query|key|value)\.(.*)", there + r"attention.self.\2.\3"),
        (layer + r"attention\.output\.(.*)", there + r"attention.output.dense.\2"),
        (layer + r"attention_norm\.(.*)", there + r"attention.output.LayerNorm.\2"),
        (layer + r"mlp\.up\.(.*)", there + r"intermediate.dense.\2"),
        (layer + r"mlp\.down\.(.*)", there + r"output.dense.\2"),
        (layer + r"mlp_norm\.(.*)", there + r"output.LayerNorm.\2"),
        (r"embedding\.weight", "bert.embeddings.word_embeddings.weight"),
        (r"position_embedding\.weight", "bert.embeddings.position_embeddings.weight"),
        (r"segment_embedding\.weight", "bert.embeddings.token_type_embeddings.weight"),
        (r"embedding_norm\.(.*)", r"bert.embeddings.LayerNorm.\1"),
        (r"masked_head\.transform\.(.*)", r"cls.predictions.transform.dense.\1"),
        (r"masked_head\.norm\.(.*)", r"cls.predictions.transform.LayerNorm.\1"),
        (r"masked_head\.head\.(.*)", r"cls.predictions.decoder.\1"),
    ]
    ours = with_weights_of(theirs, build(tiny("bert")), rules)
    tokens, segments, masked = numbers(2, 16), numbers(2, 16, high=2), torch.tensor([3, 20])
    expected = theirs(input_ids=tokens, token_type_ids=segments).logits.flatten(0, 1)
    torch.testing.assert_close(ours(tokens, segments), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours(tokens, segments, masked), expected[masked], rtol=1e-4, atol=1e-4)


def test_our_t5_is_hugging_faces():
    config = {"d_model": 48, "d_kv": 12, "d_ff": 192, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4}
    theirs = huggingface.build("T5ForConditionalGeneration", config | {"vocab_size": 97})
    rules = [(r"(embedding|head)\.weight", "shared.weight")]
    for side, last in (("encoder", 1), ("decoder", 2)):
        layer, there = rf"{side}_layers\.(\d+)\.", rf"{side}.block.\1.layer."
        for part, theirs_part in (("query", "q"), ("key", "k"), ("value", "v"), ("output", "o")):
            rules.append((layer + rf"attention\.{part}\.weight", there + f"0.SelfAttention.{theirs_part}.weight"))
            rules.append((layer + rf"cross\.{part}\.weight", there + f"1.EncDecAttention.{theirs_part}.weight"))
        rules += [
            (layer + r"attention_norm\.weight", there + "0.layer_norm.weight"),
            (layer + r"cross_norm\.weight", there + "1.layer_norm.weight"),
            (layer + r"mlp_norm\.weight", there + f"{last}.layer_norm.weight"),
            (layer + r"mlp\.up\.weight", there + f"{last}.DenseReluDense.wi.weight"),
            (layer + r"mlp\.down\.weight", there + f"{last}.DenseReluDense.wo.weight"),
            (rf"{side}_norm\.weight", f"{side}.final_layer_norm.weight"),
            (
                rf"{side}_positions\.bias\.weight",
                f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            ),
        ]
    ours = with_weights_of(theirs, build(tiny("t5")), rules)
    tokens, targets = numbers(2, 40), numbers(2, 30)
    expected = theirs(input_ids=tokens, decoder_input_ids=targets).logits
    torch.testing.assert_close(ours(tokens, targets), expected, rtol=1e-4, atol=1e-4)


def test_our_vit_is_hugging_faces():
    config = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 192}
    config |= {"image_size": 32, "patch_size": 8, "num_labels": 10, "hidden_act": "gelu_new", "layer_norm_eps": 1e-5}
    theirs = huggingface.build("ViTForImageClassification", config)
    layer, there = r"layers\.(\d+)\.", r"vit.layers.\1."
    parts = {"attention_norm": "layernorm_before", "mlp_norm": "layernorm_after", "mlp.up": "mlp.fc1"}
    parts |= {"mlp.down": "mlp.fc2"}
    parts |= {f"attention.{part}": f"attention.{part[0]}_proj" for part in ("query", "key", "value", "output")}
    rules = [(layer + re.escape(part) + r"\.(.*)", there + other + r".\2") for part, other in parts.items()]
    rules += [
        (r"patches\.(.*)", r"vit.embeddings.patch_embeddings.projection.\1"),
        ("class_token", "vit.embeddings.cls_token"),
        ("position", "vit.embeddings.position_embeddings"),
        (r"norm\.(.*)", r"vit.layernorm.\1"),
        (r"classifier\.(.*)", r"classifier.\1"),
    ]
    ours = with_weights_of(theirs, build(tiny("vit")), rules)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(images), theirs(pixel_values=images).logits, rtol=1e-4, atol=1e-4)


def test_our_mixture_of_experts_is_hugging_faces_mixtral():
    """Theirs with a loop over the experts, which reads how many tokens each has, and theirs with our operator."""
    config = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
    config |= {"num_key_value_heads": 2, "num_local_experts": 8, "vocab_size": 97, "rope_theta": 10000.0}
    theirs = huggingface.build("MixtralForCausalLM", config)
    layer, there = r"layers\.(\d+)\.", r"model.layers.\1."
    rules = [
        (layer + r"attention\.(q|k|v|o)\w+\.weight", there + r"self_attn.\2_proj.weight"),
        (layer + r"attention_norm\.weight", there + "input_layernorm.weight"),
        (layer + r"mlp_norm\.weight", there + "post_attention_layernorm.weight"),
        (layer + r"mlp\.router\.weight", there + "mlp.gate.weight"),
        (layer + r"mlp\.experts\.(\w+)", there + r"mlp.experts.\2"),
        (r"embedding\.weight", "model.embed_tokens.weight"),
        (r"norm\.weight", "model.norm.weight"),
        (r"head\.weight", "lm_head.weight"),
    ]
    given = TINY | EXPERTS | {"kv_heads": 2}
    ours = with_weights_of(theirs, build(from_dimensions(given)), rules, split_experts)
    tokens = numbers(2, 16)
    grouped = theirs(tokens).logits
    theirs.config._experts_implementation = "eager"
    looped = theirs(tokens).logits
    torch.testing.assert_close(grouped, looped, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours(tokens), looped, rtol=1e-4, atol=1e-4)


def split_experts(state):
    """gate_up_proj (experts, 2 ffn, hidden) and down_proj as our gate, up and down (experts, in, out)."""
    for name in [name for name in state if name.endswith("gate_up_proj")]:
        prefix = name.removesuffix("gate_up_proj")
        state[f"{prefix}gate"], state[f"{prefix}up"] = state[name].mT.chunk(2, dim=-1)
        state[f"{prefix}down"] = state[f"{prefix}down_proj"].mT
    return state


@pytest.mark.parametrize("transposed", [False, True])
def test_a_grouped_product_and_its_gradients_are_those_of_a_loop_over_groups(transposed):
    counts = torch.tensor([3, 0, 4])
    x = torch.randn(8, 5, dtype=torch.float64, requires_grad=True)  # the last row belongs to no group
    weight = torch.randn(3, 6, 5, dtype=torch.float64) if transposed else torch.randn(3, 5, 6, dtype=torch.float64)
    weight.requires_grad_()
    matrices = weight.mT if transposed else weight
    out = operators.grouped_mm(x, matrices, counts)
    expected = torch.cat((x[:3] @ matrices[0], x[3:7] @ matrices[2], torch.zeros(1, 6, dtype=torch.float64)))
    torch.testing.assert_close(out, expected)
    direction = torch.randn_like(out)
    got, want = (torch.autograd.grad(y, (x, weight), direction) for y in (out, expected))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)
    assert got[1].is_contiguous()


def test_pytorchs_own_operator_checks_pass():
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    x, weight, counts = torch.randn(8, 5, requires_grad=True), torch.randn(3, 5, 6), torch.tensor([3, 1, 4])
    torch.library.opcheck(operators.grouped_mm, (x, weight, counts), test_utils=checks)
    for transposed in (False, True):
        arguments = (x.detach().T, torch.randn(8, 6), counts, transposed)
        torch.library.opcheck(operators.grouped_mm_weight, arguments, test_utils=checks)


def test_every_token_gets_the_weighted_sum_of_its_best_experts():
    config = tiny("moe")
    mlp = SparseMLP(config).double()
    with torch.no_grad():
        for parameter in mlp.parameters():
            parameter.copy_(torch.randn_like(parameter))
    x = torch.randn(2, 5, config.hidden, dtype=torch.float64)
    got = mlp(x).flatten(0, 1)
    for token, row in zip(x.flatten(0, 1), got, strict=True):
        weights, best = torch.softmax(mlp.router(token).float(), -1).topk(2)
        weights = (weights / weights.sum()).double()
        experts = mlp.experts
        each = [
            (torch.nn.functional.silu(token @ experts.gate[e]) * (token @ experts.up[e])) @ experts.down[e]
            for e in best
        ]
        torch.testing.assert_close(row, weights[0] * each[0] + weights[1] * each[1], rtol=1e-5, atol=1e-5)


def test_buffers_that_hold_every_token_change_nothing_and_smaller_ones_drop():
    roomy, tight = (from_dimensions(TINY | EXPERTS | {"capacity_factor": factor}) for factor in (4.0, 1.0))
    free, held, dropping = (SparseMLP(c).double() for c in (tiny("moe"), roomy, tight))
    with torch.no_grad():
        for parameter in free.parameters():
            parameter.copy_(torch.randn_like(parameter))
    held.load_state_dict(free.state_dict())
    dropping.load_state_dict(free.state_dict())
    x = torch.randn(2, 8, 48, dtype=torch.float64)
    torch.testing.assert_close(held(x), free(x))
    assert not torch.allclose(dropping(x), free(x))


def test_experts_compute_their_whole_buffers():
    def flops(factor: float | None) -> int:
        config = from_dimensions(TINY | EXPERTS | {"capacity_factor": factor})
        known = {torch.ops.cosim.grouped_mm: grouped_flops, torch.ops.cosim.grouped_mm_weight: grouped_flops}
        with FakeTensorMode(), FlopCounterMode(display=False, custom_mapping=known) as counter:
            step(build(config)).backward()
        return sum(n for op, n in counter.get_flop_counts()["Global"].items() if "grouped" in str(op))

    assert flops(None) == flops(1.0) == flops(1.5) / 1.5


@pytest.mark.parametrize("name", ["bert", "t5", "vit", "moe, all", "mla"])
def test_a_tiny_model_learns(name):
    torch.manual_seed(0)
    model = build(tiny(name).for_workload(16), dropout=0.05)
    first = step(model).item()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        last = step(model)
        last.backward()
        optimizer.step()
    assert last.item() < 0.5 * first


def test_a_run_decides_how_many_positions_are_masked_and_how_long_the_targets_are():
    bert, t5 = tiny("bert"), tiny("t5")
    assert bert.for_workload(512).masked_positions == 77  # 15 %
    assert bert.for_workload(512, 1.0).masked_positions == 0  # all of them
    assert bert.for_workload(128, 0.1).model_flops_per_token(128) < bert.for_workload(128).model_flops_per_token(128)
    assert t5.for_workload(512, None, 128).decoder_seq_len == 128
    assert t5.for_workload(512).decoder_seq_len == 0
    assert tiny("vit").image_tokens == 17


def test_active_parameters_are_those_that_the_papers_state():
    """DeepSeek-V2 21 B, V3 37 B (arXiv 2405.04434, 2412.19437), Mixtral 13 B (2401.04088), Qwen3 (2505.09388): with the
    embedding, of which a token uses a row.
    """
    stated = {"deepseek-v2": 21e9, "deepseek-v3": 37e9, "mixtral-8x7b": 13e9, "qwen3-30b-a3b": 3.3e9}
    for name, active in stated.items():
        config = named.load(name)
        assert config.matmul_parameters() + config.vocab * config.hidden == pytest.approx(active, rel=0.03), name


def test_what_workload_show_prints_is_the_model_again():
    for name in ("bert-base", "t5-small", "vit-h14", "deepseek-v3", "gpt-oss-20b", "qwen3-8b", "gpt2"):
        assert from_dimensions(named.load(name).stated()) == named.load(name)


@pytest.mark.parametrize(
    ("name", "config", "sentence"),
    [
        ("WhisperForConditionalGeneration", {}, "the inputs of WhisperForConditionalGeneration cannot be made"),
        ("CLIPModel", {}, "the inputs of CLIPModel cannot be made, its forward takes input_ids, pixel_values"),
    ],
)
def test_classes_whose_inputs_are_not_tokens_or_images_are_one_sentence(name, config, sentence):
    with FakeTensorMode(), pytest.raises(InputError, match=sentence):
        huggingface.build(name, config)
