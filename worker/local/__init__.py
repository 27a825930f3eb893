"""Rows of files on this machine, without queue and store."""
