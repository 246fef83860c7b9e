"""The module that a timer is given for a layer: the model's own, or a plain one that makes the same product or lookup.

Invariant: a plain module has the layer's own values in the layout of `nn.Linear`, `nn.Embedding` or `nn.EmbeddingBag`, and
its codes are the layer's own, laid out alike; so a time belongs to widths and values, not to the spelling of a call. Not
taken: the model's call itself, with inputs of its own making: a call may be any code.
"""

from dataclasses import replace

from torch import Tensor, nn

from precimap.layers.inventory import Layer
from precimap.layers.owners import module_of
from precimap.layers.quantized import QuantizedLayer
from precimap.layers.views import parameter_names
from precimap.numerics.quantize import Affine


def timed_module(model: nn.Module, layer: Layer) -> nn.Module:
    """What `Layer.timed_as` names. The model's own module is not copied; a plain one has values of its own."""
    if layer.module is not None:
        return module_of(model, layer.name)
    weight = parameter_names(model)[layer.name].detach()
    if layer.table:
        kind = nn.EmbeddingBag if "embedding_bag" in layer.ops else nn.Embedding
        table: nn.Module = kind.from_pretrained(weight.reshape(-1, weight.shape[-1]).clone())
        return table
    matrix = _matrix(weight, layer).clone()
    made = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta", dtype=matrix.dtype)
    made.weight = nn.Parameter(matrix, requires_grad=False)
    return made


def timed_codes(coded: QuantizedLayer, layer: Layer) -> QuantizedLayer:
    """A layer's codes and scales as they are of the weight of `timed_module`."""
    if layer.module is not None:
        return coded
    if layer.table:
        return replace(coded, keeps=False)
    affine, shape = coded.weight_affine, coded.codes.shape
    laid_out = [
        None if part is None else _shared(_matrix(part.expand(shape), layer), shared_by_all=part.numel() == 1)
        for part in (affine.scale, affine.zero, affine.offset)
    ]
    assert laid_out[0] is not None
    return replace(
        coded,
        codes=_matrix(coded.codes, layer).contiguous(),
        weight_affine=Affine(laid_out[0], laid_out[1], laid_out[2]),
        keeps=False,
    )


def _matrix(tensor: Tensor, layer: Layer) -> Tensor:
    """A tensor of the parameter's shape as [N, K], K along what the layer's calls sum over; of a stack its first weight."""
    contracted = layer.contracted
    assert contracted is not None
    if layer.stacked > 1:
        tensor, contracted = tensor[0], tuple(dim - 1 for dim in contracted)
    kept = [dim for dim in range(tensor.dim()) if dim not in contracted]
    inputs = 1
    for dim in contracted:
        inputs *= tensor.shape[dim]
    return tensor.permute(*kept, *contracted).reshape(-1, inputs)


def _shared(spread: Tensor, shared_by_all: bool) -> Tensor:
    """[N, K], the same along K -> [N, 1], or [1, 1]."""
    return spread[:1, :1].contiguous() if shared_by_all else spread[:, :1].contiguous()
