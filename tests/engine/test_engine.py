"""`add`, `abort`, `step`: what a row's text is, and that nothing around the row changes it."""

import json
import shutil
from functools import partial

import pytest
import torch
from peft import PeftModel

from tests import tiny
from tests.engine.harness import Harness
from worker.engine.adapters.adapter import LoRAPair, LoRAWeights
from worker.engine.cache_size import CacheShape
from worker.engine.model_runner import Outcome
from worker.engine.sampler import Sample
from worker.errors import InvalidParameters, PromptTooLong
from worker.jobs import AdapterKey, FinishReason, InferenceRequest, SamplingParams

PROMPT = (72, 101, 108, 108, 111)
PROMPTS = [PROMPT, (1,), (200, 7, 9), tuple(range(40, 60)), (33, 33, 33, 33), (120, 5)]
EOS = 256


def request(name, prompt=PROMPT, adapter=None, **params):
    params = {"max_new_tokens": 10, "ignore_eos": True, **params}
    return InferenceRequest(id=name, prompt=prompt, adapter=adapter, params=SamplingParams(**params))


@pytest.fixture(scope="module")
def harness(llama):
    return Harness(llama, max_num_seqs=6, max_num_batched_tokens=32, max_loras=3)


@pytest.fixture(autouse=True)
def _clean(request):
    """Whatever a test does, it leaves an engine that holds nothing."""
    yield
    if "harness" in request.fixturenames:
        engine = request.getfixturevalue("harness").engine
        for name in list(engine._sequences):
            engine.abort(name)
        engine.check_integrity()
        assert not engine.has_work


@pytest.fixture
def script(harness, monkeypatch):
    """Rows say what they are told to: token ids or text by request id."""
    lines = {}

    def run(batch):
        rows = [row.sequence for row in batch.rows if row.samples]
        samples = [Sample(lines[row.request.id][row.num_generated], -0.5, True) for row in rows]
        return Outcome(samples, [[] for _ in batch.rows])

    def put(name, said):
        lines[name] = list(harness.base.tokenizer.encode(said)) if isinstance(said, str) else said

    monkeypatch.setattr(harness.runner, "run", run)
    return put


def run_one(harness, name="row", **options):
    return harness.run([request(name, **options)])[name]


# Ends


def test_row_ends_at_eos_which_is_a_token_and_no_text(harness, script):
    script("row", [*harness.base.tokenizer.encode("abc"), EOS, 1, 2])
    done = run_one(harness, ignore_eos=False)
    assert (done.text, done.finish_reason) == ("abc", FinishReason.EOS_TOKEN)
    assert done.token_ids[-1] == EOS
    assert len(done.token_ids) == 4
    assert done.prompt_tokens == len(PROMPT)
    assert done.failure is None


def test_ignored_eos_goes_on_to_the_limit(harness, script):
    script("row", [*harness.base.tokenizer.encode("a"), EOS, *harness.base.tokenizer.encode("bcdef")])
    done = run_one(harness, max_new_tokens=5)
    assert (done.text, done.finish_reason) == ("abcd", FinishReason.LENGTH)
    assert len(done.token_ids) == 5


@pytest.mark.parametrize("limit", [1, 2, 7])
def test_row_ends_at_max_new_tokens(limit, harness):
    done = run_one(harness, max_new_tokens=limit)
    assert (len(done.token_ids), done.finish_reason) == (limit, FinishReason.LENGTH)


def test_eos_as_the_very_last_token_is_an_eos(harness, script):
    script("row", [*harness.base.tokenizer.encode("ab"), EOS])
    assert run_one(harness, max_new_tokens=3, ignore_eos=False).finish_reason is FinishReason.EOS_TOKEN


def test_every_eos_of_the_model_ends_a_row(llama, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "base")
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [256, 7]}))
    assert Harness(folder).base.eos_token_ids == {256, 7}


# Stop sequences


@pytest.mark.parametrize(
    ("said", "stops", "text", "tokens"),
    [
        ("one two three", ["two"], "one ", 7),
        ("one two three", ["t"], "one ", 5),
        ("one two three", ["one"], "", 3),
        ("one two three", ["o"], "", 1),
        ("one two three", ["three", "two"], "one ", 7),
        ("one two three", ["wo", "two"], "one ", 7),
        ("one two three", ["two", "ne tw"], "o", 6),
        ("one two three", ["e two t", "two"], "one ", 7),
        ("aaab", ["aab"], "a", 4),
        ("ababac", ["abac"], "ab", 6),
        ("a\n\nb", ["\n\n"], "a", 3),
        ("Straße und", ["ße"], "Stra", 7),
        ("Straße und", ["ß"], "Stra", 6),
        ("ok \U0001f600! more", ["\U0001f600"], "ok ", 7),
        ("ok \U0001f600! more", ["\U0001f600!"], "ok ", 8),
        ("ok \U0001f600! more", ["k \U0001f600"], "o", 7),
        ("中文句子。完", ["。"], "中文句子", 15),
        ("end", ["end"], "", 3),
    ],
)
def test_text_ends_before_the_first_stop_sequence(said, stops, text, tokens, harness, script):
    script("row", said)
    done = run_one(harness, stop_sequences=tuple(stops), max_new_tokens=len(said.encode()))
    assert (done.text, done.finish_reason) == (text, FinishReason.STOP_SEQUENCE)
    assert len(done.token_ids) == tokens


@pytest.mark.parametrize("stops", [["four"], ["One"], ["twothree"], ["three "], ["Hello"], ["oone"]])
def test_text_without_its_stop_sequence_is_whole(stops, harness, script):
    script("row", "one two three")
    done = run_one(harness, stop_sequences=tuple(stops), max_new_tokens=13)
    assert (done.text, done.finish_reason) == ("one two three", FinishReason.LENGTH)


def test_stop_sequence_in_the_prompt_or_across_its_end_does_not_count(harness, script):
    prompt = harness.base.tokenizer.encode("stop st")
    script("row", "op here stop")
    done = run_one(harness, prompt=prompt, stop_sequences=("stop",), max_new_tokens=12)
    assert done.text == "op here "


def test_stop_sequence_is_found_behind_bytes_that_are_no_text(harness, script):
    tokenizer = harness.base.tokenizer
    broken = tokenizer.encode("é")[0]
    script("row", [broken, *tokenizer.encode("a"), broken, broken, *tokenizer.encode("b stop")])
    done = run_one(harness, stop_sequences=("stop",), max_new_tokens=10)
    assert (done.text, done.finish_reason) == ("\ufffda\ufffd\ufffdb ", FinishReason.STOP_SEQUENCE)


def test_stop_sequence_and_eos_end_at_whichever_comes_first(harness, script):
    script("row", [*harness.base.tokenizer.encode("ab"), EOS, *harness.base.tokenizer.encode("c")])
    done = run_one(harness, stop_sequences=("c",), ignore_eos=False)
    assert (done.text, done.finish_reason) == ("ab", FinishReason.EOS_TOKEN)


def test_stop_sequences_of_rows_do_not_mix(harness, script):
    for name in ("a", "b", "c"):
        script(name, "one two three")
    requests = [
        request("a", stop_sequences=("two",), max_new_tokens=13),
        request("b", stop_sequences=("three",), max_new_tokens=13),
        request("c", max_new_tokens=13),
    ]
    done = harness.run(requests)
    assert [done[name].text for name in "abc"] == ["one ", "one two ", "one two three"]


def test_what_the_model_says_is_cut_where_the_text_first_has_it(harness):
    plain = run_one(harness, max_new_tokens=20)
    stop = plain.text[6:8]
    done = run_one(harness, stop_sequences=(stop,), max_new_tokens=20)
    assert done.text == plain.text[: plain.text.index(stop)]
    assert done.token_ids == plain.token_ids[: len(done.token_ids)]


# Details


def forced_log_probs(base, folder, prompt, generated):
    """Log-probabilities of `generated`, by transformers and PEFT over the whole text at once."""
    model = tiny.load_base(base)
    if folder is not None:
        model = PeftModel.from_pretrained(model, folder).eval()
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *generated]])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(dim=-1)[range(len(generated)), list(generated)].tolist()


@pytest.mark.parametrize(
    "params", [{}, {"do_sample": True, "temperature": 2.5, "top_k": 50, "seed": 3, "repetition_penalty": 1.3}]
)
def test_log_probs_are_those_of_transformers_and_peft(params, harness, llama, adapters):
    folders = [None, *adapters[:2]]
    keys = [folder and harness.adapter(folder) for folder in folders]
    done = harness.run(
        request(f"{index}/{row}", prompt=prompt, adapter=key, details=True, **params)
        for index, key in enumerate(keys)
        for row, prompt in enumerate(PROMPTS[:3])
    )
    for index, folder in enumerate(folders):
        for row, prompt in enumerate(PROMPTS[:3]):
            own = done[f"{index}/{row}"]
            assert len(own.log_probs) == len(own.token_ids)
            expected = forced_log_probs(llama, folder, prompt, own.token_ids)
            assert own.log_probs == pytest.approx(expected, abs=1e-4)


def test_log_probs_are_there_only_when_asked_for(harness):
    done = harness.run([request("with", details=True), request("without")])
    assert done["without"].log_probs is None
    assert done["with"].token_ids == done["without"].token_ids


@pytest.fixture
def watch(monkeypatch):
    """A list that gets, for each step of a harness from now on, how many logits it kept beside one a row."""

    def put(harness):
        seen = []
        executor = harness.runner._executor
        run = executor.run

        def run_and_note(rows, *latest):
            logits = run(rows, *latest)
            seen.append(len(logits) - len(rows))
            return logits

        monkeypatch.setattr(executor, "run", run_and_note)
        return seen

    return put


@pytest.mark.parametrize("limit", [1, 7, 256])
def test_prompt_log_probs_are_the_same_however_few_a_step_computes(limit, harness, watch, adapters):
    keys = [None, *map(harness.adapter, adapters[:2])]
    rows = [request(f"{n}", range(n, n + 60), key, prompt_log_probs=True) for n, key in enumerate(keys)]
    rows += [request(f"plain{n}", PROMPTS[3], key) for n, key in enumerate(keys)]
    expected = harness.run(rows)
    assert len({own.prompt_log_probs for own in expected.values()}) == 4
    kept = watch(harness)
    harness.engine._scheduler.max_scored_tokens = limit
    got = harness.run(rows)
    harness.engine._scheduler.max_scored_tokens = 256
    assert max(kept) <= limit
    for name, own in expected.items():
        assert got[name].token_ids == own.token_ids
        assert got[name].prompt_log_probs == pytest.approx(own.prompt_log_probs, abs=1e-4)


def test_large_step_keeps_the_logits_of_few_prompt_tokens(llama, watch):
    harness = Harness(llama, max_num_seqs=6, max_num_batched_tokens=2048)
    rows = [request(f"row{n}", range(n, n + 150), prompt_log_probs=True) for n in range(6)]
    kept = watch(harness)
    done = harness.run(rows)
    assert 240 < max(kept) <= 256
    assert all(len(own.prompt_log_probs) == 150 for own in done.values())


# Company


def mixed_requests(keys):
    """Rows of every kind: greedy and sampled, short and long, of the base and of adapters."""
    for number, prompt in enumerate(PROMPTS * 3):
        params = [
            {},
            {"do_sample": True, "temperature": 1.5, "seed": 11},
            {"do_sample": True, "top_p": 0.9, "repetition_penalty": 1.2},
        ][number % 3]
        yield request(
            f"row{number}", prompt, keys[number % len(keys)], max_new_tokens=4 + number % 7, **params
        )


def test_any_row_says_the_same_alone_and_mixed(harness, adapters):
    keys = [None, *map(harness.adapter, adapters[:4])]
    requests = list(mixed_requests(keys))
    mixed = harness.run(requests)
    backwards = harness.run(reversed(requests))
    for own in requests:
        alone = harness.run([own])[own.id]
        assert mixed[own.id] == alone
        assert backwards[own.id] == alone


def test_preempted_sampled_rows_go_on_as_if_nothing_had_been(llama, harness):
    requests = [
        request(f"row{number}", prompt, do_sample=True, temperature=2.0, max_new_tokens=20, details=True)
        for number, prompt in enumerate(PROMPTS)
    ]
    cramped = Harness(llama, cache_shape=CacheShape(10, 8), max_num_seqs=6, max_num_batched_tokens=20)
    cramped.engine._scheduler.lengths.ratio = 0.0  # nobody is expected to grow
    got, expected = cramped.run(requests), harness.run(requests)
    assert cramped.stats[-1].preempted > 0
    for name, done in expected.items():
        assert got[name].token_ids == done.token_ids
        assert got[name].text == done.text
        assert got[name].log_probs == pytest.approx(done.log_probs, abs=1e-4)


def test_seed_decides_and_the_id_where_there_is_none(harness):
    sampled = partial(request, do_sample=True, temperature=3.0)
    done = harness.run(
        [sampled("a", seed=1), sampled("b", seed=1), sampled("c", seed=2), sampled("d"), sampled("e")]
    )
    assert done["a"].token_ids == done["b"].token_ids
    assert len({done[name].token_ids for name in "acde"}) == 4
    assert harness.run([sampled("d")])["d"] == done["d"]


def test_rows_join_while_others_run(harness):
    first, second = request("first", max_new_tokens=12), request("second", PROMPTS[3], max_new_tokens=12)
    expected = {name: done.token_ids for name, done in harness.run([first, second]).items()}
    harness.engine.add(first)
    for _ in range(4):
        assert harness.engine.step()[0] == []
    harness.engine.add(second)
    _, stats = harness.engine.step()
    assert stats.rows == 2
    assert {name: done.token_ids for name, done in harness.drain().items()} == expected


def test_base_rows_among_adapters_say_what_the_base_alone_says(harness, llama, adapters):
    keys = [harness.adapter(folder) for folder in adapters[:3]]
    requests = [request(f"base{row}", prompt) for row, prompt in enumerate(PROMPTS)]
    others = [request(f"other{row}", prompt, keys[row % 3]) for row, prompt in enumerate(PROMPTS)]
    expected = tiny.peft_generate(llama, None, map(list, PROMPTS), 10, eos_token_id=None)
    mixed = harness.run([own for pair in zip(requests, others, strict=True) for own in pair])
    for row, tokens in enumerate(expected):
        assert list(mixed[f"base{row}"].token_ids) == tokens
        assert mixed[f"other{row}"].token_ids != mixed[f"base{row}"].token_ids


def loud(harness, llama):
    """An adapter whose keys are as large as numbers get, and whose queries are so small that it works."""
    projections = dict(tiny.load_base(llama).named_modules())
    pairs = {}
    for name, target in harness.runner.targets.items():
        if name.endswith("q_proj"):
            pairs[name] = LoRAPair(torch.eye(target.in_features), -projections[name].weight.detach())
        elif name.endswith("k_proj"):
            ones = torch.ones(1, target.in_features)
            pairs[name] = LoRAPair(ones, torch.full((target.out_features, 1), 5e36))
    key = AdapterKey("loud", "1")
    assert harness.store.reserve(key)
    harness.store._loader = lambda _key, _folder: LoRAWeights(key, pairs)
    harness.store.load(key, None)
    return key


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("shape", [CacheShape(3, 160), CacheShape(6, 64)], ids=["own", "shared"])
def test_what_a_row_leaves_in_the_cache_does_no_harm_to_rows_after_it(shape, reuse, llama):
    """Even finite keys, if they are large: a score that overflows is not finite behind a mask either."""
    harness = Harness(llama, max_num_seqs=3, cache_shape=shape, prefix_reuse=reuse)
    rows = [request(f"row{number}", PROMPTS[number], max_new_tokens=20 + number) for number in range(3)]
    expected = harness.run(rows)
    key = loud(harness, llama)
    others = harness.run(request(f"loud{n}", range(n, n + 50), key) for n in range(6))
    assert all(own.failure is None for own in others.values())
    assert harness.run(rows) == expected


# Adapters come and go


def test_twelve_adapters_take_turns_in_two_slots(llama, adapters):
    harness = Harness(llama, max_loras=2, max_num_seqs=4)
    keys = [harness.adapter(folder) for folder in adapters]
    prompts = PROMPTS[:2]
    done = harness.run(
        request(f"{index}/{row}", prompt, key, max_new_tokens=6)
        for row, prompt in enumerate(prompts)
        for index, key in enumerate(keys)
    )
    answers = set()
    for index, folder in enumerate(adapters):
        expected = tiny.peft_generate(llama, folder, map(list, prompts), 6, eos_token_id=None)
        assert [list(done[f"{index}/{row}"].token_ids) for row in range(2)] == expected
        answers.add(tuple(expected[0]))
    assert len(answers) > 6, "the adapters do not differ enough to tell"
    assert max(stats.adapters for stats in harness.stats) == 2
    assert max(stats.resident_adapters for stats in harness.stats) == 2


def test_new_version_serves_new_rows_while_old_rows_keep_the_old(llama, adapters, tmp_path):
    harness = Harness(llama)
    old_folder, new_folder = adapters[1], adapters[2]
    for version, folder in (("1", old_folder), ("2", new_folder)):
        (tmp_path / version).mkdir()
        (tmp_path / version / "tone").symlink_to(folder)
    old = harness.adapter(tmp_path / "1" / "tone", version="1")
    harness.engine.add(request("old", adapter=old))
    for _ in range(4):
        harness.engine.step()
    new = harness.adapter(tmp_path / "2" / "tone", version="2")
    assert old.name == new.name
    done = harness.run([request("new", adapter=new), request("late", adapter=old)])
    (by_old,) = tiny.peft_generate(llama, old_folder, [list(PROMPT)], 10, eos_token_id=None)
    (by_new,) = tiny.peft_generate(llama, new_folder, [list(PROMPT)], 10, eos_token_id=None)
    assert by_old != by_new
    assert list(done["old"].token_ids) == list(done["late"].token_ids) == by_old
    assert list(done["new"].token_ids) == by_new


# Refusals and aborts


def test_row_too_long_is_refused_with_all_numbers(harness):
    with pytest.raises(PromptTooLong) as caught:
        harness.engine.add(request("row", (1,) * 100, max_new_tokens=61))
    for number in ("100", "61", "161", "160"):
        assert number in str(caught.value)
    assert not harness.engine.has_work


def test_row_that_just_fits_runs_to_its_end(harness):
    done = run_one(harness, prompt=(65,) * 100, max_new_tokens=60)
    assert len(done.token_ids) == 60


def test_empty_prompt_is_refused(harness):
    with pytest.raises(InvalidParameters, match="no tokens"):
        harness.engine.add(request("row", ()))


def test_check_refuses_what_add_refuses_and_adds_nothing(harness):
    with pytest.raises(PromptTooLong):
        harness.engine.check(request("row", max_new_tokens=1000))
    harness.engine.check(request("row"))
    assert not harness.engine.has_work


def test_id_in_flight_is_refused_and_free_again_afterwards(harness):
    harness.engine.add(request("row"))
    with pytest.raises(ValueError, match="row is in flight"):
        harness.engine.add(request("row", PROMPTS[1]))
    assert set(harness.drain()) == {"row"}
    assert run_one(harness).failure is None


@pytest.mark.parametrize("steps", [0, 1, 2, 4])
def test_aborted_rows_free_everything_wherever_they_stand(steps, harness, adapters):
    key = harness.adapter(adapters[0])
    expected = harness.run([request("kept", adapter=key)])["kept"]
    blocks = harness.runner.cache_shape.num_blocks
    harness.engine.add(request("kept", adapter=key))
    for number in range(9):  # some run, some are in the middle of their prompt, some wait
        harness.engine.add(request(f"row{number}", (7,) * 30, key, stop_sequences=("x",)))
    for _ in range(steps):
        harness.engine.step()
    for number in range(9):
        harness.engine.abort(f"row{number}")
        harness.engine.check_integrity()
    assert harness.drain() == {"kept": expected}
    _, stats = harness.engine.step()
    assert (stats.running, stats.waiting, stats.free_blocks) == (0, 0, blocks)


def test_abort_of_an_unknown_or_ended_row_does_nothing(harness):
    harness.engine.abort("nobody")
    run_one(harness)
    harness.engine.abort("row")
    harness.engine.check_integrity()


def test_aborted_id_can_be_used_again(harness):
    expected = run_one(harness)
    harness.engine.add(request("row", PROMPTS[3]))
    harness.engine.step()
    harness.engine.abort("row")
    assert run_one(harness) == expected


# Stats


def test_stats_count_every_prompt_and_generated_token(harness):
    harness.stats.clear()
    done = harness.run(request(f"row{number}", prompt) for number, prompt in enumerate(PROMPTS))
    computed = sum(stats.prompt_tokens for stats in harness.stats)
    assert computed + sum(stats.reused_tokens for stats in harness.stats) == sum(map(len, PROMPTS))
    generated = sum(len(own.token_ids) for own in done.values())
    assert sum(stats.generated_tokens for stats in harness.stats) == generated


def test_step_without_work_reports_an_empty_step(harness):
    completions, stats = harness.engine.step()
    assert completions == []
    assert (stats.rows, stats.adapters, stats.prompt_tokens, stats.generated_tokens) == (0, 0, 0, 0)


def test_token_that_the_model_does_not_know_is_that_rows_error(harness):
    with pytest.raises(InvalidParameters, match="token 272, the base model knows 272 tokens"):
        harness.engine.add(request("stray", [1, 272]))
