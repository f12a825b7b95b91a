"""Writes one offline W&B run; started by `tracker` in a process of its own.

Reads {record, run_dir, settings, id} as JSON from stdin and prints {run: folder name, server: base URL}.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import wandb

from rotrl.report.standings import number, standings

# Nothing of the machine, the working copy or the terminal: the record holds what is needed.
QUIET = {
    "silent": True,
    "console": "off",
    "disable_git": True,
    "disable_code": True,
    "save_code": False,
    "x_disable_stats": True,
    "x_disable_meta": True,
    "x_disable_machine_info": True,
    "x_save_requirements": False,
}


def write(record: Mapping[str, Any], run_dir: Path, settings: Mapping[str, Any], run_id: str) -> dict[str, str]:
    run = wandb.init(
        mode="offline",
        dir=str(run_dir),
        id=run_id,
        project=settings.get("project") or "rotrl",
        entity=settings.get("entity"),
        group=settings.get("group") or record.get("name"),
        name=f"{record.get('name')}-{str(record.get('digest'))[:8]}",
        tags=list(settings.get("tags") or []),
        config={"command": record.get("command"), "models": record.get("models"), **(record.get("config") or {})},
        settings=wandb.Settings(**QUIET),
    )
    try:
        run.define_metric("align/step", hidden=True)
        run.define_metric("align/*", step_metric="align/step")
        for point in (record.get("align") or {}).get("curve") or []:
            run.log({f"align/{key}": value for key, value in point.items()})
        if pictures := _pictures(run_dir):
            run.log(pictures)
        run.log({name: _table(rows) for name, rows in _tables(record).items() if rows})
        run.summary.update(summary(record))
    finally:
        run.finish()
    return {"run": Path(run.dir).parent.name, "server": str(run.settings.base_url)}


def summary(record: Mapping[str, Any]) -> dict[str, Any]:
    """One number a model and task, the best merges, and the pooled kappa of every expert."""
    table, found = standings(record), {"status": record.get("status")}
    for row in table.rows:
        found |= {f"{row.role}/{row.model}/{task}": score.value for task, score in row.scores.items()}
        if row.mean:
            found |= {f"{row.role}/{row.model}/mean": row.mean.value, f"{row.role}/{row.model}/minimum": row.minimum}
    for name, best in (("mean", table.best_mean), ("minimum", table.best_minimum)):
        if best and best.mean:
            found |= {f"best_by_{name}": best.model, f"best_by_{name}/mean": best.mean.value}
    for row in (record.get("geometry") or {}).get("rows") or []:
        if row.get("module") == "all":
            found[f"kappa/{row['expert']}/{row['side']}"] = number(row.get("kappa_median"))
    return found


def _tables(record: Mapping[str, Any]) -> dict[str, Sequence[Mapping[str, Any]]]:
    merges = record.get("merges") or {}
    keys = ("sha256", "effective_coefficient", "norm_ratio", "storage_loss", "dtype")
    return {
        "scores": record.get("scores") or [],
        "comparisons": record.get("comparisons") or [],
        "geometry": (record.get("geometry") or {}).get("rows") or [],
        "merges": [{"merge": label, **{key: made.get(key) for key in keys}} for label, made in merges.items()],
    }


def _table(rows: Sequence[Mapping[str, Any]]) -> wandb.Table:
    columns: list[Any] = list(dict.fromkeys(key for row in rows for key in row))
    return wandb.Table(
        columns=columns, data=[[row.get(key) for key in columns] for row in rows], allow_mixed_types=True
    )


def _pictures(run_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in sorted((run_dir / "figures").glob("*.png")):
        found[f"figures/{path.stem}"] = wandb.Image(str(path))
    page = run_dir / "report.html"
    return found | ({"report": wandb.Html(page.read_text(encoding="utf-8"), inject=False)} if page.is_file() else {})


if __name__ == "__main__":
    task = json.load(sys.stdin)
    print(json.dumps(write(task["record"], Path(task["run_dir"]), task["settings"], task["id"])))
