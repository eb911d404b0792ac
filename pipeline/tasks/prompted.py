"""Text classification by a language model that completes a template with a label's word.

The start is zero-shot, and close to the task: what makes fine-tuning by forward passes alone possible
(Malladi et al. 2023, table 4). Of the vocabulary only the labels' words are computed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.tasks.base import Batch
from pipeline.tasks.language_modelling import LanguageModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROMPTED_FILE = "prompted.json"  # beside the language model


@dataclass(frozen=True)
class Prompting:
    """How a language model classifies; all that is kept beside it.

    ``words`` has the word of each of ``labels``, ``tokens`` its id; ``answer`` is where it is predicted, an
    index among a text's tokens, from the end where it is negative. ``kind`` is ``mlm`` or ``clm``.
    """

    kind: str
    template: str
    labels: list[str]
    words: list[str]
    tokens: list[int]
    answer: int


class PromptedClassifier(LanguageModel):
    """A language model, read at one position of each text, whose vocabulary is the labels' words.

    In place of its output layer stand the words' rows alone. Where that layer is the embedding, they are
    looked up in it, so that a tied weight stays one; where it is a layer of its own, they are copied out,
    trained as the head, and written back when the model is saved.
    """

    def __init__(self, model: PreTrainedModel, prompting: Prompting) -> None:
        super().__init__(model)
        self.prompting = prompting
        given: Any = model  # typed in part
        whole = given.get_output_embeddings()
        tied = whole.weight is given.get_input_embeddings().weight
        tokens = torch.tensor(prompting.tokens, device=whole.weight.device)
        words = TiedWords(whole, tokens) if tied else _copied(whole, tokens)
        # not among the model's parameters: nothing but the words' rows is read of it
        self._whole = (whole,)
        self._words = (words,)
        _exchange(model, whole, words)

    def features(self, batch: Batch) -> Tensor:
        """Hidden states where the word is predicted: ``[examples, hidden]``."""
        states: Tensor = self.encoder(**batch.inputs).last_hidden_state
        answer = self.prompting.answer
        lengths = batch.inputs["attention_mask"].sum(1)
        places = lengths + answer if answer < 0 else torch.full_like(lengths, answer)
        return states[torch.arange(len(states), device=states.device), places]

    def save(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """The whole language model as a ``save_pretrained`` directory, and how it classifies as JSON."""
        with self._restored():
            super().save(folder, tokenizer)
        said = json.dumps(asdict(self.prompting), indent=2, ensure_ascii=False)
        (folder / PROMPTED_FILE).write_text(said + "\n", encoding="utf-8")

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

    @classmethod
    def load(cls, folder: Path) -> PromptedClassifier:
        """What `save` wrote.

        Raises:
            UserError: the folder holds no prompted classifier.
        """
        from pipeline.models import load_language_model

        path = folder / PROMPTED_FILE
        if not path.is_file():
            raise UserError(f"{folder} holds no prompted classifier; run the finetune stage first")
        prompting = Prompting(**json.loads(path.read_text(encoding="utf-8")))
        return cls(load_language_model(str(folder), prompting.kind, 0, "auto"), prompting).eval()


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
