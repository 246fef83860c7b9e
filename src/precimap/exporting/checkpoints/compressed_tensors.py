"""A map as a compressed-tensors checkpoint: what vLLM, SGLang and transformers load.

Invariant: codes and scales are those that the certificate was measured with, in every bit; scales are float32, which vLLM
reads as such. All other tensors are the certified model's, in its dtype, and all other files are copied. The folder is
checked twice before it gets its name: decoded by the formula of the format, and by the linter of the engine that it is for.
The three engines get the same files; what differs is what each may not be given. Not taken: the compressor of the
compressed-tensors library, which quantises by itself.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from precimap.errors import DeployError
from precimap.exporting.checkpoints.decoded import check_decoded
from precimap.exporting.checkpoints.expressed import expressed
from precimap.exporting.checkpoints.same_model import SameModel, same_model
from precimap.exporting.checkpoints.stated import quantization_config
from precimap.exporting.exported import Exported
from precimap.exporting.hf_folder import CONFIG, INDEX, HfFolder, open_folder
from precimap.exporting.linting.lint import lint
from precimap.exporting.shipped import Shipped
from precimap.layers.quantized import QuantizedLayer
from precimap.layers.views import plain_name

NOTES = (
    "The certificate was measured on the form that is named; an engine has its own kernels for the same codes and scales, "
    "its own attention and its own sums. precimap.compare certifies what it serves.",
    "What surrounds the model (tokens, prompts, pooling, a head of the task) was not looked at.",
)


def write(shipped: Shipped, folder: Path) -> Exported:
    """The checkpoint in the folder, and what is said of it.

    Raises DeployError for a map that the engine would misread, for a folder whose weights are not the certified ones,
    ModelError for one that cannot be read.
    """
    source = _source(shipped)
    if "quantization_config" in source.config:
        raise DeployError(f"{source.path}: is quantised already; export from the folder of the original model")
    same = same_model(shipped.task.model, source)
    low = expressed(shipped, same, shipped.to)
    layers = {module: shipped.layers[same.pieces[f"{module}.weight"].name] for module in low}
    rest = _rest(shipped.model, same, layers)
    config = quantization_config(low, _unquantised(shipped.task.model, source, same, layers))
    left_out = _copy(source, folder)
    _write_shards(source, folder, layers, rest)
    _write_config(source, folder, config, shipped)
    check_decoded(open_folder(folder), layers, rest)
    found = lint(folder, engine=shipped.to)
    if found.misread:
        raise DeployError(f"{shipped.to} would misread this checkpoint, so it is not exported: {found.misread[0].said}")
    return Exported(
        to=shipped.to,
        map=shipped.map.fingerprint,
        not_certified=shipped.map.not_certified,
        files=tuple(sorted(str(one.relative_to(folder)) for one in folder.rglob("*") if one.is_file())),
        layers=_runs(shipped),
        inputs=(),
        difference=None,
        engine={"format": "compressed-tensors 0.17", "torch": torch.__version__},
        notes=(*NOTES, *_said_of(same, left_out), *_rounded_scales(shipped), *(one.said for one in found.findings)),
    )


def _source(shipped: Shipped) -> HfFolder:
    """The folder that the model came from: as given, or as its config says."""
    if shipped.checkpoint is not None:
        return open_folder(shipped.checkpoint)
    for module in shipped.task.model.modules():
        path = getattr(getattr(module, "config", None), "_name_or_path", None)
        if isinstance(path, str) and path and Path(path).is_dir():
            return open_folder(path)
    raise DeployError(
        "expected the Hugging Face folder that the model was loaded from; its config names none that is here. Give it by "
        "--checkpoint FOLDER (checkpoint=...)"
    )


def _rest(model: nn.Module, same: SameModel, layers: Mapping[str, QuantizedLayer]) -> dict[str, Tensor]:
    """Stored name -> the certified model's tensor, of all that is not quantised."""
    own = {plain_name(name): tensor for name, tensor in model.state_dict(keep_vars=True).items()}
    low = {f"{module}.weight" for module in layers}
    return {stored: piece.of(own[piece.name].detach()) for stored, piece in same.pieces.items() if stored not in low}


def _unquantised(model: nn.Module, source: HfFolder, same: SameModel, layers: Mapping[str, QuantizedLayer]) -> set[str]:
    """Stored names of every Linear that keeps its values, experts and the folder's other parts included."""
    kinds = {same.stored_name(plain_name(name)): module for name, module in model.named_modules()}
    found = {name for name, module in kinds.items() if name is not None and isinstance(module, nn.Linear)}
    found |= {
        name.removesuffix(".weight")
        for name, stored in source.tensors.items()
        if name.endswith(".weight") and len(stored.shape) == 2
    }
    return {name for name in found if name not in layers and not isinstance(kinds.get(name), nn.Embedding)}


def _copy(source: HfFolder, folder: Path) -> list[Path]:
    """All files without weights; returns what was left out."""
    without, weights = source.others()
    for path in without:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.path / path, folder / path)
    return weights


def _write_shards(
    source: HfFolder, folder: Path, layers: Mapping[str, QuantizedLayer], rest: Mapping[str, Tensor]
) -> None:
    """The folder's files under their names, one in memory at a time; and their index where there is one."""
    where, total = dict[str, str](), 0
    for file in source.files:
        made: dict[str, Tensor] = {}
        with source.opened(file) as read:
            for name in (name for name, at in source.tensors.items() if at.file == file):
                layer = layers.get(name.removesuffix(".weight"))
                if layer is None or not name.endswith(".weight"):
                    made[name] = rest[name] if name in rest else read.get_tensor(name)
                    continue
                made[name], made[f"{name}_scale"] = layer.codes, layer.weight_affine.scale.float()
        made = {name: tensor.detach().cpu().contiguous() for name, tensor in made.items()}
        save_file(_apart(made), str(folder / file), metadata={"format": "pt"})
        where |= dict.fromkeys(made, file)
        total += sum(tensor.nbytes for tensor in made.values())
    if (source.path / INDEX).exists():
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each in memory of its own: a file has no two names for one tensor."""
    seen, apart = set[int](), dict[str, Tensor]()
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return apart


def _write_config(source: HfFolder, folder: Path, quantised: Mapping[str, Any], shipped: Shipped) -> None:
    base = shipped.base
    config = {"torch_dtype": base, **_in_dtype(source.config, base), "quantization_config": quantised}
    if "dtype" in config:
        del config["torch_dtype"]
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _in_dtype(config: Mapping[str, Any], base: str) -> dict[str, Any]:
    """The config, and those of the parts of the model, with the dtype that the files have."""
    return {
        key: _in_dtype(value, base) if isinstance(value, dict) else base if key in ("dtype", "torch_dtype") else value
        for key, value in config.items()
    }


def _runs(shipped: Shipped) -> dict[str, str]:
    """What the checkpoint has of each layer of the map."""
    base = shipped.base
    forms = {"int8": "INT8 channel x dynamic token", "fp8": "FP8 channel x dynamic token"}
    return {
        name: forms.get(shipped.layers[name].scheme.name, base) if name in shipped.layers else base
        for name in shipped.map.layers
    }


def _rounded_scales(shipped: Shipped) -> list[str]:
    if shipped.to != "transformers" or shipped.base == "float32":
        return []
    return [
        "transformers rounds scales to the model's dtype when it loads: in bfloat16 each row of a weight is off by up to "
        "0.4 %, which was not certified. Loaded with dtype=torch.float32 its weights are the certified ones, in every bit."
    ]


def _said_of(same: SameModel, left_out: list[Path]) -> list[str]:
    said = []
    if same.folder_only:
        said.append(
            f"{len(same.folder_only)} tensors of the folder are no part of the certified model and are copied as they "
            f"are: {', '.join(same.folder_only[:3])}"
        )
    if same.model_only:
        said.append(f"Not in these files, for the folder has no place for it: {', '.join(same.model_only[:3])}")
    if left_out:
        said.append(
            f"Not copied, for they hold the original weights in other forms: {', '.join(str(one) for one in left_out[:5])}"
        )
    return said
