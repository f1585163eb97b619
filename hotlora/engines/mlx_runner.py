"""MLX: base and export by mlx-lm. Checked with mlx 0.32 and mlx-lm 0.32, their build for CPUs under Linux."""

from pathlib import Path
from typing import Any

from runner import Answer, LogProbs, Request, picked, serve


def probe(request: Request) -> Answer:
    import mlx.core as mx
    from mlx_lm.utils import load_adapters, load_model

    if request.device == "cpu":
        mx.set_default_device(mx.cpu)

    def loaded(folder: str) -> Any:
        model, _ = load_model(Path(folder))
        model.set_dtype(getattr(mx, request.dtype))
        return model.eval() or model

    model = loaded(request.base)
    base = score(model, request)
    if request.is_merged:
        del model
        model = loaded(request.export)
    else:
        model = load_adapters(model, request.export)
        model.eval()
    device = "cpu" if mx.default_device() == mx.Device(mx.cpu) else "gpu"
    return Answer(base, score(model, request), dtype=request.dtype, device=device)


def score(model: Any, request: Request) -> LogProbs:
    import mlx.core as mx
    import numpy as np

    found = []
    for text, tokens in zip(request.texts, request.tokens, strict=True):
        logits = model(mx.array([text]))[0].astype(mx.float32)
        found.append(picked(np.array(logits), tokens))
    return found


if __name__ == "__main__":
    serve(("mlx-lm", "mlx"), probe)
