"""lm-evaluation-harness: log-likelihoods by `/v1/completions`, answers by both endpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lm_eval
import pytest
from conftest import Server
from lm_eval.tasks import TaskManager

TASKS = Path(__file__).parent / "lm_eval_task"
NUM_CHOICES = [4, 3, 3, 3, 2]


@pytest.fixture(scope="module")
def tasks() -> TaskManager:
    return TaskManager(include_path=str(TASKS), include_defaults=False)


@pytest.fixture(autouse=True)
def in_the_tasks_folder(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tasks name their data by relative paths; the key comes as for OpenAI."""
    monkeypatch.chdir(TASKS)
    monkeypatch.setenv("OPENAI_API_KEY", server.api_key)


def evaluated(
    server: Server, tasks: TaskManager, task: str, model: str, path: str, **options: Any
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The task's results, and its samples in order."""
    told = lm_eval.simple_evaluate(
        model=model,
        model_args={
            "model": server.model,
            "base_url": f"{server.base_url}/{path}",
            "timeout": 60,
            "max_retries": 1,
            **options.pop("model_args", {}),
        },
        tasks=[task],
        task_manager=tasks,
        bootstrap_iters=0,
        **options,
    )
    assert told is not None
    return told["results"][task], sorted(told["samples"][task], key=lambda each: each["doc_id"])


def log_likelihoods(server: Server, tasks: TaskManager, **model_args: Any) -> list[list[float]]:
    """Of each choice of each question."""
    results, samples = evaluated(
        server, tasks, "shapes_choice", "local-completions", "completions", model_args=model_args
    )
    assert 0 <= results["acc,none"] <= 1
    told = [[float(choice[0][0]) for choice in each["resps"]] for each in samples]
    assert [len(each) for each in told] == NUM_CHOICES
    return told


@pytest.fixture(scope="module")
def expected(server: Server, tasks: TaskManager) -> list[list[float]]:
    """By the checkpoint's tokenizer, as token ids, one prompt a request."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(TASKS)
        patch.setenv("OPENAI_API_KEY", server.api_key)
        return log_likelihoods(server, tasks, **local_tokenizer(server), tokenized_requests=True)


def local_tokenizer(server: Server) -> dict[str, str]:
    folder = server.repository / "server" / "demo"
    return {"tokenizer_backend": "huggingface", "tokenizer": str(folder)}


def test_log_likelihoods_are_log_probabilities(expected: list[list[float]]) -> None:
    assert all(-200 < value < 0 for choices in expected for value in choices)
    assert len({round(value, 6) for choices in expected for value in choices}) > 10


@pytest.mark.parametrize(
    "more",
    [
        {"tokenized_requests": False},
        {"tokenized_requests": True, "batch_size": 4},
        {"tokenized_requests": False, "batch_size": 4},
        {"tokenized_requests": True, "num_concurrent": 4},
    ],
    ids=["text", "batches-of-ids", "batches-of-text", "concurrently"],
)
def test_every_way_to_ask_gives_the_same_log_likelihoods(
    server: Server, tasks: TaskManager, expected: list[list[float]], more: dict[str, Any]
) -> None:
    told = log_likelihoods(server, tasks, **local_tokenizer(server), **more)
    for choices, wanted in zip(told, expected, strict=True):
        assert choices == pytest.approx(wanted, abs=1e-3)


def test_the_servers_own_tokenizer_gives_the_same(
    server: Server, tasks: TaskManager, expected: list[list[float]]
) -> None:
    """By /tokenizer_info, /tokenize and /detokenize, which it finds by itself."""
    told = log_likelihoods(server, tasks, auth_token=server.api_key)
    for choices, wanted in zip(told, expected, strict=True):
        assert choices == pytest.approx(wanted, abs=1e-3)


def test_answers_by_chat(server: Server, tasks: TaskManager) -> None:
    results, samples = evaluated(
        server,
        tasks,
        "shapes_generate",
        "local-chat-completions",
        "chat/completions",
        apply_chat_template=True,
        model_args={"eos_string": "<|endofturn|>"},
    )
    assert 0 <= results["exact_match,none"] <= 1
    answers = [each["resps"][0][0] for each in samples]
    assert len(answers) == 3 and all(answers)
    assert not any("!" in answer for answer in answers)


def test_answers_by_completions(server: Server, tasks: TaskManager) -> None:
    _, samples = evaluated(
        server,
        tasks,
        "shapes_generate",
        "local-completions",
        "completions",
        model_args=local_tokenizer(server),
    )
    assert len([each["resps"][0][0] for each in samples]) == 3
