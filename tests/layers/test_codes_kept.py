"""Inside a search each weight is quantised once under each scheme."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import torch

from precimap.layers.quantized import QuantizedLayer, codes_kept, quantize_layer
from precimap.numerics.schemes import BF16_FLOOR, SCHEMES, Scheme

WEIGHT = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))


def coded(scheme: Scheme = SCHEMES["fp8"], weight: torch.Tensor = WEIGHT) -> QuantizedLayer:
    return quantize_layer("weight", weight, (1,), scheme, None)


def test_the_same_codes_come_again_inside_the_block_alone() -> None:
    assert coded() is not coded()
    with codes_kept():
        assert coded() is coded()
        assert coded(SCHEMES["int8"]) is not coded()
        assert coded(weight=WEIGHT.clone()) is not coded()
        with ThreadPoolExecutor(1) as other:
            assert other.submit(coded).result() is not coded()
    assert coded() is not coded()


def test_a_weight_that_was_written_is_quantised_anew() -> None:
    weight = WEIGHT.clone()
    with codes_kept():
        first = coded(weight=weight)
        weight.mul_(2)
        assert torch.equal(coded(weight=weight).weight(), 2 * first.weight())


def test_codes_of_two_bytes_are_not_held() -> None:
    with codes_kept():
        held, floor = (weakref.ref(coded(scheme).codes) for scheme in (SCHEMES["fp8"], BF16_FLOOR))
        gc.collect()
        assert held() is not None
        assert floor() is None
    gc.collect()
    assert held() is None
