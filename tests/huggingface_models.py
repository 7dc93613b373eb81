"""Small models of Hugging Face Transformers, made from their configurations, each with a batch and a loss; and the products with a
parameter that they compute in eager PyTorch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import float64_recipe
import torch
import torch.nn.functional as F
import transformers
from support import float64
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

aten = torch.ops.aten

VOCAB, HIDDEN = 96, 128
SIZES = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 2,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

Made = tuple[nn.Module, dict[str, Tensor]]
"""A model, and the arguments of a call that returns logits and a loss."""


def _tokens(length: int = 16) -> Tensor:
    return torch.randint(1, VOCAB, (2, length))


def _on_text(model: nn.Module, length: int = 16) -> Made:
    tokens = _tokens(length)
    return model, {"input_ids": tokens, "labels": tokens}


def llama(layers: int = 2, length: int = 16) -> Made:
    config = transformers.LlamaConfig(**SIZES | {"num_hidden_layers": layers}, num_key_value_heads=1)
    return _on_text(transformers.LlamaForCausalLM(config), length)


def qwen3() -> Made:
    return _on_text(transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, num_key_value_heads=1, head_dim=64)))


def mixtral(experts: str, layers: int = 1) -> Made:
    """experts: one of Transformers' implementations of them, "eager", "batched_mm" or "grouped_mm"."""
    sizes = SIZES | {"num_hidden_layers": layers}
    config = transformers.MixtralConfig(**sizes, num_key_value_heads=1, num_local_experts=4, experts_implementation=experts)
    return _on_text(transformers.MixtralForCausalLM(config))


def gpt2() -> Made:
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_positions=32, n_embd=HIDDEN, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0, **dropout
    )
    return _on_text(transformers.GPT2LMHeadModel(config))


def bert() -> Made:
    return _on_text(transformers.BertForMaskedLM(transformers.BertConfig(**SIZES, **NO_DROPOUT, max_position_embeddings=32)))


def t5() -> Made:
    config = transformers.T5Config(
        vocab_size=VOCAB, d_model=HIDDEN, d_kv=64, d_ff=HIDDEN, num_layers=1, num_heads=2, dropout_rate=0.0, decoder_start_token_id=0
    )
    return _on_text(transformers.T5ForConditionalGeneration(config))


def vit() -> Made:
    sizes = {name: SIZES[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
    config = transformers.ViTConfig(**sizes, **NO_DROPOUT, image_size=32, patch_size=8, num_labels=10)
    return transformers.ViTForImageClassification(config), {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.randint(0, 10, (2,))}


def whisper() -> Made:
    side = {"layers": 1, "attention_heads": 2, "ffn_dim": HIDDEN}
    sides = {f"{which}_{name}": n for which in ("encoder", "decoder") for name, n in side.items()}
    config = transformers.WhisperConfig(
        vocab_size=VOCAB, d_model=HIDDEN, max_source_positions=16, max_target_positions=16, dropout=0.0, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None, **sides,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config), {"input_features": torch.randn(2, 80, 32), "labels": _tokens()}


def mamba() -> Made:
    config = transformers.MambaConfig(vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=2, state_size=8)
    return _on_text(transformers.MambaForCausalLM(config), length=4)  # its scan is a loop over the tokens


def mamba2() -> Made:
    config = transformers.Mamba2Config(
        vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=2, state_size=16, num_heads=4, head_dim=64, n_groups=1, chunk_size=8
    )
    return _on_text(transformers.Mamba2ForCausalLM(config))


MODELS: dict[str, Callable[[], Made]] = {
    "llama": llama, "qwen3": qwen3, "mixtral": lambda: mixtral("batched_mm"), "gpt2": gpt2, "bert": bert, "t5": t5, "vit": vit,
    "whisper": whisper, "mamba": mamba, "mamba2": mamba2,
}  # fmt: skip


class _Watch(TorchDispatchMode):
    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self.names = names
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (aten.mm.default, aten.addmm.default, aten.bmm.default):
            storages = [operand.untyped_storage().data_ptr() for operand in args[-2:]]
            self.seen.update(self.names[storage] for storage in storages if storage in self.names)
        return func(*args, **(kwargs or {}))


def parameters_multiplied(model: Any, inputs: dict[str, Tensor]) -> Counter[str]:
    """How often an eager forward pass multiplies by each parameter or a slice of it: told by the memory that its products read.

    Experts are looped over, whatever implementation the model has: the others copy or hide what they multiply by.
    """
    names = {parameter.untyped_storage().data_ptr(): name for name, parameter in model.named_parameters()}
    experts = model.get_experts_implementation()
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    with torch.no_grad(), _Watch(names) as watch:
        model(**inputs)
    if model._can_set_experts_implementation():
        model.set_experts_implementation(experts)
    return watch.seen


def parameter_of(model: nn.Module, name: str) -> str:
    """The parameter behind a name of the report, by the first of its names if it is tied."""
    own = dict(model.named_parameters(remove_duplicate=False))
    wanted = own.get(name, own.get(f"{name}.weight"))
    return next(n for n, parameter in model.named_parameters() if parameter is wanted)


@contextmanager
def forward_quantized(model: nn.Module, names: list[str]) -> Iterator[None]:
    """The linears named compute their eager forward by the independent float64 recipe."""

    def values(x: Tensor) -> Tensor:
        rows = float64(x.reshape(-1, x.shape[-1]))
        return torch.from_numpy(float64_recipe.four_over_six(rows)).reshape(x.shape).to(x.device)

    def hook(module: Any, args: tuple[Tensor], y: Tensor) -> Tensor:
        weight = module.weight.t() if isinstance(module, Conv1D) else module.weight
        bias = None if module.bias is None else module.bias.double()
        return F.linear(values(args[0]), values(weight), bias).to(y.dtype)

    handles = [model.get_submodule(name).register_forward_hook(hook) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
