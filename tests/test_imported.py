"""Profiles out of what others measured: each form equals what the model itself says, and bad files are one error."""

import base64
import gzip
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny import tiny_batch
from zoo import zoo_config, zoo_model

import hotlora
from hotlora import DataError, HotLoraError, RoutingProfile, import_profile, import_scores
from hotlora.hf.models import moe_layers
from hotlora.routing.formats import ids as counting
from hotlora.routing.formats.model import known_of
from hotlora.routing.profiler import profile_routing

WIDTH = 16


class Nano:
    """A batch through nano: its profile, its experts' ids [T, L, K] and its router logits, padding left out."""

    def __init__(self) -> None:
        model = hotlora.load_model("nano", device="cpu")
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(10, 200, (4, WIDTH), generator=generator)
        self.mask = torch.ones_like(self.ids)
        self.mask[1, 9:] = 0
        self.mask[3, 5:] = 0
        self.batch = {"input_ids": self.ids, "attention_mask": self.mask}
        self.profile = profile_routing(model, [self.batch])
        seen: list[torch.Tensor] = []
        hooks = [
            model.get_submodule(layer.experts).register_forward_pre_hook(lambda module, args: seen.append(args[1]))
            for layer in moe_layers(model)
        ]
        with torch.no_grad():
            self.logits = model(**self.batch, output_router_logits=True).router_logits
        for hook in hooks:
            hook.remove()
        self.is_token = self.mask.flatten().bool()
        self.routed = torch.stack(seen, dim=1)[self.is_token].numpy()


@pytest.fixture(scope="module")
def nano() -> Nano:
    return Nano()


def npy_bytes(array: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def text64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def lines(*rows: Any) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def served(way: str, array: np.ndarray, folder: Path) -> list[Path]:
    """The ids in files, as engines and people keep them."""
    file = folder / f"routed.{way.split()[0]}"
    first, rest = array[:20], array[20:]
    flat = text64(np.ascontiguousarray(first, "<i4").tobytes()), text64(np.ascontiguousarray(rest, "<i4").tobytes())
    match way:
        case "npy uint8" | "npy int32" | "npy int64" | "npy >u2":
            file.write_bytes(npy_bytes(array.astype(way.split()[1])))
        case "npy two":
            other = folder / "other.npy"
            file.write_bytes(npy_bytes(first)), other.write_bytes(npy_bytes(rest))
            return [file, other]
        case "npz":
            np.savez(file, a=first.astype(np.int16), b=rest.astype(np.int16))
        case "npz compressed":
            np.savez_compressed(file, a=first, b=rest)
        case "safetensors":
            save_file({"a": torch.from_numpy(first), "b": torch.from_numpy(rest)}, file)
        case "safetensors layers":
            tensors = {f"layer{i}": torch.from_numpy(array[:, i].copy()) for i in range(array.shape[1])}
            save_file(tensors, file)
        case "jsonl vllm":  # base64 of .npy on each choice
            file.write_bytes(lines(*({"choices": [{"routed_experts": text64(npy_bytes(a))}]} for a in (first, rest))))
        case "jsonl lists":  # vLLM 0.21: the prompt's beside the choices'
            row = {"prompt_routed_experts": first.tolist(), "choices": [{"routed_experts": rest.tolist()}]}
            file.write_bytes(lines(row, {"choices": [{"routed_experts": None}]}))
        case "jsonl sglang":  # base64 of int32, in meta_info or in sgl_ext
            rows = {"meta_info": {"routed_experts": flat[0]}}, {"choices": [{"sgl_ext": {"routed_experts": flat[1]}}]}
            file.write_bytes(lines(*rows))
        case "json sglang":  # of a batch, indented
            rows = [{"meta_info": {"routed_experts": text}} for text in flat]
            file.write_text(json.dumps(rows, indent=1))
        case "jsonl gzip":
            file.write_bytes(gzip.compress(lines({"routed_experts": array.tolist()})))
    return [file]


WAYS = (
    "npy uint8", "npy int32", "npy int64", "npy >u2", "npy two", "npz", "npz compressed", "safetensors",
    "safetensors layers", "jsonl vllm", "jsonl lists", "jsonl sglang", "json sglang", "jsonl gzip",
)  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_routed_experts_give_the_counts_of_the_models_own_profile(nano: Nano, tmp_path: Path, way: str):
    found = import_profile(served(way, nano.routed, tmp_path), model="nano")
    assert torch.equal(found.counts, nano.profile.counts) and found.layers == nano.profile.layers
    assert (found.num_tokens, found.num_experts_per_tok) == (nano.profile.num_tokens, nano.profile.num_experts_per_tok)
    assert found.source["fingerprint"] == nano.profile.source["fingerprint"]
    assert hotlora.select_experts(found).experts == hotlora.select_experts(nano.profile).experts


def test_router_logits_give_counts_and_mass(nano: Nano, tmp_path: Path):
    tensors = {f"router_logits.{i}": logits.contiguous() for i, logits in enumerate(nano.logits)}
    save_file({**tensors, "attention_mask": nano.mask}, tmp_path / "layers.safetensors")
    np.savez(tmp_path / "stacked.npz", torch.stack(nano.logits).numpy()[:, nano.is_token.numpy()])
    np.savez_compressed(tmp_path / "small.npz", torch.stack(nano.logits).numpy()[:, nano.is_token.numpy()])
    for name in ("layers.safetensors", "stacked.npz", "small.npz"):
        found = import_profile(tmp_path / name, model="nano")
        assert torch.equal(found.counts, nano.profile.counts)
        assert torch.allclose(found.mass, nano.profile.mass, rtol=1e-5), "nano's config says how weights are normalized"
    with pytest.raises(DataError, match="--num-experts-per-tok"):
        import_profile(tmp_path / "layers.safetensors")
    top_k = nano.profile.num_experts_per_tok
    found = import_profile(tmp_path / "layers.safetensors", num_experts_per_tok=top_k)
    assert torch.equal(found.counts, nano.profile.counts) and not found.mass.any()
    halves = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save_file({**halves, "attention_mask": nano.mask}, tmp_path / "half.safetensors")
    rounded = import_profile(tmp_path / "half.safetensors", model="nano").counts
    assert (rounded - nano.profile.counts).abs().sum() <= 0.05 * rounded.sum()


def test_counts_and_mass_as_json_give_the_same_profile(nano: Nano, tmp_path: Path):
    profile = nano.profile
    data = {"counts": profile.counts.tolist(), "mass": profile.mass.tolist(), "num_tokens": profile.num_tokens}
    (tmp_path / "c.json").write_text(json.dumps(data))
    found = import_profile(tmp_path / "c.json", model="nano")
    assert found.hash == profile.hash
    by_layer = {
        str(layer): {"cnt": counts, "gate": mass}
        for layer, counts, mass in zip(profile.layers, data["counts"], data["mass"], strict=True)
    }
    for whole in (by_layer, {"arch": "x", "tokens": profile.num_tokens, "layers": by_layer}):
        (tmp_path / "r.json").write_text(json.dumps(whole))
        assert import_profile(tmp_path / "r.json", model="nano").hash == profile.hash


def slowly(array: np.ndarray, num_experts: int) -> torch.Tensor:
    counts = torch.zeros(array.shape[1], num_experts, dtype=torch.int64)
    for token in array.tolist():
        for layer, chosen in enumerate(token):
            for expert in chosen:
                counts[layer, expert] += 1
    return counts


def distinct(num_tokens: int, num_layers: int, top_k: int, num_experts: int, seed: int = 0) -> np.ndarray:
    draws = np.random.default_rng(seed).random((num_tokens, num_layers, num_experts))
    return draws.argsort(axis=-1)[..., :top_k]


@pytest.mark.parametrize(
    ("top_k", "num_experts", "dtype"),
    [(8, 64, "u1"), (8, 128, "u1"), (8, 200, "u1"), (8, 256, "u1"), (6, 64, "i4"), (3, 9, "i2"), (1, 16, "u1"),
     (2, 300, "u2"), (4, 512, "i8"), (10, 512, "<i4"), (22, 256, "i4"), (2, 8, "i1")],
)  # fmt: skip
def test_every_size_is_counted_as_a_loop_counts_it(
    tmp_path: Path, monkeypatch, top_k: int, num_experts: int, dtype: str
):
    monkeypatch.setattr(counting, "_BLOCK", 1000)  # several blocks, and pieces of them
    monkeypatch.setattr(counting, "_PIECE", 200)
    array = distinct(90, 3, top_k, num_experts).astype(dtype)
    file = tmp_path / "a.npy"
    np.save(file, array)
    found = import_profile(file, num_experts=num_experts)
    assert torch.equal(found.counts, slowly(array, num_experts)) and found.num_tokens == 90
    assert (found.counts.sum(dim=1) == 90 * top_k).all()


def test_layers_and_tokens_without_experts_are_left_out(tmp_path: Path):
    """Servers write a layer for each decoder layer, zeros where it is dense; trainers pad tokens, SGLang by -1."""
    array = distinct(50, 4, 2, 8).astype(np.int32)
    array[:, 0] = 0
    array[-1] = 0
    array[7] = -1
    np.save(tmp_path / "a.npy", array)
    found, told, _ = hotlora.routing.imported.imported(tmp_path / "a.npy", None, None, 8, None)
    routed = np.delete(array, [7, 49], axis=0)[:, 1:]
    assert found.layers == (1, 2, 3) and found.num_tokens == 48
    assert torch.equal(found.counts, slowly(routed, 8))
    assert "2 tokens without experts (zeros or -1)" in told and "layers without experts (0 of the array)" in told
    for dtype in (np.uint8, np.uint16):  # -1 as it is in these
        np.save(tmp_path / "a.npy", array.astype(dtype))
        assert torch.equal(import_profile(tmp_path / "a.npy", num_experts=8).counts, found.counts)
    array[3, 2] = 0
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(DataError, match=r"layer 2 has no experts .* for 3 of 50 tokens, layer 1 for 2"):
        import_profile(tmp_path / "a.npy", num_experts=8)


def test_a_models_dense_layers_may_be_in_the_array_or_not(tmp_path: Path):
    config = zoo_config("deepseek_v2")
    config.num_hidden_layers, config.first_k_dense_replace, config.mlp_layer_types = 4, 1, None
    config.save_pretrained(tmp_path)
    known = known_of(tmp_path)
    assert known.layers == (1, 2, 3) and known.num_hidden_layers == 4
    array = distinct(20, 4, known.num_experts_per_tok, known.num_experts).astype(np.uint8)
    np.save(tmp_path / "moe.npy", array[:, 1:])
    dense = array.copy()
    dense[:, 0] = 0
    np.save(tmp_path / "all.npy", dense)
    np.save(tmp_path / "wrong.npy", array)
    np.save(tmp_path / "few.npy", array[:, :2])
    found = import_profile(tmp_path / "all.npy", model=tmp_path)
    assert found.layers == (1, 2, 3) and found.hash == import_profile(tmp_path / "moe.npy", model=tmp_path).hash
    with pytest.raises(DataError, match=r"has layers 0 to 3, and the MoE layers of .* are 1 to 3"):
        import_profile(tmp_path / "wrong.npy", model=tmp_path)
    with pytest.raises(DataError, match=r"has 2 layers, and .* has 3 MoE layers \(1 to 3\) of 4"):
        import_profile(tmp_path / "few.npy", model=tmp_path)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_next", "deepseek_v2", "gemma4_text", "afmoe", "ernie4_5_moe"])
def test_a_router_is_tried_before_its_logits_are_believed(tmp_path: Path, family: str):
    """Where random weights show that the K highest logits are chosen, the counts and the mass are the model's own."""
    model = zoo_model(family)
    batch = tiny_batch()
    model.config.save_pretrained(tmp_path)
    profile = profile_routing(model, [batch])
    with torch.no_grad():
        logits = model(**batch, output_router_logits=True).router_logits
    tensors = {f"layer{i}": part.flatten(0, -2).contiguous() for i, part in enumerate(logits)}
    save_file({**tensors, "attention_mask": batch["attention_mask"]}, tmp_path / "l.safetensors")
    if family in ("afmoe", "ernie4_5_moe"):
        with pytest.raises(DataError, match=f"the router of {family} does not choose the K highest"):
            import_profile(tmp_path / "l.safetensors", model=tmp_path)
        return
    found = import_profile(tmp_path / "l.safetensors", model=tmp_path)
    assert torch.equal(found.counts, profile.counts) and found.layers == profile.layers
    assert found.mass.any() == (family != "gemma4_text")
    assert not found.mass.any() or torch.allclose(found.mass, profile.mass, rtol=1e-4)


def esft_line(ids: np.ndarray, weights: np.ndarray) -> str:
    return "\t".join(map(str, ids.ravel().tolist())) + "\t\t" + "\t".join(f"{w:.4f}" for w in weights.ravel()) + "\n"


def test_esfts_files_add_up_over_lines_layers_and_ranks(tmp_path: Path):
    array = distinct(30, 2, 6, 64)
    weights = np.random.default_rng(1).random(array.shape).round(4)
    for rank, part in ((0, slice(0, 20)), (1, slice(20, 30))):
        for row, layer in enumerate((1, 2)):
            file = tmp_path / f"rank_{rank}" / f"expert_weights_{layer}.txt"
            file.parent.mkdir(exist_ok=True)
            ids, gates = array[part, row], weights[part, row]
            file.write_text(esft_line(ids[:4], gates[:4]) + esft_line(ids[4:], gates[4:]))
    sizes = {"num_experts": 64, "num_experts_per_tok": 6}
    found = import_profile(tmp_path, **sizes)
    assert found.layers == (1, 2) and found.num_tokens == 30 and torch.equal(found.counts, slowly(array, 64))
    mass = torch.zeros(2, 64, dtype=torch.float64)
    for row in range(2):
        mass[row].index_add_(0, torch.from_numpy(array[:, row].ravel()), torch.from_numpy(weights[:, row].ravel()))
    assert torch.allclose(found.mass, mass)
    with pytest.raises(DataError, match="does not say how many experts a layer has"):
        import_profile(tmp_path)
    file.write_text(esft_line(array[:3, 0], weights[:3, 0]))
    with pytest.raises(DataError, match="layer 2 has 138 assignments, layer 1 has 180"):
        import_profile(tmp_path, **sizes)
    for text in (
        "1\t2\n",
        "1\t2\t3\t4\t5\t6\t\t.1\n",
        "1\t2\t3\t4\t5\t6\t\t.1\t.1\t.1\t.1\t.1\tnan\n",
        "\n",
        "é\t\t1\n",
    ):
        file.write_text(text)
        with pytest.raises(DataError, match=r"expert_weights_2\.txt, line 1: "):
            import_profile(tmp_path, **sizes)


def test_scores_are_written_for_the_rule_scores(tmp_path: Path):
    array = distinct(40, 2, 2, 8)
    counts = slowly(array, 8)
    reap = torch.rand(2, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    file = tmp_path / "saliency.json"
    whole = {"counts": counts.tolist(), "gate": counts.double().tolist(), "reap": reap.tolist(), "num_tokens": 40}
    file.write_text(json.dumps({**whole, "note": "x"}))
    profile = import_profile(file, tmp_path / "out" / "p.safetensors")
    assert RoutingProfile.load(tmp_path / "out" / "p.safetensors").hash == profile.hash
    scores = tmp_path / "out" / "p-reap.json"
    plan = hotlora.select_experts(profile, rule="scores", scores=scores, experts_per_layer=3)
    assert plan == hotlora.select_experts(
        profile, rule="scores", scores=import_scores(file)["reap"], experts_per_layer=3
    )
    assert [*plan.experts.values()] == [tuple(sorted(row.topk(3).indices.tolist())) for row in reap]
    with pytest.raises(HotLoraError, match=r"a\.json and .*b\.json hold scores, which do not add up"):
        summary = {"token_scores": {"1": {"0": 0.5, "1": 0.5}}, "gate_scores": {"1": {"0": 0.2, "1": 0.3}}}
        for name in "ab":
            (tmp_path / f"{name}.json").write_text(json.dumps(summary))
        import_scores([tmp_path / "a.json", tmp_path / "b.json"])
    assert import_scores(tmp_path / "a.json")["gate_scores"].tolist() == [[0.2, 0.3]]
    with pytest.raises(DataError, match=r"ESFT's summary holds scores \(token_scores, gate_scores\) and no counts"):
        import_profile(tmp_path / "a.json", tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()
