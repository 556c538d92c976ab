"""Names that notebooks import for what Parley does not do. Importing them works; using them says what they are for."""

from __future__ import annotations

from typing import Any, NoReturn

from parley.errors import UsageError


class OutOfScope:
    """A name whose every use is a UsageError."""

    def __init__(self, name: str, purpose: str) -> None:
        self._message = f"{name} is for {purpose}, which Parley does not train; it fine-tunes text models: FastModel"

    def __getattr__(self, attribute: str) -> NoReturn:
        if attribute.startswith("__"):  # what Python itself looks for
            raise AttributeError(attribute)
        raise UsageError(self._message)

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise UsageError(self._message)


FastVisionModel = OutOfScope("FastVisionModel", "vision models")
UnslothVisionDataCollator = OutOfScope("UnslothVisionDataCollator", "vision models")
FastSentenceTransformer = OutOfScope("FastSentenceTransformer", "embedding models")
FastTextModel = OutOfScope("FastTextModel", "classifiers and encoders")
SyntheticDataKit = OutOfScope("SyntheticDataKit", "making data with vLLM")
