"""Choosing recipes: decorators, contexts, set_recipe and globs, who wins, and what graph breaks and regional compilation do to them."""

from __future__ import annotations

import copy
import types
from typing import Any

import pytest
import torch
from support import capture
from torch import Tensor, nn

import quartet_compile as quartet


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x) + self.k(x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.out = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.out(x)


def recipes(model: Any, *args: Tensor, **options: Any) -> dict[str, tuple[str, str]]:
    """name -> (recipe, who decided)."""
    compiled, backend = capture(model, **options)
    compiled(*(args or (torch.randn(16, 64, requires_grad=True),)))
    return {linear.name: (linear.recipe, linear.decided_by) for linear in backend.report(model).linears}


def test_everything_is_quartet2_by_default() -> None:
    assert recipes(Model()) == dict.fromkeys(
        ("layers.0.q", "layers.0.k", "layers.1.q", "layers.1.k", "out"), ("quartet2", "default")
    )


# ---------------------------------------------------------------- decorators and contexts


def test_a_decorated_class_stays_a_class_and_decides_forward_and_backward() -> None:
    @quartet.recipe("bf16")
    class Decorated(Block):
        pass

    assert isinstance(Decorated, type)
    model = nn.Sequential(Decorated(), Block())
    compiled, backend = capture(model)
    compiled(torch.randn(16, 64, requires_grad=True))
    products = {linear.name: linear.products for linear in backend.report(model).linears}
    assert products == {"0.q": (), "0.k": (), "1.q": ("y", "dx", "dw"), "1.k": ("y", "dx", "dw")}
    assert backend.graphs[0].backward.count("aten.mm.default") == 4


def test_decorating_a_subclass_leaves_its_parent_alone() -> None:
    @quartet.recipe("bf16")
    class Decorated(Block):
        pass

    assert recipes(Decorated())["q"][0] == "bf16"
    torch._dynamo.reset()
    assert recipes(Block())["q"][0] == "quartet2"


def test_a_decorated_function_and_a_context_inside_the_model() -> None:
    @quartet.recipe("bf16")
    def decorated(model: Block, x: Tensor) -> Tensor:
        return model.q(x)

    def run(x: Tensor) -> Tensor:
        y = decorated(block, x)
        with quartet.recipe("bf16"):
            y = other.q(y)
            with quartet.recipe("quartet2"):
                y = other.k(y)
        return block.k(y)

    block, other = Block(), Block()
    compiled, backend = capture(run)
    compiled(torch.randn(16, 64))
    found = [(linear.name, linear.recipe) for linear in backend.report(None).linears]
    assert found == [("q", "bf16"), ("q", "bf16"), ("k", "quartet2"), ("k", "quartet2")]


def test_the_innermost_decorator_wins() -> None:
    @quartet.recipe("bf16")
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.inner = nn.Linear(64, 64), Inner()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(self.a(x))

    @quartet.recipe("quartet2")
    class Inner(Block):
        pass

    assert {n: r for n, (r, _) in recipes(Outer()).items()} == {"a": "bf16", "inner.q": "quartet2", "inner.k": "quartet2"}


def test_decorators_do_nothing_in_eager_code() -> None:
    @quartet.recipe("quartet2")
    class Decorated(Block):
        pass

    model, x = Decorated(), torch.randn(4, 64)
    assert torch.equal(model(x), model.q(x) + model.k(x))


@pytest.mark.parametrize("target", [int, nn.Linear(2, 2), 3, lambda: (yield)])
def test_what_cannot_be_decorated_is_refused(target: Any) -> None:
    with pytest.raises(TypeError, match="decorates"):
        quartet.recipe("bf16")(target)


def test_unknown_recipes_are_refused_with_the_valid_names() -> None:
    with pytest.raises(ValueError, match="valid are bf16, quartet2"):
        quartet.recipe("nvfp5")
    with pytest.raises(ValueError, match="valid are bf16, quartet2"):
        quartet.set_recipe(Block(), "nvfp5")

    def traced(x: Tensor) -> Tensor:
        with quartet.recipe("nvfp5"):
            return block.q(x)

    block = Block()
    with pytest.raises(Exception, match="valid are bf16, quartet2"):
        recipes(traced)


def test_a_context_around_the_call_breaks_no_graph_at_unflatten() -> None:
    block = Block()
    compiled = torch.compile(lambda x: block.q(x).unflatten(-1, (4, -1)).sum(), backend="eager", fullgraph=True)
    with quartet.recipe("bf16"):
        assert compiled(torch.randn(4, 64)).isfinite()


def test_what_is_no_name_of_a_recipe_is_said_in_one_line() -> None:
    for written in (lambda: quartet.recipe(Block), lambda: quartet.set_recipe("bf16", Block())):  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r'^quartet\.\w+ takes the name of a recipe, such as "bf16", not Block$'):
            written()


# ---------------------------------------------------------------- graph breaks and eager contexts


@pytest.mark.feature("Ways to compile", "graph breaks")
def test_a_graph_break_inside_a_decorated_function_keeps_its_recipe() -> None:
    @quartet.recipe("bf16")
    def broken(x: Tensor) -> Tensor:
        x = block.q(x)
        torch._dynamo.graph_break()
        return block.k(x)

    block, other = Block(), nn.Linear(64, 64)

    def run(x: Tensor) -> Tensor:
        return other(broken(x))

    compiled, backend = capture(run)
    compiled(torch.randn(16, 64))
    report = backend.report(None)
    assert len(report.graphs) > 1, "the graph did break"
    found = [(linear.recipe, linear.decided_by) for linear in report.linears]
    assert found == [("bf16", "decorator on function broken")] * 2 + [("quartet2", "default")]


def test_a_graph_break_inside_a_decorated_class_keeps_its_recipe() -> None:
    @quartet.recipe("bf16")
    class Broken(Block):
        def forward(self, x: Tensor) -> Tensor:
            x = self.q(x)
            torch._dynamo.graph_break()
            return self.k(x)

    assert {recipe for recipe, _ in recipes(Broken()).values()} == {"bf16"}


def test_a_context_around_the_call_is_guarded_on() -> None:
    model, x = nn.Linear(64, 64), torch.randn(16, 64)
    exact = model(x)
    compiled = torch.compile(model, backend="quartet")
    for _ in range(2):
        with quartet.recipe("bf16"):
            torch.testing.assert_close(compiled(x), exact)
        assert (compiled(x) - exact).norm() > 0.05 * exact.norm(), "quantized"


def test_a_helper_that_breaks_inside_and_outside_a_decorated_function_never_takes_the_wrong_recipe() -> None:
    inner, x = nn.Linear(64, 64), torch.randn(16, 64)

    def helper(y: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return inner(y)

    @quartet.recipe("bf16")
    def decorated(y: Tensor) -> Tensor:
        return helper(y)

    compiled, _ = capture(lambda y: (decorated(y), helper(y)))
    with pytest.raises(RuntimeError, match=r"compiled under quartet\.recipe\('bf16'\) and is now called under no quartet\.recipe"):
        compiled(x)


def test_a_decorated_static_method() -> None:
    class Holder:
        @quartet.recipe("bf16")
        @staticmethod
        def run(layer: nn.Module, y: Tensor) -> Tensor:
            return layer(y)

    layer = nn.Linear(64, 64)
    assert [r for r, _ in recipes(lambda y: Holder.run(layer, y)).values()] == ["bf16"]


# ---------------------------------------------------------------- set_recipe


def test_set_recipe_by_glob_and_back() -> None:
    model = Model()
    handle = quartet.set_recipe(model, "bf16", only="layers.*.q")
    found = recipes(model)
    assert [n for n, (r, _) in found.items() if r == "bf16"] == ["layers.0.q", "layers.1.q"]
    assert found["layers.0.q"] == ("bf16", "set_recipe(only='layers.*.q')")
    handle.remove()
    assert "forward" not in model.layers[0].q.__dict__
    torch._dynamo.reset()
    assert all(r == "quartet2" for r, _ in recipes(model).values())


def test_a_glob_that_matches_no_module_raises_and_names_some() -> None:
    with pytest.raises(ValueError, match=r"'layer\.\*' matches no module of Model; its modules begin with: layers, layers\.0"):
        quartet.set_recipe(Model(), "bf16", only="layer.*")


def test_inner_and_later_settings_win_and_a_copy_keeps_them() -> None:
    model = Model()
    quartet.set_recipe(model, "bf16")
    quartet.set_recipe(model, "quartet2", only="layers.1")
    quartet.set_recipe(model, "bf16", only="layers.1.k")
    quartet.set_recipe(model, "quartet2", only=["layers.1.k", "out"])
    expected = {"layers.0.q": "bf16", "layers.0.k": "bf16", "layers.1.q": "quartet2", "layers.1.k": "quartet2", "out": "quartet2"}
    assert {n: r for n, (r, _) in recipes(model).items()} == expected
    torch._dynamo.reset()
    twin = copy.deepcopy(model)
    assert {n: r for n, (r, _) in recipes(twin).items()} == expected
    assert twin.layers[1].forward.__self__ is twin.layers[1], "the copy's forward is bound to the copy"
    assert twin.state_dict().keys() == model.state_dict().keys()


def test_settings_can_be_taken_back_in_any_order() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    first, second = quartet.set_recipe(model, "bf16", only="0"), quartet.set_recipe(model, "quartet2", only="0")
    first.remove()
    assert recipes(model)["0"] == ("quartet2", "set_recipe(only='0')")
    second.remove()
    second.remove()
    torch._dynamo.reset()
    assert recipes(model)["0"] == ("quartet2", "default")
    assert not [name for name in model[0].__dict__ if name == "forward" or name.startswith("_quartet")]


def test_a_forward_of_the_modules_own_survives_and_follows_copies() -> None:
    model, x = nn.Linear(64, 64, bias=False), torch.randn(4, 64)

    def doubled(self: nn.Linear, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight) * 2

    model.forward = types.MethodType(doubled, model)
    handle = quartet.set_recipe(model, "bf16")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.weight.zero_()
    assert not twin(x).any()
    torch.testing.assert_close(model(x), 2 * x @ model.weight.t())
    handle.remove()
    assert model.forward.__func__ is doubled


@pytest.mark.parametrize(("arguments", "error"), [((print, "bf16", None), TypeError), ((nn.Linear(2, 2), "bf16", []), ValueError)])
def test_settings_that_would_do_nothing_are_refused(arguments: tuple[Any, str, Any], error: type[Exception]) -> None:
    model, name, only = arguments
    with pytest.raises(error, match=r"quartet\.set_recipe"):
        quartet.set_recipe(model, name, only=only)


def test_a_decorator_is_stronger_than_set_recipe_which_is_stronger_than_globs() -> None:
    @quartet.recipe("quartet2")
    class Decorated(Block):
        pass

    model = nn.Sequential(Decorated(), Block())
    quartet.set_recipe(model, "bf16", only="0")
    quartet.set_recipe(model, "quartet2", only="1.q")
    found = recipes(model, exclude=["*"])
    assert {n: r for n, (r, _) in found.items()} == {"0.q": "quartet2", "0.k": "quartet2", "1.q": "quartet2", "1.k": "bf16"}


def test_set_recipe_after_compiling_recompiles() -> None:
    model, x = nn.Sequential(nn.Linear(64, 64)), torch.randn(16, 64)
    compiled, backend = capture(model)
    compiled(x)
    quartet.set_recipe(compiled, "bf16")
    compiled(x)
    assert [linear.recipe for linear in backend.report(model).linears] == ["quartet2", "bf16"]


@pytest.mark.feature("Ways to compile", "regional compilation")
def test_blocks_of_one_class_compiled_one_by_one_keep_their_recipes() -> None:
    model, x = Model(), torch.randn(16, 64)
    quartet.set_recipe(model, "bf16", only="layers.1")
    exact = [layer(x) for layer in model.layers]
    for layer in model.layers:
        layer.compile(backend="quartet")
    for _ in range(2):
        assert (model.layers[0](x) - exact[0]).norm() > 0.05 * exact[0].norm(), "quantized"
        torch.testing.assert_close(model.layers[1](x), exact[1])


def test_blocks_with_the_same_recipes_are_compiled_once_whoever_set_them() -> None:
    """Nine blocks: with a compilation for each, Dynamo would give up at its limit of eight."""
    model = nn.Sequential(*(Block() for _ in range(9)))
    quartet.set_recipe(model, "bf16", only=["*.q"])
    for i in range(3):
        quartet.set_recipe(model, "bf16", only=f"{i}.q")
    quartet.set_recipe(model, "quartet2", only="4.q")
    _, backend = capture(model)
    for block in model:
        block.compile(backend=backend)
    model(torch.randn(16, 64, requires_grad=True))
    assert [[linear.recipe for linear in graph.linears] for graph in backend.graphs] == [["bf16", "quartet2"], ["quartet2", "quartet2"]]
    bf16, quantized = backend.report(model).graphs
    assert bf16.linears[0].names == ("0.q", "1.q", "2.q", "3.q", "5.q", "6.q", "7.q", "8.q")
    assert bf16.linears[0].decided_by == "set_recipe(only='0.q') and 3 more"
    assert quantized.linears[0].decided_by == "set_recipe(only='4.q')"


class Breaking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return torch.relu(self.q(x))


@pytest.mark.parametrize("one_by_one", [False, True])
def test_a_graph_break_keeps_what_was_set(one_by_one: bool) -> None:
    """Then eager code enters the module, and the graphs behind the break serve all modules of the class."""
    model, x = nn.Sequential(*(Breaking() for _ in range(4))), torch.randn(16, 64, requires_grad=True)
    quartet.set_recipe(model, "bf16")
    quartet.set_recipe(model, "quartet2", only=["1", "3"])
    quartet.set_recipe(model, "bf16", only="3.q")
    compiled, backend = capture(model)
    if one_by_one:
        model = nn.Sequential(*model)  # without what was set on the whole
        compiled = model
        for block in model:
            block.compile(backend=backend)
    for _ in range(2):
        compiled(x)
    found = {name: linear.recipe for linear in backend.report(model).linears for name in linear.names}
    outer = "quartet2" if one_by_one else "bf16"
    assert found == {"0.q": outer, "1.q": "quartet2", "2.q": outer, "3.q": "bf16"}


# ---------------------------------------------------------------- globs of the options


def test_exclude_wins_over_include_and_include_lifts_the_defaults() -> None:
    class WithHead(Model):
        def __init__(self) -> None:
            super().__init__()
            self.lm_head = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.lm_head(super().forward(x))

    found = recipes(WithHead(), exclude="layers.0.*", include=["lm_head", "layers.0.q"])
    bf16 = {n for n, (r, _) in found.items() if r == "bf16"}
    assert bf16 == {"layers.0.q", "layers.0.k"}
    assert found["lm_head"] == ("quartet2", "quartet.include 'lm_head'")


def test_a_glob_of_the_options_that_matches_nothing_is_reported() -> None:
    report = quartet.explain(Model(), torch.randn(4, 64), options={"quartet.exclude": ["layers.0.*", "nothing.*"]})
    assert report.unmatched == (("quartet.exclude", "nothing.*"),)
    assert "quartet.exclude: 'nothing.*' matches no linear" in str(report)
