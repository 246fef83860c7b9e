"""Compressed-tensors checkpoints, which vLLM, SGLang and transformers load: the folder that a model came from, in low
precision where a map says so.

compressed_tensors.py  the writer: the folder's shards, one at a time, with the codes of a map
same_model.py          which parameter of the certified model each stored tensor is, and that it has its values
expressed.py           which layers the format holds and the engine runs as the map says; all others are refused
stated.py              the `quantization_config` of a map, in fields that compressed-tensors 0.17 knows
decoded.py             what was written, read back and decoded, beside the certified weights
"""
