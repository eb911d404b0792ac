"""Text classification by a language model that completes a template with a label's word.

The start is zero-shot, and close to the task: what makes fine-tuning by forward passes alone possible
(Malladi et al. 2023, table 4). Where each word is one token, of the vocabulary only the labels' words are
computed; `pipeline.tasks.phrased` has words of several.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pipeline.tasks.base import Batch
from pipeline.tasks.language_modelling import LanguageModel
from pipeline.tasks.template import Template

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROMPTED_FILE = "prompted.json"  # beside the language model


@dataclass(frozen=True)
class Prompting:
    """How a language model classifies; all that is kept beside it.

    ``words`` has the word of each of ``labels``, ``tokens`` the id of its first token, ``rest`` those of the
    others: it is empty where no word has any. ``answer`` is where the first is predicted, an index among a
    text's tokens, from the end where it is negative. ``kind`` is ``mlm`` or ``clm``.
    """

    kind: str
    template: str
    labels: list[str]
    words: list[str]
    tokens: list[int]
    answer: int
    rest: list[list[int]] = field(default_factory=list)

    @classmethod
    def spelling(
        cls, kind: str, template: Template, labels: Sequence[str], words: Sequence[str]
    ) -> Prompting:
        """``words`` as the template's tokenizer spells them. Raises UserError as `Template.words` does."""
        ids = template.words(words)
        rest = [word[1:] for word in ids]
        first = [word[0] for word in ids]
        several = rest if any(rest) else []
        return cls(kind, template.text, list(labels), list(words), first, template.answer, several)

    def spelled(self, label: int) -> list[int]:
        """All tokens of a label's word."""
        return [self.tokens[label], *(self.rest[label] if self.rest else ())]


class CompletingClassifier(LanguageModel):
    """A language model that says which label's word completes a text's template."""

    copies, spare = 1, 0
    """Rows that it reads of each text, and tokens that are added to them."""

    def __init__(self, model: PreTrainedModel, prompting: Prompting) -> None:
        super().__init__(model)
        self.prompting = prompting

    def rows(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the encoder reads of texts ``[examples, tokens]``: ``copies`` rows of each in turn."""
        return inputs

    def at_words(self, states: Tensor, mask: Tensor) -> Tensor:
        """Of the rows' states those that the words are predicted from: ``[examples, …, hidden]``.

        ``mask`` is the texts' own, before `rows`.
        """
        raise NotImplementedError

    def features(self, batch: Batch) -> Tensor:
        """Hidden states where the words' tokens are predicted."""
        states: Tensor = self.encoder(**self.rows(batch.inputs)).last_hidden_state
        return self.at_words(states, batch.inputs["attention_mask"])

    def places(self, mask: Tensor) -> Tensor:
        """Where in each text the word begins to be predicted: int64 ``[examples]``."""
        answer, lengths = self.prompting.answer, mask.sum(1)
        return lengths + answer if answer < 0 else torch.full_like(lengths, answer)

    def save(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """The whole language model as a ``save_pretrained`` directory, and how it classifies as JSON."""
        super().save(folder, tokenizer)
        kept = {key: value for key, value in asdict(self.prompting).items() if key != "rest" or value}
        said = json.dumps(kept, indent=2, ensure_ascii=False)
        (folder / PROMPTED_FILE).write_text(said + "\n", encoding="utf-8")


class PromptedClassifier(CompletingClassifier):
    """Words of one token: it is read at one position of each text, and its vocabulary is the labels' words.

    In place of its output layer stand the words' rows alone. Where that layer is the embedding, they are
    looked up in it, so that a tied weight stays one; where it is a layer of its own, they are copied out,
    trained as the head, and written back when the model is saved.
    """

    def __init__(self, model: PreTrainedModel, prompting: Prompting) -> None:
        super().__init__(model, prompting)
        given: Any = model  # typed in part
        whole = given.get_output_embeddings()
        tied = whole.weight is given.get_input_embeddings().weight
        tokens = torch.tensor(prompting.tokens, device=whole.weight.device)
        words = TiedWords(whole, tokens) if tied else _copied(whole, tokens)
        # not among the model's parameters: nothing but the words' rows is read of it
        self._whole = (whole,)
        self._words = (words,)
        _exchange(model, whole, words)

    def at_words(self, states: Tensor, mask: Tensor) -> Tensor:
        """``[examples, hidden]``."""
        return states[torch.arange(len(states), device=states.device), self.places(mask)]

    def save(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """As `CompletingClassifier.save`."""
        with self._restored():
            super().save(folder, tokenizer)

    def save_adapter(self, folder: Path, base: str, rank: int) -> None:
        """As `TaskModel.save_adapter`: of the whole language model."""
        with self._restored():
            super().save_adapter(folder, base, rank)

    @contextmanager
    def _restored(self) -> Iterator[None]:
        """Within it, the model has its whole output layer, with the words' rows as they are now."""
        [whole], [words] = self._whole, self._words
        with torch.no_grad():
            for row, token in enumerate(self.prompting.tokens):
                if isinstance(words, nn.Linear):
                    whole.weight[token] = words.weight[row]
                if words.bias is not None:
                    whole.bias[token] = words.bias[row]
        _exchange(self.model, words, whole)
        try:
            yield
        finally:
            _exchange(self.model, whole, words)


class TiedWords(nn.Module):
    """Logits of some words, by their rows of an embedding that the model also reads with."""

    def __init__(self, whole: Any, tokens: Tensor) -> None:
        super().__init__()
        self.rows = nn.Embedding(1, 1)
        self.rows.weight = whole.weight
        self.bias = None if whole.bias is None else nn.Parameter(whole.bias.detach()[tokens])
        self.register_buffer("tokens", tokens, persistent=False)
        self.tokens: Tensor

    def forward(self, states: Tensor) -> Tensor:
        """``[texts, 1, hidden]`` gives ``[texts, 1, words]``."""
        rows = self.rows(self.tokens.expand(len(states), -1))
        logits: Tensor = states @ rows.mT
        return logits if self.bias is None else logits + self.bias


def _copied(whole: Any, tokens: Tensor) -> nn.Linear:
    weight = whole.weight.detach()
    words = nn.Linear(weight.shape[1], len(tokens), whole.bias is not None, weight.device, weight.dtype)
    words.weight = nn.Parameter(weight[tokens])
    if whole.bias is not None:
        words.bias = nn.Parameter(whole.bias.detach()[tokens])
    return words


def _exchange(model: nn.Module, old: Any, new: Any) -> None:
    """Puts ``new`` where ``old`` is, and its bias where the old one's is: some models hold it twice."""
    bias = old.bias
    for module in list(model.modules()):
        if module is old or module is new:
            continue
        for name, child in list(module.named_children()):
            if child is old:
                setattr(module, name, new)
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter is bias:
                module._parameters[name] = new.bias
