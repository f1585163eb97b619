"""The loss of a step on a CPU: the LM head at the positions that have a label, a chunk of them at a time.

Without Triton, TRL takes the head and the loss at every position, the prompt's and the padding too: two fifths of a
small model's step. All logits at once are too much as well: 4,000 labels and 100,000 words are 1.6 GB in float32,
several times over in a backward pass.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..hf.forward import LOGITS, head_for_chunks, hidden_at, logits_at
from ..tasks.tokens import IGNORE


class LabelledLoss:
    """Sums the cross-entropy of a batch's labels.

    Args:
        model: a causal LM, with adapters or not, in no wrapper of several processes.
        ids: a text, to try once whether the family's logits are its head's.
    """

    def __init__(self, model: Any, ids: Sequence[int]):
        self.model, self.ids = model, ids

    def __call__(self, model: Any, inputs: Mapping[str, Any], labels: Tensor) -> tuple[Any, Tensor, Tensor]:
        """The model's outputs, the sum in nats, and how many labels there are.

        model: the one of `__init__`, or a wrapper of it. labels: token ids `[B, S]`, IGNORE where there is none; each
        is what the position before should say.
        """
        labels = labels[:, 1:]
        positions = (labels != IGNORE).any(0).nonzero()[:, 0]
        labels = labels[:, positions]
        found = labels != IGNORE
        head = head_for_chunks(self.model, labels, self.ids)
        if head is not None and not any(weight.requires_grad for weight in head.parameters()):
            outputs, hidden = hidden_at(model, inputs, positions, head)
            loss = chunked_loss(head, hidden[found], labels[found])
        else:
            outputs = logits_at(model, inputs, positions)
            loss = torch.nn.functional.cross_entropy(outputs.logits[found].float(), labels[found], reduction="sum")
        return outputs, loss, found.sum()


def chunked_loss(head: nn.Module, hidden_ND: Tensor, labels_N: Tensor) -> Tensor:
    """The sum of the cross-entropy of `head(hidden)`, in nats, with no more than LOGITS logits at a time.

    The gradient of `hidden` is taken on the way forward, so that the head runs once; the head's own weights get none.

    Args:
        head: the LM head, whose weights do not train.
        hidden_ND: its input at each position that has a label.
        labels_N: token ids.
    """
    loss: Tensor = _ChunkedLoss.apply(hidden_ND, head, labels_N)
    return loss


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, head: nn.Module, labels_N: Tensor) -> Tensor:
        wants = ctx.needs_input_grad[0]
        total = torch.zeros((), device=hidden_ND.device)
        gradient = torch.empty_like(hidden_ND) if wants else None
        with torch.no_grad():
            rows = max(1, LOGITS // head(hidden_ND[:1]).shape[-1])
        for start in range(0, len(hidden_ND), rows):
            part = slice(start, start + rows)
            with torch.set_grad_enabled(wants):
                hidden = hidden_ND[part].detach().requires_grad_(wants)
                loss = torch.nn.functional.cross_entropy(head(hidden).float(), labels_N[part], reduction="sum")
                if gradient is not None:
                    (gradient[part],) = torch.autograd.grad(loss, hidden)
            total += loss.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad, None, None
