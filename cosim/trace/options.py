"""What decides which graph a training step becomes, besides the model itself."""

from __future__ import annotations

from dataclasses import dataclass

from hwmodels.units import InputError

FORMATS = ("fp32", "bf16", "fp16")
OPTIMIZERS = (
    *("adamw", "adam", "sgd", "lion", "lamb", "adafactor", "muon"),
    *("adagrad", "rmsprop", "adamax", "nadam", "radam"),
)
FRONTENDS = ("eager", "compile")
IMPLEMENTATIONS = ("fused", "foreach", "single")
FUSED = ("adamw", "adam", "sgd", "adagrad", "lion", "muon")
"""Optimizers with a fused kernel (muon: of the AdamW that updates all but matrices); the others run as foreach."""
SINGLE_ONLY = ("adafactor",)
"""Optimizers that run parameter by parameter unless asked: torch.optim.Adafactor's foreach form takes more memory."""


@dataclass(frozen=True, slots=True)
class TraceOptions:
    """The recipe of the traced step; sizes bind afterwards, `OpGraph.bind`.

    `batch` and `sequence` are used for tracing only where a module refuses the canonical sizes; the graph comes back
    bound to them. Raises InputError for an unknown format, optimizer or implementation.
    """

    attention: str = "flash"  # flash: one op; unfused: the operators that eager PyTorch runs
    dropout: float = 0.0
    parameter_format: str = "fp32"  # the module is built in it
    autocast_format: str | None = None  # torch.autocast around forward and loss
    autocast_norms_in_fp32: bool = True  # as CUDA's autocast does; False: programs whose norms cast to autocast_format
    master_format: str | None = None  # fp32: the optimizer updates separate copies, which are copied back
    gradient_format: str | None = None  # in which gradients reach the optimizer; None: as backward makes them
    optimizer: str = "adamw"
    optimizer_implementation: str = "fused"
    gradient_clipping: bool = True
    loss_scaling: bool = False  # as torch.amp.GradScaler does it
    rms_norm_fused: bool = True  # RMSNorm as one operator; False: as the elementary ones in which LLaMA writes it
    loss_fused: bool = False  # cross entropy as one operator
    loss_in_fp32: bool = True  # the logits are copied to fp32 first
    logged_losses: int = 0  # more cross entropies without gradient, for metrics
    task: str = "pretrain"
    frontend: str = "eager"  # compile: the graphs that torch.compile captures and partitions
    batch: int = 1
    sequence: int = 1024

    def __post_init__(self) -> None:
        _one_of("attention", self.attention, ("flash", "unfused"))
        _one_of("parameter_format", self.parameter_format, FORMATS)
        _one_of("autocast_format", self.autocast_format, (None, "bf16", "fp16"))
        _one_of("master_format", self.master_format, (None, "fp32"))
        _one_of("gradient_format", self.gradient_format, (None, *FORMATS))
        _one_of("optimizer", self.optimizer, OPTIMIZERS)
        _one_of("optimizer_implementation", self.optimizer_implementation, IMPLEMENTATIONS)
        _one_of("frontend", self.frontend, FRONTENDS)
        _one_of("task", self.task, ("pretrain",))

    @property
    def separate_masters(self) -> bool:
        """Whether the optimizer works on copies of the parameters in another format."""
        return self.master_format is not None and self.master_format != self.parameter_format

    @property
    def implementation(self) -> str:
        """How the optimizer really runs: PyTorch has fused kernels for a few optimizers only."""
        if self.optimizer in SINGLE_ONLY:
            return "single"
        if self.optimizer_implementation == "fused" and self.optimizer not in FUSED:
            return "foreach"
        return self.optimizer_implementation


def _one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        words = ", ".join("none" if word is None else str(word) for word in allowed)
        raise InputError(f"trace option {name}: {value!r} is not allowed; allowed: {words}")
