"""Plain PEFT: the base by transformers, and the adapter by `PeftModel.from_pretrained`."""

import warnings

from runner import Answer, Request, serve
from transformers_runner import load, score


def probe(request: Request) -> Answer:
    from peft import PeftModel

    model = load(request.base, request)
    base = score(model, request)
    with warnings.catch_warnings():  # keys that PEFT leaves out
        warnings.filterwarnings("error", message="Found missing adapter keys")
        adapted = PeftModel.from_pretrained(model, request.export).eval()
    return Answer(base, score(adapted, request), dtype=request.dtype, device=request.device)


if __name__ == "__main__":
    serve(("peft", "transformers", "torch"), probe)
