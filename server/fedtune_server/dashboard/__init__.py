"""The coordinator's web page: what its runs and sites do now, for a person with the token.

It only reads. `serving` starts it beside the gRPC services; `model` says what is shown,
`feed` sends changes, `login` decides who sees them, `metrics` says the same to Prometheus, with
the page or without. FastAPI is imported by `serving` and `app` alone.
"""
