"""One run of each loop on the same model and batch, with a stopwatch on it."""

import dataclasses
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import torch
from accelerate import Accelerator
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from examples.lm_rlhf import train
from examples.lm_rlhf.config import Config, smollm2_135m, tiny
from examples.lm_rlhf.models import Policy, load_policy
from safe_ops import TokenLogProbs, token_log_probs
from safe_rl import (
    ControllerModule,
    KLBaseline,
    KLReward,
    PolicyMeasurements,
    PPOLoss,
    SAFELoss,
    SoftMinGAE,
    causal_lm,
)
from safe_rl.integrations.transformers import Sampler
from tests.benchmarks.stopwatch import Stopwatch, Update

ROWS, MINIBATCH, EPOCHS, PROMPT, RESPONSE = 16, 8, 2, 24, 24
VOCABULARY, WIDTH, LAYERS = 8192, 128, 4

STAGES: tuple[tuple[object, str, str], ...] = (
    (Sampler, "sample", "sampling"),
    (train, "score", "scoring"),
    (PolicyMeasurements, "forward", "controller"),
    (ControllerModule, "forward", "controller"),
    (KLBaseline, "forward", "advantages"),
    (KLReward, "forward", "advantages"),
    (SoftMinGAE, "forward", "advantages"),
    (SAFELoss, "forward", "losses"),
    (PPOLoss, "forward", "losses"),
    (train, "kl_of_update", "trust region"),
    (Accelerator, "backward", "backward"),
    (train, "clip", "optimizer"),
    (train, "polyak", "optimizer"),
    (torch.optim.Adam, "step", "optimizer"),
    (train, "save_checkpoint", "checkpoint"),
)
"""Functions of the example's loop, and the stage that each is part of."""


def make_tiny_model(folder: Path) -> None:
    """Language model, reward model and prompts, the same for every loop."""
    torch.manual_seed(0)
    words = {"<eos>": 0} | {f"w{number}": number for number in range(1, VOCABULARY)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<eos>", pad_token="<eos>", padding_side="left"
    )
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        num_labels=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "policy")
    LlamaForSequenceClassification(config).save_pretrained(folder / "reward")
    for name in ("policy", "reward"):
        tokenizer.save_pretrained(folder / name)
    ids = torch.randint(1, VOCABULARY, (64, PROMPT))
    (folder / "prompts.txt").write_text(
        "".join(" ".join(f"w{token}" for token in row) + "\n" for row in ids.tolist())
    )


def tiny_config(folder: Path) -> Config:
    """Ours, without the trust region: the peer has none."""
    return dataclasses.replace(
        tiny(str(folder / "policy")),
        reward_model=str(folder / "reward"),
        prompts=folder / "prompts.txt",
        batch_size=ROWS,
        minibatch_size=MINIBATCH,
        epochs=EPOCHS,
        max_new_tokens=RESPONSE,
        trust_region_limit=None,
        threads=1,
    )


def demo_config() -> Config:
    """SmolLM2-135M, as ``make demo`` runs it, on one thread."""
    return dataclasses.replace(smollm2_135m(), threads=1)


def without_ends(config: Config) -> Policy:
    """Every response has its full length: as many tokens for one loop as for the other."""
    return dataclasses.replace(load_policy(config), eos_ids=torch.empty(0, dtype=torch.int64))


def made_logits(
    states: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None,
    mask: Tensor,
    temperature: float,
) -> TokenLogProbs:
    """What ``linear_log_probs`` spares."""
    logits = torch.nn.functional.linear(states, weight, bias)
    scored = token_log_probs(logits, tokens, temperature=temperature)
    return TokenLogProbs(*(torch.where(mask, x, 0.0) for x in scored))


def ours(
    config: Config,
    *,
    algorithm: str,
    make_logits: bool,
    updates: int,
    output: Path,
    tell: Callable[[Update], object],
    clock: Callable[[], float] = time.thread_time,
) -> None:
    """The example's loop."""
    config = dataclasses.replace(config, algorithm=algorithm, steps=updates)
    with Stopwatch(tell, clock) as watch, ExitStack() as patches:
        patches.enter_context(patch.object(train, "load_policy", without_ends))
        if make_logits:
            patches.enter_context(patch.object(causal_lm, "linear_log_probs", made_logits))
        for owner, name, stage in STAGES:
            # The trust region scores once more: that is its price, and no scoring.
            watch.stage(owner, name, stage, whole=stage == "trust region")
        watch.mark(Sampler, "sample", "sampled")
        watch.mark(SoftMinGAE, "forward", "scored")
        watch.mark(train, "gather_rollout", "trained", before=True)
        watch.update_ends(train, "timing_record")
        train.train(config, output, resume=False)


def trl(folder: Path, *, updates: int, output: Path, tell: Callable[[Update], object]) -> None:
    """TRL's PPOTrainer: its value model is a second language model, trained whole."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    ppo: ModuleType = sys.modules[PPOTrainer.__module__]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "policy")
    lines = (folder / "prompts.txt").read_text().splitlines()
    config = tiny_config(folder)
    torch.set_num_threads(1)
    settings = PPOConfig(
        output_dir=str(output),
        per_device_train_batch_size=ROWS,
        gradient_accumulation_steps=1,
        num_mini_batches=ROWS // MINIBATCH,
        num_ppo_epochs=EPOCHS,
        local_rollout_forward_batch_size=ROWS,
        total_episodes=updates * ROWS,
        response_length=RESPONSE,
        temperature=1.0,
        learning_rate=config.policy_learning_rate,
        num_sample_generations=0,
        save_strategy="no",
        report_to="none",
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = PPOTrainer(
        settings,
        processing_class=tokenizer,
        model=LlamaForCausalLM.from_pretrained(folder / "policy"),
        ref_model=None,
        reward_model=LlamaForSequenceClassification.from_pretrained(folder / "reward"),
        value_model=LlamaForSequenceClassification.from_pretrained(folder / "reward"),
        train_dataset=Dataset.from_dict({"input_ids": tokenizer(lines)["input_ids"]}),
        peft_config=LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,
            target_modules=list(config.lora_targets),
            task_type="CAUSAL_LM",
        ),
    )
    with Stopwatch(tell) as watch:
        watch.mark(ppo, "batch_generation", "sampled")
        watch.mark(ppo, "masked_whiten", "scored")
        watch.mark(trainer, "log", "trained", before=True)
        watch.update_ends(trainer.callback_handler, "on_step_end")
        trainer.train()
