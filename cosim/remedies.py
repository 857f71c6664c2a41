"""What would make a run fit: changes of the run file, each one tried before it is named."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from cosim.spec import RunSpec
from hwmodels.units import InputError, format_quantity

Change = tuple[str, ...]
"""What `--set` takes, together."""

_MOST_DEVICES = 64  # times those of the run


def remedy(spec: RunSpec, peak_bytes: float, capacity_bytes: float, peak_of: Callable[[RunSpec], float]) -> str:
    """One clause: the smallest changes of `spec` whose peak, as `peak_of` finds it, is within the capacity.

    Changes of one kind come before combinations, these before more devices, and a shorter sequence, which is another
    run, last. If nothing fits, how far the best gets.
    """
    best: tuple[float, Change] = (peak_bytes, ())
    for group in _groups(spec):
        fitting: list[str] = []
        for change in group:
            peak = _peak(spec, change, peak_of)
            if peak is None:
                continue
            best = min(best, (peak, change))
            if peak <= capacity_bytes:
                fitting.append(f"{_words(change)} ({format_quantity(peak, 'data')})")
        if fitting:
            return f"it fits with {' or '.join(fitting)}"
    if not best[1]:
        return "nothing that was tried needs less"
    return f"nothing that was tried makes it fit; least with {_words(best[1])}: {format_quantity(best[0], 'data')}"


def _peak(spec: RunSpec, change: Change, peak_of: Callable[[RunSpec], float]) -> float | None:
    try:
        return peak_of(spec.override(change))
    except InputError:  # this run cannot be changed so
        return None


def _groups(spec: RunSpec) -> Iterable[Sequence[Change]]:
    """Changes in the order in which they are tried; the first group of which one fits is the answer."""
    micro_batches = _smaller_micro_batches(spec)
    again: list[Change] = [("training.recompute=full",)] if spec.training.recompute != "full" else []
    zeros: list[Change] = []
    if spec.data_parallel > 1:
        zeros = [(f"parallel.zero={zero}",) for zero in range((spec.parallel.zero or 0) + 1, 4)]
    for zero in zeros:
        yield [zero]
    # the largest micro-batch that fits: halves are tried one after the other
    for micro_batch in micro_batches:
        yield [micro_batch, *again]
    if not micro_batches and again:
        yield again
    smallest, sharded = micro_batches[-1:], zeros[-1:]
    pairs = [
        (*a, *b) for one, two in ((sharded, again), (sharded, smallest), (smallest, again)) for a in one for b in two
    ]
    if pairs:
        yield pairs
    everything: Change = tuple(text for part in (sharded, smallest, again) for change in part for text in change)
    yield [everything]
    factor = 2
    while factor <= _MOST_DEVICES:
        yield [(*everything, *_more_devices(spec, factor))]
        factor *= 2
    length = spec.workload.seq_len // 2
    while length >= max(128, spec.workload.seq_len // 64):
        yield [(*everything, f"workload.seq_len={length}")]
        length //= 2


def _smaller_micro_batches(spec: RunSpec) -> list[Change]:
    """Divisors of the sequences per replica that are below the micro-batch, each at most half of the one before."""
    found: list[Change] = []
    per_replica = spec.workload.global_batch // spec.data_parallel
    wanted = spec.workload.micro_batch // 2
    while wanted >= 1:
        while per_replica % wanted:
            wanted -= 1
        found.append((f"workload.micro_batch={wanted}",))
        wanted //= 2
    return found


def _more_devices(spec: RunSpec, factor: int) -> Change:
    """`factor` times the devices, with ZeRO 3, and the batch that they need at least."""
    devices = spec.system.devices * factor
    changes = [f"system.devices={devices}", "parallel.zero=3"]
    if spec.workload.global_batch % devices:
        changes.append(f"workload.global_batch={spec.workload.global_batch * factor}")
    return tuple(changes)


def _words(change: Change) -> str:
    last = dict(text.split("=", 1) for text in change)  # of two values of a key the later holds
    return ", ".join(f"{key.rpartition('.')[2]}: {value}" for key, value in last.items())
