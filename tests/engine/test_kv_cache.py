"""Who holds which blocks, and what is known to be in them."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.engine.kv_cache import Growth, OwnBlocks, SharedBlocks
from worker.engine.prefixes import PrefixTree
from worker.jobs import AdapterKey

KEY, OTHER = AdapterKey("tone", "1"), AdapterKey("tone", "2")
TEXT = list(range(100, 140))


@pytest.fixture(params=["shared", "own"])
def cache(request):
    return SharedBlocks(40, 4) if request.param == "shared" else OwnBlocks(4, 40, granule=4)


def compute(cache, adapter, tokens):
    """A sequence that computes `tokens`, reuses what it can, and still runs; also how much it reused."""
    blocks = []
    node = cache.match(adapter, tokens, len(tokens) - 1)
    copies = cache.begin(blocks, node, len(tokens))
    assert copies is not None
    cache.remember(adapter, tokens, blocks, len(tokens))
    return blocks, node.num_tokens if node else 0, copies


def give_back(cache, blocks):
    """As a sequence does that has filled its blocks."""
    cache.free(blocks, len(blocks) * cache.block_size)


# Blocks


def test_blocks_are_handed_out_lowest_first_and_taken_back():
    cache = SharedBlocks(4, 2)
    first, second = [], []
    assert cache.grow(first, 3)
    assert cache.grow(second, 1)
    assert (first, second, cache.num_free) == ([0, 1], [2], 1)
    give_back(cache, first)
    assert (first, cache.num_free) == ([], 3)
    assert cache.grow(second, 4)
    assert second == [2, 0]
    cache.check_integrity([second])


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_blocks_that_tokens_need(tokens, blocks):
    cache = SharedBlocks(8, 4)
    assert cache.missing([], tokens) == blocks
    assert cache.missing([7], tokens) == max(0, blocks - 1)
    assert cache.missing([7, 6, 5, 4], tokens) == 0


def test_growth_that_does_not_fit_changes_nothing():
    cache = SharedBlocks(2, 2)
    held = []
    assert cache.grow(held, 2)
    assert not cache.grow(held, 5)
    assert (held, cache.num_free) == ([0], 1)
    assert cache.grow(held, 1)
    assert held == [0]


@pytest.mark.parametrize("held", [[[0]], [[0, 1], [1]], [[0], [1], [2]], [[0, 0]]])
def test_block_lost_or_held_twice_is_noticed(held):
    cache = SharedBlocks(3, 1)
    cache.grow([], 2)
    with pytest.raises(AssertionError):
        cache.check_integrity(held)


# Texts


def test_text_is_known_in_whole_granules_and_only_once_it_is_remembered(cache):
    blocks = []
    assert cache.begin(blocks, None, 11) == []
    assert cache.match(KEY, TEXT, 40) is None
    cache.remember(KEY, TEXT, blocks, 3)
    assert cache.match(KEY, TEXT, 40) is None
    cache.remember(KEY, TEXT, blocks, 11)
    assert cache.match(KEY, TEXT, 40).num_tokens == 8
    assert cache.match(KEY, TEXT, 8).num_tokens == 8
    assert cache.match(KEY, TEXT, 7).num_tokens == 4
    assert cache.match(KEY, TEXT, 3) is None
    cache.check_integrity([blocks])
    cache.check_known(KEY, TEXT, blocks, 11)


def test_only_the_same_version_and_the_same_tokens_are_the_same_text(cache):
    blocks, _, _ = compute(cache, KEY, TEXT[:12])
    assert cache.match(OTHER, TEXT, 40) is None
    assert cache.match(None, TEXT, 40) is None
    assert cache.match(KEY, TEXT[1:], 39) is None
    assert cache.match(KEY, [*TEXT[:7], 0, *TEXT[8:]], 40).num_tokens == 4
    cache.check_integrity([blocks])


def test_nothing_is_known_without_reuse():
    for cache in (SharedBlocks(40, 4, reuse=False), OwnBlocks(4, 40, granule=4, reuse=False)):
        blocks, reused, _ = compute(cache, KEY, TEXT)
        give_back(cache, blocks)
        assert compute(cache, KEY, TEXT)[1] == reused == 0


def test_text_of_a_free_block_is_found_until_its_place_is_needed(cache):
    blocks, _, _ = compute(cache, KEY, TEXT)
    give_back(cache, blocks)
    assert cache.num_free == cache.num_blocks
    assert compute(cache, KEY, TEXT[:20])[1] == 16
    others = [compute(cache, OTHER, [number, *range(39)])[0] for number in range(3)]
    assert cache.match(KEY, TEXT, 40).num_tokens >= 20
    more = []
    while cache.num_free:
        cache.grow(more, len(more) * cache.block_size + 1)
    assert cache.match(KEY, TEXT, 40).num_tokens == 20
    assert len(others) == 3


def test_empty_blocks_go_before_remembered_ones_and_the_least_recently_used_before_others():
    cache = SharedBlocks(8, 4)
    texts = [[number] * 8 for number in range(3)]
    held = [compute(cache, KEY, text)[0] for text in texts]
    for blocks in held:
        give_back(cache, blocks)
    again, reused, _ = compute(cache, KEY, texts[0])
    assert reused == 4  # and its end, which was computed anew, is remembered in one place
    give_back(cache, again)
    assert cache.grow(again, 8)
    known = [node.num_tokens if (node := cache.match(KEY, text, 8)) else 0 for text in texts]
    assert known == [8, 8, 8], "two blocks were empty"
    assert cache.grow(again, 12)
    known = [node.num_tokens if (node := cache.match(KEY, text, 8)) else 0 for text in texts]
    assert known == [8, 4, 8], "the end of the text that was used least recently"
    cache.check_integrity([again])


def test_shared_blocks_are_held_by_all_who_begin_with_them():
    cache = SharedBlocks(40, 4)
    first, _, _ = compute(cache, KEY, TEXT[:16])
    second, reused, copies = compute(cache, KEY, [*TEXT[:8], 0, 0])
    assert (reused, copies) == (8, [])
    assert second[:2] == first[:2]
    assert second[2] not in first
    assert (cache.num_shared(first), cache.num_shared(second)) == (2, 2)
    give_back(cache, first)
    assert cache.num_shared(second) == 0
    cache.check_integrity([second])


def test_text_computed_twice_is_kept_once():
    cache = SharedBlocks(40, 4)
    first, second = [], []
    assert cache.begin(first, None, 10) == cache.begin(second, None, 10) == []
    assert not set(first) & set(second)
    cache.remember(KEY, TEXT, first, 10)
    cache.remember(KEY, TEXT, second, 10)
    assert second[:2] == first[:2]
    assert second[2] != first[2]
    assert cache.num_free == 36
    cache.check_integrity([first, second])


def test_begin_that_does_not_fit_changes_nothing():
    cache = SharedBlocks(5, 4)
    first, _, _ = compute(cache, KEY, TEXT[:16])
    node = cache.match(KEY, TEXT, 16)
    blocks = []
    assert cache.begin(blocks, node, 24) is None
    assert cache.begin(blocks, node, 20) == []
    give_back(cache, first)
    give_back(cache, blocks)
    assert cache.begin(blocks, cache.match(KEY, TEXT, 8), 24) is None
    cache.check_integrity([blocks])


def test_own_block_gets_a_copy_of_what_a_held_one_has():
    cache = OwnBlocks(3, 40, granule=4)
    first, _, _ = compute(cache, KEY, TEXT)
    second, reused, copies = compute(cache, KEY, [*TEXT[:13], 0])
    assert (reused, copies) == (12, [(first[0], second[0], 12)])
    # Whoever has a copy can be copied from.
    other = []
    cache.grow(other, 1)
    give_back(cache, first)
    cache.grow(first, 1)
    give_back(cache, other)
    third, _, copies = compute(cache, KEY, [*TEXT[:13], 1])
    assert copies == [(second[0], third[0], 12)]
    cache.check_integrity([first, second, third])


def test_own_block_is_taken_over_where_that_loses_nothing_or_nothing_is_empty():
    cache = OwnBlocks(2, 40, granule=4)
    first, _, _ = compute(cache, KEY, TEXT[:9])
    block = first[0]
    give_back(cache, first)
    second, reused, copies = compute(cache, KEY, TEXT[:9])
    assert (second, reused, copies) == ([block], 8, [])
    give_back(cache, second)
    third, _, copies = compute(cache, KEY, TEXT[:5])
    assert copies == [(block, third[0], 4)], "the rest of the text would be lost"
    fourth, _, copies = compute(cache, KEY, [*TEXT[:4], 0])
    assert (fourth, copies) == ([block], [])
    assert cache.match(KEY, TEXT, 40).num_tokens == 4
    cache.check_integrity([third, fourth])


def test_copy_from_a_block_that_is_free_is_made_before_that_block_can_go():
    cache = OwnBlocks(2, 40, granule=4)
    first, _, _ = compute(cache, KEY, TEXT[:13])
    source = first[0]
    give_back(cache, first)
    second, _, copies = compute(cache, KEY, TEXT[:5])
    third, _, later = compute(cache, OTHER, TEXT[:5])
    assert copies == [(source, second[0], 4)]
    assert (third, later) == ([source], [])
    assert cache.match(KEY, TEXT, 40).num_tokens == 4
    cache.check_integrity([second, third])


# What others have left


def test_new_blocks_have_nothing_to_be_zeroed(cache):
    cache.grow([], 9)
    assert cache.take_leftovers() == ()


def test_places_that_were_written_are_to_be_zeroed_once_somebody_gets_the_block(cache):
    blocks = []
    cache.grow(blocks, 10)
    cache.free(blocks, 7)
    assert cache.take_leftovers() == ()
    cache.grow(blocks, 10)
    shared = isinstance(cache, SharedBlocks)
    assert cache.take_leftovers() == (((0, 0, 4), (1, 0, 3)) if shared else ((0, 0, 7),))
    cache.free(blocks, 0)
    cache.grow(blocks, 10)
    assert cache.take_leftovers() == (), "they are zeros"


def test_block_that_changes_hands_twice_between_two_calls_is_named_once(cache):
    blocks = []
    cache.grow(blocks, 3)
    cache.free(blocks, 2)
    cache.grow(blocks, 3)
    cache.free(blocks, 3)
    cache.grow(blocks, 3)
    assert cache.take_leftovers() == ((blocks[0], 0, 3),)


def test_text_that_is_shared_is_not_to_be_zeroed():
    cache = SharedBlocks(12, 4)
    first, _, _ = compute(cache, KEY, TEXT[:16])
    give_back(cache, first)
    second, reused, _ = compute(cache, KEY, TEXT[:16])
    assert reused == 12
    assert cache.take_leftovers() == ()
    give_back(cache, second)
    third = []
    cache.grow(third, 48)
    assert {block for block, _, _ in cache.take_leftovers()} == set(range(5)), "all that was ever written"


def test_text_that_is_copied_or_taken_over_is_not_to_be_zeroed_and_what_was_behind_it_is():
    cache = OwnBlocks(2, 40, granule=4)
    first, _, _ = compute(cache, KEY, TEXT[:13])
    second, _, _ = compute(cache, OTHER, TEXT[:11])
    cache.free(second, 11)
    cache.take_leftovers()
    second, _, copies = compute(cache, KEY, TEXT[:9])
    assert copies == [(first[0], second[0], 8)]
    assert cache.take_leftovers() == ((second[0], 8, 11),)
    cache.free(first, 13)
    third, _, copies = compute(cache, KEY, TEXT[:5])
    assert copies == []
    assert cache.take_leftovers() == ((third[0], 4, 13),)


# Forecast


@given(
    rows=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=8),
    block_size=st.integers(1, 6),
    num_blocks=st.integers(1, 40),
)
def test_rows_that_fit_by_forecast_grow_to_their_end(rows, block_size, num_blocks):
    cache = SharedBlocks(num_blocks, block_size)
    running, refused = [], None
    for tokens, remaining in rows:
        others = [Growth(left, size, len(blocks), len(blocks)) for left, size, blocks in running]
        if cache.fits(None, Growth(remaining, tokens, 0, 0), others):
            blocks = []
            assert cache.begin(blocks, None, tokens) == []
            running.append((remaining, tokens, blocks))
        else:
            refused = (remaining, tokens, [])
            break
    peak = exact_peak([*running, *([refused] if refused else [])], block_size)
    if refused:  # cautious by less than a block a row
        assert peak + len(running) + 1 > num_blocks
    else:
        assert peak <= num_blocks
    for step in itertools.count(1):
        if not running:
            break
        for remaining, tokens, blocks in running:
            assert cache.grow(blocks, tokens + step - 1), "a row found no room"
            if remaining == step:
                give_back(cache, blocks)
        running = [row for row in running if row[0] > step]


def exact_peak(rows, block_size):
    """Most blocks ever in use when each row grows by a token a step, its last one not computed."""
    steps = max(remaining for remaining, _, _ in rows)
    return max(
        sum(-(-(tokens + step - 1) // block_size) for remaining, tokens, _ in rows if remaining >= step)
        for step in range(1, steps + 1)
    )


def test_forecast_counts_what_is_shared_once():
    cache = SharedBlocks(12, 4)
    first, _, _ = compute(cache, KEY, TEXT[:33])
    tokens = [*TEXT[:32], 0]
    others = [Growth(2, 34, len(first), 1)]
    assert not cache.fits(None, Growth(2, len(tokens), 0, 0), others)
    assert cache.fits(cache.match(KEY, tokens, 32), Growth(2, len(tokens), 0, 0), others)


# The tree


def test_tree_forgets_what_nobody_has():
    tree = PrefixTree(2)
    nodes = tree.extend(KEY, None, [1, 2, 3, 4, 5], 5)
    for node in nodes:
        node.holders["a"] = None
    assert [node.num_tokens for node in nodes] == [2, 4]
    assert nodes[-1].path == nodes
    nodes[0].holders["b"] = None
    tree.drop(nodes[0], "a")
    tree.check_integrity()
    tree.drop(nodes[1], "a")
    assert tree.find(KEY, [1, 2, 3, 4], 4) is nodes[0]
    tree.drop(nodes[0], "b")
    assert tree.find(KEY, [1, 2, 3, 4], 4) is None
    assert not list(tree.nodes())
    assert not tree._top.children


def test_hash_collision_is_no_match():
    """In CPython -1 and -2 have the same hash, and so have tuples of them."""
    assert hash((-1, 5)) == hash((-2, 5))
    tree = PrefixTree(2)
    for node in tree.extend(None, None, [-1, 5], 2):
        node.holders["a"] = None
    assert tree.find(None, [-2, 5], 2) is None
    assert tree.find(None, [-1, 5], 2) is not None
