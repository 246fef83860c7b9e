"""WHAT a low-precision number is: tensors in, tensors out, and no model.

formats.py   the formats, as rows of plain numbers
schemes.py   formats, granularities and range rules of one layer's weight and input
quantize.py  values to codes and back: the one quantiser, written to be read
large.py     large weights, some rows at a time
fast.py      the same bits at the speed that a search needs
ranges.py    how a scale is chosen: from a tensor, or from calibrated limits
rows.py      the scale and offset of an embedding table's packed rows
grid_shift.py  other grids for the same tensor: what part of a drop is the lottery of rounding
"""

# Part of a run's premise: raised when the same input would give other codes, scales or dequantised values, or when the
# emulation would round their products in other places. The machine is no part of it: the order of a float32 sum is each
# machine's own, of emulated products as of the model's, so a run that moves between machines mixes last bits of both.
NUMERICS_VERSION = "3"
