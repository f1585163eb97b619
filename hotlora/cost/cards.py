"""How long a training step takes on a card, foreseen, and what bounds it.

The cards are as their makers specify them (dense products in bfloat16 that are summed in float32); what a step gets of
that is assumed to be what an H200 got.
"""

from dataclasses import dataclass

from .cluster import H100, H200, H200_SHARES, Machine
from .memory import Step, Storage, activation_bytes, few_bits, memory, transfer_bytes

PCIE_4, PCIE_5 = 31.5e9, 63.0e9
"""Bytes/s each way of 16 lanes; `link_share` of it is counted on."""
DISK = 3e9
"""Bytes/s that an SSD on PCIe is read with; assumed."""
_OURS = {"triton": H200_SHARES["triton"]}  # what these cards' products are made by

CARDS = (
    Machine("RTX 4070", 12e9, 58.3e12, 504e9, PCIE_4, PCIE_4, _OURS),
    Machine("RTX 4080", 16e9, 97.5e12, 717e9, PCIE_4, PCIE_4, _OURS),
    Machine("RTX 4090", 24e9, 165.2e12, 1.008e12, PCIE_4, PCIE_4, _OURS),
    Machine("L40S", 48e9, 362e12, 864e9, PCIE_4, PCIE_4, _OURS),
    H100,
)
T4 = Machine("T4", 16e9, 65e12, 320e9, PCIE_4 / 2, PCIE_4 / 2, {"torch": H200_SHARES["torch"]})
"""Its products are in float16."""
CPU = Machine("a CPU", 0.0, 1e12, 50e9, DISK / 0.8, DISK / 0.8, {"torch": 0.5})
"""For comparing ways on the same one; assumed."""


TYPICAL = CARDS[2]
"""The card that ways are compared on where nothing is known of a run's own."""


def card_named(name: str) -> Machine | None:
    """By what CUDA calls it, as "NVIDIA GeForce RTX 4090"; None: it is not among these."""
    return next((card for card in (*CARDS, H200, T4) if card.name.removesuffix(" SXM") in name), None)


def card_of_size(size: float) -> Machine:
    """The one whose memory is nearest to so many bytes, the larger of two that are as near."""
    return min((*CARDS, H200), key=lambda card: (abs(card.memory - size), -card.memory))


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step, in parts that are at the same time, and in whole."""

    compute: float
    transfer: float
    """Of offloaded experts and activations, while layers compute."""
    step: float

    @property
    def bound(self) -> str:
        return "transfer" if self.transfer > self.compute else "compute"


def step_time(step: Step, storage: Storage, card: Machine) -> StepTime:
    """Of all batches of an optimizer step. Products, or the weights that are read for them if that takes longer;
    quantized experts made dense before each; and transfers. Kernel launches, the optimizer and the data are left out.
    """
    recomputes, batches = storage.gradient_checkpointing, storage.gradient_accumulation_steps
    passes, read = 3 if recomputes else 2, memory(step, storage)["weights"]
    share = card.compute_shares.get("torch") or card.compute_shares["triton"]  # what runs there by itself
    flops = step.flops + (step.recomputed if recomputes else 0)
    compute = max(flops / (card.flops * share), passes * read / card.bandwidth)
    if stored := few_bits(step, storage):  # read packed, written dense, read dense
        cold = sum((layer.up + layer.down) * (1 - layer.hot / layer.num_experts) for layer in step.experts)
        dense = cold if storage.keep_hot else step.expert_weights
        compute += passes * dense * (stored + 2 * step.itemsize) / card.bandwidth
    from_disk = step.on_cpu or storage.offload_folder is not None
    speed = DISK if from_disk else host_link(card) * card.link_share
    transfer = transfer_bytes(step, storage) / speed
    if moved := activation_bytes(step, storage):  # there and back
        transfer += 2 * moved / (host_link(card) * card.link_share)
    return StepTime(batches * compute, batches * transfer, batches * max(compute, transfer))


def host_link(card: Machine) -> float:
    """Bytes/s between a card and its host's memory, each way."""
    return PCIE_5 if card.name.startswith(("H100", "H200")) else PCIE_4
