"""schemathesis makes up calls from /openapi.json: no server error, and what comes back is in it."""

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from openai_app import says, serving
from schemathesis.specs.openapi.checks import positive_data_acceptance, unsupported_method

from longwing.server.app import make_app

# What fits the document can still not fit the model: a prompt that is too long, an unknown model.
EXCLUDED: Any = [positive_data_acceptance, unsupported_method]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize("part", ["/v1/", "/"])
@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
def test_no_call_that_can_be_made_up_is_a_server_error(part: str, mode: Any) -> None:
    app = make_app(serving(says("ok"), allowed_hosts=("testserver",)))
    api = schemathesis.openapi.from_asgi("/openapi.json", app)
    num_operations = 0
    for found in api.get_all_operations():
        operation = found.ok()
        is_simple = mode is schemathesis.GenerationMode.NEGATIVE and not operation.body
        if is_simple or operation.path.startswith("/v1/") != (part == "/v1/"):
            continue
        num_operations += 1

        @settings(
            max_examples=20, deadline=None, database=None, derandomize=True,
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(case=operation.as_strategy(generation_mode=mode))
        def check(case: Any) -> None:
            case.call_and_validate(excluded_checks=EXCLUDED)

        check()
    assert num_operations >= 2
