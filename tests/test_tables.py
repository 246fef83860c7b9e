"""Tables that a person can read at 80 columns."""

from precimap.report.tables import short_name


def test_a_name_keeps_what_tells_layers_apart() -> None:
    name = "transformer.encoder.layer.10.attention.self.query.weight"
    assert short_name(name, 80) == "transformer.encoder.layer.10.attention.self.query"
    assert short_name(name, 32) == "…layer.10.attention.self.query"
    assert short_name("a" * 50, 10) == "…" + "a" * 9
