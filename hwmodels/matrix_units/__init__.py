"""Matrix units: what multiplies matrices, and how work is cut for it."""
