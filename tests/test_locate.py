"""Names of linears from the paths that Dynamo leaves on nodes."""

from __future__ import annotations

import pytest

from quartet_compile.passes.locate import _name, dotted


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("L['self']", ""),
        ("L['self'].layers.0.q", "layers.0.q"),
        ("L['self']._modules['layers']._modules['0']._modules['q']._parameters['weight']", "layers.0.q.weight"),
        ("G['model'].head", "head"),
        ("L['loss'].__closure__[0].cell_contents.layers.0.q", "layers.0.q"),
        ("L['self'].layers.1.forward.__self__.q", "layers.1.q"),
        ("L['args'][0].q", "q"),
        ("L['self'].layers.0.__dict__['_modules']['_checkpoint_wrapped_module'].q", "layers.0.q"),
        ("L['parameters']['layers.0.weight']", "layers.0.weight"),
    ],
)
def test_dotted_names(path: str, name: str) -> None:
    assert dotted(path) == name


@pytest.mark.parametrize(
    ("module", "weights", "name"),
    [
        ("layers.0.q", ["layers.0.q.weight"], "layers.0.q"),
        ("layers.0", ["layers.0.mix"], "layers.0.mix"),
        ("head", ["embedding.weight"], "head"),
        ("", ["weight"], ""),
        ("", ["w"], "w"),
        ("block", ["block.inner.weight"], "block.inner"),
        ("a", ["a.x", "a.y"], "a"),
    ],
)
def test_names_of_sites(module: str, weights: list[str], name: str) -> None:
    assert _name(module, weights) == name
