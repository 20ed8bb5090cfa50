"""Figures show what the arrays say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from exalign.evaluation.schema import MethodEvidence
from exalign.exact.convergence import GradientErrors
from exalign.report.figures import draw_alignment, draw_checkpoints, draw_frontier, draw_other_stages, smooth
from exalign.report.paper_figures import draw_divergences, draw_error_against_k
from exalign.report.style import DARK, LIGHT, figure_style, inline_svg, looks_of, save_figure, spread_apart


def luminance(color: str) -> float:
    """Relative luminance of WCAG 2."""
    channels = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(first: str, second: str) -> float:
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def bare(name, family, target):
    return MethodEvidence(name, family, target, True, [], [])


def test_families_differ_in_grey_and_targets_in_form():
    methods = [bare(f"{f}-{t}", f, t) for f in ("exo", "dpo") for t in ("reward", "preference")]
    methods += [bare("ppo", "ppo", None), bare("jeffreys", "other", "reward"), bare("alpha", "other", "preference")]
    looks = looks_of(methods)
    assert len({(look.color, look.marker, look.dashes) for look in looks.values()}) == 7
    for target in ("reward", "preference"):
        exo, dpo = looks[f"exo-{target}"], looks[f"dpo-{target}"]
        assert contrast(exo.color, dpo.color) > 1.9
        assert exo.marker != dpo.marker
    assert looks["exo-reward"].dashes != looks["exo-preference"].dashes


def test_texts_and_lines_stand_out_from_the_paper():
    for colors in (LIGHT, DARK):
        assert contrast(colors["ink"], colors["paper"]) > 10
        assert contrast(colors["muted"], colors["paper"]) > 4.5
        assert all(contrast(colors[name], colors["paper"]) > 2.3 for name in colors if name[-1].isdigit())


def test_light_and_dark_name_the_same_colors():
    assert set(LIGHT) == set(DARK)
    assert len(set(LIGHT.values())) == len(LIGHT)


def test_many_methods_of_one_family_have_looks():
    looks = looks_of([bare(f"exo{i}", "exo", "reward") for i in range(5)] + [bare("x", "unheard of", None)])
    assert len(looks) == 6


@pytest.mark.parametrize("family", ["exo", "dpo", "ppo", "other"])
def test_nine_of_a_family_are_told_apart(family):
    looks = looks_of([bare(str(i), family, "reward") for i in range(9)]).values()
    assert len({(look.color, look.marker) for look in looks}) == 9


def lines_of(figure, label):
    return [line for line in figure.axes[0].lines if line.get_label() == label]


@pytest.mark.parametrize("width", [8.8, 3.75])
def test_the_frontier_draws_every_checkpoint(evidence_and_page, width):
    evidence, _ = evidence_and_page
    with figure_style():
        figure = draw_frontier(evidence, looks_of(evidence.methods), width=width)
    drawn = {tuple(np.round(xy, 9)) for line in figure.axes[0].lines for xy in zip(*line.get_data(), strict=True)}
    for method in evidence.methods:
        for point in method.points:
            assert tuple(np.round((point.kl.estimate, point.reward.estimate), 9)) in drawn
    (low_x, high_x), (low_y, high_y) = figure.axes[0].get_xlim(), figure.axes[0].get_ylim()
    for method in evidence.methods:
        for point in method.points:
            assert low_x < point.kl.low
            assert point.kl.high < high_x
            assert low_y < point.reward.low
            assert point.reward.high < high_y


@pytest.mark.parametrize("width", [8.8, 3.75])
def test_legends_of_long_names_are_whole(evidence_and_page, width):
    evidence, _ = evidence_and_page
    names = {name: f"{name}-with-a-long-name-of-its-own" for name in (method.name for method in evidence.methods)}
    methods = [replace(method, name=names[method.name]) for method in evidence.methods]
    curves = [replace(c, stage="/".join(names.get(p, p) for p in c.stage.split("/"))) for c in evidence.curves]
    long, looks = replace(evidence, methods=methods, curves=curves), looks_of(methods)
    with figure_style():
        drawn = [draw(long, looks, width=width) for draw in (draw_frontier, draw_alignment, draw_checkpoints)]
        for figure in drawn:
            for legend in figure.legends:
                figure.draw_without_rendering()
                extent = legend.get_window_extent()
                assert extent.x0 >= 0 and extent.x1 <= figure.bbox.width
                assert len(legend.get_texts()) >= len(methods)


def test_small_multiples_have_a_panel_per_metric(evidence_and_page):
    evidence, _ = evidence_and_page
    looks = looks_of(evidence.methods)
    with figure_style():
        alignment = draw_alignment(evidence, looks, width=8.8)
        checkpoints = draw_checkpoints(evidence, looks, width=3.75)
        stages = draw_other_stages(evidence, width=8.8)
    assert [axes.get_title(loc="left") for axes in alignment.axes][:2] == ["loss", "KL, estimated (nats)"]
    assert len(alignment.axes) == 8
    assert len(checkpoints.axes) == 7
    assert [axes.get_title(loc="left") for axes in stages.axes] == ["sft: loss", "reward: loss"]


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=12), st.floats(0.01, 1))
def test_labels_keep_apart_and_in_order(wanted, distance):
    places = spread_apart(wanted, distance)
    ordered = np.array(places)[np.argsort(wanted, kind="stable")]
    assert (np.diff(ordered) >= distance - 1e-9).all()
    assert np.mean(places) == pytest.approx(np.mean(wanted), abs=1e-9)


def test_smoothing_keeps_lines_and_means():
    np.testing.assert_allclose(smooth(np.full(100, 3.0)), 3.0)
    noise = np.random.default_rng(0).normal(size=300)
    assert smooth(noise).std() < 0.4 * noise.std()


def test_divergences_of_the_exact_world():
    xs = np.linspace(-3, 3, 50)
    target = np.exp(-((np.abs(xs) - 1.5) ** 2))
    policies = {"reverse KL (EXO)": np.exp(-((xs - 1.5) ** 2)), "forward KL (DPO)": np.exp(-(xs**2) / 4)}
    figure = draw_divergences(xs, target / target.sum(), policies, reference=np.full(50, 0.1))
    for axes, (name, values) in zip(figure.axes, policies.items(), strict=True):
        drawn = {line.get_label(): line.get_ydata() for line in axes.lines}
        assert axes.get_title(loc="left") == name
        np.testing.assert_allclose(drawn["policy"], values)
        np.testing.assert_allclose(drawn["π_sft"], 0.1)


KS = np.array([2.0, 4.0, 8.0, 16.0])


def measured(bias, noise=0.0):
    rows = (KS, bias, noise / KS, KS**-0.5, 0.01 * KS**-0.5)
    return GradientErrors(*(torch.tensor(np.broadcast_to(row, len(KS)).copy()) for row in rows))


def test_error_against_k_shows_the_slope_of_theory():
    unknown = measured(1 / KS, noise=1.0)
    shown = {"EXO": measured(3 / KS, noise=np.array([0.5, 4, 4, 4])), "DPO": measured([1, 0.5, 0, -0.1])}
    figure = draw_error_against_k({**shown, "lost in noise": unknown})
    (guide,) = lines_of(figure, "slope −1")
    assert np.polyfit(np.log(guide.get_xdata()), np.log(guide.get_ydata()), 1)[0] == pytest.approx(-1)
    # What is not above 0 has no place on a log axis.
    assert list(lines_of(figure, "DPO")[0].get_xdata()) == [2, 4]
    assert [axes.get_yscale() for axes in figure.axes] == ["log", "log"]
    assert all(np.isfinite(axes.get_ylim()).all() for axes in figure.axes)
    assert [len(axes.lines) for axes in figure.axes] == [3, 4]


def test_texts_in_figures_are_escaped_and_not_parsed(tmp_path):
    figure = draw_error_against_k({"</svg><script>$x_{$": measured(1 / KS)})
    svg = inline_svg(figure, "name", 'a "description" <b>')
    assert "<script>" not in svg
    assert "&lt;script&gt;$x_{$" in svg
    assert '<title>a "description" &lt;b&gt;</title>' in svg
    save_figure(figure, tmp_path, "theorem")
    assert {path.name for path in tmp_path.iterdir()} == {"theorem.png", "theorem.svg"}


def test_inline_figures_use_the_colors_of_the_page():
    svg = inline_svg(draw_error_against_k({"EXO": measured(1 / KS)}), "name", "text")
    assert "var(--exo-1)" in svg
    assert "var(--ink)" in svg
    assert LIGHT["exo-1"] not in svg.lower()
    assert "http" not in svg.replace("http://www.w3.org/2000/svg", "").replace("http://www.w3.org/1999/xlink", "")
