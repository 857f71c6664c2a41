"""Everything a user can say about one run: data only, read from YAML, checked, with every default filled in."""

from cosim.spec.modelled import NotModelledError
from cosim.spec.run import RunSpec
from cosim.spec.sections import (
    AcceleratorOverride,
    EveryBlocks,
    HuggingFaceModel,
    ModelDimensions,
    Network,
    Overlap,
    ParallelSpec,
    PythonModel,
    SystemSpec,
    TrainingSpec,
    WorkloadSpec,
)

__all__ = [
    "AcceleratorOverride",
    "EveryBlocks",
    "HuggingFaceModel",
    "ModelDimensions",
    "Network",
    "NotModelledError",
    "Overlap",
    "ParallelSpec",
    "PythonModel",
    "RunSpec",
    "SystemSpec",
    "TrainingSpec",
    "WorkloadSpec",
]
