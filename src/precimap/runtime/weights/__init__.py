"""Weights in low precision, in the places of the parameters they stand for.

low_weight   the tensor: what it answers, and who is asked for each call of it
structure    its views, copies and moves
memory       who wants its memory: other processes, NumPy, a parameter's `data`
products     which calls multiply it or look its rows up, and what its kernel is asked for them
int8         the kernel of x86 CPUs: INT8 codes through oneDNN
fp8          the kernel of NVIDIA GPUs: E4M3 codes through `_scaled_mm` and `_scaled_grouped_mm`
stored       codes that are decoded once: weight-only schemes on a CPU
rows         packed rows of embedding tables on a CPU
emulated     quantise-dequantise around the call, on any device
placing      a copy of a model with such tensors in it
"""
