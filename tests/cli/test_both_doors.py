"""The same in Python and on the command line: verbs, and the names of what they take."""

from dataclasses import fields
from inspect import signature

import typer

import precimap as pm
from precimap.cli import app
from precimap.searching.question import Asked, Effort, Question, Serving, Terms

VERBS = {
    name: [option.lstrip("-").replace("-", "_") for one in command.params for option in one.opts[:1]]
    for name, command in typer.main.get_command(app).commands.items()  # type: ignore[attr-defined]
}
OF_THE_TERMINAL = {"config", "verbose", "width", "json", "output", "help"}
# Of a scheme: `Scheme.with_range` in Python.
OF_SCHEMES = {"input_range"}


def names_of(*records: type) -> set[str]:
    return {one.name for record in records for one in fields(record)}


def test_every_verb_is_in_both_doors() -> None:
    pages = {"layers": "discover", "report": "SearchResult", "demo": None}  # what Python has in their place
    for verb in VERBS:
        named = pages.get(verb, verb.replace("-", "_"))
        assert named is None or hasattr(pm, named), verb


def test_every_option_of_a_search_has_its_name_in_python() -> None:
    python = set(signature(pm.search).parameters) - {"asked"} | set(Asked.__annotations__) | set(Terms.__annotations__)
    python |= names_of(Effort, Serving, pm.Knapsack, pm.Constraints)
    typed = set(VERBS["search"]) - OF_THE_TERMINAL - OF_SCHEMES
    assert typed <= python
    # What only Python has: records that hold options, listeners, and how many units are looked at.
    assert python - typed == {
        *("effort", "serving", "constraints", "progress", "on_preflight", "ledger"),
        *("audit_units", "check_units", "screen_units"),
    }


def test_every_option_of_the_other_verbs_has_its_name_in_python() -> None:
    for verb, function in {
        "certify": pm.certify,
        "plan": pm.plan,
        "bench-device": pm.bench_device,
        "deploy": pm.deploy,
    }.items():
        python = set(signature(function).parameters) | set(Terms.__annotations__)
        assert set(VERBS[verb]) - OF_THE_TERMINAL <= python | {"precision_map"}, verb


def test_what_a_question_takes_stands_in_the_signature_of_search() -> None:
    """The names of the dict that types `search(**asked)` are the fields of the record that holds them."""
    assert {"margin", *Asked.__annotations__} == {one.name for one in fields(Question)}
