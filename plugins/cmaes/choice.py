"""Which variant fits a problem, and why."""

from __future__ import annotations

from pipeline.optimizer import Problem
from pipeline.registry import free_bytes, readable_bytes
from plugins.cmaes.full import CMA
from plugins.cmaes.low_memory import LMMA
from plugins.cmaes.low_rank import VkD
from plugins.cmaes.options import Options
from plugins.cmaes.separable import SepCMA
from plugins.cmaes.strategy import CMAES

VARIANTS: dict[str, type[CMAES]] = {"CMA": CMA, "VkD": VkD, "SepCMA": SepCMA, "LMMA": LMMA}
_SHARE = 0.5  # of free memory
_LOW_MEMORY_FROM = 100_000  # coordinates; LMMA's steps are too bold for few


def choose(problem: Problem, options: Options) -> tuple[str, str]:
    """The richest variant that the budget can teach and the memory hold, by name, and why it is that one."""
    free = free_bytes(problem.device)
    if options.rank:
        return "VkD", "rank is an option of VkD alone"
    turned_down: list[str] = []
    for name in ("CMA", "VkD", "SepCMA"):
        why = _against(VARIANTS[name], problem, options, free)
        if not why:
            return name, "; ".join(turned_down) or "its covariance can be learnt within the budget"
        turned_down.append(f"{name} {why}")
    small = problem.size < _LOW_MEMORY_FROM
    return "SepCMA" if small else "LMMA", "; ".join(turned_down)


def _against(variant: type[CMAES], problem: Problem, options: Options, free: int) -> str:
    needed = variant.memory_bytes(problem, options)
    if needed > _SHARE * free:
        return f"would take {readable_bytes(needed)} of {readable_bytes(free)} that are free"
    p = variant.parameters_for(problem.size, options)
    evaluations = p.population_size / (p.c_1 + p.c_mu)
    if evaluations > problem.forward_passes:
        return f"would take some {evaluations:,.0f} evaluations to learn and has {problem.forward_passes:,}"
    return ""
