"""Optimizers beside each other: ``plan`` says what runs, ``jobs`` runs it, ``results`` reads it."""
