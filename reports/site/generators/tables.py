"""The generated tables by the name that a page's marker gives."""

from collections.abc import Callable, Mapping

from generators import (
    accelerator_file,
    commands,
    library,
    low_precision,
    python_api,
    result,
    run_file,
    software_stack,
    vocabulary,
)

_TABLES: Mapping[str, Callable[[], str]] = {
    "accelerators": library.accelerators,
    "accelerator-file": accelerator_file.keys,
    "calibrated": accelerator_file.calibrated,
    "commands": commands.reference,
    "formats": library.formats,
    "models": library.models,
    "number-formats": low_precision.formats,
    "published-groups": library.published_groups,
    "python-api": python_api.text,
    "python-names": python_api.names,
    "recipes": low_precision.recipes,
    "result": result.fields,
    "run-file": run_file.reference,
    "software-stack": software_stack.facts,
    "software-stack-values": software_stack.values,
    "vocabulary": vocabulary.classes,
    "vocabulary-operators": vocabulary.operators,
}


def table(name: str) -> str:
    """The Markdown of the table called `name`. Raises KeyError: there is none."""
    return _TABLES[name]()
