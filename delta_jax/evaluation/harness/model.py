"""A model of this library as lm-evaluation-harness calls one; importing this file imports lm_eval."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from delta_jax.data import JsonTokenizer, Tokenizer, load_chat_template, load_tokenizer
from delta_jax.evaluation.harness.conventions import Conventions, conventions
from delta_jax.evaluation.scoring import Score, score
from delta_jax.inference import complete
from delta_jax.inference.prompts import Writer
from delta_jax.layers.checks import require_positive_integers
from delta_jax.models import LanguageModel
from delta_jax.training import restore_model

__all__ = ["DeltaJaxLM"]

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_LENGTH = 2048  # of a model that no run tells it


class DeltaJaxLM(TemplateLM):
    """See `delta_jax.evaluation.harness.load_lm`, which makes one and says what the arguments are."""

    def __init__(
        self,
        run: str | Path | None = None,
        *,
        model: LanguageModel | None = None,
        tokenizer: Tokenizer | None = None,
        step: int | None = None,
        ema: bool = False,
        batch_size: int | str = 8,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        shared_prefixes: bool = True,
        seed: int = 0,
        max_batch_size: int | None = None,  # this and the next are what the harness tells every model
        device: str | None = None,  # "cuda:0" if nobody says otherwise; JAX decides
    ):
        super().__init__()
        self._folder: Path | None = None
        if run is not None:
            if model is not None or tokenizer is not None:
                raise ValueError("give a run, or a model and its tokenizer, not both")
            self._folder = Path(str(run))
            config, model = restore_model(self._folder, step, ema=ema)
            name, length = config.data.tokenizer, config.sequence_length
            tokenizer = load_tokenizer(name)
            found = conventions(tokenizer, name)
        elif model is None or tokenizer is None:
            raise ValueError("give a run, the output folder of a training run, or a model and its tokenizer")
        else:
            name, length = type(tokenizer).__name__, _LENGTH
            found = Conventions(tokenizer.document_id, tokenizer.document_id, True)
        self.model, self._tokenizer, self._name, self._run = model, tokenizer, name, run
        self._conventions = Conventions(
            found.prefix_id if prefix_token_id is None else prefix_token_id,
            found.eos_id,
            found.begins if add_bos_token is None else bool(add_bos_token),
        )
        if not 0 <= self._conventions.prefix_id < model.config.vocab_size:
            raise ValueError(f"prefix_token_id must lie in [0, {model.config.vocab_size}), got {prefix_token_id}")
        if isinstance(batch_size, str):
            if not batch_size.isdecimal():
                raise ValueError(f"batch_size must be a positive integer, got {batch_size!r}")
            batch_size = int(batch_size)
        self._max_length = length if max_length is None else max_length
        require_positive_integers(batch_size=batch_size, max_length=self._max_length)
        self.batch_size, self._shared, self._seed = batch_size, bool(shared_prefixes), seed
        self._template: Any = None

    @property
    def eot_token_id(self) -> int:
        return self._conventions.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self._conventions.prefix_id

    @property
    def max_length(self) -> int:
        return self._max_length

    @property
    def max_gen_toks(self) -> int:
        return 256

    @property
    def tokenizer_name(self) -> str:
        return str(self._name).replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """What the results say of the model."""
        return {
            "run": None if self._run is None else str(self._run),
            "max_length": self.max_length,
            "prefix_token_id": self.prefix_token_id,
            "add_bos_token": self._conventions.begins,
            "shared_prefixes": self._shared,
        }

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids, with the prefix before them where contexts have it, unless `add_special_tokens` is False.

        What reads like a special token is one, as in the harness's own models.
        """
        tokenizer = self._tokenizer
        ids = tokenizer.encode_special(string)[0] if isinstance(tokenizer, JsonTokenizer) else tokenizer.encode(string)
        tokens: list[int] = ids.tolist()
        if self._conventions.begins and add_special_tokens is not False and tokens[:1] != [self.prefix_token_id]:
            return [self.prefix_token_id, *tokens]
        return tokens

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        # The harness asks for the first token of a text that follows nothing.
        some = [request for request in requests if request.args != ("", "")]
        found = iter(super().loglikelihood(some, disable_tqdm=disable_tqdm))
        return [(0.0, True) if request.args == ("", "") else next(found) for request in requests]

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        pairs = [(context or [self.prefix_token_id], continuation) for _, context, continuation in requests]
        return [(one.log_probability, one.greedy) for one in self._scores(pairs, disable_tqdm)]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        windows, owners = [], []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1):
                windows.append(make_disjoint_window(window))
                owners.append(number)
        sums = [0.0] * len(requests)
        for number, one in zip(owners, self._scores(windows, disable_tqdm), strict=True):
            sums[number] += one.log_probability
        return sums

    def _scores(self, pairs: list[tuple[list[int], list[int]]], disable_tqdm: bool) -> list[Score]:
        with tqdm(total=len(pairs), disable=disable_tqdm, desc="Scoring") as bar:
            return score(
                self.model,
                pairs,
                max_length=self.max_length,
                batch_size=self.batch_size,
                shared_prefixes=self._shared,
                progress=bar.update,
            )

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        texts = [""] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Generating") as bar:
            for told, numbers in alike.items():
                options, most = self._options(json.loads(told))
                prompts = [
                    (self.tok_encode(requests[number].args[0]) or [self.prefix_token_id])[-most:] for number in numbers
                ]
                streams = [number % 2**31 for number in numbers]
                found = complete(self.model, prompts, batch_size=self.batch_size, streams=streams, **options)
                for number, (completion,) in zip(numbers, found, strict=True):
                    texts[number] = completion.text
                    bar.update()
        return texts

    def _options(self, told: dict[str, Any]) -> tuple[dict[str, Any], int]:
        """How to continue prompts, and how many of their tokens there is room for."""
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(told, self.max_gen_toks))
        until, new = [text for text in kwargs.pop("until") if text], kwargs.pop("max_gen_toks")
        draws = kwargs.pop("do_sample") and kwargs.get("temperature", 1.0) > 0
        beams = kwargs.pop("num_beams", 1)
        unknown = sorted(kwargs.keys() - set(_SAMPLING)) or (["num_beams"] if beams != 1 else [])
        if unknown:
            raise ValueError(
                f"generation_kwargs: {', '.join(unknown)} cannot be had of this model, which knows until, max_gen_toks, "
                f"do_sample, {', '.join(_SAMPLING)}"
            )
        if new >= self.max_length:
            raise ValueError(
                f"max_gen_toks, {new}, leaves no room for a prompt: give a max_length above the {self.max_length} there are"
            )
        sampling = {name: kwargs[name] for name in _SAMPLING if name in kwargs} if draws else {}
        if draws:
            sampling.setdefault("temperature", 1.0)
        elif "repetition_penalty" in kwargs:
            sampling["repetition_penalty"] = kwargs["repetition_penalty"]
        ids = {self.eot_token_id, self._tokenizer.document_id}
        if self._folder is not None:
            ids.update(Writer(self._folder, self._tokenizer).stops()[0])
        if isinstance(self._tokenizer, JsonTokenizer):
            # A special token has no text in which it could be looked for.
            written = [self._tokenizer.encode_special(text)[0].tolist() for text in until]
            ids.update(tokens[0] for tokens in written if len(tokens) == 1 and not self._tokenizer.decode(tokens))
        stops = {"stop_id": sorted(ids), "stop": until or None, "tokenizer": self._tokenizer}
        key = {"key": jax.random.key(self._seed)} if draws else {}
        return {"max_new_tokens": new, **sampling, **stops, **key}, self.max_length - new

    def chat_template(self, chat_template: bool | str = False) -> str:
        return str(self._chat().source) if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        text = str(self._chat().render(chat_history, add_generation_prompt=add_generation_prompt))
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()  # the text goes on right after it
        return text[: text.rindex(last) + len(last)] if last in text else text

    def _chat(self) -> Any:
        self._template = self._template or (None if self._folder is None else load_chat_template(self._folder))
        if self._template is None:
            raise ValueError(
                f"a chat template is needed: {self._folder or 'the model'} has neither chat_template.jinja nor one in "
                "tokenizer_config.json"
            )
        if not isinstance(self._tokenizer, JsonTokenizer):
            raise ValueError("a chat template needs the special tokens of a tokenizer.json, and this model's are bytes")
        return self._template
