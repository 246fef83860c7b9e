"""The deployed model in one safetensors file: codes, scales and everything that stayed in base precision.

Invariant: what is loaded computes the same bits as what was saved, on the same machine. Packed kernel forms do not travel
(oneDNN's cannot); they are made again at load. Layout: base tensors under their own names; for a low-precision layer
`<name>.codes`, `<name>.scale` and, with a zero point, `<name>.zero` or, for rows of a table, `<name>.offset`; the map is
JSON in the file's metadata, beside a digest of the map and of all names, dtypes, shapes and bytes, which is compared before
anything is made of them. What the digest cannot know (a file that another program wrote) is looked at value by value: a
model whose bits computed something else would not tell. Pickle is not read or written.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from precimap.durable import write_bytes
from precimap.errors import DeployError, MapError
from precimap.fingerprints import modules_of
from precimap.layers.casting import CASTS
from precimap.layers.copying import copied
from precimap.layers.prepared import architecture
from precimap.layers.quantized import QuantizedLayer, shipped_range
from precimap.layers.views import parameter_names, plain_name
from precimap.numerics.fast import parts as cut_in_parts
from precimap.numerics.formats import Format, IntegerFormat
from precimap.numerics.large import LARGEST_PART
from precimap.numerics.quantize import Affine, storage_dtype
from precimap.numerics.schemes import Granularity, Scheme
from precimap.precision_map import Decision, PrecisionMap
from precimap.runtime.deploy import build, deployed_layers, deployment_of, warn_of, watch_batches
from precimap.runtime.weights.low_weight import LowWeight

METADATA_KEY = "precimap_map"
DIGEST_KEY = "precimap_digest"
PARTS = ("codes", "scale", "zero", "offset")


def save_deployed(deployed: nn.Module, base: nn.Module, path: str | Path) -> None:
    """Write a deployed model, all of it; `base`: the model it was deployed from, or its architecture.

    Every value is the deployed model's own. Raises DeployError for a model that is not deployed, or from another
    architecture than `base`, SaveError, MapError.
    """
    carried = deployment_of(deployed)
    layers = deployed_layers(deployed)
    tensors = _base_tensors(deployed, architecture(base, carried.map), layers, bool(carried.elsewhere))
    for name, layer in layers.items():
        tensors[f"{name}.codes"] = layer.codes
        tensors[f"{name}.scale"] = layer.weight_affine.scale
        if layer.weight_affine.zero is not None:
            tensors[f"{name}.zero"] = layer.weight_affine.zero
        if layer.weight_affine.offset is not None:
            tensors[f"{name}.offset"] = layer.weight_affine.offset
    contents = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = carried.map.text()
    write_bytes(Path(path), save(contents, {METADATA_KEY: text, DIGEST_KEY: _digest(contents, text)}))


def load_deployed(model: nn.Module, path: str | Path, *, target: str | None = None) -> nn.Module:
    """Read a deployed model; `model` gives the architecture and its dtypes, its own weights are neither read nor changed.

    Raises MapError for a file that is not such a checkpoint, is damaged or does not fit the model (PremiseMismatch where it
    is other modules with the same tensors), DeployError as `deploy` does. Warns as `deploy` does of a map that is not
    certified.
    """
    text, tensors = _read(path)
    precision_map = PrecisionMap.parse(text, str(path))
    layers = {name: _layer(name, precision_map, tensors, str(path)) for name in precision_map.low}
    given = modules_of(model)
    # The realigned layer may have got a bias; all values come from the file.
    model = architecture(model, precision_map)
    loaded = _with_base_tensors(model, tensors, layers, str(path))
    repaired = "" if precision_map.realignment is None else precision_map.realignment.layer.rpartition(".")[0]
    # With the values of the file, for a module may print some; but for the one that was realigned after it was written down.
    precision_map.check(architecture={**_uncast(modules_of(loaded), precision_map), repaired: given[repaired]})
    deployed = build(loaded, precision_map, layers, target or precision_map.target, owned=False)
    watch_batches(deployed)
    warn_of(precision_map)
    return deployed


def _uncast(modules: Mapping[str, str], precision_map: PrecisionMap) -> dict[str, str]:
    """Modules as they printed themselves before the map cast them: lists of parameters print their dtype."""
    if precision_map.cast is None:
        return dict(modules)
    now, before = str(CASTS[precision_map.cast]), f"torch.{precision_map.premise.base_precision}"
    return {name: printed.replace(now, before) for name, printed in modules.items()}


def _read(path: str | Path) -> tuple[str, dict[str, Tensor]]:
    """The map and the tensors of a file whose digest is theirs."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if METADATA_KEY not in metadata:
                raise MapError(
                    f"{path}: expected a checkpoint that precimap wrote, got a safetensors file without a map"
                )
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        raise MapError(f"{path}: cannot be read as safetensors ({error})") from error
    if metadata.get(DIGEST_KEY) != _digest(tensors, metadata[METADATA_KEY]):
        raise MapError(
            f"{path}: its digest is of other tensors or of another map: the file was damaged or edited, or is from before "
            "digests were written. Take the file as it was written, or deploy the map again"
        )
    return metadata[METADATA_KEY], tensors


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    """SHA-256 of the map's text and of every tensor: name, dtype, shape, bytes. Tensors are contiguous, on the CPU."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name!r} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _held(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter, and every buffer that a state dict holds, once, by its first name."""
    kept = {plain_name(name) for name in model.state_dict(keep_vars=True)}
    found: dict[str, Tensor] = dict(parameter_names(model))
    buffers = {plain_name(name): buffer for name, buffer in model.named_buffers()}
    return found | {name: buffer for name, buffer in buffers.items() if name in kept}


def _base_tensors(
    deployed: nn.Module, base: nn.Module, layers: Mapping[str, QuantizedLayer], elsewhere: bool
) -> dict[str, Tensor]:
    """Every tensor that stayed, once, and the parameters that are kept beside their codes.

    elsewhere: a library's own module has some of the layers, and beside them tables under names of its own, which are then
    taken from `base`. Raises DeployError for a base that knows other tensors than the deployed model.
    """
    tensors, own = {}, _held(deployed)
    for name, given in _held(base).items():
        tensor = own.get(name)
        if tensor is not None and tensor.shape == given.shape:
            if not isinstance(tensor, LowWeight):
                tensors[name] = tensor
            elif layers[name].keeps:
                tensors[name] = tensor.read()
        elif not elsewhere:
            raise DeployError(
                f"expected the model that this one was deployed from, got another architecture: {name} has the shape "
                f"{tuple(given.shape)} there, and {'no tensor' if tensor is None else tuple(tensor.shape)} here"
            )
        elif name not in layers:
            tensors[name] = given
    return tensors


def _layer(name: str, precision_map: PrecisionMap, tensors: Mapping[str, Tensor], path: str) -> QuantizedLayer:
    """A layer's codes and scales, of the dtypes, shapes and ranges that its scheme and its decision say."""
    scheme, decision = precision_map.scheme_of(name), precision_map.layers[name]
    assert scheme is not None
    zeros, offsets = scheme.rows is None and not scheme.weight.symmetric, scheme.rows is not None
    wanted = dict(zip(PARTS, (True, True, zeros, offsets), strict=True))
    parts = {part: tensors.get(f"{name}.{part}") for part in PARTS}
    differing = [part for part in PARTS if (parts[part] is not None) != wanted[part]]
    if differing:
        raise MapError(
            f"{path}: layer {name} in {scheme.name} consists of {' and '.join(p for p in PARTS if wanted[p])}; "
            f"{' and '.join(differing)} {'is' if len(differing) == 1 else 'are'} missing or too many"
        )
    shared = _shared_dims(decision, scheme)
    shape = tuple(1 if dim in shared else size for dim, size in enumerate(decision.shape))
    expected = {"codes": (storage_dtype(scheme.weight.format), decision.shape)}
    for part, tensor in parts.items():
        dtype, size = expected.get(part, (torch.float32, shape))
        if tensor is not None and (tensor.dtype, tuple(tensor.shape)) != (dtype, size):
            raise MapError(
                f"{path}: layer {name}: expected {part} {dtype} {size}, got {tensor.dtype} {tuple(tensor.shape)}"
            )
    codes, scale, zero, offset = (parts[part] for part in PARTS)
    assert codes is not None
    assert scale is not None
    affine, keeps = Affine(scale, zero, offset), decision.keeps(scheme)
    layer = QuantizedLayer(
        name=name, scheme=scheme, codes=codes, weight_affine=affine, input_range=shipped_range(decision), keeps=keeps
    )
    _check_values(layer, path)
    return layer


def _shared_dims(decision: Decision, scheme: Scheme) -> tuple[int, ...]:
    """The dims of the weight over which a scale is shared, as `quantize_layer` has them."""
    if scheme.weight.granularity is Granularity.PER_TENSOR or decision.contracted is None:
        return tuple(range(len(decision.shape)))
    return decision.contracted


def _check_values(layer: QuantizedLayer, path: str) -> None:
    """Raises MapError for codes and scales that no layer has: they would compute, and something else."""
    affine, format = layer.weight_affine, layer.scheme.weight.format
    named = {"scale": affine.scale, "zero": affine.zero, "offset": affine.offset}
    for part, tensor in named.items():
        if tensor is not None and not torch.isfinite(tensor).all():
            raise MapError(f"{path}: layer {layer.name}: its {part} holds NaN or infinity")
    # A row of a table may have the scale 0 or one below it (`numerics.rows`): its values are then around its offset.
    if affine.offset is None and not (affine.scale > 0).all():
        raise MapError(f"{path}: layer {layer.name}: expected scales above zero, got {float(affine.scale.min()):g}")
    if not _are_codes(layer.codes, format):
        raise MapError(f"{path}: layer {layer.name}: it holds codes that {format.name} does not have")


def _are_codes(codes: Tensor, format: Format) -> bool:
    """Whether each is a code of a finite value. NaN is one of E4M3's codes, -128 is none of INT8's."""
    if isinstance(format, IntegerFormat):
        return _within(codes, format.minimum, format.maximum)
    if format.torch_dtype is None:
        return _within(codes, 0, 2**format.bits - 1)
    return all(bool(torch.isfinite(part.float()).all()) for (part,) in cut_in_parts([codes], LARGEST_PART))


def _within(codes: Tensor, low: int, high: int) -> bool:
    """Whether all of some whole numbers are."""
    if not codes.numel():
        return True
    least, most = torch.aminmax(codes)
    return low <= int(least) and int(most) <= high


def _with_base_tensors(
    model: nn.Module, tensors: Mapping[str, Tensor], layers: Mapping[str, QuantizedLayer], path: str
) -> nn.Module:
    """A tree like the model's whose parameters and buffers are those of the file: these, all of them and no others.

    A layer's own parameter, unless it is kept, has no values in the file: there is an empty one in its place, for as
    long as it takes to put the codes there. Buffers that no state dict holds are the model's own, remade by it.
    """
    known = {f"{name}.{part}" for name in layers for part in PARTS}
    held, stands_in = _held(model), dict[int, Any]()
    for name, value in held.items():
        if name in layers:
            _check_shape(layers[name], value, path)
        if name in layers and not layers[name].keeps:
            place = _device_of(value)
            stands_in[id(value)] = nn.Parameter(
                torch.empty((), dtype=value.dtype, device=place).expand(value.shape), False
            )
            continue
        known.add(name)
        tensor = _fitting(tensors.get(name), value, name, path)
        stands_in[id(value)] = nn.Parameter(tensor, False) if isinstance(value, nn.Parameter) else tensor
    for name, buffer in model.named_buffers():
        if id(buffer) not in stands_in:
            stands_in[id(buffer)] = _remade(name, buffer, path)
    unknown = sorted(tensors.keys() - known)
    if unknown:
        raise MapError(
            f"{path}: it has {', '.join(unknown[:3])}, the model has not; it belongs to another architecture"
        )
    return copied(model, stands_in)


def _check_shape(layer: QuantizedLayer, value: Tensor, path: str) -> None:
    if layer.codes.shape != value.shape:
        raise MapError(
            f"{path}: {layer.name}: the model has a parameter {tuple(value.shape)}, the file codes "
            f"{tuple(layer.codes.shape)}; give the architecture that was saved"
        )


def _device_of(value: Tensor) -> torch.device:
    """Where the loaded tensor goes; the values of a model on the meta device go to the CPU."""
    return torch.device("cpu") if value.is_meta else value.device


def _remade(name: str, buffer: Tensor, path: str) -> Tensor:
    """A buffer that is in no state dict. Raises MapError where a skeleton has no values of it."""
    if buffer.is_meta:
        raise MapError(
            f"{path}: {name} is a buffer that is not saved, and the model has it on the meta device, without values; make "
            "the model there for its parameters alone (accelerate's init_empty_weights does so by default)"
        )
    return buffer.detach().clone()


def _fitting(tensor: Tensor | None, value: Tensor, name: str, path: str) -> Tensor:
    """The tensor of the file on the device of the model's own `value`. Raises MapError for none, or one of another kind."""
    if tensor is None:
        raise MapError(f"{path}: the model has {name}, the file has not; it belongs to another architecture")
    found, expected = ((each.dtype, tuple(each.shape)) for each in (tensor, value))
    if found != expected:
        raise MapError(
            f"{path}: {name}: the model has {expected[0]} {expected[1]}, the file {found[0]} {found[1]}; give the "
            "architecture in the precision in which it was saved, such as model.bfloat16()"
        )
    # Copied: in the file a tensor lies at any address, and float products round by the alignment of theirs.
    return tensor.to(_device_of(value), copy=True)
