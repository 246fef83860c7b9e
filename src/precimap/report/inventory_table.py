"""What discovery found in a model, as rich tables that fit 80 columns.

Layers, the other parameters and why they are none, the products without a weight, and where the FLOPs are: together they
leave nothing of the model unsaid. Every share is of the whole model: of all FLOPs that are counted, of the bytes of all
parameters.
"""

import itertools

from rich.console import Group, RenderableType
from rich.text import Text

from precimap.layers.inventory import Inventory
from precimap.report.tables import megabytes, short_name
from precimap.report.terminal import Rows, lines_of

PRODUCTS_SHOWN = 12


def inventory_table(inventory: Inventory) -> RenderableType:
    """Every parameter of a model: the layers, the others by reason, the products without a weight, where the FLOPs are."""
    table = Rows(title=f"{len(inventory.layers)} layers", title_justify="left", box=None, pad_edge=False)
    table.add_column("layer", no_wrap=True)
    table.add_column("op", no_wrap=True)
    table.add_column("shape", no_wrap=True)
    table.add_column("FLOPs", justify="right")
    table.add_column("bytes", justify="right")
    table.add_column("shares", no_wrap=True)
    for layer in inventory.layers:
        share = _part(layer.flops, inventory.flops)
        note = "dead" if layer.dead else ("scheme+input" if layer.fused and layer.siblings else "")
        note = note or ("scheme" if layer.fused else "") or ("input" if layer.siblings else "")
        shape = "x".join(map(str, layer.shape))
        size = f"{_part(layer.bytes, inventory.bytes):.1%}"
        table.add_row(short_name(layer.name), ",".join(layer.ops)[:12], shape, f"{share:.1%}", size, note)
    parts = (table, _others(inventory), *([_products(inventory)] if inventory.products else []), _coverage(inventory))
    return Group(*(part for pair in zip(parts, itertools.repeat(Text())) for part in pair))


def _others(inventory: Inventory) -> RenderableType:
    table = Rows(title="other parameters", title_justify="left", box=None, pad_edge=False)
    table.add_column("count", justify="right")
    table.add_column("values", justify="right")
    table.add_column("why precision is not chosen for them")
    reasons: dict[str, list[int]] = {}
    for other in inventory.others:
        reasons.setdefault(other.reason, []).append(other.numel)
    for reason, sizes in reasons.items():
        table.add_row(str(len(sizes)), f"{sum(sizes):,}", reason)
    return table


def _products(inventory: Inventory) -> RenderableType:
    title = "activation x activation products"
    table = Rows(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("op", no_wrap=True, max_width=16)
    for heading in ("left", "right"):
        table.add_column(heading, no_wrap=True)
    for heading in ("calls", "FLOPs", "of all"):
        table.add_column(heading, justify="right", no_wrap=True)
    every = inventory.flops
    for product in inventory.products[:PRODUCTS_SHOWN]:
        shapes = ("x".join(map(str, shape)) for shape in (product.left, product.right))
        table.add_row(product.op, *shapes, f"{product.calls:,}", f"{product.flops:,}", f"{product.flops / every:.1%}")
    rest = inventory.products[PRODUCTS_SHOWN:]
    if rest:
        flops = sum(product.flops for product in rest)
        calls = sum(product.calls for product in rest)
        table.add_row(f"{len(rest)} others", "--json", "", f"{calls:,}", f"{flops:,}", f"{flops / every:.1%}")
    return table


def _coverage(inventory: Inventory) -> RenderableType:
    every, hidden = inventory.flops, inventory.weight_flops - inventory.layer_flops
    tables = sum(x.bytes for x in inventory.layers if x.table)
    lines = [
        f"{inventory.parameters:,} parameters, all accounted for",
        f"bytes of all parameters: {megabytes(inventory.bytes)}, {_part(inventory.layer_bytes, inventory.bytes):.1%} in "
        f"layers, {_part(tables, inventory.bytes):.1%} in embedding tables",
        f"FLOPs: {every:,} in a batch of {inventory.units}, {inventory.covered:.1%} in layers",
        f"activation x activation FLOPs: {inventory.activation_flops:,}, {_part(inventory.activation_flops, every):.1%}, "
        "always in base precision",
    ]
    if hidden:
        lines.append(f"FLOPs that no layer stands for: {hidden:,}, {_part(hidden, every):.1%}, in base precision")
    lines += [
        f"hidden from layers: {where}, {flops:,} FLOPs, {_part(flops, every):.1%}"
        for where, flops in inventory.hidden_flops[:PRODUCTS_SHOWN]
    ]
    rest = inventory.hidden_flops[PRODUCTS_SHOWN:]
    if rest:
        lines.append(f"hidden from layers: {len(rest)} others (--json), {sum(flops for _, flops in rest):,} FLOPs")
    lines += [f"no FLOPs are known of, and in no share: {where}" for where in inventory.uncounted]
    lines += [f"dead: {layer.name}: {layer.dead}" for layer in inventory.layers if layer.dead]
    return lines_of(lines)


def _part(some: int, every: int) -> float:
    return some / every if every else 0.0
