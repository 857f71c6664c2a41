"""What belongs to one family of models is read for it, and refused in one sentence for others."""

import pytest

from cosim.spec import RunSpec
from hwmodels.units import InputError

RUN = {"workload": {"global_batch": 8}, "system": {"accelerator": "h100-sxm-80gb", "devices": 8}}


def run(model: object, **workload: object) -> RunSpec:
    return RunSpec.from_mapping({**RUN, "workload": {"model": model, "global_batch": 8, **workload}})


def test_images_have_their_own_sequence_length() -> None:
    spec = run("vit-b16")
    assert spec.workload.seq_len == 197
    assert spec.override(["workload.model=vit-h14"]).workload.seq_len == 257
    assert RunSpec.from_mapping(spec.echo()) == spec
    assert run({"huggingface": "ViTForImageClassification", "config": {"image_size": 32}}).workload.seq_len == 5


def test_masked_positions_and_target_length_reach_the_model() -> None:
    bert = run("bert-large", seq_len=512, masked_fraction=0.25).model()
    assert bert.masked_positions == 128  # type: ignore[union-attr]
    t5 = run("t5-base", seq_len=512, decoder_seq_len=114).model()
    assert t5.decoder_seq_len == 114  # type: ignore[union-attr]


def test_dimensions_are_those_of_the_published_rows() -> None:
    """deepseek-v2 with 4 layers: 13.3029 billion parameters in training_runs.csv, which prints hidden / heads as
    head_dim.
    """
    mla = "q_lora=1536;kv_lora=512;qk_nope=128;qk_rope=64;v=128"
    model = {"family": "moe", "layers": 4, "hidden": 5120, "heads": 128, "kv_heads": 128, "head_dim": 40, "mla": mla}
    model |= {"ffn": 12288, "gated_mlp": True, "vocab": 102400, "tied_embeddings": False, "pos_emb": "rope"}
    model |= {"attn_type": "mla", "dense_layers": 1, "num_experts": 160, "experts_per_token": 6, "moe_ffn": 1536}
    config = run(model | {"shared_experts": 2}, seq_len=4096).dimensions()
    assert config is not None
    assert config.parameters() / 1e9 == pytest.approx(13.3029, abs=1e-4)
    assert config.head_dim == 192


BAD = [
    (("gpt2", {"seq_len": 512, "masked_fraction": 0.15}), "workload.masked_fraction: 0.15 belongs to family bert, not"),
    (
        ("bert-base", {"seq_len": 512, "decoder_seq_len": 8}),
        "workload.decoder_seq_len: 8 belongs to family t5, not to b",
    ),
    (("vit-b16", {"seq_len": 196}), "workload.seq_len: 196 contradicts the model's images of 197 tokens; leave it out"),
    (("gpt2", {}), "workload.seq_len: missing"),
    (
        ({"family": "moe", "layers": 2, "hidden": 8, "heads": 2, "vocab": 9}, {"seq_len": 8}),
        "model.num_experts: missing",
    ),
    (({"family": "gpt", "layers": 2, "hidden": 8, "heads": 2}, {"seq_len": 8}), "workload.model.vocab: missing"),
    (
        ({"family": "llama", "layers": 2, "hidden": 8, "heads": 2, "vocab": 9, "patch_size": 4}, {"seq_len": 8}),
        "workload.model.patch_size: family 'llama' has no such dimension; it belongs to vit",
    ),
]


@pytest.mark.parametrize(("given", "sentence"), BAD, ids=lambda x: str(x)[:50])
def test_what_a_family_does_not_have_is_one_sentence(given: tuple[object, dict[str, object]], sentence: str) -> None:
    with pytest.raises(InputError) as error:
        run(given[0], **given[1])
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)
