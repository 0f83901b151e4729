"""Database and files: tables, runs, leases. Knows SQLAlchemy; never imports optuna, torch, tuner or models."""
