"""What `BoundedProtocol` relies on inside uvicorn: an upgrade that changes it must fail here."""

from __future__ import annotations

import inspect

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from tidegate.http.uvicorn_protocol import BoundedProtocol, bounded


def test_every_method_that_we_override_is_still_there_with_its_parameters() -> None:
    ours = {
        name: method
        for name, method in vars(BoundedProtocol).items()
        if inspect.isfunction(method) and hasattr(HttpToolsProtocol, name) and name != "__init__"
    }
    assert set(ours) == {
        *("connection_made", "connection_lost", "data_received", "pause_writing"),
        *("resume_writing", "shutdown", "timeout_keep_alive_handler", "send_400_response"),
        *("on_message_begin", "on_header", "on_headers_complete", "on_body"),
        *("on_message_complete", "on_response_complete", "_start_asgi_task"),
        *("_unsupported_upgrade_warning", "_unset_keepalive_if_required"),
    }
    for name, method in ours.items():
        theirs = inspect.signature(getattr(HttpToolsProtocol, name)).parameters
        assert list(inspect.signature(method).parameters) == list(theirs), name


def test_uvicorn_still_calls_and_reads_what_we_hang_on() -> None:
    source = inspect.getsource(HttpToolsProtocol)
    for relied_on in (
        "self._start_asgi_task(self.cycle, app)",
        "self._start_asgi_task(cycle, app)",
        "on_response=self.on_response_complete",
        "self.send_400_response(msg)",
        "self.pipeline.appendleft",
        "self._unset_keepalive_if_required()",
        # What follows we do ourselves, so that each request costs less.
        "task.add_done_callback(self.tasks.discard)\n        self.tasks.add(task)",
    ):
        assert relied_on in source
    cycle = inspect.getsource(RequestResponseCycle)
    for relied_on in (
        "if not self.keep_alive:\n                    self.transport.close()",
        "self.more_body",
        "self.disconnected",
        "self.message_event.set()",
        'name == b"connection"',
    ):
        assert relied_on in cycle


def test_a_request_keeps_its_state_where_direct_answers_look_for_it() -> None:
    cycle = inspect.getsource(RequestResponseCycle)
    for relied_on in (
        "self.body = bytearray()",
        "self.waiting_for_100_continue",
        "self.message_event.clear()",
        "self.default_headers",
        "self.response_started = True",
        "self.response_complete = True",
        "self.keep_alive",
        "self.on_response()",
        "if self.flow.write_paused and not self.disconnected:\n            await self.flow.drain()",
    ):
        assert relied_on in cycle


def test_what_we_do_instead_of_uvicorn_is_what_it_does() -> None:
    assert inspect.getsource(HttpToolsProtocol.on_header).splitlines()[1:] == [
        "        name = name.lower()",
        '        if name == b"expect" and value.lower() == b"100-continue":',
        "            self.expect_100_continue = True",
        "        self.headers.append((name, value))",
    ]
    ends = inspect.getsource(HttpToolsProtocol.on_response_complete)
    said = [line.strip() for line in ends.splitlines()[1:]]
    assert [line for line in said if line and not line.startswith("#")] == [
        "self.server_state.total_requests += 1",
        "if self.transport.is_closing():",
        "return",
        "self._unset_keepalive_if_required()",
        "self.flow.resume_reading()",
        "if self.pipeline:",
        "cycle, app = self.pipeline.pop()",
        "self._start_asgi_task(cycle, app)",
        "else:",
        "self.timeout_keep_alive_task = self.loop.call_later(",
        "self.timeout_keep_alive, self.timeout_keep_alive_handler",
        ")",
    ]


def test_the_timers_come_from_the_settings() -> None:
    protocol = bounded(receive_timeout_ms=2_000, stalled_reader_ms=10_000)
    assert issubclass(protocol, BoundedProtocol)
    assert (protocol.HEAD_TIMEOUT_S, protocol.STALLED_READER_S) == (2.0, 15.0)
