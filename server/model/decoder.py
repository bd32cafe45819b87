"""The text decoder: a Llama over a paged cache, with everything it reads in the signature.

Modules carry the checkpoint's names below `language_model.model.` (`model.` for text checkpoints).
"""

import torch
from torch import Tensor, nn

from server.attention.backend import AskedTokens, AttentionBackend, AttentionInputs, LayerCache
from server.model.config import TextConfig
from server.model.layers import FusedLinear, GatedMLP, RMSNorm, RotaryEmbedding, project, rotate


class Attention(nn.Module):
    def __init__(self, config: TextConfig, backend: AttentionBackend) -> None:
        super().__init__()
        self.backend = backend
        self.head_dim = config.head_dim
        query_size = config.num_heads * config.head_dim
        kv_size = config.num_kv_heads * config.head_dim
        bias = config.attention_bias
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        parts = {"q_proj": query_size, "k_proj": kv_size, "v_proj": kv_size}
        self.qkv_proj = FusedLinear(config.hidden_size, parts, bias=bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=bias)

    def forward(
        self,
        hidden: Tensor,
        rotation: tuple[Tensor, Tensor],
        attention: AttentionInputs,
        cache: LayerCache,
        asked: AskedTokens | None,
    ) -> Tensor:
        heads = project(self.qkv_proj, hidden).view(len(hidden), -1, self.head_dim)
        # Queries and keys are rotated together: [tokens, heads + kv_heads, head_dim].
        rotated = rotate(heads[:, : self.num_heads + self.num_kv_heads], rotation)
        queries, keys = rotated.split_with_sizes([self.num_heads, self.num_kv_heads], dim=1)
        values = heads[:, -self.num_kv_heads :]
        self.backend.write(keys, values, cache, attention)
        if asked is not None:
            queries, attention = queries[asked.rows], asked.attention
        attended = self.backend.attend(queries, cache, attention)
        return project(self.o_proj, attended.flatten(1))


class DecoderLayer(nn.Module):
    def __init__(self, config: TextConfig, backend: AttentionBackend) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config, backend)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)

    def forward(
        self,
        hidden: Tensor,
        rotation: tuple[Tensor, Tensor],
        attention: AttentionInputs,
        cache: LayerCache,
        asked: AskedTokens | None,
    ) -> Tensor:
        """hidden [tokens, hidden] -> the same; [asked, hidden] where only some are asked for."""
        normed = self.input_layernorm(hidden)
        attended = self.self_attn(normed, rotation, attention, cache, asked)
        hidden = (hidden if asked is None else hidden[asked.rows]) + attended
        output: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return output


class Decoder(nn.Module):
    """Embeddings in, last hidden states out; `embed` and `logits` are its two ends."""

    tokenless_ids: Tensor

    def __init__(
        self, config: TextConfig, backend: AttentionBackend, *, tokenless_ids: list[int]
    ) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.embedding_rows, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, backend) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary = RotaryEmbedding(
            config.head_dim, theta=config.rope_theta, scaling=config.rope_scaling
        )
        self.lm_head = nn.Linear(config.hidden_size, config.logits_rows, bias=False)
        if config.is_tied:
            self.lm_head.weight = self.embed_tokens.weight
        ids = torch.tensor(tokenless_ids, dtype=torch.int64, device="cpu")
        self.register_buffer("tokenless_ids", ids, persistent=False)

    def embed(self, ids: Tensor) -> Tensor:
        """ids [tokens] -> [tokens, hidden]."""
        embeds: Tensor = self.embed_tokens(ids)
        return embeds

    def forward(self, embeds: Tensor, positions: Tensor, attention: AttentionInputs) -> Tensor:
        """embeds [tokens, hidden], positions [tokens] -> normed states [asked, hidden].

        Asked are those that `attention` says, or all tokens.
        """
        rotation = self.rotary(positions)
        hidden = embeds
        for layer, cache in zip(self.layers, attention.caches, strict=True):
            is_last = layer is self.layers[-1]
            hidden = layer(hidden, rotation, attention, cache, attention.asked if is_last else None)
        normed: Tensor = self.norm(hidden)
        return normed

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [rows, hidden] -> float32 [rows, logits_rows]; ids without a token are -inf."""
        logits = project(self.lm_head, hidden).float()
        return logits.index_fill_(1, self.tokenless_ids, -torch.inf)
