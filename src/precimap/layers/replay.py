"""In a probe of one layer, what does not depend on that layer is a result already known.

Invariant: a probe by replay returns the bits of the plain probe. A call is answered from the recording only where the
function, the arguments, the contents of every tensor it reads and the surroundings are those of the recording; in-place
calls, random calls, views and all that cannot be described run as ever. The alternative, keeping the input of each
block and starting there, needs to know the blocks, and saves nothing beside the path (towers, experts).

What changes a tensor unseen by torch (a numpy array that shares its memory) is noticed only where torch, inside the
block, handed out the memory: such a storage is never trusted again.
"""

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor

from precimap.errors import ModelError
from precimap.layers.code_products import Operand
from precimap.layers.contents import Kind, address_of, is_plain, kind_of, tensors_in
from precimap.layers.emulation import Emulation, SharedInputs
from precimap.layers.interception import WeightCall
from precimap.layers.quantized import QuantizedLayer
from precimap.layers.recording import Call, Recording, one_per_storage

__all__ = ["Recording", "Replay"]

_WRITES = (Kind.WRITE, Kind.WRITE_ANY, Kind.STATISTICS)
_UNKEYED = (Kind.OPAQUE, Kind.LEAK)


class Replay(Emulation):
    """Emulates the given layers, and answers the other calls from the recording where it can.

    Without layers and with an empty recording the pass is recorded; it must be a pass of the batch that the probes
    take. Use it under `torch.no_grad()`, else __enter__ raises ModelError; calls that the model makes under its own
    `enable_grad` or `inference_mode` are computed. Between the passes of one recording the model's values may change
    only by calls that raise the version of the tensor (not through `.data`).
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        layers: Mapping[str, QuantizedLayer],
        operands: Mapping[str, Operand],
        recording: Recording,
    ) -> None:
        super().__init__(weights, layers, operands)
        self._recording = recording
        self._changes = bool(layers)
        self._records = False
        self._depth = 0
        self._given: dict[Call, None] = {}
        self._random: list[bytes] = []
        self._contents = recording.contents()

    def __enter__(self) -> Self:
        if self._depth == 0:
            if torch.is_grad_enabled() or torch.is_inference_mode_enabled():
                raise ModelError("replay expects torch.no_grad() around it: recorded results have no gradient")
            self._records = not self._changes and not self._recording.complete
            self._contents = self._recording.contents()
            self._random = _random_states() if self._records else []
        super().__enter__()
        self._depth += 1
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._depth -= 1
        if self._depth > 0:
            return  # an attention call is over, not the pass
        self._inputs = SharedInputs()  # the last input is a recorded result: held on to, it would be copied
        if self._records and exception[0] is not None:
            self._recording.clear()
        else:
            self._recording.finish(self._contents, None if self._records else self._given)
            self._given.clear()

    def on_weight(self, call: WeightCall) -> Any:
        if call.op.lookup and self._layers[call.view.name].scheme.computes_low:
            # Emulation leaves such a lookup as it is, so it can be a result already known.
            return self.on_other(call.func, call.arguments.args, call.arguments.kwargs)
        func, emulate = call.func, functools.partial(super().on_weight, call)
        args, kwargs = call.arguments.args, call.arguments.kwargs
        return self._computed(self._run(func, kind_of(func), args, kwargs, emulate), None)

    def on_other(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kind = kind_of(func)
        if kind is Kind.READ:
            return func(*args, **kwargs)
        if kind is Kind.VIEW:
            output = func(*args, **kwargs)
        elif self._records:
            output = self._record(func, kind, args, kwargs)
        else:
            output = self._replay(func, kind, args, kwargs)
        if self._changes:
            self.views.follow(func, args, kwargs, output)
        return output

    def _key(self, func: Any, kind: Kind, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The call's key, or None where it has none."""
        if kind in _UNKEYED or torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            return None
        return self._contents.key(func, args, kwargs)

    def _replay(self, func: Any, kind: Kind, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        key = self._key(func, kind, args, kwargs)
        call = None if key is None else self._recording.find(key)
        if call is not None and call.output is not None:
            output = self._recording.give(call, self._contents)
            if output is not None:
                self._recording.replayed += 1
                self._given[call] = None
                return output
        return self._computed(self._run(func, kind, args, kwargs, None), call)

    def _computed(self, ran: tuple[Any, Any, Any], call: Call | None) -> Any:
        """What `_run` gave of a call of a probe. What it wrote has the numbers of the recorded call, if there is one."""
        output, read, changed = ran
        self._recording.computed += 1
        written = [] if call is None else _written(read, changed, output)
        if call is not None and len(call.numbers) == len(written):
            for tensor, number in zip(written, call.numbers, strict=True):
                self._contents.write(tensor, number)
        else:  # what a call made is unknown anyway; what it changed may have been known
            for tensor in changed:
                self._contents.forget(tensor)
        return output

    def _record(self, func: Any, kind: Kind, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        recording, key = self._recording, self._key(func, kind, args, kwargs)
        started = time.perf_counter()
        output, read, changed = self._run(func, kind, args, kwargs, None)
        seconds = time.perf_counter() - started
        if self._drew():
            key = None
        written = _written(read, changed, output)
        call = None if key is None else recording.find(key)
        if call is not None and call.output is not None and not _same_bits(call.output, output):
            recording.distrust(call)
        elif call is None and key is not None:
            call = recording.add(key, len(written))
            if (
                written
                and not changed
                and _kind(kind, args, kwargs) is Kind.PURE
                and _can_be_kept(output, len(written))
            ):
                recording.keep(call, output, seconds)
        known = call is not None and len(call.numbers) == len(written)
        for place, tensor in enumerate(written):
            if call is not None and known:
                self._contents.write(tensor, call.numbers[place])
            else:
                self._contents.forget(tensor)
        return output

    def _drew(self) -> bool:
        """Whether a generator has moved since the last call: what this one returned may depend on where it stood."""
        before, self._random = self._random, _random_states()
        return before != self._random

    def _run(
        self,
        func: Any,
        kind: Kind,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        run: Callable[[], Any] | None,
    ) -> tuple[Any, list[Tensor], list[Tensor]]:
        """The output, the plain tensors among the arguments, and those that the call changed. run: other than `func`."""
        kind = _kind(kind, args, kwargs)
        read = [tensor for tensor in tensors_in(args) if is_plain(tensor)]
        if kwargs:
            read += [tensor for tensor in tensors_in(kwargs.values()) if is_plain(tensor)]
        targets = _targets(kind, args, kwargs, read) if kind in _WRITES else []
        for tensor in targets:
            self._recording.before_write(tensor)
        before = [-1 if tensor.is_inference() else tensor._version for tensor in read]
        try:
            output = func(*args, **kwargs) if run is None else run()
        except BaseException:  # the model may catch it and go on with what was half written
            for tensor in targets:
                self._contents.forget(tensor)
            raise
        changed = [t for t, version in zip(read, before, strict=True) if version >= 0 and t._version != version]
        if kind is Kind.STATISTICS:
            changed += targets
        for tensor in changed:
            self._recording.after_write(tensor)
        if kind is Kind.LEAK or not (is_plain(output) if type(output) is Tensor else _all_plain(output)):
            # A tensor of another kind (sparse, a subclass) can share what it was made of.
            for tensor in read:
                self._recording.before_write(tensor)
                self._contents.leak(tensor)
        return output, read, changed


def _kind(kind: Kind, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Kind:
    """The kind of one call: `out` and `inplace` make a write of any function, evaluation leaves statistics alone."""
    if kind is Kind.STATISTICS:
        training = args[5] if len(args) > 5 else kwargs.get("training", kwargs.get("use_input_stats", True))
        return Kind.STATISTICS if training else Kind.PURE
    if kwargs and (kwargs.get("out") is not None or kwargs.get("inplace")):
        return Kind.WRITE
    return kind


def _targets(kind: Kind, args: tuple[Any, ...], kwargs: dict[str, Any], read: list[Tensor]) -> list[Tensor]:
    """The tensors that the call is known to change, among the plain ones that it is given."""
    if kind is Kind.WRITE_ANY:
        return read
    if kind is Kind.STATISTICS:
        found = tensors_in((args[1:3], kwargs.get("running_mean"), kwargs.get("running_var")))
    else:
        found = tensors_in((kwargs.get("out"),)) or tensors_in(args[:1]) or read
    return [tensor for tensor in found if is_plain(tensor)]


def _all_plain(output: Any) -> bool:
    return all(map(is_plain, tensors_in((output,))))


def _written(read: list[Tensor], changed: list[Tensor], output: Any) -> list[Tensor]:
    """One tensor for each storage that a call changed or made, in an order that is the same each time."""
    known = {address_of(tensor) for tensor in read}
    made = (t for t in tensors_in((output,)) if is_plain(t) and address_of(t) not in known)
    return one_per_storage((*changed, *made))


def _can_be_kept(output: Any, made: int) -> bool:
    """Whether all of the output can be given again: plain tensors, each on one of the storages that the call made."""
    tensors = tensors_in((output,))
    return (
        _is_simple(output)
        and len(one_per_storage(tensors)) == made
        and not any(t.requires_grad or t.is_conj() or t.is_neg() or t.is_inference() for t in tensors)
    )


def _is_simple(output: Any) -> bool:
    if isinstance(output, Tensor):
        return type(output) is Tensor and is_plain(output)
    if isinstance(output, tuple | list):
        return all(map(_is_simple, output))
    return output is None or isinstance(output, bool | int | float | str)


def _same_bits(first: Any, second: Any) -> bool:
    pairs = list(zip(tensors_in((first,)), tensors_in((second,)), strict=True))
    return all(
        a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride() and torch.equal(_bytes(a), _bytes(b))
        for a, b in pairs
    )


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _random_states() -> list[bytes]:
    """The state of every default generator that a call could draw from."""
    generators = [torch.default_generator]
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        generators += torch.cuda.default_generators
    return [generator.get_state().numpy().tobytes() for generator in generators]
