"""The commands as a user types them, on tiny models, the embedded one, and bad input."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_config
from tiny_files import save_tiny_model
from tiny_tokenizer import byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import hotlora
from hotlora import ExpertPlan, RoutingProfile
from hotlora.base.records import read_record
from hotlora.cli.main import app
from hotlora.cli.names import with_dashes


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["train", "--lora_r", "8"], "No such option: --lora-r. Did you mean --r?"),
        (["train", "--lr=1e-4"], "Did you mean --learning-rate?"),
        (["train", "--model-name-or-path", "nano"], "Did you mean --model?"),
        (["train", "--assistant-only-loss"], "Did you mean --train-on assistant?"),
        (["train", "--bf16"], "Did you mean --dtype bfloat16?"),
        (["train", "--target_modules", "q_proj"], "Leave it out: attention, the router, shared experts"),
        (["train", "--cutoff_len", "9"], "Did you mean --max-length?"),
        (["train", "--logging-steps", "1"], "Leave it out: metrics.jsonl"),
        (["evaluate", "--model_name_or_path", "nano"], "Did you mean --model?"),
        (["train", "--use_dora"], "Did you mean --dora?"),
        (["train", "--task", "nano-math"], "Did you mean --data?"),
        (["chat", "--adapter", "runs/a"], "It stands without an option: hotlora chat RUN."),
        (["plan", "p", "--model", "nano"], "No such option: --model (Possible options"),
        (["params", "--model", "nano"], "It stands without an option: hotlora params CONFIG."),
        (["generate", "runs/a", "hello"], "Each is named here: --adapter, --model."),
        (["evaluate", "runs/a"], "Each is named here: --data, --model, --adapter."),
    ],
)
def test_names_of_other_libraries_are_answered_with_ours(words: list[str], told: str):
    done = CliRunner().invoke(app, words)
    text = " ".join(done.output.replace("│", " ").split())
    assert done.exit_code == 2 and told in text, text
    assert text.count("--") < 8


def test_underscores_are_taken_for_dashes():
    config = Path(hotlora.__file__).parent / "nano" / "model" / "config.json"
    done = CliRunner().invoke(app, ["params", str(config), "--experts_per_layer=2", "--r", "8"])
    assert done.exit_code == 0, done.output
    assert with_dashes(["a_b", "--c_d=e_f", "--", "--g_h"]) == ["a_b", "--c-d=e_f", "--", "--g_h"]
    assert with_dashes(["--a_b\nc_d"]) == ["--a_b\nc_d"], "a text"
    assert "No such option" in CliRunner().invoke(app, ["params", "--no_such_thing"]).output


def run(*words: object) -> str:
    """What a command prints; a failure of the command is a failure of the test."""
    code, out, err = attempt(*words)
    assert code == 0, err
    return out


def attempt(*words: object) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "hotlora", *map(str, words)], capture_output=True, text=True, timeout=300
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_tiny_model(folder)
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{i} + 1 =", "completion": f" {i + 1}"}) + "\n" for i in range(40)))
    return file


OLMOE_CONFIG = Path(__file__).parents[1] / "benchmarks" / "configs" / "olmoe-1b-7b"


def test_help_needs_no_torch():
    code = (
        "import sys, hotlora.cli.main\n"
        "assert not {'torch', 'transformers', 'peft'} & set(sys.modules), 'help would take seconds'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    text = run("--help")
    for command in ("demo", "profile", "plan", "train", "evaluate", "merge", "report", "params"):
        assert re.search(rf"\b{command}\b", text)


def test_model_and_data_are_enough(call, model_folder: Path, rows: Path, tmp_path: Path):
    words = ("train", "--model", model_folder, "--data", rows, "--max-steps", 4, "--save-steps", 2)
    out = run(*words, "--output", tmp_path / "run")
    record = read_record(tmp_path / "run")
    assert record["status"] == "done" and record["plan"]["params"]["fraction"] == 0.25
    for name in ("adapter", "plan.json", "run.json"):
        assert str(tmp_path / "run" / name) in out and (tmp_path / "run" / name).exists()
    # The same words again: done already, nothing trained anew.
    assert call(*words, "--output", tmp_path / "run")[:2] == (0, out)


def test_the_stages_one_by_one(call, model_folder: Path, rows: Path, tmp_path: Path):
    folder = tmp_path / f"[bold] {'longer than a line ' * 6}"  # told whole, in one line
    folder.mkdir()
    profile, plan = folder / "profile.safetensors", folder / "plan.json"
    code, out, _ = call("profile", "--model", model_folder, "--data", rows, "-o", profile)
    assert code == 0 and f"profile: {profile}\n" in out
    assert RoutingProfile.load(profile).source["examples"] == 40
    code, out, _ = call("plan", profile, "--rule", "cold", "--experts-per-layer", 2, "-o", plan)
    assert code == 0 and out.startswith("cold: 4 of 16 experts in 2 layers") and out.endswith(f"plan: {plan}\n")
    assert all(len(ids) == 2 for ids in ExpertPlan.load(plan).experts.values())
    words = ("--model", model_folder, "--data", rows, "--max-steps", 2, "--plan", plan, "-o", folder / "run")
    code, out, _ = call("train", *words)
    assert code == 0 and "cold 25%" in out and f"adapter: {folder / 'run' / 'adapter'}\n" in out
    (told,) = re.findall("^pictures: (.*)$", out, re.MULTILINE)
    assert shlex.split(told) == ["hotlora", "report", str(folder / "run")], "a shell takes it as it is"
    code, out, _ = call("merge", "--model", model_folder, folder / "run" / "adapter", "-o", folder / "merged")
    assert code == 0 and (folder / "merged" / "model.safetensors").is_file() and "bits" not in out
    assert f"merged model: {folder / 'merged'}\n" in out
    code, out, _ = call("report", folder / "run")
    assert code == 0 and f"page: {folder / 'run' / 'report.html'}\n" in out
    assert (folder / "run" / "report.html").is_file()


def test_a_score_that_is_not_kept_is_told(call, tmp_path: Path):
    words = ("evaluate", "--model", "nano", "--data", "nano-choice", "--limit", 2)
    code, out, _ = call(*words)
    assert code == 0 and "kept nowhere: --output FOLDER keeps the record" in out
    code, out, _ = call(*words, "-o", tmp_path / "kept")
    assert code == 0 and "kept nowhere" not in out and (tmp_path / "kept" / "run.json").is_file()


def test_merge_and_export_tell_that_the_base_was_quantized(call, model_folder: Path, rows: Path, tmp_path: Path):
    adapter = tmp_path / "run" / "adapter"
    words = ("--model", model_folder, "--data", rows, "--max-steps", 1, "--experts-per-layer", 2)
    assert call("train", *words, "-o", tmp_path / "run")[0] == 0
    config = json.loads((adapter / "adapter_config.json").read_text())
    for keep, experts in (({}, "all experts in"), ({"0": [1]}, "all experts but the hot ones in")):
        config["base_quantization"] = {"bits": 4, "keep": keep}
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        for command in (("merge",), ("export", "--format", "peft")):
            output = tmp_path / f"{command[0]}{len(keep)}"
            code, out, _ = call(command[0], "--model", model_folder, adapter, "-o", output, *command[1:])
            assert code == 0 and f"{experts} 4 bits" in out
            if command[0] == "export":
                assert f"how to use it: {output / 'README.md'}\n" in out and (output / "README.md").is_file()


def test_parameters_from_a_config_alone(call, tmp_path: Path):
    config = {
        "model_type": "olmoe", "hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16,
        "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 64, "num_experts_per_tok": 8,
        "vocab_size": 50304,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    for budget, trainable in (
        ([], 311_459_840),
        (["--experts-per-layer", 16], 84_967_424),
        (["--fraction", 0.125], 47_218_688),
    ):
        code, out, _ = call("params", tmp_path / "config.json", *budget, "--json")
        assert code == 0 and json.loads(out)["trainable"] == trainable
    code, out, _ = call("params", tmp_path / "config.json", "--experts-per-layer", 16)
    assert code == 0 and "84,967,424" in out and "1.2131%" in out


def test_params_has_the_adapters_flops(call):
    code, out, _ = call("params", OLMOE_CONFIG, "--method", "hellora", "--coverage", 0.516)
    assert (
        code == 0 and "57.9 MFLOP a token forward for the adapter, where its experts take 51.6% of the routing" in out
    )
    code, out, _ = call("params", OLMOE_CONFIG, "--method", "hellori-s", "--coverage", 0.516, "--json")
    masked = json.loads(out)
    assert masked["adapter_flops"]["per_token"] == pytest.approx(57.9e6, rel=1e-3), "a mask saves none"
    code, out, _ = call("params", OLMOE_CONFIG, "--method", "fft", "--json")
    assert code == 0 and "adapter_flops" not in json.loads(out)
    code, _, err = call("params", OLMOE_CONFIG, "--method", "fft", "--coverage", 0.5)
    assert code == 1 and "coverage is of LoRA's FLOPs" in err


@pytest.mark.parametrize("rate", ["0", "-5", "nan", "inf"])
def test_params_takes_a_rate_above_0(call, rate: str):
    code, _, err = call("params", OLMOE_CONFIG, "--estimate", "--tflops", rate)
    assert code == 1 and "TFLOP/s is out of range: a rate is above 0" in err


OF_A_STEP = {
    "--batch-size": 4, "--max-length": 64, "--quantize": 4, "--quantize-linear": 4, "--offload": "all",
    "--optim": "adamw_8bit", "--device": "cpu", "--dtype": "float16", "--tflops": 5, "--gradient-checkpointing": None,
}  # fmt: skip


@pytest.mark.parametrize("flag", OF_A_STEP)
def test_params_drops_nothing_of_a_step(call, flag: str):
    value = OF_A_STEP[flag]
    words = [flag] if value is None else [flag, value]
    code, _, err = call("params", OLMOE_CONFIG, *words)
    assert code == 1 and f"{flag} changes what a step takes, not what is trained: give --estimate or --fit, too." in err


@pytest.mark.parametrize("method", ["fft", "perft-r", "perft-d", "perft-s"])
def test_params_refuses_a_budget_that_a_method_does_not_use(call, method: str):
    for budget in (["--fraction", 0.5], ["--experts-per-layer", 4]):
        code, _, err = call("params", OLMOE_CONFIG, "--method", method, *budget)
        assert code == 1 and f"method '{method}' chooses no experts: leave {budget[0]} out." in err


def test_params_takes_a_flag_before_a_placement_as_train_does(call):
    for words, router in ((["--placement", "pure"], 0), (["--placement", "pure", "--train-router"], 1_081_344)):
        code, out, _ = call("params", OLMOE_CONFIG, *words, "--json")
        assert code == 0 and json.loads(out)["router"] == router


def test_adapters_of_two_bases_are_not_combined(call, tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        config = {"base_model_name_or_path": f"lab/{name}"}
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config))
    code, _, err = call("combine", tmp_path / "a", tmp_path / "b", "-o", tmp_path / "out")
    assert code == 1 and "the adapters are of lab/a and lab/b: if these are one model, give it (--model)" in err


@pytest.mark.parametrize("device", ["mps", "meta", "no such thing"])
def test_params_estimates_for_cuda_and_cpu(call, device: str):
    for words in (["--estimate"], ["--fit", "12GB"]):
        code, _, err = call("params", OLMOE_CONFIG, "--device", device, *words)
        assert code == 1 and f"device is '{device}': give cuda or cpu." in err


def test_params_has_what_a_server_keeps_for_each_adapter(call):
    code, out, _ = call("params", OLMOE_CONFIG, "--experts-per-layer", 8, "--json")
    assert code == 0 and json.loads(out)["server_bytes"] == {"vllm": 620_756_992, "sglang": 620_756_992}
    code, out, _ = call("params", OLMOE_CONFIG, "--r", 20, "--share-a")
    told = "vllm 620.8 MB (--max-loras), sglang-shared 140.2 MB (--max-loras-per-batch)"
    assert code == 0 and f"Served, each adapter takes in bfloat16: {told}" in out
    code, out, _ = call("params", OLMOE_CONFIG, "--r", 600, "--json")
    assert code == 0 and list(json.loads(out)["server_bytes"]) == ["sglang"], "vLLM has no room of such a rank"


def test_an_estimate_is_for_the_device_that_is_named(call, model_folder: Path):
    command = ["params", model_folder, "--estimate", "--batch-size", 2, "--max-length", 32, "--json"]
    found = {}
    for device in ("cuda", "cpu"):
        code, out, _ = call(*command, "--device", device)
        assert code == 0
        found[device] = json.loads(out)["estimate"]
    assert {device: one["device"] for device, one in found.items()} == {"cuda": "cuda", "cpu": "cpu"}
    # The loss takes a tile of a fixed width on a GPU, and as many logits as there are on a CPU: few, here.
    assert found["cpu"]["memory"]["workspace"] < found["cuda"]["memory"]["workspace"]
    code, out, _ = call(*command)
    assert code == 0 and json.loads(out)["estimate"] == found["cuda"]


def test_bad_input_is_one_message(call, model_folder: Path, rows: Path, tmp_path: Path):
    train = ("train", "--model", model_folder, "--output", tmp_path / "run", "--max-steps", 2)
    broken, empty = tmp_path / "broken.jsonl", tmp_path / "empty.jsonl"
    broken.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    empty.write_text("")
    dense = tmp_path / "dense"
    LlamaForCausalLM(
        LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=259)
    ).save_pretrained(dense)
    byte_tokenizer().save_pretrained(dense)
    other = ExpertPlan({0: (0,), 1: (1,)}, 8, "hot", {}, fingerprint="olmoe-000000000000")
    other.save(tmp_path / "other.json")
    call("profile", "--model", model_folder, "--data", rows, "-o", tmp_path / "profile.safetensors")
    whole = (tmp_path / "profile.safetensors").read_bytes()
    (tmp_path / "short.safetensors").write_bytes(whole[: len(whole) // 2])
    for words, message in (
        ((*train, "--data", broken), r"broken\.jsonl line 2.*prompt"),
        ((*train, "--data", empty), r"empty\.jsonl holds no rows"),
        ((*train, "--data", tmp_path / "none.jsonl"), r"none\.jsonl"),
        ((*train, "--data", rows, "--fraction", 0), r"fraction is 0"),
        ((*train, "--data", rows, "--fraction", 1.5), r"fraction is 1\.5.*at most 1"),
        ((*train, "--data", rows, "--rule", "hottest"), r"rule 'hottest'.*hot, all, random, cold"),
        ((*train, "--data", rows, "--r", 0), r"r = 0 is out of range"),
        ((*train, "--data", rows, "--plan", tmp_path / "other.json"), r"plan was made for olmoe-000000000000"),
        ((*train, "--data", rows, "--profile", tmp_path / "short.safetensors"), r"short\.safetensors is not a whole"),
        (("train", "--model", dense, "--data", rows, "-o", tmp_path / "d"), r"llama model has no MoE layer"),
        (("train", "--model", tmp_path / "nowhere", "--data", rows, "-o", tmp_path / "d"), r"nowhere.*not a folder"),
        (("plan", tmp_path / "short.safetensors"), r"not a whole routing profile"),
        (("evaluate", "--generations", rows, "--data", rows), r"names no task"),
        (("report", tmp_path / "nothing"), r"nothing is not a folder"),
        (("report", model_folder), r"no run\.json"),
        (("demo", "--task", "gsm8k", "-o", tmp_path / "demo"), r"no task 'gsm8k'"),
    ):
        code, _, err = call(*words)
        assert code == 1, words
        assert re.search(message, " ".join(err.split())), err
        assert "Traceback" not in err and err.count("error:") == 1
    assert not list(tmp_path.rglob("*.tmp")) and not (tmp_path / "run" / "adapter").exists()


def test_a_config_of_an_unsupported_family_is_named(call, tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({**tiny_config("olmoe").to_dict(), "model_type": "dbrx"}))
    code, _, err = call("params", tmp_path / "config.json")
    assert code == 1 and "dbrx" in err
