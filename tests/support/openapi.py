"""Compares answers of the HTTP API with its document, worker/web/openapi.json."""

from __future__ import annotations

import json
import re
from functools import cache
from importlib.resources import files
from typing import Any

import jsonschema_rs

DOCUMENT: dict[str, Any] = json.loads(files("worker.web").joinpath("openapi.json").read_bytes())
# A slash in an id may stand for itself. Longer paths first: `/v1/views/<id>/history` is no id.
PATHS = {re.compile(re.sub(r"{\w+}", ".+", path)): path for path in sorted(DOCUMENT["paths"], key=len, reverse=True)}


def assert_documented(path: str, code: int, body: object) -> None:
    """The document has this status code for this path, and its schema allows this body.

    A path that is not in the document answers an error, or is not of the API.
    """
    template = next((template for pattern, template in PATHS.items() if pattern.fullmatch(path)), None)
    if template is not None:
        validator(template, code).validate(body)
    elif path.startswith("/v1/"):
        assert code >= 400, f"{path} is not documented"


@cache
def validator(template: str, code: int) -> jsonschema_rs.Validator:
    responses = DOCUMENT["paths"][template]["get"]["responses"]
    assert str(code) in responses, f"{template}: {code} is not documented"
    response = responses[str(code)]
    if "$ref" in response:
        response = DOCUMENT["components"]["responses"][response["$ref"].rpartition("/")[2]]
    schema = response["content"]["application/json"]["schema"]
    whole = {"components": DOCUMENT["components"], "allOf": [schema]}
    return jsonschema_rs.Draft202012Validator(whole, validate_formats=True)
