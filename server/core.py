"""The nouns that rooms hand to each other, and nothing else.

Everything here is a frozen value without behaviour beyond derived numbers. What crosses to the
engine process is encoded as it stands; pixels travel beside it as raw uint8 (`Tiles`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

Tiles: TypeAlias = npt.NDArray[np.uint8]
"""The square pictures of one medium, uint8 [tiles, tile_size, tile_size, 3], RGB."""

MediaKind = Literal["image", "video"]
FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class VisionSpec:
    """How one checkpoint wants pixels cut and how many tokens it makes of them.

    Shared by the code that counts tokens and the code that makes features, so that they agree.
    Sizes are (height, width) in pixels.
    """

    tile_size: int
    candidate_resolutions: tuple[tuple[int, int], ...]
    image_queries: int
    video_slow_queries: int
    video_fast_queries: int
    first_last_frames_slow: bool
    max_canvases: int
    image_token_id: int
    video_token_id: int | None
    pad_to_square: bool = True
    unpad: bool = True
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    rescale_factor: float = 1 / 255
    resample: int = 3  # PIL.Image.Resampling value; 3 is BICUBIC
    frames_per_canvas: int = 9

    @property
    def pad_colour(self) -> tuple[int, int, int]:
        """The colour around a letterboxed picture: per-channel int(mean * 255)."""
        red, green, blue = self.image_mean
        return int(red * 255), int(green * 255), int(blue * 255)

    @property
    def max_frames(self) -> int:
        """The most frames a video is sampled to."""
        return self.max_canvases * self.frames_per_canvas

    @property
    def max_grids(self) -> int:
        """The most tiles a picture is cut into, its thumbnail not counted."""
        area = self.tile_size * self.tile_size
        return max(
            (height * width // area for height, width in self.candidate_resolutions), default=0
        )


@dataclass(frozen=True, slots=True)
class VisionLayout:
    """Which features of a medium's tiles are kept, and in which order.

    `tile_queries[i]` is the number of features (a square number) tile i is pooled to.
    With a `local_grid` of (tile rows, tile columns), tile 0 is the thumbnail and the others form,
    row-major, one feature map of which `kept` = (top, left, rows, columns) survives the unpad crop.
    `newline` appends the newline embedding: to each kept row, or once to a lone thumbnail.
    """

    tile_queries: tuple[int, ...]
    local_grid: tuple[int, int] | None = None
    kept: tuple[int, int, int, int] | None = None
    newline: bool = False

    @property
    def num_tokens(self) -> int:
        if self.local_grid is None or self.kept is None:
            return sum(self.tile_queries) + int(self.newline)
        _, _, rows, columns = self.kept
        return self.tile_queries[0] + rows * (columns + int(self.newline))


@dataclass(frozen=True, slots=True)
class VisionInput:
    """One picture or video as the engine sees it; its tiles travel beside it.

    `digest` is the SHA-256 (hex) over the tiles and the settings that made them: it is computed
    here from bytes we saw and is the only key under which the medium may be cached.
    """

    kind: MediaKind
    layout: VisionLayout
    digest: str

    @property
    def num_tokens(self) -> int:
        return self.layout.num_tokens


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of one request are chosen and when they end.

    `temperature` 0, or nearly, is greedy. `top_k` 0 and `min_p` 0 are off. `logit_bias` holds (id,
    what is added to its logit). `stop_token_ids` end the answer and are not part of its text;
    whether the model's own ends are among them was decided by `ignore_eos`. None of them is chosen
    before the answer has `min_tokens`, unless its grammar allows nothing else.

    With `num_logprobs` each token comes with its log-probability and those of so many likeliest
    ones, and with `num_prompt_logprobs` each token of the prompt does. They are the model's own:
    of its logits before anything above changes them.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """What a checkpoint's `generation_config.json` wants where a request says nothing."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What the engine is asked for: ids in, ids out.

    `vision_starts[i]` is the index in `prompt_ids` of the first of the `vision[i].num_tokens`
    placeholder ids of medium i. Of one tenant's waiting requests a lower `priority` starts first.
    The prompt is answered `num_choices` times. Choice 0 is the answer that would come alone; the
    others draw with seeds that follow from the request's. Each answer follows the `grammar`, in the
    form that llguidance takes and proved before it is sent: it ends only where that is satisfied.
    Of the special tokens it may use those of `grammar_special_ids`.
    Only requests of one tenant with one `cache_salt` share what is kept of prompts and media.
    """

    request_id: str
    tenant: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    vision: tuple[VisionInput, ...] = ()
    vision_starts: tuple[int, ...] = ()
    priority: int = 0
    num_choices: int = 1
    grammar: str | None = None
    grammar_special_ids: tuple[int, ...] = ()
    cache_salt: str = ""

    @property
    def cache_owner(self) -> tuple[str, str]:
        """Whose caches it reads and fills."""
        return self.tenant, self.cache_salt


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """How likely a token was: its log-probability, and the likeliest at its place, best first.

    `top` holds (id, log-probability). An id that could not come at all has -infinity.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One step of one choice. The last event of a choice, and only it, has a finish reason.

    `token_id` is None where a choice ends without a token (abort, error). `error_code` is one of
    the contract's codes and is set exactly when `finish_reason` is "error", which ends the whole
    request. With the first token of choice 0 comes what is told of the prompt:
    `num_cached_tokens`, how much of it was in the cache; `encode_times_s`, how long each of its
    media was encoded, 0 where that was done already; and `prompt_logprobs` if asked for, one for
    each of its ids, None for the first and for placeholders.
    """

    request_id: str
    token_id: int | None
    finish_reason: FinishReason | None = None
    error_code: str | None = None
    num_cached_tokens: int = 0
    encode_times_s: tuple[float, ...] = ()
    choice: int = 0
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
