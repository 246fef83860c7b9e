"""x86 CPUs.

target.py      the target INT8: what this CPU takes, and which kernel serves it
int8.py        the kernel of products: INT8 codes through oneDNN
stored.py      codes that are decoded once: weight-only schemes
rows.py        packed rows of embedding tables
layer_timer.py the time of single layers
whole_timer.py the time of whole models
"""
