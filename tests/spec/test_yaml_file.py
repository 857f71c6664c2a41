"""A YAML document is plain data of bounded size, or one sentence about what is wrong with it."""

from pathlib import Path

import pytest

from hwmodels.units import InputError
from hwmodels.yaml_file import load_yaml


def test_scalars_are_those_of_yaml_1_2() -> None:
    text = "{a: 1e12, b: 1.0e12, c: no, d: 010, e: 0x10, f: 2024-01-01, g: true, h: ~, i: 1_000, j: 1:30, k: .5, l: -3}"
    assert load_yaml(text, "t") == {
        "a": 1e12, "b": 1e12, "c": "no", "d": 10, "e": 16, "f": "2024-01-01", "g": True, "h": None, "i": 1000,
        "j": "1:30", "k": 0.5, "l": -3,
    }  # fmt: skip


def test_anchors_and_merges_work() -> None:
    assert load_yaml("a: &x {p: 1}\nb: {<<: *x, q: 2}\n", "t") == {"a": {"p": 1}, "b": {"p": 1, "q": 2}}


LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)
MERGES = "a0: &a0 {k: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 12))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "t: is empty"),
        ("# only a comment\n", "t: is empty"),
        ("---\n", "t: is empty"),
        ("a: 1\nb: 2\na: 3\n", "t, line 3: the key 'a' is there twice"),
        ("a: !!python/object/apply:os.system [echo]\n", "t, line 1: the tag '!!python/object/apply:os.system' is not"),
        ("a: !mine {x: 1}\n", "t, line 1: the tag '!mine' is not allowed"),
        (LAUGHS, "aliases are followed"),
        (MERGES, "aliases are followed"),
        ("a: &a [*a]\n", "an alias contains itself"),
        ("a: [1, 2\nb: 3\n", "t, line 2: is not valid YAML"),
        ("a: 1\n---\nb: 2\n", "is not valid YAML"),
        ("a: " + "9" * 10_000, "is not valid YAML"),
        ("? [a, b]\n: 1\n", "a key must be text"),
        ("[" * 400_000, "nested deeper"),
        ("[" * 200 + "]" * 200, "nested deeper"),
        ("- " * 400_000, "nested deeper"),
        ("a: \x00", "is not valid YAML"),
        ("a: '" + "x" * 10_000_000 + "'", "t: is larger than the 1 MB"),
    ],
)
def test_bad_document_is_one_sentence(text: str, sentence: str) -> None:
    with pytest.raises(InputError) as error:
        load_yaml(text, "t")
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_unreadable_files_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe9\n")
    (tmp_path / "large.yaml").write_bytes(b"#" * 10_000_000)
    for name, sentence in [
        ("missing.yaml", "No such file"),
        ("", "directory"),
        ("latin.yaml", "not UTF-8"),
        ("large.yaml", "larger than the 1 MB"),
        ("n\x00l", "cannot be read"),
    ]:
        with pytest.raises(InputError, match=sentence):
            load_yaml(tmp_path / name if name else tmp_path, "run.yaml")
