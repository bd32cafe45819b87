"""The errors a caller can be told about.

    ServerError                         500 internal_error
    ├── InvalidRequest                  400 invalid_value
    │   ├── InvalidJson                 400 invalid_json
    │   ├── InvalidType                 400 invalid_type
    │   ├── MissingParameter            400 missing_required_parameter
    │   ├── UnknownParameter            400 unknown_parameter
    │   ├── UnsupportedParameter        400 unsupported_parameter
    │   ├── StringTooLong               400 string_above_max_length
    │   ├── ArrayTooLong                400 array_above_max_length
    │   ├── PromptTooLong               400 context_length_exceeded
    │   ├── InvalidPrompt               400 invalid_prompt
    │   ├── InvalidSchema               400 invalid_json_schema
    │   ├── AttachmentNotFound          400 invalid_value
    │   ├── InvalidStretch              400 invalid_value
    │   ├── MediaError                  400 image_parse_error / video_parse_error
    │   │   ├── InvalidMediaUrl         400 invalid_image_url / invalid_video_url
    │   │   ├── InvalidBase64           400 invalid_base64_image / invalid_base64_video
    │   │   ├── EmptyMediaFile          400 empty_image_file / empty_video_file
    │   │   ├── UnsupportedMediaType    400 unsupported_image_media_type / unsupported_video_...
    │   │   ├── MediaFileTooLarge       400 image_file_too_large / video_file_too_large
    │   │   ├── DownloadFailed          400 failed_to_download_image / failed_to_download_video
    │   │   └── MediaTooLarge           400 image_too_large / video_too_large
    │   ├── InvalidApiKey               401 invalid_api_key
    │   ├── ModelNotFound               404 model_not_found
    │   ├── FileNotFound                404 file_not_found
    │   ├── UnknownUrl                  404 unknown_url
    │   ├── MethodNotAllowed            405 method_not_allowed
    │   ├── RequestReceiveTimeout       408 request_receive_timeout
    │   ├── RequestTooLarge             413 request_too_large
    │   ├── HeadersTooLarge             431 headers_too_large
    │   └── UnsupportedContentType      415 unsupported_content_type
    ├── RateLimited                     429 rate_limit_exceeded
    ├── RequestTimeout                  504 request_timeout
    ├── StorageFull                     507 storage_full
    └── Unavailable                     503 server_is_overloaded
        ├── WorkerRestarting            503 worker_restarting
        ├── ShuttingDown                503 shutting_down
        └── ModelLoading                503 model_loading

    CheckpointError                     start-up only: a checkpoint that cannot be served
    ConfigError                         start-up only: a setting that cannot be used

A class knows its status, type and code; an instance adds the public message and the `param` path.
Messages are written by us: they never carry exception text, paths or addresses, and at most 64
escaped characters of what the client sent (`quoted`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Literal

MAX_MESSAGE_CHARS = 2_000
MAX_QUOTED_CHARS = 64
CONTEXT_IS = "This model's maximum context length is"


def quoted(text: str) -> str:
    """Client text fit for a message: control characters escaped, cut at 64 characters, quoted."""
    shown = text[:MAX_QUOTED_CHARS].encode("unicode_escape").decode("ascii")[:MAX_QUOTED_CHARS]
    return f"'{shown}...'" if len(text) > MAX_QUOTED_CHARS else f"'{shown}'"


class ServerError(Exception):
    """Something the caller is told about, with its HTTP status and the contract's type and code."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: str = "internal_error"
    default_message: ClassVar[str] = "The server had an internal error."
    retry_after_s: int | None = None
    should_retry: ClassVar[bool | None] = None
    """What `x-should-retry` says, if anything."""

    def __init__(self, message: str | None = None, *, param: str | None = None) -> None:
        self.message = (message or self.default_message)[:MAX_MESSAGE_CHARS]
        self.param = param
        super().__init__(self.message)

    def body(self) -> dict[str, dict[str, str | None]]:
        """The OpenAI error object."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }


class InvalidRequest(ServerError):
    """A value the server cannot use."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_value"
    default_message = "The request is invalid."


class InvalidJson(InvalidRequest):
    code = "invalid_json"
    default_message = "The request body is not valid JSON."


class InvalidType(InvalidRequest):
    code = "invalid_type"


class MissingParameter(InvalidRequest):
    code = "missing_required_parameter"


class UnknownParameter(InvalidRequest):
    code = "unknown_parameter"


class UnsupportedParameter(InvalidRequest):
    code = "unsupported_parameter"


class StringTooLong(InvalidRequest):
    code = "string_above_max_length"


class ArrayTooLong(InvalidRequest):
    code = "array_above_max_length"


class PromptTooLong(InvalidRequest):
    """Its message begins with OpenAI's words, by which clients (litellm) know this error."""

    code = "context_length_exceeded"


class InvalidPrompt(InvalidRequest):
    """The number of media and of their places in the prompt differ."""

    code = "invalid_prompt"


class InvalidSchema(InvalidRequest):
    """A form of the answer that cannot be kept to: a schema, a regex, choices or a grammar."""

    code = "invalid_json_schema"
    default_message = (
        "The form of the answer turned out too complex to be followed any further, "
        "or nothing that it allows may come."
    )


class AttachmentNotFound(InvalidRequest):
    """A medium refers to a part that the request does not have."""


class InvalidStretch(InvalidRequest):
    """A stretch of a video (`start_s`, `end_s`) that this video does not have."""


class MediaError(InvalidRequest):
    """A picture or video that cannot be used; the code says which of the two it was."""

    code_pattern: ClassVar[str] = "{kind}_parse_error"
    default_message = "The media item could not be decoded."

    def __init__(
        self,
        message: str | None = None,
        *,
        kind: Literal["image", "video"] = "image",
        param: str | None = None,
    ) -> None:
        super().__init__(message, param=param)
        self.kind = kind
        self.code = self.code_pattern.format(kind=kind)


class InvalidMediaUrl(MediaError):
    code_pattern = "invalid_{kind}_url"


class InvalidBase64(MediaError):
    code_pattern = "invalid_base64_{kind}"


class EmptyMediaFile(MediaError):
    code_pattern = "empty_{kind}_file"


class UnsupportedMediaType(MediaError):
    code_pattern = "unsupported_{kind}_media_type"


class MediaFileTooLarge(MediaError):
    """More bytes than the limit for its kind."""

    code_pattern = "{kind}_file_too_large"


class DownloadFailed(MediaError):
    """The place a medium was to come from did not give it, or not in time."""

    code_pattern = "failed_to_download_{kind}"


class MediaTooLarge(MediaError):
    """Pixels, sides, aspect ratio, duration or packets beyond a limit."""

    code_pattern = "{kind}_too_large"


class InvalidApiKey(InvalidRequest):
    status = 401
    code = "invalid_api_key"
    default_message = "A valid API key is required: Authorization: Bearer KEY."


class ModelNotFound(InvalidRequest):
    status = 404
    code = "model_not_found"


class FileNotFound(InvalidRequest):
    """No such uploaded file, or one of another owner: nobody can tell which."""

    status = 404
    code = "file_not_found"
    default_message = "No such file."


class UnknownUrl(InvalidRequest):
    status = 404
    code = "unknown_url"
    default_message = "No such URL."


class MethodNotAllowed(InvalidRequest):
    status = 405
    code = "method_not_allowed"
    default_message = "This URL does not take that method."


class RequestReceiveTimeout(InvalidRequest):
    status = 408
    code = "request_receive_timeout"
    default_message = "The request did not arrive in time."


class RequestTooLarge(InvalidRequest):
    status = 413
    code = "request_too_large"


class HeadersTooLarge(InvalidRequest):
    status = 431
    code = "headers_too_large"
    default_message = "The request's headers are too long or too many."


class UnsupportedContentType(InvalidRequest):
    status = 415
    code = "unsupported_content_type"
    default_message = "The request body must be sent as application/json, without encoding."


class RateLimited(ServerError):
    """This client's share is used up."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"
    should_retry = True
    default_message = "Too many requests of this client are in progress."

    def __init__(
        self, message: str | None = None, *, param: str | None = None, wait_s: float = 1.0
    ) -> None:
        """`wait_s` is how long until there is room again, where that is known."""
        super().__init__(message, param=param)
        self.retry_after_s = math.ceil(wait_s)


class PoisonRequest(ServerError):
    """The engine process died more than once while it was computed."""

    code = "poison_request"
    default_message = "The model worker failed twice over this request: it is not tried again now."
    should_retry = False


class RequestTimeout(ServerError):
    status = 504
    code = "request_timeout"
    default_message = "The request took longer than allowed."


class StorageFull(ServerError):
    """An upload that finds no room; sending it again does not help."""

    status = 507
    code = "storage_full"
    should_retry = False
    default_message = "There is no room for this file."


class Unavailable(ServerError):
    """The server cannot take this request now."""

    status = 503
    type = "service_unavailable_error"
    code = "server_is_overloaded"
    default_message = "The server is overloaded; try again later."
    should_retry = True
    retry_after_s = 1

    def __init__(
        self,
        message: str | None = None,
        *,
        param: str | None = None,
        shortage: str | None = None,
        wait_s: float | None = None,
    ) -> None:
        """`shortage` is what there is too little of, in one word, for whoever counts.

        `wait_s` is how long until there may be room again, where that is known.
        """
        super().__init__(message, param=param)
        self.shortage = shortage
        if wait_s is not None:
            self.retry_after_s = math.ceil(wait_s)


class WorkerRestarting(Unavailable):
    code = "worker_restarting"
    default_message = "The model worker is restarting; try again."
    retry_after_s = 5


class ShuttingDown(Unavailable):
    code = "shutting_down"
    default_message = "The server is shutting down."


class ModelLoading(Unavailable):
    code = "model_loading"
    default_message = "The model is still loading."
    retry_after_s = 5


class CheckpointError(Exception):
    """A checkpoint that cannot be served; the message is one line for the operator."""


class ConfigError(Exception):
    """A setting that cannot be used; the message is one line for the operator."""


ANSWER_ERRORS: Mapping[str, type[ServerError]] = {
    error.code: error
    for error in (
        ServerError,
        InvalidSchema,
        PoisonRequest,
        RequestTimeout,
        Unavailable,
        WorkerRestarting,
        ShuttingDown,
        ModelLoading,
    )
}
"""By code: what an answer may still meet after it was admitted."""
