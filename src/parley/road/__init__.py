"""Old name of `parley.pipeline` and `parley.evaluation`, read for one version."""

import warnings

from parley.evaluation.evaluate_run import evaluate_run as evaluate
from parley.pipeline import RunResult, demo, train

__all__ = ["RunResult", "demo", "evaluate", "train"]

warnings.warn(
    "parley.road is now parley.pipeline (train, demo) and parley.evaluation.evaluate_run", FutureWarning, stacklevel=2
)
