"""Which linears are left in the model's dtype, and the reasons that the report gives."""

from __future__ import annotations

from typing import Any

import float64_recipe as independent
import pytest
import torch
import torch.nn.functional as F
from support import capture, recorded_seeds, relative_error
from torch import Tensor, nn

import quartet_compile as quartet


def only_linear(model: nn.Module, *args: Any, **options: Any) -> Any:
    compiled, backend = capture(model, **options)
    compiled(*args)
    (linear,) = backend.report(model).linears
    return linear


def test_a_trained_weight_expanded_over_a_batch_is_reported() -> None:
    """Its gradient is one matrix for each of the batch."""

    class Expanded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(80, 80))

        def forward(self, x: Tensor) -> Tensor:
            return torch.bmm(x, self.weight.expand(3, 80, 80))

    model, x = Expanded(), torch.randn(3, 4, 80)
    linear = only_linear(model, x)
    assert linear.left_because == "unsupported"
    assert "unknown form" in linear.reason


def test_a_scaled_addmm_is_reported() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(80, 80)

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.linear.bias, x, self.linear.weight.t(), alpha=2)

    assert "alpha" in only_linear(Scaled(), torch.randn(4, 80)).reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_with_a_vector_is_reported_and_stays_as_it_was(dtype: torch.dtype, device: torch.device) -> None:
    """Inductor would decompose it before it could be counted, and cannot compile it otherwise."""

    class Vector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(80, 72, dtype=dtype))

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmv(x.mean(), self.weight, x)

    model, x = Vector(), torch.randn(72, dtype=dtype, requires_grad=True)
    linear = only_linear(model, x)
    assert (linear.name, linear.left_because, len(linear.before)) == ("(root)", "unsupported", 2), "y and dx; dw is no product"
    results = []
    for step in (model, torch.compile(model, backend="quartet"), torch.compile(model, backend="inductor")):
        y = step(x)
        y.backward(torch.ones_like(y))
        results.append((y.detach(), x.grad, model.weight.grad))
        x.grad = model.weight.grad = None
    tolerance = 1e-5 if dtype == torch.float32 else 8e-3  # one rounding to bfloat16 of sums in another order
    for eager, ours, inductors in zip(*results, strict=True):
        torch.testing.assert_close(ours, eager, rtol=tolerance, atol=tolerance * float(eager.abs().max()))
        assert torch.equal(ours, inductors)


@pytest.mark.parametrize(
    ("model", "reason"),
    [(nn.Conv2d(64, 64, 1, stride=2), "stride or padding"), (nn.Conv2d(64, 64, 1, padding=1), "stride or padding"),
     (nn.ConvTranspose2d(64, 64, 1), "transposed one")],
)  # fmt: skip
def test_a_convolution_that_is_no_linear_of_all_pixels_is_reported(model: nn.Module, reason: str) -> None:
    assert reason in only_linear(model, torch.randn(2, 64, 8, 8)).reason


@pytest.mark.parametrize("model", [nn.Conv2d(64, 64, 3), nn.Conv2d(64, 64, 1, groups=2)])
def test_other_convolutions_are_no_linears(model: nn.Module) -> None:
    compiled, backend = capture(model)
    compiled(torch.randn(2, 64, 8, 8))
    assert backend.report(None).linears == ()


def test_the_text_names_convolutions_that_are_no_linears_and_their_share() -> None:
    class Vision(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch, self.up = nn.Conv2d(3, 64, 8, stride=8), nn.Linear(64, 128)

        def forward(self, images: Tensor) -> Tensor:
            y = self.up(self.patch(images).flatten(2).transpose(1, 2))
            return torch.bmm(y, y.transpose(1, 2))

    text = str(quartet.explain(Vision(), torch.randn(2, 3, 32, 32)))
    # 32 patches: y, dw of the convolution; y, dx, dw of the linear; y and both gradients of the product of activations
    convolution, linear, product = 2 * 2 * 32 * 192 * 64, 3 * 2 * 32 * 64 * 128, 3 * 2 * 2 * 16 * 128 * 16
    total = convolution + linear + product
    assert "\n  no linear: patch: a convolution, which stays in the model's dtype\n" in text
    others = f"{(convolution + product) / total:.1%} of 3 other products (attention) and 2 convolutions"
    assert f"{linear / total:.1%} in NVFP4, 0.0% of linears left, {others}\n" in text


def test_a_model_without_linears_has_no_table() -> None:
    text = str(quartet.explain(lambda x: x @ x, torch.randn(64, 64)))
    assert text.startswith("quartet: 0 of 0 linears in NVFP4, 1 graph(s)\n\nfloating point operations of products: 524 K,"), text


def test_a_bilinear_is_reported() -> None:
    assert "_trilinear" in only_linear(nn.Bilinear(64, 64, 64), torch.randn(4, 64), torch.randn(4, 64)).reason


def test_products_in_branches_are_counted() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.yes, self.no = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, lambda x: self.yes(x), lambda x: self.no(self.no(x)), (x,))

    linear = only_linear(Branches(), torch.randn(4, 64))
    assert linear.left_because == "unsupported"
    assert linear.reason == "3 product(s) inside cond, which is not looked into"


def test_float64_is_reported_as_unsupported() -> None:
    linear = only_linear(nn.Linear(80, 80).double(), torch.randn(4, 80).double())
    assert linear.left_because == "unsupported"
    assert "float64" in linear.reason


def test_products_of_activations_are_no_linears() -> None:
    class Attention(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return (q @ q.transpose(-1, -2)).softmax(-1) @ q

    compiled, backend = capture(Attention())
    compiled(torch.randn(2, 64, 64, requires_grad=True))
    assert backend.report(None).linears == ()


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ("lm_head", "output head"),
        ("router", "router of a mixture of experts"),
        ("small", "8 features, below 64"),
        ("tied", "its weight is also an embedding"),
    ],
)
def test_defaults_leave_heads_routers_small_and_tied_linears(names: str, reason: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(100, 128)
            self.body = nn.Linear(128, 128)
            setattr(self, names, nn.Linear(128, 8 if names == "small" else 100))
            if names == "tied":
                self.tied.weight = self.embedding.weight

        def forward(self, i: Tensor) -> Tensor:
            return getattr(self, names)(self.body(self.embedding(i)))

    model = Model()
    compiled, backend = capture(model)
    compiled(torch.randint(0, 100, (2, 8)))
    body, left = backend.report(model).linears
    assert (body.name, body.products) == ("body", ("y", "dx", "dw"))
    assert (left.left_because, left.products) == ("default", ())
    assert reason in left.reason


def test_a_numbered_output_is_no_head() -> None:
    """BERT's `layer.3.output.dense` and a block's `layers.0.output` are ordinary linears."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.output = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.output(x)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Block()])

        def forward(self, x: Tensor) -> Tensor:
            return self.layers[0](x)

    assert only_linear(Model(), torch.randn(4, 64)).products == ("y", "dw")


def test_an_input_made_of_parameters_is_reported() -> None:
    class Latents(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.latents, self.q = nn.Parameter(torch.randn(4, 80)), nn.Linear(80, 80)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.q(self.latents)

    linear = only_linear(Latents(), torch.randn(4, 80))
    assert (linear.name, linear.left_because) == ("q", "unsupported")
    assert "parameters or constants" in linear.reason


def test_a_computed_weight_is_left_unless_it_is_asked_for() -> None:
    """Its gradient goes on through what computed it."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(66, 70) / 8)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight * 3)

    model, x = Scaled(), torch.randn(40, 70)
    left = only_linear(model, x, min_features=1)
    assert (left.left_because, left.products) == ("default", ())
    assert "computed from parameters" in left.reason
    compiled, backend = capture(model, min_features=1, include=["*"])
    with recorded_seeds() as seeds:
        y = compiled(x)
        e = torch.randn_like(y)
        y.backward(e)
    assert backend.report(model).linears[0].products == ("y", "dw")
    x64, w64, e64 = x.double().numpy(), (model.weight.detach() * 3).double().numpy(), e.double().numpy()
    assert relative_error(y, independent.linear(x64, w64)) < 1e-6
    assert relative_error(model.weight.grad, 3 * independent.wgrad(e64, x64, seeds.transposed[0])) < 1e-6


class Experts(nn.Module):
    """Each token meets the matrix of the expert that is its own: picked by an index, copied, multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 80, 64))

    def forward(self, x: Tensor, expert: Tensor) -> Tensor:
        return torch.bmm(self.up[expert].to(x.dtype), x.unsqueeze(-1)).squeeze(-1)


def test_matrices_picked_by_data_are_reported() -> None:
    linear = only_linear(Experts(), torch.randn(4, 64), torch.randint(0, 3, (4,)))
    assert (linear.name, linear.left_because) == ("up", "unsupported")
    assert "picked from a parameter by data" in linear.reason


def test_rows_picked_by_data_are_activations() -> None:
    """A table of positions, of two dimensions or of three, is what a linear multiplies, not what it multiplies by."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.stack, self.q = nn.Parameter(torch.randn(9, 64)), nn.Parameter(torch.randn(9, 4, 64)), nn.Linear(64, 64)

        def forward(self, i: Tensor) -> Tensor:
            return torch.stack([self.q(self.table[i]), self.q(self.stack[i]).sum(1)])

    compiled, backend = capture(Positions())
    compiled(torch.randint(0, 9, (4,)))
    assert [(n.name, n.products) for n in backend.report(None).linears] == [("q", ("y", "dx", "dw"))] * 2


def test_parameters_that_enter_an_unknown_operator_are_reported() -> None:
    @torch.library.custom_op("quartet_tests::product", mutates_args=())
    def product(x: Tensor, w: Tensor, scale: Tensor) -> Tensor:
        return x @ w.t() * scale

    product.register_fake(lambda x, w, scale: x.new_empty(x.shape[0], w.shape[0]))

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.scale = nn.Linear(64, 80), nn.Parameter(torch.ones(80))

        def forward(self, x: Tensor) -> Tensor:
            return product(x, self.inner.weight, self.scale)

    model = Hidden().requires_grad_(False)
    compiled, backend = capture(model)
    compiled(torch.randn(4, 64))
    report = backend.report(model)
    assert [(n.name, n.left_because) for n in report.linears] == [("inner", "unsupported")]
    assert report.linears[0].reason == "it enters quartet_tests.product.default, which is not looked into"
