"""Scoring candidates with forward passes, in the cheapest way that is exact."""
