"""Protocols of reward services: `dar.reward.v1`, and those of services written for other programs.

A protocol encodes samples as a request and decodes an answer into one result per sample. An answer
of the wrong length or type, or with a number out of bounds, is rejected as a whole.

native: ``dar.reward.v1``.
openai_grader: OpenAI's graders, one sample per request.
openrlhf: servers of OpenRLHF.
plain: any JSON API, by a template and a JSON pointer.
strict: number checks and parts of rewards, shared by the protocols.
trl: reward functions of TRL behind a URL.
"""
