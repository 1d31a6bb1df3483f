"""lm-evaluation-harness on a model of this library; `python -m delta_jax.evaluation.harness` is its command line with it.

Nothing here imports lm_eval before it is used: `pip install "delta_jax[eval]"`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

__all__ = ["evaluate_tasks", "load_lm", "register", "results_json", "results_table"]

NAME = "delta_jax"


def load_lm(run: str | Path | None = None, **options: Any) -> Any:
    """A model as lm-evaluation-harness calls one, for `simple_evaluate(model=...)` or `evaluate_tasks`.

    Args:
        run: the output folder of a training run, or of an import.
        **options: any of
            model, tokenizer: a `LanguageModel` and its tokenizer, in place of a run;
            step: the checkpoint of that step, default the newest;
            ema: whether the weights are their moving average;
            batch_size: contexts, continuations and prompts at a time, default 8;
            max_length: tokens that the model reads at most, of longer texts the last ones; default the run's
            sequence_length, without a run 2048;
            add_bos_token: whether contexts begin with the prefix token; default as `docs/how_to/evaluate.md` says;
            prefix_token_id: the token before a text that follows nothing, likewise;
            shared_prefixes: whether contexts are read once, default True; see `delta_jax.evaluation.score`;
            seed: of what is drawn where a task asks for samples, default 0.

    Returns:
        An `lm_eval.api.model.TemplateLM`.

    Raises:
        ModuleNotFoundError: lm_eval is not installed.
        ValueError: there is no such run, or an option is impossible.

    Examples:
        >>> mixer = MixerSpec(mixer="delta_net", options=(("num_heads", 2),))
        >>> config = ModelConfig(vocab_size=257, hidden_size=8, num_layers=1, pattern=(mixer,), intermediate_size=0)
        >>> model = LanguageModel(config, rngs=nnx.Rngs(0))
        >>> lm = load_lm(model=model, tokenizer=ByteTokenizer(), max_length=64)
        >>> lm.tok_encode("ab"), lm.prefix_token_id  # a document begins with the document id
        ([256, 97, 98], 256)
    """
    _require()
    from delta_jax.evaluation.harness.model import DeltaJaxLM

    return DeltaJaxLM(run, **options)


def evaluate_tasks(
    lm: Any,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    apply_chat_template: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Evaluates a model on tasks of lm-evaluation-harness.

    Args:
        lm: from `load_lm`, or a function without arguments that makes one, which is called once the tasks are known.
        tasks: names of tasks or groups of them, patterns such as "mmlu_*", or paths of YAML files.
        include_path: a folder of more tasks.
        num_fewshot: examples before each document; default what a task says.
        limit: how many documents of each task, default all.
        apply_chat_template: whether prompts are written as messages of a user.
        **options: further ones of `lm_eval.simple_evaluate`, such as bootstrap_iters.

    Returns:
        What `lm_eval.simple_evaluate` does: "results" has for each task its measures, as in "acc,none".

    Raises:
        ModuleNotFoundError: lm_eval is not installed.
        ValueError: a task is unknown or cannot be loaded, or the model has no chat template.

    Examples:
        >>> evaluate_tasks(lambda: load_lm("run"), ["mine"], include_path="nowhere")
        Traceback (most recent call last):
        ValueError: include_path: there is no folder 'nowhere'
    """
    _require()
    from delta_jax.evaluation.harness.tasks import find_tasks, run_tasks

    for name, number, least in (("limit", limit, 1), ("num_fewshot", num_fewshot, 0)):
        if number is not None and number < least:
            raise ValueError(f"{name} must be at least {least}, got {number}")
    names, manager = find_tasks(tasks, include_path)
    more = {"num_fewshot": num_fewshot, "limit": limit, "apply_chat_template": apply_chat_template}
    return run_tasks(lm() if callable(lm) else lm, names, manager, **more, **options)


def results_table(results: dict[str, Any]) -> str:
    """The results of `evaluate_tasks` as a table in Markdown.

    Examples:
        >>> print(results_table({"results": {"mine": {"acc,none": 0.75, "acc_stderr,none": 0.25}}}), end="")
        | Tasks | Version | Filter | n-shot | Metric | Value  | Stderr |
        |-------|---------|--------|--------|--------|--------|--------|
        | mine  |         | none   |        | acc    | 0.7500 | 0.2500 |
    """
    from delta_jax.evaluation.harness.tasks import table

    return "\n".join(table(results, column) for column in ("results", "groups") if results.get(column))


def results_json(results: dict[str, Any]) -> str:
    """The results of `evaluate_tasks` as JSON.

    Examples:
        >>> import json
        >>> json.loads(results_json({"results": {"mine": {"acc,none": np.float64(0.75)}}}))["results"]["mine"]
        {'acc,none': 0.75}
    """
    from lm_eval.utils import handle_non_serializable

    return json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False) + "\n"


def register() -> None:
    """Makes the model known to lm-evaluation-harness by the name "delta_jax", as for `simple_evaluate(model="delta_jax")`.

    Raises:
        ModuleNotFoundError: lm_eval is not installed.

    Examples:
        >>> register()
        >>> from lm_eval.api.registry import get_model
        >>> get_model("delta_jax").__name__
        'DeltaJaxLM'
    """
    _require()
    import lm_eval.models  # noqa: F401  # all others first: a registry that is not empty is not filled any more
    from lm_eval.api.registry import model_registry

    if NAME not in model_registry:
        model_registry.register(NAME, target="delta_jax.evaluation.harness.model:DeltaJaxLM")


def main() -> None:
    """The command line of lm-evaluation-harness, for which `--model delta_jax --model_args run=FOLDER` is this model."""
    register()
    import lm_eval.utils
    from lm_eval.__main__ import cli_evaluate

    from delta_jax.evaluation.harness.tasks import table

    lm_eval.utils.make_table = table
    cli_evaluate()


def _require() -> None:
    if find_spec("lm_eval") is None:
        raise ModuleNotFoundError(
            "this needs lm_eval, which is not installed: pip install 'delta_jax[eval]'", name="lm_eval"
        )
