"""Trains the tiny DeltaNet on the source of Python's standard library and shows what it learnt.

    python -m experiments.demo [key=value ...]        the preset is configs/tiny.toml

A run found in the output folder is continued; a finished one is only shown.
"""

import argparse
import time

import jax
from flax import nnx
from rich.console import Console
from rich.table import Table

from delta_jax.config import load_config
from delta_jax.data import bigram_bits_per_byte, load_tokenizer, split, validation_batches, validation_bytes
from delta_jax.evaluation import EvaluationResult, evaluate
from delta_jax.inference import generate
from delta_jax.models import LanguageModel, number_of_parameters
from delta_jax.training import TrainConfig, restore_model, train
from experiments.harness.runner import one_sentence

PROMPT = 'class Stack:\n    """A last-in, first-out stack."""\n\n    def __init__(self'


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.demo",
        description="Trains the tiny DeltaNet on the source of Python's standard library and shows what it learnt.",
        epilog="A run found in the output folder is continued; a finished one is only shown.",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of configs/tiny.toml, such as steps=100")
    overrides = parser.parse_args().overrides
    with one_sentence("demo"):
        show(load_config(TrainConfig, "tiny", overrides))


def show(config: TrainConfig) -> None:
    """Train, measure, sample."""
    start = time.monotonic()
    console = Console()
    tokenizer = load_tokenizer(config.data.tokenizer)

    # What there is to learn from, and what has to be beaten.
    training, validation = split(config.data)
    size = validation_bytes(config.data)
    bigram = bigram_bits_per_byte(config.data)
    untrained = LanguageModel(config.model, rngs=nnx.Rngs(config.seed))
    console.print(
        f"Corpus {config.data.path}: {len(training)} documents to train on, {len(validation)} held out "
        f"({size:,} bytes).\nModel: {config.model.num_layers} layers, "
        f"{number_of_parameters(untrained):,} parameters.\nTraining: {config.steps} steps of "
        f"{config.batch_size * config.sequence_length:,} tokens.\n"
    )

    # Train.
    result = train(config, baselines={"byte bigram": bigram})
    if result.interrupted:
        console.print("Interrupted; the same command goes on from here.")
        return

    # Measure before and after on every held-out document.
    def measure(model: LanguageModel) -> EvaluationResult:
        batches = validation_batches(config.data, batch_size=config.batch_size, sequence_length=config.sequence_length)
        return evaluate(model, batches)

    _, trained = restore_model(config.output)
    before, after = measure(untrained), measure(trained)
    table = Table("validation split", "bits per byte", title="\nHow well is unseen source code predicted?")
    table.add_row("model before training", f"{before.bits_per_byte:.3f}")
    table.add_row("byte bigram, the baseline", f"{bigram:.3f}")
    table.add_row("model after training", f"[bold]{after.bits_per_byte:.3f}[/bold]")
    console.print(table)

    # Sample.
    prompt = [tokenizer.document_id, *tokenizer.encode(PROMPT).tolist()]
    (new,) = generate(
        trained,
        [prompt],
        max_new_tokens=400,
        temperature=0.8,
        stop_id=tokenizer.document_id,
        key=jax.random.key(0),
    )
    console.print("\nA sample, after the prompt in bold:\n")
    console.print(PROMPT, style="bold", end="", markup=False, highlight=False, soft_wrap=True)
    console.print(tokenizer.decode(new), markup=False, highlight=False, soft_wrap=True)
    console.print(f"\nThe loss curve is {result.output / 'curve.png'}. All this took {time.monotonic() - start:.0f} s.")


if __name__ == "__main__":
    main()
