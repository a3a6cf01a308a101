"""A response's output items and the events of its stream, in the order that OpenAI's clients expect."""

from __future__ import annotations

import json
import time
from json.encoder import encode_basestring_ascii as quoted
from typing import Any

from lapis.api.protocol.chat import ChatLogprob
from lapis.api.protocol.items import new_item_id
from lapis.api.protocol.responses import OutputCall, OutputMessage, OutputText, ResponseObject, ResponseUsage
from lapis.tokenizer.tool_parser import ToolCallDelta


class ResponseWriter:
    """Takes what the model says; gives the events about it and collects `response.output`.

    Events are numbered without a gap. A message is opened by its first text and closed by a call or the end.
    """

    def __init__(self, response: ResponseObject) -> None:
        self.response = response
        self._number = 0
        self._message: OutputMessage | None = None
        self._texts: list[str] = []
        self._logprobs: list[ChatLogprob] = []
        self._before = ""  # of the events that carry text: everything in front of it

    def begin(self) -> str:
        """The first two events."""
        return self._about("response.created") + self._about("response.in_progress")

    def text(self, text: str, logprobs: list[ChatLogprob] | None = None) -> str:
        """The model said something."""
        events = self._open() if self._message is None else ""
        self._texts.append(text)
        written = "[]"
        if logprobs:
            self._logprobs += logprobs
            written = json.dumps([logprob.model_dump() for logprob in logprobs])
        number, self._number = self._number, self._number + 1
        # By hand: this is done for every token.
        return f'{events}{self._before}{quoted(text)},"logprobs":{written},"sequence_number":{number}}}\n\n'

    def call(self, call: ToolCallDelta) -> str:
        """The model asks for a call."""
        events = self._close("completed")
        item = OutputCall(
            id=new_item_id("fc"), status="in_progress", call_id=call.id, name=call.name, arguments=""
        )
        place = {"item_id": item.id, "output_index": len(self.response.output)}
        events += self._item("response.output_item.added", item)
        events += self._event("response.function_call_arguments.delta", **place, delta=call.arguments)
        done = item.model_copy(update={"status": "completed", "arguments": call.arguments})
        events += self._event(
            "response.function_call_arguments.done", **place, name=call.name, arguments=call.arguments
        )
        events += self._item("response.output_item.done", done)
        self.response.output.append(done)
        return events

    def end(self, *, cut: bool, usage: ResponseUsage) -> str:
        """The model has ended; `cut` when it ran into the limit of tokens."""
        status = "incomplete" if cut else "completed"
        events = self._open() if self._message is None and not self.response.output else ""
        events += self._close(status)
        response = self.response
        response.status = "incomplete" if cut else "completed"
        response.incomplete_details = {"reason": "max_output_tokens"} if cut else None
        response.completed_at = None if cut else int(time.time())
        response.usage = usage
        return events

    def last(self) -> str:
        """The last event."""
        return self._about(f"response.{self.response.status}")

    def fail(self, message: str) -> str:
        """The engine failed: what there is of the answer is incomplete."""
        events = self._close("incomplete")
        self.response.status = "failed"
        self.response.error = {"code": "server_error", "message": message}
        return events + self.last()

    def _open(self) -> str:
        item = OutputMessage(id=new_item_id("msg"), status="in_progress", content=[])
        self._message = item
        place = {"item_id": item.id, "output_index": len(self.response.output), "content_index": 0}
        kind = "response.output_text.delta"
        head = json.dumps({"type": kind, **place}, separators=(",", ":"))
        self._before = f'event: {kind}\ndata: {head[:-1]},"delta":'
        part = OutputText(text="").model_dump()
        return self._item("response.output_item.added", item) + self._event(
            "response.content_part.added", **place, part=part
        )

    def _close(self, status: str) -> str:
        if self._message is None:
            return ""
        part = OutputText(text="".join(self._texts), logprobs=self._logprobs)
        done = self._message.model_copy(update={"status": status, "content": [part]})
        place = {"item_id": done.id, "output_index": len(self.response.output), "content_index": 0}
        shown = part.model_dump()
        events = (
            self._event("response.output_text.done", **place, text=part.text, logprobs=shown["logprobs"])
            + self._event("response.content_part.done", **place, part=shown)
            + self._item("response.output_item.done", done)
        )
        self.response.output.append(done)
        self._message, self._texts, self._logprobs = None, [], []
        return events

    def _item(self, kind: str, item: OutputMessage | OutputCall) -> str:
        return self._event(kind, output_index=len(self.response.output), item=item.model_dump())

    def _about(self, kind: str) -> str:
        return self._event(kind, response=self.response.model_dump())

    def _event(self, kind: str, **fields: Any) -> str:
        number, self._number = self._number, self._number + 1
        data = json.dumps({"type": kind, **fields, "sequence_number": number}, separators=(",", ":"))
        return f"event: {kind}\ndata: {data}\n\n"
