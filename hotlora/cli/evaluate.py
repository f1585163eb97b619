"""The command `evaluate`, and how scores are printed."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..base.errors import HotLoraError
from ..report.text import loss_word, shown
from ..runs.options import EvalOptions
from .options import AsJson, options_of, out
from .saved import tuned


@options_of(EvalOptions, leave=("model", "expert_parallel"))
def evaluate(
    data: Annotated[
        str | None,
        typer.Option("--data", "-d", "--task", help="A task, with its files (gsm8k:DIR), or your own rows."),
    ] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="A folder, a name on the Hub, or nano.")] = None,
    engine: Annotated[str, typer.Option(help="transformers, or vllm where it is installed.")] = "transformers",
    samples: Annotated[
        int, typer.Option(rich_help_panel="Sampling", help="Answers to each prompt, for pass@k (with a temperature).")
    ] = 1,
    temperature: Annotated[float, typer.Option(rich_help_panel="Sampling", help="0: greedy.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(rich_help_panel="Sampling", help="Draw from this share of the probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(rich_help_panel="Sampling", help="Of the draws.")] = 0,
    harness: Annotated[
        str | None, typer.Option(rich_help_panel="lm-eval", help="lm-eval: its prompts, metrics and filters.")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            rich_help_panel="lm-eval",
            help="Its tasks, with commas between; gsm8k:DIR and hellaswag:DIR read local files.",
        ),
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(rich_help_panel="lm-eval", help="Examples in the prompt (default: the task's).")
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(rich_help_panel="lm-eval", help="A folder with task configs of your own.")
    ] = None,
    generations: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel="Without a model",
            help="JSON lines with index or task_id, and completion: score these on a task. Several of an example give "
            "pass@k.",
        ),
    ] = None,
    allow_missing: Annotated[
        bool,
        typer.Option(
            "--allow-missing",
            rich_help_panel="Without a model",
            help="Examples without a completion count as wrong; else they are an error.",
        ),
    ] = False,
    rouge: Annotated[
        bool, typer.Option("--rouge", help="Of your own rows also ROUGE-L, which needs the extra rouge.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Keep run.json and every example's result here.")
    ] = None,
    as_json: AsJson = False,
    **given: Any,
) -> None:
    """Score a model, a model with an adapter, or completions made elsewhere, on a task's test split or your own rows.

    `hotlora evaluate --data rows.jsonl --adapter runs/mine` takes the base from the adapter. Of your own rows it tells
    exact match, loss, perplexity and token accuracy; with --rouge ROUGE-L.

    With --output, an evaluation that was stopped goes on where it was.

    humaneval runs Python that the model wrote, as far apart from all else as the system allows: docs/evaluation.md.
    """
    from ..evaluation.generate import Sampling
    from ..runs.evaluation import run_evaluation, run_generations, run_harness

    if generations is None and "adapter" in given:
        model, given["adapter"] = tuned(given["adapter"], model)
        given = {name: value for name, value in given.items() if value is not None}
    if harness is not None or tasks is not None:
        if harness != "lm-eval" or not tasks or data or not model or generations:
            raise HotLoraError("Give --harness lm-eval with --tasks and --model (and an adapter), and no --data.")
        drawn = rouge or samples != 1 or temperature or top_p != 1 or engine != "transformers"
        if drawn or "max_new_tokens" in given:
            raise HotLoraError(
                "lm-eval's tasks say how answers are drawn: leave engine, sampling, --max-new-tokens and --rouge out."
            )
        reading: list[str] = [
            name for name in ("apply_chat_template", "columns", "train_on", "test_split") if name in given
        ]
        if reading := [*reading, *(["seed"] if seed else []), *(["allow_missing"] if allow_missing else [])]:
            raise HotLoraError(f"lm-eval writes prompts and draws answers by itself: leave {', '.join(reading)} out.")
        names = [name.strip() for name in tasks.split(",")]
        options = EvalOptions(model=model, **given)
        record = run_harness(options, names, output, include_path=include_path, num_fewshot=num_fewshot)
        _show_evaluation(record, output, as_json)
        return
    if data is None or num_fewshot is not None or include_path is not None:
        raise HotLoraError("Give --data, a task to score; num-fewshot and include-path go with --harness lm-eval.")
    if allow_missing and generations is None:
        raise HotLoraError("--allow-missing is of completions made elsewhere: give --generations, too.")
    sampling = Sampling(samples, temperature, top_p, seed)
    answering = set(given) - {"limit"} or rouge or engine != "transformers" or sampling != Sampling()
    if generations is not None and answering:
        raise HotLoraError(
            "--generations holds the answers: leave out what says how a model answers, and how rows are read."
        )
    if (model is None) == (generations is None):
        raise HotLoraError("Give --model (and an adapter), which answers, or --generations, which holds the answers.")
    if model is None:
        assert generations is not None
        limit = given.get("limit")
        record, _ = run_generations(
            data, generations, output, allow_missing=allow_missing, limit=limit, progress=not as_json
        )
    else:
        options = EvalOptions(model=model, **given)
        record, _ = run_evaluation(options, data, output, sampling=sampling, engine=engine, rouge=rouge, progress=True)
    _show_evaluation(record, output, as_json)


def _show_evaluation(record: dict[str, Any], output: Path | None, as_json: bool) -> None:
    if as_json:
        print(json.dumps(record["evaluation"]))
    else:
        print_evaluation(record, output)
        if output is None:
            out.print("kept nowhere: --output FOLDER keeps the record and every example's result")
        if bits := record.get("config", {}).get("quantize"):
            kept = "; those of the adapter are not" if record["config"].get("keep_hot") else ""
            out.print(f"experts were stored in {bits} bits{kept} (--quantize)")
        if bits := record.get("config", {}).get("quantize_linear"):
            out.print(f"other linear layers were stored in {bits} bits (--quantize-linear)")


def print_evaluation(record: dict[str, Any], output: Path | None) -> None:
    for task, result in (record.get("evaluation") or {}).items():
        is_text = result["metric"] == "token_accuracy"
        if is_text:
            out.print(f"{task}: {result['n']:,} texts")
        else:
            out.print(
                f"{task}: {result['metric']} {result['accuracy']:.1%} "
                f"(95% {result['ci_low']:.1%} to {result['ci_high']:.1%}, n = {result['n']})",
            )
        if "loss" in result:
            which = "" if is_text else "response "
            low, high = (f"{end:.4f}" if end is not None else "?" for end in result["loss_ci"])
            out.print(
                f"  loss {loss_word(result['loss'])} (95% {low} to {high}), perplexity "
                f"{shown(result['perplexity'], '.3g')}, "
                f"token accuracy {result['token_accuracy']:.1%}, {result['tokens']:,} {which}tokens",
            )  # fmt: skip
        if "rouge_l" in result:
            low, high = (f"{end:.4f}" if end is not None else "?" for end in result["rouge_l_ci"])
            out.print(f"  ROUGE-L {result['rouge_l']:.4f} (95% {low} to {high})")
        passes = [f"{name} {value:.1%}" for name, value in result.items() if name.startswith("pass@")]
        if passes:
            out.print(f"  {', '.join(passes)}")
        if "max_new_tokens" in result:
            out.print(
                f"  {result['unfinished']:,} answers were cut at {result['max_new_tokens']:,} tokens "
                "(--max-new-tokens)",
            )
        if output is not None:
            out.print(f"  every example: {output / result.get('results', result.get('losses'))}")
