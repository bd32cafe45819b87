"""A small byte-level tokenizer with the family's special tokens, and templates to feed it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from server.chat.tokenizer import Tokenizer
from server.core import VisionSpec

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
END_OF_TURN, STOP = "<|endofturn|>", "<|stop|>"
IMAGE, VIDEO = "<|dummy3|>", "<|_unuse_missing_100270|>"
# Begins like another one, begins with another character, and holds letters outside ASCII.
LONGER, BRACKETS, KOREAN = "<|im_start|>user", "[특별한]", "한<국>"
SPECIAL = (END_OF_TEXT, IM_START, IM_END, END_OF_TURN, STOP, IMAGE, VIDEO, LONGER, BRACKETS, KOREAN)

CORPUS = [
    "You are a helpful assistant. What is in the picture? A red circle and a blue square.",
    "그림에 무엇이 있나요? 빨간 원과 파란 사각형이 있습니다. 안녕하세요.",
    "system user assistant tool_list image/aux <|im_start|> <|im_end|> <|endoftext|>",
] * 4

LIST_TEMPLATE = """
{%- macro block(role, text) -%}
{{ '<|im_start|>' + role + '\\n' + text + '<|im_end|>\\n' }}
{%- endmacro -%}
{{- '<|im_start|>tool_list\\n<|im_end|>\\n' -}}
{%- for message in messages -%}
{%- if message.content is string -%}
{{- block(message.role, message.content | trim) -}}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'text' -%}
{{- block(message.role, part.text) -}}
{%- elif part.type == 'image' -%}
{{- block('user (mime)', {'type': 'image/jpeg', 'filename': part.filename} | tojson) -}}
{{- block('user (vector)', '<|dummy3|>') -}}
{{- block('image/aux', {'ocr': part.ocr, 'lens_keywords': part.lens_keywords,
    'lens_local_keywords': part.lens_local_keywords} | tojson) -}}
{%- elif part.type == 'video' -%}
{{- block('user (mime)', {'type': 'video/mp4', 'filename': part.filename} | tojson) -}}
{{- block('user (vector)', '<|_unuse_missing_100270|>') -}}
{{- block('video/aux', {'lens_keywords': part.lens_keywords, 'speech_to_text': part.speech_to_text,
    'lens_local_keywords': part.lens_local_keywords} | tojson) -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- if message.role == 'assistant' %}{{ '<|endofturn|>' }}{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}
"""

# One part a message, and no idea of a video: the older release.
DICT_TEMPLATE = """
{%- for message in messages -%}
{%- set content = message.content -%}
{%- if content.type == 'text' -%}
{{- '<|im_start|>' + message.role + '\\n' + content.text + '<|im_end|>\\n' -}}
{%- elif content.type == 'image' -%}
{{- '<|im_start|>user (vector)\\n<|dummy3|><|im_end|>\\n' -}}
{{- '<|im_start|>image/aux\\n{"ocr": "' + content.ocr + '"}<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}
"""

STRING_TEMPLATE = """
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}
"""


@pytest.fixture(scope="session")
def description() -> dict[str, Any]:
    """The tokenizer.json, as a value. `<|endoftext|>` is an ordinary entry too, with its merges."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=460,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    loaded: dict[str, Any] = json.loads(tokenizer.to_str())
    vocabulary, merges = loaded["model"]["vocab"], loaded["model"]["merges"]
    word = "endoftext"
    stems = [(word[:length], word[length]) for length in range(1, len(word))]
    for left, right in [("<", "|"), ("|", ">"), *stems, ("<|", word), (f"<|{word}", "|>")]:
        vocabulary.setdefault(left + right, len(vocabulary))
        merges.append([left, right])
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(loaded))
    tokenizer.add_special_tokens(list(SPECIAL))
    loaded = json.loads(tokenizer.to_str())
    return loaded


@pytest.fixture(scope="session")
def tokenizer(description: dict[str, Any]) -> Tokenizer:
    return Tokenizer(json.dumps(description))


@pytest.fixture(scope="session")
def official(description: dict[str, Any]) -> tokenizers.Tokenizer:
    """What the official encoding does: special-token strings become special tokens."""
    return tokenizers.Tokenizer.from_str(json.dumps(description))


@pytest.fixture(scope="session")
def vision(tokenizer: Tokenizer) -> VisionSpec:
    return VisionSpec(
        tile_size=28,
        candidate_resolutions=((28, 28), (28, 56), (56, 28), (56, 56)),
        image_queries=4,
        video_slow_queries=4,
        video_fast_queries=1,
        first_last_frames_slow=False,
        max_canvases=2,
        image_token_id=tokenizer.special[IMAGE],
        video_token_id=tokenizer.special[VIDEO],
    )
