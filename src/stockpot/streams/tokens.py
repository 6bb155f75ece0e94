"""Tokenised examples in memory: one long tensor a column, padded a batch at a time.

Nothing is padded or copied before it is asked for: a hundred million tokens are one tensor, a
subset is a list of row numbers, and a batch is one gather.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from stockpot.streams.data import digest_of

__all__ = ["IGNORED", "Ragged", "TextBatch", "TextData"]

IGNORED = -100
"""The label of a token that is not learned (PyTorch's and Transformers' own mark)."""

TextBatch = dict[str, "Tensor | None"]
"""``input_ids`` (B, L), ``attention_mask`` (B, L) or None where nothing is padded, ``labels``."""


@dataclass(frozen=True)
class Ragged:
    """Rows of different lengths in one tensor: row n is ``values[begins[n]:begins[n + 1]]``."""

    values: Tensor
    begins: Tensor
    """(N + 1,) int64."""

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]], dtype: torch.dtype = torch.int32) -> Ragged:
        """From lists of numbers."""
        lengths = torch.tensor([0, *map(len, rows)])
        values = torch.tensor([value for row in rows for value in row], dtype=dtype)
        return cls(values, lengths.cumsum(0))

    def __len__(self) -> int:
        return len(self.begins) - 1

    def lengths(self) -> Tensor:
        """(N,) int64."""
        return self.begins.diff()

    def padded(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The rows side by side, padded on the right, and where there is something: (B, L) each."""
        begins = self.begins.index_select(0, rows).unsqueeze(1)
        ends = self.begins.index_select(0, rows + 1).unsqueeze(1)
        places = torch.arange(int((ends - begins).max())).unsqueeze(0)
        there = places < ends - begins
        # What is beyond a row's end is masked; it only must be some place in the tensor.
        return self.values[(begins + places).clamp_(max=max(0, len(self.values) - 1))], there


class TextData(Dataset[TextBatch]):
    """Tokenised examples that share their tensors.

    Args:
        inputs: the tokens of each example; for an encoder-decoder, what the encoder reads.
        learned: for each of those tokens whether it is learned (causal models); None for an
            encoder-decoder.
        targets: what the decoder is to say (encoder-decoder); None for causal models.
        pad: the token that fills up a batch; it is masked and never learned.
        rows: which of the examples belong to this data set; all by default.
    """

    def __init__(
        self,
        inputs: Ragged,
        learned: Tensor | None,
        targets: Ragged | None,
        pad: int,
        rows: Tensor | None = None,
    ) -> None:
        self.inputs, self.learned, self.targets, self.pad = inputs, learned, targets, pad
        self.rows = torch.arange(len(inputs)) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> TextBatch:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int] | Tensor) -> TextBatch:
        """The batch of these examples, as long as its longest."""
        rows = self.rows.index_select(0, torch.as_tensor(indices))
        values, there = self.inputs.padded(rows)
        tokens = torch.where(there, values, self.pad).long()
        if self.targets is not None:
            wanted, said = self.targets.padded(rows)
            labels = torch.where(said, wanted, IGNORED).long()
        else:
            assert self.learned is not None
            learned, _ = Ragged(self.learned, self.inputs.begins).padded(rows)
            labels = torch.where(there & learned, tokens, IGNORED)
        mask = None if bool(there.all()) else there.long()
        return {"input_ids": tokens, "attention_mask": mask, "labels": labels}

    def subset(self, indices: Tensor) -> TextData:
        """These examples, in this order, over the same tensors."""
        return TextData(self.inputs, self.learned, self.targets, self.pad, self.rows[indices])

    def lengths(self) -> Tensor:
        """(N,) how many tokens each example has, those of the answer included."""
        lengths = self.inputs.lengths()
        if self.targets is not None:
            lengths = lengths + self.targets.lengths()
        return lengths[self.rows]

    def nbytes(self) -> int:
        """Tokens of these examples, and which of them are learned."""
        a_token = self.inputs.values.element_size()
        if self.learned is not None:
            a_token += self.learned.element_size()
        total = int(self.inputs.lengths()[self.rows].sum()) * a_token
        if self.targets is not None:
            said = int(self.targets.lengths()[self.rows].sum())
            total += said * self.targets.values.element_size()
        return total

    def fingerprint(self, known: dict[int, bytes] | None = None) -> str:
        """SHA-256 of the tokens and of which are learned."""
        parts = [self.inputs.values, self.inputs.begins, self.learned, self.rows]
        if self.targets is not None:
            parts += [self.targets.values, self.targets.begins]
        return digest_of(parts, known)

    def joined(self, batches: Sequence[TextBatch]) -> TextBatch:
        """Several batches as one, as long as the longest of them."""
        tokens = [batch["input_ids"] for batch in batches]
        labels = [batch["labels"] for batch in batches]
        masks = [
            torch.ones_like(t) if batch["attention_mask"] is None else batch["attention_mask"]
            for t, batch in zip(tokens, batches, strict=True)
            if t is not None
        ]
        mask = _stacked(masks, 0)
        return {
            # A masked token may be any; 0 is in every vocabulary.
            "input_ids": _stacked(tokens, 0),
            "attention_mask": None if bool(mask.all()) else mask,
            "labels": _stacked(labels, IGNORED),
        }


def _stacked(parts: Sequence[Tensor | None], fill: int) -> Tensor:
    known = [part for part in parts if part is not None]
    width = max(part.shape[1] for part in known)
    return torch.cat(
        [torch.nn.functional.pad(part, (0, width - part.shape[1]), value=fill) for part in known]
    )
