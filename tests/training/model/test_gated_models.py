"""Models and data sets that the hub gives only to some accounts, on a hub of this machine."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from dar.errors import TrainingError
from dar.settings import Settings
from dar.training import DARTrainer, JobInputs, NullControl, train_job
from dar.training.data.sets import open_rows
from dar.training.model.loading import load_model, load_tokenizer
from dar.training.model.reward_model import load_reward_model
from dar.training.script.arguments import ScriptArguments
from dar.training.script.assembly import build
from fakes import tiny_models
from fakes.hub import Hub, files_in, use_hub
from fakes.recording_sink import RecordingSink

TOKEN, STRANGER = "hf_9XkQ2vRbW7mLpZt4", "hf_Jd83nVyTqC5sGh1u"
MODEL, JUDGE, ROWS = "team/policy", "team/judge", "datasets/team/rows"
LINES = b'{"prompt": "w10 w20"}\n{"prompt": "w55"}\n{"prompt": "w60 w32"}\n'


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    folder = tmp_path_factory.mktemp("repositories")
    return {
        MODEL: files_in(tiny_models.save(tiny_models.policy(), folder / "policy")),
        JUDGE: files_in(tiny_models.save(tiny_models.judge(pad_token_id=1), folder / "judge")),
        ROWS: {"train.jsonl": LINES},
    }


@pytest.fixture
def hub(
    repositories: dict[str, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Hub]:
    names = frozenset(repositories)
    readers = {TOKEN: names, STRANGER: frozenset[str]()}
    with Hub(repositories, gated=names, readers=readers) as server:
        use_hub(monkeypatch, server.endpoint, tmp_path / "hub-cache")
        yield server


LOADERS: dict[str, Callable[..., Any]] = {
    f"the model '{MODEL}'": lambda **access: load_model(MODEL, **access),
    f"the tokenizer of the model '{MODEL}'": lambda **access: load_tokenizer(MODEL, **access),
    f"the reward model '{JUDGE}'": lambda **access: load_reward_model(JUDGE, **access),
    "the data set 'team/rows' of the hub (split 'train')": lambda **access: open_rows(
        "team/rows", **access
    ),
}


@pytest.mark.parametrize("what", LOADERS)
def test_everything_of_a_hub_is_requested_with_the_token(hub: Hub, what: str) -> None:
    LOADERS[what](token=TOKEN)
    assert {token for _, token in hub.asked()} == {TOKEN}


@pytest.mark.parametrize("what", LOADERS)
@pytest.mark.parametrize(
    ("token", "words"),
    [
        (None, "only to accounts that its owner has accepted; accept its licence on its page"),
        (STRANGER, "only to accounts that its owner has accepted; accept its licence on its page"),
        ("hf_B6wEzK0rYf2aNx7i", "HTTP 401: Invalid credentials in Authorization header"),
    ],
    ids=["no token", "of another account", "expired"],
)
def test_what_the_hub_refuses_is_one_sentence_with_the_way_out(
    hub: Hub, what: str, token: str | None, words: str
) -> None:
    with pytest.raises(TrainingError) as refused:
        LOADERS[what](token=token)
    message = refused.value.message
    assert what in message
    assert words in message
    assert "set DAR_HF_TOKEN on the worker (HF_TOKEN for dar train) to a token of " in message
    assert "\n" not in message
    assert token is None or token not in message


def test_a_private_model_is_one_that_the_hub_may_keep(hub: Hub) -> None:
    hub.private = frozenset({MODEL})
    for token in (None, STRANGER):
        with pytest.raises(TrainingError, match=r"keeps it private; .* set DAR_HF_TOKEN"):
            load_model(MODEL, token=token)
    assert load_model(MODEL, token=TOKEN).config.model_type == "llama"


def test_the_token_of_the_environment_is_used_without_one_of_dar(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    load_tokenizer(MODEL)
    assert {token for _, token in hub.asked()} == {TOKEN}


@pytest.mark.parametrize("peft", [None, {"type": "lora", "r": 2}], ids=["weights", "adapter"])
def test_a_job_loads_all_it_names_with_the_token_and_writes_it_nowhere(
    hub: Hub,
    job_inputs: Callable[..., JobInputs],
    sink: RecordingSink,
    tmp_path: Path,
    peft: dict[str, Any] | None,
) -> None:
    judge = {"name": "judge", "kind": "hf_model", "model": JUDGE}
    inputs = job_inputs({"rewards": {"components": [judge]}, "peft": peft}, steps=2, offline=False)
    spec = inputs.spec.model_copy(
        update={"model": MODEL, "training_file": "hf://team/rows?split=train"}
    )
    inputs = replace(inputs, spec=spec, model=MODEL, training_file=None, hub_token=TOKEN)
    assert train_job(inputs, sink, NullControl()) == "finished"
    assert hub.asked().keys() == {(MODEL, TOKEN), (JUDGE, TOKEN), (ROWS, TOKEN)}
    assert TOKEN not in repr(inputs)
    assert TOKEN not in json.dumps([sink.events, sink.phases], default=str)
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path


def test_dar_train_uses_the_token_of_its_settings_and_a_flag_comes_first(
    hub: Hub, config: Callable[..., Any], sink: RecordingSink
) -> None:
    script = ScriptArguments(
        model_name_or_path=MODEL, dataset_name="team/rows", reward_model_name_or_path=[JUDGE]
    )
    settings = Settings(hf_token=SecretStr(TOKEN))
    trainer = build(script, config(), settings, sink, NullControl())
    assert isinstance(trainer, DARTrainer)
    assert hub.asked().keys() == {(MODEL, TOKEN), (JUDGE, TOKEN), (ROWS, TOKEN)}
    assert TOKEN not in str(trainer.args)
    assert TOKEN not in trainer.args.to_json_string()
    flagged = config(hub_token=STRANGER)
    with pytest.raises(TrainingError, match="only to accounts that its owner has accepted"):
        build(script, flagged, settings, sink, NullControl())
