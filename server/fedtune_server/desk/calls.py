"""What every gRPC call goes through: who calls, how often, and refusals as status codes."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any

import grpc

from fedtune.deploy.channel import one_line
from fedtune.errors import AccessError, FedtuneError
from fedtune_server.desk.credentials import RIGHTS, Caller, Gate
from fedtune_server.desk.presence import Presence
from fedtune_server.desk.queue import UnknownRunError
from fedtune_server.desk.rates import PeerRates
from fedtune_server.desk.telemetry import AUTH_REFUSALS, CALLS

_log = logging.getLogger(__name__)

_caller: ContextVar[Caller] = ContextVar("caller")

_WRONG_PER_S, _WRONG_BURST = 0.5, 20.0
"""Calls with a wrong token from one address; guesses are 256 bits, the limit keeps logs short."""


class CallRefusedError(FedtuneError):
    """A call is refused with a status code of its own."""

    def __init__(self, code: grpc.StatusCode, reason: str) -> None:
        super().__init__(reason)
        self.code = code


def caller() -> Caller:
    """Who the call that is being answered comes from."""
    return _caller.get()


class Guard(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc has no types
    """Admits or refuses every call, and turns errors into status codes.

    Args:
        per_s, burst: calls of one caller.
    """

    def __init__(self, gate: Gate, presence: Presence, per_s: float, burst: float) -> None:
        self._gate, self._presence = gate, presence
        self._rates = PeerRates(per_s, burst)
        self._wrong = PeerRates(_WRONG_PER_S, _WRONG_BURST)

    async def intercept_service(self, continuation: Any, details: Any) -> Any:  # grpc's own types
        """The handler of a method, behind the guard."""
        handler = await continuation(details)
        metadata = {key: value for key, value in details.invocation_metadata or ()}
        if handler is None:
            return None
        return self._guarded(handler, details.method, metadata)

    def _guarded(self, handler: Any, method: str, metadata: Mapping[str, Any]) -> Any:
        async def one(request: Any, context: Any) -> Any:
            async with self._call(method, metadata, context):
                return await inner(request, context)

        async def many(request: Any, context: Any) -> AsyncIterator[Any]:
            async with self._call(method, metadata, context):
                found = inner(request, context)
                if not inspect.isasyncgen(found):
                    await found  # it writes by itself
                    return
                async for reply in found:
                    yield reply

        kinds = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")
        kind = kinds[2 * bool(handler.request_streaming) + bool(handler.response_streaming)]
        inner = getattr(handler, kind)
        make = getattr(grpc, f"{kind}_rpc_method_handler")
        return make(
            many if handler.response_streaming else one,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    @asynccontextmanager
    async def _call(
        self, method: str, metadata: Mapping[str, Any], context: Any
    ) -> AsyncIterator[None]:
        code = grpc.StatusCode.OK
        try:
            _caller.set(self._admit(method, metadata, _address(context.peer())))
            yield
        except FedtuneError as error:
            code = _code(error)
            await context.abort(code, one_line(str(error), 1000))
        except (asyncio.CancelledError, GeneratorExit):
            code = grpc.StatusCode.CANCELLED
            raise
        except grpc.aio.AbortError:
            code = context.code() or grpc.StatusCode.UNKNOWN
            raise
        except Exception:  # noqa: BLE001  at the edge of the process: logged in full, told in short
            _log.exception("a fault while answering %s", method)
            code = grpc.StatusCode.INTERNAL
            await context.abort(code, "a fault at the coordinator; see its logs/desk.log")
        finally:
            # Only names that are known: labels are kept for ever.
            CALLS.labels(method if method in RIGHTS else "other", code.name).inc()

    def _admit(self, method: str, metadata: Mapping[str, Any], address: str) -> Caller:
        texts = {key: value for key, value in metadata.items() if isinstance(value, str)}
        try:
            found = self._gate.admit(method, texts)
        except AccessError as error:
            if not self._wrong.take(address):
                AUTH_REFUSALS.labels("too many").inc()
                raise _too_many() from None
            AUTH_REFUSALS.labels("token or right").inc()
            self._presence.refuse(address, "call", str(error))
            _log.warning("%s was refused %s: %s", address, method, error)
            raise
        who = address if found.role == "anyone" else f"{found.role} {found.name}"
        if not self._rates.take(who):
            raise _too_many()
        return found


def _too_many() -> CallRefusedError:
    return CallRefusedError(
        grpc.StatusCode.RESOURCE_EXHAUSTED, "too many calls; wait a few seconds and try again"
    )


def _code(error: FedtuneError) -> grpc.StatusCode:
    if isinstance(error, CallRefusedError):
        return error.code
    if isinstance(error, AccessError):
        return grpc.StatusCode.PERMISSION_DENIED
    if isinstance(error, UnknownRunError):
        return grpc.StatusCode.NOT_FOUND
    return grpc.StatusCode.FAILED_PRECONDITION


def _address(peer: str) -> str:
    """The address in `ipv4:127.0.0.1:4711`, without the port, which each connection has anew."""
    return one_line(peer.rpartition(":")[0] or peer, 200)
