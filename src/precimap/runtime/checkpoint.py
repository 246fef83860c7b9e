"""The deployed model in one safetensors file: codes, scales and everything that stayed in base precision.

Invariant: what is loaded computes the same bits as what was saved, on the same machine. Packed kernel forms do not travel
(oneDNN's cannot); they are made again at load. Layout: base tensors under their own names; for a low-precision layer
`<name>.codes`, `<name>.scale` and, with a zero point, `<name>.zero` or, for rows of a table, `<name>.offset`; the map is
JSON in the file's metadata. Pickle is not read or written.
"""

from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from precimap.durable import write_bytes
from precimap.errors import MapError
from precimap.layers.copying import shared_copy
from precimap.layers.quantized import QuantizedLayer, shipped_range
from precimap.layers.realign import realigned
from precimap.layers.views import parameter_names, plain_name
from precimap.numerics.quantize import Affine, storage_dtype
from precimap.precision_map import PrecisionMap
from precimap.runtime.deploy import build, deployed_layers, deployment_of, watch_batches

METADATA_KEY = "precimap_map"


def save_deployed(deployed: nn.Module, base: nn.Module, path: str | Path) -> None:
    """Write a deployed model; `base` is the model it was deployed from. Raises DeployError, SaveError."""
    carried = deployment_of(deployed)
    layers = deployed_layers(deployed)
    tensors = _base_tensors(realigned(base, carried.map.realignment), set(layers))
    for name, layer in layers.items():
        tensors[f"{name}.codes"] = layer.codes
        tensors[f"{name}.scale"] = layer.weight_affine.scale
        if layer.weight_affine.zero is not None:
            tensors[f"{name}.zero"] = layer.weight_affine.zero
        if layer.weight_affine.offset is not None:
            tensors[f"{name}.offset"] = layer.weight_affine.offset
    contents = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_bytes(Path(path), save(contents, {METADATA_KEY: carried.map.model_dump_json()}))


def load_deployed(model: nn.Module, path: str | Path, *, target: str | None = None) -> nn.Module:
    """Read a deployed model; `model` gives the architecture, its own weights are neither read nor changed.

    Raises MapError for a file that is not such a checkpoint or does not fit the model, DeployError as `deploy` does.
    """
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(METADATA_KEY)
            if text is None:
                raise MapError(
                    f"{path}: expected a checkpoint that precimap wrote, got a safetensors file without a map"
                )
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise MapError(f"{path}: cannot be read as safetensors ({error})") from error
    precision_map = PrecisionMap.parse(text, str(path))
    layers = {name: _layer(name, precision_map, tensors, str(path)) for name in precision_map.low}
    model = realigned(model, precision_map.realignment)  # it may have got a bias; all values come from the file
    loaded = _with_base_tensors(model, tensors, layers, str(path))
    deployed = build(loaded, precision_map, layers, target or precision_map.target)
    watch_batches(deployed)
    return deployed


def _base_tensors(base: nn.Module, low: set[str]) -> dict[str, Tensor]:
    """Every tensor that stayed, once: safetensors refuses two names for one storage."""
    tensors: dict[str, Tensor] = dict(parameter_names(base))
    tensors.update({plain_name(name): buffer for name, buffer in base.named_buffers()})
    return {name: tensor.clone() for name, tensor in tensors.items() if name not in low}


def _layer(name: str, precision_map: PrecisionMap, tensors: dict[str, Tensor], path: str) -> QuantizedLayer:
    scheme, decision = precision_map.scheme_of(name), precision_map.layers[name]
    codes, scale = tensors.get(f"{name}.codes"), tensors.get(f"{name}.scale")
    if scheme is None or codes is None or scale is None:
        raise MapError(
            f"{path}: layer {name} has no codes or no scale in the file; it is cut or not a precimap checkpoint"
        )
    if codes.dtype != storage_dtype(scheme.weight.format) or tuple(codes.shape) != decision.shape:
        raise MapError(
            f"{path}: layer {name}: expected codes {storage_dtype(scheme.weight.format)} {decision.shape}, "
            f"got {codes.dtype} {tuple(codes.shape)}"
        )
    zero, offset = tensors.get(f"{name}.zero"), tensors.get(f"{name}.offset")
    if (offset is None) != (scheme.rows is None):
        raise MapError(f"{path}: layer {name}: offsets and scheme {scheme.name} do not belong together")
    return QuantizedLayer(name, scheme, codes, Affine(scale, zero, offset), shipped_range(decision))


def _with_base_tensors(
    model: nn.Module, tensors: dict[str, Tensor], layers: dict[str, QuantizedLayer], path: str
) -> nn.Module:
    """A tree like the model's whose parameters and buffers are those of the file."""
    copied = shared_copy(model)
    for owner_name, module in copied.named_modules():
        slots: list[dict[str, Tensor | None]] = [module._parameters, module._buffers]
        for slot in slots:
            for attribute, value in slot.items():
                name = plain_name(f"{owner_name}.{attribute}".lstrip("."))
                if value is None or name in layers:
                    continue
                if name not in tensors:
                    raise MapError(
                        f"{path}: the model has {name}, the file has not; it belongs to another architecture"
                    )
                if tensors[name].shape != value.shape:
                    raise MapError(
                        f"{path}: {name}: the model has {tuple(value.shape)}, the file {tuple(tensors[name].shape)}"
                    )
                # Copied: in the file a tensor lies at any address, and float products round by the alignment of theirs.
                tensor = tensors[name].to(value.device, copy=True)
                slot[attribute] = nn.Parameter(tensor, requires_grad=False) if slot is module._parameters else tensor
    return copied
