"""GRPO or RLOO of TRL with a KL that settles at a target: a controller moves beta.

    python -m examples.trl_beta --model FOLDER_OR_HUB_ID --prompts FILE --output runs/trl

Pays the VADER sentiment of the completion. The controller's state is in the checkpoints.
"""

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from safe_ops.controllers import AdaptiveKL, Controller
from safe_rl.integrations.trl import BetaCallback

TRAINERS = {"grpo": (GRPOConfig, GRPOTrainer), "rloo": (RLOOConfig, RLOOTrainer)}
ANALYZER = SentimentIntensityAnalyzer()


def sentiment(completions: list[str], **columns: object) -> list[float]:
    """VADER's compound sentiment, -1 to 1; TRL passes the other columns as well."""
    return [ANALYZER.polarity_scores(text)["compound"] for text in completions]


def main(argv: list[str] | None = None) -> GRPOTrainer | RLOOTrainer:
    """Train; returns the trainer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", type=Path, required=True, help="one prompt a line")
    parser.add_argument("--output", required=True)
    parser.add_argument("--algorithm", choices=TRAINERS, default="grpo")
    parser.add_argument("--target", type=float, default=0.05, help="nats per token")
    parser.add_argument("--gain", type=float, default=0.5, help="0 keeps beta at its start")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--resume", action="store_true", help="from the last checkpoint there")
    options = parser.parse_args(argv)

    config, trainer_class = TRAINERS[options.algorithm]
    args = config(
        options.output,
        max_steps=options.steps,
        learning_rate=options.lr,
        lr_scheduler_type="constant",
        per_device_train_batch_size=16,
        num_generations=8,
        max_completion_length=24,
        beta=0.05,  # not 0: TRL then builds no reference model
        bf16=torch.cuda.is_available(),
        save_steps=20,
        report_to="none",
    )
    prompts = options.prompts.read_text(encoding="utf-8").splitlines()
    trainer = trainer_class(
        options.model, sentiment, args=args, train_dataset=Dataset.from_dict({"prompt": prompts})
    )
    law = AdaptiveKL(target=options.target, initial_coef=args.beta, gain=options.gain)
    trainer.add_callback(BetaCallback(Controller(law), trainer))
    trainer.train(resume_from_checkpoint=options.resume or None)
    for entry in trainer.state.log_history:
        if {"beta", "kl"} <= entry.keys():
            print("step {step:4} kl {kl:.3f} beta {beta:.4f}".format(**entry))
    return trainer


if __name__ == "__main__":
    main()
