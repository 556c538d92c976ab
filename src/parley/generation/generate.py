"""Old name of `parley.inference.generate`, read for one version."""

import warnings

from parley.inference.generate import end_of_turn_ids, generate, stream

__all__ = ["end_of_turn_ids", "generate", "stream"]

warnings.warn("parley.generation.generate is now parley.inference.generate", FutureWarning, stacklevel=2)
