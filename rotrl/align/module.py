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
KEPT = ("identity", "curve", "validations", "best", "spoilt")  # by a checkpoint, beside Lightning's own
PATIENCE = 5  # steps in a row with a gradient that is not finite, until there is no point in going on


class LogitAlignment(pl.LightningModule):
    """Minimises `sum_k mix_k KL(teacher_k || adapted)` per token, plus `angle_prior * sum ||log R||^2`.

    Each teacher speaks on tokens that it sampled itself. The student's weights outside the adapted matrices stay those
    of the source. RiemannianAdam is Adam for parameters that lie on no manifold. `lr`, which a family's groups may
    scale, rises over `warmup` steps and falls to 0 along a cosine. With `patience` the fit stops after so many
    looks, one each `validate_every` steps, without a lower KL on the held-out batches, at the parameters of the lowest.
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
        mix: Mapping[str, float] | None = None,
        patience: int | None = None,
        validate_every: int = 1,
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
        self.mix = dict(mix or dict.fromkeys(teachers, 1 / len(teachers)))
        self.patience, self.validate_every = patience, validate_every
        self.identity = dict(identity or {})
        self.curve: list[dict[str, float]] = []
        self.validations: list[dict[str, float]] = []
        self.best: dict[str, Tensor] = {}  # the family's state at the lowest of `validations`
        self.spoilt = 0  # steps in a row that were skipped
        self.measured: dict[str, float] = {}  # by the last validation

    @property
    def student(self) -> PreTrainedModel:
        return self._frozen[0]

    @property
    def teachers(self) -> dict[str, PreTrainedModel]:
        return self._frozen[1]

    # the objective

    def kl(self, name: str, batch: Mapping[str, Tensor], adapted: Mapping[str, Tensor]) -> Tensor:
        """Mean of KL(teacher || adapted) over the sampled tokens of the batch, in nats; of a rank's share of it, what
        gives this in the mean over ranks."""
        with torch.no_grad():
            teacher = self.hidden(self.teachers[name], batch)
        student = self.hidden(self.student, batch, adapted)
        heads = head(self.student), head(self.teachers[name])
        return head_kl(student, heads[0], teacher, heads[1], count=batch["count"])

    def hidden(self, model: PreTrainedModel, batch: Mapping[str, Tensor], weights: Mapping[str, Tensor] | None = None):
        """Last hidden states (tokens, hidden) where the next token is a sampled one."""
        prefix = f"{model.base_model_prefix}."
        given = {name.removeprefix(prefix): weight for name, weight in (weights or {}).items()}
        arguments = {"input_ids": batch["ids"], "use_cache": False}
        return functional_call(model.base_model, given, kwargs=arguments).last_hidden_state[batch["predicts"]]

    def training_step(self, batch: Batch, _: int) -> Tensor:
        loss, figures = self.objective(batch)
        if self.angle_prior:
            with self.exactly():
                loss = loss + self.angle_prior * self.family.prior()
        self.note(figures)
        return loss

    def objective(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss without the prior, and the figures that it is made of: means over ranks are those of all."""
        adapted = self.adapted()
        kls = {name: self.kl(name, part, adapted) for name, part in batch.items()}
        loss = torch.stack([self.mix[name] * kl for name, kl in kls.items()]).sum()
        return loss, {f"kl_{name}": kl.detach() for name, kl in kls.items()}

    def adapted(self) -> dict[str, Tensor]:
        """The adapted weights in the student's dtype."""
        with self.exactly():
            return self.family(self.student.dtype)

    def exactly(self) -> torch.autocast:
        """float32 within a mixed-precision step: bfloat16 would swallow small angles."""
        return torch.autocast(self.device.type, enabled=False)

    @torch.no_grad()
    def note(self, figures: Mapping[str, Tensor]) -> None:
        """A row of the curve, as it stands before the step, and the same numbers for bar and loggers.

        What a family measures of itself costs as much as its step: it does so where it is kept.
        """
        step, every = self.global_step, self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        kept = step % every == 0 and (not self.curve or self.curve[-1]["step"] < step)  # once, if gradients accumulate
        means = self.trainer.strategy.reduce(torch.stack(list(figures.values())), reduce_op="mean")
        values = dict(zip(figures, means.unbind(), strict=True))
        if kept or (self.trainer.loggers and (step + 1) % every == 0):
            with self.exactly():
                values |= self.family.measures()
        self.log_dict(values, prog_bar=True, batch_size=1)
        if kept:
            self.curve.append({"step": step, **{key: float(value) for key, value in values.items()}})

    def validation_step(self, *_: Any) -> None:
        self.measured = self.heldout_kl()

    @torch.no_grad()
    def heldout_kl(self) -> dict[str, float]:
        """Mean KL of each teacher over the sampled tokens of the held-out batches, which the ranks share."""
        sums = {name: [0.0, 0.0] for name in self.teachers}
        adapted = self.adapted()
        for batch in self.heldout[self.trainer.global_rank :: self.trainer.world_size]:
            for name, part in self.trainer.strategy.batch_to_device(batch).items():
                count = float(part["count"])
                sums[name][0] += count * float(self.kl(name, part, adapted))
                sums[name][1] += count
        table = self.trainer.strategy.reduce(torch.tensor(list(sums.values()), device=self.device), reduce_op="sum")
        return {name: total / count for name, (total, count) in zip(sums, table.tolist(), strict=True)}

    # the early stop

    def is_due(self, step: int) -> bool:
        """Whether to look at the held-out batches after this step."""
        last = self.validations[-1]["step"] if self.validations else 0
        return self.patience is not None and step % self.validate_every == 0 and step > last

    def look(self, step: int) -> bool:
        """Measures the held-out KL, keeps the parameters if it is the lowest, tells whether the fit is over."""
        with self.trainer.precision_plugin.val_step_context():
            row = {"step": step, **{f"kl_{name}": kl for name, kl in self.heldout_kl().items()}}
        if self.mean_kl(row) < min((self.mean_kl(each) for each in self.validations), default=math.inf):
            self.best = {key: value.cpu().clone() for key, value in self.family.state_dict().items()}
        self.validations.append(row)
        return self.is_over()

    def is_over(self) -> bool:
        """Whether patience is at its end: so many looks since the lowest KL."""
        if self.patience is None or not self.validations:
            return False
        told = [self.mean_kl(row) for row in self.validations]
        return len(told) - 1 - told.index(min(told)) >= self.patience

    def mean_kl(self, row: Mapping[str, float]) -> float:
        """Of the teachers by `mix`; infinite where it is no number."""
        mean = sum(weight * row[f"kl_{name}"] for name, weight in self.mix.items())
        return mean if math.isfinite(mean) else math.inf

    def take_best(self) -> None:
        """Where the fit was watched; not a hook, for Lightning calls none where the checkpoint is that of the end."""
        if self.best:
            self.family.load_state_dict(self.best)

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
        if self.global_step % self.trainer.log_every_n_steps == 0 and self.family.drift() > DRIFT:  # type: ignore[attr-defined]
            optimizer = self.trainer.optimizers[0]
            for group in optimizer.param_groups:
                optimizer.stabilize_group(group)  # type: ignore[attr-defined]

    # what Lightning asks for

    def train_dataloader(self):
        return self.train_batches

    def val_dataloader(self):
        return DataLoader(range(1), batch_size=None)  # type: ignore[arg-type]  # one step goes through all batches

    def on_fit_start(self) -> None:
        self.move()

    def on_validation_start(self) -> None:
        self.move()

    def move(self) -> None:
        for model in (self.student, *self.teachers.values()):
            model.to(self.device)  # type: ignore[arg-type]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["rotrl"] = {key: getattr(self, key) for key in KEPT}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for key in KEPT:
            setattr(self, key, checkpoint["rotrl"][key])


def head(model: PreTrainedModel) -> Tensor:
    """Output embedding (vocabulary, hidden)."""
    return model.get_output_embeddings().weight  # type: ignore[union-attr]
