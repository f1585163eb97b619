"""A hotlora adapter where hotlora was not imported: it says so, whoever loads it."""

import json
from pathlib import Path

import pytest
from apart import apart
from peft import PeftModel, get_peft_model
from plain_peft import loaded
from tiny import fill, tiny_batch, tiny_model, tiny_plan

import hotlora
from hotlora.adapter.config import HotLoraConfig


def saved(folder: Path, **options):
    base = tiny_model()
    base.save_pretrained(folder / "base")
    model = get_peft_model(base, HotLoraConfig(plan=tiny_plan(base), r=4, **options))
    fill(model, 1)
    model.save_pretrained(folder / "adapter")
    return model.eval()


@pytest.mark.parametrize("way", ["peft", "transformers"])
def test_the_error_names_hotlora(tmp_path: Path, way: str):
    model = saved(tmp_path)
    said = apart(loaded, str(tmp_path), way)
    assert "this adapter needs hotlora" in said and "pip install hotlora" in said and "export --format peft" in said
    # With hotlora it loads, in both ways.
    batch = tiny_batch()
    for with_it in (
        hotlora.load_adapter(tiny_model(), tmp_path / "adapter"),
        PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter").eval(),
    ):
        assert with_it(**batch).logits.equal(model(**batch).logits)


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
        assert apart(loaded, str(tmp_path), "peft").split() == ["loaded", "False"]
