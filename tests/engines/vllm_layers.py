"""Run by the Python of the engines, without precimap: what vLLM computes in each product of a checkpoint.

    python vllm_layers.py CHECKPOINT INPUTS OUTPUTS [pooling]

INPUTS: safetensors, an input for each width, named by it. OUTPUTS: safetensors, module -> its output, with `kernels` in
the metadata, module -> what runs it, or `error`, what stopped the engine; in pooling also `embedding`, of the tokens that
INPUTS has as `tokens`.
"""

import json
import os
import sys

os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    HF_HUB_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="ERROR",
)

import torch
from safetensors.torch import load_file, save_file
from vllm import LLM
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

SIZES = {"max_model_len": 128, "max_num_seqs": 4, "max_num_batched_tokens": 256}


def kernel_of(module):
    scheme = getattr(module, "scheme", None)
    if scheme is None:
        return "not quantised"
    found = [type(value).__name__ for value in vars(scheme).values() if "Kernel" in type(value).__name__]
    return f"{type(scheme).__name__} {' '.join(found)}"


def main(checkpoint, tensors, path, *pooling):
    inputs, outputs, kernels = load_file(tensors), {}, {}
    try:
        options = {"runner": "pooling"} if pooling else {"enable_prefix_caching": False}
        llm = LLM(
            model=checkpoint, dtype="bfloat16", enforce_eager=True, skip_tokenizer_init=not pooling, **SIZES, **options
        )
        model = llm.llm_engine.model_executor.driver_worker.model_runner.model
        for name, module in model.named_modules():
            if isinstance(module, LinearBase):
                with torch.inference_mode():
                    found = module(inputs[str(module.input_size)])
                outputs[name] = (found[0] if isinstance(found, tuple) else found).contiguous()
                kernels[name] = kernel_of(module)
            elif isinstance(module, ParallelLMHead):
                with torch.inference_mode():
                    given = inputs[str(module.embedding_dim)]
                    outputs[name] = module.quant_method.apply(module, given)[:, : module.org_vocab_size].contiguous()
                kernels[name] = kernel_of(module)
        if pooling:
            prompts = [{"prompt_token_ids": row[row > 0].tolist()} for row in inputs["tokens"]]
            outputs["embedding"] = torch.tensor([one.outputs.embedding for one in llm.embed(prompts, use_tqdm=False)])
        said = {"kernels": json.dumps(kernels)}
    except Exception as error:  # noqa: BLE001 - whatever stops the engine is what was asked for
        said = {"error": f"{type(error).__name__}: {error}"}
    save_file({name: tensor.clone() for name, tensor in outputs.items()}, path, metadata=said)


main(*sys.argv[1:])
