"""Self-supervised learning: masked (BERT, Devlin et al. 2019) and causal language modelling.

Logits are computed only where there is a target: the vocabulary's matrix is most of a small model's forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.noise import derive
from pipeline.tasks.base import Batch, TaskModel
from pipeline.tasks.batching import pad

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class LanguageModel(TaskModel):
    """A ``transformers`` model with its language-modelling head, split at its base model."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    @property
    def whole(self) -> nn.Module:
        """With its head."""
        return self.model

    @property
    def encoder(self) -> nn.Module:  # type: ignore[override]
        """The base model: everything below the head."""
        base: nn.Module = self.model.base_model
        return base

    def features(self, batch: Batch) -> Tensor:
        """Hidden states at the positions with a target: ``[outputs, hidden]``."""
        states: Tensor = self.encoder(**batch.inputs).last_hidden_state
        return states.flatten(0, 1)[batch.positions]

    def outputs(self, features: Tensor) -> Tensor:
        """Logits ``[outputs, vocabulary]``."""
        return self.logits(features[:, None])[:, 0]

    def logits(self, states: Tensor) -> Tensor:
        """``[texts, tokens, hidden]`` to ``[texts, tokens, vocabulary]`` by the model's own head."""
        prefix = self.model.base_model_prefix
        base = getattr(self.model, prefix)
        setattr(self.model, prefix, _Given(states))
        try:
            logits: Tensor = self.model(
                input_ids=torch.zeros(1, 1, dtype=torch.long, device=states.device)
            ).logits
        finally:
            setattr(self.model, prefix, base)
        return logits

    def save(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """A ``save_pretrained`` directory."""
        from pipeline.models.loading import save_model

        save_model(self.model, folder)
        tokenizer.save_pretrained(str(folder))


class _Given(nn.Module):
    """Stands in for a base model and answers with hidden states computed before."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self._states = states

    @property
    def decoder(self) -> _Given:
        """Some causal models (OPT, BART) go past their base model to its decoder."""
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=self._states)


class CorpusData:
    """Unlabelled texts, each cut to ``max_length`` tokens, and batches with targets from them.

    Raises:
        UserError: none has a token to predict.
    """

    def __init__(
        self,
        texts: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        task: str,
        mask_probability: float,
    ) -> None:
        tokens = tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]
        self._tokenizer = tokenizer
        self._special = np.asarray(sorted(set(tokenizer.all_special_ids)), dtype=np.int64)
        self._tokens = [row for row in tokens if len(row) > 2 and not np.isin(row, self._special).all()]
        if not self._tokens:
            raise UserError(
                f"none of the corpus's {len(texts):,} texts has three tokens to this model's tokenizer; "
                "see prepare.corpus"
            )
        self._task = task
        self._probability = mask_probability

    def __len__(self) -> int:
        return len(self._tokens)

    def batch(self, rows: Sequence[int], seed: int) -> Batch:
        """The batch of those rows; for ``mlm`` the masks are drawn from ``seed``."""
        inputs = pad([self._tokens[i] for i in rows], self._tokenizer.pad_token_id)
        if self._task == "clm":
            return self._next_tokens(inputs)
        return self._masked(inputs, np.random.default_rng(seed))

    def _next_tokens(self, inputs: dict[str, Tensor]) -> Batch:
        ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
        has_next = torch.zeros_like(mask)
        has_next[:, :-1] = mask[:, 1:]
        positions = has_next.flatten().nonzero().squeeze(-1)
        return Batch(inputs, ids.flatten()[positions + 1], positions)

    def _masked(self, inputs: dict[str, Tensor], rng: np.random.Generator) -> Batch:
        """Of the positions chosen, 80% become the mask, 10% a random token, 10% stay."""
        ids = inputs["input_ids"].numpy()
        eligible = inputs["attention_mask"].numpy().astype(bool) & ~np.isin(ids, self._special)
        chosen = eligible & (rng.random(ids.shape) < self._probability)
        if not chosen.any():  # a batch without a target has no loss
            chosen.flat[rng.choice(np.flatnonzero(eligible))] = True
        positions = np.flatnonzero(chosen)
        targets = ids.flat[positions].copy()
        fate, replaced = rng.random(len(positions)), ids.copy()
        replaced.flat[positions[fate < 0.8]] = self._tokenizer.mask_token_id
        random = (fate >= 0.8) & (fate < 0.9)
        replaced.flat[positions[random]] = rng.integers(len(self._tokenizer), size=int(random.sum()))
        masked = {**inputs, "input_ids": torch.from_numpy(replaced)}
        return Batch(masked, torch.from_numpy(targets), torch.from_numpy(positions))


def validation_batches(data: CorpusData, limit: int, batch_size: int, seed: int) -> list[Batch]:
    """The first ``limit`` rows with masks that never change, so that losses can be compared."""
    rows = range(min(limit, len(data)))
    return [data.batch(rows[i : i + batch_size], derive(seed, 3, i)) for i in range(0, len(rows), batch_size)]


def target_size(batches: Sequence[Batch], tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """How many targets there are, and for how many bytes of UTF-8; the tokenizer's marks stand for none."""
    texts = [str(tokenizer.decode(batch.targets.tolist(), skip_special_tokens=True)) for batch in batches]
    return sum(len(batch.targets) for batch in batches), sum(len(text.encode()) for text in texts)
