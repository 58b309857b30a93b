"""Fine-tuning that stays near where it began, with the Trainer of transformers.

    python -m examples.transformers_trainer --model FOLDER_OR_HUB_ID --text FILE --output runs/near

The loss is the cross-entropy plus ``kl_coef`` times the KL to the untouched model. A controller
chooses ``kl_coef`` so that the KL settles at ``--target``; its state is in the checkpoints.
"""

import argparse
import copy
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

from safe_ops import kl_exact, masked_mean
from safe_ops.controllers import AdaptiveKL, Controller
from safe_rl.integrations.transformers_callback import ControllerCallback


class AnchoredTrainer(transformers.Trainer):
    """Logs the mean KL since the last log as ``kl``, nats per token."""

    reference: nn.Module
    kl_coef: float
    kls: list[Tensor]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Cross-entropy and the anchor."""
        outputs = model(**inputs)
        with torch.no_grad():
            reference = self.reference(**inputs).logits
        kl = masked_mean(kl_exact(outputs.logits, reference), inputs["attention_mask"].bool())
        self.kls.append(kl.detach())
        return outputs.loss + self.kl_coef * kl

    def log(self, logs, start_time=None):
        """Add the KL; over several ranks, reduce it here."""
        if self.kls:
            logs |= {"kl": torch.stack(self.kls).mean().item(), "kl_coef": self.kl_coef}
            self.kls.clear()
        super().log(logs, start_time)


def main(argv: list[str] | None = None) -> AnchoredTrainer:
    """Train; returns the trainer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, required=True, help="one text a line")
    parser.add_argument("--output", required=True)
    parser.add_argument("--target", type=float, default=0.1, help="nats per token")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--resume", action="store_true", help="from the last checkpoint there")
    options = parser.parse_args(argv)
    texts = options.text.read_text(encoding="utf-8").splitlines()
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    args = transformers.TrainingArguments(
        options.output, max_steps=options.steps, learning_rate=options.lr,
        lr_scheduler_type="constant", logging_steps=1, save_steps=20, report_to="none",
    )  # fmt: skip
    trainer = AnchoredTrainer(
        transformers.AutoModelForCausalLM.from_pretrained(options.model),
        args,
        data_collator=transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False),
        train_dataset=[dict(tokenizer(text)) for text in texts],
    )
    trainer.reference, trainer.kls = copy.deepcopy(trainer.model).eval(), []
    controller = Controller(AdaptiveKL(target=options.target, initial_coef=0.1, gain=1.0))
    set_coef = lambda state: setattr(trainer, "kl_coef", float(state.coef))  # noqa: E731
    trainer.add_callback(ControllerCallback(controller, on_update=set_coef))
    trainer.train(resume_from_checkpoint=options.resume or None)
    return trainer


if __name__ == "__main__":
    main()
