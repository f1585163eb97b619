"""Fine-tune Mixture-of-Experts language models where they already work.

    profile = hotlora.profile_routing(model, batches)
    plan    = hotlora.select_experts(profile, rule="hot", fraction=0.25)
    config  = hotlora.HotLoraConfig(plan=plan, r=32, lora_alpha=64)
    model   = peft.get_peft_model(model, config)

`hotlora.train(model, data)` does all of it, and trains.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# name -> the module that holds it. Imported when first asked for, so that `hotlora --help` does not load torch.
_PUBLIC = {
    "add_runs": "report.leaderboard_folder",
    "ExpertsQuantization": "adapter.quantize",
    "export_adapter": "api",
    "import_adapter": "adapter.formats.import_peft",
    "DataError": "base.errors",
    "ExpertPlan": "routing.plan",
    "FileError": "base.errors",
    "HotLoraConfig": "adapter.config",
    "HotLoraError": "base.errors",
    "ModelError": "base.errors",
    "PlanError": "base.errors",
    "RoutingProfile": "routing.profile",
    "Routes": "routing.routes",
    "Verification": "engines.verify",
    "Run": "runs.load",
    "base_quantization": "adapter.load",
    "compare_examples": "report.paired",
    "compare_runs": "report.comparison",
    "count_parameters": "adapter.count",
    "evaluate": "api",
    "import_profile": "routing.imported",
    "import_scores": "routing.imported",
    "jaccard": "routing.profile",
    "leaderboard": "report.leaderboard",
    "load": "runs.load",
    "load_adapter": "runs.load",
    "load_model": "adapter.load",  # the folder makes it take checkpoints in MXFP4 and FP8
    "load_tokenizer": "hf.models",
    "profile": "api",
    "profile_routing": "routing.profiler",
    "quantize_experts": "adapter.quantize",
    "record_routing": "routing.routes",
    "replay_routing": "routing.replay",
    "run_sweep": "runs.sweep",
    "select_experts": "routing.plan",
    "train": "api",
    "verify_export": "engines.verify",
    "write_report": "report.page",
}

_MODULES = ("data", "plots")

__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:  # what `__getattr__` gives, for type checkers and editors
    from . import data as data
    from . import plots as plots
    from .adapter.config import HotLoraConfig as HotLoraConfig
    from .adapter.count import count_parameters as count_parameters
    from .adapter.formats.import_peft import import_adapter as import_adapter
    from .adapter.load import base_quantization as base_quantization
    from .adapter.quantize import ExpertsQuantization as ExpertsQuantization
    from .adapter.quantize import quantize_experts as quantize_experts
    from .api import evaluate as evaluate
    from .api import export_adapter as export_adapter
    from .api import profile as profile
    from .api import train as train
    from .base.errors import DataError as DataError
    from .base.errors import FileError as FileError
    from .base.errors import HotLoraError as HotLoraError
    from .base.errors import ModelError as ModelError
    from .base.errors import PlanError as PlanError
    from .engines.verify import Verification as Verification
    from .engines.verify import verify_export as verify_export
    from .hf.models import load_model as load_model
    from .hf.models import load_tokenizer as load_tokenizer
    from .report.comparison import compare_runs as compare_runs
    from .report.leaderboard import leaderboard as leaderboard
    from .report.leaderboard_folder import add_runs as add_runs
    from .report.page import write_report as write_report
    from .report.paired import compare_examples as compare_examples
    from .routing.imported import import_profile as import_profile
    from .routing.imported import import_scores as import_scores
    from .routing.plan import ExpertPlan as ExpertPlan
    from .routing.plan import select_experts as select_experts
    from .routing.profile import RoutingProfile as RoutingProfile
    from .routing.profile import jaccard as jaccard
    from .routing.profiler import profile_routing as profile_routing
    from .routing.replay import replay_routing as replay_routing
    from .routing.routes import Routes as Routes
    from .routing.routes import record_routing as record_routing
    from .runs.load import Run as Run
    from .runs.load import load as load
    from .runs.load import load_adapter as load_adapter
    from .runs.sweep import run_sweep as run_sweep


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    if name not in _PUBLIC:
        raise AttributeError(f"module 'hotlora' has no attribute {name!r}")
    return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES, *_PUBLIC])
