"""The adapter mirror: `s3://bucket/model_id/adapters/` on local disk, whole versions only."""
