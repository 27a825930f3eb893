"""Faults on the way to S3 and SQS: a proxy that makes them, and what the worker does about them."""
