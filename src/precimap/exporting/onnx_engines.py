"""Engines that run an ONNX file on this CPU, and what of its products they really multiply in low precision.

Invariant: what runs is read off the engine's own graph, the one that it made of the file for this machine: ONNX Runtime's
optimised graph, OpenVINO's executable one. Neither says on its own that a product it could not fuse is computed in float32.
Counting Q/DQ pairs in the file was not taken: they are what is asked for.

    onnxruntime    the CPU provider, as it comes
    openvino       all that has no scheme in the model's own precision, as the map says (INFERENCE_PRECISION_HINT f32)
    openvino-bf16  all of that in BF16, which is OpenVINO's own choice on CPUs that multiply it; not what was certified

Each has as many threads as torch has when it is loaded.
"""

import re
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from precimap.errors import DeployError, first_line

ORT, OPENVINO, OPENVINO_BF16 = "onnxruntime", "openvino", "openvino-bf16"
_ORT_INT8 = {"QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "MatMulInteger", "QLinearConv"}
_ORT_FLOAT = {"Gemm", "MatMul", "FusedGemm", "FusedMatMul", "TransposedMatMul"}
_OPENVINO_PRODUCTS = {"FullyConnected", "MatMul", "Convolution"}
_PRECISIONS = {"u8": "INT8", "i8": "INT8", "bf16": "BF16", "f16": "FP16", "f32": "float32"}
Call = Callable[[Sequence[Tensor]], list[Tensor]]


@dataclass(frozen=True, slots=True, eq=False)
class Running:
    """A file that an engine has loaded. products: name and precision of each product in the graph that it made."""

    engine: str
    version: str
    call: Call
    products: tuple[tuple[str, str], ...]

    def runs(self, name: str) -> str:
        """What the product of that name in the file runs in."""
        whole = re.compile(rf"(?:^|[ ,/]){re.escape(name)}(?:$|[ ,/])")
        found = sorted({how for node, how in self.products if whole.search(node)})
        return " and ".join(found) or "not found in the engine's graph"

    def layer(self, products: Iterable[str]) -> str:
        """What the products of one layer run in."""
        return " and ".join(sorted({self.runs(name) for name in products}))


def onnxruntime(path: Path) -> Running:
    """Raises ImportError without it, DeployError for a file that it does not load."""
    import onnx
    import onnxruntime as ort

    with tempfile.TemporaryDirectory() as folder:
        optimised, options = Path(folder, "optimised.onnx"), ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = torch.get_num_threads()
        options.optimized_model_filepath = str(optimised)
        try:
            session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise DeployError(f"ONNX Runtime {ort.__version__} does not load it: {first_line(error)}") from error
        graph = onnx.load(str(optimised), load_external_data=False).graph
    names = [given.name for given in session.get_inputs()]

    def call(inputs: Sequence[Tensor]) -> list[Tensor]:
        feed = {name: _array(tensor, name) for name, tensor in zip(names, inputs, strict=True)}
        return [torch.from_numpy(found) for found in session.run(None, feed)]

    int8 = [(node.name, "INT8") for node in graph.node if node.op_type in _ORT_INT8]
    wide = [(node.name, "float32") for node in graph.node if node.op_type in _ORT_FLOAT]
    return Running(ORT, ort.__version__, call, (*int8, *wide))


def openvino(path: Path) -> Running:
    """As `onnxruntime`."""
    return _openvino(path, OPENVINO, "f32")


def openvino_bf16(path: Path) -> Running:
    """As `onnxruntime`."""
    return _openvino(path, OPENVINO_BF16, "bf16")


def _openvino(path: Path, name: str, rest: str) -> Running:
    import openvino as ov

    settings = {
        "INFERENCE_PRECISION_HINT": rest,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    version = str(ov.__version__).split("-")[0]
    try:
        compiled: Any = ov.Core().compile_model(str(path), "CPU", settings)
    except RuntimeError as error:
        raise DeployError(f"OpenVINO {version} does not load it: {str(error).strip().splitlines()[-1]}") from error
    names = [given.get_any_name() for given in compiled.inputs]

    def call(inputs: Sequence[Tensor]) -> list[Tensor]:
        feed = {name: _array(tensor, name) for name, tensor in zip(names, inputs, strict=True)}
        found = compiled(feed, share_inputs=True)
        return [torch.from_numpy(found[place].copy()) for place in range(len(compiled.outputs))]

    products = []
    for node in compiled.get_runtime_model().get_ordered_ops():
        said = node.get_rt_info()
        if said["layerType"].value in _OPENVINO_PRODUCTS:
            precision = said["runtimePrecision"].value
            products.append((said["originalLayersNames"].value, _PRECISIONS.get(precision, precision)))
    return Running(name, version, call, tuple(products))


def _array(tensor: Tensor, name: str) -> Any:
    if tensor.dtype == torch.bfloat16:
        raise DeployError(
            f"input {name} is BF16, which NumPy and so these engines do not take from Python; give it in float32"
        )
    return tensor.detach().cpu().contiguous().numpy()


ENGINES: dict[str, Callable[[Path], Running]] = {
    ORT: onnxruntime,
    OPENVINO: openvino,
    OPENVINO_BF16: openvino_bf16,
}
EXTRAS = {ORT: "onnx", OPENVINO: "openvino", OPENVINO_BF16: "openvino"}
