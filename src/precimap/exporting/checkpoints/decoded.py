"""What was written, read back and decoded, beside the certified weights: equal in every bit, or not exported.

Invariant: the files are opened anew, and each weight is made of what stands in them as the format defines it, codes times
scale; nothing of the writer's memory is believed. A disk or a library that changed a byte is found here.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from precimap.errors import DeployError
from precimap.exporting.hf_folder import HfFolder
from precimap.layers.quantized import QuantizedLayer


def check_decoded(written: HfFolder, low: Mapping[str, QuantizedLayer], rest: Mapping[str, Tensor]) -> None:
    """low: stored module -> its layer; rest: stored name -> what it has to hold. Raises DeployError."""
    for module, layer in low.items():
        codes, scale = written.read(f"{module}.weight"), written.read(f"{module}.weight_scale")
        if not torch.equal(codes.float() * scale.float(), layer.weight().cpu()):
            raise DeployError(
                f"{module}: what was written does not decode to the certified weight; nothing is exported"
            )
    for name, values in rest.items():
        found = written.read(name)
        if found.dtype != values.dtype or not torch.equal(found, values.detach().cpu()):
            raise DeployError(f"{name}: what was written is not what the certified model holds; nothing is exported")
