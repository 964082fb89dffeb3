"""Write docs/schemas/ from the models of ``dar.reward.v1``: ``python docs/build_schemas.py``."""

import json
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from dar.protocol.rewards import VERSION, Accepted, RewardRequest, RewardResponse

TARGET = Path(__file__).with_name("schemas")
DIALECT = "https://json-schema.org/draft/2020-12/schema"
GIVEN = {"not": {"type": "null"}}
EXCLUSIVE: dict[str, list[dict[str, Any]]] = {
    "RequestSample": [{"prompt": GIVEN, "messages": {"type": "null"}}, {"messages": GIVEN, "prompt": {"type": "null"}}],
    "RewardResponse": [{"rewards": GIVEN}, {"results": GIVEN}],
    "SampleResult": [
        {"reward": GIVEN}, {"skip": {"const": True}}, {"error": GIVEN},
        {"reward": {"type": "null"}, "skip": {"const": False}, "error": {"type": "null"}},
    ],
}  # fmt: skip
"""Alternatives that the models check by code. Exactly one of them applies, and its first field is
required."""


def schemas() -> dict[str, str]:
    """The text of each file, by file name."""
    models: dict[str, tuple[type[BaseModel], str]] = {
        "request": (RewardRequest, "Body of the POST to a reward service."),
        "response": (RewardResponse, "Body of a 200, of a poll that is done, and of a callback."),
        "accepted": (Accepted, "Body of a 202: the result comes later."),
    }
    return {
        f"{VERSION}.{name}.json": json.dumps(_schema(model, title), indent=2, ensure_ascii=False)
        + "\n"
        for name, (model, title) in models.items()
    }


def _schema(model: type[BaseModel], title: str) -> dict[str, Any]:
    found = model.model_json_schema(mode="validation")
    for name, definition in {model.__name__: found, **found.get("$defs", {})}.items():
        for field in definition.get("properties", {}).values():
            field.pop("title", None)
            if "patternProperties" in field:
                field["additionalProperties"] = False
        definition.pop("title", None)
        if name in EXCLUSIVE:
            definition["oneOf"] = [
                {"required": [next(iter(fields))], "properties": fields}
                for fields in EXCLUSIVE[name]
            ]
    return {"$schema": DIALECT, "title": f"{VERSION}: {title}", **found}


if __name__ == "__main__":
    TARGET.mkdir(exist_ok=True)
    for name, text in schemas().items():
        (TARGET / name).write_text(text)
    sys.stdout.write(f"{TARGET}\n")
