"""`suggest`: its losses are those of models with linears left out, and its list reaches what it names."""

from __future__ import annotations

import json
from typing import Any

import expecttest
import float64_recipe as recipe
import numpy as np
import pytest
import torch
from suggest_support import Batch, Block, BrokenBlock, Model, batches_for, losses, with_bad_linear
from support import float64
from torch import Tensor, nn

import quartet_compile as quartet
from quartet_compile.suggestion import Candidate, Exclusion, Mean, Suggestion, mean, ratio

LINEARS = [f"layers.{i}.{name}" for i in range(2) for name in ("up", "down")]


@pytest.mark.parametrize("measure", ["alone", pytest.param("left out", marks=pytest.mark.slow)])
def test_costs_are_those_of_models_with_other_linears_excluded(measure: Any) -> None:
    model = Model(blocks=2)
    batches = batches_for(model)
    suggestion = quartet.suggest(model, batches, measure=measure, budget=1.0)
    full, plain = losses(model, batches), losses(model, batches, exclude=["*"])
    assert suggestion.plain == pytest.approx(np.mean(plain), rel=1e-6)
    assert suggestion.quantized == pytest.approx(np.mean(full), rel=1e-6)
    differences = np.subtract(full, plain)
    assert suggestion.gap.value == pytest.approx(differences.mean(), rel=1e-4)
    assert suggestion.gap.error == pytest.approx(differences.std(ddof=1) / 6**0.5, rel=1e-3)
    assert sorted(c.name for c in suggestion.candidates) == sorted(LINEARS)
    for candidate in suggestion.candidates:
        others = [name for name in LINEARS if name != candidate.name]
        if measure == "alone":
            expected = np.subtract(losses(model, batches[::2], exclude=others), plain[::2])
        else:
            expected = np.subtract(full[::2], losses(model, batches[::2], exclude=[candidate.name]))
        assert candidate.loss.value == pytest.approx(expected.mean(), rel=1e-3, abs=1e-8), candidate.name
        assert candidate.loss.error == pytest.approx(expected.std(ddof=1) / 3**0.5, rel=1e-2, abs=1e-8), candidate.name
        assert candidate.linears == (candidate.name,)
    assert [len(exclusion.linears) for exclusion in suggestion.exclusions] == [1, 2, 3, 4]
    for exclusion in suggestion.exclusions[1::2]:
        left_out = losses(model, batches[1::2], exclude=[*exclusion.linears])
        share = np.subtract(full[1::2], left_out).mean() / np.subtract(full, plain)[1::2].mean()
        assert exclusion.recovered.value == pytest.approx(share, rel=1e-3, abs=1e-5)


def test_costs_are_those_of_the_recipe() -> None:
    """In float64, without this package. A code that is rounded to the other side of a midpoint moves one of 4096 outputs."""
    model = Model(blocks=1)
    batches = batches_for(model, count=4)
    suggestion = quartet.suggest(model, batches)
    block = model.layers[0]
    up, down, head = ((float64(m.weight), float64(m.bias)) for m in (block.up, block.down, model.lm_head))

    def linear(x: np.ndarray, parameters: tuple[np.ndarray, np.ndarray], quantized: bool) -> np.ndarray:
        w, b = parameters
        return (recipe.linear(x, w) if quantized else x @ w.T) + b

    def loss(batch: Batch, *quantized: str) -> float:
        x, target = map(float64, batch)
        y = x + linear(np.maximum(linear(x, up, "up" in quantized), 0), down, "down" in quantized)
        return float(((linear(y, head, False) - target) ** 2).mean())

    gap = np.mean([loss(b, "up", "down") - loss(b) for b in batches])
    assert suggestion.gap.value == pytest.approx(gap, rel=1e-2)
    found = {c.name: c.loss.value for c in suggestion.candidates}
    for name in ("up", "down"):
        assert found[f"layers.0.{name}"] == pytest.approx(np.mean([loss(b, name) - loss(b) for b in batches[::2]]), rel=1e-2)


@pytest.mark.parametrize(
    ("block", "measure"), [(Block, "alone"), (BrokenBlock, "alone"), pytest.param(BrokenBlock, "left out", marks=pytest.mark.slow)]
)
def test_a_bad_linear_is_found_and_leaving_it_out_recovers_most(device: torch.device, block: Any, measure: Any) -> None:
    model = with_bad_linear(Model(block=block))
    batches = batches_for(model)
    suggestion = quartet.suggest(model, batches, measure=measure)
    first, *others = suggestion.candidates
    assert first.name == "layers.1.down"
    assert first.loss.value > 5 * max(c.loss.value for c in others)
    assert suggestion.chosen is not None
    assert suggestion.chosen.linears == ("layers.1.down",)
    assert suggestion.only == ("layers.1.down",)
    assert suggestion.chosen.recovered.value > 0.7

    full, plain = losses(model, batches[1::2]), losses(model, batches[1::2], exclude=["*"])
    handle = quartet.set_recipe(model, "bf16", only=[*suggestion.only])
    applied = losses(model, batches[1::2])
    handle.remove()
    recovered = np.subtract(full, applied).mean() / np.subtract(full, plain).mean()
    assert suggestion.chosen.recovered.value == pytest.approx(recovered, rel=1e-3)
    if block is Block:
        assert suggestion.exclude == ("layers.1.down",)
        assert losses(model, batches[1::2], exclude=[*suggestion.exclude]) == pytest.approx(applied)
    else:
        assert suggestion.exclude == (), "in the graph its name is that of all layers"
        assert any("quartet.exclude cannot single these out" in note for note in suggestion.notes)
        assert "quartet.exclude\":" not in str(suggestion)


def test_kinds_and_blocks_are_left_out_as_one() -> None:
    model = with_bad_linear(Model())
    batches = batches_for(model)
    kinds = quartet.suggest(model, batches, by="kind", budget=0.5)
    assert [(c.name, len(c.linears), c.flops) for c in kinds.candidates] == [("layers.*.down", 3, 0.5), ("layers.*.up", 3, 0.5)]
    assert kinds.exclude == kinds.only == ("layers.*.down",)
    blocks = quartet.suggest(model, batches, by="block", budget=0.5)
    assert blocks.candidates[0].name == "layers.1"
    assert blocks.candidates[0].linears == ("layers.1.up", "layers.1.down")
    assert blocks.exclude == blocks.only == ("layers.1",)
    full, plain = losses(model, batches), losses(model, batches, exclude=["*"])
    for suggestion, excluded in ((kinds, "layers.*.down"), (blocks, "layers.1")):
        left_out = losses(model, batches[1::2], exclude=[excluded])
        share = np.subtract(full[1::2], left_out).mean() / np.subtract(full, plain)[1::2].mean()
        assert suggestion.exclusions[0].recovered.value == pytest.approx(share, rel=1e-3)


def test_all_linears_of_a_kind_are_said_in_one_glob() -> None:
    """Also where single linears are ranked. A kind of which one is not left out is listed."""
    model = Model(blocks=2)
    with_bad_linear(with_bad_linear(model, 0), 1)
    batches = batches_for(model)
    assert quartet.suggest(model, batches, budget=0.5).exclude == ("layers.*.down",)
    assert quartet.suggest(model, batches, budget=0.25).exclude in (("layers.0.down",), ("layers.1.down",))


def test_costs_in_operations_and_bytes() -> None:
    model = Model()
    suggestion = quartet.suggest(model, batches_for(model, tokens=32), budget=1.0)
    assert {c.flops for c in suggestion.candidates} == {1 / 6}
    packed = {"up": (128 * 64 + 32 * 64) * 9 // 16 + 8, "down": (64 * 128 + 32 * 128) * 9 // 16 + 8}
    plain = {"up": 32 * 64 * 4, "down": 32 * 128 * 4}
    for c in suggestion.candidates:
        kind = c.name.rpartition(".")[2]
        assert c.bytes == plain[kind] - packed[kind]


def test_an_input_that_others_read_is_kept_for_them() -> None:
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(x)
            return (self.q(x) * self.k(x)).square().mean()

    model = Three()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4)
    suggestion = quartet.suggest(model, [torch.randn(32, 64) for _ in range(32)], budget=1.0, measure="left out")
    weight = 64 * 64 * 9 // 16 + 4
    assert {c.bytes for c in suggestion.candidates} == {32 * 64 * 4 - weight}, "the packed input stays, for the other one"


def test_the_matrices_of_a_batch_are_one_candidate() -> None:
    """Globs cannot tell them apart."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts, self.out = nn.Parameter(torch.randn(4, 64, 64) / 8), nn.Linear(64, 64)

        def mix(self, x: Tensor) -> Tensor:
            return self.out(torch.einsum("ti,eio->eto", x, self.experts).relu().sum(0))

        def forward(self, x: Tensor, target: Tensor) -> Tensor:
            return nn.functional.mse_loss(self.mix(x), target)

    model = Experts()
    with torch.no_grad():
        batches = [(x, model.mix(x)) for x in (torch.randn(64, 64) for _ in range(4))]
    suggestion = quartet.suggest(model, batches, budget=0.8)
    costs = {c.name: c for c in suggestion.candidates}
    assert {name: c.flops for name, c in costs.items()} == {"experts": 0.8, "out": 0.2}
    alone = np.subtract(losses(model, batches[::2], exclude="out"), losses(model, batches[::2], exclude="*"))
    assert costs["experts"].loss.value == pytest.approx(alone.mean(), rel=1e-3)


def test_what_is_left_alone_already_is_no_candidate() -> None:
    model = with_bad_linear(Model())
    batches, given = batches_for(model), ["*.up", "layers.0"]
    suggestion = quartet.suggest(model, batches, options={"quartet.exclude": given}, budget=0.5)
    assert {c.name: c.flops for c in suggestion.candidates} == {"layers.1.down": 0.5, "layers.2.down": 0.5}
    assert suggestion.given == ("*.up", "layers.0")
    full, plain = losses(model, batches, exclude=given), losses(model, batches, exclude=["*"])
    assert suggestion.gap.value == pytest.approx(np.mean(full) - np.mean(plain), rel=1e-3)
    assert suggestion.exclude == ("layers.1.down",)
    assert """options={"quartet.exclude": ['*.up', 'layers.0', 'layers.1.down']}""" in str(suggestion)
    with pytest.raises(ValueError, match="no linear of this model is quantized"):
        quartet.suggest(model, batches, options={"quartet.exclude": "*"})


def test_noise_is_not_ranked() -> None:
    """Targets that have nothing to do with the model: rounding is as likely to help as to hurt."""
    model = Model()
    g = torch.Generator().manual_seed(3)
    batches = [tuple(torch.randn(8, 64, generator=g) for _ in range(2)) for _ in range(4)]
    suggestion = quartet.suggest(model, batches)
    assert not suggestion.gap.clear
    assert suggestion.candidates == suggestion.exclusions == suggestion.exclude == suggestion.only == ()
    assert "not clear of noise, so nothing is ranked" in str(suggestion)


def test_nothing_is_suggested_that_the_budget_forbids() -> None:
    model = with_bad_linear(Model(blocks=1), 0)
    suggestion = quartet.suggest(model, batches_for(model), budget=0.4)
    assert suggestion.candidates[0].flops == 0.5
    assert suggestion.chosen is None
    assert "nothing that clearly costs loss fits into budget=0.4" in str(suggestion)


def test_a_recipe_in_the_code_is_obeyed_and_named() -> None:
    """A decorator is stronger than both ways of leaving a linear out."""

    class Decorated(Block):
        @quartet.recipe("quartet2")
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    model = with_bad_linear(Model(block=Decorated))
    suggestion = quartet.suggest(model, batches_for(model))
    assert suggestion.chosen is not None
    assert suggestion.exclude == suggestion.only == ()
    assert sum("does not reach what the model's code" in note for note in suggestion.notes) == 2


def test_the_error_of_a_ratio_is_that_of_many_draws() -> None:
    """Against the spread of the ratio of means over independent samples."""
    g = np.random.default_rng(0)

    def sample() -> tuple[np.ndarray, np.ndarray]:
        whole = g.normal(1.0, 0.3, 12)
        return 0.6 * whole + g.normal(0, 0.1, 12), whole

    found = [ratio(*map(list, sample())) for _ in range(1000)]
    spread = np.std([r.value for r in found])
    assert np.mean([r.value for r in found]) == pytest.approx(0.6, abs=5 * spread / 1000**0.5 + 0.002)  # of second order: 0.1^2/12
    assert np.sqrt(np.mean([r.error**2 for r in found])) == pytest.approx(spread, rel=0.1)


def test_what_is_clear_of_noise_seldom_is_when_there_is_nothing() -> None:
    """5 times of 100, for as few batches as there may be in a half; the bound is 5 standard errors of the count."""
    g = np.random.default_rng(0)
    for batches in (2, 3, 6, 20, 40):
        hits = sum(mean(list(g.normal(size=batches))).clear for _ in range(1000))
        assert hits / 1000 == pytest.approx(0.05, abs=5 * (0.05 * 0.95 / 1000) ** 0.5), batches


class TestText(expecttest.TestCase):
    def test_the_printed_suggestion(self) -> None:
        def candidate(name: str, loss: float, n: int = 4096) -> Candidate:
            return Candidate(name, (name,), Mean(loss, 0.0002, 8), 0.1, n)

        def exclusion(share: float, *names: str) -> Exclusion:
            return Exclusion(names, names, Mean(share, 0.02, 8), 0.1 * len(names), 4096)

        candidates = (candidate("layers.1.mlp.down_proj", 0.02), candidate("layers.0.attn.o_proj", 0.004, -100), candidate("a", 0.0001))
        exclusions = exclusion(0.6, "layers.1.mlp.down_proj"), exclusion(0.7, "layers.1.mlp.down_proj", "layers.0.attn.o_proj")
        suggestion = Suggestion(
            "linear", "alone", 0.2, 1.5, 1.532, Mean(0.032, 0.001, 16), candidates, exclusions, exclusions[0],
            ("layers.1.mlp.down_proj",), ("layers.1.mlp.down_proj",), ("*.gate",), ("nothing else",),
        )  # fmt: skip
        self.assertExpectedInline(str(suggestion), """\
quartet: NVFP4 costs 0.03200 +- 0.00100 of loss, 1.50000 -> 1.53200, over 16 batches

loss that quantizing each alone costs, on 8 of the batches:

linear                  linears  loss                 FLOPs  kept bytes
layers.1.mlp.down_proj  1        +0.02000 +- 0.00020  10.0%  +4.0 KiB
layers.0.attn.o_proj    1        +0.00400 +- 0.00020  10.0%  -100 B
  not clear of noise (0.00010 at most): a

left out together, most loss for its FLOPs first (8 other batches):

left out  the last one            recovers of the gap  costs of NVFP4's FLOPs  kept bytes
1         layers.1.mlp.down_proj  60% +- 2%            10.0%                   +4.0 KiB    <- suggested
2         layers.0.attn.o_proj    70% +- 2%            20.0%                   +4.0 KiB

suggested, at most 20% of the FLOPs in NVFP4:
  options={"quartet.exclude": ['*.gate', 'layers.1.mlp.down_proj']}
  quartet.set_recipe(model, "bf16", only=['layers.1.mlp.down_proj'])

note: nothing else""")


def test_a_suggestion_is_plain_data_and_fits_a_terminal() -> None:
    model = with_bad_linear(Model())
    suggestion = quartet.suggest(model, batches_for(model))
    data = json.loads(json.dumps(suggestion.to_dict()))
    assert data["chosen"]["linears"] == ["layers.1.down"]
    assert data["candidates"][0]["loss"]["value"] == suggestion.candidates[0].loss.value
    assert max(map(len, str(suggestion).splitlines())) <= 120
