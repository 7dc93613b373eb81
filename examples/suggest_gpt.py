"""Which linears of a GPT that `train_gpt.py` has trained to leave out of NVFP4, and whether that helps on other text.

    python examples/train_gpt.py
    python examples/suggest_gpt.py                              # the model trained in NVFP4, in runs/tiny
    python examples/suggest_gpt.py --by kind
    python examples/suggest_gpt.py --include lm_head            # with the output head in NVFP4, too, which the defaults leave alone

Half of the batches go to `quartet.suggest`. With the other half the suggestion is checked as a user would apply it: the model is compiled
three times, without NVFP4, with it, and with the suggested linears left out.
"""

import argparse
import json
from pathlib import Path
from statistics import fmean, stdev

import torch
from gpt_data import load_corpus, validation_batches
from gpt_model import GPT
from gpt_training import PRESETS, Settings, autocast

import quartet_compile as quartet


def difference(some: list[float], others: list[float]) -> str:
    """Mean and standard error, batch by batch."""
    differences = [a - b for a, b in zip(some, others, strict=True)]
    return f"{fmean(differences):.5f} +- {stdev(differences) / len(differences) ** 0.5:.5f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/tiny"), help="folder of the run (default: runs/tiny)")
    parser.add_argument("--recipe", default="quartet2", help="which of its trainings (default: quartet2)")
    parser.add_argument("--by", choices=["linear", "kind", "block"], default="linear")
    parser.add_argument("--include", nargs="*", default=[], metavar="GLOB", help="linears that the defaults leave alone")
    parser.add_argument("--budget", type=float, default=0.2, help="share of the FLOPs in NVFP4 to give up at most (default: 0.2)")
    parser.add_argument("--batches", type=int, default=64, help="of validation text, half of them for the check (default: 64)")
    args = parser.parse_args()

    settings = Settings(**json.loads((args.out / "settings.json").read_text()))
    config = PRESETS[settings.preset].model
    files = [Path(file) for file in settings.data]
    corpus = load_corpus(files, vocab=config.vocab, context=config.context, cache=args.out / "tokenizer.json")
    model = GPT(config).to(settings.device).eval()
    model.load_state_dict(torch.load(args.out / f"checkpoint_{args.recipe}.pt", map_location="cpu", weights_only=True)["model"])
    text = validation_batches(corpus.validation, count=args.batches, batch=settings.batch, context=config.context)
    batches = [tuple(part.to(settings.device) for part in batch) for batch in text]

    with autocast(settings):
        suggestion = quartet.suggest(model, batches[::2], by=args.by, budget=args.budget, options={"quartet.include": args.include})
    print(suggestion)

    def losses(backend: str, **options: list[str]) -> list[float]:
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=backend, options={f"quartet.{key}": value for key, value in options.items()})
        with torch.no_grad(), autocast(settings):
            return [compiled(*batch).item() for batch in batches[1::2]]

    plain, quantized = losses("inductor"), losses("quartet", include=args.include)
    print(f"\non {len(plain)} batches that it has not seen:")
    print(f"  NVFP4 costs                     {difference(quantized, plain)}")
    if suggestion.exclude:
        left_out = losses("quartet", include=args.include, exclude=[*suggestion.exclude])
        print(f"  with the suggestion left out    {difference(left_out, plain)}")
        print(f"  so leaving it out takes away    {difference(quantized, left_out)}")


if __name__ == "__main__":
    main()
