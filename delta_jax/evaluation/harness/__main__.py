"""The command line of lm-evaluation-harness, which knows this library's models."""

from delta_jax.evaluation.harness import main

if __name__ == "__main__":
    main()
