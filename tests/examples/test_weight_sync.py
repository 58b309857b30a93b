"""TorchRL's weight-synchronisation schemes with our policy, as far as they go without a GPU."""

import importlib.util

import pytest
import torch
from torch.testing import assert_close
from torchrl.collectors.llm import RayLLMCollector
from torchrl.modules.llm import AsyncVLLM
from torchrl.weight_update.llm import (
    SGLangWeightSyncScheme,
    VLLMDoubleBufferSyncScheme,
    VLLMWeightSyncScheme,
    get_model_metadata,
)
from transformers import AutoModelForCausalLM

from examples.lm_rlhf.config import tiny
from examples.lm_rlhf.models import load_policy
from examples.torchrl_llm import sampler
from tests.tiny_models import save_language_model

# The other strategy, "tensordict", leaves adapters apart (below).
pytestmark = pytest.mark.filterwarnings("ignore:state_dict strategy is experimental:UserWarning")

TOKENS = torch.arange(8).unsqueeze(0)
without_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is not None, reason="vllm is installed"
)
without_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is not None, reason="ray is installed"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_language_model(tmp_path_factory.mktemp("sync") / "model", chat=True)


@pytest.fixture(scope="module")
def policy(folder):
    """With adapters that have learnt something."""
    policy = load_policy(tiny(str(folder)))
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in policy.peft_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return policy


def test_what_is_sent_by_files_is_the_policy_with_its_adapters_merged(policy, folder, tmp_path):
    scheme = VLLMDoubleBufferSyncScheme(remote_addr=str(tmp_path), strategy="state_dict")
    sender = scheme.create_sender()
    sender.register_model(policy.peft_model)
    sender.update_weights()
    # An engine reads names as they are in the published checkpoint.
    engine = AutoModelForCausalLM.from_pretrained(folder)
    before = engine(TOKENS).logits
    received = scheme.create_transport().receive_weights()
    engine.load_state_dict(dict(received.items()))
    expected = policy.language_model(TOKENS).logits
    assert_close(engine(TOKENS).logits, expected, rtol=0, atol=1e-4)
    assert (before - expected).abs().max() > 0.1
    # Merged in a copy: the policy still learns through its adapters.
    assert any("lora_B" in name for name, _ in policy.language_model.named_parameters())


def test_the_wrapper_is_not_what_to_register(policy, tmp_path):
    """Its names have one "model." more, and its adapters stay apart: no engine knows them."""
    scheme = VLLMDoubleBufferSyncScheme(remote_addr=str(tmp_path))
    wrapper = sampler(policy, tiny("any"))
    sender = scheme.create_sender()
    sender.register_model(wrapper)
    sender.update_weights()
    names = set(scheme.create_transport().receive_weights().keys())
    assert {"model.lm_head.weight"} <= names
    assert any(".lora_A." in name for name in names)


def test_the_nccl_schemes_know_what_they_would_send(policy, folder):
    published = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    metadata = get_model_metadata(policy.peft_model)
    assert metadata == {name: (value.dtype, value.shape) for name, value in published.items()}
    scheme = VLLMWeightSyncScheme(gpus_per_replica=2, num_replicas=2, strategy="state_dict")
    scheme.create_sender().register_model(policy.peft_model)
    assert isinstance(scheme.master_port, int)
    served = SGLangWeightSyncScheme("http://localhost:30000", num_gpus=2, strategy="state_dict")
    served.create_sender().register_model(policy.peft_model)


@without_vllm
def test_engines_and_the_nccl_group_need_vllm(policy, folder):
    with pytest.raises(ImportError, match="vllm is not installed"):
        AsyncVLLM.from_pretrained(str(folder))
    sender = VLLMWeightSyncScheme(strategy="state_dict").create_sender()
    sender.register_model(policy.peft_model)
    with pytest.raises(ModuleNotFoundError, match="vllm"):
        sender.init_all_workers_group(get_model_metadata(policy.peft_model))


@without_ray
def test_the_collector_of_ray_needs_ray(policy):
    with pytest.raises(RuntimeError, match="ray library not found"):
        RayLLMCollector(lambda: None, policy=sampler(policy, tiny("any")), dialog_turns_per_batch=2)
