"""Data sets of a hub as ``training_file``: ``hf://owner/name?split=train``."""

import re
from dataclasses import dataclass
from urllib.parse import parse_qsl

from dar.errors import InvalidRequestError

SCHEME = "hf://"
_ADDRESS = re.compile(
    r"hf://(?P<name>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(\?(?P<query>.*))?", re.ASCII
)
_WORD = re.compile(r"[\w.-]{1,96}", re.ASCII)


@dataclass(frozen=True, slots=True)
class HubData:
    """One split of a data set of a hub."""

    name: str
    """``owner/name``."""
    split: str = "train"
    config: str | None = None
    """Name of a configuration of the data set; None: its only one."""

    @classmethod
    def parse(cls, address: str, param: str = "training_file") -> "HubData":
        """Parse an address.

        Raises:
            InvalidRequestError: It is not such an address, or it has other parameters than a split
                and a configuration.
        """
        found = _ADDRESS.fullmatch(address)
        query = parse_qsl((found["query"] or "") if found else "", keep_blank_values=True)
        words = dict(query)
        is_right = (
            found is not None
            and len(words) == len(query)
            and words.keys() <= {"split", "config"}
            and all(_WORD.fullmatch(word) for word in words.values())
        )
        if found is None or not is_right:
            raise InvalidRequestError(
                f"{address!r} is no data set of a hub; write hf://owner/name?split=train, "
                "with &config=… where it has several",
                param=param,
            )
        return cls(found["name"], **words)
