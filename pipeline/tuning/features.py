"""Features that several runs read: computed before the first one, by all processes of a study."""

from __future__ import annotations

from collections.abc import Iterable

from pipeline import start
from pipeline.config import Config
from pipeline.engine import shared
from pipeline.engine.evaluator import Engine
from pipeline.errors import UserError
from pipeline.layout import Layout
from pipeline.measuring.evaluation import features

_PASSES_A_STEP = 64  # at most, of most methods: a smaller budget does not read all of the data


def compute_part(config: Config, base: Layout, turns: Iterable[int], process: int) -> None:
    """Computes features of the batches that a trial begins with, and leaves them to the other processes.

    Each of ``turns`` is the number of a batch; who asks for one does it. Nothing is computed where more than
    the head is searched, or the budget ends before all texts were read.
    """
    try:
        begin = start.begin(config, base, "finetune", None)
        space = start.space(config.finetune, config, begin.model)
        training = start.training(config.finetune, config)
    except UserError:  # each trial says so
        return
    # of whole batches none has a row that was read before: what is encoded together is what a trial would
    steps = sum(len(batch.targets) for batch in begin.train) // config.finetune.batch_size
    head_only = not begin.examiner and space.only_in(begin.model.head_parameters())
    if not head_only or training.forward_passes < steps * _PASSES_A_STEP:
        return
    engine = Engine(begin.model, space, 0, training.run_seed, training.objective)
    for turn in turns:
        if turn < steps:
            engine.recall([begin.batch(turn)])
        elif turn < steps + len(begin.validation):
            features(begin.model, [begin.validation[turn - steps]])
        else:
            break
    engine.close()
    shared.save(process)
