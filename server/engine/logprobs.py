"""Log-probabilities of tokens, from the logits as the model made them; knows no requests.

Nothing is sorted but the few that are told.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from server.core import TokenLogprobs


def token_logprobs(
    logits: Tensor, token_ids: Sequence[int], num_top: Sequence[int]
) -> list[TokenLogprobs]:
    """logits float32 [rows, ids] -> of each row its token and its `num_top` likeliest.

    NaN where the row holds one, or no id at all may come.
    """
    normalisers = logits.logsumexp(dim=-1, keepdim=True)
    chosen = logits.gather(1, torch.tensor(token_ids, device=logits.device)[:, None])
    values, ids = logits.topk(min(max(num_top), logits.shape[1]), dim=-1)
    return [
        TokenLogprobs(token_id, logprob, tuple(zip(top_ids[:num], top[:num], strict=True)))
        for token_id, logprob, top_ids, top, num in zip(
            token_ids,
            (chosen - normalisers)[:, 0].tolist(),
            ids.tolist(),
            (values - normalisers).tolist(),
            num_top,
            strict=True,
        )
    ]
