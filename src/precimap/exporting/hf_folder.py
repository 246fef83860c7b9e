"""A Hugging Face folder: its config, the tensors of its safetensors files, and its other files.

Invariant: tensors are known by the headers of the files, which cost nothing to read; values are read one file at a time, so
that a model larger than the memory can be rewritten. Weights in other formats are not read. Not taken: loading the model
by transformers, which renames tensors, ties them and casts them.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from precimap.errors import ModelError

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
# Weights in the files of other loaders, which would go on serving the original beside what is exported.
_OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".ot", ".ckpt")
_OTHER_FOLDERS = ("onnx", "openvino", "original", ".git", ".cache")


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor as a file's header has it; dtype in the words of safetensors, `F8_E4M3`."""

    file: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class HfFolder:
    """tensors: by name, in the order of the files; files: those that hold them."""

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Stored]
    files: tuple[str, ...]

    @contextmanager
    def opened(self, file: str) -> Iterator[Any]:
        """A file, whose `get_tensor(name)` reads one tensor. Raises ModelError for one that cannot be read."""
        with _opened(self.path / file) as read:
            yield read

    def read(self, name: str) -> Tensor:
        """One tensor, alone."""
        with self.opened(self.tensors[name].file) as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    def others(self) -> tuple[list[Path], list[Path]]:
        """Files without weights, and files with weights in other formats or places, relative to the folder."""
        without: list[Path] = []
        weights: list[Path] = []
        for root, folders, names in os.walk(self.path):
            here = Path(root).relative_to(self.path)
            weights += [here / one for one in folders if one in _OTHER_FOLDERS]
            folders[:] = sorted(one for one in folders if one not in _OTHER_FOLDERS)
            for name in sorted(names):
                top = here == Path()
                if top and (name in self.files or name in (CONFIG, INDEX)):
                    continue
                holds = name.endswith(_OTHER_WEIGHTS) or name.endswith(".index.json")
                (weights if top and holds else without).append(here / name)
        return without, weights


def open_folder(path: str | Path) -> HfFolder:
    """The folder. Raises ModelError where config.json or the tensors are missing or cannot be read."""
    folder = Path(path)
    config = _json(folder / CONFIG)
    if (folder / INDEX).exists():
        listed = _json(folder / INDEX).get("weight_map")
        if not isinstance(listed, dict) or not all(_is_name(file) for file in listed.values()):
            raise ModelError(f"{folder / INDEX}: expected a weight_map of tensors to files beside it")
        files = tuple(dict.fromkeys(listed.values()))
    else:
        files = tuple(sorted(one.name for one in folder.glob("*.safetensors")))
        listed = None
    if not files:
        raise ModelError(
            f"{folder}: expected the weights in safetensors files, found none; save the model in that form"
        )
    tensors: dict[str, Stored] = {}
    for file in files:
        with _opened(folder / file) as read:
            for name in read.keys():  # noqa: SIM118 - the file is no mapping
                if name in tensors:
                    raise ModelError(f"{folder}: {name} is in {tensors[name].file} and in {file}; engines read either")
                part = read.get_slice(name)
                tensors[name] = Stored(file, part.get_dtype(), tuple(part.get_shape()))
    missing = sorted(name for name, file in (listed or {}).items() if name not in tensors or tensors[name].file != file)
    if missing:
        raise ModelError(f"{folder / INDEX}: names {missing[0]}, which {listed and listed[missing[0]]} does not hold")
    return HfFolder(path=folder, config=config, tensors=tensors, files=files)


def _is_name(file: Any) -> bool:
    return isinstance(file, str) and Path(file).name == file and file.endswith(".safetensors")


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        opened: Any = safe_open(str(path), framework="pt")
        with opened as read:
            yield read
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: expected a whole safetensors file ({error})") from error


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ModelError(f"{path}: expected JSON ({error})") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found
