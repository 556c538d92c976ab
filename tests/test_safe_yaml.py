from __future__ import annotations

from pathlib import Path

import pytest

from parley.errors import RunError, UsageError
from parley.safe_yaml import MAX_BYTES, MAX_DEPTH, load_yaml, read_yaml_file

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10)
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: 1e-4", {"a": 1e-4}),
        ("[1E3, -1.5e-3, .5e1, 5e, '1e3']", [1000.0, -0.0015, 5.0, "5e", "1e3"]),
        ("- 1\n" * 19_999, [1] * 19_999),
        ("a: &x {b: 1}\nc: *x\nd: {<<: *x, b: 2}", {"a": {"b": 1}, "c": {"b": 1}, "d": {"b": 2}}),
        ("[no, off, yes, true, False]", ["no", "off", "yes", True, False]),
        ("", None),
        ("[" * MAX_DEPTH + "]" * MAX_DEPTH, eval("[" * MAX_DEPTH + "]" * MAX_DEPTH)),
    ],
)
def test_ordinary_documents(text: str, value: object) -> None:
    assert load_yaml(text, "f") == value


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (LAUGHS, "once its aliases are expanded"),
        ("&a [*a]", "has no finished anchor"),
        ("a: *b", "has no finished anchor"),
        ("[" * 100_000, "nested over"),
        ("- " * 5000 + "x", "nested over"),
        ("- 1\n" * 20_001, "over 20,000 values"),
        ("!!python/object/apply:os.system [id]", "is not read"),
        ("!!int x", "is not read"),
        ("a: 2024-13-45", "month must be in 1..12"),
        ("a: " + "9" * 5000, "digits"),
        ("{a: 1, a: 2}", "key 'a' is there twice"),
        ("? [a]\n: b", "unhashable key"),
        ("=", "not valid YAML"),
        ("--- 1\n--- 2", "single document"),
        ("\x00", "not valid YAML"),
    ],
)
def test_documents_beyond_the_limits_are_one_line(text: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason) as caught:
        load_yaml(text, "f")
    assert str(caught.value).startswith("f: not valid YAML")


def test_files_are_bounded_and_text(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RunError, match="binary, not UTF-8 text"):
        read_yaml_file(path, RunError)
    path.write_text("#" * (MAX_BYTES + 1))
    with pytest.raises(UsageError, match="too large for the settings of a run"):
        read_yaml_file(path)
    path.write_text("#" * MAX_BYTES)
    assert MAX_BYTES == 256 * 1024
    assert read_yaml_file(path) is None
    path.write_text("a: 1")
    assert read_yaml_file(path) == {"a": 1}
