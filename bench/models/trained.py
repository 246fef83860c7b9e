"""Models that the benchmarks train themselves: the same weights each time, and kept.

Invariant: the same recipe, data, code and version of torch give the same weights, bit for bit, so that a cache of them is
only a matter of time. Shipping trained weights was not taken: the data's terms allow research only.
"""

import hashlib
import inspect
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from precimap.durable import write_bytes


def kept(
    name: str,
    recipe: object,
    data: Sequence[Tensor],
    code: Sequence[Any],
    folder: Path | None,
    train: Callable[[], nn.Module],
) -> dict[str, Tensor]:
    """The weights of the model that `train` gives, from `folder` where they are there already.

    data: all tensors that training reads. code: classes and functions whose files say how it trains; this file counts
    without being named. folder: None for `precimap-bench` in the system's temporary one.
    """
    folder = folder or Path(tempfile.gettempdir()) / "precimap-bench"
    digest = hashlib.sha256(f"{recipe} torch {torch.__version__}".encode())
    for file in sorted({__file__, *map(inspect.getfile, code)}):
        digest.update(Path(file).read_bytes())
    for tensor in data:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    path = folder / f"{name}-{digest.hexdigest()[:16]}.safetensors"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(path, save(train().state_dict()))
    return load_file(path)


@contextmanager
def alone(seed: int) -> Iterator[None]:
    """One thread, because sums over threads change their order, and a random state of its own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)


class BestEpoch:
    """Keeps the weights of the epoch with the least validation loss; stops after `patience` epochs without a better one."""

    def __init__(self, model: nn.Module, patience: int) -> None:
        self._model, self._patience, self._waited = model, patience, 0
        self._least, self._weights = float("inf"), _copied(model)

    def enough(self, loss: float) -> bool:
        """Judge an epoch; whether to stop."""
        self._waited = 0 if loss < self._least else self._waited + 1
        if loss < self._least:
            self._least, self._weights = loss, _copied(self._model)
        return self._waited == self._patience

    def restored(self) -> nn.Module:
        """The model with the best epoch's weights, in evaluation mode, frozen."""
        self._model.load_state_dict(self._weights)
        return self._model.eval().requires_grad_(False)


def _copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}
