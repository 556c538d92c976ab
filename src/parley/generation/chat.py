"""Old name of `parley.inference.chat`, read for one version."""

import warnings

from parley.inference.chat import ChatSession

__all__ = ["ChatSession"]

warnings.warn("parley.generation.chat is now parley.inference.chat", FutureWarning, stacklevel=2)
