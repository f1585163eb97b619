"""What one of `bench`'s processes does: builds one contender, counts what a step costs, and times steps."""

import gc
import time
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..base.heap import free
from ..base.precision import is_fast_on_cpu
from ..cost.activations import SavedBytes, autocast
from ..cost.estimate import sized_config, torch_dtype
from ..hf.forward import PROBED
from ..hf.internals import internal
from ..hf.moe_layers import attention_modules, moe_layers
from ..routing.plan import ExpertPlan
from ..routing.profiler import profile_routing
from ..training.labelled_loss import LabelledLoss
from .contenders import BenchConfig, Contender, RandomModel, adapted, skew_routers, spreads_for

PARTS = ("step", "forward", "backward", "optimizer")
_SKEWED_ON = 512  # tokens; the routing that is reported is that of the whole batch
_CUDA_COPIES = ("Memcpy", "Memset")


class Worker:
    """One contender: its model, its adapters, its optimizer. `prepare` comes first; then any number of `turn`s."""

    def __init__(self, config: BenchConfig, contender: Contender) -> None:
        self.config, self.contender = config, contender
        self.device = torch.device(config.device)
        self.config_of_model = sized_config(config.model, config.layers)
        self.dtype = torch_dtype(config.dtype, self.config_of_model)
        self._generator = torch.Generator().manual_seed(config.seed)
        self.input_ids = self._tokens()
        self._base: RandomModel | None = None

    def ready(self) -> bool:
        """Answers once the process has imported everything."""
        return True

    def calibrate(self) -> dict[str, Any]:
        """What all contenders share: the routers' spreads, the routing that comes of them, plans, and the machine's
        matrix rate."""
        rate = matrix_rate(self.dtype, self.device)
        model = self._random().model
        some = self.input_ids[: max(1, _SKEWED_ON // self.input_ids.shape[1]), :_SKEWED_ON]
        spreads = spreads_for(model, some, self.config.cv, self.config.seed)
        skew_routers(model, spreads, self.config.seed)
        profile = profile_routing(model, [{"input_ids": self.input_ids}])
        chosen = {contender.name: contender.plan(profile) for contender in self.config.all_contenders()}
        plans = {name: plan.to_dict() for name, plan in chosen.items() if plan is not None}
        plain = {name: getattr(profile, name) for name in ("layers", "num_tokens", "num_experts_per_tok")}
        plain |= {"counts": profile.counts.tolist(), "mass": profile.mass.tolist()}
        return {"rate": rate, "spreads": spreads, "plans": plans, "profile": plain}

    def prepare(self, spreads: list[float], plan: dict[str, Any] | None) -> dict[str, Any]:
        """Builds everything, and counts what needs no clock."""
        base = self._random()
        skew_routers(base.model, spreads, self.config.seed)
        blocks = _moe_blocks(base.model)
        if self.device.type == "cuda":  # as TRL's trainer does: a loss without the whole of the logits
            internal("trl.trainer.utils:add_fused_lm_head")(base.model)
        chosen = None if plan is None else ExpertPlan.from_dict(plan)
        self.model = adapted(base.model, self.contender, chosen, self.config.r)
        self._labelled = LabelledLoss(self.model, range(1, PROBED))
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5, weight_decay=0.0, fused=True)
        self.step()  # makes AdamW's state
        measured = {
            "trainable": sum(p.numel() for p in self.trained),
            "peak_memory_bytes": self._peak_memory(),
            "saved_bytes_per_token_layer": self._saved_bytes(blocks) / self.config.tokens / len(blocks),
            "operations": self._operations(),
        }
        self._sleep()
        return measured

    def turn(self) -> dict[str, float]:
        """Seconds of one step and of its parts."""
        self._random().wake()
        self.step()  # allocators start from nothing after a sleep, and a training's step follows another one
        times = self.step()
        self._sleep()
        return times

    def step(self) -> dict[str, float]:
        """Seconds of a step and of its parts, by PARTS' names."""
        self.input_ids.copy_(self._tokens())  # in place: a profiler warns of what is freed that it did not see made
        clock = _Clock(self.device)
        loss = self.loss()
        clock.mark()
        loss.backward()
        clock.mark()
        self.optimizer.step()
        self.optimizer.zero_grad()
        clock.mark()
        return dict(zip(PARTS, clock.seconds(), strict=True))

    def loss(self) -> Tensor:
        """The mean, as training has it on this device; for all contenders the same."""
        with autocast(self.device.type, self.dtype):
            if self.device.type == "cuda":
                return self.model(input_ids=self.input_ids, labels=self.input_ids, fused_lm_head=True).loss
            _, loss, count = self._labelled(self.model, {"input_ids": self.input_ids}, self.input_ids)
            return loss / count

    def _tokens(self) -> Tensor:
        """A batch, another one each time, as in training: libraries keep what they made for a shape, and how many rows
        an expert gets is such a shape. All contenders get the same ones."""
        assert self.config.length is not None
        shape = (self.config.tokens // self.config.length, self.config.length)
        vocabulary = self.config_of_model.get_text_config().vocab_size
        return torch.randint(vocabulary, shape, generator=self._generator).to(self.device)

    def _random(self) -> RandomModel:
        if self._base is None:
            self._base = RandomModel(self.config_of_model, self.dtype, self.device, self.config.seed)
        return self._base

    def _sleep(self) -> None:
        self._random().sleep()
        if self.device.type == "cuda":
            free()

    def _peak_memory(self) -> int:
        """The most that tensors take during a step: the model, its adapters, AdamW's state, and all that the step
        makes. What an allocator or a matrix library holds besides is not in it."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.step()
            return torch.cuda.max_memory_allocated(self.device)
        state = [value for values in self.optimizer.state.values() for value in values.values()]
        resting = {
            t.untyped_storage()._cdata: t.untyped_storage().nbytes()
            for t in (*self.model.parameters(), *self.model.buffers(), *state)
        }
        return sum(resting.values()) + _peak_allocated(self.step)

    def _saved_bytes(self, blocks: list[nn.Module]) -> int:
        """What autograd keeps of the forwards of the MoE blocks."""
        saved = SavedBytes(self.model)
        handles = []
        for block in blocks:
            handles.append(block.register_forward_pre_hook(lambda *_: saved.__enter__() and None))
            handles.append(block.register_forward_hook(lambda *_: saved.__exit__(None, None, None)))
        loss = self.loss()
        for handle in handles:
            handle.remove()
        loss.backward()
        self.optimizer.zero_grad()
        return saved.total

    def _operations(self) -> int:
        """Kernels that a step launches on a GPU; on the CPU, operations that torch dispatches."""
        if self.device.type != "cuda":
            with _CountOperations() as counter:
                self.step()
            return counter.number
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profiler:
            self.step()
        on_gpu = (e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA)
        return sum(not event.name.startswith(_CUDA_COPIES) for event in on_gpu)


def matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a large square product, the best of several: what the machine gives at most in this dtype. A small one
    on a CPU without instructions for it, where a large one takes minutes."""
    size = 8192 if device.type == "cuda" else 2048 if is_fast_on_cpu(dtype) else 256
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best, until = float("inf"), time.perf_counter() + 1.0
    for i in range(50):
        clock = _Clock(device)
        a @ b
        clock.mark()
        best = min(best, clock.seconds()[0])
        if i >= 3 and time.perf_counter() > until:
            break
    return 2 * size**3 / best


def _moe_blocks(model: nn.Module) -> list[nn.Module]:
    """The module around each experts module and its router; the experts alone where that is the decoder layer."""
    attention = attention_modules(model)
    paths = []
    for layer in moe_layers(model):
        block = layer.experts.rpartition(".")[0]
        paths.append(layer.experts if any(path.startswith(f"{block}.") for path in attention) else block)
    return [model.get_submodule(path) for path in paths]


class _Clock:
    """Seconds between marks, first the whole. On a GPU by its own clock, so that nothing waits in between."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        if self._on_gpu:
            torch.cuda.synchronize(device)
        self._marks: list[Any] = []
        self.mark()

    def mark(self) -> None:
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        if self._on_gpu:
            self._marks[-1].synchronize()
        spans = [(self._marks[0], self._marks[-1]), *zip(self._marks, self._marks[1:], strict=False)]
        return [a.elapsed_time(b) / 1000 if self._on_gpu else b - a for a, b in spans]


def _peak_allocated(run: Callable[[], Any]) -> int:
    """The most bytes that torch's CPU allocator hands out during `run`, above what it had before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    assert profiler.profiler is not None
    found = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    found.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in found), initial=0))


class _CountOperations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return func(*args, **(kwargs or {}))
