"""Merged weights: by hand, in half precision, with biases and several adapters."""

import pytest
import torch
from peft import LoraConfig
from torch import nn

from safe_rl.integrations.merged_linear import MergedLinear
from tests.safe_rl.integrations import models

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]


def weight_of(merged: MergedLinear) -> torch.Tensor:
    """[out, in], in whatever order the layer keeps it."""
    like = merged.weight
    one = torch.eye(merged.in_features, dtype=like.dtype)
    bias = 0 if merged.bias is None else merged.bias
    with torch.no_grad():
        return (merged(one) - bias).T


def test_by_hand() -> None:
    peft_model = models.with_lora(models.llama(), targets=["q_proj"])
    q_proj = peft_model.get_base_model().model.layers[0].self_attn.q_proj
    merged = MergedLinear([q_proj])
    merged.refresh()
    up, down = q_proj.lora_B["default"].weight, q_proj.lora_A["default"].weight
    expected = q_proj.base_layer.weight.double() + 5 / 3 * up.double() @ down.double()
    torch.testing.assert_close(weight_of(merged).double(), expected, rtol=1e-6, atol=1e-6)


def test_several_layers_with_and_without_bias() -> None:
    layers = [nn.Linear(3, 2), nn.Linear(3, 4, bias=False), nn.Linear(3, 1)]
    merged = MergedLinear(layers)
    merged.refresh()
    x = torch.randn(5, 2, 3)
    expected = torch.cat([layer(x) for layer in layers], -1)
    with torch.no_grad():
        torch.testing.assert_close(merged(x), expected)
    nn.init.constant_(layers[0].bias, 3.0)
    merged.refresh()
    assert (merged.bias[:2] == 3.0).all()


def test_two_active_adapters() -> None:
    peft_model = models.with_lora(models.llama(), targets=["o_proj"])
    peft_model.add_adapter("second", LoraConfig(r=2, target_modules=["o_proj"]))
    models.move_adapters(peft_model, 0.3)
    peft_model.base_model.set_adapter(["default", "second"])
    o_proj = peft_model.get_base_model().model.layers[1].self_attn.o_proj
    merged = MergedLinear([o_proj])
    merged.refresh()
    x = torch.randn(4, 16)
    torch.testing.assert_close(merged(x), o_proj(x), rtol=1e-5, atol=1e-5)


def test_float32_adapters_on_a_bfloat16_base_are_rounded_once() -> None:
    peft_model = models.with_lora(models.llama().bfloat16(), targets=["up_proj"])
    up_proj = peft_model.get_base_model().model.layers[0].mlp.up_proj
    assert up_proj.lora_A["default"].weight.dtype == torch.float32
    merged = MergedLinear([up_proj])
    merged.refresh()
    up, down = up_proj.lora_B["default"].weight, up_proj.lora_A["default"].weight
    expected = (up_proj.base_layer.weight.float() + 5 / 3 * up @ down).bfloat16()
    assert (weight_of(merged) == expected).float().mean() > 0.99


def test_weights_that_peft_has_merged_are_not_merged_twice() -> None:
    peft_model = models.with_lora(models.llama(), targets=["v_proj"])
    v_proj = peft_model.get_base_model().model.layers[0].self_attn.v_proj
    peft_model.base_model.merge_adapter()
    merged = MergedLinear([v_proj])
    merged.refresh()
    assert torch.equal(weight_of(merged), v_proj.base_layer.weight)


def test_a_refresh_follows_a_change_of_dtype() -> None:
    layer = nn.Linear(2, 3)
    merged = MergedLinear([layer])
    layer.double()
    merged.refresh()
    assert torch.equal(weight_of(merged), layer.weight)
    assert torch.equal(merged.bias, layer.bias)


def test_a_refresh_follows_a_layer_that_has_grown() -> None:
    layer = nn.Linear(2, 3)
    merged = MergedLinear([layer, nn.Linear(2, 1)])
    merged.refresh()
    grown = nn.Linear(2, 70)
    layer.weight.data, layer.bias.data = grown.weight.data, grown.bias.data
    merged.refresh()
    torch.testing.assert_close(weight_of(merged)[:70], grown.weight)
    assert torch.equal(merged.bias[:70], grown.bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # packed where it can be, and not
def test_made_in_inference_mode_and_refreshed_outside_of_it(dtype: torch.dtype) -> None:
    layer = nn.Linear(2, 3, dtype=dtype)
    with torch.inference_mode():
        merged = MergedLinear([layer])
        merged.refresh()
    nn.init.constant_(layer.weight, 2.0)
    merged.refresh()
    assert torch.equal(weight_of(merged), layer.weight)
    assert not merged.weight.requires_grad
    assert not merged.bias.requires_grad


def test_the_copy_is_no_part_of_the_state() -> None:
    layer = nn.Linear(2, 3)
    assert not MergedLinear([layer]).state_dict()
    assert not list(MergedLinear([layer]).parameters())


def test_other_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="plain LoRA over one, got Embedding"):
        MergedLinear([nn.Embedding(2, 3)])
