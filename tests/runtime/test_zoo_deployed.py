"""Models that nobody here wrote, deployed: they compute what was emulated, and stay what they were to foreign code."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import zoo, zoo_language, zoo_senses
from helpers.small_maps import map_over, premise_for
from helpers.specimen import Builder
from helpers.zoo_deployed import calibrated, examined, int8_choice, names, rms
from precimap import Splits, Task, deploy, discover
from precimap.layers.emulation import quantized
from precimap.layers.quantized import quantize_map
from precimap.metrics import Loss
from precimap.runtime.weights.placing import low_weights

pytestmark = pytest.mark.filterwarnings("ignore")  # of maps made by hand, and of the libraries about their own parts
MODELS: tuple[Builder, ...] = (
    *zoo.ZOO,
    *zoo_language.DECODERS,
    *zoo_language.STATES,
    *zoo_language.ENCODERS,
    *zoo_language.PAIRS,
    *zoo_senses.PICTURES,
    *zoo_senses.SIGNALS,
)
# A fused recurrent call and a single column, weights that are computed, a weight that is multiplied from both sides.
NOTHING_LOW = {"lstm", "weight_norm_mlp", "tied_autoencoder"}


@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
def test_a_model_of_the_zoo_is_deployed(build: Builder, tmp_path: Path) -> None:
    outcome = examined(build(), tmp_path)
    assert (outcome.low + outcome.tables > 0) == (build.__name__ not in NOTHING_LOW)


def test_the_zoo_is_large() -> None:
    assert len({build.__name__ for build in MODELS}) == len(MODELS) >= 130


@pytest.fixture
def encoder(tmp_path: Path) -> Any:
    """A sentence encoder: BERT with a tokenizer of a few words, and the mean over its tokens."""
    sentences = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
    transformers = pytest.importorskip("transformers", reason="needs the demo extra")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"open a file read the list of numbers and close it again".split()]
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(dict.fromkeys(words)))
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    transformers.BertTokenizerFast(str(vocabulary)).save_pretrained(tmp_path / "bert")
    return sentences.SentenceTransformer(str(tmp_path / "bert"), device="cpu").eval()


def test_a_sentence_encoder_goes_on_encoding(encoder: Any) -> None:
    texts = ["open a file", "the list of numbers", "read it again and close the file"]

    def forward(model: Any, batch: dict[str, Tensor]) -> Tensor:
        found: Tensor = model(dict(batch))["sentence_embedding"]
        return found

    batch = {name: value for name, value in encoder.preprocess(texts).items() if isinstance(value, Tensor)}
    inventory = discover(encoder, forward, batch)
    splits = Splits([batch], [batch], [batch])
    task = Task(encoder, splits=splits, forward=forward, loss=lambda scores, _: scores.sum(1), metric=Loss())
    chosen = map_over(inventory, int8_choice(inventory), "cpu-int8", premise_for(encoder))
    chosen = calibrated(chosen, task)
    fast = deploy(encoder, chosen, task=task)
    assert len(low_weights(fast)) >= 12
    assert names(fast) == names(encoder)
    base, found = (torch.from_numpy(model.encode(texts)) for model in (encoder, fast))
    with quantized(encoder, quantize_map(encoder, chosen)):
        emulation = torch.from_numpy(encoder.encode(texts))
    assert rms(found, emulation) < 0.1 * rms(emulation, base)
    assert torch.equal(torch.from_numpy(fast.encode(texts)), found)
