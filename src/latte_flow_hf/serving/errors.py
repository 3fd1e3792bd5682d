# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Errors in the form that clients of OpenAI read: `{"error": {"message", "type", "param", "code"}}`."""

from fastapi.responses import JSONResponse


# OpenAI's `type` of each status; all others are "server_error" or "invalid_request_error".
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An error that a client is told.

    Args:
        status (`int`): the HTTP status.
        message (`str`): what is wrong and what would be accepted.
        code (`str`, *optional*): what programs can rely on.
        param (`str`, *optional*): the field of the request.
        headers (`dict[str, str]`, *optional*): headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.headers = status, message, code, param, headers

    def body(self) -> dict[str, dict[str, str | None]]:
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {
            "error": {
                # Names of fields may contain what UTF-8 cannot encode.
                "message": self.message.encode("utf-8", "backslashreplace").decode(),
                "type": kind,
                "param": None if self.param is None else self.param.encode("utf-8", "backslashreplace").decode(),
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)
