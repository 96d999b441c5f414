"""Environment variables with which a start tells its ranks about the run. No MLX, so that launching needs none."""

STATUS_FILE = "HIPPO_STATUS_FILE"
"""Path of the file for rank 0's exit status, which mlx.launch swallows."""
RUN_KEY = "HIPPO_RUN_KEY"
"""The key that all ranks of a run have been given."""
CONSOLE = "HIPPO_CONSOLE"
"""Path of the socket where rank 0 fetches the standard streams of ./launch/run."""
