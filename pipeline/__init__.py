"""Gradient-free pretraining and fine-tuning of transformer language models.

Read it in this order: ``stages/finetune.py`` → ``pipeline/trainer.py`` → an optimizer in ``plugins/`` →
``pipeline/engine/`` → the model.
"""

__version__ = "0.1.0"
