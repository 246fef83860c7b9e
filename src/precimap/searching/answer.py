"""What a search says in the end, in a sentence: the certified map, or why the baseline stays.

Invariant: a "no" is an answer with its number: the bound that was too wide, or the time that low precision does not save.
"""

from collections.abc import Sequence

from precimap.certificate import Certificate
from precimap.end_to_end import BASE, BLANKET, EndToEnd
from precimap.precision_map import PrecisionMap
from precimap.searching.latency.planned import Latency
from precimap.searching.maps.assemble import MapWriter, assemble
from precimap.searching.maps.candidates import Casts, Chain


def answer_of(
    writer: MapWriter, chain: Chain, certificates: Sequence[Certificate]
) -> tuple[PrecisionMap, Certificate | None, str]:
    """The final map, the certificate that decided, if any, and the sentence."""
    passed = [certificate for certificate in certificates if certificate.certified]
    if passed:
        every = (*chain.candidates, *chain.casts.candidates)
        final = next(one.map for one in every if one.map is not None and one.map.fingerprint == passed[-1].map)
        answer = f"certified: {_what(final)}, {_saving(final, writer.subject.latency)}"
        return final.model_copy(update={"certificate": passed[-1]}), passed[-1], answer
    certificate = certificates[0] if certificates else None
    return assemble(writer, {}), certificate, f"keep the baseline: {_why_not(writer, chain, certificate)}"


def _what(final: PrecisionMap) -> str:
    low, of = len(final.low), len(final.layers)
    if final.cast is None:
        return f"{low} of {of} layers in low precision"
    return f"the whole model in {final.cast}" + (f", {low} of its {of} layers in 8 bits" if low else "")


def why_not_cast(casts: Casts, margin: float, certificates: Sequence[Certificate]) -> str:
    """Why the cast of the whole model, with nothing in 8 bits, is not the answer, where it is faster than the answer."""
    if casts.refused is not None and not casts.candidates:
        return casts.refused
    alone = casts.candidates[-1] if casts.candidates else None
    if alone is not None and alone.measured is not None and not alone.passed(margin):
        drop = alone.measured.drop.estimate
        return f"already on the search split its drop is {drop:+.2g}, at most {alone.measured.upper:.2g}"
    asked = {one.fingerprint for one in casts.candidates}
    for certificate in certificates:
        if certificate.map in asked and certificate.certified:
            return "with layers in 8 bits it was expected to be faster still, and that was asked about"
        if certificate.map in asked:
            return f"the certify split does not prove it ({certificate.verdict})"
    if any(not certificate.certified for certificate in certificates):
        return "a map before it was not certified, which ends the questions to the certify split"
    return "timed by itself it was not faster than the map beyond the noise of timing"


def gain_said(times: EndToEnd, weighed: str, why_no_cast: str) -> str:
    """The measured gain of a map that pays, with what is faster still and why it is not the answer.

    weighed: what time and bytes are worth together, where bytes have a price.
    """
    said = (
        f"end to end {times.gain} times as fast as the base model ({times.served}, {times.batches}, n = {times.gain.n})"
    )
    if weighed:
        said += f"; {weighed}"
    # Not everything low: that it is faster is why one searches, and that it is not good enough.
    other = next(((name, speed) for name, speed in times.faster() if not name.startswith(BLANKET)), None)
    if other is None:
        return said
    name, speed = other
    precision, form = name.split(", ")
    why = f"the question was about the model {times.served}" if form != times.served else why_no_cast
    what = f"{name} is faster still, {1 / speed.median:.2f} times"
    if precision == BASE:
        return f"{said}; {what}: that is the unchanged model in another form, and {why}"
    return f"{said}; {what}, and is not the answer because {why}"


def no_gain(times: EndToEnd, weighed: str) -> str:
    """Why a map that may well be tolerable is none. weighed: as in `gain_said`."""
    foretold = "" if times.foretold is None else f"; the sum of single layers predicted {times.foretold}"
    if times.foretold_off is not None:
        foretold += f" and is off by {abs(times.foretold_off):.2f} of the base model's time"
    price = f"; {weighed}" if weighed else ""
    return (
        f"keep the baseline: not worth it on this hardware ({times.device}): deployed as a whole ({times.served}, "
        f"{times.batches}), the fastest map is {times.gain} times as fast as the base model, {_beside_noise(times)} "
        f"(n = {times.gain.n} turns){foretold}{price}"
    )


def _beside_noise(times: EndToEnd) -> str:
    if times.gain.upper < 1:
        return "and so slower"
    return "but takes more bytes than that is worth" if times.pays else "within the noise of timing"


def _saving(final: PrecisionMap, latency: Latency | None) -> str:
    if final.cast is not None:
        before, after = final.shrinks
        return f"{1 - after / before:.1%} of the bytes saved"
    bytes_said = f"{final.bytes_share:.1%} of the bytes"
    if latency is None:
        return f"{final.flops_said}, {bytes_said}"
    share, lower, upper = latency.savings.total((name, final.layers[name].scheme or "") for name in final.low)
    return f"{share:.1%} [{lower:.1%}, {upper:.1%}] of the layers' time saved, {bytes_said}"


def _why_not(writer: MapWriter, chain: Chain, certificate: Certificate | None) -> str:
    margin, latency = writer.table.margin, writer.subject.latency
    if certificate is not None:
        return f"the safest map was not certified ({certificate.verdict})"
    measured = [one.measured for one in chain.candidates if one.measured is not None]
    if measured:
        best = min(measured, key=lambda found: found.strictest(margin))
        filled, whose = best.strictest(margin) / margin, best.tightest(margin)
        return f"already on the search split the best bound of a map is {filled:.2g} times the margin of {whose}"
    if chain.candidates:
        return "time ran out before a map was measured as a whole"
    if latency is not None and latency.slower and not writer.subject.pairs:
        return latency.verdict()
    return "no layer is both eligible and not sensitive"
