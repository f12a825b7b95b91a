"""Records as a run leaves them: 13 models on two tasks, one without scores, one whose evaluation failed."""

import csv
import hashlib
import itertools

import numpy as np
import pytest

SHAPES = {
    "q": (96, 96),
    "k": (32, 96),
    "v": (32, 96),
    "o": (96, 96),
    "gate": (256, 96),
    "up": (256, 96),
    "down": (96, 256),
}
CONTROLS = ("isotropic", "sign_flip", "permuted", "bf16_rounding", "planted_0.0", "planted_0.5", "planted_1.0")
SKILL = {  # true accuracies: (tiny_math, tiny_code)
    "base": (0.25, 0.44),
    "math": (0.80, 0.39),
    "code": (0.23, 0.98),
    "linear": (0.73, 0.86),
    "task_arithmetic": (0.72, 0.86),
    "task_arithmetic_065": (0.75, 0.88),
    "slerp": (0.73, 0.87),
    "ties": (0.74, 0.86),
    "tsv_m": (0.77, 0.91),
    "split_task_arithmetic": (0.74, 0.88),
    "orthomerge": (0.73, 0.88),
    "geodesic": (0.72, 0.85),
    "learned": (0.79, 0.965),
}
MERGES = [name for name in SKILL if name not in ("base", "math", "code")]
ROTATIONS = ("split_task_arithmetic", "orthomerge", "geodesic", "learned")
TASKS = ("tiny_math", "tiny_code")
PROBLEMS, SAMPLES = 150, 8


def sha(text):
    return hashlib.sha256(text.encode()).hexdigest()


def write_csv(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def null_share(m, n, side):
    if side == "right":
        m, n = n, m
    return (m - 1) / (2 * n) if m <= n else 1 - (n + 1) / (2 * m)


def geometry_rows(rng):
    rows = []
    for expert, layer, (module, (m, n)), side in itertools.product(
        ("math", "code", "math_sft"), range(3), SHAPES.items(), ("left", "right")
    ):
        for control in ("", *(CONTROLS if expert != "math_sft" else ())):
            null = np.clip(null_share(m, n, side) + rng.normal(0, 0.01), 0.01, 0.98)
            planted = {"planted_0.5": 0.25, "planted_1.0": 0.95}.get(control, 0.0)
            kappa = planted + rng.normal(-0.02 if not control else 0.0, 0.02)
            rows.append(
                {
                    "expert": expert,
                    "tensor": f"model.layers.{layer}.{module}_proj.weight",
                    "layer": layer,
                    "module": module,
                    "rows": m,
                    "cols": n,
                    "rel_norm": 0.065,
                    "side": side,
                    "share": null + kappa * (1 - null),
                    "null": null,
                    "kappa": kappa,
                    "kappa_low": kappa - 0.02,
                    "kappa_high": kappa + 0.02,
                    "nu": 2.2,
                    "rho": 0.01,
                    "gram": 1.0,
                    "nss": 0.002,
                    "angle_max": 4.3,
                    "unchanged_bf16": 0.01,
                    "control": control,
                }
            )
    return rows


def samples(rng):
    """0/1 matrices (problems x samples) whose difficulty the models share, as real problems do."""
    hard = {task: rng.normal(0, 1.2, PROBLEMS) for task in TASKS}
    drawn = {}
    for model, skills in SKILL.items():
        for task, skill in zip(TASKS, skills, strict=True):
            logit = np.log(skill / (1 - skill)) * 1.25 - hard[task]
            drawn[model, task] = (rng.random((PROBLEMS, SAMPLES)) < 1 / (1 + np.exp(-logit[:, None]))).astype(float)
    return drawn


def score_rows(drawn):
    rows = []
    for (model, task), outcome in drawn.items():
        means = outcome.mean(1)
        for metric, values in ((f"avg@{SAMPLES}", means), (f"pass@{SAMPLES}", outcome.max(1))):
            value, half = values.mean(), 1.96 * values.std() / PROBLEMS**0.5
            sampling = 1.96 * (means * (1 - means)).mean() ** 0.5 / (PROBLEMS * SAMPLES) ** 0.5
            rows.append(
                {
                    "model": model,
                    "task": task,
                    "protocol": "tiny",
                    "metric": metric,
                    "value": value,
                    "low": value - half,
                    "high": min(value + half, 1.0),
                    "sampling_low": value - sampling,
                    "sampling_high": value + sampling,
                    "problems": PROBLEMS,
                    "samples": PROBLEMS * SAMPLES,
                    "truncated": 3,
                    "unfinished": 0,
                }
            )
    return rows


def comparison_rows(drawn):
    rows = []
    pairs = [(merge, other) for merge in MERGES for other in ("base", "math", "code")]
    for (a, b), task in itertools.product([*pairs, ("learned", "tsv_m")], TASKS):
        difference = drawn[a, task].mean(1) - drawn[b, task].mean(1)
        value, half = difference.mean(), 1.96 * difference.std() / PROBLEMS**0.5
        base = drawn["base", task].mean()
        gain = drawn[b, task].mean() - base
        kept = (drawn[a, task].mean() - base) / gain if gain > 0.1 else None
        rows.append(
            {
                "a": a,
                "b": b,
                "task": task,
                "difference": value,
                "low": value - half,
                "high": value + half,
                "p_value": float(np.exp(-abs(value / half) * 2)),
                "wins": int((difference > 0).sum()),
                "ties": int((difference == 0).sum()),
                "losses": int((difference < 0).sum()),
                "retention": kept,
                "retention_low": kept and kept - 0.04,
                "retention_high": kept and kept + 0.04,
            }
        )
    return rows


def geometry_summary(rows):
    groups = itertools.product(("math", "code", "math_sft"), SHAPES, ("left", "right"))
    summary = []
    for expert, module, side in groups:
        own = [r for r in rows if (r["expert"], r["module"], r["side"], r["control"]) == (expert, module, side, "")]
        kappa = float(np.median([r["kappa"] for r in own]))
        summary.append(
            {
                "expert": expert,
                "module": module,
                "side": side,
                "kappa_median": kappa,
                "kappa_low": kappa - 0.02,
                "kappa_high": kappa + 0.02,
                "nu_median": 2.2,
                "share_median": float(np.median([r["share"] for r in own])),
                "null_median": float(np.median([r["null"] for r in own])),
                "verdict": "no rotation beyond the null",
            }
        )
    words = "no rotation beyond the null in 42 of 42 groups; the update is no closer to a rotation than its sign flip"
    return {"rows": summary, "verdict": words, "thresholds": {"rotation": 0.5, "none": 0.05}}


def skeleton():
    pair = {"a": "math", "b": "code", "norm_a": 9.1, "norm_b": 8.7, "norm_ab": 12.4, "cosine": 0.04}
    suite = {m: {"_target_": f"rotrl.merge.{'rotation' if m in ROTATIONS else 'linear'}.{m}"} for m in MERGES}
    return {
        "rotrl": "0.1.0",
        "name": "demo",
        "digest": sha("demo"),
        "command": "python -m rotrl protocol.n=8 logger.api_key=hunter2hunter2",
        "created": "2026-01-05T10:00:00+00:00",
        "finished": "2026-01-05T10:03:41+00:00",
        "status": "done",
        "config": {"seed": 0, "merge": suite, "logger": {"mode": "offline", "api_key": "hunter2hunter2"}},
        "models": {
            "base": {"path": "/models/base", "sha256": sha("base")},
            "experts": {name: {"path": f"/models/{name}", "sha256": sha(name)} for name in ("math", "code")},
            "controls": {"math_sft": {"path": "/models/math_sft", "sha256": sha("math_sft")}},
        },
        "versions": {"torch": "2.13.0", "vllm": "0.32.0", "transformers": "5.19.0", "python": "3.11.2"},
        "device": {"machine": "x86_64", "system": "Linux", "cores": 2, "gpus": []},
        "sandbox_level": "landlock",
        "stages": {
            "evidence": {"key": sha("e"), "seconds": 4.2, "reused": False},
            "align": {"key": sha("a"), "seconds": 41.0, "reused": True},
            "merge": {"key": sha("m"), "seconds": 6.1, "reused": False},
            "evaluate": {"key": sha("v"), "seconds": 131.5, "reused": False},
        },
        "lineage": {
            "verdict": "siblings",
            "words": "math and code are siblings: both were trained from the base (cosine 0.04)",
            "pairs": [pair | {"verdict": "siblings"}],
            "consequences": {"task arithmetic": "the task vectors may be added; nothing is counted twice"},
        },
        "geometry": None,
        "align": {
            "source": {"merge": {"_target_": "rotrl.merge.linear.task_arithmetic", "scale": 1.0}},
            "teachers": ["math", "code"],
            "objective": "logits",
            "parametrization": "stiefel",
            "seconds": 41.0,
            "kl_before": {"math": 0.11, "code": 0.08},
            "kl_after": {"math": 0.02, "code": 0.015},
            "angle_rms": 0.6,
            "angle_max": 4.3,
            "orthogonality_error": 3e-7,
            "explained": 0.02,
            "closed_form": 0.41,
            "curve": [
                {"step": s, "kl_math": 0.02 + 0.09 * 0.96**s, "kl_code": 0.015 + 0.065 * 0.95**s}
                for s in range(0, 121, 4)
            ],
        },
        "merges": {
            label: {
                "path": f"merged/{label}",
                "sha256": sha(label),
                "effective_coefficient": 0.65,
                "norm_ratio": 0.92,
                "storage_loss": 0.0004,
                "dtype": "float32",
                "seconds": 0.4,
                "reused": False,
                "warnings": [],
                "config": suite[label],
            }
            for label in MERGES
        },
        "scores": [],
        "comparisons": [],
        "decisions": ["dtype=float32: bfloat16 would lose 78 % of the update"],
        "warnings": ["tiny_math: 3 of 1200 completions were cut at max_tokens"],
    }


@pytest.fixture
def full(tmp_path):
    """(record, run_dir) of a finished demo."""
    rng = np.random.default_rng(0)
    geometry, drawn = geometry_rows(rng), samples(rng)
    record = skeleton()
    record |= {
        "geometry": geometry_summary(geometry),
        "scores": score_rows(drawn),
        "comparisons": comparison_rows(drawn),
    }
    write_csv(tmp_path / "evidence" / "geometry.csv", geometry)
    write_csv(tmp_path / "scores.csv", record["scores"])
    write_csv(tmp_path / "comparisons.csv", record["comparisons"])
    return record, tmp_path


@pytest.fixture
def evidence_only(tmp_path):
    """(record, run_dir) of `evidence=geometry align=none merge=none evaluation=none`."""
    rows = geometry_rows(np.random.default_rng(1))
    write_csv(tmp_path / "evidence" / "geometry.csv", rows)
    return skeleton() | {
        "geometry": geometry_summary(rows),
        "align": None,
        "merges": {},
        "sandbox_level": None,
    }, tmp_path


@pytest.fixture
def merge_only(tmp_path):
    """(record, run_dir) of `merge=ties evidence=none evaluation=none`."""
    record = skeleton() | {"lineage": None, "align": None}
    return record | {
        "merges": {"ties": record["merges"]["ties"]},
        "config": {"merge": record["config"]["merge"]["ties"]},
    }, tmp_path


@pytest.fixture
def failed(tmp_path):
    """(record, run_dir) whose engine died in the evaluation."""
    record = skeleton() | {"status": "failed", "error": "the engine died twice on tiny_math/17; lower max_tokens"}
    del record["stages"]["evaluate"]
    return record, tmp_path
