"""Runs a module once on small real tensors, to see what its code reads of them."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from cosim.trace.options import TraceOptions
from cosim.trace.run import autocast, build, default_format, explained, inputs_of, loss_of, operators_of
from cosim.trace.step import DataDependentError, Source
from cosim.trace.values import Noting, OneByOne, Read, Sizes, Values
from hwmodels.units import InputError

_BATCHES, _SEQUENCES = (3, 5), (13, 17)  # primes far apart from one another's multiples
_SEED = 0


def rehearse(model: Source, options: TraceOptions) -> Values:
    """What the module reads of its tensors in a step of a few random tokens, at two sizes.

    Raises InputError if it does not run, DataDependentError if it has too many weights to be made for real, or reads
    other numbers at another size.
    """
    failure: InputError | None = None
    for sizes in _candidates(options):
        try:
            first = _noted(model, options, sizes[0])
            second = _noted(model, options, sizes[1], first)
        except DataDependentError:
            raise
        except InputError as error:
            failure = error
            continue
        if [read.where for read in first] != [read.where for read in second]:
            other = next((a for a, b in zip(first, second, strict=False) if a.where != b.where), first[-1])
            raise DataDependentError(
                f"model: what it reads of the values of its tensors changes with its sizes, at {other.where}"
            )
        return Values(first, second, sizes)
    assert failure is not None
    raise DataDependentError(
        f"model: its control flow depends on the values of its tensors, and on small real ones {_without_key(failure)}"
    ) from failure


def _candidates(options: TraceOptions) -> Iterator[tuple[Sizes, Sizes]]:
    """Small sizes; the actual sequence length and both actual sizes, where the module takes no others."""
    yield (_BATCHES[0], _SEQUENCES[0]), (_BATCHES[1], _SEQUENCES[1])
    yield (_BATCHES[0], options.sequence), (_BATCHES[1], options.sequence)
    yield (options.batch, options.sequence), (options.batch, options.sequence)


def _noted(model: Source, options: TraceOptions, sizes: Sizes, earlier: tuple[Read, ...] = ()) -> tuple[Read, ...]:
    """What is read while the module is built and runs forward, loss and backward."""
    noting = Noting(earlier)
    with (
        torch.random.fork_rng(devices=()),
        default_format(options),
        operators_of(options),
        OneByOne(),
        noting,
    ):
        torch.manual_seed(_SEED)
        module = build(model, options, sizes[1])
        inputs, labels = inputs_of(module, *sizes)
        noting.building = False
        with explained():
            with autocast(options):
                loss = loss_of(module, options)(inputs, labels)
            loss.backward()  # type: ignore[no-untyped-call]
    return tuple(noting.reads)


def _without_key(failure: InputError) -> str:
    return str(failure).removeprefix("model: ")
