"""Shares are of the whole, whatever the parts are."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cosim.report.breakdown import grouped, memory_parts, time_parts
from cosim.result import Result


def test_shares_of_time_and_of_memory_sum_to_one(result: Result) -> None:
    for parts, whole in ((time_parts(result), result.step_time_s), (memory_parts(result), result.peak_memory_bytes)):
        assert sum(part.share for part in parts) == pytest.approx(1.0)
        assert sum(part.amount for part in parts) == pytest.approx(whole)


def test_groups_lose_nothing(result: Result) -> None:
    parts = time_parts(result)
    groups = grouped(parts)
    assert [group for group, *_ in groups] == ["compute", "optimizer", "exposed_communication", "host"]
    assert sum(len(inner) for *_, inner in groups) == len(parts)


def test_time_that_no_part_accounts_for_is_shown_as_other(changed: Callable[..., Result]) -> None:
    parts = time_parts(changed(step_time_s=2.0, time_breakdown_s={"compute": {"matmul": 1.5}}))
    assert [(part.key, part.share) for part in parts] == [("matmul", 0.75), ("other", 0.25)]
