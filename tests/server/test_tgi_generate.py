"""TGI's whole answers: their text, details, headers, and the best of several."""

import re
from typing import Any

import pytest
from scripted import ScriptedEngine
from server_of import ask, engine_of, serving_of

from longwing.engine.events import Failed
from longwing.engine.request import Request
from longwing.server.serving import Serving
from longwing.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def serving(byte_tokenizer: Tokenizer) -> Serving:
    return serving_of(byte_tokenizer)


def generate(serving: Serving, inputs: str, **parameters: Any) -> dict[str, Any]:
    answer = ask(serving, "/generate", {"inputs": inputs, "parameters": parameters})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_without_details_there_is_text_alone(serving: Serving) -> None:
    assert generate(serving, "Hello") == {"generated_text": "Hello"}


def test_details_tell_how_the_text_came_about(serving: Serving) -> None:
    details = generate(serving, "Hi", max_new_tokens=1, details=True)["details"]
    assert details == {
        "finish_reason": "length",
        "generated_tokens": 1,
        "seed": None,
        "prefill": [],
        "tokens": [{"id": 39, "text": "H", "logprob": -0.25, "special": False}],
    }


def test_an_end_token_is_shown_among_the_tokens_and_not_in_the_text(serving: Serving) -> None:
    answer = generate(serving, "Hi", details=True)
    assert answer["generated_text"] == "Hi"
    assert answer["details"]["finish_reason"] == "eos_token"
    last = answer["details"]["tokens"][-1]
    assert (last["text"], last["special"]) == ("<end>", True)


def test_a_stop_string_is_part_of_the_text(serving: Serving) -> None:
    answer = generate(serving, "one two three", stop=["two"], details=True)
    assert answer["generated_text"] == "one two"
    assert answer["details"]["finish_reason"] == "stop_sequence"


def test_special_tokens_in_inputs_are_read_as_such(serving: Serving) -> None:
    generate(serving, "a<end>b")
    assert engine_of(serving).seen[-1].prompt_ids == (64, 256, 65)


def test_truncate_keeps_the_last_tokens(serving: Serving) -> None:
    assert generate(serving, "x" * 500 + "tail", truncate=4)["generated_text"] == "tail"


def test_return_full_text_begins_with_all_of_the_inputs(serving: Serving) -> None:
    answer = generate(serving, "Hello you", truncate=3, return_full_text=True)
    assert answer["generated_text"] == "Hello youyou"


def test_top_tokens_stand_beside_each_token_if_asked_for(serving: Serving) -> None:
    details = generate(serving, "Hi", max_new_tokens=2, top_n_tokens=2, details=True)["details"]
    assert [[token["id"] for token in place] for place in details["top_tokens"]] == [
        [39, 40],
        [72, 73],
    ]
    assert details["top_tokens"][0][0] == {
        "id": 39, "text": "H", "logprob": -0.25, "special": False,
    }  # fmt: skip


def test_prompt_tokens_are_reported_if_the_operator_lets_them(byte_tokenizer: Tokenizer) -> None:
    serving = serving_of(byte_tokenizer, enable_prefill_logprobs=True)
    details = generate(serving, "Hi", decoder_input_details=True)["details"]
    assert details["prefill"] == [
        {"id": 39, "text": "H", "logprob": None},
        {"id": 72, "text": "i", "logprob": -0.5},
    ]


@pytest.mark.parametrize(
    ("parameters", "temperature"),
    [
        ({}, 0.0),
        ({"do_sample": True}, 1.0),
        ({"do_sample": True, "temperature": None}, 1.0),
        ({"temperature": 0.5}, 0.5),
        ({"temperature": 1.0}, 0.0),
        ({"typical_p": 0.2}, 1.0),
        ({"top_k": 5, "temperature": 0.7}, 0.7),
        ({"top_p": 0.9}, 1.0),
    ],
)
def test_what_departs_from_neutral_is_sampled_as_in_tgi(
    serving: Serving, parameters: dict[str, Any], temperature: float
) -> None:
    details = generate(serving, "Hi", details=True, **parameters)["details"]
    assert engine_of(serving).seen[-1].params.temperature == temperature
    assert (details["seed"] is None) == (temperature == 0)


def test_falconlites_call_is_understood(serving: Serving) -> None:
    settings = {"do_sample": True, "max_new_tokens": 250, "typical_p": 0.2, "temperature": None,
                "truncate": None, "seed": 1, "use_cache": True}  # fmt: skip
    settings["max_new_tokens"] = 50
    details = generate(serving, "Hi", details=True, **settings)["details"]
    params = engine_of(serving).seen[-1].params
    assert (params.typical_p, params.seed, params.temperature) == (0.2, 1, 1.0)
    assert details["seed"] == 1


def test_best_of_gives_the_answer_of_highest_mean_log_probability(
    byte_tokenizer: Tokenizer,
) -> None:
    def answer(request: Request, n: int) -> list[Any]:
        ids = [64, 65, 256] if n == 0 else [66, 67, 68, 256]
        events = ScriptedEngine(byte_tokenizer).say(request, ids, seed=n + 1)
        logprob = (-1.0, -0.5)[n]  # the second is longer, and less likely in sum
        for event in events:
            if hasattr(event, "logprob"):
                object.__setattr__(event, "logprob", logprob)
        return events

    serving = serving_of(byte_tokenizer, engine={"answer": answer})
    told = generate(serving, "Hi", best_of=2, do_sample=True, details=True)
    assert told["generated_text"] == "cde"
    assert told["details"]["seed"] == 2
    (other,) = told["details"]["best_of_sequences"]
    assert (other["generated_text"], other["seed"]) == ("ab", 1)
    assert set(other) == {
        "generated_text", "finish_reason", "generated_tokens", "seed", "prefill", "tokens",
    }  # fmt: skip
    assert len(engine_of(serving).seen) == 2


def test_headers_have_the_units_of_tgi_3(serving: Serving) -> None:
    answer = ask(serving, "/generate", {"inputs": "Hé", "parameters": {"max_new_tokens": 2}})
    told = answer.headers
    assert told["x-compute-type"] == "cpu+optimized"
    assert told["x-compute-characters"] == "2"
    assert told["x-prompt-tokens"] == "3"
    assert told["x-generated-tokens"] == "2"
    assert re.fullmatch(r"\d+\.\d+", told["x-compute-time"])  # seconds
    # milliseconds: the script waits 0.25 s, reads for 0.5 s, generates for 1.5 s
    assert told["x-queue-time"] == "250"
    assert told["x-inference-time"] == "2000"
    assert told["x-time-per-token"] == "1000"
    assert told["x-total-time"].isdecimal()
    assert told["x-validation-time"].isdecimal()


def test_the_root_answers_with_a_list_of_one(serving: Serving) -> None:
    for path in ("/", "/invocations"):
        answer = ask(serving, path, {"inputs": "Hello", "stream": False})
        assert answer.json() == [{"generated_text": "Hello"}], path


def test_invocations_takes_openais_bodies(serving: Serving) -> None:
    answer = ask(serving, "/invocations", {"prompt": "Hello", "max_tokens": 2})
    assert answer.json()["choices"][0]["text"] == "He"
    refused = ask(serving, "/invocations", {"messages": 5})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "messages"
    neither = ask(serving, "/invocations", {"text": "?"})
    assert neither.status_code == 422
    assert neither.json()["error_type"] == "validation"


@pytest.mark.parametrize(
    ("kind", "status", "error_type", "text"),
    [
        ("request", 422, "validation", "Input validation error: too deep"),
        ("generation", 424, "generation", "Request failed during generation: too deep"),
        ("engine", 503, "generation", "Request failed during generation: too deep"),
    ],
)
def test_a_failed_answer_has_the_status_of_whose_fault_it_was(
    byte_tokenizer: Tokenizer, kind: str, status: int, error_type: str, text: str
) -> None:
    failed = Failed(kind=kind, message="too deep")
    serving = serving_of(byte_tokenizer, engine={"answer": lambda request, n: [failed]})
    answer = ask(serving, "/generate", {"inputs": "H"})
    assert answer.status_code == status
    assert answer.json() == {"error": text, "error_type": error_type}
    assert ("retry-after" in answer.headers) == (status == 503)


def test_an_answer_without_an_end_is_called_incomplete(byte_tokenizer: Tokenizer) -> None:
    serving = serving_of(byte_tokenizer, engine={"answer": lambda request, n: []})
    answer = ask(serving, "/generate", {"inputs": "H"})
    assert answer.status_code == 500
    assert answer.json() == {
        "error": "Incomplete generation", "error_type": "incomplete_generation",
    }  # fmt: skip


def test_a_long_prompt_is_tokenised_in_a_thread_to_the_same_ids(byte_tokenizer: Tokenizer) -> None:
    serving = serving_of(byte_tokenizer, max_input_len=5000, max_total_len=6000)
    generate(serving, "abc" * 1000, max_new_tokens=1)
    assert engine_of(serving).seen[-1].prompt_ids == (64, 65, 66) * 1000


def test_tokenize_speaks_tgi_and_vllm(serving: Serving) -> None:
    assert ask(serving, "/tokenize", {"inputs": "Hé<end>"}).json() == [
        {"id": 39, "text": "H", "start": 0, "stop": 1},
        {"id": 127, "text": "", "start": 1, "stop": 1},
        {"id": 102, "text": "é", "start": 1, "stop": 2},
        {"id": 256, "text": "<end>", "start": 2, "stop": 7},
    ]
    assert ask(serving, "/tokenize", {"prompt": "ab"}).json() == {
        "count": 2, "max_model_len": 120, "tokens": [64, 65],
    }  # fmt: skip
    named = ask(serving, "/tokenize", {"prompt": "ab", "return_token_strs": True}).json()
    assert named["token_strs"] == ["a", "b"]
    assert ask(serving, "/detokenize", {"tokens": [64, 256]}).json() == {"prompt": "a<end>"}
    for body in ({}, {"inputs": "a", "prompt": "b"}):
        assert ask(serving, "/tokenize", body).status_code == 422
    unknown = ask(serving, "/detokenize", {"tokens": [999]})
    assert unknown.status_code == 422
    assert "999" in unknown.json()["error"]


def test_chats_without_a_template_are_a_template_error(serving: Serving) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    for path in ("/chat_tokenize", "/tokenize"):
        answer = ask(serving, path, {"messages": messages})
        assert answer.status_code == 422, path
        assert answer.json()["error_type"] == "template_error"
        assert answer.json()["error"].startswith("Template error: ")


def test_chat_tokenize_gives_text_and_tokens() -> None:
    from openai_app import tokenizer  # a model with a chat template

    serving = serving_of(tokenizer())
    messages = [{"role": "user", "content": "Hi"}]
    told = ask(serving, "/chat_tokenize", {"messages": messages}).json()
    assert told["templated_text"] == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert "".join(t["text"] for t in told["tokenize_response"]) == told["templated_text"]
    ids = ask(serving, "/tokenize", {"messages": messages}).json()["tokens"]
    assert ids == [token["id"] for token in told["tokenize_response"]]


def test_info_has_the_fields_of_both_versions_and_the_ladder(serving: Serving) -> None:
    told = ask(serving, "/info").json()
    assert told["max_input_length"] == told["max_input_tokens"] == 100
    assert told["max_total_tokens"] == 120
    assert told["model_id"] == "owner/scripted"
    assert told["max_batch_total_tokens"] == 64 * 16
    assert (told["rope_method"], told["rope_rungs"]) == ("dynamic", [128, 256])
    wanted = {
        "model_id", "model_sha", "model_dtype", "model_device_type", "model_pipeline_tag",
        "max_concurrent_requests", "max_best_of", "max_stop_sequences", "waiting_served_ratio",
        "max_waiting_tokens", "validation_workers", "max_client_batch_size", "router", "version",
        "sha", "docker_label",
    }  # fmt: skip
    assert wanted <= set(told)
