"""How a call of the model becomes the inputs of an exported file, and its outputs what the model returns: `call.json`.

Invariant: what comes out has the structure that the model's own results have (a dict, a dataclass of transformers), so that
a task's forward runs on an engine unchanged. A call that the file was not made for is refused: other arguments, or another
value of one that is no tensor, which is fixed in the file. The file is JSON, with torch's own text of a structure in it.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten, treespec_dumps, treespec_loads

from precimap.durable import write_text
from precimap.errors import DeployError, MapError

CALL = "call.json"
_TENSOR = "tensor"


@dataclass(frozen=True, slots=True, eq=False)
class Structure:
    """inputs, outputs: of each leaf of a call and of its result, `tensor` or [the value that is fixed]."""

    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]
    in_spec: TreeSpec
    out_spec: TreeSpec

    @classmethod
    def of(cls, program: ExportedProgram) -> "Structure":
        """Raises DeployError for constants or structures that have no text."""
        signature, spec = program.graph_signature, program.call_spec
        assert spec.in_spec is not None
        assert spec.out_spec is not None
        given = [one.arg for one in signature.input_specs if one.kind.name == "USER_INPUT"]
        sent = [one.arg for one in signature.output_specs]
        inputs, outputs = (
            [[a.value] if isinstance(a, ConstantArgument) else _TENSOR for a in args] for args in (given, sent)
        )
        made = cls(tuple(inputs), tuple(outputs), spec.in_spec, spec.out_spec)
        try:
            made.text()
        except Exception as error:
            raise DeployError(
                f"what the model takes or returns cannot be written down ({type(error).__name__}: {error}); let it take and "
                "return tensors, dicts, tuples, or classes that torch.utils._pytree knows by a serialized_type_name"
            ) from error
        return made

    def text(self) -> str:
        row = {
            "inputs": self.inputs,
            "outputs": self.outputs,
            "in_spec": treespec_dumps(self.in_spec),
            "out_spec": treespec_dumps(self.out_spec),
        }
        return json.dumps(row, indent=2) + "\n"

    def save(self, folder: Path) -> None:
        write_text(folder / CALL, self.text())

    @classmethod
    def load(cls, folder: Path) -> "Structure":
        """Raises MapError for a folder that holds none, or one of classes that are not here."""
        try:
            row = json.loads((folder / CALL).read_text(encoding="utf-8"))
            specs = [treespec_loads(row[name]) for name in ("in_spec", "out_spec")]
            return cls(tuple(row["inputs"]), tuple(row["outputs"]), *specs)
        except (OSError, ValueError, KeyError, NotImplementedError, ImportError) as error:
            raise MapError(f"{folder}: expected {CALL} as precimap export writes it ({error})") from error

    def calling(self, run: Callable[[Sequence[Tensor]], list[Tensor]]) -> Callable[..., Any]:
        """A function that is called as the model is, of one of tensors alone."""

        def call(*args: Any, **kwargs: Any) -> Any:
            return self._result(run(self._tensors(args, kwargs)))

        return call

    def _tensors(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        positional, named = tree_unflatten([None] * self.in_spec.num_leaves, self.in_spec)
        if named.keys() == kwargs.keys():
            kwargs = {name: kwargs[name] for name in named}
        leaves, spec = tree_flatten((args, kwargs))
        if spec != self.in_spec:
            raise DeployError(
                f"this file was exported for calls with {_said(positional, named)}, got one with {_said(args, kwargs)}, or "
                "with other structures in them"
            )
        for leaf, fixed in zip(leaves, self.inputs, strict=True):
            if (fixed == _TENSOR) != isinstance(leaf, Tensor) or (fixed != _TENSOR and fixed != [leaf]):
                raise DeployError(f"this file has an argument fixed as {fixed!r}, got {leaf!r:.60}")
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def _result(self, found: list[Tensor]) -> Any:
        left = iter(found)
        return tree_unflatten([next(left) if fixed == _TENSOR else fixed[0] for fixed in self.outputs], self.out_spec)


def _said(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    return f"{len(args)} positional arguments and {', '.join(kwargs) or 'none'} by name"
