"""HOW a layer computes on this hardware.

weights/      low-precision tensors in the places of parameters, and the kernels that multiply them
emulated.py   the target that emulates: any device, any layer, slow
cpu_int8.py   the target INT8 on x86: what this CPU takes, and which kernel serves it
cuda_fp8.py   the target FP8 on NVIDIA GPUs: what they take (experimental: not yet measured on a GPU)
torchrec_tables.py the target torchrec: its quantised collections, filled with a map's rows
compiled_target.py the first two as Inductor compiles them
shared_codes.py inputs that were quantised last, for layers that read the same values
compiled.py   a deployed model through torch.compile
attention.py  attention in products, for compiled models in BF16
cuda_graphs.py a model as one CUDA graph for each batch size
deploy.py     a map into a running model, checked against the emulation
kernel_checks.py each deployed weight against what it stands for
checkpoint.py the deployed model in safetensors
batch_watch.py tells of batches that nobody timed
cpu_timer.py, cuda_timer.py the time of single layers
cpu_whole.py, cuda_whole.py the time of whole models
timing.py     speed as a ratio, interleaved
"""
