"""Backups of an installation, taken while it runs and restored into an empty one, and its moves.

manifest: the list of all files of a backup with their sizes and digests.
databases: copies of SQLite and PostgreSQL databases, and what they refer to.
backup: takes a backup.
restore: restores one.
move: copies all files into another storage.
"""
