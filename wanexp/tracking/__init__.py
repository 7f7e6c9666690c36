"""What becomes of a record: MLflow runs, and the view of them."""
