"""HOW a layer computes on this hardware.

weights/      low-precision tensors in the places of parameters: one mechanism for all hardware
x86/          INT8 products and packed tables on x86 CPUs
nvidia/       FP8 products and graphs on NVIDIA GPUs (experimental: not yet measured on a GPU)
compiling/    a deployed model as torch.compile's Inductor makes it
emulated.py   the target that emulates: any device, any layer, slow
torchrec_tables.py the target torchrec: its quantised collections, filled with a map's rows
shared_codes.py inputs that were quantised last, for layers that read the same values
deploy.py     a map into a running model, checked against the emulation
kernel_checks.py each deployed weight against what it stands for
checkpoint.py the deployed model in safetensors
batch_watch.py tells of batches that nobody timed
timing.py     speed as a ratio, interleaved
"""
