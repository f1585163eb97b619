"""Profiles out of what others measured: each form equals what the model itself says, and bad files are one error."""

import base64
import gzip
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from published import ABSENT, DATA
from safetensors.torch import save_file
from tiny import tiny_batch
from zoo import zoo_config, zoo_model

import hotlora
from hotlora import DataError, HotLoraError, PlanError, RoutingProfile, import_profile, import_scores
from hotlora.hf.moe_layers import moe_layers
from hotlora.report.published import MODELS
from hotlora.report.study_report import write_study
from hotlora.routing.formats import ids as counting
from hotlora.routing.formats.model import known_of
from hotlora.routing.imported import imported
from hotlora.routing.profiler import profile_routing
from hotlora.runs.checks import check_run
from hotlora.runs.options import RunOptions
from hotlora.runs.study import run_study

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
    wrong = array.copy()
    wrong[70, 1] = wrong[70, 1, 0]  # an expert that is there twice, or thrice
    np.save(tmp_path / "wrong.npy", wrong)
    for few in (0, 2**15):  # by layer, and all at once
        monkeypatch.setattr(counting, "_FEW", few)
        found = import_profile(file, num_experts=num_experts)
        assert torch.equal(found.counts, slowly(array, num_experts)) and found.num_tokens == 90
        assert (found.counts.sum(dim=1) == 90 * top_k).all()
        if top_k > 1:
            with pytest.raises(DataError, match=r"token 70, layer 1 of the array|layer 1 has no experts"):
                import_profile(tmp_path / "wrong.npy", num_experts=num_experts)


def test_layers_and_tokens_without_experts_are_left_out(tmp_path: Path):
    """Servers write a layer for each decoder layer, zeros where it is dense; trainers pad tokens, SGLang by -1."""
    array = distinct(50, 4, 2, 8).astype(np.int32)
    array[:, 0] = 0
    array[-1] = 0
    array[7] = -1
    np.save(tmp_path / "a.npy", array)
    found, told, _ = imported(tmp_path / "a.npy", None, None, 8, None)
    routed = np.delete(array, [7, 49], axis=0)[:, 1:]
    assert found.layers == (1, 2, 3) and found.num_tokens == 48
    assert torch.equal(found.counts, slowly(routed, 8))
    assert (
        "without 2 tokens that are padding or have no experts" in told
        and "layers without experts (0 of the array)" in told
    )
    np.save(tmp_path / "b.npy", array)
    both, told, _ = imported([tmp_path / "a.npy", tmp_path / "b.npy"], None, None, 8, None)
    assert both.num_tokens == 96 and torch.equal(both.counts, 2 * found.counts) and "without 4 tokens" in told
    for dtype in (np.uint8, np.uint16):  # -1 as it is in these
        np.save(tmp_path / "a.npy", array.astype(dtype))
        assert torch.equal(import_profile(tmp_path / "a.npy", num_experts=8).counts, found.counts)
    array[3, 2] = 0
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(DataError, match=r"layer 2 has no experts .* for 3 of 50 tokens, layer 1 for 2"):
        import_profile(tmp_path / "a.npy", num_experts=8)


def test_dense_layers_of_a_router_that_chooses_one_expert_are_left_out(tmp_path: Path):
    """Llama 4: every other layer is dense, and its zeros are as good as expert 0."""
    array = distinct(50, 4, 1, 8).astype(np.int32)
    array[:, ::2] = 0
    array[7] = -1
    np.save(tmp_path / "a.npy", array)
    found, told, _ = imported(tmp_path / "a.npy", None, None, 8, None)
    assert found.layers == (1, 3) and found.num_tokens == 49 and "layers without experts (0, 2 of the array)" in told
    assert torch.equal(found.counts, slowly(np.delete(array, 7, axis=0)[:, 1::2], 8))
    np.save(tmp_path / "a.npy", np.zeros((50, 2, 1), np.int32))  # one expert has it all, in every layer
    assert import_profile(tmp_path / "a.npy", num_experts=8).counts[:, 0].tolist() == [50, 50]


def top_1_with_dense_layers(folder: Path) -> Path:
    config = zoo_config("qwen3_moe")
    config.num_hidden_layers, config.num_experts_per_tok, config.decoder_sparse_step = 4, 1, 2
    config.mlp_only_layers = []
    config.save_pretrained(folder)
    assert known_of(folder).layers == (1, 3)
    return folder


def test_dense_layers_of_a_model_that_chooses_one_expert_are_left_out(tmp_path: Path):
    model = top_1_with_dense_layers(tmp_path / "model")
    num_experts = known_of(model).num_experts
    array = distinct(50, 4, 1, num_experts).astype(np.int32)
    array[:, 3] = 0  # an MoE layer, of which one expert has it all
    np.save(tmp_path / "wrong.npy", array)
    array[:, ::2] = 0
    np.save(tmp_path / "all.npy", array)
    np.save(tmp_path / "moe.npy", array[:, 1::2])
    np.savez(tmp_path / "named.npz", **{f"layer{layer}": array[:, layer] for layer in range(4)})
    for name in ("all.npy", "moe.npy", "named.npz"):
        found = import_profile(tmp_path / name, model=model)
        assert found.layers == (1, 3) and found.num_tokens == 50
        assert torch.equal(found.counts, slowly(array[:, 1::2], num_experts)), name
    with pytest.raises(DataError, match=r"has layers 0 to 3, and the MoE layers of .* are 1, 3"):
        import_profile(tmp_path / "wrong.npy", model=model)


def test_counts_of_the_model_as_an_array(tmp_path: Path):
    """A sum over an engine's counts, whose dense layers have zeros."""
    model = top_1_with_dense_layers(tmp_path / "model")
    counts = slowly(distinct(50, 2, 1, known_of(model).num_experts), known_of(model).num_experts).numpy()
    whole = np.insert(counts, [0, 1], 0, axis=0)
    np.save(tmp_path / "counts3.npy", counts)  # a number in the name makes no layer of it
    np.savez(tmp_path / "all.npz", logical_count=whole.astype(np.int32))
    save_file({"counts": torch.from_numpy(whole)}, tmp_path / "all.safetensors")
    for name in ("counts3.npy", "all.npz", "all.safetensors"):
        found = import_profile(tmp_path / name, model=model)
        assert found.layers == (1, 3) and found.num_tokens == 50 and (found.counts.numpy() == counts).all()
    whole[0, 1] = 50
    np.save(tmp_path / "wrong.npy", whole)
    with pytest.raises(DataError, match=r"has layers 0 to 1, 3, and the MoE layers of .* are 1, 3"):
        import_profile(tmp_path / "wrong.npy", model=model)
    np.save(tmp_path / "a.npy", counts)
    with pytest.raises(DataError, match=r'counts \[layers, experts\] with --model CONFIG, or as JSON, {"counts": '):
        import_profile(tmp_path / "a.npy", num_experts=known_of(model).num_experts)


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
        logits = getattr(model(**batch, output_router_logits=True), "router_logits", None)
    if logits is None:  # as of 5.17 for deepseek_v2 and gemma4_text
        pytest.skip(f"transformers {transformers.__version__} returns no router_logits of {family}")
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
    for data in (b"\xff\xfe", None):
        file.unlink()
        file.write_bytes(data) if data else file.mkdir()
        with pytest.raises(HotLoraError, match=r"rank_1.expert_weights_2\.txt .*(whole file|cannot be read)"):
            import_profile(tmp_path, **sizes)
        if not data:
            file.rmdir()


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


def test_a_profile_of_counts_alone_has_no_signal_mass(tmp_path: Path):
    np.save(tmp_path / "a.npy", distinct(40, 2, 2, 8))
    profile = import_profile(tmp_path / "a.npy", tmp_path, num_experts=8)
    again = RoutingProfile.load(tmp_path)
    assert not profile.has_mass and again.hash == profile.hash and again.source == {"imported": "routed experts"}
    for options in ({"signal": "mass"}, {"rule": "cumulative", "signal": "mass"}, {"rule": "auto", "signal": "mass"}):
        with pytest.raises(PlanError, match=r"no signal mass .* imported from routed experts"):
            hotlora.select_experts(again, **options)
    assert len(hotlora.select_experts(again, experts_per_layer=3).experts[0]) == 3
    result, profiles = run_study([str(tmp_path / "profile.safetensors")], None, tell=lambda text: None)
    page = write_study(result, profiles, tmp_path / "study", "hotlora")
    assert page.is_file()


GOOD: dict[str, Any] = {"counts": [[3, 1], [2, 2]], "num_tokens": 4}


@pytest.mark.parametrize(
    ("data", "match"),
    [
        ({"counts": [[3, 1], [2, 1]], "num_tokens": 4}, "layer 1 has 3 assignments, layer 0 has 4: .* tokens x 1"),
        ({"counts": [[3, 1], [2, 2]], "num_tokens": 3}, "3 tokens, and layers have 4 to 4 assignments"),
        ({"counts": [[3, 2], [4, 1]], "num_tokens": 5, "num_experts_per_tok": 2}, "5 assignments.* whole num"),
        ({"counts": [[3, 3], [4, 2]], "num_tokens": 6, "num_experts_per_tok": 2}, "6 tokens of 2 .* which is 3 tokens"),
        ({"counts": [[3, 1], [2, 2]]}, "does not say how many experts a token is sent to.* --num-experts-per-tok"),
        ({**GOOD, "counts": [[5, -1], [2, 2]]}, "counts of layer 0, expert 1, is -1: it must be 0 or more"),
        ({**GOOD, "counts": [[2.5, 1.5], [2, 2]]}, r"counts hold 2\.5: counts are whole numbers"),
        ({**GOOD, "counts": [[3, 1], [4]]}, "1 to 2 experts a layer: every layer must have as many"),
        ({**GOOD, "counts": [[3, True], [2, 2]]}, "what is no number of 64 bits"),
        ({**GOOD, "counts": [[10**40, 1], [2, 2]]}, "what is no number of 64 bits"),
        ({**GOOD, "counts": [[0, 0], [0, 0]], "num_experts_per_tok": 1}, "all counts are 0"),
        ({**GOOD, "counts": 3}, "counts must be a list of layers"),
        ({**GOOD, "mass": [[0.1, float("nan")], [1, 1]]}, "mass of layer 0, expert 1, is nan"),
        ({**GOOD, "mass": [[0.1, 0.1]]}, r"counts are \[2, 2\], mass is \[1, 2\]"),
        ({"counts": [[4, 0], [2, 2]], "num_tokens": 4, "mass": [[1, 1], [1, 1]]}, "expert 1, .*0 where the count is 0"),
        ({**GOOD, "reap": [[1, float("inf")], [1, 1]]}, "reap of layer 0, expert 1, is inf"),
        ({**GOOD, "layers": [1, 0]}, r"layers are \[1, 0\]: they must be 2 ascending decoder indices"),
        ({**GOOD, "num_experts": 3}, "counts have 2 experts a layer, and the model has 3"),
        ({**GOOD, "assignments_per_layer": [4, 5]}, r"_per_layer are \[4, 5\], and the counts add up to \[4, 4\]"),
        ({"examples": [[[[0, 1]], [[2, 1]]]], "num_experts": 2, "num_experts_per_tok": 1}, "layer 1 has expert 2: ids"),
        ({"examples": [[[[0, 1]], [[1, 2]]]], "num_experts": 2, "num_experts_per_tok": 1}, "0 has 1 assignments"),
        ({"examples": [[[[0, 1]]], []], "num_experts": 2, "num_experts_per_tok": 1}, "example 1 has 0 layers"),
        ({"examples": [[[[0]]]], "num_experts": 2, "num_experts_per_tok": 1}, r"must be pairs \(expert, count\)"),
        ({"layers": {"0": {"cnt": [1]}, "1": {"gate": [1]}}}, "layer 1 has .*gate.*, another .*cnt"),
        ({"version": 1, "scores": {}}, "is a file of scores already"),
        ({"routed_experts": [[[0, 1]], [[0]]]}, "routed experts are ragged"),
        ({"routed_experts": "é"}, "routed experts are text, and no base64"),
        ({"routed_experts": "AAAA"}, "int32 without a shape, as SGLang returns them: give --model CONFIG"),
        ({"routed_experts": 3}, "routed experts are '3'"),
        ({"a": 1}, "holds no routing that is known"),
        ([], "holds no routing that is known"),
    ],
)  # fmt: skip
def test_numbers_that_cannot_be_are_one_error(tmp_path: Path, data: Any, match: str):
    file = tmp_path / "c.json"
    file.write_text(json.dumps(data))
    with pytest.raises(HotLoraError, match=match) as told:
        import_profile(file, tmp_path / "p.safetensors")
    assert str(file) in str(told.value) and not (tmp_path / "p.safetensors").exists()


def zip_of(data: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as packed:
        packed.writestr("a.npy", data)
    return stream.getvalue()


IDS = np.array([[[0, 1], [1, 2]], [[2, 3], [3, 0]]], np.int32)


@pytest.mark.parametrize(
    ("name", "data", "match"),
    [
        ("a.npy", npy_bytes(IDS)[:-3], "is cut short"),
        ("a.npy", npy_bytes(IDS + 1), r"token 1, layer 0 of the array, has the experts \[3, 4\]: .* ids from 0 to 3"),
        ("a.npy", npy_bytes(IDS - 2), r"token 0, layer 0 of the array, has the experts \[-2, -1\]"),
        ("a.npy", npy_bytes(np.minimum(IDS, 2)), r"token 1, layer 0 of the array, has the experts \[2, 2\]"),
        ("a.npy", npy_bytes(IDS[0]), "give expert ids"),
        ("a.npy", npy_bytes(IDS[:0]), "no routed experts of any token"),
        ("a.npy", npy_bytes(IDS[:, :0]), "no routed experts of any token"),
        ("a.npy", npy_bytes(IDS * 0), "no layer has experts"),
        ("a.npy", npy_bytes(IDS.astype(complex)), "holds complex128, which is not read"),
        ("a.npy", npy_bytes(np.array([{}], object)), r"holds object, which is not read \(nothing is unpickled\)"),
        ("a.npy", npy_bytes(np.asfortranarray(IDS)), "Fortran's order"),
        ("a.npy", npy_bytes(IDS.astype(np.float32)), "is 4 experts|router logits of 2 experts"),
        ("a.npy", npy_bytes(np.full((1, 2, 4), np.nan, np.float32)), "logits that are not finite, near token 0"),
        ("a.npy", b"\x93NUMPY", "holds no .npy array"),
        ("a.npy", b"", "is not a whole file of routing|no routing"),
        ("a.npz", zip_of(npy_bytes(IDS)[:-4]), "cut short"),
        ("a.npz", zip_of(npy_bytes(IDS))[:-10], "not a zip|is not a whole file"),
        ("a.npz", zip_of(b"x"), "holds no .npy array"),
        ("a.safetensors", b"\xff" * 7 + b"\x00{}", "header would be"),
        ("a.pt", b"\x80\x02}q\x00.", "nothing is unpickled"),
        ("a.pt", zip_of(b"\x80\x02}q\x00."), "nothing is unpickled; save it as .safetensors or .npz"),
        ("a.jsonl", b'{"choices": [{"text": "4"}]}\n{"choices": []}\n', "--enable-return-routed-experts"),
        ("a.json", b"\xff\xfe", "is not a whole file of routing"),
        ("a.jsonl", b'{"routed_experts": [[[0, 1]]]}\n{"routed', "is not a whole file of routing"),
        ("a.json", b"[" * 100_000, "is not a whole file of routing"),
        ("a.json.gz", gzip.compress(b"{}", mtime=0)[:-4], "is not a whole file of routing"),
    ],
)  # fmt: skip
def test_broken_files_are_one_error(tmp_path: Path, name: str, data: bytes, match: str):
    file = tmp_path / name
    file.write_bytes(data)
    with pytest.raises(HotLoraError, match=match) as told:
        import_profile(file, tmp_path / "p.safetensors", num_experts=4, num_experts_per_tok=2)
    assert str(file) in str(told.value) and sorted(path.name for path in tmp_path.iterdir()) == [name]


def test_a_folder_is_its_files(tmp_path: Path):
    """So that a server's requests, a file each, need not fit on a command line."""
    (tmp_path / "routed").mkdir()
    for number in range(3):
        np.save(tmp_path / "routed" / f"{number}.npy", distinct(9 + number, 2, 2, 8))
    (tmp_path / "routed" / "notes.md").write_text("not read")
    folder = import_profile(tmp_path / "routed", num_experts=8)
    files = import_profile(sorted((tmp_path / "routed").glob("*.npy")), num_experts=8)
    assert folder.num_tokens == 30 and torch.equal(folder.counts, files.counts)


def test_files_that_do_not_belong_together_are_one_error(tmp_path: Path):
    np.save(tmp_path / "a.npy", distinct(9, 2, 2, 8))
    np.save(tmp_path / "b.npy", distinct(9, 3, 2, 8))
    (tmp_path / "c.json").write_text(json.dumps(GOOD))
    (tmp_path / "empty").mkdir()
    sizes = {"num_experts": 8}
    for files, match in (
        (["a.npy", "b.npy"], r"a\.npy has layers \(0, 1\), .*b\.npy has \(0, 1, 2\)"),
        (["a.npy", "a.npy"], "given twice"),
        (["a.npy", "missing.npy"], "missing.npy does not exist"),
        (["empty"], "without ESFT's expert_weights_LAYER.txt"),
        ([], "no file was given"),
    ):
        with pytest.raises(HotLoraError, match=match):
            import_profile([tmp_path / file for file in files], **sizes)
    with pytest.raises(DataError, match=r"c\.json has form counts|counts have 2 experts a layer, and the model has 8"):
        import_profile([tmp_path / "a.npy", tmp_path / "c.json"], **sizes)
    for size in (0, -1, 65537):
        with pytest.raises(DataError, match=f"num_experts is {size}"):
            import_profile(tmp_path / "a.npy", num_experts=size)


def test_another_models_files_are_one_error(nano: Nano, tmp_path: Path):
    for name, array in (("layers", nano.routed[:, :3]), ("k", nano.routed[..., :1]), ("ids", nano.routed + 1)):
        np.save(tmp_path / f"{name}.npy", array)
    profile = nano.profile
    counts = {"counts": profile.counts.tolist(), "num_tokens": profile.num_tokens, "layers": [*range(1, 7)]}
    (tmp_path / "counts.json").write_text(json.dumps(counts))
    for name, match in (
        ("layers.npy", r"has 3 layers, and nano has 6 MoE layers \(0 to 5\) of 6"),
        ("k.npy", "sends a token to"),
        ("ids.npy", r"ids from 0 to 31"),
        ("counts.json", "has layers 1 to 6, and the MoE layers of nano are 0 to 5"),
    ):
        with pytest.raises(HotLoraError, match=match):
            import_profile(tmp_path / name, model="nano")
    with pytest.raises(DataError, match="num_experts is 8, and nano has 32"):
        import_profile(tmp_path / "ids.npy", model="nano", num_experts=8)


REAL = DATA / "routing"


@pytest.mark.skipif(not REAL.is_dir(), reason=f"routing is {ABSENT}")
def test_published_counts_give_the_published_statistics():
    """MoE-Sieve's table 2 from its author's own counts, tokens of GSM8K as they were counted, and OLMoE's in NF4."""
    for model, wanted in (("olmoe", (1_167_505, 16, 64)), ("qwen", (1_383_221, 24, 60))):
        profile = import_profile(REAL / "moe_sieve" / model / "gsm8k.json")
        assert (profile.num_tokens, *profile.counts.shape) == wanted and profile.has_mass
    for model, name in (("olmoe", "OLMoE-1B-7B"), ("qwen", "Qwen1.5-MoE-A2.7B")):
        profiles = [import_profile(file) for file in sorted((REAL / "moe_sieve" / model).glob("*.json"))]
        assert len(profiles) == 10
        found = {
            "layer_cv": [profile.mean_layer_cv() for profile in profiles],
            "global_cv": [profile.global_cv() for profile in profiles],
            "cold_share": [profile.cold_share().mean().item() for profile in profiles],
            "coverage": [profile.coverage(fraction=0.25).mean().item() for profile in profiles],
        }
        for statistic, values in found.items():
            assert round(sum(values) / 10, 3) == MODELS[name][statistic], (model, statistic)
    glm = import_profile(REAL / "glm_5_2" / "wiki.json")
    assert (glm.num_tokens, glm.num_experts_per_tok, glm.layers[0], glm.layers[-1]) == (191_804, 8, 3, 77)
    assert import_scores(REAL / "glm_5_2" / "wiki.json")["reap"].shape == (75, 256)
    each = import_profile(REAL / "olmoe_alpaca_per_example" / "bf16.json.gz")
    assert each.num_tokens == 88_098 and not each.has_mass
    both = import_profile([REAL / "moe_sieve" / "olmoe" / f"{name}.json" for name in ("gsm8k", "mbpp")])
    assert both.num_tokens == 1_167_505 + 33_802


def test_the_command_says_what_was_read_and_training_takes_the_profile(nano: Nano, tmp_path: Path, call):
    np.save(tmp_path / "routed.npy", nano.routed)
    file, plan = tmp_path / "p.safetensors", tmp_path / "plan.json"
    code, out, _ = call("import", tmp_path / "routed.npy", "--model", "nano", "-o", file)
    tokens = f"{nano.profile.num_tokens:,}"
    assert code == 0 and f"routed experts: {tokens} tokens, 6 layers (0 to 5) of 32 experts, 4 a token" in out
    assert "counts alone" in out and str(file) in out and "not bound" not in out
    assert call("plan", file, "-o", plan)[0] == 0
    assert hotlora.ExpertPlan.load(plan).experts == hotlora.select_experts(nano.profile).experts
    options = RunOptions(model="nano", data="nano-math", profile=file, r=2)
    check_run(options)  # what `train` asks of a profile before it begins
    code, out, _ = call("import", tmp_path / "routed.npy", "--num-experts", 32, "-o", file)
    assert code == 0 and "not bound to a model" in out
    check_run(options)
    import_profile(tmp_path / "routed.npy", file, num_experts=64)
    with pytest.raises(PlanError, match="64"):  # not bound, and it does not fit
        check_run(options)
    code, _, err = call("import", tmp_path / "routed.npy", "-o", file)
    assert code == 1 and "--num-experts" in err


def test_the_command_writes_scores_alone_as_json(tmp_path: Path, call):
    whole = {"counts": [[3, 1], [2, 2]], "num_tokens": 4, "reap": [[0.5, 1.5], [2, 3]]}
    (tmp_path / "c.json").write_text(json.dumps(whole))
    code, out, _ = call("import", tmp_path / "c.json", "-o", tmp_path / "s.json")
    assert code == 0 and str(tmp_path / "s-reap.json") in out
    written = json.loads((tmp_path / "s-reap.json").read_text())
    assert written == {"version": 1, "fingerprint": None, "scores": {"0": [0.5, 1.5], "1": [2.0, 3.0]}}
    (tmp_path / "c.json").write_text(json.dumps(GOOD))
    code, _, err = call("import", tmp_path / "c.json", "-o", tmp_path / "s.json")
    assert code == 1 and "holds no scores but counts" in err


def test_counts_that_map_layers_keep_their_numbers(tmp_path: Path):
    """The keys are decoder indices, so they are not numbered from 0; and mass may be written alike."""
    rows = {"1": [1, 2, 3, 4], "3": [4, 3, 2, 1]}
    mass = {"3": [2.0, 1.0, 1.0, 0.5], "1": [0.5, 1.0, 1.0, 2.0]}
    file = tmp_path / "counts.json"
    file.write_text(json.dumps({"counts": rows, "mass": mass, "num_experts_per_tok": 2}))
    profile = import_profile(file)
    assert profile.layers == (1, 3) and profile.counts.tolist() == [rows["1"], rows["3"]]
    assert profile.mass.tolist() == [mass["1"], mass["3"]]
    for changed, said in (
        ({"layers": [0, 1]}, r"counts have layers 1, 3, and layers are \[0, 1\]: keep one"),
        ({"mass": {"1": mass["1"], "2": mass["3"]}}, "mass have layers 1 to 2, counts 1, 3"),
    ):
        file.write_text(json.dumps({"counts": rows, "mass": mass, "num_experts_per_tok": 2, **changed}))
        with pytest.raises(DataError, match=said):
            import_profile(file)


def test_a_profile_of_ours_is_named_as_one(tmp_path: Path):
    ours = RoutingProfile((0,), torch.tensor([[2, 2]]), torch.ones(1, 2, dtype=torch.float64), 2, 2)
    ours.save(tmp_path / "ours.safetensors")
    with pytest.raises(HotLoraError, match="is a profile already: give it to --profile"):
        import_profile(tmp_path / "ours.safetensors")
    with pytest.raises(HotLoraError, match="is a profile already"):
        import_scores(tmp_path / "ours.safetensors")
