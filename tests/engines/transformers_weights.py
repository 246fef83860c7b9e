"""Run by the Python of the engines, without precimap: what transformers makes of a checkpoint.

    python transformers_weights.py CHECKPOINT INPUTS OUTPUTS [DTYPE]

INPUTS: safetensors, `tokens`, and an input for each width, named by it. OUTPUTS: safetensors, `logits` of the tokens, and
of each Linear NAME, `NAME.weight` as it multiplies it, and `NAME.output`; `error` in the metadata is what stopped it.
"""

import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


def main(checkpoint, given, path, dtype="auto"):
    inputs, outputs, said = load_file(given), {}, {}
    try:
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).eval()
        with torch.no_grad():
            outputs["logits"] = model(input_ids=inputs["tokens"]).logits
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear):
                outputs[f"{name}.weight"] = module.weight.detach()
                with torch.no_grad():
                    outputs[f"{name}.output"] = module(inputs[str(module.in_features)][None].to(model.dtype))[0]
    except Exception as error:  # noqa: BLE001 - whatever stops the engine is what was asked for
        said["error"] = f"{type(error).__name__}: {error}"
    save_file({name: tensor.clone() for name, tensor in outputs.items()}, path, metadata=said)


main(*sys.argv[1:])
