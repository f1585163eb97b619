"""llama.cpp by llama-cpp-python: base and export are .gguf files. Checked with llama-cpp-python 0.3."""

import ctypes
from typing import Any

from runner import Answer, LogProbs, Request, picked, serve

_ERROR = 4
"""GGML_LOG_LEVEL_ERROR"""
_TYPES = {0: "float32", 1: "float16", 32: "bfloat16"}
"""of a file, by `general.file_type`; the others are quantizations"""


def probe(request: Request) -> Answer:
    import llama_cpp

    length = max(map(len, request.texts)) + 1
    options: dict[str, Any] = {
        "model_path": request.base, "n_ctx": length, "n_batch": length, "n_ubatch": length, "logits_all": True,
        "n_gpu_layers": 0 if request.device == "cpu" else -1, "verbose": True,  # else stderr is closed for C++
        # Keys and values are cached in float16 if one does not say so, which rounds more than all else.
        "type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32,
    }  # fmt: skip
    errors: list[str] = []

    @llama_cpp.llama_log_callback
    def keep(level: int, text: bytes, _: Any) -> None:
        if level == _ERROR and text.strip():
            errors.append(text.decode(errors="replace").strip())

    llama_cpp.llama_log_set(keep, ctypes.c_void_p(0))
    try:
        return compared(options, request)
    except (ValueError, RuntimeError) as error:
        raise RuntimeError("; ".join([*errors[:1], str(error)])) from None


def compared(options: dict[str, Any], request: Request) -> Answer:
    import llama_cpp

    model = llama_cpp.Llama(**options)
    base = score(model, request)
    kind = int(model.metadata.get("general.file_type", 0))
    model.close()
    model = llama_cpp.Llama(**options, lora_path=request.export)
    return Answer(base, score(model, request), dtype=_TYPES.get(kind, f"file type {kind}"), device=request.device)


def score(model: Any, request: Request) -> LogProbs:
    found = []
    for text, tokens in zip(request.texts, request.tokens, strict=True):
        model.reset()
        model.eval(text)
        found.append(picked(model.scores[: len(text)], tokens))
    return found


if __name__ == "__main__":
    serve(("llama-cpp-python",), probe)
