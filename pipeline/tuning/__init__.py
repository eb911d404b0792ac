"""An Optuna study over fine-tuning's parameters: ``run`` is the whole of it."""
