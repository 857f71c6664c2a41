"""One kernel or collective, in the columns of the published tables, priced by the hardware models."""

from cosim.cost.answers import answer, answer_line

__all__ = ["answer", "answer_line"]
