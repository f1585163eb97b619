"""Exports the adapter of trl_sft.py (run that first) for SGLang, and answers a question with it."""

import shutil
import sys
from importlib.util import find_spec

import hotlora

MODEL, ADAPTER, OUTPUT = "nano", "runs/examples/sft/adapter", "runs/examples/sglang"

if __name__ == "__main__":  # SGLang starts processes of its own, which import this file
    model = hotlora.load_adapter(hotlora.load_model(MODEL), ADAPTER)
    shutil.rmtree(OUTPUT, ignore_errors=True)
    # SGLang's adapters hold no router: the router's update goes into a copy of the base model.
    tokenizer = hotlora.load_tokenizer(MODEL)
    hotlora.export_adapter(model, OUTPUT, format="sglang", merge_router=True, tokenizer=tokenizer)
    print(f"The adapter for SGLang lies in {OUTPUT}/adapter, the model that it belongs to in {OUTPUT}/base")
    if find_spec("sglang") is None:
        sys.exit(
            "SGLang is not installed here, so nothing is served: `pip install sglang[all]`, on a machine with a GPU."
        )

    import sglang

    engine = sglang.Engine(
        model_path=f"{OUTPUT}/base", enable_lora=True, lora_paths=[f"hot={OUTPUT}/adapter"], max_loras_per_batch=1
    )
    prompt = "Question: Tom has 12 apples. He buys 5 more apples. How many apples does Tom have now?\nAnswer:"
    answer = engine.generate(prompt, {"temperature": 0.0, "max_new_tokens": 40}, lora_path="hot")
    print(prompt + answer["text"])
    engine.shutdown()
