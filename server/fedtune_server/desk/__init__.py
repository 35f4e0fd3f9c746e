"""The coordinator's desk: who asks for runs, which of them are played, and what is told of them.

Operators and sites reach it over gRPC; training goes over Flower's link and never through here.
"""
