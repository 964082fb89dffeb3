"""Where files of uploads and checkpoints are kept: a folder, or a bucket of an S3 store.

storage: the interface of both, and their errors.
folder: a folder of this machine.
s3: a bucket, for what passes through the service.
signing: URLs with which others transfer bytes to and from a bucket without its keys.
opening: the storage that the settings name.
"""
