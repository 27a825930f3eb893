"""From measured sides to ratios, and how they are printed and drawn."""

import shlex
import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.benchmarks.workload import PREFIX_ADAPTERS, PREFIX_NEW_TOKENS, PREFIX_TOKENS, Settings

COMMAND = "python -m tests.benchmarks"
HEADER = (
    "compared with", "ratio", "span", "at least", "held",
    "tokens/s", "theirs", "peak MiB", "theirs", "same tokens",
)  # fmt: skip
Rounds = Sequence[dict[str, dict[str, Any]]]
"""For each round, what each side measured, by `Side.key`."""


class Side(NamedTuple):
    kind: str
    dtype: str = "float32"
    fewer_rows: bool = False
    """Run the rows of the bf16 sides, which may be fewer."""

    @property
    def key(self) -> str:
        return f"{self.kind}/{self.dtype}" + ("/fewer-rows" if self.fewer_rows else "")


class Ratio(NamedTuple):
    """Tokens per second of `ours` over those of `theirs`."""

    name: str
    title: str
    ours: Side
    theirs: Side
    at_least: float | None = None
    same_text: bool = True
    """Whether both sides answer the same requests."""
    needs_bf16: bool = False
    """Judged only where the processor multiplies bfloat16 itself."""
    extra: bool = False

    @property
    def must_match(self) -> bool:
        """Greedy fp32 is the same tokens, row for row; in bf16 the share is printed."""
        return self.same_text and self.ours.dtype == self.theirs.dtype == "float32"


_MODULES = {"all": "all seven linear modules", "attention": "q, k, v and o", "qv": "q and v"}
_MIXED, _BASE, _ONE = Side("ours-mixed"), Side("ours-base"), Side("ours-one")
_MIXED_FEWER = Side("ours-mixed", fewer_rows=True)
_MIXED_BF16 = Side("ours-mixed", "bfloat16", fewer_rows=True)
_REUSED, _REPEATED = Side("ours-prefix-reused"), Side("ours-prefix-repeated")
_PEFT, _SWITCHING = Side("peft-mixed"), Side("peft-switching")
_PEFT_BF16 = Side("peft-mixed", "bfloat16", fewer_rows=True)
_SORTED, _MERGED = Side("peft-sorted"), Side("peft-merged")
_TRANSFORMERS = Side("transformers-base")
_FEW_SLOTS, _ALL_IN_SLOTS = Side("ours-few-slots"), Side("ours-all-in-slots")

SIDES = (
    _MERGED, _SWITCHING, _SORTED, _PEFT, _ONE, _MIXED, _BASE, _TRANSFORMERS, _REPEATED, _REUSED,
    _MIXED_FEWER, _MIXED_BF16, _PEFT_BF16, _FEW_SLOTS, _ALL_IN_SLOTS,
)  # fmt: skip
"""The order of the first round: what is compared most closely runs side by side."""

RATIOS = (
    Ratio("peft", "PEFT `adapter_names`", _MIXED, _PEFT, 6),
    Ratio("switching", "PEFT `set_adapter`, one adapter at a time", _MIXED, _SWITCHING, 8),
    Ratio("base", "our own base without adapters", _MIXED, _BASE, 0.90, same_text=False),
    Ratio("one", "our own with 1 adapter", _MIXED, _ONE, 0.95, same_text=False),
    Ratio("static", "base only: transformers `generate`", _BASE, _TRANSFORMERS, 2.5),
    Ratio("peft-bf16", "bf16: PEFT `adapter_names`", _MIXED_BF16, _PEFT_BF16, 10),
    Ratio("prefix", f"{PREFIX_TOKENS}-token shared prefix: our own without reuse", _REUSED, _REPEATED, 2),
    Ratio("bf16", "bf16: our own fp32", _MIXED_BF16, _MIXED_FEWER, 1.5, needs_bf16=True),
    Ratio("sorted", "PEFT `adapter_names`, rows sorted by an oracle", _MIXED, _SORTED, extra=True),
    Ratio("merged", "PEFT merged, one adapter at a time", _MIXED, _MERGED, extra=True),
    Ratio(
        "slots",
        "all adapters in 8 slots, twice the rows: 8 adapters there",
        _FEW_SLOTS,
        _ALL_IN_SLOTS,
        0.85,
        same_text=False,
        extra=True,
    ),
)
BY_NAME = {ratio.name: ratio for ratio in RATIOS}


class Measured(NamedTuple):
    """One ratio over all rounds; the sides' figures are medians."""

    ratio: Ratio
    by_round: list[float]
    ours: dict[str, float]
    theirs: dict[str, float]
    same: int | None
    """Rows with identical tokens in the worst round; None when the texts are not comparable."""
    rows: int
    bf16_is_native: bool

    @property
    def median(self) -> float:
        return statistics.median(self.by_round)

    @property
    def held(self) -> bool | None:
        """None when it is not judged."""
        if self.ratio.at_least is None or (self.ratio.needs_bf16 and not self.bf16_is_native):
            return None
        return self.median >= self.ratio.at_least and (not self.ratio.must_match or self.same == self.rows)

    def cells(self) -> list[str]:
        bound = "" if self.ratio.at_least is None else f"{self.ratio.at_least:g}"
        same = "" if self.same is None else f"{self.same} of {self.rows}"
        return [
            self.ratio.title,
            f"{self.median:.2f}",
            f"{min(self.by_round):.2f} to {max(self.by_round):.2f}",
            bound,
            {True: "yes", False: "no", None: "not judged"}[self.held],
            f"{self.ours['tokens_per_second']:.1f}",
            f"{self.theirs['tokens_per_second']:.1f}",
            f"{self.ours['peak_mib']:.0f}",
            f"{self.theirs['peak_mib']:.0f}",
            same,
        ]


def judge(result: dict[str, Any]) -> list[Measured]:
    """The ratios of a result, in the order of the table. Raises ValueError when sides did different work."""
    rounds: Rounds = result["rounds"]
    return [
        _measure(ratio, rounds, result["machine"]["native_bf16"])
        for ratio in RATIOS
        if all(side.key in measured for side in (ratio.ours, ratio.theirs) for measured in rounds)
    ]


def _measure(ratio: Ratio, rounds: Rounds, bf16_is_native: bool) -> Measured:
    pairs = [(measured[ratio.ours.key], measured[ratio.theirs.key]) for measured in rounds]
    if any(ours["requests"] != theirs["requests"] for ours, theirs in pairs):
        raise ValueError(f"{ratio.name}: the two sides ran different requests")
    same = [
        sum(mine == other for mine, other in zip(ours["tokens"], theirs["tokens"], strict=True))
        for ours, theirs in pairs
    ]
    return Measured(
        ratio=ratio,
        by_round=[ours["tokens_per_second"] / theirs["tokens_per_second"] for ours, theirs in pairs],
        ours=_medians([ours for ours, _ in pairs]),
        theirs=_medians([theirs for _, theirs in pairs]),
        same=min(same) if ratio.same_text else None,
        rows=pairs[0][0]["rows"],
        bf16_is_native=bf16_is_native,
    )


def _medians(measured: list[dict[str, Any]]) -> dict[str, float]:
    names = (
        "tokens_per_second",
        "seconds",
        "prefill_seconds",
        "decode_seconds",
        "startup_seconds",
        "peak_mib",
    )
    return {name: statistics.median(one[name] for one in measured) for name in names}


def changed_rows(rounds: Rounds) -> str:
    """Whether the adapters do anything, which equal tokens prove nothing without."""
    mixed, base = (rounds[0].get(side.key) for side in (_MIXED, _BASE))
    if not mixed or not base:
        return ""
    changed = sum(mine != other for mine, other in zip(mixed["tokens"], base["tokens"], strict=True))
    return f"The adapters change the text of {changed} of {mixed['rows']} rows."


def conditions(result: dict[str, Any]) -> str:
    """Command, machine, model and work, in sentences."""
    machine, settings = result["machine"], Settings.of(result["settings"])
    threads = sorted({measured["threads"] for one in result["rounds"] for measured in one.values()})
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    sentences = [
        f"`{shlex.join([*COMMAND.split(), *result['options']])}`:",
        f"median and span of {len(result['rounds'])} rounds, every side in a process of its own.",
        f"{machine['processor']}, {machine['cores']} cores, {', '.join(map(str, threads))} torch threads,",
        f"bf16 {'in hardware' if machine['native_bf16'] else 'not in hardware'}, {versions}.",
        f"{settings.base.name}, greedy, {settings.adapters} adapters of rank {settings.rank}",
        f"on {_MODULES[settings.targets]}, batches of {settings.batch} rows.",
        f"{settings.rows} rows ({result['bf16_rows']} where it says bf16) in random order,",
        "prompts of {} to {} tokens,".format(*settings.prompt_tokens),
        "answers of {} to {}, log-uniform.".format(*settings.new_tokens),
        _prefixed(settings, result["rounds"]),
        _changed_rows(result["rounds"]),
        _peft_adapters(result["rounds"]),
    ]
    whole = " ".join(filter(None, sentences))
    return textwrap.fill(whole, 120, break_long_words=False, break_on_hyphens=False)


def _prefixed(settings: Settings, rounds: Rounds) -> str:
    if _REUSED.key not in rounds[0]:
        return ""
    adapters = min(PREFIX_ADAPTERS, settings.adapters)
    return "With the shared prefix: {} adapters, answers of {} to {}.".format(adapters, *PREFIX_NEW_TOKENS)


def _changed_rows(rounds: Rounds) -> str:
    """Whether the adapters do anything, without which equal tokens prove nothing."""
    mixed, base = (rounds[0].get(side.key) for side in (_MIXED, _BASE))
    if not mixed or not base:
        return ""
    changed = sum(mine != other for mine, other in zip(mixed["tokens"], base["tokens"], strict=True))
    return f"The adapters change the text of {changed} of {mixed['rows']} rows."


def _peft_adapters(rounds: Rounds) -> str:
    key = _PEFT_BF16.key
    kept = {one[key]["details"]["adapters_in"] for one in rounds if key in one}
    if not kept:
        return ""
    return f"Beside a bf16 base PEFT's adapters are {' or '.join(sorted(kept))}, which was faster."


def markdown(result: dict[str, Any]) -> str:
    """What stands in the README between its benchmark marks."""
    lines = [conditions(result), "", _row(HEADER), _row(["---"] * len(HEADER))]
    return "\n".join([*lines, *(_row(measured.cells()) for measured in judge(result))])


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def text(result: dict[str, Any]) -> str:
    """For a terminal: the conditions, the ratios, and each side by itself."""
    sides = [["side", "tokens/s", "seconds", "prefill", "decode", "start-up", "peak MiB"]]
    for side in SIDES:
        measured = [one[side.key] for one in result["rounds"] if side.key in one]
        if measured:
            medians = _medians(measured)
            names = ("seconds", "prefill_seconds", "decode_seconds", "startup_seconds")
            sides.append(
                [
                    f"{side.kind} {side.dtype}, {measured[0]['rows']} rows",
                    f"{medians['tokens_per_second']:.1f}",
                    *(f"{medians[name]:.1f}" for name in names),
                    f"{medians['peak_mib']:.0f}",
                ]
            )
    ratios = [list(HEADER), *(measured.cells() for measured in judge(result))]
    return "\n".join([conditions(result), "", *_columns(ratios), "", *_columns(sides)])


def _columns(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [
                first.ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)),
            ]
        )
        for first, *rest in rows
    ]


def draw(result: dict[str, Any], path: Path) -> None:
    """Each ratio over its bound as a bar. Raises ImportError without matplotlib."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    bounded = [measured for measured in judge(result) if measured.ratio.at_least is not None]
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.45 * len(bounded)), layout="constrained")
    for place, measured in enumerate(bounded):
        bound = measured.ratio.at_least or 1
        relative = measured.median / bound
        color = {True: "#2f7d5b", False: "#b5483a", None: "#9a9a9a"}[measured.held]
        below, above = relative - min(measured.by_round) / bound, max(measured.by_round) / bound - relative
        axes.barh(place, relative, 0.62, color=color, xerr=[[below], [above]], error_kw={"ecolor": "#444444"})
        label = f" {measured.median:.2f} (at least {bound:g})"
        axes.annotate(label, (max(measured.by_round) / bound, place), va="center", fontsize=9)
    axes.axvline(1, color="#222222", linewidth=1)
    axes.set_yticks(range(len(bounded)), [measured.ratio.title.replace("`", "") for measured in bounded])
    axes.invert_yaxis()
    axes.margins(x=0.25)
    axes.set_xlim(left=0)
    axes.set_xlabel(
        "our tokens per second over theirs, divided by the bound (line: the bound; whiskers: all rounds)"
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=160)
    plt.close(figure)
