"""AdamW's step count by row, for parameters some of whose rows are younger than the rest.

AdamW divides its moments by 1 - beta**step to make up for their start at zero, and holds one step for a parameter. A
row that starts anew in an old parameter would lack that correction: its first steps are several times the learning
rate. The counts are part of the optimizer's state, so a checkpoint has them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

_KEY = "row_steps"


def move_rows(optimizer: Any, parameter: nn.Parameter, slots: Sequence[int | None]) -> None:
    """Row n gets AdamW's state of the row `slots[n]`, or that of a parameter which was never stepped.

    parameter: `[N, ...]`. Its values stay as they are.
    """
    state = optimizer.state.get(parameter, {})
    if "step" not in state:  # none of the rows has been stepped
        return
    counts = state.get(_KEY)
    if counts is None:
        counts = torch.full((len(parameter),), float(state["step"]), device=parameter.device)
    state[_KEY] = torch.stack([counts.new_zeros(()) if slot is None else counts[slot] for slot in slots])
    for name in ("exp_avg", "exp_avg_sq"):
        take_rows(state[name], slots, torch.zeros_like(state[name][0]))


def take_rows(tensor: Tensor, slots: Sequence[int | None], fresh: Tensor) -> None:
    """Row n becomes the row of `slots[n]`, or `fresh`."""
    rows = tensor.detach().clone()
    for n, slot in enumerate(slots):
        tensor.data[n] = fresh if slot is None else rows[slot]


@torch.no_grad()
def step_rows(optimizer: Any) -> None:
    """Before `optimizer.step()`: steps the parameters that `move_rows` has seen, their rows by their own counts, and
    takes their gradients away, so that the optimizer leaves them out."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # inside of Accelerate's
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if _KEY in state and parameter.grad is not None:
                _step(parameter, state, group)
                parameter.grad = None


def _step(parameter: nn.Parameter, state: dict[str, Any], group: dict[str, Any]) -> None:
    wholes = (parameter.data, state["exp_avg"], state["exp_avg_sq"])
    assert parameter.grad is not None
    for count in state[_KEY].unique():
        rows = (state[_KEY] == count).nonzero()[:, 0]
        values, mean, square = (whole[rows] for whole in wholes)
        beta1, beta2 = group["betas"]
        adamw(
            [values], [parameter.grad[rows]], [mean], [square], [], [count.clone()],
            foreach=group["foreach"], fused=group["fused"], capturable=group["capturable"],
            amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"],
            eps=group["eps"], maximize=group["maximize"],
        )  # fmt: skip
        for whole, part in zip(wholes, (values, mean, square), strict=True):
            whole[rows] = part
    state[_KEY] += 1
    state["step"] += 1
