"""How much of a probe is the model's own rounding: layers with their 16-bit results nudged, on the units of the audit.

Invariant: a model without 16-bit results has none, and costs two passes of one batch to find out. The spread is measured
for each layer: an early one has more roundings after it than a late one.
"""

import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from precimap.layers.nudging import Nudged
from precimap.layers.replay import Recording, Replay
from precimap.layers.views import parameter_names
from precimap.searching.run import Parts, Run, batch_subject, part_of, record_part
from precimap.task import ScoredPart, score_batch, to_device

Floats = NDArray[np.float64]

KIND = "nudge"  # in the journal
FIRST = ""  # the layer that is called first


@dataclass(frozen=True, slots=True)
class _Batch:
    """One of the search split, and how the model as given scored it."""

    number: int
    content: object
    before: ScoredPart


def own_rounding(
    run: Run, baseline: Parts, layers: Sequence[str], numbers: Sequence[int], replay_memory: int
) -> dict[str, float]:
    """Mean square change of a unit's loss, by layer, when results are rounded anew from it on; of layers with such a change.

    numbers: of the batches of the search split. replay_memory: bytes of recorded results that may be held. Nothing when the
    run is out of time.
    """
    changes: dict[str, list[Floats]] = {name: [] for name in layers}
    seen = False  # whether anything is rounded to 16 bits at all
    for number, content in enumerate(run.task.splits.search):
        if number not in numbers or not changes:
            continue
        batch = _Batch(number, content, baseline.each[number])
        seen = seen or bool(np.any(_changes(run, batch, [FIRST], replay_memory).get(FIRST, 0.0)))
        found = _changes(run, batch, list(changes), replay_memory) if seen else {}
        if found.keys() != changes.keys():
            return {}
        for name, change in found.items():
            changes[name].append(change)
    squares = {name: float(np.mean(np.concatenate(found) ** 2)) for name, found in changes.items()}
    return {name: square for name, square in squares.items() if square > 0}


def _changes(run: Run, batch: _Batch, layers: Sequence[str], replay_memory: int) -> dict[str, Floats]:
    """Of the losses of one batch, float64 [units], by layer; those that the journal holds are read from it."""
    missing = [name for name in layers if run.journal.find(KIND, batch_subject(name, batch.number)) is None]
    if missing:
        _nudge(run, batch, missing, replay_memory)
    rows = {name: run.journal.find(KIND, batch_subject(name, batch.number)) for name in layers}
    return {name: part_of(row).losses - batch.before.losses for name, row in rows.items() if row is not None}


def _nudge(run: Run, batch: _Batch, layers: Sequence[str], replay_memory: int) -> None:
    """Until time runs out."""
    task, weights = run.task, parameter_names(run.task.model)
    content, place = to_device(batch.content, task.device), f"batch {batch.number} of the search split"
    recording = Recording(replay_memory)
    with torch.no_grad():
        with Replay(weights, {}, {}, recording):
            score_batch(task, task.model, content, place)
        for name in layers:
            if run.out_of_time:
                return
            subject, started = batch_subject(name, batch.number), time.perf_counter()
            with Nudged(weights, name or None, recording, zlib.crc32(subject.encode())):
                part = score_batch(task, task.model, content, place)
            record_part(run.journal, (KIND, subject), part, time.perf_counter() - started)
