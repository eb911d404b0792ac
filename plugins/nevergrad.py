"""Any of nevergrad's optimizers: ``nevergrad:<Name>``, by the name in its registry.

nevergrad has no state to save short of a pickle of itself. But an optimizer is a function of its seed and the
losses it was told, so those losses are its state, and loading asks and tells them again. For that to hold,
every source of randomness is seeded, and what nevergrad takes from numpy's global generator is taken from a
private state that is swapped in for the length of a call (see `_Quarantine`).
"""

from __future__ import annotations

import math
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import UserError, nearest, unknown
from pipeline.optimizer import Explicit, Problem
