"""`exalign figures`: the theorems and the paper's Figures 1 and 5, computed on the enumerable world and drawn."""

from __future__ import annotations

from pathlib import Path

from exalign.exact.figures_data import gradient_error_figure, objective_figure, two_mode_figure
from exalign.report.figure_exact import ErrorPanel, draw_divergences, draw_error_against_k
from exalign.report.svg import save_figure


def draw_exact_figures(folder: Path) -> list[Path]:
    """Write the figures as PNG and SVG to `folder`; return the PNG files. Takes seconds, the same on every run."""
    names = ["figure-1", "figure-5-any-policy", "figure-5-one-mode", "theorems"]
    modes, objectives = two_mode_figure(), objective_figure()
    reference = modes.reference.numpy()
    fitted = {name: density.numpy() for name, density in modes.policies.items()}
    save_figure(
        draw_divergences(modes.points.numpy(), modes.target.numpy(), fitted, reference=reference), folder, names[0]
    )
    for name, policies in zip(names[1:3], (objectives.unlimited, objectives.gaussian), strict=True):
        drawn = {objective: density.numpy() for objective, density in policies.items()}
        save_figure(draw_divergences(objectives.points.numpy(), objectives.target.numpy(), drawn), folder, name)
    curves = gradient_error_figure().curves
    panels = [
        ErrorPanel(
            title,
            slope,
            {name: getattr(errors, kind).numpy() for name, errors in curves.items()},
            {name: getattr(errors, f"{kind}_error").numpy() for name, errors in curves.items()},
        )
        for title, slope, kind in (("bias of the gradient", -1.0, "bias"), ("its root mean square error", -0.5, "rms"))
    ]
    num_completions = next(iter(curves.values())).num_completions
    save_figure(draw_error_against_k([int(k) for k in num_completions], panels), folder, names[3])
    return [folder / f"{name}.png" for name in names]
