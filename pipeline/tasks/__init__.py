"""Kinds of task: how text becomes batches, what model answers them, what is measured."""
