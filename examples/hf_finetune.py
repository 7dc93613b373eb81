"""Fine-tune a causal language model with the Hugging Face Trainer, its linears in NVFP4.

    python examples/hf_finetune.py                                      # a small Llama, from its configuration, on the standard library
    python examples/hf_finetune.py --model runs/hf --data notes/*.txt   # goes on with what the first command saved
    python examples/hf_finetune.py --backend inductor                   # the same without NVFP4

One line is ours: `model.compile(backend="quartet")`, before the Trainer is made. `TrainingArguments(torch_compile_backend="quartet")` is
refused: Accelerate has a list of the backends that it knows (its enum DynamoBackend, in 1.15). Compiling in place has an advantage, too:
the model stays the class that it was, and what the Trainer saves has the usual names.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

try:
    import torch
    from gpt_data import split_files, split_standard_library
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        LlamaConfig,
        PreTrainedModel,
        PreTrainedTokenizerFast,
        Trainer,
        TrainingArguments,
    )

    import quartet_compile as quartet
except ModuleNotFoundError as error:
    package = str(error.name).partition(".")[0]
    sys.exit(f'The package {package} is missing: pip install "quartet-compile[hf]"')

END = "<end>"


def new_tokenizer(text: str, vocab: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `vocab` entries, trained on the text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab, initial_alphabet=alphabet, special_tokens=[END], show_progress=False)
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END)


def new_model(tokenizer: PreTrainedTokenizerFast, context: int) -> PreTrainedModel:
    """A Llama of less than a million parameters."""
    end = tokenizer.eos_token_id
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=context, bos_token_id=end, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def windows(text: str, tokenizer: PreTrainedTokenizerFast, context: int) -> list[dict[str, torch.Tensor]]:
    """The text's tokens, cut into sequences of `context`; what remains is dropped."""
    lines = tokenizer(text.splitlines(keepends=True), add_special_tokens=False)["input_ids"]
    tokens = torch.tensor([token for line in lines for token in line])
    return [{"input_ids": ids, "labels": ids} for ids in tokens[: len(tokens) // context * context].view(-1, context)]


def main(arguments: Sequence[str] | None = None) -> Trainer:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder with a model and its tokenizer, or a name on the Hub; a new small Llama by default")
    parser.add_argument("--data", type=Path, nargs="+", help="text files; by default the Python standard library")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--backend", default="quartet", help="of torch.compile")
    parser.add_argument("--out", type=Path, default=Path("runs/hf"))
    args = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("quartet_compile").setLevel(logging.INFO)  # tells which linears run in NVFP4, when they are compiled
    torch.manual_seed(0)

    text, validation = (part.decode("utf-8", "replace") for part in (split_files(args.data) if args.data else split_standard_library()))
    tokenizer = AutoTokenizer.from_pretrained(args.model) if args.model else new_tokenizer(text, vocab=1024)
    model = AutoModelForCausalLM.from_pretrained(args.model) if args.model else new_model(tokenizer, args.context)
    train, evaluate = windows(text, tokenizer, args.context), windows(validation, tokenizer, args.context)[: 4 * args.batch]

    if args.backend == "quartet":
        print(quartet.explain(model, **torch.utils.data.default_collate(train[: args.batch])))
    model.compile(backend=args.backend)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(args.out), max_steps=args.steps, per_device_train_batch_size=args.batch,
            per_device_eval_batch_size=args.batch, learning_rate=args.lr, warmup_steps=args.steps // 10, lr_scheduler_type="cosine",
            bf16=True, use_cpu=not torch.cuda.is_available(),
            logging_steps=max(1, args.steps // 10), save_strategy="no", report_to="none", dataloader_drop_last=True,
        ),
        train_dataset=train, eval_dataset=evaluate, processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    print(f"validation loss {trainer.evaluate()['eval_loss']:.3f}; the model is in {args.out}")
    return trainer


if __name__ == "__main__":
    main()
