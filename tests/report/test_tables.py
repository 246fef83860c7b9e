"""Tables that a person can read at 80 columns."""

import io

from rich.console import Console

from precimap.layers.inventory import ActivationProduct, Inventory, Layer, OtherParameter
from precimap.report.inventory_table import PRODUCTS_SHOWN, inventory_table
from precimap.report.tables import short_name


def test_a_name_keeps_what_tells_layers_apart() -> None:
    name = "transformer.encoder.layer.10.attention.self.query.weight"
    assert short_name(name, 80) == "transformer.encoder.layer.10.attention.self.query"
    assert short_name(name, 32) == "…layer.10.attention.self.query"
    assert short_name("a" * 50, 10) == "…" + "a" * 9


def test_products_of_activations_are_shown_within_80_columns() -> None:
    many = tuple(
        ActivationProduct(op="bmm", left=(8, 1000 + i, 128), right=(8, 128, 64), calls=2, flops=1000 * (40 - i))
        for i in range(40)
    )
    attention = ActivationProduct(
        op="scaled_dot_product_attention", left=(256, 12, 128, 64), right=(256, 12, 128, 64), calls=12, flops=10**12
    )
    lines = shown(Inventory(layers=(), others=(), units=8, hidden_flops=(), products=(attention, *many)))

    assert max(map(len, lines)) <= 80
    (first,) = [line for line in lines if "256x12x128x64 256x12x128x64" in line]
    assert first.split()[-3:] == ["12", "1,000,000,000,000", "100.0%"]
    left_out = sum(product.flops for product in many[PRODUCTS_SHOWN - 1 :])
    (rest,) = [line for line in lines if "29 others" in line]
    assert rest.split()[-3:] == ["58", f"{left_out:,}", "0.0%"]


def test_a_model_without_such_products_has_no_table_of_them() -> None:
    assert not any(
        "products" in line for line in shown(Inventory(layers=(), others=(), units=8, hidden_flops=(), products=()))
    )


def shown(inventory: Inventory) -> list[str]:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(inventory_table(inventory))
    return [line.rstrip() for line in console.export_text().splitlines()]


def test_every_share_is_of_the_whole_model() -> None:
    """An LSTM with nearly all of the bytes and FLOPs beside one small layer, some attention and a call nobody counts."""
    layer = Layer(
        name="head.weight",
        shape=(4, 8),
        dtype="float32",
        element_bytes=4,
        ops=("linear",),
        calls=1,
        flops=100,
        contracted=(1,),
        inputs=8,
        outputs=4,
    )
    lstm = OtherParameter(
        name="lstm.weight", shape=(100, 100), reason="inside the fused recurrent call lstm, which is not supported"
    )
    attention = ActivationProduct(op="bmm", left=(8, 10, 4), right=(8, 4, 10), calls=1, flops=300)
    hidden = (("lstm (LSTM): lstm / aten.mkldnn_rnn_layer", 600),)
    lines = shown(
        Inventory(
            layers=(layer,),
            others=(lstm,),
            units=8,
            hidden_flops=hidden,
            products=(attention,),
            uncounted=("odd (Odd): mine.product",),
        )
    )

    (row,) = [line for line in lines if line.startswith("head ")]
    assert row.split()[3:5] == ["10.0%", "0.3%"]
    (product,) = [line for line in lines if line.startswith("bmm ")]
    assert product.split()[-1] == "30.0%"
    text = " ".join(lines)
    assert "bytes of all parameters: 40.1 kB, 0.3% in layers, 0.0% in embedding tables" in text
    assert "FLOPs: 1,000 in a batch of 8, 10.0% in layers" in text
    assert "activation x activation FLOPs: 300, 30.0%, always in base precision" in text
    assert "FLOPs that no layer stands for: 600, 60.0%, in base precision" in text
    assert "hidden from layers: lstm (LSTM): lstm / aten.mkldnn_rnn_layer, 600 FLOPs, 60.0%" in text
    assert "no FLOPs are known of, and in no share: odd (Odd): mine.product" in text
