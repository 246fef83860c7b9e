"""WHERE precision may be chosen: every weight and the op that reads it, found by watching one batch run.

ops.py       which calls contract a tensor with another one, and over which dims
views.py     which tensors are a weight, or a view of one
interception.py   the one mechanism: a mode that sees every call and hands out those that read a weight
discover.py  the inventory of a model: layers, other parameters, FLOPs, siblings, dead weights
nudging.py   results rounded anew: what a model of 16 bits makes of any change
groups.py    layers that an engine fuses (must share a scheme)
refusals.py  why a layer cannot take a scheme, whatever the hardware
quantized.py one layer's codes and scales, and the emulation of a whole map
"""
