"""Shifted rounding grids: the same scheme, with scales that a retrained model could as well have got.

Part of a drop is a lottery: where the grid happens to lie. Multiplying every scale by a phase of its own draws again.

Invariant: a phase is at least 1 and below 2, so the codes reach at least as far as before and nothing saturates that
fitted (rows of tables are widened by a step instead, see `row_limits`); and it is a function of (seed, layer, role,
place) alone, with the same bits on every machine and every numpy. Not taken: adding noise to the weights, which measures
another model and not another grid; and torch's generators, whose streams differ by device and version.
"""

import hashlib
import json
import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from precimap.errors import SchemeError
from precimap.numerics.formats import FloatFormat, Format
from precimap.numerics.quantize import Affine

_BITS = 24  # of each draw: what a float32 in [1, 2) can hold, and one more

# A code q of an integer grid moves by q * (phase - 1) steps. 5 % is six steps at the outermost codes of INT8 and half a
# step from code 10 on, while the resolution falls by at most 5 % (a phase of 2 would cost a bit). Smaller codes keep a
# part of their error: an eighth of the variance of a product with normal weights, so that its spread reads 7 % low.
INTEGER_JITTER = 0.05


@dataclass(frozen=True, slots=True)
class GridShift:
    """One draw of all rounding grids of a model; `seed` is any whole number.

    Float formats: a phase in [1, 2), log-uniform. Their grid repeats with every factor of 2, so that this draws every
    place of it alike; only what underflows moves, by less than one binade. Integers: uniform in [1, 1 + INTEGER_JITTER).

    Formats of 16 bits are refused: their scale is 1 by definition, and a shifted one is what no model ships. A scale
    that may only be a power of two (E8M0) would have no phase but 1; no scheme has one.
    """

    seed: int

    def weight_affine(self, layer: str, format: Format, affine: Affine) -> Affine:
        """The affine of a layer's weight with an independent phase for each of its scales.

        The zero of an asymmetric range stays: a range from low to high, which holds 0, becomes the range from
        phase * low to phase * high, whose zero is the same. Raises SchemeError for a format of 16 bits, and for rows
        with an offset, which `row_limits` shifts.
        """
        if affine.offset is not None:
            raise SchemeError(f"{layer}: the grid of rows with an offset is shifted by row_limits, not by a phase")
        shape = tuple(affine.scale.shape)
        phases = self._phases(layer, "weight", format, math.prod(shape)).reshape(shape)
        return Affine(affine.scale * torch.from_numpy(phases).to(affine.scale.device), affine.zero)

    def row_limits(self, layer: str, low: Tensor, high: Tensor, format: Format) -> tuple[Tensor, Tensor]:
        """The limits of a table's rows (float32, one shape), each row's moved by a part of a step of its own.

        A row's grid starts at its own minimum, so a phase of the scale would leave the small codes where they are. The
        range grows by one step, and a uniform part of it comes before the minimum: every code is drawn alike, nothing
        saturates. One step of 15 is lost, and the two ends are no longer exact: for INT4 rows of 16 values the error
        reads about 14 % high, for INT8 rows 7 % (their ends). A constant row stays as it is.
        """
        place = torch.from_numpy(self._uniform(layer, "rows", low.numel()).astype(np.float32)).to(low.device)
        step = (high - low) / (format.maximum - 1)
        before = place.reshape(low.shape) * step
        return low - before, high + (step - before)

    def input_phase(self, layer: str, format: Format) -> float:
        """The phase of a layer's input scale, a float32 value: one for all tokens.

        A dynamic scale per token follows each token's amax, which spreads the tokens over the grid already; the draw is
        of the rule that makes those scales. Raises SchemeError for a format of 16 bits.
        """
        return float(self._phases(layer, "input", format, 1)[0])

    def _phases(self, layer: str, role: str, format: Format, count: int) -> NDArray[np.float32]:
        if isinstance(format, FloatFormat) and format.bits == 16:
            raise SchemeError(
                f"{layer}: the {role} is {format.name}, whose scale is always 1: its grid cannot be shifted; "
                "draw layers in 8 bits or less"
            )
        if isinstance(format, FloatFormat):
            return _power_of_two(self._draws(layer, role, count)).astype(np.float32)
        return (1 + INTEGER_JITTER * self._uniform(layer, role, count)).astype(np.float32)

    def _uniform(self, layer: str, role: str, count: int) -> NDArray[np.float64]:
        return self._draws(layer, role, count).astype(np.float64) * 2.0**-_BITS

    def _draws(self, layer: str, role: str, count: int) -> NDArray[np.uint64]:
        # A counter-based generator keyed by a hash: its raw stream is what numpy promises never to change.
        key = hashlib.sha256(json.dumps([self.seed, layer, role]).encode()).digest()[:16]
        return np.random.Philox(key=int.from_bytes(key, "little")).random_raw(count) >> np.uint64(64 - _BITS)


def _power_of_two(draws: NDArray[np.uint64]) -> NDArray[np.float64]:
    """2 ** (draws / 2**24), of square roots and products alone: IEEE 754 rounds those alike everywhere, exp2 it does not."""
    result, root = np.ones(draws.shape), 2.0
    for bit in reversed(range(_BITS)):
        root = math.sqrt(root)
        result = np.where(draws >> np.uint64(bit) & np.uint64(1), result * root, result)
    return result
