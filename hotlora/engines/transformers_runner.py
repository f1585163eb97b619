"""Plain transformers: the base, and a merged checkpoint."""

from typing import Any

from runner import Answer, LogProbs, Request, picked, serve


def probe(request: Request) -> Answer:
    scores = []
    for folder in (request.base, request.export):
        model = load(folder, request)
        scores.append(score(model, request))
        del model
    return Answer(*scores, dtype=request.dtype, device=request.device)


def load(folder: str, request: Request) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    has_images = type(AutoConfig.from_pretrained(folder)) not in AutoModelForCausalLM._model_mapping.keys()
    auto = AutoModelForImageTextToText if has_images else AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype=getattr(torch, request.dtype)).to(request.device).eval()


def score(model: Any, request: Request) -> LogProbs:
    import torch

    found = []
    with torch.no_grad():
        for text, tokens in zip(request.texts, request.tokens, strict=True):
            ids = torch.tensor([text], device=request.device)
            found.append(picked(model(input_ids=ids).logits[0].float().cpu().numpy(), tokens))
    return found


if __name__ == "__main__":
    serve(("transformers", "torch"), probe)
