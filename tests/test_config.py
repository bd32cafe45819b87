"""Settings: where they come from, which of them win, and how a wrong one is refused."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

import pytest
import yaml

from server.config import SECTIONS, ApiKey, Config, load_config
from server.errors import ConfigError

CONFIG_YAML = Path(__file__).parent.parent / "config.yaml"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.upper().startswith("HCX_"):
            monkeypatch.delenv(name)


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def write(folder: Path, text: str, *, name: str = "config.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def refusal(path: Path | None = None, flags: dict[str, dict[str, object]] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, flags)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_shipped_file_holds_exactly_the_settings_and_their_defaults() -> None:
    in_file = yaml.safe_load(CONFIG_YAML.read_text(encoding="utf-8"))
    assert {section: list(entries) for section, entries in in_file.items()} == {
        section: list(model.model_fields) for section, model in SECTIONS.items()
    }
    assert load_config(CONFIG_YAML) == Config()


def test_every_setting_in_the_shipped_file_has_a_comment_that_ends_in_its_unit() -> None:
    lines = CONFIG_YAML.read_text(encoding="utf-8").splitlines()
    settings = [index for index, line in enumerate(lines) if re.match(r"  [a-z]", line)]
    assert len(settings) == sum(len(model.model_fields) for model in SECTIONS.values())
    for index in settings:
        assert re.fullmatch(r"  # .+ \[[^\]]+\]", lines[index - 1]), lines[index]


def test_a_flag_beats_the_environment_which_beats_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, "http: {host: in-file, port: 1, keep_alive_timeout_s: 2}")
    monkeypatch.setenv("HCX_HTTP__HOST", "in-environment")
    monkeypatch.setenv("HCX_HTTP__PORT", "3")
    http = load_config(path, {"http": {"port": 4}}).http
    assert (http.host, http.port, http.keep_alive_timeout_s) == ("in-environment", 4, 2)


def test_the_defaults_do_not_read_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HCX_HTTP__PORT", "3")
    assert Config().http.port == 8000
    assert load_config().http.port == 3


def test_null_in_the_environment_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HCX_MODEL__REVISION", "null")
    assert load_config(write(tmp_path, "model: {revision: v1}")).model.revision is None


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("engin: {block_size: 16}", "unknown section engin; did you mean engine?"),
        ("engine: {blok_size: 16}", "engine.blok_size; did you mean engine.block_size?"),
        ("http: {1: 2}", "unknown setting http.1; did you mean http."),
        ("engine: 3", "engine must hold keys and values"),
        ("- engine", "must hold settings as keys and values"),
        ("engine: [", "is not valid YAML at line 1"),
        ("http: {port: 2020-13-45}", "is not valid YAML"),
        ("http: {port: " + "9" * 5000 + "}", "is not valid YAML"),
        ("[" * 3000, "is not valid YAML"),
        ("http: {port: 65536}", "http.port: input should be less than or equal to 65535"),
        ("http: {strict: 7}", "http.strict: "),
        ("model: {dtype: fp8}", "model.dtype: "),
        ("model: {device: tpu}", "model.device: "),
    ],
)
def test_a_wrong_file_is_refused_with_its_path(tmp_path: Path, text: str, named: str) -> None:
    path = write(tmp_path, text)
    message = refusal(path)
    assert message.startswith(f"{path}: ")
    assert named in message


@pytest.mark.parametrize(
    ("variable", "named"),
    [
        ("HCX_ENGIN__X", "unknown setting HCX_ENGIN__X; did you mean HCX_ENGINE__"),
        ("HCX_HTTP__PROT", "unknown setting HCX_HTTP__PROT; did you mean HCX_HTTP__PORT?"),
        ("hcx_http__prot", "unknown setting hcx_http__prot; did you mean HCX_HTTP__PORT?"),
        ("HCX_PORT", "unknown setting HCX_PORT; did you mean HCX_"),
        ("HCX_MODEL", "unknown setting HCX_MODEL; did you mean HCX_MODEL__"),
        ("HCX_HTTP_PORT", "unknown setting HCX_HTTP_PORT; did you mean HCX_HTTP__PORT?"),
        ("HCX_MODEL_PATH", "did you mean HCX_MODEL__PATH?"),
        ("HCX_MEDIA_MAX_IMAGES", "did you mean HCX_MEDIA__MAX_IMAGES?"),
        ("HCX_HTTP__API_KEYS__ALICE", "did you mean HCX_HTTP__API_KEYS"),
        ("HCX_HTTP__PORT", "http.port: "),
    ],
)
def test_a_wrong_variable_is_refused(
    monkeypatch: pytest.MonkeyPatch, variable: str, named: str
) -> None:
    monkeypatch.setenv(variable, "no number")
    message = refusal()
    assert message.startswith("environment: ")
    assert named in message


def test_a_wrong_flag_is_refused() -> None:
    assert refusal(flags={"http": {"prot": 1}}) == (
        "command line: unknown setting http.prot; did you mean http.port?"
    )
    assert refusal(flags={"http": {"port": -1}}).startswith("command line: http.port: ")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert "cannot be read: No such file" in refusal(tmp_path / "config.yaml")


def test_nobody_writes_back() -> None:
    config = Config()
    with pytest.raises(ValueError, match="frozen"):
        config.http.port = 1  # type: ignore[misc]
    with pytest.raises(ValueError, match="frozen"):
        config.http = config.http


def test_keys_of_the_file_and_of_the_environment_add_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, f"alice: {digest('a').upper()}", name="keys.yaml")
    path = write(tmp_path, "http: {api_keys_file: keys.yaml}")
    monkeypatch.setenv("HCX_HTTP__API_KEYS", json.dumps({"bob": digest("b")}))
    assert load_config(path).http.api_keys == {
        "bob": ApiKey(sha256=digest("b")),
        "alice": ApiKey(sha256=digest("a")),
    }


def test_a_key_may_have_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"requests_per_minute": 3, "tokens_per_minute": 1000, "max_concurrent": 2}
    write(tmp_path, json.dumps({"alice": {"sha256": digest("a"), **limits}}), name="keys.yaml")
    path = write(tmp_path, "http: {api_keys_file: keys.yaml}")
    bob = {"bob": {"sha256": digest("b").upper(), "max_concurrent": 1}, "eve": digest("e")}
    monkeypatch.setenv("HCX_HTTP__API_KEYS", json.dumps(bob))
    assert load_config(path).http.api_keys == {
        "bob": ApiKey(sha256=digest("b"), max_concurrent=1),
        "eve": ApiKey(sha256=digest("e")),
        "alice": ApiKey(sha256=digest("a"), **limits),
    }


@pytest.mark.parametrize("in_key_file", [True, False])
@pytest.mark.parametrize(
    ("key", "named"),
    [
        ({"sha256": digest("a"), "requests_per_minute": 0}, "alice.requests_per_minute: "),
        ({"sha256": digest("a"), "requests_per_minute": 10**10}, "alice.requests_per_minute: "),
        ({"sha256": digest("a"), "tokens_per_minute": "many"}, "alice.tokens_per_minute: "),
        ({"sha256": digest("a"), "max_concurrent": -1}, "alice.max_concurrent: "),
        ({"sha256": digest("a"), "request_per_minute": 1}, "did you mean requests_per_minute?"),
        ({"requests_per_minute": 1}, "alice.sha256: field required"),
        ({"sha256": "hunter2"}, "alice.sha256: must be the SHA-256"),
        ({"sha256": None}, "alice.sha256: "),
        ([digest("a")], "the value of 'alice' must be a SHA-256"),
        (None, "the value of 'alice' must be a SHA-256"),
    ],
)
def test_wrong_limits_are_refused_by_name(
    tmp_path: Path, in_key_file: bool, key: object, named: str
) -> None:
    keys = {"alice": key}
    settings = {"api_keys": keys}
    if in_key_file:
        settings = {"api_keys_file": str(write(tmp_path, json.dumps(keys), name="keys.yaml"))}
    message = refusal(write(tmp_path, json.dumps({"http": settings})))
    assert named in message
    assert ("keys.yaml: " in message) == in_key_file
    for secret in ("hunter2", digest("a")):
        assert secret not in message


def test_the_last_of_two_same_digests_is_named_in_any_form(tmp_path: Path) -> None:
    keys = {"alice": {"sha256": digest("a").upper()}, "bob": digest("a")}
    path = write(tmp_path, json.dumps({"http": {"api_keys": keys}}))
    assert "'alice' and 'bob' have the same key" in refusal(path)


@pytest.mark.parametrize(
    "origins",
    [
        [],
        ["*"],
        ["https://app.example.com", "http://localhost:3000", "http://[::1]:80"],
        ["chrome-extension://abcdefgh"],
    ],
)
def test_origins(tmp_path: Path, origins: list[str]) -> None:
    path = write(tmp_path, json.dumps({"http": {"cors_origins": origins}}))
    assert load_config(path).http.cors_origins == tuple(origins)


@pytest.mark.parametrize(
    "origin",
    ["", "null", "example.com", "https://", "https://a/", "https://a/b", "HTTPS://a", "https://A",
     "https://*.a", "https://a b", "https://a\n"],
)  # fmt: skip
def test_what_no_browser_sends_is_no_origin(tmp_path: Path, origin: str) -> None:
    for origins in ([origin], [origin, "https://b"], ["*", "https://b"]):
        path = write(tmp_path, json.dumps({"http": {"cors_origins": origins}}))
        assert "http.cors_origins: each must be scheme://host" in refusal(path)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"alice": "hunter2"}, "http.api_keys.alice.sha256: must be the SHA-256"),
        ({"al ice": digest("a")}, "name must be"),
        ({"alice": digest("a"), "bob": digest("a")}, "'alice' and 'bob' have the same key"),
        ("hunter2", "http.api_keys"),
    ],
)
def test_wrong_keys_are_refused_without_being_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: object, named: str
) -> None:
    from_file = refusal(write(tmp_path, json.dumps({"http": {"api_keys": keys}})))
    monkeypatch.setenv("HCX_HTTP__API_KEYS", json.dumps(keys))
    from_environment = refusal()
    for message in (from_file, from_environment):
        assert named in message
        assert "hunter2" not in message
        assert digest("a") not in message


def test_a_value_that_is_no_json_is_refused_without_being_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HCX_MEDIA__ALLOWED_HOSTS", '["example.com"]')
    monkeypatch.setenv("HCX_HTTP__API_KEYS", "alice=hunter2")
    assert refusal() == "environment: HCX_HTTP__API_KEYS is not valid JSON"
    monkeypatch.delenv("HCX_HTTP__API_KEYS")
    monkeypatch.setenv("HCX_MEDIA__DENIED_HOSTS", "hunter2")
    assert refusal() == "environment: HCX_MEDIA__DENIED_HOSTS is not valid JSON"


def test_a_relative_path_in_a_settings_file_starts_beside_it(tmp_path: Path) -> None:
    path = write(tmp_path, "media: {files_dir: uploads, local_root: /srv/media}")
    media = load_config(path).media
    assert media.files_dir == tmp_path / "uploads"
    assert media.local_root == Path("/srv/media")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("alice: hunter2", "keys.yaml: alice.sha256: must be the SHA-256"),
        ("alice: 7", "keys.yaml: the value of 'alice' must be a SHA-256"),
        (f"bob: {digest('other')}", "'bob' is also in http.api_keys"),
        ("hunter2", "must hold names and SHA-256 digests"),
    ],
)
def test_a_wrong_key_file_is_refused(tmp_path: Path, text: str, named: str) -> None:
    keys = write(tmp_path, text, name="keys.yaml")
    flags: dict[str, dict[str, object]] = {
        "http": {"api_keys_file": keys, "api_keys": {"bob": digest("b")}}
    }
    message = refusal(flags=flags)
    assert message.startswith(str(keys))
    assert named in message
    assert "hunter2" not in message


def test_a_printed_configuration_shows_no_digest() -> None:
    config = load_config(flags={"http": {"api_keys": {"alice": digest("a")}}})
    assert digest("a") not in repr(config)
    assert digest("a") not in str(config.http)
