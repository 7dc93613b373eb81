"""What `only=` selects: names, classes, functions, first and last blocks; and that a selector which selects nothing is an error."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
from support import capture
from torch import Tensor, nn

import quartet_compile as quartet
from quartet_compile.selectors import select


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x)


class LocalAttention(Attention):
    pass


class Block(nn.Module):
    def __init__(self, attention: type[nn.Module] = Attention) -> None:
        super().__init__()
        self.attn, self.mlp = attention(), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.attn(x))


class Model(nn.Module):
    def __init__(self, blocks: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(LocalAttention if i == 1 else Attention) for i in range(blocks)])
        self.out = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.out(x)


class Two(nn.Module):
    """An encoder and a decoder."""

    def __init__(self, encoder: int = 3, decoder: int = 3) -> None:
        super().__init__()
        self.encoder, self.decoder = (nn.ModuleDict({"layers": nn.ModuleList([Block() for _ in range(n)])}) for n in (encoder, decoder))


def selected(model: nn.Module, only: Any) -> list[str]:
    """Names of the modules that a selector means."""
    names = {module: name for name, module in model.named_modules()}
    return [names[module] for module, _ in select(model, only, "test")]


# ---------------------------------------------------------------- names, classes, functions


def test_a_class_means_its_instances_and_those_of_subclasses() -> None:
    assert selected(Model(), LocalAttention) == ["layers.1.attn"]
    assert selected(Model(), Attention) == [f"layers.{i}.attn" for i in range(4)]
    assert selected(nn.Linear(64, 64), nn.Linear) == [""], "the model itself"


def test_a_function_is_asked_about_each_module_inside() -> None:
    asked = []

    def wide(name: str, module: nn.Module) -> bool:
        asked.append(name)
        return isinstance(module, nn.Linear) and not name.startswith("layers")

    model = Model()
    assert selected(model, wide) == ["out"]
    assert asked == [name for name, _ in model.named_modules() if name]


def test_a_sequence_means_all_that_one_of_its_members_means() -> None:
    assert selected(Model(), ["out", LocalAttention, lambda name, module: name == "layers.3", quartet.blocks(first=1)]) == [
        "out", "layers.1.attn", "layers.3", "layers.0",
    ]  # fmt: skip


def test_a_list_of_modules_stands_for_the_modules_in_it() -> None:
    """Nobody calls the list itself."""
    assert selected(Model(2), "layers") == ["layers.0", "layers.1"]
    assert selected(Two(2, 1), "encoder") == ["encoder.layers.0", "encoder.layers.1"]
    assert selected(Model(2).layers, None) == ["0", "1"]


def test_names_are_those_without_wrappers() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = Model(3)
    model.layers[0] = checkpoint_wrapper(model.layers[0])
    model.layers[2] = torch.compile(model.layers[2])
    assert selected(model, ["layers.0.attn", "layers.2.attn"]) == [
        "layers.0._checkpoint_wrapped_module.attn", "layers.2._orig_mod.attn",
    ]  # fmt: skip
    assert selected(model, quartet.blocks(first=1, last=1)) == ["layers.0._checkpoint_wrapped_module", "layers.2._orig_mod"]


def test_a_module_that_two_names_have_is_found_by_both() -> None:
    shared = nn.Linear(64, 64)
    model = nn.ModuleDict({"a": shared, "b": shared})
    assert [selected(model, name) for name in ("a", "b", ["a", "b"])] == [["a"], ["a"], ["a"]]


@pytest.mark.feature("Choosing recipes", "set_recipe by glob, class, function and blocks")
def test_what_is_selected_gets_the_recipe_and_the_report_names_the_selector() -> None:
    def out(name: str, module: nn.Module) -> bool:
        return name == "out"

    model = Model()
    quartet.set_recipe(model, "bf16", only=[LocalAttention, out, quartet.blocks(last=1), "layers.0.mlp"])
    compiled, backend = capture(model)
    compiled(torch.randn(16, 64))
    found = {linear.name: linear.decided_by for linear in backend.report(model).linears if linear.recipe == "bf16"}
    assert found == {
        "layers.1.attn.q": "set_recipe(only=LocalAttention)",
        "out": "set_recipe(only=out)",
        "layers.3.attn.q": "set_recipe(only=blocks(last=1))",
        "layers.3.mlp": "set_recipe(only=blocks(last=1))",
        "layers.0.mlp": "set_recipe(only='layers.0.mlp')",
    }


@pytest.mark.parametrize(
    ("only", "message"),
    [
        ("layer.*", r"'layer\.\*' matches no module of Model; its modules begin with: layers, layers\.0, layers\.0\.attn"),
        (["out", "layers.0.atn"], r"'layers\.0\.atn' matches no .*; did you mean layers\.0\.attn\?"),
        (nn.Conv2d, "Conv2d matches no module of Model; its modules are of the classes Attention, Block, Linear, LocalAttention, Model, "),
        ([nn.Linear, nn.Conv2d], "Conv2d matches no module"),
        (lambda name, module: False, r"lambda at test_selectors\.py:\d+ matches no module of Model; its modules begin with: layers"),
        ([], "`only` is empty"),
    ],
)  # fmt: skip
def test_a_selector_that_selects_nothing_is_named_beside_what_exists(only: Any, message: str) -> None:
    model = Model()
    with pytest.raises(ValueError, match=rf"quartet\.set_recipe: {message}"):
        quartet.set_recipe(model, "bf16", only=only)
    assert not any("forward" in module.__dict__ for module in model.modules()), "nothing is set"


@pytest.mark.parametrize(
    ("only", "message"),
    [
        (3, "takes a glob, a class, a function of .* got 3"),
        (["out", 3], "got 3"),
        (int, "the class int, which is no nn.Module"),
        (nn.Linear(2, 2), "`only` is a module, Linear; give the module itself as the model"),
        (nn.ModuleList([nn.Linear(2, 2)]), "`only` is a module, ModuleList"),
    ],
)
def test_what_is_no_selector_is_refused(only: Any, message: str) -> None:
    with pytest.raises(TypeError, match=rf"quartet\.set_recipe: .*{message}|quartet\.set_recipe: {message}"):
        quartet.set_recipe(Model(), "bf16", only=only)


# ---------------------------------------------------------------- blocks


def test_first_and_last_blocks() -> None:
    assert selected(Model(), quartet.blocks(first=1, last=2)) == ["layers.0", "layers.2", "layers.3"]
    assert selected(Model(), quartet.blocks(first=2)) == ["layers.0", "layers.1"]
    assert selected(Model(), quartet.blocks(last=4)) == [f"layers.{i}" for i in range(4)]


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (nn.Sequential(*(Block() for _ in range(3))), ["0", "2"]),
        (nn.Sequential(nn.Embedding(8, 64), *(Block() for _ in range(3)), nn.LayerNorm(64), nn.Linear(64, 8)), ["1", "3"]),
        (nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)), ["0", "4"]),
        (nn.ModuleDict({"layers": nn.ModuleDict(OrderedDict((str(i), Block()) for i in range(3)))}), ["layers.0", "layers.2"]),
        (nn.ModuleDict({"head": nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), "h": Model().layers}), ["h.0", "h.3"]),
        (nn.ModuleDict({"tables": nn.ModuleList([nn.Embedding(9999, 8) for _ in range(3)]), "h": Model().layers}), ["h.0", "h.3"]),
        (nn.ModuleList([nn.Sequential(nn.Linear(64, n)) for n in (64, 96, 128)]), ["0", "2"]),
    ],
    ids=["sequential", "among others", "linears", "numbered dict", "beside a small chain", "beside tables", "containers of one structure"],
)  # fmt: skip
def test_blocks_are_the_chain_of_repeated_layers(model: nn.Module, expected: list[str]) -> None:
    assert selected(model, quartet.blocks(first=1, last=1)) == expected


def test_what_lies_inside_blocks_is_no_chain_but_can_be_named() -> None:
    block = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(64, 64) for _ in range(8)])})
    model = nn.ModuleDict({"h": nn.ModuleList([copy.deepcopy(block) for _ in range(3)])})
    assert list(quartet.blocks(first=1).select(model)) == ["h.0"]
    assert selected(model, quartet.blocks(first=1, of="h.*.experts")) == [f"h.{i}.experts.0" for i in range(3)]


def test_an_encoder_beside_a_decoder_has_to_be_named() -> None:
    with pytest.raises(ValueError, match=r"Two has 2 chains, .* which it is: encoder\.layers \(3 x Block\), decoder\.layers \(3 x Block\)"):
        quartet.set_recipe(Two(), "bf16", only=quartet.blocks(first=1))
    assert selected(Two(), quartet.blocks(last=1, of="decoder.layers")) == ["decoder.layers.2"]
    assert selected(Two(), quartet.blocks(first=1, of="*.layers")) == ["encoder.layers.0", "decoder.layers.0"]
    assert selected(Two(30, 2), quartet.blocks(first=1)) == ["encoder.layers.0"], "less than a tenth of the other one's parameters"


class Other(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixer = nn.Linear(64, 64)


def test_layers_of_two_kinds_with_a_base_class_in_common_are_a_chain() -> None:
    class Layer(nn.Module):
        pass

    class Attending(Layer, Block):
        pass

    class Mixing(Layer, Other):
        pass

    model = nn.ModuleDict({"h": nn.ModuleList([Mixing(), Mixing(), Attending(), Mixing(), Mixing(), Attending()])})
    assert list(quartet.blocks(first=1, last=1).select(model)) == ["h.0", "h.5"]


def test_layers_of_two_kinds_that_alternate_have_to_be_named() -> None:
    model = nn.ModuleDict({"h": nn.ModuleList([Block(), Block(), Other(), Block(), Block(), Other()])})
    with pytest.raises(ValueError, match=r"no chain of repeated layers; say with of= which it is: h \(6 x Block, Other\)"):
        quartet.blocks(first=1).select(model)
    assert list(quartet.blocks(first=1, last=2, of="h").select(model)) == ["h.0", "h.4", "h.5"]


@pytest.mark.parametrize(
    ("counts", "error", "message"),
    [
        ({"first": 3, "last": 2}, ValueError, r"blocks\(first=3, last=2\): layers \(4 x Block\) has fewer than 5 blocks"),
        ({"first": 1, "of": "blocks"}, ValueError, r"no container of Model has this name; it has layers \(4 x Block\)"),
        ({}, ValueError, "select no blocks"),
        ({"first": -1, "last": 2}, ValueError, "select no blocks"),
        ({"first": 1.0}, TypeError, "whole numbers, got 1.0"),
        ({"last": True}, TypeError, "whole numbers, got True"),
        ({"first": 1, "of": 3}, TypeError, "`of` is a glob"),
    ],
)
def test_counts_that_make_no_sense_are_refused(counts: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        quartet.set_recipe(Model(), "bf16", only=quartet.blocks(**counts))


def test_a_model_without_repeated_layers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Linear has no chain of repeated layers$"):
        quartet.set_recipe(nn.Linear(64, 64), "bf16", only=quartet.blocks(first=1))


@pytest.mark.feature("Choosing recipes", "first and last blocks, compiled block by block")
def test_first_and_last_blocks_compiled_one_by_one() -> None:
    model, x = Model(), torch.randn(16, 64, requires_grad=True)
    quartet.set_recipe(model, "bf16", only=quartet.blocks(first=1, last=1))
    _, backend = capture(model)
    for block in model.layers:
        block.compile(backend=backend)
    model(x)
    found = {name: linear.recipe for linear in backend.report(model).linears for name in linear.names}
    assert found == {f"layers.{i}.{name}": "bf16" if i in (0, 3) else "quartet2" for i in range(4) for name in ("attn.q", "mlp")}


@pytest.mark.slow
@pytest.mark.feature("Choosing recipes", "first and last blocks of {name}")
@pytest.mark.parametrize(
    ("name", "container"),
    [
        ("llama", "model.layers"), ("qwen3", "model.layers"), ("gpt2", "transformer.h"), ("bert", "bert.encoder.layer"),
        ("vit", "vit.encoder.layer|vit.layers"), ("mamba", "backbone.layers"), ("mamba2", "backbone.layers"),
    ],
)  # fmt: skip
def test_blocks_of_models_of_hugging_face(name: str, container: str) -> None:
    pytest.importorskip("transformers")
    from huggingface_models import MODELS

    model, _ = MODELS[name]()
    found = list(quartet.blocks(first=1, last=1).select(model))
    assert found in [[f"{path}.0", f"{path}.1"] for path in container.split("|")]


@pytest.mark.slow
def test_blocks_of_an_encoder_and_a_decoder_of_hugging_face() -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=96, d_model=64, d_kv=64, d_ff=64, num_layers=3, num_heads=1)
    )
    with pytest.raises(ValueError, match=r"has 2 chains.*(en|de)coder\.block \(3 x T5Block\)"):
        quartet.blocks(last=1).select(model)
    assert list(quartet.blocks(last=1, of="*.block").select(model)) == ["encoder.block.2", "decoder.block.2"]


@pytest.mark.slow
@pytest.mark.parametrize("layers", [2, 5])
def test_the_blocks_of_mixtral_are_its_layers_not_its_experts(layers: int) -> None:
    pytest.importorskip("transformers")
    from huggingface_models import mixtral

    model, _ = mixtral("eager", layers)
    assert list(quartet.blocks(first=1, last=1).select(model)) == ["model.layers.0", f"model.layers.{layers - 1}"]
