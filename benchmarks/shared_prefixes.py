"""`python -m benchmarks.shared_prefixes`: what it spares to read the contexts that requests share once.

Documents with four choices each, after contexts of their own, and after contexts that begin with the same examples; both
are scored by `delta_jax.evaluation.score` with and without shared prefixes. The two take turns in one process, after a round
that compiles; the ratio is the median over rounds. Times are those of the processor, in seconds, which others on the machine
change little, so a CPU is to be used. The model has random weights, which do not matter for the time.
"""

import argparse
import time
from statistics import median

import numpy as np
from flax import nnx

from benchmarks.options import number
from delta_jax.evaluation import score
from delta_jax.models import LanguageModel, MixerSpec, ModelConfig

VOCABULARY, CHOICES, ANSWER, QUESTION = 1024, 4, 8, 64


def requests(documents: int, context: int, shared: int) -> list[tuple[list[int], list[int]]]:
    """Every document's context, of which the first tokens are those of all, with each of its choices."""
    generator = np.random.default_rng(0)
    beginning = generator.integers(0, VOCABULARY, shared)
    found = []
    for _ in range(documents):
        own = generator.integers(0, VOCABULARY, context - shared - generator.integers(0, QUESTION // 2))
        for _ in range(CHOICES):
            answer = generator.integers(0, VOCABULARY, generator.integers(1, ANSWER, endpoint=True))
            found.append(([*beginning.tolist(), *own.tolist()], answer.tolist()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=number, default=16, help="default %(default)s")
    parser.add_argument("--context", type=number, default=1024, help="tokens of a context; default %(default)s")
    parser.add_argument("--batch-size", type=number, default=8, help="default %(default)s")
    parser.add_argument("--rounds", type=number, default=3, help="default %(default)s")
    arguments = parser.parse_args()
    pattern = tuple(MixerSpec(mixer=name, options=(("num_heads", 4),)) for name in ("gated_delta_net", "attention"))
    config = ModelConfig(
        vocab_size=VOCABULARY, hidden_size=256, num_layers=4, pattern=(pattern[0],) * 3 + pattern[1:], dtype="float32"
    )
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    for name, shared in (("contexts of their own", 0), ("the same examples first", arguments.context - QUESTION)):
        some = requests(arguments.documents, arguments.context, shared)
        taken: dict[bool, list[float]] = {True: [], False: []}
        scores = {}
        for _ in range(arguments.rounds + 1):
            for way, times in taken.items():
                start = time.process_time()
                found = score(
                    model,
                    some,
                    max_length=2 * arguments.context,
                    batch_size=arguments.batch_size,
                    shared_prefixes=way,
                )
                times.append(time.process_time() - start)
                scores[way] = np.asarray([one.log_probability for one in found])
        ratio = median(apart / once for once, apart in zip(taken[True][1:], taken[False][1:], strict=True))
        once, apart = (median(taken[way][1:]) for way in (True, False))
        error = np.abs(scores[True] - scores[False]).max()
        print(
            f"{name}: {apart:.2f} s of processor each request alone, {once:.2f} s shared, {ratio:.1f} times as fast; "
            f"scores differ by {error:.1e} nats at most",
            flush=True,
        )


if __name__ == "__main__":
    main()
