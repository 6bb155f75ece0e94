"""What a run measures, shown in TensorBoard, W&B, MLflow and Trackio."""
