"""Models on this host: its own folders, its cache, and downloads.

local: the worker's own folder of models, and paths that stay inside a folder.
cache: models that were downloaded, shared by the slots of the host, of bounded size.
hub: which files a commit of a hub has, and their download, resumed where it broke off.
fetching: the models of one attempt, from wherever they are.
"""
