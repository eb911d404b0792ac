"""A task that is no text: handwritten digits by a vision transformer, through the same engine.

    python examples/images.py vit      # writes vit/: a ViT of 18,000 parameters, fresh and untrained
    pipeline run --config examples/digits.yaml

The images are scikit-learn's: 1,797 of 8 x 8 pixels (Alpaydin and Kaynak 1998, UCI repository, CC BY 4.0).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, ViTConfig, ViTModel

from pipeline.config import Config
from pipeline.data.prepare import load_task
from pipeline.errors import UserError
from pipeline.layout import Layout
from pipeline.measuring.evaluation import linear_probe, majority, predictions
from pipeline.models.loading import choose_device, load_with_head, save_model
from pipeline.noise import derive
from pipeline.tasks.base import Batch, Start, TaskModel
from pipeline.tasks.batching import shuffled

CLASSES, SIDE, BRIGHTEST = 10, 8, 16
ORDER = 0  # of the split, which is the same for every run


class ImageClassifier(TaskModel):
    """A ``transformers`` image classifier, split at its base model."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    @property
    def encoder(self) -> nn.Module:  # type: ignore[override]
        base: nn.Module = self.model.base_model
        return base

    def features(self, batch: Batch) -> Tensor:
        """The state of the class token: ``[examples, hidden]``."""
        states: Tensor = self.encoder(**batch.inputs).last_hidden_state[:, 0]
        return states

    def outputs(self, features: Tensor) -> Tensor:
        logits: Tensor = self.model.classifier(features)
        return logits

    def save(self, folder: Path, tokenizer: None) -> None:
        save_model(self.model, folder)


class Digits:
    """Which digit an image of 8 x 8 pixels shows."""

    reads: ClassVar[str] = "task"
    data: ClassVar[str] = "own"

    def rows(self, config: Config) -> DatasetDict:
        """The images in an order of no seed's, cut into splits of ``prepare``'s sizes."""
        from sklearn.datasets import load_digits

        digits = load_digits()
        order = np.random.default_rng(ORDER).permutation(len(digits.target))
        test, validation = config.prepare.test_size, config.prepare.validation_size
        if min(test, validation) < 1 or test + validation >= len(order):
            raise UserError(
                f"prepare.test_size and prepare.validation_size must leave some of the {len(order):,} images"
            )
        parts = {
            "test": order[:test],
            "validation": order[test : test + validation],
            "train": order[test + validation :],
        }
        said = "Handwritten digits of 8 x 8 pixels, from scikit-learn (UCI repository, CC BY 4.0)."
        pixels = (digits.images / BRIGHTEST).astype(np.float32).reshape(len(order), -1)
        made = {
            name: Dataset.from_dict({"pixels": list(pixels[rows]), "label": digits.target[rows]})
            for name, rows in parts.items()
        }
        for split in made.values():
            split.info.description = said
        return DatasetDict(made)

    def start(self, config: Config, layout: Layout, folder: Path | None) -> Start:
        """The pretrained stage's model, with a head drawn from the seed."""
        model, _ = load_with_head(
            AutoModelForImageClassification,
            str(layout.pretrained),
            derive(config.seed, 6),
            config.dtype,
            num_labels=CLASSES,
        )
        size = config.finetune.batch_size
        images = {name: _Images(split) for name, split in load_task(layout).items()}
        train = images["train"]

        def batch(step: int) -> Batch:
            return train.batch(shuffled(len(train), size, config.seed, step))

        whole = {name: list(each.whole(size)) for name, each in images.items()}
        started = ImageClassifier(model.to(choose_device(config.device)))
        return Start(started, None, batch, whole["validation"], whole["train"], whole["test"])

    def load(self, folder: Path) -> ImageClassifier:
        return ImageClassifier(load_with_head(AutoModelForImageClassification, str(folder), 0, "auto")[0])

    def yardsticks(self, start: Start) -> dict[str, dict[str, float]]:
        """The commonest digit, the classifier before training, and a linear probe on its fresh features."""
        return {
            "majority": majority(start.train, start.test),
            "zero_shot": predictions(start.model, start.test).figures_with_intervals(),
            "linear_probe": linear_probe(start.model, start.train, start.validation, start.test),
        }


class _Images:
    """One split in memory: ``pixels`` float32 ``[images, 1, 8, 8]`` from -1 to 1, ``labels`` int64."""

    def __init__(self, rows: Dataset) -> None:
        pixels = torch.tensor(np.asarray(rows["pixels"], dtype=np.float32))
        self._pixels = (2 * pixels - 1).view(-1, 1, SIDE, SIDE)
        self._labels = torch.tensor(rows["label"])

    def __len__(self) -> int:
        return len(self._labels)

    def batch(self, examples: list[int]) -> Batch:
        inputs = {"pixel_values": self._pixels[examples]}
        return Batch(inputs, self._labels[examples], examples=tuple(examples))

    def whole(self, size: int) -> Iterator[Batch]:
        for first in range(0, len(self), size):
            yield self.batch(list(range(first, min(first + size, len(self)))))


def write_fresh(folder: str) -> None:
    """A ViT that has seen nothing, as a ``save_pretrained`` directory.

    Its weights are drawn wider than transformers draws them, where the class token shows next to nothing of
    the image: a search by forward passes would have little to go by.
    """
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=SIDE,
        patch_size=2,
        num_channels=1,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        initializer_range=0.2,
    )
    model = ViTModel(config, add_pooling_layer=False)
    model.save_pretrained(folder)
    print(f"{folder}: {sum(parameter.numel() for parameter in model.parameters()):,} parameters")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    write_fresh(sys.argv[1])
