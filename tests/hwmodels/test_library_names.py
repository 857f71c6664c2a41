"""A name that people type for an accelerator leads to the library's."""

import pytest

from hwmodels.accelerator import load
from hwmodels.units import InputError


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("H100", "h100-sxm-80gb"),
        ("h100-sxm", "h100-sxm-80gb or h100-sxm-96gb-hbm2e-500w"),
        ("4090", "rtx-4090"),
        ("RTX4090", "rtx-4090"),
        ("MI300", "mi300x"),
        ("TPU v4", "tpu-v4"),
        ("tpuv5p", "tpu-v5p"),
        ("Ironwood", "tpu-v7x"),
        ("trainium2", "trn2"),
        ("Gaudi 3", "gaudi3"),
        ("xeon", "xeon-amx"),
        ("template", "gpu-like or systolic-edge or systolic-pod"),
        ("h100-smx-80gb", "h100-sxm-80gb"),
        ("a100_sxm_80gb", "a100-sxm-80gb"),
    ],
)
def test_did_you_mean(typed: str, meant: str) -> None:
    with pytest.raises(InputError, match=f"no accelerator is called .*; did you mean .*{meant}"):
        load(typed)


def test_what_means_nothing_is_told_what_there_is() -> None:
    with pytest.raises(InputError, match=r"no accelerator is called 'abacus'; .cosim hw list. has the names"):
        load("abacus")
