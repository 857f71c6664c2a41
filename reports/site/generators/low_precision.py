"""Tables of the page on number formats: the formats, and the recipes that train in them."""

from cosim.techniques.recipes import RECIPES
from generators.markdown import code, table
from hwmodels.number_formats import FORMATS

_SPECIALS = {"ieee": "infinity, NaN", "nan": "NaN", "none": "none"}


def formats() -> str:
    """Every number format: bits, range and scales."""
    rows = []
    for name, f in FORMATS.items():
        if name == "bool":
            continue
        scale = f"{f.scale} per {f.block}" if f.block else ""
        scale += " and fp32 per tensor" if f.tensor_scale_bits else ""
        layout = f"1 + {f.exponent_bits} + {f.mantissa_bits}" if f.is_float else f"{f.bits} (integer)"
        if f.name == "mxint8":
            layout = "8 (six after the point)"
        special = _SPECIALS[f.specials] if f.is_float else "none"
        numbers = (str(f.bias), f"{f.largest:.5g}", f"{f.smallest:.3g}")
        rows.append([code(name), layout, *numbers, special, scale, f"{8 * f.bytes_per_element:.4g}"])
    header = ("format", "sign + exponent + mantissa", "bias", "largest", "smallest", "special codes", "scale")
    return table((*header, "bits with scales"), rows)


def recipes() -> str:
    """Every recipe: formats, scales, what is cast and what stays wide."""
    rows = []
    for r in RECIPES:
        extras = [
            *(["one more pass for the largest value"] if r.tensor_amax else []),
            *(["Hadamard transform for wgrad"] if r.hadamard else []),
            *(["stochastic rounding of gradients"] if r.stochastic else []),
            *([] if r.wgrad else ["wgrad in 16 bits"]),
            *([f"the last {r.wide_blocks:.0%} of the blocks in bf16"] if r.wide_blocks else []),
        ]
        names = (r.activation, r.weight, r.gradient)
        rows.append([code(r.precision), code(r.name), *map(code, names), "; ".join(extras) or "—", r.source])
    header = ("precision", "recipe", "activations", "weights", "gradients", "besides", "source")
    return table(header, rows)
