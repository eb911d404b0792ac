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
    end = steps + len(begin.validation)
    ahead = iter(turns)
    turn = next(ahead, end)
    engine = Engine(begin.model, space, 0, training.run_seed, training.objective)
    while turn < steps:
        engine.recall([begin.batch(turn)])
        turn = next(ahead, end)
    engine.close()  # what is held out is read by the model's own products, as a run by itself reads it
    while turn < end:
        features(begin.model, [begin.validation[turn - steps]])
        turn = next(ahead, end)
    shared.save(process)
