"""Two faults of Inductor with frozen weights, mended for as long as precimap compiles.

Invariant: compiled code writes into nothing that was there before, and each INT8 product is found in it.

Sums: Inductor adds the other operand of `product + other` inside the product, in the memory of `other`, wherever no call
but the sum seems to read it any more (`fx_passes/mkldnn_fusion.py` and `quantization.py` of torch 2.13, of INT8 products
and of float convolutions). It does not ask whether that is an input of the model, a frozen weight or buffer, or shared with
a view that is returned: inputs were overwritten, and a model with `linear(x) + self.position` answered otherwise at each
call. So the sum always gets memory of its own; it stays inside the product. Finding out where the memory may be reused was
not taken: aliases are not known where that is decided.

Rows: Inductor finds the product of inputs [.., K] by the two views around a product of rows. A model that flattens the
result at once leaves one of them, and the product was in base precision. Both are put back.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.passes.shape_prop import _extract_tensor_metadata

from precimap.errors import DeployError

_aten = torch.ops.aten
# By which Inductor asks whether the other operand may be written.
_QUESTIONS = ("_can_be_inplace", "_qlinear_binary_can_be_inplace")


@contextmanager
def sums_in_own_memory() -> Iterator[None]:
    """Raises DeployError for a torch that decides it elsewhere."""
    from torch._inductor.fx_passes import mkldnn_fusion

    if not torch._C._has_mkldnn:  # then it has neither these products nor the question
        yield
        return
    asked = vars(mkldnn_fusion)
    before = {name: asked[name] for name in _QUESTIONS if name in asked}
    if len(before) < len(_QUESTIONS):
        raise DeployError(
            f"expected {' and '.join(_QUESTIONS)} in Inductor, torch {torch.__version__} has not both: its code may "
            "overwrite the inputs of a model; use the deployed model without compiling it"
        )
    asked.update(dict.fromkeys(_QUESTIONS, _never))
    try:
        yield
    finally:
        asked.update(before)


def _never(_other: object) -> bool:
    return False


@functools.cache
def rows_pass() -> object:
    """For Inductor's `joint_custom_post_pass`. Imported no sooner than it is needed."""
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    class RowsPass(CustomGraphPass):
        def __call__(self, graph: Graph) -> None:
            for product in graph.nodes:
                if product.target in (_aten.mm.default, _aten.addmm.default):
                    _view_back(graph, product)

        def uuid(self) -> object:
            return get_hash_for_files((__file__,))  # a part of the key under which generated code is kept

    return RowsPass()


def _view_back(graph: Graph, product: Node) -> None:
    """View the result of a product of rows that were cut out of dequantised inputs as these are, and as rows again."""
    rows = product.args[-2]
    if not isinstance(rows, Node) or rows.target is not _aten.view.default:
        return
    inputs = rows.args[0]
    if not isinstance(inputs, Node) or not _dequantised(inputs):
        return
    shape = inputs.meta["val"].shape
    outward = [*shape[:-1], product.meta["val"].shape[-1]]
    if len(shape) < 3 or [_shape_viewed(user) for user in product.users] == [outward]:
        return
    with graph.inserting_after(inputs):
        sizes = [_size(graph, inputs, dim) for dim in range(len(shape) - 1)]
    users = list(product.users)
    with graph.inserting_after(product):
        wide = _view(graph, product, [*sizes, outward[-1]], outward)
    with graph.inserting_after(wide):
        flat = _view(graph, wide, [-1, outward[-1]], product.meta["val"].shape)
    for user in users:
        user.replace_input_with(product, flat)


def _dequantised(node: Node) -> bool:
    """Whether these are the values of codes, in the dtype of the product."""
    if node.target is torch.ops.prims.convert_element_type.default:
        before = node.args[0]
        return isinstance(before, Node) and _dequantised(before)
    return node.target is torch.ops.quantized_decomposed.dequantize_per_tensor.default


def _shape_viewed(user: Node) -> Any:
    return list(user.meta["val"].shape) if user.target is _aten.view.default else None


def _size(graph: Graph, node: Node, dim: int) -> Any:
    """A number, or the node that finds it where sizes vary."""
    size = node.meta["val"].shape[dim]
    if type(size) is int:
        return size
    found = graph.call_function(_aten.sym_size.int, (node, dim))
    found.meta["val"] = size
    return found


def _view(graph: Graph, node: Node, sizes: list[Any], shape: Any) -> Node:
    made = graph.call_function(_aten.view.default, (node, sizes))
    made.meta["val"] = node.meta["val"].view(shape)
    made.meta["tensor_meta"] = _extract_tensor_metadata(made.meta["val"])
    return made
