"""What a checkpoint's config says against itself, or in words that an engine does not know.

Invariant: what is known is what compressed-tensors 0.17 knows, the version that vLLM 0.32 and 0.33 pin: its arguments of a
weight or an input forbid any other field, so that a newer tool's checkpoint does not load.
"""

import re
from collections.abc import Iterator

from precimap.exporting.linting.checked import Checked, Group, in_order, matches
from precimap.exporting.linting.findings import Effect, Finding, by_layer
from precimap.exporting.linting.kinds import FORMATS

_ARGUMENTS = frozenset(
    "num_bits type symmetric group_size strategy block_structure dynamic actorder scale_dtype zp_dtype observer "
    "observer_kwargs".split()
)
_GROUP = frozenset("targets weights input_activations output_activations format".split())
ENCODER = re.compile(r"(^|\.)attention\.self\.(query|key|value)$")


def fields(checked: Checked, engine: str) -> Iterator[Finding]:
    """Fields that compressed-tensors 0.17 does not know. At the top it ignores them, and so do all engines."""
    arguments: list[str] = []
    groups = [f"{group.name}.{name}" for group in checked.groups for name in group.row if name not in _GROUP]
    for group in checked.groups:
        for part in ("weights", "input_activations", "output_activations"):
            row = group.row.get(part)
            arguments += [f"{group.name}.{part}.{name}" for name in (row or {}) if name not in _ARGUMENTS]
    # vLLM takes what it knows of a group by itself, and gives the arguments to compressed-tensors.
    of_groups: Effect = "note" if engine in ("vllm", "vllm-cpu") else "refused"
    found: tuple[tuple[list[str], Effect], ...] = ((arguments, "refused"), (groups, of_groups))
    for names, effect in found:
        if names:
            does = "ignores it" if effect == "note" else "reads no config with it"
            yield Finding(
                rule="unknown-field",
                effect=effect,
                layers=(),
                engine_does=f"compressed-tensors 0.17 does not know {', '.join(names[:4])}, and {engine} {does}",
                to_do="leave the field out if it says what goes without saying; else the engine cannot run this",
            )


def formats(checked: Checked) -> Iterator[Finding]:
    """A format for each group, and the one at the top."""
    top = checked.config.get("format")
    said = [group.row.get("format") for group in checked.groups]
    for group in checked.groups:
        form, known = group.row.get("format"), FORMATS.get(group.kind.removesuffix("-zero"))
        modules = _of(checked, group)
        if form == "mixed-precision" or (form is None and top == "mixed-precision"):
            does = f"group {group.name} has the format {form!r}, and no engine finds a scheme for it"
            yield from by_layer("format", "refused", (does, "give each group its own format"), modules)
        elif known is not None and (form or top) not in known:
            does = (
                f"group {group.name} is in {group.kind} and says format {form or top!r}; it is read as something else"
            )
            yield from by_layer("format", "misread", (does, f"write {known[0]}"), modules)
    if len({one for one in said if one is not None}) > 1 and top != "mixed-precision":
        yield Finding(
            rule="format",
            effect="refused",
            layers=(),
            engine_does=f"the groups have several formats and the top says {top!r}; transformers reads all as that",
            to_do="write mixed-precision at the top",
        )


def targets(checked: Checked) -> Iterator[Finding]:
    """Targets that match more than they say, nothing, or what another group has, too."""
    for where, target in _targets(checked):
        if not target.startswith("re:"):
            continue
        try:
            pattern = re.compile(target[3:])
        except re.error as error:
            yield Finding(
                rule="regex",
                effect="refused",
                layers=(),
                engine_does=f"{where}: {target!r} is no regular expression ({error}), at which engines stop",
                to_do="write one that can be read",
            )
            continue
        # A name that it only begins is one that its writer may not have meant: layers.1 begins layers.10.
        more = [name for name in checked.linears if pattern.match(name) and not pattern.fullmatch(name)]
        does = f"{where}: {target!r} also matches names that only begin so"
        yield from by_layer("unanchored-regex", "misread", (does, "end it with $"), more)
    several = [name for name in checked.linears if len({group.kind for group in checked.named(name)}) > 1]
    does = "is a target of several groups with different schemes; vLLM takes the first, others the last"
    yield from by_layer("several-groups", "misread", (does, "name it in one group"), several)


def encoders(checked: Checked) -> Iterator[Finding]:
    """The names that vLLM gives to the projections of an encoder's attention."""
    lost = []
    for name in checked.linears:
        if not ENCODER.search(name):
            continue
        own = _as_vllm_names(name)
        here = checked.group_of[name]
        in_ignore = any(matches(name, one) for one in checked.ignore)
        there = checked.named(own) or [group for group in checked.groups if "Linear" in group.targets]
        if in_ignore != any(matches(own, one) for one in checked.ignore) or (
            here is not None and here not in there[:1]
        ):
            lost.append(name)
    does = "vLLM names it attention.output there and does not find it in the targets, so that it stops while it loads"
    yield from by_layer(
        "encoder-names", "refused", (does, r"write re:^(.*\.)?...attention\.(self|output)\.query$"), lost
    )


def _as_vllm_names(name: str) -> str:
    return "model." + ENCODER.sub(r"\1attention.output.\2", name)


def _targets(checked: Checked) -> Iterator[tuple[str, str]]:
    for group in checked.groups:
        for target in group.targets:
            yield f"group {group.name}", target
    for one in checked.ignore:
        yield "ignore", one


def _of(checked: Checked, group: Group) -> list[str]:
    return in_order([name for name, found in checked.group_of.items() if found is group], checked)
