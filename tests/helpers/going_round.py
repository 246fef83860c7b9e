"""What a model goes through between processes and among threads, for tests of whether it computes the same after."""

import io
import pickle
import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


def through_pickle(model: nn.Module) -> nn.Module:
    found: nn.Module = pickle.loads(pickle.dumps(model))
    return found


def through_torch(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded: nn.Module = torch.load(buffer, weights_only=False)
    return loaded


def wrong_in_threads(call: Callable[[Tensor], Tensor], inputs: Sequence[Tensor], times: int) -> list[int]:
    """A thread for each input, all at once: the numbers of those whose result was once another one than alone."""
    with torch.no_grad():
        expected = [call(x) for x in inputs]
    wrong: list[int] = []

    def work(number: int) -> None:
        with torch.no_grad():
            for _ in range(times):
                if not torch.equal(call(inputs[number]), expected[number]):
                    wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return wrong
