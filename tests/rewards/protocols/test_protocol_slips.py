"""No slip of a service of another system becomes a reward, and no completion changes the shape of a
request.
"""

import json
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dar.errors import InvalidRequestError, RewardContractError, RewardMisconfiguredError
from dar.protocol.rewards import MAX_DEPTH
from dar.rewards.base import (
    Failed,
    RewardProtocol,
    Scored,
    Skipped,
)
from dar.rewards.protocols.native import NativeProtocol
from dar.rewards.protocols.openai_grader import OpenAIGraderProtocol
from dar.rewards.protocols.openrlhf import OpenRLHFProtocol
from dar.rewards.protocols.plain import PlainProtocol, check_template, resolve
from dar.rewards.protocols.trl import TRLProtocol
from fakes.reward_types import batch_of, sample

CHAT = [{"role": "user", "content": "2 + 2?"}]


# --- slips, none of which becomes a reward --------------------------------------------------------

LISTS: list[tuple[str, RewardProtocol]] = [("openrlhf", OpenRLHFProtocol()), ("trl", TRLProtocol())]


@pytest.mark.parametrize(("name", "protocol"), LISTS)
@pytest.mark.parametrize(
    ("rewards", "code"),
    [
        ("[0.5]", "length"),
        ("[[0.5]]", "length"),
        ("0.5", "type"),
        ("[]", "length"),
        ("[1,2,3,4]", "length"),
        ("[1,2,NaN]", "nonfinite"),
        ("[1,2,-Infinity]", "nonfinite"),
        ("[1,2,1e400]", "nonfinite"),
        (f"[1,2,{'9' * 400}]", "nonfinite"),
        ("[1,2,1e7]", "range"),
        ('[1,2,"3"]', "type"),
        ("[1,2,true]", "type"),
        ("[1,2,[3]]", "type"),
        ("[1,2,{}]", "type"),
        ('"123"', "type"),
        ("null", "type"),
        ('{"0":1,"1":2,"2":3}', "type"),
    ],
)
def test_lists_are_taken_whole_or_not_at_all(
    name: str, protocol: RewardProtocol, rewards: str, code: str
) -> None:
    batch = batch_of([sample(n) for n in range(3)])
    with pytest.raises(RewardContractError) as refused:
        protocol.decode(b'{"rewards": ' + rewards.encode() + b"}", batch)
    assert refused.value.error_code == f"contract.{code}", name


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b'{"reward": [1]}', "form"), (b'"x"', "type"), (b"3", "type"), (b"\xff", "json"), (b"[1,2,3] x", "json"),
        (b"[" * 100_000, "json"), (b"\xef\xbb\xbf[1,2,3]", "json"), (b"", "json"),
    ],
)  # fmt: skip
@pytest.mark.parametrize(("name", "protocol"), LISTS)
def test_what_is_no_answer_is_refused(
    name: str, protocol: RewardProtocol, body: bytes, code: str
) -> None:
    with pytest.raises(RewardContractError) as refused:
        protocol.decode(body, batch_of([sample(n) for n in range(3)]))
    assert refused.value.error_code == f"contract.{code}", name


def nested(body: str, depth: int) -> bytes:
    """``body`` with so many objects inside each other in place of DEEP."""
    return body.replace("DEEP", '{"a":' * depth + "true" + "}" * depth).encode()


@pytest.mark.parametrize(
    ("protocol", "body"),
    [
        (NativeProtocol(), '{"request_id": "rwq_1", "rewards": [1], "x": DEEP}'),
        (NativeProtocol(), '{"request_id": "rwq_1", "rewards": [1], "x": [[[DEEP]]]}'),
        (OpenAIGraderProtocol({}), '{"reward": 1, "metadata": {"errors": {"a": DEEP}}}'),
        (OpenRLHFProtocol(), '{"rewards": [1], "extra_logs": DEEP}'),
        (TRLProtocol(), '{"rewards": [1], "x": DEEP}'),
        (PlainProtocol({}, "/reward"), '{"reward": 1, "x": DEEP}'),
    ],
)
def test_a_deeply_nested_answer_is_refused_as_a_whole(protocol: RewardProtocol, body: str) -> None:
    for depth in (MAX_DEPTH, 1000, 100_000):
        with pytest.raises(RewardContractError) as refused:
            protocol.decode(nested(body, depth), batch_of([sample()]))
        assert refused.value.error_code == "contract.json"
    [found] = protocol.decode(nested(body, MAX_DEPTH - 5), batch_of([sample()]))
    is_flagged = isinstance(protocol, OpenAIGraderProtocol)
    assert isinstance(found, Failed if is_flagged else Scored)


def test_only_trl_knows_null_as_a_skip() -> None:
    batch = batch_of([sample(0), sample(1)])
    assert TRLProtocol().decode(b"[null, 1]", batch) == [Skipped(), Scored(1.0)]
    with pytest.raises(RewardContractError, match="null, but a number is expected"):
        OpenRLHFProtocol().decode(b'{"rewards": [null, 1]}', batch)


@pytest.mark.parametrize("rewards", ["[1,2]", "[[1,2]]", "[[1],[2]]"])
def test_openrlhf_tensors_of_one_row_or_column_are_lists(rewards: str) -> None:
    batch = batch_of([sample(0), sample(1)])
    found = OpenRLHFProtocol().decode(b'{"rewards": ' + rewards.encode() + b"}", batch)
    assert found == [Scored(1.0), Scored(2.0)]
    assert OpenRLHFProtocol().decode(rewards.encode(), batch) == found


@pytest.mark.parametrize("rewards", ["1", "[1]", "[[1]]"])
def test_openrlhf_may_answer_one_sample_with_a_bare_number(rewards: str) -> None:
    body = b'{"rewards": ' + rewards.encode() + b', "scores": 0.5, "extra_logs": {"A b!": [2]}}'
    found = OpenRLHFProtocol().decode(body, batch_of([sample()]))
    assert found == [Scored(1.0, {"scores": 0.5, "a_b_": 2.0})]


@pytest.mark.parametrize("rewards", ["[[1,2],[3]]", "[[1,2],[3,4]]", "[[[1]],[[2]]]", "[[1],2]"])
def test_openrlhf_lists_are_not_flattened_further(rewards: str) -> None:
    with pytest.raises(RewardContractError):
        OpenRLHFProtocol().decode(rewards.encode(), batch_of([sample(0), sample(1)]))


def test_logs_of_any_kind_never_decide_about_a_reward() -> None:
    logs = {
        "Same": [1, 2], "same": [3, 4], "text": ["a", "b"], "short": [1], "none": None, "huge": [1e300, 1],
        "x" * 40: [True, 5], "mixed": [None, 6], "": [7, 8],
    }  # fmt: skip
    body = orjson.dumps({"rewards": [1, 2], "extra_logs": logs})
    first, second = OpenRLHFProtocol().decode(body, batch_of([sample(0), sample(1)]))
    assert isinstance(first, Scored)
    assert isinstance(second, Scored)
    assert first.components == {"same": 1.0, "same_2": 3.0, "part": 7.0}
    assert second.components == {
        "same": 2.0,
        "same_2": 4.0,
        "huge": 1.0,
        "x" * 32: 5.0,
        "mixed": 6.0,
        "part": 8.0,
    }


@pytest.mark.parametrize(("text", "value"), [('"0.5"', 0.5), ("true", 1.0), ('" -2e1 "', -20.0)])
def test_texts_and_booleans_are_numbers_where_that_is_agreed(text: str, value: float) -> None:
    batch, body = batch_of([sample()]), text.encode()
    protocols: list[tuple[RewardProtocol, bytes]] = [
        (OpenRLHFProtocol(coerce=True), b"[%b]" % body),
        (TRLProtocol(coerce=True), b"[%b]" % body),
        (PlainProtocol("{{completion}}", "", coerce=True), body),
        (OpenAIGraderProtocol({}, coerce=True), b'{"reward": %b}' % body),
    ]
    for protocol, answer in protocols:
        (found,) = protocol.decode(answer, batch)
        assert isinstance(found, Scored)
        assert found.reward == value, protocol.name


@pytest.mark.parametrize(
    "text", ["nan", "inf", "1_000", "0x10", "", "1,5", "1e999", "9999999", "٣"]
)
def test_a_text_that_is_no_plain_number_is_none(text: str) -> None:
    with pytest.raises(RewardContractError):
        TRLProtocol(coerce=True).decode(orjson.dumps([text]), batch_of([sample()]))


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ({}, "form"), ({"reward": None}, "type"), ({"reward": True}, "type"), ({"reward": "1"}, "type"), ([1], "type"),
        ({"reward": 1, "metadata": []}, "type"), ({"reward": 1, "metadata": {"errors": ["other_error"]}}, "type"),
        ({"reward": 2e6}, "range"),
    ],
)  # fmt: skip
def test_an_answer_of_no_grader_is_refused(answer: object, code: str) -> None:
    with pytest.raises(RewardContractError) as refused:
        OpenAIGraderProtocol({}).decode(orjson.dumps(answer), batch_of([sample()]))
    assert refused.value.error_code == f"contract.{code}"


def test_a_flag_of_a_part_of_a_multi_grader_counts() -> None:
    answer = {"reward": 1, "metadata": {"errors": {"part": {"sample_parse_error": True}}}}
    (found,) = OpenAIGraderProtocol({}).decode(orjson.dumps(answer), batch_of([sample()]))
    assert isinstance(found, Failed)


def test_without_its_text_a_conversation_is_not_sent_as_one() -> None:
    chat = sample(0, prompt=None, messages=CHAT)
    with pytest.raises(RewardMisconfiguredError, match="conversation whose text is not known"):
        OpenRLHFProtocol().encode(batch_of([chat]))


# --- templates and pointers -----------------------------------------------------------------------


def encoded(template: object, **fields: Any) -> Any:
    columns = list(fields.get("columns", ()))
    return json.loads(PlainProtocol(template, "").encode(batch_of([sample(**fields)], columns)))


def test_a_placeholder_alone_keeps_the_type_of_its_value() -> None:
    template = {
        "text": "{{completion}}", "tokens": "{{ completion_tokens }}", "level": "{{columns.level}}", "truth": "{{ground_truth}}",
        "none": "{{columns.nothing}}", "chat": ["{{conversation}}"], "mixed": "{{prompt}}: {{columns.level}}/{{columns.nothing}}",
        "fixed": [1, None, True, {"{{completion}}": "{not} one}"}],
    }  # fmt: skip
    found = encoded(template, columns={"level": [1, 2], "nothing": None, "ground_truth": 4})
    assert found == {
        "text": "c0", "tokens": 2, "level": [1, 2], "truth": 4, "none": None,
        "chat": [[{"role": "user", "content": "p"}, {"role": "assistant", "content": "c0"}]],
        "mixed": "p: [1,2]/", "fixed": [1, None, True, {"{{completion}}": "{not} one}"}],
    }  # fmt: skip


@given(completion=st.text(), other=st.text())
def test_no_completion_changes_the_shape_of_a_request(completion: str, other: str) -> None:
    template = {"a": "{{completion}}", "b": ["<{{completion}}|{{columns.x}}>"], "c": 1}
    found = encoded(template, completion=completion, columns={"x": other})
    assert found == {"a": completion, "b": [f"<{completion}|{other}>"], "c": 1}


def test_a_lone_surrogate_in_a_completion_is_sent_as_a_replacement() -> None:
    assert encoded(["{{completion}}"], completion="a\ud800") == ["a\ufffd"]


@pytest.mark.parametrize(
    ("template", "param", "message"),
    [
        ({"a": "{{completion}}", "b": [{"c": "{{answer}}"}]}, ".b[0].c", "not a value of a sample"),
        (["{{text}} {{columns.x}}"], "[0]", "does not send"),
        ({"a": "completion"}, "", "sends no completion"),
        (None, "", "sends no completion"),
    ],
)
def test_a_template_that_cannot_work_is_refused_with_its_place(
    template: object, param: str, message: str
) -> None:
    with pytest.raises(InvalidRequestError, match=message) as refused:
        check_template(template, frozenset({"level"}))
    assert refused.value.param == param


def test_a_template_that_can_work_is_not_refused() -> None:
    check_template(
        {"a": ["{{conversation}}"], "b": "{{columns.level}}{{columns.ground_truth}}"},
        frozenset({"level"}),
    )


@pytest.mark.parametrize(
    ("pointer", "value"),
    [
        ("", {"a": [{"b": 1}], "x/y": {"~": 2}, "": 3, "0": 4}),
        ("/a/0/b", 1),
        ("/x~1y/~0", 2),
        ("/", 3),
        ("/0", 4),
    ],
)
def test_pointers_are_those_of_the_rfc(pointer: str, value: object) -> None:
    assert resolve({"a": [{"b": 1}], "x/y": {"~": 2}, "": 3, "0": 4}, pointer) == value


@pytest.mark.parametrize("pointer", ["/a/1", "/a/-1", "/a/00", "/a/-", "/b", "/a/0/b/c", "/a/x"])
def test_a_pointer_to_nothing_breaks_the_contract(pointer: str) -> None:
    with pytest.raises(RewardContractError, match="nothing at") as refused:
        resolve({"a": [{"b": 1}]}, pointer)
    assert refused.value.error_code == "contract.form"


@given(body=st.binary(max_size=200))
def test_no_bytes_at_all_make_a_decoder_raise_anything_else(body: bytes) -> None:
    protocols: list[RewardProtocol] = [
        OpenRLHFProtocol(coerce=True),
        TRLProtocol(coerce=True),
        PlainProtocol("", "/a", coerce=True),
        OpenAIGraderProtocol({}),
    ]
    for protocol in protocols:
        try:
            found = protocol.decode(body, batch_of([sample()]))
        except RewardContractError:
            continue
        assert len(found) == 1


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.floats(-1e7, 1e7)
    | st.text(max_size=5)
    | st.integers(-(10**7), 10**7),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["rewards", "reward", "scores", "extra_logs", "metadata", "errors"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)


@given(answer=JSON_VALUES)
def test_every_reward_is_a_number_that_was_sent(answer: object) -> None:
    sent = {float(number) for number in _numbers(answer)}
    protocols: list[RewardProtocol] = [
        OpenRLHFProtocol(),
        TRLProtocol(),
        PlainProtocol("", "/reward"),
        OpenAIGraderProtocol({}),
    ]
    for protocol in protocols:
        batch = batch_of([sample(n) for n in range(min(2, protocol.max_samples or 2))])
        try:
            found = protocol.decode(orjson.dumps(answer), batch)
        except RewardContractError:
            continue
        assert len(found) == len(batch.samples)
        assert {one.reward for one in found if isinstance(one, Scored)} <= sent


def _numbers(value: object) -> list[float]:
    if isinstance(value, bool):
        return []
    if isinstance(value, int | float):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [number for item in inner for number in _numbers(item)]
