"""loramill's batch worker: SQS in, mixed-adapter LoRA inference, S3 out."""
