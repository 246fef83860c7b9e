"""The same float32 model and inputs in other engines, each quantised by its own tools, on one thread.

ONNX Runtime: the graph of torch.onnx.export after `quant_pre_process`, with attention written out in products, which it runs
faster than what the fused operator is exported to (its optimiser for BERT finds no attention in either and made it slower).
INT8 is static (QDQ, every operator that it takes by default, ranges from the inputs) and dynamic. OpenVINO: from the torch
module, which keeps attention one operator; INT8 by NNCF's post-training quantisation on the same inputs, what it leaves in
float32 or BF16. One thread each and none that spins, so that the CPU time of the process is that of the work.
"""

import contextlib
import copy
import io
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Inputs = tuple[Tensor, ...]
NEEDED = "the engines that this compares with are not installed: pip install 'precimap[bench]' (%s)"


def engines(model: nn.Module, inputs: Inputs) -> dict[str, Callable[[], Tensor]]:
    """Form -> one call of the model with these inputs. Raises ImportError where the `bench` extra is missing."""
    try:
        with _quiet():
            return onnxruntime(model, inputs) | openvino(model, inputs)
    except ImportError as error:
        raise ImportError(NEEDED % error) from error


def onnxruntime(model: nn.Module, inputs: Inputs) -> dict[str, Callable[[], Tensor]]:
    """Float32, INT8 static and INT8 dynamic."""
    import onnxruntime as ort
    import onnxscript  # noqa: F401  # what torch.onnx.export needs: missing, it is named here
    from onnxruntime.quantization import QuantType, quantize_dynamic, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    names = [f"input_{number}" for number in range(len(inputs))]
    feed = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    for pool in ("intra_op", "inter_op"):
        options.add_session_config_entry(f"session.{pool}.allow_spinning", "0")
    with tempfile.TemporaryDirectory() as folder:
        exported, fp32, static, dynamic = (str(Path(folder, f"{name}.onnx")) for name in ("as", "fp32", "qdq", "dyn"))
        written_out = _attention_in_products(model)
        with torch.no_grad():
            torch.onnx.export(written_out, inputs, exported, input_names=names, external_data=False, verbose=False)
        quant_pre_process(exported, fp32, skip_symbolic_shape=True)
        int8: dict[str, Any] = {"per_channel": True, "weight_type": QuantType.QInt8}
        quantize_static(fp32, static, _Once(feed), activation_type=QuantType.QUInt8, **int8)
        quantize_dynamic(fp32, dynamic, **int8)
        sessions = {
            form: ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            for form, path in (("fp32", fp32), ("int8 static", static), ("int8 dynamic", dynamic))
        }
    return {f"onnxruntime {form}": partial(_ort_call, session, feed) for form, session in sessions.items()}


def openvino(model: nn.Module, inputs: Inputs) -> dict[str, Callable[[], Tensor]]:
    """BF16, and INT8 in float32 and in BF16."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # a benchmark tells nobody that it ran
    import nncf
    import openvino as ov

    values = [tensor.numpy() for tensor in inputs]
    with torch.no_grad():
        base = ov.convert_model(
            copy.deepcopy(model), example_input=inputs, input=[tuple(tensor.shape) for tensor in inputs]
        )
    transformer = any(isinstance(module, nn.LayerNorm) for module in model.modules())
    low = nncf.quantize(
        base,
        nncf.Dataset([tuple(values) if len(values) > 1 else values[0]]),
        subset_size=1,
        model_type=nncf.ModelType.TRANSFORMER if transformer else None,
    )
    core = ov.Core()
    forms = {}
    for form, graph, rest in (("bf16", base, "bf16"), ("int8 in fp32", low, "f32"), ("int8 in bf16", low, "bf16")):
        settings = {
            "INFERENCE_NUM_THREADS": 1,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": rest,
        }
        request = core.compile_model(graph, "CPU", settings).create_infer_request()
        forms[f"openvino {form}"] = partial(_openvino_call, request, values)
    return forms


class _Once:
    """The calibration data of ONNX Runtime: one batch."""

    def __init__(self, feed: dict[str, Any]) -> None:
        self._left = [feed]

    def get_next(self) -> dict[str, Any] | None:
        return self._left.pop() if self._left else None


def _attention_in_products(model: nn.Module) -> nn.Module:
    copied = copy.deepcopy(model)
    for module in copied.children():
        if hasattr(module, "set_attn_implementation"):  # a model of transformers
            module.set_attn_implementation("eager")
    return copied


def _ort_call(session: Any, feed: dict[str, Any]) -> Tensor:
    return torch.from_numpy(session.run(None, feed)[0])


def _openvino_call(request: Any, values: list[Any]) -> Tensor:
    return torch.from_numpy(request.infer(values, share_inputs=True, share_outputs=True)[0])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Progress bars and advice of the tools, kept from the table."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
