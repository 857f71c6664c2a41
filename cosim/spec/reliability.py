"""What goes wrong in a run: devices and links that are slower than others, and devices that fail."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from cosim.spec.quantities import Bandwidth, Duration, Section, Share, quantity
from hwmodels.units import InputError

Factor = Annotated[float, Field(ge=1, le=1000)]
PositiveDuration = Annotated[float, *quantity("time", positive=True)]


class SlowDevice(Section):
    """One device that takes longer for all that it computes; those that share its tasks wait for it."""

    pipeline_rank: Annotated[int, Field(ge=0, le=1_000_000, description="The pipeline rank that it belongs to")] = 0
    factor: Annotated[Factor, Field(description="Its time over that of the others")]


class SlowLink(Section):
    """One slow link of a tier; collectives go at the pace of the slowest link that they use."""

    tier: Annotated[Literal["fabric", "network"], Field(description="Inside a node, or between nodes")] = "network"
    factor: Annotated[Factor, Field(description="The tier's bandwidth over that of this link")]


class Variation(Section):
    """How devices and links differ from each other, and from step to step."""

    slow_device: Annotated[SlowDevice | None, Field(description="A device that is slower than the others")] = None
    slow_link: Annotated[SlowLink | None, Field(description="A link that is slower than the others of its tier")] = None
    jitter: Annotated[
        Share,
        Field(
            description="Standard deviation of the logarithm of the random factor by which each task of a device takes "
            "longer or shorter"
        ),
    ] = 0.0
    seed: Annotated[int, Field(ge=0, le=2**63 - 1, description="Of the random factors")] = 0


def _kind_of_interval(value: object) -> str:
    return "<name>" if value == "auto" else "<time>"


class Failures(Section):
    """How often devices fail, and what a failure costs the run."""

    mean_time_between_failures: Annotated[
        PositiveDuration, Field(description="Of one device: '50000 h'; a failure of any stops the run")
    ]
    checkpoint_interval: Annotated[
        Annotated[Literal["auto"], Tag("<name>")] | Annotated[PositiveDuration, Tag("<time>")],
        Discriminator(_kind_of_interval),
        Field(description="Training between two checkpoints; auto: the best there is (Daly 2006)"),
    ] = "auto"
    checkpoint_time: Annotated[
        Duration | None, Field(description="For which training stands still to save a checkpoint")
    ] = None
    storage_bandwidth: Annotated[
        Bandwidth | None,
        Field(description="Of the whole system, in place of checkpoint_time: at which weights and states are saved"),
    ] = None
    restart_time: Annotated[
        Duration, Field(description="From a failure until training goes on from the last checkpoint")
    ] = 600.0

    @model_validator(mode="after")
    def _one_way_to_say_it(self) -> Failures:
        if (self.checkpoint_time is None) == (self.storage_bandwidth is None):
            raise InputError("give checkpoint_time or storage_bandwidth, one of the two")
        return self
