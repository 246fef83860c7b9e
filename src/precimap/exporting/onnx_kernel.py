"""How a layer in low precision is written in ONNX: kernels whose products are ONNX's own operators.

Invariant: they exist while torch.export traces, and compute nothing. A static input becomes QuantizeLinear and
DequantizeLinear, a weight DequantizeLinear over its codes, and the product one node that carries the layer's name. Its form
is the one that engines fuse to INT8, which was tried out on ONNX Runtime 1.32: MatMul for stacks of rows; for plain rows
Gemm without a bias, which is added after it, and weights with zero points. MatMul and Add over plain rows it makes a float
Gemm of, before it looks for INT8.

ONNX Runtime has no BF16 product on CPUs. A BF16 layer is written as what it means: operands rounded to BF16, a float32
product, its result rounded once. Not taken: torch's `quantized_decomposed` operators, which are INT8's alone, and whose
translation leaves the form of the product to the translator.
"""

from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from precimap.errors import DeployError
from precimap.layers.quantized import QuantizedLayer
from precimap.numerics.formats import BF16, E4M3, E4M3_FNUZ, E5M2, INT8, UINT7, UINT8, IntegerFormat
from precimap.numerics.quantize import storage_dtype
from precimap.numerics.schemes import Granularity, Scheme
from precimap.runtime.weights.half import HalfKernel
from precimap.runtime.weights.low_weight import AFFINE, LowWeight
from precimap.runtime.weights.placing import on_cpu, weight_of
from precimap.runtime.weights.products import CALLS, CodedKernel, scales_of

LAYER, ROLE = "precimap.layer", "precimap.role"  # of a node: which layer it is of, and what it does for it
INPUT, WEIGHT, PRODUCT = "input", "weight", "product"
OPSET = 21
_aten = torch.ops.aten
_FLOATS = {E4M3, E5M2}


def scheme_refusal(scheme: Scheme) -> str | None:
    """Why ONNX's standard operators cannot say what the scheme computes, or None."""
    if E4M3_FNUZ in (scheme.weight.format, scheme.input and scheme.input.format):
        return "no engine that reads ONNX multiplies AMD's FP8; fp8-static is what ONNX has"
    if scheme.result is not None or scheme.input is None:
        return None
    if scheme.input.dynamic:
        nearest = "int8-static" if scheme.weight.format == INT8 else "fp8-static"
        other = ", or --to aoti, which serves int8" if scheme.weight.format == INT8 else ""
        return f"ONNX quantises inputs with static scales alone; certify a map with {nearest}{other}"
    if scheme.input.granularity is not Granularity.PER_TENSOR or scheme.input.format not in (UINT8, UINT7, E4M3):
        return "QuantizeLinear is used with one scale for an input, in unsigned INT8 or E4M3"
    return None


class OnnxKernel(CodedKernel):
    """Integers and FP8: weights alone, or with a static input."""

    name = "ONNX_KERNEL"

    def rows(self, x: Tensor, weight: LowWeight, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        name = weight.how.name
        if weight.affine.zero is not None or weight.affine.offset is not None:  # rows of a table, which has no input
            return F.linear(x.float(), weight.dequantize(), None if bias is None else bias.float()).to(dtype)
        codes, scales = weight.codes.t(), scales_of(weight)
        if scales is None:
            raise DeployError(f"{name}: expected one scale for each output of its products")
        single = weight.parts["scale"].numel() == 1
        given = weight.parts["scale"].reshape(()) if single else scales
        wide = _dequantised(codes, given, _no_zero(codes, given), {} if single else {"axis": 1}, name)
        plain = x.dim() < 3
        values = _rounded_input((x if x.dim() > 1 else x.unsqueeze(0)).float(), weight)
        product = torch.onnx.ops.symbolic(
            "Gemm" if plain else "MatMul",
            (values, wide),
            dtype=torch.float32,
            shape=(*values.shape[:-1], codes.shape[1]),
            version=OPSET,
            metadata_props={LAYER: name, ROLE: PRODUCT},
        )
        product = product if x.dim() > 1 else product.squeeze(0)
        return (product if bias is None else product + bias.float()).to(dtype)

    def values(self, weight: LowWeight) -> Tensor:
        """Of readers that are no products. Raises DeployError where they would read an input unrounded."""
        if weight.how.scheme.computes_low:
            raise DeployError(
                f"{weight.how.name}: something reads it that is no product of matrices; ONNX has it in base precision alone"
            )
        codes, affine = weight.codes, weight.affine
        if affine.offset is not None:
            return (codes.double() * affine.scale.double() + affine.offset.double()).float()
        return codes.float() * affine.scale

    def product(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is _aten.embedding.default and isinstance(args[0], LowWeight):
            return _looked_up(args[0], args[1])
        return super().product(func, args, kwargs)


def _rounded_input(x: Tensor, weight: LowWeight) -> Tensor:
    """Through the codes of a static input; the input itself under a scheme without one."""
    static, rounding, name = weight.how.input_range, weight.how.scheme.input, weight.how.name
    if rounding is None:
        return x
    if static is None:
        raise DeployError(f"{name}: expected a static input scale, got scheme {weight.how.scheme.name}")
    # Made by operators, for a traced call may know no constants of its own.
    scale, dtype = torch.full((), static.scale, dtype=torch.float32), storage_dtype(rounding.format)
    zero = torch.full((), static.zero if isinstance(rounding.format, IntegerFormat) else 0, dtype=dtype)
    if rounding.format == UINT7:  # QuantizeLinear ends at 255
        x = x.clamp(max=static.scale * (UINT7.maximum - static.zero))
    codes = torch.onnx.ops.symbolic(
        "QuantizeLinear",
        (x, scale, zero),
        dtype=dtype,
        shape=x.shape,
        version=OPSET,
        metadata_props={LAYER: name, ROLE: INPUT},
    )
    return torch.onnx.ops.symbolic(
        "DequantizeLinear",
        (codes, scale, zero),
        dtype=torch.float32,
        shape=x.shape,
        version=OPSET,
        metadata_props={LAYER: name, ROLE: INPUT},
    )


def _no_zero(codes: Tensor, scales: Tensor) -> Tensor | None:
    """Zero points that change nothing, where an engine fuses no product without them."""
    return torch.zeros(scales.shape, dtype=torch.int8) if codes.dtype == torch.int8 else None


def _dequantised(codes: Tensor, scales: Tensor, zero: Tensor | None, attributes: dict[str, Any], name: str) -> Tensor:
    return torch.onnx.ops.symbolic(
        "DequantizeLinear",
        (codes, scales) if zero is None else (codes, scales, zero),
        attributes,
        dtype=torch.float32,
        shape=codes.shape,
        version=OPSET,
        metadata_props={LAYER: name, ROLE: WEIGHT},
    )


def _looked_up(weight: LowWeight, ids: Tensor) -> Tensor:
    """Rows of a table: their codes are read, and these decoded; those of a tied one are the parameter's."""
    if "wide" in weight.parts:
        return F.embedding(ids, weight.parts["wide"])
    parts = {
        name: F.embedding(ids, part) if part.dim() > 1 and part.shape[0] > 1 else part
        for name, part in weight.canonical().items()
        if name == "codes" or name in AFFINE
    }
    return LowWeight(parts, weight.how, weight.outward, root=False).dequantize().to(weight.outward)


def products_of(program: ExportedProgram) -> tuple[set[str], set[str]]:
    """Layers that a traced program multiplies through `OnnxKernel`, and those of them whose result reaches an output."""
    operator, live, made = torch.ops.onnx_symbolic._symbolic.default, set[Any](), set[str]()
    for node in reversed(program.graph.nodes):
        if node.op == "output" or node in live:
            live.update(node.all_input_nodes)
    alive = set[str]()
    for node in program.graph.nodes:
        if node.target is not operator:
            continue
        said = dict(zip(node.kwargs["metadata_props_keys"], node.kwargs["metadata_props_values"], strict=True))
        if said.get(ROLE) == PRODUCT:
            made.add(said[LAYER])
            alive.update({said[LAYER]} if node in live else ())
    return made, alive


class RoundedKernel(HalfKernel):
    """BF16, as what it means; FP16 as engines multiply it."""

    name = "ROUNDED_KERNEL"

    def rows(self, x: Tensor, weight: LowWeight, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        if weight.how.scheme.result != BF16:
            return super().rows(x, weight, bias, dtype)
        given = None if bias is None else _through_bf16(bias)
        return _through_bf16(F.linear(_through_bf16(x), weight.codes.float(), given)).to(dtype)

    def product(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        weights = [value for value in (*args, *kwargs.values()) if isinstance(value, LowWeight)]
        if weights[0].how.scheme.result != BF16 or len(weights) > 1 or func not in CALLS:
            return super().product(func, args, kwargs)
        if func is _aten.embedding.default:
            return _looked_up(*args[:2])

        def given(value: Any) -> Any:
            if isinstance(value, LowWeight):
                return value.codes.float()
            return _through_bf16(value) if isinstance(value, Tensor) and value.is_floating_point() else value

        args, kwargs = tree_map(given, (args, kwargs))
        return _through_bf16(func(*args, **kwargs)).to(weights[0].outward)


def _through_bf16(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).float()


ONNX_KERNEL, ROUNDED_KERNEL = OnnxKernel(), RoundedKernel()


def weight_in_onnx(layer: QuantizedLayer, parameter: Tensor) -> LowWeight:
    """What stands for a parameter while the model is traced."""
    kernel = ROUNDED_KERNEL if layer.scheme.result is not None else ONNX_KERNEL
    return weight_of(layer, on_cpu(parameter, layer.name), kernel)
