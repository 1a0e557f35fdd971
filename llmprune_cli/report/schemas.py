"""The documents that are printed or written as JSON, and the schemas that describe these."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter

from llmprune_cli.folder.manifest import Manifest
from llmprune_cli.plan.document import Plan
from llmprune_cli.plan.stored import PLAN_VERSION
from llmprune_cli.report.json_results import (
    EvalReport,
    ExportResult,
    InspectResult,
    PruneResult,
    PushResult,
    RecoverResult,
    SensitivityResult,
    SweepResult,
    VerifyResult,
)

# Every document that is printed or written, by the name of its schema.
DOCUMENTS: dict[str, type] = {
    "inspect": InspectResult,
    "inspect-verify": VerifyResult,
    "inspect-sensitivity": SensitivityResult,
    "prune": PruneResult,
    "recover": RecoverResult,
    "sweep": SweepResult,
    "eval": EvalReport,
    "export": ExportResult,
    "push": PushResult,
    "plan": Plan,
    "manifest": Manifest,
}


def adapter_of(kind: Any) -> TypeAdapter[Any]:
    """What reads and writes values of a type."""
    return TypeAdapter(kind)


def schema_of(name: str) -> dict[str, Any]:
    """The JSON schema of a document, as it is written."""
    schema = adapter_of(DOCUMENTS[name]).json_schema(mode="serialization")
    if name == "plan":
        schema["properties"] = {"plan_version": {"const": PLAN_VERSION}, **schema["properties"]}
        schema["required"] = ["plan_version", *schema["required"]]
    return schema
