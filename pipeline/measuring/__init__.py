"""Held-out figures, their intervals, and the yardsticks beside them."""
