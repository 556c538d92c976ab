"""A studio without a server, and one in a process of its own that Chromium can open."""

from __future__ import annotations

from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from parley.studio.app import create_app
from parley.studio.state import Studio

ADDRESS = "http://127.0.0.1:7717"


@pytest.fixture
def studio(tmp_path: Path) -> Studio:
    return Studio(tmp_path / "runs", port=7717)


@pytest.fixture
def stranger(studio: Studio) -> TestClient:
    """A client without the token; the queue is not watched."""
    return TestClient(create_app(studio), base_url=ADDRESS, raise_server_exceptions=True)


@pytest.fixture
def client(studio: Studio, stranger: TestClient) -> TestClient:
    """A browser that opened the address, with the headers that the studio's pages send."""
    assert stranger.get("/", params={"token": studio.keys.token}).status_code == 200
    stranger.headers |= {"Origin": ADDRESS, "X-CSRF-Token": studio.keys.csrf}
    return stranger
