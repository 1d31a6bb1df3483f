"""The command line: delta-jax train | generate | evaluate | plan | info."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import os
import platform
import sys
import traceback
from collections.abc import Sequence

# Heavy imports are made by the command that needs them, so that --help and typing errors answer at once.

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tokenizers", "datasets")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments after the program's name; default those of the process.

    Returns:
        The exit code: 0; 2 for a mistake of the user and 1 for a run that diverged, one line on stderr says
        what is wrong; 130 after Ctrl-C (training itself ends with 0 then: it saves and can go on).
    """
    arguments = _parse(argv)
    try:
        return int(arguments.run(arguments))
    except (ValueError, OSError, ArithmeticError) as error:
        if arguments.debug:
            traceback.print_exc()
        else:
            print(f"delta-jax {arguments.command}: error: {error}", file=sys.stderr)
        return 1 if isinstance(error, ArithmeticError) else 2
    except KeyboardInterrupt:
        print(f"delta-jax {arguments.command}: interrupted", file=sys.stderr)
        return 130


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses; overrides may stand on either side of an option, which argparse alone does not allow."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    overrides = "overrides" in arguments and all("=" in word and not word.startswith("-") for word in rest)
    if rest and not overrides:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides += rest
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="delta-jax", description="Language models of the delta-rule family in JAX.")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser("train", parents=[common], help="train a model, or go on with a run that stopped")
    train.add_argument("config", metavar="CONFIG", help="name of a preset, or a TOML file")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="such as steps=100 or data.path=books/")
    train.set_defaults(run=_train)

    generate = commands.add_parser("generate", parents=[common], help="continue prompts with a trained model")
    generate.add_argument("folder", metavar="RUN_FOLDER", help="the output folder of a training run")
    generate.add_argument(
        "--prompt", action="append", required=True, help="a text to continue; may be given several times"
    )
    generate.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="default %(default)s")
    generate.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        metavar="X",
        help="0 takes the likeliest token; default %(default)s",
    )
    generate.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    generate.add_argument("--top-p", type=float, metavar="P", help="draw from the likeliest tokens of mass P")
    generate.add_argument("--seed", type=int, default=0, help="of the draws; default %(default)s")
    generate.set_defaults(run=_generate)

    evaluate = commands.add_parser(
        "evaluate",
        parents=[common],
        help="loss, bits per byte and perplexity on the validation split of a corpus",
    )
    evaluate.add_argument("folder", metavar="RUN_FOLDER", help="the output folder of a training run")
    evaluate.add_argument("--data", metavar="PATH", help="another corpus: stdlib, a file, a folder or a glob")
    evaluate.add_argument("--format", help="format of that corpus; default: told from its files")
    evaluate.add_argument("--text-field", metavar="NAME", help="field of that corpus that holds the text")
    evaluate.add_argument(
        "--validation-fraction",
        type=float,
        metavar="X",
        help="share of that corpus's documents; default: as in training",
    )
    evaluate.add_argument("--batch-size", type=int, metavar="B", help="rows at a time; default: as in training")
    evaluate.add_argument("--sequence-length", type=int, metavar="T", help="tokens in a row; default: as in training")
    evaluate.set_defaults(run=_evaluate)

    plan = commands.add_parser(
        "plan",
        parents=[common],
        help="compile a training step for TPUs that are not here: does it fit, what does it move",
    )
    plan.add_argument("config", metavar="CONFIG", help="name of a preset, or a TOML file")
    plan.add_argument("overrides", nargs="*", metavar="key=value", help="such as batch_size=64 or mesh.fsdp=-1")
    plan.add_argument(
        "--topology", required=True, metavar="NAME", help="v5e:16x16, v5p:2x2x1, tpu7x:2x2x1; one chip is v5e:1x1"
    )
    plan.set_defaults(run=_plan)

    info = commands.add_parser("info", parents=[common], help="versions, devices, and what can run on them")
    info.set_defaults(run=_info)
    return parser


def _train(arguments: argparse.Namespace) -> int:
    from delta_jax.config import load_config
    from delta_jax.training import TrainConfig, train

    train(load_config(TrainConfig, arguments.config, arguments.overrides))
    return 0


def _generate(arguments: argparse.Namespace) -> int:
    import jax

    from delta_jax.data import load_tokenizer
    from delta_jax.inference import generate
    from delta_jax.training import restore_model

    config, model = restore_model(arguments.folder)
    tokenizer = load_tokenizer(config.data.tokenizer)
    prompts = [[tokenizer.document_id, *tokenizer.encode(prompt).tolist()] for prompt in arguments.prompt]
    continuations = generate(
        model,
        prompts,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        stop_id=tokenizer.document_id,
        key=jax.random.key(arguments.seed),
    )
    for number, (prompt, ids) in enumerate(zip(prompts, continuations, strict=True)):
        if len(prompts) > 1:
            print(f"--- {number + 1} ---")
        print(tokenizer.decode([*prompt, *ids]))
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from delta_jax.data import bigram_bits_per_byte, validation_batches
    from delta_jax.evaluation import evaluate
    from delta_jax.training import restore_model

    fraction = arguments.validation_fraction
    if arguments.data is None and (arguments.format or arguments.text_field or fraction is not None):
        raise ValueError(
            "--format, --text-field and --validation-fraction describe another corpus: give --data as well."
        )
    config, model = restore_model(arguments.folder)
    data = config.data
    if arguments.data is not None:
        data = dataclasses.replace(data, path=arguments.data, format=arguments.format or "auto")
        data = dataclasses.replace(data, text_field=arguments.text_field or data.text_field)
        data = dataclasses.replace(data, validation_fraction=data.validation_fraction if fraction is None else fraction)
    batches = validation_batches(
        data,
        batch_size=config.batch_size if arguments.batch_size is None else arguments.batch_size,
        sequence_length=config.sequence_length if arguments.sequence_length is None else arguments.sequence_length,
    )
    result = evaluate(model, batches)
    rows = [
        ("corpus", data.path),
        ("loss", f"{result.loss:.4f} nats per token"),
        ("bits per byte", f"{result.bits_per_byte:.4f}"),
        ("perplexity", f"{result.perplexity:.3f} per token"),
        ("byte bigram", f"{bigram_bits_per_byte(data):.4f} bits per byte, for comparison"),
        ("tokens", f"{result.tokens:,}"),
        ("bytes", f"{result.bytes:,}"),
    ]
    _print_rows(rows)
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the compiler is enough: take no chip from whoever trains here

    from delta_jax.config import load_config
    from delta_jax.training import TrainConfig
    from delta_jax.training.plan import plan

    config = load_config(TrainConfig, arguments.config, arguments.overrides)
    result = plan(config, arguments.topology)
    chips = _count(result.chips, "chip") if result.devices == result.chips else f"{result.chips} x 2 devices"
    rows = [
        ("topology", f"{result.topology}, {chips} ({result.device_kind}); figures are those of one chip"),
        ("mesh", ", ".join(f"{axis}={size}" for axis, size in result.mesh.items())),
        (
            "batch",
            f"{_count(config.batch_size, 'sequence')} of {config.sequence_length:,} tokens in "
            f"{_count(config.gradient_accumulation, 'micro-batch')}",
        ),
        ("parameters", f"{result.parameters:,}"),
        ("delta rule", ", ".join(result.kernels) or "made by XLA"),
        ("products", f"{result.flops:.4g} FLOPs a step"),
    ]
    memory = result.memory
    if memory is not None:
        rows += [(field.name, _bytes(getattr(memory, field.name))) for field in dataclasses.fields(memory)]
        rows += [(kind, f"{_bytes(size)} received a step") for kind, size in result.collectives.items()]
        rows += [] if result.collectives else [("collectives", "none")]
    rows.append(("compiled in", f"{result.seconds:.0f} s"))
    _print_rows(rows)
    if memory is None:
        print(f"does not fit: the compiler says: {result.refusal}")
    else:
        fits = "fits" if result.fits else "does not fit"
        print(f"{fits}: {_bytes(memory.total)} of the {_bytes(result.hbm)} of a chip")
    return 0 if result.fits else 1


def _count(number: int, thing: str) -> str:
    plural = "es" if thing.endswith("ch") else "s"
    return f"{number:,} {thing}{'' if number == 1 else plural}"


def _bytes(size: float) -> str:
    return f"{size / 2**30:.4g} GiB" if size >= 2**27 else f"{size / 2**20:.3g} MiB"


def _info(arguments: argparse.Namespace) -> int:
    import jax

    import delta_jax
    from delta_jax.ops import implementations

    rows = [("delta_jax", delta_jax.__version__), ("python", platform.python_version())]
    rows += [(name, _version(name)) for name in _PACKAGES]
    rows += [("platform", platform.platform()), ("backend", jax.default_backend())]
    rows += [(f"device {device.id}", f"{device.device_kind} ({device.platform})") for device in jax.devices()]
    rows += [
        (f'"{name}"', "can run here" if reason is None else f"cannot run here: {reason}")
        for name, reason in implementations().items()
    ]
    _print_rows(rows)
    return 0


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _print_rows(rows: Sequence[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


if __name__ == "__main__":
    sys.exit(main())
