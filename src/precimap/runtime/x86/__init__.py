"""x86 CPUs.

target.py      the target INT8: what this CPU takes, and which kernel serves it
int8.py        the kernel of products with a fixed input scale: INT8 codes through oneDNN
tokens.py      the kernel of products with a scale for each row, quantised inside: tokens.cpp, tokens_rows.h
building.py    C++ of this package made into a library, at first use
stored.py      codes that are decoded once: weight-only schemes
rows.py        packed rows of embedding tables
layer_timer.py the time of single layers
whole_timer.py the time of whole models
"""
