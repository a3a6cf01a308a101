"""/v1/fine_tuning/alpha/graders: a grader by itself, before it decides what a model learns."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Request

from lapis.api.auth import ServicesOf, Worker
from lapis.api.body import json_body, json_schema
from lapis.api.protocol.graders import (
    GraderRunRequest,
    GraderRunResponse,
    GraderValidateRequest,
    GraderValidateResponse,
    grader_object,
    grader_run_response,
)
from lapis.api.streaming import while_connected
from lapis.evaluate.graders.python_grader import PythonSandbox

router = APIRouter(prefix="/v1/fine_tuning/alpha/graders")
Run = Annotated[GraderRunRequest, Depends(json_body(GraderRunRequest))]
Validate = Annotated[GraderValidateRequest, Depends(json_body(GraderValidateRequest))]


@router.post("/run", openapi_extra=json_schema(GraderRunRequest))
async def run_grader(request: Request, services: ServicesOf, caller: Worker, body: Run) -> GraderRunResponse:
    """What a sample is worth. What goes wrong while it is graded stands in the answer; hanging up ends it."""
    with PythonSandbox() as sandbox:
        work = services.graders.grade(caller, body.grader, body.model_sample, body.item, sandbox)
        grading = await while_connected(request.receive, work)
    return grader_run_response(grading)


@router.post("/validate", openapi_extra=json_schema(GraderValidateRequest))
async def validate_grader(services: ServicesOf, caller: Worker, body: Validate) -> GraderValidateResponse:
    """Check a grader: its fields, its models, its formula, and that its program loads."""
    with PythonSandbox() as sandbox:
        await services.graders.check(caller, body.grader, sandbox)
    return GraderValidateResponse(grader=grader_object(body.grader))
