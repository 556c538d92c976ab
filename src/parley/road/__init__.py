"""The whole road, from settings to a model that talks like its data; the command line and Python share it.

settings -> model, tokenizer, data (loading) -> held-out loss (examination) -> training -> held-out loss again and
questions to base and tuned model -> report (running). `evaluation` measures a finished run once more.
"""

from parley.road.evaluation import evaluate
from parley.road.loading import Ready, load, plan
from parley.road.running import RunResult, demo, train

__all__ = ["Ready", "RunResult", "demo", "evaluate", "load", "plan", "train"]
