"""What a model is trained towards. Pretraining: every token predicts the next one of its own document.

Dims: T tokens of a batch, H width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lapis.data.loader import TokenBatch
from lapis.kernels.batch import packed
from lapis.model.families import Decoder


def pretrain_loss(model: Decoder, tokens: TokenBatch) -> Tensor:
    """Mean cross-entropy in nats per token, an fp32 scalar. Attention never crosses a document's border."""
    ids_T, targets_T = torch.from_numpy(tokens.ids_T), torch.from_numpy(tokens.targets_T)
    head = model.head_weight
    assert isinstance(head, Tensor), "a quantised model is not trained"
    x_TH = model.hidden(ids_T, packed(tokens.lengths))
    return model.ops.linear_cross_entropy(x_TH, head, targets_T) / len(ids_T)
