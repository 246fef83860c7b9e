"""Weights in low precision, in the places of the parameters they stand for.

low_weight.py the tensor: what it answers, and who is asked for each call of it
structure.py its views, copies and moves
tracing.py   whether a compiler reads a call
memory.py    who wants its memory: other processes, NumPy, a parameter's `data`
products.py  which calls multiply it or look its rows up, and what its kernel is asked for them
half.py      products in BF16 or FP16
emulated.py  the kernel for any device: quantise-dequantise around the call
placing.py   a copy of a model with such tensors in it

The kernels of hardware are in its folder: `x86/int8.py`, `x86/stored.py`, `x86/rows.py`, `nvidia/fp8.py`.
"""
