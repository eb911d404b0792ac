"""Scores of texts: metrics of the libraries that define them, and rewards. All lie between 0 and 1."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

from pipeline.errors import UserError
from pipeline.objective.teacher import Load, found_folder
from pipeline.tasks.base import Asked, Batch, TaskModel
from pipeline.tasks.batching import pad

_IdsOf = Callable[[list[str]], list[list[int]]]


def chrf(prompt: str, completion: str, target: str) -> float:
    """chrF (Popović 2015) of one text, by sacrebleu."""
    import sacrebleu

    return float(sacrebleu.sentence_chrf(completion, [target]).score) / 100


def bleu(prompt: str, completion: str, target: str) -> float:
    """BLEU (Papineni et al. 2002) of one text, smoothed, by sacrebleu."""
    import sacrebleu

    return float(sacrebleu.sentence_bleu(completion, [target]).score) / 100


def rouge_l(prompt: str, completion: str, target: str) -> float:
    """ROUGE-L (Lin 2004): F of the longest common subsequence of words, by rouge-score."""
    return float(_rouge().score(target, completion)["rougeL"].fmeasure)


def exact_match(prompt: str, completion: str, target: str) -> float:
    """1 where both are the same but for case, punctuation, articles and spaces (SQuAD's script), else 0."""
    return float(normalised(completion) == normalised(target))


def token_f1(prompt: str, completion: str, target: str) -> float:
    """F1 of the words that both have, after the same normalisation (SQuAD's script)."""
    ours, theirs = normalised(completion).split(), normalised(target).split()
    if not ours or not theirs:
        return float(ours == theirs)
    shared = (Counter(ours) & Counter(theirs)).total()
    return 2 * shared / (len(ours) + len(theirs))


def regex(prompt: str, completion: str, *, pattern: str = "") -> float:
    """1 where ``pattern`` is found in the text, else 0. In quotes it may hold commas and plus signs."""
    return float(_compiled(pattern).search(completion) is not None)


def length(prompt: str, completion: str, *, words: int = 20) -> float:
    """1 at so many words, less in proportion to what is missing or too much, 0 at none and twice as many."""
    if words < 1:
        raise UserError(f"the objective length takes words above 0, got {words}")
    return max(0.0, 1.0 - abs(len(completion.split()) - words) / words)


def distinct(prompt: str, completion: str, *, n: int = 2) -> float:
    """The share of a text's n-grams of words that are different (Li et al. 2016); 0 where there are none."""
    if n < 1:
        raise UserError(f"the objective distinct takes n above 0, got {n}")
    words = completion.split()
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


class Classifier:
    """The probability that a classifier gives to ``label``; ``model`` is a run's ``models/finetuned``."""

    def __init__(self, load: Load, *, model: str = "", label: str = "") -> None:
        """Raises UserError where there is no such folder; the classifier is loaded when it is needed."""
        from pipeline.tasks.classification import HEAD_CONFIG, TextClassifier
        from pipeline.tasks.prompted import PROMPTED_FILE

        self._folder = found_folder(model, "classifier,model=runs/NAME/models/finetuned,label=LABEL")
        self._label = label
        self._read: tuple[TaskModel, _IdsOf, int, int] | None = None
        if not any((self._folder / name).is_file() for name in (HEAD_CONFIG, PROMPTED_FILE)):
            raise UserError(f"{self._folder} holds no classifier: it takes a run's models/finetuned")
        if not (self._folder / PROMPTED_FILE).is_file():
            TextClassifier.check(self._folder)

    def scores(self, asked: Asked, completions: Sequence[str]) -> list[float]:
        """Of each completion, read without its prompt."""
        import torch

        if self._read is None:
            self._read = self._load()
        model, tokens_of, pad_id, label = self._read
        tokens = [row or [pad_id] for row in tokens_of(list(completions))]
        with torch.inference_mode():
            probabilities = model(Batch(pad(tokens, pad_id), torch.empty(0))).float().softmax(-1)
        found: list[float] = probabilities[:, label].tolist()
        return found

    def _load(self) -> tuple[TaskModel, _IdsOf, int, int]:
        """The classifier, what makes ids of texts for it, the id of padding, and the label's number."""
        from pipeline.models.loading import load_tokenizer
        from pipeline.tasks.classification import TextClassifier
        from pipeline.tasks.phrased import load as load_completing
        from pipeline.tasks.prompted import PROMPTED_FILE
        from pipeline.tasks.template import Template

        tokenizer: Any = load_tokenizer(str(self._folder))
        longest = min(int(tokenizer.model_max_length), 512)
        model: TaskModel
        tokens_of: _IdsOf
        if (self._folder / PROMPTED_FILE).is_file():
            model = completing = load_completing(self._folder)
            labels, how = completing.prompting.labels, completing.prompting
            template = Template(how.template, tokenizer, masked=how.kind == "mlm")
            tokens_of = partial(template.tokens, max_length=longest, spare=completing.spare)
        else:
            model = headed = TextClassifier.load(self._folder)
            labels, tokens_of = headed.labels, partial(_ids, tokenizer, longest)
        if self._label not in labels:
            raise UserError(
                f"the classifier in {self._folder} has no label '{self._label}'; "
                f"its labels are {', '.join(labels)}"
            )
        return model, tokens_of, tokenizer.pad_token_id, labels.index(self._label)


def normalised(text: str) -> str:
    """As SQuAD's script compares answers (Rajpurkar et al. 2016)."""
    bare = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def corpus_bleu(completions: Sequence[str], targets: Sequence[str]) -> float:
    """BLEU of all texts together, by sacrebleu."""
    import sacrebleu

    return float(sacrebleu.corpus_bleu(list(completions), [list(targets)]).score) / 100


def corpus_chrf(completions: Sequence[str], targets: Sequence[str]) -> float:
    """chrF of all texts together, by sacrebleu."""
    import sacrebleu

    return float(sacrebleu.corpus_chrf(list(completions), [list(targets)]).score) / 100


def _ids(tokenizer: Any, longest: int, texts: list[str]) -> list[list[int]]:
    found: list[list[int]] = tokenizer(texts, truncation=True, max_length=longest)["input_ids"]
    return found


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    if not pattern:
        raise UserError(r"the objective regex needs a pattern: regex,pattern=\d+")
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"the pattern '{pattern}' of the objective regex is none: {error}") from None


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"])
