"""NVIDIA GPUs, and AMD's MI300, which torch calls a CUDA device. Experimental: not yet measured on a GPU.

target.py      the target FP8: what these GPUs take
fp8.py         the kernel: E4M3 codes, and FNUZ ones, through `_scaled_mm` and `_scaled_grouped_mm`
graphs.py      a model as one CUDA graph for each batch size that the user names, smaller batches filled up
graph_calls.py a model's compiled calls as CUDA graphs, one for each set of shapes: the form `graphs`
layer_timer.py the time of single layers
whole_timer.py the time of whole models
"""
