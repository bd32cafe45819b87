"""Every setting, in four frozen sections, and the one loader that fills them.

In rising order: the defaults below, a YAML file, environment variables named
`HCX_<SECTION>__<KEY>`, command-line flags. This is the only file that reads the environment.
A name nobody knows is refused with the nearest known one, wherever it comes from. It must not know
what the settings do: a class is given its section, or plain values, and never writes back.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections import abc
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, get_origin

import yaml
from pydantic import BaseModel, Field, PositiveFloat, PositiveInt, ValidationError, field_validator
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from server.errors import ConfigError

ENV_PREFIX = "HCX_"
ENV_DELIMITER = "__"

Values: TypeAlias = Mapping[str, Mapping[str, Any]]
"""Section -> key -> value, as a source gave it."""

_MIB = 1024 * 1024
_KEY_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)
HostName: TypeAlias = Annotated[str, Field(min_length=1, max_length=255)]
"""A host's name, `*.name` for all below one, or a network such as 10.0.0.0/8."""

_SHA256_HEX = re.compile(r"[0-9a-f]{64}", re.ASCII)
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[a-z0-9._\[\]:-]+", re.ASCII)


PerMinute: TypeAlias = Annotated[int, Field(ge=1, le=1_000_000_000)]


class ApiKey(BaseModel, frozen=True, extra="forbid", hide_input_in_errors=True):
    """A caller's key, known by its digest, and what he may use; null limits nothing."""

    sha256: Annotated[str, Field(repr=False)]
    requests_per_minute: PerMinute | None = None
    tokens_per_minute: PerMinute | None = None
    max_concurrent: PositiveInt | None = None

    @field_validator("sha256")
    @classmethod
    def _check_sha256(cls, value: str) -> str:
        digest = value.lower()
        if not _SHA256_HEX.fullmatch(digest):
            raise ValueError("must be the SHA-256 of the key as 64 hex digits, not the key itself")
        return digest


class HttpConfig(BaseModel, frozen=True, extra="forbid", hide_input_in_errors=True):
    """The two listening sockets, who may call, and what one request may cost before the model."""

    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65_535)] = 8000
    unix_socket: Path | None = None
    tls_certificate_file: Path | None = None
    tls_key_file: Path | None = None
    admin_host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    admin_port: Annotated[int, Field(ge=0, le=65_535)] | None = 0
    api_keys: Annotated[Mapping[str, ApiKey], Field(repr=False)] = {}
    api_keys_file: Path | None = None
    cors_origins: tuple[str, ...] = ()
    docs: bool | None = None
    strict: bool = False
    max_body_bytes: PositiveInt = 64 * _MIB
    max_multipart_bytes: PositiveInt = 129 * _MIB
    max_header_bytes: PositiveInt = 32 * 1024
    headers_timeout_s: PositiveFloat = 10.0
    receive_timeout_s: PositiveFloat = 60.0
    max_connections: PositiveInt = 1024
    keep_alive_timeout_s: PositiveInt = 15
    request_timeout_s: PositiveFloat = 600.0
    drain_timeout_s: PositiveInt = 30

    @property
    def shows_docs(self) -> bool:
        """Whether the API's description is public: where nobody needs a key, or it is wanted."""
        return not self.api_keys if self.docs is None else self.docs

    @field_validator("api_keys", mode="before")
    @classmethod
    def _read_api_keys(cls, value: object) -> object:
        """Names are plain; a digest alone is a key without limits."""
        if not isinstance(value, Mapping):
            return value
        for name, key in value.items():
            if not isinstance(name, str) or not _KEY_NAME.fullmatch(name):
                raise ValueError("a key's name must be 1 to 64 of A-Z a-z 0-9 . _ -")
            if not isinstance(key, str | Mapping | ApiKey):
                raise ValueError(f"the value of {name!r} must be a SHA-256, or one with limits")
            for field in key if isinstance(key, Mapping) else ():
                if field not in ApiKey.model_fields:
                    nearest = _closest(str(field), ApiKey.model_fields)
                    raise ValueError(f"{name!r} has an unknown entry; did you mean {nearest}?")
        return {
            name: {"sha256": key} if isinstance(key, str) else key for name, key in value.items()
        }

    @field_validator("api_keys")
    @classmethod
    def _check_api_keys(cls, value: Mapping[str, ApiKey]) -> Mapping[str, ApiKey]:
        """No two names share a key."""
        owner_of: dict[str, str] = {}
        for name, key in value.items():
            owner = owner_of.setdefault(key.sha256, name)
            if owner != name:
                raise ValueError(f"{owner!r} and {name!r} have the same key")
        return value

    @field_validator("cors_origins")
    @classmethod
    def _check_cors_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        """As a browser writes them, because they are compared with what it sends."""
        if value != ("*",) and not all(_ORIGIN.fullmatch(origin) for origin in value):
            raise ValueError(
                "each must be scheme://host or scheme://host:port in lower case, and * stands alone"
            )
        return value


class MediaConfig(BaseModel, frozen=True, extra="forbid", hide_input_in_errors=True):
    """What pictures and videos may be sent, from where, and what getting one may cost."""

    max_images: Annotated[int, Field(ge=0)] = 16
    max_videos: Annotated[int, Field(ge=0)] = 2
    max_image_bytes: PositiveInt = 20 * _MIB
    max_video_bytes: PositiveInt = 100 * _MIB
    max_request_bytes: PositiveInt = 128 * _MIB
    max_image_pixels: PositiveInt = 40_000_000
    max_image_side: PositiveInt = 16_384
    max_image_aspect: PositiveFloat = 200.0
    max_video_pixels: PositiveInt = 16_800_000
    max_video_duration_s: PositiveFloat = 3600.0
    max_video_packets: PositiveInt = 300_000
    max_video_frames_decoded: PositiveInt = 20_000
    image_decode_timeout_s: PositiveFloat = 5.0
    video_decode_timeout_s: PositiveFloat = 30.0
    image_decode_memory_bytes: PositiveInt = 1024 * _MIB
    video_decode_memory_bytes: PositiveInt = 3072 * _MIB
    decode_processes: PositiveInt = 2
    max_decodes_waiting: PositiveInt = 256
    jpeg_reduced_scale: bool = True
    allowed_hosts: tuple[HostName, ...] | None = None
    denied_hosts: tuple[HostName, ...] = ()
    allowed_private_hosts: tuple[HostName, ...] = ()
    allowed_ports: tuple[Annotated[int, Field(ge=1, le=65_535)], ...] = (80, 443)
    ca_file: Path | None = None
    proxy: Annotated[str | None, Field(min_length=1, repr=False)] = None
    connect_timeout_s: PositiveFloat = 3.0
    first_byte_timeout_s: PositiveFloat = 5.0
    image_fetch_timeout_s: PositiveFloat = 15.0
    video_fetch_timeout_s: PositiveFloat = 30.0
    min_fetch_bytes_per_s: PositiveInt = 16 * 1024
    max_redirects: Annotated[int, Field(ge=0)] = 3
    max_fetches: PositiveInt = 32
    max_fetches_per_host: PositiveInt = 4
    max_fetches_per_request: PositiveInt = 4
    max_fetches_waiting: PositiveInt = 256
    cache_bytes: Annotated[int, Field(ge=0)] = 512 * _MIB
    cache_ttl_s: PositiveFloat = 3600.0
    cache_dir: Path | None = None
    cache_dir_bytes: PositiveInt = 2048 * _MIB
    local_root: Path | None = None
    files_dir: Path | None = None
    files_ttl_s: PositiveFloat = 7 * 24 * 3600.0
    max_files_bytes_per_key: PositiveInt = 1024 * _MIB
    spool_dir: Path | None = None


class ModelConfig(BaseModel, frozen=True, extra="forbid", hide_input_in_errors=True):
    """Which checkpoint is served, under which name, where and in which precision."""

    path: Annotated[str, Field(min_length=1)] | None = None
    revision: Annotated[str, Field(min_length=1)] | None = None
    served_name: Annotated[str, Field(min_length=1)] | None = None
    aliases: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_context: PositiveInt | None = None


class EngineConfig(BaseModel, frozen=True, extra="forbid", hide_input_in_errors=True):
    """The engine process: its memory, its step, its queue and how it is watched."""

    attention_backend: Annotated[str, Field(min_length=1)] = "auto"
    num_threads: PositiveInt | None = None
    block_size: PositiveInt | None = None
    kv_cache_bytes: PositiveInt | None = None
    encoder_cache_bytes: PositiveInt = 256 * _MIB
    max_tokens_per_step: PositiveInt | None = None
    max_requests_running: PositiveInt = 256
    max_requests_waiting: PositiveInt = 256
    max_wait_s: PositiveFloat = 60.0
    max_requests_per_key: PositiveInt = 64
    loading_timeout_s: PositiveFloat = 300.0
    step_timeout_s: PositiveFloat = 30.0
    shutdown_timeout_s: PositiveFloat = 5.0
    restart_delay_max_s: PositiveFloat = 30.0


class Config(BaseSettings):
    """All four sections. Made by `load_config`; `Config()` is the defaults and reads nothing."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        hide_input_in_errors=True,
        env_prefix=ENV_PREFIX,
        env_nested_delimiter=ENV_DELIMITER,
        env_parse_none_str="null",
    )

    http: HttpConfig = HttpConfig()
    media: MediaConfig = MediaConfig()
    model: ModelConfig = ModelConfig()
    engine: EngineConfig = EngineConfig()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments only: `load_config` merges the sources, because it must name the guilty one."""
        return (init_settings,)


SECTIONS: Mapping[str, type[BaseModel]] = {
    "http": HttpConfig,
    "media": MediaConfig,
    "model": ModelConfig,
    "engine": EngineConfig,
}


PATHS = (
    ("http", "unix_socket"),
    ("http", "tls_certificate_file"),
    ("http", "tls_key_file"),
    ("http", "api_keys_file"),
    ("media", "ca_file"),
    ("media", "cache_dir"),
    ("media", "local_root"),
    ("media", "files_dir"),
    ("media", "spool_dir"),
)


def load_config(path: Path | None = None, flags: Values | None = None) -> Config:
    """The settings from file < environment < flags; ConfigError, one line, where one is wrong."""
    sources: list[tuple[str, Values]] = []
    if path is not None:
        sources.append((str(path), _values_in_file(path)))
    sources.append(("environment", _values_in_environment()))
    sources.append(("command line", _checked_names("command line", flags or {})))

    merged: dict[str, dict[str, Any]] = {}
    for _, values in sources:
        for section, entries in values.items():
            merged.setdefault(section, {}).update(entries)
    if path is not None:
        _resolve_relative_paths(path.parent, sources[0][1], merged)
    try:
        config = Config(**merged)  # type: ignore[arg-type]  # pydantic checks the values
    except ValidationError as error:
        raise ConfigError(_one_line(error, sources)) from None
    if config.http.api_keys_file is None:
        return config
    return _with_keys_of_file(config, config.http.api_keys_file)


def environment_with(defaults: Mapping[str, str]) -> dict[str, str]:
    """This process's own environment for a child, with values for what it does not set."""
    return {**defaults, **os.environ}


def _values_in_file(path: Path) -> Values:
    values = _mapping_in(path, what="settings")
    for section, entries in values.items():
        if section in SECTIONS and entries is not None and not isinstance(entries, dict):
            raise ConfigError(f"{path}: {section} must hold keys and values")
    # A section whose keys are all commented out reads as null and means nothing.
    return _checked_names(str(path), {name: entries or {} for name, entries in values.items()})


def _mapping_in(path: Path, *, what: str) -> dict[str, Any]:
    """A YAML (so also JSON) file that holds one mapping with text keys, or nothing."""
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"{path}: is not valid YAML{place}") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict) or not all(isinstance(key, str) for key in loaded):
        raise ConfigError(f"{path}: must hold {what} as keys and values")
    return loaded


def _values_in_environment() -> Values:
    known = _known_variables()
    for name in sorted(os.environ):
        if name.upper().startswith(ENV_PREFIX) and name.upper() not in known:
            raise ConfigError(f"environment: unknown setting {name}{_nearest_variable(name)}")
    try:
        values: Values = EnvSettingsSource(Config)()
    except SettingsError:
        # Its text quotes the value, which may be a secret.
        raise ConfigError(f"environment: {_variable_not_json()} is not valid JSON") from None
    return values


def _variable_not_json() -> str:
    """The first variable for a mapping or a list whose value cannot be parsed as one."""
    for name in sorted(os.environ):
        section, _, key = name.lower().removeprefix(ENV_PREFIX.lower()).partition(ENV_DELIMITER)
        field = SECTIONS[section].model_fields.get(key) if section in SECTIONS else None
        if field is not None and get_origin(field.annotation) in (tuple, abc.Mapping):
            try:
                json.loads(os.environ[name])
            except ValueError:
                return name.upper()
    raise AssertionError("every value can be parsed")


def _known_variables() -> list[str]:
    return [
        f"{ENV_PREFIX}{section}{ENV_DELIMITER}{key}".upper()
        for section, model in SECTIONS.items()
        for key in model.model_fields
    ]


def _nearest_variable(name: str) -> str:
    if ENV_DELIMITER not in name:  # most often one underscore where two belong
        return f"; did you mean {_closest(name.upper(), _known_variables())}?"
    section, _, key = name.lower().removeprefix(ENV_PREFIX.lower()).partition(ENV_DELIMITER)
    nearest_section = _closest(section, SECTIONS)
    nearest_key = _closest(key, SECTIONS[nearest_section].model_fields)
    variable = f"{ENV_PREFIX}{nearest_section}{ENV_DELIMITER}{nearest_key}".upper()
    return f"; did you mean {variable}?"


def _checked_names(source: str, values: Values) -> Values:
    for section, entries in values.items():
        if section not in SECTIONS:
            nearest = _closest(section, SECTIONS)
            raise ConfigError(f"{source}: unknown section {section}; did you mean {nearest}?")
        fields = SECTIONS[section].model_fields
        for key in entries:
            if key not in fields:
                nearest = f"{section}.{_closest(str(key), fields)}"
                raise ConfigError(
                    f"{source}: unknown setting {section}.{key}; did you mean {nearest}?"
                )
    return values


def _closest(name: str, known: Iterable[str]) -> str:
    # No cut-off: a wrong guess costs the reader nothing, a missing one a search.
    return difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)[0]


def _one_line(error: ValidationError, sources: list[tuple[str, Values]]) -> str:
    """The first fault, with its setting and the source that won, and without its value."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    section, key = str(first["loc"][0]), str(first["loc"][1])
    source = next(name for name, values in reversed(sources) if key in values.get(section, {}))
    return f"{source}: {_place(first['loc'])}: {_message(first)}"


def _place(parts: tuple[int | str, ...]) -> str:
    """`section.key`, and where in the value of a mapping or a list."""
    return ".".join(map(str, parts))


def _message(error: ErrorDetails) -> str:
    message = error["msg"].removeprefix("Value error, ")
    return f"{message[:1].lower()}{message[1:]}"


def _resolve_relative_paths(
    folder: Path, in_file: Values, merged: dict[str, dict[str, Any]]
) -> None:
    """What the settings file names lies beside it, wherever the server is started."""
    for section, key in PATHS:
        named = in_file.get(section, {}).get(key)
        if named is not None and merged[section][key] == named:
            merged[section][key] = folder / str(named)


def _with_keys_of_file(config: Config, path: Path) -> Config:
    of_file = _mapping_in(path, what="names and SHA-256 digests")
    doubled = sorted(of_file.keys() & config.http.api_keys.keys())
    if doubled:
        raise ConfigError(f"{path}: {doubled[0]!r} is also in http.api_keys")
    http = {**config.http.model_dump(), "api_keys": {**config.http.api_keys, **of_file}}
    try:
        return Config(
            http=HttpConfig.model_validate(http),
            media=config.media,
            model=config.model,
            engine=config.engine,
        )
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = _place(first["loc"][1:])
        raise ConfigError(f"{path}: {place}{': ' if place else ''}{_message(first)}") from None
