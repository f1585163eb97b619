"""A hotlora adapter where hotlora was not imported: it says so, whoever loads it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from peft import PeftModel, get_peft_model
from tiny import fill, tiny_batch, tiny_model, tiny_plan

import hotlora
from hotlora.adapter.config import HotLoraConfig

LOADS = """
import sys, warnings
warnings.simplefilter("ignore")
import peft, transformers
folder, way = sys.argv[1:]
try:
    base = transformers.AutoModelForCausalLM.from_pretrained(folder + "/base")
    if way == "peft":
        base = peft.PeftModel.from_pretrained(base, folder + "/adapter")
    else:
        base.load_adapter(folder + "/adapter")
    print("loaded", "hotlora" in sys.modules)
except Exception as error:
    print(type(error).__name__, error)
"""


def saved(folder: Path, **options):
    base = tiny_model()
    base.save_pretrained(folder / "base")
    model = get_peft_model(base, HotLoraConfig(plan=tiny_plan(base), r=4, **options))
    fill(model, 1)
    model.save_pretrained(folder / "adapter")
    return model.eval()


def loaded_alone(folder: Path, way: str) -> str:
    done = subprocess.run([sys.executable, "-c", LOADS, folder, way], capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.parametrize("way", ["peft", "transformers"])
def test_the_error_names_hotlora(tmp_path: Path, way: str):
    model = saved(tmp_path)
    said = loaded_alone(tmp_path, way)
    assert "this adapter needs hotlora" in said and "pip install hotlora" in said and "export --format peft" in said
    # With hotlora it loads, in both ways.
    batch = tiny_batch()
    for loaded in (
        hotlora.load_adapter(tiny_model(), tmp_path / "adapter"),
        PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter").eval(),
    ):
        assert loaded(**batch).logits.equal(model(**batch).logits)


@pytest.mark.parametrize(
    ("options", "is_plain"),
    [({}, True), ({"train_a": False}, False), ({"train_router": True}, False)],
)
def test_attention_alone_is_plain_lora(tmp_path: Path, options, is_plain):
    """But for a frozen A, which is not in the file: PEFT would draw another one."""
    base = tiny_model()
    plan = tiny_plan(base, {0: [], 1: []})
    config = HotLoraConfig(plan=plan, **{"train_router": False, **options})
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    targets = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["target_modules"]
    assert isinstance(targets, list) is is_plain
    if is_plain:
        tiny_model().save_pretrained(tmp_path / "base")
        assert loaded_alone(tmp_path, "peft").split() == ["loaded", "False"]
