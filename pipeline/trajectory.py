"""The append-only record of a run, and the run again from it.

One JSON object a line: a header, a line for each step and each measurement, an end. A step along seeds is its
seeds and coefficients, and the optimizer's state after it; a step of a population method, or of one whose
state is more than scalars, is the losses it was told, since such a method is a function of its seed and them.
Either way the file holds scalars only. With the start weights it gives every weight of the run back, bit for
bit, without one forward pass, and the optimizer's state with them: a run that was killed goes on from it as
if nothing had happened. A torn last line is ignored.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from pipeline import noise
from pipeline.engine.evaluator import StepRecord
from pipeline.errors import UserError
from pipeline.optimizer import BudgetSpent, Candidate, LowRank, Move, Optimizer, Problem, Stalled, StepReport
from pipeline.registry import Spec, create
from pipeline.space import Space

FORMAT = 2
_REDONE_TOGETHER = 512  # steps
FILE = "trajectory.jsonl"


@dataclass(frozen=True)
class Header:
    """What the run was.

    ``defaults`` are the options offered to the optimizer besides its spec's, ``start`` the digest of the
    start weights, ``config`` the whole configuration, ``code`` the digest of each file of the user's own that
    it names, ``machine`` what the last bits of sums may depend on.
    """

    optimizer: str
    defaults: dict[str, Any]
    space: str
    size: int
    run_seed: int
    forward_passes: int
    start: str
    config: dict[str, Any]
    code: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict, compare=False)
    format: int = FORMAT
    noise: int = noise.VERSION

    def problem(self, device: torch.device) -> Problem:
        return Problem(self.size, Spec.parse(self.space).backend, self.forward_passes, self.run_seed, device)


class Recorder:
    """Writes a trajectory; each line is flushed when its step is done."""

    def __init__(self, path: Path, header: Header, *, go_on: bool = False) -> None:
        """Begins the file, or goes on behind its last whole line."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if go_on:
            _drop_end(path)
        self._file: TextIO = path.open("a" if go_on else "w", encoding="utf-8")
        if not go_on:
            self._write(asdict(header))

    def step(
        self,
        forward_passes: int,
        report: StepReport,
        record: StepRecord,
        state: dict[str, Any],
        found: dict[str, Any] | None = None,
    ) -> None:
        """Notes a step: ``forward_passes`` made so far, its loss, and what it takes to do it again.

        ``state`` is the optimizer's, empty where the step is not one along seeds alone. ``found`` is what the
        engine has found out about how to score, where this step added to it.
        """
        scalars = all(isinstance(value, int | float | str | bool) for value in state.values())
        seeded = record.only_moved and scalars
        made: dict[str, Any] = {"losses": record.losses}
        if seeded:
            made = {"moves": [_written(move) for move in record.moves], "state": state}
        if found:
            made["found"] = found
        self._write({"forward_passes": forward_passes, "loss": report.loss, **made})

    def measurement(self, forward_passes: int, figures: dict[str, float], seconds: float) -> None:
        """Notes held-out figures, and the seconds the run has taken until then."""
        self._write({"forward_passes": forward_passes, "measured": figures, "seconds": seconds})

    def end(self, kept_step: int, digest: str) -> None:
        """Notes that the run ended by itself, at which step its weights were kept, and their digest."""
        self._write({"kept_step": kept_step, "digest": digest})

    def close(self) -> None:
        self._file.close()

    def _write(self, content: dict[str, Any]) -> None:
        self._file.write(json.dumps(content, separators=(",", ":")) + "\n")
        self._file.flush()


def _drop_end(path: Path) -> None:
    """Cuts off a torn last line and the end, if it came so far."""
    *whole, _torn = path.read_bytes().split(b"\n")
    if "digest" in json.loads(whole[-1]):
        whole.pop()
    with path.open("r+b") as file:
        file.truncate(sum(len(line) + 1 for line in whole))


@dataclass(frozen=True)
class Trajectory:
    """A trajectory read back: its ``lines`` are steps and measurements. ``end`` is None after a cut."""

    header: Header
    lines: list[dict[str, Any]]
    end: dict[str, Any] | None

    @staticmethod
    def begun(path: Path) -> bool:
        """Whether ``path`` holds at least a whole header."""
        return path.is_file() and b"\n" in path.read_bytes()

    @property
    def steps(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if "measured" not in line]

    @property
    def curve(self) -> list[tuple[int, dict[str, float]]]:
        """What was measured, and after how many forward passes."""
        return [(line["forward_passes"], line["measured"]) for line in self.lines if "measured" in line]

    @classmethod
    def read(cls, path: Path) -> Trajectory:
        """Raises UserError when there is none, or it is not one this version can read."""
        if not path.is_file():
            raise UserError(f"no trajectory at {path}; was the stage run?")
        lines = []
        *whole, _torn = path.read_text(encoding="utf-8").split("\n")
        for number, line in enumerate(whole, 1):
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:
                raise UserError(f"{path} line {number} is not JSON: the file is damaged") from None
        try:
            header = Header(**lines[0])
        except (IndexError, TypeError):
            raise UserError(f"{path} has no header of a trajectory") from None
        if (header.format, header.noise) != (FORMAT, noise.VERSION):
            raise UserError(
                f"{path} has format {header.format} and noise {header.noise}; "
                f"this version reads {FORMAT} and {noise.VERSION}"
            )
        end = lines[-1] if "digest" in lines[-1] else None
        return cls(header, lines[1 : None if end is None else -1], end)

    def replay(self, space: Space) -> str:
        """Moves ``space``, which holds the start weights, to where the run ended; its digest.

        Raises:
            UserError: other start weights, an optimizer that needs gradients, or a digest that differs.
        """
        if space.digest() != self.header.start:
            raise UserError(
                "the start weights are not those of this trajectory: the model or the data has changed"
                + self._elsewhere(space.device)
            )
        with threads(self.header.machine.get("threads")):
            return self._replay(space)

    def _elsewhere(self, device: torch.device) -> str:
        """What differs between the machine of the run and this one, to be said of a replay that failed."""
        here = machine(device)
        told = [f"{key} {was}, here {here.get(key)}" for key, was in self.header.machine.items()]
        return f" (the run had {'; '.join(told)})" if here != self.header.machine and told else ""

    def _replay(self, space: Space) -> str:
        steps = self.steps if self.end is None else self.steps[: self.end["kept_step"]]
        optimizer = None
        if any("moves" not in step for step in steps):
            spec = Spec.parse(self.header.optimizer)
            optimizer = create(spec, self.header.problem(space.device), self.header.defaults)
        directions = sum(len(move["seeds"]) for step in steps for move in step.get("moves", ()))
        space.fused = noise.worth_fusing(directions * space.elements)
        redo(steps, space, optimizer)
        digest = space.digest()
        if self.end is not None and digest != self.end["digest"]:
            raise UserError(
                f"replay ended at weights {digest[:12]}, the run at {self.end['digest'][:12]}: not the same"
                + self._elsewhere(space.device)
            )
        return digest


def machine(device: torch.device) -> dict[str, Any]:
    """What may change the last bits of a sum: the device, the number of threads, torch's version."""
    known = {"device": device.type, "threads": torch.get_num_threads(), "torch": str(torch.__version__)}
    return known | ({"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {})


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Computes with so many threads: a population method's algebra may sum in another order with others."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def redo(steps: Sequence[dict[str, Any]], space: Space, optimizer: Optimizer | None) -> None:
    """Does recorded steps again, without a forward pass: moves ``space``, and ``optimizer`` to its state.

    Raises:
        UserError: a step needs gradients, or the optimizer asks for something else than it did.
    """
    for moved, alike in itertools.groupby(steps, lambda step: "moves" in step):
        group = list(alike)
        if moved:
            for low in range(0, len(group), _REDONE_TOGETHER):
                few = group[low : low + _REDONE_TOGETHER]
                space.move(*[_move(move) for step in few for move in step["moves"]])
            if optimizer is not None:
                optimizer.load_state_dict(group[-1]["state"])
        elif optimizer is not None:
            for step in group:
                with suppress(BudgetSpent, Stalled):  # in the last one the run may have ended
                    optimizer.step(_Retold(space, step["losses"]))


def _written(move: Move) -> dict[str, Any]:
    """A move as it is recorded: what is not there is left out."""
    return {key: value for key, value in asdict(move).items() if value or key in ("seeds", "coefficients")}


def _move(recorded: dict[str, Any]) -> Move:
    low_rank = LowRank(**recorded["low_rank"]) if "low_rank" in recorded else None
    return Move(**{**recorded, "low_rank": low_rank})


class _Retold:
    """An `Evaluator` that tells the recorded losses again and makes no forward pass."""

    def __init__(self, space: Space, losses: list[list[float]]) -> None:
        self._space = space
        self._losses = iter(losses)

    def losses(self, candidates: Sequence[Candidate]) -> list[float]:
        recorded = next(self._losses, None)
        if recorded is None:  # the run's budget ended here
            raise BudgetSpent
        if len(recorded) != len(candidates):
            raise UserError(
                "the optimizer asks for other candidates than it did in this run: has its version changed, "
                "or does it use gradients?"
            )
        return recorded

    def move(self, move: Move) -> None:
        self._space.move(move)

    def place(self, coordinates: Tensor) -> None:
        self._space.place(coordinates)

    def gradient(self) -> tuple[float, list[Tensor]]:
        raise UserError("this run used gradients: a yardstick by backpropagation has no trajectory to replay")

    def tensors(self) -> list[Tensor]:
        return [searched.parameter for searched in self._space.tensors]
