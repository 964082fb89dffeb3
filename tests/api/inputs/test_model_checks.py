"""What the files of an installed model rule out is said at submission."""

import contextlib
import json
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fakes.live_service import Live
from service.jobs import submission
from service.jobs.model_checks import ModelFiles
from service.store.database import Database

PATH = "/v1/fine_tuning/jobs"
CHAT = b'{"prompt": "hi"}\n{"prompt": [{"role": "user", "content": "ho"}]}\n'
PAIRS = (
    b'{"chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],'
    b' "rejected": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "c"}]}\n'
)
CONFIG = {"model_type": "llama", "max_position_embeddings": 256}
LAYERS = {
    "model.embed_tokens.weight": [64, 8],
    "model.layers.0.self_attn.q_proj.weight": [8, 8],
    "model.layers.0.self_attn.v_proj.weight": [8, 8],
    "model.layers.0.input_layernorm.weight": [8],
}


def header(shapes: dict[str, list[int]]) -> bytes:
    """The beginning of a safetensors file; its weights are never read."""
    entries = {name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()}  # fmt: skip
    content = json.dumps({"__metadata__": {"format": "pt"}} | entries).encode()
    return struct.pack("<Q", len(content)) + content


@pytest.fixture
def install(home: Path) -> Callable[..., None]:
    """Puts files of a model into the models directory."""

    def put(name: str = "tiny", config: dict[str, Any] = CONFIG, **files: bytes | None) -> None:
        folder = home / "models" / name
        folder.mkdir()
        usual = {
            "config_json": json.dumps(config).encode(),
            "tokenizer_config_json": b'{"tokenizer_class": "X"}',
            "model_safetensors": header(LAYERS),
        }
        for key, content in (usual | files).items():
            stem, _, suffix = key.rpartition("_")
            if content is not None:
                (folder / f"{stem}.{suffix}").write_bytes(content)

    return put


def lora(targets: str | list[str]) -> dict[str, Any]:
    return {"peft": {"type": "lora", "target_modules": targets}}


def sampling(**values: int) -> dict[str, Any]:
    return {"sampling": values}


SAMPLING, TARGETS = "method.dar.sampling.max_new_tokens", "method.dar.peft.target_modules"


@pytest.mark.parametrize(
    ("dar", "param", "code"),
    [
        (sampling(max_new_tokens=256), SAMPLING, "context_exceeded"),
        (sampling(max_new_tokens=256, max_length=500), SAMPLING, "context_exceeded"),
        (sampling(max_new_tokens=8, max_length=8), SAMPLING, "max_length_exceeded"),
        (lora(["q_prj"]), TARGETS, "unknown_target"),
        (lora(["q_proj", "v_prj"]), TARGETS, "unknown_target"),
        (lora(["input_layernorm"]), TARGETS, "unknown_target"),
        (lora(["self_attn"]), TARGETS, "unknown_target"),
        (lora("q_proj"), TARGETS, "unknown_target"),
        (lora(r".*\.(q_prj|k_prj)"), TARGETS, "unknown_target"),
        (lora("(q_proj"), TARGETS, "invalid_pattern"),
        (lora(r"([\w.]+)+!"), TARGETS, "invalid_pattern"),
        (lora(r"(?:(a|a))*nothing"), TARGETS, "invalid_pattern"),
        (lora(r"((a?){20}){20}!"), TARGETS, "invalid_pattern"),
        (lora("(?x) (a+ #)\n)+!"), TARGETS, "invalid_pattern"),
        (lora(64 * "(a|aa)" + "!"), TARGETS, "invalid_pattern"),
        (lora(64 * "a?" + 64 * "a"), TARGETS, "invalid_pattern"),
        (lora(1001 * "a"), TARGETS, "invalid_pattern"),
    ],
)
def test_a_spec_that_the_model_cannot_serve_is_refused_with_its_parameter(
    live: Live,
    install: Callable[..., None],
    error_of: Callable[..., Any],
    dar: dict[str, Any],
    param: str,
    code: str,
) -> None:
    install()
    answer = live.http.post(PATH, json=live.spec(model="tiny", dar=dar))
    error = error_of(answer)
    assert answer.status_code == 400, answer.text
    assert (error["param"], error["errors"][0]["code"]) == (param, code)
    assert "\n" not in error["message"]


@pytest.mark.parametrize(
    "dar",
    [
        sampling(max_new_tokens=255),
        sampling(max_new_tokens=256, max_prompt_length=8),
        lora("all-linear"),
        lora(["q_proj"]),
        lora(["layers.0.self_attn.q_proj"]),
        lora(["lm_head", "embed_tokens"]),
        lora(r".*\.q_proj"),
        lora(r"model\.layers\.\d+\.self_attn\.(q|v)_proj"),
        lora(r"(?:.*\.)?layers\.(?:0|1|2[0-9])\.\w+\.(?P<name>q|k|v|o)_proj"),
        lora(r".*\.layers\.\d+\..*\.\w+_proj"),
        lora(r"(?i).*(?<!x)[]()*+|]?\.q_proj|nothing|a{3}(bc){2}"),
    ],
)
def test_what_the_model_can_serve_is_accepted(
    live: Live, install: Callable[..., None], dar: dict[str, Any]
) -> None:
    install()
    assert live.submit(model="tiny", dar=dar)["status"] == "queued"


def test_a_conversation_needs_a_chat_template(
    live: Live, install: Callable[..., None], error_of: Callable[..., Any]
) -> None:
    install()
    chats, pairs = (live.upload(rows).json()["id"] for rows in (CHAT, PAIRS))
    for spec, row in (
        (live.spec(model="tiny", training_file=chats), 2),
        (live.spec(model="tiny", training_file=pairs, dar={"rewards": None}), 1),
    ):
        error = error_of(live.http.post(PATH, json=spec))
        assert (error["param"], error["errors"][0]["row"]) == ("training_file", row)
        assert f"row {row} of the training file is a conversation" in error["message"]
    evaluated = {"validation_file": chats, "dar": {"evaluation": {"every_steps": 2}}}
    error = error_of(live.http.post(PATH, json=live.spec(model="tiny", **evaluated)))
    assert error["param"] == "validation_file"


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config_json": b'{"chat_template": "{{ messages }}"}'},
        {"chat_template_jinja": b"{{ messages }}"},
        {"tokenizer_config_json": None},  # the worker may find another tokenizer
    ],
)
def test_a_conversation_is_accepted_with_a_chat_template(
    live: Live, install: Callable[..., None], files: dict[str, bytes | None]
) -> None:
    install(**files)
    chats = live.upload(CHAT).json()["id"]
    assert live.submit(model="tiny", training_file=chats)["status"] == "queued"


@pytest.mark.parametrize(
    ("config", "files", "words"),
    [
        (CONFIG | {"auto_map": {"AutoModel": "x.Y"}}, {}, "asks to run its own code (auto_map"),
        (CONFIG | {"text_config": {"auto_map": {}}}, {}, "asks to run its own code (auto_map"),
        (
            CONFIG,
            {"model_safetensors": None, "pytorch_model_bin": b"x"},
            "are pickles, which are never loaded",
        ),
    ],
)
def test_a_model_that_is_never_loaded_is_refused(
    live: Live,
    install: Callable[..., None],
    error_of: Callable[..., Any],
    config: dict[str, Any],
    files: dict[str, bytes | None],
    words: str,
) -> None:
    install(config=config, **files)
    error = error_of(live.http.post(PATH, json=live.spec(model="tiny")))
    assert error["param"] == "model"
    assert words in error["message"]


@pytest.mark.parametrize(
    ("config", "numbers"),
    [
        ({"model_type": "llama"}, 2),
        ({"model_type": "llama", "id2label": {"0": "a", "1": "b", "2": "c"}}, 3),
        ({"model_type": "llama", "id2label": {"0": "a"}}, 1),
        ({"model_type": "llama", "num_labels": 1}, 1),
    ],
)
def test_a_reward_model_gives_one_number(
    live: Live,
    install: Callable[..., None],
    error_of: Callable[..., Any],
    config: dict[str, Any],
    numbers: int,
) -> None:
    install(name="judge", config=config)
    component = {"name": "j", "kind": "hf_model", "model": "judge"}
    answer = live.http.post(PATH, json=live.spec(dar={"rewards": {"components": [component]}}))
    if numbers == 1:
        assert answer.status_code == 200, answer.text
        return
    error = error_of(answer)
    assert error["param"] == "method.dar.rewards.components[0].model"
    assert f"gives {numbers} numbers per text" in error["message"]


@pytest.mark.parametrize(
    "files",
    [
        {"config_json": b'{"max_position_embeddings": "many", "text_config": 3}'},
        {"config_json": b'{"max_position_embeddings": null, "model_type": ["llama"]}'},
        {"model_safetensors": b"\xff" * 9},
        {"model_safetensors": b"x"},
        {"model_safetensors": struct.pack("<Q", 3) + b"[1]"},
        {"model_safetensors": header({"a.weight": []})[:-4]},
        {"tokenizer_config_json": b"\xff"},
        {"tokenizer_config_json": b"[" * 5000},
    ],
)
def test_files_that_are_not_understood_are_left_to_the_worker(
    live: Live, install: Callable[..., None], files: dict[str, bytes]
) -> None:
    install(**files)
    dar = lora(["q_proj"]) | sampling(max_new_tokens=32)
    assert live.submit(model="tiny", dar=dar)["status"] == "queued"


@pytest.mark.parametrize("config", [b"[", b"[]", b"3", b"null", b"", b"\xff", b"[" * 5000])
def test_a_model_whose_config_is_no_object_is_refused(
    live: Live, install: Callable[..., None], error_of: Callable[..., Any], config: bytes
) -> None:
    install(config_json=config)
    error = error_of(live.http.post(PATH, json=live.spec(model="tiny")))
    assert (error["param"], error["errors"][0]["code"]) == ("model", "model_config")
    assert "the config.json of the model 'tiny' is not a JSON object" in error["message"]
    component = {"name": "j", "kind": "hf_model", "model": "tiny"}
    spec = live.spec(model="Qwen/any", dar={"rewards": {"components": [component]}})
    error = error_of(live.http.post(PATH, json=spec))
    assert error["param"] == "method.dar.rewards.components[0].model"


SIZES = {"vocab_size": 64, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2}
NO_WEIGHTS = {"model_safetensors": None}
WEIGHTS = 648
"""In `LAYERS`."""
BY_CONFIG = 64 * 8 + 2 * (2 * 8 * 2 * (4 + 2) + 3 * 8 * 16)
LEAST_MEMORY: list[tuple[dict[str, Any], dict[str, Any], int, int]] = [
    # weights, gradients, two numbers of Adam and the reference, of 4 bytes each; and the weights
    ({}, {}, 20 * WEIGHTS, 4 * WEIGHTS),
    ({"hyperparameters": {"max_steps": 4, "optim": "adafactor"}}, {}, 12 * WEIGHTS, 4 * WEIGHTS),
    ({"resources": {"processes": 2}}, {}, 40 * WEIGHTS, 4 * WEIGHTS),
    ({"resources": {"processes": 2, "strategy": "fsdp"}}, {}, 20 * WEIGHTS, 4 * WEIGHTS),
    (lora(["q_proj"]), {}, 4 * WEIGHTS, 2 * WEIGHTS),
    ({}, {"config": CONFIG | SIZES, **NO_WEIGHTS}, 20 * BY_CONFIG, 4 * BY_CONFIG),
    ({}, {"consolidated_safetensors": header(LAYERS)}, 20 * WEIGHTS, 4 * WEIGHTS),
    ({}, {"config": CONFIG | SIZES | {"quantization_config": {}}}, 0, 0),
    ({}, {"config": CONFIG | SIZES | {"vocab_size": "many"}, **NO_WEIGHTS}, 0, 0),
    ({}, {"config": {"model_type": "gpt2"}, **NO_WEIGHTS}, 0, 0),
    ({}, {"model_safetensors": b"damaged"}, 0, 0),
    ({}, {"model_safetensors": header({"layer.weight": [10**30]})}, 0, 0),
    ({}, {"model_safetensors": header({"layer.weight": [2**30, 2**30]})}, 0, 0),
    ({}, {"config": CONFIG | SIZES | {"vocab_size": 10**30}, **NO_WEIGHTS}, 0, 0),
    ({}, {"config": CONFIG | SIZES | {"head_dim": -(10**9)}, **NO_WEIGHTS}, 0, 0),
]


def test_a_worker_without_the_memory_for_a_job_does_not_claim_it(
    live: Live, install: Callable[..., None]
) -> None:
    file_id = live.upload().json()["id"]

    def claims(memory: int, devices: list[str]) -> bool:
        report = {"version": "1", "machine": "m", "devices": devices, "memory_free": memory}
        report |= {"disk_free": 10**12, "disk_total": 10**12, "interval_seconds": 1.0}
        asks = {"node": "node-1", "slot": "0", "incarnation": "life-1", "boot_id": "boot-1"}
        answer = live.worker().post("/v1/worker/leases/claim", json=asks | {"report": report})
        return bool(answer.status_code == 200)

    for number, (dar, files, on_cpu, beside_gpus) in enumerate(LEAST_MEMORY):
        install(f"model-{number}", **files)
        for least, devices in ((on_cpu, []), (beside_gpus, ["0", "1"])):
            job_id = live.submit(model=f"model-{number}", training_file=file_id, dar=dar)["id"]
            if least:
                assert not claims(least - 1, devices), (number, least)
                message = live.job(job_id)["status_message"]
                assert (
                    message == f"waiting for a worker with {least:,} bytes of free memory, the "
                    "least that its trainer needs there"
                )
            assert claims(least, devices), (number, least)
            live.http.post(f"{PATH}/{job_id}/cancel")


def test_files_of_a_model_are_read_once_and_outside_of_transactions(
    live: Live, install: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    in_transaction: list[int] = []
    for kind in ("read", "write"):
        usual = getattr(Database, kind)

        @contextlib.contextmanager
        def counted(self: Database, *args: Any, usual: Any = usual, **values: Any) -> Iterator[Any]:
            in_transaction.append(threading.get_ident())
            try:
                with usual(self, *args, **values) as transaction:
                    yield transaction
            finally:
                in_transaction.remove(threading.get_ident())

        monkeypatch.setattr(Database, kind, counted)
    read: list[tuple[str, int]] = []
    content, keep = ModelFiles._content, submission._keep

    def noted(self: ModelFiles, name: str, first: int, end: int) -> bytes:
        assert threading.get_ident() not in in_transaction, name
        read.append((name, first))
        return content(self, name, first, end)

    answers = [False]
    monkeypatch.setattr(ModelFiles, "_content", noted)
    monkeypatch.setattr(submission, "_keep", lambda *of: answers.pop() if answers else keep(*of))
    install("tiny")
    file_id = live.upload().json()["id"]
    assert live.submit(model="tiny", training_file=file_id, dar=lora(["q_proj"]))["id"]
    assert answers == [], "something has changed since the plan was made"
    weights = [first for name, first in read if name == "model.safetensors"]
    assert weights == [0, 8] * 2, "once for each plan"
