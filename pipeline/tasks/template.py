"""A text in a template, which a language model completes with a word for its label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pipeline.config import FinetuneConfig

TEXT, MASK = "{text}", "{mask}"


def check(options: FinetuneConfig) -> None:
    """What can be told of a template and its words without a model.

    Raises:
        UserError: a template without ``{text}``, or words without a template.
    """
    if options.template is None and options.verbalizers:
        raise UserError(
            "finetune.verbalizers are words for a template: set finetune.template, or leave them out"
        )
    if options.template is not None and options.template.count(TEXT) != 1:
        raise UserError(f"finetune.template '{_shown(options.template)}' must hold {TEXT} once")


def _shown(template: str) -> str:
    return template.replace("\n", "\\n")


class Template:
    """What stands around a text, for one model's tokenizer; it has passed `check`.

    ``answer`` is where among a text's tokens the word is predicted: an index from the start, or a negative
    one from the end. It is the same for every text, since what is cut is the text and never the template.

    Raises:
        UserError: ``{mask}`` is missing for a masked model, or there for a causal one.
    """

    def __init__(self, template: str, tokenizer: PreTrainedTokenizerBase, *, masked: bool) -> None:
        shown = _shown(template)
        if masked and template.count(MASK) != 1:
            raise UserError(
                f"finetune.template '{shown}' must hold {MASK} once, where the word goes: "
                "the model is a masked one"
            )
        if not masked and MASK in template:
            raise UserError(
                f"finetune.template '{shown}' holds {MASK}, but the model is a causal one: "
                "the word goes to the template's end"
            )
        self.text = template
        self._tokenizer = tokenizer
        self._masked = masked
        self._before, self._after = template.replace(MASK, str(tokenizer.mask_token)).split(TEXT)
        self.answer = self._find_answer(template) if masked else -1

    def _find_answer(self, template: str) -> int:
        ids = self._encoded(self._around("a"))
        place = ids.index(self._tokenizer.mask_token_id)
        return place if template.index(MASK) < template.index(TEXT) else place - len(ids)

    def _around(self, text: str) -> str:
        return self._before + text + self._after

    def _encoded(self, text: str) -> list[int]:
        return self._all_encoded([text])[0]

    def _all_encoded(self, texts: Sequence[str]) -> list[list[int]]:
        """A causal model's end stays open, whatever its tokenizer would close it with."""
        found = self._tokenizer(list(texts), return_special_tokens_mask=True, verbose=False)
        rows = zip(found["input_ids"], found["special_tokens_mask"], strict=True)
        return [list(ids) if self._masked else ids[: open_end(special)] for ids, special in rows]

    def tokens(self, texts: Sequence[str], max_length: int, spare: int = 0) -> list[list[int]]:
        """Each text in the template, as ids; of a text that is too long the end is cut.

        ``spare`` of the ``max_length`` tokens are left free.

        Raises:
            UserError: the template alone is longer than ``max_length``.
        """
        least = len(self._encoded(self._around(""))) + spare
        if least >= max_length:
            what = "and its words take" if spare else "takes"
            raise UserError(
                f"finetune.template {what} {least} tokens, which leaves no room for a text: "
                f"finetune.max_length is {max_length}"
            )
        room = max_length - spare
        rows = self._all_encoded([self._around(text) for text in texts])
        return [
            ids if len(ids) <= room else self._cut(text, room) for ids, text in zip(rows, texts, strict=True)
        ]

    def _cut(self, text: str, max_length: int) -> list[int]:
        """As many of the text's tokens as there is room for: characters are cut, so that what is left is
        encoded as it would be in any template."""
        given = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ends = [0, *(end for _, end in given["offset_mapping"])]
        kept = len(ends) - 1
        while True:
            ids = self._encoded(self._around(text[: ends[kept]]))
            if len(ids) <= max_length or not kept:
                return ids
            kept = max(0, kept - (len(ids) - max_length))

    def words(self, words: Sequence[str]) -> list[list[int]]:
        """The tokens of each word where the template has its place.

        Raises:
            UserError: a word of no token, or one that the model does not know; two alike.
        """
        ids = [self._word(word) for word in words]
        for i, word in enumerate(words):
            if ids[i] in ids[:i]:
                raise UserError(
                    f"finetune.verbalizers: '{words[ids.index(ids[i])]}' and '{word}' are one and the same "
                    "to the model"
                )
        return ids

    def _word(self, word: str) -> list[int]:
        if self._masked:
            ids: list[int] = self._tokenizer(word, add_special_tokens=False)["input_ids"]
        else:
            prompt, whole = self._encoded(self._around("a")), self._encoded(self._around("a") + word)
            if whole[: len(prompt)] != prompt:
                raise UserError(
                    f"finetune.verbalizers: '{word}' would melt into the template's end; "
                    "begin it with a space, and end the template without one"
                )
            ids = whole[len(prompt) :]
        if not ids or self._tokenizer.unk_token_id in ids:
            raise UserError(f"finetune.verbalizers: the model does not know '{word}'; give another word")
        return ids


def open_end(special: Sequence[int]) -> int:
    """How many tokens there are before the special ones at the end."""
    length = len(special)
    while length and special[length - 1]:
        length -= 1
    return length
