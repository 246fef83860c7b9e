"""Deployed models through torch.compile.

compiled.py  a model whose calls Inductor compiles
counted.py   the INT8 products of compiled code, counted
target.py    the targets of x86 and NVIDIA in that form, and NVIDIA's as CUDA graphs of it
attention.py attention in products, for compiled models in BF16
inductor.py  what Inductor gets wrong around INT8 products, mended while it compiles
"""
