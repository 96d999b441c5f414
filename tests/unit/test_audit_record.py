"""What an audit log says of a request: what was asked, in the words that it was asked in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hippo_mpi.config.bundled import BUNDLED_MODEL
from hippo_mpi.protocols.openai_requests import COMPLETION, read_body
from hippo_mpi.serve import make_parser
from hippo_mpi.serving.api.audit_log import AuditLog
from hippo_mpi.serving.api.audit_record import EndedRequest, request_record
from hippo_mpi.serving.supervision.catalogue import ServedModel


@pytest.mark.parametrize(
    ("asked", "written"),
    [
        ({"ignore_eos": True}, {"ignore_eos": True}),
        ({"ignore_eos": False}, {}),
        ({"ignore_eos": True, "min_tokens": 5}, {"ignore_eos": True}),
        ({"min_tokens": 5}, {"min_tokens": 5}),
        ({"min_tokens": 1 << 30}, {"min_tokens": 1 << 30}),
    ],
)
def test_parameters_are_what_was_asked(tmp_path: Path, asked: dict[str, Any], written: dict[str, Any]) -> None:
    model = ServedModel("story", make_parser().read(["--model", str(BUNDLED_MODEL)]))
    sampling = read_body(COMPLETION, {"prompt": "A fox", **asked}, model.defaults).sampling
    log = AuditLog(tmp_path / "audit.jsonl")
    record = request_record(log, EndedRequest("x", None, COMPLETION, sampling, [[1]], [([2], "stop")]), model)
    log.close()
    record["parameters"].pop("max_tokens", None)
    assert record["parameters"] == written
