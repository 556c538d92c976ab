"""The hub's client raises the exception that push takes for a connection that failed."""

from __future__ import annotations

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from parley.library_compat.huggingface_hub import HTTPError


def test_a_refused_connection_is_an_http_error_and_not_the_hubs_answer() -> None:
    with pytest.raises(HTTPError) as caught:
        HfApi(endpoint="http://127.0.0.1:9").create_repo("owner/name", token="x")
    assert not isinstance(caught.value, HfHubHTTPError)
