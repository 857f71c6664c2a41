"""The op classes and their operators, from the vocabulary that the simulator prices with."""

import re

from cosim.trace import vocabulary
from generators.markdown import code, table

_ROW = re.compile(r"^    (\S.*?)  +(\S.*)$", re.MULTILINE)


def classes() -> str:
    """The classes as the vocabulary's own text explains them."""
    rows = [[", ".join(map(code, name.split(", "))), text] for name, text in _ROW.findall(vocabulary.__doc__ or "")]
    return table(("class", "operators"), rows)


def operators() -> str:
    """Every operator with its class and its arithmetic per element."""
    grouped: dict[tuple[str, float, float], list[str]] = {}
    for target, entry in vocabulary._TABLE.items():
        grouped.setdefault((entry.op_class, entry.vector_ops, entry.special_ops), []).append(target)
    order = {name: number for number, name in enumerate(vocabulary.OP_CLASSES)}
    rows = [
        [
            code(op_class),
            f"{vector:g}",
            f"{special:g}",
            " ".join(code(t.removeprefix("aten.")) for t in sorted(targets)),
        ]
        for (op_class, vector, special), targets in sorted(grouped.items(), key=lambda item: order[item[0][0]])
    ]
    return table(("class", "vector", "special", "operators (of ATen, unless named)"), rows)
