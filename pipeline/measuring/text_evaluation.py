"""Held-out figures of tasks that write: what was written, held against what should have been."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from pipeline.measuring import scores
from pipeline.measuring.evaluation import predictions
from pipeline.objective import TextObjective
from pipeline.tasks.base import Asked, Batch, TaskModel, Tested

References = Sequence[tuple[str, ...]]
Score = Callable[[str, str, str], float]
Figure = Callable[[Sequence[str], References], float]
"""Completions and their references to a figure from 0 to 1."""


def best(score: Score, completion: str, references: tuple[str, ...]) -> float:
    """The score beside the reference that it is highest with."""
    return max(score("", completion, each) for each in references)


def mean_of(score: Score) -> Figure:
    """The mean of a score of one text."""
    return lambda completions, references: float(
        np.mean([best(score, *pair) for pair in zip(completions, references, strict=True)])
    )


def _of_first(figure: Callable[[Sequence[str], Sequence[str]], float]) -> Figure:
    """A figure of all texts together, beside the first reference of each."""
    return lambda completions, references: figure(completions, [each[0] for each in references])


FIGURES: dict[str, Figure] = {
    "bleu": _of_first(scores.corpus_bleu),
    "chrf": _of_first(scores.corpus_chrf),
    "rouge_l": mean_of(scores.rouge_l),
    "exact_match": mean_of(scores.exact_match),
    "token_f1": mean_of(scores.token_f1),
}


class TextExaminer:
    """The `Examiner` of what a model writes.

    ``figures`` name those of `FIGURES` that are taken where there are references; ``each``, a function of
    `pipeline.measuring.scores`, is what a text's own score is. ``scored`` gives the objective if it scores
    texts, whose mean is then ``score``. ``loss`` is the cross-entropy of the references' tokens in nats;
    without any, the negative score.
    """

    def __init__(
        self,
        figures: Sequence[str],
        each: str,
        scored: Callable[[], TextObjective | None],
    ) -> None:
        self._figures = figures
        self._each: Score = getattr(scores, each)
        self._scored = scored

    def measure(self, model: TaskModel, batches: Sequence[Batch]) -> dict[str, float]:
        """``loss``; ``score`` and its standard deviation over the texts; the task's figures; ``words``."""
        return self.test(model, batches).figures

    def test(self, model: TaskModel, batches: Sequence[Batch]) -> Tested:
        """`measure`; a text's loss is its mean cross-entropy, or its negative score."""
        asked, completions = _written(model, batches)
        texts = [text for each in completions for text in each]
        figures: dict[str, float] = {}
        each, losses = [], []
        if objective := self._scored():
            pairs = zip(asked, completions, strict=True)
            each = [score for batch, written in pairs for score in objective.scores(batch, written)]
            figures = {"score": float(np.mean(each)), "score_sd": float(np.std(each))}
            losses, figures["loss"] = [-score for score in each], -figures["score"]
        references = [several for batch in asked for several in batch.references or ()]
        if references:
            losses = _cross_entropies(model, batches)
            figures["loss"] = float(np.average(losses, weights=_lengths(batches)))
            figures |= {name: FIGURES[name](texts, references) for name in self._figures}
            each = [best(self._each, *pair) for pair in zip(texts, references, strict=True)]
        figures["words"] = float(np.mean([len(text.split()) for text in texts]))
        return Tested({"loss": figures.pop("loss"), **figures}, losses, each, texts)


@torch.inference_mode()
def _written(model: TaskModel, batches: Sequence[Batch]) -> tuple[list[Asked], list[list[str]]]:
    device = next(model.parameters()).device
    moved = [batch.to(device) for batch in batches]
    return [batch.asked for batch in moved if batch.asked], [model.write(batch) for batch in moved]


def _cross_entropies(model: TaskModel, batches: Sequence[Batch]) -> list[float]:
    """The mean over each example's targets."""
    losses = predictions(model, batches).losses
    assert losses is not None
    return [float(part.double().mean()) for part in torch.split(losses, _lengths(batches))]


def _lengths(batches: Sequence[Batch]) -> list[int]:
    return [length for batch in batches if batch.asked for length in batch.asked.lengths]
