"""The model under training: frozen student and teachers, only the family's parameters learn."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import geoopt
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from rotrl.align.data import Batch, TrainBatches
from rotrl.align.family import Family
from rotrl.align.objective import head_kl
from rotrl.errors import NumericsError

DRIFT = 1e-5  # orthogonality error above which rotations are projected back
PATIENCE = 5  # steps in a row with a gradient that is not finite, until there is no point in going on


class LogitAlignment(pl.LightningModule):
    """Minimises the mean over teachers of `KL(teacher || adapted)` per token, plus `angle_prior * sum ||log R||^2`.

    Each teacher speaks on tokens that it sampled itself. The student's weights outside the adapted matrices stay those
    of the source. RiemannianAdam is Adam for parameters that lie on no manifold. `lr`, which a family's groups may
    scale, rises over `warmup` steps and falls to 0 along a cosine.
    """

    def __init__(
        self,
        family: Family,
        student: PreTrainedModel,
        teachers: Mapping[str, PreTrainedModel],
        *,
        train: TrainBatches | None = None,
        heldout: Sequence[Batch] = (),
        lr: float = 0.0,
        warmup: int = 0,
        angle_prior: float = 0.0,
        identity: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        self.family = family
        # In a list, out of Lightning's sight: frozen models belong in no checkpoint.
        self._frozen = [student, dict(teachers)]
        for model in (student, *teachers.values()):
            model.eval().requires_grad_(False)
        self.train_batches, self.heldout = train, heldout
        self.lr, self.warmup, self.angle_prior = lr, warmup, angle_prior
        self.identity = dict(identity or {})
        self.curve: list[dict[str, float]] = []
        self.spoilt = 0  # steps in a row that were skipped

    @property
    def student(self) -> PreTrainedModel:
        return self._frozen[0]

    @property
    def teachers(self) -> dict[str, PreTrainedModel]:
        return self._frozen[1]

    # the objective

    def kl(self, name: str, batch: Mapping[str, Tensor], adapted: Mapping[str, Tensor]) -> Tensor:
        """Mean of KL(teacher || adapted) over the sampled tokens of the batch, in nats."""
        with torch.no_grad():
            teacher = self.hidden(self.teachers[name], batch)
        student = self.hidden(self.student, batch, adapted)
        return head_kl(student, head(self.student), teacher, head(self.teachers[name]))

    def hidden(self, model: PreTrainedModel, batch: Mapping[str, Tensor], weights: Mapping[str, Tensor] | None = None):
        """Last hidden states (tokens, hidden) where the next token is a sampled one."""
        prefix = f"{model.base_model_prefix}."
        given = {name.removeprefix(prefix): weight.to(model.dtype) for name, weight in (weights or {}).items()}
        arguments = {"input_ids": batch["ids"], "use_cache": False}
        return functional_call(model.base_model, given, kwargs=arguments).last_hidden_state[batch["predicts"]]

    def training_step(self, batch: Batch, _: int) -> Tensor:
        adapted = self.adapted()
        kls = {name: self.kl(name, part, adapted) for name, part in batch.items()}
        with self.exactly():
            prior = self.family.prior() if self.angle_prior else 0.0
            self.note(kls)
        return torch.stack(list(kls.values())).mean() + self.angle_prior * prior

    def adapted(self) -> dict[str, Tensor]:
        with self.exactly():
            return self.family()

    def exactly(self) -> torch.autocast:
        """float32 within a mixed-precision step: bfloat16 would swallow small angles."""
        return torch.autocast(self.device.type, enabled=False)

    @torch.no_grad()
    def note(self, kls: Mapping[str, Tensor]) -> None:
        """A row of the curve, as it stands before the step, and the same numbers for bar and loggers."""
        values = {f"kl_{name}": kl.detach() for name, kl in kls.items()}
        values |= self.family.measures()
        self.log_dict(values, prog_bar=True, batch_size=1)
        step, every = self.global_step, self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if step % every == 0 and (not self.curve or self.curve[-1]["step"] < step):  # once, if gradients accumulate
            self.curve.append({"step": step, **{key: float(value) for key, value in values.items()}})

    def validation_step(self, batch: Batch, _: int) -> None:
        adapted = self.adapted()
        for name, part in batch.items():
            tokens = int(part["predicts"].sum())
            self.log(f"kl_{name}", self.kl(name, part, adapted), batch_size=tokens, on_step=False, on_epoch=True)

    # the optimiser and its guards

    def configure_optimizers(self):
        optimizer = geoopt.optim.RiemannianAdam(self.family.groups(self.lr), betas=(0.9, 0.95))
        steps = self.trainer.max_steps

        def schedule(step: int) -> float:
            rise = min(1.0, (step + 1) / (self.warmup + 1))
            return rise * 0.5 * (1 + math.cos(math.pi * step / steps))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_before_optimizer_step(self, _: Any) -> None:
        """Drops a gradient that is not finite: geoopt would let it into the parameter and its moments for good."""
        parts = list(self.family.parameters())
        if all(part.grad is None or bool(part.grad.isfinite().all()) for part in parts):
            self.spoilt = 0
            return
        self.spoilt += 1
        if self.spoilt >= PATIENCE:
            raise NumericsError(
                f"step {self.global_step}: the gradient was NaN or Inf {PATIENCE} steps in a row; lower align.lr or "
                "check the teachers' weights"
            )
        for part in parts:
            part.grad = None

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.family.drift() > DRIFT:
            optimizer = self.trainer.optimizers[0]
            for group in optimizer.param_groups:
                optimizer.stabilize_group(group)  # type: ignore[attr-defined]

    # what Lightning asks for

    def train_dataloader(self):
        return self.train_batches

    def val_dataloader(self):
        return DataLoader(self.heldout, batch_size=None)  # type: ignore[arg-type]

    def on_fit_start(self) -> None:
        self.move()

    def on_validation_start(self) -> None:
        self.move()

    def move(self) -> None:
        for model in (self.student, *self.teachers.values()):
            model.to(self.device)  # type: ignore[arg-type]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["rotrl"] = {"identity": self.identity, "curve": self.curve, "spoilt": self.spoilt}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.curve, self.spoilt = checkpoint["rotrl"]["curve"], checkpoint["rotrl"]["spoilt"]


def head(model: PreTrainedModel) -> Tensor:
    """Output embedding (vocabulary, hidden)."""
    return model.get_output_embeddings().weight  # type: ignore[union-attr]
