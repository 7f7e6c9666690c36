"""What stands behind `wanexp.multi_gpu_utils`, one file a subject. Import from there."""
