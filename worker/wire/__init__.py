"""Bytes <-> nouns: job messages in, result files and manifests out. Torch, AWS and asyncio stay outside."""

from worker.wire.bedrock_results import encode_summary
from worker.wire.dead_letters import encode_dead_letter
from worker.wire.enqueue import encode_job
from worker.wire.envelopes import find_pointer, unwrap, with_body
from worker.wire.manifest import (
    Manifest,
    decode_manifest,
    decode_part_tally,
    encode_manifest,
    encode_part_tally,
)
from worker.wire.native import decode, located, salvage
from worker.wire.output import encode_rows, tally
from worker.wire.places import (
    as_folder,
    cancel_uri,
    dead_letter_uri,
    input_uri,
    manifest_uri,
    part_number,
    parts_uri,
    result_uri,
    summary_uri,
    tallies_uri,
    tally_uri,
)
from worker.wire.source import encode_part, part_of
from worker.wire.split import Split, decode_split, encode_split

__all__ = [
    "Manifest",
    "Split",
    "as_folder",
    "cancel_uri",
    "dead_letter_uri",
    "decode",
    "decode_manifest",
    "decode_part_tally",
    "decode_split",
    "encode_dead_letter",
    "encode_job",
    "encode_manifest",
    "encode_part",
    "encode_part_tally",
    "encode_rows",
    "encode_split",
    "encode_summary",
    "find_pointer",
    "input_uri",
    "located",
    "manifest_uri",
    "part_number",
    "part_of",
    "parts_uri",
    "result_uri",
    "salvage",
    "summary_uri",
    "tallies_uri",
    "tally",
    "tally_uri",
    "unwrap",
    "with_body",
]
