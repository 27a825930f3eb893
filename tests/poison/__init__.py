"""A worker and what must not stop it: messages that nobody should send, and services that are not moto's."""
