"""Experiment trackers: the seam between a run and the clients of TensorBoard, Weights & Biases, MLflow and SwanLab."""
