"""Exports the adapter of trl_sft.py (run that first) for vLLM, and answers a question with it."""

import shutil
import sys
from importlib.util import find_spec

import hotlora

MODEL, ADAPTER, OUTPUT = "nano", "runs/examples/sft/adapter", "runs/examples/vllm"

if __name__ == "__main__":  # vLLM starts processes of its own, which import this file
    model = hotlora.load_adapter(hotlora.load_model(MODEL), ADAPTER)
    rank = model.peft_config["default"].r  # vLLM takes 8, 16, 32, 64, ... as max_lora_rank
    shutil.rmtree(OUTPUT, ignore_errors=True)
    # vLLM's adapters hold no router: the router's update goes into a copy of the base model.
    tokenizer = hotlora.load_tokenizer(MODEL)
    hotlora.export_adapter(model, OUTPUT, format="vllm", merge_router=True, tokenizer=tokenizer)
    print(f"The adapter for vLLM lies in {OUTPUT}/adapter, the model that it belongs to in {OUTPUT}/base")
    if find_spec("vllm") is None:
        sys.exit("vLLM is not installed here, so nothing is served: `pip install vllm`, on a machine with a GPU.")

    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    engine = LLM(f"{OUTPUT}/base", enable_lora=True, max_lora_rank=rank)
    prompt = "Question: Tom has 12 apples. He buys 5 more apples. How many apples does Tom have now?\nAnswer:"
    sampling = SamplingParams(temperature=0.0, max_tokens=40)
    (answer,) = engine.generate([prompt], sampling, lora_request=LoRARequest("hot", 1, f"{OUTPUT}/adapter"))
    print(prompt + answer.outputs[0].text)
