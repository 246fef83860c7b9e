"""Which parameter of the certified model each tensor of a folder is, and that it has its values.

Names may differ by one prefix on each side: a task's model may wrap the one that was loaded, and the folder may hold more
than it. Experts, which transformers loads into one parameter, stand in the folder one by one. Invariant: every tensor that
both have is compared, value by value, before anything is written; a folder that stores the model in other pieces than these
is refused, and never guessed at. Not taken: the fingerprint of the model's weights, which the folder's bytes do not have
where the model was cast when loaded.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from precimap.errors import DeployError
from precimap.exporting.hf_folder import HfFolder
from precimap.layers.views import plain_name, tied_names

_EXPERT = re.compile(r"^(?P<experts>.*\.experts)\.(?P<number>\d+)\.(?P<part>gate_proj|up_proj|down_proj)\.weight$")


@dataclass(frozen=True, slots=True)
class Piece:
    """A parameter of the model, or one expert of it; half: 0 for the gate and 1 for up, where a parameter holds both."""

    name: str
    expert: int | None = None
    half: int | None = None

    def of(self, parameter: Tensor) -> Tensor:
        if self.expert is None:
            return parameter
        if parameter.dim() != 3 or self.expert >= len(parameter):
            return parameter[:0]  # which has the values of no expert
        one = parameter[self.expert]
        return one if self.half is None else one.chunk(2)[self.half]


@dataclass(frozen=True, slots=True, kw_only=True)
class SameModel:
    """pieces: stored tensor -> what it is of the model. folder_only: tensors that the model lacks. model_only: parameters
    around the part that the folder holds, such as a head of the task's own. prefix: of the folder's part in the model.
    stored_prefix: of the model's part in the folder."""

    pieces: Mapping[str, Piece]
    folder_only: tuple[str, ...]
    model_only: tuple[str, ...]
    prefix: str
    stored_prefix: str

    def stored_name(self, name: str) -> str | None:
        """What the folder calls a module or parameter of the model; None for one outside its part."""
        return self.stored_prefix + name.removeprefix(self.prefix) if name.startswith(self.prefix) else None


def same_model(model: nn.Module, folder: HfFolder) -> SameModel:
    """Raises DeployError where the names do not meet, or a value differs, naming the first of them."""
    own = {plain_name(name): tensor for name, tensor in model.state_dict(keep_vars=True).items()}
    prefix, stored_prefix = _prefixes(own, folder)
    pieces = {}
    for stored in folder.tensors:
        name = prefix + stored.removeprefix(stored_prefix) if stored.startswith(stored_prefix) else ""
        piece = Piece(name) if name in own else _expert(name, own)
        if piece is not None:
            pieces[stored] = piece
    missing = _missing(model, {piece.name for piece in pieces.values()})
    folder_only = tuple(sorted({*folder.tensors} - {*pieces}))
    inside = [name for name in missing if name.startswith(prefix)]
    if inside:
        extra = [name for name in folder_only if name.startswith(stored_prefix)]
        raise DeployError(
            f"{folder.path} stores this model in other pieces: the model has {_some(inside)}, which the folder lacks, and "
            f"the folder {_some(extra) or 'nothing instead'}; precimap writes tensors one to one, and experts one by one. "
            "Name a folder that holds the model in these pieces by --checkpoint (checkpoint=...)"
        )
    _compare(own, pieces, folder)
    return SameModel(
        pieces=pieces,
        folder_only=folder_only,
        model_only=tuple(missing),
        prefix=prefix,
        stored_prefix=stored_prefix,
    )


def _expert(name: str, own: Mapping[str, Tensor]) -> Piece | None:
    """Where transformers holds a projection of one expert: in `experts.gate_up_proj` or `experts.down_proj`."""
    found = _EXPERT.match(name)
    if found is None:
        return None
    down = found["part"] == "down_proj"
    held = f"{found['experts']}.{'down_proj' if down else 'gate_up_proj'}"
    half = None if down else int(found["part"] == "up_proj")
    return Piece(held, int(found["number"]), half) if held in own else None


def _missing(model: nn.Module, found: set[str]) -> list[str]:
    """Parameters that the folder does not have, under this name or a tied one."""
    tied = tied_names(model)
    named = dict.fromkeys(plain_name(name) for name, _ in model.named_parameters(remove_duplicate=False))
    return [name for name in named if name not in found and found.isdisjoint(tied.get(name, ()))]


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _prefixes(own: Mapping[str, Tensor], folder: HfFolder) -> tuple[str, str]:
    """What to strip from the model's names, and from the folder's, so that most of them meet."""
    by_end: dict[str, list[str]] = {}
    for stored in folder.tensors:
        by_end.setdefault(_end(stored), []).append(stored)
    votes: Counter[tuple[str, str]] = Counter()
    for name in own:
        for stored in by_end.get(_end(name), ())[:64]:
            votes[_before_common_end(name, stored)] += 1
    best = votes.most_common(1)
    if not best:
        raise DeployError(
            f"expected the folder that the model was loaded from, got {folder.path}: no tensor of it has the name of a "
            f"parameter ({next(iter(folder.tensors), 'none')} there, {next(iter(own), 'none')} here)"
        )
    return best[0][0]


def _end(name: str) -> str:
    return ".".join(name.split(".")[-3:])


def _before_common_end(one: str, two: str) -> tuple[str, str]:
    first, second = one.split("."), two.split(".")
    while first and second and first[-1] == second[-1]:
        first.pop()
        second.pop()
    return "".join(f"{part}." for part in first), "".join(f"{part}." for part in second)


def _compare(own: Mapping[str, Tensor], pieces: Mapping[str, Piece], folder: HfFolder) -> None:
    compared = dict[str, int]()  # parameter -> how many of its values
    for file in folder.files:
        with folder.opened(file) as read:
            for stored, at in folder.tensors.items():
                if at.file != file or stored not in pieces:
                    continue
                piece = pieces[stored]
                certified, values = piece.of(own[piece.name].detach()), read.get_tensor(stored)
                if certified.shape != values.shape or not _equal(values, certified):
                    raise DeployError(
                        f"{folder.path}: {stored} {tuple(values.shape)} is not {piece.name} {tuple(certified.shape)} of "
                        "the certified model; an engine would serve other weights than those. Save the certified model "
                        "by save_pretrained, and name that folder by --checkpoint (checkpoint=...)"
                    )
                compared[piece.name] = compared.get(piece.name, 0) + values.numel()
    for name, count in compared.items():
        if count < own[name].numel():
            raise DeployError(f"{folder.path}: holds {count:,} of the {own[name].numel():,} values of {name} only")


def _equal(values: Tensor, certified: Tensor) -> bool:
    """As the model holds them: a model that was cast when it was loaded has the folder's values cast."""
    return torch.equal(values.to(certified.dtype), certified.to(values.device))
