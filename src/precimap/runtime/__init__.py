"""HOW a layer computes on this hardware.

emulated.py   quantise-dequantise around the original ops: any device, any layer, slow
cpu_int8.py   INT8 on x86 through oneDNN: what it takes, and the swap
int8_linear.py one layer of it, eager and traced
cuda_fp8.py   FP8 on NVIDIA GPUs: what they take, and the swap (experimental: not yet measured on a GPU)
fp8_linear.py one layer of it, the same code eager and traced
cuda_graphs.py a model as one CUDA graph for each batch size
stored_linear.py a layer stored low, decoded when it is made
attention.py  attention in products, for compiled models in BF16
compiled.py   a deployed model through torch.compile
cpu_tables.py embedding tables in packed rows, through torch's operators
torchrec_tables.py torchrec's quantised collections, filled with a map's rows
deploy.py     a map into a running model, checked against the emulation
checkpoint.py the deployed model in safetensors
swapping.py   a model with other modules in place of the layers' owners
cpu_timer.py, cuda_timer.py the time of single layers
cuda_whole.py the time of whole models on a GPU
timing.py     speed as a ratio, interleaved
"""
