"""What a family does with packed rows, with padding on the left and with a load-balancing loss: every family of the
installed transformers says so itself, and no list of names is kept."""

import pytest
import torch
from peft import get_peft_model
from test_routing import batch
from tiny import tiny_model, tiny_plan
from zoo import families, zoo_config, zoo_model

from hotlora.adapter.config import HotLoraConfig
from hotlora.base.errors import HotLoraError, ModelError
from hotlora.hf.forward import check_aux_loss, check_aux_loss_of, check_packing, logits_at, padding_matters

every_family = pytest.mark.parametrize("family", families())
TEXTS = (list(range(3, 14)), list(range(90, 60, -2)))
# Of transformers 5.23, on a CPU without the kernels that keep packed sequences apart in linear attention, Mamba and
# convolutions.
MIX = {
    "afmoe", "deepseek_v4", "ernie4_5_vl_moe", "glm4v_moe", "gpt_oss", "inkling2", "inkling2_text", "inkling_mm_model",
    "inkling_text", "jamba", "minimax", "zaya",
}  # fmt: skip
RAISE = {
    "bailing_hybrid", "glm5_next", "granitemoehybrid", "kimi_linear", "lfm2_moe", "nemotron_h", "qwen3_5_moe",
    "qwen3_5_moe_text", "qwen3_next", "qwen4_exp", "qwen4_exp_text",
}  # fmt: skip

# With transformers 5.17 their configs have a coefficient, and the models no such loss.
AUX_LATER = {"granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared", "minimax_m3_vl"}


def next_token_loss(model, *texts, packed):
    """Summed over the texts, with gradients: in one packed row, or each by itself."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    rows = [{"input_ids": text} for text in texts]
    total = 0.0
    for inputs in [collate(rows)] if packed else [collate([row]) for row in rows]:
        labels = inputs.pop("labels")[:, 1:]
        scores = model(**inputs, use_cache=False).logits[:, :-1]
        total = total + torch.nn.functional.cross_entropy(scores.flatten(0, 1), labels.flatten(), reduction="sum")
    return total


def gradient(model, *, packed):
    parameters = [p for p in model.parameters() if p.requires_grad]
    loss = next_token_loss(model, *TEXTS, packed=packed)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat([g.flatten() for g in found if g is not None])


@every_family
def test_packing_is_refused_where_examples_would_see_each_other(family):
    """Where it is allowed, the gradient of a packed row is that of its texts."""
    model = zoo_model(family)
    model.get_output_embeddings().requires_grad_(True)
    said = None
    try:
        check_packing(model, TEXTS)
    except ModelError as error:
        said = str(error)
        assert f"this {model.config.model_type} model" in said and "leave out --packing" in said
    assert said or family not in MIX | RAISE
    if said and "see each other" not in said:
        with pytest.raises(ValueError, match="packed sequences"):
            next_token_loss(model, *TEXTS, packed=True)
        return
    together, apart = gradient(model, packed=True), gradient(model, packed=False)
    change = (together - apart).norm() / apart.norm()
    assert change > 0.1 if said else change <= 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3", "gemma4_text", "granitemoeshared"])
def test_half_precision_is_not_taken_for_mixing(family, dtype):
    model = zoo_model(family, dtype=dtype)
    check_packing(model, TEXTS)
    assert not padding_matters(model, list(range(3, 60)))


def test_an_adapted_model_in_training_is_probed_and_left_as_it_was():
    base = tiny_model()
    model = get_peft_model(base, HotLoraConfig(plan=tiny_plan(base), r=4, lora_dropout=0.5)).train()
    flags = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    check_packing(model, TEXTS)
    assert not padding_matters(model, [5, 6, 7, 8])
    assert [module.training for module in model.modules()] == flags and any(flags)
    assert torch.equal(torch.get_rng_state(), state) and torch.is_grad_enabled()


@every_family
def test_where_padding_on_the_left_matters_a_row_depends_on_it(family):
    """What the probe says, against the last logits of a short row beside a longer one."""
    model = zoo_model(family)
    short, long = list(range(5, 26)), list(range(80, 50, -1))
    inputs = batch(short, long, side="left")
    position_ids = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        together = model(**inputs, position_ids=position_ids, use_cache=False).logits[0, -1]
        alone = model(**batch(short), use_cache=False).logits[0, -1]
    difference = (together - alone).norm() / alone.norm()
    matters = padding_matters(model, long)
    assert matters is (family == "deepseek_v4")
    assert difference > 0.02 if matters else difference < 1e-4


@every_family
def test_logits_at_positions(family):
    """Families that take no logits_to_keep, too."""
    model, inputs, positions = zoo_model(family), batch(TEXTS[0], TEXTS[1][:11]), torch.tensor([2, 3, 7])
    with torch.no_grad():
        whole = model(**inputs, use_cache=False).logits
        some = logits_at(model, inputs, positions)
    torch.testing.assert_close(some.logits, whole[:, positions], rtol=1e-4, atol=1e-4)


@every_family
def test_the_auxiliary_loss_is_refused_where_there_is_none(family):
    """What the config says, and then the model, against what the model gives."""
    model, inputs = zoo_model(family), batch(TEXTS[0])
    with torch.no_grad():
        outputs = model(**inputs, use_cache=False, output_router_logits=True)
    refused = []
    for check, *about in ((check_aux_loss, zoo_config(family)), (check_aux_loss_of, model, TEXTS[0])):
        try:
            check(*about, 0.01)
        except HotLoraError as error:
            assert f"{family} model" in str(error) and "0.01" in str(error) and "--aux-loss-coef" in str(error)
            refused.append(check)
        check(*about, 0.0)
    if check_aux_loss in refused:
        assert getattr(outputs, "aux_loss", None) is None
    elif refused:  # by the model alone
        assert family in AUX_LATER and not getattr(outputs, "aux_loss", None)
    else:
        assert outputs.aux_loss > 0
