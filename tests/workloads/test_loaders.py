"""Hugging Face classes and users' own modules come in as modules, or as one clear sentence."""

import sys
from collections import Counter

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from hwmodels.units import InputError
from workloads import huggingface, named, user_module
from workloads.build import build_module
from workloads.model import HuggingFaceModel, PythonModel
from workloads.training import loss_of_output

TINY_LLAMA = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY_LLAMA |= {"num_key_value_heads": 2, "vocab_size": 50}
TINY_FALCON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
TINY_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50}


class OperatorNames(TorchDispatchMode):
    """Counts the operators that reach the dispatcher."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[str(func)] += 1
        return func(*args, **(kwargs or {}))


def traced_step(model, seq=16, **options):
    with FakeTensorMode():
        module = build_module(model, **options)
        tokens = torch.zeros(2, seq, dtype=torch.int64)
        with OperatorNames() as seen:
            loss_of_output(module(tokens), tokens).backward()
    return module, seen.count


@pytest.mark.parametrize(("name", "config"), [("LlamaForCausalLM", TINY_LLAMA), ("GPT2LMHeadModel", TINY_GPT2)])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_hugging_face_models_attention_is_one_node_forward_and_backward(name, config, dropout):
    _, count = traced_step(HuggingFaceModel(name, config), dropout=dropout)
    assert count["cosim.attention.default"] == 2
    assert count["cosim.attention_backward.default"] == 2
    assert count["aten.bmm.default"] == 0 or name == "LlamaForCausalLM"  # its rotary table is a product too
    assert count["aten._softmax.default"] == 0


def test_unfused_is_the_librarys_eager_attention():
    _, count = traced_step(HuggingFaceModel("LlamaForCausalLM", TINY_LLAMA), attention="unfused")
    assert count["cosim.attention.default"] == 0
    assert count["aten._softmax.default"] == 2


@pytest.mark.parametrize(("name", "config"), [("LlamaForCausalLM", TINY_LLAMA), ("GPT2LMHeadModel", TINY_GPT2)])
def test_our_operator_gives_the_librarys_own_logits(name, config):
    ours = huggingface.build(name, config)
    eager = huggingface.build(name, config, attention="unfused")
    eager.load_state_dict(ours.state_dict())
    tokens = torch.randint(50, (2, 16))
    torch.testing.assert_close(ours(tokens).logits, eager(tokens).logits, rtol=1e-4, atol=1e-5)


def test_the_plain_gpt_is_hugging_faces_gpt2():
    """Same weights (the packed qkv reordered by head), same logits."""
    from workloads.build import build
    from workloads.model import from_dimensions

    theirs = huggingface.build("GPT2LMHeadModel", TINY_GPT2 | {"n_positions": 16})
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    given = {"family": "gpt", "layers": 2, "hidden": 32, "heads": 4, "vocab": 50, "max_positions": 16}
    ours = build(from_dimensions(given))
    weights = {k.removeprefix("transformer."): v for k, v in theirs.state_dict().items()}
    state = {"embedding.weight": weights["wte.weight"], "head.weight": weights["wte.weight"]}
    state |= {"position_embedding.weight": weights["wpe.weight"]}
    state |= {f"norm.{kind}": weights[f"ln_f.{kind}"] for kind in ("weight", "bias")}
    parts = {"attention_norm": "ln_1", "mlp_norm": "ln_2", "attention.qkv": "attn.c_attn"}
    parts |= {"attention.output": "attn.c_proj", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}
    for layer in range(2):
        for mine, other in parts.items():
            for kind in ("weight", "bias"):
                value = weights[f"h.{layer}.{other}.{kind}"]
                value = value.T if value.dim() == 2 else value
                if mine == "attention.qkv":  # theirs (3, heads, head_dim), ours (heads, 3, head_dim)
                    value = value.unflatten(0, (3, 4, 8)).transpose(0, 1).flatten(0, 2)
                state[f"layers.{layer}.{mine}.{kind}"] = value
    ours.load_state_dict(state)
    tokens = torch.randint(50, (2, 16))
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-5)


def test_the_library_and_the_named_configuration_agree_on_llama3s_size():
    config = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    config |= {"num_key_value_heads": 8, "vocab_size": 128256}
    module, _ = traced_step(HuggingFaceModel("LlamaForCausalLM", config))
    assert sum(p.numel() for p in module.parameters()) == named.load("llama3-8b").parameters()


def test_gpt2s_tied_embeddings_stay_tied_without_initialisation():
    module, _ = traced_step(HuggingFaceModel("GPT2LMHeadModel", {}))
    assert sum(p.numel() for p in module.parameters()) == named.load("gpt2").parameters()


@pytest.mark.parametrize(
    ("name", "config", "sentence"),
    [
        ("LlamaForCausalLN", {}, "'LlamaForCausalLN' is not a model class .* LlamaForCausalLM"),
        ("AutoConfig", {}, "'AutoConfig' is not a model class"),
        ("os", {}, "'os' is not a model class"),
        ("LlamaForCausalLM", {"hidden": 32}, "model.config.hidden: LlamaConfig has no such entry; did you mean hidden"),
        ("LlamaForCausalLM", TINY_LLAMA | {"num_attention_heads": 0}, "model.config: LlamaForCausalLM"),
        ("LlamaForCausalLM", TINY_LLAMA | {"hidden_size": "big"}, "model.config: LlamaForCausalLM"),
    ],
)
def test_what_hugging_face_cannot_build_is_one_sentence(name, config, sentence):
    with FakeTensorMode(), pytest.raises(InputError, match=sentence) as error:
        huggingface.build(name, config)
    assert "\n" not in str(error.value)


def test_a_window_shorter_than_the_sequence_is_refused():
    config = TINY_LLAMA | {"sliding_window": 8}
    traced_step(HuggingFaceModel("MistralForCausalLM", config), seq=8)
    with pytest.raises(InputError, match="sliding_window 8 below seq_len 16 is not modelled yet"):
        traced_step(HuggingFaceModel("MistralForCausalLM", config), seq=16)


def test_a_window_that_is_switched_off_is_no_window():
    """Qwen's mixtures say 0, and others keep a width that `use_sliding_window` leaves unused."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    for config in (experts, experts | {"sliding_window": 8, "use_sliding_window": False}):
        module, _ = traced_step(HuggingFaceModel("Qwen2MoeForCausalLM", TINY_LLAMA | config), seq=16)
        assert module.longest_sequence is None


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("GPTJForCausalLM", TINY_GPT2 | {"rotary_dim": 8}),
        ("FalconForCausalLM", TINY_FALCON),
        ("MptForCausalLM", {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 50}),
    ],
)
def test_a_class_with_attention_of_its_own_runs_that(name, config):
    module, count = traced_step(HuggingFaceModel(name, config))
    assert count["cosim.attention.default"] == 0
    assert sum(p.numel() for p in module.parameters()) > 0


def test_a_class_is_not_offered_that_would_be_refused():
    with FakeTensorMode(), pytest.raises(InputError) as error:
        huggingface.build("AutoModelForCausalLM", {})
    assert "AutoModel" not in str(error.value).partition("allowed: ")[2]


@pytest.mark.parametrize("shape", [(1,), (2, 50), (2, 15, 50), (32,)])
def test_an_output_without_a_row_per_label_is_one_sentence(shape):
    labels = torch.zeros(2, 16, dtype=torch.int64)
    with pytest.raises(InputError, match=r"shape \(.*\); allowed: logits of shape \(2, 16, vocab\), one row per label"):
        loss_of_output(torch.zeros(shape), labels)


def test_logits_may_have_one_dimension_for_all_positions():
    labels = torch.zeros(2, 16, dtype=torch.int64)
    flat, apart = (loss_of_output(torch.zeros(*shape, 50), labels) for shape in ((32,), (2, 16)))
    torch.testing.assert_close(flat, apart)


def test_without_transformers_the_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"pip install cosim\[huggingface\]"):
        huggingface.build("LlamaForCausalLM", {})


MODULE = """
from torch import nn
from mine_parts import width

def build(vocab=10):
    return nn.Sequential(nn.Embedding(vocab, width), nn.Linear(width, vocab))

def number(): return 3
def broken(): raise RuntimeError("no such luck\\nat all")
def leaves(): raise SystemExit(3)
constant = 3
"""


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "mine.py").write_text(MODULE)
    (tmp_path / "mine_parts.py").write_text("width = 4\n")
    (tmp_path / "wrong.py").write_text("def f(:\n")
    (tmp_path / "needs.py").write_text("import a_library_that_is_not_there\n")
    return tmp_path


def test_a_users_module_is_called_with_its_arguments(directory):
    module = build_module(PythonModel("mine:build", {"vocab": 20}, directory))
    assert isinstance(module, nn.Module)
    assert module(torch.zeros(1, 2, dtype=torch.int64)).shape == (1, 2, 20)


def test_nothing_of_a_users_module_stays_in_the_interpreter(directory, tmp_path_factory):
    path = list(sys.path)
    user_module.load("mine:build", {}, directory)
    assert sys.path == path
    assert not {"mine", "mine_parts"} & set(sys.modules)
    other = tmp_path_factory.mktemp("other")
    (other / "mine.py").write_text("from torch import nn\ndef build(): return nn.Identity()\n")
    assert isinstance(user_module.load("mine:build", {}, other), nn.Identity)


def test_a_users_file_may_be_called_like_a_module_that_is_already_there(tmp_path):
    import colorsys

    (tmp_path / "colorsys.py").write_text("from torch import nn\ndef build(): return nn.Identity()\n")
    assert isinstance(user_module.load("colorsys:build", {}, tmp_path), nn.Identity)
    assert sys.modules["colorsys"] is colorsys


def test_an_installed_module_can_be_named_too(tmp_path):
    assert isinstance(user_module.load("torch.nn:Linear", {"in_features": 2, "out_features": 3}, tmp_path), nn.Linear)


@pytest.mark.parametrize(
    ("target", "sentence"),
    [
        ("mine", "'mine' is not a target; write it like 'package.module:build'"),
        ("mine:build:again", "is not a target"),
        ("../mine:build", "is not a target"),
        ("nowhere:build", "no module 'nowhere' in "),
        ("needs:build", "importing needs raised ModuleNotFoundError: No module named 'a_library"),
        ("wrong:build", "importing wrong raised SyntaxError"),
        ("mine:bild", "there is no 'bild' in it; it has .*build"),
        ("mine:constant", "is a int; it must be a function or class"),
        ("mine:number", "returned a int; it must return an nn.Module"),
        ("mine:broken", "'mine:broken' raised RuntimeError: no such luck at all"),
        ("mine:leaves", "'mine:leaves' raised SystemExit: 3"),
    ],
)
def test_what_goes_wrong_in_a_users_module_is_one_sentence(directory, target, sentence):
    with pytest.raises(InputError, match=sentence) as error:
        user_module.load(target, {}, directory)
    assert "\n" not in str(error.value)


def test_wrong_arguments_are_one_sentence(directory):
    with pytest.raises(InputError, match=r"raised TypeError: build\(\) got an unexpected keyword argument 'size'"):
        user_module.load("mine:build", {"size": 3}, directory)


def test_a_name_like_no_other_gets_no_guess() -> None:
    with pytest.raises(InputError, match=r"there is no model 'qqqqq'; `cosim workload list` has all names"):
        named.find("qqqqq")
