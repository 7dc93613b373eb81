"""Recipes that change during training: "BF16 for the last 15% of steps".

A switch is a `set_recipe`: each compiled graph that it concerns is compiled once more at its next call, and the code of a phase that comes
again is used again. Parameters, optimizer and random state are not touched.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from quartet_compile.marks import RecipeHandle, modules_of, set_on
from quartet_compile.passes.place import lookup
from quartet_compile.recipes import RECIPES
from quartet_compile.selectors import Only

WHERE = "quartet.RecipeSchedule"


class RecipeSchedule:
    """Switches the recipe of a model, or of those of its modules that `only` selects, while it trains.

        schedule = quartet.RecipeSchedule(model, {0.85: "bf16"}, steps=10_000)
        for batch in batches:
            loss(model, batch).backward()
            optimizer.step()
            schedule.step()                          # once for each step of the optimizer

    recipes: when -> recipe. A float is a fraction of `steps`, from 0.0 to below 1.0, rounded to a whole step; an int is a step, from 0 on.
    A recipe counts from that step on, so 8500 of 10000 steps are done before 0.85; None takes back what the schedule set. Before the first
    one, the schedule sets nothing. only: as for `set_recipe`; what it selects is settled when the schedule is made. Each switch counts like
    a call of `set_recipe` at that moment: what is set on inner modules is stronger, and so are decorators.

    `state_dict` belongs into the checkpoint: a resumed run is in the phase that it would be in. Raises TypeError or ValueError for what is
    no time, no recipe, no selector; for two recipes at one step; and for one that no step is left for.
    """

    def __init__(self, model: nn.Module, recipes: Mapping[int | float, str | None], *, steps: int | None = None, only: Only = None) -> None:
        if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 1):
            raise ValueError(f"{WHERE}: steps is the whole number of training steps, got {steps!r}")
        if not isinstance(recipes, Mapping) or not recipes:
            raise ValueError(f'{WHERE} takes recipes by step, as in {{0.85: "bf16"}}, got {recipes!r}')
        plan: dict[int, str | None] = {}
        for when, name in recipes.items():
            step = _step(when, steps)
            if step in plan:
                raise ValueError(f"{WHERE}: {when!r} is step {step}, which has a recipe already")
            if name is not None:
                lookup(RECIPES, name, f"{WHERE}, from {when!r} on")
            plan[step] = name
        self._plan = sorted(plan.items())
        self._modules = modules_of(model, only, WHERE)
        self._handle = RecipeHandle([])
        self._phase: tuple[int, str | None] | None = None
        self._done = 0
        self._follow()

    @property
    def recipe(self) -> str | None:
        """What the schedule sets for the next step; None if nothing."""
        return None if self._phase is None else self._phase[1]

    def step(self) -> None:
        """A training step is done: switch if the next one belongs to another phase."""
        self._done += 1
        self._follow()

    def state_dict(self) -> dict[str, Any]:
        """How many steps are done. The recipes are not in it: a resumed run may follow another plan."""
        return {"step": self._done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to the phase of a saved schedule, forward or back. Raises ValueError for what `state_dict` did not return."""
        step = state.get("step") if isinstance(state, Mapping) else None
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            raise ValueError(f"{WHERE}: not the state of a schedule: {state!r}")
        self._done = step
        self._follow()

    def _follow(self) -> None:
        phase = next((entry for entry in reversed(self._plan) if entry[0] <= self._done), None)
        if phase == self._phase:
            return
        self._handle.remove()
        self._phase = phase
        step, name = phase or (0, None)
        if name is not None:
            self._handle = set_on([(module, f"schedule ({name} from step {step})") for module, _ in self._modules], name)


def _step(when: object, steps: int | None) -> int:
    """The step that a key of the plan means."""
    if isinstance(when, bool) or not isinstance(when, (int, float)):
        raise TypeError(f"{WHERE}: a time is a fraction (float) or a step (int), got {when!r}")
    if isinstance(when, float):
        if steps is None:
            raise ValueError(f"{WHERE}: {when} is a fraction of the training steps; give their number, steps=")
        if not 0.0 <= when < 1.0:
            raise ValueError(f"{WHERE}: a fraction is from 0.0 to below 1.0, got {when}; a step is written as an int")
    step = round(when * steps) if isinstance(when, float) and steps is not None else int(when)
    if step < 0 or (steps is not None and step >= steps):
        raise ValueError(f"{WHERE}: {when!r} is step {step}, and steps go from 0 to " + ("..." if steps is None else str(steps - 1)))
    return step
