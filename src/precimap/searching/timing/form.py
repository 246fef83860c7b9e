"""In which form of the hardware models of this kind are the fastest, before any layer is judged.

Invariant: the form is found from whole models that need no map (the base model, everything low under each scheme, the whole
model cast), timed in turns through the task's own forward; layers are then timed, and maps certified, in that form.
Not taken: a search in each form, which would take the time of two and ask the certify split twice.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from pydantic import TypeAdapter

from precimap.end_to_end import BASE, BLANKET, SizeTimes
from precimap.errors import InputError
from precimap.hardware_profile import Times
from precimap.layers.target import Hardware, Target
from precimap.numerics.schemes import Scheme
from precimap.searching.pairs import Key
from precimap.searching.question import AUTO, Question
from precimap.searching.subject import Subject
from precimap.searching.timing.forms import Form
from precimap.searching.timing.shapes import too_many_shapes
from precimap.searching.timing.whole import WholeModelBench

_FASTER = 0.95
_SIZES = TypeAdapter(tuple[SizeTimes, ...])


@dataclass(frozen=True, slots=True)
class FormChoice:
    """said: for the reader, with the times that decided. fastest: the scheme under which a model with every layer low is the
    fastest in this form, where they were compared. slower: the others that surely lose against it, and why."""

    form: str
    said: str
    fastest: str | None = None
    slower: Mapping[str, str] = field(default_factory=dict)


def form_asked(given: Target | Hardware, question: Question) -> tuple[Hardware | None, Target]:
    """The target, where it is known; else the hardware whose form is to be found, and its first form to begin with.

    Raises InputError for a form beside a target that is one, for a profile of something else, and where nothing would tell.
    """
    serving = question.serving
    if not isinstance(given, Hardware):
        if serving.form != AUTO:
            raise InputError(
                f"expected the target cpu or cuda beside the form {serving.form}; {given.name} is one form"
            )
        return None, given
    if serving.form != AUTO and serving.form not in given.forms:
        raise InputError(f"expected a form of {given.name}, {' or '.join(given.forms)}, got {serving.form}")
    if serving.form != AUTO:
        return None, given.forms[serving.form]
    if serving.profile is not None:
        return None, given.of_map(serving.profile.target)
    if not question.effort.timing_seconds:
        raise InputError(
            f"expected a form ({' or '.join(given.forms)}) for {given.name} where no whole model is timed; or "
            "timing_seconds above 0"
        )
    return given, next(iter(given.forms.values()))


def in_fastest_form(subject: Subject, hardware: Hardware, bench: WholeModelBench) -> Subject:
    """The subject on the target that is the fastest form; without what that target refuses, or is slow in as a whole.

    bench: of the subject, on the first of the hardware's forms. Raises DeployError where the base model does not run.
    """
    schemes = _shortest(subject.schemes)
    name = f"{hardware.name} at {', '.join(map(str, bench.sizes))}, {', '.join(scheme.name for scheme in schemes)}"
    found = subject.run.journal.find("form", name)
    if found is None:
        timed, refused = bench.beside(schemes, any(scheme.result is not None for scheme in subject.schemes))
        row = {"sizes": _SIZES.dump_python(timed, mode="json"), "refused": refused}
        subject.run.journal.record("form", name, row)
        found = subject.run.journal.find("form", name)
    assert found is not None
    sizes = _SIZES.validate_json(json.dumps(found.value["sizes"]))
    choice = chosen_form(tuple(hardware.forms), sizes, schemes)
    many = too_many_shapes(subject, bench.timer.most_shapes(choice.form))
    if many is not None:
        again = chosen_form([form for form in hardware.forms if form != choice.form], sizes, schemes)
        choice = replace(again, said=f"{again.said}; {choice.form} would be faster, but {many}")
    target = hardware.forms[choice.form]
    layers = {layer.name: layer for layer in subject.inventory.layers}
    refusals = ((pair, target.refusal(layers[pair[0]], pair[1])) for pair in subject.pairs)
    left = subject.without({(name, scheme.name): why for (name, scheme), why in refusals if why is not None})
    return replace(left.without(_beaten(left, choice)), target=target, said=choice.said)


def chosen_form(forms: Sequence[str], sizes: Sequence[SizeTimes], schemes: Sequence[Scheme]) -> FormChoice:
    """By times over the fastest model in the first form. Another form is taken where its fastest takes a twentieth less.

    Not where it is surely faster: a form proves nothing, each is timed and certified again, and quartiles of whole models
    overlap on most machines; the first form, which needs no compiler, would win by noise.
    """
    known = _means(sizes)
    best = {form: name for form in forms if (name := _fastest(known, form)) is not None}
    form = forms[0]
    for other in forms[1:]:
        if other in best and known[best[other]].median < _FASTER * known[best[form]].median:
            form = other
    shares = [f"{name} {known[best[name]]} ({_called(best[name][0])})" for name in best]
    said = (
        f"the model is to be served {form}: the fastest take, as shares of the time {forms[0]}, {' and '.join(shares)}"
    )
    without = [name for name in forms if name not in best]
    if without:
        said += f"; {' and '.join(without)} could not be timed"
    if form == forms[0]:  # nothing is fused there: each layer's own time tells more than all of them together
        return FormChoice(form, said)
    return FormChoice(form, said, *_slower(known, form, schemes))


def _called(precision: str) -> str:
    if precision == BASE:
        return "the model unchanged"
    kind, _, scheme = precision.partition(" ")
    return f"all layers in {scheme}" if kind == BLANKET else f"the whole model in {precision}"


def _fastest(known: Mapping[Form, Times], form: str) -> Form | None:
    return min((name for name in known if name[1] == form), key=lambda name: known[name].median, default=None)


def _means(sizes: Sequence[SizeTimes]) -> dict[Form, Times]:
    """Of what was timed at every batch size; every size counts alike."""
    found: dict[Form, list[Times]] = {}
    for size in sizes:
        for one in size.forms:
            found.setdefault((one.precision, one.form), []).append(one.ratio)
    return {
        name: Times(
            median=sum(one.median for one in of) / len(of),
            lower=sum(one.lower for one in of) / len(of),
            upper=sum(one.upper for one in of) / len(of),
            n=min(one.n for one in of),
        )
        for name, of in found.items()
        if len(of) == len(sizes)
    }


def _slower(known: Mapping[Form, Times], form: str, schemes: Sequence[Scheme]) -> tuple[str | None, dict[str, str]]:
    """The scheme under which everything low is the fastest, and those that surely take longer."""
    named = {scheme.name: (f"{BLANKET} {scheme.name}", form) for scheme in schemes}
    times = {name: known[key] for name, key in named.items() if key in known}
    if len(times) < 2:
        return None, {}
    best = min(times, key=lambda name: times[name].median)
    return best, {
        name: f"with every layer low and {form}, {best} takes {times[best].median / took.median:.2f} of its time"
        for name, took in times.items()
        if took.lower > times[best].upper
    }


def _beaten(subject: Subject, choice: FormChoice) -> dict[Key, str]:
    """The pairs of slower schemes, of layers that can take the fastest one."""
    free = {layer for layer, scheme in subject.pairs if scheme.name == choice.fastest}
    return {
        (layer, scheme.name): choice.slower[scheme.name]
        for layer, scheme in subject.pairs
        if scheme.name in choice.slower and layer in free
    }


def _shortest(schemes: Sequence[Scheme]) -> tuple[Scheme, ...]:
    """Those of the fewest bits among those that compute low."""
    low = [scheme for scheme in schemes if scheme.computes_low]
    fewest = min((scheme.weight_bits for scheme in low), default=0)
    return tuple(scheme for scheme in low if scheme.weight_bits == fewest)
