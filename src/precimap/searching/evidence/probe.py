"""The direct probe: quantise one layer, leave the rest, score. The literal micro-benchmark, by replay.

Invariant: a probe is a paired comparison with the baseline on the same units, scored on the same path, so that an
unquantised model probes to exactly zero; replayed and plain probes agree to the bit. The outer loop is over batches, so
that the recorded results of one batch at a time are held.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from precimap.errors import FAILURES, first_line
from precimap.layers.code_products import Operand
from precimap.layers.emulation import operand, quantized
from precimap.layers.quantized import QuantizedLayer
from precimap.layers.replay import Recording, Replay
from precimap.layers.views import parameter_names
from precimap.numerics.schemes import scheme_key
from precimap.searching.comparison import Comparison, compare
from precimap.searching.pairs import Pair
from precimap.searching.question import Question, bytes_of
from precimap.searching.run import Parts, Run, batch_subject, part_of, record_part
from precimap.searching.subject import Subject
from precimap.task import Scored, join_parts, score_batch, to_device

FAILED = "probe failed"  # the kind of what could not be probed, in the journal


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Probe:
    """One layer under one scheme, the rest at base precision, on the batches `numbers` of the search split."""

    layer: str
    scheme: str
    comparison: Comparison
    numbers: tuple[int, ...]
    scored: Scored
    seconds: float


def probe(
    subject: Subject, question: Question, baseline: Parts, pairs: Sequence[Pair], numbers: Sequence[int]
) -> tuple[Probe, ...]:
    """Measure each pair on the batches `numbers` of the search split; those that the journal holds are read from it.

    `Effort.replay_memory` of recorded results are held, and a quarter of that of decoded weights. When the run is out of
    time, the batches that all pairs have seen are used; pairs that have seen none are left out, and so are those that fail
    where the model itself does not (`failures` says why).
    """
    run, replay_memory = subject.run, bytes_of(question.effort.replay_memory)
    codes: dict[Pair, tuple[QuantizedLayer, Operand | None]] = {}
    room = replay_memory // 4  # for decoded weights: decoding one takes as long as its product with a small batch
    complete: list[int] = []
    for number, batch in enumerate(run.task.splits.search):
        if number not in numbers:
            continue
        run.progress("probe", len(complete), len(numbers))
        missing = [
            pair
            for pair in _without_failures(run, pairs)
            if run.journal.find("probe", batch_subject(pair[0], number), scheme_key(pair[1])) is None
        ]
        for pair in missing:
            if pair not in codes:
                (layer,) = subject.codes([pair])
                fits = 4 * layer.codes.numel() <= room
                codes[pair] = layer, operand(layer) if fits else None
                room -= 4 * layer.codes.numel() if fits else 0
        if missing and not _probe_batch(run, batch, number, [(p, codes[p]) for p in missing], replay_memory):
            break
        complete.append(number)
    run.progress("probe", len(numbers), len(numbers))
    if not complete:
        return ()
    return tuple(
        _joined(run, baseline, pair, tuple(complete), question.alpha) for pair in _without_failures(run, pairs)
    )


def _without_failures(run: Run, pairs: Sequence[Pair]) -> list[Pair]:
    failed = failures(run, pairs)
    return [(name, scheme) for name, scheme in pairs if (name, scheme.name) not in failed]


def failures(run: Run, pairs: Sequence[Pair]) -> dict[tuple[str, str], str]:
    """Which of the pairs cannot be probed, and why."""
    rows = {(row.subject, row.scheme): str(row.value["reason"]) for row in run.journal.measurements(FAILED)}
    return {
        (name, scheme.name): rows[name, scheme_key(scheme)]
        for name, scheme in pairs
        if (name, scheme_key(scheme)) in rows
    }


def _probe_batch(
    run: Run,
    batch: object,
    number: int,
    layers: Sequence[tuple[Pair, tuple[QuantizedLayer, Operand | None]]],
    replay_memory: int,
) -> bool:
    """Probe one batch under each layer. False when time ran out before the last."""
    task, weights = run.task, parameter_names(run.task.model)
    batch, place = to_device(batch, task.device), f"batch {number} of the search split"
    recording = Recording(replay_memory)
    with torch.no_grad():
        with Replay(weights, {}, {}, recording):
            score_batch(task, task.model, batch, place)
        for (name, scheme), (layer, decoded) in layers:
            if run.out_of_time:
                return False
            started = time.perf_counter()
            weight = operand(layer) if decoded is None else decoded
            try:
                with Replay(weights, {name: layer}, {name: weight}, recording):
                    part = score_batch(task, task.model, batch, place)
            except FAILURES as error:
                with quantized(task.model, {}):  # if this fails, too, it is not the layer
                    score_batch(task, task.model, batch, place)
                reason = f"in {scheme.name} it cannot be probed: {first_line(error)}"
                run.journal.record(FAILED, name, {"reason": reason}, scheme_key(scheme))
                continue
            subject, seconds = batch_subject(name, number), time.perf_counter() - started
            record_part(run.journal, ("probe", subject), part, seconds, scheme_key(scheme))
    return True


def _joined(run: Run, baseline: Parts, pair: Pair, numbers: tuple[int, ...], alpha: float) -> Probe:
    name, scheme = pair
    rows = [run.journal.find("probe", batch_subject(name, number), scheme_key(scheme)) for number in numbers]
    found = [row for row in rows if row is not None]
    whole = join_parts(run.task, [part_of(row) for row in found])
    comparison = compare(run.task, baseline.only(numbers), whole, alpha)
    return Probe(
        layer=name,
        scheme=scheme.name,
        comparison=comparison,
        numbers=numbers,
        scored=whole,
        seconds=sum(float(row.value["seconds"]) for row in found),
    )
