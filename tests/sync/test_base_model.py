"""The worker says what its base model takes; an upload for another one replaces no version that works."""

import os

import pytest

from adapters_sync.base_model import BaseModelFile
from adapters_sync.layout import (
    AdapterState,
    BaseModel,
    InvalidAdapter,
    check_folder,
    resolve,
    write_base_model,
)
from adapters_sync.report import FailureKind
from tests.sync.builders import CONFIG, WEIGHTS, config, safetensors, state_of, write_folder
from tests.sync.memory_s3 import MemoryBucket

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
BASE = BaseModel(
    modules={Q: (8, 16), DOWN: (32, 8)}, refused={"lm_head": "it is the output embedding"}, max_lora_rank=64
)


def pair(module=Q, features=(8, 16), rank=4):
    return {
        f"base_model.model.{module}.lora_A.weight": [rank, features[0]],
        f"base_model.model.{module}.lora_B.weight": [features[1], rank],
    }


def adapter(*tensors, **changes):
    """An adapter's files with tensors of these shapes."""
    header, offset = {}, 0
    for name, shape in (item for one in tensors or (pair(),) for item in one.items()):
        size = 2 * shape[0] * shape[1] if len(shape) == 2 else 2 * shape[0]
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    return {CONFIG: config(**changes), WEIGHTS: safetensors(header, bytes(offset))}


FITS = adapter(pair(), pair(DOWN, (32, 8), rank=2))
MISFITS = [
    (adapter(pair("model.layers.1.self_attn.q_proj")), "is for a module that the base model does not have"),
    (adapter(pair(features=(9, 16))), "has shape [4, 9]; the base model needs [rank, 8]"),
    (adapter(pair(features=(8, 17))), "has shape [17, 4]; the base model needs [16, rank]"),
    (adapter({f"base_model.model.{Q}.lora_A.weight": [8]}), "has shape [8]; the base model needs [rank, 8]"),
    (adapter(pair("lm_head")), "module 'lm_head' cannot take LoRA: it is the output embedding"),
    (adapter(r=65), "r is 65; the limit is 64"),
]


@pytest.mark.parametrize(("files", "reason"), MISFITS)
def test_a_misfit_is_refused_by_tensor_and_shape(tmp_path, files, reason):
    folder = write_folder(tmp_path / "a", files)
    check_folder(folder)
    with pytest.raises(InvalidAdapter) as error:
        check_folder(folder, base=BASE)
    assert reason in error.value.reason


def test_what_fits_and_tensors_that_are_no_lora_weights_pass(tmp_path):
    check_folder(write_folder(tmp_path / "a", FITS), base=BASE)
    extra = {"base_model.model.lm_head.weight": [3, 3], f"base_model.model.{Q}.lora_magnitude_vector": [16]}
    check_folder(write_folder(tmp_path / "b", adapter(pair(), extra)), base=BASE)


ENDS = BaseModel(
    modules={Q: (8, 16), "lm_head": (8, 30)},
    vocabularies={"lm_head": (30, 8), "model.embed_tokens": (30, 8)},
    lora_extra_vocab_size=4,
)
HEAD, EMBED = "base_model.model.lm_head", "base_model.model.model.embed_tokens"
WITH_TOKENS = [
    {f"{HEAD}.weight": [34, 8], f"{EMBED}.weight": [34, 8]},
    {f"{HEAD}.base_layer.weight": [30, 8], **pair("lm_head", (8, 30))},
    {f"{HEAD}.base_layer.weight": [31, 8], **pair("lm_head", (8, 31))},
    {f"{EMBED}.lora_embedding_A": [4, 33], f"{EMBED}.lora_embedding_B": [8, 4]},
    {f"{EMBED}.token_adapter.trainable_tokens_delta": [2, 8]},
    {f"{EMBED}.weight": [27, 8], f"{HEAD}.weight": [27, 8]},
    {f"{EMBED}.modules_to_save.weight": [32, 8], f"{EMBED}.original_module.weight": [32, 8]},
]
TOO_MANY = [
    ({f"{HEAD}.weight": [35, 8]}, "lm_head.weight' brings 5 tokens; the limit is 4"),
    ({f"{EMBED}.token_adapter.base_layer.weight": [35, 8]}, "brings 5 tokens; the limit is 4"),
    (pair("lm_head", (8, 35)), "lora_B.weight' brings 5 tokens; the limit is 4"),
    ({f"{EMBED}.lora_embedding_A": [4, 40]}, "brings 10 tokens; the limit is 4"),
    ({f"{EMBED}.lora_embedding_B": [9, 4]}, "has shape [9, 4]; the base model needs [8, rank]"),
    ({f"{HEAD}.weight": [30, 9]}, "has shape [30, 9]; the base model needs [30, 8]"),
    ({f"{HEAD}.weight": [30]}, "has shape [30]; the base model needs [30, 8]"),
]


@pytest.mark.parametrize("tensors", WITH_TOKENS)
def test_embeddings_and_heads_may_have_a_few_tokens_more(tmp_path, tensors):
    check_folder(write_folder(tmp_path / "a", adapter(pair(), tensors)), base=ENDS)


@pytest.mark.parametrize(("tensors", "reason"), TOO_MANY)
def test_embeddings_and_heads_of_other_sizes_are_refused(tmp_path, tensors, reason):
    folder = write_folder(tmp_path / "a", adapter(pair(), tensors))
    with pytest.raises(InvalidAdapter) as error:
        check_folder(folder, base=ENDS)
    assert reason in error.value.reason


def test_the_smaller_of_two_limits_on_the_rank_holds(tmp_path):
    folder = write_folder(tmp_path / "a", adapter(r=48))
    check_folder(folder, max_rank=100, base=BASE)
    with pytest.raises(InvalidAdapter, match="the limit is 32"):
        check_folder(folder, max_rank=32, base=BASE)


@pytest.mark.parametrize(("files", "reason"), MISFITS)
def test_an_upload_for_another_base_is_invalid_and_the_last_good_version_stays(world, files, reason):
    world.bucket.put_adapter("a", FITS)
    world.sync()
    write_base_model(world.paths, BASE)
    good = resolve(world.adapters_dir, "a")
    world.bucket.put_adapter("a", files)
    world.bucket.put_adapter("b", FITS)
    report = world.sync()
    status = state_of(world, "a")
    assert (status.state, status.version) == (AdapterState.INVALID, good.version)
    assert reason in status.reason
    assert resolve(world.adapters_dir, "a") == good
    assert resolve(world.adapters_dir, "b") is not None
    assert report.failures == {FailureKind.INVALID: 1}


def test_without_the_file_nothing_is_judged_by_it(world):
    for number, (files, _) in enumerate(MISFITS):
        world.bucket.put_adapter(f"a{number}", files)
    assert len(world.sync().published) == len(MISFITS)


@pytest.mark.parametrize("content", [b"", b"[]", b'{"modules": {"q": 3}}', b"\xff"])
def test_a_file_that_cannot_be_read_is_as_good_as_none(world, content):
    world.sync()
    world.paths.base_model_file.write_bytes(content)
    world.bucket.put_adapter("a", MISFITS[0][0])
    assert world.sync().published


def test_a_version_kept_from_before_is_judged_before_it_comes_back(world):
    world.bucket.put_adapter("a", MISFITS[0][0])
    world.sync()
    world.bucket.put_adapter("a", FITS)
    world.sync()
    good = resolve(world.adapters_dir, "a")
    write_base_model(world.paths, BASE)
    world.bucket.put_adapter("a", MISFITS[0][0])
    assert world.sync().failures == {FailureKind.INVALID: 1}
    assert resolve(world.adapters_dir, "a") == good


def test_what_was_refused_is_judged_anew_when_the_base_changes_and_only_then(world, monkeypatch):
    world.bucket.put_adapter("a", FITS)
    reads = []
    real = MemoryBucket.read

    def counted(self, path, etag):
        reads.append(path)
        return real(self, path, etag)

    async def work(mirror):
        states = []
        for modules in ({}, {}, BASE.modules):
            write_base_model(world.paths, BaseModel(modules=modules))
            for _ in range(2):
                reads.clear()
                await mirror.run_once()
                states.append((mirror.state.find("a").state, bool(reads)))
        return states

    world.sync()
    world.bucket.put_adapter("a", adapter())
    monkeypatch.setattr(MemoryBucket, "read", counted)
    refused, published = AdapterState.INVALID, AdapterState.READY
    assert world.with_mirror(work) == [
        (refused, True), (refused, False),
        (refused, False), (refused, False),
        (published, True), (published, False),
    ]  # fmt: skip


def test_the_file_is_read_when_it_changed_and_otherwise_only_asked_for_its_status(world, monkeypatch):
    world.sync()
    file = BaseModelFile(world.paths)
    assert (file.look(), file.model) == (False, None)
    write_base_model(world.paths, BASE)
    assert (file.look(), file.model) == (True, BASE)
    with monkeypatch.context() as patch:
        patch.setattr("adapters_sync.base_model._read", lambda path: pytest.fail("read again"))
        assert not file.look()
    world.paths.base_model_file.unlink()
    assert (file.look(), file.model) == (True, None)


def test_writing_what_is_said_already_changes_no_file(world):
    world.sync()
    write_base_model(world.paths, BASE)
    before = world.paths.base_model_file.stat()
    write_base_model(world.paths, BASE)
    assert world.paths.base_model_file.stat() == before
    assert before.st_mode & 0o777 == 0o644


def test_a_failed_write_leaves_what_was_there(world, monkeypatch):
    world.sync()
    write_base_model(world.paths, BASE)
    before = sorted(world.adapters_dir.parent.iterdir())

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_base_model(world.paths, BaseModel(modules={}))
    file = BaseModelFile(world.paths)
    file.look()
    assert file.model == BASE
    assert sorted(world.adapters_dir.parent.iterdir()) == before
