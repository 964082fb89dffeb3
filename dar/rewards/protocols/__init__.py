"""What is spoken with reward services: the protocol of this project, and those of services that were written for others.

An adapter turns samples into the bytes of a request and an answer into one result for each sample. None of them guesses: an
answer of another length, of another type or beyond the bounds is refused as a whole.
"""
