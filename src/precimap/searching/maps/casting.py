"""The whole model in 16 bits as a map of its own: alone, and with the layers that the best map has in 8 bits.

Invariant: such a map is one more candidate, looked at on the search split as a whole, and certified like any other; why it
is none, or did not pass, is kept for whoever reads that a cast is faster. A layer of scheme `bf16` alone leaves all between
the layers as it is; the cast takes that along, and what it costs is known of the whole only.
"""

from collections.abc import Mapping

from precimap.decisions import Cast
from precimap.errors import FAILURES, JournalError, first_line
from precimap.layers.casting import CASTS
from precimap.numerics.quantize import storage_dtype
from precimap.numerics.schemes import Scheme
from precimap.precision_map import BYTES
from precimap.searching.allocation.knapsack import Step
from precimap.searching.maps.assemble import MapWriter
from precimap.searching.maps.candidates import Casts, Chain, MapCandidate, measure
from precimap.searching.question import Question
from precimap.searching.run import Parts


def looked_at_casts(writer: MapWriter, question: Question, chain: Chain, baseline: Parts) -> Casts:
    """Look at the cast alone and, where that passes, at the cast with the best map's 8-bit layers."""
    name = _cast_of(writer.subject.schemes)
    refused = _refused(writer, question, name)
    if refused is not None or name is None:
        return Casts(refused=refused)
    best = {} if chain.best is None else chain.candidates[chain.best].step.choice
    short = {layer: scheme for layer, scheme in best.items() if writer.subject.by_name[scheme].result is None}
    found: list[MapCandidate] = []
    for choice in ({}, short) if short else ({},):
        if writer.subject.run.out_of_time:
            return Casts(tuple(found), "time ran out before it was looked at" if not found else None)
        try:
            found.insert(0, _look(writer, question, choice, name, baseline))
        except JournalError:
            raise
        except FAILURES as error:
            return Casts(tuple(found), f"the model does not run in {name} ({first_line(error)})")
        if not found[0].passed(question.margin):
            break  # with layers in 8 bits it has more to lose
    return Casts(tuple(found))


def _look(
    writer: MapWriter, question: Question, choice: Mapping[str, str], name: Cast, baseline: Parts
) -> MapCandidate:
    made = writer.written(choice, name)
    after = made.shrinks[1]
    step = Step(choice=dict(choice), gain=0.0, cost=0.0, bytes=after)  # what it gains is timed as a whole
    candidate = MapCandidate(step=step, map=made, fingerprint=made.fingerprint)
    return measure(writer.subject.run, candidate, baseline, question.alpha, ())


def _cast_of(schemes: tuple[Scheme, ...]) -> Cast | None:
    """The dtype of the first scheme of 16 bits."""
    result = next((scheme.result for scheme in schemes if scheme.result is not None), None)
    if result is None:
        return None
    dtype = storage_dtype(result)
    return next(name for name, known in CASTS.items() if known == dtype)


def _refused(writer: MapWriter, question: Question, name: Cast | None) -> str | None:
    """Why the whole model is not cast, or None."""
    subject = writer.subject
    timer, base = subject.target.whole_timer, subject.task.base_precision
    if name is None:
        return "no scheme of 16 bits is among those asked for; with bf16 among them a cast of the whole model is asked, too"
    if base not in BYTES:
        return f"the model is in {base} already"
    if question.pinned or question.allowed:
        return "some layers are pinned or limited to certain schemes, and a cast changes all of them"
    if question.realign:
        return "maps are realigned, and a cast is not"
    if timer is None or CASTS[name] not in timer.casts:
        return f"{subject.target.name} is not fast in {name}"
    return None
