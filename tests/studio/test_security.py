"""Who may use the studio, from where, and what its responses allow a browser to do."""

from __future__ import annotations

from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from parley.errors import RunError, UsageError
from parley.studio import security
from parley.studio.app import create_app
from parley.studio.state import Studio
from parley.studio.web import _environment

ADDRESS = "http://127.0.0.1:7717"
PREFERENCE = {"theme": "dark"}


def test_the_token_is_exchanged_for_a_strict_cookie(studio: Studio, stranger: TestClient) -> None:
    assert stranger.get("/").status_code == 401
    assert stranger.get("/", params={"token": "x" * 43}).status_code == 401
    assert stranger.get("/").status_code == 401
    entered = stranger.get("/", params={"token": studio.keys.token})
    cookie = entered.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert studio.keys.token not in cookie
    assert studio.keys.token not in entered.text
    assert stranger.get("/").status_code == 200


@pytest.mark.parametrize("path", ["/", "/data", "/static/style.css", "/runs", "/nothing"])
def test_nothing_is_served_without_the_cookie(stranger: TestClient, path: str) -> None:
    assert stranger.get(path).status_code == 401


def test_a_cookie_of_another_value_is_refused(studio: Studio, stranger: TestClient) -> None:
    stranger.cookies.set(studio.keys.cookie, "0" * 64)
    assert stranger.get("/").status_code == 401


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:7717", 200),
        ("localhost:9000", 200),
        ("[::1]:7717", 200),
        ("evil.example:7717", 421),
        ("127.0.0.1.evil.example", 421),
        ("192.168.0.7:7717", 421),
        ("[::1", 421),
        ("", 421),
    ],
)
def test_the_host_is_this_machine(client: TestClient, host: str, status: int) -> None:
    del client.headers["Origin"]
    assert client.get("/", headers={"Host": host}).status_code == status


def test_an_exposed_studio_is_found_under_addresses_and_no_foreign_name() -> None:
    assert security.is_own_host("192.168.0.7:7717", "0.0.0.0")
    assert security.is_own_host("box.lan:7717", "box.lan")
    assert not security.is_own_host("evil.example:7717", "0.0.0.0")


@pytest.mark.parametrize("origin", ["http://evil.example", "http://127.0.0.1:9999", "https://127.0.0.1:7717", "null"])
def test_a_page_of_another_origin_is_refused(client: TestClient, origin: str) -> None:
    assert client.get("/", headers={"Origin": origin}).status_code == 403
    assert client.post("/preferences", data=PREFERENCE, headers={"Origin": origin}).status_code == 403


def test_a_change_needs_origin_and_csrf_token(client: TestClient) -> None:
    assert client.post("/preferences", data=PREFERENCE).status_code == 204
    assert client.post("/preferences", data=PREFERENCE, headers={"X-CSRF-Token": "0" * 64}).status_code == 403
    csrf = client.headers.pop("X-CSRF-Token")
    assert client.post("/preferences", data=PREFERENCE).status_code == 403
    client.headers["X-CSRF-Token"] = csrf
    del client.headers["Origin"]
    assert client.post("/preferences", data=PREFERENCE).status_code == 403


def test_every_route_that_changes_something_is_no_get(studio: Studio) -> None:
    app = create_app(studio)
    methods = {method for route in app.routes for method in getattr(route, "methods", None) or ()}
    assert methods <= {"GET", "POST"}


def test_headers_forbid_inline_scripts_and_other_sites(client: TestClient) -> None:
    for path in ("/", "/nothing", "/static/style.css"):
        headers = client.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "http" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
    assert client.get("/").headers["cache-control"] == "no-store"


def test_a_body_beyond_the_limit_is_refused(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(security, "MAX_FORM_BYTES", 100)
    assert client.post("/preferences", data={"theme": "x" * 200}).status_code == 413
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    assert client.post("/preferences", content=iter([b"theme=", b"x" * 200]), headers=form).status_code == 413


def test_a_form_is_a_form(client: TestClient) -> None:
    assert client.post("/preferences", json=PREFERENCE).status_code == 400
    assert client.post("/preferences", data={str(k): "" for k in range(2000)}).status_code == 400


@pytest.mark.parametrize("name", ["../secret", "..%2f..%2fsecret", "%2fetc/passwd", "vendor%2f..%2fstyle.css", ""])
def test_static_files_are_those_of_the_package(client: TestClient, name: str) -> None:
    assert client.get(f"/static/{name}").status_code == 404


@pytest.mark.parametrize("name", ["../outside", "/etc", "link", "a\0b", "x" * 5000, "", "."])
def test_no_run_is_opened_outside_of_the_root(studio: Studio, tmp_path: Path, name: str) -> None:
    for folder in (tmp_path / "outside",):
        folder.mkdir()
        (folder / "run.yaml").write_text("model: parley-demo\n")
    (studio.root / "link").symlink_to(tmp_path / "outside")
    with pytest.raises(RunError, match="no run of that name"):
        studio.run_path(name)


def test_paths_are_those_of_the_allowed_folders(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    studio = Studio(tmp_path / "runs", port=1, allowed=[tmp_path / "models"])
    assert studio.check_path(str(tmp_path / "models" / "one")) == tmp_path / "models" / "one"
    for path in (tmp_path / "other", tmp_path / "models" / ".." / "other", "/etc/passwd", "../x"):
        with pytest.raises(UsageError, match="--allow"):
            studio.check_path(str(path))


def test_the_secret_is_its_owners_and_stays(studio: Studio) -> None:
    path = studio.folder / "secret"
    assert path.stat().st_mode & 0o077 == 0
    again = Studio(studio.root, port=7717)
    assert (again.keys.session, again.keys.csrf) == (studio.keys.session, studio.keys.csrf)
    assert again.keys.token != studio.keys.token
    path.chmod(0o644)  # others may have read it
    assert Studio(studio.root, port=7717).keys.session != studio.keys.session


@pytest.mark.parametrize("language", ["en", "zh"])
def test_templates_escape_what_they_translate_and_show(language: str) -> None:
    hostile = "<script>\u202e\x1b[2J%s%(x)s"
    environment = _environment(language)
    for template in (
        "{{ _(text) }}",
        "{{ text }}",
        "{{ _('a %(name)s', name=text) }}",
        "{% trans %}{{ text }}{% endtrans %}",
    ):
        rendered = environment.from_string(template).render(text=hostile)
        assert "&lt;script&gt;" in rendered
        assert not set(rendered) & set("<\u202e\x1b")
