"""`--fit`: what it chooses fits, costs least, and leaves alone what was given."""

import itertools
import json
import re
from dataclasses import fields, replace

import pytest
import torch
from runs import run_options
from typer.testing import CliRunner

from hotlora.base.errors import HotLoraError
from hotlora.base.records import read_record
from hotlora.base.sizes import parse_size
from hotlora.cli.main import app
from hotlora.cost import fit as module
from hotlora.cost.cards import CARDS, step_time
from hotlora.cost.estimate import estimate, step_of
from hotlora.cost.fit import fit
from hotlora.cost.memory import Storage, expert_bytes, memory, state_bytes, transfer_bytes
from hotlora.cost.preflight import ROOM, experts_of, preflight, step_by, warm_up_by
from hotlora.cost.setups import LEVERS, Setups
from hotlora.hf.models import config_file
from hotlora.runs import training
from hotlora.runs.methods import resolve
from hotlora.runs.sweep import Condition, Sweep

LARGE = 10**12
SMALL = {"batch_size": 8, "max_length": 128, "r": 8}


def fitted(size, given=(), host=LARGE, device="cpu", **options):
    return fit(run_options(model="nano", data="", fit=size, **{**SMALL, **options}), given, host=host, device=device)


def needed(options, device="cpu"):
    """By an estimate of its own."""
    names = (
        *(field.name for field in fields(Storage) if hasattr(options, field.name)),
        "batch_size",
        "max_length",
        "r",
    )
    return estimate("nano", fraction=0.25, device=device, **{name: getattr(options, name) for name in names})["memory"]


PLAIN = run_options(model="nano", data="", **SMALL)


@pytest.mark.parametrize(
    ("text", "size"), [("24GB", 24 * 10**9), ("22.5 GiB", 22.5 * 2**30), ("800mb", 8 * 10**8), ("1TB", 10**12)]
)
def test_sizes(text, size):
    assert parse_size("fit", text) == size


@pytest.mark.parametrize("text", ["24", "GB", "0GB", "-3GB", "24 gigs", "", "1e9GB"])
def test_what_is_no_size(text):
    with pytest.raises(HotLoraError, match=r"fit is .*give a number with its unit, as 24GB or 22.5GiB"):
        run_options(model="nano", data="", fit=text)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("share", [0.8, 0.6, 0.45])
def test_what_is_chosen_fits(device, share):
    size = round(share * needed(PLAIN, device)["total"] / ROOM)
    found = fitted(f"{size / 1e6:.3f}MB", device=device)
    assert found.chosen
    real = needed(found.options, device)
    assert real["total"] <= 1.02 * ROOM * size  # activations are not quite even in the tokens
    assert found.memory["total"] == pytest.approx(real["total"], rel=0.02)
    examples = found.options.batch_size * found.options.gradient_accumulation_steps
    assert examples == SMALL["batch_size"]
    assert all(getattr(found.options, name) == value for name, value in found.chosen.items())


def test_nothing_is_changed_where_all_fits():
    found = fitted("10GB")
    assert not found.chosen and found.options == run_options(model="nano", data="", fit="10GB", **SMALL)
    assert "nothing to change: a step of 8 × 128 tokens needs about" in found.lines[1]


def test_the_cheapest_comes_first():
    """By the cost model; the experts are rounded only where that saves a lot."""
    size = 0.7 * needed(PLAIN, "cuda")["total"] / ROOM
    found = fitted(f"{size / 1e6:.3f}MB", device="cuda")
    assert "quantize" not in found.chosen
    step = step_of("nano", fraction=0.25, device="cuda", **SMALL)
    chosen = _time(step, found.options)
    for checkpointing, batch in itertools.product((False, True), (8, 4, 2, 1)):
        other = replace(
            PLAIN, gradient_checkpointing=checkpointing, batch_size=batch, gradient_accumulation_steps=8 // batch
        )
        if needed(other, "cuda")["total"] <= ROOM * size:
            assert _time(step, other) >= 0.999 * chosen


def _time(step, options):
    storage = Storage(**{f.name: getattr(options, f.name) for f in fields(Storage) if hasattr(options, f.name)})
    return step_time(step.of_tokens(options.batch_size * options.max_length), storage, CARDS[2]).step


@pytest.mark.parametrize(
    ("given", "left"),
    [
        ({"batch_size": 8}, {"batch_size", "gradient_accumulation_steps"}),
        ({"gradient_accumulation_steps": 1}, {"batch_size", "gradient_accumulation_steps"}),
        ({"gradient_checkpointing": False}, {"gradient_checkpointing"}),
    ],
)
def test_what_is_given_is_not_changed(given, left):
    size = 0.75 * needed(PLAIN)["total"] / ROOM
    try:
        found = fitted(f"{size / 1e6:.3f}MB", given=tuple(given), **given)
    except HotLoraError as error:
        assert "leave --" in str(error) and "to --fit" in str(error)
    else:
        assert found.chosen and not left & found.chosen.keys()


def test_where_nothing_fits_the_least_is_told():
    with pytest.raises(HotLoraError) as error:
        fitted("1MB")
    told = str(error.value)
    assert told.startswith("nano does not fit into 1 MB on cpu, of which 90% are counted on: the least is ")
    least = float(told.split("the least is ")[1].split(" MB")[0])  # in whole MB
    assert "--gradient-checkpointing" in told and "Take a device with" in told
    with pytest.raises(HotLoraError):
        fitted(f"{(least - 0.6) / ROOM:.2f}MB")
    assert fitted(f"{(least + 0.6) / ROOM:.2f}MB").memory["total"] == pytest.approx(least * 1e6, abs=0.5e6)


def test_what_is_told_beyond_it_would_do():
    options = {"rule": "all", "r": 64, "device": "cuda", "host": 0}
    with pytest.raises(HotLoraError) as error:
        fitted("1MB", **options)
    least = float(str(error.value).split("the least is ")[1].split(" MB")[0])
    with pytest.raises(HotLoraError) as error:
        fitted(f"{0.8 * least / ROOM:.2f}MB", **options)
    told = str(error.value).split("Each of these besides would do: ")[1]
    assert "--rule hot --fraction 0.25" in told and "--r 8" in told
    assert "paged" not in told  # it would need RAM


def test_half_the_length_is_advised_by_what_it_takes():
    """A quarter, where attention keeps its scores."""
    options = {"max_length": 1024, "batch_size": 1, "attn_implementation": "eager", "device": "cuda"}
    setups = setups_of(**options)
    (half,) = [way for way in setups.beyond(setups.own) if "max_length" in way.changes]
    own = step_of("nano", fraction=0.25, padded=True, r=8, **options | {"max_length": 512})
    assert half.step == own and half.step.length == 512
    assert half.step.rest < 0.4 * setups.own.step.rest


def test_ways_of_a_packed_run_have_masks_of_their_own():
    """Which grow with the square of a batch; kernels that know where examples end are advised."""
    options = {"max_length": 256, "batch_size": 4, "packing": True, "device": "cuda"}
    setups = setups_of(**options)
    for way in setups.chosen_from:
        size = way.changes.get("batch_size", 4)
        assert way.step == step_of("nano", fraction=0.25, packed=True, r=8, **sized(options, batch_size=size))
    assert setups.own.step.rest > 4.2 * min(way.step.rest for way in setups.chosen_from)
    base = next(way for way in setups.chosen_from if way.changes.get("batch_size") == 2)
    first = next(setups.beyond(base))
    assert first.changes == base.changes | {"attn_implementation": "flash_attention_2"}
    flash = {"batch_size": 2, "attn_implementation": "flash_attention_2"}
    assert first.step.rest == step_of("nano", fraction=0.25, packed=True, r=8, **sized(options, **flash)).rest
    assert first.step.tokens == 512 and first.total < base.total
    for other in ({"packing": False}, {"device": "cpu"}, {"attn_implementation": "flash_attention_2"}):
        others = setups_of(**options | other)
        assert not any("attn_implementation" in way.changes for way in others.beyond(others.own))


def test_a_packed_runs_warm_up_is_counted_at_its_batch():
    setups = setups_of(max_length=256, batch_size=4, packing=True, device="cuda", warmup="lora", rule="all")
    plain = setups_of(max_length=256, batch_size=4, packing=True, device="cuda", rule="all")
    assert [way.total for way in setups.chosen_from] == [way.total for way in plain.chosen_from]


def sized(options, **changes):
    return {name: value for name, value in options.items() if name != "packing"} | changes


def setups_of(device, **options):
    run = run_options(model="nano", data="", **{**SMALL, **options})
    path, where = config_file("nano"), torch.device(device)
    by = step_by(run, path, where, experts_of(run))
    return Setups(run, by, warm_up_of=warm_up_by(run, path, where))


def test_more_ram_and_one_thing_more_are_told_together():
    """With little RAM the least that fits is no measure of the model: offloading takes far less of the card."""
    with pytest.raises(HotLoraError) as error:
        fitted("0.1MB", device="cuda")
    whole = str(error.value)
    with pytest.raises(HotLoraError) as error:
        fitted("0.1MB", device="cuda", host=5 * 10**8)
    told = str(error.value)
    assert "RAM" not in whole and ", without more RAM." in told
    least, more = told.split("the least is ")[1], told.split(" of RAM it is ")[1]
    assert float(more.split(" MB")[0]) < float(least.split(" MB")[0])
    options = {"device": "cuda", "given": ("batch_size", "gradient_accumulation_steps"), "dtype": "float32"}
    with pytest.raises(HotLoraError) as error:
        fitted("0.1MB", **options)
    least = float(str(error.value).split("the least is ")[1].split(" MB")[0])
    with pytest.raises(HotLoraError) as error:
        fitted(f"{0.97 * least / ROOM:.2f}MB", host=0, **options)
    assert "GB of RAM with --gradient-checkpointing --offload all" in str(error.value)


@pytest.mark.parametrize("options", [{"full": True}, {"use_dora": True}, {"train_full_experts": True}])
def test_what_the_estimate_does_not_know(options):
    with pytest.raises(HotLoraError, match="which does not know"):
        fitted("1GB", **options)


def test_remedies_of_preflight_are_the_same_ways():
    """What is advised first is what --fit would choose."""
    free = round(0.6 * needed(PLAIN)["total"] / ROOM)
    advised = preflight(replace(PLAIN, device="cpu"), free=free).remedies
    found = fitted(f"{free / 1e6:.3f}MB")
    assert advised[0][0].split() == [
        word for name, value in found.chosen.items() for word in module.flag(name, value).split()
    ]


# Optimizers and offloading, by arithmetic.

SHAPES = ((1000, 300), (10, 8), (64, 64))


def test_the_state_of_optimizers_is_theirs():
    """Of torch's and bitsandbytes' own, after a step on parameters of these shapes."""
    torch = pytest.importorskip("torch")
    bnb = pytest.importorskip("bitsandbytes")
    made = {
        "adamw_torch": torch.optim.AdamW, "sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad,
        "rmsprop": torch.optim.RMSprop, "adamw_8bit": bnb.optim.AdamW8bit, "lion_8bit": bnb.optim.Lion8bit,
        "lion_32bit": bnb.optim.Lion, "ademamix_8bit": bnb.optim.AdEMAMix8bit,
    }  # fmt: skip
    for name, kind in made.items():
        parameters = [torch.nn.Parameter(torch.ones(shape)) for shape in SHAPES]
        optimizer = kind(parameters, lr=1e-3)
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        if "bitsandbytes" in kind.__module__:  # a step on a CPU is not in all of its versions; the state is made before
            for group in optimizer.param_groups:
                for parameter in parameters:
                    optimizer.init_state(group, parameter, 0, 0)
        else:
            optimizer.step()
        states = [value for state in optimizer.state.values() for key, value in state.items() if "qmap" not in key]
        real = sum(value.nbytes for value in states if isinstance(value, torch.Tensor) and value.ndim)
        assert sum(state_bytes(name, SHAPES)) == real, name


def test_paged_state_leaves_the_card():
    stays, leaves = state_bytes("paged_adamw_8bit", SHAPES)
    assert leaves == 2 * 300_000
    assert stays == sum(state_bytes("adamw_8bit", SHAPES)) - leaves
    with pytest.raises(HotLoraError, match="does not know the optimizer nonsense: it knows"):
        state_bytes("nonsense", ())


@pytest.fixture(scope="module")
def steps():
    return {device: step_of("nano", fraction=0.25, device=device, **SMALL) for device in ("cpu", "cuda")}


@pytest.mark.parametrize("quantize", [None, 4])
def test_offloaded_experts_are_elsewhere(quantize, steps):
    step = steps["cuda"]
    none, cold, every = (
        memory(step, Storage(quantize=quantize, offload=offload)) for offload in ("none", "cold", "all")
    )
    weights, _ = expert_bytes(step, Storage(quantize=quantize))
    layer, table = weights / len(step.experts), step.embedding * step.itemsize
    assert table > 0
    assert none["host"] == none["staging"] == 0
    # All wait there until the hot ones are known; then a projection's cold ones are copied.
    assert every["host"] == round(weights) and cold["host"] == round(weights + 0.75 * 2 / 3 * layer)
    for found, away in ((cold, 0.75 * weights), (every, weights)):
        assert found["weights"] + away + table == pytest.approx(none["weights"], abs=2)
        assert found["disk"] == 0 and found["total"] < none["total"]
    # Two slots for a layer's gate and up, two of its three matrices: what is multiplied, and what comes next.
    assert every["staging"] == round(4 / 3 * layer) and cold["staging"] == round(0.75 * 4 / 3 * layer)
    on_disk = memory(step, Storage(quantize=quantize, offload="all", offload_folder="somewhere"))
    assert (on_disk["host"], on_disk["disk"], on_disk["total"]) == (0, every["host"], every["total"])
    # There for the forward, and again for the backward.
    assert transfer_bytes(step, Storage(quantize=quantize, offload="all")) == pytest.approx(2 * weights)


def test_a_cpu_maps_what_is_offloaded(steps):
    step = steps["cpu"]
    weights, _ = expert_bytes(step, Storage())
    for offload in ("cold", "all"):
        found = memory(step, Storage(offload=offload))
        assert (found["disk"], found["host"], found["staging"]) == (weights, 0, 0)
        assert found["total"] == memory(step, Storage())["total"] - weights - step.embedding * step.itemsize


def test_offloading_is_chosen_within_the_ram_that_there_is(steps):
    """Weights are most of what a step of few tokens needs."""
    options = {"batch_size": 1, "max_length": 16, "r": 1, "device": "cuda", "dtype": "float32"}
    whole = estimate("nano", fraction=0.25, **options)["memory"]
    size = f"{0.5 * whole['total'] / ROOM / 1e6:.3f}MB"
    del options["device"]
    chosen = fitted(size, device="cuda", given=("quantize",), **options)
    assert chosen.chosen["offload"] in ("cold", "all")
    assert chosen.memory["host"] > 0 and any("come to the card" in line for line in chosen.lines)
    with pytest.raises(HotLoraError, match="of RAM with --offload"):
        fitted(size, device="cuda", given=("quantize",), host=0, **options)


# The commands.


def train(tmp_path, *flags):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{i} + 1 =", "completion": f" {i + 1}"}) + "\n" for i in range(4)))
    command = ["train", "--model", "nano", "--data", str(data), "--max-steps", "1", "--r", "2", "--no-preflight"]
    given = ["--device", "cpu", "--max-length", "128", "--output", str(tmp_path / "run"), *flags]
    return CliRunner().invoke(app, [*command, *given])


def test_train_does_what_it_says_and_goes_on_so(tmp_path):
    size = needed(run_options(model="nano", data="", batch_size=4, max_length=128, r=2))["total"] / ROOM
    result = train(tmp_path, "--fit", f"{size / 1e6:.2f}MB")
    assert result.exit_code == 0, result.output
    told = " ".join(result.stderr.split())
    assert "fit: --batch-size" in told and "as many examples an optimizer step" in told
    config = read_record(tmp_path / "run")["config"]
    assert config["fit"] and config["batch_size"] * config["gradient_accumulation_steps"] == 16
    assert config["batch_size"] < 16
    # With another size it is the same run, as it was begun.
    again = train(tmp_path, "--fit", "auto")
    assert again.exit_code == 0 and "nothing was trained now" in again.stderr and "fit:" not in again.stderr
    assert read_record(tmp_path / "run")["config"] == config


def test_a_run_that_was_stopped_goes_on_with_what_was_chosen(tmp_path, monkeypatch):
    """Whatever is free then; where nothing was kept, it is chosen for the memory of now."""
    size = needed(run_options(model="nano", data="", batch_size=4, max_length=128, r=2))["total"] / ROOM
    real = training.train
    for keeps in (True, False):
        folder = tmp_path / str(keeps)
        folder.mkdir()

        def stops(*args, keeps=keeps, **options):
            if keeps:
                real(*args, **options)
            raise HotLoraError("stopped here")

        with monkeypatch.context() as patched:
            patched.setattr("hotlora.runs.training.train", stops)
            assert train(folder, "--fit", f"{size / 1e6:.2f}MB").exit_code != 0
        then = read_record(folder / "run")["config"]
        assert then["batch_size"] < 16
        again = train(folder, "--fit", "100GB")
        assert again.exit_code == 0, again.output
        now = read_record(folder / "run")["config"]
        levers = [name for name in LEVERS if name in now and name in then]
        assert ([now[name] for name in levers] == [then[name] for name in levers]) == keeps
        assert keeps or now["batch_size"] == 16


def test_a_run_that_goes_on_is_told_of_nothing_that_it_may_not_change(tmp_path):
    """--extend with --fit: neither another rank nor other experts."""
    assert train(tmp_path).exit_code == 0
    result = train(tmp_path, "--fit", "20MB", "--max-steps", "2", "--extend", "--batch-size", "16")
    told = str(result.exception)
    assert "the least is" in told and "the same options" in told and "Or leave --batch-size to --fit" in told
    assert not any(flag in told for flag in ("--r ", "--max-length", "--optim", "--quantize", "smaller"))
    size = needed(run_options(model="nano", data="", batch_size=4, max_length=128, r=2))["total"] / ROOM
    result = train(tmp_path, "--fit", f"{size / 1e6:.2f}MB", "--max-steps", "2", "--extend")
    assert result.exit_code == 0, result.exception
    config = read_record(tmp_path / "run")["config"]
    assert config["batch_size"] < 16 and config["quantize"] is None


def test_a_sweep_has_no_fit():
    """Its runs would each choose on their own."""
    with pytest.raises(HotLoraError, match="fit"):
        Sweep("s", "nano", "nano-math", [Condition("hot")], options={"fit": "1GB"})


def test_too_little_ram_is_told():
    found = preflight(replace(PLAIN, device="cpu"), free=10**10)
    assert found.fits and not found.host
    short = replace(found, device="cuda:0", host=5 * 10**9, host_free=10**9)
    assert not short.fits and "5.0 GB of RAM for offloaded experts, of which 1.0 GB are free" in str(short)


def test_train_stops_before_anything_where_nothing_fits(tmp_path):
    result = train(tmp_path, "--fit", "1MB")
    assert result.exit_code != 0 and "the least is" in str(result.exception or result.output)
    assert not (tmp_path / "run").exists()


def test_params_says_the_same(tmp_path):
    arguments = ["params", "nano", "--fraction", "0.25", "--r", "8", "--max-length", "128", "--batch-size", "8"]
    size = f"{0.8 * needed(PLAIN)['total'] / ROOM / 1e6:.3f}MB"
    result = CliRunner().invoke(app, [*arguments, "--device", "cpu", "--fit", size, "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["fit"]["chosen"] == dict(fitted(size, given=("max_length", "r", "batch_size")).chosen)
    assert found["estimate"]["memory"]["total"] == pytest.approx(found["fit"]["memory"]["total"], rel=0.02)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


def params(*words):
    """What `hotlora params nano` says, or its error."""
    result = CliRunner().invoke(app, ["params", "nano", *map(str, words)])
    return str(result.exception) if result.exception else result.stdout


def as_json(*words):
    told = params(*words, "--json")
    assert told.startswith("{"), told
    return json.loads(told)


@pytest.mark.parametrize("options", [{"on_top_of": ["a"]}, {"reprofile_every": 5, "reprofile_left": "merge"}])
def test_what_a_gpu_cannot_offload_is_not_chosen_or_advised(options):
    size = 0.6 * needed(PLAIN, "cuda")["total"] / ROOM
    try:
        found = fitted(f"{size / 1e6:.3f}MB", device="cuda", **options)
        assert "offload" not in found.chosen
    except HotLoraError as error:
        assert "--offload" not in str(error) and "--quantize-linear" not in str(error)
        assert "paged_adamw" not in str(error) or "reprofile_every" not in options


def test_a_warm_up_is_counted_as_plain_lora_on_all_experts():
    """Whatever A and ranks the run after it has."""
    found = {}
    for method in ("hellora", "hellori-d", "perft-e"):
        options = resolve(method, model="nano", data="", warmup="lora", **SMALL)
        found[method] = warm_up_by(options, config_file("nano"), torch.device("cpu"))({}).trainable
    assert found["hellora"] == found["hellori-d"] == step_of("nano", device="cpu", **SMALL).trainable
    assert found["perft-e"] < found["hellora"], "it has no adapters on attention and router"


def test_params_says_how_fast_and_which_ram_it_counts_on(no_gpu):
    small = f"{0.85 * needed(PLAIN, 'cuda')['total'] / ROOM / 1e6:.3f}MB"
    words = ("--r", 8, "--max-length", 128, "--batch-size", 8, "--device", "cuda")
    for host, whose in (((), "free here; --host: another machine's"), (("--host", "9GB"), "--host")):
        told = params(*words, "--fit", small, "--offload", "all", *host)
        assert re.search(rf"whose memory is nearest; and [0-9.]+ GB of RAM \({whose}\)$", told, re.M), told
    assert "; and 5.0 GB of RAM (--host)" in told, "4 GB are left to the system"
    for size in ("12GB", small):
        told = params(*words, "--fit", size)
        (speed,) = re.findall(r": ([0-9,]+) tokens/s, by the cost model \(RTX 4070\)$", told, re.M)
        options = fitted(size, given=("r", "max_length", "batch_size"), device="cuda").options
        step = step_of(
            "nano", fraction=0.25, **{name: getattr(options, name) for name in ("batch_size", "max_length", "r")}
        )
        storage = Storage(**{field.name: getattr(options, field.name) for field in fields(Storage)})
        time = step_time(step, storage, CARDS[0])
        assert CARDS[0].name == "RTX 4070"
        assert float(speed.replace(",", "")) == pytest.approx(8 * 128 / time.step, rel=0.01)
    assert "tokens/s" not in params(*words[:-1], "cpu", "--fit", "1GB")
    assert "give --tflops, or --fit" in params("--estimate", "--max-length", 64)


def test_params_takes_what_is_here_or_a_named_device(no_gpu):
    assert "there is no GPU here" in params("--fit", "auto", "--device", "cuda")
    assert " on cpu, of which 90%" in params("--fit", "auto", "--r", 8, "--batch-size", 1)
    assert as_json("--fit", "auto", "--batch-size", 1)["estimate"]["device"] == "cpu"
    assert as_json("--fit", "1GB", "--device", "auto")["estimate"]["device"] == "cpu"


@pytest.mark.parametrize("words", [("--fit", "100MB"), ("--estimate",)])
def test_params_without_a_budget_has_the_default_of_train(words, no_gpu):
    words = ("--r", 8, "--max-length", 128, *words)
    found, quarter = as_json(*words), as_json(*words, "--fraction", 0.25)
    assert found.pop("fraction") == 0.25 and found == quarter
    assert params(*words).startswith("Experts: the hottest 25% of each layer's, as `hotlora train` has it by default")
    assert "as `hotlora train`" not in params(*words, "--fraction", 1)
    every = as_json(*words, "--fraction", 1)
    assert every["trainable"] == as_json("--r", 8)["trainable"] > found["trainable"]
    assert every["estimate"]["memory"]["adapter"] > found["estimate"]["memory"]["adapter"]


def test_params_advises_its_own_options(no_gpu):
    words = ("--method", "lora", "--r", 64, "--max-length", 128, "--batch-size", 8, "--host", "4GB")
    least = float(params(*words, "--fit", "1MB").split("the least is ")[1].split(" MB")[0])
    words = (*words, "--fit", f"{0.8 * least / ROOM:.2f}MB")
    told = params(*words)
    assert "--rule" not in told and "--fraction 0.25 (" in told
    assert as_json(*words, "--fraction", 0.25)["fit"]["chosen"]


def test_the_ram_that_is_advised_is_enough(no_gpu):
    words = ("--fit", "99MB", "--max-length", 512)
    told = params(*words, "--host", "4GB")
    size, flags = told.split("(--host ")[1].split(") with ")
    assert "4.0 GB are left to the process and the system" in told
    given = flags.split(" (")[0].split()
    assert as_json(*words, *given, "--host", size)["fit"]["memory"]["host"] > 0


METHODS_KNOWN = ["hellora", "lori-s", "sieve", "dr-lora", "perft-e"]


@pytest.mark.parametrize("method", METHODS_KNOWN)
def test_params_takes_the_methods_that_train_fits(method, no_gpu):
    size, small = "60MB", {"batch_size": 4, "max_length": 128, "r": 8}
    words = ("--method", method, "--r", 8, "--max-length", 128, "--batch-size", 4, "--device", "cpu", "--fit", size)
    run = resolve(method, model="nano", data="", device="cpu", fit=size, **small)
    chosen = dict(fit(run, tuple(small), host=LARGE, device="cpu").chosen)
    found = as_json(*words)
    assert found["fit"]["chosen"] == chosen
    assert found["estimate"]["memory"]["total"] == pytest.approx(found["fit"]["memory"]["total"], rel=0.02)
    assert ("trainable" in found) == (method != "dr-lora")
    if method == "dr-lora":
        assert params(*words).startswith("Parameters are not counted: method 'dr-lora' trains two of")


def test_the_routers_own_k_is_counted_as_it_is():
    """Of nano's 32 experts 4, where a quarter are 8."""
    exact = step_of("nano", experts_per_layer=4, device="cpu", **SMALL)
    assert step_of("nano", experts_per_layer="top_k", device="cpu", **SMALL) == exact
    with pytest.raises(HotLoraError, match="experts_per_layer is 'all': it must be an integer from 1 to 32"):
        step_of("nano", experts_per_layer="all", device="cpu", **SMALL)


@pytest.mark.parametrize(("method", "words"), [("fft", "full fine-tuning"), ("dora", "DoRA"), ("esft", "full experts")])
def test_params_names_what_it_cannot_foresee(method, words):
    for asked in (("--estimate",), ("--fit", "1GB")):
        told = params("--method", method, *asked)
        assert f"method '{method}' is {words}, which {asked[0]} does not know: leave {asked[0]} out, or give" in told


@pytest.mark.parametrize(
    ("size", "name"),
    [("8GB", "RTX 4070"), ("12GiB", "RTX 4070"), ("20GB", "RTX 4090"), ("80GiB", "H100 SXM"), ("141GB", "H200 SXM")],
)
def test_without_a_gpu_times_are_of_the_card_of_that_size(size, name, no_gpu):
    found = fitted(size, device="cuda")
    assert found.lines[0].endswith(f"; counted as an {name}, whose memory is nearest")
    assert "counted as" not in fitted(size, device="cpu").lines[0]


def test_a_cpus_time_is_foreseen_too():
    found = fitted("60MB", max_length=512)
    assert "gradient_checkpointing" in found.chosen
    ratio = float(found.lines[-1].split("takes ")[1].split(" times")[0])
    assert ratio > 1.2 and found.lines[-1].endswith("(a CPU, whose rates are assumed)")


def test_a_cpu_is_advised_no_paged_optimizer():
    options = {"r": 64, "rule": "all"}
    advised = {}
    for device in ("cpu", "cuda"):
        with pytest.raises(HotLoraError) as error:
            fitted("1MB", device=device, **options)
        least = float(str(error.value).split("the least is ")[1].split(" MB")[0])
        with pytest.raises(HotLoraError) as error:
            fitted(f"{0.85 * least / ROOM:.2f}MB", device=device, **options)
        advised[device] = str(error.value)
    assert "--optim adamw_8bit (" in advised["cpu"] and "--optim paged_adamw_8bit (" in advised["cuda"]
