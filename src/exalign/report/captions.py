"""What stands under a figure or table: its data, how many, and what its intervals are."""

from __future__ import annotations

from dataclasses import dataclass

from exalign.evaluation.schema import Evidence
from exalign.report.wording import number, visible


@dataclass(frozen=True)
class Captions:
    """Captions from a run's evidence; each is a few sentences."""

    evidence: Evidence

    def frontier(self) -> str:
        text = f"{self._data()} Bars: {self._interval()}."
        best = self.evidence.optimum
        if best is not None:
            text += (
                f" Optimum and best of N: from {_range(best.fewest_samples, best.most_samples)} samples of SFT "
                f"for each of n = {best.num_prompts} prompts; dotted where fewer than {number(best.least_ess, 2)} "
                "of them count."
            )
        return text

    def accuracy(self) -> str:
        return (
            f"{self._data()} Accuracy: the share of samples with log-odds above 0. Bars: {self._interval()}. Every "
            "prompt weighs the same."
        )

    def reward(self) -> str:
        return (
            f"{self._data()} Band: one standard deviation of the rewards of a prompt's samples (dividing by their "
            f"number − 1), averaged over prompts. Bars: {self._interval()}. Step 0 is SFT; grey: the other methods."
        )

    def ablation(self) -> str:
        return (
            f"{self._data()} Each point is the last checkpoint of a method, its KL to SFT (nats) beside it. Bars: "
            f"{self._interval()}."
        )

    def density(self, prompts: int) -> str:
        """Of the first `prompts` prompts."""
        density = self.evidence.density
        assert density is not None
        shown = density.prompts[:prompts]
        sizes = [len(prompt.samples) for prompt in shown]
        text = (
            f"Run {visible(self.evidence.name)}: n = {_range(min(sizes), max(sizes))} samples of SFT for "
            f"{'the prompt' if prompts == 1 else f'each of {prompts} prompts'}{self._temperature()} (ticks), weighted "
            "by π/π_sft of each method's final policy. Kernel estimates along log π_sft, one bandwidth (Scott's rule, "
            f"{_range(*(number(f(p.bandwidth for p in shown), 2) for f in (min, max)))} nats) for all. Bands: "
            f"{self._level()} over samples."
        )
        if density.beta is not None:
            counts = [curve.effective_samples for p in shown for curve in p.curves[:1]]
            text += (
                f" Optimum: π*_β of the evaluation's rewards at β = {density.beta:g}, β_π·β_r of {density.beta_of}; it "
                f"stands on {_range(*(number(f(counts), 2) for f in (min, max)))} effective samples."
            )
        return text

    def verdicts(self) -> str:
        return (
            f"Run {visible(self.evidence.name)}: n, the number of prompts, stands beside each bar; every prompt weighs "
            f"the same. Line above a bar: {100 * self.evidence.confidence:.0f} % bootstrap interval of the wins over "
            f"prompts (seed {self.evidence.judgements.seed})."
        )

    def win_rates(self) -> str:
        best = self.evidence.best_of_n[-1] if self.evidence.best_of_n else None
        text = (
            f"{self._data()} Win rate in % over all pairs of samples of a prompt, a tie counting half, n the number of "
            f"prompts; in brackets {self._interval()}. The scorer is what the run evaluates with."
        )
        if best is not None:
            text += (
                f" Best of {best.n}: expected over all choices of {best.n} of each prompt's pool of SFT's samples, "
                "none of which are those it is compared with."
            )
        return text

    def _data(self) -> str:
        evidence = self.evidence
        samples = "" if evidence.sft is None else f", {evidence.sft.num_samples:,} samples of a policy"
        name = visible(evidence.name)
        return f"Run {name}: n = {evidence.num_prompts:,} held-out prompts{samples}{self._temperature()}."

    def _temperature(self) -> str:
        return "" if self.evidence.temperature is None else f" at τ = {self.evidence.temperature:g}"

    def _interval(self) -> str:
        return f"{self._level()} over prompts"

    def _level(self) -> str:
        evidence = self.evidence
        return (
            f"{100 * evidence.confidence:.0f} % bootstrap intervals ({evidence.num_resamples:,} resamples, seed "
            f"{evidence.seed})"
        )


def _range(low: object, high: object) -> str:
    return f"{low}" if low == high else f"{low}–{high}"
