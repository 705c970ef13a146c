"""Experiment tracking: metrics, parameters, costs and model cards. The only package that imports mlflow."""
