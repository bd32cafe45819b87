"""The demo model's chat template, and the same layout in Python for training.

The template is what ships and what the server renders; `segments` exists because training renders
millions of turns, and a test holds the two together.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from tools.demo_model.questions import Conversation, Medium
from tools.demo_model.scenes import Clip

IMAGE_TOKEN = "<|dummy3|>"
VIDEO_TOKEN = "<|_unuse_missing_100270|>"
IMAGE_HINT = (
    "다음 중 ocr은 사진에서 검출된 글자이고, "
    "lens_keyword는 사진에서 추출된 keyword와 bbox 위치입니다. "
    "bbox는 0~1 사이로 정규화된 [x1, y1, x2, y2]의 형태입니다. 참고하여 답변하세요. "
)
VIDEO_HINT = (
    "다음 중 lens_keyword는 영상에서 추출된 keyword와 bbox 위치입니다. "
    "bbox는 0~1 사이로 정규화된 [x1, y1, x2, y2]의 형태입니다. 참고하여 답변하세요. "
)

CHAT_TEMPLATE = (
    (
        """\
{%- macro text_of(content) -%}
{%- if content is string -%}
{{- content -}}
{%- elif content is mapping -%}
{{- content.text | default('', true) -}}
{%- elif content is iterable -%}
{%- for part in content -%}{{- part.text | default('', true) -}}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- macro user_part(part) -%}
{%- if part is string -%}
{{- '<|im_start|>user\\n' + part + '<|im_end|>\\n' -}}
{%- elif part.type in ('image', 'image_url') -%}
{{- '<|im_start|>user (mime)\\n{"type": "image/jpeg", "filename": ' -}}
{{- part.filename | default('', true) | tojson -}}
{{- '}<|im_end|>\\n<|im_start|>user (vector)\\n<|dummy3|><|im_end|>\\n<|im_start|>image/aux\\n' -}}
{{- 'IMAGE_HINT{"ocr": ' -}}
{{- part.ocr | default('', true) | tojson -}}
{{- ', "lens_keywords": ' -}}
{{- part.lens_keywords | default('', true) | tojson -}}
{{- ', "lens_local_keywords": ' -}}
{{- part.lens_local_keywords | default('', true) | tojson -}}
{%- if part.speech_to_text -%}
{{- ', "speech_to_text": ' + part.speech_to_text | tojson -}}
{%- endif -%}
{{- '}<|im_end|>\\n' -}}
{%- elif part.type in ('video', 'video_url') -%}
{{- '<|im_start|>user (mime)\\n{"type": "video/mp4", "filename": ' -}}
{{- part.filename | default('', true) | tojson -}}
{{- '}<|im_end|>\\n<|im_start|>user (vector)\\n<|_unuse_missing_100270|><|im_end|>\\n' -}}
{{- '<|im_start|>video/aux\\nVIDEO_HINT{"ocr": ' -}}
{{- part.ocr | default('', true) | tojson -}}
{{- ', "lens_keywords": ' -}}
{{- part.lens_keywords | default('', true) | tojson -}}
{{- ', "lens_local_keywords": ' -}}
{{- part.lens_local_keywords | default('', true) | tojson -}}
{{- ', "speech_to_text": ' -}}
{{- part.speech_to_text | default('', true) | tojson -}}
{{- '}<|im_end|>\\n' -}}
{%- else -%}
{{- '<|im_start|>user\\n' -}}{{- part.text | default('', true) -}}{{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- endmacro -%}
{{- '<|im_start|>tool_list\\n' -}}
{%- if tools -%}
{{- '[' -}}
{%- for tool in tools -%}
{{- (tool.function if tool.function is defined else tool) | tojson -}}
{%- if not loop.last -%}{{- ', ' -}}{%- endif -%}
{%- endfor -%}
{{- ']' -}}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- if not messages or messages[0].role not in ('system', 'developer') -%}
{{- '<|im_start|>system\\n<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role in ('system', 'developer') -%}
{{- '<|im_start|>system\\n' -}}{{- text_of(message.content) -}}{{- '<|im_end|>\\n' -}}
{%- elif message.role == 'user' -%}
{%- if message.content is string or message.content is mapping -%}
{{- user_part(message.content) -}}
{%- else -%}
{%- for part in message.content -%}{{- user_part(part) -}}{%- endfor -%}
{%- endif -%}
{%- elif message.role == 'assistant' -%}
{%- if message.tool_calls -%}
{{- '<|im_start|>assistant' -}}
{%- if message.content -%}
{{- '\\n' -}}{{- text_of(message.content) -}}{{- '<|im_end|>\\n<|im_start|>assistant' -}}
{%- endif -%}
{{- ' -> tool/function_call\\n[' -}}
{%- for call in message.tool_calls -%}
{{- '{"name": ' -}}{{- call.function.name | tojson -}}{{- ', "arguments": ' -}}
{%- if call.function.arguments is string -%}
{{- call.function.arguments -}}
{%- else -%}
{{- call.function.arguments | tojson -}}
{%- endif -%}
{{- '}' -}}
{%- if not loop.last -%}{{- ', ' -}}{%- endif -%}
{%- endfor -%}
{{- ']<|im_end|><|stop|>\\n' -}}
{%- else -%}
{{- '<|im_start|>assistant\\n' -}}{{- text_of(message.content) -}}
{{- '<|im_end|><|endofturn|>\\n' -}}
{%- endif -%}
{%- elif message.role == 'tool' -%}
{{- '<|im_start|>tool/function_call\\n' -}}{{- text_of(message.content) -}}{{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
    )
    .replace("IMAGE_HINT", IMAGE_HINT)
    .replace("VIDEO_HINT", VIDEO_HINT)
)


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of prompt text. Only `answer` segments count in the loss."""

    text: str
    answer: bool = False


def quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def part_text(medium: Medium) -> str:
    video = isinstance(medium.content, Clip)
    mime, token, aux, hint = (
        ("video/mp4", VIDEO_TOKEN, "video/aux", VIDEO_HINT)
        if video
        else ("image/jpeg", IMAGE_TOKEN, "image/aux", IMAGE_HINT)
    )
    speech = ', "speech_to_text": ""' if video else ""
    return (
        f'<|im_start|>user (mime)\n{{"type": "{mime}", "filename": {quoted(medium.filename)}}}'
        f"<|im_end|>\n<|im_start|>user (vector)\n{token}<|im_end|>\n<|im_start|>{aux}\n{hint}"
        f'{{"ocr": {quoted(medium.ocr)}, "lens_keywords": "", "lens_local_keywords": ""{speech}}}'
        "<|im_end|>\n"
    )


def segments(conversation: Conversation, *, upto: int | None = None) -> list[Segment]:
    """The conversation as text. With `upto`, the prompt of that turn: no answer from there on."""
    opening = "<|im_start|>tool_list\n<|im_end|>\n<|im_start|>system\n"
    opening += f"{conversation.system or ''}<|im_end|>\n"
    media = "".join(part_text(medium) for medium in conversation.media)
    parts = []
    for index, turn in enumerate(conversation.turns):
        question = f"<|im_start|>user\n{turn.question}<|im_end|>\n"
        if index == 0:
            question = question + media if conversation.text_first else media + question
            question = opening + question
        parts.append(Segment(question + "<|im_start|>assistant\n"))
        if upto == index:
            break
        parts.append(Segment(f"{turn.answer}<|im_end|><|endofturn|>", answer=True))
        parts.append(Segment("\n"))
    return parts


def messages(conversation: Conversation, *, upto: int) -> list[dict[str, Any]]:
    """The same as chat messages, media parts without their data."""
    result: list[dict[str, Any]] = []
    if conversation.system:
        result.append({"role": "system", "content": conversation.system})
    for index, turn in enumerate(conversation.turns[: upto + 1]):
        content: Any = turn.question
        if index == 0 and conversation.media:
            parts: list[dict[str, Any]] = []
            for medium in conversation.media:
                kind = "video" if isinstance(medium.content, Clip) else "image"
                parts.append(
                    {"type": kind, kind: "", "filename": medium.filename, "ocr": medium.ocr}
                )
            text = [{"type": "text", "text": turn.question}]
            content = text + parts if conversation.text_first else parts + text
        result.append({"role": "user", "content": content})
        if index < upto:
            result.append({"role": "assistant", "content": turn.answer})
    return result
