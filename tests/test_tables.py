"""Tables that a person can read at 80 columns."""

import io

from rich.console import Console

from precimap.layers.inventory import ActivationProduct, Inventory
from precimap.report.inventory_table import PRODUCTS_SHOWN, inventory_table
from precimap.report.tables import short_name


def test_a_name_keeps_what_tells_layers_apart() -> None:
    name = "transformer.encoder.layer.10.attention.self.query.weight"
    assert short_name(name, 80) == "transformer.encoder.layer.10.attention.self.query"
    assert short_name(name, 32) == "…layer.10.attention.self.query"
    assert short_name("a" * 50, 10) == "…" + "a" * 9


def test_products_of_activations_are_shown_within_80_columns() -> None:
    many = tuple(ActivationProduct("bmm", (8, 1000 + i, 128), (8, 128, 64), 2, 1000 * (40 - i)) for i in range(40))
    attention = ActivationProduct("scaled_dot_product_attention", (256, 12, 128, 64), (256, 12, 128, 64), 12, 10**12)
    lines = shown(Inventory((), (), 8, (), (attention, *many)))

    assert max(map(len, lines)) <= 80
    (first,) = [line for line in lines if "256x12x128x64 256x12x128x64" in line]
    assert first.split()[-3:] == ["12", "1,000,000,000,000", "100.0%"]
    left_out = sum(product.flops for product in many[PRODUCTS_SHOWN - 1 :])
    (rest,) = [line for line in lines if "29 others" in line]
    assert rest.split()[-3:] == ["58", f"{left_out:,}", "0.0%"]


def test_a_model_without_such_products_has_no_table_of_them() -> None:
    assert not any("products" in line for line in shown(Inventory((), (), 8, (), ())))


def shown(inventory: Inventory) -> list[str]:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(inventory_table(inventory))
    return [line.rstrip() for line in console.export_text().splitlines()]
