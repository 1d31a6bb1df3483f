"""The command line: delta-jax train | generate | evaluate | import | export | plan | config | info."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.metadata
import os
import platform
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Heavy imports are made by the command that needs them, so that --help and typing errors answer at once.

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tokenizers", "datasets")
# Errors that a user can cause; XLA says RESOURCE_EXHAUSTED where a device has too little memory.
_OF_USERS = (ValueError, OSError, ArithmeticError, ModuleNotFoundError, MemoryError)
# What `pip install "delta_jax[train]"` brings, under the names by which it is imported.
_OF_TRAIN = (
    *("array_record", "datasets", "flax", "grain", "jinja2", "matplotlib", "optax"),
    *("orbax", "pyarrow", "rich", "tensorboard", "tokenizers"),
)


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
        if os.getcwd() not in sys.path:  # mixers of one's own are found here, as by `python -m`
            sys.path.append(os.getcwd())
        return int(arguments.run(arguments))
    except (Exception, KeyboardInterrupt) as error:
        return _failed(arguments, error)


def _failed(arguments: argparse.Namespace, error: BaseException) -> int:
    """Says what went wrong, and the exit code; raises what no user can cause."""
    if isinstance(error, KeyboardInterrupt):
        print(f"delta-jax {arguments.command}: interrupted", file=sys.stderr)
        return 130
    if not isinstance(error, _OF_USERS) and "RESOURCE_EXHAUSTED" not in str(error):
        raise error
    if arguments.debug:
        traceback.print_exc()
    else:
        print(f"delta-jax {arguments.command}: error: {_sentence(error)}", file=sys.stderr)
    return 1 if isinstance(error, ArithmeticError) else 2


def _sentence(error: BaseException) -> str:
    """What went wrong, in one line; of a module that is missing, how to install it."""
    if isinstance(error, ModuleNotFoundError):
        name = (error.name or "").partition(".")[0]
        if name in _OF_TRAIN or name == "lm_eval":
            extra = "eval" if name == "lm_eval" else "train"
            return f"this needs {name}, which is not installed: pip install 'delta_jax[{extra}]'"
        return f"this needs {name or error}, which is not installed"
    said = " ".join(str(error).split()) or type(error).__name__
    out_of_memory = isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in said
    return f"there is not enough memory: {said}" if out_of_memory else said


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


def _takes_a_run(command: argparse.ArgumentParser, example: str = "such as steps=100 or data.path=books/") -> None:
    """The arguments that `_config` reads."""
    command.add_argument("config", metavar="CONFIG", nargs="?", help="name of a preset, or a TOML file")
    command.add_argument("overrides", nargs="*", metavar="key=value", help=example)


def _takes_processes(command: argparse.ArgumentParser) -> None:
    """The arguments that describe one of several processes of a run."""
    group = command.add_argument_group(
        "several processes",
        "each runs the same command; a launcher that JAX knows (srun, mpirun, TPU pods) says who is who",
    )
    group.add_argument(
        "--distributed",
        choices=("auto", "on", "off"),
        default="auto",
        help="whether this is one process of several; auto: where a launcher or the arguments below say so",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="of the first process, which listens there")
    group.add_argument("--processes", type=int, metavar="N", help="how many there are")
    group.add_argument("--process", type=int, metavar="I", help="which of them this is, from 0")
    group.add_argument(
        "--heartbeat-timeout",
        type=int,
        metavar="SECONDS",
        help="a process that is silent for so long is lost, and the others end; default 100",
    )


def _takes_ema(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--ema", action="store_true", help="the moving average of the weights, of a run with ema_decay"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="delta-jax", description="Language models of the delta-rule family in JAX.")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    keys = "Every key and what it means, with the values of a preset: delta-jax config PRESET."
    train = commands.add_parser(
        "train", parents=[common], help="train a model, or go on with a run that stopped", epilog=keys
    )
    _takes_a_run(train)
    _takes_processes(train)
    train.set_defaults(run=_train)

    generate = commands.add_parser("generate", parents=[common], help="continue prompts with a trained model")
    generate.add_argument("folder", metavar="RUN_FOLDER", help="the output folder of a training run")
    generate.add_argument("--prompt", action="append", metavar="TEXT", help="to continue; may be given several times")
    generate.add_argument(
        "--prompt-file",
        action="append",
        metavar="FILE",
        help="a file whose whole text is a prompt, - is standard input; may be given several times",
    )
    generate.add_argument(
        "--prompts",
        metavar="FILE",
        help='a file of JSON lines, each an object with "prompt" or "messages"; the results are JSON lines too',
    )
    generate.add_argument(
        "--output",
        metavar="FILE",
        help="write JSON lines there, in the order of the prompts; the same command goes on where it was interrupted",
    )
    generate.add_argument(
        "--batch-size", type=int, default=8, metavar="B", help="prompts at a time; default %(default)s"
    )
    generate.add_argument("--samples", type=int, default=1, metavar="N", help="of each prompt; default %(default)s")
    generate.add_argument(
        "--chat",
        action="store_true",
        help="a prompt is the message of a user: write it as the chat template in the run folder says",
    )
    generate.add_argument("--system", metavar="TEXT", help="the system's message before it")
    generate.add_argument(
        "--save-prefix", metavar="FILE", help="read the prompt, save what the model remembers, and end"
    )
    generate.add_argument("--prefix", metavar="FILE", help="go on from what was saved; prompts come right after it")
    generate.add_argument("--step", type=int, metavar="N", help="the checkpoint of step N; default the newest")
    _takes_ema(generate)
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
    generate.add_argument(
        "--min-p", type=float, metavar="P", help="draw from tokens at least P times as likely as the likeliest"
    )
    generate.add_argument(
        "--repetition-penalty",
        type=float,
        metavar="X",
        help="above 1, tokens of the text so far become less likely",
    )
    generate.add_argument(
        "--stop",
        action="append",
        metavar="TEXT",
        help="a text before which a text ends; may be given several times",
    )
    generate.add_argument(
        "--stop-id",
        type=int,
        action="append",
        default=[],
        metavar="ID",
        help="a token before which a text ends, besides those that end documents and turns; may be given several times",
    )
    generate.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the draws, in [0, 2^32); default %(default)s"
    )
    generate.set_defaults(run=_generate)

    evaluate = commands.add_parser(
        "evaluate",
        parents=[common],
        help="loss, bits per byte and perplexity on a corpus; with --tasks, tasks of lm-evaluation-harness",
    )
    evaluate.add_argument("folder", metavar="RUN_FOLDER", help="the output folder of a training run")
    evaluate.add_argument("--step", type=int, metavar="N", help="the checkpoint of step N; default the newest")
    _takes_ema(evaluate)
    evaluate.add_argument("--data", metavar="PATH", help="another corpus: stdlib, a file, a folder or a glob")
    evaluate.add_argument(
        "--split",
        choices=("validation", "train", "all"),
        help="which documents; default: all of a corpus given with --data, else those held out from training",
    )
    evaluate.add_argument("--format", help="format of that corpus; default: told from its files")
    evaluate.add_argument("--text-field", metavar="NAME", help="field of that corpus that holds the text")
    evaluate.add_argument(
        "--records",
        choices=("text", "completion", "messages"),
        help="what its records hold; of completions and messages the answers alone count; default: as in training",
    )
    evaluate.add_argument(
        "--validation-fraction",
        type=float,
        metavar="X",
        help="share of that corpus's documents; default: as in training",
    )
    evaluate.add_argument(
        "--batch-size", type=int, metavar="B", help="rows at a time; default: as in training, 8 for tasks"
    )
    evaluate.add_argument("--sequence-length", type=int, metavar="T", help="tokens in a row; default: as in training")
    tasks = evaluate.add_argument_group("tasks of lm-evaluation-harness", "in place of a corpus")
    tasks.add_argument(
        "--tasks", metavar="NAME,...", help="such as lambada_openai,piqa; groups, patterns and YAML files as well"
    )
    tasks.add_argument("--include-path", metavar="DIR", help="a folder of more tasks, as YAML files")
    tasks.add_argument("--limit", type=int, metavar="N", help="the first N documents of each task")
    tasks.add_argument(
        "--max-length",
        type=int,
        metavar="T",
        help="tokens that the model reads at most, of longer texts the last; default: sequence_length of the run",
    )
    tasks.add_argument(
        "--num-fewshot", type=int, metavar="K", help="examples before each document; default: as the task says"
    )
    tasks.add_argument(
        "--apply-chat-template",
        action="store_true",
        help="write prompts as messages, by the template in the run folder",
    )
    tasks.add_argument(
        "--add-bos-token",
        action=argparse.BooleanOptionalAction,
        help="whether contexts begin with the prefix token; default: as the tokenizer's files say, without them yes",
    )
    tasks.add_argument(
        "--shared-prefixes",
        action=argparse.BooleanOptionalAction,
        help="whether contexts that several requests share are read once, which changes rounding alone; default: yes",
    )
    tasks.add_argument("--output", metavar="FILE", help="write the results there, as JSON")
    evaluate.set_defaults(run=_evaluate)

    into = commands.add_parser(
        "import", parents=[common], help="make a run of a published checkpoint (Hugging Face, flash-linear-attention)"
    )
    into.add_argument("source", metavar="FOLDER_OR_NAME", help="safetensors with a config.json, or a name on a hub")
    into.add_argument("--output", required=True, metavar="RUN", help="the run's folder; new or empty")
    into.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="default %(default)s"
    )
    into.add_argument(
        "--ignore-key", action="append", default=[], metavar="KEY", help="a key of config.json known to change nothing"
    )
    into.set_defaults(run=_import)

    out = commands.add_parser("export", parents=[common], help="write a run's model as a published checkpoint")
    out.add_argument("folder", metavar="RUN_FOLDER", help="the output folder of a training run, or an imported one")
    out.add_argument("--output", required=True, metavar="FOLDER", help="where it goes; new or empty")
    out.add_argument("--format", choices=("transformers", "fla"), help="whose classes load it; default as imported")
    out.add_argument("--step", type=int, metavar="N", help="the checkpoint of step N; default the newest")
    out.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default as imported, or as trained")
    _takes_ema(out)
    out.set_defaults(run=_export)

    plan = commands.add_parser(
        "plan",
        parents=[common],
        help="compile a training step for TPUs or GPUs that are not here: does it fit, what does it move",
    )
    _takes_a_run(plan, "such as batch_size=64 or mesh.fsdp=-1")
    plan.add_argument(
        "--topology", required=True, metavar="NAME", help="v5e:16x16, v5p:2x2x1; h100:8, on four hosts h100:8x4"
    )
    plan.add_argument(
        "--suggest",
        action="store_true",
        help="of TPUs: plan other meshes too, those near the best next, and say which is; each takes as long as a plan",
    )
    plan.set_defaults(run=_plan)

    config = commands.add_parser(
        "config",
        parents=[common],
        help="print a configuration: every key, what it means, its value; a file to start from",
    )
    _takes_a_run(config)
    config.set_defaults(run=_show_config)

    info = commands.add_parser("info", parents=[common], help="versions, devices, and what can run on them")
    info.set_defaults(run=_info)
    return parser


def _config(arguments: argparse.Namespace) -> Any:
    """The configuration of a run that a command names."""
    from delta_jax.config import load_config, preset_names

    if arguments.config is None:
        names = ", ".join(preset_names())
        raise ValueError(f"name a TOML file or a preset, as in delta-jax {arguments.command} tiny; there are: {names}")
    from delta_jax.training import TrainConfig

    return load_config(TrainConfig, arguments.config, arguments.overrides)


def _train(arguments: argparse.Namespace) -> int:
    config = _config(arguments)
    import jax

    from delta_jax.training import processes, train

    processes.join(
        arguments.distributed,
        coordinator=arguments.coordinator,
        processes=arguments.processes,
        process=arguments.process,
        heartbeat=arguments.heartbeat_timeout,
    )
    try:
        train(config)
    except BaseException as error:
        if jax.distributed.is_initialized():
            _leave(arguments, error)
        raise
    return 0


def _leave(arguments: argparse.Namespace, error: BaseException) -> None:
    """Ends one of several processes, for which the others would wait."""
    from delta_jax.training import processes

    if processes.is_lost(error):
        if arguments.debug:
            traceback.print_exc()
        processes.leave(processes.LOST, f"delta-jax {arguments.command}: error: {processes.lost(error)}")
    try:
        code = _failed(arguments, error)
    except BaseException:
        traceback.print_exc()
        code = 1
    processes.leave(code)


def _show_config(arguments: argparse.Namespace) -> int:
    config = _config(arguments)
    from delta_jax.config import described

    print(described(config), end="")
    return 0


def _generate(arguments: argparse.Namespace) -> int:
    records = _records(arguments)
    if not 0 <= arguments.seed < 2**32:
        raise ValueError(f"--seed must lie in [0, 2^32), got {arguments.seed}")
    if arguments.save_prefix is not None and (len(records) > 1 or arguments.output is not None):
        raise ValueError(
            "--save-prefix saves what one prompt leaves behind, and makes no text: give one, and no --output"
        )
    import jax

    from delta_jax.data import load_tokenizer
    from delta_jax.inference import load_prefix, read_prompts, save_prefix
    from delta_jax.inference.prompts import Writer
    from delta_jax.training import restore_model

    config, model = restore_model(arguments.folder, arguments.step, ema=arguments.ema)
    tokenizer = load_tokenizer(config.data.tokenizer)
    writer = Writer(Path(arguments.folder), tokenizer, chat=arguments.chat, system=arguments.system)
    prefix = None if arguments.prefix is None else load_prefix(arguments.prefix, model)
    prompts = []
    for number, record in enumerate(records, 1):
        try:
            prompts.append(writer.tokens(record, continues=prefix is not None))
        except ValueError as error:
            raise ValueError(f"prompt {number}: {error}" if len(records) > 1 else str(error)) from None
    if arguments.save_prefix is not None:
        reading = read_prompts(model, prompts, after=prefix)
        save_prefix(arguments.save_prefix, model, reading)
        print(f"{arguments.save_prefix}: {_count(int(reading.lengths[0]), 'token')}")
        return 0
    ids, texts = writer.stops()
    options: dict[str, Any] = {
        **{name: getattr(arguments, name) for name in _GENERATION},
        "stop_id": sorted({*ids, *arguments.stop_id}),
        "stop": [*texts, *(arguments.stop or [])],
    }
    more = {"key": jax.random.key(arguments.seed), "tokenizer": tokenizer, "prefix": prefix}
    if arguments.prompts is None and arguments.output is None:
        return _print_texts(arguments, model, records, prompts, **options, **more)
    return _write_records(arguments, model, records, prompts, options, more)


_GENERATION = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def _records(arguments: argparse.Namespace) -> list[Any]:
    """What is to be continued: objects with "prompt" or "messages"."""
    files = (_read_text("--prompt-file", name) for name in arguments.prompt_file or [])
    records: list[Any] = [{"prompt": text} for text in (*(arguments.prompt or []), *files)]
    if arguments.prompts is not None:
        from delta_jax.inference.records import read_records

        name = "standard input" if arguments.prompts == "-" else arguments.prompts
        records += read_records(_read_text("--prompts", arguments.prompts), name)
    if not records:
        raise ValueError("give a text to continue with --prompt, --prompt-file or --prompts")
    same = arguments.output is not None and Path(arguments.output).exists()
    if same and arguments.prompts not in (None, "-") and Path(arguments.output).samefile(arguments.prompts):
        raise ValueError("--output must be another file than --prompts")
    return records


def _print_texts(
    arguments: argparse.Namespace, model: Any, records: list[Any], prompts: list[list[int]], **options: Any
) -> int:
    """Every prompt with what follows it, or only the answer to a message."""
    from delta_jax.inference import complete, stream

    tokenizer = options["tokenizer"]
    begins = ["" if arguments.chat else tokenizer.decode(prompt) for prompt in prompts]
    if len(prompts) == arguments.samples == 1:
        pieces = stream(model, prompts, **options)
        print(begins[0], end="", flush=True)
        for (piece,) in pieces:
            print(piece.text, end="", flush=True)
        print()
        return 0
    found = complete(model, prompts, batch_size=arguments.batch_size, samples=arguments.samples, **options)
    for number, (begin, completions) in enumerate(zip(begins, found, strict=True), 1):
        for sample, completion in enumerate(completions, 1):
            print(f"--- {number}.{sample} ---" if arguments.samples > 1 else f"--- {number} ---")
            print(begin + completion.text, flush=True)
    return 0


def _write_records(
    arguments: argparse.Namespace,
    model: Any,
    records: list[Any],
    prompts: list[list[int]],
    options: dict[str, Any],
    more: dict[str, Any],
) -> int:
    """JSON lines, to a file that an interrupted run goes on from, or to standard output."""
    from delta_jax.inference import complete
    from delta_jax.inference.prefix import model_fingerprint
    from delta_jax.inference.records import Results, line_of

    sizes = {"batch_size": arguments.batch_size, "samples": arguments.samples}
    if arguments.output is None:
        for record, completions in zip(records, complete(model, prompts, **sizes, **options, **more), strict=True):
            print(line_of(record, completions), end="", flush=True)
        return 0
    prefix = None if arguments.prefix is None else hashlib.sha256(Path(arguments.prefix).read_bytes()).hexdigest()
    decides = {**options, "samples": arguments.samples, "seed": arguments.seed, "prefix": prefix}
    results = Results(arguments.output, records, prompts, {**decides, "model": model_fingerprint(model)})
    found = complete(model, prompts, first=results.done, **sizes, **options, **more)
    with results:
        for completions in found:
            results.write(completions)
    return 0


def _read_text(option: str, name: str) -> str:
    source = "standard input" if name == "-" else f"the file {name!r}"
    try:
        return (sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()).decode()
    except OSError as error:
        raise ValueError(f"{option}: {source} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{option}: {source} is not text in UTF-8") from error


_OF_TASKS = {
    **dict.fromkeys(
        ("include_path", "limit", "max_length", "num_fewshot", "add_bos_token", "shared_prefixes", "output")
    ),
    "apply_chat_template": False,
}
_OF_CORPORA = ("data", "split", "format", "text_field", "records", "validation_fraction", "sequence_length")


def _evaluate(arguments: argparse.Namespace) -> int:
    given = [name for name, default in _OF_TASKS.items() if getattr(arguments, name) != default]
    if arguments.tasks is None and given:
        raise ValueError(f"{_flags(given)} belong to tasks: give --tasks as well")
    return _evaluate_corpus(arguments) if arguments.tasks is None else _evaluate_tasks(arguments)


def _flags(names: Sequence[str]) -> str:
    return ", ".join("--" + name.replace("_", "-") for name in names)


def _evaluate_tasks(arguments: argparse.Namespace) -> int:
    """Tasks of lm-evaluation-harness: a table, and JSON if wanted."""
    given = [name for name in _OF_CORPORA if getattr(arguments, name) is not None]
    if given:
        raise ValueError(f"{_flags(given)} describe a corpus, and --tasks has its own")
    from delta_jax.evaluation.harness import evaluate_tasks, load_lm, results_json, results_table

    output = None if arguments.output is None else Path(arguments.output)
    if output is not None and not output.parent.is_dir():
        raise ValueError(f"--output: there is no folder {str(output.parent)!r}")
    options = {
        "step": arguments.step,
        "ema": arguments.ema,
        "batch_size": 8 if arguments.batch_size is None else arguments.batch_size,
        "max_length": arguments.max_length,
        "add_bos_token": arguments.add_bos_token,
        "shared_prefixes": arguments.shared_prefixes is not False,
    }
    results = evaluate_tasks(
        lambda: load_lm(arguments.folder, **options),
        [name for name in arguments.tasks.split(",") if name],
        include_path=arguments.include_path,
        num_fewshot=arguments.num_fewshot,
        limit=arguments.limit,
        apply_chat_template=arguments.apply_chat_template,
    )
    print(results_table(results), end="")
    if output is not None:
        output.write_text(results_json(results), encoding="utf-8")
    return 0


def _evaluate_corpus(arguments: argparse.Namespace) -> int:
    from delta_jax.data import bigram_bits_per_byte, validation_batches
    from delta_jax.evaluation import evaluate
    from delta_jax.training import restore_model

    fraction = arguments.validation_fraction
    if arguments.data is None and (
        arguments.format or arguments.text_field or arguments.records or fraction is not None
    ):
        raise ValueError(
            "--format, --text-field, --records and --validation-fraction describe another corpus: give --data as well."
        )
    config, model = restore_model(arguments.folder, arguments.step, ema=arguments.ema)
    data = config.data
    part: Any = arguments.split or ("validation" if arguments.data is None else "all")
    if arguments.data is not None:
        data = dataclasses.replace(data, path=arguments.data, format=arguments.format or "auto")
        data = dataclasses.replace(data, text_field=arguments.text_field or data.text_field)
        data = dataclasses.replace(data, records=arguments.records or data.records)
        data = dataclasses.replace(data, validation_fraction=data.validation_fraction if fraction is None else fraction)
    batches = validation_batches(
        data,
        batch_size=config.batch_size if arguments.batch_size is None else arguments.batch_size,
        sequence_length=config.sequence_length if arguments.sequence_length is None else arguments.sequence_length,
        part="training" if part == "train" else part,
    )
    result = evaluate(model, batches)
    which = {"validation": "the documents held out", "train": "the documents trained on", "all": "all documents"}
    rows = [
        ("corpus", f"{data.path}, {which[part]}"),
        ("loss", f"{result.loss:.4f} nats per token"),
        ("bits per byte", f"{result.bits_per_byte:.4f}"),
        ("perplexity", f"{result.perplexity:.3f} per token"),
        ("tokens", f"{result.tokens:,}"),
        ("bytes", f"{result.bytes:,}"),
    ]
    if part == "validation" and data.records == "text":  # the bigram counts the other documents
        rows.insert(4, ("byte bigram", f"{bigram_bits_per_byte(data):.4f} bits per byte, for comparison"))
    _print_rows(rows)
    return 0


def _import(arguments: argparse.Namespace) -> int:
    from delta_jax.interop.checkpoint import abstract_leaves
    from delta_jax.training import import_run

    found = import_run(arguments.source, arguments.output, dtype=arguments.dtype, ignore_keys=arguments.ignore_key)
    number = sum(leaf.size for leaf in abstract_leaves(found.model).values())
    rows = [("model", f"{found.table['model_type']}, {number:,} parameters"), ("run", arguments.output)]
    if found.aside:
        what = f"{_count(len(found.aside), 'tensor')} that the text model does not use, such as {found.aside[0]}"
        rows.append(("set aside", what))
    _print_rows(rows)
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from delta_jax.training import export_run

    kind = export_run(
        arguments.folder,
        arguments.output,
        format=arguments.format,
        step=arguments.step,
        dtype=arguments.dtype,
        ema=arguments.ema,
    )
    _print_rows([("model", kind), ("folder", arguments.output)])
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    import jax

    from delta_jax.parallel import Chip, chip_or_gpu_of

    # The compiler is enough: take no chip from whoever trains here.
    jax.config.update("jax_platforms", jax.config.jax_platforms or "cpu")

    chip = chip_or_gpu_of(arguments.topology)
    kind, one = ("TPU", "chip") if isinstance(chip, Chip) else ("GPU", "GPU")
    if kind == "GPU":
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # XLA is at pains to say that there is no GPU
    config = _config(arguments)
    if arguments.suggest:
        return _suggest(config, arguments.topology, _bytes(chip.hbm_gib * 2**30) if isinstance(chip, Chip) else "")
    from delta_jax.training.plan import plan

    doing = f"compiling the step for {arguments.topology}, which can take minutes; no {kind} is used"
    result = plan(config, arguments.topology, meanwhile=lambda: _sign_of_life(doing))
    chips = _count(result.chips, one) if result.devices == result.chips else f"{result.chips} x 2 devices"
    rows = [
        ("topology", f"{result.topology}, {chips} ({result.device_kind}); figures are those of one {one}"),
        ("mesh", ", ".join(f"{axis}={size}" for axis, size in result.mesh.items())),
        (
            "batch",
            f"{_count(config.batch_size, 'sequence')} of {config.sequence_length:,} tokens in "
            f"{_count(config.gradient_accumulation, 'micro-batch')}",
        ),
        ("parameters", f"{result.parameters:,}"),
        ("kernels", ", ".join(result.kernels) or "made by XLA"),
        ("products", f"{_scaled(result.flops, 'FLOP')} a step"),
    ]
    memory, estimate = result.memory, result.estimate
    speeds = ", ".join(f"{_scaled(speed, 'B/s')} {name}" for name, speed in result.links.items())
    if memory is not None:
        sizes = dataclasses.asdict(memory)
        if kind == "GPU":
            del sizes["program"]  # which XLA does not say
        rows += [(name, _bytes(size)) for name, size in sizes.items()]
        rows.append(("memory traffic", f"{_bytes(result.traffic)} a step"))
        for exchanged in result.exchanges:
            kinds = ", ".join(f"{kind} {_bytes(size)}" for kind, size in exchanged.received.items())
            over = " x ".join(exchanged.axes)
            rows.append((f"over {over}", f"{kinds} received a step, at least {_seconds(exchanged.seconds)}"))
        bound = f"a lower bound: what is received, at the published peak of links, {speeds}"
        rows.append(("collectives", bound if result.exchanges else "none"))
    if result.bound is not None:
        told = f"a bound, no estimate: products at {_scaled(chip.flops, 'FLOP/s')}, arguments and results once, collectives"
        rows.append(("step time", f"at least {_seconds(result.bound)}, {told}"))
    if estimate is not None and isinstance(chip, Chip):
        checked = (
            "as published times of others have it" if estimate.calibrated else "a guess: nobody has checked this chip"
        )
        parts = {"products": estimate.products, "kernels": estimate.kernels, "elementwise and copies": estimate.others}
        parts["collectives"] = estimate.collectives
        shortest, longest = (f"{ratio:.2f}" for ratio in estimate.spread)
        rows += [
            ("step time", f"{_seconds(estimate.least)} to {_seconds(estimate.most)}, an estimate: no TPU has run this"),
            ("tokens/s", f"{estimate.tokens / estimate.most:,.0f} to {estimate.tokens / estimate.least:,.0f} in all"),
            ("MFU", f"{estimate.useful / estimate.most:.0%} to {estimate.useful / estimate.least:.0%}"),
            ("made of", ", ".join(f"{name} {_seconds(seconds)}" for name, seconds in parts.items())),
            (
                "assuming",
                f"the compiler's own schedules, {shortest} to {longest} of what they say ({checked}); links at "
                f"{speeds}, which collectives fill beside the rest or before it; MFU is of "
                f"{_scaled(chip.flops, 'FLOP/s')} (bfloat16), without what is computed again",
            ),
        ]
        missing = [f"kernel {name}" for name in estimate.unread]
        missing += [f"{number} {opcode}" for opcode, number in estimate.unestimated.items()]
        rows += [("not counted", ", ".join(missing))] if missing else []
    rows.append(("compiled in", f"{result.seconds:.0f} s"))
    _print_rows(rows)
    if memory is None:
        print(f"does not fit: the compiler says: {result.refusal}")
    else:
        fits = "fits" if result.fits else "does not fit"
        print(f"{fits}: {_bytes(memory.total)} of the {_bytes(result.hbm)} of a {one}")
    return 0 if result.fits else 1


def _suggest(config: Any, topology: str, memory: str) -> int:
    from delta_jax.training.suggest import Trial, suggest

    def named(mesh: Mapping[str, int]) -> str:
        return ", ".join(f"{axis}={size}" for axis, size in mesh.items())

    def told(trial: Trial) -> str:
        planned = trial.plan
        if planned is None or planned.memory is None:
            return trial.refusal
        used = f"{_bytes(planned.memory.total)} of {memory}"
        if not planned.fits or planned.estimate is None:
            return f"does not fit: {used}"
        estimate = planned.estimate
        times = f"{_seconds(estimate.least)} to {_seconds(estimate.most)} a step"
        return f"{times}, of which collectives at least {_seconds(estimate.collectives)}; {used}"

    trials = suggest(
        config,
        topology,
        meanwhile=lambda mesh: _sign_of_life(f"compiling the step for {topology}, {named(mesh)}"),
        tried=lambda trial: print(f"{named(trial.mesh)}: {told(trial)}", file=sys.stderr, flush=True),
    )
    _print_rows([(named(trial.mesh), told(trial)) for trial in trials])
    best = trials[0]
    if best.rank[0]:
        print("none of these meshes fits")
        return 1
    print("best: " + " ".join(f"mesh.{axis}={size}" for axis, size in best.mesh.items()))
    return 0


@contextmanager
def _sign_of_life(text: str) -> Iterator[None]:
    """Says on stderr what is going on and, every few seconds, for how long already."""
    start, done, inside = time.monotonic(), threading.Event(), sys.stderr.isatty()

    def tick() -> None:
        while not done.wait(1 if inside else 15):
            elapsed = f"{time.monotonic() - start:.0f} s"
            print(
                f"\r{text}: {elapsed}" if inside else elapsed, end="" if inside else "\n", file=sys.stderr, flush=True
            )

    print(text, end="" if inside else "\n", file=sys.stderr, flush=True)
    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        if inside:
            print(file=sys.stderr)


def _scaled(number: float, unit: str) -> str:
    sizes = ((f"P{unit}", 1e15), (f"T{unit}", 1e12), (f"G{unit}", 1e9), (f"M{unit}", 1e6), (unit, 1.0))
    return _in_units(number, *sizes)


def _seconds(seconds: float) -> str:
    return _in_units(seconds, ("s", 1.0), ("ms", 1e-3), ("us", 1e-6))


def _count(number: int, thing: str) -> str:
    plural = "es" if thing.endswith("ch") else "s"
    return f"{number:,} {thing}{'' if number == 1 else plural}"


def _bytes(size: int | float) -> str:
    return _in_units(size, ("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("bytes", 1))


def _in_units(number: int | float, *units: tuple[str, int | float]) -> str:
    """The number in the largest unit of which there is one, or in the last."""
    unit, size = next((pair for pair in units if number >= pair[1]), units[-1])
    return f"{number / size:.4g} {unit}"


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
