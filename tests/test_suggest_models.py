"""`suggest` takes models, batches and losses of all kinds, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from suggest_support import Model, batches_for, losses, with_bad_linear
from support import capture
from torch import Tensor, nn

import quartet_compile as quartet
from quartet_compile import choices


class Outputs(nn.Module):
    """Returns its loss in one of several ways."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.inner, self.wrap = with_bad_linear(Model()), wrap

    def forward(self, x: Tensor, target: Tensor) -> Any:
        return self.wrap(self.inner(x, target))


@dataclass
class ModelOutput:
    loss: Tensor
    logits: Tensor


@pytest.mark.parametrize(
    ("wrap", "as_dict"),
    [(lambda y: (y, "more"), False), (lambda y: ModelOutput(y, y.expand(3, 3)), True), (lambda y: y.reshape(1), True)],
    ids=["tuple", "loss", "one element"],
)
def test_losses_and_batches_of_all_kinds(wrap: Any, as_dict: bool) -> None:
    model = Outputs(wrap)
    batches = batches_for(model.inner, count=4)
    named = [{"target": target, "x": x} for x, target in batches] if as_dict else batches
    suggestion = quartet.suggest(model, named, budget=0.2)
    assert suggestion.candidates[0].name == "inner.layers.1.down"
    assert suggestion.plain == pytest.approx(np.mean(losses(model.inner, batches, exclude="*")), rel=1e-6)


def test_a_loss_of_ones_own() -> None:
    """Of the output and the batch, where the model returns neither."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    seen: list[Any] = []

    def loss(y: Tensor, batch: Tensor) -> float:
        seen.append(batch)
        return (y - batch).square().mean().item()

    batches = [torch.randn(16, 64) for _ in range(4)]
    suggestion = quartet.suggest(model, batches, loss=loss)
    assert {id(batch) for batch in seen} == {id(batch) for batch in batches}
    with torch.no_grad():
        assert suggestion.plain == pytest.approx(np.mean([(model(x) - x).square().mean().item() for x in batches]), rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": lambda x: x}, TypeError, "takes a module"),
        ({"batches": torch.randn(8, 64)}, TypeError, "takes a list of batches, got Tensor"),
        ({"batches": 3}, TypeError, "takes a list of batches, got int"),
        ({"batches": [1, 2, 3, 4]}, TypeError, "a batch is a tensor, a tuple or a dict, got int"),
        ({"batches": [torch.randn(8, 64)] * 3}, ValueError, "at least 4 batches"),
        ({}, TypeError, r"a tensor of shape \[8, 64\], is no loss"),
        ({"loss": lambda y, batch: y}, TypeError, r"loss= has to return one number, got a tensor of shape \[8, 64\]"),
        ({"loss": lambda y, batch: None}, TypeError, "loss= has to return one number, got NoneType"),
        ({"loss": lambda y, batch: y.mean() * float("nan")}, ValueError, "the loss of a batch is nan with nothing in NVFP4"),
        ({"by": "layer"}, ValueError, "by is one of 'linear', 'kind', 'block', got 'layer'"),
        ({"measure": "both"}, ValueError, "measure is one of"),
        ({"budget": 0}, ValueError, "budget is a share"),
        ({"options": {"quartet.exlude": "a"}}, ValueError, "did you mean quartet.exclude"),
    ],
)
def test_errors_say_what_is_wrong(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    valid: dict[str, Any] = {"model": nn.Sequential(nn.Linear(64, 64)), "batches": [torch.randn(8, 64)] * 4}
    with pytest.raises(error, match=message):
        quartet.suggest(**{**valid, **arguments})


class Stateful(nn.Module):
    """Dropout, batch norm, a counting buffer, random numbers: with a part that is in evaluation mode already."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.norm, self.dropout = nn.BatchNorm1d(64), nn.Dropout(0.5)
        self.frozen = nn.BatchNorm1d(64).eval()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = self.second(self.dropout(self.norm(self.frozen(torch.relu(self.first(x))))))
        return (y + 0.1 * torch.randn_like(y)).square().mean()


def test_nothing_is_left_behind() -> None:
    model = Stateful()
    compiled = torch.compile(model, backend="eager")
    batches = [torch.randn(512, 64) for _ in range(8)]
    compiled(batches[0])
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes = {name: module.training for name, module in model.named_modules()}
    attributes = [dict(vars(p)) for p in model.parameters()]
    generator, fused = torch.get_rng_state(), torch.backends.mha.get_fastpath_enabled()
    for _ in range(2):
        assert len(quartet.suggest(compiled, batches).candidates) == 2
    with pytest.raises(TypeError, match="loss= has to return"):
        quartet.suggest(model, batches, loss=lambda y, batch: None)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert not model.frozen.training
    assert all(p.grad is None for p in model.parameters())
    assert [vars(p) for p in model.parameters()] == attributes
    assert torch.backends.mha.get_fastpath_enabled() == fused
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled(batches[0])


def test_it_measures_in_evaluation_mode_with_equal_random_numbers() -> None:
    """Without dropout; what a model draws all the same is drawn again in each run, so that differences are of rounding alone."""
    model = Stateful()
    batches = [torch.randn(512, 64) for _ in range(8)]
    state = torch.get_rng_state()
    suggestion = quartet.suggest(model, batches)
    model.eval()
    expected: dict[bool, list[float]] = {}
    for excluded in (True, False):
        compiled, _ = capture(model, exclude=["*"] if excluded else [])
        for half in (batches[::2], batches[1::2]):
            torch.set_rng_state(state)
            with torch.no_grad():
                expected.setdefault(excluded, []).extend(compiled(x).item() for x in half)
    assert suggestion.plain == pytest.approx(np.mean(expected[True]), rel=1e-6)
    assert suggestion.quantized == pytest.approx(np.mean(expected[False]), rel=1e-6)


@pytest.mark.slow
def test_batches_of_different_lengths() -> None:
    model = with_bad_linear(Model())
    batches = [batches_for(model, count=1, tokens=t)[0] for t in (16, 24, 32, 48, 64, 80)]
    suggestion = quartet.suggest(model, batches)
    assert suggestion.candidates[0].name == "layers.1.down"
    assert suggestion.plain == pytest.approx(np.mean(losses(model, batches, exclude="*")), rel=1e-5)
    assert suggestion.quantized == pytest.approx(np.mean(losses(model, batches)), rel=1e-5)


@pytest.mark.slow
def test_models_that_compile_themselves() -> None:
    model = with_bad_linear(Model())
    batches = batches_for(model)
    expected = quartet.suggest(model, batches).to_dict()
    model.compile(backend="eager")
    assert quartet.suggest(model, batches).to_dict() == expected
    blocks = with_bad_linear(Model())
    blocks.load_state_dict(model.state_dict())
    for layer in blocks.layers:
        layer.compile(backend="eager")
    assert quartet.suggest(blocks, batches).to_dict() == expected


class Encoder(nn.Module):
    """torch's own layer: a fused form of it in inference hides its linears, and its out_proj is computed by another module's forward.

    out_proj is bad as in `with_bad_linear`: features of the values that are always 0 meet outliers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(64, 2, 128, batch_first=True)
        attention = self.block.self_attn
        with torch.no_grad():
            attention.in_proj_weight[128::16] = 0
            attention.out_proj.weight.mul_(16)
            attention.out_proj.weight[:, ::16] = 300.0

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return nn.functional.mse_loss(self.block(x), target)


@pytest.mark.slow
def test_layers_that_torch_fuses_in_inference_are_measured_as_in_training() -> None:
    model = Encoder()
    inputs, zeros = [torch.randn(4, 16, 64) for _ in range(4)], torch.zeros(4, 16, 64)
    in_training = {linear.name for linear in quartet.explain(model, inputs[0], zeros).rewritten}
    model.eval()
    with torch.no_grad():
        batches = [(x, model.block(x) + 0.01 * torch.randn_like(x)) for x in inputs]
    suggestion = quartet.suggest(model, batches)
    assert {c.name for c in suggestion.candidates} == in_training
    assert len(in_training) == 4
    assert suggestion.exclude == ("block.self_attn.out_proj",)
    assert suggestion.only == ()
    assert any("another module's forward computes them" in note for note in suggestion.notes)


def test_a_coarse_loss_is_named() -> None:
    model = with_bad_linear(Model())
    suggestion = quartet.suggest(model, batches_for(model), loss=lambda y, batch: y.bfloat16())
    assert any("bfloat16 number, too coarse" in note for note in suggestion.notes)


def test_a_layer_that_dynamo_gives_up_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would run in eager code, and none of its linears quantized."""

    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.state = nn.Linear(64, 64), "0"

        def forward(self, x: Tensor) -> Tensor:
            self.state = self.state + "0"
            return self.linear(x).square().mean() + len(self.state)

    monkeypatch.setattr(choices, "RECOMPILES", 3)
    with pytest.raises(Exception, match="recompile_limit"):
        quartet.suggest(Changing(), [torch.randn(8, 64)] * 4)


def test_gradients_inside_the_forward_are_refused() -> None:
    class Force(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            with torch.enable_grad():
                return self.linear(x).square().mean()

    with pytest.raises(Exception, match="computes gradients inside its forward"):
        quartet.suggest(Force(), [torch.randn(8, 64)] * 4)


@pytest.mark.slow
def test_a_hugging_face_model() -> None:
    """Batches are dicts, the loss is an attribute of the output; labels are what the model itself finds most probable."""
    pytest.importorskip("transformers")
    from huggingface_models import llama

    model, _ = llama()
    mlp = model.model.layers[1].mlp
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
        mlp.gate_proj.weight[::16] = 0  # silu(0) = 0: these features meet outliers, as in `with_bad_linear`
        mlp.down_proj.weight.mul_(20)
        mlp.down_proj.weight[:, ::16] = 60.0
        batches = []
        for _ in range(6):
            tokens = torch.randint(1, 96, (4, 32))
            best = model(input_ids=tokens).logits.argmax(-1)
            batches.append({"input_ids": tokens, "labels": torch.cat([tokens[:, :1], best[:, :-1]], 1)})
        expected = np.mean([model(**batch).loss.item() for batch in batches])
    suggestion = quartet.suggest(model, batches)
    assert suggestion.plain == pytest.approx(expected, rel=1e-4)
    assert suggestion.candidates[0].name == "model.layers.1.mlp.down_proj"
    assert suggestion.exclude == suggestion.only
    assert "model.layers.1.mlp.down_proj" in suggestion.exclude
    assert suggestion.chosen.recovered.value > 0.5
    assert {c.name for c in quartet.suggest(model, batches, by="block").candidates} == {"model.layers.0", "model.layers.1"}
