"""What the experiments share: studies as data, side-by-side training, results on disk, the page."""

from experiments.harness.results import Results, Summary
from experiments.harness.runner import main
from experiments.harness.study import Arm, Cell, Sweep, arm, mixer
from experiments.harness.verdicts import Claim, Study, Verdict

__all__ = ["Arm", "Cell", "Claim", "Results", "Study", "Summary", "Sweep", "Verdict", "arm", "main", "mixer"]
