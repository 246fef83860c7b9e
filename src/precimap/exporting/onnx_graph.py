"""The graph that torch.onnx.export makes of a traced model, made one that a person and an engine can read.

Invariant: only names and constants are touched. Views of codes that the graph would compute at each start (a transpose,
one third of a packed projection) become the codes themselves; nothing that is quantised is folded to floats. Each
product of a layer in low precision is then looked at: it reads codes through DequantizeLinear, and its input, where the
scheme has one, through a pair of QuantizeLinear and DequantizeLinear; what an optimiser took out is an error here.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from precimap.errors import DeployError
from precimap.exporting.onnx_kernel import INPUT, LAYER, PRODUCT, ROLE, WEIGHT
from precimap.layers.quantized import QuantizedLayer

_VIEWS = {"Transpose", "Reshape", "Slice", "Squeeze", "Unsqueeze", "Gather", "Identity", "Expand"}
_PARTS = {INPUT: ("", "input_scale", "input_zero"), WEIGHT: ("codes", "scale", "zero")}
EXTERNAL_FROM = 1_500_000_000  # bytes of constants; a protobuf ends at 2 GB


def tidied(model: Any, layers: Mapping[str, QuantizedLayer], sizes: Sequence[Sequence[str]]) -> dict[str, list[str]]:
    """Fold views of codes, name what belongs to a layer after it, and sizes that vary after `sizes` (of each input), in
    place. Returns layer -> names of its products.

    Raises DeployError for a product that is not one of the layer's codes.
    """
    from onnxscript import optimizer

    _split_constants(model.graph)
    optimizer.fold_constants(  # codes of any size
        model, input_size_limit=2**40, output_size_limit=2**40, should_fold=lambda node: node.op_type in _VIEWS
    )
    optimizer.remove_unused_nodes(model)
    _name_sizes(model.graph, sizes)
    products: dict[str, list[str]] = {name: [] for name in layers}
    for node in model.graph:
        if node.metadata_props.get(ROLE) == PRODUCT:
            layer = layers[node.metadata_props[LAYER]]
            _check(node, layer)
            found = products[layer.name]
            node.name = layer.name if not found else f"{layer.name}#{len(found) + 1}"
            found.append(node.name)
            for number, (reader, _) in enumerate(node.outputs[0].uses()):  # which engines name a fused product after
                if reader.op_type == "Add":
                    reader.name = f"{node.name}/bias" + (str(number) if number else "")
            _name_parts(model.graph, node)
    _name_tables(model.graph, layers)
    return products


def _split_constants(graph: Any) -> None:
    """Parts of a packed weight as constants of their own, which the optimiser does of operators with one output alone."""
    import onnx_ir

    for node in list(graph):
        held = node.inputs[0].const_value if node.op_type == "Split" else None
        sizes = node.inputs[1].const_value if len(node.inputs) > 1 and node.inputs[1] is not None else None
        if held is None or (sizes is None and "num_outputs" not in node.attributes):
            continue
        axis, whole = node.attributes["axis"].value if "axis" in node.attributes else 0, held.numpy()
        each = -(-whole.shape[axis] // len(node.outputs))
        ends = np.cumsum([each] * len(node.outputs) if sizes is None else sizes.numpy())[:-1]
        for place, (output, part) in enumerate(zip(node.outputs, np.split(whole, ends, axis), strict=True)):
            name = f"{node.inputs[0].name}.part{place}"
            made = onnx_ir.Value(name=name, const_value=onnx_ir.tensor(np.ascontiguousarray(part), name=name))
            made.shape, made.type = onnx_ir.Shape(part.shape), output.type
            graph.register_initializer(made)
            output.replace_all_uses_with(made)
        graph.remove(node, safe=True)


def _check(node: Any, layer: QuantizedLayer) -> None:
    """Raises DeployError for a product that is not one of the layer's codes and of an input as the map has it."""
    values, weight = node.inputs[0].producer(), node.inputs[1].producer()
    held, *affine = _constants(weight, "DequantizeLinear")
    if held is None or held.itemsize != 1:
        raise DeployError(f"{layer.name}: expected a product with codes in the graph, found one with other values")
    if not np.isin(affine[0], layer.weight_affine.scale.numpy()).all() or (len(affine) > 1 and np.any(affine[1])):
        raise DeployError(f"{layer.name}: expected the map's scales in the graph, found others")
    own = layer.codes.contiguous().view(torch.uint8).numpy()
    if held.size == own.size and not np.array_equal(_counts(held.view(np.uint8)), _counts(own)):
        raise DeployError(f"{layer.name}: expected the map's codes in the graph, found others")
    static = layer.input_range
    if static is None:
        return
    quantised = None if values is None else values.inputs[0].producer()
    for one, operator in ((values, "DequantizeLinear"), (quantised, "QuantizeLinear")):
        _, *range_ = _constants(one, operator)
        if [float(part) for part in range_] != [float(np.float32(static.scale)), float(static.zero)]:
            raise DeployError(
                f"{layer.name}: expected its input through QuantizeLinear and DequantizeLinear of scale {static.scale:g} "
                f"and zero {static.zero}, found {'another input' if one is None else f'{one.op_type} of {range_}'}"
            )


def _constants(node: Any, operator: str) -> list[Any]:
    """Of each input of the node its values, or None where it is computed; [None] of another operator."""
    if node is None or node.op_type != operator:
        return [None]
    return [
        None if given.const_value is None else given.const_value.numpy() for given in node.inputs if given is not None
    ]


def _counts(codes: Any) -> Any:
    """How often each code is there, in whatever order."""
    return np.bincount(codes.reshape(-1), minlength=256)


def _name_parts(graph: Any, product: Any) -> None:
    """`deep.weight.codes`, `deep.weight.scale`, `deep.weight.input_scale`; what layers share has the name of the first."""
    for value in product.inputs:
        node = value.producer()
        if node is None:
            continue
        parts: tuple[str, ...] = _PARTS.get(node.metadata_props.get(ROLE), ())
        for part, constant in zip(parts, node.inputs, strict=False):
            if part and constant is not None and constant.name in graph.initializers:
                name = f"{product.name}.{part}"
                if name not in graph.initializers and not constant.name.endswith(f".{part}"):
                    constant.name = name


def _name_tables(graph: Any, layers: Mapping[str, QuantizedLayer]) -> None:
    """`words.weight.codes`, which torch.export has as `words.parametrizations.weight.original0`."""
    for name, layer in layers.items():
        module, _, attribute = name.rpartition(".")
        affine = layer.weight_affine
        parts = ["codes", "scale", *(["zero"] if affine.zero is not None else ())]
        parts += [*(["offset"] if affine.offset is not None else ()), *(["wide"] if layer.keeps else ())]
        for number, part in enumerate(parts):
            prefix = f"{module}." if module else ""
            constant = graph.initializers.get(f"{prefix}parametrizations.{attribute}.original{number}")
            if constant is not None:
                constant.name = f"{name}.{part}"


def _name_sizes(graph: Any, sizes: Sequence[Sequence[str]]) -> None:
    names: dict[str, str] = {}
    for value, said in zip(graph.inputs, sizes, strict=True):
        for dim, size in zip(value.shape or (), said, strict=True):
            if not isinstance(dim, int) and dim.value is not None and not size.isdigit():
                names.setdefault(dim.value, size)
    values = [*graph.inputs, *graph.outputs, *(value for node in graph for value in node.outputs)]
    for value in values:
        for place, dim in enumerate(value.shape or ()):
            if not isinstance(dim, int) and dim.value is not None:
                value.shape[place] = re.sub(r"\w+", lambda word: names.get(word[0], word[0]), dim.value)


def save(program: Any, path: Path) -> tuple[str, ...]:
    """Names of the files. Raises OSError."""
    size = sum(value.const_value.nbytes for value in program.model.graph.initializers.values())
    program.save(str(path), external_data=size > EXTERNAL_FROM)
    return tuple(sorted(one.name for one in path.parent.iterdir()))
