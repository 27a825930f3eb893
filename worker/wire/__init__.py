"""Bytes <-> nouns: job messages in, result files and manifests out. Torch, AWS and asyncio stay outside."""

from worker.wire.bedrock_results import encode_summary
from worker.wire.dead_letters import encode_dead_letter
from worker.wire.enqueue import encode_job
from worker.wire.manifest import Manifest, decode_manifest, encode_manifest
from worker.wire.native import decode, salvage
from worker.wire.output import encode_rows, tally
from worker.wire.places import cancel_uri, dead_letter_uri, manifest_uri, result_uri, summary_uri

__all__ = [
    "Manifest",
    "cancel_uri",
    "dead_letter_uri",
    "decode",
    "decode_manifest",
    "encode_dead_letter",
    "encode_job",
    "encode_manifest",
    "encode_rows",
    "encode_summary",
    "manifest_uri",
    "result_uri",
    "salvage",
    "summary_uri",
    "tally",
]
