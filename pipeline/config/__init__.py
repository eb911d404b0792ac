"""Every parameter of a run: ``schema`` is what there is, ``checking`` what fits, ``reading`` how it comes."""

from pipeline.config.reading import MAPPINGS, build, override, read, updated, write
from pipeline.config.schema import (
    PHASE,
    SCALES,
    SECTIONS,
    YARDSTICK,
    Config,
    EvaluateConfig,
    FinetuneConfig,
    PrepareConfig,
    PretrainConfig,
    TrainConfig,
    TuneConfig,
    with_yardstick,
)

__all__ = [
    "MAPPINGS",
    "PHASE",
    "SCALES",
    "SECTIONS",
    "YARDSTICK",
    "Config",
    "EvaluateConfig",
    "FinetuneConfig",
    "PrepareConfig",
    "PretrainConfig",
    "TrainConfig",
    "TuneConfig",
    "build",
    "override",
    "read",
    "updated",
    "with_yardstick",
    "write",
]
