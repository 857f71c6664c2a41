"""The disk cache: the same graph without torch, and no harm from damage."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cosim.graph import OpGraph
from cosim.trace import TraceOptions, cached_trace
from workloads.model import ModelConfig

OPTIONS = TraceOptions(batch=2, sequence=128, parameter_format="bf16", master_format="fp32")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COSIM_CACHE_DIR", str(tmp_path))
    return tmp_path / "traces"


def same(a: OpGraph, b: OpGraph) -> bool:
    for field in dataclasses.fields(OpGraph):
        one, two = getattr(a, field.name), getattr(b, field.name)
        if isinstance(one, np.ndarray):
            if not np.array_equal(one, two) or one.dtype != two.dtype:
                return False
        elif field.name in ("op_inputs", "op_outputs"):
            if not (np.array_equal(one.indptr, two.indptr) and np.array_equal(one.indices, two.indices)):
                return False
        elif field.name != "provenance" and one != two:
            return False
    return True


def test_a_cached_graph_is_the_traced_graph(gpt: ModelConfig) -> None:
    first, second = cached_trace(gpt, OPTIONS), cached_trace(gpt, OPTIONS)
    assert (first.provenance["cache"], second.provenance["cache"]) == ("stored", "hit")
    assert same(first, second)


def test_other_sizes_hit_and_another_recipe_misses(gpt: ModelConfig) -> None:
    cached_trace(gpt, OPTIONS)
    longer = cached_trace(gpt, dataclasses.replace(OPTIONS, batch=4, sequence=256))
    assert longer.provenance["cache"] == "hit"
    assert (longer.axes["batch"], longer.axes["sequence"]) == (4, 256)
    assert cached_trace(gpt, dataclasses.replace(OPTIONS, dropout=0.1)).provenance["cache"] == "stored"
    beyond = cached_trace(gpt, dataclasses.replace(OPTIONS, sequence=2048))  # more rows in the position table
    assert beyond.provenance["cache"] == "stored"


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "text"])
def test_a_damaged_entry_is_traced_again(gpt: ModelConfig, cache: Path, damage: str) -> None:
    first = cached_trace(gpt, OPTIONS)
    (entry,) = cache.glob("*.npz")
    content = entry.read_bytes()
    middle = len(content) // 2
    entry.write_bytes(
        {
            "truncate": content[:middle],
            "flip": content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :],
            "empty": b"",
            "text": b"not a graph",
        }[damage]
    )
    again = cached_trace(gpt, OPTIONS)
    assert again.provenance["cache"] == "stored"
    assert same(first, again)
    assert cached_trace(gpt, OPTIONS).provenance["cache"] == "hit"
    assert [path.suffix for path in cache.iterdir()] == [".npz"]


def test_a_directory_that_cannot_be_written_means_no_cache(
    gpt: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("COSIM_CACHE_DIR", str(blocked))
    graph = cached_trace(gpt, OPTIONS)
    assert graph.provenance["cache"].startswith("not written: ")
    assert len(graph) > 100


def test_a_users_module_is_never_cached(cache: Path) -> None:
    from torch import nn

    def build() -> nn.Module:
        return nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 50))

    assert "cache" not in cached_trace(build, OPTIONS).provenance
    assert not cache.exists()


def test_a_hit_imports_no_torch_and_is_fast(gpt: ModelConfig) -> None:
    cached_trace(gpt, OPTIONS)
    program = f"""
import sys, time
from cosim.trace import TraceOptions, cached_trace
from workloads.model import ModelConfig
model = {gpt!r}
start = time.perf_counter()
graph = cached_trace(model, {OPTIONS!r})
assert graph.provenance["cache"] == "hit", graph.provenance
assert "torch" not in sys.modules
print(time.perf_counter() - start)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.3
