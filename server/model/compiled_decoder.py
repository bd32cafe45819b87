"""The decoder's layers as one program of compiled loops, where all of them can be had.

What `decoder` does, in the same order, and tested against it. Threads that compute one operation
after another fall asleep between two of them, which in a step of a few rows takes as long as a
fifth of it; here they only wait for each other.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from server.attention.backend import AttentionInputs, PairBackend
from server.kernels.machine import Call, run
from server.model.decoder import Decoder, DecoderLayer
from server.model.layers import RMSNorm
from server.model.packed import PackedLinear
from server.model.pointwise import gate_call, norm_call, rotate_call


def compile_decoder(decoder: Decoder) -> CompiledDecoder | None:
    """None where a part of a layer has no loop of its own."""
    layers = [_parts(layer) for layer in decoder.layers if isinstance(layer, DecoderLayer)]
    known = [layer for layer in layers if layer is not None]
    if not known or len(known) < len(decoder.layers):
        return None
    return CompiledDecoder(decoder, known)


class CompiledDecoder(nn.Module):
    """In the place of a decoder; its embedding and its head stay what they are."""

    def __init__(self, decoder: Decoder, layers: list[_Layer]) -> None:
        super().__init__()
        self.decoder, self.norm = decoder, decoder.norm
        self._layers = layers

    def embed(self, ids: Tensor) -> Tensor:
        return self.decoder.embed(ids)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.decoder.logits(hidden)

    def forward(self, embeds: Tensor, positions: Tensor, attention: AttentionInputs) -> Tensor:
        """embeds [tokens, hidden], positions [tokens] -> normed states [asked, hidden]."""
        rotation = self.decoder.rotary(positions)
        room = _Room.for_tokens(len(embeds), self._layers[0], like=embeds)
        hidden = embeds.clone(memory_format=torch.contiguous_format)
        product: Tensor | None = None  # what is still to be added to hidden
        calls: list[Call] = []
        for layer, cache in zip(self._layers, attention.caches, strict=True):
            num_rotated = layer.num_heads + layer.num_kv_heads
            queries = room.rotated[:, : layer.num_heads]
            keys, values = room.rotated[:, layer.num_heads :], room.heads[:, num_rotated:]
            calls += [
                _norm(layer.input_norm, hidden, room.normed, added=product),
                layer.qkv.call(room.normed, room.heads.flatten(1)),
                rotate_call(room.heads[:, :num_rotated], rotation, room.rotated),
                layer.backend.write_call(keys, values, cache, attention),
            ]
            if layer is self._layers[-1] and attention.asked is not None:
                run(calls)
                rows, attention = attention.asked.rows, attention.asked.attention
                hidden, queries, room = hidden[rows], queries[rows], room.first(len(rows))
                calls = []
            calls += [
                layer.backend.attend_call(queries, room.attended, cache, attention),
                layer.attended.call(room.attended.flatten(1), room.product),
                _norm(layer.inner_norm, hidden, room.normed, added=room.product),
                *_gated(layer.gates, room),
                layer.down.call(room.gated, room.product),
            ]
            product = room.product
        calls.append(_norm(self.norm, hidden, room.normed, added=product))
        run(calls)
        return room.normed


@dataclass(frozen=True, slots=True, eq=False)
class _Layer:
    """The parts of a layer that have loops, by what they do."""

    backend: PairBackend
    num_heads: int
    num_kv_heads: int
    head_dim: int
    input_norm: RMSNorm
    qkv: PackedLinear
    attended: PackedLinear
    inner_norm: RMSNorm
    gates: PackedLinear
    down: PackedLinear


def _parts(layer: DecoderLayer) -> _Layer | None:
    attention, mlp = layer.self_attn, layer.mlp
    qkv, attended = _with_loop(attention.qkv_proj), _with_loop(attention.o_proj)
    gates, down = _with_loop(mlp.gate_up_proj), _with_loop(mlp.down_proj)
    backend = attention.backend
    if qkv is None or attended is None or gates is None or down is None:
        return None
    if not isinstance(backend, PairBackend):
        return None
    return _Layer(
        backend=backend,
        num_heads=attention.num_heads,
        num_kv_heads=attention.num_kv_heads,
        head_dim=attention.head_dim,
        input_norm=layer.input_layernorm,
        qkv=qkv,
        attended=attended,
        inner_norm=layer.post_attention_layernorm,
        gates=gates,
        down=down,
    )


def _with_loop(linear: nn.Module) -> PackedLinear | None:
    if not isinstance(linear, PackedLinear) or not linear.has_blocks:
        return None
    # What fills up the outputs would lie between one row's and the next one's.
    return linear if linear.num_columns == linear.out_features else None


@dataclass(frozen=True, slots=True)
class _Room:
    """Where a layer leaves what it makes; the next one overwrites it."""

    normed: Tensor
    heads: Tensor
    rotated: Tensor
    attended: Tensor
    product: Tensor
    gates: Tensor
    gated: Tensor

    @classmethod
    def for_tokens(cls, num_tokens: int, layer: _Layer, *, like: Tensor) -> _Room:
        def empty(*shape: int) -> Tensor:
            return like.new_empty(num_tokens, *shape)

        return cls(
            normed=empty(layer.qkv.in_features),
            heads=empty(layer.num_heads + 2 * layer.num_kv_heads, layer.head_dim),
            rotated=empty(layer.num_heads + layer.num_kv_heads, layer.head_dim),
            attended=empty(layer.num_heads, layer.head_dim),
            product=empty(layer.down.out_features),
            # Gates and values; nothing where they are multiplied before they are stored.
            gates=empty(0 if layer.gates.can_gate else layer.gates.out_features),
            gated=empty(layer.down.in_features),
        )

    def first(self, num_tokens: int) -> _Room:
        return _Room(*(getattr(self, each.name)[:num_tokens] for each in fields(self)))


def _gated(gates: PackedLinear, room: _Room) -> list[Call]:
    if gates.can_gate:
        return [gates.call(room.normed, room.gated, is_gated=True)]
    return [gates.call(room.normed, room.gates), gate_call(room.gates, room.gated)]


def _norm(norm: RMSNorm, hidden: Tensor, output: Tensor, *, added: Tensor | None) -> Call:
    return norm_call(hidden, norm.weight, output, eps=norm.eps, added=added)
