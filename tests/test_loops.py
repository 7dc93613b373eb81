"""What stands around a compiled model in a training program: averaged copies, checkpoints on disk, data loaders, export."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from support import capture
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

import quartet_compile  # noqa: F401  (registers the backend)

pytestmark = pytest.mark.usefixtures("device")


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))


@pytest.fixture
def model_and_optimizer() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = mlp()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


@pytest.mark.feature("Ways to train", "averaged (EMA) copies")
def test_an_averaged_copy_is_evaluated_with_the_weights_that_it_has_now(model_and_optimizer: Any) -> None:
    model, optimizer = model_and_optimizer
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    training, _ = capture(model)
    evaluation, backend = capture(average)
    x = torch.randn(8, 64)
    seen = []
    for _ in range(3):
        training(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
        with torch.no_grad():
            seen.append(evaluation(x))
            assert torch.equal(seen[-1], capture(deepcopy(average))[0](x)), "a copy has never been compiled before"
    assert not torch.equal(seen[1], seen[2])
    assert [linear.name for linear in backend.report(average).linears] == ["module.0", "module.2"]


@pytest.mark.feature("Ways to train", "saving and loading state_dict")
def test_what_is_saved_is_the_models_own(model_and_optimizer: Any, tmp_path: Path) -> None:
    """Nothing of ours is in a state_dict, and what is loaded is used in the next step, compiled or not."""
    model, _ = model_and_optimizer
    plain = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    compiled, _ = capture(model)
    x = torch.randn(8, 64, requires_grad=True)
    before = compiled(x)
    before.sum().backward()
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == plain
    assert {name.removeprefix("_orig_mod.") for name in compiled.state_dict()} == set(plain)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert compiled(x).count_nonzero() == 0
    model.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert torch.equal(compiled(x), before)


def test_weights_written_through_data_are_read() -> None:
    """`.data` hides a write from the version counter of the parameter."""
    model = nn.Linear(64, 64, bias=False)
    compiled, _ = capture(model)
    x = torch.randn(8, 64)
    for context in (torch.no_grad(), torch.enable_grad()):
        with context:
            first = compiled(x)
            model.weight.data.mul_(2)
            assert torch.equal(compiled(x), 2 * first), "a power of two scales every code's value exactly"


@pytest.mark.feature("Ways to train", "data loaders with workers: {start}")
@pytest.mark.slow
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_data_loaders_with_workers(model_and_optimizer: Any, start: str, device: torch.device) -> None:
    """Started between two compiled steps, when Inductor's own processes and threads are there."""
    model, optimizer = model_and_optimizer
    compiled = torch.compile(model, backend="quartet")
    x = torch.randn(64, 64, device="cpu")
    data = TensorDataset(x, x.roll(1, dims=1))

    def step(batch: Tensor, target: Tensor) -> float:
        loss = nn.functional.mse_loss(compiled(batch.to(device)), target.to(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    first = step(*data[:16])
    losses = [step(*b) for _ in range(4) for b in DataLoader(data, batch_size=16, num_workers=2, multiprocessing_context=start)]
    assert len(losses) == 16
    assert losses[-1] < 0.9 * first


@pytest.mark.parametrize("strict", [False, True])
def test_an_export_is_the_unchanged_model(strict: bool) -> None:
    """torch.export looks through compiled modules and calls no backend: what it returns must be the user's model, whole."""
    model, x = mlp(), torch.randn(4, 64)
    regional = mlp()
    regional.load_state_dict(model.state_dict())
    for layer in regional:
        layer.compile(backend="quartet")
    for module in (torch.compile(model, backend="quartet"), regional):
        exported = torch.export.export(module, (x,), strict=strict)
        assert "quartet" not in exported.graph_module.code
        assert torch.equal(exported.module()(x), model(x))
