"""A stack states facts with sources, inherits what it does not state, and owns up to what it assumes."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from cosim import stacks
from cosim.stacks import ByArchitecture, Stack
from hwmodels.units import InputError

FACTS = {f.name for f in dataclasses.fields(Stack)} - {"name", "title", "sources", "assumed"}


def write(root: Path, name: str, facts: str = "", base: str = "") -> None:
    (root / f"{name}.yaml").write_text(f"name: {name}\ntitle: {name}\n{base}\nfacts:\n{facts or '  {}'}\n")


@pytest.mark.parametrize("name", stacks.names())
def test_every_fact_is_either_sourced_or_assumed(name: str) -> None:
    stack = stacks.load(name)
    assert set(stack.sources) | set(stack.assumed) == FACTS
    assert not set(stack.sources) & set(stack.assumed)


SOMETHING_TO_OPEN = (
    r"[\w/]+\.(cc|cpp|cu|h|hpp|py|sh|slurm|yaml|toml|md|rst)\b|docs\.pytorch\.org|(pull request|issue) \d+"
)


@pytest.mark.parametrize("name", stacks.names())
def test_every_source_names_something_to_open(name: str) -> None:
    for key, source in stacks.load(name).sources.items():
        assert re.search(SOMETHING_TO_OPEN, source), key


def test_the_library_holds_the_stacks_that_runs_name() -> None:
    assert {"pytorch", "composer", "torchtitan", "maxtext", "tensorflow", "paddle"} <= set(stacks.names())
    assert {"megatron-lm", "megatron-core", "megatron-deepspeed", "nemo"} <= set(stacks.names())


def test_what_is_assumed_stands_at_the_neutral_default(tmp_path: Path) -> None:
    write(tmp_path, "bare")
    bare, pytorch = stacks.load("bare", tmp_path), stacks.load("pytorch")
    assert set(bare.assumed) == FACTS
    assert pytorch.assumed
    assert all(getattr(pytorch, key) == getattr(bare, key) for key in pytorch.assumed)


def test_a_stack_inherits_from_its_base_and_overrides_it(tmp_path: Path) -> None:
    write(tmp_path, "old", "  bucket_bytes: {value: 8 MiB, source: a.py}\n  repeat_kv: {value: true, source: b.py}")
    write(tmp_path, "new", "  bucket_bytes: {value: 16 MiB, source: c.py}", base="base: old")
    new = stacks.load("new", tmp_path)
    assert (new.bucket_bytes, new.repeat_kv) == (16 * 2**20, True)
    assert (new.sources["bucket_bytes"], new.sources["repeat_kv"]) == ("c.py", "b.py")
    assert "repeat_kv" not in new.assumed


def test_a_fact_can_depend_on_the_architecture() -> None:
    pytorch = stacks.load("pytorch")
    assert pytorch.attention.on("hopper") == "cudnn"
    assert pytorch.attention.on("ampere") == pytorch.attention.on("an architecture of tomorrow") == "flash-2"


def test_quantities_are_read_in_their_units(tmp_path: Path) -> None:
    write(tmp_path, "s", "  launch_s: {value: 3 us, source: a.py}\n  attention: {value: cudnn, source: a.py}")
    stack = stacks.load("s", tmp_path)
    assert stack.launch_s == pytest.approx(3e-6)
    assert stack.attention == ByArchitecture("cudnn")


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ("  speed: {value: 1, source: a.py}", "facts.speed: not a fact"),
        ("  repeat_kv: true", "facts.repeat_kv: must be {value: ..., source: ...}"),
        ("  repeat_kv: {value: true}", "facts.repeat_kv: must be {value: ..., source: ...}"),
        ("  repeat_kv: {value: true, source: ''}", "source must be text"),
        ("  repeat_kv: {value: 1, source: a.py}", "1 must be true or false"),
        ("  gather_copies: {value: -1, source: a.py}", "-1 must be a whole number, at least 0"),
        ("  gather_copies: {value: true, source: a.py}", "True must be a whole number"),
        ("  backward_prefetch: {value: later, source: a.py}", "'later' is not one of pre, post, none"),
        ("  attention: {value: {default: flash-9}, source: a.py}", "'flash-9' is not one of"),
        ("  attention: {value: {hopper: cudnn}, source: a.py}", "needs a value for 'default'"),
        ("  attention: {value: {default: cudnn, hoper: cudnn}, source: a.py}", "unknown architecture 'hoper'"),
        ("  launch_s: {value: 3, source: a.py}", "launch_s"),
        ("  launch_s: {value: 3 MiB, source: a.py}", "launch_s"),
        ("  bucket_bytes: {value: -1 MiB, source: a.py}", "bucket_bytes"),
        (
            "  repeat_kv: {value: true, source: a.py}\n  repeat_kv: {value: false, source: a.py}",
            "'repeat_kv' is there twice",
        ),
        ("  - 1", "facts must be a mapping"),
        ("  [", "is not valid YAML"),
    ],
)
def test_what_cannot_be_a_fact_is_refused_in_one_sentence(tmp_path: Path, facts: str, said: str) -> None:
    write(tmp_path, "s", facts)
    with pytest.raises(InputError) as refused:
        stacks.load("s", tmp_path)
    assert said in str(refused.value)
    assert "s.yaml" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_unknown_stack_is_refused_and_the_known_are_named() -> None:
    for name in ("pytorchh", "../stack", "library/pytorch", ""):
        with pytest.raises(InputError, match=r"no software stack .* known: .*pytorch"):
            stacks.load(name)


def test_bases_in_a_circle_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "a", base="base: b")
    write(tmp_path, "b", base="base: a")
    with pytest.raises(InputError, match="a -> b -> a"):
        stacks.load("a", tmp_path)


def test_allocator_constants_are_those_of_the_pytorch_that_is_installed() -> None:
    torch = pytest.importorskip("torch")
    header = (Path(torch.__file__).parent / "include/c10/core/AllocatorConfig.h").read_text()
    constants = dict(re.findall(r"constexpr size_t (k\w+) = (\d+);", header))
    stack = stacks.load("pytorch")
    assert int(constants["kMinBlockSize"]) == stack.allocation_unit_bytes


def test_the_library_is_plain_data() -> None:
    for path in sorted((Path(stacks.__file__).parent / "library").glob("*.yaml")):
        assert set(yaml.safe_load(path.read_text())) <= {"name", "title", "base", "facts"}
