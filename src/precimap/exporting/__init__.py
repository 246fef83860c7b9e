"""Files that serving engines load, made of a certified map.

export.py      export(): one map into one new folder
shipped.py     what a map ships, before any format: the one object that all writers write from
calls.py       calls of the model as its task makes them: what is traced, and which sizes vary
traced.py      a model as torch.export traces it, in plain tensors
aoti.py        AOTInductor's package, for Python and C++
int8_tokens_served.py, int8_tokens_served.cpp  scheme `int8` in a package: the operator in a library beside it
fbgemm.py      embedding tables as FBGEMM and torchrec hold them
onnx_qdq.py        ONNX with standard Q/DQ operators: the writer
onnx_kernel.py     how a layer in low precision is written in ONNX's operators
onnx_spelling.py   calls spelled so that torch's translation to ONNX takes them
onnx_graph.py      names and constants of the graph, and what its products must read
onnx_engines.py    ONNX Runtime and OpenVINO, and what of it they really multiply in low precision
call_structure.py  how a call of the model becomes inputs of a file, and its outputs what the model returns
loaded.py      load_exported(): an exported folder as a model again
difference.py  what was exported beside what was certified
exported.py    the record of an export, `export.json`
folder.py      a folder that is written as a whole or not at all
hf_folder.py   a Hugging Face folder: its config, its tensors, its other files
checkpoints/   compressed-tensors checkpoints, which vLLM, SGLang and transformers load
linting/       what an engine would do with such a checkpoint, of any tool
"""
