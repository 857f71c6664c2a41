"""A training step of any nn.Module becomes an `OpGraph`: recorded under FakeTensor, so that nothing is allocated.

`trace` records; `cached_trace` looks on disk first, and does not import torch if it finds the graph there.
"""

from cosim.trace.cache import cached_trace
from cosim.trace.options import TraceOptions
from cosim.trace.step import bind, trace

__all__ = ["TraceOptions", "bind", "cached_trace", "trace"]
