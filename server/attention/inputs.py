"""What one step of the decoder tells its attention: tensors only, no requests and no sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class LayerCache:
    """The keys and values of one layer. Their layout belongs to the backend that allocated them."""

    keys: Tensor
    values: Tensor


@dataclass(frozen=True, slots=True)
class AskedTokens:
    """The tokens of a step whose final states are asked for; for all others the last layer only
    has to leave keys and values."""

    rows: Tensor
    """int64 [asked], where they stand among the tokens of the step."""
    attention: AttentionInputs
    """Of those tokens alone, which must be the last of their sequences."""


@dataclass(frozen=True, slots=True)
class AttentionInputs:
    """One batch of sequences laid end to end, and where their keys and values lie.

    The tokens of sequence i are the half-open range [cu_seq_q[i], cu_seq_q[i + 1]) and are the
    *last* tokens of its first `seqused_k[i]` positions: it sees all of those, causally. Position p
    of sequence i lies in page `block_table[i, p // page_size]`; columns after its last page are
    never read. The semantics are those of `torch.nn.attention.varlen.varlen_attn`.
    """

    caches: Sequence[LayerCache]
    """One for each layer of the decoder."""
    cu_seq_q: Tensor
    """int32 [sequences + 1], from 0 to the number of tokens."""
    seqused_k: Tensor
    """int32 [sequences], this step's tokens included."""
    block_table: Tensor
    """int32 [sequences, max_pages]."""
    slot_mapping: Tensor
    """int64 [tokens]: page * page_size + offset, where each token's key and value are written."""
    max_q: int
    """The most tokens of any sequence in this batch."""
    max_k: int
    """The largest of `seqused_k`."""
    asked: AskedTokens | None = None
    """None where all are asked for."""
