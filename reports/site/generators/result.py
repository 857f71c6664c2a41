"""The result's fields with the comments beside them."""

import dataclasses
import inspect
import re

from cosim.result import Result
from generators.markdown import code, sentence, table

_FIELD = re.compile(r"^    (\w+): (.+?)(?: = .*?)?(?:  # (.*))?$")
_PLAIN = {  # fields whose names say it, and which have no comment in the class
    "step_time_s": "one optimizer step",
    "step_time_interval_s": "between which times it lies; null where nothing says how far the answer can be off",
    "tokens_per_s": "all devices; of an encoder-decoder what its encoder reads, as T5 and Hugging Face's Trainer count",
    "tokens_per_s_per_device": "the same by device",
    "feasible": "whether the total on the device is within what its driver offers",
    "infeasible_reason": "by how much it does not, and what would make it fit",
    "worst_rank": "the rank with the highest peak",
    "memory_capacity_bytes": "memory of the device",
    "clock_hz": "sustained under the power limit",
    "energy_j": "one step, all devices",
    "cost_usd": "one step, all devices; null without a price",
    "limited_by": "the largest single part of the step, and its share",
    "anchor_factor": "measured over predicted, of the run that the answer is scaled to; null without one",
    "extrapolated": "parts of the answer that go beyond what was measured",
    "assumed": "facts of the software stack that stand at the neutral value",
    "warnings": "what else a reader should know",
    "schema_version": "of this object",
}


def fields() -> str:
    """A table of every key of the JSON object; the unit is in the name."""
    comments: dict[str, str] = {}
    current = ""
    for line in inspect.getsource(Result).splitlines():
        if found := _FIELD.match(line):
            current = found[1]
            comments[current] = found[3] or ""
        elif line.startswith("    ]") and "#" in line:  # a type over several lines
            comments[current] = line.partition("#")[2].strip()
        elif line.startswith("    def "):
            break
    names = [field.name for field in dataclasses.fields(Result) if field.name != "detail"]
    return table(
        ("key", "meaning"), [[code(name), sentence(comments.get(name) or _PLAIN.get(name, ""))] for name in names]
    )
