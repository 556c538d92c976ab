"""The hub client's exception for connections that fail.

Its methods let the HTTP library's own errors through where the hub cannot be reached. Which library that is depends on
the version (httpx, or httpx2 from 2.x); huggingface_hub.errors imports its base exception, and does not document it.
There is no public alternative short of importing one of the two by version.
"""

from huggingface_hub.errors import HTTPError

__all__ = ["HTTPError"]
