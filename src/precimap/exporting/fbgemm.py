"""Embedding tables as FBGEMM and torchrec hold them: the rows of each, and a list that names every table.

Invariant: every table of the model is in the list, also those that stay as they are, because torchrec takes one that it
does not find for INT8. Rows are the codes, scales and offsets that were measured; FBGEMM's operator for inference holds
scale and offset in float16, so `int8-row`, whose two are float32, is refused: its 8 bytes would be read as 4, and sums
be off without a word (seen with fbgemm-gpu-cpu 1.8). Not taken: one packed tensor a table, as torch's operators read it;
FBGEMM's setter takes codes and parameters apart.

Files. tables.safetensors: `<table>.codes` uint8 [rows, bytes] and `<table>.scale_shift` uint8 [rows, 4], a little-endian
float16 scale and offset, as `IntNBitTableBatchedEmbeddingBagsCodegen.assign_embedding_weights` takes them; `<table>`
itself of the others. <table>: its parameter. tables.json: for each table its dtype as FBGEMM's SparseType and as
torchrec's `per_table_weight_dtype` name it.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from precimap.decisions import LOOKUPS
from precimap.errors import DeployError
from precimap.exporting.exported import Exported
from precimap.exporting.shipped import Shipped
from precimap.layers.quantized import QuantizedLayer
from precimap.layers.views import parameter_names
from precimap.numerics.rows import pack_rows
from precimap.numerics.schemes import SCHEMES

TENSORS, LIST = "tables.safetensors", "tables.json"
_SPARSE = {torch.float32: "FP32", torch.float16: "FP16", torch.bfloat16: "BF16"}
_PARAMETERS = 4  # bytes of a row's scale and offset


def write(shipped: Shipped, folder: Path) -> Exported:
    """The two files. Raises DeployError for a map that holds more than tables, or tables that FBGEMM would misread."""
    reason = _refusal(shipped)
    if reason is not None:
        raise DeployError(reason)
    weights = parameter_names(shipped.model)
    tables = [name for name, decision in shipped.map.layers.items() if LOOKUPS.issuperset(decision.ops)]
    tensors, listed = dict[str, Tensor](), dict[str, dict[str, object]]()
    for name in tables:
        layer = shipped.layers.get(name)
        listed[name] = _listed(weights[name], layer)
        if layer is None:
            tensors[name] = weights[name].detach().contiguous()
        else:
            rows = _rows(layer)
            tensors[f"{name}.codes"] = rows[:, :-_PARAMETERS].contiguous()
            tensors[f"{name}.scale_shift"] = rows[:, -_PARAMETERS:].contiguous()
    save_file(tensors, folder / TENSORS)
    (folder / LIST).write_text(json.dumps(listed, indent=2) + "\n")
    return Exported(
        to="fbgemm",
        map=shipped.map.fingerprint,
        not_certified=shipped.map.not_certified,
        files=(TENSORS, LIST),
        layers={name: _runs(name, listed) for name in shipped.map.layers},
        inputs=(),
        difference=None,
        engine={"torch": torch.__version__},
        notes=(
            "The files hold the tables alone; what the model does with their rows is served by something else, and "
            "was not compared here.",
            "Read the dtype of every table from tables.json: torchrec makes one that its own list does not name INT8.",
        ),
    )


def _refusal(shipped: Shipped) -> str | None:
    others = [name for name, layer in shipped.layers.items() if layer.scheme.rows is None]
    if others or shipped.map.cast is not None or shipped.map.realignment is not None:
        what = (
            f"layers in other schemes ({', '.join(others[:3])})" if others else "a cast or a realignment of the model"
        )
        return f"fbgemm files hold tables alone, and the map has {what}; export it to aoti, which holds the whole model"
    wide = [name for name, layer in shipped.layers.items() if layer.scheme.rows != SCHEMES["int4-row"].rows]
    if wide:
        return (
            f"{', '.join(wide[:3])}: FBGEMM reads a row's scale and offset as float16, and "
            f"{shipped.layers[wide[0]].scheme.name} has them in float32; search with int8-row-half or int4-row, or "
            "export to aoti"
        )
    return None


def _rows(layer: QuantizedLayer) -> Tensor:
    assert layer.scheme.rows is not None
    return pack_rows(layer.codes, layer.weight_affine, layer.scheme.weight.format, layer.scheme.rows)


def _listed(weight: Tensor, layer: QuantizedLayer | None) -> dict[str, object]:
    rows, width = weight.shape
    if layer is None:
        return {"rows": rows, "width": width, "fbgemm": _SPARSE[weight.dtype], "torchrec": str(weight.dtype)}
    bits = layer.scheme.weight_bits
    return {
        "rows": rows,
        "width": width,
        "fbgemm": f"INT{bits}",
        "torchrec": "torch.qint8" if bits == 8 else "torch.quint4x2",
        "scale_bias_size_in_bytes": _PARAMETERS,
    }


def _runs(name: str, listed: dict[str, dict[str, object]]) -> str:
    return f"{listed[name]['fbgemm']} rows" if name in listed else "not in these files"
