"""What a run has come to."""

import msgspec

from tests.chaos.check import Found


class Tally(msgspec.Struct, kw_only=True):
    """Everything that was counted; times in seconds."""

    seed: int
    found: Found
    messages_sent: int = 0
    messages_left: int
    dead_letters: int
    kills_asked: int
    kills: dict[str, int]
    """Done, by what was done."""
    restarts: int
    exits: dict[int, int]
    """Processes that ended, by exit code; a signal is negative."""
    ended_by_themselves: list[str]
    stuck: int
    """Workers that were told to stop and had to be killed."""
    calls: int
    """To the services, every attempt counted."""
    faults: dict[str, int]
    outcomes: dict[str, int]
    """How deliveries ended, as far as the workers lived to say."""
    seconds: float = 0.0

    @property
    def is_good(self) -> bool:
        """Whether every promise was kept."""
        left = self.messages_left or self.dead_letters or self.stuck
        return self.found.is_good and not left and sum(self.kills.values()) >= self.kills_asked

    def text(self) -> str:
        """For people."""
        found, lines = self.found, list[str]()

        def line(name: str, value: object) -> None:
            lines.append(f"{name:<34}{value}")

        line("jobs sent", f"{found.jobs}, in {self.messages_sent} messages")
        line("manifests completed", found.manifests)
        line("rows expected", found.rows)
        line("rows exactly once", f"{found.once}, in {found.result_files} files")
        line("rows lost", found.lost)
        line("rows twice", found.twice)
        line("rows wrong", found.wrong)
        line("rows that nobody asked for", found.strange)
        line("messages left", self.messages_left)
        line("messages in the dead-letter queue", self.dead_letters)
        line("kills", _listed(self.kills))
        line("restarts", self.restarts)
        line("exit codes", _listed(self.exits))
        line("workers that would not stop", self.stuck)
        line("workers that ended by themselves", len(self.ended_by_themselves))
        line("calls", self.calls)
        line("faults", _listed(self.faults))
        line("deliveries, as far as is known", _listed(self.outcomes))
        line("seed", self.seed)
        line("duration", f"{self.seconds:.0f} s")
        lines += [f"  ended: {words}" for words in self.ended_by_themselves[:10]]
        lines += [f"  problem: {problem}" for problem in found.problems]
        lines.append("everything holds" if self.is_good else "NOT everything holds")
        return "\n".join(lines)


def _listed(counts: dict[str, int] | dict[int, int]) -> str:
    listed = ", ".join(f"{name} {count}" for name, count in sorted(counts.items(), key=lambda item: -item[1]))
    return f"{sum(counts.values())} ({listed})" if counts else "0"
