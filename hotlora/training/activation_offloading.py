"""Activations of a GPU in RAM between forward and backward: by TRL's `activation_offloading`, which copies them
while layers compute. Experts' weights are none of them: see `--offload`."""

import torch

from ..base.errors import HotLoraError


def check_activation_offloading(is_asked: bool, device: torch.device | str) -> None:
    """HotLoraError: on a CPU there is no other memory."""
    if is_asked and torch.device(device).type == "cpu":
        raise HotLoraError(
            "activation_offloading moves activations from a GPU's memory into RAM, and this runs on the CPU: leave it "
            "out, or give gradient_checkpointing in its place."
        )
