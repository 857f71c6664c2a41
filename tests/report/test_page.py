"""The page: whole, alone, true to the result, and safe whatever models are called."""

from __future__ import annotations

import base64
import dataclasses
import html
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cosim.engine.program import Timeline
from cosim.report.figures.memory import kept_points
from cosim.report.figures.roofline import op_points
from cosim.report.html import write_html
from cosim.result import MemoryCurve, Result
from hwmodels.units import InputError


class _Page(HTMLParser):
    """Elements with their attributes, and the text outside scripts and styles."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.data: dict[str, str] = {}
        self.text = ""
        self._inside = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.text = re.sub(r"\s+", " ", self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = str(dict(attrs).get("id", tag)) if tag in ("script", "style") else ""

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.data[self._inside] = self.data.get(self._inside, "") + data
        else:
            self.text += data

    @property
    def figures(self) -> dict[str, Any]:
        return dict(json.loads(self.data["figures"]))


@pytest.fixture(scope="module")
def page(result: Result, tmp_path_factory: pytest.TempPathFactory) -> _Page:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_html(result, path)
    return _Page(path)


def _numbers(values: Any) -> list[float]:
    """Plotly writes long columns as base64 of little-endian numbers."""
    if isinstance(values, dict):
        raw = base64.b64decode(values["bdata"])
        return list(map(float, np.frombuffer(raw, dtype=np.dtype(values["dtype"]).newbyteorder("<"))))
    return [float(value) for value in values]


def test_nothing_is_loaded_from_anywhere(page: _Page) -> None:
    loads = [attrs[name] for _, attrs in page.elements for name in ("src", "href", "action") if name in attrs]
    assert loads == []
    assert not {tag for tag, _ in page.elements} & {"link", "iframe", "object", "embed", "img", "base"}
    assert "url(" not in page.data["style"]
    assert "@import" not in page.data["style"]
    policy = next(
        attrs["content"] for _, attrs in page.elements if attrs.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "http" not in policy


def test_all_figures_have_their_place_and_their_marks(page: _Page) -> None:
    places = {attrs["id"] for _, attrs in page.elements if attrs.get("class") == "figure"}
    assert places == {f"figure-{name}" for name in page.figures}
    assert set(page.figures) == {"breakdown", "timeline", "memory", "roofline"}
    assert all(figure["data"] for figure in page.figures.values())


def test_the_headlines_are_the_result(page: _Page, result: Result) -> None:
    for said in (
        "llama3-8b on 64 × h100-sxm-80gb",
        "8.895 s",
        f"{result.tokens_per_s_per_device:,.0f}",
        f"{100 * result.mfu:.1f} %",
        "57.31 GiB",
        "72.0 % of 79.6 GiB",
        "347.3 kJ",
        "$0.395",
        "compute: matrix unit",
        result.warnings[0],
        result.assumed[0],
        "seq_len: 8192",
    ):
        assert said in page.text


def test_the_bar_sums_to_the_step_time_and_its_parts_are_the_breakdown(page: _Page, result: Result) -> None:
    bars = {bar["name"]: _numbers(bar["x"])[0] for bar in page.figures["breakdown"]["data"]}
    assert sum(bars.values()) == pytest.approx(result.step_time_s)
    assert bars["matmul"] == pytest.approx(result.time_breakdown_s["compute"]["matmul"])
    assert bars["all-gather"] == pytest.approx(result.time_breakdown_s["exposed_communication"]["all_gather"])


def test_the_memory_figure_reaches_the_peak_and_shows_the_capacity(page: _Page, result: Result) -> None:
    areas = [trace for trace in page.figures["memory"]["data"] if trace.get("stackgroup")]
    total = np.sum([_numbers(area["y"]) for area in areas], axis=0)
    assert total.max() * 2**30 == pytest.approx(result.peak_memory_bytes)
    shapes = page.figures["memory"]["layout"]["shapes"]
    assert [shape["y0"] * 2**30 for shape in shapes] == pytest.approx([result.memory_capacity_bytes])


def test_thinning_keeps_both_ends_and_the_peak_of_the_memory_curve(result: Result) -> None:
    assert result.detail is not None
    curve = result.detail.memory
    points = kept_points(curve)
    assert len(points) < len(curve.time_s)
    assert {0, len(curve.time_s) - 1, int(curve.bytes.sum(axis=0).argmax())} <= set(points.tolist())


def test_no_op_on_the_roofline_is_faster_than_its_rate_and_time_is_kept(page: _Page, result: Result) -> None:
    assert result.detail is not None
    drawn = [op for op in result.detail.ops if op.flops > 0]
    points = op_points(result.detail.ops)
    assert sum(point.time_s for point in points) == pytest.approx(sum(op.time_s for op in drawn))
    rates = [y for t in page.figures["roofline"]["data"] if t["mode"] == "markers" for y in _numbers(t["y"])]
    assert sorted(rates) == pytest.approx(sorted(point.flops / point.time_s for point in points))


def test_the_table_lists_the_ops_by_time(page: _Page, result: Result) -> None:
    assert result.detail is not None
    values = [
        float(attrs["data-value"] or "nan") for tag, attrs in page.elements if tag == "td" and "data-value" in attrs
    ]
    assert values[1::5] == sorted((op.time_s for op in result.detail.ops), reverse=True)


def test_the_tooltips_know_every_task(page: _Page, result: Result) -> None:
    assert result.detail is not None
    tasks = json.loads(page.data["tasks"])
    gathers = tasks["timeline"]["lanes"][1]
    assert len(gathers["start"]) == (result.detail.program.stream == 2).sum()
    assert "all-gather block 0, forward" in tasks["timeline"]["texts"]


def test_names_of_users_are_text_and_never_markup(hostile: Result, page: _Page, tmp_path: Path) -> None:
    path = tmp_path / "hostile.html"
    write_html(hostile, path)
    other = _Page(path)
    assert [tag for tag, _ in other.elements if tag == "script"] == [tag for tag, _ in page.elements if tag == "script"]
    assert "<script>alert(1)</script>" in other.text
    assert "<" not in other.data["figures"]
    assert "<" not in other.data["tasks"]
    drawn = [text for figure in other.figures.values() for text in _texts(figure)]
    assert any("alert(1)" in text for text in drawn)
    assert not [text for text in drawn if "<script" in text]
    assert any("<script>alert(1)" in html.unescape(text) for text in drawn)


def _texts(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for item in value.values() for text in _texts(item)]
    if isinstance(value, list):
        return [text for item in value for text in _texts(item)]
    return [value] if isinstance(value, str) else []


def test_a_result_without_detail_still_has_a_page(result: Result, tmp_path: Path) -> None:
    write_html(dataclasses.replace(result, detail=None), tmp_path / "short.html")
    short = _Page(tmp_path / "short.html")
    assert set(short.figures) == {"breakdown"}
    assert "8.895 s" in short.text


def test_a_result_in_which_nothing_happens_still_has_a_page(result: Result, tmp_path: Path) -> None:
    assert result.detail is not None
    nothing = np.zeros(0, dtype=np.int64)
    program = dataclasses.replace(result.detail.program, stream=nothing, host=nothing, launch_ps=nothing, label=nothing)
    curve = MemoryCurve(np.zeros(0), np.zeros((0, 0)), (), 0.0, "")
    detail = dataclasses.replace(
        result.detail, program=program, timeline=Timeline(nothing, nothing, nothing), ops=(), memory=curve
    )
    empty = dataclasses.replace(
        result, step_time_s=0.0, time_breakdown_s={}, memory_bytes={}, peak_memory_bytes=0.0, detail=detail
    )
    write_html(empty, tmp_path / "empty.html")
    assert set(_Page(tmp_path / "empty.html").figures) == {"breakdown", "timeline", "memory", "roofline"}


def test_a_run_that_does_not_fit_says_so_first(changed: Callable[..., Result], tmp_path: Path) -> None:
    reason = "needs 98.3 GiB of 79.6 GiB, 18.7 GiB too much; micro_batch is already 1"
    too_much = changed(feasible=False, infeasible_reason=reason, peak_memory_bytes=98.3 * 2**30)
    write_html(too_much, tmp_path / "page.html")
    text = _Page(tmp_path / "page.html").text
    assert text.index("18.7 GiB too much") < text.index("Step time")
    assert reason in text


@pytest.mark.parametrize("name", ["missing/report.html", ".", "x" * 300])
def test_a_path_that_cannot_be_written_is_an_input_error_and_leaves_nothing(
    result: Result, tmp_path: Path, name: str
) -> None:
    with pytest.raises(InputError):
        write_html(result, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_an_older_report_stays_when_the_new_one_fails(
    result: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.html"
    path.write_text("older")
    monkeypatch.setattr("cosim.report.html.page", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_html(result, path)
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    assert path.read_text() == "older"
