"""The figures of a run, as SVG (text as text, the same bytes every time) and PNG in run_dir/figures."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from rotrl.checkpoint.files import whole_file
from rotrl.report.alignment import by_layer
from rotrl.report.evidence_figures import kappa_by_layer, share_vs_null
from rotrl.report.function_figures import dose_response, parts, restored
from rotrl.report.paint import STYLE
from rotrl.report.redact import redact
from rotrl.report.score_figures import alignment, task_means, tasks_scatter
from rotrl.report.spectrum_figures import angle_spectra, calibration
from rotrl.report.sweep_figures import curves

Draw = Callable[[Mapping[str, Any], Path], Figure | None]
PLAIN = {"Date": None, "Creator": None}  # nothing in the file that changes from run to run
FIGURES: dict[str, Draw] = {
    "share_vs_null": share_vs_null,
    "kappa_by_layer": kappa_by_layer,
    "calibration": calibration,
    "angle_spectra": angle_spectra,
    "parts": parts,
    "dose_response": dose_response,
    "restored": restored,
    "alignment": alignment,
    "alignment_by_layer": by_layer,
    "tasks_scatter": tasks_scatter,
    "task_means": task_means,
    "curves": curves,
}


def draw(record: Mapping[str, Any], run_dir: Path) -> list[Path]:
    """Draws what the record and the run folder have data for; gives the files written, SVG and PNG."""
    record, folder = redact(record), Path(run_dir) / "figures"
    written: list[Path] = []
    for name, make in FIGURES.items():
        with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
            figure = make(record, Path(run_dir))
            if figure is None:
                continue
            folder.mkdir(parents=True, exist_ok=True)
            for kind, options in (("svg", {"metadata": PLAIN}), ("png", {"dpi": 160})):
                path = folder / f"{name}.{kind}"
                with whole_file(path) as temporary:
                    figure.savefig(temporary, format=kind, transparent=kind == "svg", **options)
                written.append(path)
    return written
