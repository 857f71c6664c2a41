"""What is in the library: accelerators, models, number formats, published measurements."""

from collections import Counter

from cosim.validate import published_runs
from generators.markdown import code, table
from hwmodels import accelerator, listing
from hwmodels.number_formats import FORMATS
from workloads import named


def accelerators() -> str:
    """As `cosim hw list` prints them."""
    rows = [listing.summary(name) for name in accelerator.names()]
    return table(list(rows[0]), [[code(row["name"]), *list(row.values())[1:]] for row in rows])


def models() -> str:
    """As `cosim workload list` prints them, with the source of the dimensions."""
    rows = []
    for name in named.names():
        entry = named.find(name)
        size = f"{entry.config.parameters() / 1e9:.3g} B"
        source = " ".join(str(entry.source).split())
        rows.append([code(name), entry.config.family, size, str(entry.config.layers), str(entry.config.hidden), source])
    return table(("name", "family", "parameters", "layers", "hidden", "source"), rows)


def formats() -> str:
    """The number formats with their bits."""
    rows = [
        [code(f.name), str(f.bits), str(f.exponent_bits), str(f.mantissa_bits), _scale(f.block, f.scale_bits),
         f"{f.bytes_per_element:g}"]
        for f in FORMATS.values()
    ]  # fmt: skip
    return table(("name", "bits", "exponent", "mantissa", "scale", "bytes per element"), rows)


def published_groups() -> str:
    """Rows of training_runs.csv by source: all, and those whose time is scored."""
    runs = published_runs.runs()
    scored = {run.id for run in runs if run.score_time and not run.verbatim and run.quality in ("A", "B")}
    every = Counter(run.source for run in runs)
    rows = [
        [code(source), str(count), str(sum(run.id in scored for run in runs if run.source == source))]
        for source, count in every.most_common()
    ]
    return table(("source", "rows", "time is scored"), rows)


def _scale(block: int, bits: int) -> str:
    return f"{bits} bits per {block} elements" if block else "—"
