"""The coordinator: Flower ServerApp, rounds, ledger, checkpoints and simulation."""
