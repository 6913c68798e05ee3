"""A server of longwing-tiny answers from a real document as the plain path does."""

from pathlib import Path

import httpx
from live_engine import serving

from longwing.engine.generator import Generator

DOCUMENT = Path(__file__).parents[2] / "docs" / "harbour.txt"
QUESTION = "What is the door code of the ferry house?"


def test_both_dialects_answer_from_a_document_as_the_plain_path_does(
    tiny_model: Generator, tiny_model_folder: Path
) -> None:
    prompt = f"{DOCUMENT.read_text(encoding='utf-8').rstrip()}\n\n{QUESTION}"
    messages = [{"role": "user", "content": prompt}]
    prompt_ids = tiny_model.tokenizer.chat(messages)
    expected = tiny_model.generate(prompt_ids, max_new_tokens=24)
    inputs = f"<|prompter|>{prompt}<|endoftext|><|assistant|>"
    drafting = {"max_batch_tokens": 200, "max_draft": 4, "draft_sequences": 4}
    with serving(tiny_model_folder, engine=drafting) as live:
        body = {"inputs": inputs, "parameters": {"max_new_tokens": 24, "details": True}}
        tgi = httpx.post(f"{live.url}/generate", json=body, timeout=60).json()
        chat = {"model": "tiny", "messages": messages, "max_tokens": 24, "temperature": 0}
        openai = httpx.post(f"{live.url}/v1/chat/completions", json=chat, timeout=60).json()
    assert "20418" in expected.text
    assert tgi["generated_text"] == expected.text
    assert [token["id"] for token in tgi["details"]["tokens"]] == expected.token_ids
    assert openai["choices"][0]["message"]["content"] == expected.text
    assert openai["usage"]["prompt_tokens"] == len(prompt_ids)
