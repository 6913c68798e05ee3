"""The clients that people have, unmodified, against a live server."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from server_of import Live, engine_of, running, serving_of

from longwing.tokenizer import Tokenizer


@pytest.fixture
def live(byte_tokenizer: Tokenizer) -> Iterator[Live]:
    with running(serving_of(byte_tokenizer, port=0, enable_prefill_logprobs=True)) as server:
        yield server


@pytest.mark.slow
def test_the_official_client_is_content(live: Live, official_python: Path) -> None:
    script = Path(__file__).with_name("official_tgi.py")
    done = subprocess.run(
        [str(official_python), str(script), live.url], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "all well"


def test_hugging_faces_client_is_content(live: Live) -> None:
    hub = pytest.importorskip("huggingface_hub")
    client = hub.InferenceClient(live.url, timeout=20)
    assert client.text_generation("test", max_new_tokens=2) == "te"
    told = client.text_generation(
        "test", details=True, do_sample=True, seed=4, stop=["s"], top_n_tokens=2,
        decoder_input_details=True, return_full_text=True,
    )  # fmt: skip
    assert told.generated_text == "testtes"
    assert (told.details.finish_reason, told.details.seed) == ("stop_sequence", 4)
    assert len(told.details.prefill) == 4
    parts = list(client.text_generation("test", stream=True))
    assert "".join(parts) == "test<end>"  # this client shows special tokens
    events = list(client.text_generation("test", stream=True, details=True))
    assert events[-1].generated_text == "test"
    assert events[-1].details.generated_tokens == 5
    assert [event.index for event in events] == [1, 2, 3, 4, 5]
    text = client.text_generation("test", grammar={"type": "regex", "value": "[a-z]+"})
    assert text == "test"
    with pytest.raises(hub.errors.ValidationError, match="must be <= 120"):
        client.text_generation("test", max_new_tokens=1000)
    live.call(lambda: setattr(engine_of(live.serving), "max_requests", 0))
    with pytest.raises(hub.errors.OverloadedError):
        client.text_generation("test")
