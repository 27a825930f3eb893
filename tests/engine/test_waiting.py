"""Who may start, and how to find the row that should."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from worker.engine.lengths import work
from worker.engine.sequence import Sequence
from worker.engine.waiting import Waiting
from worker.jobs import AdapterKey, InferenceRequest, SamplingParams

KEYS = [None, AdapterKey("a", "1"), AdapterKey("b", "1")]


class Machine(RuleBasedStateMachine):
    """`Waiting` beside lists that say the same slowly."""

    @initialize(bound=st.integers(0, 5))
    def start(self, bound):
        self.waiting = Waiting(bound)
        self.bound = bound
        self.new, self.aside, self.ran, self.preempted = [], [], [], []
        self.count = 0

    @property
    def offered(self):
        return [
            row
            for row in self.new
            if row not in self.aside and row.arrival <= self.new[0].arrival + self.bound
        ]

    @rule(new=st.integers(1, 5), key=st.sampled_from(KEYS), copies=st.integers(1, 12))
    def add(self, new, key, copies):
        for _ in range(copies):
            request = InferenceRequest(
                id=str(self.count), prompt=(1,) * 4, adapter=key, params=SamplingParams(max_new_tokens=new)
            )
            self.count += 1
            self.new.append(Sequence(request))
            self.waiting.add(self.new[-1])

    @precondition(lambda self: self.offered)
    @rule(data=st.data(), aside=st.booleans())
    def start_or_set_aside(self, data, aside):
        row = data.draw(st.sampled_from(self.offered))
        if aside:
            self.waiting.set_aside(row)
            self.aside.append(row)
        else:
            self.waiting.start(row)
            self.new.remove(row)
            self.ran.append(row)

    @precondition(lambda self: self.aside)
    @rule(data=st.data(), start=st.booleans())
    def bring_back_or_start(self, data, start):
        row = data.draw(st.sampled_from(self.aside))
        self.aside.remove(row)
        if start:
            self.waiting.start(row)
            self.new.remove(row)
            self.ran.append(row)
        else:
            self.waiting.bring_back(row)

    @precondition(lambda self: self.new)
    @rule(data=st.data())
    def remove(self, data):
        row = data.draw(st.sampled_from(self.new))
        self.waiting.remove(row)
        self.new.remove(row)
        if row in self.aside:
            self.aside.remove(row)

    @precondition(lambda self: self.ran)
    @rule(data=st.data())
    def preempt(self, data):
        row = self.ran.pop(data.draw(st.integers(0, len(self.ran) - 1)))
        self.waiting.preempt(row)
        self.preempted.append(row)

    @precondition(lambda self: self.preempted)
    @rule(data=st.data(), again=st.booleans())
    def start_again(self, data, again):
        row = self.preempted.pop(data.draw(st.integers(0, len(self.preempted) - 1)))
        if again:
            self.waiting.start(row)
            self.ran.append(row)
        else:
            self.waiting.remove(row)

    @invariant()
    def finds_the_same(self):
        waiting = self.waiting
        waiting.check_integrity()
        self.preempted.sort(key=lambda row: row.arrival)
        assert list(waiting) == self.preempted + self.new
        assert len(waiting) == len(self.preempted) + len(self.new)
        assert waiting.work == sum(map(work, [*self.preempted, *self.new]))
        groups = {key: [row for row in self.offered if row.request.adapter == key] for key in KEYS}
        found = {key: (waiting.of(key).longest, waiting.of(key).oldest) for key in KEYS}
        assert found == {key: (longest(rows), oldest(rows)) for key, rows in groups.items()}
        adapted = groups[KEYS[1]] + groups[KEYS[2]]
        assert (waiting.adapted.longest, waiting.adapted.oldest) == (longest(adapted), oldest(adapted))


def longest(rows):
    return min(rows, key=lambda row: (-work(row), row.arrival), default=None)


def oldest(rows):
    return min(rows, key=lambda row: row.arrival, default=None)


TestWaiting = Machine.TestCase
TestWaiting.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_what_is_gone_does_not_pile_up():
    waiting = Waiting(10)
    keep = Sequence(InferenceRequest(id="long", prompt=(1,), params=SamplingParams(max_new_tokens=9)))
    waiting.add(keep)
    waiting.start(keep)
    waiting.preempt(keep)
    for number in range(1000):
        params = SamplingParams(max_new_tokens=1 + number % 7)
        row = Sequence(InferenceRequest(id=str(number), prompt=(1,), adapter=KEYS[1], params=params))
        waiting.add(row)
        waiting.set_aside(row)
        waiting.bring_back(row)
        waiting.start(row)
        assert len(waiting.adapted.by_length._heap) + len(waiting.adapted.by_age._heap) < 50
        assert len(waiting._opened) + len(waiting._later) < 50
    assert not waiting._groups
