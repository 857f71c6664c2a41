"""Number formats: their bits, what a tensor in one occupies, and (`conversion`) bit-exact conversion."""

from hwmodels.number_formats.formats import (
    COMPUTES_AS,
    FORMATS,
    NumberFormat,
    bytes_of,
    number_format,
    tensor_bytes,
)

__all__ = ["COMPUTES_AS", "FORMATS", "NumberFormat", "bytes_of", "number_format", "tensor_bytes"]
