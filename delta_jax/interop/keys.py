"""The keys of a published model's config.json: every one is read, known to change nothing, or refused by name."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from delta_jax.config import convert
from delta_jax.layers import RopeScaling

__all__ = ["Keys", "rope_keys", "rope_options"]

# What no model's function depends on: how it was trained, saved or is served, what its token ids mean.
HARMLESS = frozenset(
    [
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "attn_implementation",
        "auto_map",
        "bos_token_id",
        "cls_token_id",
        "dtype",
        "embd_pdrop",
        "eos_token_id",
        "fp32_logits",
        "gradient_checkpointing",
        "hidden_dropout_prob",
        "id2label",
        "initializer_range",
        "initializer_std",
        "is_decoder",
        "is_encoder_decoder",
        "label2id",
        "max_length",
        "max_position_embeddings",
        "max_seq_len",
        "model_max_length",
        "model_type",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "pretraining_tp",
        "problem_type",
        "return_dict",
        "router_aux_loss_coef",
        "sep_token_id",
        "tokenizer_class",
        "torch_dtype",
        "transformers_version",
        "unk_token_id",
        "unsloth_version",
        "unsloth_fixed",
        "use_cache",
    ]
)
REQUIRED = object()
MOST_LAYERS = 10_000  # no model has as many; a damaged number must not fill the memory
SCALINGS = {
    "linear": (),
    "llama3": ("low_freq_factor", "high_freq_factor"),
    "yarn": ("beta_fast", "beta_slow", "attention_factor"),
}


class Keys:
    """The table of a config.json, and which of its keys were read.

    Args:
        table: the keys and their values.
        where: how messages call the table.
    """

    def __init__(self, table: Mapping[str, Any], where: str = "config.json"):
        self._table, self._where, self._read = table, where, set[str]()

    def __contains__(self, name: str) -> bool:
        return name in self._table

    def get(self, kind: Any, *names: str, default: Any = REQUIRED) -> Any:
        """The value of the first of several names of a key that is there and not null, as a type.

        Raises:
            ValueError: it is of another type, or missing without a default.
        """
        self._read |= set(names)
        for name in names:
            if self._table.get(name) is not None:
                return convert(kind, self._table[name], f"{self._where}: {name}")
        if kind is bool and default is True and any(name in self._table for name in names):
            # Code in which null is false would not take the default.
            raise self.refuse(next(name for name in names if name in self._table), "wanted true or false")
        if default is REQUIRED:
            raise ValueError(f"{self._where} lacks the key {names[0]}")
        return default

    def layers(self, default: int) -> int:
        """`num_hidden_layers`.

        Raises:
            ValueError: it is no integer, or not one that a model can have.
        """
        number: int = self.get(int, "num_hidden_layers", default=default)
        if not 0 < number <= MOST_LAYERS:
            raise self.refuse("num_hidden_layers", f"wanted an integer from 1 to {MOST_LAYERS:,}")
        return number

    def demand(self, name: str, *allowed: Any, default: Any = None) -> None:
        """Reads a key that may have certain values only; a missing one has the default.

        Raises:
            ValueError: it has another one.
        """
        self._read.add(name)
        value = self._table.get(name, default)
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed):
            wanted = " or ".join(repr(one) for one in allowed)
            raise self.refuse(name, f"which this library does not have, only {wanted}")

    def refuse(self, name: str, reason: str) -> ValueError:
        """The error that names a key; names and values are shown in one line, and not at any length."""
        value = repr(self._table.get(name))
        shown = value if len(value) <= 100 else f"{value[:100]}..."
        return ValueError(f"{self._where}: {name if name.isprintable() else ascii(name)} is {shown}, {reason}")

    def inner(self, name: str) -> "Keys":
        """A table inside; an empty one where there is none.

        Raises:
            ValueError: it is no table.
        """
        self._read.add(name)
        table = self._table.get(name)
        if table is not None and not isinstance(table, Mapping):
            raise self.refuse(name, "wanted a table")
        return Keys(table or {}, f"{self._where}: {name}")

    def plain(self, name: str) -> Any:
        """The value as it is, None where it is missing."""
        self._read.add(name)
        return self._table.get(name)

    def finish(self, harmless: Iterable[str] = ()) -> None:
        """Refuses the keys that nobody has read; null says that something is left out.

        Args:
            harmless: keys that change nothing in this architecture.

        Raises:
            ValueError: there is such a key.
        """
        known = self._read | HARMLESS | set(harmless)
        left = [name for name, value in self._table.items() if name not in known and value is not None]
        if left:
            raise self.refuse(
                left[0],
                "a key that is not known here and may change what the model computes; name it in ignore_keys if it does not",
            )


def layer_kinds(keys: Keys, number: int, default: Sequence[str], kinds: Sequence[str]) -> tuple[str, ...]:
    """`layer_types`, which has a kind for each layer.

    Raises:
        ValueError: it has another length, or a kind that the architecture does not have.
    """
    found = keys.get(tuple[str, ...], "layer_types", default=tuple(default))
    if len(found) != number:
        raise keys.refuse("layer_types", f"of {len(found)} layers, but num_hidden_layers is {number}")
    for kind in found:
        if kind not in kinds:
            raise keys.refuse("layer_types", f"but the layers are {' or '.join(kinds)}")
    return found


def rope_options(keys: Keys, *, theta: float, fraction: float | None = None, kind: str | None = None) -> dict[str, Any]:
    """The options of an attention layer that say what its rotary embedding is, from new and old spellings of the keys.

    Args:
        keys: of the model.
        theta, fraction: what the architecture has where the keys are missing; a fraction of None says that its classes
            always turn all channels, whatever the keys say.
        kind: the kind of layer, where the architecture has a table for each.

    Raises:
        ValueError: a kind of embedding that this library does not have, or a share of the channels where there is none.
    """
    old = keys.inner("rope_scaling")
    table = keys.inner("rope_parameters")
    if kind is not None and isinstance(keys.plain("rope_parameters"), Mapping) and kind in table:
        table = table.inner(kind)
    found_theta = keys.get(float, "rope_theta", default=theta)
    found_fraction = keys.get(
        float, "partial_rotary_factor", "rotary_pct", default=1.0 if fraction is None else fraction
    )
    options: dict[str, Any] = {"rope_theta": table.get(float, "rope_theta", default=found_theta)}
    share = table.get(float, "partial_rotary_factor", default=found_fraction)
    if share != 1.0 and fraction is None:
        name = "partial_rotary_factor" if found_fraction == 1.0 or "rotary_pct" not in keys else "rotary_pct"
        where = table if name in table else keys
        raise where.refuse(name, "but the classes of this architecture turn all channels")
    if share != 1.0:
        options["rope_fraction"] = share
    for scaling in (table, old):
        if (found := _scaling(scaling, keys)) is not None:
            options["rope_scaling"] = found
    return options


def _scaling(table: Keys, keys: Keys) -> RopeScaling | None:
    kind = table.get(str, "rope_type", "type", default="default")
    known = ("mrope_section", "mrope_interleaved", "rope_theta", "partial_rotary_factor")
    if kind in ("default", "mrope"):
        table.finish(known)
        return None
    if kind not in SCALINGS:
        raise table.refuse("rope_type", f"which this library does not have, only default, {', '.join(SCALINGS)}")
    options: dict[str, Any] = {"factor": table.get(float, "factor")}
    if kind != "linear":
        length = table.get(int, "original_max_position_embeddings", default=None)
        if length is None:
            length = keys.get(int, "max_position_embeddings")
        options["original_max_position_embeddings"] = length
    for name in SCALINGS[kind]:
        if (value := table.get(float, name, default=None)) is not None:
            options[name] = value
    scaling = RopeScaling(kind=kind, **options)
    table.finish(known)
    return scaling


def rope_keys(options: Mapping[str, Any], *, fraction: bool = False) -> dict[str, Any]:
    """`rope_parameters` of an attention layer's options."""
    table: dict[str, Any] = {"rope_type": "default", "rope_theta": options.get("rope_theta", 10000.0)}
    if fraction:
        table["partial_rotary_factor"] = options.get("rope_fraction", 1.0)
    if (scaling := options.get("rope_scaling")) is not None:
        table["rope_type"] = scaling.kind
        names = ("factor", "original_max_position_embeddings", *SCALINGS[scaling.kind])
        given = {name: getattr(scaling, name) for name in names}
        table |= {name: value for name, value in given.items() if value is not None}
    return table
