"""A schedule switches recipes while a model trains: one compilation for each graph, and nothing else changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import capture
from torch import Tensor, nn

import quartet_compile as quartet


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.up(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block() for _ in range(3)])
        self.dropout, self.out = nn.Dropout(0.1), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.out(self.dropout(x))


class Broken(Model):
    """Its graph breaks between the blocks and the rest."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        torch._dynamo.graph_break()
        return self.out(self.dropout(x))


class Run:
    """A training run with momentum, noise, dropout and batches from torch's random state."""

    def __init__(self, model: nn.Module, compiled: Callable[..., Any]) -> None:
        self.model, self.compiled = model, compiled
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        self.losses: list[float] = []

    def step(self) -> None:
        x = torch.randn(16, 64)
        loss = (self.compiled(x) - x.flip(1)).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item())


def state(run: Run) -> list[Tensor]:
    """Copies of the parameters, the optimizer's tensors and the random state."""
    moments = [value for entry in run.optimizer.state.values() for value in entry.values()]
    return [tensor.detach().clone() for tensor in (*run.model.parameters(), *moments, torch.get_rng_state())]


@pytest.mark.feature("Choosing recipes", "a schedule")
@pytest.mark.parametrize(("kind", "graphs"), [(Model, 1), (Broken, 2)])
def test_each_graph_is_compiled_once_more_at_a_switch_and_not_at_all_when_it_switches_back(kind: type[nn.Module], graphs: int) -> None:
    model = kind()
    compiled, backend = capture(model)
    schedule = quartet.RecipeSchedule(model, {2: "bf16", 4: None, 6: "bf16"})
    run, compilations = Run(model, compiled), []
    for _ in range(8):
        run.step()
        schedule.step()
        compilations.append(len(backend.graphs))
    assert compilations == [graphs, graphs, *[2 * graphs] * 6]
    recipes = [{linear.recipe for linear in graph.linears} for graph in backend.graphs]
    assert recipes == [{"quartet2"}] * graphs + [{"bf16"}] * graphs


@pytest.mark.feature("Choosing recipes", "a schedule, compiled block by block")
def test_blocks_compiled_one_by_one_share_the_compilation_of_a_switch() -> None:
    model = Model()
    _, backend = capture(model)
    for block in model.layers:
        block.compile(backend=backend)
    schedule = quartet.RecipeSchedule(model, {1: "bf16", 2: None})
    compilations = []
    for _ in range(3):
        model(torch.randn(16, 64, requires_grad=True)).sum().backward()
        schedule.step()
        compilations.append(len(backend.graphs))
    assert compilations == [1, 2, 2]


def test_a_part_of_a_model_is_scheduled_and_the_report_names_the_schedule() -> None:
    model, x = Model(), torch.randn(16, 64)
    schedule = quartet.RecipeSchedule(model, {0.5: "bf16"}, steps=2, only=quartet.blocks(first=1, last=1))
    assert {linear.decided_by for linear in quartet.explain(model, x).linears} == {"default"}
    schedule.step()
    found = {linear.name: linear.decided_by for linear in quartet.explain(model, x).linears if linear.recipe == "bf16"}
    assert found == dict.fromkeys(("layers.0.up", "layers.2.up"), "schedule (bf16 from step 1)")


@pytest.mark.slow
def test_a_switch_resets_nothing_and_losses_are_those_of_settings_made_by_hand() -> None:
    """Compiled by Inductor. By hand: the code of both recipes is compiled before the run, which then compiles nothing."""

    def run(switch: Callable[[nn.Module], Callable[[int], Any]], warm: bool) -> Run:
        torch._dynamo.reset()
        torch.manual_seed(1)
        model = Model()
        compiled = torch.compile(model, backend="quartet")
        if warm:
            before = copy.deepcopy(model.state_dict()), torch.get_rng_state()
            for recipe in ("quartet2", "bf16"):
                handle = quartet.set_recipe(model, recipe) if recipe == "bf16" else None
                compiled(torch.randn(16, 64)).sum().backward()
                if handle is not None:
                    handle.remove()
            model.zero_grad()
            model.load_state_dict(before[0])
            torch.set_rng_state(before[1])
        training, done = Run(model, compiled), switch(model)
        for step in range(1, 7):
            training.step()
            before_switch = state(training)
            done(step)
            assert all(map(torch.equal, state(training), before_switch))
        return training

    def scheduled(model: nn.Module) -> Callable[[int], Any]:
        schedule = quartet.RecipeSchedule(model, {0.5: "bf16"}, steps=6)
        return lambda step: schedule.step()

    def by_hand(model: nn.Module) -> Callable[[int], Any]:
        return lambda step: quartet.set_recipe(model, "bf16") if step == 3 else None

    ours, hand, never = run(scheduled, False), run(by_hand, True), run(lambda model: lambda step: None, False)
    assert ours.losses == hand.losses
    assert ours.losses[:3] == never.losses[:3]
    assert all(a != b for a, b in zip(ours.losses[3:], never.losses[3:], strict=True))
    assert all(map(torch.equal, state(ours), state(hand)))


def test_behind_the_switch_to_bf16_the_model_computes_what_eager_code_does() -> None:
    model, x = Model().eval(), torch.randn(16, 64)
    compiled, _ = capture(model)
    schedule = quartet.RecipeSchedule(model, {1: "bf16"})
    exact = model(x)
    assert (compiled(x) - exact).norm() > 0.02 * exact.norm(), "quantized"
    schedule.step()
    torch.testing.assert_close(compiled(x), exact)


@pytest.mark.parametrize("done", [0, 84, 85, 99])
def test_a_resumed_run_is_in_the_right_phase(done: int) -> None:
    model, twin = Model(), Model()
    plan = {"recipes": {0: "bf16", 10: None, 0.85: "bf16"}, "steps": 100}
    schedule = quartet.RecipeSchedule(model, **plan)
    for _ in range(done):
        schedule.step()
    resumed = quartet.RecipeSchedule(twin, **plan)
    resumed.load_state_dict(copy.deepcopy(schedule.state_dict()))
    assert resumed.state_dict() == schedule.state_dict() == {"step": done}
    assert resumed.recipe == schedule.recipe == ("bf16" if done == 0 or done >= 85 else None)
    found = [linear.recipe for linear in quartet.explain(twin, torch.randn(16, 64)).linears]
    assert found == ["bf16" if resumed.recipe else "quartet2"] * 4


def test_a_schedule_goes_back_to_an_earlier_checkpoint() -> None:
    model = Model()
    schedule = quartet.RecipeSchedule(model, {2: "bf16"})
    start = schedule.state_dict()
    for _ in range(5):
        schedule.step()
    assert schedule.recipe == "bf16"
    schedule.load_state_dict(start)
    assert schedule.recipe is None
    assert "forward" not in model.__dict__


@pytest.mark.parametrize(
    ("when", "steps", "first"), [(0.85, 10_000, 8500), (0.07, 100, 7), (0.29, 100, 29), (0.0, 3, 0), (1, 3, 1), (5, None, 5)]
)
def test_the_first_step_of_a_phase(when: int | float, steps: int | None, first: int) -> None:
    schedule, count = quartet.RecipeSchedule(nn.Linear(64, 64), {when: "bf16"}, steps=steps), 0
    while schedule.recipe is None:
        schedule.step()
        count += 1
    assert count == first


@pytest.mark.parametrize(
    ("recipes", "steps", "error", "message"),
    [
        ({0.85: "bf16"}, None, ValueError, "0.85 is a fraction of the training steps; give their number, steps="),
        ({85.0: "bf16"}, 100, ValueError, "a fraction is from 0.0 to below 1.0, got 85.0; a step is written as an int"),
        ({0.999: "bf16"}, 100, ValueError, "0.999 is step 100, and steps go from 0 to 99"),
        ({-1: "bf16"}, None, ValueError, "-1 is step -1"),
        ({100: "bf16"}, 100, ValueError, "100 is step 100, and steps go from 0 to 99"),
        ({50: "bf16", 0.5: None}, 100, ValueError, "0.5 is step 50, which has a recipe already"),
        ({0.5: "fp3"}, 100, ValueError, "unknown recipe 'fp3'.*from 0.5 on.*valid are bf16, quartet2"),
        ({"last": "bf16"}, 100, TypeError, "a time is a fraction .float. or a step .int., got 'last'"),
        ({True: "bf16"}, 100, TypeError, "got True"),
        ({}, 100, ValueError, "takes recipes by step"),
        ({0.5: "bf16"}, 0, ValueError, "whole number of training steps, got 0"),
        ({0.5: "bf16"}, 10.0, ValueError, "whole number of training steps, got 10.0"),
    ],
)
def test_plans_that_cannot_be_followed_are_refused(recipes: Any, steps: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        quartet.RecipeSchedule(nn.Linear(64, 64), recipes, steps=steps)


def test_what_a_schedule_selects_is_checked_when_it_is_made() -> None:
    with pytest.raises(ValueError, match=r"quartet\.RecipeSchedule: 'blocks\.\*' matches no module of Model"):
        quartet.RecipeSchedule(Model(), {0.5: "bf16"}, steps=10, only="blocks.*")


@pytest.mark.parametrize("bad", [{}, {"step": -1}, {"step": 1.5}, {"step": True}, None])
def test_a_state_that_is_none_is_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match="not the state of a schedule"):
        quartet.RecipeSchedule(nn.Linear(64, 64), {1: "bf16"}).load_state_dict(bad)
