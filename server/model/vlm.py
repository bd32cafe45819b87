"""The whole model: a decoder, and for vision checkpoints a tower and a projector before it.

Knows tiles, layouts and ids; knows nothing of requests, prompts or sampling.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from server.attention.backend import AttentionBackend, AttentionInputs
from server.core import VisionLayout
from server.model.compiled_decoder import CompiledDecoder
from server.model.config import CheckpointInfo
from server.model.decoder import Decoder
from server.model.projector import PROJECTORS
from server.model.vision_tower import VisionTower


class VisionLanguageModel(nn.Module):
    """Built without weights: `server.model.checkpoint.load_model` makes a usable one."""

    def __init__(self, info: CheckpointInfo, backend: AttentionBackend) -> None:
        super().__init__()
        text = info.text
        beyond = range(info.tokenizer_size, text.logits_rows)
        tokenless = [i for i in (*info.missing_token_ids, *beyond) if i < text.logits_rows]
        self.language_model: Decoder | CompiledDecoder = Decoder(
            text, backend, tokenless_ids=tokenless
        )
        self.vision_model: VisionTower | None = None
        self.mm_projector: nn.Module | None = None
        self.image_newline: nn.Parameter | None = None
        if info.tower is not None and info.projector is not None and info.vision is not None:
            self.vision_model = VisionTower(info.tower, info.vision)
            self.mm_projector = PROJECTORS[info.projector.kind](info.projector)
            self.image_newline = nn.Parameter(torch.empty(text.hidden_size))

    def start_tiles(self, tiles: Tensor) -> Tensor:
        """uint8 [tiles, size, size, 3], of whatever media -> states [tiles, patches, channels]."""
        return self._tower().start(tiles)

    def advance_tiles(self, states: Tensor, stages: range, num_stages: int) -> Tensor:
        """States after these stages of the tower: any `num_stages` of them are its layers."""
        return self._tower().advance(states, stages, num_stages)

    def finish_tiles(self, states: Tensor, queries: Sequence[int]) -> list[Tensor]:
        """States after all stages -> features [queries[i], hidden] of tile i."""
        if self.mm_projector is None:
            raise ValueError("a text checkpoint has no projector")
        features: list[Tensor] = self.mm_projector(states, queries)
        return features

    def embed(self, ids: Tensor) -> Tensor:
        """ids [tokens] -> [tokens, hidden]."""
        return self.language_model.embed(ids)

    def forward(self, embeds: Tensor, positions: Tensor, attention: AttentionInputs) -> Tensor:
        """embeds [tokens, hidden], positions [tokens] -> normed states [asked, hidden]."""
        hidden: Tensor = self.language_model(embeds, positions, attention)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [rows, hidden] -> float32 [rows, logits_rows]; ids without a token are -inf."""
        return self.language_model.logits(hidden)

    def assemble(self, features: list[Tensor], layout: VisionLayout) -> Tensor:
        """The features of one medium's tiles -> [num_tokens, hidden], in the decoder's order."""
        if layout.local_grid is not None and layout.kept is not None:
            local = self._kept_rows(torch.stack(features[1:]), layout)
            tokens = torch.cat([features[0], local])
        elif layout.newline:
            tokens = torch.cat([*features, self._newline(features[0])[None]])
        else:
            tokens = torch.cat(features)
        tokens = tokens.to(self.language_model.norm.weight.dtype)
        if len(tokens) != layout.num_tokens:
            raise ValueError(f"{len(tokens)} features for {layout.num_tokens} placeholders")
        return tokens

    def _tower(self) -> VisionTower:
        if self.vision_model is None:
            raise ValueError("a text checkpoint has no vision tower")
        return self.vision_model

    def _kept_rows(self, tiles: Tensor, layout: VisionLayout) -> Tensor:
        """tiles [rows * columns, side * side, hidden], row-major -> the kept map, flattened.

        The tiles are put side by side in two dimensions, what shows only padding is cropped, and
        each row that is left ends with the newline embedding.
        """
        assert layout.local_grid is not None and layout.kept is not None
        side, (tile_rows, tile_columns) = math.isqrt(tiles.shape[1]), layout.local_grid
        grid = tiles.view(tile_rows, tile_columns, side, side, -1)
        # [tile rows, tile columns, y, x, hidden] -> [tile rows * y, tile columns * x, hidden]
        whole = grid.transpose(1, 2).flatten(2, 3).flatten(0, 1)
        top, left, rows, columns = layout.kept
        kept = whole[top : top + rows, left : left + columns]
        if layout.newline:
            newline = self._newline(kept).expand(len(kept), 1, -1)
            kept = torch.cat([kept, newline], dim=1)
        return kept.flatten(0, 1)

    def _newline(self, like: Tensor) -> Tensor:
        assert self.image_newline is not None
        newline: Tensor = self.image_newline.to(like.dtype)
        return newline
