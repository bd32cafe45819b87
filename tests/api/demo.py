"""The demo checkpoint's own tokenizer and template, for tests of the API with a scripted engine."""

from __future__ import annotations

from server.chat.prepare import ModelFacts, Preparer
from server.chat.template import ChatTemplate
from server.chat.tokenizer import Tokenizer
from server.config import MediaConfig
from server.grammar.prover import Prover
from server.hub import find_checkpoint
from server.model.config import read_checkpoint

CONTEXT = 200


def demo_preparer(context_length: int = CONTEXT) -> Preparer:
    """A real preparer for text, with a short context. Pictures are nothing for it."""
    info = read_checkpoint(find_checkpoint(None).folder)
    spec = info.vision
    assert spec is not None and spec.video_token_id is not None
    tokenizer = Tokenizer.from_folder(
        info.path, reserved_ids=[spec.image_token_id, spec.video_token_id]
    )
    template = ChatTemplate.from_folder(
        info.path, tokenizer, revision_layout=info.revision_layout, vision=spec
    )
    facts = ModelFacts(
        context_length=context_length,
        stop_token_ids=info.stop_token_ids,
        im_end_id=info.turn_end_token_id,
        vision=spec,
    )
    return Preparer(
        tokenizer,
        template,
        facts=facts,
        limits=MediaConfig(),
        media=None,
        prover=Prover(info.path),
    )
