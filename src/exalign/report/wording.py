"""Numbers, texts and captions as a person reads them."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from exalign.evaluation.pool import LEAST_ESS, OPTIMUM
from exalign.evaluation.schema import Evidence, Interval, MethodEvidence

SIGNS = {"beta_pi": "β_π", "beta_r": "β_r", "beta": "β", "epsilon": "ε"}
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb]")


def visible(text: str) -> str:
    """Control characters and those that reorder or hide text, made visible; line breaks and tabs stay.

    >>> visible("a\\x00b\\u202ec")
    'a␀b[U+202E]c'
    """
    text = text.replace("\r\n", "\n")

    def name(match: re.Match[str]) -> str:
        code = ord(match[0])
        return chr(0x2400 + code) if code < 0x20 else "␡" if code == 0x7F else f"[U+{code:04X}]"

    return _CONTROLS.sub(name, text)


def number(value: float | None, digits: int = 3) -> str:
    """A number with about `digits` significant digits and a true minus; – where there is none.

    >>> number(12.345), number(-0.01234), number(1234567.0), number(0.09999), number(0.0), number(None)
    ('12.3', '−0.0123', '1,234,567', '0.100', '0', '–')
    """
    if value is None:
        return "–"
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(float(f"{value:.{digits - 1}e}"))))
    if magnitude < -4:
        text = f"{value:.{digits - 1}e}"
    else:
        text = f"{value:,.{max(0, digits - 1 - magnitude)}f}"
    return text.replace("-", "−")


def decimals(interval: Interval) -> int:
    """Decimals that suit the interval's width: 2 for a width between 0.07 and 0.7, and so on.

    Without a width 2, or more of a small number.
    """
    width, size = interval.ends[1] - interval.ends[0], abs(interval.estimate)
    if width > 1e-9 * size:
        return max(0, 1 - math.floor(math.log10(1.5 * width)))
    return max(2, 1 - math.floor(math.log10(size))) if size else 2


def interval(value: Interval | None) -> str:
    """An estimate with its interval, which a line break never splits.

    >>> interval(Interval(1.234, 1.1, 1.3, 10)), interval(Interval(1.234, None, None, 1)), interval(None)
    ('1.23 [1.10,\xa01.30]', '1.23', '–')
    >>> interval(Interval(0.0012, None, None, 1)), interval(Interval(0.0, 0.0, 0.0, 9))
    ('0.0012', '0.00 [0.00,\xa00.00]')
    >>> interval(Interval(-1e-3, -0.4, 0.4, 9)), interval(Interval(12345.6, 12000.0, 12700.0, 9))
    ('0.0 [−0.4,\xa00.4]', '12,346 [12,000,\xa012,700]')
    """
    if value is None:
        return "–"
    places, given = decimals(value), [x for x in (value.estimate, value.low, value.high) if x is not None]
    # A zero has no sign, and of tiny numbers zeros would be all that is seen.
    texts = [f"{x:z,.{places}f}".replace("-", "−") if places <= 4 else number(x) for x in given]
    return texts[0] if len(texts) < 3 else f"{texts[0]} [{texts[1]},\N{NO-BREAK SPACE}{texts[2]}]"


def plus_minus(value: tuple[float, float | None] | None) -> str:
    """A value with its standard error.

    >>> plus_minus((0.612, 0.0134)), plus_minus((0.612, None)), plus_minus(None)
    ('0.612\xa0±\xa00.013', '0.612', '–')
    """
    if value is None or value[1] is None:
        return number(value and value[0])
    return "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}".join((number(value[0]), number(value[1], 2)))


def percent(value: Interval | None) -> str:
    """A share with its interval, in per cent.

    >>> percent(Interval(0.5, 0.45, 0.55, 10))
    '50\xa0% [45,\xa055]'
    """
    if value is None:
        return "–"
    text = f"{100 * value.estimate:.0f}\N{NO-BREAK SPACE}%"
    if value.low is None or value.high is None:
        return text
    return f"{text} [{100 * value.low:.0f},\N{NO-BREAK SPACE}{100 * value.high:.0f}]"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]], align: str = "---") -> str:
    """A table, its columns but the first set as `align` says."""

    def escape(text: str) -> str:
        return visible(re.sub("[ \t\r\n]+", " ", text)).replace("|", r"\|").replace("<", "&lt;")

    lines = [head, ["---", *[align] * (len(head) - 1)], *rows]
    return "".join("| " + " | ".join(map(escape, line)) + " |\n" for line in lines)


def code(text: str) -> str:
    """A text in one line as Markdown's code, whatever backticks it has.

    >>> print(code("one\\ntwo"), code("`one`, two"))
    `one two` `` `one`, two ``
    """
    text = " ".join(visible(text).split())
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence, room = "`" * (longest + 1), " " * (longest > 0)
    return f"{fence}{room}{text}{room}{fence}"


_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def csv_text(rows: Iterable[Iterable[object]]) -> str:
    """The rows as CSV. A text that a spreadsheet would take for a formula gets an apostrophe; numbers stay numbers.

    >>> csv_text([["name", "value"], ["=1+1", -0.5], [None, 2]]).splitlines()
    ['name,value', "'=1+1,-0.5", ',2']
    """
    stream = io.StringIO()
    csv.writer(stream).writerows([_cell(value) for value in row] for row in rows)
    return stream.getvalue()


def _cell(value: object) -> object:
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value


def best(cells: Mapping[str, tuple[float, str]]) -> set[str]:
    """Who has the highest value, and whose reads the same; cells are a value and its text, the estimate first.

    >>> sorted(best({"exo": (0.612, "61 % [50, 70]"), "dpo": (0.608, "61 % [49, 68]"), "ppo": (0.58, "58 %")}))
    ['dpo', 'exo']
    >>> best({"exo": (0.612, "61 %")})
    set()
    """
    if len(cells) < 2:
        return set()
    _, highest = max(cells.values(), key=lambda cell: cell[0])
    return {name for name, (_, text) in cells.items() if text.split(" ")[0] == highest.split(" ")[0]}


def css_share(share: float) -> str:
    """A share of the length of a bar.

    >>> css_share(0.4561)
    '45.6%'
    """
    return f"{100 * share:.1f}%"


def duration(seconds: float | None) -> str:
    """Wall time.

    >>> duration(4.21), duration(75), duration(7500), duration(None)
    ('4.2 s', '1 min 15 s', '2 h 5 min', '–')
    """
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def setting(value: Any) -> str:
    """The value of a setting, a number as `number` writes it.

    >>> setting(1e-5), setting(64), setting(None), setting("linear")
    ('1.00e−05', '64', 'none', 'linear')
    """
    if isinstance(value, float):
        return number(value)
    return "none" if value is None else str(value)


def words(key: str) -> str:
    return key.replace("_", " ")


def describe(method: MethodEvidence, without: str = "") -> str:
    """A method in words: what it says of itself, else what it minimises, on what, with which β and ε.

    Of methods that differ in one setting alone it says what they share, `without` that one.

    >>> settings = {"beta_pi": 0.5, "beta_r": 0.1}
    >>> describe(MethodEvidence("a", "exo", "reward", True, [], [], settings=settings, label="EXO"), without="beta_pi")
    'EXO, reward target, β_r 0.1'
    """
    if method.line and not without:
        return method.line
    unused = {without, "epsilon" if method.target == "reward" else "beta_r"}
    values = [
        f"{sign} {method.settings[key]:g}"
        for key, sign in SIGNS.items()
        if key not in unused and isinstance(method.settings.get(key), int | float)
    ]
    return ", ".join(part for part in (method.called, method.target and f"{method.target} target", *values) if part)


@dataclass(frozen=True)
class Captions:
    """Captions from a run's evidence; each is a few sentences."""

    evidence: Evidence

    def frontier(self) -> str:
        if not self.evidence.scored:
            return self.held_out()
        text = f"{self._data()}{self.ends()} Bars: {self._interval()}."
        best = self.evidence.optimum
        if best is not None:
            text += (
                f" Optimum and best of N: from {_range(best.fewest_samples, best.most_samples)} samples of SFT "
                f"for each of n = {best.num_prompts} prompts; dotted where fewer than {number(best.least_ess, 2)} "
                "of them count."
            )
        if self.evidence.proxy_optimum is not None:
            text += (
                " Dashed: the best policy for the reward that methods were trained on, as the evaluation's scorer "
                "rewards it."
            )
        return text

    def accuracy(self) -> str:
        return (
            f"{self._data()} Accuracy: the mean sigmoid of the log-odds. Bars: {self._interval()}. Every "
            "prompt weighs the same."
        )

    def held_out(self) -> str:
        known = [p.held_out.accuracy.num_prompts for m in self.evidence.methods for p in m.points if p.held_out] or [0]
        return (
            f"{self._data()} Accuracy: the share of held-out pairs, of n = {_range(min(known), max(known))} prompts, "
            f"whose preferred text gained more log-probability over SFT than the other did. Bars: {self._interval()}."
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
            counts = [curve.effective_samples for p in shown for curve in p.curves if curve.policy == OPTIMUM]
            stands = f"{_range(*(number(f(counts), 2) for f in (min, max)))} effective samples"
            drawn = (
                f"is not drawn: it would stand on {stands}, fewer than {LEAST_ESS:g}."
                if max(counts) < LEAST_ESS
                else f"stands on {stands}, and is drawn where they are {LEAST_ESS:g} or more."
            )
            beta = f"β = {density.beta:g}, that of {density.beta_of}"
            text += f" The optimum π*_β of the evaluation's rewards at {beta}, {drawn}"
        return text

    def _answers(self) -> str:
        drawn = self.evidence.answers
        return "" if drawn is None else f" Compared are answers drawn {drawn}."

    def verdicts(self) -> str:
        return (
            f"Run {visible(self.evidence.name)}: n, the number of prompts, stands beside each bar; every prompt weighs "
            f"the same.{self._answers()} Line above a bar: {100 * self.evidence.confidence:.0f} % bootstrap interval "
            f"of the wins over prompts (seed {self.evidence.judgements.seed})."
        )

    def win_rates(self) -> str:
        best = self.evidence.best_of_n[-1] if self.evidence.best_of_n else None
        text = (
            f"{self._data()}{self._answers()} Win rate in % over all pairs of samples of a prompt, a tie counting "
            f"half, n the number of prompts; in brackets {self._interval()}. Bold: the highest of the methods. The "
            "scorer is what the run evaluates with."
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

    def ends(self) -> str:
        """Which curves are no checkpoints along one training."""
        sweeps = [method for method in self.evidence.methods if method.sweep is not None]
        names = ", ".join(visible(method.name) for method in sweeps)
        return f" Each point of {names} is the end of a training of its own." if sweeps else ""

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
